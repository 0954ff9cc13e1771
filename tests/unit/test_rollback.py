"""What is undone when a command fails half way, and what is said of what is left; tests/lab has it on real hosts."""

import os
import signal
from pathlib import Path

import pytest

from meshd.errors import ApplyError, MeshdError
from meshd.lifecycle.rollback import Step, all_or_nothing, undo, undoing
from meshd.reconcile.machine import Area, Failure
from meshd.reconcile.run import Report
from meshd.state.directory import State


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def test_undo_takes_every_step_and_says_what_is_left() -> None:
    taken: list[str] = []

    def broken() -> None:
        taken.append("broken")
        raise ApplyError("no answer")

    def puzzled() -> None:
        taken.append("puzzled")
        raise ZeroDivisionError

    def halfway() -> Report:
        taken.append("halfway")
        return Report(failures=(Failure(Area.READ, MeshdError("busy"), "link"),))

    left = undo([("Serf", broken), ("Docker", puzzled), ("the network", halfway), ("files", lambda: taken.append("x"))])
    assert taken == ["broken", "puzzled", "halfway", "x"]
    assert left == ["not undone: Serf: no answer", "not undone: Docker: ZeroDivisionError()", "not undone: link: busy"]


def test_a_block_that_succeeds_undoes_nothing() -> None:
    with undoing(lambda: pytest.fail("undone")):
        pass


def test_an_error_carries_what_is_left_as_notes() -> None:
    steps: list[Step] = [("Serf", lambda: None)]

    def refuse() -> None:
        raise ApplyError("no answer")

    with pytest.raises(MeshdError, match="half way") as caught, undoing(lambda: [*steps, ("Docker", refuse)]):
        raise MeshdError("half way")
    assert notes(caught.value) == ["not undone: Docker: no answer"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_undoes_and_cannot_stop_the_undoing(number: signal.Signals) -> None:
    taken: list[str] = []

    def interrupted_again() -> None:
        os.kill(os.getpid(), number)
        taken.append("undone")

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, undoing(lambda: [("Serf", interrupted_again)]):
        signal.raise_signal(number)
    assert (caught.value.code, taken) == (128 + number, ["undone"])
    assert signal.getsignal(number) == before


def begun(state: State) -> None:
    with all_or_nothing(state):
        state.directory.mkdir(exist_ok=True)
        state.mark_down()
        raise MeshdError("half way")


def test_a_directory_that_meshd_made_goes_with_its_files(tmp_path: Path) -> None:
    state = State(tmp_path / "meshd")
    with pytest.raises(MeshdError, match="half way"):
        begun(state)
    assert not state.directory.exists()


def test_a_directory_that_was_there_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(MeshdError, match="half way"):
        begun(State(tmp_path))
    assert list(tmp_path.iterdir()) == []
