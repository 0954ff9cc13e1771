"""The handler scripts under a plain `serf agent` that somebody runs by hand: no daemon anywhere."""

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import invitations
from tests.lab.conftest import SUSPECTED, eventually, init, join, peers, ping, snapshot

pytestmark = [pytest.mark.root, pytest.mark.lab]

# A handler of the test's own makes it, when those of meshd before it have run.
TOLD = "/run/told"


@dataclass
class Alone:
    """Three hosts without Docker and without a daemon, each with a Serf agent in the foreground of a process here."""

    lab: Lab
    hosts: list[LabHost]
    before: list[str]
    agents: list["subprocess.Popen[str]"]

    def state(self, host: LabHost) -> dict[str, str]:
        rows = json.loads(host.run(["meshd", "members", "--json"]).stdout)
        return {row["name"]: row["state"] for row in rows}

    def full_reach(self) -> bool:
        return all(ping(a, f"172.20.{100 + n}.0") for a in self.hosts for n in range(1, len(self.hosts) + 1))


@pytest.fixture(scope="module")
def alone(lab: Lab) -> Iterator[Alone]:
    lab.up(3, docker=False)
    hosts = lab.hosts()
    before = [snapshot(host) for host in hosts]
    invitation = init(hosts[0], "--no-docker", "--no-daemon")
    key = base64.b64encode(invitations.decode(invitation).gossip_key).decode()
    agents = []
    for host in hosts:
        if host is not hosts[0]:
            join(host, hosts[0], invitation, "--no-docker", "--no-daemon")
        output = host.run(["meshd", "up"]).stdout
        handlers = re.findall(r"-event-handler '([^']+)'", output)
        # Member events, the six questions of other hosts, and goodbyes that they tell of.
        assert len(handlers) == 8, output
        options = [f"-event-handler={handler}" for handler in handlers]
        options += [
            f"-event-handler=member-update=touch {TOLD}",
            f"-node={host.name}",
            f"-bind={host.address}",
            f"-encrypt={key}",
        ]
        # Nothing of meshd's own configuration: the tags must come from the handler.
        agents.append(serf_agent(host, *options, f"-retry-join={hosts[0].address}", "-retry-interval=1s"))
    try:
        yield Alone(lab, hosts, before, agents)
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def test_handlers_assemble_mesh(alone: Alone) -> None:
    """Three hosts assemble by their handlers, without a daemon."""
    eventually(alone.full_reach, 30, "every host reaches every other's overlay address")
    names = {host.name: "alive" for host in alone.hosts}
    for host in alone.hosts:
        assert alone.state(host) == names
        assert host.run(["pgrep", "-af", "meshd.* agent"], check=False).stdout == "", "no daemon runs"
        tags = host.run(["serf", "members", "-format=json"]).stdout
        assert [sorted(m["tags"]) for m in json.loads(tags)["members"]] == [["meshd", "subnet", "wg"]] * 3
    assert json.loads(alone.hosts[0].run(["meshd", "plan", "--json"]).stdout)["changes"] == []


def test_handlers_follow_changed_key(alone: Alone) -> None:
    """The others follow a host with a new key."""
    changed, other = alone.hosts[1], alone.hosts[0]
    changed.run(["rm", "/var/lib/meshd/wireguard.key"])
    changed.run(["meshd", "sync"])
    eventually(alone.full_reach, 15, "the others use the new key")
    assert len(other.run(["wg", "show", "wg0", "peers"]).stdout.split()) == 2


# The response of a handshake: 92 bytes and the header of UDP.
LOSE_RESPONSES = """
table bridge lose {
    chain forward {
        type filter hook forward priority 0;
        udp dport 51820 udp length 100 drop
    }
}
"""


def test_handlers_restart_crossed_handshake(alone: Alone) -> None:
    """A handshake that came to nothing, as when two initiations cross, is started again at the next event.

    WireGuard alone may do nothing for 25 s.
    """
    older, newer = alone.hosts[:2]
    keys = {host: host.run(["wg", "show", "wg0", "public-key"]).stdout.strip() for host in (older, newer)}

    def received() -> int:
        rows = [line.split() for line in older.run(["wg", "show", "wg0", "transfer"]).stdout.splitlines()]
        return sum(int(row[1]) for row in rows if row[0] == keys[newer])

    def crossed() -> bool:
        """Let the two meet: the older host, which leaves the start to the other one, has an initiation from it."""
        for host, other in ((older, newer), (newer, older)):
            host.run(["wg", "set", "wg0", "peer", keys[other], "remove"])
        for host in (older, newer):
            host.run(["meshd", "sync"])
        return received() > 0

    alone.lab.switch.run(["nft", "-f", "-"], text=LOSE_RESPONSES)
    try:
        eventually(crossed, 30, "an initiation has come, and no handshake of it")
        alone.hosts[2].run(["serf", "tags", "-set", "hello=world"])
        eventually(lambda: received() == 0, 30, "the peer is re-created")
    finally:
        alone.lab.switch.run(["nft", "delete", "table", "bridge", "lose"])
    eventually(alone.full_reach, 15, "and they reach each other")


def test_handlers_keep_peer_of_dead_agent(alone: Alone) -> None:
    """The peer of a host whose agent has died stays."""
    third = alone.hosts[2]
    third.run(["pkill", "-KILL", "-x", "serf"])
    alone.agents[2].wait()
    eventually(lambda: alone.state(alone.hosts[0])["barge3"] == "failed", SUSPECTED, "the dead agent is seen")
    assert ping(alone.hosts[0], "172.20.103.0"), "failed is not left"
    alone.agents[2] = serf_agent(third, "-config-file=/var/lib/meshd/serf.json")
    eventually(lambda: alone.state(alone.hosts[0])["barge3"] == "alive", 30, "it is back, by the printed line")


def test_handlers_confirm_revocation(alone: Alone) -> None:
    """All other hosts confirm a revocation."""
    first = alone.hosts[0]
    first.run(["meshd", "invite", "ghost"])
    assert "2 of 2 other hosts that are alive have confirmed it" in first.run(["meshd", "revoke", "ghost"]).stdout


def test_handlers_do_nothing_while_down(alone: Alone) -> None:
    """After `down` the handlers change nothing until `up`."""
    second = alone.hosts[1]
    second.run(["meshd", "down"])
    assert snapshot(second) == alone.before[1]
    second.run(["rm", "-f", TOLD])
    second.run(["serf", "tags", "-set", "hello=world"])
    # Serf holds the update back for up to 3 s, then runs the handlers one after the other.
    eventually(lambda: second.run(["test", "-e", TOLD], check=False).returncode == 0, 20, "the handlers have run")
    assert snapshot(second) == alone.before[1]
    second.run(["meshd", "up"])
    eventually(alone.full_reach, 15, "it is back")


def test_handlers_remove_left_host(alone: Alone) -> None:
    """The others remove a host that leaves, and nothing is left on it."""
    leaving, others = alone.hosts[2], alone.hosts[:2]
    leaving.run(["meshd", "leave"])
    alone.agents[2].wait(timeout=10)
    eventually(lambda: all(len(peers(host)) == 1 for host in others), 8, "the others have removed its peer")
    for host in others:
        assert "172.20.103.0/24" not in host.run(["ip", "route"]).stdout
        assert alone.state(host)["barge3"] == "left"
    assert snapshot(leaving) == alone.before[2]
    assert ping(others[0], "172.20.102.0")


def test_handlers_take_serf_leave_as_leave(alone: Alone) -> None:
    """Without daemons Serf's own leave removes the host."""
    leaving, other = alone.hosts[1], alone.hosts[0]
    leaving.run(["serf", "leave"])
    eventually(lambda: peers(other) == [], 8, "its peer is gone")
    assert "dev wg0" not in other.run(["ip", "route"]).stdout


def serf_agent(host: LabHost, *options: str) -> "subprocess.Popen[str]":
    with (host.directory / "serf.log").open("a") as log:
        return host.popen(["serf", "agent", *options], stdout=log, stderr=log)
