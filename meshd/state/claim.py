"""This host's own record: when it changes, under which number, and whether it still counts."""

import time
from ipaddress import IPv4Network

from meshd.endpoint import Endpoint
from meshd.errors import ConflictError, InputError
from meshd.mesh import addressing, membership
from meshd.mesh.membership import Roster
from meshd.mesh.model import Host, Member, Record
from meshd.state.directory import Claim, State
from meshd.state.settings import Settings

ENDED = {
    membership.REVOKED: "the authority has revoked this host, or the invitation by which it came",
    membership.BURIED: "the mesh has forgotten this host: run 'meshd leave --force' here, then 'meshd join' again",
}
EXPIRED = "this host is a member no more, {reason}: 'meshd join' with a new invitation for its name renews it"


def membership_ended(own: Host, known: Roster, now: float) -> str:
    """Say why this host is no member any more, and what to do; the empty string while it is one."""
    reason = known.ended(own.name, own.record, now)
    if reason == membership.BURIED and known.gone[own.name].public_key != own.record.public_key:
        return ""  # it was an earlier host of this name, and this one goes beyond it: see `renewed`
    return ENDED.get(reason, EXPIRED.format(reason=reason)) if reason else ""


def renewed(state: State, claim: Claim, known: Roster) -> Claim:
    """Give the claim with today's key and endpoint; a changed one gets a new sequence number and is kept first."""
    goodbye = known.gone.get(state.settings.name)
    # That of another key is of an earlier host of this name.
    beyond = goodbye.seq if goodbye is not None and goodbye.public_key != claim.record.public_key else 0
    return state.publish(
        subnet=claim.record.subnet, endpoint=endpoint(state.settings), settled=claim.settled, beyond=beyond
    )


def endpoint(settings: Settings) -> Endpoint:
    """Where the others' WireGuard reaches this host."""
    return Endpoint(settings.advertised, settings.wireguard_port)


def settled_subnet(state: State, listed: list[Member]) -> IPv4Network:
    """Give the subnet to take: the one claimed already unless another member claims it too."""
    settings, record, now = state.settings, claimed_record(state.claim()), time.time()
    taken = membership.claimed(settings.name, listed, state.mesh, Roster(), now)
    if settings.subnet is not None and settings.subnet in taken:
        rivals = membership.subnet_rivals(Host(settings.name, record), listed, state.mesh, Roster(), now)
        raise ConflictError(f"the subnet {settings.subnet} is taken by {', '.join(rivals)}: pass another --subnet")
    return addressing.choose(
        settings.overlay,
        settings.subnet_length,
        taken,
        settings.advertised,
        settings.name,
        persisted=record.subnet,
        allowed=record.certificate.subnets,
    )


def ended(state: State) -> str:
    """Say why this host is no member any more, as far as it has heard; the empty string while it is one."""
    claim = state.claim()
    return membership_ended(Host(state.settings.name, claim.record), state.roster(), time.time()) if claim else ""


def claimed_record(claim: Claim | None) -> Record:
    if claim is None:
        raise InputError("the claim of this host is missing from its state directory")
    return claim.record
