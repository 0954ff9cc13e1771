"""What has ended, on its way between hosts: what proves it, and its bytes. Pure.

A tombstone is proved by the host's own last record, a forgotten host and a revocation by the authority's signature, the
end of a name's earlier owner by the certificate of the later one. Nobody ends another identity's membership. A
tombstone without a proof (Serf's own leave, where no daemon runs) counts on the host that saw it and is told to nobody.
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256

import msgpack

from meshd.mesh.certificates import CredentialError
from meshd.mesh.model import Certificate, Graves, Record, Revocation, Tombstone, is_name
from meshd.mesh.records import (
    MAX_SEQ,
    RecordError,
    from_wire,
    is_public_key,
    pack_certificate,
    read_certificate,
    to_wire,
)
from meshd.mesh.terms import Mesh

_LEFT, _FORGOTTEN = b"g", b"f"


def of_leaving(record: Record) -> Tombstone:
    """Return the tombstone that a host's last record is."""
    return Tombstone(record.seq, record.public_key, record, identity=record.certificate.identity)


def unproved(record: Record) -> Tombstone:
    """Return the tombstone of a host whose Serf agent left, for this host alone."""
    return Tombstone(record.seq, record.public_key, identity=record.certificate.identity)


def forgotten(record: Record, signature: bytes) -> Tombstone:
    """Return the tombstone of a dead host, from the authority's signature. It is of all identities of the name."""
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
    return of_leaving(record) == tombstone


def proof(tombstone: Tombstone) -> bytes:
    """Return the bytes that `read_proof` reads; none for a tombstone without a proof."""
    if tombstone.record is not None:
        return _LEFT + to_wire(tombstone.record)
    return _FORGOTTEN + tombstone.forgotten if tombstone.forgotten else b""


def read_proof(seq: int, public_key: str, raw: bytes, mesh: Mesh) -> Tombstone:
    """Return the tombstone that these bytes prove; they are not checked. Raises RecordError for what is none."""
    kind, body = raw[:1], raw[1:]
    if kind == _LEFT:
        record = from_wire(body, mesh.overlay, mesh.subnet_length)
        return Tombstone(seq, public_key, record, identity=record.certificate.identity)
    if kind == _FORGOTTEN and body:
        return Tombstone(seq, public_key, forgotten=body)
    raise RecordError("the tombstone has no proof that this version of meshd knows")


def joined(graves: Graves, more: Graves) -> dict[str, dict[bytes, Tombstone]]:
    """Return the tombstones of both; of two of one identity the later one."""
    both = {name: dict(ones) for name, ones in graves.items()}
    for name, identity, tombstone in each(newer(more, graves)):
        both.setdefault(name, {})[identity] = tombstone
    return both


def newer(graves: Graves, than: Graves) -> dict[str, dict[bytes, Tombstone]]:
    """Return the tombstones that say more than those known already."""

    def is_news(name: str, identity: bytes, tombstone: Tombstone) -> bool:
        known = than.get(name, {}).get(identity)
        return known is None or tombstone.seq > known.seq

    return where(graves, is_news)


def where(graves: Graves, keep: Callable[[str, bytes, Tombstone], bool]) -> dict[str, dict[bytes, Tombstone]]:
    """Return those tombstones of which `keep(name, identity, tombstone)` holds; no name without one is left."""
    kept = {n: {i: t for i, t in ones.items() if keep(n, i, t)} for n, ones in graves.items()}
    return {name: ones for name, ones in kept.items() if ones}


def each(graves: Graves) -> Iterator[tuple[str, bytes, Tombstone]]:
    """Yield every tombstone with its name and identity, in order."""
    for name, ones in sorted(graves.items()):
        for identity, tombstone in sorted(ones.items()):
            yield name, identity, tombstone


def grave(name: str, tombstone: Tombstone) -> dict[str, dict[bytes, Tombstone]]:
    """Return one tombstone in its place among all."""
    return {name: {tombstone.identity: tombstone}}


def latest(certificates: Iterable[Certificate]) -> Certificate | None:
    """Return the last certificate that the authority itself gave out, of those for one name; None if there is none."""
    return max((c for c in certificates if c.delegation is None), key=lambda c: c.serial, default=None)


@dataclass(frozen=True, slots=True)
class Tombstones:
    """What has ended: memberships (tombstones), certificates by serial (revocations), and earlier owners of a name.

    `owners` are the certificates, by name, after which the authority's earlier ones for that name no longer count.
    """

    gone: Graves = field(default_factory=dict)
    revoked: Mapping[int, Revocation] = field(default_factory=dict)
    owners: Mapping[str, Certificate] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.gone or self.revoked or self.owners)

    @property
    def names(self) -> set[str]:
        """The names of the hosts that it is about."""
        return {*self.gone, *self.owners, *(r.name for r in self.revoked.values())}

    def without(self, other: "Tombstones") -> "Tombstones":
        """Return those that say more than what the other has."""
        return Tombstones(
            newer(self.gone, other.gone),
            {serial: r for serial, r in self.revoked.items() if serial not in other.revoked},
            {n: c for n, c in self.owners.items() if n not in other.owners or c.serial > other.owners[n].serial},
        )

    def merged(self, other: "Tombstones") -> "Tombstones":
        """Return both; of two of the same the later one."""
        more = other.without(self)
        return Tombstones(
            joined(self.gone, more.gone), {**self.revoked, **more.revoked}, {**self.owners, **more.owners}
        )

    def proved(self, mesh: Mesh) -> "Tombstones":
        """Return those that are signed by their own host or by the authority."""
        return Tombstones(
            where(self.gone, lambda name, _, tombstone: is_proved(mesh, name, tombstone)),
            {serial: r for serial, r in self.revoked.items() if mesh.trust.is_revocation(r)},
            {name: c for name, c in self.owners.items() if is_owner(mesh, name, c)},
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits by which two hosts see that they know the same ones."""
        lines = [f"{name} {t.seq} {t.public_key}\n" for name, _, t in each(self.gone)]
        lines += [f"{serial}\n" for serial in sorted(self.revoked)]
        lines += [f"{name} {c.serial}\n" for name, c in sorted(self.owners.items())]
        return sha256("".join(lines).encode()).hexdigest()[:16]

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

    def _entries(self) -> Iterator[tuple[str, tuple[object, ...]]]:
        for name, identity, tombstone in each(self.gone):
            if tombstone.has_proof:
                key = base64.b64decode(tombstone.public_key)
                yield f"g{name}:{identity.hex()}", (name, tombstone.seq, key, proof(tombstone))
        for name, certificate in self.owners.items():
            yield f"o{name}", (name, pack_certificate(certificate))
        for serial, revocation in self.revoked.items():
            yield f"r{serial:016x}", (revocation.name, serial, b"", revocation.signature)

    @classmethod
    def read(cls, payload: bytes, mesh: Mesh) -> "Tombstones":
        """Read a message of tombstones. Malformed entries are left out; signatures are not checked."""
        found = cls()
        for entry in unpack_list(payload):
            with suppress(RecordError):
                found = found.merged(cls._read(entry, mesh))
        return found

    @classmethod
    def _read(cls, entry: object, mesh: Mesh) -> "Tombstones":
        match entry:
            case [str(name), bytes(raw)] if is_name(name):
                return cls(owners={name: read_certificate(raw, is_delegated=False)})
            case [str(name), int(number), b"", bytes(signature)] if is_name(name) and is_within(number, 2**63):
                return cls(revoked={number: Revocation(number, name, signature)})
            case [str(name), int(number), bytes(raw), bytes(proof)] if is_name(name) and is_within(number, MAX_SEQ):
                key = base64.b64encode(raw).decode()
                if is_public_key(key):
                    return cls(grave(name, read_proof(number, key, proof, mesh)))
        raise RecordError("no tombstone that this version of meshd knows")


def is_owner(mesh: Mesh, name: str, certificate: Certificate) -> bool:
    """Return whether the authority itself has given a name to a certificate's identity."""
    try:
        mesh.trust.check_certificate(name, certificate)
    except CredentialError:
        return False
    return certificate.delegation is None


def is_within(number: int, limit: int) -> bool:
    """Return whether a number that someone sent is positive and below a limit."""
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
