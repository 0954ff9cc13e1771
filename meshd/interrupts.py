"""Signals that end a command: they undo its work like errors, and cannot stop the undoing."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let interrupts, also a closed terminal, end the block like errors, until what this gives is called: then none."""
    before = {number: signal.signal(number, _interrupted) for number in INTERRUPTS}

    def ignore() -> None:
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)

    try:
        yield ignore
    finally:
        _restore(before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put interrupts off to the end of the block, where they are raised.

    Starting a process is such a block: an interrupt that ends it half way would leave a process that nobody knows of.
    A mask would do as well, but a process inherits it.
    """
    # Elsewhere nothing is interrupted: Python takes signals in its main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in INTERRUPTS}
    try:
        yield
    finally:
        _restore(before)
        for number in came[:1]:
            signal.raise_signal(number)


def _restore(handlers: dict[signal.Signals, "signal._HANDLER"]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _interrupted(number: int, _: object) -> None:
    raise SystemExit(128 + number)
