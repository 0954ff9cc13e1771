"""What a person can get wrong: a clear error, an exit code, and the host as it was before."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import invitations
from tests.lab.conftest import eventually, init, join, ping, serf, snapshot

pytestmark = [pytest.mark.root, pytest.mark.lab]

MESHD = Path(sys.executable).with_name("meshd")
PROGRAMS = ("serf", "nft", "iptables", "iptables-save", "wireguard-go")


class Scene:
    """barge1 is a mesh of its own, barge2 wants to join, barge3 has a Docker engine and wants to as well."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.member, self.guest, self.docker = lab.hosts()
        self.invitation = init(self.member, "--no-docker")

    def state(self, host: LabHost) -> list[str]:
        return sorted(path.name for path in (host.directory / "meshd").iterdir())

    def refused(self, host: LabHost, *command: str, env: dict[str, str] | None = None) -> str:
        """Run a command that must fail; give its error, having seen that it changed nothing."""
        before, members = snapshot(host), self.members()
        done = host.run(["meshd", *command], check=False, env={"MESHD_INVITE": self.invitation, **(env or {})})
        assert done.returncode in {1, 2}, done
        assert "Error: " in done.stderr
        assert "Traceback" not in done.stderr
        assert snapshot(host) == before
        assert host.run(["pgrep", "-af", "serf agent|wireguard-go|meshd.* agent"], check=False).stdout == ""
        assert self.state(host) == []
        assert self.members() == members
        return done.stderr

    def members(self) -> list[str]:
        """Return who Serf says is alive, without those that failed a moment ago and are forgotten by and by."""
        listed = json.loads(serf(self.member, "members", "-format=json"))["members"]
        return sorted(member["name"] for member in listed if member["status"] == "alive")


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    lab.up(3, docker=False)
    lab.start_docker(lab.host("barge3"))
    return Scene(lab)


@contextmanager
def listener(host: LabHost, kind: str, address: str, port: int) -> Iterator[None]:
    """Occupy a port as some other program would, one that answers nothing."""
    script = (
        "import socket, sys, time\n"
        f"s = socket.socket(socket.{'AF_INET6' if ':' in address else 'AF_INET'}, socket.{kind})\n"
        "s.family == socket.AF_INET6 and s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        f"s.bind(({address!r}, {port}))\n"
        f"{'s.listen()' if kind == 'SOCK_STREAM' else 'pass'}\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    # It ends with its input: what is killed here is only nsenter, not the process behind it.
    process = host.popen([sys.executable, "-I", "-c", script], stdin=-1, stdout=-1)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.communicate(timeout=10)


def test_join_address_of_nobody(scene: Scene) -> None:
    """The address of no host is named in the error, with the ports to check."""
    error = scene.refused(scene.guest, "join", "10.10.10.199", "--no-docker")
    assert "10.10.10.199:7946 does not answer" in error
    assert "does its firewall admit TCP and UDP port 7946?" in error


def test_join_host_without_meshd(scene: Scene) -> None:
    """A host that refuses the connection is named in the error."""
    error = scene.refused(scene.guest, "join", str(scene.docker.address), "--no-docker")
    assert "10.10.10.103:7946 does not answer (connection refused)" in error


def test_join_address_of_another_program(scene: Scene) -> None:
    """An address that answers as another program is named in the error."""
    with listener(scene.docker, "SOCK_STREAM", str(scene.docker.address), 7946):
        error = scene.refused(scene.guest, "join", str(scene.docker.address), "--no-docker")
    assert "10.10.10.103:7946 answers, but not as a member of the mesh 'meshd'" in error


def test_join_with_invitation_of_another_mesh(scene: Scene) -> None:
    """An invitation of another mesh is refused."""
    ours = invitations.decode(scene.invitation)
    other = replace(ours, gossip_key=b"k" * 32)
    error = scene.refused(
        scene.guest, "join", "10.10.10.101", "--no-docker", env={"MESHD_INVITE": invitations.encode(other)}
    )
    assert "the invitation is of another mesh" in error


@pytest.mark.parametrize("spoil", [lambda t: t[:-3], lambda t: t[:20] + "A" + t[20:], lambda t: t.swapcase()])
def test_join_with_damaged_invitation(scene: Scene, spoil: "type[str]") -> None:
    """A damaged invitation is refused, and its secret is not repeated."""
    error = scene.refused(
        scene.guest, "join", "10.10.10.101", "--no-docker", env={"MESHD_INVITE": spoil(scene.invitation)}
    )
    assert "invitation" in error
    assert scene.invitation[10:] not in error, "what is wrong is told, not the secret"


@pytest.mark.parametrize(
    ("program", "package", "options"),
    [
        ("serf", "serf", ["--no-docker"]),
        ("nft", "nftables", ["--no-docker"]),
        ("wireguard-go", "wireguard-go", ["--no-docker", "--wireguard-backend", "userspace"]),
        ("iptables", "iptables", []),
    ],
)
def test_join_without_program_names_package(
    scene: Scene, program: str, package: str, options: list[str], tmp_path: Path
) -> None:
    """A missing program is named with its package."""
    for name in set(PROGRAMS) - {program}:
        found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
        assert found, name
        (tmp_path / name).symlink_to(found)
    host = scene.guest if options else scene.docker
    before = snapshot(host)
    command = ["env", f"PATH={tmp_path}", str(MESHD), "join", "10.10.10.101", *options]
    done = host.run(command, check=False, env={"MESHD_INVITE": scene.invitation})
    assert done.returncode == 1
    assert f"{program} is not installed: apt install {package}" in done.stderr
    assert snapshot(host) == before
    assert scene.state(host) == []


def test_join_without_docker_engine(scene: Scene) -> None:
    """The error for an absent Docker engine names the ways out."""
    error = scene.refused(scene.guest, "join", "10.10.10.101")
    assert "the Docker engine does not answer" in error
    assert "systemctl start docker" in error
    assert "apt install docker.io" in error
    assert "--no-docker" in error


@pytest.mark.parametrize(
    ("kind", "address", "port", "option"),
    [
        ("SOCK_DGRAM", "0.0.0.0", 51820, "--wireguard-port"),
        ("SOCK_STREAM", "10.10.10.102", 7946, "--gossip-port"),
        ("SOCK_DGRAM", "10.10.10.102", 7946, "--gossip-port"),
        ("SOCK_STREAM", "127.0.0.1", 7373, "--rpc-port"),
    ],
)
def test_join_with_taken_port(scene: Scene, kind: str, address: str, port: int, option: str) -> None:
    """A taken port is named with the option that changes it."""
    with listener(scene.guest, kind, address, port):
        error = scene.refused(scene.guest, "join", "10.10.10.101", "--no-docker")
    assert f"port {port} on {address} is not free" in error
    assert f"pass {option}" in error


@pytest.mark.parametrize(("interface", "option"), [("wg0", "--interface"), ("ovl0", "--bridge")])
def test_join_with_taken_interface_name(scene: Scene, interface: str, option: str) -> None:
    """A taken interface name is named with the option that changes it."""
    scene.docker.run(["ip", "link", "add", interface, "type", "bridge"])
    try:
        error = scene.refused(scene.docker, "join", "10.10.10.101")
        assert f"an interface {interface} exists already" in error
        assert option in error
    finally:
        scene.docker.run(["ip", "link", "del", interface])


def test_join_with_foreign_docker_network_of_same_name(scene: Scene) -> None:
    """A Docker network of that name with other settings is named with the command that removes it."""
    scene.docker.run(["docker", "network", "create", "--subnet", "10.77.0.0/24", "ovl0"])
    try:
        error = scene.refused(scene.docker, "join", "10.10.10.101")
        assert "ovl0 (10.77.0.0/24)" in error
        assert "172.20.0.0/16" in error
        assert "docker network rm ovl0" in error
    finally:
        scene.docker.run(["docker", "network", "rm", "ovl0"])


def test_join_with_overlay_overlapping_docker_network(scene: Scene) -> None:
    """An overlay that overlaps a Docker network is refused."""
    scene.docker.run(["docker", "network", "create", "--subnet", "172.20.7.0/24", "shop"])
    try:
        error = scene.refused(scene.docker, "join", "10.10.10.101")
        assert "the overlay 172.20.0.0/16 overlaps the Docker network shop (172.20.7.0/24)" in error
    finally:
        scene.docker.run(["docker", "network", "rm", "shop"])


def test_join_with_overlay_overlapping_route(scene: Scene) -> None:
    """An overlay that overlaps a route is refused."""
    scene.guest.run(["ip", "route", "add", "172.20.9.0/24", "via", "10.10.10.1"])
    try:
        error = scene.refused(scene.guest, "join", "10.10.10.101", "--no-docker")
        assert "the overlay 172.20.0.0/16 overlaps the route 172.20.9.0/24 dev eth0" in error
    finally:
        scene.guest.run(["ip", "route", "del", "172.20.9.0/24"])


def test_join_with_taken_name(scene: Scene) -> None:
    """A name that another host of the mesh has is refused."""
    error = scene.refused(scene.guest, "join", "10.10.10.101", "--no-docker", "--name", "barge1")
    assert "the name barge1 is already in the mesh (10.10.10.101:7946): pass --name" in error
    assert scene.members() == ["barge1"]


def test_join_with_taken_subnet(scene: Scene) -> None:
    """A subnet that another host of the mesh has is refused."""
    error = scene.refused(scene.guest, "join", "10.10.10.101", "--no-docker", "--subnet", "172.20.101.0/24")
    assert "the subnet 172.20.101.0/24 is taken by barge1" in error


def test_join_exhausted_overlay(scene: Scene) -> None:
    """In an overlay without a free subnet, which is that of a second mesh with room for two, a join is refused."""
    apart = ["--state-dir", "/var/lib/meshd/small"]
    ports = ["--interface", "wg1", "--wireguard-port", "51821", "--gossip-port", "7956", "--rpc-port", "7383"]
    options = ["--no-docker", *ports]
    small = ["--mesh", "small", "--overlay", "10.99.0.0/28", "--subnet-length", "30"]
    output = scene.member.run(["meshd", *apart, "init", *small, *options]).stdout
    invitation = {"MESHD_INVITE": next(w for w in output.split() if "meshd3." in w).partition("=")[2]}
    try:
        scene.docker.run(["meshd", *apart, "join", "10.10.10.101:7956", *options], env=invitation)
        error = scene.refused(scene.guest, "join", "10.10.10.101:7956", *options, env=invitation)
        assert "the overlay 10.99.0.0/28 is exhausted: all 2 subnets of length /30 are taken" in error
    finally:
        for host in (scene.docker, scene.member):
            host.run(["meshd", *apart, "leave"], check=False)
    assert scene.state(scene.docker) == []


@pytest.mark.parametrize(
    ("options", "reason"), [("ro", "Read-only file system"), ("size=4k", "No space left on device")]
)
def test_join_with_unwritable_state_directory(scene: Scene, options: str, reason: str) -> None:
    """A state directory that cannot be written is named in the error."""
    scene.guest.run(["mkdir", "-p", "/run/small"])
    scene.guest.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/run/small"])
    try:
        error = scene.refused(scene.guest, "--state-dir", "/run/small", "join", "10.10.10.101", "--no-docker")
        assert reason.lower() in error.lower()
        assert "/run/small" in error
        assert scene.guest.run(["ls", "-A", "/run/small"]).stdout == ""
    finally:
        scene.guest.run(["umount", "/run/small"])


# What a join leaves on a host as it goes on, and the signal that interrupts it when that is there.
MOMENTS = {
    "it has begun": ("pgrep -f '[m]eshd join'", "INT"),
    "its identity is there": ("test -e /var/lib/meshd/identity.key", "TERM"),
    "its claim is there": ("test -e /var/lib/meshd/claim.json", "HUP"),
    "Serf runs": ("pgrep -f 'serf agent'", "INT"),
    "its device is there": ("ip link show wg0", "TERM"),
    "its daemon runs": ("test -e /var/lib/meshd/agent.sock", "HUP"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_join_leaves_nothing(scene: Scene, moment: str) -> None:
    """A join that is interrupted at any moment leaves nothing, here and on the others, or a whole host."""
    guest, (seen, signal) = scene.guest, MOMENTS[moment]
    before = snapshot(guest)
    command = ["env", f"MESHD_INVITE={scene.invitation}", "meshd", "join", "10.10.10.101", "--no-docker"]
    process = guest.popen(command, stdout=-3, stderr=-3)
    # In the host: to start a process here for each look would take longer than some steps do.
    guest.run(
        [
            "timeout",
            "30",
            "sh",
            "-c",
            f"until {seen} >/dev/null 2>&1; do :; done; pkill -{signal} -f '[m]eshd join'; true",
        ]
    )
    process.wait(timeout=30)
    gone = ["pgrep", "-f", "meshd join"]
    eventually(lambda: not guest.run(gone, check=False).stdout, 30, "the command has ended")
    if scene.state(guest):
        # It was through and waited for the others: then it is a member, and whole.
        assert guest.run(["meshd", "plan"]).stdout == "no changes\n"
        guest.run(["meshd", "leave"])
    assert snapshot(guest) == before
    assert scene.state(guest) == []
    assert guest.run(["pgrep", "-af", "serf agent|wireguard-go|meshd.* agent"], check=False).stdout == ""
    eventually(lambda: "172.20.102" not in scene.member.run(["ip", "route"]).stdout, 10, "no host remembers it")


# tests/unit/test_state.py damages each file in each of these ways.
DAMAGED = {
    "settings.json": "",
    "underlay.json": "{",
    "claim.json": '{"hosts": 7, "record": 7, "": 7}',
    "hosts.json": '{"hosts": 7, "record": 7, "": 7}',
    "contacts.json": "{",
    "wireguard.key": "",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_state_is_named_and_traffic_continues(scene: Scene, name: str) -> None:
    """A damaged state file is named by each command, and the traffic continues."""
    guest = scene.guest
    if not scene.state(guest):
        join(guest, scene.member, scene.invitation, "--no-docker")
    path = guest.directory / "meshd" / name
    good, before = path.read_bytes(), snapshot(guest)
    path.write_text(DAMAGED[name])
    try:
        reading = () if name in {"contacts.json", "underlay.json"} else ("plan", "members", "status")
        for command in ("sync", "up", *reading):
            done = guest.run(["meshd", command], check=False)
            assert done.returncode == 2, (command, done)
            assert f"{path.name} is damaged" in done.stderr
            assert "Traceback" not in done.stderr
        assert snapshot(guest) == before
        assert ping(guest, "172.20.101.0")
    finally:
        path.write_bytes(good)
    eventually(lambda: guest.run(["meshd", "plan"], check=False).stdout == "no changes\n", 20, "all is well again")


def test_join_of_second_mesh_is_refused(scene: Scene) -> None:
    """A host has to leave its mesh before it joins another one."""
    guest = scene.guest
    if not scene.state(guest):
        join(guest, scene.member, scene.invitation, "--no-docker")
    ours = invitations.decode(scene.invitation)
    other = replace(ours, mesh="other", authority=b"k" * 32)
    before = snapshot(guest)
    done = guest.run(["meshd", "join", "10.10.10.101"], check=False, env={"MESHD_INVITE": invitations.encode(other)})
    assert done.returncode == 2
    assert "is in the mesh 'meshd' already" in done.stderr
    done = guest.run(["meshd", "init"], check=False)
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert snapshot(guest) == before
    assert ping(guest, "172.20.101.0")
