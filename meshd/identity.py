"""Keys and invitations."""

import base64
import binascii
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Network
from pathlib import Path

import msgpack

from meshd import files
from meshd.errors import InputError
from meshd.model import Endpoint

KEY_LENGTH = 32
PREFIX = "meshd1."
_CHECKSUM = 8


def key(path: Path) -> bytes:
    """Give the 32-byte key in a file, made at random if there is none. Raises InputError if it is damaged."""
    content = files.read(path)
    if content is None:
        from nacl.utils import random  # noqa: PLC0415  libsodium takes 30 ms to load

        raw: bytes = random(KEY_LENGTH)
        save_key(path, raw)
        return raw
    try:
        raw = base64.b64decode(content.strip(), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != KEY_LENGTH:
        raise InputError(f"{path} is damaged: it does not hold a {KEY_LENGTH}-byte key in base64")
    return raw


def save_key(path: Path, raw: bytes) -> None:
    """Keep a key: base64, mode 0600."""
    files.write(path, base64.b64encode(raw) + b"\n")


def public_key(private: bytes) -> str:
    """Give the WireGuard public key (base64) of a private key (32 bytes): X25519 with the base point (RFC 7748)."""
    from nacl.bindings import crypto_scalarmult_base  # noqa: PLC0415  as above

    return base64.b64encode(crypto_scalarmult_base(private)).decode()


@dataclass(frozen=True, slots=True)
class Invitation:
    """Everything a new host needs besides one member's address. It is a secret: it holds the gossip key."""

    mesh: str
    overlay: IPv4Network
    subnet_length: int
    gossip_key: bytes
    gossip_port: int
    addresses: tuple[Endpoint, ...] = ()

    def __repr__(self) -> str:
        return f"Invitation(mesh={self.mesh!r}, overlay={self.overlay})"


def encode(invitation: Invitation) -> str:
    """Give the invitation as one word: `meshd1.` and base64url of msgpack with a checksum."""
    body: bytes = msgpack.packb(
        {
            "m": invitation.mesh,
            "o": str(invitation.overlay),
            "l": invitation.subnet_length,
            "k": invitation.gossip_key,
            "p": invitation.gossip_port,
            "a": [str(address) for address in invitation.addresses],
        }
    )
    return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")


def decode(text: str) -> Invitation:
    """Read an invitation that somebody pasted. Raises InputError saying what is wrong, never what it holds."""
    text = "".join(text.split())
    if not text.startswith("meshd"):
        raise InputError("this is not an invitation: it does not start with 'meshd1.'; copy the line that init printed")
    if not text.startswith(PREFIX):
        raise InputError(f"this invitation is of another version ({text.partition('.')[0][:16]!r}); this meshd reads 1")
    coded = text.removeprefix(PREFIX)
    try:
        raw = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    body, checksum = raw[:-_CHECKSUM], raw[-_CHECKSUM:]
    if len(raw) <= _CHECKSUM or len(raw) > 4096 or checksum != _checksum(body):
        raise InputError("the invitation is damaged (its checksum is wrong): copy it again, whole")
    try:
        return _from_fields(msgpack.unpackb(body))
    except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
        raise InputError(f"the invitation does not hold what it should: {type(error).__name__}") from None


def _from_fields(fields: dict[str, object]) -> Invitation:
    gossip_key, addresses = fields["k"], fields["a"]
    length, port = fields["l"], fields["p"]
    if not (isinstance(gossip_key, bytes) and len(gossip_key) == KEY_LENGTH and isinstance(addresses, list)):
        raise ValueError
    if not (isinstance(length, int) and isinstance(port, int) and isinstance(fields["m"], str)):
        raise TypeError
    endpoints = tuple(Endpoint.parse(str(address)) for address in addresses)
    return Invitation(fields["m"], IPv4Network(str(fields["o"])), length, gossip_key, port, endpoints)


def _checksum(body: bytes) -> bytes:
    """Detect a damaged copy, nothing more: who made the invitation is not proved by it."""
    return blake2b(body, digest_size=_CHECKSUM, person=b"meshd-invite").digest()
