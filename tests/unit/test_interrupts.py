"""Interrupts that come while a process is started: none is lost, and neither is the process."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from meshd.detached import start_until
from meshd.interrupts import INTERRUPTS, interruptible, uninterrupted


@contextmanager
def interrupt_at_start_of_process(number: signal.Signals) -> Iterator[None]:
    """Interrupt this process as soon as another one has begun: before Popen returns, which is all that names it."""

    def profile(_: object, event: str, function: object) -> None:
        if event == "c_return" and getattr(function, "__name__", "") == "fork_exec":
            signal.raise_signal(number)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def running(argument: str) -> list[int]:
    """Return the processes that have this argument."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if argument.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("number", INTERRUPTS)
def test_interrupt_during_the_start_ends_the_process(tmp_path: Path, number: signal.Signals) -> None:
    """A process is ended also when the interrupt comes before its starter knows it."""
    log = tmp_path / "log"
    with interruptible(), interrupt_at_start_of_process(number), pytest.raises(SystemExit) as caught:
        start_until(lambda _: pytest.fail("not interrupted"), ["tail", "-f", str(log)], log)
    assert caught.value.code == 128 + number
    assert running(str(log)) == []


def test_failed_wait_ends_the_process(tmp_path: Path) -> None:
    """A process that does not become ready is ended."""
    seen: list[subprocess.Popen[bytes]] = []

    def never(process: "subprocess.Popen[bytes]") -> None:
        seen.append(process)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        start_until(never, ["sleep", "30"], tmp_path / "log")
    assert seen[0].returncode == -signal.SIGKILL


def test_ready_process_goes_on(tmp_path: Path) -> None:
    """A process that becomes ready outlives the wait."""
    process = start_until(lambda _: None, ["sleep", "30"], tmp_path / "log")
    try:
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_interrupt_is_raised_at_the_end_of_the_block() -> None:
    """An interrupt lets the block end first, and is not forgotten."""
    steps: list[str] = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            steps.append("went on")

    with pytest.raises(SystemExit) as caught, interruptible():
        work()
    assert (caught.value.code, steps) == (128 + signal.SIGTERM, ["went on"])


def test_interrupt_does_not_hide_an_error() -> None:
    """The error of a block that fails is the cause of what its interrupt raises."""

    def fail() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("half way")

    with pytest.raises(SystemExit) as caught, interruptible():
        fail()
    assert isinstance(caught.value.__context__, ValueError)


def test_ignored_interrupt_stays_ignored() -> None:
    """What is ignored while a command undoes its work is ignored in such a block, too."""
    with interruptible() as ignore:
        ignore()
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_other_threads_start_processes_too() -> None:
    """In a thread, which Python never interrupts, the block is an ordinary one."""
    done: list[str] = []

    def work() -> None:
        with uninterrupted():
            done.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["done"]
