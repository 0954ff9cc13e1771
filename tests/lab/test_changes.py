"""What a host publishes changes, or what WireGuard learns of it: the others follow, and nothing is reset."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshd.daemon import hints
from meshd.daemon.follow import PATIENCE
from meshd.lab import network
from meshd.lab.hosts import Lab, LabHost
from meshd.state.directory import State
from tests.lab.conftest import (
    assemble,
    eventually,
    full_reach,
    listening,
    log,
    members,
    nothing_in_clear,
    overlay,
    peers,
    ping,
    serf,
    settled,
)
from tests.lab.faults import new_key, readdress, rewritten
from tests.lab.test_bad_input import listener
from tests.lab.traffic import traffic, unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Seconds until all have a new key, between two full reconciles without a hint, and until all have a new address.
LEARNED, FULL, MOVED = 5.0, 10.0, 5.0
# Seconds for which wireguard-go sends nothing from an address that is gone, until its next handshake; and some more.
SILENT = 25.0
# Seconds that WireGuard waits before it repeats a handshake.
CROSSED = 5.0
LOSE = """
table bridge lose {
    chain forward {
        type filter hook forward priority 0;
        udp dport 51820 counter drop
    }
}
"""


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    return assemble(lab, docker=2, plain=1)


def key(host: LabHost) -> str:
    return host.run(["wg", "show", "wg0", "public-key"]).stdout.strip()


def test_new_key_after_restart_reaches_all(lab: Lab, hosts: list[LabHost]) -> None:
    """A new key is known by the record, not by an event of Serf.

    Mostly it raises none at all for a restart this quick: a leave and a join in one window are nothing.
    """
    one, two, three = hosts
    before = key(two)
    with nothing_in_clear(lab, *hosts):
        new_key(two)
        eventually(lambda: key(two) != before, 5, "its device has the new key")
        # The restart itself takes as long as the machine is busy.
        begun = time.monotonic()
        after = key(two)
        eventually(lambda: peers(one) == sorted([after, key(three)]), LEARNED, "one has the new key, and no old one")
        eventually(lambda: peers(three) == sorted([after, key(one)]), LEARNED, "so has three")
        took = time.monotonic() - begun
        eventually(lambda: ping(one, overlay(two)) and ping(two, overlay(three)), 2, "traffic goes on")
    print(f"a new key is everywhere after {took:.2f} s")  # noqa: T201
    assert took < LEARNED
    eventually(lambda: settled(hosts), 40, "all agree")


def test_simultaneous_first_handshakes_do_not_collide(hosts: list[LabHost]) -> None:
    """Two hosts that add each other at once complete a handshake without the 5 s that crossing ones lose."""
    one, two, _ = hosts
    keys = {one: key(two), two: key(one)}
    took = []
    for _ in range(16):
        for host, other in keys.items():
            host.run(["wg", "set", "wg0", "peer", other, "remove"])
        begun = time.monotonic()
        for host in keys:
            assert hints.wake(State(host.directory / "meshd").socket, "test", "serf")
        eventually(lambda: ping(one, overlay(two)) and ping(two, overlay(one)), 10, "they reach each other")
        took.append(time.monotonic() - begun)
    print(f"reach after two hosts have met: at most {max(took):.2f} s")  # noqa: T201
    assert max(took) < CROSSED
    eventually(lambda: all(keepalives(host) == {"25"} for host in keys), 2, "and both keep at it")


def test_lost_first_handshake_is_started_again_early(lab: Lab, hosts: list[LabHost]) -> None:
    """A first handshake that was lost is started again before WireGuard itself would do so, after 5 s."""
    one, two, _ = hosts
    lab.switch.run(["nft", "-f", "-"], text=LOSE)
    try:
        for host, other in ((one, key(two)), (two, key(one))):
            host.run(["wg", "set", "wg0", "peer", other, "remove"])
            assert hints.wake(State(host.directory / "meshd").socket, "test", "serf")
        eventually(lambda: lost_packets(lab) >= 2, 5, "the first message of each is lost")
    finally:
        lab.switch.run(["nft", "delete", "table", "bridge", "lose"])
    # A ping that waits for the tunnel is lost when its peer is re-created, and says so after 2 s: it is no clock.
    took = eventually(lambda: handshake(one, two) and handshake(two, one), 10, "both have a handshake")
    print(f"a handshake after the first messages were lost: {took:.2f} s")  # noqa: T201
    assert took < CROSSED - 2
    assert ping(one, overlay(two))
    assert ping(two, overlay(one))
    eventually(lambda: all(keepalives(host) == {"25"} for host in (one, two)), 2, "and both keep at it")


def handshake(host: LabHost, other: LabHost) -> bool:
    rows = dict(line.split() for line in host.run(["wg", "show", "wg0", "latest-handshakes"]).stdout.splitlines())
    return rows.get(key(other), "0") != "0"


def lost_packets(lab: Lab) -> int:
    rules = lab.switch.run(["nft", "list", "table", "bridge", "lose"]).stdout
    return int(rules.partition("counter packets ")[2].split()[0])


def keepalives(host: LabHost) -> set[str]:
    rows = host.run(["wg", "show", "wg0", "persistent-keepalive"]).stdout.splitlines()
    return {row.split()[1] for row in rows}


def endpoint(host: LabHost, of: str) -> str:
    rows = dict(line.split() for line in host.run(["wg", "show", "wg0", "endpoints"]).stdout.splitlines())
    return rows[of]


def test_learned_endpoint_is_kept(lab: Lab, hosts: list[LabHost]) -> None:
    """An endpoint that WireGuard has learned is kept by every reconcile while its handshake is fresh."""
    one, two, _ = hosts
    other = key(two)
    eventually(lambda: endpoint(one, other) == f"{two.address}:51820", 5, "the endpoint is the published one")
    before = len(log(one))
    with nothing_in_clear(lab, *hosts), rewritten(lab, two, 40000):
        # What the host itself sends is what moves its tunnel.
        assert ping(two, overlay(one))
        assert endpoint(one, other) == f"{two.address}:40000"
        until = time.monotonic() + FULL + 2
        while time.monotonic() < until:
            assert one.run(["meshd", "sync"]).stdout == "no changes\n"
            assert ping(one, overlay(two)), "one sends to where it has learned"
            assert endpoint(one, other) == f"{two.address}:40000"
            time.sleep(1)
    assert log(one)[before:] == "", "no pass of the daemon has touched it either"
    assert ping(two, overlay(one))
    assert endpoint(one, other) == f"{two.address}:51820", "and it moves back in the same way"


def identity(host: LabHost) -> list[str]:
    """What no setting changes: a host's key, and its container with all that it is."""
    return [key(host), *host.run(["docker", "inspect", "-f", "{{.Id}} {{.State.StartedAt}}", "box"]).stdout.split()]


def test_settings_change_under_traffic(lab: Lab, hosts: list[LabHost]) -> None:
    """`up` gives a host another keepalive, MTU and list of what is allowed, and no packet is lost (netmaker#2391)."""
    one, two, _ = hosts
    eventually(lambda: settled(hosts), 90, "all agree before")
    before = identity(one)
    with listening(one, 9100), nothing_in_clear(lab, *hosts), traffic(one, two):
        assert not reaches(two, one, 9100)
        done = one.run(["meshd", "up", "--keepalive", "10", "--mtu", "1380", "--allow", "tcp/9100"])
        assert (
            "Warning: the Docker network ovl0 is mtu 1420 instead of 1380, but containers are attached" in done.stderr
        )
        assert keepalives(one) == {"10"}
        assert " mtu 1380 " in one.run(["ip", "-o", "link", "show", "wg0"]).stdout
        assert reaches(two, one, 9100)
        one.run(["meshd", "up", "--keepalive", "25", "--mtu", "auto", "--allow", "none"])
        assert keepalives(one) == {"25"}
        assert not reaches(two, one, 9100)
    assert identity(one) == before
    assert one.run(["meshd", "plan"]).stdout == "no changes\n", "all is as before"


def reaches(host: LabHost, other: LabHost, port: int) -> bool:
    return host.run(["busybox", "nc", "-w", "1", overlay(other), str(port)], check=False, text="").returncode == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--gossip-port 7998", "gossip's TCP port 7998 on 10.10.10.102 is not free"),
        ("--wireguard-port 7998", "WireGuard's UDP port 7998 on 0.0.0.0 is not free"),
        ("--keepalive 5 --bind 10.10.10.199", "this host has no address 10.10.10.199"),
        ("--advertise 127.0.0.1", "--advertise 127.0.0.1 is no address of a host"),
        ("--mtu 100", "--mtu must be 576 to 65440, not 100"),
        ("--name other", "--name is fixed when a host joins: 'meshd leave, then meshd join' gives it another value"),
        ("--subnet 172.20.9.0/24", "--subnet is fixed when a host joins: 'meshd renumber' gives it another value"),
        ("--keepalive 5 --wireguard-port 7997", "WireGuard's UDP port 7997 on :: is not free"),
    ],
)
def test_wrong_settings_change_nothing(hosts: list[LabHost], options: str, error: str) -> None:
    """Settings that would not do are refused, and everything is as it was before."""
    _, two, _ = hosts

    def facts() -> list[str]:
        files = "cat /var/lib/meshd/settings.json /var/lib/meshd/underlay.json"
        commands = (files, "pgrep -a serf", "wg showconf wg0 | sort")
        return [two.run(["sh", "-c", command]).stdout for command in commands]

    with listening(two, 7998), listener(two, "SOCK_DGRAM", "0.0.0.0", 7998), listener(two, "SOCK_DGRAM", "::", 7997):
        before = facts()
        done = two.run(["meshd", "up", *options.split()], check=False)
        assert done.returncode != 0
        assert error in done.stderr
        assert "not undone" not in done.stderr
        assert facts() == before
    assert full_reach(hosts)


NFT = """#!/bin/sh
text=$(cat)
case $text in *9177*) echo "no room" >&2; exit 1;; esac
printf '%s\\n' "$text" | exec /run/nft "$@"
"""


def test_settings_that_fail_when_they_are_set_are_undone(hosts: list[LabHost]) -> None:
    """Of settings that failed in the middle nothing is left, and no packet is lost."""
    _, two, three = hosts

    def facts() -> list[str]:
        commands = (
            "cat /var/lib/meshd/settings.json",
            "pgrep -a serf",
            "wg showconf wg0 | sort",
            "nft -s list ruleset",
        )
        return [two.run(["sh", "-c", command]).stdout for command in commands]

    before = facts()
    with unbroken([(two, three)]) as wrong:
        two.run(["sh", "-c", 'cp "$(which nft)" /run/nft && cat > /run/fails && chmod +x /run/fails'], text=NFT)
        two.run(["sh", "-c", 'mount --bind /run/fails "$(which nft)"'])
        try:
            done = two.run(["meshd", "up", "--keepalive", "5", "--allow", "tcp/9177"], check=False)
        finally:
            two.run(["sh", "-c", 'umount "$(which nft)"; rm /run/nft /run/fails'])
    assert wrong == []
    assert done.returncode == 1
    assert "no room" in done.stderr
    assert "not undone" not in done.stderr
    assert facts() == before
    assert two.run(["meshd", "plan"]).stdout == "no changes\n"


def follows(host: LabHost, moved: LabHost, address: str) -> bool:
    endpoints = host.run(["wg", "show", "wg0", "endpoints"]).stdout
    return f"{address}:51820" in endpoints and ping(host, overlay(moved))


SECOND = "10.10.20.2"


@contextmanager
def second_uplink(lab: Lab, host: LabHost) -> Iterator[None]:
    """Give a host another network card, with a worse default route. Its router leads nowhere until it forwards."""
    enter = ["nsenter", f"--target={lab.switch.pid}", "--net", "ip"]
    cable = f"link add second master {network.BRIDGE} type veth peer name eth1 netns {host.pid}"
    for command in (cable, "link set second up", f"addr add 10.10.20.1/24 dev {network.BRIDGE}"):
        subprocess.run([*enter, *command.split()], check=True)
    quiet = [f"net.ipv4.conf.{name}.send_redirects=0" for name in ("all", network.BRIDGE)]
    lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=0", *quiet])
    up = f"ip addr add {SECOND}/24 dev eth1; ip link set eth1 up; ip route add default via 10.10.20.1 metric 500"
    host.run(["sh", "-ec", up])
    try:
        yield
    finally:
        lab.switch.run(["ip", "link", "del", "second"])
        lab.switch.run(["ip", "addr", "del", "10.10.20.1/24", "dev", network.BRIDGE])


def test_host_leaves_its_link_only_when_it_has_to(lab: Lab, hosts: list[LabHost]) -> None:
    """A worse uplink is taken only after 10 s, and if a member answers there; the host goes back when it can.

    (ZeroTierOne#2427, talos#9030, k3s#8059.)
    """
    one, two, three = hosts
    eventually(lambda: settled(hosts), 40, "all agree before")
    home, before = str(two.address), len(log(two))
    with second_uplink(lab, two):
        with nothing_in_clear(lab, *hosts):
            readdress(two, home, home, without=5.0)
            eventually(lambda: full_reach(hosts), 10, "all reach each other again")
            eventually(lambda: settled(hosts), 40, "nobody is lost")
        assert "underlay address is now" not in log(two)[before:], "it has stayed"

        lab.switch.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        two.run(["ip", "addr", "del", f"{home}/24", "dev", "eth0"])
        took = eventually(lambda: "underlay address is now" in log(two)[before:], 30, "it moves in the end")
        assert took > PATIENCE - 1
        eventually(lambda: all(follows(h, two, SECOND) for h in (one, three)), 3 * MOVED, "the others follow")
        begun = time.monotonic()
        two.run(["sh", "-ec", f"kill -KILL $(cat /var/lib/meshd/agent.pid); ip addr add {home}/24 dev eth0"])
        two.run(["ip", "route", "add", "default", "via", str(network.GATEWAY)])
        two.run(["meshd", "up"])
        eventually(lambda: f"is now {home} of eth0" in log(two)[before:], 30, "another daemon knows the home")
        assert time.monotonic() - begun > PATIENCE - 1
        eventually(lambda: all(follows(h, two, home) for h in (one, three)), 3 * MOVED, "and back")
    eventually(lambda: all(serf_at(host, two) == {f"{home}:7946"} for host in hosts), 90, "Serf believes it at last")


def serf_at(host: LabHost, other: LabHost) -> set[str]:
    """Where the Serf of a host has another one alive."""
    listed = json.loads(serf(host, "members", "-status=alive", f"-name={other.name}", "-format=json"))
    return {member["addr"] for member in listed["members"] or ()}


def test_new_underlay_address_reaches_all(lab: Lab, hosts: list[LabHost]) -> None:
    """The others follow a host to another underlay address by its announcement; Serf itself takes some 40 s."""
    one, two, three = hosts
    eventually(lambda: settled(hosts), 40, "all agree before")
    with nothing_in_clear(lab, *hosts):
        begun = time.monotonic()
        # As DHCP does it. The daemon looks before the new one is there, and nobody tells it of that.
        readdress(three, str(three.address), "10.10.10.133", without=0.5)
        eventually(
            lambda: all(follows(host, three, "10.10.10.133") for host in (one, two)),
            MOVED,
            "their tunnels have moved and work",
        )
        took = time.monotonic() - begun
    print(f"a host at another address is reached after {took:.2f} s")  # noqa: T201
    eventually(lambda: settled(hosts), 90, "Serf believes it at last")


def test_ports_and_addresses_change(lab: Lab, hosts: list[LabHost]) -> None:
    """`up` gives a host other ports and another address; the others learn of it (moby#31135)."""
    one, two, _ = hosts
    before, home, other = identity(two), str(two.address), "10.10.10.142"

    def at(endpoint: str) -> bool:
        return bool(members(one)["barge2"]["endpoint"] == endpoint)

    with nothing_in_clear(lab, *hosts):
        ports = {"--wireguard-port": 51999, "--gossip-port": 7999, "--rpc-port": 7399}
        said = two.run(["meshd", "up", *(str(word) for option in ports.items() for word in option)]).stderr
        # Also where Serf still has a host at an address that is silent now.
        assert "3/3 hosts ready" in said, said + log(two)
        eventually(lambda: full_reach(hosts), MOVED, "all reach each other by the other port")
        assert endpoint(one, key(two)) == f"{home}:51999"
        assert two.run(["wg", "show", "wg0", "listen-port"]).stdout == "51999\n"
        two.run(["ip", "addr", "add", f"{other}/24", "dev", "eth0"])
        said = two.run(["meshd", "up", "--bind", other, "--wireguard-port", "51820"]).stderr
        eventually(lambda: full_reach(hosts), MOVED, "all reach each other at the other address")
        assert "3/3 hosts ready" in said, said + log(two)
        assert at(f"{other}:51820")
        # Nobody's Serf believes so many addresses so soon: the command would wait for them.
        back = ["--gossip-port", "7946", "--rpc-port", "7373", "--timeout", "3"]
        two.run(["meshd", "up", "--bind", "auto", "--advertise", other, *back])
        eventually(lambda: full_reach(hosts), MOVED, "and still")
        assert at(f"{other}:51820")
        two.run(["meshd", "up", "--advertise", "auto", "--timeout", "3"])
        eventually(lambda: full_reach(hosts), MOVED, "all is as before")
        eventually(lambda: at(f"{home}:51820"), MOVED, "it is named at home")
        two.run(["ip", "addr", "del", f"{other}/24", "dev", "eth0"])
        eventually(lambda: full_reach(hosts), SILENT, "wireguard-go sends from another address at last")
    assert identity(two) == before
