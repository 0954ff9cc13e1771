"""Policy rules in a real namespace: what others set with `ip`, and where the kernel then sends packets."""

import json
import subprocess
from ipaddress import IPv4Network
from typing import Any

import pytest

from meshd.net.policy import Policy
from meshd.net.resources import Action, Change, Diversion, PolicyRule

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("sockets")]

OVERLAY = IPv4Network("172.20.0.0/16")


def ip(words: str) -> Any:
    out = subprocess.run(["ip", "-json", *words.split()], check=True, capture_output=True, text=True).stdout
    return json.loads(out or "[]")


def way(address: str = "172.20.7.1") -> str:
    """The link by which the kernel sends what a container sends to an address."""
    return str(ip(f"route get {address} from 172.20.101.1 iif ovl0")[0]["dev"])


@pytest.fixture
def policy(netns: object) -> Policy:
    assert netns
    for name in ("wg0", "ovl0", "other"):
        ip(f"link add {name} type bridge")
        ip(f"link set {name} up")
    ip("addr add 172.20.101.0/16 dev ovl0")
    subprocess.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"], check=True)
    ip("route add 172.20.7.0/24 dev wg0")
    assert way() == "wg0"
    return Policy(OVERLAY, ["wg0", "ovl0"])


def diversions(policy: Policy) -> list[Diversion]:
    return [found for found in policy.read() if isinstance(found, Diversion)]


@pytest.mark.parametrize(
    ("rule", "table"),
    [
        ("priority 5270 lookup 52", "default dev other table 52"),
        ("priority 5270 lookup 52 suppress_prefixlength 0", "172.20.7.0/25 dev other table 52"),
        ("priority 5270 lookup 51820 not fwmark 0xca6c", "default dev other table 51820"),
        ("priority 5270 lookup 52 iif ovl0", "172.16.0.0/12 dev other table 52"),
        ("priority 5270 lookup 52 from 172.20.101.0/24 to 172.20.7.1", "default dev other table 52"),
        ("priority 5270 lookup 52 to 172.20.99.9/16", "default dev other table 52"),
        ("priority 5270 lookup 52 not to 10.0.0.0/8", "unreachable default table 52"),
    ],
)
def test_rule_that_takes_the_overlay(policy: Policy, rule: str, table: str) -> None:
    """meshd's own comes right before it, and the kernel sends packets for the overlay as without either."""
    ip(f"route add {table}")
    ip(f"rule add {rule}")
    (found,) = diversions(policy)
    assert found.before == 5269
    policy.apply(Change(Action.ADD, PolicyRule(OVERLAY, 5269)))
    assert way() == "wg0"
    assert policy.read() == [PolicyRule(OVERLAY, 5269), found], "it is still needed"
    shown = [row for row in ip("-details rule") if row["priority"] == 5269]
    assert [(r["src"], r["dst"], r["dstlen"], r["table"], r["protocol"]) for r in shown] == [
        ("all", "172.20.0.0", 16, "main", "77")
    ]
    ip("rule del priority 5270")
    assert policy.read() == [PolicyRule(OVERLAY, 5269)]


@pytest.mark.parametrize(
    ("rule", "table"),
    [
        ("priority 5270 lookup 52", "100.64.0.0/10 dev other table 52"),
        ("priority 5270 lookup 52", ""),
        ("priority 5270 lookup 52 suppress_prefixlength 0", "default dev other table 52"),
        ("priority 5270 lookup 52 fwmark 0x80000/0xff0000", "default dev other table 52"),
        ("priority 5270 lookup 52 iif other", "default dev other table 52"),
        ("priority 5270 lookup 52 from 10.0.0.0/8", "default dev other table 52"),
        ("priority 5270 lookup 52 to 172.21.0.0/16", "default dev other table 52"),
        ("priority 5270 lookup 52 not to 172.16.0.0/12", "default dev other table 52"),
        ("priority 40000 lookup 52", "default dev other table 52"),
        ("priority 5270 prohibit to 10.0.0.0/8", ""),
    ],
)
def test_rule_that_leaves_the_overlay_alone(policy: Policy, rule: str, table: str) -> None:
    if table:
        ip(f"route add {table}")
    ip(f"rule add {rule}")
    assert policy.read() == []
    assert way() == "wg0"


def test_table_that_throws_the_overlay_leaves_it_alone(policy: Policy) -> None:
    """As another VPN does for the networks of a host that it is told to leave alone."""
    ip("route add default dev other table 52")
    ip("route add throw 172.16.0.0/12 table 52")
    ip("rule add priority 5270 lookup 52")
    assert policy.read() == []
    assert way() == "wg0"
    ip("route add 172.20.7.0/25 dev other table 52")
    assert [found.before for found in diversions(policy)] == [5269]
    assert way() == "other"


def test_rules_of_wg_quick_leave_the_overlay_alone(policy: Policy) -> None:
    """It asks the main table first, for all but its default route."""
    ip("route add default dev other table 51820")
    ip("rule add not fwmark 0xca6c lookup 51820")
    assert [found.before for found in diversions(policy)] == [32764]
    ip("rule add lookup main suppress_prefixlength 0")
    assert policy.read() == []
    assert way() == "wg0"


def test_rule_never_comes_before_own_addresses(policy: Policy) -> None:
    """Where there is no room behind the rule for the table local, the other one is named with what to do."""
    ip("route add default dev other table 52")
    ip("rule add priority 1 lookup 52")
    (found,) = diversions(policy)
    assert found.before is None
    assert "the policy rule 1 (from all lookup 52) takes packets for the overlay" in found.text
    assert "'ip rule del priority 1 lookup 52'" in found.text
    ip("rule del priority 1 lookup 52")
    ip("rule add priority 32765 lookup local")
    ip("rule del priority 0 lookup local")
    assert policy.read() == [], "the table main is asked for the overlay as before"
    ip("rule add priority 5270 lookup 52")
    (found,) = diversions(policy)
    assert found.before is None
    assert "put that one first ('ip rule add priority 0 lookup local')" in found.text
    ip("rule add priority 200 lookup local")
    assert [found.before for found in diversions(policy)] == [5269], "what another program has moved a little is heeded"


def test_rule_that_refuses_is_named(policy: Policy) -> None:
    """Whoever forbids something means to: it is left alone, and the command that is named removes it."""
    ip("rule add priority 100 from 172.20.101.7 prohibit")
    (found,) = diversions(policy)
    assert found.before is None
    assert "the policy rule 100 (from 172.20.101.7/32 prohibit) refuses packets for the overlay" in found.text
    ip(found.text.partition("'ip ")[2].partition("'")[0])
    assert policy.read() == []


def test_rules_of_two_meshes_are_separate(policy: Policy) -> None:
    other = Policy(IPv4Network("172.21.0.0/16"), ["wg1"])
    rules = [PolicyRule(OVERLAY, 99), PolicyRule(IPv4Network("172.21.0.0/16"), 99)]
    for adapter, rule in zip((policy, other), rules, strict=True):
        adapter.apply(Change(Action.ADD, rule))
    assert (policy.read(), other.read()) == (rules[:1], rules[1:])
    policy.apply(Change(Action.REMOVE, rules[0]))
    assert (policy.read(), other.read()) == ([], rules[1:])
