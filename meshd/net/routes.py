"""meshd's IPv4 routes in the main table, by rtnetlink; and the routes of others that overlap an overlay."""

import errno
import socket
import sys
from collections.abc import Collection
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

from pyroute2.netlink.exceptions import NetlinkError

from meshd.errors import ApplyError, ConflictError
from meshd.net.netlink import (
    RT_TABLE_MAIN,
    RTN_UNICAST,
    RTN_UNREACHABLE,
    attributes,
    dump_routes,
    rtnetlink,
    tolerating,
)
from meshd.net.resources import Action, Change, Resource, Route

PROTOCOL = 77
"""The rtm_protocol of meshd's routes. iproute2's rt_protos and the kernel's rtnetlink.h give no name to 77."""

_TYPES = {6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
# The kernel's include/uapi/linux/rtnetlink.h: attributes, and the bytes before them.
_DST, _OIF, _PRIORITY, _PREFSRC, _RTMSG = 1, 4, 6, 7, 12


class Routes:
    """The adapter of one mesh's routes: those with PROTOCOL over `link`, and the unreachable one of `overlay`.

    A second mesh on the same host has another link and another overlay: neither sees the other's routes.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"route"})

    def __init__(self, link: str, overlay: IPv4Network) -> None:
        self._link = link
        self._overlay = overlay

    def read(self) -> list[Resource]:
        """This mesh's routes, by prefix. Raises ApplyError."""
        index = _index(self._link)
        found = (_read(row, self._link, index, self._overlay) for row in dump_routes("reading routes", PROTOCOL))
        return [*sorted((route for route in found if route is not None), key=lambda r: r.prefix)]

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
            request.pop("prefsrc", None)
            with tolerating(errno.ESRCH, errno.ENODEV, errno.ENETDOWN):
                ipr.route("del", **request)


# Most routes are what they were in the reconcile before.
@lru_cache(16384)
def _read(row: bytes, link: str, index: int | None, overlay: IPv4Network) -> Route | None:
    """Read a route in the kernel's form (rtmsg, attributes); None for one that is not this mesh's."""
    length, protocol, kind = row[1], row[5], row[7]
    found = attributes(row, _RTMSG)
    number = {key: int.from_bytes(found[key], sys.byteorder) for key in (_OIF, _PRIORITY) if key in found}
    prefix = IPv4Network((found.get(_DST, bytes(4)), length))
    unreachable = kind == RTN_UNREACHABLE and prefix == overlay
    if protocol != PROTOCOL or not (unreachable or (kind == RTN_UNICAST and number.get(_OIF, 0) == index)):
        return None
    source = IPv4Address(found[_PREFSRC]) if _PREFSRC in found else None
    return Route(prefix, None if unreachable else link, source, number.get(_PRIORITY, 0))


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
    return request | ({"prefsrc": str(route.source)} if route.source else {})
