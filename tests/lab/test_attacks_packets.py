"""What must not work by packets that no honest host or container sends: by IPv6, for other addresses, for nobody's.

barge1 has Docker, barge2 has not; root on barge2 and the containers on barge1 do the attacking.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import SERVER, assemble, eventually, listening, overlay, peers, ping, run_container
from tests.lab.faults import KILL_DAEMON, restart_docker

pytestmark = [pytest.mark.root, pytest.mark.lab]

LAN, LINK_LOCAL = "192.168.77.1", "169.254.77.1"
# The bridge's MAC address holds the host's overlay address, and so does the IPv6 address that it would have.
MAC, SIX = "02:42:ac:14:65:00", "fe80::42:acff:fe14:6500"


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    return assemble(lab, docker=1, plain=1)


# --- by IPv6 ---------------------------------------------------------------------------------------------------------

CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], 2222), 2)
"""
# A router advertisement (RFC 4861) for a prefix and a default route, in a frame of the container's own making.
ADVERTISE = """
import socket, struct
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(("eth0", 0))
mac = wire.getsockname()[4]
source = socket.inet_pton(socket.AF_INET6, "fe80::bad")
everybody = socket.inet_pton(socket.AF_INET6, "ff02::1")
prefix = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 1800, 1800, 0) + socket.inet_pton(socket.AF_INET6, "2001:db8:bad::")
body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + prefix + bytes([1, 1]) + mac
words = source + everybody + struct.pack("!II", len(body), 58) + body
total = sum(struct.unpack(f"!{len(words) // 2}H", words))
while total >> 16:
    total = (total & 0xFFFF) + (total >> 16)
body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
header = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + source + everybody
wire.send(bytes.fromhex("333300000001") + mac + bytes.fromhex("86dd") + header + body)
"""


def inside(host: LabHost, container: str, script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in the network of a container."""
    pid = host.run(["docker", "inspect", "-f", "{{.State.Pid}}", container]).stdout.strip()
    command = ["nsenter", f"--target={pid}", "--net", sys.executable, "-I", "-c", script, *arguments]
    return host.run(command, check=False)


@pytest.fixture
def six(hosts: list[LabHost]) -> Iterator[str]:
    """A container that has turned IPv6 on for itself, which needs no capability."""
    run_container(hosts[0], "six", "--sysctl", "net.ipv6.conf.all.disable_ipv6=0", "meshd/serf", "sleep", "1000")
    try:
        yield "six"
    finally:
        hosts[0].run(["docker", "rm", "-f", "six"])


def reaches_a_service(host: LabHost) -> bool:
    with listening(host, 2222, "::"):
        return inside(host, "six", CONNECT, f"{SIX}%eth0").returncode == 0


def becomes_its_router(host: LabHost) -> bool:
    done = inside(host, "six", ADVERTISE)
    assert done.returncode == 0, done.stderr
    # What the host has received after it, it has dealt with after it.
    host.run(["docker", "exec", "six", "ping", "-c", "1", "-W", "2", overlay(host)])
    routes = host.run(["ip", "-6", "route"]).stdout
    assert ("default" in routes) is ("2001:db8:bad::/64" in routes), routes
    return "default" in routes


def ipv6_of(host: LabHost, link: str) -> str:
    """The IPv6 addresses of a link that are in force."""
    return host.run(["ip", "-o", "-6", "addr", "show", "dev", link, "-tentative"]).stdout


@pytest.mark.parametrize("attack", [reaches_a_service, becomes_its_router], ids=lambda attack: attack.__name__)
def test_container_gets_at_its_host_by_ipv6(hosts: list[LabHost], six: str, attack: Callable[[LabHost], bool]) -> None:
    one = hosts[0]
    own = "net.ipv6.conf.{}.{}".format
    assert six
    assert not attack(one)
    one.run(["sh", "-ec", KILL_DAEMON])
    try:
        one.run(["sysctl", "-qw", own("all", "disable_ipv6") + "=0", own("ovl0", "accept_ra") + "=2"])
        eventually(lambda: SIX in ipv6_of(one, "ovl0"), 10, "somebody has turned IPv6 on")
        assert not attack(one), "meshd's rules alone hold"
        one.run(["nft", "delete", "table", "ip6", "meshd_wg0"])
        eventually(lambda: attack(one), 10, "without both the attack works, or this test shows nothing")
    finally:
        one.run(["meshd", "up"])
    assert not ipv6_of(one, "ovl0") + ipv6_of(one, "wg0")
    assert not attack(one), "what a router has said ends with IPv6"


# --- for other addresses of a host -----------------------------------------------------------------------------------

# Says to which of the targets a TCP connection can be opened with packets that are sent from `link` as they are.
SYN = """
import json, os, select, socket, struct, sys, time
link, mac, source, *targets = sys.argv[1:]
IP = 0x0800
wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(IP))
wire.bind((link, IP))

def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

def syn(target, port, own):
    a, b = socket.inet_aton(source), socket.inet_aton(target)
    tcp = struct.pack("!HHIIBBHHH", own, port, 1, 0, 5 << 4, 2, 64240, 0, 0)
    check = checksum(a + b + struct.pack("!BBH", 0, 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack("!H", check) + tcp[18:]
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0, a, b)
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + tcp

first = 20000 + os.getpid() % 20000
ports = {first + number: target for number, target in enumerate(targets)}
answered = set()
for _ in range(4):
    for own, target in ports.items():
        address, _, port = target.partition(":")
        packet = syn(address, int(port), own)
        wire.sendto(packet, (link, IP, 0, 0, bytes.fromhex(mac.replace(":", ""))))
    deadline = time.monotonic() + 0.5
    while select.select([wire], [], [], max(0, deadline - time.monotonic()))[0]:
        packet, sender = wire.recvfrom(2000)
        if sender[2] != socket.PACKET_OUTGOING and packet[9] == 6:
            size = (packet[0] & 15) * 4
            own, flags = struct.unpack_from("!H", packet, size + 2)[0], packet[size + 13]
            if own in ports and flags & 0x12 == 0x12:
                answered.add(ports[own])
print(json.dumps(sorted(answered)))
"""


@pytest.fixture(scope="module", params=[True, False], ids=["userland proxy", "no userland proxy"])
def one(lab: Lab, hosts: list[LabHost], request: pytest.FixtureRequest) -> Iterator[LabHost]:
    """barge1 with a link to a network of its own, and a container on Docker's bridge that is published everywhere."""
    host = hosts[0]
    restart_docker(lab, host, "TERM", options=[f"--userland-proxy={str(request.param).lower()}"])
    host.run(["sh", "-ec", f"ip link add lan0 type bridge && ip addr add {LAN}/24 dev lan0 && ip link set lan0 up"])
    host.run(["ip", "addr", "add", f"{LINK_LOCAL}/16", "dev", "lan0"])
    where = ("127.0.0.1:8081", f"{LAN}:8082", f"{LINK_LOCAL}:8083", f"{host.address}:8084", "8085")
    options = [word for place in where for word in ("-p", f"{place}:80")]
    host.run(["docker", "run", "-d", "--init", "--name", "web", *options, "meshd/serf", "sh", "-c", SERVER])
    eventually(lambda: "80" in host.run(["docker", "exec", "web", "netstat", "-ltn"]).stdout, 10, "it listens")
    try:
        yield host
    finally:
        host.run(["docker", "rm", "-f", "web"])
        host.run(["ip", "link", "del", "lan0"])
        restart_docker(lab, host, "TERM")


def opened(done: "subprocess.CompletedProcess[str]") -> Sequence[str]:
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@contextmanager
def open_to_the_overlay(host: LabHost, what: str) -> Iterator[None]:
    host.run(["meshd", "up", "--allow", what])
    try:
        yield
    finally:
        host.run(["meshd", "up", "--allow", "none"])


def test_member_gets_by_the_tunnel_at_other_addresses_of_a_host(hosts: list[LabHost], one: LabHost) -> None:
    """And at what is published on them: through the tunnel there is the host's overlay address alone."""
    two, own = hosts[1], overlay(one)
    web = one.run(["docker", "inspect", "-f", "{{.NetworkSettings.IPAddress}}", "web"]).stdout.strip()
    elsewhere = ["127.0.0.1", LAN, LINK_LOCAL, str(one.address)]
    published = [f"{address}:{8081 + number}" for number, address in enumerate(elsewhere)]
    everywhere = [f"{address}:{port}" for address in elsewhere for port in (8085, 2222)]
    (key,) = peers(two)
    targets = [*published, *everywhere, f"{web}:80", f"{own}:8085", f"{own}:2222"]
    with listening(one, 2222), open_to_the_overlay(one, "tcp/2222"):
        # Its own daemon would put this right.
        two.run(["sh", "-ec", KILL_DAEMON])
        try:
            two.run(["wg", "set", "wg0", "peer", key, "allowed-ips", "0.0.0.0/0"])
            done = two.run([sys.executable, "-I", "-c", SYN, "wg0", "", overlay(two), *targets])
            assert opened(done) == sorted([f"{own}:2222", f"{own}:8085"])
        finally:
            two.run(["meshd", "up"])
    eventually(lambda: ping(two, own), 10, "they reach each other as before")


def test_container_gets_at_loopback(one: LabHost) -> None:
    """Without its userland proxy Docker lets the bridge route packets for 127.0.0.0/8."""
    own = f"{overlay(one)}:2223"
    with listening(one, 2222, "127.0.0.1"), listening(one, 2223), open_to_the_overlay(one, "all"):
        done = inside(one, "box", SYN, "eth0", MAC, overlay(one, 1), "127.0.0.1:2222", "127.0.0.1:8081", own)
    assert opened(done) == [own]


# --- for addresses that nobody has -----------------------------------------------------------------------------------


def test_container_takes_an_address_that_nobody_has(hosts: list[LabHost]) -> None:
    one, two = hosts
    nobodys = "172.20.250.66"
    run_container(one, "squatter", "--cap-add", "NET_ADMIN", "meshd/serf", "sleep", "1000")
    try:
        squatter = ["docker", "exec", "squatter"]
        assert ping(one, overlay(one, 2)), "it is there"
        one.run([*squatter, "ip", "addr", "add", f"{nobodys}/32", "dev", "eth0"])
        assert not ping(one, nobodys)
        assert not ping(two, nobodys)
        done = one.run([*squatter, "ping", "-c", "1", "-W", "2", "-I", nobodys, overlay(one)], check=False)
        assert done.returncode != 0, "nor is it answered"
        connect = "import socket, sys; socket.create_connection((sys.argv[1], 80), 5)"
        done = one.run([sys.executable, "-I", "-c", connect, nobodys], check=False)
        assert "No route to host" in done.stderr, "and who tries is told so at once"
        assert ping(one, overlay(one, 2))
    finally:
        one.run(["docker", "rm", "-f", "squatter"])
