"""The cost of a pass: simulated members by a stand-in Serf, the real wireguard-go, real routes and nftables."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from meshd.state.directory import State
from tests.bench import members as simulated
from tests.bench.daemon import Cost
from tests.bench.report import Result, Target
from tests.bench.stand_in import StandIn, serving
from tests.netns.conftest import namespace

PORT = 7373
REPEAT = 7


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
                _change(agent, 1, life=2)
                costs["one changed"] = ask("hint")
                _change(agent, size // 10, life=3)
                costs["10 % changed"] = ask("hint")
                costs["no-op after that"] = _median(ask, "full")
        return costs


def _change(agent: StandIn, count: int, life: int) -> None:
    """Let the first `count` members restart with a new key, in this life of theirs."""
    own, *others = agent.members
    agent.show([own, *(simulated.member(n, life) for n in range(1, count + 1)), *others[count:]])


def _median(ask: Callable[[str], Cost], what: str) -> Cost:
    costs = [ask(what) for _ in range(REPEAT)]
    return sorted(costs, key=lambda cost: cost.cpu)[REPEAT // 2]


@contextmanager
def _daemon(state: State) -> Iterator[Callable[[str], Cost]]:
    """A process that makes passes, in this namespace; what it gives makes one there and gives its cost."""
    command = [sys.executable, "-m", "tests.bench.daemon", str(state.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def ask(what: str) -> Cost:
            print(what, file=requests, flush=True)
            return Cost(**json.loads(answers.readline()))

        yield ask
        requests.close()


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
    axes.plot(
        sizes, floor, color="0.5", linestyle=":", marker=".", label="the reading alone: Serf,\nWireGuard and routes"
    )
    axes.set(xscale="log", yscale="log", xlabel="members", ylabel="CPU per pass, ms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
