"""A mesh that grows to a hundred hosts on one machine: joins, settling, reach, memory, control traffic, idle CPU."""

import json
import os
import random
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from meshd.lab.hosts import LabHost
from meshd.net.wireguard.userspace import exchange
from tests.bench.journal import pinging
from tests.bench.mesh import Mesh, standing
from tests.bench.report import Result, Target
from tests.lab.conftest import address_of

SIZES = (10, 25, 50, 75, 100)
SETTLED = 120.0
IDLE = 30.0  # a keepalive of WireGuard is due every 25 s
SAMPLE = 5
PROCESSES = {"daemon": " -m meshd ", "serf": "serf agent ", "wireguard": "wireguard-go "}
COUNTERS = """\
table bridge bench {
    counter gossip {}
    counter wireguard {}
    chain forward {
        type filter hook forward priority 0;
        udp dport 7946 counter name gossip
        tcp dport 7946 counter name gossip
        tcp sport 7946 counter name gossip
        udp dport 51820 counter name wireguard
    }
}
"""


@dataclass(frozen=True, slots=True)
class Scale:
    """What one size of mesh costs. Each but `reach` and `peers` is for one host, the median where they differ."""

    hosts: int
    join_s: float
    settled_s: float
    reach_percent: float
    daemon_mb: float
    serf_mb: float
    wireguard_mb: float
    gossip_bytes_per_s: float
    wireguard_bytes_per_s: float
    cpu_percent: float


def run(*, quick: bool) -> Result:
    """Let hosts join one after the other, and look at each size once it has come to rest."""
    mesh = standing()
    grown = [measure(mesh, size) for size in ((5, 10) if quick else SIZES)]
    reach = min(scale.reach_percent for scale in grown)
    target = Target("pings that got no answer", 100 - reach, 0, "%")
    return Result("scale", "A mesh that grows", [_row(s) for s in grown], (target,), partial(_draw, grown))


def measure(mesh: Mesh, size: int) -> Scale:
    joins = mesh.grow(size)
    settled = _settle(mesh.hosts)
    reach = _reach(mesh.hosts)
    before, begun = _cpu(mesh.hosts), time.monotonic()
    gossip, wireguard = _traffic(mesh)
    cpu = sum(_cpu(mesh.hosts).values()) - sum(before.values())
    idle = time.monotonic() - begun
    memory = _memory(mesh.hosts)
    return Scale(
        size,
        statistics.median(joins[-5:]),
        settled,
        reach,
        memory["daemon"],
        memory["serf"],
        memory["wireguard"],
        gossip / size,
        wireguard / size,
        cpu / idle / size * 100,
    )


def _settle(hosts: Sequence[LabHost]) -> float:
    """Wait until every host has a peer for every other one; give the seconds."""
    begun, waiting = time.monotonic(), list(hosts)
    while waiting and time.monotonic() < begun + SETTLED:
        time.sleep(0.1)
        waiting = [host for host in waiting if _peers(host) != len(hosts) - 1]
    if waiting:
        raise TimeoutError(f"not all peers on {', '.join(host.name for host in waiting)}")
    return time.monotonic() - begun


def _peers(host: LabHost) -> int:
    return exchange(Path(f"/proc/{host.pid}/root/run/wireguard/wg0.sock"), "get=1\n\n").count("public_key=")


def _reach(hosts: Sequence[LabHost]) -> float:
    """Let every host ping a few of the others; give the percentage that was answered."""
    answered, asked = 0, 0
    for target in random.sample(hosts, SAMPLE):
        others = [host for host in hosts if host != target]
        with pinging(others, address_of(target), patience=10.0) as reached:
            pass
        answered, asked = answered + len(reached), asked + len(others)
    return answered / asked * 100


def _traffic(mesh: Mesh) -> tuple[float, float]:
    """Count for IDLE seconds what passes the switch: bytes per second of gossip and of WireGuard, of all hosts."""
    mesh.lab.switch.run(["nft", "-f", "-"], text=COUNTERS)
    time.sleep(IDLE)
    listed = json.loads(mesh.lab.switch.run(["nft", "-j", "list", "counters"]).stdout)["nftables"]
    mesh.lab.switch.run(["nft", "delete", "table", "bridge", "bench"])
    counted = {entry["counter"]["name"]: entry["counter"]["bytes"] / IDLE for entry in listed if "counter" in entry}
    return counted["gossip"], counted["wireguard"]


def _processes(hosts: Sequence[LabHost]) -> Iterator[tuple[str, Path]]:
    """Find what meshd runs on these hosts: which of PROCESSES, and its directory in /proc."""
    networks = {Path(f"/proc/{host.pid}/ns/net").readlink() for host in hosts}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            for name, text in PROCESSES.items():
                if text in command and (entry / "ns/net").readlink() in networks:
                    yield name, entry


def _cpu(hosts: Sequence[LabHost]) -> dict[Path, float]:
    """Seconds of CPU that each process has used, with those of its children that have ended."""
    used = {}
    for _, entry in _processes(hosts):
        with suppress(OSError):
            words = (entry / "stat").read_text().rpartition(") ")[2].split()
            used[entry] = sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")
    return used


def _memory(hosts: Sequence[LabHost]) -> Mapping[str, float]:
    """Megabytes resident, the median of each kind of process."""
    found: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for name, entry in _processes(hosts):
        with suppress(OSError):
            if resident := re.search(r"VmRSS:\s*(\d+)", (entry / "status").read_text()):
                found[name].append(int(resident[1]) / 1024)
    return {name: statistics.median(sizes) for name, sizes in found.items()}


# --- the report ----------------------------------------------------------------------------------------------------

NAMES = {
    "hosts": "hosts",
    "join_s": "join s",
    "settled_s": "settled s",
    "reach_percent": "reach %",
    "daemon_mb": "daemon MB",
    "serf_mb": "Serf MB",
    "wireguard_mb": "wireguard-go MB",
    "gossip_bytes_per_s": "gossip B/s",
    "wireguard_bytes_per_s": "WireGuard B/s",
    "cpu_percent": "CPU %",
}


def _row(scale: Scale) -> dict[str, Any]:
    return {NAMES[field.name]: round(getattr(scale, field.name), 2) for field in fields(scale)}


def _draw(grown: Sequence[Scale], axes: Any) -> None:
    sizes = [scale.hosts for scale in grown]
    shown = [name for name in NAMES if name not in ("hosts", "settled_s", "reach_percent")]
    for name in shown:
        values = [getattr(scale, name) for scale in grown]
        axes.plot(sizes, [value / values[0] for value in values], marker="o", label=NAMES[name])
    axes.plot(sizes, [size / sizes[0] for size in sizes], color="0.5", linestyle=":", label="as the hosts")
    axes.set(xscale="log", yscale="log", xlabel="hosts", ylabel=f"of one host, to that among {sizes[0]} hosts")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xticks(sizes, map(str, sizes))
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
