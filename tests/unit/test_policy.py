"""Which policy rules of others take the overlay, and where meshd's own comes before them."""

from dataclasses import replace
from ipaddress import IPv4Network

import pytest

from meshd.net.policy import ForeignRule, Reach, diversions
from meshd.net.resources import Diversion

OVERLAY = IPv4Network("172.20.0.0/16")
LINKS = frozenset({"lo", "wg0", "ovl0"})
LOCAL, MAIN, DEFAULT = ForeignRule(0, table=255), ForeignRule(32766, table=254), ForeignRule(32767, table=253)
VPN = ForeignRule(5270, table=52)
# What Tailscale sets: its own packets are marked, and go by the other tables.
TAILSCALE = (
    ForeignRule(5210, table=254, mark=(0x80000, 0xFF0000)),
    ForeignRule(5230, table=253, mark=(0x80000, 0xFF0000)),
    ForeignRule(5250, action=7, mark=(0x80000, 0xFF0000)),
    VPN,
)


def found(*rules: ForeignRule, leading: tuple[int, ...] = (52,)) -> list[Diversion]:
    """What takes the overlay, where the tables `leading` have a route for it."""
    return diversions(rules, OVERLAY, LINKS, lambda rule: rule.table in leading)


def before(*rules: ForeignRule) -> list[int | None]:
    return [diversion.before for diversion in found(*rules)]


def test_plain_host_has_none() -> None:
    assert found(LOCAL, MAIN, DEFAULT, leading=(253,)) == []


def test_own_rule_comes_right_before_the_first_that_takes_the_overlay() -> None:
    assert before(LOCAL, *TAILSCALE, MAIN, DEFAULT) == [5269]
    assert before(LOCAL, ForeignRule(99, table=52), *TAILSCALE, MAIN, DEFAULT) == [98]
    assert found(LOCAL, *TAILSCALE, MAIN, DEFAULT, leading=()) == [], "no route for the overlay is there"


def test_rules_behind_the_main_table_take_nothing() -> None:
    for whole in (MAIN, ForeignRule(10, table=254, to=IPv4Network("172.16.0.0/12")), ForeignRule(10, table=254)):
        assert before(LOCAL, whole, ForeignRule(40000, table=52)) == []
    for part in (
        ForeignRule(10, table=254, iif="ovl0"),
        ForeignRule(10, table=254, suppressed=16),
        ForeignRule(10, table=254, narrows=("suppress_ifgroup",)),
        ForeignRule(10, table=254, inverted=True, to=OVERLAY),
    ):
        assert before(LOCAL, part, ForeignRule(40000, table=52)) == [39999], part


def test_own_rule_never_comes_before_that_of_the_table_local() -> None:
    """There the host's own addresses are looked up."""
    assert before(LOCAL, ForeignRule(2, table=52), MAIN) == [1]
    assert before(LOCAL, ForeignRule(1, table=52), MAIN) == [None]
    assert before(LOCAL, ForeignRule(0, table=52), MAIN) == [None]
    assert before(ForeignRule(200, table=255), VPN, MAIN) == [5269]
    assert before(VPN, ForeignRule(32765, table=255), MAIN) == [None]
    assert before(ForeignRule(0, table=255, to=IPv4Network("10.0.0.0/8")), VPN, MAIN) == [None], "not for all addresses"
    assert before(LOCAL, ForeignRule(1, table=52), VPN, MAIN) == [None, 5269], "and before the next it helps no less"


@pytest.mark.parametrize("action", [6, 7, 8])
def test_rule_that_refuses_is_left_alone_and_named(action: int) -> None:
    """Whoever sets one means it."""
    refusing = ForeignRule(100, action=action, source=IPv4Network("172.20.1.7"))
    assert before(LOCAL, refusing, MAIN) == [None]
    assert before(LOCAL, refusing, *TAILSCALE, MAIN) == [None, 5269]
    assert before(LOCAL, MAIN, ForeignRule(40000, action=action)) == []


def test_jumps_take_nothing_by_themselves() -> None:
    assert before(LOCAL, ForeignRule(10, action=2), ForeignRule(11, action=3), MAIN) == []


@pytest.mark.parametrize(
    ("rule", "plain", "inverted"),
    [
        (ForeignRule(1), Reach.ALL, Reach.NONE),
        (ForeignRule(1, mark=(0xCA6C, 0xFFFFFFFF)), Reach.NONE, Reach.ALL),
        (ForeignRule(1, mark=(0, 0xFF)), Reach.ALL, Reach.NONE),
        (ForeignRule(1, to=OVERLAY), Reach.ALL, Reach.NONE),
        (ForeignRule(1, to=IPv4Network("172.20.7.0/24")), Reach.SOME, Reach.SOME),
        (ForeignRule(1, to=IPv4Network("10.0.0.0/8")), Reach.NONE, Reach.ALL),
        (ForeignRule(1, source=IPv4Network("172.16.0.0/12")), Reach.SOME, Reach.SOME),
        (ForeignRule(1, source=IPv4Network("10.0.0.0/8")), Reach.NONE, Reach.ALL),
        (ForeignRule(1, iif="lo"), Reach.SOME, Reach.SOME),
        (ForeignRule(1, iif="wg0"), Reach.SOME, Reach.SOME),
        (ForeignRule(1, iif="eth0"), Reach.NONE, Reach.ALL),
        (ForeignRule(1, oif="eth0"), Reach.NONE, Reach.ALL),
        (ForeignRule(1, iif="ovl0", to=IPv4Network("10.0.0.0/8")), Reach.NONE, Reach.ALL),
        (ForeignRule(1, narrows=("dport",)), Reach.SOME, Reach.SOME),
        (ForeignRule(1, narrows=("l3mdev",)), Reach.NONE, Reach.ALL),
    ],
    ids=str,
)
def test_reach_of_a_rule(rule: ForeignRule, plain: Reach, inverted: Reach) -> None:
    """How many of the packets for the overlay a rule matches, as it is and with `not`."""
    assert rule.reach(OVERLAY, LINKS) is plain
    assert replace(rule, inverted=True).reach(OVERLAY, LINKS) is inverted


def test_rules_are_written_as_ip_does() -> None:
    rule = ForeignRule(7, table=51820, inverted=True, mark=(0xCA6C, 0xFFFFFFFF), iif="ovl0", narrows=("dport",))
    assert str(rule) == "not from all fwmark 0xca6c/0xffffffff iif ovl0 dport … lookup 51820"
    assert str(ForeignRule(7, action=8, source=OVERLAY, to=OVERLAY)) == f"from {OVERLAY} to {OVERLAY} prohibit"
