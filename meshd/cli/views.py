"""What a person reads: members, status, plan, as text and as JSON. Gathering and rendering, no decisions."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshd.audit import openings
from meshd.errors import MeshdError
from meshd.mesh import conflicts
from meshd.mesh.model import Host, Member, Record, Status
from meshd.mesh.roster import View
from meshd.net import firewall, underlay
from meshd.net.resources import Change, Peer
from meshd.reconcile import plan
from meshd.reconcile.machine import Area, wireguard
from meshd.reconcile.run import Options, Report, sync
from meshd.state.directory import Claim, State
from meshd.state.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of `meshd members`. `handshake` is Unix time in seconds, 0 for none yet, None for this host itself."""

    name: str
    subnet: str
    endpoint: str
    state: str
    handshake: float | None
    reason: str = ""


def gather(state: State) -> Report:
    """Look at members, peers and routes, and change nothing."""
    return sync(state, Options(dry=True, kinds=frozenset({"device", "peer", "route"})))


def members(state: State, report: Report) -> list[Row]:
    """Give a row for each host, each that has left, and each member that is there and refused, sorted by name."""
    claim = state.claim()
    own = Host(state.settings.name, claim.record) if claim else None
    listed = {member.name: member for member in report.members}
    handshakes = {peer.public_key: peer.handshake for peer in report.peers}
    roster = report.roster
    names = roster.hosts.keys() | roster.refused.keys() | (listed.keys() & roster.gone.keys())
    names |= {own.name} if own else set()
    return [_row(name, own, listed.get(name), report, handshakes) for name in sorted(names)]


def _row(name: str, own: Host | None, member: Member | None, report: Report, handshakes: Mapping[str, float]) -> Row:
    if own is not None and name == own.name:
        return _admitted(name, own.record, Status.ALIVE.value if member else "offline", None)
    record = report.roster.hosts.get(name)
    reason = report.roster.refused.get(name, "")
    status = member.status.value if member else Status.FAILED.value
    if record is None:
        tags = member.tags if member else {}
        address = f"{member.address}:{member.port}" if member else "-"
        gone = "left" if name in report.roster.gone else "refused"
        return Row(
            name=name,
            subnet=_printable(tags.get("subnet", "-")),
            endpoint=address,
            state=gone if not reason or status == "left" else "refused",
            handshake=0.0,
            reason="" if gone == "left" else reason,
        )
    row = _admitted(name, record, status, handshakes.get(record.public_key, 0.0))
    stale = report.roster.stale.get(name, "")
    return replace(row, state="refused", reason=reason) if reason else replace(row, reason=stale)


def _admitted(name: str, record: Record, status: str, handshake: float | None) -> Row:
    return Row(name=name, subnet=str(record.subnet), endpoint=str(record.endpoint), state=status, handshake=handshake)


def members_text(rows: Sequence[Row], now: float | None = None) -> str:
    """Give one aligned line a row: name, subnet, endpoint, state, handshake, and the reason for who is refused."""
    now = time.time() if now is None else now
    cells = [(_printable(r.name), r.subnet, r.endpoint, r.state, _ago(r.handshake, now), r.reason) for r in rows]
    return columns(cells)


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Align rows of cells as `serf members` does: two blanks between columns, none at the end of a line."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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


def _printable(text: str) -> str:
    """Make text that any holder of the gossip key may have written safe for a terminal."""
    return "".join(c if c.isprintable() and not c.isspace() else "?" for c in text)[:63]


def members_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def changes_text(changes: Sequence[Change], withheld: Sequence[Change] = ()) -> str:
    """Give one line a change, `+` for add, `~` for set and `-` for remove."""
    sign = {"add": "+", "set": "~", "remove": "-"}
    lines = [f"{sign[change.action]} {change.resource}" for change in changes]
    lines += [f"! withheld without evidence: {change}" for change in withheld]
    return "\n".join(lines) if lines else "no changes"


def changes_json(report: Report) -> dict[str, Any]:
    def plain(change: Change) -> dict[str, str]:
        return {"action": change.action.value, "kind": change.resource.kind, "resource": str(change.resource)}

    return {
        "changes": [plain(change) for change in report.changes],
        "withheld": [plain(change) for change in report.withheld],
        "failures": [str(failure) for failure in report.failures],
    }


def status(state: State) -> dict[str, Any]:
    """Give the facts of `meshd status`: strings, numbers and lists only."""
    settings, report = state.settings, sync(state, Options(dry=True))
    claim = state.claim()
    pid = state.agent_pid()
    present = [member for member in report.members if member.status is not Status.LEFT]
    alive = sum(member.status is Status.ALIVE for member in present)
    unread = [f for f in report.failures if f.area is Area.DOCKER or f.subject == "network"]
    docker = f"{report.engine.version} ({report.engine.firewall})" if report.engine else ""
    return {
        "mesh": settings.mesh,
        "host": settings.name,
        "overlay": str(settings.overlay),
        "subnet": str(claim.record.subnet) if claim else None,
        "address": str(claim.record.address) if claim else None,
        "endpoint": str(claim.record.endpoint) if claim else None,
        "daemon": (f"running (pid {pid})" if pid else "not running") if settings.daemon else "none (Serf's handlers)",
        "serf": f"{alive} of {len(present)} members alive" if report.members else "not answering",
        "wireguard": f"{settings.wireguard} ({wireguard(state).backend}), udp port {settings.wireguard_port}",
        "docker": (f"not answering ({unread[0].error})" if unread else docker) if settings.docker else "not used",
        "reachable by the overlay": "ICMP" + "".join(f", {entry}" for entry in settings.allow),
        "peers": f"{len(report.peers)}, {_fresh(report.peers)} with a handshake in the last 3 minutes",
        "pending": [str(change) for change in report.changes],
        "refused": [f"{name}: {reason}" for name, reason in sorted(report.roster.refused.items())],
        "problems": [*map(str, report.failures), *_contested(state, claim, report), *shut(settings)],
        "state directory": str(state.directory),
    }


def _contested(state: State, claim: Claim | None, report: Report) -> list[str]:
    if claim is None:
        return []
    view = View(Host(state.settings.name, claim.record), state.mesh, report.roster, time.time())
    rivals = conflicts.contested(view, report.members)
    return [
        f"subnet: {name} has moved to {claim.record.subnet}, which is this host's: 'meshd renumber' on one of the two"
        for name in rivals
    ]


def shut(settings: Settings) -> list[str]:
    """Give a line for each thing that the firewall of this host shuts, though meshd needs it open."""
    versions = {4, settings.bind.version}
    try:
        needed = openings.needed(settings, underlay.holder(settings.bind))
        return list(openings.shut(needed, firewall.ruleset(), {v: firewall.saved(v) for v in versions}))
    except MeshdError as error:
        return [f"firewall: {error}"]


def status_text(facts: Mapping[str, Any]) -> str:
    """Give one line a fact, and an indented line for each entry of a list."""
    width = max(map(len, facts)) + 1
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, list):
            lines += [f"{name + ':':<{width}} {len(value) or 'none'}", *(f"  {entry}" for entry in value)]
        else:
            lines.append(f"{name + ':':<{width}} {value}")
    return "\n".join(lines)


def _fresh(peers: Iterable[Peer]) -> int:
    return sum(time.time() - peer.handshake < plan.FRESH for peer in peers)
