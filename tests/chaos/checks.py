"""What has to be so after each fault, asked of the hosts themselves; each check gives a line for what is not so."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshd.lab.hosts import LabHost
from tests.chaos.faults import NAMES, WITH_DOCKER
from tests.lab.conftest import PCAP_HEADER, overlay

# One process for both, which is half of the time.
ASK = """
from meshd.cli.main import main
for command in (["plan"], ["members", "--json"]):
    try:
        main(command, standalone_mode=False)
    except SystemExit as end:
        print(f"exit code {end.code}")
    except Exception as error:
        print(f"{error}")
    print("---", flush=True)
"""
PINGS = "for t in $0 $@; do busybox ping -c 1 -W 1 $t >/dev/null || echo $t & done; wait"


@dataclass(slots=True)
class Verdict:
    """What was looked at, and what of it was wrong."""

    checks: int = 0
    wrong: list[str] = field(default_factory=list)

    def expect(self, right: bool, otherwise: str) -> None:
        self.checks += 1
        if not right:
            self.wrong.append(otherwise)


def reach(hosts: Sequence[LabHost]) -> Verdict:
    """Every host, and every container, reaches every other one."""
    verdict = Verdict()
    with ThreadPoolExecutor() as pool:
        for checks, wrong in pool.map(lambda asked: _pings(hosts, *asked), _askers(hosts)):
            verdict.checks += checks
            verdict.wrong += wrong
    return verdict


def _askers(hosts: Sequence[LabHost]) -> list[tuple[LabHost, tuple[str, ...]]]:
    boxes = [(host, ("docker", "exec", "box")) for host in hosts if host.name in WITH_DOCKER]
    return [*((host, ()) for host in hosts), *boxes]


def _pings(hosts: Sequence[LabHost], asker: LabHost, prefix: Sequence[str]) -> tuple[int, list[str]]:
    targets = {overlay(host): host.name for host in hosts if host.name != asker.name}
    if prefix:
        targets |= {overlay(h, 1): f"{h.name}'s box" for h in hosts if h.name in WITH_DOCKER and h.name != asker.name}
    done = asker.run([*prefix, "sh", "-c", PINGS, *targets], check=False)
    source = f"{asker.name}'s box" if prefix else asker.name
    if done.returncode != 0:
        return len(targets), [f"{source}: {done.stderr.strip()}"]
    return len(targets), [f"{source} does not reach {targets[address]}" for address in done.stdout.split()]


@dataclass(frozen=True, slots=True)
class View:
    """What one host says and has."""

    plan: str
    members: dict[str, dict[str, Any]]
    key: str
    peers: list[str]
    routes: list[str]
    guards: str


def _view(host: LabHost) -> View:
    kernel = "wg show wg0 public-key; echo ---; wg show wg0 peers; echo ---; ip route show proto 77 dev wg0; echo ---"
    kernel += "; ip route show type unreachable proto 77; nft list chain ip meshd_wg0 output"
    done = host.run(["sh", "-c", f'{sys.executable} -I -c "$0"; {kernel}', ASK], check=False)
    plan, members, key, peers, routes, guards = done.stdout.split("---\n")
    rows = json.loads(members) if members.startswith("[") else []
    prefixes = sorted(line.split()[0] for line in routes.splitlines())
    return View(plan.strip(), {row["name"]: row for row in rows}, key.strip(), sorted(peers.split()), prefixes, guards)


def agree(hosts: Sequence[LabHost]) -> Verdict:
    """All list exactly each other, alive, each with the same subnet of its own, and have nothing to change.

    And the kernel has just their peers and routes: nothing is left of who is gone.
    """
    verdict = Verdict()
    with ThreadPoolExecutor() as pool:
        views = dict(zip((host.name for host in hosts), pool.map(_view, hosts), strict=True))
    subnets = {name: view.members.get(name, {}).get("subnet", "?") for name, view in views.items()}
    verdict.expect(len(set(subnets.values())) == len(hosts), f"subnets have one owner each: {subnets}")
    for name, view in views.items():
        verdict.expect(view.plan == "no changes", f"{name}: 'meshd plan' says: {view.plan}")
        states = {n: row["state"] for n, row in view.members.items() if row["state"] != "left"}
        verdict.expect(states == dict.fromkeys(NAMES, "alive"), f"{name}: 'meshd members' says: {states}")
        listed = {n: row["subnet"] for n, row in view.members.items() if n in subnets}
        verdict.expect(listed == subnets, f"{name}: says that the subnets are {listed}, they are {subnets}")
        keys = sorted(other.key for n, other in views.items() if n != name)
        verdict.expect(view.peers == keys, f"{name}: has the peers {view.peers}, not {keys}")
        guarded = "unreachable 172.20.0.0/16" in view.guards and "ip daddr 172.20.0.0/16" in view.guards
        verdict.expect(guarded, f"{name}: what keeps traffic from leaving in clear is {view.guards}")
        others = sorted(subnet for n, subnet in subnets.items() if n != name)
        verdict.expect(view.routes == others, f"{name}: has routes to {view.routes}, not {others}")
    return verdict


class Underlay:
    """The capture of what is in clear on the underlay, looked at again and again."""

    def __init__(self, capture: Path) -> None:
        self.capture = capture
        self.heard = PCAP_HEADER

    def quiet(self) -> Verdict:
        """Nothing between overlay addresses was outside of WireGuard since the last look."""
        before, self.heard = self.heard, self.capture.stat().st_size
        verdict = Verdict()
        verdict.expect(self.heard == before, f"{self.heard - before} bytes of the overlay in clear on the underlay")
        return verdict


class Logs:
    """The daemons' logs, read on from where the last look ended."""

    def __init__(self, lab: Path) -> None:
        self.paths = {name: lab / name / "meshd" / "agent.log" for name in NAMES}
        self.read = dict.fromkeys(NAMES, (0, 0))

    def news(self) -> dict[str, list[str]]:
        """What each daemon has logged since the last look."""
        return {name: self._news(name, path) for name, path in self.paths.items() if path.exists()}

    def _news(self, name: str, path: Path) -> list[str]:
        file, (inode, offset) = path.stat(), self.read[name]
        self.read[name] = file.st_ino, file.st_size
        # Who leaves the mesh removes it, and begins another one.
        return path.read_bytes()[offset if inode == file.st_ino else 0 : file.st_size].decode().splitlines()


def explained(news: Mapping[str, Sequence[str]], by: Sequence[str]) -> Verdict:
    """No daemon has warned of anything that none of the patterns explains."""
    verdict, known = Verdict(), re.compile("|".join((r"^\S+ \S+ INFO ", *by)))
    for name, lines in news.items():
        odd = [line for line in lines if not known.search(line)]
        verdict.expect(not odd, f"{name} has logged: " + "; ".join(odd))
    return verdict
