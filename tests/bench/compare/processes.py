"""What the measurements share: who is first in a pair, what a command took, and one host among simulated ones."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tests.bench.compare.revisions import Revision
from tests.netns.conftest import Namespace, namespace

STAND = Path(__file__).with_name("stand.py")


def in_turn(pair: int) -> tuple[int, int]:
    """Return the order of old (0) and new (1) in a pair: the second one must not always be the same."""
    return (0, 1) if pair % 2 == 0 else (1, 0)


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of wall time and of CPU, of a command and of the children for which it waited."""

    wall: float
    cpu: float


def spent(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> Spent:
    """Run a command from exec to exit. Raises CalledProcessError if it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **options)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Spent(wall, usage.ru_utime + usage.ru_stime)


@dataclass(frozen=True, slots=True)
class Stand:
    """A state directory, the network namespace where Serf's stand-in answers for it, and what `stand.py` says."""

    directory: str
    space: Namespace
    handler: list[str]
    socket: str


@contextmanager
def standing(revision: Revision, size: int) -> Iterator[Stand]:
    """Let a host of this revision stand among `size` simulated members while the block runs."""
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as directory, namespace() as space:
        with space.entered():
            process = revision.popen("-P", str(STAND), directory, space.link_name(), str(size))
        with process:
            yield Stand(directory, space, **answer(revision, process))


def answer(revision: Revision, process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return the next line of JSON that a process of this revision prints."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise click.ClickException(f"{revision}: {process.args!r} has ended; its error is above")
    values: dict[str, Any] = json.loads(line)
    return values
