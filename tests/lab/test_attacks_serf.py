"""What must not work against Serf's agent, by a local user for whom its port is free, or by a member with Serf's tools.

barge1 and barge2 are a mesh of hosts with a daemon; barge3 is set up without one, and its Serf does not run.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, eventually, invitation, join, log, serf, settled
from tests.lab.faults import KILL_DAEMON, SERF, STATE, kill_daemon, kill_serf

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
        done = one.run(["meshd", "up"], check=False)
        assert (done.returncode, "a port is taken" in done.stderr) == (1, True), done.stderr
        assert "another process listens on 127.0.0.1:7373" in commands(one)
        eventually(lambda: "connected" in said.read_text(), 10, "it was asked")
        assert "heard" not in said.read_text()
    eventually(lambda: settled([one, two]), 40, "Serf starts as soon as its port is free")


def test_who_takes_the_port_of_a_serf_that_ended_hears_nothing(hosts: list[LabHost]) -> None:
    one, two, _ = hosts
    with squatter(one) as said:
        one.run(["sh", "-ec", f"kill -KILL {SERF}"])
        eventually(lambda: "listens" in said.read_text(), 10, "it was faster than the daemon")
        eventually(lambda: said.read_text().count("connected") > 3, 10, "the daemon looks for Serf there")
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
        assert "another process listens on 127.0.0.1:7373" in commands(alone)
        alone.run(["meshd", "up"])
        assert "connected" in said.read_text(), "it was asked"
        assert "heard" not in said.read_text()


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
