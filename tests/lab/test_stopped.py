"""The Docker network is made anew under its name, and the stopped containers that belong to it start on the new one."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meshd.lab.hosts import Lab, LabHost
from meshd.net.docker import DockerNetwork
from meshd.net.resources import Action, Change, StoppedContainer
from tests.lab.conftest import address_of, assemble, eventually, log, rtt, run_box, run_container

pytestmark = [pytest.mark.root, pytest.mark.lab]

SLEEP = ("meshd/serf", "sleep", "100000")
FIXED = "172.20.101.50"
# What somebody asks for who means the container to have it for good.
CHOSEN = ("--ip", FIXED, "--network-alias", "db", "--network-alias", "all", "--link", "box:neighbour")


@pytest.fixture(scope="module")
def host(lab: Lab) -> LabHost:
    (host,) = assemble(lab, docker=1)
    host.run(["docker", "network", "create", "other"])
    return host


@pytest.fixture
def stopped(host: LabHost) -> Iterator[LabHost]:
    """A host with stopped containers: `web` with all that one may choose, `second`, for which the overlay is another
    network beside its own, `new`, which never ran, and `off`, whose owner took it off the overlay."""
    host.run(["docker", "start", "box"], check=False)
    run_container(host, "web", *CHOSEN, *SLEEP)
    host.run(["docker", "run", "-d", "--init", "--name", "second", "--network", "other", *SLEEP])
    host.run(["docker", "network", "connect", "--alias", "two", "ovl0", "second"])
    host.run(["docker", "create", "--name", "new", "--network", "ovl0", *SLEEP])
    run_container(host, "off", *SLEEP)
    host.run(["docker", "network", "disconnect", "ovl0", "off"])
    host.run(["docker", "stop", "-t", "0", "web", "second", "off", "box"])
    yield host
    host.run(["docker", "rm", "-f", "web", "second", "new", "off", "box"])
    run_box(host)


def inspect(host: LabHost, kind: str, name: str) -> Any:
    (found,) = json.loads(host.run(["docker", kind, "inspect", name]).stdout)
    return found


def network(host: LabHost) -> str:
    """The ID of the Docker network, the empty string without one."""
    return host.run(["docker", "network", "inspect", "-f", "{{.Id}}", "ovl0"], check=False).stdout.strip()


def down_and_up(host: LabHost) -> None:
    said = host.run(["meshd", "down"]).stdout
    assert "stopped containers of ovl0, which start again after 'meshd up': box, new, second, web\n" in said
    host.run(["meshd", "up"])


def renumber(host: LabHost) -> None:
    said = host.run(["meshd", "renumber"]).stdout
    told = f"stopped containers, which start with free addresses of {address_of(host)}/24 whatever address they had: "
    assert f"{told}box, new, second, web\n" in said


def change_mtu(host: LabHost) -> None:
    mtu = int(inspect(host, "network", "ovl0")["Options"]["com.docker.network.driver.mtu"])
    host.run(["ip", "link", "set", "eth0", "mtu", str(mtu + 80 - 100)])
    host.run(["meshd", "sync"])
    assert inspect(host, "network", "ovl0")["Options"]["com.docker.network.driver.mtu"] == str(mtu - 100)


def remove_network(host: LabHost) -> None:
    host.run(["docker", "network", "rm", "ovl0"])
    eventually(lambda: network(host), 5, "it is made again")


@pytest.mark.parametrize("remake", [down_and_up, change_mtu, remove_network, renumber])
def test_stopped_containers_start_after_network_is_made_anew(
    stopped: LabHost, remake: Callable[[LabHost], None]
) -> None:
    """Each starts as it was, none is started, and who was taken off stays off."""
    host, before = stopped, network(stopped)
    remake(host)
    assert network(host) not in ("", before), "Docker gives each network that is made an ID of its own"
    eventually(lambda: host.run(["meshd", "plan"]).stdout == "no changes\n", 10, "settled")
    assert host.run(["docker", "ps", "-q"]).stdout == "", "whether a container runs is its owner's"

    host.run(["docker", "start", "box", "web", "second", "new", "off"])
    web = inspect(host, "container", "web")["NetworkSettings"]["Networks"]["ovl0"]
    assert {"db", "all"} <= set(web["Aliases"])
    assert web["Links"] == ["box:neighbour"]
    if remake is renumber:
        assert web["IPAddress"].startswith(f"{address_of(host)}".removesuffix("0"))
    else:
        assert web["IPAddress"] == FIXED
    second = inspect(host, "container", "second")["NetworkSettings"]["Networks"]
    assert second.keys() == {"ovl0", "other"}
    assert "two" in second["ovl0"]["Aliases"]
    assert rtt(host, "web", "neighbour")
    assert rtt(host, "new", "db")
    assert rtt(host, "box", "two")
    assert inspect(host, "container", "off")["NetworkSettings"]["Networks"] == {}


def test_container_that_docker_keeps_is_named_with_command(stopped: LabHost) -> None:
    """A container that cannot be attached holds up no other one, and the log has the command for it."""
    host = stopped
    folder = f"{host.directory}/docker/containers/{inspect(host, 'container', 'web')['Id']}"
    host.run(["sh", "-ec", f"mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}"])
    before = len(log(host))
    try:
        remove_network(host)
        eventually(lambda: "container web cannot start" in log(host)[before:], 5, "it is named")
        host.run(["docker", "start", "second"])
    finally:
        host.run(["umount", folder])
    said = re.search(
        r"container web cannot start \(.*\): (docker network connect .*)$", log(host)[before:], re.MULTILINE
    )
    assert said, log(host)[before:]
    assert "--alias=db" in said[1]
    assert "--link=box:neighbour" in said[1]
    host.run(shlex.split(said[1]))
    host.run(["docker", "start", "box", "web"])
    eventually(lambda: host.run(["meshd", "plan"]).stdout == "no changes\n", 10, "settled")


def test_container_removed_meanwhile_is_nobodys_loss(host: LabHost) -> None:
    """A container that its owner removes, after a reconcile has seen it stopped, is no failure."""
    adapter = DockerNetwork("meshd", "ovl0", f"unix:///proc/{host.pid}/root/run/docker.sock")
    adapter.apply(Change(Action.SET, StoppedContainer("0123456789ab", "gone", "ovl0")))


def test_network_that_docker_makes_otherwise_is_not_replaced_again(stopped: LabHost) -> None:
    """What meshd asked for, and did not get, is reported; asking for it again and again would not help."""
    host = stopped
    made = inspect(host, "network", "ovl0")
    host.run(["meshd", "down"])
    labels = [f"--label={name}={value}" for name, value in made["Labels"].items()]
    options = [f"--opt={name}={value}" for name, value in made["Options"].items() if "mtu" not in name]
    (pool,) = made["IPAM"]["Config"]
    ranges = ["--subnet", pool["Subnet"], "--ip-range", pool["IPRange"], "--gateway", pool["Gateway"]]
    host.run(
        ["docker", "network", "create", *labels, *options, "--opt=com.docker.network.driver.mtu=1234", *ranges, "ovl0"]
    )
    there = network(host)
    said = host.run(["meshd", "up"], check=False)
    assert said.returncode == 1
    assert re.search(
        r"Docker has made the network ovl0 with mtu 1234 instead of \d+, and would do so again", said.stderr
    )
    assert host.run(["meshd", "sync"], check=False).returncode == 1
    assert network(host) == there
    host.run(["docker", "network", "rm", "ovl0"])
    eventually(lambda: host.run(["meshd", "plan"]).stdout == "no changes\n", 10, "settled")
    assert network(host) not in ("", there)
