"""Small files that must never be half written, and never be read by others."""

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from meshd.errors import InputError, MeshdError

# As much as a file of meshd may hold. Each of them stays far below.
LIMIT = 16 * 2**20


class TooLargeError(InputError):
    """A file is larger than anything that meshd has written."""


def write(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably, with mode 0600. Raises MeshdError (disk full, read-only, …)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):  # on a read-only file system it is refused even if there is nothing to unlink
            temporary.unlink(missing_ok=True)
        raise MeshdError(f"writing {path}: {error.strerror}") from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that a user can read and a diff can show."""
    write(path, json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")


def read(path: Path, limit: int = LIMIT) -> bytes | None:
    """Return a file's content, None if there is none. Raises InputError if it cannot be read, TooLargeError."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"reading {path}: {error.strerror}") from error
    if len(content) > limit:
        raise TooLargeError(f"reading {path}: larger than {limit} bytes")
    return content


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if there is no file. Raises InputError if it is damaged."""
    content = read(path)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it does not hold an object")
    return value


def is_too_large(path: Path) -> bool:
    """Return whether a file is larger than what `read` reads."""
    try:
        return path.stat().st_size > LIMIT
    except OSError:
        return False


def set_aside(path: Path, other: Path) -> None:
    """Give a file another name. Raises MeshdError."""
    try:
        path.replace(other)
    except OSError as error:
        raise MeshdError(f"setting aside {path}: {error.strerror}") from error


def writable(path: Path) -> None:
    """Write nothing; raise MeshdError where nothing could be written: read-only, or without room for one more block."""
    try:
        disk = os.statvfs(path)
    except OSError as error:
        raise MeshdError(f"{path}: {error.strerror}") from error
    number = errno.EROFS if disk.f_flag & os.ST_RDONLY else 0 if disk.f_bfree else errno.ENOSPC
    if number:
        raise MeshdError(f"{path} cannot be written to: {os.strerror(number)}")


def private_directory(path: Path) -> None:
    """Make a directory with mode 0700. Raises MeshdError if it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise MeshdError(f"the state directory {path} cannot be made: {error.strerror}; pass --state-dir") from error
    if not os.access(path, os.W_OK):
        raise MeshdError(f"the state directory {path} is not writable; pass --state-dir")
