"""What every speaker of netlink shares: sockets, the kernel's refusals as meshd's errors, and its notifications."""

import errno
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Event
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from tenacity import retry, retry_if_exception_cause_type, stop_after_attempt

from meshd.errors import ApplyError

RT_TABLE_MAIN, RT_TABLE_LOCAL = 254, 255
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST, RTN_UNREACHABLE = 1, 2, 3, 7
RTMSG_LENGTH, RTA_DST = 12, 1
PROTOCOL = 77
"""The protocol number of meshd's routes and rules. iproute2's rt_protos and the kernel's rtnetlink.h do not name 77."""
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
NETLINK_NETFILTER = 12
_BUFFER = 1 << 20  # room for a burst such as a whole mesh's routes going with their link
_TICK = 2.0  # seconds between looks at `stop`
_RTM_GETROUTE, _RTM_GETRULE = 26, 34
NLM_F_ACK, NLM_F_DUMP, NLA_TYPE_MASK = 0x4, 0x300, 0x3FFF
_NLM_F_REQUEST, _NLM_F_DUMP_INTR = 0x1, 0x10
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RT_TABLE_COMPAT, _RTA_TABLE = 252, 15
_NLMSG_HEADER, _RTMSG = struct.Struct("=IHHII"), struct.Struct("=8BI")
_NETLINK_GET_STRICT_CHK, _ANSWER_TIME = 12, 5.0


_shared: ContextVar["_Shared | None"] = ContextVar("_shared", default=None)


class _Shared:
    """One socket for a block, opened when it is first needed."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._socket: Any = None

    def socket(self) -> Any:
        if self._socket is None:
            self._socket = self._stack.enter_context(_open())
        return self._socket

    def forget(self) -> None:
        self._socket = None


@contextmanager
def one_socket() -> Iterator[None]:
    """Let all that this thread does by `rtnetlink` in the block use one socket.

    To open and close one takes pyroute2 longer than to set a route, and a host that joins sets one for each other. A
    dump has to be read to its end before the next request, which the kernel refuses until then: make a list of it.
    """
    with ExitStack() as stack:
        token = _shared.set(_Shared(stack))
        try:
            yield
        finally:
            _shared.reset(token)


@contextmanager
def rtnetlink(doing: str) -> Iterator[Any]:
    """An rtnetlink socket, in no multicast group; what the kernel refuses is an ApplyError that begins with `doing`."""
    shared = _shared.get()
    try:
        if shared is not None:
            yield shared.socket()
            return
        with _open() as ipr:
            yield ipr
    except (NetlinkError, OSError) as error:
        if shared is not None and not isinstance(error, NetlinkError):
            shared.forget()  # unread replies may remain on the socket
        raise ApplyError(f"{doing}: {error.args[-1] if error.args else error}") from error


def _open() -> Any:
    # Strict checks let the kernel filter dumps by interface (Linux 4.20).
    return IPRoute(groups=0, strict_check=True)


@contextmanager
def tolerating(*codes: int) -> Iterator[None]:
    """Ignore these kernel errors: they say that what was wanted is already so."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in codes:
            raise


def dump_routes(doing: str, protocol: int, *, family: int = socket.AF_INET, table: int = RT_TABLE_MAIN) -> list[bytes]:
    """A table's routes with an rtm_protocol (0 for all), each as its rtmsg and attributes (rtnetlink(7)).

    pyroute2 takes 90 µs to read one route, which a host with 1,000 peers would pay each time. Raises ApplyError.
    """
    # A number of more than 8 bits fits into the attribute alone.
    message = _RTMSG.pack(family, 0, 0, 0, min(table, _RT_TABLE_COMPAT), protocol, 0, 0, 0)
    return _dump(doing, _RTM_GETROUTE, message + struct.pack("=HHI", 8, _RTA_TABLE, table))


def dump_rules(doing: str) -> list[bytes]:
    """The policy rules of IPv4 in the kernel's order, each as its fib_rule_hdr and attributes. Raises ApplyError."""
    return _dump(doing, _RTM_GETRULE, _RTMSG.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0))


@retry(retry=retry_if_exception_cause_type(InterruptedError), stop=stop_after_attempt(5), reraise=True)
def _dump(doing: str, kind: int, request: bytes) -> list[bytes]:
    try:
        with ask_socket(socket.NETLINK_ROUTE) as sock:
            # With strict checks the kernel filters by table and protocol.
            sock.setsockopt(SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            return list(asked(sock, kind, NLM_F_DUMP, request))
    except OSError as error:
        # Nobody has put a route into that table yet, or the kernel is built without policy rules.
        if error.errno in {errno.ENOENT, errno.EOPNOTSUPP}:
            return []
        raise ApplyError(f"{doing}: {error.strerror or error}") from error


def ask_socket(protocol: int) -> socket.socket:
    """Return a socket for `asked`, whose answers take no longer than 5 s. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    sock.settimeout(_ANSWER_TIME)
    return sock


def asked(sock: socket.socket, kind: int, flags: int, request: bytes) -> Iterator[bytes]:
    """Ask with NLM_F_DUMP or NLM_F_ACK, and yield the bodies of the answer. Raises OSError for the kernel's refusal."""
    header = _NLMSG_HEADER.pack(_NLMSG_HEADER.size + len(request), kind, _NLM_F_REQUEST | flags, 1, 0)
    sock.sendto(header + request, (0, 0))
    return _parts(sock)


def _parts(sock: socket.socket) -> Iterator[bytes]:
    """Yield the bodies of a multi-part answer up to its end. Raises OSError for the kernel's refusal."""
    while True:
        data = sock.recv(1 << 16)
        offset = 0
        while offset + _NLMSG_HEADER.size <= len(data):
            length, kind, flags, *_ = _NLMSG_HEADER.unpack_from(data, offset)
            if flags & _NLM_F_DUMP_INTR:
                raise InterruptedError(errno.EINTR, "what was read changed meanwhile")
            body = data[offset + _NLMSG_HEADER.size : offset + length]
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                if code := -int.from_bytes(body[:4], sys.byteorder, signed=True):
                    raise OSError(code, os.strerror(code))
                return
            yield body
            offset += (length + 3) & ~3


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """Read the attributes of a message from `offset` on: type, without its flags -> value."""
    found = {}
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        found[kind & NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


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
    """Yield each datagram until `stop` is set, seen within 2 s; None where some were lost. Raises OSError."""
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
