"""What becomes of the memory of Serf's process, and what is read of its log; tests/netns has a real agent."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.errors import ConflictError
from meshd.gossip import serf
from meshd.gossip.serf.process import MEMORY, OOM_SCORE, TAIL

LINE = "    2026/11/26 19:05:28 [INFO] serf: "
TRACE = "\n\ngoroutine 43 [running]:\nruntime.throw({0x56, 0xd})\nmain.errorFailed(0x1)\n"


USED = 64 * 2**20
# Uses as much, says so, and waits.
USE = f"used = b'x' * {USED}; print(flush=True); input()"


@pytest.fixture
def process() -> Iterator["subprocess.Popen[str]"]:
    """A process of this user that uses memory."""
    command = [sys.executable, "-I", "-c", USE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_limit_is_of_what_is_used_beside_what_is_only_reserved(process: "subprocess.Popen[str]") -> None:
    reserved = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    serf.contain(process.pid)
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_AS)
    # Python itself uses some 10 MiB more.
    assert MEMORY < soft <= reserved - USED + MEMORY
    assert hard == resource.RLIM_INFINITY, "what the agent runs may lift it"
    assert score(process.pid) == OOM_SCORE


def test_limit_that_is_there_stays(process: "subprocess.Popen[str]") -> None:
    theirs = (2**30, 2**31)
    resource.prlimit(process.pid, resource.RLIMIT_AS, theirs)
    serf.contain(process.pid)
    assert resource.prlimit(process.pid, resource.RLIMIT_AS) == theirs
    assert score(process.pid) == OOM_SCORE


def score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        (f"{LINE}EventMemberFailed: barge2 10.10.10.102\n", ""),
        (f"{LINE}x\nruntime: out of memory\nfatal error: out of memory{TRACE}", "fatal error: out of memory"),
        (f"panic: \x1b[2Jassignment to nil map{TRACE}", r"panic: \x1b[2Jassignment to nil map"),
        (f"{LINE}EventMemberJoin: x\nfatal error: a name\nfatal error: true{TRACE}", "fatal error: true"),
        (f"fatal error: long ago\n{'x' * TAIL}\n", ""),
    ],
    ids=["nothing", "no end", "out of memory", "panic", "a name before it", "no more than the log's end is read"],
)
def test_last_words_are_those_of_go(tmp_path: Path, log: str, words: str) -> None:
    path = tmp_path / "serf.log"
    path.write_text(log)
    assert serf.last_words(path) == words


def test_agent_without_log_has_no_last_words(tmp_path: Path) -> None:
    assert serf.last_words(tmp_path / "serf.log") == ""
    assert str(serf.why_ended(tmp_path / "serf.log")) == "the Serf agent did not start: it wrote no reason"


def test_reason_why_agent_did_not_start_is_its_last_error_or_that_of_go(tmp_path: Path) -> None:
    path = tmp_path / "serf.log"
    path.write_text("==> an error\n==> Failed to listen: address already in use\n==> bye\n")
    taken = serf.why_ended(path)
    assert isinstance(taken, ConflictError)
    assert str(taken).endswith("a port is taken: ==> Failed to listen: address already in use")
    path.write_text(f"==> an error\nfatal error: out of memory{TRACE}")
    assert str(serf.why_ended(path)) == "the Serf agent did not start: fatal error: out of memory"
