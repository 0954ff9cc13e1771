"""What ends a host's part in a mesh, and how that is proved to others: pure functions.

A goodbye is proved by the host's own last record, a forget and a revocation by the authority's signature. A goodbye
without a proof (Serf's own leave, where no daemon runs) counts on the host that saw it and is told to nobody.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import IPv4Network

import msgpack

from meshd.mesh.certificates import CredentialError, Trust
from meshd.mesh.model import Certificate, Goodbye, Record, Revocation, is_name
from meshd.mesh.records import MAX_SEQ, RecordError, from_wire, is_public_key, to_wire, wire_certificate

_SAID, _FORGOTTEN = b"g", b"f"


def said(record: Record) -> Goodbye:
    """Give the goodbye that a host's last record says."""
    return Goodbye(record.seq, record.public_key, _SAID + to_wire(record))


def seen(record: Record) -> Goodbye:
    """Give the goodbye of a host whose Serf agent left, for this host alone."""
    return Goodbye(record.seq, record.public_key)


def forgotten(record: Record, signature: bytes) -> Goodbye:
    """Give the tombstone of a dead host, from the authority's signature."""
    return Goodbye(record.seq, record.public_key, _FORGOTTEN + signature)


def is_proved(trust: Trust, name: str, goodbye: Goodbye, overlay: IPv4Network, length: int) -> bool:
    """Tell whether a goodbye that somebody passed on is the host's own word, or the authority's."""
    kind, proof = goodbye.proof[:1], goodbye.proof[1:]
    if kind == _FORGOTTEN:
        return trust.is_forget(name, goodbye.seq, goodbye.public_key, proof)
    if kind != _SAID:
        return False
    try:
        record = from_wire(proof, overlay, length)
        trust.check(name, record)
    except (RecordError, CredentialError):
        return False
    return record.leaving and (record.seq, record.public_key) == (goodbye.seq, goodbye.public_key)


def certificate(goodbye: Goodbye) -> Certificate | None:
    """Give the certificate of who has said a goodbye; None for the authority's word, and without a proof."""
    if goodbye.proof[:1] != _SAID:
        return None
    try:
        return wire_certificate(goodbye.proof[1:])
    except RecordError:
        return None


def is_by_invitation(goodbye: Goodbye) -> bool:
    """Tell whether a goodbye was said by an identity that a reusable invitation has made."""
    by = certificate(goodbye)
    return by is not None and by.delegation is not None


def is_outranked(goodbye: Goodbye, by: Certificate) -> bool:
    """Tell whether a goodbye is of a reusable invitation's identity, and `by` the authority's word for another one.

    Whoever has, or had, such an invitation can say a goodbye for any name, with a number that cannot be outdone.
    """
    said_by = certificate(goodbye)
    if said_by is None or said_by.delegation is None:
        return False
    return by.delegation is None and said_by.identity != by.identity


@dataclass(frozen=True, slots=True)
class Graves:
    """Tombstones on their way: goodbyes by name, and revocations."""

    gone: Mapping[str, Goodbye] = field(default_factory=dict)
    revoked: Mapping[int, Revocation] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.gone or self.revoked)

    def without(self, other: "Graves") -> "Graves":
        """Give those that say more than what the other has."""
        gone = {n: g for n, g in self.gone.items() if n not in other.gone or g.seq > other.gone[n].seq}
        return Graves(gone, {serial: r for serial, r in self.revoked.items() if serial not in other.revoked})

    def merged(self, other: "Graves") -> "Graves":
        """Give both; of two goodbyes of one name the later one."""
        return Graves({**self.gone, **other.without(self).gone}, {**other.revoked, **self.revoked})

    def proved(self, trust: Trust, overlay: IPv4Network, length: int) -> "Graves":
        """Give those that are the word of who may say it."""
        gone = {n: g for n, g in self.gone.items() if is_proved(trust, n, g, overlay, length)}
        return Graves(gone, {serial: r for serial, r in self.revoked.items() if trust.is_revocation(r)})

    @property
    def digest(self) -> str:
        """16 hexadecimal digits by which two hosts see that they know of the same ones."""
        text = "".join(f"{name} {g.seq} {g.public_key}\n" for name, g in sorted(self.gone.items()))
        return sha256((text + "".join(f"{serial}\n" for serial in sorted(self.revoked))).encode()).hexdigest()[:16]

    def pages(self, limit: int, after: str = "") -> Iterator[bytes]:
        """Give those that can be proved, in order and after `after`, in messages of at most `limit` bytes."""
        page: list[object] = []
        for place, entry in sorted(self._entries()):
            if place <= after:
                continue
            if page and len(msgpack.packb([*page, entry])) > limit:
                yield msgpack.packb(page)
                page = []
            page.append(entry)
        if page:
            yield msgpack.packb(page)

    @property
    def last(self) -> str:
        """The place of the last one in the order of `pages`."""
        return max((place for place, _ in self._entries()), default="")

    def _entries(self) -> Iterator[tuple[str, tuple[str, int, bytes, bytes]]]:
        for name, goodbye in self.gone.items():
            if goodbye.proof:
                yield f"g{name}", (name, goodbye.seq, base64.b64decode(goodbye.public_key), goodbye.proof)
        for serial, revocation in self.revoked.items():
            yield f"r{serial:016x}", (revocation.name, serial, b"", revocation.signature)

    @classmethod
    def read(cls, payload: bytes) -> "Graves":
        """Read a message of tombstones; what is none in it is left out, and whether they are true is not looked at."""
        gone, revoked = {}, {}
        for entry in unpack_list(payload):
            if not isinstance(entry, list) or len(entry) != 4:
                continue
            name, number, raw, proof = entry
            if not (isinstance(name, str) and is_name(name) and isinstance(raw, bytes) and isinstance(proof, bytes)):
                continue
            if type(number) is not int or not 0 < number < 2**63:
                continue
            key = base64.b64encode(raw).decode()
            if not raw:
                revoked[number] = Revocation(number, name, proof)
            elif number < MAX_SEQ and is_public_key(key):
                gone[name] = Goodbye(number, key, proof)
        return cls(gone, revoked)


def unpack_list(payload: bytes) -> list[object]:
    """Read a msgpack list that anybody may have sent; an empty one if it is none.

    Serf ends what it pipes into a handler with a newline, unless it ends with one by itself.
    """
    try:
        value = msgpack.unpackb(payload, strict_map_key=False)
    except msgpack.ExtraData as error:
        value = error.unpacked if error.extra == b"\n" else None
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        return []  # TypeError: a map whose key is a map
    return value if isinstance(value, list) else []
