"""Who starts the first handshake, and when it is started again; tests/lab has it between real hosts."""

from dataclasses import replace

import pytest

from meshd.mesh.model import Status
from meshd.mesh.roster import Roster
from meshd.net.resources import Action, Peer
from meshd.reconcile import handshakes
from meshd.reconcile.handshakes import PER_HOST, UNDER_WAY, Schedule, Unmet
from tests.conftest import member, public_key, record

KEY = public_key("barge2")
SENT = 148  # bytes of an initiation


def peer(number: int, *, handshake: float = 0, received: int = 0, keepalive: int = 25) -> Peer:
    of = record(number)
    return Peer(of.public_key, of.endpoint, (of.subnet,), keepalive, handshake, received)


def responder(*, is_alive: bool = True, is_new: bool = False, received: int = 0) -> Unmet:
    return Unmet(is_initiator=False, is_alive=is_alive, is_new=is_new, received=received)


def initiator(*, is_alive: bool = True) -> Unmet:
    return Unmet(is_initiator=True, is_alive=is_alive)


def after(schedule: Schedule, late: Unmet, now: float, *, restarted: bool = False) -> Schedule:
    return schedule.after({KEY: late}, {KEY} if restarted else (), hosts=0, now=now)


def attempts(late: Unmet, until: float) -> list[float]:
    """The times at which a host that finds this peer at the time 0 starts the handshake again."""
    schedule, times = after(Schedule(), replace(late, is_new=True), 0.0), list[float]()
    while (due := schedule.due) <= until:
        times.append(round(due, 3))
        assert schedule.overdue(due) == {KEY: 0}
        schedule = after(schedule, late, due, restarted=True)
    return times


# --- who -----------------------------------------------------------------------------------------------------------


def test_exactly_one_of_two_hosts_is_the_initiator() -> None:
    old, new, same = record(1, seq=1), record(2, seq=2), record(3, seq=2)
    assert (handshakes.is_initiator(new, old), handshakes.is_initiator(old, new)) == (True, False)
    assert handshakes.is_initiator(new, same) is not handshakes.is_initiator(same, new)


def test_every_host_without_a_handshake_is_unmet_whatever_serf_says() -> None:
    own, roster = record(1, seq=3), Roster({f"barge{n}": record(n, seq=n) for n in (2, 3, 4, 5)})
    listed = [member(2), member(4, Status.FAILED)]
    observed = [peer(2, received=SENT), peer(3, handshake=1.0), peer(4)]
    is_initiator = handshakes.is_initiator(own, record(3, seq=3))
    assert handshakes.unmet(own, roster, listed, observed) == {
        public_key("barge2"): Unmet(is_initiator=True, is_alive=True, received=SENT),
        public_key("barge4"): Unmet(is_initiator=False, is_alive=False),
        public_key("barge5"): Unmet(is_initiator=False, is_alive=False, is_new=True),
    }
    observed[1] = peer(3)
    assert handshakes.unmet(own, roster, listed, observed)[public_key("barge3")].is_initiator is is_initiator


def test_only_a_living_initiator_is_waited_for() -> None:
    late = {"a": responder(), "b": responder(is_alive=False), "c": initiator(), "d": initiator(is_alive=False)}
    assert handshakes.awaited(late) == {"a"}


# --- how -----------------------------------------------------------------------------------------------------------


def test_an_overdue_peer_is_re_created_with_its_keepalive() -> None:
    overdue = {KEY: 0, public_key("barge4"): 0}
    removed, added = handshakes.restarts([peer(2), peer(3), peer(4)], [peer(2, keepalive=0), peer(3)], overdue)
    assert (removed.action, removed.resource) == (Action.REMOVE, peer(2, keepalive=0))
    assert (added.action, added.resource) == (Action.ADD, peer(2))


@pytest.mark.parametrize("found", [peer(2, handshake=1.0), peer(2, received=SENT + 92), peer(3)])
def test_a_peer_that_may_have_a_session_is_left_alone(found: Peer) -> None:
    """The second one has just received something: the other side may have the session that its next packet confirms."""
    assert handshakes.restarts([peer(2), peer(3)], [found], {KEY: SENT}) == ()


def test_a_peer_that_is_no_longer_wanted_is_left_alone() -> None:
    assert handshakes.restarts([peer(3)], [peer(2)], {KEY: 0}) == ()


def test_without_a_schedule_the_responder_starts_again_what_has_crossed() -> None:
    crossed = responder(received=SENT)
    late = {"a": crossed, "b": responder(), "c": replace(crossed, is_initiator=True)}
    assert handshakes.crossed(late) == {"a": SENT}


# --- when ----------------------------------------------------------------------------------------------------------


def test_both_hosts_start_again_within_a_second_and_then_ever_more_slowly() -> None:
    assert attempts(responder(), 14) == [0.2, 0.6, 1.4, 3.0, 6.2, 12.6]
    assert attempts(initiator(), 14) == [0.7, 2.8, 9.1]
    week = 7 * 86400
    for late in (responder(), initiator()):
        times = attempts(late, week)
        assert len(times) < week / handshakes.LONGEST + 10
        assert times[-1] - times[-2] == handshakes.LONGEST, "a firewall may open after days"


def test_a_dead_host_gets_a_few_attempts_and_all_of_them_again_when_it_comes_alive() -> None:
    """At boot no host is listed yet, and hosts that come up together must not wait for Serf."""
    assert attempts(responder(is_alive=False), 1e6) == [0.2, 0.6, 1.4, 3.0]
    assert attempts(initiator(is_alive=False), 1e6) == [0.7, 2.8]
    dead = after(Schedule(), responder(is_alive=False), 0.0)
    for now in (1.0, 2.0, 3.0, 4.0):
        dead = after(dead, responder(is_alive=False), now, restarted=True)
    assert (dead.due, dead.overdue(1e9)) == (float("inf"), {})
    alive = after(dead, responder(), 100.0)
    assert alive.due == pytest.approx(100.2)
    assert after(alive, responder(), 100.1).due == pytest.approx(100.2), "once"
    assert after(alive, responder(is_alive=False), 100.1).due == pytest.approx(100.2), "what is begun goes on"


def test_attempts_that_coincided_do_not_coincide_again() -> None:
    """Two initiations cross while each is on its way. Whenever either host begins, that happens once at most."""
    ours, theirs = attempts(responder(), 10), attempts(initiator(), 20)
    for offset in range(-1000, 1000):
        coincide = sum(abs(a - b - offset / 100) < 0.05 for a in ours for b in theirs)
        assert coincide <= 1, offset / 100


def test_what_may_be_under_way_is_waited_for() -> None:
    schedule = after(Schedule(), responder(is_new=True), 0.0)
    schedule = after(schedule, responder(received=SENT), 0.19)
    assert schedule.due == pytest.approx(0.19 + UNDER_WAY)
    assert schedule.overdue(0.3) == {}
    assert schedule.overdue(0.4) == {KEY: SENT}
    again = after(schedule, responder(received=SENT), 0.4, restarted=True)
    assert again.overdue(0.8) == {KEY: 0}, "the re-created peer counts from zero"


def test_attempts_that_were_missed_are_not_made_up_for() -> None:
    """The machine slept, or was busy for seconds."""
    schedule = after(Schedule(), responder(is_new=True), 0.0)
    schedule = after(schedule, responder(), 60.0, restarted=True)
    assert schedule.due == pytest.approx(60.4)


def test_a_peer_that_was_removed_and_added_is_as_good_as_new() -> None:
    schedule = after(Schedule(), responder(), 0.0)
    for now in (1.0, 2.0, 3.0):
        schedule = after(schedule, responder(), now, restarted=True)
    assert after(schedule, responder(is_new=True), 4.0).due == pytest.approx(4.2)


def test_a_handshake_ends_the_attempts() -> None:
    schedule = after(Schedule(), responder(), 0.0)
    assert schedule.after({}, (), hosts=1, now=1.0) == Schedule()
    assert Schedule().due == float("inf")


@pytest.mark.parametrize(("hosts", "delay"), [(10, 10 * PER_HOST), (1000, handshakes.MOST_FOR_HOSTS)])
def test_a_newcomer_has_longer_the_more_hosts_it_meets(hosts: int, delay: float) -> None:
    assert Schedule().after({KEY: responder()}, (), hosts=hosts, now=0.0).due == pytest.approx(0.2 + delay)
