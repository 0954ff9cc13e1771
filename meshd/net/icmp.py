"""Pings of given sizes over one link, by which a path's MTU shows; and the link's own MTU and traffic."""

import errno
import fcntl
import secrets
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

from meshd.errors import ApplyError

_ECHO_REPLY, _ECHO_REQUEST = 0, 8
_IP_HEADER = 20
_HEADER = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence number
_COOKIE = 16
# include/uapi/linux/icmp.h and in.h; PROBE sets DF, and minds the link's MTU alone.
_SOL_RAW, _ICMP_FILTER = 255, 1
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3
_SIOCGIFMTU = 0x8921
_IFREQ = struct.Struct("16si20x")
# Packets that are read at a time, and those of a ping's peer that are no answers until it is heard no more.
_AT_ONCE, _TOO_MANY = 32, 256


class Pings:
    """A socket for pings to one address over one link. Close it, or use it as a context.

    The kernel gives it what comes from that address over that link alone: no other peer can fill it, or answer.
    """

    def __init__(self, link: str, address: IPv4Address) -> None:
        """Open the socket. Raises ApplyError."""
        self._what = f"sending pings to {address} by {link}"
        self._cookie = secrets.token_bytes(_COOKIE)
        self._identifier, self._sequence = secrets.randbits(16), 0
        self._sent: dict[int, int] = {}
        self._strays = 0
        try:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._socket.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << _ECHO_REPLY) & 0xFFFFFFFF))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link.encode())
            self._socket.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
            self._socket.connect((str(address), 0))
        except OSError as error:
            self._socket.close()
            raise self._failed(error) from error

    def __enter__(self) -> "Pings":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, size: int) -> None:
        """Send a ping whose IP packet has `size` bytes, never in fragments. Raises ApplyError."""
        self._sequence = (self._sequence + 1) & 0xFFFF
        self._sent[self._sequence] = size
        head = _HEADER.pack(_ECHO_REQUEST, 0, 0, self._identifier, self._sequence) + self._cookie
        # The padding is of zeros, which change no checksum.
        head = head[:2] + _checksum(head) + head[4:]
        try:
            self._socket.send(head.ljust(size - _IP_HEADER, b"\0"))
        except OSError as error:
            raise self._failed(error) from error

    def receive(self) -> Iterator[int]:
        """Yield the sizes of pings that have come back, each once. Raises ApplyError for too much else."""
        for _ in range(_AT_ONCE):
            try:
                packet = self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._failed(error) from error
            size = self._answered(packet)
            if size:
                yield size
                continue
            self._strays += 1
            if self._strays > _TOO_MANY:
                raise self._failed(OSError(errno.EBADMSG, "too many answers that nobody asked for"))

    def _answered(self, packet: bytes) -> int:
        """Return the size of the ping that a packet answers, 0 if it answers none. The packet is its peer's."""
        start = (packet[0] & 0xF) * 4
        head = packet[start : start + _HEADER.size]
        if len(head) < _HEADER.size or not packet.startswith(self._cookie, start + _HEADER.size):
            return 0
        kind, _, _, identifier, sequence = _HEADER.unpack(head)
        if (kind, identifier, self._sent.get(sequence)) != (_ECHO_REPLY, self._identifier, len(packet)):
            return 0
        return self._sent.pop(sequence)

    def _failed(self, error: OSError) -> ApplyError:
        return ApplyError(f"{self._what}: {error.strerror or error}")


def _checksum(data: bytes) -> bytes:
    """Return the checksum of an even number of bytes (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)


def link_mtu(link: str) -> int:
    """Return a link's MTU in bytes. Raises ApplyError."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, _SIOCGIFMTU, _IFREQ.pack(link.encode(), 0))
    except OSError as error:
        raise ApplyError(f"reading the MTU of {link}: {error.strerror or error}") from error
    return int(_IFREQ.unpack(answer)[1])


def sent_bytes(link: str) -> int:
    """Return how many bytes a link has sent, 0 if there is no such link. Raises ApplyError.

    /sys shows the links of the namespace in which it was mounted, /proc/thread-self those of this thread.
    """
    try:
        lines = Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ApplyError(f"reading the traffic of {link}: {error.strerror or error}") from error
    for line in lines:
        name, _, counters = line.partition(":")
        if name.strip() == link:
            return int(counters.split()[8])
    return 0
