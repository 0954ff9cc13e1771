"""Other people's hands: what somebody else undoes is put right by itself, soon, and logged with how it was seen."""

import re
import time
from datetime import datetime

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, eventually, log, nothing_in_clear, overlay, peers, rtt, run_box, run_container

pytestmark = [pytest.mark.root, pytest.mark.lab]

# The kernel or Docker tells of it; only the timer finds it.
TOLD, FOUND = 1.0, 10.0
# What the host may take on top, to notice and to have made the change, on a machine that is busy with other tests.
SLACK = 1.0

HANDS = {
    "a peer removed": ("wg set wg0 peer $(wg show wg0 peers | head -1) remove", FOUND),
    "a route removed": ("ip route del 172.20.102.0/24", TOLD),
    "the unreachable route removed": ("ip route del unreachable 172.20.0.0/16 metric 4278198272", TOLD),
    "the address of wg0 removed": ("ip addr del 172.20.101.0/32 dev wg0", TOLD),
    "the address of ovl0 removed": ("ip addr del 172.20.101.0/16 dev ovl0", TOLD),
    "wg0 down": ("ip link set wg0 down", TOLD),
    "wg0 deleted": ("ip link del wg0", TOLD),
    "ovl0 down": ("ip link set ovl0 down", TOLD),
    "another MTU of wg0": ("ip link set wg0 mtu 1300", TOLD),
    "another MTU of ovl0": ("ip link set ovl0 mtu 1300", TOLD),
    "proxy_arp off": ("sysctl -qw net.ipv4.conf.ovl0.proxy_arp=0", TOLD),
    "ip_forward off": ("sysctl -qw net.ipv4.ip_forward=0", TOLD),
    "proxy_delay back": ("sysctl -qw net.ipv4.neigh.ovl0.proxy_delay=80", FOUND),
    "a firewall rule removed": (
        "nft delete rule ip meshd_wg0 output handle $(nft -a list chain ip meshd_wg0 output | sed -n 's/.*drop.* //p')",
        TOLD,
    ),
    "the firewall table removed": ("nft delete table ip meshd_wg0", TOLD),
    "a rule put before": ("nft insert rule ip meshd_wg0 postrouting masquerade", TOLD),
    "a rule removed from Docker's chain": ("iptables -w -D DOCKER-USER 1", TOLD),
    "iptables -F": ("iptables -w -F", TOLD),
    "nft flush ruleset": ("nft flush ruleset", TOLD),
    "wireguard-go killed": ("pkill -KILL -x wireguard-go", 3.0),
}


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    return assemble(lab, docker=2)


@pytest.mark.parametrize("what", HANDS)
def test_what_somebody_undoes_is_put_right(lab: Lab, hosts: list[LabHost], what: str) -> None:
    one, two = hosts
    command, limit = HANDS[what]
    _settle(hosts)
    key, before = one.run(["wg", "show", "wg0", "public-key"]).stdout, len(log(one))
    with nothing_in_clear(lab):
        begun = time.time()
        one.run(["sh", "-ec", command])
        eventually(lambda: re.search(r"INFO (add|set|remove) ", log(one)[before:]), limit + 5, "it is logged")
        eventually(lambda: one.run(["meshd", "plan"]).stdout == "no changes\n", 5, "nothing is left to be changed")
        eventually(lambda: rtt(one, "box", overlay(two, 1)), 5, "a container reaches the other side")
        eventually(lambda: rtt(two, "box", overlay(one, 1)), 5, "and is reached from there")
    lines = [line for line in log(one)[before:].splitlines() if re.search(r"INFO (add|set|remove) ", line)]
    took = max(map(_logged_at, lines)) - begun
    print(f"{what}: {took:.2f} s, {lines[0].partition(' INFO ')[2]}")  # noqa: T201
    assert took <= limit + SLACK
    assert all("(seen by " in line for line in lines)
    assert one.run(["wg", "show", "wg0", "public-key"]).stdout == key
    if what in {"iptables -F", "nft flush ruleset"}:
        _restart_docker(lab, one, "TERM")  # its own rules come back with it alone


def _settle(hosts: list[LabHost]) -> None:
    eventually(lambda: all(host.run(["meshd", "plan"]).stdout == "no changes\n" for host in hosts), 20, "settled")
    eventually(lambda: rtt(hosts[0], "box", overlay(hosts[1], 1)), 20, "the containers talk")
    # Hints of what was before come in for a moment.
    time.sleep(0.5)


def _logged_at(line: str) -> float:
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()


def _restart_docker(lab: Lab, host: LabHost, number: str) -> None:
    host.run(["sh", "-c", f"kill -{number} $(cat /run/docker.pid)"])
    eventually(lambda: not host.run(["pgrep", "-x", "dockerd"], check=False).stdout, 20, "dockerd has stopped")
    host.run(["sh", "-c", "pkill -KILL -f 'containerd.*--config' ; rm -f /run/docker.pid"], check=False)
    lab.start_docker(host)
    eventually(lambda: "Up" in host.run(["docker", "ps", "--filter", "name=box"]).stdout, 20, "its container runs")


@pytest.mark.parametrize("number", ["TERM", "KILL"])
def test_dockerd_restarted(lab: Lab, hosts: list[LabHost], number: str) -> None:
    one, two = hosts
    _settle(hosts)
    with nothing_in_clear(lab):
        _restart_docker(lab, one, number)
        eventually(lambda: rtt(two, "box", overlay(one, 1)), 10, "its container is reached")
        eventually(lambda: rtt(one, "box", overlay(two, 1)), 5, "and reaches others")
        eventually(lambda: one.run(["meshd", "plan"]).stdout == "no changes\n", 10, "nothing is to be changed")


def test_a_masquerade_that_somebody_puts_first_changes_no_source(hosts: list[LabHost]) -> None:
    one, two = hosts
    _settle(hosts)
    one.run(["iptables", "-w", "-t", "nat", "-I", "POSTROUTING", "-j", "MASQUERADE"])
    try:
        script = "timeout 5 tcpdump -lnc 1 -i wg0 icmp and src " + overlay(one, 1)
        dump = two.popen(["sh", "-c", script], stdout=-1, stderr=-1)
        time.sleep(1)
        assert rtt(one, "box", overlay(two, 1))
        assert f"IP {overlay(one, 1)} > {overlay(two, 1)}" in dump.communicate(timeout=10)[0]
    finally:
        one.run(["iptables", "-w", "-t", "nat", "-D", "POSTROUTING", "-j", "MASQUERADE"])


def test_the_docker_network_removed(lab: Lab, hosts: list[LabHost]) -> None:
    one, two = hosts
    _settle(hosts)
    before = len(log(one))
    with nothing_in_clear(lab):
        one.run(["docker", "rm", "-f", "box"])
        begun = time.time()
        one.run(["docker", "network", "rm", "ovl0"])
        eventually(lambda: "add docker network ovl0" in log(one)[before:], 5, "it is made again")
        (line,) = [line for line in log(one)[before:].splitlines() if "add docker network" in line]
        assert _logged_at(line) - begun <= TOLD + SLACK
        # The bridge changes with it, so that the kernel may tell of it before Docker does.
        assert re.search(r"seen by .*(docker: network ovl0 destroy|netlink: link ovl0)", line)
        eventually(lambda: one.run(["docker", "network", "ls", "-q", "-f", "name=ovl0"]).stdout, 5, "it is there")
        run_box(one)
        assert rtt(two, "box", overlay(one, 1))


def test_containers_that_come_and_go_change_nothing(lab: Lab, hosts: list[LabHost]) -> None:
    one, two = hosts
    _settle(hosts)
    before = len(log(one))
    with nothing_in_clear(lab):
        for number in range(5):
            run_container(one, f"come{number}", "meshd/serf", "sleep", "1000")
            assert rtt(two, "box", overlay(one, 2))
            one.run(["docker", "rm", "-f", f"come{number}"])
    assert log(one)[before:] == ""
    assert len(peers(one)) == 1
