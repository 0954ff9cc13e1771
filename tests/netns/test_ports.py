"""Which links of containers have lost their bridge, between real namespaces."""

import subprocess
from ipaddress import IPv4Network

import pytest

from meshd.errors import ApplyError
from meshd.net.ports import Ports
from meshd.net.resources import Action, Change, Port
from tests.netns.conftest import Namespace

pytestmark = pytest.mark.root

OVERLAY = IPv4Network("172.20.0.0/16")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def container(link: str, within: Namespace, address: str) -> None:
    """Lay a cable from here to a namespace, as Docker does for a container."""
    ip("link", "add", link, "type", "veth", "peer", "name", f"{link}-eth", "netns", within.name)
    ip("-n", within.name, "addr", "add", address, "dev", f"{link}-eth")


def test_loose_ports_are_containers_without_bridge(
    netns_pair: tuple[Namespace, Namespace],
) -> None:
    """Only a container of this overlay that is on no bridge counts as loose."""
    here, there = netns_pair
    adapter = Ports(OVERLAY)
    with here.entered():
        ip("link", "add", "ovl0", "type", "bridge")
        ip("link", "add", "both", "type", "veth", "peer", "name", "ends")
        ip("addr", "add", "172.20.101.9/16", "dev", "ends")  # in this namespace: not a container's
        container("other", there, "172.17.0.2/16")
        container("narrow", there, "172.20.7.1/24")  # Docker gives the overlay's own length
        container("plugged", there, "172.20.101.1/16")
        ip("link", "set", "plugged", "master", "ovl0")
        container("loose", there, "172.20.101.2/16")
        assert adapter.read() == [Port("loose", None)]

        for _ in range(2):
            adapter.apply(Change(Action.SET, Port("loose", "ovl0"), Port("loose", None)))
        assert adapter.read() == []
        assert " loose@" in ip("link", "show", "master", "ovl0")

        ip("link", "del", "ovl0")
        assert sorted(adapter.read(), key=lambda port: port.key) == [Port("loose", None), Port("plugged", None)]


def test_attach_of_ended_container_is_harmless(netns_pair: tuple[Namespace, Namespace]) -> None:
    """The port of a container that has just ended raises no error."""
    with netns_pair[0].entered():
        ip("link", "add", "ovl0", "type", "bridge")
        Ports(OVERLAY).apply(Change(Action.SET, Port("gone", "ovl0")))


def test_attach_without_bridge_raises_error(netns_pair: tuple[Namespace, Namespace]) -> None:
    """The error says that there is no bridge."""
    with netns_pair[0].entered(), pytest.raises(ApplyError, match="setting port loose of ovl0: there is no bridge"):
        Ports(OVERLAY).apply(Change(Action.SET, Port("loose", "ovl0")))
