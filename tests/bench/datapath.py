"""The data path between containers of two hosts: meshd against the same WireGuard laid by hand.

The recipe is laid twice, on two hosts before meshd's and on two after them: which pair of hosts comes first made as
much of a difference as anything else. What the one is to the other says how much of a ratio is chance.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

from meshd.lab import images
from meshd.lab.hosts import Lab, LabHost
from tests.bench import by_hand
from tests.bench.report import Result, Target
from tests.bench.streams import UNITS, End, Figures, Way, interval, median, ratios, rounds
from tests.lab.conftest import empty_lab, init, join, run_box

LEAST = 0.95


def run(*, quick: bool) -> Result:
    """Measure all three in turn."""
    count, seconds = (2, 1) if quick else (20, 1)
    with empty_lab("meshd-bench-") as lab:
        ways = [_by_hand(lab, 1), _meshd(lab, 3), _by_hand(lab, 5)]
        before, ours, after = rounds(ways, count, seconds).values()
    found = {what: Comparison.of(before, ours, after, what) for what in LABELS}
    return Result(
        "datapath",
        "Between containers of two hosts: meshd to the same WireGuard by hand",
        list(_rows(found)),
        tuple(_targets(found)),
        partial(_draw, found),
    )


def _meshd(lab: Lab, number: int) -> Way:
    hosts = [lab.power_on(f"barge{n}") for n in (number, number + 1)]
    for host in hosts:
        lab.start_docker(host)
        images.build(host)
    invitation = init(hosts[0])
    join(hosts[1], hosts[0], invitation)
    for host in hosts:
        run_box(host)
    return Way("meshd", *map(_container, hosts))


def _by_hand(lab: Lab, number: int) -> Way:
    hosts = [lab.power_on(f"barge{n}") for n in (number, number + 1)]
    for host in hosts:
        lab.start_docker(host)
        images.build(host)
    by_hand.lay(hosts)
    for host in hosts:
        run_box(host)
    return Way(f"by hand {number}", *map(_container, hosts))


def _container(host: LabHost) -> End:
    """Its container `box`: iperf3 is not in the image, but runs in the container's network namespace."""
    form = "{{.State.Pid}} {{.NetworkSettings.Networks.ovl0.IPAddress}}"
    pid, address = host.run(["docker", "inspect", "--format", form, "box"]).stdout.split()
    return End(host, address, f"/proc/{pid}/ns/net")


# --- the report ----------------------------------------------------------------------------------------------------

LABELS = {
    "tcp": "TCP",
    "udp": "UDP, 1,200 B",
    "packets": "UDP, 64 B",
    "ping": "ping, median",
    "p99": "ping, p99",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure: its medians; meshd's in terms of the mean of both recipes; the one recipe's in terms of the other."""

    ours: float
    theirs: float
    ratios: list[float]
    chance: list[float]

    @classmethod
    def of(
        cls, before: Sequence[Figures], ours: Sequence[Figures], after: Sequence[Figures], what: str
    ) -> "Comparison":
        mean = [_mean(*pair) for pair in zip(before, after, strict=True)]
        return cls(median(ours, what), median(mean, what), ratios(ours, mean, what), ratios(before, after, what))


def _mean(one: Figures, other: Figures) -> Figures:
    return Figures(*(sum(pair) / 2 for pair in zip(astuple(one), astuple(other), strict=True)))


def _rows(found: Mapping[str, Comparison]) -> Iterator[dict[str, Any]]:
    for what, comparison in found.items():
        row = {"median of": UNITS[what], "meshd": round(comparison.ours, 3), "by hand": round(comparison.theirs, 3)}
        for name, values in (("ratio", comparison.ratios), ("by hand to itself", comparison.chance)):
            low, high = interval(values)
            row |= {name: round(statistics.median(values), 3), f"{name}, interval": f"{low:.3f}–{high:.3f}"}
        yield row


def _targets(found: Mapping[str, Comparison]) -> Iterator[Target]:
    for what, label in LABELS.items():
        ratio = statistics.median(found[what].ratios)
        yield Target(f"{label}: meshd to by hand", ratio, LEAST, "times as good", at_least=True)


def _draw(found: Mapping[str, Comparison], axes: Any) -> None:
    for place, comparison in enumerate(found.values()):
        first = place == 0
        axes.plot(
            comparison.ratios, [place - 0.15] * len(comparison.ratios), "o", color="0.8", markersize=4,
            label="meshd, each round" if first else "",
        )  # fmt: skip
        for values, at, color, name in (
            (comparison.ratios, place - 0.15, "C0", "meshd"),
            (comparison.chance, place + 0.15, "0.4", "by hand, once more"),
        ):
            middle, (low, high) = statistics.median(values), interval(values)
            label = f"{name}: median, 95 % interval" if first else ""
            spread = [[middle - low], [high - middle]]
            axes.errorbar(middle, at, xerr=spread, fmt="D", color=color, capsize=4, label=label)
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.axvline(LEAST, color="C3", linestyle="--", linewidth=0.8, label=f"target, {LEAST:g}")
    axes.set(yticks=range(len(LABELS)), yticklabels=LABELS.values(), xlabel="times as good as by hand")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
