"""A mesh at rest: CPU and memory of the daemon, Serf and wireguard-go, and what each host's link carries.

Small meshes are real. The daemon and wireguard-go with 50 and 1,000 peers are real too, but Serf's answers there are
simulated; 50 real Serf agents beside them say what Serf itself takes.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from meshd.endpoint import Endpoint
from meshd.gossip import serf
from meshd.lab.hosts import Lab, LabHost
from tests.bench import members as simulated
from tests.bench import pretend
from tests.bench.report import Result, Target
from tests.conftest import eventually
from tests.lab.conftest import empty_lab, init, join, settled

SIMULATED = (50, 1000)
AGENTS = 51
PROGRAMS = ("daemon", "serf", "wireguard-go")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used: seconds of CPU, with its children's; MB of memory, now and at the most."""

    cpu: float
    memory: float
    peak: float


@dataclass(frozen=True, slots=True)
class Rest:
    """A host at rest: by program the share of a core in % and the memory in MB; bytes a second on its link."""

    programs: Mapping[str, Usage]
    traffic: float | None = None


def run(*, quick: bool) -> Result:
    """Let all of them rest at the same time: together they take a few percent of a core."""
    calm, seconds = (5, 10) if quick else (20, 60)
    with empty_lab("meshd-bench-") as lab:
        hosts = {3: _mesh(lab, 1, 3), **({} if quick else {10: _mesh(lab, 5, 10)})}
        hosts |= {size: [_simulate(lab, 20 + place, size)] for place, size in enumerate(SIMULATED)}
        agents = _bare_serfs(lab.power_on("barge30"))
        time.sleep(calm)
        rests = _rest({**hosts, 0: [agents]}, seconds)
    return Result("at-rest", "A host at rest", list(_rows(rests)), tuple(_targets(rests)), partial(_draw, rests))


# --- what rests ----------------------------------------------------------------------------------------------------


def _mesh(lab: Lab, first: int, peers: int) -> list[LabHost]:
    """A real mesh whose first host has Docker, and `peers` others."""
    hosts = [lab.power_on(f"barge{number}") for number in range(first, first + peers + 1)]
    lab.start_docker(hosts[0])
    invitation = init(hosts[0])
    for host in hosts[1:]:
        join(host, hosts[0], invitation, "--no-docker")
    eventually(lambda: settled(hosts), 30, f"a mesh with {peers} peers has settled")
    return hosts


def _simulate(lab: Lab, number: int, size: int) -> LabHost:
    """A daemon with Docker whose Serf lists `size` peers that do not exist."""
    host = lab.power_on(f"barge{number}")
    lab.start_docker(host)
    host.run(["ip", "address", "add", "192.168.0.1/16", "dev", "eth0"])
    pretend.start(host, size)
    command = [sys.executable, "-I", "-m", "meshd", "--state-dir", str(pretend.STATE), "agent"]
    with (host.directory / "daemon.log").open("w") as log:
        daemon = host.popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    daemon.returncode = 0  # it outlives this command
    plan = ["meshd", "plan"]
    eventually(lambda: host.run(plan, check=False).stdout == "no changes\n", 60, f"{size} simulated peers are laid")
    return host


def _bare_serfs(host: LabHost) -> LabHost:
    """AGENTS real Serf agents on one host's loopback, configured as meshd does and with tags as large as its own."""
    for number in range(1, AGENTS + 1):
        address = Endpoint(IPv4Address("127.0.0.0") + number, 7946)
        config = serf.agent_config(
            name=f"barge{number}",
            bind=address,
            advertise=address,
            encrypt_key=bytes(32),
            rpc_port=8000 + number,
            rpc_auth="secret",
            tags=simulated.member(number).tags,
            event_handlers=(),
            retry_join=["127.0.0.1"],
        )
        (host.directory / f"serf{number}.json").write_text(json.dumps(config))
    start = f"serf agent -config-file={host.directory}/serf$number.json >/dev/null 2>&1 & sleep 0.1"
    host.run(["sh", "-c", f"for number in $(seq {AGENTS}); do {start}; done"])
    listed = "SERF_RPC_AUTH=secret serf members -rpc-addr 127.0.0.1:8001 | grep -c alive"
    eventually(lambda: host.run(["sh", "-c", listed], check=False).stdout == f"{AGENTS}\n", 30, "the Serfs have met")
    return host


# --- how it rests --------------------------------------------------------------------------------------------------


def _rest(hosts: Mapping[int, Sequence[LabHost]], seconds: int) -> dict[int, Rest]:
    """Give, by the number of peers, what the first host of each mesh used while nothing happened; 0 is bare Serf."""
    watched = {peers: processes(of[0]) for peers, of in hosts.items()}
    before = {pid: usage(pid) for pids in watched.values() for _, pid in pids}
    carried = {peers: _carried(of[0]) for peers, of in hosts.items()}
    begun = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - begun
    rests = {}
    for peers, pids in watched.items():
        used = [(name, _since(before[pid], usage(pid), elapsed)) for name, pid in pids]
        programs = {name: _middle([u for n, u in used if n == name]) for name, _ in used}
        traffic = (_carried(hosts[peers][0]) - carried[peers]) / elapsed
        rests[peers] = Rest(programs, None if peers in SIMULATED else traffic / (1 if peers else AGENTS))
    return rests


def processes(host: LabHost) -> list[tuple[str, int]]:
    """Find the programs that run on a host: the name and the process id as seen from here."""
    space, found = Path(f"/proc/{host.pid}/ns/pid").readlink(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has ended, or is nobody's
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            # By what runs: the process that passes for Serf has only its name.
            name = "daemon" if words[1:4] == ["-I", "-m", "meshd"] else (entry / "exe").readlink().name
            if name in PROGRAMS and (entry / "ns/pid").readlink() == space:
                found.append((name, int(entry.name)))
    return found


def usage(pid: int) -> Usage:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    memory, peak = (int(status.partition(f"{name}:")[2].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    # proc(5): utime, stime and those of children that were waited for; the state is the first of these fields.
    return Usage(sum(map(int, fields[11:15])) / _TICKS, memory, peak)


def _since(before: Usage, after: Usage, elapsed: float) -> Usage:
    return Usage((after.cpu - before.cpu) / elapsed * 100, after.memory, after.peak)


def _middle(usages: Sequence[Usage]) -> Usage:
    return Usage(*(statistics.median(getattr(u, field) for u in usages) for field in ("cpu", "memory", "peak")))


def _carried(host: LabHost) -> int:
    """The bytes that a host's underlay link has received and sent; of loopback where there is nothing else."""
    lines = Path(f"/proc/{host.pid}/net/dev").read_text().splitlines()[2:]
    counters = {line.split(":")[0].strip(): [int(word) for word in line.split(":")[1].split()] for line in lines}
    return sum(counters[link][0] + counters[link][8] for link in ("eth0", "lo"))


# --- the report ----------------------------------------------------------------------------------------------------


def _rows(rests: Mapping[int, Rest]) -> Iterator[dict[str, Any]]:
    for peers, rest in rests.items():
        row: dict[str, Any] = {"peers": peers or f"{AGENTS - 1}, Serf alone"}
        for name in PROGRAMS:
            used = rest.programs.get(name)
            row[f"{name} CPU %"] = round(used.cpu, 2) if used else "–"
            row[f"{name} MB"] = round(used.memory, 1) if used else "–"
            row[f"{name} peak MB"] = round(used.peak, 1) if used else "–"
        row["link B/s"] = "–" if rest.traffic is None else round(rest.traffic)
        yield row


def _targets(rests: Mapping[int, Rest]) -> Iterator[Target]:
    for peers, rest in rests.items():
        if peers:
            daemon = rest.programs["daemon"]
            yield Target(f"daemon with {peers:,} peers", daemon.cpu, 0.3, "% of a core")
            yield Target(f"daemon with {peers:,} peers, peak", daemon.peak, 80 if peers > 50 else 64, "MB")


def _draw(rests: Mapping[int, Rest], axes: Any) -> None:
    sizes = [peers for peers in rests if peers]
    for place, name in enumerate(PROGRAMS):
        for column, peers in enumerate(sizes):
            # With 50 peers, Serf is that of the bare agents.
            of = {**rests[0].programs, **rests[peers].programs} if peers < AGENTS else rests[peers].programs
            used = of.get(name)
            if used is not None:
                at = column + (place - 1) * 0.28
                axes.bar(at, used.memory, 0.26, color=f"C{place}", label="" if column else name)
                axes.annotate(f"{used.cpu:.2f} %", (at, used.memory + 1), ha="center", fontsize=7)
    names = [f"{size:,}" for size in sizes]
    axes.set(xticks=range(len(sizes)), xticklabels=names, xlabel="peers", ylabel="resident memory, MB")
    legend = axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    legend.set_title("above each bar:\n% of a core", {"size": 9})
