"""What must not work against a host that joins and knows nobody: to be what another host is.

barge1 to barge4 are the mesh, and barge5 joins. Of barge2 and barge3, the one with the older certificate claims what
the other one has: all that know them refuse it.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pytest

from meshd.daemon.exchange import PATIENCE
from meshd.endpoint import Endpoint
from meshd.gossip.messages import HOLDS
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import certificates, invitations
from meshd.mesh.model import Record
from meshd.mesh.records import encode
from meshd.reconcile.run import CLAIMED
from tests.conftest import public_key
from tests.lab.conftest import (
    assemble,
    eventually,
    invitation,
    join,
    log,
    members,
    nothing_in_clear,
    ping,
    serf,
    settled,
)
from tests.lab.test_attacks import bare_agent, is_refused, keys, signed, state, stop_agents
from tests.lab.traffic import unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Says in the name of the host that it runs on that any record is in force. Run by its Serf.
LIE = f"""
import sys
from pathlib import Path
from meshd.gossip.responder import signed
from meshd.state.directory import State
sys.stdout.buffer.write(signed(State(Path("/var/lib/meshd")), "{HOLDS}", sys.stdin.buffer.read()))
"""


@dataclass
class Scene:
    """`attacker` has an older certificate than `victim`; `voters` are the other two hosts of the mesh."""

    lab: Lab
    attacker: LabHost
    victim: LabHost
    voters: list[LabHost]

    def subnet(self) -> str:
        return str(keys(self.victim)[1].subnet)


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    one, two, three, four = mesh = assemble(lab, docker=0, plain=4)
    eventually(lambda: all(keys(h)[1].certificate.delegation is None for h in mesh), 60, "all are confirmed")
    eventually(lambda: settled(mesh), 40, "and know that")
    attacker, victim = sorted((two, three), key=lambda host: keys(host)[1].certificate.rank)
    return Scene(lab, attacker, victim, [one, four])


@contextmanager
def agent(host: LabHost, tags: Mapping[str, str], join: Sequence[LabHost], *handlers: str) -> Iterator[None]:
    """Run a Serf agent of the host's own name in place of its daemon's; afterwards the daemon is back."""
    stop_agents(host)
    try:
        with bare_agent(host, host.name, state(host).gossip_key, tags, join, *handlers):
            yield
    finally:
        host.run(["meshd", "up", "--timeout", "1"])


@contextmanager
def newcomer(scene: Scene) -> Iterator[LabHost]:
    """barge5, from when it has begun to join until it has left."""
    host = scene.lab.power_on("barge5")
    join(host, scene.voters[0], invitation(scene.voters[0]), "--no-docker", "--timeout", "1")
    try:
        yield host
    finally:
        host.run(["meshd", "leave"])


CLAIMS: dict[str, Callable[[Record, Record], Record]] = {
    "subnet": lambda own, victim: replace(own, subnet=victim.subnet),
    "WireGuard key": lambda own, victim: replace(own, public_key=victim.public_key),
    "endpoint": lambda own, victim: replace(own, endpoint=victim.endpoint),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_newcomer_gives_it_to_the_host_that_the_others_know(scene: Scene, what: str) -> None:
    """A host that joins asks the others which of two claims is in force, and believes no certificate for its age."""
    own, victim = keys(scene.attacker)[1], keys(scene.victim)[1]
    before = len(log(scene.voters[0]))
    with agent(scene.attacker, signed(scene.attacker, CLAIMS[what](own, victim)), scene.voters):
        for host in scene.voters:
            eventually(lambda h=host: is_refused(h, scene.attacker.name, scene.victim.name), 45, "others refuse it")  # type: ignore[misc]
        with nothing_in_clear(scene.lab), newcomer(scene) as host, unbroken([(scene.voters[0], scene.victim)]) as wrong:
            eventually(lambda: ping(host, str(victim.address)), 30, "it reaches the victim")
            assert members(host)[scene.victim.name]["state"] == "alive"
            assert is_refused(host, scene.attacker.name, scene.victim.name)
            told = log(host)
            assert f"{what} " in told
            assert f"is claimed by {scene.victim.name} as well, and the other hosts do not agree" in told
            assert f"route {scene.subnet()} via" in told.partition(f"add peer {victim.public_key}")[2]
        assert wrong == []
    assert "remove " not in log(scene.voters[0])[before:].partition("barge5")[0]


def test_newcomer_gives_it_to_nobody_while_the_others_disagree(scene: Scene) -> None:
    """One of them lies; the newcomer says so, and asks on until they agree."""
    own, victim = keys(scene.attacker)[1], keys(scene.victim)[1]
    one, liar = scene.voters
    path = liar.directory / "lie.py"
    path.write_text(LIE)
    claim = signed(scene.attacker, replace(own, subnet=victim.subnet))
    with agent(scene.attacker, claim, [one]), ExitStack() as lying:
        eventually(lambda: is_refused(one, scene.attacker.name, scene.victim.name), 45, "the others refuse it")
        lie = f"query:{HOLDS}={sys.executable} {path}; touch {path}.told"
        lying.enter_context(agent(liar, serf_tags(one, liar.name), [one], lie))
        with newcomer(scene) as host:
            eventually(lambda: path.with_name("lie.py.told").exists(), 30, "the liar was asked, and has answered")
            for name in (scene.attacker.name, scene.victim.name):
                eventually(lambda n=name: is_refused(host, n, f"subnet {victim.subnet} is claimed by"), 30, "nobody")  # type: ignore[misc]
            assert not ping(host, str(victim.address))
            assert str(victim.subnet) not in host.run(["ip", "route"]).stdout
            said = host.run(["meshd", "status"], check=False).stdout
            assert f"{scene.victim.name}: subnet {victim.subnet} is claimed by {scene.attacker.name} as well" in said
            lying.close()
            eventually(lambda: ping(host, str(victim.address)), 60, "it reaches the victim")


def test_older_invitation_takes_no_subnet_of_a_host(scene: Scene) -> None:
    """Its holder has never joined, so that no host knows it, and has an older certificate than the host it harms."""
    one = scene.voters[0]
    old = invitations.decode(one.run(["meshd", "invite", "late"]).stdout.split("MESHD_INVITE=")[1].split()[0])
    assert old.certificate is not None
    stranger = scene.lab.power_on("barge6")
    with nothing_in_clear(scene.lab), newcomer(scene) as host:
        eventually(lambda: keys(host)[1].certificate.delegation is None, 60, "it is confirmed")
        eventually(lambda: settled([*scene.voters, scene.attacker, scene.victim, host]), 40, "and all know that")
        before = keys(host)[1]
        assert old.certificate.rank < before.certificate.rank
        claim = Record(public_key("late"), before.subnet, Endpoint(stranger.address, 51820), 1, old.certificate)
        tags = encode(certificates.sign(old.seed, "meshd", "late", claim))
        with unbroken([(one, host), (scene.victim, host)]) as wrong:
            with bare_agent(stranger, "late", old.gossip_key, tags, scene.voters):
                for other in (*scene.voters, host):
                    eventually(lambda h=other: is_refused(h, "late", f"held by {host.name}"), 30, "all refuse it")  # type: ignore[misc]
                said = CLAIMED.format(subnet=before.subnet, rivals="late")
                assert said in host.run(["meshd", "status"], check=False).stdout
                eventually(lambda: said in log(host), 10, "its daemon has seen it")
                time.sleep(2 * PATIENCE)
            assert keys(host)[1] == before
        assert wrong == []


def serf_tags(host: LabHost, name: str) -> dict[str, str]:
    """The tags of a member, as a host's Serf lists them."""
    rows = json.loads(serf(host, "members", "-format=json"))["members"]
    return {str(k): str(v) for row in rows if row["name"] == name for k, v in row["tags"].items()}
