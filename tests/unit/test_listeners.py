"""What /proc/net says of ports, read, and whether it is in another socket's way."""

import os
import socket
import sys
from ipaddress import ip_address

import pytest

from meshd.net import listeners
from meshd.net.listeners import Listener, parse

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the tables were read on such a machine")

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F0A 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1206 1 0 100 0 0 10 0
   1: 650A0A0A:1F0A 660A0A0A:D431 01 00000000:00000000 00:00000000 00000000     0        0 1300 1 0 20 4 30 10 -1
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when
   0: 00000000000000000000000000000000:1F0A 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 1400 1 0 100
   1: 0000000000000000FFFF0000650A0A0A:0016 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 1500 1 0 100
   2: 000080FE00000000FF005452563412FE:0016 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 1600 1 0 100
"""
UDP = """\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  901: 00000000:CA6C 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 2100 2 0 0
"""


def test_tables_of_the_kernel() -> None:
    """TCP sockets that listen and all UDP sockets occupy a port; an IPv4 address in IPv6 spelling is IPv4."""
    assert list(parse("tcp", TCP)) == [Listener("tcp", ip_address("127.0.0.1"), 7946, 1206)]
    assert list(parse("tcp", TCP6)) == [
        Listener("tcp", ip_address("::"), 7946, 1400),
        Listener("tcp", ip_address("10.10.10.101"), 22, 1500),
        Listener("tcp", ip_address("fe80::5254:ff:fe12:3456"), 22, 1600),
    ]
    assert list(parse("udp", UDP)) == [Listener("udp", ip_address("0.0.0.0"), 51820, 2100)]


@pytest.mark.parametrize(
    ("has", "wanted", "is_in_the_way"),
    [
        ("127.0.0.1", "10.1.1.1", False),
        ("10.1.1.1", "10.1.1.1", True),
        ("0.0.0.0", "10.1.1.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("::", "10.1.1.1", True),
        ("::1", "0.0.0.0", False),
        ("::1", "::", True),
        ("0.0.0.0", "::", False),
    ],
)
def test_address_and_port_decide(has: str, wanted: str, is_in_the_way: bool) -> None:
    listener = Listener("udp", ip_address(has), 7946, 1)
    assert listener.occupies("udp", ip_address(wanted), 7946) is is_in_the_way
    assert not listener.occupies("tcp", ip_address(wanted), 7946)
    assert not listener.occupies("udp", ip_address(wanted), 7947)


def test_holder_of_a_port_is_named_with_its_process() -> None:
    """Those of this process itself are found, by the real /proc."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = listeners.holders("tcp", ip_address("0.0.0.0"), port)
        assert found.pid == os.getpid()
        assert str(found).endswith(f"(pid {os.getpid()})")
        assert listeners.holders("udp", ip_address("0.0.0.0"), port) == []
