"""Signals that end a command: they undo its work like errors, and cannot stop the undoing."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let interrupts, also a closed terminal, end the block like errors, until what this gives is called: then none."""
    interrupts = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _interrupted) for number in interrupts}

    def ignore() -> None:
        for number in interrupts:
            signal.signal(number, signal.SIG_IGN)

    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(number: int, _: object) -> None:
    raise SystemExit(128 + number)
