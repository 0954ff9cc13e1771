"""The mesh finds its way back: partitions, power cuts, and what was not there when it happened."""

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import permutations
from pathlib import Path

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import (
    NOBODYS,
    SUSPECTED,
    assemble,
    eventually,
    full_reach,
    invitation,
    join,
    members,
    nothing_in_clear,
    overlay,
    peers,
    ping,
    rtt,
    run_container,
    serf_lists,
    settled,
)
from tests.lab.faults import boot

pytestmark = [pytest.mark.root, pytest.mark.lab]

BACK = 15
SEND = "for t in $0 $@; do while :; do ping -qi 0.1 $t; sleep 0.1; done & done; wait"


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    yield
    lab.down()


@pytest.fixture(scope="module")
def partitions(lab: Lab) -> Iterator["Future[dict[str, float]]"]:
    """What `_partitions` returns. It mostly waits, so it runs while the tests before the one that wants it do.

    In a process of its own: a power cut in this one reaps whatever of its children has ended.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool.submit(_partitions, lab.directory.parent)


@pytest.fixture(autouse=True)
def _partitions_begin(request: pytest.FixtureRequest) -> None:
    if any("partitions" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("partitions")


def lost(host: LabHost, *names: str) -> bool:
    rows = members(host)
    return all(rows[name]["state"] == "failed" for name in names)


# Hosts 1 and 2 against 3, 4 and 5; one against two; and two that cannot hear each other while all others can.
PARTITIONS = {"1|2": ([1], [2, 3]), "2|3": ([1, 2], [3, 4, 5]), "a pair": ([1], [2])}


def _partitions(directory: Path) -> dict[str, float]:
    """Part a mesh in each way, side by side, for 30 s and for 90 s; return how long each took to be whole again."""
    labs = [Lab(directory / f"partition{number}") for number in range(len(PARTITIONS))]
    try:
        # One after the other: starting hosts takes the machine's time, and being apart does not.
        meshes = [
            assemble(lab, docker=0, plain=5 if name == "2|3" else 3) for lab, name in zip(labs, PARTITIONS, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            return {case: took for each in pool.map(_both, labs, meshes, PARTITIONS) for case, took in each.items()}
    finally:
        for lab in labs:
            lab.down()


def _both(lab: Lab, hosts: Sequence[LabHost], name: str) -> dict[str, float]:
    return {f"{name} for {seconds} s": _apart(lab, hosts, name, seconds) for seconds in (30, 90)}


def _apart(lab: Lab, hosts: Sequence[LabHost], name: str, seconds: float) -> float:
    """Cut, look at both sides, heal; give the seconds until everybody reached everybody again."""
    left, right = ([hosts[number - 1] for number in side] for side in PARTITIONS[name])
    apart = {frozenset((one.name, other.name)) for one in left for other in right}
    together = [pair for pair in permutations(hosts, 2) if frozenset(host.name for host in pair) not in apart]
    had = [peers(host) for host in hosts]
    with nothing_in_clear(lab):
        lab.cut([host.name for host in left], [host.name for host in right])
        until = time.monotonic() + seconds
        assert not ping(left[0], overlay(right[0])), "they are apart"
        while time.monotonic() < until:
            for one, other in together:
                assert ping(one, overlay(other)), f"{one.name} goes on reaching {other.name}"
            time.sleep(1)
        assert [peers(host) for host in hosts] == had, "nobody is dropped"
        lab.heal()
        took = eventually(lambda: full_reach(hosts), 2 * BACK, f"{name} for {seconds} s: all reach all")
        eventually(lambda: settled(hosts), 40, f"{name} for {seconds} s: all agree")
    return took


def test_host_rebooted_in_partition_finds_mesh(lab: Lab) -> None:
    """A host that reboots while it is cut off finds the mesh after the partition."""
    # Serf itself would look for the others in vain until long after.
    configure_serf(lab, 3, reconnect_interval="1h")
    one, two, three = assemble(lab, docker=0, plain=3)
    with nothing_in_clear(lab):
        lab.cut(["barge1"], ["barge2", "barge3"])
        lab.power_off(one)
        one = lab.power_on("barge1")
        one.run(["meshd", "up", "--timeout", "1"])
        # Somebody joins where it cannot hear it, which it has to learn afterwards.
        four = lab.power_on("barge4")
        lab.cut(["barge1"], ["barge4"])
        join(four, two, invitation(one), "--no-docker")
        eventually(lambda: lost(two, "barge1"), SUSPECTED, "it has failed")
        lab.heal()
        eventually(lambda: full_reach([one, two, three, four]), BACK, "all reach all")
        eventually(lambda: settled([one, two, three, four]), 30, "and all agree")


def test_partition_longer_than_serf_remembers_heals(lab: Lab) -> None:
    """Serf forgets failed members after its reconnect time-out, here 5 s; then it does not look for them any more."""
    configure_serf(lab, 3, reconnect_timeout="5s", tombstone_timeout="5s")
    one, two, three = assemble(lab, docker=0, plain=3)
    had = [peers(host) for host in (one, two, three)]
    with nothing_in_clear(lab):
        lab.cut(["barge1"], ["barge2", "barge3"])
        eventually(lambda: _forgot(two, "barge1") and _forgot(one, "barge2", "barge3"), 90, "Serf has reaped them")
        assert all(host.run(["meshd", "sync"]).stdout == "no changes\n" for host in (one, two, three))
        assert [peers(host) for host in (one, two, three)] == had, "reaped is not gone"
        lab.heal()
        eventually(lambda: full_reach([one, two, three]), BACK, "all reach all")
        eventually(lambda: settled([one, two, three]), 30, "and Serf has found them again")


def configure_serf(lab: Lab, count: int, **settings: str) -> None:
    """Give hosts that are no members yet settings of their own for Serf."""
    lab.up(count, docker=False)
    for host in lab.hosts():
        extra = host.directory / "meshd" / "serf.d"
        extra.mkdir(parents=True)
        (extra / "test.json").write_text(json.dumps(settings))


def _forgot(host: LabHost, *names: str) -> bool:
    return not serf_lists(host) & set(names)


def test_join_through_isolated_member(lab: Lab) -> None:
    """A host that joins through an isolated member reaches all others after the partition."""
    one, two, three = assemble(lab, docker=0, plain=3)
    with nothing_in_clear(lab):
        lab.cut(["barge1"], ["barge2", "barge3"])
        four = lab.power_on("barge4")
        lab.cut(["barge4"], ["barge2", "barge3"])
        eventually(lambda: lost(one, "barge2", "barge3"), SUSPECTED, "the one is alone")
        join(four, one, invitation(one), "--no-docker")
        assert ping(four, overlay(one))
        lab.heal()
        eventually(lambda: full_reach([one, two, three, four]), BACK, "all reach all")
        eventually(lambda: settled([one, two, three, four]), 30, "and all agree")


@pytest.mark.parametrize("which", ["one", "the founder", "all"])
def test_mesh_is_back_after_power_cut(lab: Lab, which: str) -> None:
    """`meshd up` stands in for the service manager, which runs `meshd agent` at boot (tests/lab/test_boot.py)."""
    hosts = assemble(lab, docker=1, plain=2)
    off = {"one": hosts[1:2], "the founder": hosts[:1], "all": hosts}[which]
    with nothing_in_clear(lab):
        for host in off:
            lab.power_off(host)
        for host in off:
            boot(lab, host)
        hosts = lab.hosts()
        eventually(lambda: full_reach(hosts), BACK, "all reach all")
        eventually(lambda: rtt(hosts[0], "box", overlay(hosts[2])), 10, "from the container too")
        eventually(lambda: settled(hosts), 30, "and all agree")


@pytest.mark.parametrize("docker_first", [False, True], ids=["meshd first", "dockerd first"])
def test_boot_order_of_meshd_and_docker(lab: Lab, docker_first: bool) -> None:
    """Either order of meshd and Docker at boot ends well."""
    hosts = assemble(lab, docker=1, plain=1)
    before = hosts[0].run(["docker", "network", "inspect", "ovl0", "-f", "{{.Id}}"]).stdout
    # A container that sends from its first moment on.
    hosts[0].run(["docker", "rm", "-f", "box"])
    targets = (overlay(hosts[1]), NOBODYS)
    run_container(hosts[0], "box", "--restart", "always", "meshd/serf", "sh", "-c", SEND, *targets)
    lab.power_off(hosts[0])
    with nothing_in_clear(lab):
        boot(lab, hosts[0], docker_first=docker_first)
        hosts = lab.hosts()
        eventually(lambda: rtt(hosts[0], "box", overlay(hosts[1])), BACK, "the container reaches the other host")
        eventually(lambda: settled(hosts), 30, "and nothing is to be changed")
    assert hosts[0].run(["docker", "network", "inspect", "ovl0", "-f", "{{.Id}}"]).stdout == before
    routes = hosts[0].run(["docker", "exec", "box", "ip", "route"]).stdout
    assert f"default via {overlay(hosts[0])} dev eth0" in routes


def test_partitions_heal(partitions: "Future[dict[str, float]]") -> None:
    """Partitions of 30 s and 90 s heal by themselves in time, and each side works meanwhile."""
    took = partitions.result()
    print({case: f"{seconds:.1f} s" for case, seconds in took.items()})  # noqa: T201
    assert max(took.values()) < BACK
