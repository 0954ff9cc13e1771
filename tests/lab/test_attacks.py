"""What must not work, with real packets: outsiders, holders of the gossip key, and members that overreach.

barge1 to barge3 are the mesh; barge4 is on the underlay beside them and does the attacking.
"""

import base64
import json
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from meshd.endpoint import Endpoint
from meshd.gossip.messages import APPLIED, BURY, EVENT_LIMIT, GONE, RECORD, Answer, TellRecord
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import certificates, tombstones
from meshd.mesh.model import Certificate, Delegation, Record
from meshd.mesh.records import encode, to_wire
from meshd.mesh.tombstones import Tombstones, grave
from meshd.state.directory import State
from tests.lab.conftest import (
    PCAP_HEADER,
    SUSPECTED,
    assemble,
    capture,
    eventually,
    invitation,
    join,
    log,
    members,
    nothing_in_clear,
    overlay,
    peers,
    ping,
    serf,
)
from tests.lab.traffic import unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

FORGE = Path(__file__).with_name("forge.py")
STATE = "/var/lib/meshd"
HUGE = 2**32 - 1


class Scene:
    """A mesh of three and a stranger, who may have got hold of the gossip key."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.mesh = assemble(lab, docker=0, plain=3)
        self.stranger = lab.power_on("barge4")
        self.gossip_key = state(self.mesh[0]).gossip_key
        self.others = 2
        # Until then the authority's confirmation changes what a host publishes, whatever an attack does.
        eventually(self.is_confirmed, 60, "the authority has confirmed all, and Serf has their records")

    def listed(self, host: LabHost | None = None) -> dict[str, dict[str, Any]]:
        """What Serf on a host, by default the first one, says of each member."""
        rows = json.loads(serf(host or self.mesh[0], "members", "-format=json"))["members"]
        return {row["name"]: row for row in rows}

    def tags(self, name: str) -> dict[str, str]:
        return dict(self.listed()[name]["tags"])

    def forge(self, *messages: tuple[str, Mapping[str, Any]], key: bytes | None = b"", targets: int = 3) -> None:
        """Send gossip to the hosts of the mesh: encrypted with the mesh's key, with another one, or (None) not."""
        used = self.gossip_key if key == b"" else key
        addresses = [str(host.address) for host in self.mesh[:targets]]
        task = {"key": used.hex() if used else None, "targets": addresses, "messages": messages}
        self.stranger.run([sys.executable, str(FORGE)], text=json.dumps(task))

    @contextmanager
    def agent(
        self, name: str, tags: Mapping[str, str], *, key: bytes | None = None, handlers: Sequence[str] = ()
    ) -> Iterator[None]:
        """Run a plain Serf agent on the stranger, which joins the mesh's gossip if its key is the mesh's."""
        with bare_agent(self.stranger, name, key or self.gossip_key, tags, self.mesh, *handlers):
            yield

    def told(self, text: str, *hosts: LabHost, count: int = 1) -> Callable[[], None]:
        """Return a call that waits until each Serf, by default all, has logged this so many times from now on."""
        before = {host: serf_log(host).count(text) for host in hosts or self.mesh}

        def wait() -> None:
            for host, had in before.items():
                eventually(lambda h=host, n=had: serf_log(h).count(text) >= n + count, 20, f"{host.name}: {text}")  # type: ignore[misc]

        return wait

    def forge_and_wait(
        self, *messages: tuple[str, Mapping[str, Any]], key: bytes | None = b"", targets: int = 3
    ) -> None:
        """Forge gossip, and return when the hosts have dealt with it: what comes after it is no gossip, and logged."""
        wait = self.told("Decrypt packet failed: Unsupported encryption version 170", *self.mesh[:targets])
        self.forge(*messages, key=key, targets=targets)
        self.forge(("raw", {"hex": "aabbccdd"}), key=None, targets=targets)
        wait()

    def refused(self, name: str, reason: str, within: float = 45) -> None:
        """Require that every other host refuses a member for this reason, and says so in its log."""
        for host in (host for host in self.mesh if host.name != name):
            # Whom the gossip misses learns it when two Serfs next exchange all that they know, every 30 s.
            eventually(lambda h=host: is_refused(h, name, reason), within, f"{name}: {reason}")  # type: ignore[misc]
            eventually(lambda h=host: re.search(f"WARNING refused {name}: .*{re.escape(reason)}", log(h)), 5, "logged")  # type: ignore[misc]

    def unharmed(self) -> None:
        """Require that the three have each other as they had, nobody else, and reach each other."""
        for host in self.mesh:
            assert len(peers(host)) == self.others, host.name
            routes = host.run(["ip", "route", "show", "proto", "77"]).stdout.splitlines()
            assert len([line for line in routes if "dev wg0" in line]) == self.others, routes
            assert "Traceback" not in log(host)
            assert all(ping(host, overlay(other)) for other in self.mesh), host.name

    def is_confirmed(self) -> bool:
        """Return whether no host has a delegated certificate any more and each Serf lists the newest records."""
        records = {host.name: keys(host)[1] for host in self.mesh}
        return all(record.certificate.delegation is None for record in records.values()) and all(
            dict(self.listed(host)[name]["tags"]) == encode(record)
            for host in self.mesh
            for name, record in records.items()
        )

    def is_whole(self) -> bool:
        """Tell whether the three see each other alive in Serf and have the peers that they should have."""
        names = {"barge1", "barge2", "barge3"}
        return all(names <= self.alive(host) and len(peers(host)) == self.others for host in self.mesh)

    def alive(self, host: LabHost) -> set[str]:
        """Return the names of the members that Serf on a host takes for alive."""
        return {name for name, row in self.listed(host).items() if row["status"] == "alive"}


@contextmanager
def bare_agent(
    host: LabHost, name: str, gossip_key: bytes, tags: Mapping[str, str], join: Sequence[LabHost], *handlers: str
) -> Iterator[None]:
    """Run a Serf agent of any name and tags on a host, without a daemon."""
    path = host.directory / "rogue.json"
    config = {
        "node_name": name,
        "bind": str(host.address),
        "encrypt_key": base64.b64encode(gossip_key).decode(),
        "tags": dict(tags),
        "event_handlers": list(handlers),
        "disable_name_resolution": True,
        "retry_join": [str(other.address) for other in join],
        "retry_interval": "1s",
    }
    path.write_text(json.dumps(config))
    process = host.popen(["serf", "agent", f"-config-file={path}"], stdout=-3, stderr=-3)
    try:
        yield
    finally:
        host.run(["pkill", "-KILL", "-f", str(path)], check=False)
        process.wait(timeout=10)


def serf_log(host: LabHost) -> str:
    return (host.directory / "meshd" / "serf.log").read_text(errors="replace")


def is_refused(host: LabHost, name: str, reason: str) -> bool:
    row = members(host).get(name, {"state": "", "reason": ""})
    return row["state"] == "refused" and reason in row["reason"]


def is_at(row: Mapping[str, Any], address: str) -> bool:
    return row["status"] == "alive" and str(row["addr"]).startswith(f"{address}:")


def state(host: LabHost) -> State:
    return State(host.directory / "meshd")


def keys(host: LabHost) -> tuple[bytes, Record]:
    """The identity's seed and the record of a host, as its root can read them."""
    claim = state(host).claim()
    assert claim is not None
    return state(host).identity_key, claim.record


def signed(host: LabHost, record: Record, name: str | None = None) -> dict[str, str]:
    """The tags of a new record that the host's own identity has signed: what a member can do that overreaches."""
    record = replace(record, seq=time.time_ns() // 10**6)
    return encode(certificates.sign(keys(host)[0], "meshd", name or host.name, record))


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    return Scene(lab)


@pytest.fixture(autouse=True)
def _nothing_happened(scene: Scene) -> Iterator[None]:
    eventually(scene.is_whole, 60, "the mesh is whole before the attack")
    with nothing_in_clear(scene.lab):
        yield
        scene.unharmed()


# --- outsiders -------------------------------------------------------------------------------------------------------


def test_outsider_without_key_does_not_join(scene: Scene) -> None:
    """An outsider without the gossip key does not join."""
    refused = scene.told("failed to receive: No installed keys could decrypt the message", count=2)
    with scene.agent("outsider", scene.tags("barge2"), key=os.urandom(32)):
        refused()
        for host in scene.mesh:
            assert "outsider" not in members(host)


@pytest.mark.parametrize("key", [None, os.urandom(32)], ids=["in clear", "another key"])
def test_outsider_forges_gossip(scene: Scene, key: bytes | None) -> None:
    """Gossip that an outsider forges, in clear or with another key, changes nothing."""
    before = scene.listed()
    scene.forge_and_wait(
        ("alive", alive(scene, "outsider", {})),
        ("alive", alive(scene, "barge2", {"wg": "noise"}, incarnation=HUGE)),
        ("dead", {"name": "barge3", "incarnation": HUGE, "from": "barge1"}),
        ("leave", {"name": "barge2", "time": 10_000}),
        *(("raw", {"hex": os.urandom(200).hex()}) for _ in range(50)),
        key=key,
    )
    assert scene.listed() == before


def alive(scene: Scene, name: str, tags: Mapping[str, str], incarnation: int = 1) -> dict[str, Any]:
    return {"name": name, "address": str(scene.stranger.address), "incarnation": incarnation, "tags": dict(tags)}


def test_outsider_replays_gossip(scene: Scene) -> None:
    """Replayed gossip of a host that moved to another subnet does not bring its old record back."""
    mover = scene.mesh[2]
    with capture(scene.lab, "udp port 7946") as heard:
        mover.run(["meshd", "renumber", "--subnet", "172.20.203.0/24"])
        eventually(lambda: all(members(h)["barge3"]["subnet"] == "172.20.203.0/24" for h in scene.mesh), 10, "moved")
        mover.run(["meshd", "renumber", "--subnet", overlay(mover) + "/24"])
        eventually(
            lambda: all(members(h)["barge3"]["subnet"] == f"{overlay(mover)}/24" for h in scene.mesh), 10, "back"
        )
    packets = [("raw", {"hex": payload.hex()}) for payload in udp_payloads(heard[0])]
    assert len(packets) > 20, "there was gossip to replay"
    scene.forge_and_wait(*packets[-400:], key=None)
    for host in scene.mesh:
        host.run(["meshd", "sync"])
        assert members(host)["barge3"]["subnet"] == f"{overlay(mover)}/24"


def move(scene: Scene, host: LabHost, subnet: str) -> None:
    host.run(["meshd", "renumber", "--subnet", subnet])
    for other in scene.mesh:
        eventually(lambda h=other: members(h)[host.name]["subnet"] == subnet, 10, f"{host.name} has {subnet}")  # type: ignore[misc]


def udp_payloads(pcap: bytes) -> Iterator[bytes]:
    """Give the payloads of a capture of UDP over IPv4 over Ethernet (pcap-savefile(5))."""
    at = PCAP_HEADER
    while at + 16 <= len(pcap):
        (length,) = struct.unpack_from("=I", pcap, at + 8)
        packet, at = pcap[at + 16 : at + 16 + length], at + 16 + length
        header = 14 + (packet[14] & 15) * 4
        yield packet[header + 8 :]


# --- who has the gossip key, and no certificate ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({}, "no record"),
        ({"wg": "A" * 43 + "=", "subnet": "172.20.99.0/24", "meshd": "2.AAAA"}, "ends early"),
        ({"noise": base64.b85encode(os.urandom(390)).decode()}, "no record"),
    ],
    ids=["none", "made up", "512 bytes of noise"],
)
def test_key_holder_under_own_name(scene: Scene, tags: dict[str, str], reason: str) -> None:
    """A holder of the gossip key under its own name is refused."""
    with scene.agent("stranger", tags):
        scene.refused("stranger", reason)


def test_key_holder_copies_tags(scene: Scene) -> None:
    """A holder of the gossip key with the tags of a host is refused."""
    with scene.agent("copycat", scene.tags("barge2")):
        scene.refused("copycat", "not from this mesh's authority, or for another name")


def test_key_holder_takes_name_of_alive_host(scene: Scene) -> None:
    """A holder of the gossip key under the name of a living host takes nothing from it."""
    heard = scene.told("Conflicting address for barge2", scene.mesh[0])
    with scene.agent("barge2", {"wg": "noise"}):
        heard()
        for host in scene.mesh:
            host.run(["meshd", "sync"])
        scene.unharmed()


def test_key_holder_takes_name_of_failed_host(scene: Scene) -> None:
    """A holder of the gossip key gets a failed host's name in Serf, after some 40 s, and takes nothing from it."""
    victim, copied, taken = scene.mesh[2], scene.tags("barge3"), f"{scene.stranger.address}:7946"
    with agents_stopped(scene, victim):
        eventually(lambda: members(scene.mesh[0])["barge3"]["state"] == "failed", SUSPECTED, "it is seen as failed")
        with scene.agent("barge3", {}):
            # Each Serf counts from when itself saw it fail; one that counts longer than another hears of it 30 s later.
            for host in scene.mesh[:2]:
                eventually(lambda h=host: scene.listed(h)["barge3"]["addr"] == taken, 90, "the name is taken")  # type: ignore[misc]
            scene.refused("barge3", "no record")
            scene.unharmed()
        with scene.agent("barge3", copied):
            eventually(lambda: scene.tags("barge3") == copied, 10, "with the tags of the host itself")
            scene.mesh[0].run(["meshd", "sync"])
            assert members(scene.mesh[0])["barge3"]["endpoint"] == f"{victim.address}:51820"
            scene.unharmed()


@contextmanager
def agents_stopped(scene: Scene, victim: LabHost) -> Iterator[None]:
    """Let neither Serf nor the daemon of a host run in this block, in which somebody else may take its name."""
    stop_agents(victim)
    try:
        yield
    finally:
        revive(scene, victim)


def revive(scene: Scene, victim: LabHost) -> None:
    """Start the agents of a host whose name somebody else had; the others' Serf has to believe it again."""
    restart_serfs(scene)
    victim.run(["meshd", "up", "--timeout", "1"])


def restart_serfs(scene: Scene) -> None:
    """Let every Serf begin anew: it forgets what somebody has made it believe, and the daemon starts it again."""
    for host in scene.mesh:
        host.run(["sh", "-c", "kill -KILL $(pgrep -f '^[^ ]*serf agent')"], check=False)


def stop_agents(host: LabHost) -> None:
    # The daemon first, which would start Serf again.
    host.run(["sh", "-ec", f"kill -KILL $(cat {STATE}/agent.pid); kill -KILL $(pgrep -f '^[^ ]*serf agent')"])


def test_key_holder_forges_leave_and_death(scene: Scene) -> None:
    """A forged leave or death costs no packet."""
    with unbroken([(scene.mesh[0], scene.mesh[1])]) as lost:
        for _ in range(20):
            # The host itself contradicts at once; whoever believes it for a moment must not act on it.
            scene.forge(
                ("dead", {"name": "barge2", "incarnation": HUGE // 2, "from": "barge2"}),
                ("dead", {"name": "barge2", "incarnation": HUGE // 2, "from": "barge1"}),
                ("leave", {"name": "barge2", "time": 100_000}),
            )
        scene.mesh[0].run(["meshd", "sync"])
        scene.unharmed()
    assert lost == []
    # A Serf may go on believing that the host is about to leave, whatever that says.
    restart_serfs(scene)


# --- members that overreach ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def insider(scene: Scene) -> Iterator[LabHost]:
    """barge4 as a member, whose agents are stopped: the tests speak in its name."""
    join(scene.stranger, scene.mesh[0], invitation(scene.mesh[0]), "--no-docker")
    # In its record, too, which the next reconcile signs again.
    eventually(lambda: keys(scene.stranger)[1].certificate.delegation is None, 20, "the authority has confirmed it")
    eventually(lambda: confirmed(scene), 45, "and all have its newest record")
    stop_agents(scene.stranger)
    scene.others = 3
    try:
        yield scene.stranger
    finally:
        scene.stranger.run(["meshd", "leave", "--force"], check=False)


def confirmed(scene: Scene) -> bool:
    newest = keys(scene.stranger)[1]
    return all(state(host).roster().hosts.get("barge4") == newest for host in scene.mesh)


CLAIMS = {
    "another's subnet": ("172.20.102.0/24", "is held by barge2"),
    "a /8": ("172.0.0.0/8", "outside of the overlay"),
    "everything": ("0.0.0.0/0", "outside of the overlay"),
    "the underlay's own network": ("10.10.10.0/24", "outside of the overlay"),
    "a longer prefix of another's": ("172.20.102.0/25", "is not a /24"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_member_claims_foreign_subnet(scene: Scene, insider: LabHost, what: str) -> None:
    """A member that claims a subnet that it may not have is refused."""
    subnet, reason = CLAIMS[what]
    own = keys(insider)[1]
    record = replace(own, subnet=IPv4Network(subnet))
    with scene.agent("barge4", signed(insider, record)):
        scene.refused("barge4", reason)


def test_member_with_older_certificate_takes_no_subnet(scene: Scene, insider: LabHost) -> None:
    """A known host does not move for a member with an older certificate; strangers would settle it so, after 5 s."""
    founder, own = state(scene.mesh[0]).authority_key, keys(insider)[1]
    assert founder is not None
    first = certificates.certify(founder, "meshd", "barge4", replace(own.certificate, serial=1))
    with scene.agent("barge4", signed(insider, replace(own, subnet=IPv4Network("172.20.102.0/24"), certificate=first))):
        scene.refused("barge4", "is held by barge2")
        time.sleep(8)
        scene.refused("barge4", "is held by barge2")
        assert members(scene.mesh[0])["barge2"]["subnet"] == "172.20.102.0/24"


def test_member_claims_endpoint_of_another_host(scene: Scene, insider: LabHost) -> None:
    """A member that claims the endpoint of another host is refused."""
    own, victim = keys(insider)[1], keys(scene.mesh[1])[1]
    with scene.agent("barge4", signed(insider, replace(own, endpoint=victim.endpoint))):
        scene.refused("barge4", "endpoint 10.10.10.102:51820 is held by barge2")


def test_member_uses_second_name(scene: Scene, insider: LabHost) -> None:
    """A member under a second name is refused."""
    own = keys(insider)[1]
    with scene.agent("barge9", signed(insider, own, "barge9")):
        scene.refused("barge9", "not from this mesh's authority, or for another name")


def test_member_signs_for_another_host(scene: Scene, insider: LabHost) -> None:
    """A record that a member signs for another host is refused."""
    victim = keys(scene.mesh[1])[1]
    forged = signed(insider, replace(victim, public_key=keys(insider)[1].public_key), "barge2")
    scene.forge_and_wait(("alive", alive(scene, "barge2", forged, incarnation=1000)), targets=1)
    scene.mesh[0].run(["meshd", "sync"])
    assert state(scene.mesh[0]).roster().hosts["barge2"] == victim


def test_member_publishes_older_record_of_another_host(scene: Scene) -> None:
    """An older record of another host is refused."""
    victim = scene.mesh[2]
    older = encode(keys(victim)[1])
    move(scene, victim, "172.20.203.0/24")
    with agents_stopped(scene, victim):
        eventually(lambda: members(scene.mesh[0])["barge3"]["state"] == "failed", SUSPECTED, "it has failed")
        scene.forge(("alive", {**alive(scene, "barge3", older, incarnation=1000), "address": str(victim.address)}))
        eventually(lambda: scene.tags("barge3") == older, 10, "Serf believes it")
        eventually(lambda: "is older than" in members(scene.mesh[0])["barge3"]["reason"], 10, "meshd refuses it")
        assert members(scene.mesh[0])["barge3"]["subnet"] == "172.20.203.0/24"
    move(scene, victim, f"{overlay(victim)}/24")


def test_member_with_expired_certificate(scene: Scene, insider: LabHost) -> None:
    """A member is cut off when its certificate expires, and is back with one that is valid."""
    founder, seed = state(scene.mesh[0]).authority_key, keys(insider)[0]
    assert founder is not None
    brief = Certificate(99, int(time.time()) + 6, certificates.public(seed))
    own = keys(insider)[1]
    brief = certificates.certify(founder, "meshd", "barge4", brief)
    with scene.agent("barge4", signed(insider, replace(own, certificate=brief))):
        eventually(lambda: not any(peer_of(host, own) for host in scene.mesh), 25, "it is cut off everywhere")
        scene.refused("barge4", "its certificate expired on")
        scene.others = 2
    # Its own certificate holds for ever: it is a member again as soon as it says so.
    with scene.agent("barge4", signed(insider, own)):
        scene.others = 3
        eventually(scene.is_whole, 20, "it is back")


def peer_of(host: LabHost, record: Record) -> bool:
    return record.public_key in peers(host)


@pytest.mark.parametrize("what", ["authority", "mesh"])
def test_member_with_certificate_of_another_mesh(scene: Scene, what: str) -> None:
    """A certificate of another authority or mesh is refused."""
    founder = state(scene.mesh[0]).authority_key
    assert founder is not None
    seed, signer = os.urandom(32), os.urandom(32) if what == "authority" else founder
    mesh = "other" if what == "mesh" else "meshd"
    made = certificates.certify(signer, mesh, "guest", Certificate(5, 0, certificates.public(seed)))
    record = certificates.sign(seed, "meshd", "guest", made_up(scene, made, "172.20.99.0/24"))
    with scene.agent("guest", encode(record)):
        scene.refused("guest", "not from this mesh's authority")


BEYOND = {
    "a name": ("other1", "172.20.99.0/24", 60, "names that begin with 'web-'"),
    "a subnet": ("web-1", "172.20.98.0/24", 60, "does not allow the subnet 172.20.98.0/24"),
    "its time": ("web-2", "172.20.99.0/24", -60, "expired"),
}


@pytest.mark.parametrize("what", BEYOND)
def test_delegation_beyond_its_terms(scene: Scene, what: str) -> None:
    """A delegation admits no host beyond its prefix, subnets and lifetime."""
    name, subnet, ttl, reason = BEYOND[what]
    founder = state(scene.mesh[0]).authority_key
    assert founder is not None
    seed, own = os.urandom(32), os.urandom(32)
    terms = Delegation(3, int(time.time()) + ttl, certificates.public(seed), "web-", (IPv4Network("172.20.99.0/24"),))
    terms = certificates.delegate(founder, "meshd", terms)
    made = certificates.certify_by(seed, "meshd", name, certificates.public(own), terms)
    with scene.agent(name, encode(certificates.sign(own, "meshd", name, made_up(scene, made, subnet)))):
        scene.refused(name, reason)


def test_confirmation_in_the_name_of_another_host_is_none(scene: Scene) -> None:
    """Who answers a question in the name of a host, whose Serf is dead, confirms nothing for it."""
    one, two, three = scene.mesh
    answers = {APPLIED: b"yes", BURY: Answer("", bytes(certificates.SIGNATURE)).payload()}
    handlers = []
    for query, answer in answers.items():
        path = scene.stranger.directory / query
        path.write_bytes(answer)
        handlers.append(f"query:{query}=cat {path}; echo {query} >> {path}.asked")
    label = re.findall(r"'(invitation-[0-9a-f]+)'", one.run(["meshd", "invite", "--reusable"]).stdout)[0]
    # An agent that an earlier test has ended would be asked as well, as long as Serf takes it for alive.
    names = {host.name for host in scene.mesh}
    for host in (one, two):
        eventually(lambda h=host: scene.alive(h) == names, SUSPECTED, "nobody else is alive")  # type: ignore[misc]
    # Its tunnels go on; its daemon, which would start Serf again, does not.
    three.run(["sh", "-c", f"kill -STOP $(cat {STATE}/agent.pid); pkill -KILL -f '[s]erf agent'"])
    tags = scene.tags("barge3")
    # One that died keeps its address for 30 s, one that said goodbye does not.
    scene.forge(("dead", {"name": "barge3", "incarnation": 1000, "from": "barge3"}), targets=2)
    try:
        with scene.agent("barge3", tags, handlers=handlers):
            address = str(scene.stranger.address)
            eventually(lambda: all(is_at(scene.listed(h)["barge3"], address) for h in (one, two)), 60, "it is barge3")
            done = one.run(["meshd", "revoke", label])
            assert "1 of 2 other hosts that are alive have confirmed it." in done.stdout
            assert "no answer from barge3" in done.stderr
            done = two.run(["meshd", "up", "--timeout", "3"])
            assert "2/3 hosts ready" in done.stderr
            assert "not ready after 3 s: barge3" in done.stderr
            asked = [scene.stranger.directory / f"{query}.asked" for query in answers]
            assert all(path.exists() for path in asked), "it was asked, and has answered"
    finally:
        three.run(["sh", "-c", f"kill -CONT $(cat {STATE}/agent.pid)"])
    eventually(lambda: any(r.name == label for r in state(three).roster().revoked.values()), 60, "the real one has it")


@pytest.mark.parametrize("ttl", [60, -60], ids=["holds", "has ended"])
def test_delegation_speaks_for_foreign_host(scene: Scene, ttl: int) -> None:
    """A holder of a delegation neither ends nor replaces a living host, with any sequence number."""
    founder, victim = state(scene.mesh[0]).authority_key, state(scene.mesh[0]).roster().hosts["barge2"]
    assert founder is not None
    seed, own = os.urandom(32), os.urandom(32)
    terms = certificates.delegate(founder, "meshd", Delegation(4, int(time.time()) + ttl, certificates.public(seed)))
    made = certificates.certify_by(seed, "meshd", "barge2", certificates.public(own), terms)
    elsewhere = Endpoint(scene.stranger.address, 51820)
    stolen = replace(victim, certificate=made, seq=2**48 - 2, endpoint=elsewhere)
    stolen = certificates.sign(own, "meshd", "barge2", stolen)
    goodbye = certificates.sign(own, "meshd", "barge2", replace(stolen, leaving=True))
    (page,) = Tombstones(grave("barge2", tombstones.of_leaving(goodbye))).pages(EVENT_LIMIT)
    events = [(GONE, page.hex()), (RECORD, TellRecord("barge2", to_wire(stolen)).payload().hex())]
    script = (
        "import json, sys; from meshd.gossip import calls; from meshd.state.directory import State\n"
        "with calls.rpc(State()) as serf:\n"
        "    for name, payload in json.load(sys.stdin): serf.event(name, bytes.fromhex(payload))"
    )
    scene.mesh[2].run([sys.executable, "-c", script], text=json.dumps(events))
    time.sleep(3)
    for host in scene.mesh:
        host.run(["meshd", "sync"])
        roster = state(host).roster()
        # Its tombstone of an identity that was never a host is kept as long as its invitation holds, and ends nobody.
        assert ttl > 0 or certificates.public(own) not in roster.gone.get("barge2", {}), host.name
        assert host.name == "barge2" or roster.hosts["barge2"].endpoint == victim.endpoint, host.name


def made_up(scene: Scene, certificate: Certificate, subnet: str) -> Record:
    """A record that is right but for what its certificate says."""
    key = base64.b64encode(os.urandom(32)).decode()
    return Record(key, IPv4Network(subnet), Endpoint(scene.stranger.address, 51820), 1, certificate)


def test_revoked_host_is_cut_off_permanently(scene: Scene, insider: LabHost, request: pytest.FixtureRequest) -> None:
    """A revoked host is cut off by all who are up, by the others when they are back, and after reboots."""
    # The tests after this one use the stranger's host for others.
    request.addfinalizer(lambda: insider.run(["meshd", "leave", "--force"], check=False))
    one, two, three = scene.mesh
    record = state(one).roster().hosts["barge4"]
    assert ping(insider, overlay(one))
    scene.lab.power_off(three)
    one.run(["meshd", "revoke", "barge4"])
    scene.others = 2
    eventually(lambda: not peer_of(one, record) and not peer_of(two, record), 5, "it is cut off by who is up")
    assert not ping(insider, overlay(one))
    insider.run(["meshd", "up", "--timeout", "1"], check=False)
    told = "the authority has revoked this host"
    eventually(lambda: told in insider.run(["meshd", "status"], check=False).stdout, 20, "it is told so")
    # The host that was down hears it from others, not only from the one that said it.
    stop_agents(one)
    scene.mesh[2] = three = scene.lab.power_on("barge3")
    three.run(["meshd", "up", "--timeout", "5"])
    eventually(lambda: not peer_of(three, record), 15, "and by who was down")
    one.run(["meshd", "up", "--timeout", "1"])
    # Everybody reboots.
    for host in list(scene.mesh):
        scene.lab.power_off(host)
    scene.mesh[:] = [scene.lab.power_on(name) for name in ("barge1", "barge2", "barge3")]
    for host in scene.mesh:
        host.run(["meshd", "up", "--timeout", "1"])
    eventually(scene.is_whole, 60, "the three are back")
    # No host looks for one that is revoked. It finds them again itself, once its own Serf has seen that they failed.
    scene.refused("barge4", "its certificate was revoked", SUSPECTED + 45)
    scene.unharmed()


# --- tags that somebody has spoiled ----------------------------------------------------------------------------------


def test_spoiled_tags_do_not_hide_host_from_newcomer(scene: Scene) -> None:
    """The last one: against a number that cannot be outdone the victim's own Serf is helpless until it restarts."""
    victim = scene.mesh[1]
    before = state(scene.mesh[0]).roster().hosts["barge2"]
    spoiled = {"wg": base64.b64encode(os.urandom(32)).decode(), "subnet": "172.20.102.0/24", "meshd": "2.AAAA"}
    forged = {**alive(scene, "barge2", spoiled, incarnation=HUGE), "address": str(victim.address)}
    scene.forge(("alive", forged))
    eventually(lambda: scene.tags("barge2") == spoiled, 10, "the tags are spoiled")
    eventually(lambda: members(scene.mesh[0])["barge2"]["state"] == "refused", 10, "there is an alarm")
    assert "WARNING refused barge2: the record ends early" in log(scene.mesh[0])
    assert state(scene.mesh[0]).roster().hosts["barge2"] == before, "the last good record stays in force"
    scene.unharmed()
    # Who joins now learns of it by asking.
    join(scene.stranger, scene.mesh[0], invitation(scene.mesh[0]), "--no-docker", "--timeout", "5", "--name", "late")
    try:
        eventually(lambda: ping(scene.stranger, overlay(victim)), 20, "the late joiner reaches it")
    finally:
        scene.stranger.run(["meshd", "leave"])
    eventually(lambda: all(len(peers(host)) == 2 for host in scene.mesh), 20, "it has left")
    revive(scene, victim)


def test_key_holder_makes_thousand_members(scene: Scene) -> None:
    """A thousand bogus members change nothing, fill no log and close the mesh to nobody."""
    bogus = [("alive", alive(scene, f"bogus{n}", {"wg": "x", "subnet": f"172.20.{n % 256}.0/24"})) for n in range(1000)]
    scene.forge(*bogus)
    eventually(lambda: len(members(scene.mesh[1])) > 500, 30, "Serf has taken them in")
    scene.unharmed()
    assert log(scene.mesh[0]).count("refused bogus") < 300, "nor do they fill the log"
    # And the mesh is not closed by it.
    offer = invitation(scene.mesh[0])
    join(scene.stranger, scene.mesh[1], offer, "--no-docker", "--name", "newcomer")
    try:
        assert members(scene.mesh[0])["newcomer"]["state"] == "alive"
    finally:
        left = scene.stranger.run(["meshd", "leave"])
    assert "no other host knows" not in left.stdout + left.stderr
    eventually(lambda: all(len(peers(host)) == scene.others for host in scene.mesh), 10, "it has left")


def test_revocation_reaches_hosts_among_bogus_members(scene: Scene) -> None:
    """Serf passes a message on to a few members picked at random; with 200 dead ones nearly none of it arrives."""
    one = scene.mesh[0]
    one.run(["meshd", "invite", "ghost"])
    scene.forge(*(("alive", alive(scene, f"void{number}", {})) for number in range(200)))
    eventually(lambda: "".join(members(one)).count("void") > 100, 30, "Serf has taken them in")
    one.run(["meshd", "revoke", "ghost"])
    for host in scene.mesh:
        assert "ghost" in {revocation.name for revocation in state(host).roster().revoked.values()}, host.name
