"""The connections that the kernel tracks, as far as they outlive a repair of meshd's rules.

A connection keeps the source that it got with its first packet, and "established" is accepted whatever its first packet
would meet now. So what began while a rule was away goes on without it. Such a connection is forgotten by the kernel,
and its next packet meets the rules again.

Facts are from the kernel's net/netfilter/nf_conntrack_netlink.c and its header nfnetlink_conntrack.h.
"""

import errno
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from meshd.endpoint import IPAddress
from meshd.errors import ApplyError, MissingError
from meshd.net.netlink import NETLINK_NETFILTER, NLM_F_ACK, NLM_F_DUMP, ask_socket, asked, attributes

# Why a connection contradicts the rules, as the log says it.
REWRITTEN = "whose source another rule had rewritten"
CLOSED = "that the firewall rules do not admit"

_GET, _DELETE = 0x101, 0x102  # IPCTNL_MSG_CT_GET and _DELETE of NFNL_SUBSYS_CTNETLINK
_NFGENMSG = struct.pack("=BBH", socket.AF_INET, 0, 0)
_ORIGINAL, _REPLY, _STATUS, _ID, _ZONE = 1, 2, 3, 12, 18
_IP, _PROTO = 1, 2
_SOURCE, _TARGET = 1, 2  # CTA_IP_V4_SRC and _DST
_NUMBER, _SOURCE_PORT = 1, 2
_NESTED = 0x8000
_EXPECTED = 1  # IPS_EXPECTED: of the kind that rules call related
_PROTOCOLS = {"tcp": 6, "udp": 17}
_ICMP = 1


@dataclass(frozen=True, slots=True)
class Connection:
    """A tracked connection: its first packet's addresses, and those of the answers as they come in.

    They differ where an address was rewritten: `answerer` is whom the first packet reached in the end, `answered` the
    source that it had there. `port` is the answerer's, 0 for what has none.
    """

    protocol: int
    source: IPv4Address
    target: IPv4Address
    answerer: IPv4Address
    answered: IPv4Address
    port: int = 0
    related: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What the rules of a mesh (see rules.table) say of connections. `local` are this host's own addresses."""

    overlay: IPv4Network
    subnet: IPv4Network
    bridge: bool
    allow: tuple[str, ...]
    local: frozenset[IPAddress]

    def contradiction(self, connection: Connection) -> str:
        """Return why these rules would not have let a connection begin as it did, the empty string if they would."""
        source, answerer = connection.source, connection.answerer
        to_others = answerer in self.overlay and answerer not in self.subnet
        if source in self.subnet and to_others and connection.answered != source:
            return REWRITTEN
        if source in self.local or connection.related:
            return ""
        if source in self.overlay:
            return CLOSED if answerer in self.local and not self._is_allowed(connection) else ""
        into = answerer in self.subnet and answerer == connection.target and answerer not in self.local
        return CLOSED if to_others or (self.bridge and into) else ""

    def _is_allowed(self, connection: Connection) -> bool:
        return connection.protocol == _ICMP or any(_covers(entry, connection) for entry in self.allow)


def _covers(entry: str, connection: Connection) -> bool:
    """Return whether `all`, `tcp/22` or `udp/5000-5010` is what a connection is."""
    if entry == "all":
        return True
    protocol, _, ports = entry.partition("/")
    first, _, last = ports.partition("-")
    return _PROTOCOLS[protocol] == connection.protocol and int(first) <= connection.port <= int(last or first)


def end(admission: Admission) -> tuple[Counter[str], int]:
    """Have the kernel forget the connections that contradict the rules: return how many by why, and how many are left.

    Raises MissingError where the kernel lists no connections, ApplyError for its refusal.
    """
    ended, left = Counter[str](), 0
    try:
        with ask_socket(NETLINK_NETFILTER) as sock:
            for why, request in list(_contradicting(sock, admission)):
                try:
                    list(asked(sock, _DELETE, NLM_F_ACK, request))
                    ended[why] += 1
                except OSError as error:
                    # Gone by itself, or in the hands of a flow table, which keeps it.
                    if error.errno not in (errno.ENOENT, errno.EBUSY):
                        raise
                    left += error.errno == errno.EBUSY
    except OSError as error:
        raise ApplyError(f"ending connections that contradict the rules: {error.strerror or error}") from error
    return ended, left


def _contradicting(sock: socket.socket, admission: Admission) -> Iterator[tuple[str, bytes]]:
    """Yield why a connection contradicts the rules, and the request that removes it. Raises MissingError, OSError."""
    # Of 100,000 connections of others only the bytes are looked at: an address of the overlay begins like this.
    begin = admission.overlay.network_address.packed[: admission.overlay.prefixlen // 8]
    try:
        for body in asked(sock, _GET, NLM_F_DUMP, _NFGENMSG):
            if begin in body:
                found = attributes(body, len(_NFGENMSG))
                if _ORIGINAL in found and (why := admission.contradiction(_connection(found))):
                    yield why, _NFGENMSG + b"".join(_attribute(kind, found) for kind in (_ORIGINAL, _ZONE, _ID))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP):
            raise MissingError(
                "connections that began while a firewall rule was away may go on without it: this kernel lists no "
                "connections (modprobe nf_conntrack_netlink)"
            ) from error
        raise


def _connection(found: dict[int, bytes]) -> Connection:
    original, reply = (attributes(found.get(kind, b""), 0) for kind in (_ORIGINAL, _REPLY))
    first, answer, protocol = (attributes(nested, 0) for nested in (original[_IP], reply[_IP], reply[_PROTO]))
    return Connection(
        protocol[_NUMBER][0],
        IPv4Address(first[_SOURCE]),
        IPv4Address(first[_TARGET]),
        IPv4Address(answer[_SOURCE]),
        IPv4Address(answer[_TARGET]),
        int.from_bytes(protocol.get(_SOURCE_PORT, b"")),
        bool(int.from_bytes(found.get(_STATUS, b"")) & _EXPECTED),
    )


def _attribute(kind: int, found: dict[int, bytes]) -> bytes:
    """Return an attribute as it came, padded; nothing for one that did not come."""
    if kind not in found:
        return b""
    value = found[kind]
    header = struct.pack("=HH", 4 + len(value), kind | (_NESTED if kind == _ORIGINAL else 0))
    return header + value + bytes(-len(value) % 4)
