"""Pings of given sizes between two real namespaces."""

import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from meshd.errors import ApplyError
from meshd.net import icmp
from meshd.net.icmp import Pings
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root]

ONE, TWO = IPv4Address("10.9.0.1"), IPv4Address("10.9.0.2")
Pair = tuple[Namespace, Namespace]


@pytest.fixture
def one(netns_pair: Pair) -> Iterator[Namespace]:
    """The first of two namespaces; the test runs in it."""
    with netns_pair[0].entered() as space:
        yield space


def heard(pings: Pings, last: int) -> list[int]:
    """The sizes that come back until that of the last ping does."""
    sizes: list[int] = []
    while last not in sizes:
        assert select.select([pings], [], [], 5)[0], f"{last} has not come back after {sizes}"
        sizes += pings.receive()
    return sizes


def run(*words: str, text: str | None = None) -> None:
    subprocess.run(words, input=text, text=True, check=True)


def test_pings_come_back_with_their_sizes(one: Namespace) -> None:
    """Pings come back with their sizes, and each counts once."""
    assert one
    with Pings("u0", TWO) as pings:
        for size in (1500, 577, 1500, 100):
            pings.send(size)
        assert heard(pings, 100) == [1500, 577, 1500, 100]


def test_pings_that_are_too_large_for_the_path_are_lost(netns_pair: Pair) -> None:
    """What drops large packets shows, whether on the way there or on the way back."""
    one, two = netns_pair
    for space in (two, one):
        with space.entered():
            chain = "chain input { type filter hook input priority 0; ip length > 1000 drop; }"
            run("nft", "-f", "-", text=f"table ip narrow {{ {chain}; }}")
        with one.entered(), Pings("u0", TWO) as pings:
            for size in (1500, 1001, 1000, 576):
                pings.send(size)
            assert heard(pings, 576) == [1000, 576]
        with space.entered():
            run("nft", "delete", "table", "ip", "narrow")


def test_the_mtu_of_a_route_does_not_bound_pings(one: Namespace) -> None:
    """Otherwise a path that was narrow once would never grow. Nor is a ping fragmented."""
    assert one
    run("ip", "route", "add", f"{TWO}/32", "dev", "u0", "mtu", "700")
    with Pings("u0", TWO) as pings:
        pings.send(1500)
        assert heard(pings, 1500) == [1500]
        with pytest.raises(ApplyError, match=r"sending pings to 10\.9\.0\.2 by u0: Message too long"):
            pings.send(1501)


def test_only_the_peer_answers(netns_pair: Pair) -> None:
    """What others send, and what does not answer a ping of this socket, is not heard."""
    one, two = netns_pair
    with two.entered():
        run("sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1")
        run("ip", "address", "add", "10.9.0.3/24", "dev", "u0")
        stranger = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        peer = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with stranger, peer, one.entered(), Pings("u0", TWO) as pings:
        stranger.bind(("10.9.0.3", 0))
        peer.bind((str(TWO), 0))
        pings.send(600)
        request = peer.recv(2000)[20:]
        reply = b"\0" + request[1:]
        for wrong in (reply[:8], reply[:20], reply[:-1], reply + b"\0", bytes(580), reply[:4] + b"?!" + reply[6:]):
            peer.sendto(wrong, (str(ONE), 0))
        peer.sendto(reply[:6] + struct.pack("!H", 9) + reply[8:], (str(ONE), 0))
        stranger.sendto(reply, (str(ONE), 0))
        for _ in range(2):
            peer.sendto(reply, (str(ONE), 0))
        pings.send(100)
        peer.sendto(b"\0" + peer.recv(2000)[21:], (str(ONE), 0))
        assert heard(pings, 100) == [600, 100], "once"


def test_a_peer_that_sends_too_much_is_heard_no_more(netns_pair: Pair) -> None:
    """A peer that floods its socket costs a few reads."""
    one, two = netns_pair
    with two.entered():
        peer = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with peer, one.entered(), Pings("u0", TWO) as pings:

        def answers() -> Iterator[int]:
            for _ in range(300):
                peer.sendto(bytes(64), (str(ONE), 0))
                assert select.select([pings], [], [], 5)[0]
                yield from pings.receive()

        with pytest.raises(ApplyError, match="too many answers that nobody asked for"):
            assert list(answers()) == []


def test_pings_without_a_link_or_a_way(one: Namespace) -> None:
    """A missing link is an error that names it."""
    assert one
    with pytest.raises(ApplyError, match=r"sending pings to 10\.9\.0\.2 by wg9: No such device"):
        Pings("wg9", TWO)
    with pytest.raises(ApplyError, match="reading the MTU of wg9: No such device"):
        icmp.link_mtu("wg9")
    assert icmp.sent_bytes("wg9") == 0


def test_mtu_and_traffic_of_a_link(one: Namespace) -> None:
    """The MTU and the traffic are those of the link in the thread's own namespace."""
    assert one
    run("ip", "link", "set", "u0", "mtu", "1234")
    assert icmp.link_mtu("u0") == 1234
    before = icmp.sent_bytes("u0")
    with Pings("u0", TWO) as pings:
        pings.send(1234)
        assert heard(pings, 1234) == [1234]
    assert before + 1234 <= icmp.sent_bytes("u0") < before + 2000
