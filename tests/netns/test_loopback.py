"""Who is at the other end of a connection on loopback, where a NAT rule hides it; test_serf.py has the real agent."""

import os
import select
import socket
import struct
import subprocess
import time

import pytest

from meshd.errors import SerfError
from meshd.gossip.serf import loopback
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root]

MASQUERADE = """
table ip theirs {
    chain postrouting {
        type nat hook postrouting priority 100;
        masquerade
    }
}
"""


def test_nat_rule_on_loopback_is_named_at_once(netns_pair: tuple[Namespace, Namespace]) -> None:
    """A rule that masquerades everything gives a connection on loopback another source. It must not be waited for."""
    with netns_pair[0].entered(), socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as before:
            accepted, _ = server.accept()
            loopback.check(before, lambda: [os.getpid()], 5)
            accepted.close()
        subprocess.run(["nft", "-f", "-"], input=MASQUERADE, text=True, check=True)
        with socket.create_connection(server.getsockname()) as client:
            accepted, source = server.accept()
            accepted.close()
            assert source != client.getsockname(), "or this test shows nothing"
            begun = time.monotonic()
            with pytest.raises(SerfError, match="a NAT rule changes its addresses"):
                loopback.check(client, lambda: [os.getpid()], 30)
            assert time.monotonic() - begun < 10


def test_connection_that_is_reset_is_said(netns: object) -> None:
    """An agent that ends resets the connections that wait for it: a failure like any other, and no internal error."""
    assert netns
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        until = select.poll()
        until.register(client, 0)
        assert until.poll(10_000), "the client has seen the reset"
        with pytest.raises(SerfError, match="ended a connection before it accepted it"):
            loopback.check(client, lambda: [os.getpid()], 5)
