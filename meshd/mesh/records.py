"""Record <-> Serf tags: what a host publishes, and the strict reading of what others claim (docs/record.md).

Three tags. `wg` and `subnet` stay readable in `serf members`; `meshd` holds the rest, a compact body and behind it what
later versions add (meshd.mesh.extensions), in base 85:

    wg=<base64 public key>  subnet=172.20.101.0/24  meshd=3.<base 85>

Version 2, `2.<base64url>`, is read as well, and a record of it stays what it is: it is passed on bit by bit.
"""

import base64
import binascii
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from meshd.endpoint import Endpoint, IPAddress
from meshd.errors import InputError
from meshd.mesh import extensions
from meshd.mesh.addressing import is_usable
from meshd.mesh.certificates import SIGNATURE, delegated, pack_subnets, since
from meshd.mesh.model import FORMER, VERSION, Certificate, Delegation, Record

NAMES = ("meshd", "subnet", "wg")
# memberlist's limit for a member's metadata: one type byte and the msgpack map of all tags.
LIMIT = 512
MAX_SEQ = 2**48
# As long as a delegation's prefix may be so that its hosts' records, with an IPv6 endpoint and 24 bytes of extensions,
# fit into LIMIT whatever the overlay; and as long as it was in version 2.
MAX_PREFIX, FORMER_PREFIX = 10, 16
MAX_SUBNETS = 4
# No flag is left: what a later version adds is an extension.
_LEAVING, _IPV6, _DELEGATED, _FORMER_CERTIFICATE, _VERSION_3 = 1, 2, 4, 8, 0x80
_FLAGS = {
    FORMER: _LEAVING | _IPV6 | _DELEGATED,
    VERSION: _LEAVING | _IPV6 | _DELEGATED | _FORMER_CERTIFICATE | _VERSION_3,
}
# Bytes of what the tags `wg` and `subnet` hold, and the place of the first byte behind them.
_KEY, _BODY = 32, 37


class RecordError(InputError):
    """A member's tags are not a valid record; the message is the reason that `meshd members` shows."""


def encode(record: Record) -> dict[str, str]:
    """Return the tags of a record. Raises RecordError if Serf would refuse them as too long."""
    spelled = _spell_85 if record.version >= VERSION else _spell_64
    body = f"{record.version}.{spelled(_pack(record))}"
    tags = {"wg": record.public_key, "subnet": str(record.subnet), "meshd": body}
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
    if version == str(VERSION):
        raw = _base85(body)
    elif version == str(FORMER):
        raw = _base64url(body)
    else:
        raise RecordError(f"record version {version[:16]!r}, this version of meshd supports {FORMER} and {VERSION}")
    if version != str(_version(raw)):
        raise RecordError(f"the record is not of version {version}, as it says")
    return _read(wg, subnet, raw, overlay, length)


def to_wire(record: Record) -> bytes:
    """Return a record as bytes, for where there are no tags: 220 to 380 of them."""
    return base64.b64decode(record.public_key) + pack_subnets([record.subnet]) + _pack(record)


@lru_cache(16384)
def from_wire(raw: bytes, overlay: IPv4Network, length: int) -> Record:
    """Read what `to_wire` gave, and what anyone may have sent instead. Raises RecordError."""
    try:
        subnet = IPv4Network((raw[_KEY : _BODY - 1], raw[_BODY - 1]))
    except (ValueError, IndexError):
        raise RecordError("the record has no subnet") from None
    key = base64.b64encode(raw[:_KEY]).decode()
    return _read(key, str(subnet), raw[_BODY:], overlay, length)


def _version(body: bytes) -> int:
    """Return the version of a record, which its first byte tells. Version 2 knew no such flag."""
    return VERSION if body[:1] and body[0] & _VERSION_3 else FORMER


def _read(wg: str, subnet: str, body: bytes, overlay: IPv4Network, length: int) -> Record:
    read, version = _Reader(body), _version(body)
    flags = read.number(1)
    if flags & ~_FLAGS[version]:
        raise RecordError("the record has flags that this version of meshd does not know")
    seq, address = read.number(6), read.take(16 if flags & _IPV6 else 4)
    endpoint = _endpoint(address, read.number(2))
    signed_in = FORMER if flags & _FORMER_CERTIFICATE else version
    certificate = read.certificate(is_delegated=bool(flags & _DELEGATED), version=signed_in)
    more = read.extensions() if version >= VERSION else b""
    signature = read.take(SIGNATURE)
    read.end()
    if seq == 0:
        raise RecordError("the sequence number is 0")
    key, prefix, leaving = _public_key(wg), _subnet(subnet, overlay, length), bool(flags & _LEAVING)
    return Record(key, prefix, endpoint, seq, certificate, leaving, signature, more, version)


def _pack(record: Record) -> bytes:
    address, certificate = record.endpoint.address, record.certificate
    flags = (
        _LEAVING * record.leaving | _IPV6 * (address.version == 6) | _DELEGATED * (certificate.delegation is not None)
    )
    more = b""
    if record.version >= VERSION:
        flags |= _VERSION_3 | _FORMER_CERTIFICATE * (certificate.version < VERSION)
        more = pack_extensions(record.extensions)
    head = bytes([flags]) + record.seq.to_bytes(6, "big") + address.packed + record.endpoint.port.to_bytes(2, "big")
    return head + pack_certificate(certificate) + more + record.signature


def pack_certificate(certificate: Certificate) -> bytes:
    """Return a certificate as bytes. Its version, and whether it is delegated, are not in them."""
    delegation = certificate.delegation
    head = certificate.identity + certificate.signature
    if delegation is not None:
        return head + pack_delegation(delegation)
    numbers = certificate.serial.to_bytes(8, "big") + certificate.expires.to_bytes(4, "big")
    subnets = _pack_list(certificate.subnets)
    if certificate.version < VERSION:
        return head + numbers + subnets
    return head + numbers + certificate.since.to_bytes(4, "big") + subnets + pack_extensions(certificate.extensions)


def read_certificate(raw: bytes, *, is_delegated: bool, version: int) -> Certificate:
    """Read what `pack_certificate` gave. Raises RecordError."""
    read = _Reader(raw)
    certificate = read.certificate(is_delegated=is_delegated, version=version)
    read.end()
    return certificate


def pack_delegation(delegation: Delegation) -> bytes:
    """Return a delegation as bytes. Its version is not in them."""
    prefix = delegation.prefix.encode()
    numbers = delegation.serial.to_bytes(8, "big") + delegation.expires.to_bytes(4, "big")
    terms = _pack_list(delegation.subnets) + delegation.key + bytes([len(prefix)]) + prefix
    if delegation.version < VERSION:
        return numbers + terms + delegation.signature
    numbers += delegation.hosts.to_bytes(2, "big")
    return numbers + terms + pack_extensions(delegation.extensions) + delegation.signature


def read_delegation(raw: bytes, *, version: int) -> Delegation:
    """Read what `pack_delegation` gave. Raises RecordError."""
    read = _Reader(raw)
    delegation = read.delegation(version)
    read.end()
    return delegation


def pack_extensions(block: bytes) -> bytes:
    """Return a block of extensions with its length before it, as `split_extensions` reads it."""
    return bytes([len(block)]) + block


def split_extensions(raw: bytes) -> tuple[bytes, bytes]:
    """Return a block of extensions with its length before it, and what follows. Raises RecordError."""
    read = _Reader(raw)
    return read.extensions(), read.rest


def _pack_list(subnets: tuple[IPv4Network, ...]) -> bytes:
    return bytes([len(subnets)]) + pack_subnets(subnets)


class _Reader:
    """Takes bytes one field after the other, and never more than there are."""

    def __init__(self, raw: bytes) -> None:
        self.rest = raw

    def take(self, length: int) -> bytes:
        field, self.rest = self.rest[:length], self.rest[length:]
        if len(field) < length:
            raise RecordError("the record ends early")
        return field

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def end(self) -> None:
        if self.rest:
            raise RecordError("the record is longer than it should be")

    def certificate(self, *, is_delegated: bool, version: int) -> Certificate:
        identity, signature = self.take(32), self.take(SIGNATURE)
        if is_delegated:
            return delegated(identity, self.delegation(version), signature)
        serial, expires = self.number(8), self.number(4)
        if version < VERSION:
            subnets = self._subnets()
            return Certificate(serial, expires, identity, subnets, None, signature, since(serial), version=version)
        begun, subnets, more = self.number(4), self._subnets(), self.extensions()
        return Certificate(serial, expires, identity, subnets, None, signature, begun, more)

    def delegation(self, version: int) -> Delegation:
        serial, expires = self.number(8), self.number(4)
        hosts = self.number(2) if version >= VERSION else 0
        subnets, key, length = self._subnets(), self.take(32), self.number(1)
        if length > (MAX_PREFIX if version >= VERSION else FORMER_PREFIX):
            raise RecordError("the delegation's prefix is too long")
        try:
            prefix = self.take(length).decode("ascii")
        except UnicodeDecodeError:
            raise RecordError("the delegation's prefix is not a name's") from None
        more = self.extensions() if version >= VERSION else b""
        return Delegation(serial, expires, key, prefix, subnets, self.take(SIGNATURE), hosts, more, version)

    def extensions(self) -> bytes:
        """Take a block of extensions, whose length is before it."""
        block = self.take(self.number(1))
        try:
            extensions.read(block)
        except extensions.ExtensionError as error:
            raise RecordError(str(error)) from None
        return block

    def _subnets(self) -> tuple[IPv4Network, ...]:
        count = self.number(1)
        if count > MAX_SUBNETS:
            raise RecordError("the certificate lists too many subnets")
        try:
            return tuple(IPv4Network((self.take(4), self.number(1))) for _ in range(count))
        except ValueError:
            raise RecordError("the certificate lists a subnet that is none") from None


def _spell_85(raw: bytes) -> str:
    return base64.b85encode(raw).decode()


def _spell_64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _base85(text: str) -> bytes:
    try:
        raw = base64.b85decode(text)
    except ValueError:
        raise RecordError("the record is not base 85") from None
    # One record has one spelling: what fills up the last characters is zero. Five characters are four bytes.
    begun = len(text) // 5
    if _spell_85(raw[4 * begun :]) != text[5 * begun :]:
        raise RecordError("the record is not base 85")
    return raw


def _base64url(text: str) -> bytes:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise RecordError("the record is not base64url") from None
    # One record has one spelling: the last character's unused bits are zero.
    if _spell_64(raw) != text:
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
