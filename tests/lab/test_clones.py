"""A machine that is cloned with meshd's state: a template, a restored backup, a copied disk."""

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from meshd.lab.hosts import Lab, LabHost
from meshd.mesh.twins import HOLD
from tests.lab.conftest import assemble, eventually, log, members, overlay, peers, rtt, snapshot
from tests.lab.traffic import unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

WRONG_MACHINE = 78
# Seconds in which every host has to name both machines.
NAMED = 10.0
LIMIT = 15.0


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    """A mesh of three, the first with a container."""
    return assemble(lab, docker=1, plain=2)


def clone(lab: Lab, host: LabHost, name: str, *, keeps_id: bool = False) -> LabHost:
    """A machine at another address that starts with a copy of a host's state, and with its machine-id if told so."""
    target = lab.directory / name
    target.mkdir()
    subprocess.run(["cp", "-a", host.directory / "meshd", target], check=True)
    if keeps_id:
        shutil.copy(host.directory / "machine-id", target)
    return lab.power_on(name)


@contextmanager
def cloned(lab: Lab, host: LabHost, *, keeps_id: bool = False) -> Iterator[LabHost]:
    """Such a machine, which is gone afterwards."""
    copy = clone(lab, host, "barge4", keeps_id=keeps_id)
    try:
        yield copy
    finally:
        lab.power_off(copy)
        shutil.rmtree(copy.directory)


def state_of(host: LabHost) -> dict[str, bytes]:
    """What a host's state directory holds."""
    return {p.name: p.read_bytes() for p in (host.directory / "meshd").iterdir() if p.is_file()}


def refused(host: LabHost, *command: str) -> str:
    """Run a command that has to refuse on this machine; give the error."""
    done = host.run(["meshd", *command], check=False)
    assert done.returncode == WRONG_MACHINE, done
    return done.stderr


def has_no_mesh(host: LabHost) -> bool:
    """Tell whether no tunnel, Serf or daemon runs on a host."""
    running = host.run(["pgrep", "-f", "serf agent|-m meshd"], check=False).stdout
    return "wg0" not in host.run(["ip", "link"]).stdout and not running


def test_copy_on_another_machine_refuses_and_changes_nothing(lab: Lab, hosts: list[LabHost]) -> None:
    """A copy of the state refuses on another machine and says the choice; the host that it is of loses nothing."""
    one, two, _ = hosts
    with cloned(lab, two) as copy, unbroken([(one, two)]) as lost:
        before, kept = snapshot(copy), state_of(copy)
        for command in ("up", "sync", "renumber", "leave", "agent"):
            error = refused(copy, command)
            assert "'meshd up --moved'" in error, error
            assert "remove /var/lib/meshd" in error, error
        status = copy.run(["meshd", "status"], check=False)
        assert status.returncode == 1
        assert "that of barge2 on another machine" in status.stdout
        assert (snapshot(copy), state_of(copy)) == (before, kept)
        assert has_no_mesh(copy)
        assert copy.run(["meshd", "down"], check=False).returncode == 2, "nothing is up there"
        assert snapshot(copy) == before
    assert lost == []
    assert members(one)["barge2"]["state"] == "alive"
    assert overlay(two) in one.run(["ip", "route"]).stdout


@pytest.mark.parametrize("options", [[], ["--moved"]])
def test_copy_with_same_machine_id_lays_no_tunnel_while_host_runs(
    lab: Lab, hosts: list[LabHost], options: list[str]
) -> None:
    """Where the machine-id was copied as well, the copy asks first, and names where the host runs."""
    one, two, three = hosts
    with cloned(lab, two, keeps_id=not options) as copy, unbroken([(one, two), (three, two)]) as lost:
        error = refused(copy, "up", *options)
        assert f"barge2 runs at {two.address}:51820 on another machine" in error, error
        assert refused(copy, "agent") if not options else True
        assert has_no_mesh(copy)
        if not options:
            assert f"barge2 runs at {two.address}:51820" in refused(copy, "leave")
            assert f"barge2 was at {two.address}:51820" in copy.run(["meshd", "status"], check=False).stdout
    assert lost == []
    assert members(one)["barge2"]["endpoint"] == f"{two.address}:51820"
    for host in hosts:
        assert host.run(["meshd", "status"]).returncode == 0


def test_moved_disk_brings_host_back(lab: Lab, hosts: list[LabHost]) -> None:
    """`up --moved` on a new machine, once the old one is gone: the same name, subnet and keys; containers reach it."""
    one, two, _ = hosts
    before, keys = members(one)["barge2"], peers(one)
    lab.power_off(two)
    new = clone(lab, two, "barge4")
    refused(new, "up")
    new.run(["meshd", "up", "--moved"])
    eventually(lambda: rtt(one, "box", overlay(two)), LIMIT, "the container reaches it")
    after = members(one)["barge2"]
    assert (after["subnet"], after["endpoint"]) == (before["subnet"], f"{new.address}:51820")
    assert peers(one) == keys
    new.run(["meshd", "sync"])
    eventually(lambda: new.run(["meshd", "status"], check=False).returncode == 0, LIMIT, "nothing is wrong there")
    hosts[1] = new


def test_host_that_moved_starts(lab: Lab, hosts: list[LabHost]) -> None:
    """A host that comes up at another address, and runs nowhere else, starts as before."""
    one, two, _ = hosts
    lab.power_off(two)
    hosts[1] = moved = clone(lab, two, "barge5", keeps_id=True)
    moved.run(["meshd", "up"])
    eventually(lambda: rtt(one, "box", "172.20.102.0"), LIMIT, "the container reaches it")
    assert members(one)["barge2"]["endpoint"] == f"{moved.address}:51820"


def names_both(host: LabHost, places: Sequence[str]) -> bool:
    """Tell whether status and log of a host name two machines, and the second one as the one to stop."""
    text = f"barge2 runs on two machines, at {places[0]} and at {places[1]}. Stop the one at {places[1]}"
    done = host.run(["meshd", "status"], check=False)
    return done.returncode == 1 and text in done.stdout and text in log(host)


def test_two_machines_that_run_all_the_same_are_named_by_every_host(lab: Lab, hosts: list[LabHost]) -> None:
    """Two machines that could not hear of each other both run: once they can, every host says so within 10 s.

    When one is stopped, the other one is the host again, and nobody says it any more.
    """
    one, two, three = hosts
    lab.cut(["barge5"], ["barge1", "barge3", "barge6"])
    copy = clone(lab, two, "barge6", keeps_id=True)
    copy.run(["meshd", "up"])
    lab.heal()
    places = [f"{two.address}:51820", f"{copy.address}:51820"]
    every = [one, two, three, copy]
    eventually(lambda: members(two)["barge1"]["state"] == "alive", 2 * LIMIT, "it is back among the others")
    with ThreadPoolExecutor(len(every)) as pool:
        named = partial(names_both, places=places)
        eventually(lambda: all(pool.map(named, every)), NAMED, "every host names both")
    assert "runs on two machines" in refused(two, "leave")
    copy.run(["meshd", "down"])
    remaining = [one, two, three]

    def is_over() -> bool:
        return all(host.run(["meshd", "status"], check=False).returncode == 0 for host in remaining)

    eventually(is_over, 2 * HOLD + LIMIT, "nobody says it any more")
    eventually(lambda: rtt(one, "box", "172.20.102.0"), LIMIT, "the container reaches the host that stays")
    assert members(one)["barge2"]["endpoint"] == places[0]
