"""A restart is invisible: under steady traffic between containers, nothing of meshd's may cost a packet."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, eventually, log, nothing_in_clear, overlay, serf, settled

pytestmark = [pytest.mark.root, pytest.mark.lab]

STATE = "/var/lib/meshd"
KILL_DAEMON = f"kill -KILL $(cat {STATE}/agent.pid)"
SERF = f"$(pgrep -f '^[^ ]*serf agent -config-file={STATE}')"


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    return assemble(lab, docker=2)


@contextmanager
def traffic(source: LabHost, target: LabHost) -> Iterator[None]:
    """100 pings a second and a TCP stream of 1 MB/s between containers, which both must come through whole."""
    address, stop = overlay(target, 1), threading.Event()
    # busybox's nc hangs up when its own input ends, so that stays open.
    server = ["docker", "exec", "-i", "box", "sh", "-c", "nc -l -p 7000 | wc -c"]
    receiver = target.popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    eventually(lambda: "7000" in target.run(["docker", "exec", "box", "netstat", "-ltn"]).stdout, 5, "nc listens")
    pings = source.popen(["docker", "exec", "box", "ping", "-i", "0.01", address], stdout=subprocess.PIPE)
    assert pings.stdout is not None
    head = ""
    while "seq=0" not in head:
        head += (line := pings.stdout.readline())
        assert line, f"ping has ended: {head}"
    sender = source.popen(["docker", "exec", "-i", "box", "nc", address, "7000"], stdin=subprocess.PIPE)
    assert sender.stdin is not None
    sent = 0

    def send() -> None:
        nonlocal sent
        assert sender.stdin is not None
        while not stop.wait(0.01):
            sender.stdin.write("x" * 10_000)
            sender.stdin.flush()
            sent += 10_000

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sender.stdin.close()
        sender.wait(timeout=10)
        received, _ = receiver.communicate(timeout=10)
        source.run(["pkill", "-INT", "-x", "ping"])
        statistics = head + pings.communicate(timeout=10)[0]
    # Every one in its turn; the very last may be on its way back when ping is told to stop.
    answered = [int(number) for number in re.findall(r"seq=(\d+)", statistics)]
    assert answered == list(range(len(answered))), statistics[-200:]
    assert int(statistics.partition(" packets transmitted")[0].split()[-1]) - len(answered) <= 1
    assert int(received) == sent > 0


def status(host: LabHost) -> dict[str, object]:
    facts: dict[str, object] = json.loads(host.run(["meshd", "status", "--json"], check=False).stdout)
    return facts


def kill_daemon(host: LabHost) -> None:
    host.run(["sh", "-ec", KILL_DAEMON])
    host.run(["meshd", "up"])


def kill_serf(host: LabHost) -> None:
    before = host.run(["sh", "-ec", f"echo {SERF}"]).stdout
    host.run(["sh", "-ec", f"kill -KILL {SERF}"])
    eventually(lambda: host.run(["sh", "-c", f"echo {SERF}"]).stdout not in {before, "\n"}, 5, "the daemon starts Serf")


def kill_both(host: LabHost) -> None:
    host.run(["sh", "-ec", f"{KILL_DAEMON}; kill -KILL {SERF}"])
    host.run(["meshd", "up"])


def leave_serf(host: LabHost) -> None:
    """Serf ends with exit code 0, and the others hear that it has left."""
    before = host.run(["sh", "-ec", f"echo {SERF}"]).stdout
    serf(host, "leave")
    eventually(lambda: host.run(["sh", "-c", f"echo {SERF}"]).stdout not in {before, "\n"}, 5, "the daemon starts Serf")


def sync_in_a_loop(host: LabHost) -> None:
    for _ in range(5):
        assert host.run(["meshd", "sync"]).stdout == "no changes\n"


def upgrade(host: LabHost) -> None:
    """Put the package's files in place anew and restart the daemon, as an upgrade does."""
    origin = json.loads(metadata.distribution("meshd").read_text("direct_url.json") or "{}")
    options = ["--quiet", "--no-deps", "--force-reinstall", "--no-build-isolation", "--disable-pip-version-check"]
    editable = ["--editable"] if origin.get("dir_info", {}).get("editable") else []
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *editable, origin["url"]], check=True)
    kill_daemon(host)


@pytest.mark.parametrize(
    "fault", [kill_daemon, kill_serf, kill_both, leave_serf, sync_in_a_loop, upgrade], ids=lambda f: f.__name__
)
def test_a_restart_loses_no_packet(lab: Lab, hosts: list[LabHost], fault: Callable[[LabHost], None]) -> None:
    with nothing_in_clear(lab), traffic(*hosts):
        fault(hosts[1])
    eventually(lambda: settled(hosts), 40, "both see each other alive, and nothing is to be changed")


def test_what_was_restarted_is_logged(hosts: list[LabHost]) -> None:
    assert "serf started" in log(hosts[1])
    assert "withheld" not in log(hosts[0]) + log(hosts[1])
    assert "remove peer" not in log(hosts[0]) + log(hosts[1])
