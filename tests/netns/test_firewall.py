"""meshd's rules in a real kernel, by the real nft and iptables, and what they do to packets."""

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Network

import pytest

from meshd.errors import ApplyError
from meshd.net import firewall, rules
from meshd.net.firewall import Iptables, Nftables, render
from meshd.net.resources import Action, Change, Engine, IptablesRule, Table
from meshd.reconcile import plan
from tests.conftest import OVERLAY, eventually
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root]

SUBNET = IPv4Network("172.20.101.0/24")
FAMILIES = ("ip", "ip6")
# The veth of the pair of namespaces stands in for wg0 where packets are to cross it.
TABLE = rules.table(wireguard="wg0", port=51820, bridge="ovl0", overlay=OVERLAY, subnet=SUBNET)
OVER_U0 = rules.table(wireguard="u0", port=51820, bridge="ovl0", overlay=OVERLAY, subnet=SUBNET)
SIX_OVER_U0 = rules.ipv6_table(wireguard="u0", bridge="ovl0")
BACK, ADMIT, JUMP, RAW = rules.iptables(
    wireguard="wg0", bridge="ovl0", subnet=SUBNET, engine=Engine("29.0"), owner="meshd:wg0"
)


def sh(command: str, check: bool = True) -> str:
    return subprocess.run(["sh", "-c", command], check=check, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture
def nft(netns: object) -> Nftables:
    assert netns
    return Nftables(TABLE.name, FAMILIES)


@pytest.fixture
def iptables(netns: object) -> Iptables:
    assert netns
    return Iptables("meshd:wg0")


# --- nftables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", ["ovl0", None])
def test_table_round_trip(nft: Nftables, bridge: str | None) -> None:
    """A table is read back as it was written, and adding or removing it twice is harmless."""
    table = rules.table(wireguard="wg0", port=51820, bridge=bridge, overlay=OVERLAY, subnet=SUBNET)
    assert nft.read() == []
    for _ in range(2):
        nft.apply(Change(Action.ADD, table))
        assert nft.read() == [table]
    for _ in range(2):
        nft.apply(Change(Action.REMOVE, table))
        assert nft.read() == []
    assert sh("nft list ruleset") == ""


@pytest.mark.parametrize(
    "meddling",
    [
        "nft delete rule ip meshd_wg0 output handle $(nft -a list chain ip meshd_wg0 output | sed -n 's/.*drop.* //p')",
        "nft insert rule ip meshd_wg0 forward accept",
        "nft flush chain ip meshd_wg0 postrouting",
        "nft add chain ip meshd_wg0 extra",
        "nft delete table ip meshd_wg0",
        "nft flush ruleset",
        "nft 'add chain ip meshd_wg0 output { policy drop; }'",
    ],
    ids=["deleted", "inserted", "flushed", "chain added", "table deleted", "all flushed", "policy changed"],
)
def test_changed_table_is_detected_and_restored(nft: Nftables, meddling: str) -> None:
    """A table that someone has changed is detected and restored."""
    nft.apply(Change(Action.ADD, TABLE))
    sh(meddling)
    assert nft.read() != [TABLE]
    nft.apply(Change(Action.SET, TABLE))
    assert nft.read() == [TABLE]


def test_both_ip_versions_have_table_of_same_name(nft: Nftables) -> None:
    """Both versions of IP have a table of the same name."""
    tables = [TABLE, rules.ipv6_table(wireguard="wg0", bridge="ovl0")]
    for table in tables:
        nft.apply(Change(Action.ADD, table))
    assert nft.read() == tables
    assert Nftables(TABLE.name, ("ip",)).read() == [TABLE], "on a host without IPv6 nobody asks for the other one"
    sh("nft insert rule ip6 meshd_wg0 input accept")
    assert nft.read() != tables
    nft.apply(Change(Action.SET, tables[1]))
    assert nft.read() == tables
    for table in tables:
        nft.apply(Change(Action.REMOVE, table))
    assert sh("nft list ruleset") == ""


def test_foreign_tables_are_kept(nft: Nftables) -> None:
    """The tables of others are left alone."""
    sh("nft 'table ip theirs { chain c { type filter hook input priority 0; tcp dport 22 accept; }; }'")
    before = sh("nft -s list ruleset")
    nft.apply(Change(Action.ADD, TABLE))
    nft.apply(Change(Action.REMOVE, TABLE))
    assert sh("nft -s list ruleset") == before


def test_refused_table_keeps_old_one(nft: Nftables) -> None:
    """A table that nft refuses leaves the old one in force."""
    nft.apply(Change(Action.ADD, TABLE))
    broken = Table(TABLE.family, TABLE.name, (*TABLE.chains, rules._chain("forward2", "filter", 0, "no such rule")))
    with pytest.raises(ApplyError, match="set nftables table ip meshd_wg0"):
        nft.apply(Change(Action.SET, broken))
    assert nft.read() == [TABLE]


def test_rendered_table_is_valid_nft_file(nft: Nftables) -> None:
    """The rendered table is also valid as a file for nft."""
    assert nft.read() == []
    subprocess.run(["nft", "-c", "-f", "-"], input=render(TABLE), text=True, check=True)


# --- what it does to packets ---------------------------------------------------------------------------------------


@contextmanager
def captured(space: Namespace, expression: str) -> Iterator[list[str]]:
    """Collect what arrives in a namespace while the block runs: a line of tcpdump's a packet."""
    lines: list[str] = []
    with space.entered():
        dump = subprocess.Popen(
            ["tcpdump", "-nlqi", "u0", "--immediate-mode", *expression.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert dump.stderr is not None
    while "listening on" not in dump.stderr.readline():
        assert dump.poll() is None
    try:
        yield lines
    finally:
        dump.terminate()
        lines += filter(None, dump.communicate(timeout=10)[0].splitlines())


def clear_packets(pair: tuple[Namespace, Namespace]) -> list[str]:
    """Send to an overlay address, from the host and through it, where nothing but the default route is left."""
    one, two = pair
    with captured(two, "icmp and dst net 172.20.0.0/16") as lines, one.entered():
        sh("busybox ping -c 2 -i 0.1 -W 1 172.20.7.1", check=False)
        sh("ip netns exec inner busybox ping -c 2 -i 0.1 -W 1 172.20.7.1", check=False)
    return lines


@pytest.fixture
def leaky(netns_pair: tuple[Namespace, Namespace]) -> Iterator[tuple[Namespace, Namespace]]:
    """A host that forwards, with a container behind it, and a default route and nothing else towards the overlay."""
    one, _ = netns_pair
    with one.entered():
        sh("ip netns add inner && ip link add c0 type veth peer name eth0 netns inner")
        try:
            sh("ip addr add 10.8.0.1/24 dev c0 && ip link set c0 up && sysctl -qw net.ipv4.ip_forward=1")
            sh("ip netns exec inner ip addr add 10.8.0.2/24 dev eth0 && ip netns exec inner ip link set eth0 up")
            sh("ip netns exec inner ip route add default via 10.8.0.1 && ip route add default via 10.9.0.2")
            yield netns_pair
        finally:
            sh("ip netns del inner")


def test_table_drops_overlay_packets_in_clear(leaky: tuple[Namespace, Namespace]) -> None:
    """Packets for the overlay do not leave by the default route, from the host or through it."""
    one, _ = leaky
    assert len(clear_packets(leaky)) == 4, "without the table they do leave, or this test shows nothing"
    with one.entered():
        Nftables(TABLE.name, FAMILIES).apply(Change(Action.ADD, TABLE))
    assert clear_packets(leaky) == []


def test_dropped_packets_are_counted_until_the_table_changes(leaky: tuple[Namespace, Namespace]) -> None:
    """A named counter counts what its rules drop. An unchanged table keeps it, and it makes no table a changed one."""
    one, _ = leaky
    nft = Nftables(TABLE.name, FAMILIES)
    with one.entered():
        nft.apply(Change(Action.ADD, TABLE))
        (before,) = nft.read()
        assert isinstance(before, Table)
        assert dict(before.counters) == dict(TABLE.counters), "all of them are there and at 0"
    assert clear_packets(leaky) == []
    with one.entered():
        for _ in range(2):
            (found,) = nft.read()
            assert isinstance(found, Table)
            # The host's own ping gives up when it is told that its first packet was dropped.
            assert dict(found.counters) == dict(TABLE.counters) | {"in_clear": 3}
            assert plan.diff([TABLE], [found], now=0.0, kinds={"table"}) == ()


SERVE = "import socket; s = socket.create_server(('10.9.0.2', 80)); print(1, flush=True); print(s.accept()[1][0])"
CONNECT = f"{sys.executable} -c \"import socket; socket.create_connection(('10.9.0.2', 80), 5, ('172.20.101.0', 0))\""


def source_seen(pair: tuple[Namespace, Namespace]) -> str:
    """Give the source address that the other side sees of a connection from the overlay."""
    one, two = pair
    with two.entered():
        server = subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "1\n"
    with one.entered():
        sh(CONNECT)
    return server.communicate(timeout=10)[0].strip()


@pytest.mark.parametrize("late", [True, False], ids=["masquerade after", "masquerade before"])
def test_table_keeps_source_under_masquerade(netns_pair: tuple[Namespace, Namespace], late: bool) -> None:
    """The source address survives a masquerade rule of someone else, before or after meshd's."""
    one, two = netns_pair
    masquerade = "iptables -w -t nat -I POSTROUTING -s 172.20.0.0/16 -j MASQUERADE"
    with two.entered():
        sh("ip route add 172.20.101.0/24 via 10.9.0.1")
    with one.entered():
        sh("ip addr add 172.20.101.0/32 dev lo")
        if not late:
            sh(masquerade)
            assert source_seen(netns_pair) == "10.9.0.1", "without the table it is lost, or this test shows nothing"
        Nftables(OVER_U0.name, FAMILIES).apply(Change(Action.ADD, OVER_U0))
        if late:
            sh(masquerade)
    assert source_seen(netns_pair) == "172.20.101.0"


def connects(pair: tuple[Namespace, Namespace], port: int) -> bool:
    """Tell whether the second namespace reaches a TCP port of the first one, where something listens."""
    one, two = pair
    serve = f"import socket; s = socket.create_server(('172.20.101.0', {port})); print(1, flush=True); s.accept()"
    with one.entered():
        server = subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "1\n"
    try:
        with two.entered():
            client = f"import socket; socket.create_connection(('172.20.101.0', {port}), 0.5)"
            return (
                subprocess.run([sys.executable, "-c", client], check=False, stderr=subprocess.DEVNULL).returncode == 0
            )
    finally:
        server.kill()
        server.communicate()


def test_table_closes_host_except_allowed(
    netns_pair: tuple[Namespace, Namespace],
) -> None:
    """The host is closed to the overlay except for ICMP and what is allowed."""
    one, two = netns_pair
    with one.entered():
        sh("ip addr add 172.20.101.0/32 dev lo")
    with two.entered():
        sh("ip route add 172.20.101.0/32 via 10.9.0.1")
    assert connects(netns_pair, 80), "without the table it is open, or this test shows nothing"
    for allow, open_ports in (((), []), (("tcp/80",), [80]), (("tcp/8000-8001",), [8001]), (("all",), [80, 8001])):
        table = rules.table(wireguard="u0", port=51820, bridge=None, overlay=OVERLAY, subnet=SUBNET, allow=allow)
        with one.entered():
            Nftables(table.name, FAMILIES).apply(Change(Action.SET, table))
        assert [port for port in (80, 8001) if connects(netns_pair, port)] == open_ports
        with two.entered():
            assert "1 packets received" in sh("busybox ping -c 1 -W 1 172.20.101.0")


@contextmanager
def inner(space: Namespace, name: str, network: str) -> Iterator[None]:
    """A namespace behind `space`, on a link `name` of it: NETWORK.1 on this side, NETWORK.2 inside."""
    with space.entered():
        sh(f"ip netns add {name} && ip link add {name} type veth peer name eth0 netns {name}")
        try:
            sh(f"ip addr add {network}.1/24 dev {name} && ip link set {name} up && sysctl -qw net.ipv4.ip_forward=1")
            sh(f"ip netns exec {name} ip addr add {network}.2/24 dev eth0 && ip netns exec {name} ip link set eth0 up")
            sh(f"ip netns exec {name} ip route add default via {network}.1")
            yield
        finally:
            sh(f"ip netns del {name}")


def reaches(space: Namespace, target: str, inside: str = "", source: str = "") -> bool:
    """Return whether a ping from a namespace, or from one behind it, is answered."""
    command = f"busybox ping -c 1 -W 1 {f'-I {source}' if source else ''} {target}"
    with space.entered():
        return " 1 packets received" in sh(f"{f'ip netns exec {inside} ' if inside else ''}{command}", check=False)


def test_table_closes_networks_behind_host(netns_pair: tuple[Namespace, Namespace]) -> None:
    """The tunnel does not lead to the networks behind a host, nor from them into it."""
    one, two = netns_pair
    with inner(one, "ovl0", "172.20.101"), inner(one, "lan", "192.168.7"):
        with two.entered():
            sh("ip route add 172.20.101.0/24 via 10.9.0.1 && ip route add 192.168.7.0/24 via 10.9.0.1")
        assert reaches(two, "192.168.7.2"), "without the table it is one, or this test shows nothing"
        with one.entered():
            Nftables(OVER_U0.name, FAMILIES).apply(Change(Action.ADD, OVER_U0))
        assert not reaches(two, "192.168.7.2")
        assert reaches(two, "172.20.101.2")
        assert not reaches(one, "10.9.0.2", inside="lan"), "nor from there into it"


def test_table_drops_spoofed_container_source(netns_pair: tuple[Namespace, Namespace]) -> None:
    """A container cannot send with the address of another host's container."""
    one, two = netns_pair
    with inner(one, "ovl0", "172.20.101"):
        with one.entered():
            sh("ip netns exec ovl0 ip addr add 172.20.102.1/32 dev lo && ip route add 172.20.102.1/32 dev ovl0")
        with two.entered():
            sh("ip route add 172.20.0.0/16 via 10.9.0.1")
        assert reaches(one, "10.9.0.2", "ovl0", "172.20.102.1"), "without the table it does, or this shows nothing"
        with one.entered():
            Nftables(OVER_U0.name, FAMILIES).apply(Change(Action.ADD, OVER_U0))
        assert not reaches(one, "10.9.0.2", "ovl0", "172.20.102.1")
        assert reaches(one, "10.9.0.2", "ovl0", "172.20.101.2")


@pytest.mark.parametrize("address", ["192.168.7.1", "169.254.7.1", "10.9.0.1"])
def test_table_closes_other_addresses_of_host(netns_pair: tuple[Namespace, Namespace], address: str) -> None:
    """The tunnel does not lead to the other addresses of a host."""
    one, two = netns_pair
    with one.entered():
        sh("ip link add lan type bridge && ip addr add 192.168.7.1/24 dev lan && ip addr add 169.254.7.1/16 dev lan")
        sh("ip link set lan up && ip addr add 172.20.101.0/32 dev lo")
    with two.entered():
        sh("ip route add default via 10.9.0.1")
    assert reaches(two, address), "without the table it is one, or this test shows nothing"
    with one.entered():
        Nftables(OVER_U0.name, FAMILIES).apply(Change(Action.ADD, OVER_U0))
    assert not reaches(two, address)
    assert reaches(two, "172.20.101.0")


def test_translated_port_is_open_on_overlay_address_only(
    netns_pair: tuple[Namespace, Namespace],
) -> None:
    """As Docker does for a published port: the tunnel is asked for the address that the sender wrote."""
    one, two = netns_pair
    published = ("127.0.0.1", "192.168.8.1", "172.20.101.0")
    with inner(one, "c0", "10.8.0"):
        with one.entered():
            sh("ip addr add 172.20.101.0/32 dev lo && ip addr add 192.168.8.1/32 dev lo")
            for address in published:
                sh(f"iptables -w -t nat -A PREROUTING -d {address} -p icmp -j DNAT --to-destination 10.8.0.2")
        with two.entered():
            _leave_loopback_to("10.9.0.1", "u0")
            sh("ip route add default via 10.9.0.1")
        assert [a for a in published if reaches(two, a)] == [*published], "without the table, or this shows nothing"
        with one.entered():
            Nftables(OVER_U0.name, FAMILIES).apply(Change(Action.ADD, OVER_U0))
        assert [a for a in published if reaches(two, a)] == ["172.20.101.0"]


def _leave_loopback_to(gateway: str, link: str) -> None:
    """Let this namespace send packets for 127.0.0.1 to somebody else, and take the answers."""
    sh(f"sysctl -qw net.ipv4.conf.{link}.route_localnet=1 && ip addr flush dev lo")
    sh(f"ip route flush table local root 127.0.0.0/8; ip route add 127.0.0.1 via {gateway}", check=False)


def test_table_closes_loopback_to_container(
    netns_pair: tuple[Namespace, Namespace],
) -> None:
    """A container does not reach loopback where its bridge routes it."""
    one, _ = netns_pair
    with inner(one, "ovl0", "172.20.101"):
        with one.entered():
            sh("sysctl -qw net.ipv4.conf.ovl0.route_localnet=1")
            script = "; ".join(
                (
                    "sysctl -qw net.ipv4.conf.eth0.route_localnet=1",
                    "ip addr flush dev lo",
                    "ip route flush table local root 127.0.0.0/8",
                    "ip route add 127.0.0.1 via 172.20.101.1",
                )
            )
            sh(f"ip netns exec ovl0 sh -c '{script}'")
        assert reaches(one, "127.0.0.1", inside="ovl0"), "without the table it does, or this test shows nothing"
        with one.entered():
            Nftables(OVER_U0.name, FAMILIES).apply(Change(Action.ADD, OVER_U0))
        assert not reaches(one, "127.0.0.1", inside="ovl0")
        assert reaches(one, "172.20.101.1", inside="ovl0")


def test_container_is_not_reached_at_unassigned_address(netns_pair: tuple[Namespace, Namespace]) -> None:
    """A container is not reached at an address that was given to nobody."""
    one, _ = netns_pair
    with inner(one, "ovl0", "172.20.101"):
        with one.entered():
            sh("ip addr add 172.20.101.0/16 dev ovl0 && ip netns exec ovl0 ip addr add 172.20.250.66/32 dev eth0")
        assert reaches(one, "172.20.250.66"), "without the table it is, or this test shows nothing"
        with one.entered():
            Nftables(OVER_U0.name, FAMILIES).apply(Change(Action.ADD, OVER_U0))
        assert not reaches(one, "172.20.250.66")
        assert reaches(one, "172.20.101.2")
        with one.entered(), pytest.raises(OSError, match="No route to host"):
            socket.create_connection(("172.20.250.66", 80), 5)


def test_nothing_of_ipv6_passes_by_the_links_of_a_mesh(netns_pair: tuple[Namespace, Namespace]) -> None:
    """From a container and through the tunnel, to the host itself and beyond it, and back."""
    one, two = netns_pair
    with inner(one, "ovl0", "172.20.101"), inner(one, "lan", "192.168.7"):
        with one.entered():
            sh("sysctl -qw net.ipv6.conf.all.forwarding=1")
            for name, network in (("ovl0", "fd00:1"), ("lan", "fd00:2")):
                sh(f"ip addr add {network}::1/64 dev {name} nodad")
                sh(f"ip netns exec {name} sysctl -qw net.ipv6.conf.all.disable_ipv6=0")
                sh(f"ip netns exec {name} ip addr add {network}::2/64 dev eth0 nodad")
                sh(f"ip netns exec {name} ip -6 route add default via {network}::1")
            sh("ip addr add fd00:9::1/64 dev u0 nodad")
        with two.entered():
            sh("ip addr add fd00:9::2/64 dev u0 nodad && ip -6 route add default via fd00:9::1")

        def passing() -> list[str]:
            ways = {
                "container to host": (one, "fd00:1::1", "ovl0"),
                "container to lan": (one, "fd00:2::2", "ovl0"),
                "container to tunnel": (one, "fd00:9::2", "ovl0"),
                "lan to container": (one, "fd00:1::2", "lan"),
                "lan to tunnel": (one, "fd00:9::2", "lan"),
                "host to container": (one, "fd00:1::2", ""),
                "host to tunnel": (one, "fd00:9::2", ""),
                "tunnel to host": (two, "fd00:2::1", ""),
                "tunnel to lan": (two, "fd00:2::2", ""),
                "lan to host": (one, "fd00:2::1", "lan"),
            }
            return [way for way, (space, target, inside) in ways.items() if reaches(space, target, inside)]

        # Soon: IPv6 first makes sure that nobody else has the links' own addresses.
        eventually(lambda: len(passing()) == 10, 10, "without the table all pass, or this test shows nothing")
        with one.entered():
            Nftables(SIX_OVER_U0.name, FAMILIES).apply(Change(Action.ADD, SIX_OVER_U0))
        assert passing() == ["lan to host"]


# --- an upgrade in place -------------------------------------------------------------------------------------------

# What meshd 0.1 before its IPv6 table has left on a host that is up, with u0 in place of wg0.
BEFORE = """
table ip meshd_u0 {
  chain postrouting {
    type nat hook postrouting priority 99; policy accept;
    ip saddr 172.20.101.0/24 oifname "u0" snat to ip saddr comment "meshd:0000000000000001"
  }
  chain forward {
    type filter hook forward priority -10; policy accept;
    iifname "ovl0" oifname "u0" ip saddr 172.20.101.0/24 accept comment "meshd:0000000000000002"
    iifname "ovl0" oifname "u0" drop comment "meshd:0000000000000003"
    iifname "u0" oifname "ovl0" ip daddr 172.20.101.0/24 accept comment "meshd:0000000000000004"
    iifname "u0" ip daddr != 172.20.101.0/24 drop comment "meshd:0000000000000005"
  }
  chain input {
    type filter hook input priority -10; policy accept;
    iifname != { "u0", "ovl0" } accept comment "meshd:0000000000000006"
    ip protocol icmp accept comment "meshd:0000000000000007"
    drop comment "meshd:0000000000000008"
  }
}
"""
# Sends to the first address, which counts, and to the second one, which nothing must reach, until its input ends.
STREAM = """
import select, socket, sys
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sent = 0
print("here", flush=True)
while not select.select([sys.stdin], [], [], 0.0005)[0]:
    sent += 1
    for target in sys.argv[1:]:
        sender.sendto(sent.to_bytes(8, "big"), (target, 9))
print(sent)
"""
COUNT = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
s.bind(("", 9))
print("here", flush=True)
seen = 0
while (data := s.recv(64)) != b"end":
    seen += 1
print(seen)
"""


def test_table_upgrade_in_place_cuts_and_opens_nothing(netns_pair: tuple[Namespace, Namespace]) -> None:
    """An upgrade of the table in place neither cuts nor opens anything."""
    one, two = netns_pair
    tables = (OVER_U0, SIX_OVER_U0)
    nft = Nftables(OVER_U0.name, FAMILIES)
    with inner(one, "ovl0", "172.20.101"), inner(one, "lan", "192.168.7"), ExitStack() as stack:
        with one.entered():
            subprocess.run(["nft", "-f", "-"], input=BEFORE, text=True, check=True)
            counters = [
                stack.enter_context(_python(COUNT, "ip", "netns", "exec", inside)) for inside in ("ovl0", "lan")
            ]
        with two.entered():
            sh("ip route add 172.20.101.0/24 via 10.9.0.1 && ip route add 192.168.7.0/24 via 10.9.0.1")
            sender = stack.enter_context(_python(STREAM, arguments=("172.20.101.2", "192.168.7.2")))
        with one.entered():
            for _ in range(50):
                old = nft.read()
                changes = plan.diff(tables, old, now=0.0, kinds={"table"})
                assert [change.action for change in changes] == [Action.SET, Action.ADD]
                for change in changes:
                    nft.apply(change)
                assert nft.read() == list(tables)
                # Back, for another look at the moment, as by somebody who takes the old version again.
                text = f"delete table ip meshd_u0\n{BEFORE}\ndelete table ip6 meshd_u0\n"
                subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
        sent = int(sender.communicate("\n", timeout=10)[0])
        with one.entered():
            for address in ("172.20.101.2", "192.168.7.2"):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
                    end.sendto(b"end", (address, 9))
        seen = [int(counter.communicate(timeout=10)[0]) for counter in counters]
    assert sent > 500
    assert seen == [sent, 0]


@contextmanager
def _python(script: str, *before: str, arguments: Sequence[str] = ()) -> Iterator["subprocess.Popen[str]"]:
    """Run a script in this namespace that has said `here`."""
    command = [*before, sys.executable, "-I", "-c", script, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "here\n"
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)


def test_remains_of_older_version_are_removed(netns: Namespace) -> None:
    """What an older version has left is removed with the rest."""
    assert netns
    nft = Nftables(OVER_U0.name, FAMILIES)
    subprocess.run(["nft", "-f", "-"], input=BEFORE, text=True, check=True)
    for change in plan.diff((), nft.read(), now=0.0, kinds={"table"}):
        nft.apply(change)
    assert sh("nft list ruleset") == ""


# --- iptables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [BACK, ADMIT, RAW], ids=str)
def test_iptables_rule_round_trip(iptables: Iptables, rule: IptablesRule) -> None:
    """A rule is read back and removed, and doing so twice is harmless."""
    assert iptables.read() == []
    for _ in range(2):
        iptables.apply(Change(Action.ADD, rule))
        assert iptables.read() == [rule]
    assert sh(f"iptables-save -t {rule.table}").count("meshd:wg0") == 1
    for _ in range(2):
        iptables.apply(Change(Action.REMOVE, rule))
        assert iptables.read() == []


def test_iptables_rule_goes_to_top_of_chain(iptables: Iptables) -> None:
    """A rule goes to the top of a chain that exists already."""
    sh("iptables -N DOCKER-USER && iptables -A DOCKER-USER -j RETURN")
    iptables.apply(Change(Action.ADD, ADMIT))
    lines = sh("iptables -S DOCKER-USER").splitlines()
    assert ["meshd:wg0" in line for line in lines] == [False, True, False]


def test_foreign_iptables_rules_are_kept(iptables: Iptables) -> None:
    """The rules of others and of another mesh are left alone."""
    other = IptablesRule("filter", "DOCKER-USER", ("-i", "wg1", "-o", "ovl1", "-j", "ACCEPT"), "meshd:wg1")
    Iptables("meshd:wg1").apply(Change(Action.ADD, other))
    sh("iptables -A DOCKER-USER -s 192.0.2.0/24 -j DROP")
    before = sh("iptables -S")
    iptables.apply(Change(Action.ADD, ADMIT))
    assert iptables.read() == [ADMIT]
    iptables.apply(Change(Action.REMOVE, ADMIT))
    assert sh("iptables -S") == before


def test_iptables_jump_is_made_after_chain(iptables: Iptables) -> None:
    """The jump to Docker's chain fails without the chain, and the order of keys makes the chain first."""
    with pytest.raises(ApplyError, match="FORWARD -j DOCKER-USER"):
        iptables.apply(Change(Action.ADD, JUMP))
    for rule in sorted((JUMP, ADMIT, BACK), key=lambda rule: rule.key):
        iptables.apply(Change(Action.ADD, rule))
    assert sorted(map(str, iptables.read())) == sorted(map(str, (JUMP, ADMIT, BACK)))
    sh("iptables -F")
    assert iptables.read() == []


def test_rules_with_undecodable_comment_are_read(iptables: Iptables, nft: Nftables) -> None:
    """A comment that is not UTF-8 hides no rule from iptables or nftables."""
    iptables.apply(Change(Action.ADD, ADMIT))
    nft.apply(Change(Action.ADD, TABLE))
    sh("iptables -A INPUT -m comment --comment \"$(printf 'caf\\351')\" -j ACCEPT")
    sh("printf 'add rule ip meshd_wg0 output accept comment \"caf\\351\"' | nft -f -")
    assert b"caf\xe9" in subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True).stdout
    assert iptables.read() == [ADMIT]
    assert nft.read() != [TABLE], "that of somebody else is seen"
    assert firewall.ruleset()
    iptables.apply(Change(Action.REMOVE, ADMIT))
    nft.apply(Change(Action.SET, TABLE))
    assert (iptables.read(), nft.read()) == ([], [TABLE])


def test_iptables_remove_takes_all_copies(iptables: Iptables) -> None:
    """All copies of a rule are removed."""
    iptables.apply(Change(Action.ADD, ADMIT))
    sh("iptables -A " + " ".join([ADMIT.chain, *ADMIT.match, "-m comment --comment meshd:wg0"]))
    iptables.apply(Change(Action.REMOVE, ADMIT))
    assert iptables.read() == []


def test_iptables_read_makes_no_tables(iptables: Iptables) -> None:
    """Reading the rules creates no tables."""
    before = sh("nft list ruleset")
    iptables.read()
    assert sh("nft list ruleset") == before
