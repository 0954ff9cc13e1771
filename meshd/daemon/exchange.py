"""What this host and the others tell each other over Serf besides the tags: questions, answers and news.

Nothing here decides who is a host. What is heard is either proved by a signature or only a reason to look again, and
nothing needs to arrive: who has heard nothing asks once more.
"""

import logging
import queue
import random
import time
from collections.abc import Callable, Collection
from functools import partial
from threading import Event, Lock

from meshd.errors import MeshdError, SerfError
from meshd.gossip import calls, responder, serf_agent
from meshd.gossip.messages import APPLIED, BURY, GONE, RECORD, YES, GoneQuestion, Question, read_announcement
from meshd.gossip.responder import bury
from meshd.mesh.certificates import CredentialError
from meshd.mesh.membership import Roster
from meshd.mesh.model import Record, Status
from meshd.mesh.records import RecordError
from meshd.mesh.tombstones import Graves
from meshd.reconcile.run import Report
from meshd.state.directory import State

log = logging.getLogger("meshd")

# How long a question waits for the pass that lets it be answered; the asker asks again after its own time-out.
PATIENCE = 5.0
# Seconds before the same thing is asked of the same ones again.
PAUSE = 10.0
# Seconds between asking anybody for tombstones, with no occasion for it; and for as long after a host was lost, between
# asking for its own, which some of the hosts do and tell all; and the longest before asking the authority.
ASK_AGAIN, ASK_LOST, ASKERS = 60.0, 5.0, 5
LONGEST_PAUSE = 300.0
# Seconds until a daemon first asks the authority to confirm a delegation's certificate: a new record, which it makes
# of it, is work for all hosts, and a host that has just joined gives them enough.
CALM = 5.0
ASKED = "serf: asked for readiness"
"""The hint that somebody waits for a pass."""
# Questions that wait at most when a record is to be asked for, and when anything else is; and records that are kept for
# a pass. A thousand bogus members, or askers, must neither keep everybody busy nor stand before what matters more.
MOST_RECORDS, MOST_JOBS, MOST_HEARD = 3, 10, 1000


class Exchange:
    """One daemon's side of the talk. `watch` and `ask` run in threads of their own, `after` after each pass."""

    def __init__(self, state: State, hint: Callable[[str], None], stopping: Event) -> None:
        self.state = state
        self.hint = hint
        self.stopping = stopping
        self.heard: dict[str, Record] = {}
        self._roster = Roster()
        self._applied: dict[str, int] = {}
        self._questions: dict[Question, tuple[Callable[[bytes], None], float]] = {}
        self._answering = Lock()
        # Of `heard` and `_asked_at`, which each thread changes.
        self._sharing = Lock()
        self._asked_up_to = ""
        self._alive: frozenset[str] = frozenset()
        self._lost: frozenset[str] = frozenset()
        self._lost_since = 0.0
        self._announced = 0
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        now = time.monotonic()
        self._asked_at: dict[object, float] = {"confirm": now + CALM, "anybody": now + ASK_AGAIN}
        self._confirm_pause = PAUSE / 2

    def stop(self) -> None:
        self._jobs.put(lambda: None)

    # --- after a pass ----------------------------------------------------------------------------------------------

    def after(self, report: Report) -> None:
        """Answer who has waited for this pass, and take up what it gives reason to ask or to tell."""
        self._applied, self._roster = report.applied, report.roster
        self._answer()
        with self._sharing:
            self.heard = {n: r for n, r in self.heard.items() if self._is_news(n, r)}
        if not report.members:
            return
        # Whoever has the gossip key makes any number of members, which are refused.
        hosts = report.roster.hosts
        alive = frozenset(m.name for m in report.members if m.status is Status.ALIVE and m.name in hosts)
        newcomers, self._alive = alive - self._alive, alive
        # Who meets many at once has been away itself; a single newcomer asks by itself.
        away = bool(newcomers) and len(newcomers) * 2 >= len(alive)
        if away:
            self._ask_soon(partial(self._ask_gone, newcomers), newcomers)
        if alive and sum(m.status is Status.ALIVE for m in report.members) > 2 * (len(alive) + 1):
            # Serf passes on what it hears to members picked at random: so many who are no hosts swallow nearly all.
            self._ask_soon(self._meet_anybody, "met")
        self._ask_whether_gone(frozenset(report.lost), alive)
        # Messages get lost. The larger the mesh, the more others ask.
        self._ask_soon(self._ask_anybody, "anybody", max(ASK_AGAIN, len(alive)))
        self._announce(again=away)
        self._ask_for_records(report)
        self._ask_for_confirmation()

    def _announce(self, *, again: bool) -> None:
        claim = self.state.claim()
        if claim is not None and self._alive and (again or claim.record.seq != self._announced):
            self._announced = claim.record.seq
            self._jobs.put(partial(calls.announce, self.state, claim.record))

    def _ask_whether_gone(self, lost: frozenset[str], alive: frozenset[str]) -> None:
        """Ask for the goodbyes of lost hosts, which they may have said where nobody here heard it."""
        now, own = time.monotonic(), self.state.settings.name
        if lost != self._lost:
            self._lost, self._lost_since = lost, now
        if not lost or now >= self._lost_since + ASK_AGAIN:
            return
        if own in random.sample(sorted({*alive, own}), min(len(alive) + 1, ASKERS)):
            self._ask_soon(partial(self._ask_gone, alive), ("lost", lost), ASK_LOST)

    def _ask_for_records(self, report: Report) -> None:
        """Ask the others for who cannot be read here: anybody with the gossip key can spoil tags."""
        unknown = [name for name in report.roster.refused if name not in report.roster.hosts]
        hosts = self._alive & report.roster.hosts.keys()
        for name in random.sample(unknown, min(len(unknown), MOST_RECORDS)) if hosts else ():
            self._ask_soon(partial(self._ask_record, name, hosts), name, room=MOST_RECORDS)

    def _ask_for_confirmation(self) -> None:
        if self._alive and self.state.certificate.delegation is not None:
            self._ask_soon(self._ask_confirmation, "confirm", self._confirm_pause)

    def _ask_soon(self, job: Callable[[], None], what: object, pause: float = PAUSE, *, room: int = MOST_JOBS) -> None:
        now = time.monotonic()
        with self._sharing:
            self._asked_at = {key: until for key, until in self._asked_at.items() if until > now}
            if what not in self._asked_at and self._jobs.qsize() < room:
                self._asked_at[what] = now + pause
                self._jobs.put(job)

    # --- asking ----------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask and tell, one thing after the other, until `stopping` is set."""
        while not self.stopping.is_set():
            job = self._jobs.get()
            try:
                job()
            except MeshdError as error:
                log.debug("asking the others: %s", error)

    def _ask_gone(self, names: Collection[str]) -> None:
        if not names:
            return
        known = self.state.roster().graves
        found, self._asked_up_to = calls.ask_gone(self.state, names, known, self._asked_up_to)
        if self._bury(found):
            # The others may have been away together with this host.
            calls.tell_gone(self.state, found.without(known))

    def _ask_anybody(self) -> None:
        self._ask_gone(self._anybody())

    def _meet_anybody(self) -> None:
        calls.meet(self.state, self._anybody(), calls.TELL, replay=True)

    def _anybody(self) -> Collection[str]:
        alive = sorted(self._alive)
        return random.sample(alive, min(1, len(alive)))

    def _ask_record(self, name: str, of: Collection[str]) -> None:
        record = calls.ask_record(self.state, name, of)
        if record is not None:
            self._hear(name, record)

    def _ask_confirmation(self) -> None:
        if calls.confirm(self.state):
            log.info("the authority has confirmed this host's certificate")
            self.hint("serf: certificate confirmed")
        else:
            self._confirm_pause = min(self._confirm_pause * 2, LONGEST_PAUSE)

    # --- hearing and answering -------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Hear the others' questions and news until the connection breaks. Raises SerfError."""
        with serf_agent.rpc(self.state) as client:
            for event in client.stream(f"query,user:{GONE},user:{RECORD}"):
                name, payload, identity = event["Name"], event.get("Payload"), event.get("ID")
                if not isinstance(payload, bytes):
                    continue
                if event["Event"] == "user":
                    self._told(name, payload)
                elif isinstance(identity, int):
                    self._asked(name, payload, partial(client.respond, identity))

    def _told(self, name: str, payload: bytes) -> None:
        if name == GONE:
            self._bury(Graves.read(payload))
        elif name == RECORD and (news := read_announcement(payload)) is not None:
            try:
                record = calls.read_record(self.state, news[1])
                self.state.mesh.trust.check(news[0], record)
            except (RecordError, CredentialError) as error:
                log.debug("a record of %s: %s", news[0], error)
                return
            self._hear(news[0], record)

    def _hear(self, name: str, record: Record) -> None:
        """Keep a record that its owner has signed for the next pass, unless the tags have brought it already."""
        with self._sharing:
            known = self.heard.get(name)
            if (known is not None and record.seq <= known.seq) or not self._is_news(name, record):
                return
            if known is None and len(self.heard) >= MOST_HEARD:
                return  # the tags bring it as well
            self.heard[name] = record
        self.hint(f"serf: record of {name}")

    def _is_news(self, name: str, record: Record) -> bool:
        """Tell whether a pass may make something of a record: one that never counts must not stand before others."""
        if name == self.state.settings.name or record.leaving or record.seq <= self._applied.get(name, 0):
            return False
        return not self._roster.ended(name, record, time.time())

    def _bury(self, graves: Graves) -> bool:
        if not graves or not bury(self.state, graves):
            return False
        names = [*graves.gone, *(r.name for r in graves.revoked.values())]
        self.hint("serf: goodbye of " + ", ".join(sorted(set(names)))[:80])
        return True

    def _asked(self, name: str, payload: bytes, respond: Callable[[bytes], None]) -> None:
        if name == APPLIED:
            self._asked_for_readiness(payload, respond)
            return
        if name == GONE and (question := GoneQuestion.parse(payload)) is not None:
            self._ask_back(question)
        if name == BURY:
            self._bury(Graves.read(payload))
        if answer := responder.answer(self.state, name, payload):
            respond(answer)

    def _asked_for_readiness(self, payload: bytes, respond: Callable[[bytes], None]) -> None:
        question = Question.parse(payload)
        if question is None or question.name == self.state.settings.name:
            return
        with self._answering:
            self._questions[question] = (respond, time.monotonic() + PATIENCE)
        self._answer()
        if not question.answered_by(self._applied):
            self.hint(ASKED)

    @property
    def is_asked(self) -> bool:
        """Whether somebody waits for a pass."""
        with self._answering:
            return bool(self._questions)

    def _answer(self) -> None:
        """Say yes to those who asked for records that are applied now; the others wait for a later pass."""
        with self._answering:
            now = time.monotonic()
            waiting = {q: (respond, until) for q, (respond, until) in self._questions.items() if until > now}
            for question in [q for q in waiting if q.answered_by(self._applied)]:
                respond, _ = waiting.pop(question)
                try:
                    respond(YES)
                except SerfError as error:
                    log.debug("answering %s: %s", question.name, error)
            self._questions = waiting

    def _ask_back(self, question: GoneQuestion) -> None:
        """Ask who knows other tombstones than this host: it may know more."""
        if question.asker in self._roster.hosts and question.digest != self.state.roster().graves.digest:
            asker = frozenset({question.asker})
            # Anybody with the gossip key can ask in any host's name.
            self._ask_soon(partial(self._ask_gone, asker), asker, room=MOST_JOBS // 2)
