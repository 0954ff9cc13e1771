"""What the kernel tells of changes by others, in a real namespace."""

import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from meshd.net import links, netlink
from meshd.net.netlink import PROTOCOL
from meshd.net.policy import Policy
from meshd.net.resources import Action, Change, PolicyRule, Route
from meshd.net.routes import Routes
from tests.conftest import eventually

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("netns")]

# Routes that are meshd's by their protocol, of which a watch tells whatever else it looks at.
OVERLAY = IPv4Network("172.20.0.0/16")
SIGN, LAST_SIGN = "203.0.113.0/24", "192.0.2.0/24"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def give_sign(prefix: str = SIGN) -> None:
    """Add and remove a route: the kernel does not tell of one that is there already."""
    for action in ("add", "del"):
        ip("route", action, prefix, "dev", "lo", "proto", str(PROTOCOL))


def until_heard(is_heard: Callable[[], object]) -> None:
    """Give signs until the watch tells of one: it listens."""

    def signed() -> object:
        give_sign()
        return is_heard()

    eventually(signed, 5, "the watch listens")


@contextmanager
def watch(names: list[str], hint: Callable[[str], None]) -> Iterator[None]:
    """Run `links.watch` in a thread of this namespace while the block runs."""
    stop = threading.Event()
    thread = threading.Thread(target=links.watch, args=(names, OVERLAY, hint, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        # Whatever it hears makes it look at once whether it is to stop.
        give_sign()
        thread.join(4)
        assert not thread.is_alive()


@contextmanager
def watching(*names: str) -> Iterator[Callable[[], str]]:
    """Yield a call that returns the next hint, once the watch listens."""
    hints: queue.Queue[str] = queue.Queue()
    with watch([*names], hints.put):
        until_heard(lambda: not hints.empty())
        give_sign(LAST_SIGN)
        while hints.get(timeout=3) != f"route {LAST_SIGN} removed":
            pass
        yield lambda: hints.get(timeout=3)


@pytest.fixture
def _underlay(netns: object) -> None:
    assert netns
    ip("link", "add", "u0", "type", "veth", "peer", "name", "u1")
    for name in ("u0", "u1"):
        ip("link", "set", name, "up")
    ip("addr", "add", "10.10.10.101/24", "dev", "u0")


@pytest.mark.usefixtures("_underlay")
def test_watch_reports_own_links_and_routes_and_ipv4_addresses_only() -> None:
    """The watch reports changes of meshd's links and routes, IPv4 addresses of other links, and nothing else."""
    ip("link", "add", "ovl0", "type", "bridge")
    with watching("ovl0") as hint:
        ip("link", "set", "u1", "mtu", "1400")
        ip("route", "add", "198.18.0.0/24", "dev", "u0")
        ip("addr", "add", "10.10.12.101/24", "dev", "u0")
        assert hint() == "address 10.10.12.101 of another link changed"
        ip("route", "add", "198.51.100.0/24", "dev", "u0", "proto", "77")
        assert hint() == "route 198.51.100.0/24 changed"
        ip("route", "del", "198.51.100.0/24")
        assert hint() == "route 198.51.100.0/24 removed"
        ip("link", "set", "ovl0", "up")
        assert hint() == "link ovl0 changed"
        ip("addr", "add", "172.20.101.0/16", "dev", "ovl0")
        seen = [hint()]
        while seen[-1] != "route 172.20.0.0/16 changed":
            seen.append(hint())
        assert "address 172.20.101.0 of ovl0 changed" in seen
        ip("-6", "addr", "add", "fd00::1/64", "dev", "u1", "nodad")
        ip("-6", "addr", "del", "fd00::1/64", "dev", "u1")
        ip("-6", "addr", "add", "fd00::1/64", "dev", "ovl0", "nodad")
        seen = [hint()]
        while seen[-1] != "address fd00::1 of ovl0 changed":
            seen.append(hint())
        assert not [text for text in seen if "another link" in text], "IPv6 comes and goes with containers"
        ip("link", "del", "ovl0")
        while hint() != "link ovl0 removed":
            pass
        ip("link", "add", "ovl0", "type", "bridge")
        assert hint() == "link ovl0 changed"


@pytest.mark.usefixtures("_underlay")
def test_watch_reports_sysctls_of_own_links_only() -> None:
    """The watch reports that forwarding or rp_filter of one of meshd's links was set, and of no other link."""
    ip("link", "add", "ovl0", "type", "bridge")
    with watching("ovl0") as hint:
        for link, name, value in (("u0", "forwarding", 1), ("ovl0", "forwarding", 1), ("ovl0", "rp_filter", 2)):
            Path(f"/proc/sys/net/ipv4/conf/{link}/{name}").write_text(f"{value}\n")
        assert [hint(), hint()] == ["sysctls of ovl0 changed"] * 2
        give_sign()
        assert hint() == f"route {SIGN} changed"


@pytest.mark.usefixtures("_underlay")
def test_told_predicts_hints_of_own_changes() -> None:
    """The hints that follow from meshd's own changes are predicted."""
    routes, policy = Routes("u0", OVERLAY), Policy(OVERLAY, ["wg0"])
    added = Change(Action.ADD, Route(IPv4Network("172.20.7.0/24"), "u0"))
    with watching("wg0") as hint:
        for change in (added, replace(added, action=Action.REMOVE)):
            routes.apply(change)
            assert {hint()} == links.told([change])
        first, second = PolicyRule(OVERLAY, 5269), PolicyRule(OVERLAY, 5199)
        for change in (
            Change(Action.ADD, first),
            Change(Action.SET, second, first),
            Change(Action.REMOVE, second),
        ):
            policy.apply(change)
            told = links.told([change])
            assert {hint() for _ in told} == told


@pytest.mark.usefixtures("_underlay")
def test_watch_reports_what_takes_the_overlay() -> None:
    """The watch reports policy rules, and routes of others for the overlay in whatever table, but no default route."""
    with watching("wg0") as hint:
        ip("rule", "add", "priority", "5270", "lookup", "52")
        assert hint() == "policy rule 5270 changed"
        ip("route", "add", "default", "dev", "u0")
        ip("route", "add", "default", "dev", "u0", "table", "52")
        assert hint() == "route 0.0.0.0/0 changed in table 52"
        ip("route", "add", "172.20.7.128/25", "dev", "u0")
        assert hint() == "route 172.20.7.128/25 changed"
        ip("rule", "del", "priority", "5270")
        assert hint() == "policy rule 5270 removed"


def test_watch_reports_lost_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that the kernel had to drop are reported as a hint."""
    monkeypatch.setattr(netlink, "_BUFFER", 1)  # the kernel makes that 2304 bytes
    release, hints = threading.Event(), list[str]()

    def hint(text: str) -> None:
        hints.append(text)
        release.wait(5)

    with watch(["ovl0"], hint):
        until_heard(lambda: hints)
        for number in range(20):
            ip("route", "add", f"198.51.{number}.0/24", "dev", "lo", "proto", "77")
        release.set()
        eventually(lambda: "messages were lost" in hints, 5, "the overrun is reported")


def test_watch_neither_spins_nor_leaks() -> None:
    """A watch without events uses no processor time, leaks no descriptor, and stops within 2 s."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # each entry only counts
    stop = threading.Event()
    thread = threading.Thread(target=links.watch, args=(["ovl0"], OVERLAY, [].append, stop))
    started = time.process_time()
    thread.start()
    time.sleep(1)
    stop.set()
    thread.join(3)
    assert not thread.is_alive()
    assert time.process_time() - started < 0.2
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208  # each entry only counts
