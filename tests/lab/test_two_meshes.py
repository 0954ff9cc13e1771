"""Two meshes on the same hosts: what happens to one is nothing to the other."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import SERVER, assemble, eventually, nothing_in_clear, overlay, ping, rtt
from tests.lab.traffic import traffic

pytestmark = [pytest.mark.root, pytest.mark.lab]

NAMES = ["--interface", "wg1", "--bridge", "ovl1"]
PORTS = ["--wireguard-port", "51821", "--gossip-port", "7956", "--rpc-port", "7383"]


class Second:
    """The second mesh: `b`, with names, ports, an overlay and state directories of its own; `boxb` is its container."""

    def __init__(self, hosts: list[LabHost]) -> None:
        self.hosts = hosts
        first, *others = hosts
        output = self.run(first, "init", "--mesh", "b", "--overlay", "10.80.0.0/16", *NAMES, *PORTS)
        found = re.search(r"MESHD_INVITE=(\S+) meshd join (\S+)", output)
        assert found, output
        for host in others:
            self.run(host, "join", f"{first.address}:7956", *NAMES, *PORTS, invite=found[1])
        for host in hosts:
            host.run(
                ["docker", "run", "-d", "--init", "--network", "ovl1", "--name", "boxb", "meshd/serf", "sleep", "99999"]
            )

    def run(self, host: LabHost, *words: str, invite: str = "") -> str:
        env = {"MESHD_INVITE": invite} if invite else {}
        return host.run(["meshd", "--state-dir", str(host.directory / "b"), *words], env=env).stdout

    def address(self, host: LabHost) -> str:
        return f"10.80.{host.address.packed[-1]}.1"


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    return assemble(lab, docker=2)


@pytest.fixture(scope="module")
def second(hosts: list[LabHost]) -> Second:
    return Second(hosts)


def first_mesh(host: LabHost) -> list[str]:
    """All that the first mesh has on a host."""
    commands = (
        "for link in wg0 ovl0; do ip -o link show $link | sed 's/ qdisc.*//'; ip -4 -o addr show dev $link; done",
        "ip route show proto 77 | grep 172.20.",
        "wg show wg0 allowed-ips; wg show wg0 endpoints; wg show wg0 public-key",
        "nft -s list table ip meshd_wg0; nft -s list table ip6 meshd_wg0",
        "iptables-save | grep meshd:wg0 | sed -E 's/\\[[0-9:]+\\]//' | sort",
        "docker network inspect ovl0 --format '{{.Id}} {{.Created}}'",
        "sysctl net.ipv4.ip_forward net.ipv4.conf.ovl0.proxy_arp net.ipv4.neigh.ovl0.proxy_delay",
    )
    return [host.run(["sh", "-c", command]).stdout for command in commands]


@contextmanager
def undisturbed(lab: Lab, hosts: list[LabHost]) -> Iterator[None]:
    """Require that no packet of the first mesh is lost, none is in clear, and that all it has stays as it is."""
    before = [first_mesh(host) for host in hosts]
    assert all(text for rows in before for text in rows), "everything was looked at"
    one, two = hosts
    with nothing_in_clear(lab), traffic(one, two):
        yield
    assert [first_mesh(host) for host in hosts] == before


def settled(host: LabHost, second: Second) -> bool:
    plans = [host.run(["meshd", "plan"], check=False).stdout, second.run(host, "plan")]
    return plans == ["no changes\n"] * 2


def test_two_meshes_are_separate(hosts: list[LabHost], second: Second) -> None:
    """The containers of each mesh reach their own mesh and not the other one."""
    one, two = hosts
    assert rtt(one, "box", overlay(two, 1))
    eventually(lambda: rtt(one, "boxb", second.address(two)), 5, "the second mesh is there")
    assert ping(one, second.address(two)), "a host is on both"
    for host in hosts:
        assert not rtt(one, "boxb", overlay(host, 1)), "not from the second to the first"
        assert not rtt(one, "box", second.address(host)), "nor from the first to the second"
        eventually(lambda host=host: settled(host, second), 5, "neither has anything to change")  # type: ignore[misc]


def test_container_on_no_mesh_reaches_neither(hosts: list[LabHost], second: Second) -> None:
    """Docker's own networks are masqueraded as the host, which is on both."""
    one, two = hosts
    server = ["-p", "8080:80", "meshd/serf", "sh", "-c", SERVER]
    one.run(["docker", "run", "-d", "--init", "--name", "other", *server])
    assert rtt(one, "other", str(two.address)), "it reaches the underlay"
    assert not rtt(one, "other", overlay(two, 1))
    assert not rtt(one, "other", second.address(two))
    published = ["docker", "exec", "box", "wget", "-q", "-O", "-", f"http://{overlay(one)}:8080/cgi-bin/peer"]
    assert two.run(published).stdout.strip(), "what it publishes is reached from the overlay as well"
    one.run(["docker", "rm", "-f", "other"])


def test_kill_of_second_mesh_disturbs_no_first(lab: Lab, hosts: list[LabHost], second: Second) -> None:
    """The death of the second mesh's daemon and Serf does not disturb the first mesh."""
    two = hosts[1]
    state = str(two.directory / "b")
    with undisturbed(lab, hosts):
        for pattern in (f"meshd --state-dir {state} agent", f"serf agent -config-file={state}"):
            two.run(["pkill", "-KILL", "-f", pattern])
        second.run(two, "up")
        eventually(lambda: rtt(hosts[0], "boxb", second.address(two)), 10, "the second mesh is back")
        eventually(
            lambda: json.loads(second.run(two, "status", "--json"))["serf_members_alive"] == 2, 30, "in Serf too"
        )


def test_deleted_device_of_second_mesh_disturbs_no_first(lab: Lab, hosts: list[LabHost], second: Second) -> None:
    """The loss of the second mesh's device does not disturb the first mesh."""
    with undisturbed(lab, hosts):
        hosts[1].run(["ip", "link", "del", "wg1"])
        eventually(lambda: rtt(hosts[0], "boxb", second.address(hosts[1])), 10, "the second mesh has it again")


def test_down_of_second_mesh_disturbs_no_first(lab: Lab, hosts: list[LabHost], second: Second) -> None:
    """`down` and `up` of the second mesh do not disturb the first mesh."""
    two = hosts[1]
    with undisturbed(lab, hosts):
        two.run(["docker", "rm", "-f", "boxb"])
        second.run(two, "down")
        assert "wg1" not in two.run(["ip", "link"]).stdout
        second.run(two, "up")
        eventually(lambda: ping(hosts[0], second.address(two).removesuffix("1") + "0"), 10, "the second mesh is back")


def test_third_mesh_with_taken_names_is_refused(hosts: list[LabHost]) -> None:
    """A third mesh with names or ports of the first is refused."""
    host = hosts[0]
    before = first_mesh(host)
    third = ["meshd", "--state-dir", str(host.directory / "c"), "init", "--mesh", "c"]
    for options, error in (
        ([], "an interface wg0 exists already"),
        (["--interface", "wg2"], "an interface ovl0 exists already"),
        (["--interface", "wg2", "--bridge", "ovl2"], "port 51820"),
        (["--interface", "wg2", "--bridge", "ovl2", "--wireguard-port", "51822"], "gossip's TCP port 7946"),
        (
            [
                "--interface",
                "wg2",
                "--bridge",
                "ovl2",
                "--wireguard-port",
                "51822",
                "--gossip-port",
                "7966",
                "--rpc-port",
                "7393",
            ],
            "the overlay 172.20.0.0/16 overlaps",
        ),
    ):
        done = host.run([*third, *options], check=False)
        assert done.returncode != 0
        assert error in done.stderr
        assert not (host.directory / "c").exists()
    assert first_mesh(host) == before


def test_leave_of_second_mesh_disturbs_no_first(lab: Lab, hosts: list[LabHost], second: Second) -> None:
    """`leave` of the second mesh removes all of it and does not disturb the first mesh."""
    with undisturbed(lab, hosts):
        for host in reversed(hosts):
            host.run(["docker", "rm", "-f", "boxb"], check=False)
            second.run(host, "leave", "--force")
    for host in hosts:
        links = host.run(["ip", "link"]).stdout
        assert "wg1" not in links
        assert "ovl1" not in links
        assert "10.80." not in host.run(["ip", "route"]).stdout
        rules = host.run(["sh", "-c", "nft list ruleset; iptables-save"]).stdout
        assert "wg1" not in rules
        assert "ovl1" not in rules
        assert not (host.directory / "b").exists()
        assert host.run(["meshd", "plan"]).stdout == "no changes\n"
