"""The script that Serf executes, run as Serf runs it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.daemon import hints
from meshd.gossip import serf_agent
from meshd.state.directory import State
from meshd.state.settings import Settings

SCRIPT = serf_agent.handlers() / "meshd_event.py"


def run(state: State, event: str, payload: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """As Serf does: by /bin/sh, the event in the environment, the members on stdin."""
    return subprocess.run(
        ["/bin/sh", "-c", serf_agent.handler_command(state)],
        env={"PATH": os.environ["PATH"], "SERF_EVENT": event, **environment},
        input=payload,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.fixture
def listening(state: State) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(state.socket))
        server.settimeout(5)
        yield server


def test_handler_passes_event_to_daemon(state: State, listening: socket.socket) -> None:
    """The handler passes an event to the daemon as a hint."""
    done = run(state, "member-join", "barge2\t10.10.10.102\t\twg=x\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert listening.recv(512) == b"serf: member-join"


def test_handler_passes_query_name_to_daemon(state: State, listening: socket.socket) -> None:
    """The handler passes a query to the daemon with the name of the query."""
    run(state, "query", "barge2 5", SERF_QUERY_NAME="meshd-applied")
    assert listening.recv(512) == b"serf: query meshd-applied"


def test_handler_does_not_block_on_full_socket(state: State, listening: socket.socket) -> None:
    """The handler does not wait for a daemon that does not read its socket."""
    listening.setblocking(False)
    while hints.wake(state.socket, "full") and _fits(state):
        pass
    done = run(state, "member-join")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _fits(state: State) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        try:
            client.sendto(b"x", str(state.socket))
        except BlockingIOError:
            return False
        return True


def test_handler_needs_only_standard_library(state: State, listening: socket.socket) -> None:
    """The handler needs only the standard library to pass a hint on."""
    script = f"import runpy, sys; sys.argv = ['x', {str(state.directory)!r}]\n"
    script += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    script += "allowed = sys.stdlib_module_names | {'__main__'}\n"
    script += "print(sorted(m for m in sys.modules if m.partition('.')[0] not in allowed))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert listening.recv(512) == b"serf: "


def test_handler_does_nothing_while_daemon_is_down(state: State) -> None:
    """On a host that is set up with a daemon, the handler does nothing while the daemon is down."""
    done = run(state, "member-join")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_handler_reconciles_without_daemon(state: State) -> None:
    """On a host without a daemon, the handler reconciles and reports errors."""
    settings = state.settings
    state.save_settings(Settings(name=settings.name, bind=settings.bind, daemon=False, docker=False))
    done = run(state, "member-join")
    assert done.returncode == 1
    assert "this host has not finished joining" in done.stderr


def test_handler_does_nothing_without_mesh(tmp_path: Path) -> None:
    """On a host without a mesh, the handler does nothing."""
    done = run(State(tmp_path / "none"), "member-join")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_handler_ignores_foreign_queries(state: State) -> None:
    """The handler does not answer queries of others, nor malformed ones."""
    state.save_settings(Settings(name="barge1", bind=state.settings.bind, daemon=False, docker=False))
    for name, payload in (("other", "barge2 5"), ("meshd-applied", "nonsense")):
        done = run(state, "query", payload, SERF_QUERY_NAME=name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
