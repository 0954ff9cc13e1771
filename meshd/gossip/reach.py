"""Which addresses take a TCP connection. Serf tries one address after the other, and a silent one for 10 s."""

import errno
import math
import random
import socket
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import ExitStack
from selectors import EVENT_WRITE, DefaultSelector

from meshd.endpoint import Endpoint
from meshd.errors import SerfError

# Seconds that an address has to take the connection. A packet may be lost: the kernel sends the first one again after
# one second.
MEET = 1.5
# How many addresses are tried at once.
AT_ONCE = 32


def answering(endpoints: Collection[Endpoint], until: float = math.inf) -> Generator[Endpoint, None, None]:
    """Yield those that take a connection, each as soon as it does, until the monotonic time `until`.

    The order in which they are tried is another one each time: of very many the same ones are not always last. Raises
    SerfError where this host can open no more sockets.
    """
    shuffled = random.sample([*endpoints], len(endpoints))
    for first in range(0, len(shuffled), AT_ONCE):
        try:
            yield from _answering(shuffled[first : first + AT_ONCE], min(until, time.monotonic() + MEET))
        except OSError as error:
            raise SerfError(f"looking for other hosts: {error.strerror}") from error


def _answering(endpoints: Sequence[Endpoint], until: float) -> Iterator[Endpoint]:
    with DefaultSelector() as selector, ExitStack() as opened:
        for endpoint in endpoints:
            family = socket.AF_INET if endpoint.address.version == 4 else socket.AF_INET6
            connection = opened.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            if connection.connect_ex((str(endpoint.address), endpoint.port)) in {0, errno.EINPROGRESS}:
                selector.register(connection, EVENT_WRITE, (connection, endpoint))
        # Who has answered while another one was joined is there too.
        while selector.get_map() and (ready := selector.select(max(0.0, until - time.monotonic()))):
            for key, _ in ready:
                connection, endpoint = key.data
                selector.unregister(connection)
                if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    yield endpoint
