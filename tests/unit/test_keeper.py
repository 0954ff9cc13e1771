"""When the daemon starts its Serf agent again, and what it does for one that runs; tests/lab has it at work."""

import math
import resource
import subprocess

import pytest

from meshd.daemon import keeper
from meshd.daemon.keeper import MOST_NAMES, Keeper
from meshd.state.directory import State

BEGIN = "2026/11/26 19:05:28 [INFO] serf: "
TOLD = f"{BEGIN}Received use-key query"


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def own(state: State, told: list[str]) -> Keeper:
    return Keeper(state, told.append, lambda: None)


@pytest.mark.parametrize("what", ["install", "use", "remove"])
def test_a_change_of_keys_is_told_once(own: Keeper, told: list[str], what: str) -> None:
    for _ in range(3):
        own.hear(f"{BEGIN}Received {what}-key query", 7)
    assert told == [f"Received {what}-key query"]
    own.hear(TOLD, 8)
    assert told[1:] == ["Received use-key query"], "and once of the next agent"


@pytest.mark.parametrize(
    "line",
    [
        f"{BEGIN}Received list-keys query",
        f"{BEGIN}EventMemberJoin: {TOLD} 10.10.10.9",
        f"{BEGIN}EventMemberJoin: x\\n    {TOLD}",
        f"{BEGIN}Received use-key query of x",
    ],
)
def test_no_name_of_a_member_looks_like_a_change_of_keys(own: Keeper, told: list[str], line: str) -> None:
    own.hear(line, 7)
    assert told == []
    assert not own._doubt.is_set()


def test_there_is_doubt_about_an_agent_that_ran_before_and_after_lines_were_lost(own: Keeper) -> None:
    own._started = 7
    own.adopt(7)
    assert not own._doubt.is_set()
    own.hear("2026/11/26 19:05:28 [WARN] agent.ipc: Dropping logs to 127.0.0.1:34568", 7)
    assert own._doubt.is_set()
    own._doubt.clear()
    own.adopt(8)
    assert own._doubt.is_set()


def test_an_agent_starts_again_soon_and_then_after_a_pause(own: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    own._schedule()
    assert 100.0 + keeper.SOONEST <= own.due <= 100.0 + keeper.LATEST
    own.due, own._started_at = math.inf, 99.0
    own._schedule()
    assert own.due == 99.0 + keeper.PAUSE


def test_a_thousand_members_are_no_long_line() -> None:
    names = [f"barge{number:04}" for number in range(1000)]
    assert keeper.named(names) == ", ".join(names[:MOST_NAMES]) + " and 950 more"
    assert keeper.named([]) == "unknown"


def test_an_agent_that_ran_before_is_contained_when_it_is_adopted(own: Keeper) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        own.adopt(process.pid)
        bound, _ = resource.prlimit(process.pid, resource.RLIMIT_AS)
        process.kill()
    assert bound != resource.RLIM_INFINITY


def test_an_agent_that_has_ended_by_then_is_none_to_contain(own: Keeper, caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    own.adopt(process.pid)
    own.adopt(None)
    assert caplog.messages == []


def test_the_end_of_an_agent_is_logged_once_and_by_whoever_saw_it_run(
    own: Keeper, state: State, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # nothing can be started
    state.save_gossip_key(bytes(32))
    state.serf_log.write_text("fatal error: out of memory\n")
    assert own.keep().startswith("serf: serf is not installed")
    assert caplog.messages == []
    own._ran = True
    for _ in range(2):
        assert own.keep().startswith("serf: serf is not installed")
    assert caplog.messages == ["serf ended: fatal error: out of memory"]
