"""The first handshake of two hosts: who starts it, and when a host starts it again. Pure: the clock is given.

WireGuard starts a handshake when a peer gets a keepalive. Two initiations that cross are both lost: each side responds
to the other's and forgets its own. WireGuard repeats an initiation after 5 s (REKEY_TIMEOUT), but not within 5 s of a
response that it has sent: two hosts that have crossed may wait for the next keepalive, 25 s later. A peer that is
re-created has forgotten what it sent, and starts a handshake at once.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from meshd.mesh.model import Member, Record, Status
from meshd.mesh.roster import Roster
from meshd.net.resources import Action, Change, Peer, Resource

# Seconds until a host starts a late handshake again, and how many times longer each further pause is. By these figures
# the attempts of two hosts coincide at most once, whenever each of them begins: initiations that crossed do not cross
# again. The responder's first pause is longer than most packets are on their way.
INITIATOR, RESPONDER = (0.7, 3), (0.2, 2)
# The first pause is longer by so much for each host of the mesh: a newcomer shakes hands with all of them.
PER_HOST, MOST_FOR_HOSTS = 0.02, 1.0
# A host that Serf does not list as alive is tried no more after this pause, until it is. WireGuard itself goes on.
LONGEST_FOR_THE_DEAD = 3.0
# A host that is alive is tried for ever: a firewall between the two may be closed for days.
LONGEST = 300.0
# Seconds after a peer has received something: the rest of a handshake may be on its way.
UNDER_WAY = 0.2


def is_initiator(own: Record, other: Record) -> bool:
    """Return whether this host starts the first handshake: of two hosts, the one with the newer record does.

    Both hosts see both records, and agree without a message. A newcomer has the newest record, and is mostly the last
    of the two to be ready.
    """
    return (own.seq, own.public_key) > (other.seq, other.public_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """A peer without a handshake, as a reconcile has found it.

    `is_alive` is what Serf says of its host. `is_new` says that this reconcile adds the peer. `received` counts the
    bytes that came from it.
    """

    is_initiator: bool
    is_alive: bool
    is_new: bool = False
    received: int = 0


def unmet(own: Record, roster: Roster, listed: Iterable[Member], observed: Iterable[Resource]) -> dict[str, Unmet]:
    """Return the hosts that have had no handshake with this host, by public key."""
    peers = {r.public_key: r for r in observed if isinstance(r, Peer)}
    alive = {member.name for member in listed if member.status is Status.ALIVE}
    found = {}
    for name, record in roster.hosts.items():
        peer = peers.get(record.public_key)
        if peer is None or not peer.handshake:
            found[record.public_key] = Unmet(
                is_initiator=is_initiator(own, record),
                is_alive=name in alive,
                is_new=peer is None,
                received=peer.received if peer is not None else 0,
            )
    return found


def awaited(late: Mapping[str, Unmet]) -> frozenset[str]:
    """Return the public keys of the hosts that are about to start the handshake with this host.

    These are living hosts only, which learn of this host at the same moment. After a boot a host knows its peers before
    Serf lists them: most of them still have their session, and start nothing.
    """
    return frozenset(key for key, peer in late.items() if peer.is_alive and not peer.is_initiator)


def keep_quiet(wanted: Resource, old: Resource | None, patient: Collection[str]) -> Resource:
    """Return a peer without its keepalive while its host is to start the handshake."""
    if not isinstance(wanted, Peer) or wanted.public_key not in patient:
        return wanted
    is_quiet = not isinstance(old, Peer) or (not old.keepalive and not old.handshake)
    return replace(wanted, keepalive=0) if is_quiet else wanted


def restarts(
    wanted: Iterable[Resource], observed: Iterable[Resource], overdue: Mapping[str, int]
) -> tuple[Change, ...]:
    """Return the changes that re-create overdue peers, each of which then starts a handshake at once.

    No session is cut. A peer that has had a handshake is left alone. So is a peer that has received more bytes than
    `overdue` says: the other side may have a session already, which its next packet confirms here.
    """
    late = {
        r.public_key: r
        for r in observed
        if isinstance(r, Peer) and not r.handshake and r.received <= overdue.get(r.public_key, -1)
    }
    again = [(late[r.public_key], r) for r in wanted if isinstance(r, Peer) and r.public_key in late]
    return tuple(change for old, new in again for change in (Change(Action.REMOVE, old), Change(Action.ADD, new)))


def crossed(late: Mapping[str, Unmet]) -> dict[str, int]:
    """Return what is overdue on a host that keeps no schedule: peers that sent something, but no handshake came of it.

    The initiator of the two leaves it to the other one.
    """
    return {key: peer.received for key, peer in late.items() if peer.received and not peer.is_initiator}


@dataclass(frozen=True, slots=True)
class Attempt:
    """The next attempt at one late handshake, at the time `next` or as soon as nothing is under way.

    `peer` is how it was found last, `heard` when it was found to have received something.
    """

    peer: Unmet
    next: float
    pause: float
    heard: float = float("-inf")

    @property
    def due(self) -> float | None:
        """The time at which the handshake is started again, None if it is not."""
        if not self.peer.is_alive and self.pause > LONGEST_FOR_THE_DEAD:
            return None
        return max(self.next, self.heard + UNDER_WAY)

    def found(self, peer: Unmet, *, now: float) -> "Attempt":
        """Return the attempt after a reconcile that did not make it."""
        return replace(self, peer=peer, heard=now if peer.received > self.peer.received else self.heard)

    def made(self, peer: Unmet, *, now: float) -> "Attempt":
        """Return the attempt that follows this one, made at the time `now`: the re-created peer counts from zero."""
        _, factor = _pauses(peer)
        pause = min(self.pause * factor, LONGEST)
        return Attempt(replace(peer, received=0), now + pause, pause)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The late handshakes and when they are started again, by public key."""

    attempts: Mapping[str, Attempt] = field(default_factory=dict)

    @property
    def due(self) -> float:
        """The time of the next attempt, infinity if there is none."""
        return min((due for a in self.attempts.values() if (due := a.due) is not None), default=float("inf"))

    def overdue(self, now: float) -> dict[str, int]:
        """Return the peers to re-create now, and how many bytes each had received when it was found last."""
        attempts = self.attempts.items()
        return {key: a.peer.received for key, a in attempts if (due := a.due) is not None and due <= now}

    def after(self, late: Mapping[str, Unmet], restarted: Collection[str], *, hosts: int, now: float) -> "Schedule":
        """Return the schedule after a reconcile that found these handshakes late, and started some of them again.

        The attempts begin with the first pause when a peer is new, and when its host comes alive.
        """
        delay = now + min(PER_HOST * hosts, MOST_FOR_HOSTS)
        attempts = {}
        for key, peer in late.items():
            before = self.attempts.get(key)
            if before is None or peer.is_new or (peer.is_alive and not before.peer.is_alive):
                pause, _ = _pauses(peer)
                attempts[key] = Attempt(peer, delay + pause, pause)
            elif key in restarted:
                attempts[key] = before.made(peer, now=now)
            else:
                attempts[key] = before.found(peer, now=now)
        return Schedule(attempts)


def _pauses(peer: Unmet) -> tuple[float, int]:
    return INITIATOR if peer.is_initiator else RESPONDER
