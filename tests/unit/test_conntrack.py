"""Which connections contradict the rules of a mesh."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from meshd.net.conntrack import CLOSED, REWRITTEN, Admission, Connection
from tests.conftest import OVERLAY

BOX, NEIGHBOUR, HOST, OUTSIDE_OWN = "172.20.101.2", "172.20.101.3", "172.20.101.0", "172.20.250.9"
THEIRS, THEIR_HOST = "172.20.102.2", "172.20.102.0"
ELSEWHERE, UNDERLAY, LAN = "192.0.2.1", "10.10.10.101", "172.17.0.2"
TCP, ICMP = 6, 1


def admission(*, bridge: bool = True, allow: tuple[str, ...] = ()) -> Admission:
    local = frozenset(map(IPv4Address, (HOST, UNDERLAY, "172.17.0.1", "127.0.0.1")))
    return Admission(overlay=OVERLAY, subnet=IPv4Network("172.20.101.0/24"), bridge=bridge, allow=allow, local=local)


def connection(
    source: str, target: str, answerer: str = "", answered: str = "", *, protocol: int = TCP, port: int = 80
) -> Connection:
    reply = IPv4Address(answerer or target), IPv4Address(answered or source)
    return Connection(protocol, IPv4Address(source), IPv4Address(target), *reply, port)


FINE = {
    "to another host's container": connection(BOX, THEIRS),
    "from there": connection(THEIRS, BOX),
    "of the host itself": connection(HOST, THEIRS),
    "within the bridge": connection(BOX, NEIGHBOUR),
    "within the bridge, by a published port and with the bridge's source": connection(BOX, HOST, BOX, HOST),
    "to the world, masqueraded": connection(BOX, ELSEWHERE, ELSEWHERE, UNDERLAY),
    "to a published port of another network": connection(BOX, HOST, LAN, "172.17.0.1"),
    "of others to such a port": connection(THEIRS, HOST, LAN),
    "of the world to a published port": connection(ELSEWHERE, UNDERLAY, BOX),
    "of the world to the host's overlay address": connection(ELSEWHERE, HOST),
    "of the host by another address": connection(UNDERLAY, THEIRS, THEIRS, HOST),
    "of the host to its container by another address": connection(UNDERLAY, BOX),
    "of the host to itself": connection(HOST, UNDERLAY),
    "from the host to its container": connection(HOST, BOX),
    "a ping of others to the host": connection(THEIRS, HOST, protocol=ICMP, port=0),
    "of others altogether": connection(LAN, ELSEWHERE, ELSEWHERE, UNDERLAY),
    "to the underlay": connection(ELSEWHERE, UNDERLAY),
    "of somebody who speaks for another host's container": connection(OUTSIDE_OWN, BOX),
}
WRONG = {
    "masqueraded to another host's container": (connection(BOX, THEIRS, THEIRS, HOST), REWRITTEN),
    "masqueraded to the underlay's address": (connection(BOX, THEIRS, THEIRS, UNDERLAY), REWRITTEN),
    "masqueraded to another host": (connection(BOX, THEIR_HOST, THEIR_HOST, HOST, protocol=ICMP), REWRITTEN),
    "of the host itself, masqueraded": (connection(HOST, THEIRS, THEIRS, UNDERLAY), REWRITTEN),
    "by a port that leads to another host": (connection(BOX, UNDERLAY, THEIRS, HOST), REWRITTEN),
    "from another network into the tunnel": (connection(LAN, THEIRS, THEIRS, HOST), CLOSED),
    "from the world into the tunnel": (connection(ELSEWHERE, UNDERLAY, THEIRS), CLOSED),
    "of the world to a container": (connection(ELSEWHERE, BOX), CLOSED),
    "of others to the host": (connection(THEIRS, HOST, port=22), CLOSED),
    "of a container to the host": (connection(BOX, UNDERLAY, port=22), CLOSED),
}


@pytest.mark.parametrize("name", FINE)
def test_connection_that_the_rules_admit_is_kept(name: str) -> None:
    assert admission().contradiction(FINE[name]) == ""


@pytest.mark.parametrize("name", WRONG)
def test_connection_that_contradicts_the_rules_is_told_why(name: str) -> None:
    found, why = WRONG[name]
    assert admission().contradiction(found) == why


@pytest.mark.parametrize(
    ("allow", "closed"),
    [
        ((), [22, 80, 5005]),
        (("tcp/22",), [80, 5005]),
        (("tcp/22", "tcp/5000-5010"), [80]),
        (("udp/22",), [22, 80, 5005]),
        (("all",), []),
    ],
)
def test_what_is_allowed_on_the_host_is_kept(allow: tuple[str, ...], closed: list[int]) -> None:
    admitted = admission(allow=allow)
    assert [p for p in (22, 80, 5005) if admitted.contradiction(connection(THEIRS, HOST, port=p))] == closed


def test_related_connection_is_kept() -> None:
    """As the data connection of FTP, which the rules accept as related."""
    closed = connection(THEIRS, HOST, port=4000)
    assert admission().contradiction(closed) == CLOSED
    assert admission().contradiction(replace(closed, related=True)) == ""


def test_without_a_bridge_nothing_guards_containers() -> None:
    assert admission(bridge=False).contradiction(connection(ELSEWHERE, BOX)) == ""
    assert admission(bridge=False).contradiction(connection(LAN, THEIRS, THEIRS, HOST)) == CLOSED
