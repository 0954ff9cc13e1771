"""The underlay: the address to send from, the link that holds it, that link's MTU, and who answers there."""

import errno
import selectors
import socket
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from ipaddress import IPv4Network, ip_address
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from meshd.endpoint import Endpoint, IPAddress, LocalAddresses
from meshd.errors import InputError
from meshd.net.netlink import (
    RT_TABLE_LOCAL,
    RT_TABLE_MAIN,
    RTA_DST,
    RTMSG_LENGTH,
    RTN_BROADCAST,
    RTN_LOCAL,
    RTN_UNICAST,
    attributes,
    dump_routes,
    rtnetlink,
)


def source_address(towards: IPAddress | None) -> IPAddress:
    """The address that the kernel would send from to reach `towards`; None: by the default route of lowest metric.

    Raises InputError when there is no such route, ApplyError when the kernel cannot be asked.
    """
    with rtnetlink(f"looking up the route to {towards or 'default'}") as ipr:
        source = _source_towards(ipr, towards) if towards else _default_source(ipr)
    if source is None:
        raise InputError(f"there is no route to {towards or 'anywhere (no default route)'}; pass --bind ADDRESS")
    return source


def _source_towards(ipr: Any, towards: IPAddress) -> IPAddress | None:
    try:
        answer = ipr.route("get", family=_family(towards), dst=str(towards))[0]
    except NetlinkError as error:
        if error.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
            return None  # no route, `unreachable`, `prohibit` and `blackhole`, in this order
        raise
    source = answer.get("RTA_PREFSRC")
    return ip_address(source) if source else None


def _default_source(ipr: Any) -> IPAddress | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        rows = ipr.route("dump", family=family, table=RT_TABLE_MAIN, dump_filter=None)
        for row in sorted((r for r in rows if _is_default(r)), key=lambda r: r.get("RTA_PRIORITY") or 0):
            if source := _route_source(ipr, row):
                return source
    return None


def _is_default(row: Any) -> bool:
    return bool(row["dst_len"] == 0 and row["type"] == RTN_UNICAST and row.get("RTA_TABLE") == RT_TABLE_MAIN)


def _route_source(ipr: Any, row: Any) -> IPAddress | None:
    """A route's own source; else the one for its gateway; else the first global address of its link."""
    if source := row.get("RTA_PREFSRC"):
        return ip_address(source)
    hops = row.get("RTA_MULTIPATH") or [row]
    if gateway := hops[0].get("RTA_GATEWAY"):
        gateway = ip_address(gateway)
        if not gateway.is_link_local:
            return _source_towards(ipr, gateway)
    index = row.get("RTA_OIF") or hops[0].get("oif")
    found = (a for i, a in _all_addresses(ipr, row["family"]) if i == index and not a.is_link_local)
    return next(found, None)


def _family(address: IPAddress) -> int:
    return socket.AF_INET6 if address.version == 6 else socket.AF_INET


def _all_addresses(ipr: Any, family: int) -> Iterator[tuple[int, IPAddress]]:
    """(link index, address) of every address of a family, in the kernel's order: primary before secondary."""
    for row in list(ipr.addr("dump", family=family, dump_filter=None)):
        # IFA_ADDRESS is the far end of a point-to-point link; IPv6 has no IFA_LOCAL elsewhere.
        yield row["index"], ip_address(row.get("IFA_LOCAL") or row.get("IFA_ADDRESS"))


def networks(overlay: IPv4Network, ignore_links: Collection[str]) -> list[IPv4Network]:
    """The networks inside `overlay` in which this host has an address by other links. Raises ApplyError."""
    found = []
    with rtnetlink("looking for this host's own networks") as ipr:
        ignored = {index for index, name in socket.if_nameindex() if name in ignore_links}
        for row in ipr.addr("dump", family=socket.AF_INET, dump_filter=None):
            network = IPv4Network((row.get("IFA_LOCAL") or row.get("IFA_ADDRESS"), row["prefixlen"]), strict=False)
            if row["index"] not in ignored and network.overlaps(overlay):
                found.append(network)
    return sorted(found)


def local() -> LocalAddresses:
    """Return the addresses that the kernel takes for this host's own, and those that broadcast. Raises ApplyError."""
    lengths: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}
    found: dict[int, set[IPAddress]] = {RTN_LOCAL: set(), RTN_BROADCAST: set()}
    what = "looking for this host's own addresses"
    for row in dump_routes(what, 0, family=socket.AF_UNSPEC, table=RT_TABLE_LOCAL):
        destination, length = attributes(row, RTMSG_LENGTH).get(RTA_DST, b""), lengths.get(row[0], 0)
        if row[7] in found and length and row[1] == 8 * length == 8 * len(destination):
            found[row[7]].add(ip_address(destination))
    return LocalAddresses(frozenset(found[RTN_LOCAL]), frozenset(found[RTN_BROADCAST]))


def _holder(ipr: Any, address: IPAddress) -> Any | None:
    for index, held in _all_addresses(ipr, _family(address)):
        if held == address:
            return ipr.link("get", index=index)[0]
    return None


def holder(address: IPAddress) -> str | None:
    """The name of the link that holds an address, or None. Raises ApplyError."""
    with rtnetlink(f"looking for the link of {address}") as ipr:
        message = _holder(ipr, address)
        return str(message.get("ifname")) if message else None


def links_of_addresses() -> dict[IPAddress, str]:
    """Return the link of each address that this host has. Raises ApplyError."""
    with rtnetlink("looking for this host's own addresses") as ipr:
        names, families = dict(socket.if_nameindex()), (socket.AF_INET, socket.AF_INET6)
        return {a: names.get(i, "") for family in families for i, a in _all_addresses(ipr, family)}


def answered(endpoints: Iterable[Endpoint], source: IPAddress | None, seconds: float) -> IPAddress | None:
    """Return the own address from which one of these could be connected to by TCP, None if none within `seconds`.

    With `source` they are asked from that address, otherwise from the one that the kernel takes for each.
    """
    until = time.monotonic() + seconds
    with ExitStack() as stack, selectors.DefaultSelector() as waiting:
        for endpoint in endpoints:
            sock = stack.enter_context(socket.socket(_family(endpoint.address), socket.SOCK_STREAM))
            sock.setblocking(False)
            with suppress(OSError):  # another IP version, or no route from there
                if source is not None:
                    sock.bind((str(source), 0))
                if sock.connect_ex((str(endpoint.address), endpoint.port)) in (0, errno.EINPROGRESS):
                    waiting.register(sock, selectors.EVENT_WRITE)
        while waiting.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                assert isinstance(key.fileobj, socket.socket)  # noqa: S101  it was registered above
                if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    return ip_address(key.fileobj.getsockname()[0])
                waiting.unregister(key.fileobj)
    return None


def mtu(address: IPAddress) -> int:
    """The MTU in bytes of the link that holds an address. Raises InputError when none does."""
    with rtnetlink(f"looking for the link of {address}") as ipr:
        message = _holder(ipr, address)
    if message is None:
        raise InputError(
            f"no link of this host has the address {address}, for which it waits: "
            "'meshd up --bind ADDRESS' gives it another one"
        )
    return int(message.get("mtu"))
