"""Docker's versions: a mesh on each, and the upgrade of a host in place from one to the next."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import (
    SERVER,
    assemble,
    eventually,
    fetch,
    overlay,
    rtt,
    run_box,
    run_container,
)
from tests.lab.faults import restart_docker

pytestmark = [pytest.mark.root, pytest.mark.lab]

# What .ci/unpack has unpacked, the oldest first (`make test-docker`). All other tests run on the installed one.
FOLDER = Path(os.environ.get("MESHD_DOCKERS", "/nowhere"))
VERSIONS = {suite: version for suite, version in (("trixie", "26."), ("sid", "28.")) if (FOLDER / suite).is_dir()}

# How long a host may take to be whole again after what was done to its engine, in seconds.
LIMIT = 10.0


class Mesh:
    """Three hosts on one version; each has `box`, the first one two web servers, one of them published."""

    def __init__(self, lab: Lab, root: Path | None) -> None:
        self.lab, self.root = lab, root
        self.hosts = assemble(lab, docker=3, root=self.root)
        # Pinned, as a restart of an engine may give containers each other's addresses.
        self.published, self.closed = overlay(self.hosts[0], 8), overlay(self.hosts[0], 9)
        for name, address, *options in (("published", self.published, "-p", "8080:80"), ("closed", self.closed)):
            options += ["--ip", address, "--restart", "always", "meshd/serf", "sh", "-c", SERVER]
            run_container(self.hosts[0], name, *options)

    def check(self) -> None:
        """Everything that a user was promised, within the limit."""
        for host in self.hosts:
            eventually(lambda: host.run(["meshd", "plan"], check=False).stdout == "no changes\n", LIMIT, "settled")  # noqa: B023
        for source in self.hosts:
            for target in self.hosts:
                eventually(lambda: rtt(source, "box", overlay(target, 1)), LIMIT, f"{source.name} to {target.name}")  # noqa: B023
        server, client = self.hosts[0], self.hosts[1]
        outside = f"http://{server.address}:8080/cgi-bin/peer"
        eventually(lambda: fetch(client, outside) == str(client.address), LIMIT, "the published port, by the underlay")
        for address in (self.published, self.closed):
            eventually(lambda: seen(client, address) == overlay(client, 1), LIMIT, "the source is the container's")  # noqa: B023
            assert self.from_the_underlay(address) == ""

    def from_the_underlay(self, address: str) -> str:
        """What a neighbour gets that routes to a container's address past WireGuard."""
        neighbour = self.lab.switch
        neighbour.run(["ip", "route", "add", address, "via", str(self.hosts[0].address)])
        try:
            return fetch(neighbour, f"http://{address}/cgi-bin/peer")
        finally:
            neighbour.run(["ip", "route", "del", address])


def seen(client: LabHost, address: str) -> str:
    """The source that a web server sees when the container `box` asks it."""
    url = f"http://{address}/cgi-bin/peer"
    return client.run(["docker", "exec", "box", "wget", "-q", "-O", "-", url], check=False).stdout.strip()


def version(host: LabHost) -> str:
    return host.run(["docker", "version", "--format", "{{.Server.Version}}"]).stdout


def test_there_are_other_dockers_to_test() -> None:
    assert VERSIONS, f"{FOLDER} has none: make test-docker"


def test_upgraded_in_place_from_each_to_the_next(lab: Lab) -> None:
    """From the installed one on; one host after the other, so that in between the mesh is of two versions."""
    mesh = Mesh(lab, None)
    try:
        mesh.check()
        for suite, expected in VERSIONS.items():
            for host in mesh.hosts:
                restart_docker(lab, host, "TERM", FOLDER / suite)
                assert version(host).startswith(expected)
                mesh.check()
    finally:
        lab.down()


@pytest.fixture(scope="module", params=VERSIONS)
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    yield Mesh(lab, FOLDER / request.param)
    lab.down()


def test_the_mesh(mesh: Mesh) -> None:
    assert mesh.root is not None
    assert version(mesh.hosts[0]).startswith(VERSIONS[mesh.root.name])
    mesh.check()


@pytest.mark.parametrize("number", ["TERM", "KILL"])
def test_dockerd_restarted(mesh: Mesh, number: str) -> None:
    restart_docker(mesh.lab, mesh.hosts[0], number, mesh.root)
    mesh.check()


def test_networks_pruned(mesh: Mesh) -> None:
    """With the containers there, and on a host where none is left."""
    mesh.hosts[0].run(["docker", "network", "prune", "-f"])
    bare = mesh.hosts[2]
    bare.run(["docker", "rm", "-f", "box"])
    before = bare.run(["docker", "network", "inspect", "-f", "{{.Id}}", "ovl0"]).stdout
    assert "ovl0" in bare.run(["docker", "network", "prune", "-f"]).stdout

    def made_again() -> bool:
        return bare.run(["docker", "network", "inspect", "-f", "{{.Id}}", "ovl0"], check=False).stdout.strip() not in (
            "",
            before.strip(),
        )

    eventually(made_again, LIMIT, "the network is there again")
    run_box(bare)
    mesh.check()
