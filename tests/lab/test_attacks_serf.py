"""What must not work against Serf's agent, by a local user for whom its port is free, or by a member with Serf's tools.

barge1 and barge2 are a mesh of hosts with a daemon. barge3 is set up without one at first, and its Serf does not run.
"""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import pairwise, permutations
from pathlib import Path
from typing import IO

import pytest

from meshd.errors import MeshdError
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import LONG, RPC_KEY, assemble, eventually, invitation, join, log, overlay, serf, settled
from tests.lab.faults import KILL_DAEMON, SERF, STATE, kill_daemon, kill_serf
from tests.lab.traffic import unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
# Takes Serf's port as soon as it is free, agrees to all that it is asked, and writes down what it hears.
SQUAT = r"""
import socket, sys, threading
def serve(connection):
    print("connected", flush=True)
    seq = 0
    while said := connection.recv(65536):
        print("heard", said, flush=True)
        seq += 1
        connection.sendall(b"\x82\xa3Seq" + bytes([seq]) + b"\xa5Error\xa0")
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
print("waits", flush=True)
while True:
    try:
        server.bind(("127.0.0.1", 7373))
        break
    except OSError:
        pass
server.listen()
print("listens", flush=True)
while True:
    threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    hosts = assemble(lab, docker=0, plain=2)
    alone = lab.power_on("barge3")
    join(alone, hosts[0], invitation(hosts[0]), "--no-docker", "--no-daemon")
    return [*hosts, alone]


@contextmanager
def squatter(host: LabHost) -> Iterator[Path]:
    """User nobody waits for Serf's port; the file says what becomes of that."""
    said = host.directory / "squatter"
    with said.open("w") as file:
        process = host.popen([*NOBODY, "/usr/bin/python3", "-I", "-c", SQUAT], stdout=file, stdin=subprocess.DEVNULL)
    eventually(lambda: "waits" in said.read_text(), 10, "the squatter is there")
    try:
        yield said
    finally:
        host.run(["pkill", "-KILL", "-u", "65534"], check=False)
        process.wait(timeout=10)


def commands(host: LabHost) -> str:
    """Run every command that asks Serf; give what they say."""
    said = ""
    for command in ("members", "status", "plan", "sync"):
        done = host.run(["meshd", command], check=False)
        said += done.stdout + done.stderr
    return said


def test_a_squatter_on_serfs_port_hears_nothing(hosts: list[LabHost]) -> None:
    one, two, _ = hosts
    one.run(["meshd", "down"])
    with squatter(one) as said:
        eventually(lambda: "listens" in said.read_text(), 10, "it has the port")
        done, told = one.run(["meshd", "up"], check=False), commands(one)
        eventually(lambda: "connected" in said.read_text(), 10, "it was asked")
        assert "heard" not in said.read_text()
        assert (done.returncode, "TCP port 7373 on 127.0.0.1 is not free" in done.stderr) == (1, True), done.stderr
        assert "another process listens on 127.0.0.1:7373" in told
    one.run(["meshd", "up"])
    eventually(lambda: settled([one, two]), 40, "it is back")


def test_who_takes_the_port_of_a_serf_that_ended_hears_nothing(hosts: list[LabHost]) -> None:
    one, two, _ = hosts
    with squatter(one) as said:
        one.run(["sh", "-ec", f"kill -KILL {SERF}"])
        eventually(lambda: "listens" in said.read_text(), 10, "it was faster than the daemon")
        eventually(lambda: said.read_text().count("connected") > 3, 10, "the daemon looks for Serf there")
        assert "heard" not in said.read_text()
        eventually(lambda: "a port is taken" in log(one), 10, "and says what is wrong")
        one.run(["sh", "-ec", KILL_DAEMON])
        one.run(["meshd", "up"], check=False)
        commands(one)
        assert "heard" not in said.read_text()
    eventually(lambda: settled([one, two]), 40, "Serf starts as soon as its port is free")


def test_without_a_daemon_a_squatter_hears_nothing(hosts: list[LabHost]) -> None:
    alone = hosts[2]
    with squatter(alone) as said:
        eventually(lambda: "listens" in said.read_text(), 10, "it has the port")
        told = commands(alone)
        assert "connected" in said.read_text(), "it was asked"
        assert "heard" not in said.read_text()
        assert "another process listens on 127.0.0.1:7373" in told


def rpc_key(host: LabHost) -> str:
    return host.run(["cat", f"{STATE}/rpc.key"]).stdout


def test_the_key_of_the_rpc_is_another_one_after_each_start_of_serf(hosts: list[LabHost]) -> None:
    one, two, _ = hosts
    first = rpc_key(one)
    kill_daemon(one)
    assert rpc_key(one) == first, "the agent that runs keeps its key"
    assert "barge1" in serf(one, "members")
    kill_serf(one)
    eventually(lambda: settled([one, two]), 40, "they see each other")
    assert rpc_key(one) != first
    assert "barge1" in serf(one, "members")
    old = f"SERF_RPC_AUTH=$(echo {first.strip()} | base64 -d | od -An -tx1 | tr -d ' \\n') serf members"
    assert "Invalid authentication token" in one.run(["sh", "-c", old], check=False).stdout, "the old one opens nothing"


# --- a member --------------------------------------------------------------------------------------------------------


# Serf's own key command, and with what it needs to know. Says what it has done to whom.
CHANGE_KEYS = f"""
key() {{ base64 -d {STATE}/rpc.key | od -An -tx1 | tr -d ' \\n'; }}
change() {{
    other=$(head -c 32 /dev/urandom | base64)
    export SERF_RPC_AUTH=$(key)
    serf keys -install $other; serf keys -use $other; serf keys -remove $(cat {STATE}/gossip.key)
}}
"""
# A member that lets nothing of meshd's get in its way: its agent is back on the mesh's key before each command.
LOOP = f"""
{CHANGE_KEYS}
until=$(($(date +%s) + $1)); shift
while [ $(date +%s) -lt $until ]; do
    serf agent -config-file={STATE}/serf.json >/dev/null 2>&1 & agent=$!
    export SERF_RPC_AUTH=$(key)
    until serf join "$@" 2>&1 | grep -v refused; do sleep 0.1; kill -0 $agent || break; done
    change
    kill -KILL $agent; wait $agent 2>/dev/null
done
"""
# How soon after the last such command the agents are back on the key of the mesh. Only a query returns their keys,
# which takes seconds while Serf waits for a member that has died: the daemons' logs tell the time.
AGAIN = timedelta(seconds=10)
FORGE = Path(__file__).with_name("forge.py")


@pytest.fixture(scope="module")
def mesh(lab: Lab, hosts: list[LabHost]) -> list[LabHost]:
    """Two hosts and a third one whose root is the attacker."""
    one, two, alone = hosts
    alone.run(["meshd", "leave", "--force"])
    join(alone, one, invitation(one), "--no-docker")
    mesh = [one, two, lab.host("barge3")]
    eventually(lambda: settled(mesh), 40, "they have met")
    return mesh


def on_the_meshs_key(hosts: list[LabHost]) -> bool:
    """Tell whether the agents of these hosts list each other and have one key, that of the mesh."""
    key = hosts[0].run(["cat", f"{STATE}/gossip.key"]).stdout.strip()
    for host in hosts:
        try:
            listed, keys = serf(host, "members", "-status=alive"), serf(host, "keys", "-list")
        except MeshdError:
            return False  # it starts again
        if not all(other.name in listed for other in hosts):
            return False
        if [line.split()[0] for line in keys.splitlines() if line.endswith("]")] != [key]:
            return False
    return True


def starts(host: LabHost, begun: int) -> list[datetime]:
    """When the daemon has started Serf, since its log had so many characters."""
    lines = [line for line in log(host)[begun:].splitlines() if line.endswith("serf started")]
    return [datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") for line in lines]


def test_keys_that_a_member_changed_are_the_meshs_again(mesh: list[LabHost]) -> None:
    begun = [len(log(host)) for host in mesh]
    with unbroken(list(permutations(mesh, 2))) as wrong:
        said, ended = mesh[2].run(["sh", "-c", f"{CHANGE_KEYS}change"], check=False).stdout, datetime.now()
        assert "Successfully changed primary key" in said, said
        eventually(lambda: on_the_meshs_key(mesh), 40, "all are on the mesh's key")
        eventually(lambda: settled(mesh), 40, "nothing is to be changed")
    assert wrong == []
    for host, length in zip(mesh, begun, strict=True):
        told = log(host)[length:]
        assert re.search(r"a member changed the keys .* Members now: barge1, barge2, barge3\n", told), told
        times = starts(host, length)
        assert 1 <= len(times) <= 2, told
        assert times[-1] - ended < AGAIN, told


def test_a_name_that_looks_like_a_key_command_starts_no_agent_again(mesh: list[LabHost]) -> None:
    one, begun = mesh[0], [len(log(host)) for host in mesh]
    key = base64.b64decode(one.run(["cat", f"{STATE}/gossip.key"]).stdout)
    name = "x\n    2026/11/26 19:05:28 [INFO] serf: Received use-key query\ny"
    member = {"name": name, "incarnation": 1, "address": "10.10.10.250", "tags": {}}
    task = {"key": key.hex(), "targets": [str(host.address) for host in mesh], "messages": [["alive", member]]}
    mesh[2].run([sys.executable, str(FORGE)], text=json.dumps(task))
    files = [host.directory / "meshd" / "serf.log" for host in mesh]
    eventually(lambda: all("EventMemberFailed: x\n" in path.read_text() for path in files), 40, "it came and failed")
    for host, length in zip(mesh, begun, strict=True):
        assert "refused x" in log(host)[length:], "the daemon has seen it"
        assert starts(host, length) == []
    for host in mesh:
        host.run(["sh", "-ec", f"kill -KILL {SERF}"])
    eventually(lambda: settled(mesh), 40, "nobody lists it any more")


def test_keys_that_were_changed_while_no_daemon_ran_are_the_meshs_again(lab: Lab, mesh: list[LabHost]) -> None:
    one, newcomer, offer = mesh[0], lab.power_on("barge4"), invitation(mesh[0])
    one.run(["sh", "-ec", KILL_DAEMON])
    before = one.run(["sh", "-ec", f"echo {SERF}"]).stdout
    mesh[2].run(["sh", "-c", f"{CHANGE_KEYS}change"], check=False)
    eventually(lambda: on_the_meshs_key(mesh[1:]), 40, "those with a daemon are")
    # What the monitor remembers is gone by the time that the daemon is back.
    one.run(["sh", "-c", f"export SERF_RPC_AUTH={RPC_KEY}; for i in $(seq 600); do serf info >/dev/null; done"])
    assert not on_the_meshs_key(mesh), "that one is not"
    assert one.run(["sh", "-ec", f"echo {SERF}"]).stdout == before
    begun, said = len(log(one)), newcomer.directory / "said"
    with said.open("w") as output:
        joining = joins(newcomer, one, offer, output)
    eventually(lambda: "has another gossip key at the moment" in said.read_text(), 10, "a join waits, and says why")
    one.run(["meshd", "up"])
    eventually(lambda: on_the_meshs_key(mesh), 40, "all are")
    assert joining.wait(timeout=40) == 0, said.read_text()
    assert len(starts(one, begun)) == 1
    eventually(lambda: settled([*mesh, newcomer]), 20, "nothing is to be changed")
    newcomer.run(["meshd", "leave"])
    eventually(lambda: settled(mesh), 20, "it is gone")


def joins(host: LabHost, via: LabHost, offer: str, output: IO[str]) -> "subprocess.Popen[str]":
    """Begin to join."""
    words = ["env", f"MESHD_INVITE={offer}", "meshd", "join", str(via.address), "--no-docker"]
    return host.popen(words, stdout=output, stderr=output)


SECONDS = 60 if LONG else 35


def test_attack_that_goes_on_costs_no_packet_and_no_host_and_a_join_succeeds(lab: Lab, mesh: list[LabHost]) -> None:
    one, two, attacker = mesh
    newcomer, offer = lab.host("barge4"), invitation(one)
    begun = [len(log(host)) for host in mesh]
    attacker.run(["sh", "-ec", f"{KILL_DAEMON}; kill -KILL {SERF}"])
    targets, said = [str(one.address), str(two.address)], newcomer.directory / "said"
    with (
        (attacker.directory / "attack").open("w") as output,
        said.open("w") as answer,
        unbroken(list(permutations(mesh, 2))) as wrong,
    ):
        attack = attacker.popen(["sh", "-c", LOOP, "sh", str(SECONDS), *targets], stdout=output, stderr=output)
        eventually(lambda: starts(one, begun[0]) and starts(two, begun[1]), 30, "it has begun")
        joining = joins(newcomer, two, offer, answer)
        attack.wait(timeout=SECONDS + 30)
        ended = datetime.now()
        eventually(lambda: on_the_meshs_key([one, two]), 40, "both are on the mesh's key")
        assert joining.wait(timeout=40) == 0, said.read_text()
        attacker.run(["meshd", "up"])
        eventually(lambda: settled([*mesh, newcomer]), 40, "all are there")
    done = (attacker.directory / "attack").read_text()
    assert done.count("Successfully changed primary key") >= 5, done
    assert wrong == []
    for host, length in zip((one, two), begun, strict=False):
        times = starts(host, length)
        pauses = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
        assert len(times) >= 5, "the attack did reach it again and again"
        assert min(pauses) > 4.9, pauses
        assert times[-1] - ended < AGAIN, "back on the mesh's key in time"
        removed = [line for line in log(host)[length:].splitlines() if "remove " in line]
        assert not [line for line in removed if any(overlay(other) in line for other in mesh)], "no peer and no route"
