"""Record <-> Serf tags: what a host publishes, and the strict reading of what others claim (docs/record.md).

Three tags. `wg` and `subnet` stay readable in `serf members`; `meshd` holds the rest, base64url of a fixed layout:

    wg=<base64 public key>  subnet=172.20.101.0/24  meshd=2.<base64url>
"""

import base64
import binascii
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from meshd.endpoint import Endpoint, IPAddress
from meshd.errors import InputError
from meshd.mesh.addressing import is_usable
from meshd.mesh.certificates import SIGNATURE, delegated, pack_subnets
from meshd.mesh.model import Certificate, Delegation, Record

NAMES = ("meshd", "subnet", "wg")
VERSION = "2"
# memberlist's limit for a member's metadata: one type byte and the msgpack map of all tags.
LIMIT = 512
MAX_SEQ = 2**48
# As long as a delegation's prefix may be so that its hosts' records fit into LIMIT with an IPv6 endpoint.
MAX_PREFIX = 16
MAX_SUBNETS = 4
_LEAVING, _IPV6, _DELEGATED = 1, 2, 4


class RecordError(InputError):
    """A member's tags are not a valid record; the message is the reason that `meshd members` shows."""


def encode(record: Record) -> dict[str, str]:
    """Return the tags of a record. Raises RecordError if Serf would refuse them as too long."""
    body = base64.urlsafe_b64encode(_pack(record)).decode().rstrip("=")
    tags = {"wg": record.public_key, "subnet": str(record.subnet), "meshd": f"{VERSION}.{body}"}
    if size(tags) > LIMIT:
        raise RecordError(f"the record takes {size(tags)} bytes, Serf carries {LIMIT}")
    return tags


def size(tags: Mapping[str, str]) -> int:
    """Return the bytes that Serf needs for tags: its type byte, the map's header, a header for each string."""

    def encoded(text: str) -> int:
        length = len(text.encode())
        return length + (1 if length < 32 else 3)

    return 1 + (1 if len(tags) < 16 else 3) + sum(encoded(k) + encoded(v) for k, v in tags.items())


def decode(tags: Mapping[str, str], overlay: IPv4Network, length: int) -> Record:
    """Read a record from tags that anyone may have written; RecordError says why it is not one.

    Whether it is signed by who it says, and whether a host can be at its endpoint, is checked by terms.Mesh.
    """
    missing = [name for name in NAMES if name not in tags]
    if missing:
        raise RecordError("no record" if len(missing) == len(NAMES) else f"no {missing[0]} tag")
    return _decode(tags["wg"], tags["subnet"], tags["meshd"], overlay, length)


# Most members' tags are what they were in the reconcile before.
@lru_cache(16384)
def _decode(wg: str, subnet: str, packed: str, overlay: IPv4Network, length: int) -> Record:
    version, _, body = packed.partition(".")
    if version != VERSION:
        raise RecordError(f"record version {version[:16]!r}, this version of meshd supports {VERSION}")
    read = _Reader(_base64url(body))
    flags = read.number(1)
    if flags & ~(_LEAVING | _IPV6 | _DELEGATED):
        raise RecordError("the record has flags that this version of meshd does not know")
    seq, address = read.number(6), read.take(16 if flags & _IPV6 else 4)
    endpoint = _endpoint(address, read.number(2))
    certificate = read.certificate(is_delegated=bool(flags & _DELEGATED))
    signature = read.take(SIGNATURE)
    read.end()
    if seq == 0:
        raise RecordError("the sequence number is 0")
    leaving = bool(flags & _LEAVING)
    return Record(_public_key(wg), _subnet(subnet, overlay, length), endpoint, seq, certificate, leaving, signature)


def to_wire(record: Record) -> bytes:
    """Return a record as bytes, for where there are no tags: 230 to 330 of them."""
    return base64.b64decode(record.public_key) + pack_subnets([record.subnet]) + _pack(record)


@lru_cache(16384)
def from_wire(raw: bytes, overlay: IPv4Network, length: int) -> Record:
    """Read what `to_wire` gave, and what anyone may have sent instead. Raises RecordError."""
    try:
        subnet = IPv4Network((raw[32:36], raw[36]))
    except (ValueError, IndexError):
        raise RecordError("the record has no subnet") from None
    body = base64.urlsafe_b64encode(raw[37:]).decode().rstrip("=")
    wg = base64.b64encode(raw[:32]).decode()
    return decode({"wg": wg, "subnet": str(subnet), "meshd": f"{VERSION}.{body}"}, overlay, length)


def wire_certificate(raw: bytes) -> Certificate:
    """Return the certificate in what `to_wire` gave; nothing else of it is read. Raises RecordError."""
    read = _Reader(raw[37:])
    flags = read.number(1)
    read.take(6 + (16 if flags & _IPV6 else 4) + 2)
    return read.certificate(is_delegated=bool(flags & _DELEGATED))


def _pack(record: Record) -> bytes:
    address = record.endpoint.address
    delegation = record.certificate.delegation
    flags = _LEAVING * record.leaving | _IPV6 * (address.version == 6) | _DELEGATED * (delegation is not None)
    head = bytes([flags]) + record.seq.to_bytes(6, "big") + address.packed + record.endpoint.port.to_bytes(2, "big")
    return head + pack_certificate(record.certificate) + record.signature


def pack_certificate(certificate: Certificate) -> bytes:
    """Return a certificate as bytes. Whether it is delegated is not in them."""
    delegation = certificate.delegation
    head = certificate.identity + certificate.signature
    if delegation is not None:
        return head + pack_delegation(delegation)
    return head + _terms(certificate.serial, certificate.expires, certificate.subnets)


def read_certificate(raw: bytes, *, is_delegated: bool) -> Certificate:
    """Read what `pack_certificate` gave. Raises RecordError."""
    read = _Reader(raw)
    certificate = read.certificate(is_delegated=is_delegated)
    read.end()
    return certificate


def pack_delegation(delegation: Delegation) -> bytes:
    """Return a delegation as bytes."""
    prefix = delegation.prefix.encode()
    terms = _terms(delegation.serial, delegation.expires, delegation.subnets)
    return terms + delegation.key + bytes([len(prefix)]) + prefix + delegation.signature


def read_delegation(raw: bytes) -> Delegation:
    """Read what `pack_delegation` gave. Raises RecordError."""
    read = _Reader(raw)
    delegation = read.delegation()
    read.end()
    return delegation


def _terms(serial: int, expires: int, subnets: tuple[IPv4Network, ...]) -> bytes:
    return serial.to_bytes(8, "big") + expires.to_bytes(4, "big") + bytes([len(subnets)]) + pack_subnets(subnets)


class _Reader:
    """Takes bytes one field after the other, and never more than there are."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def take(self, length: int) -> bytes:
        field, self._raw = self._raw[:length], self._raw[length:]
        if len(field) < length:
            raise RecordError("the record ends early")
        return field

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def end(self) -> None:
        if self._raw:
            raise RecordError("the record is longer than it should be")

    def certificate(self, *, is_delegated: bool) -> Certificate:
        identity, signature = self.take(32), self.take(SIGNATURE)
        if is_delegated:
            return delegated(identity, self.delegation(), signature)
        serial, expires, subnets = self._terms()
        return Certificate(serial, expires, identity, subnets, None, signature)

    def delegation(self) -> Delegation:
        serial, expires, subnets = self._terms()
        key, length = self.take(32), self.number(1)
        if length > MAX_PREFIX:
            raise RecordError("the delegation's prefix is too long")
        try:
            prefix = self.take(length).decode("ascii")
        except UnicodeDecodeError:
            raise RecordError("the delegation's prefix is not a name's") from None
        return Delegation(serial, expires, key, prefix, subnets, self.take(SIGNATURE))

    def _terms(self) -> tuple[int, int, tuple[IPv4Network, ...]]:
        serial, expires, count = self.number(8), self.number(4), self.number(1)
        if count > MAX_SUBNETS:
            raise RecordError("the certificate lists too many subnets")
        try:
            return serial, expires, tuple(IPv4Network((self.take(4), self.number(1))) for _ in range(count))
        except ValueError:
            raise RecordError("the certificate lists a subnet that is none") from None


def _base64url(text: str) -> bytes:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise RecordError("the record is not base64url") from None
    # One record has one spelling: the last character's unused bits are zero.
    if base64.urlsafe_b64encode(raw).decode().rstrip("=") != text:
        raise RecordError("the record is not base64url")
    return raw


def is_public_key(text: str) -> bool:
    """Return whether a text is a WireGuard public key, in its only spelling."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    # The all-zero key is how WireGuard spells "no key"; the re-encoding refuses a second spelling of one key.
    return len(raw) == 32 and raw != bytes(32) and base64.b64encode(raw).decode() == text


def _public_key(text: str) -> str:
    if not is_public_key(text):
        raise RecordError("the wg tag is not a WireGuard public key")
    return text


def _subnet(text: str, overlay: IPv4Network, length: int) -> IPv4Network:
    try:
        subnet = IPv4Network(text)
    except ValueError:
        raise RecordError(f"subnet {text[:32]!r} is not a prefix") from None
    if str(subnet) != text:
        raise RecordError(f"subnet {text[:32]!r} is not written as {subnet}")
    if not subnet.subnet_of(overlay):
        raise RecordError(f"subnet {subnet} is outside of the overlay {overlay}")
    if subnet.prefixlen != length:
        raise RecordError(f"subnet {subnet} is not a /{length}")
    if not is_usable(subnet, overlay):
        raise RecordError(f"subnet {subnet} is at the overlay's edge")
    return subnet


def _endpoint(packed: bytes, port: int) -> Endpoint:
    address: IPAddress = IPv6Address(packed) if len(packed) == 16 else IPv4Address(packed)
    endpoint = Endpoint(address, port)
    if port == 0:
        raise RecordError(f"endpoint {endpoint} is no port")
    return endpoint
