"""What has ended, on its way between hosts: what proves it, and its bytes. Pure.

A tombstone is proved by the host's own last record, a forgotten host and a revocation by the authority's signature, the
end of a name's earlier owner by the certificate of the later one. Nobody ends another identity's membership. A
tombstone without a proof (Serf's own leave, where no daemon runs) counts on the host that saw it and is told to nobody.

What version 2 can read is written as version 2 wrote it, and comes first: its hosts read no page after one of which
they can read nothing.
"""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256

from meshd.mesh import shares, versioned
from meshd.mesh.certificates import CredentialError
from meshd.mesh.model import FORMER, VERSION, Certificate, Graves, Record, Revocation, Tombstone, is_name
from meshd.mesh.records import (
    MAX_SEQ,
    RecordError,
    from_wire,
    is_public_key,
    pack_certificate,
    pack_extensions,
    read_certificate,
    split_extensions,
    to_wire,
)
from meshd.mesh.terms import Mesh

# What the first byte of a proof says: the host's own last record; the authority's word of version 2, and of version 3;
# the owner of a name; a revocation of version 3.
_LEFT, _FORMER_FORGET, _FORGOTTEN, _OWNER, _REVOKED = b"g", b"f", b"F", b"o", b"R"


def of_leaving(record: Record) -> Tombstone:
    """Return the tombstone that a host's last record is."""
    return Tombstone(record.seq, record.public_key, record, identity=record.certificate.identity)


def unproved(record: Record) -> Tombstone:
    """Return the tombstone of a host whose Serf agent left, for this host alone."""
    certificate = record.certificate
    return Tombstone(record.seq, record.public_key, identity=certificate.identity, certificate=certificate)


def dead(record: Record) -> Tombstone:
    """Return the tombstone of a dead host, which the authority is to sign."""
    return Tombstone(record.seq, record.public_key, identity=record.certificate.identity)


def is_proved(mesh: Mesh, name: str, tombstone: Tombstone) -> bool:
    """Return whether a tombstone that another host passed on is the word of its own host, or of the authority."""
    if tombstone.forgotten:
        return mesh.trust.is_forget(name, tombstone)
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
    if not tombstone.forgotten:
        return b""
    if not tombstone.identity:
        return _FORMER_FORGET + tombstone.forgotten
    whose = tombstone.seq.to_bytes(6, "big") + base64.b64decode(tombstone.public_key) + tombstone.identity
    return _FORGOTTEN + whose + pack_extensions(tombstone.extensions) + tombstone.forgotten


def read_proof(seq: int, public_key: str, raw: bytes, mesh: Mesh) -> Tombstone:
    """Return the tombstone that these bytes prove; they are not checked. Raises RecordError for what is none.

    Of version 3 the proof alone tells all.
    """
    kind, body = raw[:1], raw[1:]
    if kind == _FORMER_FORGET and body:
        return Tombstone(seq, public_key, forgotten=body)
    tombstone = _read_proof(raw, mesh)
    return Tombstone(seq, public_key, tombstone.record, tombstone.forgotten, tombstone.identity, tombstone.extensions)


def _read_proof(raw: bytes, mesh: Mesh) -> Tombstone:
    kind, body = raw[:1], raw[1:]
    if kind == _LEFT:
        return of_leaving(from_wire(body, mesh.overlay, mesh.subnet_length))
    if kind != _FORGOTTEN:
        raise RecordError("the tombstone has no proof that this version of meshd knows")
    seq, key, identity = int.from_bytes(body[:6], "big"), base64.b64encode(body[6:38]).decode(), body[38:70]
    block, signature = split_extensions(body[70:])
    if not is_public_key(key) or not is_within(seq, MAX_SEQ) or not signature:
        raise RecordError("the authority's word of a dead host is malformed")
    return Tombstone(seq, key, forgotten=signature, identity=identity, extensions=block)


def joined(graves: Graves, more: Graves) -> dict[str, dict[bytes, Tombstone]]:
    """Return the tombstones of both; of two of one identity the one that says more."""
    both = {name: dict(ones) for name, ones in graves.items()}
    for name, identity, tombstone in each(newer(more, graves)):
        both.setdefault(name, {})[identity] = tombstone
    return both


def newer(graves: Graves, than: Graves) -> dict[str, dict[bytes, Tombstone]]:
    """Return the tombstones that say more than those known already."""

    def is_news(name: str, identity: bytes, tombstone: Tombstone) -> bool:
        known = than.get(name, {}).get(identity)
        return known is None or tombstone.rank > known.rank

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
        """16 hexadecimal digits by which two hosts see that they know the same ones.

        By an invitation whose share is used up each host knows others, and would ask for them again and again.
        """
        full, graves = shares.full(self.gone), each(self.gone)
        lines = [
            f"{name} {identity.hex()} {t.seq} {t.public_key}\n"
            for name, identity, t in graves
            if t.delegation is None or t.delegation.serial not in full
        ]
        lines += [f"{serial} is full\n" for serial in sorted(full)]
        lines += [f"{serial}\n" for serial in sorted(self.revoked)]
        lines += [f"{name} {c.serial}\n" for name, c in sorted(self.owners.items())]
        return sha256("".join(lines).encode()).hexdigest()[:16]

    def pages(self, limit: int, after: str = "") -> Iterator[bytes]:
        """Yield those that can be proved, in order and after `after`, in messages of at most `limit` bytes."""
        page: list[object] = []
        for place, entry in sorted(self._entries()):
            if place <= after:
                continue
            if page and len(versioned.pack(*page, entry)) > limit:
                yield versioned.pack(*page)
                page = []
            page.append(entry)
        if page:
            yield versioned.pack(*page)

    @property
    def last(self) -> str:
        """The place of the last one in the order of `pages`."""
        return max((place for place, _ in self._entries()), default="")

    def _entries(self) -> Iterator[tuple[str, tuple[object, ...]]]:
        """Yield the place of each in the order, and its entry in a message: of version 3 behind all of version 2."""
        for name, identity, tombstone in each(self.gone):
            place, key, said = f"g{name}:{identity.hex()}", base64.b64decode(tombstone.public_key), proof(tombstone)
            if _is_former(tombstone):
                yield place, (name, tombstone.seq, key, said)
            elif said:
                yield f"v{place}", (VERSION, name, said)
        for name, certificate in self.owners.items():
            packed = pack_certificate(certificate)
            if certificate.version < VERSION:
                yield f"o{name}", (name, packed)
            else:
                yield f"vo{name}", (VERSION, name, _OWNER + packed)
        for serial, revocation in self.revoked.items():
            if revocation.version < VERSION:
                yield f"r{serial:016x}", (revocation.name, serial, b"", revocation.signature)
            else:
                yield f"vr{serial:016x}", (VERSION, revocation.name, _REVOKED + pack_revocation(revocation))

    @classmethod
    def read(cls, payload: bytes, mesh: Mesh) -> "Tombstones":
        """Read a message of tombstones. Malformed entries are left out; signatures are not checked."""
        found = cls()
        for entry in versioned.unpack(payload):
            with suppress(RecordError):
                if isinstance(entry, list) and versioned.is_versioned(entry):
                    found = found.merged(cls._read(versioned.stripped(entry), mesh))
                else:
                    found = found.merged(cls._read_former(entry, mesh))
        return found

    @classmethod
    def _read(cls, entry: list[object], mesh: Mesh) -> "Tombstones":
        match entry:
            case [str(name), bytes(raw)] if is_name(name):
                if raw[:1] == _OWNER:
                    return cls(owners={name: read_certificate(raw[1:], is_delegated=False, version=VERSION)})
                if raw[:1] == _REVOKED:
                    revocation = read_revocation(raw[1:], name)
                    return cls(revoked={revocation.serial: revocation})
                return cls(grave(name, _read_proof(raw, mesh)))
        raise RecordError("no tombstone that this version of meshd knows")

    @classmethod
    def _read_former(cls, entry: object, mesh: Mesh) -> "Tombstones":
        match entry:
            case [str(name), bytes(raw)] if is_name(name):
                return cls(owners={name: read_certificate(raw, is_delegated=False, version=FORMER)})
            case [str(name), int(number), b"", bytes(signature)] if is_name(name) and is_within(number, 2**63):
                return cls(revoked={number: Revocation(number, name, signature)})
            case [str(name), int(number), bytes(raw), bytes(proof)] if is_name(name) and is_within(number, MAX_SEQ):
                key = base64.b64encode(raw).decode()
                if is_public_key(key):
                    return cls(grave(name, read_proof(number, key, proof, mesh)))
        raise RecordError("no tombstone that this version of meshd knows")


def _is_former(tombstone: Tombstone) -> bool:
    """Return whether hosts of version 2 can read a tombstone's proof."""
    if tombstone.record is not None:
        return tombstone.record.version < VERSION
    return bool(tombstone.forgotten) and not tombstone.identity


def pack_revocation(revocation: Revocation) -> bytes:
    """Return a revocation of version 3 as bytes, without its name."""
    return revocation.serial.to_bytes(8, "big") + pack_extensions(revocation.extensions) + revocation.signature


def read_revocation(raw: bytes, name: str) -> Revocation:
    """Read what `pack_revocation` gave. Raises RecordError."""
    serial, (block, signature) = int.from_bytes(raw[:8], "big"), split_extensions(raw[8:])
    if not is_within(serial, 2**63):
        raise RecordError("the revocation has no serial")
    return Revocation(serial, name, signature, block, VERSION)


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
