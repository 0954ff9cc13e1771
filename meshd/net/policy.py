"""Policy rules: those of others that take packets for the overlay from the main table, and meshd's own before them.

Linux asks the rules by their priority, the least number first, and each names a table of routes (ip-rule(8)). The
layout of a rule and how it is matched are from the kernel's include/uapi/linux/fib_rules.h and net/core/fib_rules.c.
"""

import errno
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Network
from typing import ClassVar

from meshd.net.netlink import (
    PROTOCOL,
    RT_TABLE_LOCAL,
    RT_TABLE_MAIN,
    RTA_DST,
    RTMSG_LENGTH,
    attributes,
    dump_routes,
    dump_rules,
    rtnetlink,
    tolerating,
)
from meshd.net.resources import Action, Change, Diversion, PolicyRule, Resource

_TO_TABLE = 1
_REFUSING = {6: "blackhole", 7: "unreachable", 8: "prohibit"}
_INVERTED = 2
_RTN_THROW = 9
_DST, _SRC, _IIF, _PRIORITY, _MARK, _TUNNEL, _IFGROUP, _SUPPRESSED = 1, 2, 3, 6, 10, 12, 13, 14
_TABLE, _MASK, _OIF, _VRF, _PROTOCOL = 15, 16, 17, 19, 21
_NARROWING = {_TUNNEL: "tun_id", 20: "uidrange", 22: "ipproto", 23: "sport", 24: "dport"}
_NAMES = {RT_TABLE_LOCAL: "local", RT_TABLE_MAIN: "main", 253: "default"}


class Reach(IntEnum):
    """How many of the packets for the overlay a rule matches."""

    NONE = 0
    SOME = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class ForeignRule:
    """One rule of the kernel's. `mark` has value and mask; `narrows` names what else it looks at, as ip does.

    The rule passes over the routes of its table that are as short as `suppressed` or shorter; -1 for none.
    """

    priority: int
    action: int = _TO_TABLE
    table: int = 0
    inverted: bool = False
    to: IPv4Network | None = None
    source: IPv4Network | None = None
    iif: str | None = None
    oif: str | None = None
    mark: tuple[int, int] = (0, 0)
    narrows: tuple[str, ...] = ()
    suppressed: int = -1

    @property
    def target(self) -> str:
        """What it does with a packet, in the words of ip."""
        if self.action != _TO_TABLE:
            return _REFUSING.get(self.action, f"type {self.action}")
        return f"lookup {_NAMES.get(self.table, self.table)}"

    def __str__(self) -> str:
        words = ["not"] if self.inverted else []
        words += ["from", str(self.source or "all")]
        words += ["to", str(self.to)] if self.to else []
        words += ["fwmark", f"{self.mark[0]:#x}/{self.mark[1]:#x}"] if any(self.mark) else []
        words += [word for name, link in (("iif", self.iif), ("oif", self.oif)) if link for word in (name, link)]
        return " ".join([*words, *(f"{name} …" for name in self.narrows), self.target])

    def reach(self, overlay: IPv4Network, links: Collection[str]) -> Reach:
        """Return how many packets for the overlay it matches; `links` are those by which they come, `lo` included.

        Nobody marks them: what somebody has marked is to go another way (a proxy's packets, another VPN's own).
        """
        found = min(self._reaches(overlay, links))
        return Reach(Reach.ALL - found) if self.inverted else found

    def _reaches(self, overlay: IPv4Network, links: Collection[str]) -> Iterator[Reach]:
        yield Reach.ALL if self.mark[0] & self.mark[1] == 0 else Reach.NONE
        if self.to is not None and not overlay.subnet_of(self.to):
            yield Reach.SOME if self.to.overlaps(overlay) else Reach.NONE
        if self.source is not None:
            yield Reach.SOME if self.source.overlaps(overlay) else Reach.NONE
        for link in filter(None, (self.iif, self.oif)):
            yield Reach.SOME if link in links else Reach.NONE
        if self.narrows:
            yield Reach.NONE if "l3mdev" in self.narrows else Reach.SOME


def diversions(
    rules: Iterable[ForeignRule],
    overlay: IPv4Network,
    links: Collection[str],
    leads: Callable[[ForeignRule], bool],
) -> list[Diversion]:
    """Return the rules that keep packets for the overlay from the main table, up to one that meshd can come before.

    `rules` are others', in the kernel's order. `leads` says whether the table of one has a route for the overlay. Who
    refuses packets means to; who routes them elsewhere loses them, since meshd's firewall lets them leave by its own
    links alone. So meshd comes before the latter, but never before the rule for the host's own addresses. Pure.
    """
    found: list[Diversion] = []
    local: int | None = None
    for rule in rules:
        reach = rule.reach(overlay, links)
        if rule.action in _REFUSING:
            if reach is not Reach.NONE:
                found.append(_refusing(rule))
        elif rule.action != _TO_TABLE or reach is Reach.NONE:
            continue
        elif rule.table == RT_TABLE_LOCAL:
            local = rule.priority if local is None and reach is Reach.ALL else local
        elif rule.table == RT_TABLE_MAIN:
            if reach is Reach.ALL and rule.suppressed < overlay.prefixlen:
                break
        elif leads(rule):
            if local is not None and local < rule.priority - 1:
                return [*found, Diversion(f"the policy rule {rule.priority}", before=rule.priority - 1)]
            found.append(_in_the_way(rule, local))
    return found


def _refusing(rule: ForeignRule) -> Diversion:
    what = f"the policy rule {rule.priority} ({rule}) refuses packets for the overlay"
    return Diversion(f"{what}: if it is not meant to, {_advice(rule)}")


def _in_the_way(rule: ForeignRule, local: int | None) -> Diversion:
    what = f"the policy rule {rule.priority} ({rule}) takes packets for the overlay"
    if local is None:
        return Diversion(
            f"{what}, and meshd's own would come before the one for the table local: put that one first "
            f"('ip rule add priority 0 lookup local'), or {_advice(rule)}"
        )
    return Diversion(
        f"{what}, and between it and {local}, the one for the table local, is no room for meshd's own: "
        f"give it a greater number, or {_advice(rule)}"
    )


def _advice(rule: ForeignRule) -> str:
    return f"remove it: 'ip rule del priority {rule.priority} {rule.target}'"


class Policy:
    """The adapter of the policy rule of one mesh, which has the overlay looked up in the main table.

    `links` are those by which packets for the overlay come.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"rule"})

    def __init__(self, overlay: IPv4Network, links: Collection[str]) -> None:
        self._overlay = overlay
        self._links = frozenset({"lo", *links})

    def read(self) -> list[Resource]:
        """This mesh's rule, and the rules of others that keep packets for the overlay from it. Raises ApplyError."""
        rows = dump_rules("reading policy rules")
        own, others = self._own(rows), [_read(row) for row in rows if not self._is_own(row)]
        return [
            # Of several, the kernel asks the first one alone.
            *(PolicyRule(self._overlay, priority) for priority in own[:1]),
            *diversions(others, self._overlay, self._links, self._leads),
        ]

    def apply(self, change: Change) -> None:
        """Make one change; a second time it is harmless. Raises ApplyError."""
        rule = change.resource
        assert isinstance(rule, PolicyRule)  # noqa: S101  what the dispatch by kind guarantees, for the type checker
        kept = () if change.action is Action.REMOVE else (rule.priority,)
        with rtnetlink(f"setting {rule}") as ipr:
            # The new one first, so that there is one all the while.
            for priority in kept:
                with tolerating(errno.EEXIST):
                    ipr.rule("add", **self._request(priority))
            for priority in self._own(dump_rules("reading policy rules")):
                if priority not in kept:
                    with tolerating(errno.ENOENT):
                        ipr.rule("del", **self._request(priority))

    def _request(self, priority: int) -> dict[str, object]:
        return {
            "family": socket.AF_INET,
            "priority": priority,
            "dst": str(self._overlay.network_address),
            "dst_len": self._overlay.prefixlen,
            "table": RT_TABLE_MAIN,
            "protocol": PROTOCOL,
        }

    def _is_own(self, row: bytes) -> bool:
        rule = _read(row)
        return (_protocol(row), rule.to, rule.table) == (PROTOCOL, self._overlay, RT_TABLE_MAIN)

    def _own(self, rows: Iterable[bytes]) -> list[int]:
        return [_read(row).priority for row in rows if self._is_own(row)]

    def _leads(self, rule: ForeignRule) -> bool:
        """Return whether a table has a route for some of the overlay that the rule does not pass over."""
        routes = [_route(row) for row in dump_routes(f"reading the table of the {rule}", 0, table=rule.table)]
        routes = [(prefix, kind) for prefix, kind in routes if prefix.overlaps(self._overlay)]
        # A throw route sends all that it covers to the next rule, unless a longer one leads on.
        thrown = [p.prefixlen for p, kind in routes if kind == _RTN_THROW and self._overlay.subnet_of(p)]
        least = max([rule.suppressed, *thrown])
        return any(prefix.prefixlen > least for prefix, kind in routes if kind != _RTN_THROW)


def _protocol(row: bytes) -> int:
    return attributes(row, RTMSG_LENGTH).get(_PROTOCOL, b"\0")[0]


@lru_cache(1024)
def _read(row: bytes) -> ForeignRule:
    """Read a rule in the kernel's form (fib_rule_hdr, attributes)."""
    found = attributes(row, RTMSG_LENGTH)
    number = {key: int.from_bytes(value, sys.byteorder) for key, value in found.items() if len(value) == 4}
    name = {key: found[key].rstrip(b"\0").decode(errors="replace") for key in (_IIF, _OIF) if key in found}
    mark = number.get(_MARK, 0)
    narrows = [text for key, text in _NARROWING.items() if key in found]
    narrows += ["tos"] if row[3] else []
    narrows += ["l3mdev"] if found.get(_VRF, b"\0")[0] else []
    # With a group of links, the rule passes over routes that lead to one of them, whatever their length.
    narrows += ["suppress_ifgroup"] if _IFGROUP in found else []
    suppressed = number.get(_SUPPRESSED, 0xFFFFFFFF)
    return ForeignRule(
        priority=number.get(_PRIORITY, 0),
        action=row[7],
        table=number.get(_TABLE, row[4]),
        inverted=bool(int.from_bytes(row[8:12], sys.byteorder) & _INVERTED),
        to=_prefix(found.get(_DST), row[1]),
        source=_prefix(found.get(_SRC), row[2]),
        iif=name.get(_IIF),
        oif=name.get(_OIF),
        mark=(mark, number.get(_MASK, 0xFFFFFFFF if mark else 0)),
        narrows=tuple(narrows),
        suppressed=-1 if suppressed == 0xFFFFFFFF else suppressed,
    )


def _prefix(address: bytes | None, length: int) -> IPv4Network | None:
    # The kernel keeps what it was given behind the prefix, and does not look at it.
    return None if address is None else IPv4Network((address, length), strict=False)


# Most routes are what they were in the reconcile before.
@lru_cache(16384)
def _route(row: bytes) -> tuple[IPv4Network, int]:
    """Read the prefix and the type of a route in the kernel's form (rtmsg, attributes)."""
    return IPv4Network((attributes(row, RTMSG_LENGTH).get(RTA_DST, bytes(4)), row[1])), row[7]
