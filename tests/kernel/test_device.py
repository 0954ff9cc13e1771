"""A kernel device with many peers: its dump comes in several messages, and a peer may be split over them."""

from ipaddress import IPv4Network

import pytest

from meshd.endpoint import Endpoint
from meshd.keys import public_key
from meshd.net import wireguard
from meshd.net.resources import Action, Change, Device, Peer
from meshd.net.wireguard import contract, kernel
from meshd.net.wireguard.contract import encode_key
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root, pytest.mark.kernel]

KEY = bytes([1]) * 32
COUNT = 300
# 57 KB of allowed IPs: more than one message of a dump (32 KB at most), less than one attribute of a request (64 KB).
MANY = tuple(IPv4Network("172.21.0.0/16").subnets(new_prefix=27))


@pytest.fixture
def device(netns: Namespace) -> contract.WireGuard:
    """A device `wg0` of the kernel without peers."""
    assert netns
    adapter = wireguard.find("wg0", KEY, prefer="kernel")
    adapter.apply(Change(Action.ADD, Device("wg0", public_key(KEY), 51820)))
    return adapter


def peer(number: int, *networks: IPv4Network, port: int = 51820) -> Peer:
    own = IPv4Network((int(IPv4Network("10.64.0.0/10").network_address) + number * 256, 24))
    key = encode_key(number.to_bytes(2, "big") + b"p" * 30)
    return Peer(key, Endpoint.parse(f"192.0.2.1:{port}"), networks or (own,), 25)


def change(device: contract.WireGuard, action: Action, *peers: Peer) -> None:
    for one in peers:
        device.apply(Change(action, one))


def read(device: contract.WireGuard) -> list[Peer]:
    return [resource for resource in device.read() if isinstance(resource, Peer)]


def test_kernel_device_is_found_by_its_port(device: contract.WireGuard) -> None:
    """Its socket has no process in /proc."""
    assert device.backend == "kernel"
    assert wireguard.link_on(51820) == "wg0"
    assert wireguard.link_on(51821) == ""


def test_kernel_device_with_300_peers(device: contract.WireGuard) -> None:
    """Three hundred peers are read, changed and removed."""
    peers = sorted((peer(number) for number in range(COUNT)), key=lambda one: one.key)
    change(device, Action.ADD, *peers)
    assert isinstance(device, kernel.Kernel)
    assert len(device._get()) > 1, "the dump was not split: this test shows nothing"
    assert read(device) == peers
    changed = [peer(number, port=51821) for number in range(0, COUNT, 3)]
    before = {one.key: one for one in peers}
    for new in changed:
        device.apply(Change(Action.SET, new, before[new.key]))
    wanted = before | {one.key: one for one in changed}
    assert read(device) == [wanted[key] for key in sorted(wanted)]
    change(device, Action.REMOVE, *peers[: COUNT // 2])
    assert read(device) == [wanted[one.key] for one in peers[COUNT // 2 :]]


def test_kernel_peer_with_many_allowed_ips(device: contract.WireGuard) -> None:
    """A peer with more allowed IPs than one message holds is read whole."""
    peers = [peer(1), peer(2, *MANY), peer(3)]  # AAE…, AAI…, AAM…: in the order of their keys
    change(device, Action.ADD, *peers)
    assert isinstance(device, kernel.Kernel)
    parts = sum(len(message.get_attr("WGDEVICE_A_PEERS") or ()) for message in device._get())
    assert parts > len(peers), "no peer was split: this test shows nothing"
    assert read(device) == peers
