"""meshd's IPv4 routes in the main table, by rtnetlink; and the routes of others that overlap an overlay."""

import errno
import socket
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

from pyroute2.netlink.exceptions import NetlinkError

from meshd.errors import ApplyError, ConflictError
from meshd.net.netlink import (
    PROTOCOL,
    RT_TABLE_MAIN,
    RTN_UNICAST,
    RTN_UNREACHABLE,
    attributes,
    dump_routes,
    rtnetlink,
    tolerating,
)
from meshd.net.resources import Action, Change, Diversion, Resource, Route

_TYPES = {6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
# The kernel's include/uapi/linux/rtnetlink.h: attributes, and the bytes before them.
_DST, _OIF, _GATEWAY, _PRIORITY, _PREFSRC, _METRICS, _MULTIPATH, _RTMSG = 1, 4, 5, 6, 7, 8, 9, 12
_KERNEL, _METRICS_MTU = 2, 2
# Who sets routes, by rtm_protocol, which the daemons of these names use (iproute2's rt_protos).
_SETTERS = {
    1: "an ICMP redirect",
    3: "ip or a script (protocol boot)",
    4: "an administrator (protocol static)",
    11: "zebra (FRR, Quagga)",
    12: "bird",
    16: "a DHCP client",
    18: "keepalived",
    42: "babel",
    186: "bgp",
    187: "isis",
    188: "ospf",
    189: "rip",
    192: "eigrp",
}
# Routes of others that are named one by one.
_NAMED = 10


class Routes:
    """The adapter of one mesh's routes: those with PROTOCOL over `link`, and the unreachable one of `overlay`.

    A second mesh on the same host has another link and another overlay: neither sees the other's routes. The kernel
    itself has a route to the overlay over `bridge`, which is there on a host with Docker.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"route"})

    def __init__(self, link: str, overlay: IPv4Network, bridge: str | None = None) -> None:
        self._link = link
        self._overlay = overlay
        self._bridge = bridge

    def read(self) -> list[Resource]:
        """This mesh's routes, by prefix, and the routes of others that take packets from them. Raises ApplyError."""
        index, own, others = _index(self._link), list[Route](), list[_Foreign]()
        for row in dump_routes("reading routes", 0):
            route = _read(row, self._link, index, self._overlay)
            if isinstance(route, Route):
                own.append(route)
            elif route is not None:
                others.append(route)
        own.sort(key=lambda route: route.prefix)
        return [*own, *self._diversions(own, others, index)]

    def _diversions(self, own: Iterable[Route], others: Iterable["_Foreign"], index: int | None) -> list[Diversion]:
        bridge = _index(self._bridge)
        # What the kernel itself has over the bridge goes with the bridge's address.
        connected = [r for r in others if r.protocol == _KERNEL and r.index is not None and r.index == bridge]
        metrics = {r.prefix: r.metric for r in own} | {r.prefix: r.metric for r in connected}
        found = [
            route
            for route in others
            # By wg0 packets are encrypted, whoever has set the route.
            if route not in connected
            and (route.index is None or route.index != index)
            and route.metric <= metrics.get(route.prefix, route.metric)
        ]
        more = [Diversion(f"{len(found) - _NAMED} more routes of others take packets for the overlay")]
        return [Diversion(str(route)) for route in found[:_NAMED]] + (more if found[_NAMED:] else [])

    def apply(self, change: Change) -> None:
        """Make one change; a second time it is harmless. Raises ApplyError, or ConflictError for others' routes."""
        route = change.resource
        if not isinstance(route, Route):
            raise ApplyError(f"{change}: routes have no {route.kind}")
        if change.action is Action.REMOVE:
            self._remove(route)
        else:
            self._set(route, known=isinstance(change.old, Route))

    def _is_ours(self, row: Any, index: int | None) -> bool:
        if row["proto"] != PROTOCOL:
            return False
        if row["type"] == RTN_UNREACHABLE:
            return _prefix(row) == self._overlay
        return row["type"] == RTN_UNICAST and index is not None and row.get("RTA_OIF") == index

    def _set(self, route: Route, known: bool) -> None:
        with rtnetlink(f"adding {route}") as ipr:
            request = _request(route, _index(route.link))
            if request is None:
                raise ApplyError(f"adding {route}: there is no link {route.link}")
            # The kernel replaces by prefix and metric, whoever made the route: only one that was read is known as ours.
            if not known:
                try:
                    ipr.route("add", **request)
                except NetlinkError as error:
                    if error.code != errno.EEXIST:
                        raise
                    self._refuse_foreign(ipr, route)
                else:
                    return
            ipr.route("replace", **request)

    def _refuse_foreign(self, ipr: Any, route: Route) -> None:
        index = _index(self._link)
        for row in _dump(ipr):
            taken = _prefix(row) == route.prefix and (row.get("RTA_PRIORITY") or 0) == route.metric
            if taken and not self._is_ours(row, index):
                raise ConflictError(
                    f"adding {route}: there is a route to {route.prefix} already ({_via(row)}) that is not this "
                    f"mesh's; remove it, or choose another prefix"
                )

    def _remove(self, route: Route) -> None:
        with rtnetlink(f"removing {route}") as ipr:
            request = _request(route, _index(route.link))
            if request is None:
                return  # the kernel removes a link's routes with the link
            # The kernel removes only what is like the request in all that this names.
            for detail in ("prefsrc", "metrics"):
                request.pop(detail, None)
            with tolerating(errno.ESRCH, errno.ENODEV, errno.ENETDOWN):
                ipr.route("del", **request)


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A route of others to some of the overlay."""

    prefix: IPv4Network
    kind: int
    protocol: int
    index: int | None
    gateway: IPv4Address | None
    metric: int

    def __str__(self) -> str:
        link = [] if self.index is None else ["dev", _name(self.index)]
        via = ["via", str(self.gateway)] if self.gateway else []
        metric = ["metric", str(self.metric)] if self.metric else []
        kind = [] if self.kind == RTN_UNICAST else [_TYPES.get(self.kind, f"type {self.kind}")]
        route = " ".join([*kind, str(self.prefix), *via, *link, *metric])
        taken = f"the route {route} takes packets for the overlay"
        if self.protocol == _KERNEL:
            return f"{taken}: take the address that it belongs to from {_name(self.index or 0)}, or remove that link"
        setter = _SETTERS.get(self.protocol, f"a program with protocol number {self.protocol}")
        return f"{taken}: remove it ('ip route del {route}'), which {setter} has set"


# Most routes are what they were in the reconcile before.
@lru_cache(16384)
def _read(row: bytes, link: str, index: int | None, overlay: IPv4Network) -> Route | _Foreign | None:
    """Read a route in the kernel's form (rtmsg, attributes); None for one that has nothing to do with the overlay."""
    length, protocol, kind = row[1], row[5], row[7]
    found = attributes(row, _RTMSG)
    number = {key: int.from_bytes(found[key], sys.byteorder) for key in (_OIF, _PRIORITY) if key in found}
    prefix = IPv4Network((found.get(_DST, bytes(4)), length))
    unreachable = kind == RTN_UNREACHABLE and prefix == overlay
    if protocol != PROTOCOL or not (unreachable or (kind == RTN_UNICAST and number.get(_OIF, 0) == index)):
        return _foreign(prefix, kind, protocol, found, number) if prefix.subnet_of(overlay) else None
    source = IPv4Address(found[_PREFSRC]) if _PREFSRC in found else None
    mtu = int.from_bytes(attributes(found.get(_METRICS, b""), 0).get(_METRICS_MTU, b""), sys.byteorder)
    return Route(prefix, None if unreachable else link, source, number.get(_PRIORITY, 0), mtu)


def _foreign(
    prefix: IPv4Network, kind: int, protocol: int, found: Mapping[int, bytes], number: Mapping[int, int]
) -> _Foreign:
    # Of several hops, the first one is named: a hop's link comes after its length, flags and weight.
    hop = int.from_bytes(found[_MULTIPATH][4:8], sys.byteorder) if _MULTIPATH in found else None
    gateway = IPv4Address(found[_GATEWAY]) if _GATEWAY in found else None
    return _Foreign(prefix, kind, protocol, number.get(_OIF, hop), gateway, number.get(_PRIORITY, 0))


def overlapping(overlay: IPv4Network, ignore_links: Collection[str]) -> list[tuple[IPv4Network, str]]:
    """Main-table routes that overlap `overlay`, with their link's name (or `unreachable`, `blackhole`, …), sorted.

    Left out: default routes, routes over `ignore_links`, and meshd's unreachable route of this very overlay.
    Raises ApplyError.
    """
    with rtnetlink(f"looking for routes that overlap {overlay}") as ipr:
        found = {(_prefix(row), _via(row)) for row in _dump(ipr) if row["dst_len"] and not _is_guard(row, overlay)}
    return sorted((p, via) for p, via in found if p.overlaps(overlay) and via not in ignore_links)


def _is_guard(row: Any, overlay: IPv4Network) -> bool:
    return row["proto"] == PROTOCOL and row["type"] == RTN_UNREACHABLE and _prefix(row) == overlay


def _dump(ipr: Any) -> list[Any]:
    """The main table's IPv4 routes. `dump_filter=None` puts the fields into the request, so that the kernel filters."""
    return list(ipr.route("dump", family=socket.AF_INET, table=RT_TABLE_MAIN, dump_filter=None))


def _index(link: str | None) -> int | None:
    try:
        return socket.if_nametoindex(link) if link is not None else None
    except OSError:
        return None


def _prefix(row: Any) -> IPv4Network:
    return IPv4Network((row.get("RTA_DST") or "0.0.0.0", row["dst_len"]))  # noqa: S104  # a prefix, nothing is bound


def _via(row: Any) -> str:
    """The link of a route (of a multipath route: of its first hop), or the type of a route that has none."""
    hops = row.get("RTA_MULTIPATH")
    index = row.get("RTA_OIF") or (hops[0].get("oif") if hops else None)
    if index is None:
        return _TYPES.get(row["type"], f"type {row['type']}")
    return _name(index)


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"link {index}"


def _request(route: Route, index: int | None) -> dict[str, Any] | None:
    """The fields of one route for netlink; None when its link does not exist."""
    request: dict[str, Any] = {
        "family": socket.AF_INET,
        "table": RT_TABLE_MAIN,
        "dst": str(route.prefix),
        "proto": PROTOCOL,
        "priority": route.metric or None,
    }
    if route.link is None:
        return request | {"type": RTN_UNREACHABLE, "scope": _SCOPE_UNIVERSE}
    if index is None:
        return None
    request |= {"type": RTN_UNICAST, "scope": _SCOPE_LINK, "oif": index}
    if route.source:
        request["prefsrc"] = str(route.source)
    return request | ({"metrics": {"mtu": route.mtu}} if route.mtu else {})
