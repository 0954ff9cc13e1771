"""Two machines that want one name at the same second, through different members: one gets it, and the other one none.

`MESHD_LONG=1` for more of them, `MESHD_SEED=7` to repeat a run.
"""

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

from meshd.errors import InputError
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh.twins import HOLD
from meshd.state.directory import State
from tests.lab.conftest import LONG, SUSPECTED, assemble, eventually, invitation, peers, serf, snapshot
from tests.lab.faults import new_key
from tests.lab.test_handshakes import losing
from tests.lab.test_undone import PROCESSES, STATE

pytestmark = [pytest.mark.root, pytest.mark.lab]

DRAWS = int(os.environ.get("MESHD_DRAWS", "20" if LONG else "2"))
# Seconds from the first of the two commands until all hosts have the same one of the two, and until both have ended.
AGREED, ENDED = 15.0, 40.0
# Serf gives the name to another address only when the agent that had it first is dead for 30 s.
FORGOTTEN = 30.0 + SUSPECTED


@dataclass(frozen=True, slots=True)
class Scene:
    """A mesh of three, and two machines beside it."""

    mesh: list[LabHost]
    twins: list[LabHost]

    def winner(self, name: str) -> LabHost | None:
        """Give the one of the two that all hosts have for a name."""
        keys = {key(host, name) for host in self.mesh}
        return next((twin for twin in self.twins if keys == {own_key(twin)}), None)


@pytest.fixture(scope="module")
def meeting(lab: Lab) -> Scene:
    return Scene(assemble(lab, docker=0, plain=3), [lab.power_on(name) for name in ("barge4", "barge5")])


@pytest.fixture
def scene(meeting: Scene) -> Iterator[Scene]:
    yield meeting
    for twin in meeting.twins:
        twin.run(["meshd", "leave", "--force"], check=False)


@pytest.mark.parametrize("kind", ["reusable", "named"])
def test_one_of_two_gets_the_name(lab: Lab, scene: Scene, kind: str) -> None:
    """All hosts agree on one; the other one's join ends with an error, and its host is as it was before."""
    seed = int(os.environ.get("MESHD_SEED") or random.SystemRandom().randrange(10**6))
    draw, one = random.Random(seed), scene.mesh[0]
    for number in range(DRAWS):
        # Serf takes its time to give a name away, so each draw has another one.
        name, vias = f"{kind}{number}", draw.sample(scene.mesh, 2)
        # Here gossip needs 0.2 s, and who comes later meets the name. Among more hosts it needs longer.
        gap, slow = draw.uniform(0, 0.2), draw.choice([None, 0.0, 0.0, draw.uniform(0, 1)]) if number else 0.0
        text = (
            f"MESHD_SEED={seed}, draw {number}: {kind}, through {[via.name for via in vias]}, {gap:.2f} s apart, "
            f"gossip takes {'its time' if slow is None else f'{slow:.2f} s more'}"
        )
        named = ["meshd", "invite", name]
        offer = invitation(one) if kind == "reusable" else one.run(named).stdout.split("MESHD_INVITE=")[1].split()[0]
        before = [snapshot(twin) for twin in scene.twins]
        begun, joins = time.monotonic(), list[subprocess.Popen[str]]()
        with slow_gossip(lab, vias, name, slow):
            for twin, via in zip(scene.twins, vias, strict=True):
                command = ["env", f"MESHD_INVITE={offer}", "meshd", "join", str(via.address), "--no-docker"]
                joins.append(twin.popen([*command, f"--name={name}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE))
                time.sleep(gap)
        agreed = follow(scene, name, joins, begun)
        said = [join.communicate(timeout=ENDED) for join in joins]
        both = f"{text}\n" + "\n".join(f"{j.returncode}: {out}{err}" for j, (out, err) in zip(joins, said, strict=True))
        ended = time.monotonic() - begun
        print(f"agreed after {agreed:.1f} s, ended after {ended:.1f} s\n{both}", flush=True)  # noqa: T201

        assert sorted(join.returncode == 0 for join in joins) == [False, True], both
        lost = next(number for number in (0, 1) if joins[number].returncode)
        loser, winner = scene.twins[lost], scene.twins[1 - lost]
        assert "4/4 hosts ready" in said[1 - lost][1], both
        assert said[lost][1].startswith("Error: "), both
        assert name in said[lost][1], both
        assert "not undone" not in said[lost][1], both
        eventually(lambda w=winner, n=name: scene.winner(n) is w, AGREED, f"all have the one that is ready\n{both}")  # type: ignore[misc]
        assert agreed < AGREED, both
        assert snapshot(loser) == before[lost]
        assert loser.run(PROCESSES, check=False).stdout == ""
        assert loser.run(["ls", "-A", STATE]).stdout == ""
        there = [f"{winner.address} alive"]
        if number == DRAWS - 1 and LONG:
            took = eventually(lambda n=name, t=there: all(listed(h, n) == t for h in scene.mesh), FORGOTTEN, "no other")  # type: ignore[misc]
            print(f"no other one is listed after {took:.1f} s", flush=True)  # noqa: T201
            assert winner.run(["meshd", "status"], check=False).returncode == 0
        # Two machines had the identity of an invitation for one name, and a host does not leave while it has a twin.
        eventually(lambda w=winner: w.run(["meshd", "leave"], check=False).returncode == 0, 2 * HOLD, "it leaves")  # type: ignore[misc]
        eventually(lambda n=name: not any(key(host, n) for host in scene.mesh), 10, "it has left")  # type: ignore[misc]


def test_older_record_is_not_ready(scene: Scene) -> None:
    """A host whose state is an older copy hears that the others have a newer record of it, and is not told yes."""
    one, _, three = scene.mesh
    three.run(["sh", "-ec", f"meshd down; cp -a {STATE} /run/older; meshd up"])
    new_key(three)
    newer = own_key(three)
    eventually(lambda: newer in peers(one), 10, "the others have its new key")
    three.run(["sh", "-ec", f"meshd down; cp -a {STATE} /run/newer; rm -rf {STATE}/*; cp -a /run/older/. {STATE}"])
    said = three.run(["meshd", "up", "--timeout=3"]).stderr
    assert "1/3 hosts ready" in said
    assert re.search(r"barge1 is not ready: its record \d+ is older than \d+, which stays in force", said)
    three.run(["sh", "-ec", f"meshd down; rm -rf {STATE}/*; cp -a /run/newer/. {STATE}"])
    assert "3/3 hosts ready" in three.run(["meshd", "up"]).stderr


@contextmanager
def slow_gossip(lab: Lab, vias: list[LabHost], name: str, seconds: float | None) -> Iterator[None]:
    """Let nobody hear of the other one for so long after each of the two is listed by the member that it came by.

    Serf gossips over UDP. It joins over TCP, and by that it sees that the others are alive.
    """
    with losing(lab, "gossip", None if seconds is None else "udp dport 7946"):
        yield
        if seconds is not None:
            eventually(lambda: all(listed(via, name) for via in vias), 30, "both are members")
            time.sleep(seconds)


def follow(scene: Scene, name: str, joins: list["subprocess.Popen[str]"], begun: float) -> float:
    """Wait until the commands have ended; give the seconds after which all had the one that they have then."""
    agreed, last = 0.0, None
    while time.monotonic() - begun < ENDED and (last is None or any(join.poll() is None for join in joins)):
        now = time.monotonic() - begun
        if (found := scene.winner(name)) is not last:
            agreed, last = now, found
        time.sleep(0.1)
    return agreed if last is not None else ENDED


def own_key(twin: LabHost) -> str | None:
    with suppress(InputError):  # a join that fails takes its state away meanwhile
        claim = State(twin.directory / "meshd").claim()
        return claim.record.public_key if claim is not None else None
    return None


def key(host: LabHost, name: str) -> str:
    """The WireGuard key that a host of the mesh has for a name, in its roster and in its kernel."""
    record = State(host.directory / "meshd").roster().hosts.get(name)
    return record.public_key if record is not None and record.public_key in peers(host) else ""


def listed(host: LabHost, name: str) -> list[str]:
    """What Serf on a host says of the members of a name: where they are, and in which state."""
    rows = json.loads(serf(host, "members", "-format=json"))["members"]
    return [f"{row['addr'].partition(':')[0]} {row['status']}" for row in rows if row["name"] == name]
