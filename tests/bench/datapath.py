"""The data path between containers of two hosts: meshd against the same WireGuard laid by hand."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from meshd.lab import images
from meshd.lab.hosts import Lab, LabHost
from tests.bench import by_hand
from tests.bench.report import Result, Target
from tests.bench.streams import UNITS, End, Figures, Way, interval, median, ratios, rounds
from tests.lab.conftest import assemble, run_box

LEAST = 0.95


def run(*, quick: bool) -> Result:
    """Measure both in turn."""
    pairs, seconds = (3, 1) if quick else (12, 2)
    with bench_lab() as lab:
        figures = rounds([_meshd(lab), _by_hand(lab)], pairs, seconds)
    return Result(
        "datapath",
        "Between containers of two hosts: meshd to the same WireGuard by hand",
        list(_rows(figures)),
        tuple(_targets(figures)),
        partial(_draw, figures),
    )


@contextmanager
def bench_lab() -> Iterator[Lab]:
    """An empty lab; everything in it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="meshd-bench-", dir="/var/tmp", ignore_cleanup_errors=True) as directory:
        lab = Lab(Path(directory) / "lab")
        try:
            yield lab
        finally:
            lab.down()


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


def _rows(figures: Mapping[str, Sequence[Figures]]) -> Iterator[dict[str, Any]]:
    for what, unit in UNITS.items():
        low, high = interval(ratios(*figures.values(), what))
        medians = {name: round(median(of, what), 3) for name, of in figures.items()}
        yield {
            "median of": unit,
            **medians,
            "ratio": round(_ratio(figures, what), 3),
            "interval": f"{low:.3f}–{high:.3f}",
        }


def _ratio(figures: Mapping[str, Sequence[Figures]], what: str) -> float:
    ordered = sorted(ratios(*figures.values(), what))
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


def _targets(figures: Mapping[str, Sequence[Figures]]) -> Iterator[Target]:
    for what, unit in UNITS.items():
        yield Target(f"{unit}, median ratio", _ratio(figures, what), LEAST, "of by hand", at_least=True)


def _draw(figures: Mapping[str, Sequence[Figures]], axes: Any) -> None:
    labels = ["TCP, Gbit/s", "UDP, Gbit/s", "UDP, small packets/s", "ping, median", "ping, p99"]
    for place, what in enumerate(UNITS):
        values = ratios(*figures.values(), what)
        axes.plot(values, [place] * len(values), "o", color="0.7", markersize=4, label="" if place else "each pair")
        low, high = interval(values)
        middle = _ratio(figures, what)
        label = "" if place else "median and its 95 % interval"
        axes.errorbar(
            middle, place, xerr=[[middle - low], [high - middle]], fmt="D", color="C0", capsize=4, label=label
        )
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.axvline(LEAST, color="C3", linestyle="--", linewidth=0.8, label=f"target, {LEAST:g}")
    axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel="meshd to by hand, in each pair; more is better")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
