"""wireguard-go's text protocol "UAPI" as pure functions (https://www.wireguard.com/xplatform/).

What is read was written by another program: whatever it is, the result is a State or an ApplyError.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Network, ip_network

from meshd.endpoint import Endpoint
from meshd.errors import ApplyError
from meshd.net.resources import Peer
from meshd.net.wireguard.contract import PeerUpdate, decode_key, encode_key

MAX_LINE = 4096  # characters
_KEY = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"-?[0-9]{1,19}")
_LINE = re.compile(r"([a-z0-9_]+)=([\x20-\x7e]*)")


@dataclass(slots=True)
class _PeerText:
    """A peer as far as it has been read."""

    public_key: str
    endpoint: Endpoint | None = None
    allowed_ips: list[IPv4Network] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def peer(self) -> Peer:
        number = self.numbers.get
        seconds, nanoseconds = number("last_handshake_time_sec", 0), number("last_handshake_time_nsec", 0)
        return Peer(
            public_key=self.public_key,
            endpoint=self.endpoint,
            allowed_ips=tuple(sorted(self.allowed_ips)),
            keepalive=number("persistent_keepalive_interval", 0),
            handshake=seconds + nanoseconds / 1e9,
            received=number("rx_bytes", 0),
            sent=number("tx_bytes", 0),
        )


@dataclass(frozen=True, slots=True)
class State:
    """The answer to `get=1`. `private_key` is "" (64 hex digits otherwise), kept out of the repr."""

    private_key: str = field(repr=False)
    port: int
    peers: tuple[Peer, ...]


_LIMITS = {
    "listen_port": 65535,
    "persistent_keepalive_interval": 65535,
    "last_handshake_time_sec": 1 << 62,
    "last_handshake_time_nsec": 999_999_999,
    "rx_bytes": 1 << 63,
    "tx_bytes": 1 << 63,
}


_KNOWN = _LIMITS.keys() | {"public_key", "private_key", "endpoint", "allowed_ip", "preshared_key", "protocol_version"}


def parse(text: str) -> State:
    """Read the answer to `get=1`, peers sorted by key. Raises ApplyError for anything that is not one.

    IPv6 allowed IPs are passed over: meshd sets none, and a Peer has no room for them. So are keys that a newer
    wireguard-go may have.
    """
    private_key, port = "", 0
    peers: dict[str, _PeerText] = {}
    current: _PeerText | None = None
    for key, value in _pairs(text):
        if key == "public_key":
            current = _PeerText(encode_key(bytes.fromhex(_hex(key, value))))
            if peers.setdefault(current.public_key, current) is not current:
                raise not_understood(f"peer {current.public_key} twice")
        elif current is not None:
            _read_peer_line(current, key, value)
        elif key == "private_key":
            private_key = _hex(key, value)
        elif key == "listen_port":
            port = _number(key, value)
    return State(private_key, port, tuple(peers[key].peer() for key in sorted(peers)))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """The `key=value` lines before the last one, which must be `errno=0` and end with an empty line."""
    if not text.endswith("\n\n"):
        raise not_understood("it ends early")
    lines = text[:-2].split("\n")
    last = lines.pop()
    for line in lines:
        key, equals, value = line.partition("=")
        # A thousand peers are ten thousand lines: the regular expression is for what is not known.
        is_line = line.isascii() and line.isprintable() if key in _KNOWN else _LINE.fullmatch(line) and key != "errno"
        if not equals or not is_line or len(line) > MAX_LINE:
            raise not_understood(
                f"line {line[:80]!r}" if not line.startswith("private_key") else "the private key's line"
            )
        yield key, value
    key, _, number = last[:MAX_LINE].partition("=")
    if key != "errno" or not _NUMBER.fullmatch(number):
        raise not_understood("it ends without an errno")
    if int(number):
        code = abs(int(number))
        raise ApplyError(f"wireguard-go refused: {os.strerror(code) if code < 4096 else f'error {number}'}")


def _read_peer_line(peer: _PeerText, key: str, value: str) -> None:
    if key in _LIMITS:
        peer.numbers[key] = _number(key, value)
        return
    try:
        if key == "endpoint":
            peer.endpoint = Endpoint.parse(value)
        elif key == "allowed_ip" and isinstance(network := _network(value), IPv4Network):
            peer.allowed_ips.append(network)
    except ValueError as error:
        raise not_understood(f"{key} {value[:80]!r}") from error


_network = lru_cache(16384)(ip_network)


def _hex(key: str, value: str) -> str:
    if not _KEY.fullmatch(value):
        raise not_understood(f"{key} is not 64 hexadecimal digits")  # the value may be a secret
    return value


def _number(key: str, value: str) -> int:
    # Of ASCII text isdigit() means 0 to 9.
    if not value.isdigit() or len(value) > 19 or (number := int(value)) > _LIMITS[key]:
        raise not_understood(f"{key} {value[:80]!r}")
    return number


def not_understood(what: str) -> ApplyError:
    return ApplyError(f"wireguard-go's answer is not understood: {what}")


def format_device(private_key: bytes | None, port: int | None) -> str:
    """A request that sets a device's private key and UDP port; None leaves either as it is."""
    return _request(
        ("private_key", None if private_key is None else private_key.hex()),
        ("listen_port", port),
    )


def format_peer(key: str, update: PeerUpdate) -> str:
    """A request that sets a peer (base64 `key`). Raises ApplyError for what could not be one line."""
    return _request(
        ("public_key", decode_key(key).hex()),
        ("update_only", "true" if update.update_only else None),
        ("endpoint", update.endpoint),
        ("persistent_keepalive_interval", update.keepalive),
        ("replace_allowed_ips", None if update.allowed_ips is None else "true"),
        *(("allowed_ip", network) for network in update.allowed_ips or ()),
    )


def format_removal(key: str) -> str:
    """A request that removes a peer (base64 `key`), which need not exist."""
    return _request(("public_key", decode_key(key).hex()), ("remove", "true"))


def _request(*pairs: tuple[str, object]) -> str:
    lines = [f"{key}={value}" for key, value in pairs if value is not None]
    for line in lines:
        # An IPv6 zone may hold any character, and endpoints are written by others: one line must stay one line.
        if not _LINE.fullmatch(line):
            raise ApplyError(f"WireGuard request: {line.partition('=')[0]} holds characters that do not belong there")
    return "\n".join(["set=1", *lines, "", ""])
