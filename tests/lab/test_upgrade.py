"""A mesh of an earlier version is upgraded host by host, and two successive versions run in one mesh.

`tests/upgrade-from` names the commit of the earlier one, whose wheel is built from this repository's history.
"""

import itertools
import json
import sys
from pathlib import Path

import click
import pytest

import meshd
from meshd.lab import images
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import extensions
from meshd.mesh.model import FORMER, VERSION, Record
from meshd.mesh.records import encode, to_wire
from meshd.state.directory import State
from tests.bench.compare.revisions import built_wheel
from tests.lab.conftest import eventually, full_reach, init, join, peers, run_box, serf, settled
from tests.lab.faults import install, upgrade
from tests.lab.traffic import traffic, unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

EARLIER = Path(__file__).parents[1] / "upgrade-from"


@pytest.fixture(scope="module")
def earlier() -> Path:
    """The wheel of the earlier version."""
    commit = EARLIER.read_text().strip()
    try:
        return built_wheel(commit)
    except click.ClickException as error:
        pytest.fail(
            f"tests/upgrade-from names the commit {commit}, which cannot be built here. A clone without history lacks "
            f"it: 'git fetch --unshallow'. {error.message}"
        )


@pytest.fixture(scope="module")
def mesh(lab: Lab, earlier: Path) -> tuple[list[LabHost], str]:
    """Three hosts of the earlier version, two of them with Docker, and the invitation by which two of them came."""
    lab.up(5, docker=False)
    hosts = lab.hosts()
    for host in hosts[:3]:
        install(host, earlier)
    for host in hosts[:2]:
        lab.start_docker(host)
        images.build(host)
    invitation = init(hosts[0])
    join(hosts[1], hosts[0], invitation)
    join(hosts[2], hosts[0], invitation, "--no-docker")
    for host in hosts[:2]:
        run_box(host)
    return hosts, invitation


def published(host: LabHost) -> Record:
    """The own record of a host, by its file."""
    claim = State(host.directory / "meshd").claim()
    assert claim is not None
    return claim.record


def know_each_other(hosts: list[LabHost]) -> bool:
    """Return whether each host has the newest record of each other one, to the last bit."""
    records = {host.name: to_wire(published(host)) for host in hosts}
    for host in hosts:
        known = {name: to_wire(record) for name, record in State(host.directory / "meshd").roster().hosts.items()}
        if {**known, host.name: records[host.name]} != records:
            return False
    return True


def test_a_mesh_is_upgraded_host_by_host_without_losing_a_packet(mesh: tuple[list[LabHost], str]) -> None:
    """From the earlier version to this one, one host after the other, with traffic between hosts and containers."""
    hosts = mesh[0][:3]
    assert [published(host).version for host in hosts] == [FORMER] * 3
    eventually(lambda: full_reach(hosts), 40, "all have met")
    with unbroken([*itertools.permutations(hosts, 2)]) as lost, traffic(hosts[0], hosts[1]):
        # The authority's host neither first nor last.
        for number, host in enumerate((hosts[1], hosts[0], hosts[2]), start=1):
            upgrade(host)
            eventually(lambda host=host: published(host).version == VERSION, 20, f"{host.name} runs version 3")  # type: ignore[misc]
            assert sorted(published(each).version for each in hosts) == [FORMER] * (3 - number) + [VERSION] * number
            assert full_reach(hosts), "two versions in one mesh"
        eventually(lambda: settled(hosts), 60, "all see each other alive, and nothing is to be changed")
    assert lost == []


def test_an_upgraded_mesh_has_version_3_everywhere(mesh: tuple[list[LabHost], str]) -> None:
    """Certificates, what hosts know of each other, and what Serf shows."""
    hosts = mesh[0][:3]
    eventually(
        lambda: all(published(host).certificate.is_final for host in hosts), 60, "the authority has renewed them"
    )
    eventually(lambda: know_each_other(hosts), 30, "all have the newest records")
    for host in hosts:
        listed = json.loads(serf(host, "members", "-format=json"))["members"]
        assert {m["name"]: m["tags"] for m in listed} == {each.name: encode(published(each)) for each in hosts}


def test_a_newcomer_joins_by_an_invitation_of_the_earlier_version(mesh: tuple[list[LabHost], str]) -> None:
    hosts, invitation = mesh
    assert invitation.startswith("meshd2.")
    join(hosts[3], hosts[1], invitation, "--no-docker", "--strict")
    assert full_reach(hosts[:4])
    eventually(lambda: published(hosts[3]).certificate.is_final, 60, "the authority has confirmed it")
    eventually(lambda: settled(hosts[:4]), 40, "nothing is to be changed")


BLOCK = extensions.pack({5: b"of a later version", 127: b""})
# What a later version would do: extensions in its record, and in its messages of both forms.
LATER = {
    "state/claim.py": ("state.certificate, leaving)", f"state.certificate, leaving, extensions={BLOCK!r})"),
    "mesh/versioned.py": ("[VERSION, *fields]", "[VERSION, *fields, {5: b'later'}]"),
    "gossip/messages.py": ("{self.digest} {self.after}", "{self.digest} {self.after} 5=00"),
}


def make_later(host: LabHost) -> None:
    """Install on one host a version of meshd that says more than this one knows."""
    install(host)
    package = host.run([sys.executable, "-c", "import meshd; print(meshd.__path__[0])"]).stdout.strip()
    for name, (old, new) in LATER.items():
        text = (Path(meshd.__path__[0]) / name).read_text()
        assert text.count(old) == 1, name
        host.run(["sh", "-ec", f"cat >{package}/{name}"], text=text.replace(old, new))


def test_a_host_of_a_later_version_runs_in_the_same_mesh(mesh: tuple[list[LabHost], str]) -> None:
    """Its record and messages have extensions that nobody knows: it is admitted, and passed on to the last bit."""
    hosts, _ = mesh
    later = hosts[4]
    make_later(later)
    offer = hosts[0].run(["meshd", "invite", "--reusable"]).stdout.split("MESHD_INVITE=")[1].split()[0]
    join(later, hosts[2], offer, "--no-docker", "--strict")
    assert published(later).extensions == BLOCK
    assert full_reach(hosts)
    eventually(lambda: published(later).certificate.is_final, 60, "the authority has confirmed it")
    eventually(lambda: know_each_other(hosts), 30, "all have its record, to the last bit")
    last = published(later)
    later.run(["meshd", "leave"])
    eventually(lambda: all(last.public_key not in peers(host) for host in hosts[:4]), 20, "all have heard its goodbye")
    for host in hosts[:4]:
        (tombstone,) = State(host.directory / "meshd").roster().gone[later.name].values()
        assert tombstone.record is not None
        assert tombstone.record.extensions == BLOCK
    eventually(lambda: settled(hosts[:4]), 40, "nothing is to be changed")
