"""Who may sign for a name: delegations, certificates and signed records, with Ed25519 (docs/record.md). Pure.

    authority ─▶ certificate of a name's identity ─▶ record
    authority ─▶ delegation ─▶ certificate of a name's identity ─▶ record

What is signed begins with a text of its own, so that a signature of one kind never passes for another, and names the
mesh. Numbers are big-endian.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv4Network

from meshd.errors import InputError
from meshd.mesh.addressing import is_allowed
from meshd.mesh.model import (
    FORMER,
    VERSION,
    Certificate,
    Delegation,
    Host,
    Record,
    Revocation,
    Tombstone,
    identity_serial,
)

SEED = 32
SIGNATURE = 64
# How many signatures are remembered as good or bad: checking one takes 90 µs.
CACHE = 16384


class CredentialError(InputError):
    """A certificate or a signature that does not hold; the message is the reason that `meshd members` shows."""


def new_seed() -> bytes:
    """Make the secret half of an Ed25519 key pair: 32 bytes."""
    return secrets.token_bytes(SEED)


def new_serial(now: float) -> int:
    """Return a new serial, below 2⁶³: the time in milliseconds and 20 random bits, so that an earlier one is lower."""
    return (int(now * 1000) << 20) | secrets.randbits(20)


def since(serial: int) -> int:
    """Return the Unix seconds in a serial, at most those that four bytes hold: when its certificate was first given."""
    return min((serial >> 20) // 1000, 2**32 - 1)


def public(seed: bytes) -> bytes:
    """Return the public half of a key pair."""
    from nacl.signing import SigningKey  # noqa: PLC0415  libsodium takes 30 ms to load

    return bytes(SigningKey(seed).verify_key)


def _sign(seed: bytes, body: bytes) -> bytes:
    from nacl.signing import SigningKey  # noqa: PLC0415  as above

    return bytes(SigningKey(seed).sign(body).signature)


@lru_cache(CACHE)
def _holds(key: bytes, body: bytes, signature: bytes) -> bool:
    from nacl.exceptions import CryptoError  # noqa: PLC0415  as above
    from nacl.signing import VerifyKey  # noqa: PLC0415

    try:
        VerifyKey(key).verify(body, signature)
    except (CryptoError, ValueError):
        return False
    return True


# --- what is signed ------------------------------------------------------------------------------------------------


def _body(kind: str, mesh: str, *fields: bytes, version: int = FORMER) -> bytes:
    """Return the bytes under a signature: each field has its length before it, so that none can run into another."""
    parts = (f"meshd {kind} {version}".encode(), mesh.encode(), *fields)
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def pack_subnets(subnets: Iterable[IPv4Network]) -> bytes:
    """Return prefixes as four bytes of address and one of length each."""
    return b"".join(s.network_address.packed + bytes([s.prefixlen]) for s in subnets)


def _delegation_body(mesh: str, delegation: Delegation) -> bytes:
    numbers = delegation.serial.to_bytes(8, "big") + delegation.expires.to_bytes(4, "big")
    fields = [delegation.key, delegation.prefix.encode(), pack_subnets(delegation.subnets)]
    if delegation.version >= VERSION:
        numbers += delegation.hosts.to_bytes(2, "big")
        fields.append(delegation.extensions)
    return _body("delegation", mesh, numbers, *fields, version=delegation.version)


def _certificate_body(mesh: str, name: str, certificate: Certificate) -> bytes:
    numbers = certificate.serial.to_bytes(8, "big") + certificate.expires.to_bytes(4, "big")
    fields = [certificate.identity, pack_subnets(certificate.subnets)]
    if certificate.version >= VERSION:
        numbers += certificate.since.to_bytes(4, "big")
        fields.append(certificate.extensions)
    return _body("certificate", mesh, name.encode(), numbers, *fields, version=certificate.version)


def _record_body(mesh: str, name: str, record: Record) -> bytes:
    numbers = record.seq.to_bytes(6, "big") + bytes([record.leaving])
    texts = (name, record.public_key, str(record.subnet), str(record.endpoint))
    fields = [*(text.encode() for text in texts), numbers, record.certificate.identity]
    if record.version >= VERSION:
        # An identity may have several certificates, and nobody puts an earlier one under a later record.
        fields += [record.certificate.signature, record.extensions]
    return _body("record", mesh, *fields, version=record.version)


def _forget_body(mesh: str, name: str, tombstone: Tombstone) -> bytes:
    fields = [name.encode(), tombstone.seq.to_bytes(6, "big"), tombstone.public_key.encode()]
    if not tombstone.identity:
        return _body("forget", mesh, *fields)
    return _body("forget", mesh, *fields, tombstone.identity, tombstone.extensions, version=VERSION)


def _answer_body(mesh: str, name: str, query: str, question: bytes, refusal: str) -> bytes:
    # Serf appends a newline to what it pipes into a handler, unless there is one.
    digest = blake2b(question.removesuffix(b"\n"), digest_size=32).digest()
    return _body("answer", mesh, name.encode(), query.encode(), digest, refusal.encode())


def _revocation_body(mesh: str, revocation: Revocation) -> bytes:
    fields = [revocation.serial.to_bytes(8, "big"), revocation.name.encode()]
    if revocation.version >= VERSION:
        fields.append(revocation.extensions)
    return _body("revocation", mesh, *fields, version=revocation.version)


# --- signing -------------------------------------------------------------------------------------------------------


def delegate(authority: bytes, mesh: str, delegation: Delegation) -> Delegation:
    """Sign a delegation with the authority's seed."""
    return replace(delegation, signature=_sign(authority, _delegation_body(mesh, delegation)))


def certify(authority: bytes, mesh: str, name: str, certificate: Certificate) -> Certificate:
    """Sign a certificate with the authority's seed."""
    return replace(certificate, signature=_sign(authority, _certificate_body(mesh, name, certificate)))


def certify_by(seed: bytes, mesh: str, name: str, identity: bytes, delegation: Delegation) -> Certificate:
    """Sign a certificate with a delegation's seed; all but the identity is the delegation's."""
    certificate = delegated(identity, delegation)
    return replace(certificate, signature=_sign(seed, _certificate_body(mesh, name, certificate)))


def delegated(identity: bytes, delegation: Delegation, signature: bytes = b"") -> Certificate:
    """Return the certificate of an identity under a delegation."""
    serial, version = identity_serial(identity), delegation.version
    return Certificate(serial, delegation.expires, identity, delegation.subnets, delegation, signature, version=version)


def sign(identity: bytes, mesh: str, name: str, record: Record) -> Record:
    """Sign a record with the seed of its certificate's identity."""
    return replace(record, signature=_sign(identity, _record_body(mesh, name, record)))


def forget(authority: bytes, mesh: str, name: str, tombstone: Tombstone) -> Tombstone:
    """Sign, with the authority's seed, that a host is dead."""
    return replace(tombstone, forgotten=_sign(authority, _forget_body(mesh, name, tombstone)))


def answer(identity: bytes, mesh: str, name: str, query: str, question: bytes, *, refusal: str) -> bytes:
    """Sign, with a host's identity, its answer to a Serf query: why not, or the empty string for yes."""
    return _sign(identity, _answer_body(mesh, name, query, question, refusal))


def revoke(authority: bytes, mesh: str, serial: int, name: str) -> Revocation:
    """Sign a revocation with the authority's seed."""
    revocation = Revocation(serial, name, b"")
    return replace(revocation, signature=_sign(authority, _revocation_body(mesh, revocation)))


# --- checking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trust:
    """What a host believes: the word of one authority (its public key) about one mesh."""

    mesh: str
    authority: bytes

    def check(self, name: str, record: Record) -> None:
        """Require that the owner of the name has signed a record, whatever the time. Raises CredentialError."""
        self.check_certificate(name, record.certificate)
        if not _holds(record.certificate.identity, _record_body(self.mesh, name, record), record.signature):
            raise CredentialError("its record is not signed by its certificate's identity")
        if not is_allowed(record.subnet, record.certificate.subnets):
            raise CredentialError(f"its certificate does not allow the subnet {record.subnet}")

    def check_certificate(self, name: str, certificate: Certificate) -> None:
        """Require that the authority stands behind a certificate for this name. Raises CredentialError."""
        signer, delegation = self.authority, certificate.delegation
        if delegation is not None:
            self.check_delegation(delegation)
            if not name.startswith(delegation.prefix):
                raise CredentialError(f"its invitation is for names that begin with {delegation.prefix!r}")
            signer = delegation.key
        if not _holds(signer, _certificate_body(self.mesh, name, certificate), certificate.signature):
            raise CredentialError("its certificate is not from this mesh's authority, or for another name")

    def check_delegation(self, delegation: Delegation) -> None:
        """Require that a delegation is the authority's. Raises CredentialError."""
        if not _holds(self.authority, _delegation_body(self.mesh, delegation), delegation.signature):
            raise CredentialError("its certificate's delegation is not from this mesh's authority")

    def is_forget(self, name: str, tombstone: Tombstone) -> bool:
        """Return whether the authority signed that this host is dead."""
        return _holds(self.authority, _forget_body(self.mesh, name, tombstone), tombstone.forgotten)

    def is_answer(self, host: Host, query: str, question: bytes, refusal: str, signature: bytes) -> bool:
        """Return whether a host's identity has signed this answer to this question."""
        body = _answer_body(self.mesh, host.name, query, question, refusal)
        return _holds(host.record.certificate.identity, body, signature)

    def is_revocation(self, revocation: Revocation) -> bool:
        """Return whether the authority signed this revocation."""
        return _holds(self.authority, _revocation_body(self.mesh, revocation), revocation.signature)


def check_time(certificate: Certificate, now: float) -> None:
    """Require that a certificate, and the delegation behind it, has not expired. Raises CredentialError."""
    if certificate.expires and now >= certificate.expires:
        raise CredentialError(f"its certificate expired on {date(certificate.expires)}")


def date(seconds: int) -> str:
    """Return a time for people: UTC, to the minute."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
