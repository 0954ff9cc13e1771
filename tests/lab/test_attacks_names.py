"""Who has a name: what an earlier owner of it, or another holder of the same invitation, must not do to the host.

barge1 to barge3 are the mesh, barge4 is the attacker, and barge5 the host whose name it wants.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from meshd.endpoint import Endpoint
from meshd.gossip.messages import EVENT_LIMIT, GONE, RECORD, TellRecord
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import certificates, invitations, tombstones
from meshd.mesh.model import Record
from meshd.mesh.records import encode, to_wire
from meshd.mesh.roster import SUPERSEDED
from meshd.mesh.tombstones import Tombstones, grave
from tests.conftest import public_key
from tests.lab.conftest import eventually, join, members, nothing_in_clear, peers, ping
from tests.lab.faults import new_key
from tests.lab.test_attacks import Scene, is_at, is_refused, keys, state

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Serf events, each a name and a payload in hex, from a host whose root is no friend.
SEND = (
    "import json, sys; from meshd.gossip import serf_agent; from meshd.state.directory import State\n"
    "with serf_agent.rpc(State()) as serf:\n"
    "    for name, payload in json.load(sys.stdin): serf.event(name, bytes.fromhex(payload))"
)
# What no clock gives, and what cannot be exceeded.
FAR, GREATEST = 2**47, 2**48 - 1


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    return Scene(lab)


@pytest.fixture(scope="module")
def owner(scene: Scene) -> LabHost:
    return scene.lab.power_on("barge5")


@pytest.fixture(autouse=True)
def _all_is_as_before(scene: Scene, owner: LabHost) -> Iterator[None]:
    with nothing_in_clear(scene.lab):
        yield
    for host in (scene.stranger, owner):
        host.run(["meshd", "leave", "--force"], check=False)
    eventually(lambda: all(len(peers(host)) == scene.others for host in scene.mesh), 30, "they are gone")
    scene.unharmed()


def send(host: LabHost, name: str, *records: Record) -> None:
    """Let everybody hear of these records by events; goodbyes as tombstones."""
    events = []
    for record in records:
        if record.leaving:
            (page,) = Tombstones(grave(name, tombstones.of_leaving(record))).pages(EVENT_LIMIT)
            events.append((GONE, page.hex()))
        else:
            events.append((RECORD, TellRecord(name, to_wire(record)).payload().hex()))
    host.run([sys.executable, "-c", SEND], text=json.dumps(events))


def has(host: LabHost, name: str, record: Record) -> bool:
    """Tell whether a host has this identity and key for a name, in its roster and in WireGuard."""
    known = state(host).roster().hosts.get(name)
    same = known is not None and known.certificate.identity == record.certificate.identity
    return same and known is not None and known.public_key == record.public_key in peers(host)


def test_earlier_owner_of_name_does_not_come_back(scene: Scene, owner: LabHost) -> None:
    """Who had a name before the authority gave it to another host gets neither it back nor that one out."""
    one, two, three = scene.mesh
    offer = one.run(["meshd", "invite", "--reusable"]).stdout
    join(scene.stranger, one, offer.split("MESHD_INVITE=")[1].split()[0], "--no-docker")
    eventually(lambda: keys(scene.stranger)[1].certificate.delegation is None, 60, "the authority has confirmed it")
    identity, earlier = keys(scene.stranger)
    eventually(lambda: all(has(host, "barge4", earlier) for host in scene.mesh), 30, "all have it")

    # One of the three is away from now on.
    three.run(["meshd", "down"])
    scene.stranger.run(["meshd", "leave"])
    label = re.findall(r"'(invitation-[0-9a-f]+)'", offer)[0]
    said = one.run(["meshd", "revoke", label]).stdout
    assert "keep their certificates: barge4." in said, "it is the authority's own now"
    offer = one.run(["meshd", "invite", "barge4"]).stdout
    join(owner, one, offer.split("MESHD_INVITE=")[1].split()[0], "--no-docker", "--name", "barge4")
    real = keys(owner)[1]
    eventually(lambda: has(one, "barge4", real) and has(two, "barge4", real), 10, "the name is the real one's")

    def stolen(seq: int, *, leaving: bool = False) -> Record:
        where = Endpoint(scene.stranger.address, 51820)
        made = replace(earlier, seq=seq, public_key=public_key("thief"), endpoint=where, leaving=leaving)
        return certificates.sign(identity, "meshd", "barge4", made)

    # The one that was away cannot learn it from the real one, which does not run.
    owner.run(["meshd", "down"])
    # Who died keeps its address in Serf for 30 s, who said goodbye does not.
    scene.forge(("dead", {"name": "barge4", "incarnation": 1000, "from": "barge4"}), targets=2)
    with scene.agent("barge4", encode(stolen(FAR))):
        there = str(scene.stranger.address)
        eventually(lambda: all(is_at(scene.listed(h)["barge4"], there) for h in (one, two)), 20, "Serf has the earlier")
        send(two, "barge4", stolen(FAR + 1), stolen(FAR + 2, leaving=True), stolen(FAR + 3))
        three.run(["meshd", "up"])
        thief = stolen(FAR).public_key
        taken = eventually(lambda: is_refused(three, "barge4", SUPERSEDED), 20, "it refuses the earlier owner")
        print(f"a host that was away knows the owner after {taken:.1f} s")  # noqa: T201
        assert not {earlier.public_key, thief} & set(peers(three))
    owner.run(["meshd", "up"])
    eventually(lambda: all(has(host, "barge4", real) for host in scene.mesh), 30, "all have the real one")
    send(two, "barge4", stolen(FAR + 4))
    for host in scene.mesh:
        host.run(["meshd", "sync"])
        assert has(host, "barge4", real), host.name
        assert "barge4" not in state(host).roster().gone, host.name
        assert ping(host, members(host)["barge4"]["subnet"].partition("/")[0]), host.name
    assert owner.run(["meshd", "status"], check=False).returncode == 0, "the real one is well"


@pytest.mark.parametrize("seq", [GREATEST - 1, GREATEST])
def test_goodbye_by_another_identity_moves_no_number(scene: Scene, owner: LabHost, seq: int) -> None:
    """A goodbye in a newcomer's name, by another holder of its invitation, neither ends it nor moves its numbers."""
    one, two, _ = scene.mesh
    offer = one.run(["meshd", "invite", "--reusable"]).stdout.split("MESHD_INVITE=")[1].split()[0]
    invitation = invitations.decode(offer)
    assert invitation.delegation is not None
    identity = os.urandom(32)
    made = certificates.certify_by(
        invitation.seed, "meshd", "barge5", certificates.public(identity), invitation.delegation
    )
    endpoint = Endpoint(scene.stranger.address, 51820)
    goodbye = replace(keys(two)[1], certificate=made, public_key=public_key("thief"), endpoint=endpoint)
    goodbye = certificates.sign(identity, "meshd", "barge5", replace(goodbye, seq=seq, leaving=True))
    send(two, "barge5", goodbye)
    join(owner, one, offer, "--no-docker")
    send(two, "barge5", goodbye)
    eventually(lambda: keys(owner)[1].certificate.delegation is None, 60, "the authority has confirmed it")
    send(two, "barge5", goodbye)
    new_key(owner)
    eventually(lambda: all(has(host, "barge5", keys(owner)[1]) for host in scene.mesh), 20, "its changes reach all")
    assert keys(owner)[1].seq < 2**40
    assert not any(is_refused(host, "barge5", "") for host in scene.mesh)
    assert "Traceback" not in (owner.directory / "meshd" / "agent.log").read_text()
