"""What every speaker of netlink shares: sockets, the kernel's refusals as meshd's errors, and its notifications."""

import errno
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshd.errors import ApplyError

RT_TABLE_MAIN = 254
RTN_UNICAST, RTN_UNREACHABLE = 1, 7
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
_BUFFER = 1 << 20  # room for a burst such as a whole mesh's routes going with their link
_TICK = 0.5  # seconds between looks at `stop`


@contextmanager
def rtnetlink(doing: str) -> Iterator[Any]:
    """An rtnetlink socket, in no multicast group; what the kernel refuses is an ApplyError that begins with `doing`."""
    try:
        # Strict checks let the kernel filter dumps by interface (Linux 4.20).
        with IPRoute(groups=0, strict_check=True) as ipr:
            yield ipr
    except (NetlinkError, OSError) as error:
        raise ApplyError(f"{doing}: {error.args[-1] if error.args else error}") from error


@contextmanager
def tolerating(*codes: int) -> Iterator[None]:
    """Let these kernel errors pass: they say that what was wanted is already so."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in codes:
            raise


def link_kind(message: Any) -> str:
    """IFLA_INFO_KIND; `device` for what has none (loopback, hardware)."""
    return str(message.get(("linkinfo", "kind")) or "device")


def subscribe(protocol: int, *groups: int) -> socket.socket:
    """Open a socket on which the kernel tells what happens in these multicast groups. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        sock.bind((0, 0))
        for group in groups:
            sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    except BaseException:
        sock.close()
        raise
    return sock


def notifications(sock: socket.socket, stop: Event) -> Iterator[bytes | None]:
    """Give each datagram until `stop` is set, seen within 0.5 s; None where some were lost. Raises OSError."""
    while not stop.is_set():
        if not select.select([sock], [], [], _TICK)[0]:
            continue
        try:
            yield sock.recv(1 << 16)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None
