"""Whether this host runs on another machine as well: asked before it starts elsewhere, and as long as there is doubt.

Serf passes nothing on to a member whose name another one has. So the machine of which the others do not know hears
nothing, and has to ask: its questions do get through.
"""

import logging
import random
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from threading import Event, Lock

from meshd.daemon.hints import Hint, Source
from meshd.endpoint import Endpoint
from meshd.errors import MeshdError, WrongMachineError
from meshd.gossip import calls, serf, serf_agent
from meshd.gossip.messages import Sighting, TellTwins, Where
from meshd.gossip.reach import answering
from meshd.gossip.serf.client import CONFLICT
from meshd.mesh.model import Host, Record
from meshd.mesh.records import to_wire
from meshd.mesh.twins import Place, Sightings, Twins
from meshd.state import claim as own_claim
from meshd.state.directory import Claim, State

log = logging.getLogger("meshd")

# Before a host starts at another address: how many addresses it tries, and how often it asks. A question or its answer
# may be lost.
MEETINGS, QUESTIONS = 8, 2
# Seconds from one question to the next while there is doubt, and when the answer is known.
AGAIN, KNOWN = 2.0, 5.0
# The same with many hosts, all of which pass a question on: a second for every so many of them.
HOSTS_A_SECOND = 100
# Seconds of doubt after a host came to another address, and after Serf has heard of a namesake.
MOVED, CONFLICTED = 600.0, 20.0
ELSEWHERE = (
    "{name} runs at {place} on another machine, and this one at {address} must not start: its state is a copy, or was "
    "copied. If this is the machine to keep, run 'meshd down' at {place}, then 'meshd up' here. If not, remove "
    "{directory} here, then run 'meshd join' with an invitation of its own"
)


def settle(state: State) -> None:
    """Let this host start at the address that it has now. Raises WrongMachineError while it runs at another one.

    Nothing is asked where it still has the address of its last record. Who cannot ask, or gets no answer, starts: a
    host that has moved must come back also when it is alone.
    """
    place = None
    try:
        claim = state.claim()
        if claim is None or not claim.settled or claim.record.leaving or not own_claim.unasked(state, claim):
            return
        place = _elsewhere(state, claim)
        if place is None:
            with state.lock():
                own_claim.refresh(state, claim, state.roster())
    except MeshdError as error:
        log.debug("asking whether this host runs elsewhere: %s", error)  # of the state: each reconcile reports it
    if place is not None:
        name, here = state.settings.name, state.advertised
        raise WrongMachineError(
            ELSEWHERE.format(name=name, place=place.endpoint, address=here, directory=state.directory)
        )


def _elsewhere(state: State, claim: Claim) -> Place | None:
    """Return where this host runs on another machine, as that one says; None if none does, or nobody can be asked."""
    is_adopted = serf.running(state.serf_config) is not None
    try:
        with serf_agent.start(state):
            place = _asked(state, claim)
    except MeshdError as error:
        log.debug("asking whether this host runs elsewhere: %s", error)
        return None
    if place is not None and not is_adopted:
        serf_agent.stop(state)
    return place


def _asked(state: State, claim: Claim) -> Place | None:
    """Ask, and return what another machine answers; None without an answer. Raises SerfError."""
    settings, here = state.settings, own_claim.endpoint(state)
    own = Host(settings.name, claim.record)
    known = [e for name, e in state.contacts().items() if name != settings.name]
    some = random.sample(known, min(len(known), MEETINGS - 1))
    if not _meet(state, [Endpoint(claim.record.endpoint.address, settings.gossip_port), *some]):
        return None
    for _ in range(QUESTIONS):
        found = calls.where(state, own, here)
        # The word of a machine that has ended since could be shown again, and would keep this host down.
        if found.is_answer:
            return found.place
    return None


def _meet(state: State, endpoints: Collection[Endpoint]) -> bool:
    """Join those hosts that are there at these addresses; return whether any is. Raises SerfError."""
    there = [*map(str, answering(endpoints))]
    if there:
        with serf_agent.rpc(state) as client:
            client.join(there)
    return bool(there)


class TwinWatch:
    """What one daemon knows of hosts that run on two machines. `watch` runs in a thread of its own."""

    def __init__(self, state: State, hint: Callable[[Hint], None], stopping: Event) -> None:
        self.state = state
        self.beyond = 0
        """What the number of this host's record has to exceed, after it had a twin."""
        self._hint = hint
        self._stopping = stopping
        self._sightings: Sightings[TellTwins] = Sightings()
        self._doubt_until = 0.0
        self._question = b""
        self._hosts: Mapping[str, Record] = {}
        self._lock = Lock()

    def hear(self, line: str) -> None:
        """Take note of a line of the log of this host's Serf: one that has met a namesake is a reason to ask."""
        if CONFLICT.fullmatch(line.strip().split(" ", 2)[-1]):
            self._doubt_until = time.monotonic() + CONFLICTED

    def is_own(self, question: bytes) -> bool:
        """Return whether this daemon is asking that itself. Serf hands on one answer of each name."""
        return question == self._question

    def told(self, word: TellTwins) -> None:
        """Take in the word of a host that it runs on another machine as well, which its identity has signed."""
        twins, claim = word.twins, self.state.claim()
        if claim is None:
            return
        own = self.state.settings.name
        hosts = {**self._hosts, own: claim.record}
        record = hosts.pop(twins.name, None)
        if record is None or not twins.is_about(record, own=twins.name == own):
            return
        # A host that lies says nothing of others: theirs are the other endpoints.
        if any(other.endpoint in (twins.one.endpoint, twins.other.endpoint) for other in hosts.values()):
            return
        if calls.is_word(self.state, Host(twins.name, record), word):
            self._see(twins, word)

    def sighting(self, question: Where) -> bytes | None:
        """Return what this host knows of another one that is asked for: its machines may not hear of each other."""
        record = self._hosts.get(question.name)
        if record is None or record.certificate.identity != question.identity:
            return None
        with self._lock:
            words = self._sightings.words_of(question.name, time.monotonic())
        return Sighting(to_wire(record), words).payload()

    def watch(self) -> None:
        """Ask while there is doubt, and forget what is over, until the daemon stops."""
        with suppress(MeshdError), self._lock:
            for twins in self.state.twins().values():  # of the daemon before this one
                self._sightings.see(twins, time.monotonic())
        while not self._stopping.is_set():
            claim = self.state.claim()
            pause = AGAIN
            if claim is not None and claim.settled and not claim.record.leaving:
                self._expire(claim.record)
                if self._is_in_doubt(claim) and self._ask(Host(self.state.settings.name, claim.record)):
                    pause = KNOWN
            self._stopping.wait(max(pause, len(self._hosts) / HOSTS_A_SECOND))

    def after(self, hosts: Mapping[str, Record]) -> None:
        """Take note of who is a host, after a reconcile."""
        self._hosts = hosts

    def _is_in_doubt(self, claim: Claim) -> bool:
        # Before this host has gone beyond the record of a machine that ended, the others still have that one.
        if claim.record.seq <= self.beyond:
            return False
        return time.monotonic() < self._doubt_until or abs(time.time() - claim.moved) < MOVED

    def _ask(self, own: Host) -> bool:
        """Ask where this host runs; return whether another machine has answered."""
        try:
            found = calls.where(self.state, own, own.record.endpoint, self._asks)
            # A record proves that the other machine was there. It may have ended since.
            if found.place is None or (own.name in self._sightings.known and not found.is_live):
                return False
            twins = Twins(own.name, Place.of(own.record), found.place)
            self._doubt_until = time.monotonic() + CONFLICTED
            self._see(twins)
            calls.tell_twins(self.state, twins)
        except MeshdError as error:
            log.debug("asking whether this host runs elsewhere: %s", error)
            return False
        return True

    def _asks(self, question: bytes) -> None:
        self._question = question

    def _see(self, twins: Twins, word: TellTwins | None = None) -> None:
        with self._lock:
            if self._sightings.see(twins, time.monotonic(), word):
                self._keep()

    def _expire(self, own: Record) -> None:
        name = self.state.settings.name
        with self._lock:
            over = self._sightings.expire({**self._hosts, name: own}, time.monotonic())
            if name in over:
                # What the other one has published, and what both have said, counts no more.
                self.beyond = max(own.seq, over[name].one.seq, over[name].other.seq)
            if over:
                self._keep()

    def _keep(self) -> None:
        """Put on disk what `meshd status` shows, and have the daemon log it."""
        with suppress(MeshdError):
            self.state.save_twins(self._sightings.known)
        self._hint(Hint(Source.MESH, "twins"))
