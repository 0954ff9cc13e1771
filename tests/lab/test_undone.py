"""A command that cannot end as it should: what it leaves behind, and that it, or another one, ends it well."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from meshd.lab import images
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import SUSPECTED, eventually, init, invitation, join, members, run_container, snapshot
from tests.lab.test_bad_input import listener

pytestmark = [pytest.mark.root, pytest.mark.lab]

STATE = "/var/lib/meshd"
PROCESSES = ["pgrep", "-af", "serf agent|wireguard-go|meshd.* agent"]
# What stays, what ends when it loses the network, and what has taken the names that Docker would use the next times.
SLEEP = "exec sleep 100000"
ENDS = "while ip link show eth0; do sleep 0.05; done"
IN_THE_WAY = f"for n in 1 2 3; do ip link add eth$n type bridge; done; {SLEEP}"

FULL_DISK = """
import os
from ipaddress import IPv4Address
from pathlib import Path
from meshd.state import authority
from meshd.lifecycle.join import _settle_in
from meshd.lifecycle.preflight import Command
from meshd.lifecycle.rollback import all_or_nothing
from meshd.lifecycle.up import begin
from meshd.mesh import addressing
from meshd.state.settings import Settings
from meshd.state.claim import endpoint, publish
from meshd.state.directory import State

state = State()
settings = Settings(name="barge2", bind=IPv4Address("10.10.10.102"), docker=False)
with all_or_nothing(state):
    _settle_in(state, settings, settings.bind, Command.INIT)
    authority.found(state, settings.mesh, settings.name)
    subnet = addressing.choose(settings.overlay, 24, (), settings.bind, settings.name)
    publish(state, state.claim(), subnet=subnet, endpoint=endpoint(state), settled=True)
    begin(state)
    with Path("/var/lib/meshd/full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
"""


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    """barge1 has a Docker engine, barge2 has none."""
    lab.up(2, docker=False)
    one, two = lab.hosts()
    lab.start_docker(one)
    images.build(one)
    return [one, two]


@pytest.fixture
def mesh(hosts: list[LabHost]) -> Iterator[list[LabHost]]:
    one, two = hosts
    before = [snapshot(host) for host in hosts]
    join(two, one, init(one), "--no-docker")
    yield hosts
    one.run(["sh", "-c", "docker rm -f $(docker ps -aq)"], check=False)
    for host in (two, one):
        host.run(["meshd", "leave", "--force"], check=False)
    assert [snapshot(host) for host in hosts] == before


def container(host: LabHost, name: str, script: str, *options: str) -> None:
    run_container(host, name, "--cap-add", "NET_ADMIN", *options, "meshd/serf", "sh", "-c", script)


def attached(host: LabHost) -> set[str]:
    (network,) = json.loads(host.run(["docker", "network", "inspect", "ovl0"]).stdout)
    return {facts["Name"] for facts in network["Containers"].values()}


def aliases(host: LabHost, name: str) -> list[str]:
    (facts,) = json.loads(host.run(["docker", "inspect", name]).stdout)
    return sorted(facts["NetworkSettings"]["Networks"]["ovl0"]["Aliases"])


def test_full_disk_at_join_is_rolled_back(hosts: list[LabHost]) -> None:
    """A disk that fills up during a join leaves no half of a host behind."""
    host, before = hosts[1], snapshot(hosts[1])
    host.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", STATE])
    try:
        done = host.run([sys.executable, "-c", FULL_DISK], check=False)
        assert "OSError: [Errno 28] No space left on device\n" in done.stderr
        assert host.run(PROCESSES, check=False).stdout == ""
        assert snapshot(host) == before
        assert host.run(["ls", "-A", STATE]).stdout == "full\n"
        assert "\nnot undone: what other hosts have heard of this one: writing" in done.stderr, "what is left"
    finally:
        host.run(["umount", "-l", STATE])


def test_leave_with_taken_port_is_refused_or_forced(mesh: list[LabHost]) -> None:
    """A leave that cannot be announced is refused; with `--force` it names `meshd forget`."""
    one, two = mesh
    two.run(["meshd", "down"])
    with listener(two, "SOCK_STREAM", str(two.address), 7946):
        done = two.run(["meshd", "leave"], check=False)
        assert done.returncode == 1
        assert (
            "cannot tell barge1 that this host is leaving: the Serf agent did not start, a port is taken" in done.stderr
        )
        assert "use --force and then run 'meshd forget barge2' on the host that holds the authority" in done.stderr
    two.run(["meshd", "up"])
    assert members(one)["barge2"]["state"] == "alive", "it has changed nothing"

    two.run(["meshd", "down"])
    with listener(two, "SOCK_STREAM", str(two.address), 7946):
        done = two.run(["meshd", "leave", "--force"])
    assert (
        "Warning: no other host knows that this one has left (the Serf agent did not start, a port is taken"
        in done.stderr
    )
    assert (
        "run 'meshd forget barge2' on the host that holds the authority, or barge1 will keep this host" in done.stderr
    )
    assert two.run(["ls", "-A", STATE]).stdout == ""
    eventually(lambda: members(one)["barge2"]["state"] == "failed", SUSPECTED, "the other has lost it")
    one.run(["meshd", "forget", "barge2"])
    join(two, one, invitation(one), "--no-docker")


def test_leave_on_full_disk_is_refused_or_forced(mesh: list[LabHost]) -> None:
    """A full disk makes `leave` fail, and `leave --force` succeed."""
    two = mesh[1]
    two.run(["meshd", "down"])
    small = f"mv {STATE}/* /run/kept; mount -t tmpfs -o size=1m,mode=700 tmpfs {STATE}; mv /run/kept/* {STATE}"
    two.run(["sh", "-ec", f"mkdir /run/kept; {small}"])
    try:
        two.run(["meshd", "up"])
        two.run(["sh", "-c", f"cat /dev/zero > {STATE}/full"], check=False)
        before = snapshot(two), two.run(PROCESSES, check=False).stdout
        done = two.run(["meshd", "leave"], check=False)
        assert done.returncode == 1
        assert "cannot tell barge1 that this host is leaving: writing" in done.stderr
        assert (snapshot(two), two.run(PROCESSES, check=False).stdout) == before, "it has changed nothing"
        done = two.run(["meshd", "leave", "--force"])
        assert "Warning: no other host knows that this one has left (writing" in done.stderr
        assert two.run(["ls", "-A", STATE]).stdout == "full\n"
        assert two.run(PROCESSES, check=False).stdout == ""
    finally:
        two.run(["meshd", "leave", "--force"], check=False)
        two.run(["umount", STATE])


def test_leave_waits_for_running_reconcile(mesh: list[LabHost]) -> None:
    """A leave waits for the reconcile that runs, which would otherwise publish the old claim again."""
    two = mesh[1]
    # Nobody else is to wait for the lock.
    two.run(["sh", "-c", f"kill -KILL $(cat {STATE}/agent.pid)"])
    claim = two.run(["cat", f"{STATE}/claim.json"]).stdout
    hold = f"echo held; sleep 3; cat {STATE}/claim.json"
    with two.popen(["flock", f"{STATE}/lock", "sh", "-c", hold], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        two.run(["meshd", "leave"])
        assert holder.stdout.read() == claim


def test_down_again_finishes_after_docker_hung(mesh: list[LabHost]) -> None:
    """`down`, run again, removes what a hanging Docker has kept."""
    one, _ = mesh
    one.run(["pkill", "-STOP", "dockerd"])
    try:
        assert one.run(["meshd", "down"], check=False).returncode == 1
    finally:
        one.run(["pkill", "-CONT", "dockerd"])
        # With its child nsenter has stopped as well, and as long as it does the host cannot end.
        subprocess.run(["pkill", "-CONT", "-f", f"^nsenter --target={one.pid} .* dockerd "], check=True)
    assert one.run(["docker", "network", "ls", "-qf", "name=ovl0"]).stdout, "the network is still there"
    one.run(["meshd", "down"])
    assert not one.run(["docker", "network", "ls", "-qf", "name=ovl0"]).stdout
    again = one.run(["meshd", "down"], check=False)
    assert again.returncode == 2
    assert "is not up on this host" in again.stderr


def test_renumber_moves_containers_and_names_failed_ones(mesh: list[LabHost]) -> None:
    """`renumber --force` moves containers with their aliases and names those that it could not."""
    one, _ = mesh
    for number in range(3):
        container(one, f"web{number}", SLEEP, "--network-alias", f"service{number}", "--network-alias", "all")
        container(one, f"ends{number}", ENDS, "--rm")
    before = [aliases(one, f"web{number}") for number in range(3)]
    assert {"all", "service1"} < set(before[1])
    done = one.run(["meshd", "renumber", "--force"])
    for number in range(3):
        assert re.search(rf"^container web{number} has the address 172\.20\.\d+\.\d+$", done.stdout, re.MULTILINE)
        assert aliases(one, f"web{number}") == before[number], "none is lost, and none is there twice"
    assert attached(one) == {"web0", "web1", "web2"}
    assert one.run(["docker", "exec", "web0", "ping", "-c", "1", "-W", "2", "service1"]).returncode == 0

    for number in range(2):
        container(one, f"stuck{number}", IN_THE_WAY, "--network-alias", f"s{number}")
    done = one.run(["meshd", "renumber", "--force"], check=False)
    assert done.returncode == 1
    assert "Error: containers are off the overlay: stuck" in done.stderr
    assert attached(one) == {"web0", "web1", "web2"}
    for number in range(2):
        again = rf"\): (docker network connect .*--alias=s{number} .*ovl0 stuck{number})$"
        command = re.search(again, done.stdout, re.MULTILINE)
        assert command, done.stdout
        one.run(["docker", "exec", f"stuck{number}", "sh", "-c", "for n in 1 2 3; do ip link del eth$n; done"])
        one.run(command[1].split())
        assert f"s{number}" in aliases(one, f"stuck{number}")


def test_interrupted_renumber_leaves_no_container_off(mesh: list[LabHost]) -> None:
    """A `renumber --force` that is interrupted leaves no container off the overlay."""
    one, _ = mesh
    for number in range(2):
        container(one, f"web{number}", SLEEP)
    process = one.popen(["meshd", "renumber", "--force"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("the subnet of barge1 is ")
    one.run(["pkill", "-TERM", "-f", "meshd renumber"])
    process.communicate(timeout=60)
    assert attached(one) == {"web0", "web1"}

    # And one whose terminal is gone: all that it says is an error.
    assert one.run(["sh", "-c", "meshd renumber --force >/dev/full"], check=False).returncode == 1
    assert attached(one) == {"web0", "web1"}
