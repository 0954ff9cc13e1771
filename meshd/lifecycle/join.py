"""Make a mesh, or join one. On any error the host is as it was before."""

import math
import time
from collections.abc import Callable, Collection
from typing import Any

from meshd import files
from meshd.daemon import hints, service
from meshd.endpoint import Endpoint, IPAddress
from meshd.errors import ConflictError, InputError, SerfError
from meshd.gossip import calls, serf_agent
from meshd.gossip.delivery import Progress, Readiness, wait_ready
from meshd.lifecycle import leave, preflight
from meshd.lifecycle.preflight import Command
from meshd.lifecycle.rollback import all_or_nothing, steps, undoing
from meshd.lifecycle.up import begin, up
from meshd.mesh import addressing
from meshd.mesh.invitations import Admission, Invitation
from meshd.mesh.model import Member, Record
from meshd.net import underlay
from meshd.state import authority, machine_id
from meshd.state.claim import choose_subnet, endpoint, has_ended, publish, settle_subnet, settled
from meshd.state.directory import Claim, State
from meshd.state.settings import AUTO, DEFAULTS, Settings

# What Serf says of a member whose agent has another key, and of one that ends or starts at this moment.
ANOTHER_KEY = "No installed keys could decrypt the message"
STARTS_AGAIN = ("connection refused", "connection reset", "broken pipe", "EOF")
# Seconds to ask again while the answer stays the same, which is longer than an agent needs for that; and at most.
UNCHANGED, LONGEST = 10.0, 120.0
AGAIN = 0.2


def with_overlay(options: dict[str, Any]) -> Settings:
    """Return the settings of these options, with an overlay that nothing here has if it is AUTO. Raises MeshdError."""
    if options.get("overlay") != AUTO:
        return Settings(**options)
    settings = Settings(**{**options, "overlay": DEFAULTS["overlay"], "subnet": None})
    free = preflight.free_overlay(settings)
    if free is None:
        raise ConflictError("no private range is free on this host: choose an overlay yourself (--overlay PREFIX)")
    return Settings(**{**options, "overlay": free})


def init(state: State, settings: Settings) -> None:
    """Make a mesh with this host as its first. On any error the host is as it was before."""
    _not_set_up(state)
    settings.check_addresses()
    bind = _bind(settings, towards=None)
    with all_or_nothing(state):
        _settle_in(state, settings, bind, Command.INIT)
        authority.found(state, settings.mesh, settings.name)
        subnet = settings.subnet or choose_subnet(state)
        publish(state, None, subnet=subnet, endpoint=endpoint(state), settled=True)
        begin(state)


def join(
    state: State,
    settings: Settings,
    invitation: Invitation,
    admission: Admission,
    member: Endpoint,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Join the mesh of the member at `member`. On any error the host is as it was before.

    `say` is told why this takes longer than usual.
    """
    _not_set_up(state)
    settings.check_addresses()
    preflight.member_address(member, settings.overlay)
    allowed = admission.certificate.subnets
    if settings.subnet is not None and not addressing.is_allowed(settings.subnet, allowed):
        raise InputError(f"the invitation allows subnets of {', '.join(map(str, allowed))} only, not {settings.subnet}")
    bind = _bind(settings, member.address)
    preflight.reachable(member)
    with all_or_nothing(state):
        _settle_in(state, settings, bind, Command.JOIN, invitation.gossip_key)
        state.save_authority(invitation.authority)
        state.save_certificate(admission.certificate, admission.seed)
        state.save_contacts({"": member})
        subnet = settings.subnet or choose_subnet(state, allowed=allowed)
        # Without a daemon nobody can be asked before the agent is started by hand.
        claim = publish(state, None, subnet=subnet, endpoint=endpoint(state), settled=not settings.daemon)
        if settings.daemon:
            service.start(state)
            _enter(state, claim, member, say)
        begin(state)


def _enter(state: State, claim: Claim, member: Endpoint, say: Callable[[str], None]) -> None:
    """Join the gossip, and settle the claim against those of all members."""
    settings = state.settings
    members = _meet(state, member, say)
    if holder := serf_agent.name_conflict(state):
        raise ConflictError(f"the name {settings.name} is already in the mesh ({holder}): pass --name")
    subnet = settle_subnet(state, claim, members)
    publish(state, claim, subnet=subnet, endpoint=endpoint(state), settled=True)


def _meet(state: State, member: Endpoint, say: Callable[[str], None]) -> list[Member]:
    """Join the gossip through a member; return all members.

    While someone changes the keys of all Serf agents, they have another key at times and start again (see
    daemon.keeper). So a member with another key is asked again, longer than they need for that.
    """
    begun, before, until = time.monotonic(), "", math.inf
    while True:
        with serf_agent.connect(state) as client:
            try:
                client.join([str(member)])
                return client.members()
            except SerfError as error:
                reason = str(error)
        obstacle, now = _obstacle(reason), time.monotonic()
        if obstacle != before:
            before, until = obstacle, min(now + UNCHANGED, begun + LONGEST)
            if obstacle == ANOTHER_KEY:
                say(
                    f"{member} has another gossip key at the moment: a member changes the keys of all Serf agents "
                    f"(serf keys), or the invitation is of another mesh. It is asked again for {UNCHANGED:g} s"
                )
        if not obstacle or now >= until:
            raise InputError(
                f"{member} answers, but not as a member of the mesh {state.settings.mesh!r}: the invitation is of "
                f"another mesh, or another program uses that port ({reason})"
            )
        time.sleep(AGAIN)


def _obstacle(error: str) -> str:
    """Return what kept this host from joining, the empty string for what does not pass by itself."""
    if not error.startswith("join: "):
        return "this host's own Serf starts again"
    return next((text for text in (ANOTHER_KEY, *STARTS_AGAIN) if text in error), "")


def join_again(state: State, invitation: Invitation | None) -> None:
    """Start this host, which is a member, and take over the certificate of a new invitation. That is harmless.

    Raises InputError for an invitation to another mesh.
    """
    admission = renewal(state, invitation, time.time()) if invitation is not None else None
    # Nothing else changes, and no packet is lost.
    if admission is not None and admission.certificate != state.certificate:
        with state.lock():
            state.save_certificate(admission.certificate, admission.seed)
        hints.wake(state.socket, "a new certificate")
    up(state)


def renewal(state: State, invitation: Invitation, now: float) -> Admission | None:
    """Return what a new invitation gives to this host, which is a member; None if that is nothing.

    Raises InputError for an invitation to another mesh, and for one that is not valid for this host.
    """
    if invitation.authority != state.mesh.trust.authority:
        raise InputError(
            f"this host is in the mesh {state.settings.mesh!r} already, and the invitation is of another one: "
            "run 'meshd leave' first, or pass another --state-dir, --interface, --bridge and ports"
        )
    if invitation.certificate is None and state.certificate.delegation is None:
        return None  # a reusable invitation gives less than the certificate by the authority itself
    # Another identity would be another host of this name to the others. A revoked one counts for nothing any more.
    keeps = invitation.certificate is None and state.roster().revoked.keys().isdisjoint(state.certificate.serials)
    name = state.settings.name
    return invitation.redeem(name, name, now, state.identity_key if keeps else None)


def wait_for_others(state: State, timeout: float, progress: Progress, *, is_new: bool) -> Readiness:
    """Wait until the others have configured this host, and return who has.

    Raises InputError if this host is no longer a member. One that `is_new`, and hears only now that its invitation was
    revoked, is as it was before. So is one whose name another new host has got, with ConflictError.
    """
    rivals: list[Record] = []

    def is_over(hosts: Collection[str]) -> bool:
        rivals[:] = _rivals(state, hosts) if is_new else []
        return bool(rivals)

    readiness = wait_ready(state, timeout, progress, is_over=is_over)
    if rivals:
        has_same = rivals[0].certificate.identity == state.certificate.identity
        # A goodbye would end the other machine's membership, if both have one identity.
        withdraw = (lambda _: None) if has_same else leave.end_quietly
        with undoing(lambda: steps(state, existed=False, withdraw=withdraw)):
            raise ConflictError(_lost_name(state, rivals[0]))
    if reason := has_ended(state):
        if is_new:
            leave.leave(state, force=True)
        raise InputError(reason)
    return readiness


def _rivals(state: State, hosts: Collection[str]) -> list[Record]:
    """Return the records that these hosts have for this one's name, if none of them has this host's and those count.

    Serf accepts each of two that join in the same second where it is heard of first. As long as the hosts do not agree,
    the authority is asked: of two identities it confirms one, and all hosts take that one.
    """
    name, own, roster = state.settings.name, settled(state).record, state.roster()
    found = calls.look_up_records(state, name, hosts)
    others = [r for r in found if r.public_key != own.public_key and not roster.ended(name, r, time.time())]
    if others and own.certificate.delegation is not None and calls.request_confirmation(state):
        hints.wake(state.socket, "certificate confirmed")
    elif earlier := [r.seq for r in others if _is_earlier_life(r, own)]:
        _go_beyond(state, max(earlier))
    elif len(others) == len(found) and all(record.replaces(own) for record in others):
        return others
    return []


def _is_earlier_life(record: Record, own: Record) -> bool:
    """Return whether a record is of this machine, which has lost its disk and uses its invitation again."""
    return record.endpoint == own.endpoint and record.certificate.identity == own.certificate.identity


def _go_beyond(state: State, number: int) -> None:
    """Publish the own record under a number beyond one that a wrong clock may have given."""
    with state.lock():
        claim = settled(state)
        record = claim.record
        publish(state, claim, subnet=record.subnet, endpoint=record.endpoint, settled=True, beyond=number)
    hints.wake(state.socket, "another number")


def _lost_name(state: State, rival: Record) -> str:
    name, there = state.settings.name, rival.endpoint.address
    if rival.certificate.identity == state.certificate.identity:
        return f"another machine, at {there}, has used this invitation for {name}: make one for another name"
    return (
        f"the name {name} is another host's, at {there}: pass --name. If that one is gone, use an invitation "
        f"for that name ('meshd invite {name}')"
    )


def _not_set_up(state: State) -> None:
    if state.exists:
        settings = state.settings
        raise ConflictError(
            f"this host is already in the mesh {settings.mesh!r} as {settings.name}: "
            "'meshd up' starts it, 'meshd leave' ends it"
        )


def _bind(settings: Settings, towards: IPAddress | None) -> IPAddress:
    """Return the underlay address: the chosen one, or the one that the kernel would use towards a member."""
    bind = settings.bind or underlay.source_address(towards)
    settings.check_underlay(bind)
    return bind


def _settle_in(
    state: State, settings: Settings, bind: IPAddress, command: Command, gossip_key: bytes | None = None
) -> None:
    """Check the machine, then write everything that starting needs."""
    files.private_directory(state.directory)
    preflight.check(settings, bind, state.wireguard_key, command)
    if gossip_key is not None:
        state.save_gossip_key(gossip_key)
    _ = state.gossip_key, state.rpc_key
    if settings.bind is None:
        state.save_found_bind(bind, underlay.holder(bind) or "")
    machine_id.bind(state)
    state.save_settings(settings)
