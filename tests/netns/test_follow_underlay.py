"""A host follows its underlay address, unless somebody chose one; tests/lab has it with Serf."""

import socket
import subprocess
from dataclasses import replace
from ipaddress import ip_address

import pytest

from meshd.daemon.follow import PATIENCE, Follower, follow
from meshd.endpoint import Endpoint, IPAddress
from meshd.errors import InputError
from meshd.net import underlay
from meshd.state.directory import Found, Place, State
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("netns")]

OLD, NEW, OTHER = (ip_address(f"10.10.10.{last}") for last in (101, 102, 103))


def follow_underlay(state: State) -> bool:
    """Look once, as a daemon that has just started does; return whether the host has moved."""
    return follow(state, Follower(), 0.0) is not None


def ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture
def found(state: State) -> State:
    """A host that has found the address OLD, and knows a member in that network; the machine has NEW only."""
    ip("link add u0 type bridge", "link set u0 up", f"addr add {NEW}/24 dev u0")
    state.save_settings(replace(state.settings, bind=None))
    state.save_found_bind(OLD)
    state.save_contacts({"barge3": Endpoint(OTHER, 7946)})
    return state


def test_found_address_is_replaced(found: State) -> None:
    """A found address is replaced when no link holds it."""
    assert follow_underlay(found)
    assert (found.bind, found.settings.bind, State(found.directory).bind) == (NEW, None, NEW)
    assert not follow_underlay(found), "it is held now"


def test_missing_address_is_found_again(found: State) -> None:
    """A lost underlay.json is written again."""
    (found.directory / "underlay.json").unlink()
    assert follow_underlay(found)
    assert State(found.directory).bind == NEW


def test_chosen_address_is_kept(found: State) -> None:
    """An address that somebody chose is never replaced."""
    found.save_settings(replace(found.settings, bind=OTHER))
    assert not follow_underlay(found)
    assert (found.bind, found.found_bind()) == (OTHER, OLD)


def test_overlay_address_is_not_taken(found: State) -> None:
    """While the underlay has no address, the route to the overlay may be the best one that is left."""
    ip(f"addr del {NEW}/24 dev u0", "addr add 172.20.101.0/16 dev u0", "route add default dev u0")
    with pytest.raises(InputError, match=r"172\.20\.101\.0 is inside the overlay"):
        follow_underlay(found)
    assert found.found_bind() == OLD


def test_own_and_broadcast_addresses_are_found() -> None:
    """The kernel tells which addresses are this host's own, on any link, and by which it broadcasts."""
    ip(
        "link set lo up",
        "addr add 192.0.2.7/32 dev lo",
        "link add u0 type bridge",
        "link set u0 up",
        f"addr add {NEW}/24 dev u0",
        "addr add 2001:db8::5/64 dev lo nodad",
    )
    found = underlay.local()
    assert found.addresses >= {NEW, *map(ip_address, ("192.0.2.7", "2001:db8::5", "127.0.0.1", "::1"))}
    assert OLD not in found.addresses
    assert ip_address("10.10.10.255") in found.broadcasts
    assert not found.addresses & found.broadcasts


HOME, AWAY = Place(ip_address("10.8.0.1"), "home"), Place(ip_address("10.9.0.1"), "u0")


def at_home(state: State, member: IPAddress) -> None:
    """A host whose home is the link `home`, beside the pair's link `u0` where a member may be."""
    ip("link add home type bridge", "link set home up", f"addr add {HOME.address}/24 dev home")
    state.save_settings(replace(state.settings, bind=None))
    state.save_found(Found(HOME, HOME))
    state.save_contacts({"barge3": Endpoint(member, 7946)})


def test_host_leaves_its_link_only_for_where_a_member_answers(
    state: State, netns_pair: tuple[Namespace, Namespace]
) -> None:
    """It stays while no member answers, moves once one does, and goes back; a restart between changes nothing."""
    one, two = netns_pair
    with two.entered():
        server = socket.socket()
        server.bind(("10.9.0.2", 7946))
    with one.entered(), server:
        at_home(state, ip_address("10.9.0.2"))
        follower = Follower()
        assert follow(state, follower, 0.0) is None
        ip(f"addr del {HOME.address}/24 dev home")
        times = [follow(state, follower, 1.0), follow(state, follower, 1.0 + PATIENCE)]
        assert times == [None, None], "nobody listens there"
        assert state.bind == HOME.address
        server.listen()
        assert follow(state, follower, 2.0 + PATIENCE) is None, "it asks once in a while"
        assert follow(state, follower, 1.0 + 2 * PATIENCE) == AWAY
        assert state.bind == AWAY.address

        again, follower = State(state.directory), Follower()
        assert again.found() == Found(AWAY, HOME)
        assert follow(again, follower, 0.0) is None
        ip(f"addr add {HOME.address}/24 dev home")
        assert follow(again, follower, 1.0) is None
        assert follow(again, follower, 1.0 + PATIENCE) is None, "the member has no way back to that address"
        with two.entered():
            ip("route add 10.8.0.0/24 via 10.9.0.1")
        assert follow(again, follower, 1.0 + 2 * PATIENCE) == HOME
        assert State(state.directory).found() == Found(HOME, HOME)


def test_moved_machine_has_an_address_though_nobody_answers(
    state: State, netns_pair: tuple[Namespace, Namespace]
) -> None:
    """All hosts may have been moved at once; one whose old link is still there goes on asking."""
    with netns_pair[0].entered():
        at_home(state, ip_address("10.9.0.7"))
        ip(f"addr del {HOME.address}/24 dev home")
        follower = Follower()
        assert [follow(state, follower, 0.0), follow(state, follower, PATIENCE)] == [None, None]
        ip("link del home")
        assert follow(state, follower, 2 * PATIENCE) == AWAY


def test_link_of_an_address_is_learnt(found: State) -> None:
    """An older version kept the address alone, and an address may go with its link into a bridge."""
    found.save_found_bind(NEW)
    assert not follow_underlay(found)
    assert found.found() == Found(Place(NEW, "u0"), Place(NEW, "u0"))
