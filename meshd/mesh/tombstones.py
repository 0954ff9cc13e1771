"""Tombstones and revocations on their way between hosts: what proves them, and their bytes. Pure.

A tombstone is proved by the host's own last record, a forgotten host and a revocation by the authority's signature. A
tombstone without a proof (Serf's own leave, where no daemon runs) counts on the host that saw it and is told to nobody.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import msgpack

from meshd.mesh.certificates import CredentialError
from meshd.mesh.model import Record, Revocation, Tombstone, is_name
from meshd.mesh.records import MAX_SEQ, RecordError, from_wire, is_public_key, to_wire
from meshd.mesh.terms import Mesh

_LEFT, _FORGOTTEN = b"g", b"f"


def of_leaving(record: Record) -> Tombstone:
    """Return the tombstone that a host's last record is."""
    return Tombstone(record.seq, record.public_key, record)


def unproved(record: Record) -> Tombstone:
    """Return the tombstone of a host whose Serf agent left, for this host alone."""
    return Tombstone(record.seq, record.public_key)


def forgotten(record: Record, signature: bytes) -> Tombstone:
    """Return the tombstone of a dead host, from the authority's signature."""
    return Tombstone(record.seq, record.public_key, forgotten=signature)


def is_proved(mesh: Mesh, name: str, tombstone: Tombstone) -> bool:
    """Return whether a tombstone that another host passed on is the word of its own host, or of the authority."""
    if tombstone.forgotten:
        return mesh.trust.is_forget(name, tombstone.seq, tombstone.public_key, tombstone.forgotten)
    record = tombstone.record
    if record is None or not record.leaving:
        return False
    try:
        mesh.trust.check(name, record)
    except CredentialError:
        return False
    return (record.seq, record.public_key) == (tombstone.seq, tombstone.public_key)


def proof(tombstone: Tombstone) -> bytes:
    """Return the bytes that `read_proof` reads; none for a tombstone without a proof."""
    if tombstone.record is not None:
        return _LEFT + to_wire(tombstone.record)
    return _FORGOTTEN + tombstone.forgotten if tombstone.forgotten else b""


def read_proof(seq: int, public_key: str, raw: bytes, mesh: Mesh) -> Tombstone:
    """Return the tombstone that these bytes prove; they are not checked. Raises RecordError for what is none."""
    kind, body = raw[:1], raw[1:]
    if kind == _LEFT:
        return Tombstone(seq, public_key, from_wire(body, mesh.overlay, mesh.subnet_length))
    if kind == _FORGOTTEN and body:
        return Tombstone(seq, public_key, forgotten=body)
    raise RecordError("the tombstone has no proof that this version of meshd knows")


@dataclass(frozen=True, slots=True)
class Tombstones:
    """Tombstones by host name, and revocations by serial."""

    gone: Mapping[str, Tombstone] = field(default_factory=dict)
    revoked: Mapping[int, Revocation] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.gone or self.revoked)

    def without(self, other: "Tombstones") -> "Tombstones":
        """Return those that say more than what the other has."""
        gone = {n: t for n, t in self.gone.items() if n not in other.gone or t.seq > other.gone[n].seq}
        return Tombstones(gone, {serial: r for serial, r in self.revoked.items() if serial not in other.revoked})

    def merged(self, other: "Tombstones") -> "Tombstones":
        """Return both; of two tombstones of one name the later one."""
        return Tombstones({**self.gone, **other.without(self).gone}, {**other.revoked, **self.revoked})

    def proved(self, mesh: Mesh) -> "Tombstones":
        """Return those that are signed by their own host or by the authority."""
        gone = {n: t for n, t in self.gone.items() if is_proved(mesh, n, t)}
        return Tombstones(gone, {serial: r for serial, r in self.revoked.items() if mesh.trust.is_revocation(r)})

    @property
    def digest(self) -> str:
        """16 hexadecimal digits by which two hosts see that they know the same ones."""
        text = "".join(f"{name} {t.seq} {t.public_key}\n" for name, t in sorted(self.gone.items()))
        return sha256((text + "".join(f"{serial}\n" for serial in sorted(self.revoked))).encode()).hexdigest()[:16]

    def pages(self, limit: int, after: str = "") -> Iterator[bytes]:
        """Yield those that can be proved, in order and after `after`, in messages of at most `limit` bytes."""
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
        for name, tombstone in self.gone.items():
            if tombstone.has_proof:
                key = base64.b64decode(tombstone.public_key)
                yield f"g{name}", (name, tombstone.seq, key, proof(tombstone))
        for serial, revocation in self.revoked.items():
            yield f"r{serial:016x}", (revocation.name, serial, b"", revocation.signature)

    @classmethod
    def read(cls, payload: bytes, mesh: Mesh) -> "Tombstones":
        """Read a message of tombstones. Malformed entries are left out; signatures are not checked."""
        gone, revoked = {}, {}
        for entry in unpack_list(payload):
            match entry:
                case [str(name), int(number), b"", bytes(signature)] if is_name(name) and _is_within(number, 2**63):
                    revoked[number] = Revocation(number, name, signature)
                case [str(name), int(number), bytes(raw), bytes(proof)] if is_name(name) and _is_within(
                    number, MAX_SEQ
                ):
                    key = base64.b64encode(raw).decode()
                    try:
                        tombstone = read_proof(number, key, proof, mesh)
                    except RecordError:
                        continue
                    if is_public_key(key):
                        gone[name] = tombstone
        return cls(gone, revoked)


def _is_within(number: int, limit: int) -> bool:
    return type(number) is int and 0 < number < limit  # msgpack's true is an int, too


def unpack_list(payload: bytes) -> list[object]:
    """Return the msgpack list that anyone may have sent, an empty one if it is none.

    Serf appends a newline to what it pipes into a handler, unless it ends with one already.
    """
    try:
        value = msgpack.unpackb(payload, strict_map_key=False)
    except msgpack.ExtraData as error:
        value = error.unpacked if error.extra == b"\n" else None
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        return []  # TypeError: a map whose key is a map
    return value if isinstance(value, list) else []
