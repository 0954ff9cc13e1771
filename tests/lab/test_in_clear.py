"""What somebody on the underlay can read of a mesh: nothing, from the first packet on."""

import base64
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshd.lab import network
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import init, join, ping

pytestmark = [pytest.mark.root, pytest.mark.lab]


@contextmanager
def listening(lab: Lab) -> Iterator[list[bytes]]:
    """Hear every packet on the underlay while the block runs; afterwards the list holds the whole capture."""
    pid = lab.switch_pid
    assert pid is not None
    switch = LabHost("switch", network.GATEWAY, pid, lab.directory / "switch")
    path = lab.directory / "capture"
    command = ["tcpdump", "-ni", "underlay", "--immediate-mode", "-U", "-w", str(path), "not arp and not icmp6"]
    dump = subprocess.Popen(switch.argv(command), stderr=subprocess.PIPE, text=True)
    heard: list[bytes] = []
    assert dump.stderr is not None
    try:
        while "listening on" not in dump.stderr.readline():
            assert dump.poll() is None
        yield heard
    finally:
        switch.run(["pkill", "-INT", "-x", "tcpdump"])
        dump.communicate(timeout=10)
        heard.append(path.read_bytes())


def test_nothing_of_the_mesh_is_readable_from_the_first_packet_on(lab: Lab) -> None:
    lab.up(2, docker=False)
    one, two = lab.hosts()
    with listening(lab) as heard:
        invitation = init(one, "--no-docker")
        join(two, one, invitation, "--no-docker")
        assert ping(two, "172.20.101.0")
        one.run(["meshd", "members"])
        two.run(["meshd", "leave"])
    (capture,) = heard
    secrets = [
        base64.b64decode(host.run(["cat", f"/var/lib/meshd/{name}.key"]).stdout)
        for host, name in ((one, "gossip"), (one, "wireguard"), (one, "rpc"))
    ]
    public = one.run(["wg", "show", "wg0", "public-key"]).stdout.strip().encode()
    for word in (b"barge1", b"barge2", b"172.20.10", b"subnet", b"51820", b"meshd", public, *secrets):
        assert word not in capture
    # An overlay address in a packet's header would be one in clear.
    assert bytes([172, 20, 101, 0]) not in capture
    assert capture.count(one.address.packed + two.address.packed) > 20, "the capture did hear the two"


def test_what_is_said_in_clear_would_have_been_heard(lab: Lab) -> None:
    lab.up(2, docker=False)
    one, two = lab.hosts()
    with listening(lab) as heard:
        one.run(["bash", "-c", f"echo hello from barge1 > /dev/udp/{two.address}/9"])
    assert b"hello from barge1" in heard[0]
