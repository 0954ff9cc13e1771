"""Start a process that outlives the command that starts it."""

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from meshd.interrupts import uninterrupted


def start(
    arguments: Sequence[str], log: Path, *, flags: int = 0, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a program in a session of its own, with its output appended to a log that only this user can read.

    To a file, not to a pipe: a pipe's end would take the process along with who reads it. `flags` are added to those of
    open(2), `environment` to what it inherits. Raises OSError, whose `filename` is the log or the program.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)
    try:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            cwd="/",
            env={**_environment(), **(environment or {})},
        )
    finally:
        os.close(descriptor)


def start_until(
    ready: Callable[["subprocess.Popen[bytes]"], None], arguments: Sequence[str], log: Path
) -> "subprocess.Popen[bytes]":
    """Start a program, and wait for `ready`, which is given its process; end it if that fails or is interrupted."""
    process = None
    try:
        with uninterrupted():
            process = start(arguments, log)
        ready(process)
    except BaseException:
        with uninterrupted():
            if process is not None:
                process.kill()
                process.wait()
        raise
    return process


def _environment() -> dict[str, str]:
    """Return the environment without meshd's settings, which may hold an invitation."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MESHD_")}
