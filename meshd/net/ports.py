"""Containers' links that have lost the bridge: found, and plugged in again, by rtnetlink.

Deleting the bridge detaches all of them, and Docker does not attach them again while the containers run. Such a
link is one end of a veth pair without a master, and the other end, in another namespace, has an address of the overlay.
"""

import errno
import socket
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

from meshd.errors import ApplyError
from meshd.net.netlink import rtnetlink, tolerating
from meshd.net.resources import Action, Change, Port, Resource


class Ports:
    """The adapter of the links that have lost the bridge. It only plugs in: who unplugs a container is Docker."""

    kinds: ClassVar[frozenset[str]] = frozenset({"port"})

    def __init__(self, overlay: IPv4Network) -> None:
        self._overlay = overlay

    def read(self) -> list[Resource]:
        """The links of this overlay's containers that are on no bridge. Raises ApplyError."""
        with rtnetlink("looking for containers without a bridge") as ipr:
            loose = [m for m in ipr.link("dump", kind="veth") if not m.get("IFLA_MASTER")]
            return [Port(m.get("ifname"), None) for m in loose if _is_on(ipr, m, self._overlay)]

    def apply(self, change: Change) -> None:
        """Plug a link in; a second time it is harmless. Raises ApplyError."""
        port = change.resource
        assert isinstance(port, Port)  # noqa: S101  what the dispatch by kind guarantees, for the type checker
        if change.action is Action.REMOVE or port.bridge is None:
            raise ApplyError(f"{change}: unplugging a container is Docker's")
        with rtnetlink(f"setting {port}") as ipr:
            bridges = ipr.link_lookup(ifname=port.bridge)
            if not bridges:
                raise ApplyError(f"setting {port}: there is no bridge {port.bridge}")
            for index in ipr.link_lookup(ifname=port.link):
                with tolerating(errno.ENODEV):  # the container has just ended
                    ipr.link("set", index=index, master=bridges[0])


def _is_on(ipr: Any, message: Any, overlay: IPv4Network) -> bool:
    """Return whether the other end of a veth pair has an address that Docker gives on the overlay: with its length."""
    namespace, peer = message.get("IFLA_LINK_NETNSID"), message.get("IFLA_LINK")
    if namespace is None or namespace < 0:
        return False  # both ends are here, or the other one is where this host may not look
    # IFA_TARGET_NETNSID (Linux 4.20) asks another namespace without entering it. pyroute2 0.9 takes this 32-bit number
    # for a text, to which it adds a zero byte: the number's highest one, on little-endian machines.
    target = namespace.to_bytes(3, "little")
    rows = list(ipr.addr("dump", family=socket.AF_INET, index=peer, target_netnsid=target, dump_filter=None))
    return any(
        row["index"] == peer and row["prefixlen"] == overlay.prefixlen and IPv4Address(row.get("IFA_LOCAL")) in overlay
        for row in rows
    )
