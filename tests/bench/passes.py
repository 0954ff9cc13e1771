"""The cost of a pass: simulated members by a stand-in Serf, the real wireguard-go, real routes and nftables."""

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from meshd import plan
from meshd.errors import MeshdError
from meshd.reconcile import MEMBERSHIP, Machine, members, reconcile
from meshd.state import State
from tests.bench import members as simulated
from tests.bench.report import Result, Target
from tests.bench.stand_in import StandIn, serving
from tests.netns.conftest import namespace

PORT = 7373
REPEAT = 7
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


def run(*, quick: bool) -> Result:
    """Measure with growing numbers of members."""
    sizes = (100, 1000) if quick else (100, 1000, 10_000)
    costs = {size: measure(size) for size in sizes}
    return Result("passes", "The cost of a pass", _rows(costs), tuple(_targets(costs)), partial(_draw, costs))


def measure(size: int) -> dict[str, Cost]:
    """Make the passes with one number of members, those of one daemon in a process of its own; by name."""
    with tempfile.TemporaryDirectory(prefix="meshd-bench-") as directory, namespace() as space, space.entered():
        state = State(Path(directory))
        own = simulated.fill(state, PORT, space.link_name())
        listed = [own, *(simulated.member(number) for number in range(1, size + 1))]
        with serving(PORT, state.rpc_key, listed) as agent:
            with _daemon(state) as ask:
                costs = {"cold": ask("full")}
            with _daemon(state) as ask:
                costs["restarted"] = ask("full")
                costs["no-op"] = _median(ask, "full")
                costs["no-op, by hint"] = _median(ask, "hint")
                for name in ("members", "peer", "route", "link", "table"):
                    costs[f"reading {name}"] = _median(ask, name)
                _change(agent, 1)
                costs["one changed"] = ask("hint")
                _change(agent, size // 10)
                costs["10 % changed"] = ask("hint")
                costs["no-op after that"] = _median(ask, "full")
        return costs


def _change(agent: StandIn, count: int) -> None:
    """Let the first `count` members restart with a new key; those that have before are in a later life."""
    life = max(int(count > 1) + 2, 2)
    own, *others = agent.members
    agent.show([own, *(simulated.member(n, life) for n in range(1, count + 1)), *others[count:]])


def _median(ask: Callable[[str], Cost], what: str) -> Cost:
    costs = [ask(what) for _ in range(REPEAT)]
    return sorted(costs, key=lambda cost: cost.cpu)[REPEAT // 2]


# --- in the process of the daemon ----------------------------------------------------------------------------------


@contextmanager
def _daemon(state: State) -> Iterator[Callable[[str], Cost]]:
    """A process that makes passes; what it gives makes one there and gives its cost. It is started in the namespace."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(str(state.directory), there))
    process.start()
    there.close()

    def ask(what: str) -> Cost:
        here.send(what)
        cost = here.recv()
        assert isinstance(cost, Cost), cost
        return cost

    try:
        yield ask
    finally:
        here.close()
        process.join()


def _serve(directory: str, connection: Connection) -> None:
    state = State(Path(directory))
    machine: Machine | None = None
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        if what not in KINDS and machine is None:
            machine = Machine(state)
        connection.send(_cost(state, partial(_do, state, machine, what)))


def _do(state: State, machine: Machine | None, what: str) -> int:
    """Make a pass, or only read; give the number of changes."""
    if what in KINDS:
        report = reconcile(state, kinds=KINDS[what])
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
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Cost(cpu, wall, changes, len(_stamps(state) - before), memory)


def _cpu() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _stamps(state: State) -> set[tuple[str, int, int]]:
    """Every file of the state directory with its inode and time: what is written gets another one."""
    return {(e.name, e.stat().st_ino, e.stat().st_mtime_ns) for e in os.scandir(state.directory)}


# --- the report ----------------------------------------------------------------------------------------------------


def _rows(costs: dict[int, dict[str, Cost]]) -> list[dict[str, Any]]:
    return [
        {
            "members": size,
            "pass": name,
            "CPU ms": round(cost.cpu * 1e3, 1),
            "wall ms": round(cost.wall * 1e3, 1),
            "changes": cost.changes,
            "files": cost.files,
            "peak MB": round(cost.memory, 1),
        }
        for size, by_name in costs.items()
        for name, cost in by_name.items()
    ]


def _targets(costs: dict[int, dict[str, Cost]]) -> Iterator[Target]:
    middle = costs[1000]
    yield Target("no-op at 1,000 members", middle["no-op"].cpu * 1e3, 100, "ms of CPU")
    yield Target("no-op at 1,000 members: written", middle["no-op"].changes + middle["no-op"].files, 0, "writes")
    # The new key's peer, the old one's removal; the route stays.
    yield Target("one new key at 1,000 members: changes", middle["one changed"].changes, 2, "changes")
    if 10_000 in costs:
        for name in ("cold", "no-op"):
            ratio = costs[10_000][name].cpu / middle[name].cpu
            yield Target(f"{name}: 10,000 members to 1,000", ratio, 12, "times the CPU")


def _draw(costs: dict[int, dict[str, Cost]], axes: Any) -> None:
    sizes = sorted(costs)
    for name in ("cold", "restarted", "10 % changed", "one changed", "no-op", "no-op, by hint"):
        axes.plot(sizes, [costs[size][name].cpu * 1e3 for size in sizes], marker="o", label=name)
    floor = [sum(costs[s][f"reading {n}"].cpu for n in ("members", "peer", "route")) * 1e3 for s in sizes]
    axes.plot(sizes, floor, color="0.5", linestyle=":", marker=".", label="reading Serf, WireGuard and routes")
    axes.set(xscale="log", yscale="log", xlabel="members", ylabel="CPU per pass, ms")
    axes.legend(frameon=False, fontsize=9)
