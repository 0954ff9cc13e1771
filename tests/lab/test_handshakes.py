"""The first handshake of hosts that come up in any order; tests/unit/test_handshakes.py has the times of attempts."""

import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, combinations

import pytest

from meshd.lab import network
from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import LONG, TALK, assemble, eventually, log, overlay
from tests.lab.faults import STATE

pytestmark = [pytest.mark.root, pytest.mark.lab]

# `MESHD_DRAWS=50` for more of them, `MESHD_SEED=7` to repeat a run.
DRAWS = int(os.environ.get("MESHD_DRAWS", "10" if LONG else "4"))
# Seconds from when two hosts have each other as peers to their handshake; the second where the processors have no time
# to spare.
LIMIT, LIMIT_WHEN_BUSY = 3.0, 6.0
# Less than WireGuard alone needs for its next initiation.
ALONE = 4.5
# The response of a handshake has 92 bytes and the header of UDP.
RESPONSES, GOSSIP = "udp dport 51820 udp length 100", "meta l4proto { tcp, udp } th dport 7946"
NAMES = ("barge1", "barge2", "barge3")


@dataclass(frozen=True, slots=True)
class Case:
    """Who loses power or WireGuard, in the order in which they come back, and the seconds before each of them does."""

    back: tuple[tuple[str, float], ...]
    is_power_cut: bool
    has_traffic: bool
    has_gossip: bool

    def __str__(self) -> str:
        what = "power" if self.is_power_cut else "wireguard-go"
        back = [f"{name} back after {gap:.2f} s" for name, gap in self.back]
        traffic, gossip = "with" if self.has_traffic else "no", "with" if self.has_gossip else "no"
        return f"{what} of {', '.join(back)}, {traffic} traffic, {gossip} gossip"


def drawn(draw: random.Random) -> Case:
    names, is_power_cut = draw.sample(NAMES, draw.choice([1, 2, 3, 3])), draw.random() < 0.8
    # The daemon starts WireGuard again at once.
    gaps = [draw.choice([0.0, draw.uniform(0, 1), draw.uniform(0, 6)]) * is_power_cut for _ in names]
    return Case(tuple(zip(names, gaps, strict=True)), is_power_cut, draw.random() < 0.5, draw.random() < 0.5)


def test_first_handshake_comes_soon_in_whatever_order_hosts_come_up(lab: Lab) -> None:
    assemble(lab, docker=0, plain=len(NAMES))
    seed = int(os.environ.get("MESHD_SEED") or random.SystemRandom().randrange(10**6))
    draw, worst = random.Random(seed), list[float]()
    for number in range(DRAWS):
        case, limit = drawn(draw), LIMIT_WHEN_BUSY if is_busy() else LIMIT
        took = meet_again(lab, case)
        worst.append(max(took.values()))
        text = f"MESHD_SEED={seed}, draw {number}: {case}: {took}"
        print(text)  # noqa: T201
        logs = "\n".join(f"{host.name}:\n{log(host)}" for host in lab.hosts())
        assert worst[-1] < limit, f"{text}; a handshake took over {limit:g} s\n{logs}"
    print(f"first handshakes took at most, s: {sorted(worst)}")  # noqa: T201


def test_first_handshake_does_not_wait_for_serf(lab: Lab) -> None:
    """The first responses are lost, as when initiations cross, and WireGuard alone waits for at least 5 s."""
    names = NAMES[:2]
    for host in lab.hosts() or assemble(lab, docker=0, plain=len(NAMES)):
        lab.power_off(host)
    with losing(lab, "gossip", GOSSIP):
        with losing(lab, "responses", RESPONSES):
            for name in names:
                boot(lab, name, after=0, has_traffic=False)
            hosts = [lab.host(name) for name in names]
            eventually(lambda: any(peer(host, "received") for host in hosts), 20, "one has responded")
            assert not any(peer(host, "handshake") for host in hosts)
        took = eventually(lambda: all(peer(host, "handshake") for host in hosts), ALONE, "both have shaken hands")
        print(f"the handshake came after {took:.2f} s")  # noqa: T201


@contextmanager
def losing(lab: Lab, what: str, rule: str | None) -> Iterator[None]:
    """Have the underlay drop what a rule matches, if there is one."""
    chain = f"add chain bridge lose_{what} forward {{ type filter hook forward priority 0; }}"
    lines = [f"add table bridge lose_{what}", chain, f"add rule bridge lose_{what} forward {rule} drop" if rule else ""]
    lab.switch.run(["nft", "-f", "-"], text="\n".join([*lines, ""]))
    try:
        yield
    finally:
        lab.switch.run(["nft", "delete", "table", "bridge", f"lose_{what}"])


def peer(host: LabHost, what: str) -> int:
    """Return a figure of the one of the first two hosts that this one is not."""
    (other,) = {f"172.20.{network.addresses(name)[0].packed[-1]}.0/24" for name in NAMES[:2]} - {f"{overlay(host)}/24"}
    rows = {row[3]: row for row in (line.split("\t") for line in dump(host)[1:])}
    return int(rows[other][{"handshake": 4, "received": 5}[what]]) if other in rows else 0


def is_busy() -> bool:
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def meet_again(lab: Lab, case: Case) -> dict[str, float]:
    """Play a case, and return for each pair of hosts how long the handshake took after both had each other as peers."""
    names = [name for name, _ in case.back]
    hosts = {host.name: host for host in lab.hosts()}
    staying = [hosts[name] for name in NAMES if name not in names]
    with traffic(lab, staying if case.has_traffic else []), losing(lab, "gossip", None if case.has_gossip else GOSSIP):
        begun = time.time()
        if not case.is_power_cut:
            for name in names:
                hosts[name].run(["pkill", "-KILL", "-x", "wireguard-go"])
            return watch(lab, names, begun)
        for name in names:
            lab.power_off(hosts[name])
        with ThreadPoolExecutor() as pool:
            times = accumulate(gap for _, gap in case.back)
            booting = [pool.submit(boot, lab, n, t, case.has_traffic) for n, t in zip(names, times, strict=True)]
            took = watch(lab, names, begun)
        assert all(boot.exception() is None for boot in booting)
        return took


def boot(lab: Lab, name: str, after: float, has_traffic: bool) -> None:
    time.sleep(after)
    host = lab.power_on(name)
    if has_traffic:
        talk(host)
    host.run(["sh", "-c", "meshd agent </dev/null >$0 2>&1 &", f"{STATE}/agent.log"])


def talk(host: LabHost) -> None:
    """Have a host send to all others until `traffic` ends: a packet that waits makes WireGuard start a handshake."""
    targets = {f"172.20.{network.addresses(name)[0].packed[-1]}.0" for name in NAMES} - {overlay(host)}
    command = '{ sleep 600 | "$0" "$@"; } >/dev/null 2>&1 &'
    host.run(["sh", "-c", command, sys.executable, "-I", "-c", TALK, *targets])


@contextmanager
def traffic(lab: Lab, hosts: Sequence[LabHost]) -> Iterator[None]:
    for host in hosts:
        talk(host)
    yield
    for host in lab.hosts():
        host.run(["pkill", "-x", "sleep"], check=False)


def watch(lab: Lab, names: Sequence[str], begun: float) -> dict[str, float]:
    """Wait until each pair with one of these hosts has shaken hands since Unix time `begun`."""
    had, met = dict[str, float](), dict[str, float]()
    pairs = {f"{a}-{b}": (a, b) for a, b in combinations(NAMES, 2) if {a, b} & set(names)}
    keys: dict[str, str] = {}
    deadline = time.monotonic() + 60
    while met.keys() != pairs.keys() and time.monotonic() < deadline:
        seen = {}
        for host in lab.hosts():
            rows = [line.split("\t") for line in dump(host)]
            if rows:
                keys[host.name] = rows[0][1]
                seen[host.name] = {row[0]: int(row[4]) for row in rows[1:]}
        now = time.monotonic()
        for pair, (one, other) in pairs.items():
            stamps = [seen.get(a, {}).get(keys.get(b, ""), -1) for a, b in ((one, other), (other, one))]
            if min(stamps) >= 0:
                had.setdefault(pair, now)
            if min(stamps) >= int(begun):
                met.setdefault(pair, now)
        time.sleep(0.05)
    return {pair: round(met.get(pair, deadline) - had.get(pair, begun), 2) for pair in pairs}


def dump(host: LabHost) -> list[str]:
    return host.run(["wg", "show", "wg0", "dump"], check=False).stdout.splitlines()
