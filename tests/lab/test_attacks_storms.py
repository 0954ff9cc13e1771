"""What must not work by saying much, or by saying again what was true once.

barge1 to barge3 are the mesh. barge4 does the attacking: at first with the gossip key alone, later as a member.
"""

import base64
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations

import pytest

from meshd.endpoint import Endpoint
from meshd.gossip.messages import EVENT_LIMIT, GONE, RECORD, TellRecord
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import certificates
from meshd.mesh.model import Record
from meshd.mesh.records import to_wire
from tests.lab.conftest import eventually, invitation, join, log, members, nothing_in_clear, overlay, peers, ping
from tests.lab.test_attacks import FORGE, Scene, alive, is_refused, keys, restart_serfs, signed, state, stop_agents
from tests.lab.test_attacks_names import SEND, send
from tests.lab.traffic import unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

SECONDS = 15
# Clock ticks in a second (sysconf); user and system time are fields 14 and 15 of /proc/PID/stat (proc(5)).
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    return Scene(lab)


@pytest.fixture(autouse=True)
def _nothing_happened(scene: Scene) -> Iterator[None]:
    eventually(scene.is_whole, 60, "the mesh is whole before the attack")
    with nothing_in_clear(scene.lab), unbroken(list(permutations(scene.mesh, 2))) as wrong:
        yield
    assert wrong == [], "no packet is lost"
    scene.unharmed()


def spent(host: LabHost) -> float:
    """The processor time in seconds that a host's daemon has used so far."""
    stat = host.run(["sh", "-c", "cat /proc/$(cat /var/lib/meshd/agent.pid)/stat"]).stdout
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def bounded(scene: Scene, share: float, lines: int) -> Iterator[None]:
    """Fail if a daemon takes more than this share of a processor in the block, or logs more lines."""
    before = {host: (spent(host), log(host).count("\n")) for host in scene.mesh}
    begun = time.monotonic()
    yield
    lasted = time.monotonic() - begun
    for host, (time_before, lines_before) in before.items():
        used, logged = (spent(host) - time_before) / lasted, log(host).count("\n") - lines_before
        print(f"{host.name}: {used:.0%} of a processor, {logged} lines in {lasted:.0f} s")  # noqa: T201
        assert used < share, host.name
        assert logged < lines, log(host)[-2000:]


def event(name: str, record: Record) -> tuple[str, str]:
    return RECORD, TellRecord(name, to_wire(record)).payload().hex()


# --- with the gossip key alone ---------------------------------------------------------------------------------------


def test_agents_come_and_go_without_end(scene: Scene) -> None:
    """Agents that join and die under ever new names keep no daemon busy, and fill no log."""
    script = """
import json, subprocess, sys, time
config, until, number = json.load(sys.stdin), time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < until:
    number += 1
    config["node_name"] = f"storm{number}"
    with open("/run/storm.json", "w") as file:
        json.dump(config, file)
    agent = subprocess.Popen(["serf", "agent", "-config-file=/run/storm.json"], stdout=-3, stderr=-3)
    time.sleep(0.5)
    agent.kill()
    agent.wait()
print(number)
"""
    config = {
        "bind": str(scene.stranger.address),
        "encrypt_key": base64.b64encode(scene.gossip_key).decode(),
        "disable_name_resolution": True,
        "start_join": [str(host.address) for host in scene.mesh],
    }
    with bounded(scene, 0.6, 400):
        storm = scene.stranger.run([sys.executable, "-c", script, str(SECONDS)], text=json.dumps(config))
    assert int(storm.stdout) > SECONDS / 2
    assert any("storm" in name for name in members(scene.mesh[0])), "they were there"


def test_one_exchange_lists_five_thousand_members(scene: Scene) -> None:
    """A single exchange of state over TCP that lists five thousand members costs no host, and no packet."""
    task = {
        "key": scene.gossip_key.hex(),
        "targets": [str(host.address) for host in scene.mesh],
        "messages": [],
        "streams": [["state", {"members": 5000, "address": str(scene.stranger.address)}]],
    }
    scene.stranger.run([sys.executable, str(FORGE)], text=json.dumps(task))
    eventually(lambda: sum(n.startswith("listed") for n in scene.listed()) > 4000, 30, "Serf has taken them in")
    with bounded(scene, 1.0, 400):
        offer = invitation(scene.mesh[0])
        join(scene.stranger, scene.mesh[1], offer, "--no-docker", "--name", "newcomer")
        assert ping(scene.stranger, overlay(scene.mesh[2]))
        scene.stranger.run(["meshd", "leave"])
    eventually(lambda: all(len(peers(host)) == scene.others for host in scene.mesh), 20, "it has left")
    restart_serfs(scene)


def test_coordinates_that_are_no_numbers(scene: Scene) -> None:
    """Coordinates that are no numbers, in the answers to Serf's probes, break nothing."""
    task = {
        "key": scene.gossip_key.hex(),
        "targets": [str(host.address) for host in scene.mesh],
        "messages": [("alive", alive(scene, "nowhere", {}))],
        "answer": 3 * len(scene.mesh),
    }
    scene.stranger.run([sys.executable, str(FORGE)], text=json.dumps(task))
    for host in scene.mesh:
        assert "panic" not in (host.directory / "meshd" / "serf.log").read_text(errors="replace")
        assert host.run(["meshd", "sync"]).returncode == 0


# --- as a member -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def insider(scene: Scene) -> Iterator[LabHost]:
    """barge4 as a member that the authority itself has certified; its agents are stopped: the tests speak for it."""
    join(scene.stranger, scene.mesh[0], invited(scene, "barge4"), "--no-docker")
    scene.others = 3
    stop_agents(scene.stranger)
    try:
        yield scene.stranger
    finally:
        scene.stranger.run(["meshd", "leave", "--force"], check=False)


def invited(scene: Scene, name: str) -> str:
    return scene.mesh[0].run(["meshd", "invite", name]).stdout.split("MESHD_INVITE=")[1].split()[0]


def test_goodbye_said_again_after_a_second_join(scene: Scene, insider: LabHost) -> None:
    """The goodbye of a host's earlier time in the mesh, said again, does not end the host that has joined since."""
    insider.run(["meshd", "up"])
    insider.run(["meshd", "leave"])
    eventually(lambda: all("barge4" in state(h).roster().gone for h in scene.mesh), 20, "its goodbye is heard")
    goodbyes = [page.hex() for page in state(scene.mesh[1]).roster().all_tombstones.pages(EVENT_LIMIT)]
    join(insider, scene.mesh[0], invited(scene, "barge4"), "--no-docker")
    for _ in range(3):
        scene.mesh[1].run([sys.executable, "-c", SEND], text=json.dumps([(GONE, page) for page in goodbyes]))
        for host in scene.mesh:
            host.run(["meshd", "sync"])
            assert keys(insider)[1].public_key in peers(host), host.name
            assert ping(host, overlay(insider)), host.name
    assert insider.run(["meshd", "status"], check=False).returncode == 0
    stop_agents(insider)


def test_two_claims_in_one_reconcile(scene: Scene, insider: LabHost) -> None:
    """A member that claims one host's subnet by its tags, and another host's endpoint by an event, gets neither."""
    identity, own = keys(insider)
    two, three = scene.mesh[1:]
    subnet = keys(two)[1].subnet
    later = replace(own, seq=time.time_ns() // 10**6 + 1000, endpoint=Endpoint(three.address, 51820))
    with scene.agent("barge4", signed(insider, replace(own, subnet=subnet))):
        send(two, "barge4", certificates.sign(identity, "meshd", "barge4", later))
        for host in scene.mesh:
            eventually(lambda h=host: is_refused(h, "barge4", "is held by"), 45, "it is refused")  # type: ignore[misc]
            host.run(["meshd", "sync"])
            known = state(host).roster().hosts["barge4"]
            assert (known.subnet, known.endpoint) == (own.subnet, own.endpoint), host.name


def test_record_that_changes_without_end(scene: Scene, insider: LabHost) -> None:
    """A member that says a new endpoint of its own thirty times a second keeps no daemon busy, and fills no log."""
    identity, own = keys(insider)
    script = """
import json, sys, time
from meshd.gossip import serf_agent
from meshd.state.directory import State
events, begun = json.load(sys.stdin), time.monotonic()
with serf_agent.rpc(State()) as serf:
    for number, (name, payload) in enumerate(events):
        serf.event(name, bytes.fromhex(payload))
        time.sleep(max(0, begun + number / 30 - time.monotonic()))
"""
    first = time.time_ns() // 10**6
    said = [
        replace(own, seq=first + number, endpoint=Endpoint(insider.address, 51820 + number % 2))
        for number in range(30 * SECONDS)
    ]
    events = [event("barge4", certificates.sign(identity, "meshd", "barge4", record)) for record in said]
    with bounded(scene, 0.8, 800):
        scene.mesh[1].run([sys.executable, "-c", script], text=json.dumps(events))
        for host in scene.mesh:
            eventually(lambda h=host: state(h).roster().hosts["barge4"].seq == said[-1].seq, 10, "all have the last")  # type: ignore[misc]
