"""What to ask and to tell the other hosts after a reconcile. Pure: the caller gives the clock and the dice."""

import math
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from meshd.gossip.messages import AskTombstones
from meshd.mesh.model import Certificate, Host, Record, Status
from meshd.mesh.votes import Vote, Votes, claim_of, is_open
from meshd.reconcile.run import Report

# Seconds before the same thing is asked again of the same hosts.
PAUSE = 10.0
# The same for disputes, and how many claims are asked about, and of how many hosts, at once: anyone with a reusable
# invitation makes any number of claims.
VOTE_AGAIN, MAX_CLAIMS, VOTERS = 5.0, 8, 5
# Seconds between routine questions for tombstones, without an occasion.
ASK_AGAIN = 60.0
# Seconds between questions for the tombstone of a lost host, in the first ASK_AGAIN seconds after it was lost.
ASK_LOST = 5.0
# How many of the hosts ask for it at once.
ASKERS = 5
# Upper bound of the back-off of questions to the authority.
LONGEST_PAUSE = 300.0
# Seconds until the authority is first asked to confirm a delegation's certificate. A confirmed certificate is a new
# record, which is work for all hosts, and a host that has just joined gives them enough.
CALM = 5.0
# Seconds between questions of a host whose certificate is the authority's own, but of version 2, while no other host
# has one of version 3: it is good as it is, and an authority of version 2 never answers.
RENEW_PAUSE = 3600.0
# Upper bounds of the queue for lookups of records, for asking back, and for all jobs. They bound the work that bogus
# members and askers can cause, and keep room for what matters more.
MAX_LOOKUPS, MAX_ASKED_BACK, MAX_JOBS = 3, 5, 10


@dataclass(frozen=True, slots=True)
class PullTombstones:
    """Ask these hosts for tombstones."""

    of: frozenset[str]


@dataclass(frozen=True, slots=True)
class SyncWith:
    """Exchange everything with these hosts over TCP."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Announce:
    """Publish the own record as an event, besides the tags."""

    record: Record


@dataclass(frozen=True, slots=True)
class LookUpRecord:
    """Ask these hosts for the newest record of `name`."""

    name: str
    of: frozenset[str]


@dataclass(frozen=True, slots=True)
class CollectVotes:
    """Ask these hosts which of these claims, which are all for one place, are in force for them."""

    claims: tuple[Host, ...]
    voters: tuple[Host, ...]


@dataclass(frozen=True, slots=True)
class RequestConfirmation:
    """Ask the authority for its own certificate in place of a delegation's, or of one of version 2."""


Job = PullTombstones | SyncWith | Announce | LookUpRecord | CollectVotes | RequestConfirmation


class Asking:
    """Decides what to ask. `queued` is always the number of jobs that wait already, `now` the monotonic clock."""

    def __init__(self, own: str, now: float, dice: random.Random) -> None:
        self._own = own
        self._dice = dice
        self._until: dict[object, float] = {
            "confirm": now + CALM,
            "renew": now + CALM,
            "anybody": now + ASK_AGAIN,
        }
        self._confirm_pause = PAUSE / 2
        self._alive: frozenset[str] = frozenset()
        self._lost: frozenset[str] = frozenset()
        self._lost_since = 0.0
        self._announced = 0
        self._queued = 0
        # When each open dispute was asked about, by its place.
        self._voted: dict[str, float] = {}

    def after(self, report: Report, votes: Votes, *, queued: int, now: float) -> list[Job]:
        """Return what to ask and to tell after a reconcile; `votes` is what was said of claims so far."""
        if not report.members:
            return []
        self._queued = queued
        # Anyone who has the gossip key can make any number of members, which are refused.
        hosts = report.roster.hosts
        alive = frozenset(m.name for m in report.members if m.status is Status.ALIVE and m.name in hosts)
        newcomers, self._alive = alive - self._alive, alive
        # Meeting many hosts at once means that this host was away; a single newcomer asks by itself.
        away = bool(newcomers) and len(newcomers) * 2 >= len(alive)
        jobs: list[Job] = []
        if away:
            jobs += self._soon(PullTombstones(newcomers), newcomers, now)
        if alive and sum(m.status is Status.ALIVE for m in report.members) > 2 * (len(alive) + 1):
            # Serf gossips to members picked at random: so many members that are no hosts swallow nearly all of it.
            jobs += self._soon(SyncWith(self._anybody()), "met", now)
        jobs += self._lost_hosts(frozenset(report.lost), now)
        if alive:
            # Messages get lost. The larger the mesh, the more other hosts ask.
            jobs += self._soon(PullTombstones(self._anybody()), "anybody", now, max(ASK_AGAIN, len(alive)))
        jobs += self._announcement(report, again=away)
        jobs += self._lookups(report, now)
        jobs += self._votes(report, votes, now)
        if alive and report.own is not None and not report.own.record.certificate.is_final:
            jobs += self._confirmation(report.own.record.certificate, hosts.values(), now)
        return jobs

    def asked(
        self, question: AskTombstones, digest: str, hosts: Collection[str], *, queued: int, now: float
    ) -> list[Job]:
        """Return what to ask a host that knows other tombstones than this one, whose digest is `digest`."""
        if question.asker not in hosts or question.digest == digest:
            return []
        self._queued = queued
        asker = frozenset({question.asker})
        # Anyone who has the gossip key can ask in any host's name.
        return self._soon(PullTombstones(asker), asker, now, room=MAX_ASKED_BACK)

    def _confirmation(self, own: Certificate, hosts: Iterable[Record], now: float) -> list[Job]:
        if own.delegation is not None or any(record.certificate.is_final for record in hosts):
            return self._soon(RequestConfirmation(), "confirm", now, self._confirm_pause)
        return self._soon(RequestConfirmation(), "renew", now, RENEW_PAUSE)

    def not_confirmed(self) -> None:
        """Wait longer before the authority is asked again."""
        self._confirm_pause = min(self._confirm_pause * 2, LONGEST_PAUSE)

    def _anybody(self) -> frozenset[str]:
        return frozenset(self._dice.sample(sorted(self._alive), min(1, len(self._alive))))

    def _announcement(self, report: Report, *, again: bool) -> list[Job]:
        if report.own is None or not self._alive or (not again and report.own.record.seq == self._announced):
            return []
        self._announced = report.own.record.seq
        return [Announce(report.own.record)]

    def _lost_hosts(self, lost: frozenset[str], now: float) -> list[Job]:
        """Ask for the tombstones of lost hosts, which they may have sent where no host here heard them."""
        if lost != self._lost:
            self._lost, self._lost_since = lost, now
        if not lost or now >= self._lost_since + ASK_AGAIN or not self._alive:
            return []
        askers = self._dice.sample(sorted({*self._alive, self._own}), min(len(self._alive) + 1, ASKERS))
        return self._soon(PullTombstones(self._alive), ("lost", lost), now, ASK_LOST) if self._own in askers else []

    def _lookups(self, report: Report, now: float) -> list[Job]:
        """Look up the records of members that are refused: anyone who has the gossip key can spoil tags."""
        roster = report.roster
        hosts = self._alive & roster.hosts.keys()
        unknown = [n for n in roster.refused if n not in roster.hosts and n not in roster.waiting]
        names: Iterable[str] = self._dice.sample(unknown, min(len(unknown), MAX_LOOKUPS)) if hosts else ()
        return [job for name in names for job in self._soon(LookUpRecord(name, hosts), name, now, room=MAX_LOOKUPS)]

    def voted(self, now: float) -> None:
        """Take note that votes were collected: one job of this kind at a time, as each may take seconds."""
        self._until["votes"] = now + VOTE_AGAIN

    def _votes(self, report: Report, votes: Votes, now: float) -> list[Job]:
        """Ask about the dispute that was asked about longest ago, and first those that were not asked or are silent."""
        disputes = [d for d in report.roster.disputes if d.voters and is_open(d, votes, self._own)]
        if not disputes:
            return []
        dispute = min(disputes, key=lambda d: self._voted.get(d.place, -math.inf))
        ranked = sorted(dispute.claims.items(), key=lambda claim: (claim[1].certificate.rank, claim[0]))[:MAX_CLAIMS]
        so_far = [votes.get(claim_of(*claim), Vote()) for claim in ranked]
        unasked = dispute.voters.keys() - frozenset.intersection(*(vote.asked for vote in so_far))
        silent = dispute.voters.keys() - frozenset.intersection(*(frozenset(vote.said) for vote in so_far))
        some = sorted(unasked or silent or dispute.voters)
        chosen = self._dice.sample(some, min(VOTERS, len(some)))
        job = CollectVotes(
            tuple(Host(*claim) for claim in ranked), tuple(Host(name, dispute.voters[name]) for name in chosen)
        )
        jobs = self._soon(job, "votes", now, math.inf)
        if jobs:
            self._voted = {d.place: self._voted.get(d.place, -math.inf) for d in disputes} | {dispute.place: now}
        return jobs

    def _soon(self, job: Job, what: object, now: float, pause: float = PAUSE, *, room: int = MAX_JOBS) -> list[Job]:
        self._until = {key: until for key, until in self._until.items() if until > now}
        if what in self._until or self._queued >= room:
            return []
        self._until[what] = now + pause
        self._queued += 1
        return [job]
