"""Three hosts without Docker on the kernel's WireGuard, from init to leave, and on an underlay that loses packets."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, eventually, full_reach, members, overlay, peers, ping, settled, snapshot

pytestmark = [pytest.mark.root, pytest.mark.kernel]

# Generous: software emulation makes everything ten times as slow.
SOON = 120


@pytest.fixture(scope="module")
def before(lab: Lab) -> list[str]:
    """What meshd may change, as it was on each host before there was a mesh."""
    lab.up(3, docker=False)
    return [snapshot(host) for host in lab.hosts()]


@pytest.fixture(scope="module")
def hosts(lab: Lab, before: list[str]) -> list[LabHost]:
    assert len(before) == 3
    return assemble(lab, docker=0, plain=3)


def routes(host: LabHost) -> str:
    return host.run(["ip", "-4", "route", "show", "proto", "77"]).stdout


def held(hosts: list[LabHost]) -> list[tuple[list[str], str]]:
    """What each host has of the others: its peers and its routes."""
    return [(peers(host), routes(host)) for host in hosts]


@contextmanager
def netem(lab: Lab, hosts: list[LabHost], *words: str) -> Iterator[None]:
    """Let the underlay treat all that goes to each host as tc-netem(8) says, while the block runs."""
    for host in hosts:
        lab.switch.run(["tc", "qdisc", "add", "dev", host.name, "root", "netem", *words])
    try:
        yield
    finally:
        for host in hosts:
            lab.switch.run(["tc", "qdisc", "del", "dev", host.name, "root"])


def lost(host: LabHost, count: int) -> int:
    """Ping the gateway, outside of the mesh; give how many answers did not come."""
    done = host.run(["busybox", "ping", "-c", str(count), "-W", "1", "10.10.10.1"], check=False)
    return count - done.stdout.count("bytes from")


def test_the_mesh_is_made_of_the_kernels_wireguard(hosts: list[LabHost]) -> None:
    for host in hosts:
        facts = json.loads(host.run(["meshd", "status", "--json"]).stdout)
        assert facts["wireguard"] == "wg0 (kernel), udp port 51820"
        assert facts["problems"] == facts["refused"] == facts["pending"] == []
        assert "wireguard" in host.run(["ip", "-d", "link", "show", "wg0"]).stdout
        assert host.run(["pgrep", "wireguard-go"], check=False).returncode == 1
    eventually(lambda: full_reach(hosts), SOON, "all reach all")
    eventually(lambda: settled(hosts), SOON, "nothing to change")


def test_loss_delay_and_reordering_leave_the_mesh_whole(lab: Lab, hosts: list[LabHost]) -> None:
    whole = held(hosts)
    with netem(lab, hosts, "loss", "10%", "delay", "50ms", "20ms", "reorder", "25%", "50%"):
        assert "loss 10%" in lab.switch.run(["tc", "qdisc", "show", "dev", hosts[0].name]).stdout
        for _ in range(3):
            eventually(lambda: full_reach(hosts), SOON, "all reach all, with retries")
            assert held(hosts) == whole
    eventually(lambda: settled(hosts), SOON, "nothing to change")
    assert held(hosts) == whole


def test_half_of_the_packets_lost_heals_afterwards(lab: Lab, hosts: list[LabHost]) -> None:
    whole = held(hosts)
    with netem(lab, hosts, "loss", "50%"):
        assert lost(hosts[0], 20) > 0, "netem loses nothing: this test shows nothing"
        assert held(hosts) == whole
    eventually(lambda: full_reach(hosts), SOON, "all reach all")
    eventually(lambda: settled(hosts), SOON, "all alive, and nothing to change")
    assert held(hosts) == whole


def test_down_takes_the_device_away_and_up_brings_it_back(hosts: list[LabHost]) -> None:
    last = hosts[2]
    subnet = members(last)[last.name]["subnet"]
    last.run(["meshd", "down"])
    assert "wg0" not in last.run(["ip", "link"]).stdout
    assert not ping(hosts[0], overlay(last))
    last.run(["meshd", "up"], timeout=SOON)
    eventually(lambda: full_reach(hosts), SOON, "all reach all")
    assert members(last)[last.name]["subnet"] == subnet


def test_leave_leaves_no_trace_here_nor_there(hosts: list[LabHost], before: list[str]) -> None:
    first, last = hosts[0], hosts[2]
    last.run(["meshd", "leave"], timeout=SOON)
    eventually(lambda: all(len(peers(host)) == 1 for host in hosts[:2]), SOON, "the others drop its peer")
    assert overlay(last) not in routes(first)
    assert snapshot(last) == before[2]
