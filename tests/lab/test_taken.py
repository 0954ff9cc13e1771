"""What meshd wants to have is somebody's already: the error says whose, and what to type, and nothing has changed."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network

import pytest

from meshd.lab import images
from meshd.lab.hosts import Lab, LabHost
from meshd.state.directory import State
from tests.lab.conftest import SERVER, eventually, fetch, init, join, snapshot
from tests.lab.test_bad_input import listener
from tests.lab.test_two_meshes import NAMES, PORTS

pytestmark = [pytest.mark.root, pytest.mark.lab]

OVERLAY = IPv4Network("172.20.0.0/16")
LABEL = "com.docker.compose.project"
# What a program holds that has the name of another one.
SOCKET = """
import socket, sys
open("/proc/self/comm", "w").write(sys.argv[1])
s = socket.create_server(("0.0.0.0", 7946))
print("ready", flush=True); sys.stdin.read()
"""


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    """Two hosts with Docker. Neither has a mesh unless a test makes one."""
    lab.up(2, docker=True)
    for host in lab.hosts():
        images.build(host)
    return lab.hosts()


@pytest.fixture
def one(hosts: list[LabHost]) -> Iterator[LabHost]:
    """The first host, which is afterwards as it was."""
    with as_it_was(hosts[0]) as host:
        yield host


@contextmanager
def as_it_was(host: LabHost) -> Iterator[LabHost]:
    before = snapshot(host)
    try:
        yield host
    finally:
        host.run(["sh", "-c", "docker rm -f $(docker ps -aq)"], check=False)
        host.run(["meshd", "leave", "--force"], check=False)
        host.run(["docker", "network", "prune", "-f"])
    assert snapshot(host) == before


def refused(host: LabHost, *command: str, invitation: str = "") -> str:
    """Run a command that must fail and change nothing; give its error."""
    before, state = snapshot(host), sorted(path.name for path in (host.directory / "meshd").iterdir())
    done = host.run(["meshd", *command], check=False, env={"MESHD_INVITE": invitation} if invitation else {})
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert snapshot(host) == before
    assert sorted(path.name for path in (host.directory / "meshd").iterdir()) == state
    return done.stderr


def compose(host: LabHost, project: str, *published: str, subnet: str = "") -> IPv4Network:
    """Make what `docker compose up` makes: a network, wherever Docker likes by default, and a server on it."""
    network, where = f"{project}_default", ["--subnet", subnet] if subnet else []
    host.run(["docker", "network", "create", "--label", f"{LABEL}={project}", *where, network])
    options = ["--init", "--network", network, "--name", f"{project}-web-1", *published]
    host.run(["docker", "run", "-d", *options, "meshd/serf", "sh", "-c", SERVER])
    (facts,) = json.loads(host.run(["docker", "network", "inspect", network]).stdout)
    return IPv4Network(facts["IPAM"]["Config"][0]["Subnet"])


def test_default_overlay_that_compose_projects_have(one: LabHost) -> None:
    """`init` names who has it and a range that is free; `--overlay auto` takes that."""
    subnets = [compose(one, project) for project in ("a", "b", "shop")]
    assert subnets[2] == OVERLAY, "Docker gives it to the third project of a new engine"
    one.run(["ip", "route", "add", "10.80.4.0/24", "via", "10.10.10.1"])
    error = refused(one, "init")
    assert (
        "the overlay 172.20.0.0/16 overlaps the Docker network shop_default (172.20.0.0/16), used by shop-web-1: "
        "pass --overlay 10.81.0.0/16, which is free here" in error
    )
    init(one, "--overlay", "auto")
    assert json.loads(one.run(["meshd", "status", "--json"]).stdout)["overlay"] == "10.81.0.0/16"
    one.run(["ip", "route", "del", "10.80.4.0/24"])


def test_join_where_a_compose_project_has_the_overlay(hosts: list[LabHost]) -> None:
    """The error names the containers and the way out, which is one: Docker gives the project another range."""
    with as_it_was(hosts[0]) as one, as_it_was(hosts[1]) as two:
        invitation = init(one, "--no-docker")
        compose(two, "shop", subnet=str(OVERLAY))
        error = refused(two, "join", str(one.address), invitation=invitation)
        assert "overlaps the Docker network shop_default (172.20.0.0/16), used by shop-web-1: " in error
        assert "run 'docker compose -p shop down', then run 'meshd join' again, and start its containers again" in error
        two.run(["sh", "-ec", "docker rm -f shop-web-1; docker network rm shop_default"])
        join(two, one, invitation)
        assert not compose(two, "shop").overlaps(OVERLAY)
        two.run(["meshd", "leave", "--force"])


def test_overlay_that_a_compose_project_got_while_down(one: LabHost) -> None:
    """`up` refuses and changes nothing: the project's published server answers all the time."""
    init(one)
    one.run(["meshd", "down"])
    one.run(["ip", "link", "add", "ovl0", "type", "bridge"])
    assert "an interface ovl0 exists already (a link of kind bridge) and is not this mesh's" in refused(one, "up")
    one.run(["ip", "link", "del", "ovl0"])
    # Docker itself draws another range each time, until it has drawn all.
    compose(one, "shop", "-p", "8080:80", subnet=str(OVERLAY))
    url = "http://127.0.0.1:8080/cgi-bin/peer"
    eventually(lambda: fetch(one, url), 10, "the server answers")
    error = refused(one, "up")
    assert "overlaps the Docker network shop_default (172.20.0.0/16), used by shop-web-1: " in error
    assert "run 'docker compose -p shop down', then run 'meshd up' again" in error
    assert fetch(one, url)
    assert State(one.directory / "meshd").is_down
    one.run(["sh", "-ec", "docker rm -f shop-web-1; docker network rm shop_default"])
    one.run(["meshd", "up"])
    assert not compose(one, "shop").overlaps(OVERLAY), "meshd has it now"


def test_overlay_that_a_network_got_while_meshd_ran(one: LabHost) -> None:
    """Somebody has removed meshd's network and made another one: `status` names it."""
    init(one)
    # The daemon would be faster.
    pid = one.run(["cat", "/var/lib/meshd/agent.pid"]).stdout.strip()
    one.run(["kill", "-STOP", pid])
    one.run(["docker", "network", "rm", "ovl0"])
    one.run(["docker", "network", "create", "--subnet", str(OVERLAY), "other"])
    one.run(["kill", "-CONT", pid])
    eventually(
        lambda: (
            "172.20.0.0/16 overlaps the Docker network other (172.20.0.0/16), without containers: run 'docker "
            "network rm other'" in one.run(["meshd", "status"], check=False).stdout
        ),
        20,
        "status says who has the overlay",
    )
    one.run(["docker", "network", "rm", "other"])
    eventually(lambda: one.run(["meshd", "status"], check=False).returncode == 0, 20, "it is put right by itself")


def test_ports_and_names_that_another_mesh_has(one: LabHost) -> None:
    """The second mesh of a host is told what the first one has, until it has everything of its own."""
    init(one)
    second = ["--state-dir", str(one.directory / "b"), "init", "--mesh", "b"]
    mesh = "the mesh 'meshd' in /var/lib/meshd"
    clash = "{} exists already (a link of kind {}, of " + mesh + ") and is not this mesh's: pass {}"
    for count, told in (
        (0, "an interface " + clash.format("wg0", "tun", "--interface wg1")),
        (1, "an interface " + clash.format("ovl0", "bridge", "--bridge ovl1")),
        (2, "UDP port 51820 on 0.0.0.0 is not free: the WireGuard interface wg0, by wireguard-go (pid "),
        (3, f"gossip's TCP port 7946 on 10.10.10.101 is not free: the Serf agent of {mesh} (pid "),
    ):
        given = [*NAMES, *PORTS][: 2 * count]
        done = one.run(["meshd", *second, *given], check=False)
        assert (done.returncode, told in done.stderr) == (1, True), done.stderr
    assert "pass --gossip-port 7947, or take that mesh down" in done.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [("dockerd", "Docker Swarm, by dockerd (pid {pid}), has it"), ("spider", "spider (pid {pid}) has it")],
)
def test_port_that_another_program_has(one: LabHost, name: str, told: str) -> None:
    """It is named with its number, at `init` and at `up`, which take it as soon as it is free."""
    process = one.popen([sys.executable, "-I", "-c", SOCKET, name], stdin=-1, stdout=-1)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        pid = one.run(["pgrep", "-x", name, "--newest"]).stdout.strip()
        error = refused(one, "init", "--no-docker")
        assert f"gossip's TCP port 7946 on 10.10.10.101 is not free: {told.format(pid=pid)}. " in error
        assert "pass --gossip-port 7947, or " in error
    finally:
        process.communicate(timeout=10)


def test_ports_that_others_got_while_down(one: LabHost) -> None:
    """`up` refuses; a listener at another address of this host is in nobody's way."""
    init(one, "--no-docker")
    one.run(["meshd", "down"])
    with listener(one, "SOCK_DGRAM", "127.0.0.1", 51820):
        error = refused(one, "up")
        assert "WireGuard's UDP port 51820 on 0.0.0.0 is not free: python" in error
        assert "To go on, pass --wireguard-port 51821, or stop that program" in error
    with listener(one, "SOCK_STREAM", "127.0.0.1", 7946):
        one.run(["meshd", "up"])
    one.run(["meshd", "down"])
    one.run(["ip", "link", "add", "wg0", "type", "veth"])
    error = refused(one, "up")
    assert "an interface wg0 exists already (a link of kind veth) and is not this mesh's: remove it" in error
    one.run(["ip", "link", "del", "wg0"])
    one.run(["meshd", "up"])
