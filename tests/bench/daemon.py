"""`python -m tests.bench.daemon DIRECTORY`: a process that makes passes as the daemon does, and says what each took.

It imports what a daemon imports and no more: its memory is one of the figures.
"""

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from meshd.daemon.agent import GARBAGE, Agent
from meshd.errors import MeshdError
from meshd.gossip import serf_agent
from meshd.gossip.serf_agent import members
from meshd.reconcile import plan
from meshd.reconcile.machine import Machine, this_machine
from meshd.reconcile.run import MEMBERSHIP, Options, sync
from meshd.state.directory import State

# The kinds of a pass by its hint: the timer's looks at all, Serf's at what a member can change.
KINDS = {"full": frozenset(plan.ORDER), "hint": MEMBERSHIP}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one pass, or one reading, took: seconds of CPU (with nft's) and of wall time, writes, MB at the peak."""

    cpu: float
    wall: float
    changes: int = 0
    files: int = 0
    memory: float = 0.0


def main() -> None:
    """Read one word a line, what to do, and answer each with a line of JSON."""
    gc.set_threshold(GARBAGE)
    state = Agent(State(Path(sys.argv[1]))).state
    # The stand-in for Serf lives in the process that started this one.
    serf_agent.processes = lambda state: [os.getppid()]  # noqa: ARG005  the name is that of the real one's
    machine: Machine | None = None
    for line in sys.stdin:
        what = line.strip()
        if what not in KINDS and machine is None:
            machine = this_machine(state)

        def work(what: str = what, machine: Machine | None = machine) -> int:
            return _do(state, machine, what)

        print(json.dumps(asdict(_cost(state, work))), flush=True)  # noqa: T201  the answer


def _do(state: State, machine: Machine | None, what: str) -> int:
    """Make a pass, or only read; give the number of changes."""
    if what in KINDS:
        report = sync(state, Options(kinds=KINDS[what]))
        if report.failures:
            raise MeshdError("; ".join(map(str, report.failures[:3])))
        return len(report.changes)
    if what == "members":
        members(state)
    elif machine is not None:
        machine.observe({what})
    return 0


def _cost(state: State, work: Callable[[], int]) -> Cost:
    before, cpu, wall = _stamps(state), _cpu(), time.perf_counter()
    changes = work()
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    return Cost(cpu, wall, changes, len(_stamps(state) - before), _peak())


def _peak() -> float:
    # Not ru_maxrss: that begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _cpu() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _stamps(state: State) -> set[tuple[str, int, int]]:
    """Every file of the state directory with its inode and time: what is written gets another one."""
    return {(e.name, e.stat().st_ino, e.stat().st_mtime_ns) for e in os.scandir(state.directory)}


if __name__ == "__main__":
    main()
