"""Three hosts without Docker on the kernel's WireGuard, from init to leave, and on an underlay that loses packets."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import permutations

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, eventually, log, overlay, peers, serf, snapshot

pytestmark = [pytest.mark.root, pytest.mark.kernel]

# Generous: software emulation makes everything ten times as slow, and a `meshd` command takes 5 to 20 s.
SOON = 120


@pytest.fixture(scope="module")
def before(lab: Lab) -> str:
    """What meshd may change, as it was on the last host before there was a mesh."""
    lab.up(3, docker=False)
    return snapshot(lab.hosts()[-1])


@pytest.fixture(scope="module")
def hosts(lab: Lab, before: str) -> list[LabHost]:
    assert "wg0" not in before
    return assemble(lab, docker=0, plain=3)


def routes(host: LabHost) -> str:
    return host.run(["ip", "-4", "route", "show", "proto", "77"]).stdout


def held(hosts: list[LabHost]) -> list[tuple[list[str], str]]:
    """What each host has of the others: its peers and its routes."""
    return [(peers(host), routes(host)) for host in hosts]


def answers(hosts: list[LabHost], count: int = 1) -> list[int]:
    """Ping from every host to every other one `count` times, all at once; give how many answers each had."""

    def ping(pair: tuple[LabHost, LabHost]) -> int:
        command = ["busybox", "ping", "-c", str(count), "-W", "3", overlay(pair[1])]
        return pair[0].run(command, check=False).stdout.count("bytes from")

    with ThreadPoolExecutor() as pool:
        return list(pool.map(ping, permutations(hosts, 2)))


def alive(hosts: list[LabHost]) -> bool:
    """Tell whether Serf on every host has every host alive. It is ten times as fast to ask as meshd."""
    return all(len(re.findall(" alive ", serf(host, "members"))) == len(hosts) for host in hosts)


def at_rest(hosts: list[LabHost]) -> bool:
    """Tell whether all reach all, all are alive, and none has anything to change."""
    if not all(answers(hosts)) or not alive(hosts):
        return False
    with ThreadPoolExecutor() as pool:
        plans = list(pool.map(lambda host: host.run(["meshd", "plan"], check=False).stdout, hosts))
    return plans == ["no changes\n"] * len(hosts)


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


def test_mesh_uses_kernel_wireguard(hosts: list[LabHost]) -> None:
    """The mesh uses the kernel's WireGuard and settles."""
    eventually(lambda: at_rest(hosts), SOON, "a whole mesh")
    facts = json.loads(hosts[0].run(["meshd", "status", "--json"]).stdout)
    assert facts["wireguard_backend"] == "kernel"
    assert facts["problems"] == facts["pending"] == []
    assert facts["refused"] == {}
    for host in hosts:
        assert "wireguard" in host.run(["ip", "-d", "link", "show", "wg0"]).stdout
        assert host.run(["pgrep", "wireguard-go"], check=False).returncode == 1


def test_loss_delay_and_reordering_change_no_peer(lab: Lab, hosts: list[LabHost]) -> None:
    """Ten percent of loss, delay and reordering change no peer and no route."""
    whole, said = held(hosts), [len(log(host)) for host in hosts]
    with netem(lab, hosts, "loss", "10%", "delay", "50ms", "20ms", "reorder", "25%", "50%"):
        heard = answers(hosts, 20)
        eventually(lambda: alive(hosts), SOON, "all alive, in spite of the loss")
    # Of ten packets one is lost on the way there, and one on the way back.
    assert sum(heard) < 20 * len(heard), "netem loses nothing: this test shows nothing"
    assert min(heard) >= 5
    assert held(hosts) == whole
    for host, length in zip(hosts, said, strict=True):
        assert "remove" not in log(host)[length:]


def test_mesh_heals_after_half_of_packets_lost(lab: Lab, hosts: list[LabHost]) -> None:
    """While half of all packets are lost no peer goes, and afterwards the mesh heals."""
    whole = held(hosts)
    with netem(lab, hosts, "loss", "50%"):
        heard = answers(hosts, 30)
        assert sum(heard) < 15 * len(heard), "netem loses less than it should: this test shows nothing"
        assert held(hosts) == whole
    eventually(lambda: at_rest(hosts), SOON, "all reach all, all alive, and nothing to change")
    assert held(hosts) == whole


def test_down_and_up_on_kernel_device(hosts: list[LabHost]) -> None:
    """`down` removes the device, and `up` brings it back."""
    first, last = hosts[0], hosts[2]
    last.run(["meshd", "down"])
    assert "wg0" not in last.run(["ip", "link"]).stdout
    assert not any(answers([first, last]))
    last.run(["meshd", "up"])
    eventually(lambda: all(answers(hosts)), SOON, "all reach all, by the same addresses")


def test_leave_removes_every_trace(hosts: list[LabHost], before: str) -> None:
    """After `leave` nothing is left on this host, and nothing of it on the others."""
    first, last = hosts[0], hosts[2]
    last.run(["meshd", "leave"])
    eventually(lambda: all(len(peers(host)) == 1 for host in hosts[:2]), SOON, "the others drop its peer")
    assert overlay(last) not in routes(first)
    assert snapshot(last) == before
