"""Locks on files: they end with the process that holds them, however it ends (flock(2))."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshd import files
from meshd.errors import MeshdError

POLL = 0.01


@contextmanager
def held(path: Path, timeout: float, busy: str) -> Iterator[int]:
    """Hold the lock of a file, and yield its descriptor. Raises MeshdError with `busy` after `timeout` seconds."""
    try:
        descriptor = _open(path)
    except OSError as error:
        raise MeshdError(f"opening {path}: {error.strerror}") from error
    try:
        deadline = time.monotonic() + timeout
        while not _taken(descriptor):
            if time.monotonic() >= deadline:
                raise MeshdError(busy)
            time.sleep(POLL)
        yield descriptor
    finally:
        os.close(descriptor)


def sign(descriptor: int) -> None:
    """Write this process's id into a held lock's file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def holder(path: Path) -> int | None:
    """Return the process id in a lock's file while the lock is held, otherwise None."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        content = (files.read(path) or b"").strip()
        return int(content) if content.isdigit() else None
    except OSError:
        return None
    return None


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # A file system that went read-only, as ext4 does after an error of the disk, can be locked all the same.
        if error.errno != errno.EROFS:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
