"""Key files, and WireGuard's public key of a private one."""

import base64
import binascii
import secrets
from pathlib import Path

from meshd import files
from meshd.errors import InputError

KEY_LENGTH = 32


def key(path: Path) -> bytes:
    """Return the 32-byte key in a file, made at random if there is none. Raises InputError if it is damaged."""
    raw = saved_key(path)
    if raw is None:
        raw = new_key()
        save_key(path, raw)
    return raw


def new_key() -> bytes:
    return secrets.token_bytes(KEY_LENGTH)


def saved_key(path: Path) -> bytes | None:
    """Return the 32-byte key in a file, None if there is none. Raises InputError if it is damaged."""
    content = files.read(path)
    if content is None:
        return None
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
    """Return the WireGuard public key (base64) of a private key (32 bytes): X25519 with the base point (RFC 7748)."""
    from nacl.bindings import crypto_scalarmult_base  # noqa: PLC0415  libsodium takes 30 ms to load

    return base64.b64encode(crypto_scalarmult_base(private)).decode()
