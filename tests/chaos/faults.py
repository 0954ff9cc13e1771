"""The faults that are drawn: what is done, how soon all is well again, and what the daemons may say of it."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from random import Random
from typing import Literal

from meshd.lab.hosts import Lab, LabHost
from tests.lab import faults
from tests.lab.conftest import (
    SUSPECTED,
    eventually,
    full_reach,
    invitation,
    join,
    members,
    overlay,
    ping,
    rtt,
    run_box,
    run_container,
    serf_lists,
)
from tests.lab.faults import FLUSHED, HANDS, boot, restart_docker, rewritten

NAMES = tuple(f"barge{number}" for number in range(1, 6))
WITH_DOCKER = NAMES[:2]

# Seconds until all reach all, and until Serf has told everybody who is there (docs/faults.md).
BACK, AGREED = 15.0, 40.0

# Warnings that a fault explains. While dockerd is away, its network and its rules cannot be read.
DOCKER_AWAY = r"WARNING (network|stopped|docker|iptables).*: the Docker engine does not answer"
# A pass, or a command, meets a Serf that is ending or that hangs; the daemon starts it again.
SERF_AWAY = r"WARNING (members|tags|set tags|serf).*the Serf agent"
# Its underlay address is another one.
MOVED = r"WARNING (this host's underlay address is now |underlay: no link of this host has the address )"
# Who has not heard the goodbye takes a host's next life for somebody else until the authority has confirmed it.
TAKEN = r"WARNING refused .*: another host has its name and has not left"
# Docker cannot change a network under its containers.
HELD = r"WARNING set docker network ovl0 .*containers are attached"
# A host that was forgotten comes back: all others refuse it, and it hears why.
# A rule that masquerades everything changes connections on loopback, too.
HIDDEN = r"WARNING (members|tags|contacts): the kernel lists no other end of a connection"
FORGOTTEN = r"WARNING (refused .*: it left, or was forgotten|membership: the mesh has forgotten this host)"
EXPLAINED = {"a rule put before": (HIDDEN,)}


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a fault happens: the lab, the host, the draw of all else. `say` tells the details.

    `near` are the hosts on the same side of a partition.
    """

    lab: Lab
    host: LabHost
    rng: Random
    say: Callable[[str], None]
    near: Sequence[str] = NAMES

    def other(self, among: Sequence[str] = NAMES) -> LabHost:
        return self.rng.choice([h for h in self.lab.hosts() if h.name in among and h.name != self.host.name])

    def box(self) -> LabHost:
        """The other host with a container."""
        return next(h for h in self.lab.hosts() if h.name in WITH_DOCKER and h.name != self.host.name)


@dataclass(frozen=True, slots=True)
class Fault:
    """Within `reach` seconds after `act` all reach all, and within `agree` all agree on everything.

    `says` are patterns of the warnings that the daemons may log meanwhile. `cuts` says whose traffic may suffer: that
    of no host, of the one where it happens, or of any; the hosts on which the guard against sending in clear has to
    hold meanwhile `talk`.
    """

    act: Callable[[Scene], None]
    reach: float = 0.0
    agree: float = AGREED
    docker: bool = False
    says: tuple[str, ...] = ()
    cuts: Literal["no host", "the host", "any"] = "the host"
    talk: bool = False


# --- power, and the wires --------------------------------------------------------------------------------------------


def _power_cycle(scene: Scene) -> None:
    _off_and_on(scene, [scene.host])


def _power_cycle_all(scene: Scene) -> None:
    _off_and_on(scene, scene.lab.hosts())


def _off_and_on(scene: Scene, hosts: Sequence[LabHost]) -> None:
    docker_first, seconds = scene.rng.random() < 0.5, scene.rng.uniform(0, 4)
    scene.say(f"off for {seconds:.1f} s, {'dockerd' if docker_first else 'meshd'} first")
    for host in hosts:
        scene.lab.power_off(host)
    time.sleep(seconds)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda host: boot(scene.lab, host, docker_first=docker_first), hosts))


def _cut(scene: Scene) -> None:
    """One or two against the rest, or one against one; sometimes something else happens meanwhile."""
    name, what = scene.host.name, scene.rng.choice(("", "", *MEANWHILE))
    others = scene.rng.sample([other for other in NAMES if other != name], len(NAMES) - 1)
    sides = [([name], others), ([name, others[0]], others[1:]), ([name], others[:1])]
    _apart(scene, *scene.rng.choice(sides), what)


def _cut_from_a_newcomer(scene: Scene) -> None:
    """A host leaves and joins, and half of the others hear of it when it is over."""
    left = [scene.host.name, scene.other().name]
    _apart(scene, left, [name for name in NAMES if name not in left], "leaves and joins")


def _apart(scene: Scene, left: Sequence[str], right: Sequence[str], meanwhile: str) -> None:
    # Serf takes some 6 s to notice.
    seconds = scene.rng.choice((*[scene.rng.uniform(1, 8)] * 3, 30.0))
    scene.say(f"{'+'.join(left)} | {'+'.join(right)} for {seconds:.1f} s, meanwhile: {meanwhile or 'nothing'}")
    until = time.monotonic() + seconds
    scene.lab.cut(left, right)
    try:
        if meanwhile:
            FAULTS[meanwhile].act(replace(scene, near=left))
        time.sleep(max(0.0, until - time.monotonic()))
    finally:
        scene.lab.heal()


def _outlasted(scene: Scene) -> None:
    """A partition that is longer than Serf remembers, which for that is made to forget soon."""
    hosts = scene.lab.hosts()
    forgetful = [host.directory / "meshd" / "serf.d" / "forgetful.json" for host in hosts]
    for path in forgetful:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"reconnect_timeout": "5s", "tombstone_timeout": "5s"}))
    _each(faults.kill_serf, hosts)
    others = [name for name in NAMES if name != scene.host.name]
    eventually(lambda: all(len(serf_lists(host)) == len(NAMES) for host in hosts), 40, "Serf lists all")
    scene.lab.cut([scene.host.name], others)
    try:
        eventually(lambda: serf_lists(scene.host) == {scene.host.name}, 90, "Serf has forgotten the others")
        eventually(lambda: scene.host.name not in serf_lists(scene.other()), 90, "and they have forgotten it")
    finally:
        scene.lab.heal()
        for path in forgetful:
            path.unlink()
    _each(faults.kill_serf, hosts)


def _each(act: Callable[[LabHost], None], hosts: Sequence[LabHost]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(act, hosts))


def _another_port(scene: Scene) -> None:
    with rewritten(scene.lab, scene.host, scene.rng.randint(40_000, 50_000)):
        assert full_reach(scene.lab.hosts()), "all reach all"
        time.sleep(scene.rng.uniform(0, 3))
        assert full_reach(scene.lab.hosts()), "all reach all a while later"


def _another_address(scene: Scene) -> None:
    """There and back, as the lab knows its hosts by their addresses."""
    host, others = scene.host, [other for other in scene.lab.hosts() if other.name != scene.host.name]
    first, other_one = str(host.address), "10.10.10.199"
    faults.readdress(host, first, other_one, scene.rng.uniform(0, 2))
    try:
        _followed(host, other_one, others)
    finally:
        faults.readdress(host, other_one, first)
    _followed(host, first, others)


def _followed(host: LabHost, address: str, others: Sequence[LabHost]) -> None:
    def follows(other: LabHost) -> bool:
        return f"{address}:51820" in other.run(["wg", "show", "wg0", "endpoints"]).stdout and ping(other, overlay(host))

    for other in others:
        eventually(partial(follows, other), 10, f"{other.name} has followed to {address}")


def _another_mtu(scene: Scene) -> None:
    for mtu in (1400, 1500):
        scene.host.run(["ip", "link", "set", "eth0", "mtu", str(mtu)])
        show = partial(scene.host.run, ["ip", "link", "show", "wg0"])
        eventually(lambda: f"mtu {mtu - 80} " in show().stdout, 12, "wg0 has followed")  # noqa: B023


def _unplugged(scene: Scene) -> None:
    seconds = scene.rng.uniform(1, 8)
    scene.say(f"for {seconds:.1f} s")
    scene.lab.switch.run(["ip", "link", "set", scene.host.name, "down"])
    time.sleep(seconds)
    scene.lab.switch.run(["ip", "link", "set", scene.host.name, "up"])


def _frozen(scene: Scene) -> None:
    """A process hangs: the daemon or Serf."""
    processes = {"the daemon": f"$(cat {faults.STATE}/agent.pid)", "Serf": faults.SERF}
    what, seconds = scene.rng.choice(sorted(processes)), scene.rng.uniform(1, 10)
    scene.say(f"{what} for {seconds:.1f} s")
    pid = scene.host.run(["sh", "-ec", f"echo {processes[what]}"]).stdout.strip()
    scene.host.run(["kill", "-STOP", pid])
    time.sleep(seconds)
    scene.host.run(["kill", "-CONT", pid])


def _two_at_once(scene: Scene) -> None:
    """Two faults of one host each, at the same time on two hosts."""
    other, what = scene.other(), scene.rng.sample(sorted(MEANWHILE), 2)
    scene.say(f"{what[0]}, and on {other.name} {what[1]}")
    scenes = [scene, replace(scene, host=other, rng=Random(scene.rng.random()))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name, where: FAULTS[name].act(where), what, scenes))


# --- hosts that come and go ------------------------------------------------------------------------------------------


def _leave_and_join(scene: Scene) -> None:
    scene.host.run(["meshd", "leave", "--force"])
    _join(scene.host, scene.other(scene.near), scene)


def _join(host: LabHost, via: LabHost, scene: Scene) -> None:
    scene.say(f"joins by {via.name}")
    join(host, via, invitation(via), *([] if host.name in WITH_DOCKER else ["--no-docker"]))
    hand_on(via, host)
    _new_box(host)


def hand_on(holder: LabHost, *others: LabHost) -> None:
    """Bring the authority to hosts that may have to invite and to forget when its first holder is away."""
    passphrase = ["--passphrase-file", "/run/passphrase"]
    write = ["sh", "-c", "umask 077; echo 'a long passphrase' >/run/passphrase"]
    for host in (holder, *others):
        host.run(write)
    export = holder.run(["meshd", "authority", "export", *passphrase]).stdout
    for host in others:
        host.run(["meshd", "authority", "import", "-", *passphrase], text=export)


def _new_box(host: LabHost) -> None:
    if host.name in WITH_DOCKER:
        host.run(["docker", "rm", "-f", "box"])
        run_box(host)


def _leave_unheard(scene: Scene) -> None:
    """A host says goodbye while another one has no power, which hears of it when it is back."""
    away = scene.other()
    via = next(host for host in scene.lab.hosts() if host.name not in {away.name, scene.host.name})
    scene.say(f"{away.name} is off")
    scene.lab.power_off(away)
    scene.host.run(["meshd", "leave", "--force"])
    away = boot(scene.lab, away)
    gone = partial(away.run, ["ip", "route"])
    eventually(lambda: f"{overlay(scene.host)}/24" not in gone().stdout, 10, f"{away.name} has heard of it")
    _join(scene.host, via, scene)


def _renumber(scene: Scene) -> None:
    """To another subnet and back, as the lab knows its hosts by them."""
    for subnet in ("172.20.200.0/24", f"{overlay(scene.host)}/24"):
        scene.host.run(["meshd", "renumber", "--force", "--subnet", subnet])
        eventually(lambda: full_reach(scene.lab.hosts()), 5, "all reach all")


def _down_and_up(scene: Scene) -> None:
    scene.host.run(["meshd", "down", "--force"])
    scene.host.run(["meshd", "up"])
    _new_box(scene.host)


def _forget(scene: Scene) -> None:
    """A host dies, is forgotten, and comes back to join anew."""
    lab, dead, via = scene.lab, scene.host, scene.other()
    scene.say(f"by {via.name}")
    lab.power_off(dead)
    left, subnet = lab.hosts(), f"{overlay(dead)}/24"
    eventually(
        lambda: members(via)[dead.name]["state"] == "failed", SUSPECTED, f"{via.name} sees {dead.name} as failed"
    )
    via.run(["meshd", "forget", dead.name])
    eventually(lambda: not any(subnet in host.run(["ip", "route"]).stdout for host in left), 5, "it is gone")
    assert full_reach(left), "the others reach each other"
    back = boot(lab, dead)
    eventually(lambda: "has forgotten" in back.run(["meshd", "status"], check=False).stdout, 15, "it is told so")
    back.run(["meshd", "leave", "--force"])
    _join(back, via, scene)


# --- Docker ----------------------------------------------------------------------------------------------------------


def _docker_restart(number: str) -> Callable[[Scene], None]:
    return lambda scene: restart_docker(scene.lab, scene.host, number)


def _network_made_again(scene: Scene) -> None:
    host = scene.host
    host.run(["docker", "rm", "-f", "box"])
    before = host.run(["docker", "network", "ls", "-q", "-f", "name=ovl0"]).stdout
    host.run(["docker", "network", "rm", "ovl0"])
    found = partial(host.run, ["docker", "network", "ls", "-q", "-f", "name=ovl0"])
    eventually(lambda: found().stdout not in {"", before}, 10, "the network is there again")
    run_box(host)


def _churn(scene: Scene) -> None:
    host, far = scene.host, scene.box()
    for number in range(scene.rng.randint(1, 3)):
        run_container(host, f"come{number}", "meshd/serf", "sleep", "1000")
        assert rtt(far, "box", overlay(host, 2)), "a new container is reached at once"
        host.run(["docker", "rm", "-f", f"come{number}"])


def _masquerade_first(scene: Scene) -> None:
    host, far = scene.host, scene.box()
    rule = ["POSTROUTING", "-j", "MASQUERADE"]
    host.run(["iptables", "-w", "-t", "nat", "-I", *rule])
    script = f"timeout 5 tcpdump -lnc 1 -i wg0 'icmp[icmptype] == icmp-echo and src {overlay(host, 1)}' 2>&1"
    dump = host.popen(["sh", "-c", script], stdout=-1)
    assert dump.stdout is not None
    while "listening on" not in dump.stdout.readline():
        assert dump.poll() is None
    assert rtt(host, "box", overlay(far, 1)), "the containers talk"
    assert f"IP {overlay(host, 1)} > " in dump.communicate(timeout=10)[0], "the source is the container's own"
    host.run(["iptables", "-w", "-t", "nat", "-D", *rule])


# --- all of them -----------------------------------------------------------------------------------------------------


def _on_host(act: Callable[[LabHost], None]) -> Callable[[Scene], None]:
    return lambda scene: act(scene.host)


def _hand(what: str) -> Callable[[Scene], None]:
    return lambda scene: HANDS[what].on(scene.host, scene.other())


FAULTS = {
    "daemon killed": Fault(_on_host(faults.kill_daemon), cuts="no host", talk=True),
    "Serf killed": Fault(_on_host(faults.kill_serf), says=(SERF_AWAY,), cuts="no host", talk=True),
    "daemon and Serf killed": Fault(_on_host(faults.kill_both), says=(SERF_AWAY,), cuts="no host", talk=True),
    "Serf leaves": Fault(_on_host(faults.leave_serf), says=(SERF_AWAY,), cuts="no host", talk=True),
    "sync in a loop": Fault(_on_host(faults.sync_in_a_loop), cuts="no host", talk=True),
    "package upgraded": Fault(_on_host(faults.upgrade), cuts="no host", talk=True),
    "new WireGuard key": Fault(_on_host(faults.new_key), reach=5, says=(SERF_AWAY,), talk=True),
    "power cut": Fault(_power_cycle, reach=BACK, says=(DOCKER_AWAY,)),
    "power cut of all": Fault(_power_cycle_all, reach=BACK, says=(DOCKER_AWAY,), cuts="any"),
    "partition": Fault(_cut, reach=BACK, says=(DOCKER_AWAY, SERF_AWAY), cuts="any"),
    # Serf may not have noticed the partition, and then tells of what happened meanwhile with its next full exchange.
    "partition from a newcomer": Fault(_cut_from_a_newcomer, reach=AGREED, says=(TAKEN,), cuts="any"),
    "partition that Serf forgets": Fault(_outlasted, reach=BACK, says=(SERF_AWAY,)),
    "another port seen": Fault(_another_port),
    "another underlay address": Fault(_another_address, reach=5, agree=90.0, says=(MOVED, SERF_AWAY)),
    "another underlay MTU": Fault(_another_mtu, says=(HELD,), talk=True),
    "cable pulled": Fault(_unplugged, reach=BACK),
    "process frozen": Fault(_frozen, reach=BACK, says=(SERF_AWAY,), cuts="no host", talk=True),
    "two at once": Fault(_two_at_once, reach=BACK, says=(DOCKER_AWAY, SERF_AWAY), cuts="any"),
    "leaves and joins": Fault(_leave_and_join, reach=5),
    "leaves unheard by one": Fault(_leave_unheard, reach=5, says=(DOCKER_AWAY,), cuts="any"),
    "down and up": Fault(_down_and_up, reach=5),
    "renumbered": Fault(_renumber, reach=5),
    "dies and is forgotten": Fault(_forget, reach=5, says=(FORGOTTEN, DOCKER_AWAY)),
    "dockerd restarted by TERM": Fault(
        _docker_restart("TERM"), reach=10, docker=True, says=(DOCKER_AWAY,), cuts="no host", talk=True
    ),
    "dockerd restarted by KILL": Fault(
        _docker_restart("KILL"), reach=10, docker=True, says=(DOCKER_AWAY,), cuts="no host", talk=True
    ),
    "Docker network removed": Fault(_network_made_again, docker=True, talk=True),
    "containers come and go": Fault(_churn, docker=True, cuts="no host", talk=True),
    "a masquerade put first": Fault(_masquerade_first, docker=True, cuts="no host", talk=True, says=(HIDDEN,)),
    **{
        what: Fault(_hand(what), hand.limit, hand.limit, hand.docker, talk=True, says=EXPLAINED.get(what, ()))
        for what, hand in HANDS.items()
    },
}
# What may happen while hosts are apart, or at the same time on another one: any host, and nobody else has part in it.
# In one order, or the same seed would draw something else in another process.
MEANWHILE = (
    *("daemon killed", "Serf killed", "daemon and Serf killed", "Serf leaves", "new WireGuard key", "power cut"),
    *("wg0 down", "wg0 deleted", "a peer removed", "the firewall table removed", "wireguard-go killed"),
)


@dataclass(frozen=True, slots=True)
class Draw:
    """One fault to come: which, on which host, and the seed of all else that is drawn for it."""

    name: str
    host: str
    seed: int


def draws(seed: int) -> Iterator[Draw]:
    """Give faults without end, the same ones for the same seed: each one once, in any order, then all again."""
    for deck in count():
        rng = Random(f"{seed}/{deck}")
        for name in rng.sample(sorted(FAULTS), len(FAULTS)):
            draw = Draw(name, rng.choice(WITH_DOCKER if FAULTS[name].docker else NAMES), rng.randrange(2**32))
            yield draw
            if name in FLUSHED and draw.host in WITH_DOCKER:
                yield Draw("dockerd restarted by TERM", draw.host, draw.seed)
