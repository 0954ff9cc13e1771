"""Which process is at the other end of a TCP connection on loopback: any local user may listen on a free port.

The kernel names the other end's socket (sock_diag(7)), and /proc the sockets of a process. Both are asked about the
very connection that is used, so nobody can take the port in between.
"""

import errno
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from meshd.errors import SerfError

# include/uapi/linux/{netlink,sock_diag,inet_diag}.h, include/net/tcp_states.h
_NETLINK_SOCK_DIAG = 4
_NLMSG_ERROR = 2
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_ESTABLISHED = 1
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_SOCKET_ID = struct.Struct("!HH16s16sI8s")
_ANSWER = struct.Struct(f"=BBBB{_SOCKET_ID.size}sIIIII")
_ANY_COOKIE = b"\xff" * 8
_TCP_TABLE = Path("/proc/net/tcp")
# Seconds within which the kernel lists the other end, accepted or not. A NAT rule that changes the connection's
# addresses hides it, and such a rule must not hold up the reconcile that removes it.
LISTED = 0.15
# A listener accepts within some 50 µs; the first looks come fast and the later ones rarely.
FIRST_PAUSE, LONGEST_PAUSE = 0.0002, 0.02


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a socket is. The inode is 0 until the listener has accepted the connection, and the user is 0 as well."""

    inode: int
    uid: int


def check(connection: socket.socket, processes: Callable[[], Collection[int]], timeout: float) -> None:
    """Return as soon as one of these processes holds the other end of `connection`. Raises SerfError if none does.

    Before it returns nothing may be sent.
    """
    port = _ends(connection)[0][1]
    begun, pause = time.monotonic(), FIRST_PAUSE
    while True:
        pids = processes()
        if not pids:
            raise SerfError(f"the Serf agent does not run, and another process listens on 127.0.0.1:{port}")
        owner = other_end(connection)
        if owner is not None and owner.inode:
            if owner.uid != os.geteuid():
                raise SerfError(f"a process of user {owner.uid} listens on 127.0.0.1:{port} in the Serf agent's place")
            if any(_holds(pid, owner.inode) for pid in pids):
                return
        waited = time.monotonic() - begun
        if owner is None and waited >= LISTED:
            raise SerfError(
                f"the kernel lists no other end of a connection to 127.0.0.1:{port}: a NAT rule changes its addresses"
            )
        if waited >= timeout:
            named = ", ".join(map(str, pids))
            raise SerfError(
                f"the Serf agent (pid {named}) does not accept a connection to 127.0.0.1:{port}"
                if not (owner and owner.inode)
                else f"another process than the Serf agent (pid {named}) listens on 127.0.0.1:{port}"
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def other_end(connection: socket.socket) -> Owner | None:
    """Return whose the other end of a connection on loopback is, None while the kernel lists no such socket.

    Raises SerfError if the other end has ended the connection.
    """
    local, remote = _ends(connection)
    found = _diagnosed(local, remote)
    # A kernel without the module tcp_diag says the same as for a socket that is not there.
    return found if found is not None else _listed(local, remote)


def _ends(connection: socket.socket) -> tuple[tuple[str, int], tuple[str, int]]:
    """Return the addresses of the other end and of this one. Raises SerfError if the connection is reset."""
    try:
        return connection.getpeername(), connection.getsockname()
    except OSError as error:
        # A process that ends resets what it has not accepted yet.
        raise SerfError(f"the Serf agent ended a connection before it accepted it: {error.strerror}") from error


def _diagnosed(local: tuple[str, int], remote: tuple[str, int]) -> Owner | None:
    """Ask sock_diag for one socket: it takes 10 µs, however many connections the host has."""
    addresses = (ipaddress.IPv4Address(end[0]).packed.ljust(16, b"\0") for end in (local, remote))
    sought = _SOCKET_ID.pack(local[1], remote[1], *addresses, 0, _ANY_COOKIE)
    body = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 1 << _ESTABLISHED) + sought
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
            kernel.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0) + body)
            answer = kernel.recv(4096)
    except OSError as error:
        if error.errno in {errno.EPROTONOSUPPORT, errno.ENOENT}:
            return None
        raise SerfError(f"asking the kernel who listens on 127.0.0.1:{local[1]}: {error.strerror}") from error
    if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
        return None
    _, state, _, _, found, *_, uid, inode = _ANSWER.unpack_from(answer, _HEADER.size)
    # Where there is no connection the kernel gives the listener.
    is_it = state == _ESTABLISHED and _SOCKET_ID.unpack(found)[:4] == _SOCKET_ID.unpack(sought)[:4]
    return Owner(inode, uid) if is_it else None


def _listed(local: tuple[str, int], remote: tuple[str, int]) -> Owner | None:
    """Look for one socket in the kernel's table of all, which takes milliseconds."""
    wanted = [*(_hexadecimal(end) for end in (local, remote)), f"{_ESTABLISHED:02X}"]
    for line in _TCP_TABLE.read_text().splitlines():
        words = line.split()
        if words[1:4] == wanted:
            return Owner(int(words[9]), int(words[7]))
    return None


def _hexadecimal(end: tuple[str, int]) -> str:
    (address,) = struct.unpack("=I", ipaddress.IPv4Address(end[0]).packed)
    return f"{address:08X}:{end[1]:04X}"


def _holds(pid: int, inode: int) -> bool:
    """Return whether a process has the socket `inode` open. Raises SerfError where that cannot be seen."""
    wanted = f"socket:[{inode}]"
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError as error:
        raise SerfError(
            f"which sockets the Serf agent (pid {pid}) has cannot be seen: it has more rights than this process. "
            f"End it (kill {pid}): meshd starts another one"
        ) from error
    except OSError:
        return False  # it has ended
    return any(_target(descriptor) == wanted for descriptor in descriptors)


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except OSError:
        return ""  # closed meanwhile
