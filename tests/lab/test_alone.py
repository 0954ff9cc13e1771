"""A daemon whose Serf, disk or state fails it keeps up what it knows: peers, routes, the firewall."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, eventually, init, join, nothing_in_clear, overlay, peers, ping
from tests.lab.faults import FOUND, SERF, STATE, boot

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    return assemble(lab, docker=0, plain=2)


def log(host: LabHost) -> str:
    return host.run(["cat", f"{STATE}/agent.log"]).stdout


def daemon(host: LabHost) -> str:
    return host.run(["cat", f"{STATE}/agent.pid"]).stdout


def is_well(host: LabHost) -> bool:
    done = host.run(["meshd", "plan"], check=False)
    return (done.returncode, done.stdout) == (0, "no changes\n")


def drift_is_repaired(host: LabHost, other: LabHost) -> None:
    """Nobody tells of a peer that is removed: a full pass finds it."""
    host.run(["ip", "route", "del", f"{overlay(other)}/24"])
    eventually(lambda: host.run(["ip", "route", "show", f"{overlay(other)}/24"]).stdout, FOUND, "the route is back")
    key = peers(host)[0]
    host.run(["wg", "set", "wg0", "peer", key, "remove"])
    eventually(lambda: key in peers(host), 2 * FOUND, "the peer is back")
    eventually(lambda: ping(host, overlay(other)), FOUND, "the other is reached")


@contextmanager
def no_serf(host: LabHost) -> Iterator[None]:
    """Let Serf end, and not start again: somebody's own configuration cannot be read."""
    broken = host.directory / "meshd" / "serf.d" / "broken.json"
    broken.parent.mkdir(exist_ok=True)
    broken.write_text("{")
    host.run(["sh", "-ec", f"kill -KILL {SERF}"])
    try:
        yield
    finally:
        broken.unlink()


def test_known_hosts_are_kept_without_serf(lab: Lab, hosts: list[LabHost]) -> None:
    """While Serf cannot run, peers and routes of known hosts are kept and repaired."""
    one, two = hosts
    with nothing_in_clear(lab), no_serf(one):
        eventually(lambda: "serf: the Serf agent did not start" in log(one), 5, "it is said")
        drift_is_repaired(one, two)
        assert log(one).count("serf: the Serf agent did not start") == 1, "once, not in each pass"
    eventually(lambda: "no longer: serf: " in log(one), 5, "it starts again")
    eventually(lambda: is_well(one), 20, "all is well again")


def test_boot_without_serf_reaches_known_hosts(lab: Lab, hosts: list[LabHost]) -> None:
    """After a boot without Serf the known hosts are reached."""
    one, two = hosts
    with no_serf(one):
        lab.power_off(one)
        with nothing_in_clear(lab):
            one = boot(lab, one)
            eventually(lambda: "table ip meshd_wg0" in one.run(["nft", "list", "ruleset"]).stdout, 15, "the firewall")
            eventually(lambda: ping(one, overlay(two)), 15, "the other is reached")
            assert re.search(r"serf: +not answering", one.run(["meshd", "status"], check=False).stdout)
            assert one.run(["ip", "route", "show", "type", "unreachable"]).stdout
    eventually(lambda: is_well(one), 30, "all is well again")


def test_daemon_survives_damaged_state(lab: Lab, hosts: list[LabHost]) -> None:
    """A state file that is damaged under a daemon does not end it, and is reported once."""
    one, two = lab.hosts()[: len(hosts)]
    before, route = daemon(one), ["ip", "route", "show", f"{overlay(two)}/24"]
    for name in ("claim.json", "settings.json"):
        path = one.directory / "meshd" / name
        good, said = path.read_bytes(), len(log(one))
        path.write_text("{")
        try:
            one.run(["ip", "route", "del", f"{overlay(two)}/24"])
            eventually(lambda: f"{name} is damaged" in log(one)[said:], FOUND, "it is said")  # noqa: B023
            assert f"{name} is damaged" in one.run(["meshd", "status"], check=False).stderr
        finally:
            path.write_bytes(good)
        eventually(lambda: one.run(route).stdout, 5, "the route is back")
        assert log(one)[said:].count("WARNING") == 1, "it is said once"
    assert daemon(one) == before
    eventually(lambda: is_well(one), 20, "all is well again")


@contextmanager
def full(host: LabHost) -> Iterator[str]:
    host.run(["sh", "-c", f"dd if=/dev/zero of={STATE}/filler bs=1k 2>/dev/null"], check=False)
    try:
        yield "No space left on device"
    finally:
        host.run(["rm", f"{STATE}/filler"])


@contextmanager
def read_only(host: LabHost) -> Iterator[str]:
    # Above itself: what is open for writing, as Serf's log, lets nobody make the mount itself read-only.
    host.run(["mount", "--bind", STATE, STATE])
    host.run(["mount", "-o", "remount,bind,ro", STATE])
    try:
        yield "Read-only file system"
    finally:
        host.run(["umount", "--lazy", STATE])


@pytest.fixture(scope="module")
def small(lab: Lab, hosts: list[LabHost]) -> tuple[list[LabHost], str]:
    """A host in a mesh of its own whose state is on a small disk, a member of it, and the invitation."""
    assert hosts
    lab.up(5, docker=False)
    found = lab.hosts()[2:]
    found[0].run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", STATE])
    invitation = init(found[0], "--no-docker")
    join(found[1], found[0], invitation, "--no-docker")
    return found, invitation


@pytest.mark.parametrize("fault", [full, read_only], ids=["full", "read-only"])
def test_daemon_repairs_on_full_or_read_only_disk(
    small: tuple[list[LabHost], str], fault: Callable[[LabHost], AbstractContextManager[str]]
) -> None:
    """With a full or read-only disk the daemon repairs drift and admits newcomers."""
    (one, two, three), invitation = small
    before = daemon(one)
    with fault(one) as reason:
        # A change of the hosts, which the disk should know first.
        join(three, two, invitation, "--no-docker")
        rows = json.loads(three.run(["meshd", "members", "--json"]).stdout)
        (subnet,) = [row["subnet"] for row in rows if row["handshake"] is None]
        eventually(lambda: one.run(["ip", "route", "show", subnet]).stdout, FOUND, "the newcomer is met")
        drift_is_repaired(one, two)
        assert reason in one.run(["meshd", "status"], check=False).stdout
        three.run(["meshd", "leave"])
    eventually(lambda: not one.run(["ip", "route", "show", subnet]).stdout, FOUND, "it is forgotten")
    eventually(lambda: is_well(one), 20, "all is well again")
    assert daemon(one) == before
