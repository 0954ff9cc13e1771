"""The data path between containers of two hosts: meshd against the same WireGuard laid by hand."""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from meshd.lab import images
from meshd.lab.hosts import Lab, LabHost
from tests.bench import by_hand
from tests.bench.report import Result, Target
from tests.bench.streams import UNITS, End, Figures, Way, interval, median, ratios, rounds
from tests.lab.conftest import assemble, empty_lab, run_box

LEAST = 0.95


def run(*, quick: bool) -> Result:
    """Measure both in turn."""
    pairs, seconds = (2, 1) if quick else (30, 1)
    with empty_lab("meshd-bench-") as lab:
        ours, theirs = rounds([_meshd(lab), _by_hand(lab)], pairs, seconds).values()
    return Result(
        "datapath",
        "Between containers of two hosts: meshd to the same WireGuard by hand",
        list(_rows(ours, theirs)),
        tuple(_targets(ours, theirs)),
        partial(_draw, ours, theirs),
    )


def _meshd(lab: Lab) -> Way:
    hosts = assemble(lab, docker=2)
    return Way("meshd", *map(_container, hosts))


def _by_hand(lab: Lab) -> Way:
    hosts = [lab.power_on("barge3"), lab.power_on("barge4")]
    for host in hosts:
        lab.start_docker(host)
        images.build(host)
    by_hand.lay(hosts)
    for host in hosts:
        run_box(host)
    return Way("by hand", *map(_container, hosts))


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


def _rows(ours: Sequence[Figures], theirs: Sequence[Figures]) -> Iterator[dict[str, Any]]:
    for what, unit in UNITS.items():
        pairs = ratios(ours, theirs, what)
        low, high = interval(pairs)
        yield {
            "median of": unit,
            "meshd": round(median(ours, what), 3),
            "by hand": round(median(theirs, what), 3),
            "ratio": round(statistics.median(pairs), 3),
            "interval": f"{low:.3f}–{high:.3f}",
        }


def _targets(ours: Sequence[Figures], theirs: Sequence[Figures]) -> Iterator[Target]:
    for what, label in LABELS.items():
        ratio = statistics.median(ratios(ours, theirs, what))
        yield Target(f"{label}: meshd to by hand", ratio, LEAST, "times as good", at_least=True)


def _draw(ours: Sequence[Figures], theirs: Sequence[Figures], axes: Any) -> None:
    for place, what in enumerate(LABELS):
        values = ratios(ours, theirs, what)
        axes.plot(values, [place] * len(values), "o", color="0.75", markersize=4, label="" if place else "each pair")
        middle, (low, high) = statistics.median(values), interval(values)
        label = "" if place else "median, 95 % interval"
        spread = [[middle - low], [high - middle]]
        axes.errorbar(middle, place, xerr=spread, fmt="D", color="C0", capsize=4, label=label)
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.axvline(LEAST, color="C3", linestyle="--", linewidth=0.8, label=f"target, {LEAST:g}")
    axes.set(yticks=range(len(LABELS)), yticklabels=LABELS.values(), xlabel="times as good as by hand")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
