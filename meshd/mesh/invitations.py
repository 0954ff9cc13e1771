"""Invitations: what a new host needs besides the address of a member, and what it makes of it."""

import base64
import binascii
from dataclasses import dataclass, field
from hashlib import blake2b
from ipaddress import IPv4Network

import msgpack

from meshd.endpoint import Endpoint, unusable
from meshd.errors import InputError
from meshd.mesh import certificates
from meshd.mesh.certificates import CredentialError, Trust
from meshd.mesh.model import FORMER, VERSION, Certificate, Delegation, is_name
from meshd.mesh.records import RecordError, pack_certificate, pack_delegation, read_certificate, read_delegation

# What an invitation of each version begins with.
PREFIXES = {FORMER: "meshd2.", VERSION: "meshd3."}
PREFIX = PREFIXES[VERSION]
_CHECKSUM = 8


@dataclass(frozen=True, slots=True)
class Invitation:
    """Everything a new host needs besides one member's address. It is a secret: it holds keys.

    `seed` is the identity's of a named host, with its `certificate`; or, of a reusable one, what signs for the
    `delegation`.
    """

    mesh: str
    overlay: IPv4Network
    subnet_length: int
    gossip_key: bytes
    gossip_port: int
    authority: bytes
    seed: bytes
    name: str | None = None
    certificate: Certificate | None = None
    delegation: Delegation | None = None
    addresses: tuple[Endpoint, ...] = ()

    def __repr__(self) -> str:
        return f"Invitation(mesh={self.mesh!r}, overlay={self.overlay}, name={self.name!r})"

    @property
    def trust(self) -> Trust:
        return Trust(self.mesh, self.authority)

    def redeem(self, name: str | None, fallback: str, now: float, identity: bytes | None = None) -> "Admission":
        """Return what makes a host a member; `name` is what was asked for.

        A reusable invitation certifies the host's `identity` (its seed) if it has one: with another one it would be
        another host of its name to the others.

        Raises InputError for another host's name and for an invitation that its authority did not make.
        """
        if self.certificate is not None and self.name is not None:
            if name not in {None, self.name}:
                raise InputError(f"the invitation is for the host {self.name!r}, not for {name!r}")
            return self._checked(self.name, self.certificate, self.seed, now)
        delegation = self.delegation
        if delegation is None:
            raise InputError("the invitation holds no certificate")
        own, seed = name or fallback, identity or certificates.new_seed()
        if not is_name(own):
            raise InputError(f"the host name {own!r} is not 1 to 63 letters, digits, dots and dashes: pass --name")
        if not own.startswith(delegation.prefix):
            raise InputError(
                f"the invitation is for names that begin with {delegation.prefix!r}, not for {own!r}: pass --name"
            )
        certificate = certificates.certify_by(self.seed, self.mesh, own, certificates.public(seed), delegation)
        return self._checked(own, certificate, seed, now)

    def _checked(self, name: str, certificate: Certificate, seed: bytes, now: float) -> "Admission":
        if certificate.expires and now >= certificate.expires:
            raise InputError(f"the invitation expired on {certificates.date(certificate.expires)}: ask for another one")
        try:
            self.trust.check_certificate(name, certificate)
        except CredentialError as error:
            raise InputError(f"the invitation was not made by its mesh's authority: {error}") from None
        return Admission(name, certificate, seed)


@dataclass(frozen=True, slots=True)
class Admission:
    """What makes a host a member: its name, the certificate of both, and the seed of its identity."""

    name: str
    certificate: Certificate
    seed: bytes = field(repr=False)


def encode(invitation: Invitation) -> str:
    """Return the invitation as one word: `meshd3.` and base64url of msgpack with a checksum."""
    certificate, delegation = invitation.certificate, invitation.delegation
    version = min(signed.version for signed in (certificate, delegation) if signed is not None)
    body: bytes = msgpack.packb(
        {
            "m": invitation.mesh,
            "o": str(invitation.overlay),
            "l": invitation.subnet_length,
            "k": invitation.gossip_key,
            "p": invitation.gossip_port,
            "i": invitation.authority,
            "s": invitation.seed,
            "n": invitation.name,
            "c": None if certificate is None else pack_certificate(certificate),
            "d": None if delegation is None else pack_delegation(delegation),
            "a": [str(address) for address in invitation.addresses],
        }
    )
    return PREFIXES[version] + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")


def decode(text: str) -> Invitation:
    """Read an invitation that someone pasted. Raises InputError saying what is wrong, never what it holds."""
    text = "".join(text.split())
    if not text.startswith("meshd"):
        raise InputError(
            f"this is not an invitation: it does not start with {PREFIX!r}; copy the line that 'meshd invite' printed"
        )
    version = next((version for version, prefix in PREFIXES.items() if text.startswith(prefix)), None)
    if version is None:
        raise InputError(
            f"this invitation is of another version ({text.partition('.')[0][:16]!r}); "
            f"this version of meshd supports {' and '.join(map(str, PREFIXES))}"
        )
    coded = text.removeprefix(PREFIXES[version])
    try:
        raw = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    body, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
    if len(raw) <= _CHECKSUM or len(raw) > 4096 or checksum != _checksum(body):
        raise InputError("the invitation is damaged (its checksum is wrong): copy it again, whole")
    try:
        return _from_fields(msgpack.unpackb(body), version)
    except RecordError as error:
        raise InputError(f"what the invitation holds cannot be read: {error}") from None
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise InputError(f"the invitation is malformed ({type(error).__name__})") from None


def _from_fields(fields: dict[str, object], version: int) -> Invitation:
    length, port, name, addresses = fields["l"], fields["p"], fields["n"], fields["a"]
    if not (type(length) is int and type(port) is int and isinstance(fields["m"], str)):
        raise TypeError
    if not (isinstance(addresses, list) and (name is None or (isinstance(name, str) and is_name(name)))):
        raise TypeError
    overlay = IPv4Network(str(fields["o"]))
    certificate, delegation = _bytes(fields["c"]), _bytes(fields["d"])
    if (certificate is None) == (delegation is None) or (name is None) != (certificate is None):
        raise ValueError
    return Invitation(
        fields["m"],
        overlay,
        length,
        _key(fields["k"]),
        port,
        _key(fields["i"]),
        _key(fields["s"]),
        name,
        None if certificate is None else read_certificate(certificate, is_delegated=False, version=version),
        None if delegation is None else read_delegation(delegation, version=version),
        tuple(_usable(str(address), overlay) for address in addresses),
    )


def _usable(text: str, overlay: IPv4Network) -> Endpoint:
    endpoint = Endpoint.parse(text)
    if problem := unusable(endpoint.address, overlay):
        raise ValueError(problem)
    return endpoint


def _key(value: object) -> bytes:
    if not (isinstance(value, bytes) and len(value) == certificates.SEED):
        raise ValueError
    return value


def _bytes(value: object) -> bytes | None:
    if not (value is None or isinstance(value, bytes)):
        raise TypeError
    return value


def _checksum(body: bytes) -> bytes:
    """Detect a damaged copy, nothing more: who made the invitation is not proved by it."""
    return blake2b(body, digest_size=_CHECKSUM, person=b"meshd-invite").digest()
