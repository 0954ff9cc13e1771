"""Connections that began while meshd's rules were away, in a real kernel."""

import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network, ip_address
from pathlib import Path

import pytest

from meshd.net import conntrack, rules, underlay
from meshd.net.firewall import Nftables
from meshd.net.resources import Action, Change
from tests.conftest import OVERLAY, eventually
from tests.netns.conftest import Namespace
from tests.netns.test_firewall import inner, sh

pytestmark = [pytest.mark.root]

SUBNET = IPv4Network("172.20.101.0/24")
ALLOW = ("udp/53",)
TABLE = rules.table(wireguard="u0", port=51820, bridge="ovl0", overlay=OVERLAY, subnet=SUBNET, allow=ALLOW)
BOX, HOST, THEIRS, LAN, WORLD = "172.20.101.2", "172.20.101.1", "172.20.102.1", "192.168.7.2", "10.9.0.2"
# By which source address and to which address and port a datagram is sent, in which namespace.
SEND = (
    "import socket, sys; s = socket.socket(2, 2); s.bind((sys.argv[1], 0)); "
    "s.sendto(b'x', (sys.argv[2], int(sys.argv[3])))"
)
# Says which source it saw of each datagram.
LISTEN = """
import socket
s = socket.socket(2, 2); s.bind(("172.20.102.1", 9)); print("here", flush=True)
while True: print(s.recvfrom(9)[1][0], flush=True)
"""


@pytest.fixture
def site(netns_pair: tuple[Namespace, Namespace]) -> Iterator[tuple[Namespace, Namespace]]:
    """A host with a container, another network and Docker's masquerading, and the container of another host.

    The veth `u0` stands in for wg0; what is behind it is the overlay's other half, and the world as well.
    """
    one, two = netns_pair
    with inner(one, "ovl0", "172.20.101"), inner(one, "lan", "192.168.7"):
        with one.entered():
            sh("ip route add 172.20.102.0/24 via 10.9.0.2 src 172.20.101.1")
            for network, link in (("172.20.0.0/16", "ovl0"), ("192.168.7.0/24", "lan")):
                sh(f"iptables -w -t nat -A POSTROUTING -s {network} ! -o {link} -j MASQUERADE")
            sh(f"iptables -w -t nat -A PREROUTING -d {HOST} -p udp --dport 8080 -j DNAT --to-destination {LAN}:80")
        with two.entered():
            sh("ip addr add 172.20.102.1/32 dev lo && ip route add default via 10.9.0.1")
        yield one, two


def tracked() -> dict[tuple[str, str], str]:
    """The source and target of each connection that this namespace tracks, and the source that is answered."""
    found = {}
    for line in Path("/proc/thread-self/net/nf_conntrack").read_text().splitlines():
        source, target, _, answered = re.findall(r"(?:src|dst)=(\S+)", line)
        port = re.search(r"dport=(\d+)", line)
        found[source, f"{target}:{port[1]}" if port else target] = answered
    return found


def lay() -> None:
    Nftables(TABLE.name, ("ip", "ip6")).apply(Change(Action.ADD, TABLE))


def end() -> tuple[Counter[str], int]:
    local = underlay.local().addresses
    assert ip_address(HOST) in local
    return conntrack.end(conntrack.Admission(overlay=OVERLAY, subnet=SUBNET, bridge=True, allow=ALLOW, local=local))


def send(inside: str, source: str, target: str, port: int = 9) -> None:
    sh(f'{f"ip netns exec {inside} " if inside else ""}{sys.executable} -I -c "{SEND}" {source} {target} {port}')


def test_connections_that_contradict_the_rules_are_ended_and_no_others(site: tuple[Namespace, Namespace]) -> None:
    """Of all that began without the table, what its rules would not have let begin ends, and all else goes on."""
    one, two = site
    with one.entered():
        for target in (THEIRS, WORLD):
            send("ovl0", BOX, target)
            send("lan", LAN, target)
        send("ovl0", BOX, HOST, 22)
        sh(f"ip netns exec ovl0 busybox ping -c 1 -W 1 {THEIRS}")
        send("", HOST, BOX)
        send("", HOST, HOST)
    with two.entered():
        for port in (22, 53, 8080):
            send("", THEIRS, HOST, port)
        sh(f"busybox ping -c 1 -W 1 -I {THEIRS} {HOST}")
        for source in (THEIRS, WORLD):
            send("", source, BOX)
    with one.entered():
        before = tracked()
        assert before[BOX, f"{THEIRS}:9"] == "10.9.0.1", "its source was rewritten, or this test shows nothing"
        lay()
        assert tracked() == before, "which outlives the repair, or nobody would need this"
        assert end() == (Counter({conntrack.REWRITTEN: 2, conntrack.CLOSED: 4}), 0)
        after = tracked()
        assert before.keys() - after.keys() == {
            (BOX, f"{THEIRS}:9"),
            (BOX, THEIRS),  # the ping
            (BOX, f"{HOST}:22"),
            (LAN, f"{THEIRS}:9"),
            (THEIRS, f"{HOST}:22"),
            (WORLD, f"{BOX}:9"),
        }
        assert after.keys() <= before.keys()
        assert end() == (Counter(), 0)


@contextmanager
def listening(space: Namespace) -> Iterator["subprocess.Popen[str]"]:
    with space.entered():
        process = subprocess.Popen([sys.executable, "-I", "-c", LISTEN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_flow_goes_on_with_its_own_source(site: tuple[Namespace, Namespace]) -> None:
    """A flow of datagrams that began with a rewritten source goes on with its own one; a TCP connection ends."""
    one, two = site
    with two.entered():
        server = socket.create_server((THEIRS, 80))
    with Namespace("ovl0").entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client = socket.create_connection((THEIRS, 80), 5)
        later = socket.socket()
    with server, sender, client, later, listening(two) as heard:
        assert heard.stdout is not None
        sender.sendto(b"x", (THEIRS, 9))
        assert heard.stdout.readline() == "10.9.0.1\n"
        connection, (source, _) = server.accept()
        assert source == "10.9.0.1"
        with one.entered():
            lay()
            assert end()[0] == Counter({conntrack.REWRITTEN: 2})
        sender.sendto(b"x", (THEIRS, 9))
        assert heard.stdout.readline() == f"{BOX}\n"
        with connection, pytest.raises(ConnectionError):
            eventually(lambda: client.send(b"x") == 0, 5, "the other side knows no such connection")
        later.settimeout(5)
        later.connect((THEIRS, 80))
        with server.accept()[0] as another:
            assert another.getpeername()[0] == BOX


def test_hundreds_are_ended_at_once(site: tuple[Namespace, Namespace]) -> None:
    """They come in more than one message of the kernel's, among as many that stay."""
    one, two = site
    with two.entered():
        sh("ip route add blackhole 172.20.102.0/24")
    with Namespace("ovl0").entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(2, 255):
            for target in (f"172.20.102.{number}", f"10.9.0.{number}"):
                for port in (9, 10, 11):
                    sender.sendto(b"x", (target, port))
    with one.entered():
        lay()
        assert end() == (Counter({conntrack.REWRITTEN: 3 * 253}), 0)
        assert len([target for _, target in tracked() if target.startswith("10.9.0.")]) == 3 * 253
        assert not [target for _, target in tracked() if target.startswith("172.20.102.")]
