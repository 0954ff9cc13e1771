"""Hints: what comes by the socket, and what only repeats what the daemon knows."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.daemon import hints
from meshd.daemon.hints import HELD_BACK, Echoes, Hint, Source

ROUTE = Hint(Source.NETLINK, "route 172.20.7.0/24 changed")
JOINED = Hint(Source.HANDLER, "member-join")


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "agent.sock"))
        server.settimeout(5)
        yield server


def test_wake_is_read_as_a_commands_hint(listening: socket.socket, tmp_path: Path) -> None:
    assert hints.wake(tmp_path / "agent.sock", "settings")
    assert hints.read(listening.recv(hints.LENGTH)) == Hint(Source.COMMAND, "settings")


def test_wake_without_a_daemon_says_so(tmp_path: Path) -> None:
    assert not hints.wake(tmp_path / "agent.sock", "settings")


def test_the_handler_script_is_recognised() -> None:
    assert hints.read(b"serf: member-join") == JOINED
    assert hints.read(b"serf: query meshd-applied") == Hint(Source.HANDLER, "query meshd-applied")


@given(st.binary(max_size=600))
def test_any_datagram_is_a_printable_hint(datagram: bytes) -> None:
    hint = hints.read(datagram)
    assert hint.source in {Source.HANDLER, Source.COMMAND}
    assert hint.text.isprintable()


def test_the_kernels_report_of_an_own_change_repeats_once() -> None:
    echoes = Echoes()
    echoes.expect([ROUTE])
    assert echoes.repeats(ROUTE, 0)
    assert not echoes.repeats(ROUTE, 0), "somebody else made the second change"
    echoes.expect([ROUTE])
    echoes.expect([])
    assert not echoes.repeats(ROUTE, 0), "it was of an earlier reconcile"


def test_a_handler_repeats_what_serf_has_logged() -> None:
    echoes = Echoes()
    assert not echoes.repeats(JOINED, 0)
    echoes.logged(10)
    assert echoes.repeats(JOINED, 10 + HELD_BACK - 0.1)
    assert not echoes.repeats(JOINED, 10 + HELD_BACK)
    assert not echoes.repeats(Hint(Source.HANDLER, "query meshd-applied"), 10), "Serf does not log queries"
    assert not echoes.repeats(Hint(Source.LOG, "member-join"), 10)
