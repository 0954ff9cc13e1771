"""What Serf executes at an event, from exec to exit, with the daemon's socket there and read."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Thread

from tests.bench.compare.pairs import Figures
from tests.bench.compare.processes import in_turn, spent, standing
from tests.bench.compare.revisions import Revision

PAIRS = 200
END = b"end"


def run(revisions: Sequence[Revision]) -> Iterator[tuple[Figures, Figures]]:
    """Run both handlers in turn."""
    with ExitStack() as stack:
        commands = [stack.enter_context(_handler(revision)) for revision in revisions]
        for pair in range(PAIRS):
            figures = {place: _figures(commands[place]) for place in in_turn(pair)}
            yield figures[0], figures[1]


def _figures(command: Sequence[str]) -> Figures:
    took = spent(command, {"PATH": os.environ["PATH"], "SERF_EVENT": "member-update"})
    return {"wall ms": took.wall * 1e3, "CPU ms": took.cpu * 1e3}


@contextmanager
def _handler(revision: Revision) -> Iterator[list[str]]:
    with standing(revision, 0) as stand, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(stand.socket)
        reader = Thread(target=_drain, args=(server,))
        reader.start()
        try:
            yield stand.handler
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
                client.sendto(END, stand.socket)
            reader.join()


def _drain(server: socket.socket) -> None:
    while server.recv(512) != END:
        pass
