"""When the daemon starts its Serf agent again since somebody changed its keys; tests/lab has it at work."""

from pathlib import Path

import pytest

from meshd.daemon import keeper
from meshd.daemon.keeper import KEY_COMMAND, MOST_NAMES, Keeper, Log
from meshd.state.directory import State

TELLS = "    2026/11/26 19:05:28 [INFO] serf: Received use-key query\n"
OTHER = "    2026/11/26 19:05:28 [INFO] serf: Received list-keys query\n"


@pytest.mark.parametrize(("what", "tells"), [("install", 1), ("use", 1), ("remove", 1), ("list", 0)])
def test_a_change_of_keys_is_told_and_a_look_at_them_is_not(state: State, what: str, tells: int) -> None:
    line = f"2026/11/26 19:05:28 [INFO] serf: Received {what}-key{'s' if what == 'list' else ''} query"
    assert Keeper(state, lambda: None).hear(line, 7) is bool(tells)
    assert bool(KEY_COMMAND.search(line.encode())) is bool(tells)


def test_a_log_tells_of_the_agent_that_writes_it_now(tmp_path: Path) -> None:
    path = tmp_path / "serf.log"
    log = Log(path)
    assert not log.tells(1), "there is none yet"
    path.write_text(OTHER)
    assert not log.tells(1)
    path.write_text(OTHER + TELLS[:-9])
    assert not log.tells(1), "the line is not whole"
    path.write_text(OTHER + TELLS)
    assert log.tells(1)
    path.write_text(OTHER)
    assert log.tells(1), "also when the line has been cut off"
    assert not log.tells(2), "the next agent's log is another one"


def test_a_log_that_was_cut_is_read_from_its_begin(tmp_path: Path) -> None:
    path = tmp_path / "serf.log"
    path.write_text(OTHER * 10)
    log = Log(path)
    assert not log.tells(1)
    path.write_text(TELLS)
    assert log.tells(1)


def test_an_agent_starts_again_soon_and_then_after_a_pause(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    now, begun = [100.0], Keeper(state, lambda: None)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    begun._look(7)
    assert begun.due == float("inf"), "nothing was told"
    begun.hear(TELLS, 7)
    begun._look(7)
    assert now[0] + keeper.SOONEST <= begun.due <= now[0] + keeper.LATEST
    first = begun.due
    now[0] += 0.3
    begun._look(7)
    assert begun.due == first, "more commands do not put it off"
    begun.due, begun._last_start = float("inf"), first
    begun._look(8)
    assert begun.due == float("inf"), "that was the agent before"
    begun.hear(TELLS, 8)
    begun._look(8)
    assert begun.due == first + keeper.PAUSE


def test_a_thousand_members_are_no_long_line() -> None:
    names = [f"barge{number:04}" for number in range(1000)]
    assert keeper._named(names) == ", ".join(names[:MOST_NAMES]) + " and 950 more"
    assert keeper._named([]) == "unknown"
