"""Other people's hands: what somebody else undoes is put right by itself, soon, and logged with how it was seen."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, ip_network

import pytest

from meshd.lab import network
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import (
    SERVER,
    assemble,
    eventually,
    invitation,
    join,
    log,
    nothing_in_clear,
    overlay,
    peers,
    ping,
    rtt,
    run_box,
    run_container,
    tcpdump,
)
from tests.lab.faults import FLUSHED, FOUND, HANDS, STATE, restart_docker
from tests.lab.promises import seen
from tests.lab.traffic import lost_pings

pytestmark = [pytest.mark.root, pytest.mark.lab]

# What guides to hardening set for the links to come, at its strictest.
HARDENED = {"forwarding": 0, "rp_filter": 1, "arp_ignore": 2, "arp_announce": 2, "arp_filter": 1}
HARDENED |= {"accept_redirects": 0, "secure_redirects": 0, "send_redirects": 0, "shared_media": 0, "log_martians": 1}
# What a pass itself may take on a machine that is busy with other tests, where it has to wait for the timer.
SLACK = 0.5
# Within this what the daemon is told of is put right also where others take both cores; the log says what told it.
BUSY = 5.0


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    return assemble(lab, docker=2)


@pytest.fixture(scope="module")
def plain(lab: Lab, hosts: list[LabHost]) -> LabHost:
    """One without Docker, and so without its bridge, whose route to all of the overlay stops what leaves as well."""
    host = lab.power_on("barge3")
    join(host, hosts[1], invitation(hosts[0]), "--no-docker")
    return host


@pytest.mark.parametrize("what", HANDS)
def test_drift_is_repaired(lab: Lab, hosts: list[LabHost], what: str) -> None:
    """What someone else undoes on a host is repaired in time and logged."""
    one, two = hosts
    _put_right(lab, one, two, what)
    assert rtt(one, "box", overlay(two, 1)), "a container reaches the other side"
    assert rtt(two, "box", overlay(one, 1)), "and is reached from there"


@pytest.mark.parametrize("what", [what for what, hand in HANDS.items() if not hand.docker and hand.limit != FOUND])
def test_drift_is_repaired_without_docker(lab: Lab, hosts: list[LabHost], plain: LabHost, what: str) -> None:
    """What someone else undoes on a host without Docker is repaired in time and logged."""
    _put_right(lab, plain, hosts[1], what)


def _put_right(lab: Lab, one: LabHost, two: LabHost, what: str) -> None:
    hand, hosts = HANDS[what], [one, two]
    _settle(hosts)
    key, before = one.run(["wg", "show", "wg0", "public-key"]).stdout, len(log(one))
    with nothing_in_clear(lab, *hosts):
        begun = time.time()
        hand.on(one, two)
        eventually(lambda: re.search(r"INFO (add|set|remove) ", log(one)[before:]), hand.limit + 5, "it is logged")
        eventually(lambda: one.run(["meshd", "plan"]).stdout == "no changes\n", 5, "nothing is left to be changed")
        eventually(lambda: ping(one, overlay(two, 1)) and ping(two, overlay(one)), 5, "they reach each other")
    lines = [line for line in log(one)[before:].splitlines() if re.search(r"INFO (add|set|remove) ", line)]
    took = max(map(_logged_at, lines)) - begun
    print(f"{what}: {took:.2f} s, {lines[0].partition(' INFO ')[2]}")  # noqa: T201
    assert took <= hand.limit + (SLACK if hand.limit == FOUND else 0)
    assert all("(seen by " in line for line in lines)
    assert any(re.search(rf" INFO {hand.what}.* \(seen by .*{hand.seen}", line) for line in lines), lines
    assert one.run(["wg", "show", "wg0", "public-key"]).stdout == key
    if what in FLUSHED and (one.directory / "docker").exists():
        restart_docker(lab, one, "TERM")  # its own rules come back with it alone


def _settle(hosts: Sequence[LabHost]) -> None:
    eventually(lambda: all(host.run(["meshd", "plan"]).stdout == "no changes\n" for host in hosts), 20, "settled")
    eventually(lambda: ping(hosts[0], overlay(hosts[1], 1)), 20, "they reach each other")
    # Hints of what was before come in for a moment.
    time.sleep(0.5)


def _logged_at(line: str) -> float:
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()


@pytest.mark.parametrize("link", ["wg0", "ovl0"])
def test_link_made_anew_on_a_hardened_host_forwards(lab: Lab, hosts: list[LabHost], link: str) -> None:
    """Where hardening lets no new link forward, containers still reach each other by a link that is made anew."""
    one, two = hosts
    _settle(hosts)
    paths = [f"net.ipv4.conf.default.{name}" for name in HARDENED]
    found, before = one.run(["sysctl", *paths]).stdout, len(log(one))
    one.run(["sysctl", "-qw", *map("{}={}".format, paths, HARDENED.values())])
    try:
        with nothing_in_clear(lab, *hosts):
            begun = time.time()
            one.run(["ip", "link", "del", link])
            eventually(lambda: rtt(one, "box", overlay(two, 1)), 10, "a container reaches the other side")
            eventually(lambda: rtt(two, "box", overlay(one, 1)), 5, "and is reached from there")
        eventually(lambda: f"add sysctl net/ipv4/conf/{link}/forwarding = 1" in log(one)[before:], 5, "it is logged")
        (line,) = re.findall(rf".*add sysctl net/ipv4/conf/{link}/forwarding = 1.*", log(one)[before:])
        assert _logged_at(line) - begun <= BUSY
        assert one.run(["sysctl", "-n", f"net.ipv4.conf.{link}.rp_filter"]).stdout == "1\n", "it is as hardened"
    finally:
        one.run(["sysctl", "-q", "-p", "-"], text=found)


@pytest.mark.parametrize("number", ["TERM", "KILL"])
def test_dockerd_restart_keeps_network(lab: Lab, hosts: list[LabHost], number: str) -> None:
    """What needs no engine goes on without it, and what somebody undoes meanwhile is put right with it or without."""
    one, two = hosts
    _settle(hosts)
    before, network = len(log(one)), _network(one)
    flow = two.popen(["docker", "exec", "box", "ping", "-i", "0.05", overlay(one)], stdout=subprocess.PIPE)
    with nothing_in_clear(lab, *hosts):
        one.run(["sh", "-ec", f"kill -{number} $(cat /run/docker.pid); iptables -w -D DOCKER-USER 1"])
        one.run(["ip", "link", "set", "ovl0", "mtu", "1300"])
        restart_docker(lab, one)
        eventually(lambda: rtt(two, "box", overlay(one, 1)), 10, "its container is reached")
        eventually(lambda: rtt(one, "box", overlay(two, 1)), 5, "and reaches others")
        eventually(lambda: one.run(["meshd", "plan"]).stdout == "no changes\n", 10, "nothing is to be changed")
    two.run(["pkill", "-INT", "-x", "ping"])
    said = flow.communicate(timeout=10)[0]
    assert lost_pings(said, 2) == "", "the host itself is reached all the while"
    assert said.count("seq=") > 20
    assert _network(one) == network, "it is the same network"
    assert "set link ovl0" in log(one)[before:]
    assert "add iptables rule filter DOCKER-USER" in log(one)[before:]


def _network(host: LabHost) -> str:
    return host.run(["docker", "network", "inspect", "ovl0", "-f", "{{.Id}}"]).stdout


def test_foreign_masquerade_changes_no_source(lab: Lab, hosts: list[LabHost]) -> None:
    """A masquerade rule of someone else changes no source address in the overlay."""
    one, two = hosts
    _settle(hosts)
    one.run(["iptables", "-w", "-t", "nat", "-I", "POSTROUTING", "-j", "MASQUERADE"])
    try:
        dump = tcpdump(two, "wg0", f"icmp[icmptype] == icmp-echo and src {overlay(one, 1)}")
        with nothing_in_clear(lab, *hosts):
            assert rtt(one, "box", overlay(two, 1))
        assert f"IP {overlay(one, 1)} > {overlay(two, 1)}" in dump.communicate(timeout=10)[0]
    finally:
        one.run(["iptables", "-w", "-t", "nat", "-D", "POSTROUTING", "-j", "MASQUERADE"])


# In a shell, the handle of the rule that keeps sources, which Docker's MASQUERADE rewrites without it.
EXEMPTION = "$(nft -a list chain ip meshd_wg0 postrouting | awk '/snat to/ {print $NF}')"
# Answers each line with the address that it came from.
ANSWER = """
import socket, sys, threading
def answer(connection):
    while connection.recv(99):
        connection.sendall(connection.getpeername()[0].encode())
def serve():
    while True: threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
server = socket.create_server(("", 7000))
threading.Thread(target=serve, daemon=True).start()
print("here", flush=True)
sys.stdin.read()
"""
# Sends each line of its input, and prints what comes back.
CALL = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000), 5)
print("here", flush=True)
for line in sys.stdin:
    try:
        connection.sendall(line.encode())
        print(connection.recv(99).decode() or "ended", flush=True)
    except ConnectionError:
        print("ended", flush=True)
"""


def test_flow_that_began_without_its_rule_gets_its_own_source(lab: Lab, hosts: list[LabHost]) -> None:
    """A ping goes on with the container's address, a TCP connection ends, and what was right goes on."""
    one, two = hosts
    _settle(hosts)
    before, target = len(log(one)), overlay(two, 1)
    with nothing_in_clear(lab, *hosts), _in_box(two, ANSWER), _in_box(one, CALL, target) as kept, ExitStack() as stack:
        assert _said(kept) == overlay(one, 1)
        with _daemon_held(one):
            one.run(["sh", "-ec", f"nft delete rule ip meshd_wg0 postrouting handle {EXEMPTION}"])
            pings = one.popen(["docker", "exec", "box", "ping", "-i", "0.1", target], stdout=subprocess.DEVNULL)
            stack.callback(pings.wait, timeout=10)
            stack.callback(one.run, ["pkill", "-INT", "-x", "ping"])
            assert _source(two) == overlay(one), "the ping has the host's source, or this test shows nothing"
            lost = stack.enter_context(_in_box(one, CALL, target))
            assert _said(lost) == overlay(one), "and so has a TCP connection"
        begun = time.time()
        eventually(lambda: "another rule had rewritten" in log(one)[before:], 5, "it is logged")
        (line,) = re.findall(r".* ended \d+ connections whose source another rule had rewritten", log(one)[before:])
        assert _logged_at(line) - begun <= BUSY
        assert _source(two) == overlay(one, 1), "the ping goes on with its own source"
        assert _said(lost) == "ended"
        assert _said(kept) == overlay(one, 1)


@contextmanager
def _daemon_held(host: LabHost) -> Iterator[None]:
    """Let a host's daemon do nothing while the block runs."""
    host.run(["sh", "-ec", f"kill -STOP $(cat {STATE}/agent.pid)"])
    try:
        yield
    finally:
        host.run(["sh", "-ec", f"kill -CONT $(cat {STATE}/agent.pid)"])


@contextmanager
def _in_box(host: LabHost, script: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a script in the network of a host's container that has said `here`; it ends with its input."""
    box = host.run(["docker", "inspect", "-f", "{{.State.Pid}}", "box"]).stdout.strip()
    command = ["nsenter", f"--target={box}", "--net", sys.executable, "-I", "-c", script, *arguments]
    process = host.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
    finally:
        process.communicate(timeout=10)


def _said(caller: "subprocess.Popen[str]") -> str:
    """Give what a caller is answered to one more line."""
    assert caller.stdin is not None
    assert caller.stdout is not None
    caller.stdin.write("hello\n")
    caller.stdin.flush()
    return caller.stdout.readline().strip()


def _source(host: LabHost) -> str:
    """Give the source of a ping that comes in by the tunnel now."""
    line = tcpdump(host, "wg0", "inbound and icmp[icmptype] == icmp-echo").communicate(timeout=25)[0]
    return line.partition("IP ")[2].partition(" >")[0]


def test_removed_docker_network_is_made_again(lab: Lab, hosts: list[LabHost]) -> None:
    """A removed Docker network is made again at once."""
    one, two = hosts
    _settle(hosts)
    before = len(log(one))
    with nothing_in_clear(lab, *hosts):
        one.run(["docker", "rm", "-f", "box"])
        begun = time.time()
        one.run(["docker", "network", "rm", "ovl0"])
        eventually(lambda: "add docker network ovl0" in log(one)[before:], 5, "it is made again")
        (line,) = [line for line in log(one)[before:].splitlines() if "add docker network" in line]
        assert _logged_at(line) - begun <= BUSY
        # The bridge changes with it, so that the kernel may tell of it before Docker does.
        assert re.search(r"seen by .*(docker: network ovl0 destroy|netlink: link ovl0)", line)
        eventually(lambda: one.run(["docker", "network", "ls", "-q", "-f", "name=ovl0"]).stdout, 5, "it is there")
        run_box(one)
        assert rtt(two, "box", overlay(one, 1))


@pytest.mark.parametrize("address", ["172.20.250.9", "172.20.102.77"])
def test_container_outside_of_its_hosts_subnet_is_named(lab: Lab, hosts: list[LabHost], address: str) -> None:
    """Docker takes any address of the overlay. `status` and the log name the container and an address that would do."""
    one, two = hosts
    _settle(hosts)
    before, counted = len(log(one)), _dropped(one)
    theirs = IPv4Address(address) in IPv4Network(f"{overlay(two)}/24")
    said = f"container outside has the address {address} outside of this host's subnet {overlay(one)}/24"
    said += f", in that of {two.name}: " if theirs else ": "
    try:
        with nothing_in_clear(lab, *hosts):
            run_container(one, "outside", "--ip", address, "meshd/serf", "sleep", "1000")
            assert not rtt(one, "outside", overlay(two, 1)), "meshd drops what it sends"
            done = one.run(["meshd", "status"], check=False)
            (line,) = [line.strip() for line in done.stdout.splitlines() if said in line]
            assert done.returncode == 1
            if not theirs:  # those the kernel drops first where rp_filter is on
                assert _dropped(one) > counted, "which is counted"
                assert re.search(r"\n  foreign_source: \d+ packets of containers", done.stdout)
            eventually(lambda: f"WARNING {line}" in log(one)[before:], FOUND + 5, "the log says so")
        one.run(["docker", "rm", "-f", "outside"])
        found = re.search(r"with --ip (\S+), which is free", line)
        assert found
        run_container(one, "outside", "--ip", found[1], "meshd/serf", "sleep", "1000")
        assert rtt(one, "outside", overlay(two, 1)), "that address does"
        assert one.run(["meshd", "status"]).returncode == 0, "what was dropped before is no problem"
        eventually(lambda: f"no longer: {line}" in log(one)[before:], FOUND + 5, "the log says that it is over")
    finally:
        one.run(["docker", "rm", "-f", "outside"])


def _dropped(host: LabHost) -> int:
    """Return how many packets of containers with a source outside of the host's subnet were dropped."""
    facts = json.loads(host.run(["meshd", "status", "--json"], check=False).stdout)
    return int(facts["dropped"].get("foreign_source", 0))


def test_containers_come_and_go_without_changes(lab: Lab, hosts: list[LabHost]) -> None:
    """Containers that come and go change no peer and no route."""
    one, two = hosts
    _settle(hosts)
    before = len(log(one))
    with nothing_in_clear(lab, *hosts):
        for number in range(5):
            run_container(one, f"come{number}", "meshd/serf", "sleep", "1000")
            assert rtt(two, "box", overlay(one, 2))
            one.run(["docker", "rm", "-f", f"come{number}"])
    assert log(one)[before:] == ""
    assert len(peers(one)) == 2


def test_bridge_mac_address_survives_container_removal(hosts: list[LabHost]) -> None:
    """A bridge left to itself has the lowest MAC address of its ports, and all containers lose it with that port."""
    one, two = hosts
    _settle(hosts)
    names = [f"come{number}" for number in range(3)]
    for name in names:
        run_container(one, name, "meshd/serf", "sleep", "1000")
    assert all(rtt(one, name, overlay(two, 1)) for name in ("box", *names))
    for name in names:
        one.run(["docker", "rm", "-f", name])
        for left in ("box", *names[names.index(name) + 1 :]):
            assert rtt(one, left, overlay(two, 1)), f"{left} goes on without {name}"


# --- what takes the overlay ------------------------------------------------------------------------------------------


@contextmanager
def another_vpn(host: LabHost) -> Iterator[None]:
    """Send all that leaves a host another way, as a VPN does that is its default route (tailscale#13367, #6231)."""
    host.run(["ip", "route", "add", "throw", str(ip_network(f"{network.GATEWAY}/24", strict=False)), "table", "52"])
    host.run(["ip", "route", "add", "default", "via", str(network.GATEWAY), "table", "52"])
    host.run(["ip", "rule", "add", "priority", "5270", "lookup", "52"])
    try:
        yield
    finally:
        host.run(["ip", "rule", "del", "priority", "5270"])
        host.run(["ip", "route", "flush", "table", "52"])


def rules(host: LabHost) -> str:
    return host.run(["ip", "rule"]).stdout


@pytest.mark.parametrize("docker", [True, False], ids=["with Docker", "without Docker"])
def test_another_vpn_does_not_take_the_overlay(lab: Lab, hosts: list[LabHost], plain: LabHost, docker: bool) -> None:
    """A policy rule and a default route of another VPN take no packet of the overlay for more than a moment."""
    one, two = hosts[0] if docker else plain, hosts[1]
    _settle([one, two])
    before, untouched = len(log(one)), rules(one)
    with nothing_in_clear(lab, one, two):
        begun = time.time()
        with another_vpn(one):
            eventually(lambda: "to 172.20.0.0/16 lookup main" in rules(one), 5, "meshd's rule is there")
            eventually(lambda: "add policy rule 5269" in log(one)[before:], 5, "and is logged")
            (line,) = re.findall(r".* INFO add policy rule 5269: .*", log(one)[before:])
            assert _logged_at(line) - begun <= BUSY
            assert re.search(r"\(seen by .*netlink: (policy rule 5270 changed|route .* changed in table 52)", line)
            assert ping(one, overlay(two, 1))
            assert ping(two, overlay(one))
            assert not docker or (rtt(one, "box", overlay(two, 1)) and rtt(two, "box", overlay(one, 1)))
            assert one.run(["meshd", "status"], check=False).returncode == 0
        eventually(lambda: rules(one) == untouched, 5, "it has gone with the other one")


def test_down_removes_policy_rule(hosts: list[LabHost], plain: LabHost) -> None:
    """`meshd down` leaves the rules as they were before meshd, and `meshd up` puts its own first again."""
    _settle([plain, hosts[1]])
    with another_vpn(plain):
        others = [line for line in rules(plain).splitlines() if "172.20.0.0/16" not in line]
        eventually(lambda: "5269:" in rules(plain), 5, "meshd's rule is there")
        plain.run(["meshd", "down"])
        assert rules(plain).splitlines() == others
        plain.run(["meshd", "up"])
        eventually(lambda: ping(plain, overlay(hosts[1], 1)), 10, "a container is reached again")
        assert "5269:" in rules(plain)


@pytest.mark.parametrize(
    ("kind", "taking", "what"),
    [
        ("route", "172.20.102.0/25 dev eth0", "the route 172.20.102.0/25 dev eth0 takes packets"),
        (
            "rule",
            "priority 100 to 172.20.102.0/24 prohibit",
            "the policy rule 100 (from all to 172.20.102.0/24 prohibit)",
        ),
    ],
    ids=["a longer route", "a rule that refuses"],
)
def test_what_takes_the_overlay_is_named(lab: Lab, hosts: list[LabHost], kind: str, taking: str, what: str) -> None:
    """What meshd has to leave alone, `status` and the log name, with the command that helps."""
    one, two = hosts
    _settle(hosts)
    before = len(log(one))
    with nothing_in_clear(lab, *hosts):
        begun = time.time()
        one.run(["ip", kind, "add", *taking.split()])
        try:
            eventually(lambda: what in log(one)[before:], 5, "it is logged")
            (line,) = [line for line in log(one)[before:].splitlines() if what in line]
            assert _logged_at(line) - begun <= BUSY
            assert not rtt(one, "box", overlay(two, 1)), "there is a reason to"
            done = one.run(["meshd", "status"], check=False)
            assert (done.returncode, what in done.stdout) == (1, True)
            (advice,) = re.findall(rf"'(ip {kind} del [^']*)'", done.stdout)
            one.run(advice.split())
            eventually(lambda: rtt(one, "box", overlay(two, 1)), 5, "the other side is reached again")
            eventually(lambda: f"no longer: {what}" in log(one)[before:], 5, "the log says so")
        finally:
            one.run(["ip", kind, "del", *taking.split()], check=False)
    assert one.run(["meshd", "status"]).returncode == 0


# --- published ports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy", [True, False], ids=["userland proxy", "no userland proxy"])
def test_published_port_is_reached_from_the_overlay(lab: Lab, hosts: list[LabHost], proxy: bool) -> None:
    """By its own host's addresses with --allow where Docker's userland proxy answers, else as it is (moby#27817)."""
    one, two = hosts
    _settle(hosts)
    run_container(one, "web", "-p", "8080:80", "--restart", "always", "meshd/serf", "sh", "-c", SERVER)
    addresses = [f"{address}:8080" for address in (one.address, overlay(one))]
    try:
        if not proxy:
            restart_docker(lab, one, "TERM", options=["--userland-proxy=false"])
        eventually(lambda: seen(two, addresses[1]) == overlay(two, 1), 20, "a container elsewhere is seen as itself")
        assert seen(two, addresses[0]) == str(two.address), "by the underlay it is its host"
        # After a restart Docker gives the two containers their addresses in any order.
        own = one.run(["docker", "inspect", "-f", "{{.NetworkSettings.Networks.ovl0.IPAddress}}", "box"]).stdout.strip()
        closed, opened = ("", overlay(one)) if proxy else (own, own)
        assert [seen(one, address) for address in addresses] == [closed, closed]
        one.run(["meshd", "up", "--allow", "tcp/8080"])
        assert [seen(one, address) for address in addresses] == [opened, opened]
    finally:
        one.run(["meshd", "up", "--allow", "none"])
        one.run(["docker", "rm", "-f", "web"])
        if not proxy:
            restart_docker(lab, one, "TERM")
