"""meshd's rules in a real kernel, by the real nft and iptables, and what they do to packets."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network

import pytest

from meshd.errors import ApplyError
from meshd.net import firewall, rules
from meshd.net.firewall import Iptables, Nftables, render
from meshd.net.resources import Action, Change, Engine, IptablesRule, Table
from tests.conftest import OVERLAY
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root]

SUBNET = IPv4Network("172.20.101.0/24")
FAMILIES = ("ip", "ip6")
# The veth of the pair of namespaces stands in for wg0 where packets are to cross it.
TABLE = rules.table(wireguard="wg0", port=51820, bridge="ovl0", overlay=OVERLAY, subnet=SUBNET)
OVER_U0 = rules.table(wireguard="u0", port=51820, bridge="ovl0", overlay=OVERLAY, subnet=SUBNET)
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
def test_a_table_is_read_back_as_it_was_written(nft: Nftables, bridge: str | None) -> None:
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
def test_what_others_did_to_the_table_is_seen_and_mended(nft: Nftables, meddling: str) -> None:
    nft.apply(Change(Action.ADD, TABLE))
    sh(meddling)
    assert nft.read() != [TABLE]
    nft.apply(Change(Action.SET, TABLE))
    assert nft.read() == [TABLE]


def test_the_tables_of_others_are_left_alone(nft: Nftables) -> None:
    sh("nft 'table ip theirs { chain c { type filter hook input priority 0; tcp dport 22 accept; }; }'")
    before = sh("nft -s list ruleset")
    nft.apply(Change(Action.ADD, TABLE))
    nft.apply(Change(Action.REMOVE, TABLE))
    assert sh("nft -s list ruleset") == before


def test_a_table_that_nft_refuses_leaves_the_old_one_in_force(nft: Nftables) -> None:
    nft.apply(Change(Action.ADD, TABLE))
    broken = Table(TABLE.family, TABLE.name, (*TABLE.chains, rules._chain("forward2", "filter", 0, "no such rule")))
    with pytest.raises(ApplyError, match="set nftables table ip meshd_wg0"):
        nft.apply(Change(Action.SET, broken))
    assert nft.read() == [TABLE]


def test_what_nft_is_given_it_takes_as_a_file_too(nft: Nftables) -> None:
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


def test_nothing_for_the_overlay_leaves_in_clear(leaky: tuple[Namespace, Namespace]) -> None:
    one, _ = leaky
    assert len(clear_packets(leaky)) == 4, "without the table they do leave, or this test shows nothing"
    with one.entered():
        Nftables(TABLE.name, FAMILIES).apply(Change(Action.ADD, TABLE))
    assert clear_packets(leaky) == []


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
def test_a_source_is_kept_whatever_masquerades(netns_pair: tuple[Namespace, Namespace], late: bool) -> None:
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
    serve = f"import socket; s = socket.create_server(('10.9.0.1', {port})); print(1, flush=True); s.accept()"
    with one.entered():
        server = subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "1\n"
    try:
        with two.entered():
            client = f"import socket; socket.create_connection(('10.9.0.1', {port}), 0.5)"
            return (
                subprocess.run([sys.executable, "-c", client], check=False, stderr=subprocess.DEVNULL).returncode == 0
            )
    finally:
        server.kill()
        server.communicate()


def test_the_host_itself_is_closed_to_the_overlay_but_for_what_is_allowed(
    netns_pair: tuple[Namespace, Namespace],
) -> None:
    one, two = netns_pair
    assert connects(netns_pair, 80), "without the table it is open, or this test shows nothing"
    for allow, open_ports in (((), []), (("tcp/80",), [80]), (("tcp/8000-8001",), [8001]), (("all",), [80, 8001])):
        table = rules.table(wireguard="u0", port=51820, bridge=None, overlay=OVERLAY, subnet=SUBNET, allow=allow)
        with one.entered():
            Nftables(table.name, FAMILIES).apply(Change(Action.SET, table))
        assert [port for port in (80, 8001) if connects(netns_pair, port)] == open_ports
        with two.entered():
            assert "1 packets received" in sh("busybox ping -c 1 -W 1 10.9.0.1")


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
    """Tell whether a ping from a namespace, or from one behind it, is answered."""
    command = f"busybox ping -c 1 -W 1 {f'-I {source}' if source else ''} {target}"
    with space.entered():
        return " 1 packets received" in sh(f"{f'ip netns exec {inside} ' if inside else ''}{command}", check=False)


def test_a_tunnel_is_no_way_to_the_networks_behind_a_host(netns_pair: tuple[Namespace, Namespace]) -> None:
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


def test_a_container_does_not_speak_for_another_hosts(netns_pair: tuple[Namespace, Namespace]) -> None:
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


# --- iptables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [BACK, ADMIT, RAW], ids=str)
def test_an_iptables_rule_is_read_back_and_removed(iptables: Iptables, rule: IptablesRule) -> None:
    assert iptables.read() == []
    for _ in range(2):
        iptables.apply(Change(Action.ADD, rule))
        assert iptables.read() == [rule]
    assert sh(f"iptables-save -t {rule.table}").count("meshd:wg0") == 1
    for _ in range(2):
        iptables.apply(Change(Action.REMOVE, rule))
        assert iptables.read() == []


def test_a_rule_goes_to_the_top_of_a_chain_that_is_there(iptables: Iptables) -> None:
    sh("iptables -N DOCKER-USER && iptables -A DOCKER-USER -j RETURN")
    iptables.apply(Change(Action.ADD, ADMIT))
    lines = sh("iptables -S DOCKER-USER").splitlines()
    assert ["meshd:wg0" in line for line in lines] == [False, True, False]


def test_the_rules_of_others_and_of_another_mesh_stay(iptables: Iptables) -> None:
    other = IptablesRule("filter", "DOCKER-USER", ("-i", "wg1", "-o", "ovl1", "-j", "ACCEPT"), "meshd:wg1")
    Iptables("meshd:wg1").apply(Change(Action.ADD, other))
    sh("iptables -A DOCKER-USER -s 192.0.2.0/24 -j DROP")
    before = sh("iptables -S")
    iptables.apply(Change(Action.ADD, ADMIT))
    assert iptables.read() == [ADMIT]
    iptables.apply(Change(Action.REMOVE, ADMIT))
    assert sh("iptables -S") == before


def test_the_jump_to_dockers_chain_needs_the_chain_and_is_made_after_it(iptables: Iptables) -> None:
    with pytest.raises(ApplyError, match="FORWARD -j DOCKER-USER"):
        iptables.apply(Change(Action.ADD, JUMP))
    for rule in sorted((JUMP, ADMIT, BACK), key=lambda rule: rule.key):
        iptables.apply(Change(Action.ADD, rule))
    assert sorted(map(str, iptables.read())) == sorted(map(str, (JUMP, ADMIT, BACK)))
    sh("iptables -F")
    assert iptables.read() == []


def test_a_comment_that_is_no_text_hides_no_rule(iptables: Iptables, nft: Nftables) -> None:
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


def test_all_copies_of_a_rule_go(iptables: Iptables) -> None:
    iptables.apply(Change(Action.ADD, ADMIT))
    sh("iptables -A " + " ".join([ADMIT.chain, *ADMIT.match, "-m comment --comment meshd:wg0"]))
    iptables.apply(Change(Action.REMOVE, ADMIT))
    assert iptables.read() == []


def test_reading_makes_no_tables(iptables: Iptables) -> None:
    before = sh("nft list ruleset")
    iptables.read()
    assert sh("nft list ruleset") == before
