"""Which of two hosts starts the first handshake, and when the other one starts it all the same. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from meshd.mesh.model import Member, Record, Status
from meshd.mesh.roster import Roster
from meshd.net.resources import (
    Action,
    Change,
    Peer,
    Resource,
)
from meshd.state.settings import Settings


def speaks_first(own: Record, other: Record) -> bool:
    """Tell which of two hosts begins the first handshake: the one with the newer record; the other waits for a moment.

    A keepalive begins it at once. Two that cross are both lost, since each side then answers and forgets its own
    question, and WireGuard asks again only after 5 s (REKEY_TIMEOUT). Two hosts that learn of each other at the same
    time, as when one joins, would often do that. Who joins is mostly the last of the two to be ready.
    """
    return (own.seq, own.public_key) > (other.seq, other.public_key)


def begin_anew(
    wanted: Iterable[Resource], observed: Iterable[Resource], overdue: Collection[str]
) -> tuple[Change, ...]:
    """Give the changes that make WireGuard begin a handshake at once with these public keys, if there was none yet.

    A peer that is made anew has forgotten its own first message, for which it would wait 5 s. Nothing is cut: without a
    handshake no packet passes.
    """
    unmet = {r.public_key: r for r in observed if isinstance(r, Peer) and not r.handshake}
    keys = unmet.keys() & set(overdue)
    again = [(unmet[r.public_key], r) for r in wanted if isinstance(r, Peer) and r.public_key in keys]
    return tuple(change for old, new in again for change in (Change(Action.REMOVE, old), Change(Action.ADD, new)))


def keep_quiet(wanted: Resource, old: Resource | None, patient: Collection[str]) -> Resource:
    if not isinstance(wanted, Peer) or wanted.public_key not in patient:
        return wanted
    is_quiet = not isinstance(old, Peer) or (not old.keepalive and not old.handshake)
    return replace(wanted, keepalive=0) if is_quiet else wanted


def patient_keys(settings: Settings, own: Record, roster: Roster, listed: Iterable[Member]) -> set[str]:
    """Give the public keys of those who begin the handshake with this host, of the hosts that are alive.

    Without a daemon nobody would follow up.
    """
    if not settings.daemon or not settings.keepalive:
        return set()
    alive = (roster.hosts[m.name] for m in listed if m.status is Status.ALIVE and m.name in roster.hosts)
    return {other.public_key for other in alive if not speaks_first(own, other)}
