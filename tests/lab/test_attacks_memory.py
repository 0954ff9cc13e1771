"""What must not fill a host's memory, with the gossip key in hand.

barge1 to barge3 are the mesh, the first two with a container. barge4 is the attacker, which is no member.
"""

import json
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import permutations
from pathlib import Path

import pytest

from meshd.gossip.serf.process import MEMORY, OOM_SCORE
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import LONG, assemble, eventually, log, settled
from tests.lab.faults import SERF
from tests.lab.test_attacks import FORGE, state
from tests.lab.traffic import traffic, unbroken

pytestmark = [pytest.mark.root, pytest.mark.lab]

SECONDS = 60 if LONG else 20
# By TCP 410 kB that are 1 GB, by UDP 62 kB that are 150 MB.
STREAMS, MESSAGES = [["zeros", {"codes": 280_000}]], [["zeros", {"codes": 42_000}]] * 3
# What Go had reserved without using it may be used as well.
MOST = MEMORY + 128 * 2**20


class Sizes:
    """The most memory that any Serf agent, and any daemon, was seen to have: in bytes."""

    def __init__(self) -> None:
        self.serf = self.daemon = 0

    def look(self) -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                resident = int((entry / "statm").read_text().split()[1]) * resource.getpagesize()
                if words[0].endswith(b"serf"):
                    self.serf = max(self.serf, resident)
                elif b"meshd" in words and b"agent" in words:
                    self.daemon = max(self.daemon, resident)


@contextmanager
def watched() -> Iterator[Sizes]:
    """Look at the memory of all agents and daemons, over and over."""
    sizes, stop = Sizes(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            sizes.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()


def oom_scores(host: LabHost) -> tuple[int, int]:
    """How readily the kernel ends Serf, and the daemon, when memory is short: 0 is as readily as any process."""
    said = host.run(["sh", "-c", f"cat /proc/{SERF}/oom_score_adj /proc/$(cat /var/lib/meshd/agent.pid)/oom_score_adj"])
    serf, daemon = said.stdout.split()
    return int(serf), int(daemon)


def test_compressed_gossip_fills_no_memory(lab: Lab) -> None:
    """A minute of gossip that unpacks to a gigabyte ends Serf again and again, and costs nobody else anything."""
    mesh = assemble(lab, docker=2, plain=1)
    attacker = lab.power_on("barge4")
    task = {
        "key": state(mesh[0]).gossip_key.hex(),
        "targets": [str(host.address) for host in mesh],
        "messages": MESSAGES,
        "streams": STREAMS,
        "seconds": SECONDS,
    }
    daemons = [host.run(["cat", "/var/lib/meshd/agent.pid"]).stdout for host in mesh]
    begun = [len(log(host)) for host in mesh]
    assert [oom_scores(host) for host in mesh] == [(OOM_SCORE, 0)] * 3
    with traffic(mesh[0], mesh[1]), unbroken(list(permutations(mesh, 2))) as wrong, watched() as sizes:
        attacker.run([sys.executable, str(FORGE)], text=json.dumps(task))
        eventually(lambda: settled(mesh), 40, "all see each other again")
    assert wrong == []
    assert sizes.serf < MOST
    assert sizes.daemon < 128 * 2**20
    assert [host.run(["cat", "/var/lib/meshd/agent.pid"]).stdout for host in mesh] == daemons
    for host, length in zip(mesh, begun, strict=True):
        told = log(host)[length:]
        assert told.count("serf ended: fatal error: ") >= 5, "the attack did reach it again and again"
        assert "remove " not in told
        assert "internal error" not in told
