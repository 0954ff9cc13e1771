"""What a firewall is said to block, beside what real packets meet there."""

import socket
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

from meshd.audit import openings
from meshd.net import firewall
from meshd.state.settings import Settings
from tests.conftest import eventually
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root]

SETTINGS = Settings(name="two")
TCP, UDP, WIREGUARD = "TCP 7946", "UDP 7946", "UDP 51820"
ALL = frozenset({TCP, UDP, WIREGUARD})
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Case:
    """Rules in the language of nft, or of iptables-restore, what is dropped, and what of that cannot be told."""

    rules: str
    dropped: frozenset[str]
    untold: frozenset[str] = NONE


def nft(
    chain: str, dropped: frozenset[str], untold: frozenset[str] = NONE, more: str = "", family: str = "inet"
) -> Case:
    return Case(f"table {family} t {{\n{more}\nchain input {{\n{chain}\n}}\n}}\n", dropped, untold)


def iptables(rules: str, dropped: frozenset[str], untold: frozenset[str] = NONE, policy: str = "DROP") -> Case:
    head = f"*filter\n:INPUT {policy} [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"
    return Case(f"{head}{rules}\nCOMMIT\n", dropped, untold)


OPEN = "type filter hook input priority 0; policy accept;\n"
SHUT = "type filter hook input priority 0; policy drop;\n"
CASES = {
    "nothing but the policy": nft(SHUT, ALL),
    "each port": nft(SHUT + "tcp dport { 22, 7946 } accept\nudp dport { 7946, 51820 } accept", NONE),
    "one port not": nft(SHUT + "tcp dport 7946 accept\nudp dport 7946 accept", frozenset({WIREGUARD})),
    "a range": nft(SHUT + "tcp dport 7000-8000 accept\nudp dport { 1-100, 50000-60000 } accept", frozenset({UDP})),
    "either protocol": nft(SHUT + "meta l4proto { tcp, udp } th dport 7946 accept", frozenset({WIREGUARD})),
    "one protocol": nft(SHUT + "ip protocol udp accept", frozenset({TCP})),
    "another link": nft(SHUT + 'iifname "wg*" accept\niif lo accept', ALL),
    "all but a link": nft(OPEN + 'iifname != "lo" drop', ALL),
    "a state map": nft(
        SHUT + "ct state vmap { established : accept, invalid : drop }\nudp dport 7946 accept", ALL - {UDP}
    ),
    "new connections": nft(OPEN + "ct state new reject", ALL),
    "old connections": nft(SHUT + "ct state established,related accept\nct status dnat accept", ALL),
    "a port map": nft(
        SHUT + "udp dport vmap { 7946 : accept, 51820 : drop }\ntcp dport 7946 accept", frozenset({WIREGUARD})
    ),
    "a jump": nft(SHUT + "jump mine", ALL - {TCP}, more="chain mine {\ntcp dport 7946 accept\n}"),
    "a goto": nft(OPEN + "goto mine\ndrop", NONE, more="chain mine {\ntcp dport 22 accept\n}"),
    "a return": nft(OPEN + "jump mine\naccept", ALL - {UDP}, more="chain mine {\nudp dport 7946 return\ndrop\n}"),
    "the other version of IP": nft(SHUT, NONE, family="ip6"),
    "a later chain": nft(OPEN + "accept", ALL, more="chain late {\ntype filter hook input priority 10;\nreject\n}"),
    "a named set": nft(
        SHUT + "tcp dport @open accept", ALL - {TCP}, more="set open {\ntype inet_service\nelements = { 7946 }\n}"
    ),
    "a named set without it": nft(
        SHUT + "tcp dport @open accept", ALL, frozenset({TCP}), more="set open {\ntype inet_service\n}"
    ),
    "an address": nft(SHUT + "ip saddr 10.9.0.1 accept", NONE),
    "another address": nft(SHUT + "ip saddr 10.9.0.9 accept", ALL, ALL),
    "an address shut out": nft(
        OPEN + "ip saddr 10.9.0.1 udp dport 51820 drop", frozenset({WIREGUARD}), frozenset({WIREGUARD})
    ),
    "a limit": nft(SHUT + "udp dport 7946 limit rate 100/second accept", ALL - {UDP}),
    "a table of iptables' name": Case("table ip filter {\nchain input {\n" + SHUT + "}\n}\n", ALL),
    "iptables: the policy": iptables("", ALL),
    "iptables: each port": iptables(
        "-A INPUT -p tcp --dport 7946 -j ACCEPT\n-A INPUT -p udp -m multiport --dports 7946,51000:52000 -j ACCEPT", NONE
    ),
    "iptables: one port not": iptables(
        "-A INPUT -p udp --dport 7946 -m conntrack --ctstate NEW -j ACCEPT",
        ALL - {UDP},
    ),
    "iptables: old connections": iptables("-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", ALL),
    "iptables: new connections": iptables("-A INPUT -m state --state NEW -j DROP", ALL, policy="ACCEPT"),
    "iptables: all but a link": iptables("-A INPUT ! -i lo -j REJECT", ALL, policy="ACCEPT"),
    "iptables: a comment": iptables(
        '-A INPUT -p tcp -m comment --comment "said \\"-j ACCEPT\\"" -j DROP', frozenset({TCP}), policy="ACCEPT"
    ),
    "iptables: a chain": iptables(
        ":mine - [0:0]\n-A INPUT -i u+ -j mine\n-A INPUT -j ACCEPT\n-A mine -p udp -j RETURN\n-A mine -j DROP",
        frozenset({TCP}),
        policy="ACCEPT",
    ),
    "iptables: a goto": iptables(
        ":mine - [0:0]\n-A INPUT -g mine\n-A INPUT -j DROP\n-A mine -p udp -j DROP", ALL - {TCP}, policy="ACCEPT"
    ),
    "iptables: an address": iptables("-A INPUT -s 10.9.0.1/32 -j ACCEPT", NONE),
    "iptables: maybe a return": iptables(
        ":mine - [0:0]\n-A INPUT -j mine\n-A mine -m addrtype --dst-type LOCAL -j RETURN\n-A mine -j DROP",
        NONE,
        policy="ACCEPT",
    ),
    "iptables: not what is logged": iptables("-A INPUT -p udp --dport 7946 -j LOG", ALL),
}


@pytest.mark.parametrize("name", CASES)
def test_reported_blocks_match_packets(name: str, netns_pair: tuple[Namespace, Namespace]) -> None:
    """What meshd reports as blocked is what real packets do not pass."""
    case, (client, host) = CASES[name], netns_pair
    with host.entered():
        load(case.rules)
        assert told(SETTINGS) == case.dropped - case.untold
    # Once more where a busy machine was late.
    eventually(lambda: dropped(client, host) == case.dropped, 3, "packets meet what the rules say")


FORWARD = "table inet t {\nchain forward {\ntype filter hook forward priority 0; policy drop;\n"
BOTH = {"the way from wg0 to ovl0", "the way from ovl0 to wg0"}


@pytest.mark.parametrize(
    ("rules", "docker", "expected"),
    [
        (FORWARD + "}\n}\n", True, BOTH),
        (FORWARD + "}\n}\n", False, set()),
        (FORWARD + 'iifname "wg0" accept\n}\n}\n', True, {"the way from ovl0 to wg0"}),
        (FORWARD + "tcp dport 80 accept\n}\n}\n", True, set()),
        ("*filter\n:FORWARD DROP [0:0]\nCOMMIT\n", True, BOTH),
        (
            "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -i wg0 -o ovl0 -j ACCEPT\nCOMMIT\n",
            True,
            {"the way from ovl0 to wg0"},
        ),
    ],
)
def test_reported_blocks_between_wireguard_and_docker(
    rules: str, docker: bool, expected: set[str], netns: Namespace
) -> None:
    """A blocked way between WireGuard and the Docker network is reported for each direction."""
    assert netns
    load(rules)
    assert told(replace(SETTINGS, docker=docker)) == expected


def test_rule_for_any_link_may_admit_without_link(netns: Namespace) -> None:
    """While no link has the address, a rule for any link may admit."""
    assert netns
    load("table inet t {\nchain input {\n" + SHUT + 'iifname "eth0" tcp dport 7946 accept\n}\n}\n')
    assert told(SETTINGS, link=None) == {UDP, WIREGUARD}


def test_reported_blocks_over_ipv6(netns: Namespace) -> None:
    """Over an IPv6 underlay the rules for IPv6 count."""
    assert netns
    load("table ip6 t {\nchain input {\n" + SHUT + "udp dport 51820 accept\n}\n}\n")
    assert told(SETTINGS, version=6) == {TCP, UDP}
    load("flush ruleset\n")
    saved = "*filter\n:INPUT DROP [0:0]\n:ufw6-user-input - [0:0]\nCOMMIT\n"
    subprocess.run(["ip6tables-restore"], input=saved, text=True, check=True, timeout=20)
    assert told(SETTINGS, version=6) == ALL
    assert told(SETTINGS) == NONE
    assert all("; to open it: ufw allow " in line for line in lines(SETTINGS, version=6))


def load(rules: str) -> None:
    program = ["iptables-restore"] if rules.startswith("*") else ["nft", "-f", "-"]
    subprocess.run(program, input=rules, text=True, check=True, timeout=20)


def told(settings: Settings, link: str | None = "u0", version: int = 4) -> set[str]:
    """Give what is said to be blocked: ports as in ALL, ways as they are called."""
    whats = [line.partition(" is blocked by ")[0] for line in lines(settings, link, version)]
    return {what.replace(" port", "").partition(" (")[0] for what in whats}


def lines(settings: Settings, link: str | None = "u0", version: int = 4) -> list[str]:
    needed = openings.needed(settings, link, version)
    return list(openings.blocked(needed, firewall.ruleset(), {version: firewall.saved(version) for version in (4, 6)}))


def dropped(client: Namespace, host: Namespace) -> set[str]:
    """Give which of the three ports of `host` no packet of `client` arrives at."""
    address, ports = "10.9.0.2", {UDP: 7946, WIREGUARD: 51820}
    with ExitStack() as stack:
        with host.entered():
            stack.enter_context(socket.create_server((address, 7946)))
            ears = {name: stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for name in ports}
            for name, port in ports.items():
                ears[name].bind((address, port))
                ears[name].settimeout(0)
        with client.entered(), socket.socket(type=socket.SOCK_DGRAM) as mouth:
            for port in ports.values():
                mouth.sendto(b"hello", (address, port))
            found = set() if _connects(address) else {TCP}
        return found | {name for name, ear in ears.items() if not _hears(ear)}


def _connects(address: str) -> bool:
    try:
        socket.create_connection((address, 7946), 0.3).close()
    except OSError:
        return False
    return True


def _hears(ear: socket.socket) -> bool:
    try:
        return bool(ear.recv(10))
    except BlockingIOError:
        return False
