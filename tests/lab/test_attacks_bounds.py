"""What the holder of a reusable invitation must not make the others keep.

barge1 to barge3 are the mesh. barge4 is the attacker: it makes hosts by the hundred, and says their goodbyes. barge5 to
barge8 are honest hosts; the last one comes by the attacker's own invitation.
"""

import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network

import pytest

from meshd.endpoint import Endpoint
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import certificates, invitations, tombstones
from meshd.mesh.model import DEFAULT_HOSTS, Record, Tombstone
from meshd.mesh.records import encode
from meshd.mesh.roster import CROWDED
from meshd.mesh.shares import PLACES
from tests.conftest import public_key
from tests.lab.conftest import LONG, eventually, join, log, members, nothing_in_clear, peers, ping
from tests.lab.test_attacks import Scene, keys, state

pytestmark = [pytest.mark.root, pytest.mark.lab]

# How long the attack goes on, in seconds, and how many hosts it makes at once.
SECONDS, AT_ONCE = (60 if LONG else 30), 200
MOST = PLACES * DEFAULT_HOSTS
# Bytes of hosts.json for each of them, and for all else.
ENTRY, REST = 900, 20_000
# Serf itself lists all that were made, for a day. Bytes by which a daemon may grow, for each of them and for all else,
# and seconds in which a process that begins anew reads one of them.
LISTED, GROWTH, READ = 12_000, 16 * 2**20, 0.0005


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    return Scene(lab)


@dataclass(slots=True)
class Holder:
    """Who has got hold of a reusable invitation: makes hosts of it, each with a subnet and an endpoint of its own."""

    scene: Scene
    offer: str
    made: int = 0
    hosts: dict[str, tuple[bytes, Record]] = field(default_factory=dict)

    def make(self) -> None:
        """Make hosts that nobody has seen before."""
        invitation = invitations.decode(self.offer)
        assert invitation.delegation is not None
        here, free = self.scene.stranger.address, list(IPv4Network("172.20.0.0/16").subnets(new_prefix=24))
        self.hosts = {}
        for place in range(AT_ONCE):
            self.made += 1
            name, identity = f"bogus{self.made}", os.urandom(32)
            public = certificates.public(identity)
            signed = certificates.certify_by(invitation.seed, "meshd", name, public, invitation.delegation)
            # Not the first subnet, and none of those that the lab's hosts take, which begin at 101.
            subnet, endpoint = free[1 + place if place < 90 else 31 + place], Endpoint(here, 20_000 + self.made)
            record = Record(public_key(name), subnet, endpoint, 1, signed)
            self.hosts[name] = identity, certificates.sign(identity, "meshd", name, record)

    def say(self, incarnation: int, *, leaving: bool) -> None:
        """Let all hosts of the mesh hear of these hosts, or of their goodbyes, by gossip."""
        messages = []
        for name, (identity, record) in self.hosts.items():
            said = replace(record, seq=2, leaving=True) if leaving else record
            tags = encode(certificates.sign(identity, "meshd", name, said))
            fields = {"name": name, "address": str(self.scene.stranger.address), "incarnation": incarnation}
            messages.append(("alive", {**fields, "tags": tags}))
        self.scene.forge(*messages)
        wanted = set(self.hosts)
        what = "the goodbyes are heard" if leaving else "the hosts are heard"
        for host in self.scene.mesh:
            eventually(lambda h=host: self.heard(h, wanted, leaving=leaving) * 2 > AT_ONCE, 30, what)  # type: ignore[misc]

    def vanish(self) -> None:
        """Let them die in Serf: many that are alive there swallow gossip, which is another attack."""
        dead = [("dead", {"name": name, "incarnation": 2, "from": name}) for name in self.hosts]

        def are_dead() -> bool:
            self.scene.forge(*dead)
            rows = self.scene.listed()
            alive = [name for name in self.hosts.keys() & rows.keys() if rows[name]["status"] == "alive"]
            return len(alive) < AT_ONCE / 20

        eventually(are_dead, 30, "they are dead")

    def heard(self, host: LabHost, wanted: set[str], *, leaving: bool) -> int:
        """How many of them Serf on a host lists, with this word."""
        before = {name: encode(record)["meshd"] for name, (_, record) in self.hosts.items()}
        rows = self.scene.listed(host)
        tags = {name: rows[name]["tags"].get("meshd") for name in wanted & rows.keys()}
        return sum((tag == before[name]) != leaving for name, tag in tags.items())


def kept(host: LabHost) -> tuple[int, int]:
    """How many hosts, and how many tombstones, a host keeps by reusable invitations."""
    roster = state(host).roster()
    hosts = sum(r.certificate.delegation is not None for r in roster.hosts.values())
    return hosts, sum(t.is_delegated for _, _, t in tombstones.each(roster.gone))


def size(host: LabHost) -> int:
    return (host.directory / "meshd" / "hosts.json").stat().st_size


def memory(host: LabHost) -> int:
    """The bytes of memory that a host's daemon has."""
    said = host.run(["sh", "-c", "cat /proc/$(cat /var/lib/meshd/agent.pid)/status"]).stdout
    return int(re.findall(r"VmRSS:\s+(\d+) kB", said)[0]) * 1024


def reconcile(host: LabHost) -> float:
    """The seconds of a processor that a reconcile takes, the median of five."""
    spent = []
    for _ in range(5):
        # The second line of `times` has the minutes and seconds of what the shell has run, the user's and the system's.
        said = host.run(["sh", "-ec", "meshd sync >/dev/null; times"]).stdout.splitlines()[1]
        spent.append(sum(60 * int(m) + float(s) for m, s in re.findall(r"(\d+)m([\d.]+)s", said)))
    return statistics.median(spent)


def invite(host: LabHost, *options: str) -> tuple[str, str]:
    """Return a reusable invitation, and the name by which it is revoked."""
    said = host.run(["meshd", "invite", "--reusable", *options]).stdout
    return said.split("MESHD_INVITE=")[1].split()[0], re.findall(r"'(invitation-[0-9a-f]+)'", said)[0]


def is_confirmed(scene: Scene, host: LabHost) -> bool:
    """Tell whether a host has the authority's own certificate, and all others have it as a host."""
    mine = keys(host)[1]
    known = [state(other).roster().hosts.get(host.name) for other in scene.mesh]
    return mine.certificate.delegation is None and known == [mine] * len(scene.mesh)


def revoke(host: LabHost, name: str) -> float:
    """The seconds that it takes to revoke a host or an invitation."""
    begun = time.monotonic()
    host.run(["meshd", "revoke", name])
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def honest(scene: Scene) -> Iterator[Sequence[LabHost]]:
    hosts = [scene.lab.power_on(f"barge{number}") for number in range(5, 9)]
    with nothing_in_clear(scene.lab):
        yield hosts


def test_an_invitation_fills_no_disk(scene: Scene, honest: Sequence[LabHost]) -> None:
    """Hosts and their goodbyes without a pause leave a bounded rest on every host, and the revocation nothing of it."""
    one = scene.mesh[0]
    (stolen, label), (offer, _) = invite(one), invite(one, "--hosts", "3")
    before = {host: (memory(host), reconcile(host)) for host in scene.mesh}
    holder, until = Holder(scene, stolen), time.monotonic() + SECONDS
    seen: dict[LabHost, int] = dict.fromkeys(scene.mesh, 0)
    while time.monotonic() < until:
        holder.make()
        holder.say(1, leaving=False)
        seen = {host: max(most, sum(kept(host))) for host, most in seen.items()}
        holder.say(2, leaving=True)
        seen = {host: max(most, sum(kept(host))) for host, most in seen.items()}
        holder.vanish()
    assert holder.made > 2 * MOST, "the attack is one"
    assert all(DEFAULT_HOSTS < most <= MOST for most in seen.values()), seen

    for host in honest[:3]:
        join(host, one, offer, "--no-docker")
    for host in honest[:3]:
        eventually(lambda h=host: is_confirmed(scene, h), 90, f"{host.name} is a host")  # type: ignore[misc]
    scene.others += 3
    # By the attacker's own invitation a host has no place before the authority has confirmed it.
    last = honest[3]
    join(last, one, stolen, "--no-docker", "--timeout=1")
    eventually(lambda: is_confirmed(scene, last), 120, "the authority has confirmed it")
    assert any(CROWDED in log(host) for host in scene.mesh)
    assert all(ping(host, members(host)["barge8"]["subnet"].partition("/")[0]) for host in scene.mesh)

    for host, (had, took) in before.items():
        print(f"{host.name}: {holder.made} made, {kept(host)} kept, {size(host)} bytes, memory {had} to {memory(host)}")  # noqa: T201
        print(f"{host.name}: a reconcile took {took:.2f} s of a processor, now {reconcile(host):.2f} s")  # noqa: T201
        assert sum(kept(host)) <= MOST
        assert size(host) < MOST * ENTRY + REST
        assert memory(host) < had + GROWTH + holder.made * LISTED
        assert reconcile(host) < 2 * took + holder.made * READ
        assert "internal error" not in log(host)

    of_host, of_invitation = revoke(one, "barge7"), revoke(one, label)
    print(f"revoke took {of_host:.1f} s for a host, {of_invitation:.1f} s for the invitation")  # noqa: T201
    assert of_invitation < 2 * of_host + 2
    for host in scene.mesh:
        eventually(lambda h=host: kept(h) == (0, 0), 30, f"{host.name} has nothing of it left")  # type: ignore[misc]
        assert size(host) < REST
        # barge5, barge6 and barge8 stay: the authority has confirmed them.
        eventually(lambda h=host: len(peers(h)) == 5, 30, f"{host.name} has its peers, and no others")  # type: ignore[misc]
    assert [t for _, _, t in tombstones.each(state(one).roster().gone) if isinstance(t, Tombstone)] == []
