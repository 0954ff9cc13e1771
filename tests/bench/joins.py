"""Join to ready: a fresh host's `meshd join`, with Serf's own gossip and Serf's own handler beside it on one clock."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from typing import Any

from meshd.lab.hosts import LabHost
from tests.bench.journal import Journal, pinging, watching
from tests.bench.mesh import Mesh, standing
from tests.bench.report import Result, Target
from tests.lab.conftest import overlay

COMMAND, CALL = "the command's start", "Serf's join call"


@dataclass(frozen=True, slots=True)
class Join:
    """One join, in seconds: of the command since its start, and of each other host since Serf's join call.

    The record enters the gossip with that call.
    """

    serf: float
    call: float
    called: float
    ready: float
    over: float
    seen: dict[str, float]
    configured: dict[str, float]
    reached: dict[str, float]
    handler: dict[str, float]

    @property
    def ratio(self) -> float:
        """What the last host needed until it was configured, in terms of what Serf needed to tell it."""
        return max(self.configured.values()) / max(self.seen.values())

    @property
    def late(self) -> int:
        """The number of hosts on which Serf's own handler started before the newcomer was configured."""
        return sum(at >= self.handler[name] for name, at in self.configured.items())


# What is told of a join: until when, since when, and the seconds.
PHASES: tuple[tuple[str, str, Callable[[Join], float]], ...] = (
    ("Serf starts", COMMAND, lambda join: join.serf),
    ("Serf's join call", COMMAND, lambda join: join.call),
    ("the join call is over", CALL, lambda join: join.called - join.call),
    ("seen by the last host's Serf", CALL, lambda join: max(join.seen.values())),
    ("configured on the last host", CALL, lambda join: max(join.configured.values())),
    ("first packet from the last host", CALL, lambda join: max(join.reached.values())),
    ("the last host has answered", CALL, lambda join: join.ready - join.call),
    ("Serf's handler starts on the first host", CALL, lambda join: min(join.handler.values())),
    ("Serf's handler starts on the last host", CALL, lambda join: max(join.handler.values())),
    ("the whole command", COMMAND, lambda join: join.over),
)


def run(*, quick: bool) -> Result:
    """Let a host join and leave again and again, in meshes that grow."""
    sizes, rounds = ((3, 10), 2) if quick else ((3, 10, 25, 50), 6)
    mesh, joins = standing(), dict[int, list[Join]]()
    for size in sizes:
        mesh.grow(size - 1)
        joins[size] = list(measure(mesh, rounds))
    rows, targets = [row for size in sizes for row in _rows(size, joins[size])], tuple(_targets(joins))
    return Result("joins", "From join to ready", rows, targets, partial(_draw, sizes[-1], joins[sizes[-1]]))


def measure(mesh: Mesh, rounds: int) -> Iterator[Join]:
    """Let one more host join the mesh so many times; it leaves after each."""
    new = mesh.next_host()
    with watching([*mesh.hosts, new]) as journal:
        for _ in range(rounds):
            journal.settle()
            yield _join(mesh, new, journal)
            journal.settle()
            new.run(["meshd", "leave"])


def _join(mesh: Mesh, new: LabHost, journal: Journal) -> Join:
    with pinging(mesh.hosts, IPv4Address(overlay(new))) as reached:
        begun = time.monotonic()
        command = mesh.join_command(new)
        assert command.stderr is not None
        said = command.stderr.readline()
        ready = time.monotonic()
        command.communicate()
        over = time.monotonic()
        assert said == f"{len(mesh.hosts) + 1}/{len(mesh.hosts) + 1} hosts ready\n", said
    ((_, serf),) = journal.on_each([new], "agent: Serf agent starting", {new.name: begun}).items()
    ((_, call),) = journal.on_each([new], "agent: joining", {new.name: begun}).items()
    ((_, called),) = journal.on_each([new], "agent: joined", {new.name: call}).items()
    since = dict.fromkeys((host.name for host in mesh.hosts), call)
    seen = journal.on_each(mesh.hosts, f"EventMemberJoin: {new.name} ", since)
    configured = journal.on_each(mesh.hosts, f"(endpoint {new.address}:", since)
    # The newcomer's certificate is confirmed soon; Serf then makes one member-update of the join and the update.
    handler = journal.on_each(mesh.hosts, "Received event: member-", seen)
    spread = ({name: at - call for name, at in times.items()} for times in (seen, configured, reached, handler))
    return Join(serf - begun, call - begun, called - begun, ready - begun, over - begun, *spread)


# --- the report ----------------------------------------------------------------------------------------------------


def _rows(size: int, joins: Sequence[Join]) -> Iterator[dict[str, Any]]:
    for until, since, seconds in PHASES:
        times = [seconds(join) * 1e3 for join in joins]
        yield {
            "hosts": size,
            "until": until,
            "since": since,
            "median ms": round(statistics.median(times)),
            "max ms": round(max(times)),
            "joins": len(times),
        }


def _targets(joins: dict[int, list[Join]]) -> Iterator[Target]:
    smallest, largest = min(joins), max(joins)
    ratios = [join.ratio for join in joins[largest]]
    for name, figure in (("median", statistics.median(ratios)), ("max", max(ratios))):
        yield Target(f"{largest} hosts, configured on the last: {name}", figure, 1.5, "times Serf's gossip")
    late = sum(join.late for join in joins[largest])
    yield Target(f"{largest} hosts, configured after Serf's own handler started", late, 0, "hosts of all joins")
    whole = statistics.median(join.over for join in joins[smallest])
    yield Target(f"{smallest} hosts, the whole command: median", whole, 2.5, "s")


def _draw(size: int, joins: Sequence[Join], axes: Any) -> None:
    curves = {
        "Serf's log shows the join": [at for join in joins for at in join.seen.values()],
        "meshd has configured the peer": [at for join in joins for at in join.configured.values()],
        "a ping is answered": [at for join in joins for at in join.reached.values()],
        "Serf's own handler starts": [at for join in joins for at in join.handler.values()],
    }
    for label, times in curves.items():
        shares = [(place + 1) / len(times) * 100 for place in range(len(times))]
        axes.step([0, *sorted(times)], [0, *shares], where="post", label=label)
    axes.set(xlabel=f"since Serf's join call into a mesh of {size} hosts, s", ylabel="of the other hosts, %")
    axes.set(xlim=(0, None), ylim=(0, 101))
    axes.legend(frameon=False, loc="lower right")
