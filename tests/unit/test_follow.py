"""When a host follows its underlay address, with a clock of the test's own; tests/netns has real links."""

from ipaddress import ip_address

import pytest

from meshd.daemon.follow import PATIENCE, Follower, Seen, Wish, moved
from meshd.state.directory import Found, Place

HOME, RENEWED = Place(ip_address("10.10.10.101"), "eth0"), Place(ip_address("10.10.10.133"), "eth0")
AWAY, NEXT = Place(ip_address("192.168.77.2"), "eth1"), Place(ip_address("192.168.77.9"), "eth1")
AT_HOME, ABROAD = Found(HOME, HOME), Found(AWAY, HOME)


def seen(*places: Place, route: Place | None = None) -> Seen:
    return Seen({place.address: place.link for place in places}, route)


@pytest.fixture
def follower() -> Follower:
    """A follower that has seen the host at home at second 0."""
    follower = Follower()
    assert follower.wish(AT_HOME, seen(HOME, AWAY), 0.0) is None
    assert not follower.waits
    return follower


@pytest.mark.parametrize("found", [AT_HOME, None, Found(Place(HOME.address), Place(HOME.address))])
def test_address_of_same_link_is_followed_at_once(found: Found | None) -> None:
    """So is the first one, and any where an older version did not keep the link."""
    follower = Follower()
    assert follower.wish(found, seen(RENEWED, AWAY, route=RENEWED), 0.0) == Wish(RENEWED, asks=False)
    assert moved(found, RENEWED) == Found(RENEWED, RENEWED), "it is at home there"


def test_short_absence_moves_nothing(follower: Follower) -> None:
    for second in range(1, 10):
        assert follower.wish(AT_HOME, seen(AWAY, route=AWAY), second) is None
        assert follower.waits
    assert follower.wish(AT_HOME, seen(HOME, AWAY), 10.0) is None
    assert follower.wish(AT_HOME, seen(AWAY, route=AWAY), 11.0) is None, "each absence counts for itself"
    assert follower.wish(AT_HOME, seen(AWAY, route=AWAY), 20.0) is None


def test_other_link_is_asked_for_after_a_while_and_seldom(follower: Follower) -> None:
    asked = [s for s in range(1, 40) if follower.wish(AT_HOME, seen(AWAY, route=AWAY), s) == Wish(AWAY, asks=True)]
    assert asked == [11, 21, 31]
    assert moved(AT_HOME, AWAY) == ABROAD


def test_nothing_to_move_to_is_waited_for(follower: Follower) -> None:
    assert follower.wish(AT_HOME, seen(), 1.0) is None
    assert follower.waits
    assert follower.wish(AT_HOME, seen(AWAY, route=AWAY), 1.0 + PATIENCE) == Wish(AWAY, asks=True)


def test_home_is_returned_to_after_a_while() -> None:
    follower = Follower()
    assert follower.wish(ABROAD, seen(AWAY, route=AWAY), 0.0) is None
    waits = [follower.waits]
    assert follower.wish(ABROAD, seen(AWAY, HOME, route=HOME), 5.0) is None
    assert [*waits, follower.waits] == [False, True], "a home that never comes back is not waited for"
    assert follower.wish(ABROAD, seen(AWAY, route=AWAY), 9.0) is None
    assert follower.wish(ABROAD, seen(AWAY, HOME, route=HOME), 10.0) is None, "it has to stay"
    assert follower.wish(ABROAD, seen(AWAY, HOME, route=HOME), 19.9) is None
    assert follower.wish(ABROAD, seen(AWAY, HOME, route=HOME), 20.0) == Wish(HOME, asks=True, source=HOME.address)
    assert moved(ABROAD, HOME) == AT_HOME


def test_home_may_have_another_address() -> None:
    follower = Follower()
    view = seen(AWAY, RENEWED, route=RENEWED)
    assert follower.wish(ABROAD, view, 0.0) is None
    assert follower.wish(ABROAD, view, 10.0) == Wish(RENEWED, asks=True, source=RENEWED.address)
    assert moved(ABROAD, RENEWED) == Found(RENEWED, RENEWED)


def test_address_of_a_link_abroad_is_followed_at_once() -> None:
    follower = Follower()
    assert follower.wish(ABROAD, seen(NEXT, route=NEXT), 0.0) == Wish(NEXT, asks=False)
    assert moved(ABROAD, NEXT) == Found(NEXT, HOME), "the home stays where it is"


def test_only_a_moved_machine_takes_what_nobody_answers_at(follower: Follower) -> None:
    """A host whose daemon has started where the old link does not exist takes any address, and no other one does."""
    follower.wish(AT_HOME, seen(AWAY, route=AWAY), 1.0)
    assert not follower.is_stranded(AT_HOME, ["lo", "eth1"]), "the link went while the daemon ran"
    started = Follower()
    started.wish(AT_HOME, seen(AWAY, route=AWAY), 1.0)
    assert started.is_stranded(AT_HOME, ["lo", "eth1"])
    assert not started.is_stranded(AT_HOME, ["lo", "eth0", "eth1"])
