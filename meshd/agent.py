"""The daemon: keeps Serf running, collects hints from everywhere, and makes a pass for them.

It decides nothing by itself. Killing it changes no peer, no route and no packet: Serf and WireGuard go on, and the
next daemon adopts them.
"""

import logging
import os
import queue
import random
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from threading import Event, Lock, Thread

from meshd import bridge, files, firewall, gossip, links, plan, routes, rules, serf
from meshd.errors import InputError, MeshdError, SerfError
from meshd.model import Goodbye, Status
from meshd.queries import APPLIED, GONE, GoneQuestion, Question, answer_gone, digest, read_page
from meshd.reconcile import MEMBERSHIP, WITHOUT_DOCKER, Report, bury, reconcile, renumber
from meshd.state import State

log = logging.getLogger("meshd")

# A full pass at least this often: what the kernel does not notify (a flushed rule, a sysctl) is found by it.
INTERVAL = 10.0
# Hints of one cause come in bursts; this is what the first one waits for the others.
SETTLE = 0.02
RETRY = 1.0
# How long a question waits for the pass that lets it be answered; the asker asks again after its own time-out.
PATIENCE = 5.0
# Seconds between asking anybody for goodbyes, with no occasion for it.
ASK_AGAIN = 60.0
LONGEST_SEARCH = 10.0
LOG_LIMIT = 4 * 2**20


class Agent:
    """One daemon for one state directory. `run` returns after `stop`, or raises MeshdError if one runs already."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.hints: queue.Queue[str] = queue.Queue()
        self.stopping = Event()
        self.questions: dict[Question, tuple[Callable[[bytes], None], float]] = {}
        self.asking = Lock()
        self.search = Event()
        self.applied: dict[str, int] = {}
        self.alive: frozenset[str] = frozenset()
        self.rivalry: float | None = None
        self.to_ask: queue.Queue[frozenset[str]] = queue.Queue()
        self.complaints: set[str] = set()
        self.report = Report()

    def run(self) -> None:
        settings = self.state.settings
        if self.state.is_down:
            raise InputError(f"the mesh {settings.mesh} is down on this host: run 'meshd up'")
        with self.state.agent_lock():
            log.info("meshd of mesh %s on %s starts", settings.mesh, settings.name)
            self._start_threads()
            self._loop()
            log.info("meshd stops; tunnels, routes and Serf go on without it")

    def stop(self) -> None:
        self.stopping.set()
        self.search.set()
        self.hints.put("stop")
        self.to_ask.put(frozenset())

    def hint(self, text: str) -> None:
        self.hints.put(text)

    def _start_threads(self) -> None:
        settings = self.state.settings
        names = {settings.wireguard, settings.bridge} if settings.docker else {settings.wireguard}
        watches: list[Callable[[], None]] = [
            self._listen,
            self._watch_log,
            self._watch_serf,
            self._ask_for_goodbyes,
            self._rejoin,
            lambda: links.watch(names, routes.PROTOCOL, self.hint, self.stopping),
            lambda: firewall.watch(rules.table_name(settings.wireguard), self.hint, self.stopping),
        ]
        if settings.docker:
            watches.append(lambda: bridge.watch(settings.bridge, self.hint, self.stopping))
        for watch in watches:
            Thread(target=self._forever, args=(watch,), daemon=True).start()

    def _forever(self, watch: Callable[[], None]) -> None:
        """Watch again whatever ends it: what a watch misses only the timer finds."""
        while not self.stopping.is_set():
            try:
                watch()
            except MeshdError as error:
                log.debug("%s", error)
            except Exception:
                log.exception("a watch failed, which is a mistake in meshd; it begins again")
            self.stopping.wait(RETRY / 2)

    # --- the loop --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        # At boot dockerd waits for this first pass, and until it runs systemd's docker.socket lets every question hang.
        if self._keep_serf():
            self._pass(["start"], WITHOUT_DOCKER)
        _notify_service_manager()
        full_pass_due, hints = 0.0, ["start"]
        while not self.stopping.is_set():
            full = time.monotonic() >= full_pass_due or not all(hint.startswith("serf:") for hint in hints)
            if full:
                self._follow_underlay()
            ok = self._keep_serf() and self._pass(hints, plan.ORDER if full else MEMBERSHIP)
            if full:
                full_pass_due = time.monotonic() + INTERVAL
                _trim(self.state)
            hints = self._wait(min(INTERVAL, max(0.0, full_pass_due - time.monotonic())) if ok else RETRY)

    def _wait(self, timeout: float) -> list[str]:
        """Give the hints that came, an empty list if none did for `timeout` seconds."""
        try:
            hints = [self.hints.get(timeout=timeout)]
        except queue.Empty:
            return []
        self.stopping.wait(SETTLE)
        while not self.hints.empty():
            hints.append(self.hints.get())
        return sorted(set(hints))

    def _follow_underlay(self) -> None:
        try:
            if gossip.follow_underlay(self.state):
                log.warning("this host's underlay address is now %s", self.state.settings.bind)
        except MeshdError as error:
            log.debug("underlay: %s", error)

    def _keep_serf(self) -> bool:
        if serf.running(self.state.serf_config) is not None:
            return True
        try:
            with gossip.start(self.state):
                log.info("serf started")
                self.search.set()
        except MeshdError as error:
            self._complain({f"serf: {error}"})
            return False
        return True

    def _pass(self, hints: list[str], kinds: Collection[str]) -> bool:
        """Make a pass; what went wrong is logged once, not in each pass. True unless something failed."""
        claim = self.state.claim()
        if claim is None or not claim.settled:
            return True  # `meshd join` is still asking the mesh
        try:
            self.report = reconcile(self.state, kinds=kinds)
        except MeshdError as error:
            if not self.state.is_down:  # or `meshd down` is about to end this daemon
                self._complain({str(error)})
            return False
        report = self.report
        for change in report.changes:
            log.info("%s (seen by %s)", change, ", ".join(hints) or "timer")
        reasons = {f"refused {name}: {reason}" for name, reason in report.roster.refused.items()}
        held = {f"withheld without evidence: {change} (meshd sync --force does it)" for change in report.withheld}
        self._complain({str(failure) for failure in report.failures} | reasons | held)
        self.applied = report.applied
        self._answer()
        self._notice_newcomers(report)
        self._yield_subnet(report)
        return not report.failures

    def _complain(self, complaints: set[str]) -> None:
        for text in sorted(complaints - self.complaints):
            log.warning("%s", text)
        for text in sorted(self.complaints - complaints):
            log.info("no longer: %s", text)
        self.complaints = complaints

    def _answer(self) -> None:
        """Say yes to those who asked for records that are applied now; the others wait for a later pass."""
        with self.asking:
            waiting = {
                q: (respond, until) for q, (respond, until) in self.questions.items() if until > time.monotonic()
            }
            for question in [q for q in waiting if q.answered_by(self.applied)]:
                respond, _ = waiting.pop(question)
                try:
                    respond(Question.YES)
                except SerfError as error:
                    log.debug("answering %s: %s", question.name, error)
            self.questions = waiting

    # --- where hints come from -------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Take hints from the handler scripts: a datagram each, never answered."""
        path = self.state.socket
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            before = os.umask(0o177)
            server.bind(str(path))
            os.umask(before)
            server.settimeout(0.5)
            while not self.stopping.is_set():
                try:
                    text = server.recv(512)
                except TimeoutError:
                    continue
                self.hint("".join(c if c.isprintable() else "?" for c in text.decode(errors="replace")))
        path.unlink(missing_ok=True)

    def _watch_log(self) -> None:
        """Hint at member events as Serf logs them: 1 to 3 s before its handlers and streams hear of them."""
        with gossip.rpc(self.state) as client:
            self.hint("serf: connected")
            try:
                for line in client.monitor("INFO"):
                    if "serf: EventMember" in line:
                        self.hint("serf: " + line.partition("serf: ")[2][:80])
            finally:
                self.hint("serf: connection lost")

    def _watch_serf(self) -> None:
        """Answer the others' questions, and hear the goodbyes that they tell of."""
        with gossip.rpc(self.state) as client:
            for event in client.stream(f"query,user:{GONE}"):
                name, payload, identity = event["Name"], event.get("Payload"), event.get("ID")
                if not isinstance(payload, bytes):
                    continue
                if event["Event"] == "user":
                    self._bury(read_page(payload))
                elif isinstance(identity, int):
                    self._asked(name, payload, partial(client.respond, identity))

    def _asked(self, name: str, payload: bytes, respond: Callable[[bytes], None]) -> None:
        if name == APPLIED:
            question = Question.parse(payload)
            if question is None or question.name == self.state.settings.name:
                return
            with self.asking:
                self.questions[question] = (respond, time.monotonic() + PATIENCE)
            self._answer()
            if not question.answered_by(self.applied):
                self.hint("serf: asked for readiness")
        elif name == GONE and (gone_question := GoneQuestion.parse(payload)) is not None:
            gone = self.state.roster().gone
            if answer := answer_gone(gone_question, gone):
                respond(answer)
            if gone_question.digest != digest(gone) and gone_question.asker != self.state.settings.name:
                # Who knows others than this host may know more than this host.
                self.to_ask.put(frozenset({gone_question.asker}))

    def _bury(self, gone: Mapping[str, Goodbye]) -> bool:
        if not bury(self.state, gone):
            return False
        self.hint("serf: goodbye of " + ", ".join(sorted(gone))[:80])
        return True

    def _notice_newcomers(self, report: Report) -> None:
        """After a start or a healed partition, ask for the goodbyes that were said meanwhile.

        Who meets many at once has been away itself; a single newcomer asks by itself.
        """
        if not report.members:
            return
        own = self.state.settings.name
        alive = frozenset(m.name for m in report.members if m.status is Status.ALIVE and m.name != own)
        newcomers, self.alive = alive - self.alive, alive
        if newcomers and len(newcomers) * 2 >= len(alive):
            self.to_ask.put(newcomers)

    def _yield_subnet(self, report: Report) -> None:
        """Move to another subnet if a rival's claim to this one stands for a while and nobody here uses it.

        What is heard first after a partition may be void in a moment: goodbyes arrive after the members.
        """
        if report.rival is None or self.state.settings.subnet is not None:
            self.rivalry = None
            return
        self.rivalry = self.rivalry or time.monotonic()
        if time.monotonic() - self.rivalry < PATIENCE:
            return
        try:
            record = renumber(self.state)
        except MeshdError as error:
            log.debug("renumber: %s", error)
            return
        log.warning("%s has the subnet of this host, which moves to %s", report.rival, record.subnet)
        self.rivalry = None
        self.hint("subnet: moved")

    def _ask_for_goodbyes(self) -> None:
        asked: dict[frozenset[str], float] = {}
        while not self.stopping.is_set():
            try:
                names = self.to_ask.get(timeout=max(ASK_AGAIN, len(self.alive)))
            except queue.Empty:
                # Messages get lost. The larger the mesh, the more others ask.
                names = frozenset(random.sample(sorted(self.alive), min(1, len(self.alive))))
            if not names or time.monotonic() - asked.get(names, -INTERVAL) < INTERVAL:
                continue
            asked = {**{n: t for n, t in asked.items() if time.monotonic() - t < INTERVAL}, names: time.monotonic()}
            try:
                known = self.state.roster().gone
                found = gossip.ask_gone(self.state, names, known)
                if self._bury(found):
                    # The others may have been away together with this host.
                    gossip.tell_gone(self.state, {n: g for n, g in found.items() if known.get(n) != g})
            except MeshdError as error:
                log.debug("asking for goodbyes: %s", error)

    def _rejoin(self) -> None:
        """Look for the hosts that Serf has lost, more and more rarely while the same ones stay lost."""
        pause, before = RETRY, set[str]()
        while not self.stopping.is_set():
            if self.search.wait(pause):
                self.search.clear()
                pause = RETRY
            try:
                with gossip.rpc(self.state) as client:
                    lost = gossip.lost(self.state, client.members())
                joined = gossip.rejoin(self.state, lost)
            except MeshdError as error:
                log.debug("rejoin: %s", error)
                continue
            pause = RETRY if joined or set(lost) != before else min(pause * 2, LONGEST_SEARCH)
            before = set(lost)


def run(state: State) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    agent = Agent(state)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()


def _notify_service_manager() -> None:
    """Tell systemd that the first pass is over, so that dockerd starts after the bridge is there (sd_notify(3))."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def _trim(state: State) -> None:
    """Keep the logs that Serf and a detached daemon append to from filling the disk."""
    for path in (state.serf_log, state.agent_log):
        if path.exists() and path.stat().st_size > LOG_LIMIT:
            content = files.read(path, 2 * path.stat().st_size) or b""
            with path.open("r+b") as file:
                file.write(content[-LOG_LIMIT // 4 :])
                file.truncate()
