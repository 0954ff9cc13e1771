"""Large packets: the overlay's MTU follows the underlay's, and nothing hangs where a packet does not fit."""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshd.lab import network
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, dropping, eventually, log, members, nothing_in_clear, overlay, run_box
from tests.lab.faults import kill_daemon

pytestmark = [pytest.mark.root, pytest.mark.lab]

# WireGuard's own part over IPv6; over IPv4 it is 20 less.
OVERHEAD = 80
LARGE, STREAM = 10_000, 5_000_000


def assembled(lab: Lab, mtu: int) -> list[LabHost]:
    lab.down()
    lab.up(2, docker=False, mtu=mtu)
    return assemble(lab, docker=2)


def mtus(host: LabHost) -> list[str]:
    """The MTUs of wg0, of ovl0, and of a container's link."""
    show = "ip -o link show wg0; ip -o link show ovl0; docker exec box ip -o link show eth0"
    return re.findall(r" mtu (\d+) ", host.run(["sh", "-ec", show]).stdout)


def large_ping(source: LabHost, target: LabHost) -> bool:
    command = ["docker", "exec", "box", "ping", "-c", "1", "-W", "2", "-s", str(LARGE), overlay(target, 1)]
    return source.run(command, check=False).returncode == 0


def stream(source: LabHost, target: LabHost) -> int:
    """Send some MB from container to container; give the bytes that came."""
    server = ["docker", "exec", "-i", "box", "sh", "-c", "timeout 20 nc -l -p 7000 | wc -c"]
    receiver = target.popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    eventually(lambda: "7000" in target.run(["docker", "exec", "box", "netstat", "-ltn"]).stdout, 5, "nc listens")
    send = f"head -c {STREAM} /dev/zero | timeout 20 nc {overlay(target, 1)} 7000"
    source.run(["docker", "exec", "box", "sh", "-c", send], check=False)
    return int(receiver.communicate(timeout=25)[0])


def assert_large_packets_pass(hosts: list[LabHost]) -> None:
    for source, target in (hosts, hosts[::-1]):
        assert stream(source, target) == STREAM, f"TCP from {source.name}"
        assert large_ping(source, target), f"ping from {source.name}"


@pytest.mark.parametrize("mtu", [1280, 1400, 1500, 9000])
def test_overlay_mtu_follows_underlay(lab: Lab, mtu: int) -> None:
    """The MTU of the overlay follows that of the underlay, and large packets pass."""
    hosts = assembled(lab, mtu)
    with nothing_in_clear(lab):
        assert [mtus(host) for host in hosts] == [[str(mtu - OVERHEAD)] * 3] * 2
        assert_large_packets_pass(hosts)


@contextmanager
def narrow(lab: Lab, hosts: list[LabHost], mtu: int) -> Iterator[None]:
    """Put a router with a smaller MTU between two hosts that does not say what it drops: no ICMP comes from it."""
    one, two = hosts
    switch = lab.switch
    quiet = [f"net.ipv4.conf.{name}.send_redirects=0" for name in ("all", network.BRIDGE)]
    switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", *quiet])
    for host, other in ((one, two), (two, one)):
        switch.run(["ip", "route", "replace", str(other.address), "dev", network.BRIDGE, "mtu", "lock", str(mtu)])
        host.run(["ip", "route", "replace", str(other.address), "via", str(network.GATEWAY)])
    rules = "table ip silent { chain output { type filter hook output priority 0; ip protocol icmp drop; }; }"
    switch.run(["nft", "-f", "-"], text=rules)
    try:
        yield
    finally:
        switch.run(["nft", "delete", "table", "ip", "silent"])
        for host, other in ((one, two), (two, one)):
            switch.run(["ip", "route", "del", str(other.address)])
            host.run(["ip", "route", "del", str(other.address)])


def test_large_packets_pass_narrow_path(lab: Lab) -> None:
    """Large packets pass a path that is narrower than the hosts know."""
    hosts = lab.hosts() or assembled(lab, 9000)
    with nothing_in_clear(lab), narrow(lab, hosts, 1400):
        assert_large_packets_pass(hosts)
    assert path_mtus(hosts) == [int(mtus(hosts[0])[0])] * 2, "what is fragmented on its way need not be smaller"


def test_underlay_mtu_decrease_while_containers_run(lab: Lab) -> None:
    """Docker cannot change a network under its containers: they keep their MTU until they are started anew."""
    hosts = lab.hosts() or assembled(lab, 9000)
    for host in hosts:
        host.run(["ip", "link", "set", "eth0", "mtu", "1500"])
        lab.switch.run(["ip", "link", "set", host.name, "mtu", "1500"])
    for host in hosts:
        eventually(lambda host=host: mtus(host)[:2] == ["1420", "1420"], 12, "the hosts have followed")  # type: ignore[misc]
        eventually(lambda host=host: "containers are attached (box): stop them" in log(host), 5, "it says what is left")  # type: ignore[misc]
    with nothing_in_clear(lab):
        assert_large_packets_pass(hosts)
    for host in hosts:
        host.run(["docker", "rm", "-f", "box"])
        host.run(["meshd", "sync"])
        run_box(host)
        assert mtus(host) == ["1420"] * 3


def path_mtus(hosts: list[LabHost]) -> list[object]:
    """What each of two hosts says of the path to the other."""
    return [members(host)[other.name]["mtu"] for host, other in (hosts, hosts[::-1])]


def test_path_that_drops_large_packets_is_measured(lab: Lab) -> None:
    """Where a switch drops what is too large, TCP flows within 10 s and large pings pass; the path grows again."""
    hosts = lab.hosts() or assembled(lab, 1500)
    one, two = hosts
    wide = [int(mtus(one)[0])] * 2
    assert path_mtus(hosts) == wide
    with nothing_in_clear(lab):
        with dropping(lab, 1000):
            began = time.monotonic()
            assert stream(one, two) == STREAM
            assert time.monotonic() - began < 10
            eventually(lambda: large_ping(one, two) and large_ping(two, one), 10, "large packets pass")
            # 60 bytes are WireGuard's, which sends multiples of 16.
            eventually(lambda: path_mtus(hosts) == [928, 928], 5, "the members say how wide the path is")
            one.run(["meshd", "status"])  # it is no problem
            # What the route has, the next daemon takes up.
            kill_daemon(one)
            one.run(["meshd", "sync"])
            assert path_mtus(hosts) == [928, 928]
        eventually(lambda: large_ping(one, two) and path_mtus(hosts) == wide, 15, "the path has grown")
