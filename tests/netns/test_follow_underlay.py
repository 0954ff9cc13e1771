"""A host follows its underlay address, unless somebody chose one; tests/lab has it with Serf."""

import subprocess
from dataclasses import replace
from ipaddress import ip_address

import pytest

from meshd.daemon.agent import follow_underlay
from meshd.endpoint import Endpoint
from meshd.errors import InputError
from meshd.net import underlay
from meshd.state.directory import State

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("netns")]

OLD, NEW, OTHER = (ip_address(f"10.10.10.{last}") for last in (101, 102, 103))


@pytest.fixture
def found(state: State) -> State:
    """A host that has found the address OLD, and knows a member in that network; the machine has NEW only."""
    for command in ("link add u0 type bridge", "link set u0 up", f"addr add {NEW}/24 dev u0"):
        subprocess.run(["ip", *command.split()], check=True)
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
    for command in (
        f"addr del {NEW}/24 dev u0",
        "addr add 172.20.101.0/16 dev u0",
        "route add default dev u0",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    with pytest.raises(InputError, match=r"172\.20\.101\.0 is inside the overlay"):
        follow_underlay(found)
    assert found.found_bind() == OLD


def test_own_and_broadcast_addresses_are_found() -> None:
    """The kernel tells which addresses are this host's own, on any link, and by which it broadcasts."""
    for command in (
        "link set lo up",
        "addr add 192.0.2.7/32 dev lo",
        "link add u0 type bridge",
        "link set u0 up",
        f"addr add {NEW}/24 dev u0",
        "addr add 2001:db8::5/64 dev lo nodad",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    found = underlay.local()
    assert found.addresses >= {NEW, *map(ip_address, ("192.0.2.7", "2001:db8::5", "127.0.0.1", "::1"))}
    assert OLD not in found.addresses
    assert ip_address("10.10.10.255") in found.broadcasts
    assert not found.addresses & found.broadcasts
