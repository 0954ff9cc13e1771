"""Hosts of a small distribution: Python, serf, wireguard-go and nft, and busybox for all the rest."""

import os
from pathlib import Path

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import eventually, init, join, members, overlay, ping, snapshot

pytestmark = [pytest.mark.root, pytest.mark.lab]

# What .ci/fetch-busybox has unpacked; `make test` sees to it.
ROOT = Path(os.environ.get("MESHD_BUSYBOX") or Path(__file__).parents[2] / ".make/busybox")

LIMIT = 15.0


@pytest.fixture(scope="module")
def before(lab: Lab) -> list[str]:
    """What meshd may change, as it was on each of two hosts before there was a mesh."""
    return [snapshot(lab.power_on(f"barge{number}", root=ROOT)) for number in (1, 2)]


@pytest.fixture(scope="module")
def hosts(lab: Lab, before: list[str]) -> list[LabHost]:
    """A mesh of the two."""
    assert len(before) == 2
    one, two = lab.hosts()
    join(two, one, init(one, "--no-docker"), "--no-docker")
    return [one, two]


def reached(hosts: list[LabHost]) -> bool:
    return ping(hosts[0], overlay(hosts[1])) and ping(hosts[1], overlay(hosts[0]))


def test_busybox_host_lacks_usual_programs(lab: Lab, before: list[str]) -> None:
    """The host lacks the programs that other hosts have."""
    assert before
    host = lab.hosts()[0]
    for program in ("bash", "docker", "ip6tables", "iptables", "perl", "ss", "systemctl", "wg"):
        assert host.run(["which", program], check=False).stdout == "", program
    for program in ("ip", "mount", "ps", "sh", "sysctl"):
        assert host.run(["realpath", f"/usr/bin/{program}"]).stdout == "/usr/bin/busybox\n", program


def test_busybox_init_and_join(hosts: list[LabHost]) -> None:
    """`init` and `join` make a mesh of two such hosts."""
    eventually(lambda: reached(hosts), LIMIT, "both reach each other")
    for host in hosts:
        assert host.run(["meshd", "status"]).returncode == 0
        assert host.run(["meshd", "plan"]).stdout == "no changes\n"


def test_busybox_down_and_up(hosts: list[LabHost], before: list[str]) -> None:
    """`down` leaves the host as it was, and `up` brings it back."""
    two = hosts[1]
    two.run(["meshd", "down"])
    assert snapshot(two) == before[1]
    two.run(["meshd", "up"])
    eventually(lambda: reached(hosts), LIMIT, "both reach each other")


def test_busybox_up_after_reboot(lab: Lab, hosts: list[LabHost], before: list[str]) -> None:
    """`up` after a reboot brings the host back with its subnet."""
    subnet = members(hosts[1])["barge2"]["subnet"]
    lab.power_off(hosts[1])
    hosts[1] = lab.power_on("barge2", root=ROOT)
    assert snapshot(hosts[1]) == before[1]
    hosts[1].run(["meshd", "up"])
    eventually(lambda: reached(hosts), LIMIT, "both reach each other")
    assert members(hosts[0])["barge2"]["subnet"] == subnet


def test_busybox_leave_removes_every_trace(hosts: list[LabHost], before: list[str]) -> None:
    """After `leave` nothing is left on this host, and the other one knows."""
    one, two = hosts
    two.run(["meshd", "leave"])
    eventually(lambda: members(one).get("barge2", {}).get("state", "left") == "left", LIMIT, "the other knows it")
    one.run(["meshd", "leave"])
    for host, was in zip(hosts, before, strict=True):
        assert snapshot(host) == was
        running = host.run(["sh", "-c", "cat /proc/[0-9]*/cmdline"]).stdout.split("\0")
        assert not {"agent", "wireguard-go"} & {Path(word).name for word in running}
        assert list((host.directory / "meshd").iterdir()) == []
