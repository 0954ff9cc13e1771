"""Other people's firewalls on the hosts of a mesh: containers reach each other again soon after each restart of one."""

import json
import sys
from dataclasses import dataclass

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab import firewalls
from tests.lab.conftest import assemble, eventually, nothing_in_clear, overlay
from tests.lab.promises import all_reach_all, from_the_underlay, published, seen, serve

pytestmark = [pytest.mark.root, pytest.mark.lab]

# How long all may take to reach all again, in seconds.
LIMIT = 10.0

# What docs/firewalls.md tells people to do.
OPEN_FIREWALLD = """
firewall-cmd --permanent --add-port=7946/tcp --add-port=7946/udp --add-port=51820/udp
firewall-cmd --permanent --zone=trusted --add-interface=wg0
firewall-cmd --reload
"""
OPEN_UFW = "ufw allow 7946; ufw allow 51820/udp"
NFTABLES = """
flush ruleset
table inet filter {
  chain input {
    type filter hook input priority filter; policy drop;
    ct state vmap { established : accept, related : accept, invalid : drop }
    iifname "lo" accept
    ip protocol icmp accept
    tcp dport { 22, 7946 } accept
    udp dport { 7946, 51820 } accept
  }
}
"""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Four hosts with Docker: firewalld on nftables, firewalld on iptables, ufw, and a file of nft's."""

    lab: Lab
    hosts: list[LabHost]

    def whole(self, host: LabHost) -> bool:
        """Tell whether `host` and all others reach each other, its servers see who asks, and nothing is to change."""
        client = self.hosts[0] if host != self.hosts[0] else self.hosts[1]
        return (
            all_reach_all(self.hosts, host)
            and all(seen(client, overlay(host, last)) == overlay(client, 1) for last in (8, 9))
            and host.run(["meshd", "plan"], check=False).stdout == "no changes\n"
        )


@pytest.fixture(scope="module")
def mesh(lab: Lab) -> Mesh:
    assert firewalls.FOLDER.is_dir(), f"{firewalls.FOLDER} has no firewalls: make .make/firewalls"
    lab.up(4, docker=False)
    for host in lab.hosts():
        firewalls.lay(host)
    # Before Docker, which asks for firewalld only when it starts.
    for host, backend in zip(lab.hosts(), ("nftables", "iptables"), strict=False):
        firewalls.start_firewalld(host, backend)
        host.run(["sh", "-ec", OPEN_FIREWALLD])
    hosts = assemble(lab, docker=4)
    for host in hosts:
        serve(host)
    hosts[2].run(["sh", "-ec", OPEN_UFW])
    hosts[3].run(["sh", "-c", "cat >/etc/nftables.conf"], text=NFTABLES)
    return Mesh(lab, hosts)


# The host, what is done there, and whether Docker's own rules are there afterwards: it hears of firewalld, and ufw does
# not touch them.
EVENTS = {
    "firewalld on nftables reloaded": (0, "firewall-cmd --reload", True),
    "firewalld on nftables restarted": (0, firewalls.RESTART_FIREWALLD, True),
    "firewalld on iptables reloaded": (1, "firewall-cmd --reload", True),
    "firewalld on iptables restarted": (1, firewalls.RESTART_FIREWALLD, True),
    "ufw enabled": (2, "ufw --force disable && ufw --force enable", True),
    "ufw reloaded": (2, "ufw --force enable && ufw reload", True),
    "nftables.service restarted": (3, firewalls.RESTART_NFTABLES, False),
}


@pytest.mark.parametrize("what", EVENTS)
def test_containers_reach_each_other_after_firewall_event(mesh: Mesh, what: str) -> None:
    """After a reload or restart of a firewall, containers reach each other again in time."""
    number, command, with_docker = EVENTS[what]
    host = mesh.hosts[number]
    with nothing_in_clear(mesh.lab):
        host.run(["sh", "-ec", command])
        took = eventually(lambda: mesh.whole(host), LIMIT, f"{what}: all is well again")
        if with_docker:
            eventually(lambda: published(host, mesh.hosts[3]), LIMIT, "the published port")
    print(f"{what}: {took:.1f} s")  # noqa: T201
    assert from_the_underlay(mesh.lab, host, overlay(host, 9)) == ""
    assert problems(host) == []


def problems(host: LabHost) -> list[str]:
    """What `meshd status` finds wrong on a host; its exit code says whether there is something."""
    done = host.run(["meshd", "status", "--json"], check=False)
    found: list[str] = json.loads(done.stdout)["problems"]
    assert done.returncode == (1 if found else 0)
    return found


SHUT = {
    "firewalld on nftables": (0, "firewall-cmd --permanent --remove-port=7946/tcp; firewall-cmd --reload"),
    "firewalld on iptables": (1, "firewall-cmd --permanent --remove-port=7946/tcp; firewall-cmd --reload"),
    "ufw": (2, "ufw --force enable; ufw delete allow 7946; ufw allow 7946/udp"),
}


@pytest.mark.parametrize("what", SHUT)
def test_status_names_blocked_port_and_remedy(mesh: Mesh, what: str) -> None:
    """`meshd status` and `up` name a blocked port with the command that opens it."""
    number, command = SHUT[what]
    host, neighbour = mesh.hosts[number], mesh.hosts[3]
    host.run(["sh", "-ec", command])
    assert not connects(neighbour, host, 7946)
    (line,) = problems(host)
    found, _, remedy = line.partition("; to open it: ")
    assert found == f"TCP port 7946 (gossip) on eth0 is blocked by {what.partition(' ')[0]}"
    assert f"Warning: {line}\n" in host.run(["meshd", "up"]).stderr
    host.run(["sh", "-ec", remedy])
    assert problems(host) == []
    assert connects(neighbour, host, 7946)
    assert "Warning" not in host.run(["meshd", "up"]).stderr


def test_status_names_port_blocked_by_nftables_file(mesh: Mesh) -> None:
    """`meshd status` names a port that a file of nft rules blocks."""
    host = mesh.hosts[3]
    host.run(["nft", "-f", "-"], text=NFTABLES.replace("7946, 51820", "7946"))
    (line,) = problems(host)
    assert line == (
        "UDP port 51820 (WireGuard) on eth0 is blocked by nftables' chain inet filter input; "
        "to open it: add a rule there that accepts it"
    )
    host.run(["nft", "-f", "/etc/nftables.conf"])
    assert problems(host) == []


def test_status_names_forwarding_blocked_by_firewalld(mesh: Mesh) -> None:
    """Without its zone, firewalld rejects what comes from other hosts, and `meshd status` says so."""
    host, neighbour = mesh.hosts[0], mesh.hosts[1]
    host.run(["sh", "-ec", "firewall-cmd --permanent --zone=trusted --remove-interface=wg0; firewall-cmd --reload"])
    eventually(lambda: not seen(neighbour, overlay(host, 9)), LIMIT, "firewalld rejects it")
    (line,) = problems(host)
    found, _, remedy = line.partition("; to open it: ")
    assert found == "the way from wg0 to ovl0 is blocked by firewalld"
    host.run(["sh", "-ec", remedy])
    eventually(lambda: mesh.whole(host), LIMIT, "all is well again")
    assert problems(host) == []


def connects(client: LabHost, host: LabHost, port: int) -> bool:
    """Tell whether a TCP port answers by the underlay."""
    script = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    command = [sys.executable, "-I", "-c", script, str(host.address), str(port)]
    return client.run(command, check=False).returncode == 0
