"""Links, their addresses and kernel parameters, by rtnetlink and /proc/sys; and what others change of them.

Facts are from rtnetlink(7) and the kernel's net/core/rtnetlink.c and net/ipv4/devinet.c; `ip` is not needed.
"""

import errno
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, ClassVar

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from meshd.errors import ApplyError, ConflictError
from meshd.net.netlink import (
    PROTOCOL,
    RT_TABLE_LOCAL,
    RT_TABLE_MAIN,
    link_kind,
    notifications,
    rtnetlink,
    subscribe,
    tolerating,
)
from meshd.net.resources import Action, Address, Change, Link, PolicyRule, Resource, Route, Sysctl

PROC_SYS = Path("/proc/sys")
IFF_UP = 1
# RTNLGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR and _IPV4_NETCONF.
_GROUPS = (1, 5, 7, 8, 9, 24)
RTM_NEWNETCONF, NETCONFA_IFINDEX, NETCONFA_IFINDEX_ALL = 80, 1, -1
_TUN_KINDS = ("wireguard", "tun", "tuntap")  # wireguard-go's links are TUN
# Both, since whoever turns IPv6 on again for all links at once does not turn router advertisements on with it.
_WITHOUT_IPV6 = {"accept_ra": "0", "disable_ipv6": "1"}


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
        with rtnetlink("reading links") as ipr:
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


def _find(ipr: Any, name: str) -> Any | None:
    """The RTM_NEWLINK message of one link, or None."""
    try:
        return ipr.link("get", ifname=name)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


def _link(message: Any) -> Link:
    kind = link_kind(message)
    return Link(
        name=message.get("ifname"),
        type="wireguard" if kind in _TUN_KINDS else kind,
        mtu=message.get("mtu"),
        up=bool(message["flags"] & IFF_UP),
        mac=message.get("address") if kind == "bridge" else None,
        ipv6=any(value != _WITHOUT_IPV6[name] for name, value in _ipv6_sysctls(message.get("ifname"))),
    )


def _ipv6_sysctls(link: str) -> Iterator[tuple[str, str]]:
    """Yield what decides about a link's IPv6: none on a host without IPv6 or with an MTU below 1280, IPv6's least."""
    for name in _WITHOUT_IPV6:
        value = _read_sysctl(f"net/ipv6/conf/{link}/{name}")
        if value is not None:
            yield name, value


def has_ipv6() -> bool:
    """Return whether this host has IPv6 at all."""
    return (PROC_SYS / "net/ipv6").is_dir()


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
    with rtnetlink(f"setting {link}") as ipr:
        message = _find(ipr, link.name)
        if message is None:
            message = _create_bridge(ipr, link)
        if (found := _link(message).type) != link.type:
            raise ConflictError(
                f"setting {link}: {link.name} exists and is a {found} link, not a {link.type}; "
                f"rename or delete it, or give meshd another name"
            )
        if link.mac is not None and message.get("address") != link.mac:
            _set_mac(ipr, message["index"], link)
        ipr.link("set", index=message["index"], mtu=link.mtu)
        if not link.ipv6:
            # Before the link is up, which gives it an address; a greater MTU may have brought IPv6 with it.
            _disable_ipv6(link.name)
        ipr.link("set", index=message["index"], state="up" if link.up else "down")


def _disable_ipv6(link: str) -> None:
    for name, value in _ipv6_sysctls(link):
        if value != _WITHOUT_IPV6[name]:
            _write_sysctl(Sysctl(f"net/ipv6/conf/{link}/{name}", _WITHOUT_IPV6[name]))


def _create_bridge(ipr: Any, link: Link) -> Any:
    if link.type != "bridge":
        raise ApplyError(f"setting {link}: there is no link {link.name}")
    try:
        ipr.link("add", ifname=link.name, kind="bridge", **({"address": link.mac} if link.mac else {}))
    except NetlinkError as error:  # Docker, or another meshd, was faster
        if error.code != errno.EEXIST:
            raise
    return ipr.link("get", ifname=link.name)[0]


def _set_mac(ipr: Any, index: int, link: Link) -> None:
    """Change the MAC address of a bridge that someone else has made, Docker for instance, and tell its containers."""
    # The kernel then sends a gratuitous ARP for each address (NETDEV_CHANGEADDR in net/ipv4/devinet.c).
    _write_sysctl(Sysctl(f"net/ipv4/conf/{link.name}/arp_notify", "1"))
    ipr.link("set", index=index, address=link.mac)


def _remove_link(link: Link) -> None:
    with rtnetlink(f"removing {link}") as ipr:
        message = _find(ipr, link.name)
        if message is None:
            return
        found = _link(message).type
        if found != link.type or found not in ("bridge", "wireguard"):
            raise ConflictError(f"removing {link}: {link.name} is a {found} link; meshd did not make it")
        with tolerating(errno.ENODEV):
            ipr.link("del", index=message["index"])


def _add_address(address: Address) -> None:
    with rtnetlink(f"adding {address}") as ipr:
        message = _find(ipr, address.link)
        if message is None:
            raise ApplyError(f"adding {address}: there is no link {address.link}")
        # Without IFA_F_NOPREFIXROUTE: the bridge's connected route is what keeps unknown blocks off the underlay.
        with tolerating(errno.EEXIST):
            ipr.addr("add", scope=0, **_address_request(message, address))


def _remove_address(address: Address) -> None:
    with rtnetlink(f"removing {address}") as ipr:
        message = _find(ipr, address.link)
        if message is not None:
            with tolerating(errno.EADDRNOTAVAIL, errno.ENODEV):
                ipr.addr("del", **_address_request(message, address))


def _address_request(message: Any, address: Address) -> dict[str, Any]:
    interface = address.interface
    return {
        "family": socket.AF_INET,
        "index": message["index"],
        "address": str(interface.ip),
        "prefixlen": interface.network.prefixlen,
    }


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


def link_names() -> dict[str, str]:
    """Every link's name and kind in the kernel's words (`bridge`, `tun`, `wireguard`; `device` for hardware)."""
    with rtnetlink("listing links") as ipr:
        return {message.get("ifname"): link_kind(message) for message in ipr.link("dump")}


# --- changes by others ---------------------------------------------------------------------------------------------


def watch(names: Collection[str], overlay: IPv4Network, hint: Callable[[str], None], stop: threading.Event) -> None:
    """Block until `stop` is set (seen within 2 s) and call `hint` for each change to the links `names`.

    That is: the links themselves, their addresses and IPv4 sysctls, IPv4 routes over them, with meshd's protocol or
    inside the `overlay`, IPv4 routes of other tables that could take it, IPv4 policy rules, forwarding as a whole, and
    IPv4 addresses of other links (the underlay's may be among them).
    A hint is one line of text (`route 172.20.7.0/24 removed`); meshd's own changes hint too. An overrun of the
    socket is a hint as well, since what it lost is unknown. Raises ApplyError.
    """
    watcher = _Watcher(names, overlay)
    try:
        with subscribe(socket.NETLINK_ROUTE, *_GROUPS) as sock:
            watcher.look_up()
            for data in notifications(sock, stop):
                for text in watcher.read(data):
                    hint(text)
    except OSError as error:
        raise ApplyError(f"watching links: {error.strerror or error}") from error


def told(changes: Iterable[Change]) -> set[str]:
    """Return the hints by which a watch tells of the routes and policy rules among one's own changes."""
    hints = set()
    for change in changes:
        done = "removed" if change.action is Action.REMOVE else "changed"
        match change.resource:
            case Route(prefix=prefix):
                hints.add(_route_text(str(prefix), done))
            case PolicyRule(priority=priority):
                hints.add(_rule_text(priority, done))
        if isinstance(change.old, PolicyRule):
            hints.add(_rule_text(change.old.priority, "removed"))
    return hints


def _rule_text(priority: int, done: str) -> str:
    return f"policy rule {priority} {done}"


def _route_text(prefix: str, done: str) -> str:
    return f"route {prefix} {done}"


class _Watcher:
    """Turns netlink datagrams into hints. Links are remembered by index: a route's message has no name."""

    def __init__(self, names: Collection[str], overlay: IPv4Network) -> None:
        self._names = frozenset(names)
        self._overlay = overlay
        self._marshal = MarshalRtnl()
        self.index: dict[int, str] = {}

    def look_up(self) -> None:
        self.index = {index: name for index, name in socket.if_nameindex() if name in self._names}

    def read(self, data: bytes | None) -> list[str]:
        if data is None:
            self.look_up()
            return ["messages were lost"]
        texts = [text for message in self._marshal.parse(data) if (text := self._text(message))]
        return texts + [f"sysctls of {self.index.get(i, 'all')} changed" for i in _netconf(data) if self._minds(i)]

    def _minds(self, index: int) -> bool:
        return index == NETCONFA_IFINDEX_ALL or index in self.index

    def _text(self, message: Any) -> str | None:
        event = message.get("event", "")
        if not isinstance(event, str):
            return None  # of a type that pyroute2 does not know
        done = "removed" if event.startswith("RTM_DEL") else "changed"
        if event.endswith("LINK"):
            return self._link_text(message, done)
        if event.endswith("ADDR"):
            return self._address_text(message, done)
        if event.endswith("RULE"):
            return _rule_text(message.get("FRA_PRIORITY") or 0, done)
        return self._text_of_route(message, done) if event.endswith("ROUTE") else None

    def _text_of_route(self, message: Any, done: str) -> str | None:
        prefix, table = IPv4Network((message.get("RTA_DST") or 0, message["dst_len"])), message.get("RTA_TABLE")
        ours = message.get("RTA_OIF") in self.index or message.get("proto") == PROTOCOL
        if table == RT_TABLE_MAIN:
            return _route_text(str(prefix), done) if ours or prefix.subnet_of(self._overlay) else None
        # Whether a policy rule leads there, the reconcile will see.
        foreign = table != RT_TABLE_LOCAL and prefix.overlaps(self._overlay)
        return f"{_route_text(str(prefix), done)} in table {table}" if foreign else None

    def _address_text(self, message: Any, done: str) -> str | None:
        link = self.index.get(message["index"])
        # Every container that ends takes an IPv6 address with it: of other links only those of IPv4 are told of.
        if link is None and message["family"] != socket.AF_INET:
            return None
        address = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
        return f"address {address} of {link or 'another link'} {done}"

    def _link_text(self, message: Any, done: str) -> str | None:
        """Follows renames and re-creations: a name may come back with another index."""
        name, index = message.get("ifname"), message["index"]
        known = self.index.pop(index, None)
        if name in self._names and done == "changed":
            self.index[index] = name
        return f"link {known or name} {done}" if known or name in self._names else None


def _netconf(data: bytes) -> Iterator[int]:
    """Yield the link index of each change of forwarding, proxy_arp or rp_filter, which pyroute2 does not read."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, offset)
        if length < 16:
            return
        # A netlink header of 16 bytes, the family padded to 4, then attributes of which the index is the first.
        if kind == RTM_NEWNETCONF and length >= 28 and data[offset + 22] == NETCONFA_IFINDEX:
            yield struct.unpack_from("=i", data, offset + 24)[0]
        offset += (length + 3) & ~3
