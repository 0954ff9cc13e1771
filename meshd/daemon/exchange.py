"""The daemon's threads that talk with the other hosts over Serf, and what they heard until a reconcile takes it up.

Nothing here decides who is a host. What is heard is either proved by a signature or only a reason to look again. No
message has to arrive: a host that heard nothing asks again.
"""

import logging
import queue
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock

from meshd.daemon.asking import (
    Announce,
    Asking,
    CollectVotes,
    Job,
    LookUpRecord,
    PullTombstones,
    RequestConfirmation,
    SyncWith,
)
from meshd.daemon.hints import READINESS, Hint, Source
from meshd.daemon.twins import TwinWatch
from meshd.errors import MeshdError
from meshd.gossip import calls, messages, serf_agent
from meshd.gossip.messages import (
    APPLIED,
    EVENT,
    GONE,
    HOLDS,
    QUERY,
    RECORD,
    TWINS,
    Applied,
    AskTombstones,
    Holds,
    TellTwins,
    Where,
)
from meshd.gossip.responder import Reply, merge_tombstones, respond, signed
from meshd.mesh.membership import is_news
from meshd.mesh.model import Record
from meshd.mesh.roster import Roster
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones
from meshd.mesh.votes import Claim, Vote, claim_of
from meshd.reconcile.run import Report
from meshd.state.directory import State

log = logging.getLogger("meshd")

# Seconds for which a question waits for the reconcile that answers it; the asker asks again after its own time-out.
PATIENCE = 5.0
# Upper bound of the records that are kept for the next reconcile. A thousand bogus members must not fill the memory.
MAX_HEARD = 1000
# The same of questions that wait.
MAX_WAITING = 1000

Respond = Callable[[bytes], None]

NOT_IN_FORCE = "it is not in force here"


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A question that waits for a reconcile, until then at most."""

    question: Applied
    answer: Respond
    until: float


class Exchange:
    """One daemon's side of the talk. `watch` and `ask` run in threads of their own, `after` after each reconcile."""

    def __init__(self, state: State, hint: Callable[[Hint], None], stopping: Event) -> None:
        self.state = state
        self.hint = hint
        self.stopping = stopping
        self.twins = TwinWatch(state, hint, stopping)
        self.asking = Asking(state.settings.name, time.monotonic(), random.Random())  # noqa: S311  no secret
        self.heard: dict[str, Record] = {}
        self.votes: dict[Claim, Vote] = {}
        self._report = Report()
        self._applied = Roster()
        self._waiting: dict[bytes, _Waiting] = {}
        # Of `_waiting`; and of `heard`, `votes` and `asking`, which each thread changes.
        self._answering, self._sharing = Lock(), Lock()
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._resume_at = ""

    def stop(self) -> None:
        self._jobs.put(None)

    def after(self, report: Report) -> None:
        """Answer the questions that waited for this reconcile, and take up what it gives reason to ask or to tell."""
        self._report, self._applied = report, report.applied
        self._answer()
        self.twins.after(report.roster.hosts)
        with self._sharing:
            self.heard = {n: r for n, r in self.heard.items() if self._is_news(n, r)}
            claims = {claim_of(n, r) for d in report.roster.disputes for n, r in d.claims.items()}
            self.votes = {claim: vote for claim, vote in self.votes.items() if claim in claims}
            self._enqueue(self.asking.after(report, self.votes, queued=self._jobs.qsize(), now=time.monotonic()))

    # --- asking ----------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask and tell, one job after the other, until `stopping` is set."""
        while not self.stopping.is_set():
            job = self._jobs.get()
            try:
                if job is not None:
                    self._do(job)
            except MeshdError as error:
                log.debug("asking the other hosts: %s", error)

    def _enqueue(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._jobs.put(job)

    def _do(self, job: Job) -> None:
        match job:
            case PullTombstones():
                self._pull_tombstones(job)
            case SyncWith():
                calls.sync_with(self.state, job.names, calls.TELL, replay=True)
            case Announce():
                calls.announce(self.state, job.record)
            case LookUpRecord():
                record = calls.look_up_record(self.state, job.name, job.of)
                if record is not None:
                    self.hear(job.name, record)
            case CollectVotes():
                self._collect_votes(job)
            case RequestConfirmation():
                self._request_confirmation()

    def _pull_tombstones(self, job: PullTombstones) -> None:
        known = self.state.roster().all_tombstones
        found, self._resume_at = calls.pull_tombstones(self.state, job.of, known, self._resume_at)
        if found and merge_tombstones(self.state, found):
            self._hint_at(found)
            # The other hosts may have been away together with this one. What this one did not keep, they need not hear.
            calls.broadcast_tombstones(self.state, self.state.roster().all_tombstones.without(known))

    def _collect_votes(self, job: CollectVotes) -> None:
        """Store all votes together: a reconcile that saw those on one claim alone could be led by one voter."""
        try:
            said = {
                claim_of(host.name, host.record): calls.ask_holds(self.state, host, job.voters) for host in job.claims
            }
            asked = [voter.name for voter in job.voters]
            with self._sharing:
                self.votes |= {c: self.votes.get(c, Vote()).with_answers(asked, answers) for c, answers in said.items()}
        finally:
            with self._sharing:
                self.asking.voted(time.monotonic())
        self.hint(Hint(Source.MESH, "votes"))

    def _request_confirmation(self) -> None:
        if calls.request_confirmation(self.state):
            log.info("the authority has confirmed this host's certificate")
            self.hint(Hint(Source.MESH, "certificate confirmed"))
        else:
            with self._sharing:
                self.asking.not_confirmed()

    # --- hearing and answering -------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Hear the other hosts' messages until the connection breaks. Raises SerfError."""
        with serf_agent.rpc(self.state) as client:
            for event in client.stream(f"query,user:{GONE},user:{RECORD},user:{TWINS}"):
                payload, identity = event.get("Payload"), event.get("ID")
                if isinstance(payload, bytes):
                    answer = partial(client.respond, identity) if isinstance(identity, int) else None
                    self.receive(event["Event"], event["Name"], payload, answer)

    def receive(self, kind: str, name: str, payload: bytes, answer: Respond | None) -> None:
        """Take in one message; a query's `answer` takes the reply."""
        message = messages.read(kind, name, payload, self.state.mesh)
        if message is None or (kind, answer is None) not in {(QUERY, False), (EVENT, True)}:
            return
        if isinstance(message, Applied) and answer is not None:
            self._wait_for(message, payload, answer)
            return
        if isinstance(message, Holds) and answer is not None:
            self._vote(message, payload, answer)
            return
        if isinstance(message, TellTwins):
            self.twins.told(message)
            return
        if isinstance(message, Where) and answer is not None and message.name != self.state.settings.name:
            if sighting := self.twins.sighting(message):
                answer(sighting)
            return
        if self.twins.is_own(payload):
            return
        if isinstance(message, AskTombstones):
            self._ask_back(message)
        waiting = self._report.roster.waiting
        reply = respond(self.state, message, payload if kind == QUERY else None, waiting=waiting)
        if reply.answer and answer is not None:
            answer(reply.answer)
        self._take_in(reply)

    def _take_in(self, reply: Reply) -> None:
        if reply.tombstones is not None:
            self._hint_at(reply.tombstones)
        if reply.record is not None:
            self.hear(reply.name, reply.record)

    def hear(self, name: str, record: Record) -> None:
        """Keep a record that its owner has signed for the next reconcile, unless the tags have brought it already."""
        with self._sharing:
            known = self.heard.get(name)
            if (known is not None and not record.replaces(known)) or not self._is_news(name, record):
                return
            if known is None and len(self.heard) >= MAX_HEARD:
                return  # the tags bring it as well
            self.heard[name] = record
        self.hint(Hint(Source.MESH, f"record of {name}"))

    def _is_news(self, name: str, record: Record) -> bool:
        """Return whether a reconcile may use a record. One that never counts must not keep out others."""
        if name == self.state.settings.name or record.leaving:
            return False
        return is_news(record, self._applied.hosts.get(name)) and not self._report.roster.ended(
            name, record, time.time()
        )

    def _hint_at(self, tombstones: Tombstones) -> None:
        self.hint(Hint(Source.MESH, "tombstone of " + ", ".join(sorted(tombstones.names))[:80]))

    def _vote(self, question: Holds, payload: bytes, answer: Respond) -> None:
        """Say whether a record is in force here. Nobody speaks for itself, or before it is a host."""
        if question.name == self.state.settings.name or self._report.own is None:
            return
        is_in_force = question.answer(self._report.roster)
        if is_in_force is not None:
            answer(signed(self.state, HOLDS, payload, "" if is_in_force else NOT_IN_FORCE))

    def _wait_for(self, question: Applied, payload: bytes, answer: Respond) -> None:
        if question.name == self.state.settings.name:
            return
        mesh, asked = self.state.mesh, _Waiting(question, answer, time.monotonic() + PATIENCE)
        with self._answering:
            if self._is_answered(payload, asked, mesh):
                return
            if len(self._waiting) >= MAX_WAITING:
                return  # a host asks again
            self._waiting[payload] = asked
        self.hint(READINESS)

    @property
    def is_asked(self) -> bool:
        """Whether another host waits for a reconcile."""
        with self._answering:
            return bool(self._waiting)

    def _answer(self) -> None:
        """Answer those who asked for records that are applied or refused now; the others wait for a later reconcile."""
        mesh = self.state.mesh
        with self._answering:
            now = time.monotonic()
            self._waiting = {
                payload: asked
                for payload, asked in self._waiting.items()
                if asked.until > now and not self._is_answered(payload, asked, mesh)
            }

    def _is_answered(self, payload: bytes, asked: _Waiting, mesh: Mesh) -> bool:
        """Answer if the record that was asked for is applied or refused now. Return whether it is."""
        refusal = self._report.obstacle(asked.question, mesh)
        if refusal is None and not asked.question.is_answered_by(self._applied):
            return False
        try:
            asked.answer(signed(self.state, APPLIED, payload, refusal or ""))
        except MeshdError as error:
            log.debug("answering %s: %s", asked.question.name, error)
        return True

    def _ask_back(self, question: AskTombstones) -> None:
        """Ask a host that knows other tombstones than this one: it may know more."""
        if question.asker not in self._report.roster.hosts:
            return  # anyone with the gossip key can ask under any name
        digest = self.state.roster().all_tombstones.digest
        with self._sharing:
            queued, now = self._jobs.qsize(), time.monotonic()
            self._enqueue(self.asking.asked(question, digest, self._report.roster.hosts, queued=queued, now=now))
