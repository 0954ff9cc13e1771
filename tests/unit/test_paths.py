"""When the MTU of a path is measured, and what comes of it; tests/lab has it between real hosts."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from meshd.endpoint import Endpoint
from meshd.net.resources import Peer
from meshd.reconcile import paths
from meshd.reconcile.paths import EVERY, OVERHEAD, SELDOM, SMALLEST, Path
from tests.conftest import public_key, record

FULL = 1420
UNIX = 1_000_000.0
KEY = public_key("barge2")
# A measurement with nothing to wait for; and the time until a narrow path of any width is known.
QUICK, SOON = 0.05, 3.0


def peer(*, sent: int = 0, handshake: float = UNIX, endpoint: Endpoint | None = None) -> Peer:
    of = record(2)
    return Peer(of.public_key, endpoint or of.endpoint, (of.subnet,), 25, handshake, 0, sent)


@dataclass
class World:
    """A clock, and a path that lets pings of up to `width` bytes come back after `rtt` seconds, unless `loses` one."""

    width: int = FULL
    rtt: float = 0.02
    loses: Callable[[], bool] = lambda: False
    now: float = 100.0
    pings: list[tuple[float, int]] = field(default_factory=list)
    found: list[int] = field(default_factory=list)

    def send(self, sizes: tuple[int, ...]) -> list[tuple[float, int]]:
        self.pings += [(self.now, size) for size in sizes]
        return [(self.now + self.rtt, size) for size in sizes if size <= self.width and not self.loses()]

    def measure(self, path: Path) -> Path:
        """Make one measurement; `found` has the MTUs that were known meanwhile."""
        path, sizes = path.begun(now=self.now)
        answers = self.send(sizes)
        while path.trial is not None:
            arrival = min((at for at, _ in answers), default=float("inf"))
            self.now = max(self.now, min(arrival, path.trial.next))
            for at, size in [answer for answer in answers if answer[0] <= self.now]:
                path = path.heard(size, now=self.now)
                answers.remove((at, size))
            path, sizes = path.stepped(now=self.now)
            answers += self.send(sizes)
            if path.mtu and path.mtu not in self.found[-1:]:
                self.found.append(path.mtu)
        return path


def fresh(full: int = FULL, *, handshake: float = UNIX) -> Path:
    return paths.new(peer(handshake=handshake), full, now=100.0)


# --- what is found -------------------------------------------------------------------------------------------------


def test_a_wide_path_takes_one_ping() -> None:
    world = World()
    path = world.measure(fresh())
    assert ([size for _, size in world.pings], world.found) == ([FULL], [FULL])
    assert world.now - 100 < QUICK
    assert paths.mtus({KEY: path}) == {KEY: 0}, "as wide as the overlay"


@pytest.mark.parametrize("full", [SMALLEST, 1280, FULL, 1423, 8920, 65440])
@pytest.mark.parametrize("width", [SMALLEST, 577, 928, 940, 1279, 1419, 1420, 1422, 4000, 8919])
def test_a_narrow_path_is_found_to_a_multiple_of_16(full: int, width: int) -> None:
    world = World(width=width)
    path = world.measure(fresh(full))
    assert path.mtu == (full if width >= full else width // 16 * 16)
    assert world.now - 100 < SOON
    assert len(world.pings) < 250
    assert all(mtu <= width for mtu in world.found), "never one that does not pass"


def test_a_narrow_path_is_usable_before_it_is_known_exactly() -> None:
    world = World(width=928)
    path = world.measure(replace(fresh(), mtu=FULL))
    assert (world.found, path.mtu) == ([FULL, 880, 928], 928)


def test_a_path_that_was_narrow_takes_three_pings_and_stays_so() -> None:
    world = World(width=928)
    path = world.measure(replace(fresh(), mtu=928))
    assert ([size for _, size in world.pings], path.mtu) == ([FULL, 944, 928], 928)
    assert world.now - 100 < 0.2


@pytest.mark.parametrize("width", [944, 1200, FULL])
def test_a_path_grows(width: int) -> None:
    world = World(width=width)
    assert world.measure(replace(fresh(), mtu=928)).mtu == width // 16 * 16 if width < FULL else FULL
    assert all(mtu >= 928 for mtu in world.found), "what passes meanwhile is not narrowed"


@pytest.mark.parametrize("width", [SMALLEST, 600, 800])
def test_a_narrow_path_narrows_further(width: int) -> None:
    assert World(width=width).measure(replace(fresh(), mtu=928)).mtu == width // 16 * 16


@pytest.mark.parametrize("mtu", [0, 928, FULL])
def test_without_any_answer_nothing_is_known_anew(mtu: int) -> None:
    world = World(width=SMALLEST - 1)
    path = world.measure(replace(fresh(), mtu=mtu))
    assert (path.mtu, path.misses) == (mtu, 1)


def test_losses_narrow_nothing() -> None:
    """One packet in 20 is lost each way, in four hours of measurements of a narrow path and of a wide one."""
    draw = random.Random(7)
    for width in (928, FULL):
        world = World(width=width, loses=lambda: draw.random() < 1 - 0.95**2)
        path = replace(fresh(), mtu=width)
        for _ in range(4_800):
            path = world.measure(path)
        assert world.found == [width]
        assert len(world.pings) < 4_800 * 12


def test_heavy_losses_narrow_next_to_nothing() -> None:
    """Half of all packets are lost each way: that is known for nothing rather than for a narrow path."""
    draw = random.Random(7)
    narrowed = 0
    for _ in range(1000):
        world = World(loses=lambda: draw.random() < 0.75)
        narrowed += world.measure(replace(fresh(), mtu=FULL)).mtu < FULL
        assert world.now - 100 < 60
    assert narrowed <= 20


@pytest.mark.parametrize("rtt", [0.3, 0.6, 1.5])
def test_a_long_path_is_wide_all_the_same_and_waited_for_from_then_on(rtt: float) -> None:
    world = World(rtt=rtt)
    path = world.measure(fresh())
    assert world.found == [FULL]
    before = len(world.pings)
    world.measure(path)
    assert (world.found, len(world.pings)) == ([FULL], before + 1)


def test_answers_that_come_when_nothing_is_measured_change_nothing() -> None:
    path = fresh()
    assert path.heard(600, now=100.0) is path
    assert path.stepped(now=500.0) == (path, ())


# --- when ----------------------------------------------------------------------------------------------------------


def is_due(path: Path, now: float) -> bool:
    return path.is_due(now=now, unix=UNIX)


def measured(mtu: int = FULL) -> Path:
    """A path that was measured at the time 100."""
    path = replace(fresh(), checked=100.0, mtu=mtu, due=100.0 + SELDOM)
    assert not is_due(path, 100.0)
    return path


def observed(path: Path, now: float, *, sent: int = 0, handshake: float = UNIX) -> Path:
    return path.observed(peer(sent=sent, handshake=handshake), path.full, now=now)


def test_a_path_is_measured_at_the_first_handshake() -> None:
    path = fresh(handshake=0)
    assert not is_due(path, 100.0)
    assert is_due(observed(path, 100.5), 100.5)


def test_a_quiet_path_is_measured_every_ten_minutes() -> None:
    world = World()
    path = world.measure(fresh())
    assert not is_due(path, world.now + 0.9 * SELDOM - 1)
    assert is_due(path, world.now + SELDOM)


def test_a_path_with_traffic_is_measured_every_three_seconds() -> None:
    path, times = measured(), []
    for tick in range(200):
        now = 100 + tick / 10
        path = observed(path, now, sent=tick * 10_000)
        if is_due(path, now):
            times.append(now)
            path = World(now=now).measure(path)
    assert times == pytest.approx([103, 106.1, 109.2, 112.3, 115.4, 118.5], abs=0.2)


def test_what_answers_the_other_hosts_pings_is_no_traffic() -> None:
    """Two hosts that measure as long as the other does would never end."""
    path = observed(measured(), 103.0, sent=2 * (FULL + OVERHEAD))
    assert not is_due(path, 110.0)


def test_own_pings_are_no_traffic() -> None:
    world = World(width=928)
    path = world.measure(replace(fresh(), mtu=FULL))
    sent = sum(size + OVERHEAD for _, size in world.pings)
    assert sent > 20_000
    assert not is_due(observed(path, 110.0, sent=sent), 120.0)


def test_retries_of_one_large_packet_are_traffic() -> None:
    """A TCP connection that has begun on a path that has become narrow sends little more."""
    path = observed(measured(), 100.7, sent=3 * (FULL + 32))
    assert is_due(path, 100 + EVERY)


def test_a_new_endpoint_is_measured_but_not_each_time_that_a_peer_moves() -> None:
    path = measured()
    other = replace(path.peer, endpoint=Endpoint.parse("192.0.2.99:7"))
    moved = path.observed(other, FULL, now=101.0)
    assert not is_due(moved, 102.9)
    assert is_due(moved, 100 + EVERY)
    assert is_due(path.observed(other, FULL, now=200.0), 200.0)


def test_a_new_mtu_of_the_overlay_begins_anew() -> None:
    path = measured().observed(peer(), 8920, now=101.0)
    assert (path.full, path.mtu, is_due(path, 101.0)) == (8920, 0, True)


def test_a_peer_that_answers_nothing_is_asked_more_and_more_rarely_until_it_is_met_again() -> None:
    path, times = fresh(), []
    world = World(width=0)
    for _ in range(12):
        world.now = path.due
        times.append(world.now)
        path = observed(world.measure(path), world.now, sent=10_000_000)
    pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert pauses == sorted(pauses)
    assert SELDOM <= pauses[-1] < SELDOM + 10
    assert is_due(observed(path, world.now + EVERY, handshake=UNIX + 1), world.now + EVERY)


def test_a_peer_without_a_session_is_left_alone() -> None:
    """A ping would start a handshake."""
    path = fresh()
    assert path.is_due(now=100.0, unix=UNIX + 179)
    assert not path.is_due(now=100.0, unix=UNIX + 180)


def test_paths_come_and_go_with_their_peers() -> None:
    before = paths.observe({}, {KEY: peer()}, FULL, now=100.0)
    assert before[KEY].mtu == 0
    assert paths.mtus(before) == {}, "a route keeps what it has"
    known = {KEY: replace(before[KEY], mtu=928)}
    assert paths.mtus(paths.observe(known, {KEY: peer()}, FULL, now=101.0)) == {KEY: 928}
    assert paths.observe(known, {}, FULL, now=101.0) == {}


def test_what_a_route_kept_is_known_and_not_narrowed_on_the_way() -> None:
    """A daemon that starts on a narrow path must not take the route's MTU away until it has measured anew."""
    found = paths.observe({}, {KEY: peer()}, FULL, now=100.0, kept={KEY: 928})
    world = World(width=928)
    assert world.measure(found[KEY]).mtu == 928
    assert world.found == [928]
    assert paths.observe({}, {KEY: peer()}, FULL, now=100.0, kept={KEY: FULL})[KEY].mtu == 0
