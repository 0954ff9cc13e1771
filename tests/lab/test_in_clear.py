"""What somebody on the underlay can read of a mesh: nothing, from the first packet on."""

import base64

import pytest

from meshd.lab import images
from meshd.lab.hosts import Lab
from tests.lab.conftest import (
    IN_CLEAR,
    PCAP_HEADER,
    capture,
    capturing,
    eventually,
    init,
    join,
    nothing_in_clear,
    overlay,
    ping,
    rtt,
    run_box,
    talking,
)

pytestmark = [pytest.mark.root, pytest.mark.lab]


def test_no_mesh_data_is_readable_on_underlay(lab: Lab) -> None:
    """No name, address or key of the mesh is readable on the underlay from the first packet on."""
    lab.up(2, docker=False)
    one, two = lab.hosts()
    with capture(lab) as heard:
        invitation = init(one, "--no-docker")
        join(two, one, invitation, "--no-docker")
        assert ping(two, "172.20.101.0")
        one.run(["meshd", "members"])
        two.run(["meshd", "leave"])
    (packets,) = heard
    secrets = [
        base64.b64decode(host.run(["cat", f"/var/lib/meshd/{name}.key"]).stdout)
        for host, name in ((one, "gossip"), (one, "wireguard"), (one, "rpc"))
    ]
    public = one.run(["wg", "show", "wg0", "public-key"]).stdout.strip().encode()
    for word in (b"barge1", b"barge2", b"172.20.10", b"subnet", b"51820", b"meshd", public, *secrets):
        assert word not in packets
    # An overlay address in a packet's header would be one in clear.
    assert bytes([172, 20, 101, 0]) not in packets
    assert packets.count(one.address.packed + two.address.packed) > 20, "the capture did hear the two"


def test_no_overlay_packet_leaves_before_first_peer(lab: Lab) -> None:
    """Packets for the overlay do not leave in clear before there is a peer."""
    lab.down()
    lab.up(2, docker=False)
    one, two = lab.hosts()
    lab.start_docker(one)
    images.build(one)
    invitation = init(one)
    run_box(one)
    with nothing_in_clear(lab, one), talking(one, two):
        join(two, one, invitation, "--no-docker")
        eventually(lambda: rtt(one, "box", overlay(two)), 15, "the container reaches the other host")


def test_capture_detects_overlay_packet_in_clear(lab: Lab) -> None:
    """The capture does detect overlay traffic in clear."""
    lab.down()
    lab.up(2, docker=False)
    hosts = lab.hosts()
    with (
        pytest.raises(AssertionError, match="overlay traffic in clear"),
        nothing_in_clear(lab, *hosts),
        capturing(lab, IN_CLEAR) as path,
    ):
        eventually(lambda: path.stat().st_size > PCAP_HEADER, 10, "a packet is on the underlay")


def test_capture_detects_text_in_clear(lab: Lab) -> None:
    """The capture does detect text in clear."""
    lab.up(2, docker=False)
    one, two = lab.hosts()
    with capture(lab) as heard:
        one.run(["bash", "-c", f"echo hello from barge1 > /dev/udp/{two.address}/9"])
    assert b"hello from barge1" in heard[0]
