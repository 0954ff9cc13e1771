"""What a user reads: members, status, plan, as text and as JSON. Gathering and rendering, no decisions."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshd.audit import openings
from meshd.errors import MeshdError
from meshd.mesh import conflicts
from meshd.mesh.model import Member, Record, Status
from meshd.mesh.roster import View
from meshd.net import firewall, rules, underlay
from meshd.net.resources import Action, Change, Network
from meshd.printable import printable
from meshd.reconcile import plan
from meshd.reconcile.machine import Area, docker, wireguard
from meshd.reconcile.run import Options, Report, sync
from meshd.state.directory import State
from meshd.state.settings import Settings

# Also for a container that asks for a port that its own host publishes (ADR 10).
MORE = "ICMP ('meshd up --allow tcp/PORT' allows more)"
# The longest name that a host can have has 63 characters.
WORD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of `meshd members`. `handshake` is Unix time in seconds, 0 for none yet, None for this host itself.

    `mtu` is the largest packet in bytes that goes to the host whole, None where none goes or it is not known.
    """

    name: str
    subnet: str
    endpoint: str
    state: str
    handshake: float | None
    reason: str = ""
    mtu: int | None = None


def gather(state: State) -> Report:
    """Look at members, peers, routes and the overlay's MTU, and change nothing."""
    return sync(state, Options(dry=True, kinds=frozenset({"device", "link", "peer", "route"})))


def members(report: Report) -> list[Row]:
    """Return a row for each host, each that has left, and each member that is there and refused, sorted by name."""
    listed = {member.name: member for member in report.members}
    handshakes = {peer.public_key: peer.handshake for peer in report.peers}
    roster = report.roster
    names = roster.hosts.keys() | roster.refused.keys() | (listed.keys() & roster.gone.keys())
    names |= {report.own.name} if report.own else set()
    return [_row(name, listed.get(name), report, handshakes) for name in sorted(names)]


def _row(name: str, member: Member | None, report: Report, handshakes: Mapping[str, float]) -> Row:
    if report.own is not None and name == report.own.name:
        return _admitted(name, report.own.record, Status.ALIVE.value if member else "offline", None)
    record = report.roster.hosts.get(name)
    reason = report.roster.refused.get(name, "")
    status = member.status.value if member else Status.FAILED.value
    if record is None:
        tags = member.tags if member else {}
        address = f"{member.address}:{member.port}" if member else "-"
        has_left = name in report.roster.gone and (not reason or status == "left")
        return Row(
            name=name,
            subnet=printable(tags.get("subnet", "-"), WORD),
            endpoint=address,
            state="left" if has_left else "refused",
            handshake=0.0,
            reason="" if has_left else reason,
        )
    row = _admitted(name, record, status, handshakes.get(record.public_key, 0.0))
    row = replace(row, mtu=report.mtus.get(record.public_key) or report.mtu or None)
    stale = report.roster.stale.get(name, "")
    return replace(row, state="refused", reason=reason) if reason else replace(row, reason=stale)


def _admitted(name: str, record: Record, status: str, handshake: float | None) -> Row:
    return Row(name=name, subnet=str(record.subnet), endpoint=str(record.endpoint), state=status, handshake=handshake)


def members_lines(rows: Sequence[Row], now: float | None = None) -> list[str]:
    """Return one aligned line a row: name, subnet, endpoint, state, handshake, and the reason for who is refused."""
    now = time.time() if now is None else now
    cells = [(_word(r.name), _word(r.subnet), r.endpoint, r.state, _ago(r.handshake, now), r.reason) for r in rows]
    return columns(cells)


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a line for each row: cells aligned as by `serf members`, two blanks apart, none at the end of a line."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ago(handshake: float | None, now: float) -> str:
    if handshake is None:
        return "this-host"
    if handshake == 0:
        return "never"
    seconds = max(0, int(now - handshake))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}-ago"
    return f"{seconds}s-ago"


def _word(text: str) -> str:
    """Return what a holder of the gossip key may have written as one word, which looks like no other columns."""
    return printable(text, WORD).replace(" ", "\\x20")


def members_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def changes_lines(changes: Sequence[Change], withheld: Sequence[Change] = ()) -> list[str]:
    """Return one line a change, `+` for add, `~` for set and `-` for remove."""
    sign = {"add": "+", "set": "~", "remove": "-"}
    lines = [f"{sign[change.action]} {change.resource}" for change in changes]
    lines += [f"! {plan.withheld_text(change)}" for change in withheld]
    return lines or ["no changes"]


def changes_json(report: Report) -> dict[str, Any]:
    def plain(change: Change) -> dict[str, str]:
        return {"action": change.action.value, "kind": change.resource.kind, "resource": str(change.resource)}

    return {
        "changes": [plain(change) for change in report.changes],
        "withheld": [plain(change) for change in report.withheld],
        "failures": [str(failure) for failure in report.failures],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What `meshd status` shows. Its JSON has these names and values; None is what is not known or not there.

    `refused` gives the reason by name, `dropped` the packets by the counter of the firewall's rules. A handshake is
    recent if it proves that the peer is reachable now.
    """

    mesh: str
    host: str
    overlay: str
    subnet: str | None
    address: str | None
    endpoint: str | None
    state_dir: str
    daemon: bool
    daemon_pid: int | None
    serf_members: int | None
    serf_members_alive: int | None
    wireguard_interface: str
    wireguard_backend: str
    wireguard_port: int
    docker: bool
    docker_version: str | None
    docker_firewall: str | None
    docker_error: str | None
    allow: list[str]
    peers: int
    peers_with_recent_handshake: int
    pending: list[str]
    refused: dict[str, str]
    dropped: dict[str, int]
    problems: list[str]


def status(state: State) -> Facts:
    """Look at everything, and change nothing."""
    report = sync(state, Options(dry=True))
    obstacles = [*_in_the_way(state.settings, report), *blocked(state)]
    return facts(state, report, wireguard(state).backend, obstacles, time.time())


def facts(state: State, report: Report, backend: str, obstacles: Sequence[str], now: float) -> Facts:
    """Return what a report says of this host; `backend` is its WireGuard, `obstacles` are what others keep from it."""
    settings, engine = state.settings, report.engine
    record = report.own.record if report.own else None
    present = [member for member in report.members if member.status is not Status.LEFT]
    unread = [str(f.error) for f in report.failures if f.area is Area.DOCKER or f.subject == "network"]
    return Facts(
        mesh=settings.mesh,
        host=settings.name,
        overlay=str(settings.overlay),
        subnet=str(record.subnet) if record else None,
        address=str(record.address) if record else None,
        endpoint=str(record.endpoint) if record else None,
        state_dir=str(state.directory),
        daemon=settings.daemon,
        daemon_pid=state.agent_pid(),
        serf_members=len(present) if report.members else None,
        serf_members_alive=sum(m.status is Status.ALIVE for m in present) if report.members else None,
        wireguard_interface=settings.wireguard,
        wireguard_backend=backend,
        wireguard_port=settings.wireguard_port,
        docker=settings.docker,
        docker_version=engine.version if engine else None,
        docker_firewall=engine.firewall if engine else None,
        docker_error=unread[0] if unread else None,
        allow=list(settings.allow),
        peers=len(report.peers),
        peers_with_recent_handshake=sum(now - peer.handshake < plan.FRESH for peer in report.peers),
        pending=[str(change) for change in report.changes],
        refused=dict(sorted(report.roster.refused.items())),
        dropped=dict(report.dropped),
        problems=[
            *map(str, report.failures),
            *report.notices,
            *(report.misplaced or ()),
            *_contested(state, report, now),
            *obstacles,
        ],
    )


def status_json(facts: Facts) -> dict[str, Any]:
    return asdict(facts)


def status_lines(facts: Facts) -> list[str]:
    """Return one line a fact, and an indented line for each entry of a list."""
    alive = f"{facts.serf_members_alive} of {facts.serf_members} members alive"
    daemon = f"running (pid {facts.daemon_pid})" if facts.daemon_pid else "not running"
    engine = f"{facts.docker_version} ({facts.docker_firewall})" if facts.docker_version else "not answering"
    lines: dict[str, object] = {
        "mesh": facts.mesh,
        "host": facts.host,
        "overlay": facts.overlay,
        "subnet": facts.subnet,
        "address": facts.address,
        "endpoint": facts.endpoint,
        "daemon": daemon if facts.daemon else "none (Serf's handlers)",
        "serf": "not answering" if facts.serf_members is None else alive,
        "wireguard": f"{facts.wireguard_interface} ({facts.wireguard_backend}), udp port {facts.wireguard_port}",
        "docker": f"not answering ({facts.docker_error})" if facts.docker_error else engine,
        "reachable by the overlay": ", ".join(["ICMP", *facts.allow]) if facts.allow else MORE,
        "peers": f"{facts.peers}, {facts.peers_with_recent_handshake} with a handshake in the last 3 minutes",
        "pending": facts.pending,
        "refused": [f"{name}: {reason}" for name, reason in facts.refused.items()],
        "dropped": [
            f"{n}: {packets} packets {rules.DROPPED.get(n, '')}".rstrip() for n, packets in facts.dropped.items()
        ],
        "problems": facts.problems,
        "state directory": facts.state_dir,
    }
    return _aligned(lines if facts.docker else {**lines, "docker": "not used"})


def _aligned(lines: Mapping[str, object]) -> list[str]:
    width = max(map(len, lines)) + 1
    text: list[str] = []
    for name, value in lines.items():
        if isinstance(value, list):
            text += [f"{name + ':':<{width}} {len(value) or 'none'}", *(f"  {entry}" for entry in value)]
        else:
            text.append(f"{name + ':':<{width}} {value}")
    return text


def _contested(state: State, report: Report, now: float) -> list[str]:
    if report.own is None:
        return []
    subnet = report.own.record.subnet
    rivals = conflicts.contested(View(report.own, state.mesh, report.roster, now), report.members)
    return [
        f"subnet: {name} has moved to {subnet}, which is this host's: 'meshd renumber' on one of the two"
        for name in rivals
    ]


def _in_the_way(settings: Settings, report: Report) -> list[str]:
    """Return a line for each Docker network that keeps meshd's own, which is not there, from being made."""
    is_missing = any(isinstance(c.resource, Network) and c.action is Action.ADD for c in report.changes)
    network = docker(settings) if is_missing else None
    try:
        rivals = network.overlapping(settings.overlay) if network is not None else []
    except MeshdError as error:
        return [f"network: {error}"]
    return [f"network: {rival.problem(settings.overlay)}" for rival in rivals]


def blocked(state: State) -> list[str]:
    """Return a line for each thing that the firewall of this host blocks, though meshd needs it open."""
    try:
        bind = state.bind
        needed = openings.needed(state.settings, underlay.holder(bind), bind.version)
        return list(openings.blocked(needed, firewall.ruleset(), {v: firewall.saved(v) for v in {4, bind.version}}))
    except MeshdError as error:
        return [f"firewall: {error}"]
