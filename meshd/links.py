"""Links, their addresses and kernel parameters, by rtnetlink and /proc/sys; and what a start needs to know of them.

Facts are from rtnetlink(7) and the kernel's net/core/rtnetlink.c and net/ipv4/devinet.c; `ip` is not needed.
"""

import errno
import select
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from ipaddress import IPv4Address, IPv4Interface, ip_address
from pathlib import Path
from typing import Any, ClassVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from meshd.errors import ApplyError, ConflictError, InputError
from meshd.model import Action, Address, Change, IPAddress, Link, Resource, Sysctl

PROC_SYS = Path("/proc/sys")
IFF_UP = 1
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
_WATCH_BUFFER = 1 << 20  # room for a burst such as a whole mesh's routes going with their link
_WATCH_TICK = 0.5  # seconds between looks at `stop`
_TUN_KINDS = ("wireguard", "tun", "tuntap")  # wireguard-go's links are TUN


class Links:
    """The adapter of links, addresses and sysctls.

    `names` are the links that meshd owns on this host; `sysctls` are paths below /proc/sys
    (`net/ipv4/conf/ovl0/proxy_arp`). What does not exist is not listed.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"link", "address", "sysctl"})

    def __init__(self, names: Sequence[str], sysctls: Sequence[str]) -> None:
        self._names = tuple(names)
        self._sysctls = tuple(sysctls)

    def read(self) -> list[Resource]:
        """The links, their IPv4 addresses and the sysctls that exist. Raises ApplyError."""
        resources: list[Resource] = []
        with _netlink("reading links") as ipr:
            for message in filter(None, (_find(ipr, name) for name in self._names)):
                resources += [_link(message), *_addresses_of(ipr, message)]
        for path in self._sysctls:
            value = _read_sysctl(path)
            if value is not None:
                resources.append(Sysctl(path, value))
        return resources

    def apply(self, change: Change) -> None:
        """Make one change; a second time it is harmless. Raises ApplyError or ConflictError."""
        resource, gone = change.resource, change.action is Action.REMOVE
        match resource:
            case Link():
                _remove_link(resource) if gone else _set_link(resource)
            case Address():
                _remove_address(resource) if gone else _add_address(resource)
            case Sysctl():
                # There is nothing to remove from /proc/sys: what was before is a SET of the old value.
                if not gone:
                    _write_sysctl(resource)
            case _:
                raise ApplyError(f"{change}: links have no {resource.kind}")


@contextmanager
def _netlink(doing: str) -> Iterator[Any]:
    """An rtnetlink socket, in no multicast group; what the kernel refuses is an ApplyError that begins with `doing`."""
    try:
        # Strict checks let the kernel filter dumps by interface (Linux 4.20).
        with IPRoute(groups=0, strict_check=True) as ipr:
            yield ipr
    except (NetlinkError, OSError) as error:
        raise ApplyError(f"{doing}: {error.args[-1] if error.args else error}") from error


def _find(ipr: Any, name: str) -> Any | None:
    """The RTM_NEWLINK message of one link, or None."""
    try:
        return ipr.link("get", ifname=name)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


def _kind(message: Any) -> str:
    """IFLA_INFO_KIND; `device` for what has none (loopback, hardware)."""
    return str(message.get(("linkinfo", "kind")) or "device")


def _link(message: Any) -> Link:
    kind = _kind(message)
    return Link(
        name=message.get("ifname"),
        type="wireguard" if kind in _TUN_KINDS else kind,
        mtu=message.get("mtu"),
        up=bool(message["flags"] & IFF_UP),
    )


def _addresses_of(ipr: Any, message: Any) -> list[Resource]:
    name, index = message.get("ifname"), message["index"]
    # `dump_filter=None` puts the index into the request instead of filtering what the kernel sent.
    rows = ipr.addr("dump", family=socket.AF_INET, index=index, dump_filter=None)
    return [
        Address(name, IPv4Interface((row.get("IFA_LOCAL") or row.get("IFA_ADDRESS"), row["prefixlen"])))
        for row in rows
        if row["index"] == index
    ]


def _set_link(link: Link) -> None:
    with _netlink(f"setting {link}") as ipr:
        message = _find(ipr, link.name)
        if message is None:
            message = _create_bridge(ipr, link)
        if (found := _link(message).type) != link.type:
            raise ConflictError(
                f"setting {link}: {link.name} exists and is a {found} link, not a {link.type}; "
                f"rename or delete it, or give meshd another name"
            )
        ipr.link("set", index=message["index"], mtu=link.mtu)
        ipr.link("set", index=message["index"], state="up" if link.up else "down")


def _create_bridge(ipr: Any, link: Link) -> Any:
    if link.type != "bridge":
        raise ApplyError(f"setting {link}: there is no link {link.name}")
    try:
        ipr.link("add", ifname=link.name, kind="bridge")
    except NetlinkError as error:  # Docker, or another meshd, was faster
        if error.code != errno.EEXIST:
            raise
    return ipr.link("get", ifname=link.name)[0]


def _remove_link(link: Link) -> None:
    with _netlink(f"removing {link}") as ipr:
        message = _find(ipr, link.name)
        if message is None:
            return
        found = _link(message).type
        if found != link.type or found not in ("bridge", "wireguard"):
            raise ConflictError(f"removing {link}: {link.name} is a {found} link; meshd did not make it")
        with _tolerating(errno.ENODEV):
            ipr.link("del", index=message["index"])


def _add_address(address: Address) -> None:
    with _netlink(f"adding {address}") as ipr:
        message = _find(ipr, address.link)
        if message is None:
            raise ApplyError(f"adding {address}: there is no link {address.link}")
        # Without IFA_F_NOPREFIXROUTE: the bridge's connected route is what keeps unknown blocks off the underlay.
        with _tolerating(errno.EEXIST):
            ipr.addr("add", scope=0, **_address_request(message, address))


def _remove_address(address: Address) -> None:
    with _netlink(f"removing {address}") as ipr:
        message = _find(ipr, address.link)
        if message is not None:
            with _tolerating(errno.EADDRNOTAVAIL, errno.ENODEV):
                ipr.addr("del", **_address_request(message, address))


def _address_request(message: Any, address: Address) -> dict[str, Any]:
    interface = address.interface
    return {
        "family": socket.AF_INET,
        "index": message["index"],
        "address": str(interface.ip),
        "prefixlen": interface.network.prefixlen,
    }


@contextmanager
def _tolerating(*codes: int) -> Iterator[None]:
    """Let these kernel errors pass: they say that what was wanted is already so."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in codes:
            raise


def _sysctl_path(path: str) -> Path:
    parts = path.split("/")
    if not all(parts) or "." in parts or ".." in parts:
        raise ApplyError(f"sysctl {path!r}: not a path below {PROC_SYS}")
    return PROC_SYS / path


def _read_sysctl(path: str) -> str | None:
    try:
        return " ".join(_sysctl_path(path).read_text(encoding="ascii").split())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ApplyError(f"reading sysctl {path}: {getattr(error, 'strerror', None) or error}") from error


def _write_sysctl(sysctl: Sysctl) -> None:
    try:
        # Opened without O_CREAT: a path that is not there is an error, not a new file.
        with _sysctl_path(sysctl.path).open("r+", encoding="ascii") as file:
            file.write(f"{sysctl.value}\n")
    except (OSError, ValueError) as error:
        raise ApplyError(f"setting {sysctl}: {getattr(error, 'strerror', None) or error}") from error


# --- what a start asks about the machine ---------------------------------------------------------------------------


def underlay_source(towards: IPAddress | None) -> IPAddress:
    """The address that the kernel would send from to reach `towards`; None: by the default route of lowest metric.

    Raises InputError when there is no such route, ApplyError when the kernel cannot be asked.
    """
    with _netlink(f"looking up the route to {towards or 'default'}") as ipr:
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
    for row in ipr.addr("dump", family=family, dump_filter=None):
        # IFA_ADDRESS is the far end of a point-to-point link; IPv6 has no IFA_LOCAL elsewhere.
        yield row["index"], ip_address(row.get("IFA_LOCAL") or row.get("IFA_ADDRESS"))


def _holder(ipr: Any, address: IPAddress) -> Any | None:
    for index, held in _all_addresses(ipr, _family(address)):
        if held == address:
            return ipr.link("get", index=index)[0]
    return None


def holder(address: IPAddress) -> str | None:
    """The name of the link that holds an address, or None. Raises ApplyError."""
    with _netlink(f"looking for the link of {address}") as ipr:
        message = _holder(ipr, address)
        return str(message.get("ifname")) if message else None


def underlay_mtu(address: IPAddress) -> int:
    """The MTU in bytes of the link that holds an address. Raises InputError when none does."""
    with _netlink(f"looking for the link of {address}") as ipr:
        message = _holder(ipr, address)
    if message is None:
        raise InputError(f"no link of this host has the address {address}; pass --bind with one that it has")
    return int(message.get("mtu"))


def link_names() -> dict[str, str]:
    """Every link's name and kind in the kernel's words (`bridge`, `tun`, `wireguard`; `device` for hardware)."""
    with _netlink("listing links") as ipr:
        return {message.get("ifname"): _kind(message) for message in ipr.link("dump")}


# --- changes by others ---------------------------------------------------------------------------------------------


def watch(names: Collection[str], protocol: int, hint: Callable[[str], None], stop: threading.Event) -> None:
    """Block until `stop` is set (seen within 0.5 s) and call `hint` for each change to the links `names`.

    That is: the links themselves, their IPv4 addresses, IPv4 routes over them, and any IPv4 route with meshd's
    `protocol`. A hint is one line of text (`netlink: route 172.20.7.0/24 removed`); meshd's own changes hint
    too. An overrun of the socket is a hint as well, since what it lost is unknown. Raises ApplyError.
    """
    watcher = _Watcher(names, protocol)
    try:
        with closing(_subscribe()) as sock:
            watcher.index = {index: name for index, name in socket.if_nameindex() if name in names}
            while not stop.is_set():
                if select.select([sock], [], [], _WATCH_TICK)[0]:
                    for text in watcher.receive(sock):
                        hint(f"netlink: {text}")
    except OSError as error:
        raise ApplyError(f"watching links: {error.strerror or error}") from error


def _subscribe() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WATCH_BUFFER)
    sock.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE))
    return sock


class _Watcher:
    """Turns netlink datagrams into hints. Links are remembered by index: a route's message has no name."""

    def __init__(self, names: Collection[str], protocol: int) -> None:
        self._names = frozenset(names)
        self._protocol = protocol
        self._marshal = MarshalRtnl()
        self.index: dict[int, str] = {}

    def receive(self, sock: socket.socket) -> list[str]:
        try:
            data = sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                self.index = {index: name for index, name in socket.if_nameindex() if name in self._names}
                return ["messages were lost"]
            raise
        return [text for message in self._marshal.parse(data) if (text := self._text(message))]

    def _text(self, message: Any) -> str | None:
        event = message.get("event", "")
        done = "removed" if event.startswith("RTM_DEL") else "changed"
        if event.endswith("LINK"):
            return self._link_text(message, done)
        if event.endswith("ADDR") and message["index"] in self.index:
            return f"address {message.get('IFA_LOCAL')} of {self.index[message['index']]} {done}"
        ours = message.get("RTA_OIF") in self.index or message.get("proto") == self._protocol
        if event.endswith("ROUTE") and ours and message.get("RTA_TABLE") == RT_TABLE_MAIN:
            prefix = f"{message.get('RTA_DST') or IPv4Address(0)}/{message['dst_len']}"
            return f"route {prefix} {done}"
        return None

    def _link_text(self, message: Any, done: str) -> str | None:
        """Follows renames and re-creations: a name may come back with another index."""
        name, index = message.get("ifname"), message["index"]
        known = self.index.pop(index, None)
        if name in self._names and done == "changed":
            self.index[index] = name
        return f"link {known or name} {done}" if known or name in self._names else None
