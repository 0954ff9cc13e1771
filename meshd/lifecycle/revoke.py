"""`meshd forget` and `revoke`, on the host with the authority: remove a dead host, cut one off, end an invitation."""

from contextlib import suppress
from dataclasses import dataclass

from meshd.daemon import hints
from meshd.errors import ConflictError, InputError, SerfError
from meshd.gossip import calls, serf_agent
from meshd.gossip.delivery import Readiness, tell_tombstones
from meshd.gossip.responder import merge_tombstones
from meshd.mesh.model import Status
from meshd.mesh.tombstones import Tombstones, grave
from meshd.reconcile.run import sync
from meshd.state import authority
from meshd.state.directory import State


def forget(state: State, name: str) -> Readiness:
    """Bury a host that will not come back: all others drop it, and its subnet is free. Return who has heard of it.

    Raises InputError for a name that is not known or without the authority, ConflictError for a host that is alive.
    """
    settings, roster = state.settings, state.roster()
    if name == settings.name:
        raise InputError(f"{name} is this host: run 'meshd leave' here")
    record = roster.hosts.get(name)
    if record is None:
        known = ", ".join(sorted(roster.hosts)) or "none"
        raise InputError(f"no host {name!r} is known to this mesh; known: {known}")
    goodbye = authority.forget(state, name, record)
    with serf_agent.rpc(state) as client:
        member = next((m for m in client.members() if m.name == name), None)
        if member is not None and member.status is Status.ALIVE:
            raise ConflictError(f"{name} is alive: run 'meshd leave' there, or stop it first")
    return _end(state, name, Tombstones(grave(name, goodbye)))


@dataclass(frozen=True, slots=True)
class Revoked:
    """What `revoke` did: the names of all that is revoked, the hosts that stay, and who has heard of it.

    `stay` came by an invitation that is revoked, and the authority has confirmed them before.
    """

    names: list[str]
    stay: list[str]
    heard: Readiness


def revoke(state: State, name: str, *, with_hosts: bool = False) -> Revoked:
    """Cut a host off everywhere, or end a reusable invitation; `with_hosts` also those that came by it."""
    if name == state.settings.name:
        raise InputError(f"{name} is this host: bring the authority to another one and revoke it from there")
    revoked = authority.revoke(state, name, with_hosts=with_hosts)
    merge_tombstones(state, Tombstones(revoked=revoked))
    # The daemon may have confirmed a host meanwhile. From now on it does not.
    with suppress(InputError):
        revoked |= authority.revoke(state, name, with_hosts=with_hosts)
    heard = _end(state, name, Tombstones(revoked=revoked))
    names = sorted({revocation.name for revocation in revoked.values()})
    return Revoked(names, authority.confirmed_by(state, names), heard)


def _end(state: State, name: str, ended: Tombstones) -> Readiness:
    merge_tombstones(state, ended)
    with suppress(SerfError), serf_agent.rpc(state) as client:
        member = next((m for m in client.members() if m.name == name), None)
        if member is not None and member.status in {Status.FAILED, Status.LEFT}:
            client.force_leave(name, prune=True)
    with suppress(SerfError):
        calls.broadcast_tombstones(state, ended)
    sync(state)
    hints.wake(state.socket, "tombstones")
    return tell_tombstones(state, ended)
