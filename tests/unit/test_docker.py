"""What Docker says of a network, read; the engine itself is met in the lab."""

import gc
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from meshd.errors import MissingError
from meshd.net.docker import (
    DockerNetwork,
    _attachment,
    _containers,
    _differences,
    _is_lost,
    _network,
    _subnets,
)
from meshd.net.resources import Action, Network, RunningContainer
from meshd.reconcile import plan

INSPECTED: dict[str, Any] = {
    "Name": "ovl0",
    "Id": "0123",
    "IPAM": {
        "Driver": "default",
        "Config": [{"Subnet": "172.20.0.0/16", "IPRange": "172.20.101.0/24", "Gateway": "172.20.101.0"}],
    },
    "Options": {
        "com.docker.network.bridge.name": "ovl0",
        "com.docker.network.driver.mtu": "1420",
        "com.docker.network.bridge.trusted_host_interfaces": "wg0",
    },
    "Labels": {"meshd.mesh": "meshd"},
}
NETWORK = Network(
    name="ovl0",
    bridge="ovl0",
    subnet=IPv4Network("172.20.0.0/16"),
    ip_range=IPv4Network("172.20.101.0/24"),
    gateway=IPv4Address("172.20.101.0"),
    mtu=1420,
    options=(("com.docker.network.bridge.trusted_host_interfaces", "wg0"),),
)


def test_network_from_inspect_output() -> None:
    """The output of `docker network inspect` is read as a network."""
    assert _network(INSPECTED) == NETWORK


def test_containers_from_inspect_output() -> None:
    """Containers are read with their addresses; one without an address is left out."""
    listed = {"1": {"Name": "box", "IPv4Address": "172.20.101.1/16"}, "2": {"Name": "six", "IPv4Address": ""}}
    assert [*_containers({"Containers": listed})] == [RunningContainer("box", IPv4Address("172.20.101.1"))]
    assert [*_containers({"Containers": None})] == [*_containers({})] == []


@pytest.mark.parametrize("ipam", [None, {}, {"Config": None}, {"Config": [{"Subnet": "10.0.0.0/8"}]}], ids=str)
def test_foreign_network_differs_without_crash(ipam: Any) -> None:
    """A network that someone else made with other settings differs from the desired one and raises no error."""
    found = _network({**INSPECTED, "IPAM": ipam, "Options": None})
    assert found != NETWORK
    assert "subnet" in _differences(found, NETWORK)


def test_what_docker_adds_is_no_difference() -> None:
    """Options of daemon.json, an IPv6 pool and labels that nobody asked for make no other network."""
    config = [{"Subnet": "fdff::/64", "Gateway": "fdff::1"}, *INSPECTED["IPAM"]["Config"]]
    options = {**INSPECTED["Options"], "com.docker.network.bridge.enable_icc": "true"}
    completed = {
        **INSPECTED,
        "EnableIPv6": True,
        "Internal": False,
        "IPAM": {"Driver": "default", "Options": {"any": "thing"}, "Config": config},
        "Options": options,
        "Labels": {**INSPECTED["Labels"], "of": "others"},
    }
    found = _network(completed)
    assert found.without_additions(NETWORK) == NETWORK
    assert plan.diff([NETWORK], [found], now=0) == ()


@pytest.mark.parametrize("value", ["wg1", None])
def test_other_value_of_an_asked_option_is_a_difference(value: str | None) -> None:
    """An option that was asked for and has another value, or none, makes the network another one."""
    name = "com.docker.network.bridge.trusted_host_interfaces"
    options = {key: text for key, text in {**INSPECTED["Options"], name: value}.items() if text is not None}
    found = _network({**INSPECTED, "Options": options})
    assert found.without_additions(NETWORK) != NETWORK
    assert [change.action for change in plan.diff([NETWORK], [found], now=0)] == [Action.SET]


def test_differences_name_both_values() -> None:
    """A difference is shown with the value found and the value wanted."""
    other = _network({**INSPECTED, "Options": {**INSPECTED["Options"], "com.docker.network.driver.mtu": "1500"}})
    assert _differences(other, NETWORK) == "mtu 1500 instead of 1420"


CONTAINER: dict[str, Any] = {
    "Id": "0123456789abcdef",
    "Name": "/web",
    "NetworkSettings": {
        "Networks": {
            "ovl0": {
                "Aliases": ["all of it", "0123456789ab"],
                "Links": ["box:neighbour"],
                "DriverOpts": {"com.docker.network.endpoint.ifname": "ov0"},
                "GwPriority": 7,
                "IPAMConfig": {"IPv4Address": "172.20.101.50"},
                "NetworkID": "gone",
                "IPAddress": "",
            }
        }
    },
}


def test_attachment_has_what_a_user_chose() -> None:
    """An attachment has all that a user chose for a container's place on the network, and its command says it."""
    attachment = _attachment(CONTAINER, "ovl0")
    assert attachment.address == IPv4Address("172.20.101.50")
    assert attachment.settings == {
        "Aliases": ["all of it"],
        "Links": ["box:neighbour"],
        "DriverOpts": {"com.docker.network.endpoint.ifname": "ov0"},
        "GwPriority": 7,
    }
    assert attachment.command("ovl0") == (
        "docker network connect '--alias=all of it' --link=box:neighbour "
        "--driver-opt=com.docker.network.endpoint.ifname=ov0 --gw-priority=7 --ip=172.20.101.50 ovl0 web"
    )


@pytest.mark.parametrize(("known", "lost"), [("gone", True), ("there", False), ("", False), (None, False)])
def test_lost_endpoint_is_of_a_network_that_is_not_there(known: str | None, lost: bool) -> None:
    """A container that knows no ID of its network starts on the one of that name."""
    assert _is_lost({"NetworkID": known}, {"there"}) is lost


def test_subnets_skip_ipv6_pools() -> None:
    """IPv6 pools and empty ones are skipped, as the overlay is IPv4."""
    pools = [{"Subnet": "fd00::/64"}, {"Subnet": "172.20.0.0/16"}, {}]
    assert _subnets({"IPAM": {"Config": pools}}) == [IPv4Network("172.20.0.0/16")]


# The SDK drops the socket whose connect has failed, and Python says so when it collects it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_missing_engine_error_names_remedies(tmp_path: Path) -> None:
    """The error for an absent Docker engine names how to install it and how to go without."""
    bridge = DockerNetwork("meshd", "ovl0", f"unix://{tmp_path}/docker.sock")
    with pytest.raises(MissingError, match=r"Docker engine does not answer.*apt install docker\.io.*--no-docker"):
        bridge.engine()
    gc.collect()
