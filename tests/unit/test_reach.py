"""Which addresses take a TCP connection. Those that are silent, or refuse, delay nobody."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from resource import RLIMIT_NOFILE, getrlimit, setrlimit

import pytest

from meshd.endpoint import Endpoint
from meshd.errors import SerfError
from meshd.gossip import reach
from meshd.gossip.reach import AT_ONCE, answering


@pytest.fixture
def listening() -> Iterator[list[Endpoint]]:
    with ExitStack() as servers:
        yield [_endpoint(servers.enter_context(socket.create_server(("127.0.0.1", 0)))) for _ in range(3)]


@pytest.fixture
def full() -> Iterator[tuple[socket.socket, int]]:
    """A server that has as many connections to accept as it holds, and their number: the kernel drops others."""
    with ExitStack() as sockets:
        server = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        waiting = 0
        while True:
            connection = sockets.enter_context(socket.socket())
            connection.settimeout(0.2)
            if connection.connect_ex(server.getsockname()):
                connection.close()  # it would try again
                break
            waiting += 1
        yield server, waiting


@pytest.fixture
def silent(full: tuple[socket.socket, int]) -> Endpoint:
    """An address that answers nothing."""
    return _endpoint(full[0])


def _endpoint(server: socket.socket) -> Endpoint:
    address, port = server.getsockname()
    return Endpoint(ip_address(address), port)


def _refusing() -> Endpoint:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return _endpoint(server)


def test_who_listens_is_found_among_others(listening: list[Endpoint], silent: Endpoint) -> None:
    """Neither a port that refuses, nor an address without an answer, nor one without a route is there."""
    nowhere = Endpoint(ip_address("255.255.255.255"), 7946)
    assert sorted(map(str, answering([silent, _refusing(), nowhere, *listening]))) == sorted(map(str, listening))


def test_silent_one_delays_nobody(monkeypatch: pytest.MonkeyPatch, listening: list[Endpoint], silent: Endpoint) -> None:
    begun = time.monotonic()
    monkeypatch.setattr(reach, "MEET", 30.0)
    found = answering([silent, *listening])
    assert {next(found) for _ in listening} == {*listening}
    assert time.monotonic() - begun < reach.MEET
    found.close()


def test_who_answered_while_another_was_joined_is_there(
    monkeypatch: pytest.MonkeyPatch, listening: list[Endpoint], full: tuple[socket.socket, int]
) -> None:
    """To join a host may take longer than all of them have for their answer."""
    monkeypatch.setattr(reach, "MEET", 0.2)
    server, waiting = full
    found = answering([_endpoint(server), *listening])
    soon = {next(found) for _ in listening}
    for _ in range(waiting + 1):  # the last one is that of the search, which the kernel tries again after a second
        server.accept()[0].close()
    assert {*found} == {_endpoint(server)}
    assert soon == {*listening}


def test_more_than_are_tried_at_once(listening: list[Endpoint]) -> None:
    assert {*answering([*(_refusing() for _ in range(2 * AT_ONCE)), *listening])} == {*listening}


def test_time_that_is_over_leaves_nobody_waiting(silent: Endpoint) -> None:
    assert not [*answering([silent], until=time.monotonic())]


def test_no_socket_left_is_said(listening: list[Endpoint]) -> None:
    before = getrlimit(RLIMIT_NOFILE)
    with socket.socket() as last:
        setrlimit(RLIMIT_NOFILE, (last.fileno() + 1, before[1]))
        try:
            with pytest.raises(SerfError, match="looking for other hosts: Too many open files"):
                [*answering(listening)]
        finally:
            setrlimit(RLIMIT_NOFILE, before)
