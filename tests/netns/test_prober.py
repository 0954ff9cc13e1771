"""The daemon's thread that measures paths, on a real tunnel; tests/lab has it with all the rest."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Thread

import pytest

from meshd.daemon.hints import Hint, Source
from meshd.daemon.prober import Prober
from meshd.keys import public_key
from meshd.mesh.roster import Roster
from meshd.reconcile.run import Report
from meshd.state.directory import State
from tests.conftest import eventually, record
from tests.netns.conftest import Namespace
from tests.netns.test_wireguard import KEYS, Node

pytestmark = pytest.mark.root

FULL, KEY = 1380, public_key(KEYS[2])
# An IP packet of WireGuard's, which has 60 bytes of its own, and holds 928.
NARROW = 1000


@pytest.fixture
def pair(netns_pair: tuple[Namespace, Namespace]) -> tuple[Node, Node]:
    """Two hosts that have shaken hands."""
    one, two = (Node(space, "userspace", number) for space, number in zip(netns_pair, (1, 2), strict=True))
    one.join(two, "10.9.0.2")
    two.join(one, None)
    assert one.ping(two) == 1
    return one, two


def report(one: Node, two: Node, **of: object) -> Report:
    """What a reconcile on the first host says of the second."""
    host = replace(record(2), public_key=KEY, subnet=two.block)
    return Report(Roster({"barge2": host}), peers=(one.sees(two),), unmet={}, **of)  # type: ignore[arg-type]


@contextmanager
def measuring(state: State, one: Node) -> Iterator[tuple[Prober, list[Hint]]]:
    """Run the thread of the first host; give it and what it hints at."""
    state.save_settings(replace(state.settings, wireguard=one.name))
    hints: list[Hint] = []
    prober = Prober(state, hints.append, stopping := Event())

    def measure() -> None:
        with one.space.entered():
            prober.measure()

    thread = Thread(target=measure)
    thread.start()
    try:
        yield prober, hints
    finally:
        stopping.set()
        thread.join()


@contextmanager
def narrow(two: Node) -> Iterator[None]:
    """Let the second host drop what is too large, as a switch would, while the block runs."""
    chain = f"chain input {{ type filter hook input priority 0; udp dport 51820 ip length > {NARROW} drop; }}"
    with two.space.entered():
        subprocess.run(["nft", "-f", "-"], input=f"table ip narrow {{ {chain}; }}", text=True, check=True)
    try:
        yield
    finally:
        with two.space.entered():
            subprocess.run(["nft", "delete", "table", "ip", "narrow"], check=True)


def sending(one: Node, two: Node, until: Callable[[], bool]) -> Callable[[], bool]:
    """Return a condition that sends some large packets each time that it is asked."""

    def is_so() -> bool:
        with one.space.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(10):
                sock.sendto(bytes(1300), (str(two.block.network_address), 9))
        return until()

    return is_so


def test_path_with_traffic_is_measured_as_it_changes(state: State, pair: tuple[Node, Node]) -> None:
    """A path is measured when its peer is met, and again and again while it carries traffic."""
    one, two = pair
    with measuring(state, one) as (prober, hints):
        prober.after(report(one, two))
        eventually(lambda: prober.mtus == {KEY: 0}, 5, "the path is as wide as the link")
        with narrow(two):
            eventually(sending(one, two, lambda: prober.mtus == {KEY: 928}), 10, "it is measured to be narrow")
        assert hints[-1] == Hint(Source.PATHS, "barge2 928")
        eventually(sending(one, two, lambda: prober.mtus == {KEY: 0}), 10, "it has grown")
        assert hints[-1] == Hint(Source.PATHS, f"barge2 {FULL}")
        prober.after(replace(report(one, two), roster=Roster()))
        eventually(lambda: prober.mtus == {}, 5, "the host is gone")


def test_route_that_an_earlier_daemon_has_narrowed_is_widened(state: State, pair: tuple[Node, Node]) -> None:
    """What the route has from an earlier daemon is measured anew, and a reconcile is made where it is wrong."""
    one, two = pair
    with measuring(state, one) as (prober, hints):
        prober.after(report(one, two, mtus={KEY: 928}))
        eventually(lambda: hints == [Hint(Source.PATHS, f"barge2 {FULL}")], 5, "the route is to change")


def test_path_is_measured_when_the_link_changes(state: State, pair: tuple[Node, Node]) -> None:
    """With another MTU of the link, the path is measured anew, without traffic."""
    one, two = pair
    with measuring(state, one) as (prober, hints):
        prober.after(report(one, two))
        with narrow(two):
            eventually(lambda: prober.mtus == {KEY: 928}, 5, "it is narrow")
            prober.after(report(one, two, mtus={KEY: 928}))
            with one.space.entered():
                subprocess.run(["ip", "link", "set", one.name, "mtu", "900"], check=True)
            eventually(lambda: prober.mtus == {KEY: 0}, 5, "it is as wide as the link now")
        assert hints[-1] == Hint(Source.PATHS, "barge2 900")
