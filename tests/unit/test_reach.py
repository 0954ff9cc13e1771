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
def silent() -> Iterator[Endpoint]:
    """An address that answers nothing: the kernel drops connections beyond those that a server has to accept."""
    with ExitStack() as sockets:
        server = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        full: list[int] = []
        while not full or not full[-1]:
            connection = sockets.enter_context(socket.socket())
            connection.settimeout(0.2)
            full.append(connection.connect_ex(server.getsockname()))
        yield _endpoint(server)


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
    monkeypatch: pytest.MonkeyPatch, listening: list[Endpoint], silent: Endpoint
) -> None:
    """To join a host may take longer than all of them have for their answer."""
    monkeypatch.setattr(reach, "MEET", 0.2)
    found = answering([silent, *listening])
    first = next(found)
    time.sleep(2 * reach.MEET)
    assert {first, *found} == {*listening}


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
