"""One contract for both WireGuard backends, on real devices; checked from outside with `wg` and `ping`."""

import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network, ip_address
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.generic.wireguard import wgmsg

from meshd.endpoint import Endpoint
from meshd.errors import ApplyError, ConflictError, InputError, MissingError
from meshd.keys import public_key
from meshd.net import icmp, wireguard
from meshd.net.links import Links, link_names
from meshd.net.resources import Action, Address, Change, Device, Link, Peer, Route
from meshd.net.routes import Routes
from meshd.net.wireguard import contract, kernel, userspace
from meshd.net.wireguard.contract import encode_key
from tests.netns.conftest import Namespace

pytestmark = pytest.mark.root

KEYS = [bytes([n]) * 32 for n in range(1, 4)]
OVERLAY = IPv4Network("172.20.0.0/16")

BACKENDS = ["userspace", pytest.param("kernel", marks=pytest.mark.kernel)]


def wg(*words: str) -> str:
    return subprocess.run(["wg", *words], check=True, capture_output=True, text=True).stdout


def device(name: str, number: int = 0, port: int = 51820) -> Device:
    return Device(name, public_key(KEYS[number]), port)


def peer(number: int, endpoint: str | None = None, block: str | None = None, keepalive: int = 0) -> Peer:
    network = IPv4Network(block or f"172.20.{number}.0/24")
    where = Endpoint.parse(endpoint) if endpoint else None
    return Peer(encode_key(number.to_bytes(2, "big") + b"p" * 30), where, (network,), keepalive)


def add(adapter: contract.WireGuard, *resources: Any) -> None:
    for resource in resources:
        adapter.apply(Change(Action.ADD, resource))


def remove(adapter: contract.WireGuard, *resources: Any) -> None:
    for resource in resources:
        adapter.apply(Change(Action.REMOVE, resource))


def peers(adapter: contract.WireGuard) -> dict[str, Peer]:
    return {r.key: r for r in adapter.read() if isinstance(r, Peer)}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def name(netns: Namespace) -> str:
    return netns.link_name()


@pytest.fixture
def adapter(name: str, backend: str) -> contract.WireGuard:
    found = wireguard.find(name, KEYS[0], prefer=backend)
    assert found.backend == backend
    return found


# --- one device ----------------------------------------------------------------------------------------------------


def test_device_round_trip(adapter: contract.WireGuard, name: str) -> None:
    """A device is made, read back and removed, and `wg` shows it."""
    assert adapter.read() == []
    add(adapter, device(name))
    assert adapter.read() == [device(name)]
    assert wg("show", name, "public-key").strip() == device(name).public_key
    assert wg("show", name, "listen-port").strip() == "51820"
    remove(adapter, device(name))
    assert adapter.read() == []
    assert not Path(f"/var/run/wireguard/{name}.sock").exists()
    with pytest.raises(subprocess.CalledProcessError):
        wg("show", name)


def test_routes_apply_is_idempotent(adapter: contract.WireGuard, name: str) -> None:
    """Adding or removing everything twice is harmless."""
    wanted = [device(name), peer(1, "192.0.2.1:51820", keepalive=25), peer(2)]
    for _ in range(2):
        add(adapter, *wanted)
    assert adapter.read() == wanted
    for _ in range(2):
        remove(adapter, *wanted)
    assert adapter.read() == []


def test_remove_from_absent_device_is_harmless(adapter: contract.WireGuard, name: str) -> None:
    """Removing a peer or the device is harmless if the device is absent."""
    remove(adapter, peer(1), device(name))


def test_add_peer_to_absent_device_raises_error(adapter: contract.WireGuard) -> None:
    """Adding a peer to an absent device raises ApplyError that names the peer."""
    with pytest.raises(ApplyError, match=r"add peer .*172\.20\.1\.0/24.*: "):
        add(adapter, peer(1))


def test_device_of_another_key_is_refused(adapter: contract.WireGuard, name: str) -> None:
    """A device with another key than the host's is refused."""
    with pytest.raises(ApplyError, match="belongs to"):
        add(adapter, device(name, number=1))
    assert adapter.read() == []


def test_port_change_keeps_peers(adapter: contract.WireGuard, name: str) -> None:
    """A change of the port keeps the peers."""
    add(adapter, device(name), peer(1))
    adapter.apply(Change(Action.SET, device(name, port=51999), device(name)))
    assert adapter.read() == [device(name, port=51999), peer(1)]


def test_peer_change_keeps_other_peers(adapter: contract.WireGuard, name: str) -> None:
    """A change of one peer keeps the others."""
    first, second = peer(1, "192.0.2.1:1"), peer(2, "[2001:db8::2]:2", keepalive=5)
    add(adapter, device(name), first, second)
    changed = peer(1, "192.0.2.9:9", "172.20.91.0/24", keepalive=7)
    adapter.apply(Change(Action.SET, changed, first))
    assert adapter.read() == [device(name), changed, second]
    remove(adapter, changed)
    assert adapter.read() == [device(name), second]


def test_peer_without_endpoint_keeps_old_one(adapter: contract.WireGuard, name: str) -> None:
    """A change without an endpoint keeps the one that the peer has."""
    first = peer(1, "192.0.2.1:1")
    add(adapter, device(name), first)
    adapter.apply(Change(Action.SET, peer(1, None, keepalive=3), first))
    assert adapter.read()[1] == peer(1, "192.0.2.1:1", keepalive=3)


def test_set_keeps_roamed_endpoint(adapter: contract.WireGuard, name: str) -> None:
    """The peer roams between read and apply: its new endpoint must not be taken back."""
    first = peer(1, "192.0.2.1:1")
    add(adapter, device(name), first)
    wg("set", name, "peer", first.public_key, "endpoint", "192.0.2.77:77")
    adapter.apply(Change(Action.SET, peer(1, "192.0.2.1:1", keepalive=3), first))
    assert adapter.read()[1] == peer(1, "192.0.2.77:77", keepalive=3)


def test_set_does_not_create_peer(adapter: contract.WireGuard, name: str) -> None:
    """A change of a peer that has gone does not create it without its other fields."""
    add(adapter, device(name))
    adapter.apply(Change(Action.SET, peer(1, keepalive=3), peer(1)))
    assert adapter.read() == [device(name)]


def test_many_peers_round_trip(adapter: contract.WireGuard, name: str) -> None:
    """Hundreds of peers, and one with hundreds of prefixes, are read back exactly."""
    many = [peer(n, f"192.0.2.{n % 250 + 1}:{1000 + n}", f"10.{n // 200}.{n % 200}.0/24", n) for n in range(1, 301)]
    blocks = tuple(IPv4Network(f"10.{100 + n // 250}.{n % 250}.0/24") for n in range(900))
    wide = Peer(encode_key(b"w" * 32), None, blocks)
    add(adapter, device(name), *many, wide)
    assert adapter.read() == [device(name), *sorted([*many, wide], key=lambda p: p.key)]


def test_private_key_is_not_exposed(adapter: contract.WireGuard, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The private key is in no repr, argument or environment, and the daemon has its own session."""
    monkeypatch.setenv("MESHD_INVITE", "a-secret")
    add(adapter, device(name))
    assert not any(encode_key(KEYS[0]) in f"{r}{r!r}" or KEYS[0].hex() in f"{r!r}" for r in adapter.read())
    for process in daemons(name):
        assert process.joinpath("cmdline").read_bytes().split(b"\0")[1:] == [name.encode(), b""]
        assert b"a-secret" not in process.joinpath("environ").read_bytes()
        assert os.getsid(int(process.name)) != os.getsid(0)


def test_existing_device_is_adopted(
    adapter: contract.WireGuard, name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running device is adopted by the backend that made it, whatever is preferred."""
    add(adapter, device(name), peer(1))
    monkeypatch.setenv("PATH", "/nonexistent")
    for prefer in ("auto", "userspace", "kernel"):
        again = wireguard.find(name, KEYS[0], prefer)
        assert again.backend == backend
        assert again.read() == [device(name), peer(1)]


def test_wireguard_leaks_no_descriptor(adapter: contract.WireGuard, name: str) -> None:
    """Reading and changing a device leaves no descriptor open."""
    add(adapter, device(name))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # each entry only counts
    for _ in range(10):
        add(adapter, device(name), peer(1))
        adapter.read()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208  # each entry only counts


# --- two hosts -----------------------------------------------------------------------------------------------------


def echo(sock: socket.socket, address: str, sequence: int, interval: float) -> bool:
    """One ping (RFC 792); this machine may have no `ping`. Waits for `interval` seconds afterwards."""
    body = struct.pack("!HH", os.getpid() & 0xFFFF, sequence) + b"meshd"
    words = struct.unpack("!6H", struct.pack("!BBH", 8, 0, 0) + body[:8])
    total = sum(words) + (body[8] << 8)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    try:
        sock.sendto(struct.pack("!BBH", 8, 0, checksum) + body, (address, 0))
        while True:
            packet = sock.recv(1500)
            if packet[20] == 0 and packet[24:] == body:
                time.sleep(interval)
                return True
    except OSError:  # no answer in time; or ENOKEY, with which the kernel's WireGuard refuses what no peer is for
        return False


class Node:
    """A host of two: its namespace, its device and what it says about itself."""

    def __init__(self, space: Namespace, backend: str, number: int) -> None:
        self.space, self.number, self.name = space, number, space.link_name()
        self.block = IPv4Network(f"172.20.{number}.0/24")
        with space.entered():
            self.wireguard = wireguard.find(self.name, KEYS[number], prefer=backend)
            links = Links([self.name], [])
            address = Address(self.name, IPv4Interface(f"{self.block.network_address}/32"))
            add(self.wireguard, device(self.name, number))
            for resource in (Link(self.name, "wireguard", 1380), address):
                links.apply(Change(Action.ADD, resource))

    def peer(self, address: str | None) -> Peer:
        endpoint = Endpoint(ip_address(address), 51820) if address else None
        return Peer(public_key(KEYS[self.number]), endpoint, (self.block,))

    def join(self, other: "Node", address: str | None) -> None:
        with self.space.entered():
            add(self.wireguard, other.peer(address))
            Routes(self.name, OVERLAY).apply(Change(Action.ADD, self.route(other)))

    def route(self, other: "Node") -> Route:
        return Route(other.block, self.name, self.block.network_address)

    def pings(self, other: "Node", *sizes: int) -> list[int]:
        """Send pings of these sizes; give those that come back until the last one does."""
        found: list[int] = []
        with self.space.entered(), icmp.Pings(self.name, other.block.network_address) as pings:
            for size in sizes:
                pings.send(size)
            while sizes[-1] not in found:
                assert select.select([pings], [], [], 5)[0]
                found += pings.receive()
        return found

    def ping(self, other: "Node", count: int = 1, interval: float = 0.0) -> int:
        """How many of `count` echo requests were answered."""
        with self.space.entered(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.settimeout(1)
            return sum(echo(sock, str(other.block.network_address), n, interval) for n in range(count))

    def sees(self, other: "Node") -> Peer:
        with self.space.entered():
            return peers(self.wireguard)[public_key(KEYS[other.number])]


@pytest.fixture
def nodes(netns_pair: tuple[Namespace, Namespace], backend: str) -> tuple[Node, Node]:
    one, two = Node(netns_pair[0], backend, 1), Node(netns_pair[1], backend, 2)
    one.join(two, "10.9.0.2")
    two.join(one, None)
    return one, two


def test_two_hosts_handshake_and_ping(nodes: tuple[Node, Node]) -> None:
    """Two hosts complete a handshake and ping each other."""
    one, two = nodes
    before = time.time()
    assert one.sees(two).handshake == 0.0
    assert one.ping(two) == 1
    there, back = one.sees(two), two.sees(one)
    assert before - 1 <= there.handshake <= time.time() + 1
    assert there.received > 0 < there.sent
    assert back.endpoint == Endpoint.parse("10.9.0.1:51820")
    assert two.ping(one) == 1


def test_pings_show_what_passes_a_tunnel(nodes: tuple[Node, Node]) -> None:
    """The largest ping that comes back is the path's MTU, to a multiple of 16, whatever MTU the route has."""
    one, two = nodes
    assert one.ping(two) == 1
    narrow = replace(one.route(two), mtu=700)
    with one.space.entered():
        Routes(one.name, OVERLAY).apply(Change(Action.SET, narrow, one.route(two)))
    assert one.pings(two, 1380, 576) == [1380, 576]
    with two.space.entered():
        chain = "chain input { type filter hook input priority 0; udp dport 51820 ip length > 1000 drop; }"
        subprocess.run(["nft", "-f", "-"], input=f"table ip narrow {{ {chain}; }}", text=True, check=True)
    # 60 bytes are WireGuard's.
    assert one.pings(two, 1380, 944, 928, 576) == [928, 576]


def test_unchanged_peers_lose_no_packet(nodes: tuple[Node, Node]) -> None:
    """The same device and peers applied again, and other peers beside them, end no session and lose no packet."""
    one, two = nodes
    assert one.ping(two) == 1
    handshake = one.sees(two).handshake
    with ThreadPoolExecutor(1) as pool, one.space.entered():
        flood = pool.submit(two.ping, one, 200, 0.005)
        for number in range(100, 130):
            same = one.sees(two)
            one.wireguard.apply(Change(Action.ADD, device(one.name, 1)))
            one.wireguard.apply(Change(Action.SET, device(one.name, 1), device(one.name, 1)))
            one.wireguard.apply(Change(Action.SET, same, same))
            add(one.wireguard, peer(number, "10.9.0.9:9"))
            remove(one.wireguard, peer(number))
        assert flood.result(timeout=20) == 200
    assert one.sees(two).handshake == handshake


def test_removed_peer_is_cut_off_until_added_again(nodes: tuple[Node, Node]) -> None:
    """A removed peer is cut off and is reached again when it is added again."""
    one, two = nodes
    assert one.ping(two) == 1
    with one.space.entered():
        remove(one.wireguard, two.peer(None))
    assert one.ping(two) == 0
    one.join(two, "10.9.0.2")
    assert one.ping(two) == 1


def test_recreated_peer_starts_handshake_at_once(adapter: contract.WireGuard, name: str) -> None:
    """A peer that is removed and added again starts a handshake at once; a changed one does not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        other.settimeout(2)  # WireGuard repeats its first message after 5 s
        there = peer(1, f"127.0.0.1:{other.getsockname()[1]}", keepalive=25)
        add(adapter, device(name))
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        for _ in range(3):
            add(adapter, there)
            assert other.recv(200)[:4] == b"\1\0\0\0", "a first message"
            adapter.apply(Change(Action.SET, there, there))
            with pytest.raises(TimeoutError):
                other.recv(200)
            remove(adapter, there)


def test_new_adapter_keeps_session_of_running_device(nodes: tuple[Node, Node]) -> None:
    """A new adapter takes over a running device and keeps its sessions."""
    one, two = nodes
    assert one.ping(two) == 1
    handshake = one.sees(two).handshake
    with one.space.entered():
        again = wireguard.find(one.name, KEYS[1])
        again.apply(Change(Action.SET, device(one.name, 1), device(one.name, 1)))
    assert one.ping(two, count=3) == 3
    assert one.sees(two).handshake == handshake


# --- what only wireguard-go has ------------------------------------------------------------------------------------


def daemons(name: str) -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"wireguard-go") and words[1:2] == [name.encode()]:
            yield process


@pytest.fixture
def go(name: str) -> contract.WireGuard:
    return userspace.Userspace(name, KEYS[0])


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def kill(name: str) -> None:
    """End the daemon at once; its link goes with it, its socket stays."""
    for process in daemons(name):
        os.kill(int(process.name), signal.SIGKILL)
    assert eventually(lambda: not userspace.is_running(name))


def test_killed_wireguard_go_is_started_again(go: contract.WireGuard, name: str) -> None:
    """A device whose wireguard-go was killed reads as absent and can be made again."""
    add(go, device(name), peer(1))
    kill(name)
    assert go.read() == []
    assert Path(f"/var/run/wireguard/{name}.sock").exists()  # stale, and in the way
    add(go, device(name), peer(1))
    assert go.read() == [device(name), peer(1)]


def test_nothing_is_sent_to_another_user_at_socket(go: contract.WireGuard, name: str) -> None:
    """Nothing is sent to another user's process at the socket."""
    path, heard = Path(f"/var/run/wireguard/{name}.sock"), []
    add(go, device(name))
    kill(name)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        # The kernel remembers who it was that began to listen.
        os.seteuid(65534)
        try:
            server.listen()
        finally:
            os.seteuid(0)
        server.setblocking(False)
        with pytest.raises(ApplyError, match="another user listens there"):
            userspace.exchange(path, "get=1\n\n")
        assert not userspace._answers(path), "nobody takes it for wireguard-go"
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(4096))
    assert heard == [b"", b""]
    path.unlink()


def test_remove_cleans_up_after_killed_wireguard_go(go: contract.WireGuard, name: str) -> None:
    """Removing the device removes the socket that a killed wireguard-go has left."""
    add(go, device(name))
    kill(name)
    assert go.read() == []
    remove(go, device(name))
    assert not Path(f"/var/run/wireguard/{name}.sock").exists()


def test_remove_ends_wireguard_go(go: contract.WireGuard, name: str) -> None:
    """Removing the device ends wireguard-go."""
    add(go, device(name))
    assert [*daemons(name)]
    remove(go, device(name))
    assert eventually(lambda: not [*daemons(name)])


def test_tun_link_without_daemon_reads_as_absent(go: contract.WireGuard, name: str) -> None:
    """A TUN link without a wireguard-go reads as absent."""
    with IPRoute(groups=0) as ipr:
        ipr.link("add", ifname=name, kind="tuntap", mode="tun")
    assert go.read() == []


def test_wireguard_go_of_another_namespace_is_ignored(
    go: contract.WireGuard, name: str, netns_pair: tuple[Namespace, Namespace]
) -> None:
    """A wireguard-go of another network namespace is not touched."""
    add(go, device(name))
    with netns_pair[0].entered():
        assert go.read() == []
        remove(go, device(name))
        with pytest.raises(ApplyError, match=r"starting wireguard-go: ERROR: .*in use"):
            add(go, device(name))
    assert go.read() == [device(name)]


def test_missing_wireguard_go_names_package(go: contract.WireGuard, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a missing wireguard-go names its package."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MissingError, match="apt install wireguard-go"):
        add(go, device(name))
    with pytest.raises(MissingError, match="apt install wireguard-go"):
        wireguard.find(name, KEYS[0], "userspace")


# --- choosing ------------------------------------------------------------------------------------------------------


def test_missing_wireguard_error_names_both_remedies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any WireGuard the error names the package and the kernel module."""
    monkeypatch.setattr(kernel, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MissingError) as caught:
        wireguard.find(name, KEYS[0])
    assert str(caught.value) == (
        "this kernel has no WireGuard and wireguard-go is not installed: apt install wireguard-go, "
        "or load the module (modprobe wireguard)"
    )
    with pytest.raises(MissingError, match="modprobe wireguard"):
        wireguard.find(name, KEYS[0], "kernel")


def test_unknown_backend_raises_input_error(name: str) -> None:
    """An unknown backend raises InputError."""
    with pytest.raises(InputError, match="magic"):
        wireguard.find(name, KEYS[0], "magic")


def test_kernel_detection_leaks_no_descriptor(netns: Namespace) -> None:
    """Looking for the kernel's WireGuard leaves no descriptor open."""
    assert netns
    kernel.is_available()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # each entry only counts
    for _ in range(5):
        kernel.is_available()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208  # each entry only counts


@pytest.mark.kernel
def test_auto_prefers_kernel(name: str) -> None:
    """The backend `auto` prefers the kernel and leaves no link behind."""
    before = link_names()
    assert wireguard.find(name, KEYS[0]).backend == "kernel"
    assert link_names() == before


def test_link_of_another_kind_is_kept(adapter: contract.WireGuard, name: str) -> None:
    """A link of another kind with the device's name raises ConflictError and is kept."""
    with IPRoute(groups=0) as ipr:
        ipr.link("add", ifname=name, kind="bridge")
    assert adapter.read() == []
    with pytest.raises(
        (ApplyError, ConflictError), match=rf"add wireguard {name} |{name}: it exists and is a bridge link"
    ):
        add(adapter, device(name))
    with pytest.raises(ConflictError, match=rf"{name}: it is a bridge link"):
        remove(adapter, device(name))
    assert link_names()[name] == "bridge"


# --- the kernel's messages, without a kernel -------------------------------------------------------------------------


def message(*attributes: tuple[str, Any]) -> Any:
    """A message as it comes from the kernel: encoded and decoded again."""
    out = wgmsg()
    out["attrs"] = list(attributes)
    out.encode()
    back = wgmsg(out.data)
    back.decode()
    return back


def part(key: str, *blocks: str, **attributes: Any) -> dict[str, Any]:
    allowed = [
        {
            "attrs": [
                ("WGALLOWEDIP_A_FAMILY", 2),
                ("WGALLOWEDIP_A_IPADDR", network.network_address.packed),
                ("WGALLOWEDIP_A_CIDR_MASK", network.prefixlen),
            ]
        }
        for network in map(IPv4Network, blocks)
    ]
    others = [(f"WGPEER_A_{name}", value) for name, value in attributes.items()]
    return {"attrs": [("WGPEER_A_PUBLIC_KEY", key), *others, ("WGPEER_A_ALLOWEDIPS", allowed)]}


def test_collect_merges_split_peer() -> None:
    """A peer whose prefixes are split over several messages is put together."""
    key, other = encode_key(b"k" * 32), encode_key(b"o" * 32)
    head = part(key, "10.0.1.0/24", ENDPOINT={"addr": "192.0.2.1", "port": 7}, PERSISTENT_KEEPALIVE_INTERVAL=5)
    messages = [
        message(
            ("WGDEVICE_A_LISTEN_PORT", 51820),
            ("WGDEVICE_A_PUBLIC_KEY", public_key(KEYS[0])),
            ("WGDEVICE_A_PEERS", [part(other, "10.0.9.0/24"), head]),
        ),
        message(("WGDEVICE_A_PEERS", [part(key, "10.0.0.0/24")])),
    ]
    blocks = (IPv4Network("10.0.0.0/24"), IPv4Network("10.0.1.0/24"))
    assert kernel.collect("wg0", messages) == [
        device("wg0"),
        Peer(key, Endpoint.parse("192.0.2.1:7"), blocks, 5),
        Peer(other, None, (IPv4Network("10.0.9.0/24"),)),
    ]
