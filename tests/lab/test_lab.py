"""The lab itself: what it starts, and that nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshd.cli.main import main
from meshd.lab import docker, images
from meshd.lab.hosts import Lab
from tests.lab.conftest import eventually, ping

pytestmark = [pytest.mark.root, pytest.mark.lab]

MESHD = str(Path(sys.executable).with_name("meshd"))


def command(lab: Lab, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [MESHD, "lab", "--dir", str(lab.directory), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def traces(lab: Lab) -> list[str]:
    """Everything on this machine that names the lab: processes, mounts, cgroups, folders."""
    found = [str(lab.directory)] if lab.directory.exists() else []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(lab.directory) in words and int(process.name) != os.getpid():
            found.append(words)
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(lab.directory) in line]
    name = docker.cgroup(lab.directory).lstrip("/")
    found += [str(path) for tree in ("", "*/") for path in docker.CGROUPS.glob(f"{tree}{name}")]
    return found


@pytest.fixture
def small(lab: Lab) -> Iterator[Lab]:
    yield lab
    lab.down()


def test_lab_up_is_idempotent_and_down_leaves_nothing(small: Lab) -> None:
    """`lab up` twice is harmless, and `lab down` leaves nothing."""
    first = command(small, "up", "--hosts", "2", "--no-docker")
    assert [line.split()[:2] for line in first.stdout.splitlines()] == [
        ["barge1", "10.10.10.101"],
        ["barge2", "10.10.10.102"],
    ]
    assert command(small, "up", "--hosts", "2", "--no-docker").stdout == first.stdout
    assert ping(small.host("barge1"), "10.10.10.102")
    assert [row["name"] for row in json.loads(command(small, "status", "--json").stdout)] == ["barge1", "barge2"]
    assert command(small, "down").stdout == "The lab is gone.\n"
    assert traces(small) == []
    assert command(small, "status").stdout == "No lab host is running: meshd lab up\n"
    assert command(small, "down").returncode == 0, "down when nothing is up is harmless"


def test_lab_exec_passes_output_and_exit_code(small: Lab) -> None:
    """`lab exec` passes on the output and the exit code of the command."""
    command(small, "up", "--hosts", "1", "--no-docker")
    done = command(small, "exec", "barge1", "--", "sh", "-c", "hostname; echo to-stderr >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == ("barge1\n", "to-stderr\n", 7)
    missing = command(small, "exec", "barge9", "--", "true")
    assert missing.returncode == 2
    assert "no lab host 'barge9' is running; running: barge1" in missing.stderr


def test_lab_host_sees_only_itself(small: Lab) -> None:
    """A lab host has its own files, links and state directory."""
    small.up(2, docker=False)
    host = small.host("barge2")
    assert host.run(["ls", "-A", "/var/lib/meshd"]).stdout == ""
    host.run(["touch", "/run/here", "/var/lib/meshd/here"])
    assert not Path("/run/here").exists()
    assert small.host("barge1").run(["ls", "-A", "/var/lib/meshd"]).stdout == ""
    links = host.run(["ip", "-o", "link"]).stdout
    assert [line.split(": ")[1].partition("@")[0] for line in links.splitlines()] == ["lo", "eth0"]


def test_lab_down_after_crash_leaves_nothing(small: Lab) -> None:
    """A lab with an engine and a container whose processes are killed without a word."""
    small.up(1, docker=True)
    host = small.hosts()[0]
    images.build(host)
    host.run(["docker", "run", "-d", "meshd/serf", "sleep", "1000"])
    pid = int(host.run(["cat", "/run/docker.pid"]).stdout)
    host.run(["kill", "-KILL", str(pid)])
    os.kill(small.switch.pid, signal.SIGKILL)
    assert command(small, "down").returncode == 0
    eventually(lambda: traces(small) == [], 10, f"nothing is left: {traces(small)}")


def test_lab_down_after_killed_up_leaves_nothing(small: Lab) -> None:
    """`lab down` leaves nothing after a `lab up` that was killed half-way."""
    process = subprocess.Popen(
        [MESHD, "lab", "--dir", str(small.directory), "up", "--hosts", "5", "--no-docker"], stdout=subprocess.DEVNULL
    )
    eventually(lambda: len(small.hosts()) >= 2, 20, "some hosts are there")
    process.kill()
    process.wait()
    assert command(small, "down").returncode == 0
    assert traces(small) == []


@pytest.mark.parametrize(("arguments", "error"), [(["up", "--hosts", "0"], "1 to 150 hosts"), (["up", "-n", "x"], "x")])
def test_lab_up_refuses_bad_number_of_hosts(lab: Lab, arguments: list[str], error: str) -> None:
    """A bad number of hosts is refused."""
    result = CliRunner().invoke(main, ["lab", "--dir", str(lab.directory), *arguments])
    assert result.exit_code == 2
    assert error in result.output
    assert traces(lab) == []
