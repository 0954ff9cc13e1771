"""Host to host: meshd beside tinc, Nebula and the bare underlay, and what makes it faster."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from meshd.lab.hosts import Lab, LabHost
from tests.bench import others
from tests.bench.report import Result
from tests.bench.streams import TOOLS, UNITS, End, Figures, Way, interval, median, ratios, rounds
from tests.lab.conftest import empty_lab, init, join, overlay

JUMBO = 9000


def run(*, quick: bool) -> Result:
    """Measure all in turn; each pair of hosts has one of the ways, except that three share the last pair."""
    with empty_lab("meshd-bench-") as lab:
        figures = rounds(list(_ways(lab, quick=quick)), 1 if quick else 5, 1)
    return Result(
        "tunnels",
        "Host to host: meshd, other meshes, the bare underlay",
        list(_rows(figures)),
        (),
        partial(_draw, figures),
    )


def _ways(lab: Lab, *, quick: bool) -> Iterator[Way]:
    yield _meshd("meshd", _pair(lab, 1))
    yield _meshd("meshd, newer wireguard-go", _pair(lab, 3), newer=True)
    hosts = _pair(lab, 5)
    yield Way("underlay", *(End(host, str(host.address)) for host in hosts))
    if not quick:
        yield others.tinc(hosts)
        yield others.nebula(hosts)
        yield _meshd(f"meshd, underlay's MTU {JUMBO}", _pair(lab, 7, JUMBO))
        yield _meshd("meshd, both", _pair(lab, 9, JUMBO), newer=True)


def _pair(lab: Lab, number: int, mtu: int = 1500) -> list[LabHost]:
    return [lab.power_on(f"barge{n}", mtu=mtu) for n in (number, number + 1)]


def _meshd(name: str, hosts: Sequence[LabHost], *, newer: bool = False) -> Way:
    """Make a mesh of two hosts, with the wireguard-go that is installed or with the newest one."""
    if newer:
        for host in hosts:
            # Each host has a file system of its own as far as mounts go.
            host.run(["mount", "--bind", str(TOOLS / "sid/usr/bin/wireguard-go"), "/usr/bin/wireguard-go"])
    options = ["--no-docker", "--allow", "all"]
    invitation = init(hosts[0], *options)
    join(hosts[1], hosts[0], invitation, *options)
    return Way(name, *(End(host, overlay(host)) for host in hosts))


# --- the report ----------------------------------------------------------------------------------------------------


def _rows(figures: Mapping[str, Sequence[Figures]]) -> Iterator[dict[str, Any]]:
    for name, of in figures.items():
        medians = {unit: round(median(of, what), 3) for what, unit in UNITS.items()}
        low, high = interval(ratios(of, figures["meshd"], "tcp"))
        yield {"": name, **medians, "TCP to meshd's": f"{low:.2f}–{high:.2f}"}


def _draw(figures: Mapping[str, Sequence[Figures]], axes: Any) -> None:
    ours = figures["meshd"]
    marks = {"tcp": ("TCP throughput", "D"), "packets": ("small packets/s", "s"), "ping": ("ping, median", "o")}
    for shift, (what, (label, mark)) in zip((-0.2, 0, 0.2), marks.items(), strict=True):
        for place, of in enumerate(figures.values()):
            values = sorted(ratios(of, ours, what))
            low, high = interval(values)
            middle = median(of, what) / median(ours, what) if what != "ping" else median(ours, what) / median(of, what)
            axes.plot([low, high], [place + shift] * 2, color=f"C{list(marks).index(what)}", linewidth=1)
            axes.plot(
                middle,
                place + shift,
                mark,
                color=f"C{list(marks).index(what)}",
                markersize=5,
                label="" if place else label,
            )
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set(
        xscale="log",
        yticks=range(len(figures)),
        yticklabels=list(figures),
        xlabel="to meshd with Debian's wireguard-go; more is better",
    )
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
