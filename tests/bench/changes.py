"""Change to applied: a new key, a goodbye, a revocation, beside Serf's own gossip of each; and failures as they are."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from meshd.lab.hosts import LabHost
from tests.bench.journal import Journal, pinging, watching
from tests.bench.mesh import Mesh, standing
from tests.bench.report import Result, Target
from tests.lab.conftest import address_of
from tests.lab.faults import KILL_DAEMON, STATE, boot

REKEY = f"{KILL_DAEMON}; rm {STATE}/wireguard.key; meshd up"


@dataclass(frozen=True, slots=True)
class Spread:
    """How one thing spread over the other hosts: seconds since it was in the gossip, or had happened, by their names.

    `heard` is when Serf's log tells of it, `applied` when meshd has done what follows, `handler` when Serf's own
    handler for it starts.
    """

    heard: Mapping[str, float]
    applied: Mapping[str, float] = field(default_factory=dict)
    handler: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return max(self.applied.values()) / max(self.heard.values())

    @property
    def late(self) -> int:
        return sum(at >= self.handler[name] for name, at in self.applied.items() if name in self.handler)


def run(*, quick: bool) -> Result:
    """Change what one host publishes, let it go, fail and come back, again and again, in the mesh that is there."""
    size, rounds = (10, 1) if quick else (50, 2)
    mesh = standing()
    mesh.grow(size - 1)
    spreads = measure(mesh, rounds)
    return Result(
        "changes", f"From change to applied, {size} hosts", list(_rows(spreads)), tuple(_targets(spreads)),
        partial(_draw, spreads),
    )  # fmt: skip


def measure(mesh: Mesh, rounds: int) -> dict[str, list[Spread]]:
    """Make each change so many times, by a host more than the mesh has; it is gone afterwards."""
    new = mesh.next_host()
    found: dict[str, list[Spread]] = {}

    def note(name: str, spread: Spread) -> None:
        found.setdefault(name, []).append(spread)

    with watching([*mesh.hosts, new]) as journal:
        change = Changes(mesh, journal)
        for _ in range(rounds):
            for name, end in (("goodbye", change.goodbye), ("revocation", change.revocation)):
                mesh.admit(new)
                note("new key", change.new_key(new))
                note(name, end(new))
        mesh.admit(new)
        for _ in range(max(1, rounds // 2)):
            for name, spread in change.power(new):
                note(name, spread)
            for name, spread in change.cable(mesh.next_host()):
                note(name, spread)
        mesh.next_host().run(["meshd", "leave"])
    return found


class Changes:
    """What can happen to a host, each thing once the mesh has come to rest."""

    def __init__(self, mesh: Mesh, journal: Journal) -> None:
        self.mesh, self.journal = mesh, journal

    def new_key(self, host: LabHost) -> Spread:
        """Restart the daemon with another WireGuard key: it tells Serf, which goes on."""
        self.journal.settle()
        host.run(["sh", "-ec", REKEY])
        return self._update(host, f"(endpoint {host.address}:")

    def goodbye(self, host: LabHost) -> Spread:
        self.journal.settle()
        host.run(["meshd", "leave"])
        return self._update(host, "remove peer")

    def _update(self, host: LabHost, done: str) -> Spread:
        """The host's new record is in the gossip when its own Serf logs it."""
        text = f"EventMemberUpdate: {host.name}"
        begun = self._logged(host, text)
        heard = self.journal.on_each(self.mesh.hosts, text, self._since(begun))
        applied = self.journal.on_each(self.mesh.hosts, done, self._since(begun))
        handler = self.journal.on_each(self.mesh.hosts, "Received event: member-", heard)
        return Spread(*(_since(begun, times) for times in (heard, applied, handler)))

    def revocation(self, host: LabHost) -> Spread:
        """A user event of the first host, which acts by itself and does not log it; Serf holds no user event back.

        The first host then asks the others whether they have heard, in which they hear of it as well.
        """
        self.journal.settle()
        first, *others = self.mesh.hosts
        first.run(["meshd", "revoke", host.name])
        text = "Received event: user-event: meshd-gone|Received event: query: meshd-bury"
        begun = self._logged(first, text)
        heard = self.journal.on_each(others, text, self._since(begun))
        applied = self.journal.on_each(others, "remove peer", self._since(begun))
        host.run(["meshd", "leave", "--force"])
        return Spread(_since(begun, heard), _since(begun, applied))

    def power(self, host: LabHost) -> Iterator[tuple[str, Spread]]:
        """Cut the power of a host, and turn it on again."""
        self.journal.settle()
        begun = time.monotonic()
        self.mesh.lab.power_off(host)
        yield "power lost", self._status("Failed", host, begun)
        self.journal.settle()
        begun = time.monotonic()
        host = boot(self.mesh.lab, host)
        with pinging(self.mesh.hosts, address_of(host)) as reached:
            heard = self._status("Join", host, begun)
        yield "power back", Spread(heard.heard, _since(begun, reached))

    def cable(self, host: LabHost) -> Iterator[tuple[str, Spread]]:
        """Cut the cable of a host until all have noticed, and mend it."""
        self.journal.settle()
        begun = time.monotonic()
        self.mesh.lab.cut([host.name], [other.name for other in self.mesh.hosts])
        yield "cable cut", self._status("Failed", host, begun)
        self.journal.settle()
        begun = time.monotonic()
        self.mesh.lab.heal()
        with pinging(self.mesh.hosts, address_of(host)) as reached:
            heard = self._status("Join", host, begun)
        yield "cable mended", Spread(heard.heard, _since(begun, reached))

    def _status(self, event: str, host: LabHost, begun: float) -> Spread:
        text = f"EventMember{event}: {host.name} "
        return Spread(_since(begun, self.journal.on_each(self.mesh.hosts, text, self._since(begun))))

    def _logged(self, host: LabHost, text: str) -> float:
        return self.journal.on_each([host], text, {host.name: 0.0})[host.name]

    def _since(self, begun: float) -> dict[str, float]:
        return dict.fromkeys((host.name for host in self.mesh.hosts), begun)


def _since(begun: float, times: Mapping[str, float]) -> dict[str, float]:
    return {name: at - begun for name, at in times.items()}


# --- the report ----------------------------------------------------------------------------------------------------

STAGES: tuple[tuple[str, Callable[[Spread], Mapping[str, float]]], ...] = (
    ("heard by the last Serf", lambda spread: spread.heard),
    ("applied on the last host", lambda spread: spread.applied),
    ("Serf's handler starts on the last", lambda spread: spread.handler),
)


def _rows(spreads: Mapping[str, list[Spread]]) -> Iterator[dict[str, Any]]:
    for name, found in spreads.items():
        for stage, times in STAGES:
            lasts = [max(times(spread).values()) * 1e3 for spread in found if times(spread)]
            if lasts:
                median, most = round(statistics.median(lasts)), round(max(lasts))
                yield {"change": name, "until": stage, "median ms": median, "max ms": most, "times": len(lasts)}


def _targets(spreads: Mapping[str, list[Spread]]) -> Iterator[Target]:
    for name in ("new key", "goodbye", "revocation"):
        ratios = [spread.ratio for spread in spreads[name]]
        yield Target(f"{name}, applied on the last: median", statistics.median(ratios), 1.5, "times Serf's gossip")
        yield Target(f"{name}, applied on the last: max", max(ratios), 1.5, "times Serf's gossip")
    late = sum(spread.late for found in spreads.values() for spread in found)
    yield Target("applied after Serf's own handler for it started", late, 0, "hosts of all changes")


def _draw(spreads: Mapping[str, list[Spread]], axes: Any) -> None:
    names = list(spreads)
    for stage, times in STAGES:
        points = [(max(times(s).values()), row) for row, name in enumerate(names) for s in spreads[name] if times(s)]
        axes.scatter(*zip(*points, strict=True), label=stage, alpha=0.7)
    axes.set(xscale="log", xlabel="s", yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
