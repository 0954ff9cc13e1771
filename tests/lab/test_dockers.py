"""Docker's versions: a mesh on each, and the upgrade of a host in place from one to the next."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.lab import images
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, eventually, init, log, overlay, rtt, run_box, run_container
from tests.lab.faults import restart_docker
from tests.lab.promises import all_reach_all, from_the_underlay, published, seen, serve

pytestmark = [pytest.mark.root, pytest.mark.lab]

# What .ci/unpack has unpacked, the oldest first (`make test-docker`).
FOLDER = Path(os.environ.get("MESHD_DOCKERS", "/nowhere"))
VERSIONS = {suite: version for suite, version in (("trixie", "26."), ("sid", "28.")) if (FOLDER / suite).is_dir()}
# The machine's own, which all other tests run on too.
INSTALLED = "installed"

# How long a host may take to be whole again after what was done to its engine, in seconds.
LIMIT = 10.0


class Mesh:
    """Three hosts on one version; each has `box`, the first one two web servers, one of them published."""

    def __init__(self, lab: Lab, root: Path | None) -> None:
        self.lab, self.root = lab, root
        self.hosts = assemble(lab, docker=3, root=self.root)
        self.servers = serve(self.hosts[0])

    def check(self) -> None:
        """Everything that a user was promised, within the limit."""
        for host in self.hosts:
            eventually(lambda: host.run(["meshd", "plan"], check=False).stdout == "no changes\n", LIMIT, "settled")  # noqa: B023
        eventually(lambda: all_reach_all(self.hosts), LIMIT, "all containers reach each other")
        server, client = self.hosts[0], self.hosts[1]
        eventually(lambda: published(server, client), LIMIT, "the published port, by the underlay")
        for address in self.servers:
            eventually(lambda: seen(client, address) == overlay(client, 1), LIMIT, "the source is the container's")  # noqa: B023
            assert from_the_underlay(self.lab, server, address) == ""


def version(host: LabHost) -> str:
    return host.run(["docker", "version", "--format", "{{.Server.Version}}"]).stdout


def test_other_docker_versions_are_available() -> None:
    """Docker versions of other suites are unpacked."""
    assert VERSIONS, f"{FOLDER} has none: make test-docker"


def test_docker_upgrade_in_place(lab: Lab) -> None:
    """Docker is upgraded host by host from the installed version on, so that the mesh is of two versions in between."""
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


# What a daemon.json may add to every network that is made on its host.
DEFAULTS = (
    "com.docker.network.driver.mtu=1234",
    "com.docker.network.bridge.enable_icc=true",
    "com.docker.network.bridge.host_binding_ipv4=127.0.0.1",
    "com.docker.network.bridge.gateway_mode_ipv4=nat",
    "com.docker.network.enable_ipv6=true",
)


@pytest.mark.parametrize("suite", VERSIONS)
def test_docker_default_options_change_nothing(lab: Lab, suite: str) -> None:
    """What Docker adds to a network of its own accord is no reason to replace the network, and brings no IPv6."""
    lab.up(1, docker=False)
    (host,) = lab.hosts()
    try:
        lab.start_docker(host, FOLDER / suite, [f"--default-network-opt=bridge={option}" for option in DEFAULTS])
        images.build(host)
        init(host)
        (made,) = json.loads(host.run(["docker", "network", "inspect", "ovl0"]).stdout)
        assert made["Options"]["com.docker.network.bridge.host_binding_ipv4"] == "127.0.0.1", "Docker has added it"
        assert made["Options"]["com.docker.network.driver.mtu"] == "1420"
        assert not made["EnableIPv6"]
        run_box(host)
        host.run(["meshd", "sync"])
        eventually(lambda: host.run(["meshd", "plan"]).stdout == "no changes\n", LIMIT, "settled")
        (found,) = json.loads(host.run(["docker", "network", "inspect", "ovl0"]).stdout)
        assert found["Id"] == made["Id"]
        assert "set docker network" not in log(host)
    finally:
        lab.down()


@pytest.fixture(scope="module", params=[INSTALLED, *VERSIONS])
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    yield Mesh(lab, None if request.param == INSTALLED else FOLDER / request.param)
    lab.down()


def test_mesh_on_docker_version(mesh: Mesh) -> None:
    """A mesh on this version of Docker keeps every promise."""
    if mesh.root is not None:
        assert version(mesh.hosts[0]).startswith(VERSIONS[mesh.root.name])
    mesh.check()


@pytest.mark.parametrize("number", ["TERM", "KILL"])
def test_dockerd_restart(mesh: Mesh, number: str) -> None:
    """After a restart of dockerd, by SIGTERM or SIGKILL, the mesh is whole."""
    restart_docker(mesh.lab, mesh.hosts[0], number, mesh.root)
    mesh.check()


def test_docker_networks_pruned(mesh: Mesh) -> None:
    """After `docker network prune`, with and without containers, the mesh is whole, and stopped ones start again."""
    mesh.hosts[0].run(["docker", "network", "prune", "-f"])
    bare = mesh.hosts[2]
    run_container(bare, "kept", "--network-alias", "alias", "meshd/serf", "sleep", "100000")
    bare.run(["docker", "stop", "-t", "0", "kept"])
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
    eventually(lambda: bare.run(["docker", "start", "kept"], check=False).returncode == 0, LIMIT, "it starts")
    assert rtt(bare, "box", "alias")
    bare.run(["docker", "rm", "-f", "kept"])
