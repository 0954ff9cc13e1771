"""Streams and pings between two ends: what iperf3 and ping measure there, and what pairs of such figures say."""

import json
import math
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshd.lab.hosts import LabHost

# Unpacked by the Makefile, not installed.
TOOLS = Path(__file__).parents[2] / ".make" / "tools"
OWN = TOOLS / "own"

# What fits into every tunnel here (Nebula's MTU is 1300), and what a call or a game sends.
LARGE, SMALL = 1200, 64


@dataclass(frozen=True, slots=True)
class End:
    """Where one end is: a host, or a network namespace on it, and its address there."""

    host: LabHost
    address: str
    namespace: str = ""

    def argv(self, program: Path, *arguments: str) -> list[str]:
        """Give the command that runs an unpacked program at this end."""
        enter = ["nsenter", f"--net={self.namespace}"] if self.namespace else []
        return [*enter, *unpacked(program), *arguments]


@dataclass(frozen=True, slots=True)
class Way:
    """A way from one end to another, by name."""

    name: str
    client: End
    server: End


@dataclass(frozen=True, slots=True)
class Figures:
    """What one round gave: Gbit/s that arrived, thousands of small packets a second that arrived, milliseconds."""

    tcp: float
    udp: float
    packets: float
    ping: float
    p99: float


UNITS = {
    "tcp": "TCP Gbit/s",
    "udp": "UDP Gbit/s",
    "packets": "1,000 packets/s",
    "ping": "ping ms",
    "p99": "ping p99 ms",
}


def unpacked(program: Path) -> list[str]:
    """Give the words that run a program of the unpacked packages, with their libraries."""
    libraries = ":".join(str(path) for path in sorted(OWN.glob("**/lib/*-linux-gnu")))
    return ["env", f"LD_LIBRARY_PATH={libraries}", str(program)]


def measure(way: Way, seconds: int) -> Figures:
    """Take one round; each of its three streams lasts `seconds`."""
    with _serving(way.server):
        tcp = _iperf(way, seconds)["sum_received"]["bits_per_second"] / 1e9
        large = _datagrams(way, seconds, LARGE)
        small = _datagrams(way, seconds, SMALL)
        times = _pings(way, seconds)
    return Figures(tcp, large * LARGE * 8 / 1e9, small / 1e3, statistics.median(times), _percentile(times, 99))


def rounds(ways: Sequence[Way], count: int, seconds: int) -> dict[str, list[Figures]]:
    """Measure all ways in turn, `count` times, each round beginning with another one: what disturbs, disturbs all."""
    figures: dict[str, list[Figures]] = {way.name: [] for way in ways}
    for number in range(count):
        first = number % len(ways)
        for way in [*ways[first:], *ways[:first]]:
            figures[way.name].append(measure(way, seconds))
    return figures


def median(figures: Sequence[Figures], what: str) -> float:
    return float(statistics.median(getattr(f, what) for f in figures))


def ratios(ours: Sequence[Figures], theirs: Sequence[Figures], what: str) -> list[float]:
    """Give how much better ours is in each pair: above 1 it carries more, or answers sooner."""
    pairs = [(getattr(a, what), getattr(b, what)) for a, b in zip(ours, theirs, strict=True)]
    return [b / a if what in ("ping", "p99") else a / b for a, b in pairs]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Give a confidence interval of the median, 95 % or a little more: two of the values, by the sign test."""
    ordered, count = sorted(values), len(values)
    outside, place = 0.0, 0
    while (outside := outside + math.comb(count, place) / 2**count) <= 0.025:
        place += 1
    return ordered[max(place - 1, 0)], ordered[-max(place, 1)]


# --- one end -------------------------------------------------------------------------------------------------------


@contextmanager
def _serving(end: End) -> Iterator[None]:
    command = end.argv(OWN / "usr/bin/iperf3", "--server", "--forceflush")
    server = end.host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert server.stdout is not None
    try:
        line = ""
        while "Server listening" not in line:
            line = server.stdout.readline()
            assert line, "iperf3 does not listen"
        yield
    finally:
        # What is nsenter's child belongs to the host's namespace of processes, and ends with it.
        end.host.run(["pkill", "-x", "iperf3"], check=False)
        server.communicate()


def _iperf(way: Way, seconds: int, *options: str) -> Mapping[str, Any]:
    arguments = ["--client", way.server.address, "--time", str(seconds), "--json", *options]
    for _ in range(5):
        done = way.client.host.run(way.client.argv(OWN / "usr/bin/iperf3", *arguments), check=False)
        answer: Mapping[str, Any] = json.loads(done.stdout)
        if "error" not in answer:
            end: Mapping[str, Any] = answer["end"]
            return end
        time.sleep(0.2)  # the server is still busy with the one before
    raise AssertionError(f"{way.name}: {answer['error']}")


def _datagrams(way: Way, seconds: int, size: int) -> float:
    """Give the datagrams of `size` bytes that arrive in a second while as many as possible are sent."""
    end = _iperf(way, seconds, "--udp", "--bitrate", "0", "--length", str(size))["sum"]
    return float((end["packets"] - end["lost_packets"]) / end["seconds"])


def _pings(way: Way, seconds: int) -> list[float]:
    """Give round-trip times in milliseconds, 200 a second."""
    command = way.client.argv(OWN / "bin/ping", "-c", str(seconds * 200), "-i", "0.005", way.server.address)
    return [float(found) for found in re.findall(r"time=([0-9.]+) ms", way.client.host.run(command).stdout)]


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
