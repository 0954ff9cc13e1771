"""This host's own record: when it changes, under which number, which subnet it claims, and whether it still counts."""

import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network

from meshd import keys
from meshd.endpoint import Endpoint
from meshd.errors import ConflictError, InputError
from meshd.mesh import addressing, certificates, conflicts
from meshd.mesh.model import Host, Member, Record, Tombstone
from meshd.mesh.records import MAX_SEQ
from meshd.mesh.roster import BURIED, REVOKED, SUPERSEDED, Roster, View
from meshd.state.directory import Claim, State

ENDED = {
    REVOKED: "the authority has revoked this host, or the invitation by which it came",
    SUPERSEDED: "the authority has given this host's name to another one: run 'meshd leave --force' here, then "
    "'meshd join' with an invitation of its own",
    BURIED: "the mesh has forgotten this host: run 'meshd leave --force' here, then 'meshd join' again",
}
EXPIRED = "this host is no longer a member, {reason}. To renew it, run 'meshd join' with a new invitation for its name"


USED_UP = (
    "the numbers of this host's records are used up: run 'meshd leave --force' here, then 'meshd join' with a new "
    "invitation"
)
UNASKED = (
    "{name} was at {last} and is at {address} now: 'meshd up' asks first whether it still runs there on another machine"
)
# The greatest number of a record, but for the goodbye.
LAST = MAX_SEQ - 2


class NumbersError(InputError):
    """This host's record cannot change any more."""


class UnfinishedError(InputError):
    """This host has not claimed its subnet yet: `meshd join` still asks the mesh, or was interrupted."""


def settled(state: State) -> Claim:
    """Return the own record that others may rely on. Raises UnfinishedError before `meshd join` has finished."""
    claim = state.claim()
    if claim is None or not claim.settled:
        raise UnfinishedError(
            f"this host has not finished joining {state.settings.mesh!r}: if no 'meshd join' is running, "
            "run 'meshd leave --force', then 'meshd join' again"
        )
    return claim


def staying(state: State) -> Claim:
    """Return the settled own record of a host that has not begun to leave. Raises InputError."""
    claim = settled(state)
    if claim.record.leaving:
        raise InputError(
            f"this host has begun to leave {state.settings.mesh!r}: run 'meshd leave' again to finish that"
        )
    return claim


def publish(
    state: State,
    last: Claim | None,
    *,
    subnet: IPv4Network,
    endpoint: Endpoint,
    settled: bool,
    leaving: bool = False,
    beyond: int = 0,
    now: float | None = None,
) -> Claim:
    """Return the own record to publish, signed and kept on disk. Its number grows exactly when the record changes.

    `last` is the own record so far. `beyond` is the number of a tombstone of this identity, or of the authority's: it
    may be of a clock that was wrong. A number never goes back: it survives reboots in the file. Where the file was
    lost, the number restarts at Unix time, which is higher than any that one record a second reaches.

    Raises NumbersError when there is no greater number. The greatest is for a goodbye.
    """
    seq = last.record.seq if last else 0
    record = Record(keys.public_key(state.wireguard_key), subnet, endpoint, seq, state.certificate, leaving)
    moved = last.moved if last is not None else 0
    if last is not None and record == replace(last.record, signature=b"") and seq > beyond:
        claim = Claim(last.record, settled, moved)
    else:
        start = int(time.time() if now is None else now)
        if last is not None and last.record.endpoint.address != endpoint.address:
            moved = start
        record = replace(record, seq=max(seq + 1, beyond + 1, start))
        if record.seq > LAST + leaving:
            raise NumbersError(USED_UP)
        settings = state.settings
        claim = Claim(certificates.sign(state.identity_key, settings.mesh, settings.name, record), settled, moved)
    if claim != last:
        state.save_claim(claim)
    return claim


def refresh(state: State, claim: Claim, known: Roster, now: float | None = None, *, beyond: int = 0) -> Claim:
    """Return the own record with today's key, certificate and endpoint; one that changed has been numbered and kept.

    Its number is greater than `beyond`. Where the numbers are used up it stays as it is.
    """
    record = claim.record
    earlier = _earlier(Host(state.settings.name, record), known)
    beyond = max((beyond, *(tombstone.seq for tombstone in earlier)))
    with suppress(NumbersError):
        return publish(
            state,
            claim,
            subnet=record.subnet,
            endpoint=endpoint(state),
            settled=claim.settled,
            beyond=beyond,
            now=now,
        )
    return claim


def _earlier(own: Host, known: Roster) -> list[Tombstone]:
    """Return the tombstones of earlier hosts of this name, with other keys, that this one has to go beyond."""
    graves = known.gone.get(own.name, {}).values()
    return [t for t in graves if t.voids(own.record) and t.public_key != own.record.public_key]


def unasked(state: State, claim: Claim) -> str:
    """Return why this host must not start before it has asked whether it runs elsewhere; else the empty string.

    It has another address than the one that it published last. Its daemon has asked before it starts (daemon.twins).
    """
    if not has_moved(state, claim) or not state.settings.daemon or state.agent_pid() is not None:
        return ""
    return UNASKED.format(name=state.settings.name, last=claim.record.endpoint, address=state.advertised)


def has_moved(state: State, claim: Claim) -> bool:
    """Return whether this host has another address than the one that it published last."""
    return claim.record.endpoint.address != state.advertised


def endpoint(state: State) -> Endpoint:
    """Return where the other hosts' WireGuard reaches this host."""
    return Endpoint(state.advertised, state.settings.wireguard_port)


def choose_subnet(
    state: State,
    taken: Collection[IPv4Network] = (),
    *,
    allowed: Collection[IPv4Network] = (),
    persisted: IPv4Network | None = None,
) -> IPv4Network:
    """Return a free subnet for this host (see addressing.choose). Raises ConflictError when there is none."""
    settings = state.settings
    return addressing.choose(
        settings.overlay,
        settings.subnet_length,
        taken,
        state.advertised,
        settings.name,
        persisted=persisted,
        allowed=allowed,
    )


def settle_subnet(state: State, claim: Claim, listed: Collection[Member]) -> IPv4Network:
    """Return the subnet to take: the claimed one, unless another member claims it too. Raises ConflictError."""
    settings, record = state.settings, claim.record
    view = View(Host(settings.name, record), state.mesh, Roster(), time.time())
    taken = conflicts.claimed(view, listed)
    if settings.subnet is not None and settings.subnet in taken:
        rivals = conflicts.subnet_rivals(view, listed)
        raise ConflictError(f"the subnet {settings.subnet} is taken by {', '.join(rivals)}: pass another --subnet")
    return choose_subnet(state, taken, allowed=record.certificate.subnets, persisted=record.subnet)


def ended(own: Host, known: Roster, now: float) -> str:
    """Return why this host is no longer a member, and what to do; the empty string while it is one."""
    reason = known.ended(own.name, own.record, now)
    if reason == BURIED:
        earlier = _earlier(own, known)
        if all(t in earlier for t in known.gone[own.name].values() if t.voids(own.record)):
            # They ended earlier hosts of this name, and this one goes beyond them (see `refresh`), if it can.
            return USED_UP if any(t.seq >= LAST for t in earlier) else ""
    return ENDED.get(reason, EXPIRED.format(reason=reason)) if reason else ""


def has_ended(state: State) -> str:
    """Return what `ended` says by what is on disk now."""
    claim = state.claim()
    return ended(Host(state.settings.name, claim.record), state.roster(), time.time()) if claim else ""
