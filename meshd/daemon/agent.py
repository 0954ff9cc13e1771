"""The daemon: keeps Serf running, collects hints from everywhere, and reconciles for them.

It decides nothing by itself. Killing it changes no peer, no route and no packet: Serf and WireGuard go on, and the
next daemon adopts them.
"""

import gc
import logging
import os
import queue
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from threading import Event, Thread

from meshd import files
from meshd.daemon import hints, twins
from meshd.daemon.complaints import Complaints
from meshd.daemon.exchange import PATIENCE, Exchange
from meshd.daemon.follow import Follower, follow
from meshd.daemon.hints import ABOUT_MEMBERS, READINESS, Echoes, Hint, Source
from meshd.daemon.keeper import Keeper
from meshd.daemon.log import configure as configure_log
from meshd.daemon.prober import Prober
from meshd.errors import InputError, MeshdError
from meshd.gossip import calls, serf, serf_agent
from meshd.net import docker, firewall, links, rules
from meshd.net.resources import Engine
from meshd.reconcile import plan
from meshd.reconcile.handshakes import Schedule
from meshd.reconcile.machine import Area
from meshd.reconcile.renumber import renumber
from meshd.reconcile.run import MEMBERSHIP, WITHOUT_DOCKER, Options, Report, sync
from meshd.state.claim import UnfinishedError
from meshd.state.directory import State

log = logging.getLogger("meshd")

# Everything is read at least this often, which finds what the kernel does not report (a flushed rule, a sysctl). The
# cost grows with the hosts, and so does the interval beyond 200 of them: it stays below 0.3 % of a core.
INTERVAL, LONGEST_INTERVAL = 10.0, 60.0
HOSTS_A_SECOND = 20
# Hints of one cause come in bursts; this is what the first one waits for the others.
SETTLE = 0.02
RETRY = 1.0
LONGEST_SEARCH = 10.0
# Seconds in which a host that began with an empty list of hosts may have met a thief before the owner.
PROBATION = 600.0
# How often a thread that waits for hints looks whether it is to end. The process does not wait for it.
LOOK = 2.0
LOG_LIMIT = 4 * 2**20
# Garbage collection threshold. A reconcile keeps about 20 objects per host until it ends. With Python's default, 700,
# a quarter of a reconcile with 10,000 hosts goes into collections that free nothing.
GARBAGE = 20_000


class Agent:
    """One daemon for one state directory. `run` returns after `stop`, or raises MeshdError if one runs already."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.hints: queue.SimpleQueue[Hint] = queue.SimpleQueue()
        self.ending = False
        self.stopping = Event()
        self.exchange = Exchange(state, self.hints.put, self.stopping)
        self.prober = Prober(state, self.hints.put, self.stopping)
        self.search = Event()
        self.rivalry: float | None = None
        # Until when what this host has taken for somebody's may be another host's (see conflicts.disputes).
        self.newcomer_until = 0.0
        self.handshakes = Schedule()
        self.follower = Follower()
        self.full_sync_due = 0.0
        self.complaints = Complaints()
        self.keeper = Keeper(state, partial(self.hint, Source.LOG), self._search_all)
        # Why this host's Serf does not run, the empty string while it does.
        self.silence = ""
        self.echoes = Echoes()
        self.engine: Engine | None = None
        self.report = Report()
        self.lost: frozenset[str] = frozenset()
        # Who acts on a finished reconcile, in this order.
        self.listeners: list[Callable[[Report], None]] = [
            self._search_lost,
            self._schedule_handshakes,
            self._say_what_is_wrong,
            self.exchange.after,
            self.prober.after,
            self._yield_subnet,
        ]

    def run(self) -> None:
        settings = self.state.settings
        if self.state.is_down:
            raise InputError(f"the mesh {settings.mesh} is down on this host: run 'meshd up'")
        # Before the lock: who waits for the daemon waits for this as well, and nobody lays a tunnel meanwhile.
        with suppress(MeshdError):
            follow(self.state, self.follower, time.monotonic())
        twins.settle(self.state)
        with self.state.agent_lock():
            log.info("meshd of mesh %s on %s starts", settings.mesh, settings.name)
            with suppress(MeshdError):  # of a damaged file, which each reconcile reports
                self.newcomer_until = 0.0 if self.state.roster().hosts else time.monotonic() + PROBATION
            self._start_threads()
            self._loop()
            self.stopping.set()
            self.search.set()
            self.exchange.stop()
            log.info("meshd stops; tunnels, routes and Serf go on without it")

    def stop(self) -> None:
        """End `run` after its reconcile. A signal handler may call this: nothing in it waits for a lock."""
        self.ending = True
        self.hint(Source.DAEMON, "stop")

    def hint(self, source: Source, text: str) -> None:
        """Have the loop look again."""
        self.hints.put(Hint(source, text))

    def _start_threads(self) -> None:
        settings = self.state.settings
        names = {settings.wireguard, settings.bridge} if settings.docker else {settings.wireguard}
        table = rules.table_name(settings.wireguard)
        watches: list[Callable[[], None]] = [
            self._listen,
            self._watch_log,
            self.exchange.watch,
            self.exchange.ask,
            self.exchange.twins.watch,
            self.prober.measure,
            self._rejoin,
            self.keeper.watch,
            partial(links.watch, names, settings.overlay, partial(self.hint, Source.NETLINK), self.stopping),
            partial(firewall.watch, table, partial(self.hint, Source.NFTABLES), self.stopping),
        ]
        if settings.docker:
            changed, restarted = partial(self.hint, Source.DOCKER), partial(self.hint, Source.ENGINE)
            watches.append(partial(docker.watch, settings.bridge, changed, restarted, self.stopping))
        for watch in watches:
            Thread(target=self._forever, args=(watch,), daemon=True).start()

    def _forever(self, watch: Callable[[], None]) -> None:
        """Restart a watch whatever ended it: what a watch misses only the timer finds."""
        told = ""
        while not self.stopping.is_set():
            try:
                watch()
            except MeshdError as error:
                log.debug("%s", error)
            except Exception as error:
                if (text := repr(error)) != told:
                    log.exception("internal error (a bug in meshd), watching again:")
                told = text
            self.stopping.wait(RETRY / 2)

    # --- the loop --------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        # At boot dockerd waits for this first reconcile, and until it runs, systemd's docker.socket lets every question
        # hang.
        causes = [Hint(Source.DAEMON, "start")]
        self._survive(partial(self._sync, causes, WITHOUT_DOCKER))
        _notify_service_manager()
        while not self.ending:
            ok = self._survive(partial(self._sync_that_is_due, causes))
            due = min(self.full_sync_due, self.handshakes.due, self.keeper.due)
            causes = self._wait(max(0.0, due - time.monotonic()) if ok else RETRY)

    def _survive(self, work: Callable[[], bool]) -> bool:
        """Return whether this went well. Nothing that goes wrong ends the daemon, which is the one to try again."""
        try:
            return work()
        except MeshdError as error:
            self._complain({str(error)})
        except Exception as error:
            text = f"internal error (a bug in meshd), retrying: {error!r}"
            if text not in self.complaints:
                log.exception("internal error:")
            self._complain({text})
        return False

    def _sync_that_is_due(self, causes: list[Hint]) -> bool:
        full = time.monotonic() >= self.full_sync_due or not all(hint.source in ABOUT_MEMBERS for hint in causes)
        if full:
            self.full_sync_due = time.monotonic() + INTERVAL
            self.state.reload_settings()
            is_reachable = self._follow_underlay()
        ok = self._sync(causes, plan.ORDER if full else MEMBERSHIP)
        if full:
            interval = _interval(len(self.report.roster.hosts)) if ok else INTERVAL
            self.full_sync_due = time.monotonic() + (interval if is_reachable else RETRY)
            _trim(self.state)
        return ok

    def _wait(self, timeout: float) -> list[Hint]:
        """Return the hints that came, an empty list if none did for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                found = [self.hints.get(timeout=max(0.0, deadline - time.monotonic()))]
            except queue.Empty:
                return []
            time.sleep(SETTLE)
            while not self.hints.empty():
                found.append(self.hints.get())
            if news := [hint for hint in found if not self._is_echo(hint)]:
                return sorted(set(news))

    def _is_echo(self, hint: Hint) -> bool:
        if hint == READINESS:
            return not self.exchange.is_asked  # the last reconcile may have answered it
        return self.echoes.repeats(hint, time.monotonic())

    def _follow_underlay(self) -> bool:
        """Move to the address where this host should be now; False while another one may come at any time."""
        try:
            place = follow(self.state, self.follower, time.monotonic())
        except MeshdError as error:
            log.debug("underlay: %s", error)
            return False
        if place is not None:
            log.warning("this host's underlay address is now %s of %s", place.address, place.link)
        return not self.follower.waits

    def _sync(self, causes: list[Hint], kinds: Collection[str]) -> bool:
        """Reconcile; return whether nothing failed. What went wrong is logged once, not each time.

        Without Serf no new host is found, and what is known is kept up all the same.
        """
        self.silence = self.keeper.keep()
        if any(hint.source is Source.ENGINE for hint in causes):
            self.engine = None
        options = Options(
            kinds=kinds,
            heard=dict(self.exchange.heard),
            votes=dict(self.exchange.votes),
            is_newcomer=time.monotonic() < self.newcomer_until,
            overdue=self.handshakes.overdue(time.monotonic()),
            mtus=self.prober.mtus,
            beyond=self.exchange.twins.beyond,
            engine=self.engine,
            unended=self.report.unended,
            alone=bool(self.silence),
        )
        try:
            report = sync(self.state, options)
        except UnfinishedError:
            self.handshakes = Schedule()
            self._complain(set())
            return not self.silence  # `meshd join` is still asking the mesh
        except MeshdError as error:
            if not self.state.is_down:  # or `meshd down` is about to end this daemon
                self._complain({str(error)})
            return False
        undone = {failure.subject for failure in report.failed(Area.CHANGE)}
        for change in (c for c in report.changes if str(c) not in undone):
            log.info("%s (seen by %s)", change, ", ".join(map(str, causes)) or "timer")
        self.echoes.expect(Hint(Source.NETLINK, text) for text in links.told(report.changes))
        self.engine = report.engine or self.engine
        self.report = report
        for listener in self.listeners:
            listener(report)
        return not report.failures and not self.silence

    # --- after a reconcile -----------------------------------------------------------------------------------------

    def _search_all(self) -> None:
        """Have the next reconcile search every host that Serf does not know: one that has just started knows none."""
        self.lost = frozenset()

    def _search_lost(self, report: Report) -> None:
        if report.lost.keys() - self.lost:
            self.search.set()
        self.lost = frozenset(report.lost)

    def _schedule_handshakes(self, report: Report) -> None:
        if report.unmet is not None:
            hosts, now = len(report.roster.hosts), time.monotonic()
            self.handshakes = self.handshakes.after(report.unmet, report.restarted, hosts=hosts, now=now)

    def _say_what_is_wrong(self, report: Report) -> None:
        self._complain(self.complaints.of(report, time.monotonic()))

    def _complain(self, texts: set[str]) -> None:
        self.complaints.log(texts | {self.silence} if self.silence else texts)

    # --- where hints come from -------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Take hints from the handler scripts: a datagram each, never answered."""
        path = self.state.socket
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            before = os.umask(0o177)
            server.bind(str(path))
            os.umask(before)
            server.settimeout(LOOK)
            while not self.stopping.is_set():
                try:
                    datagram = server.recv(hints.LENGTH)
                except TimeoutError:
                    continue
                self.hints.put(hints.read(datagram))
        path.unlink(missing_ok=True)

    def _watch_log(self) -> None:
        """Hint at member events as Serf logs them: 1 to 3 s before its handlers and streams hear of them."""
        with serf_agent.rpc(self.state) as client:
            pid = serf.running(self.state.serf_config)
            self.keeper.adopt(pid)
            self.hint(Source.LOG, "connected")
            try:
                for line in client.monitor("INFO"):
                    self.keeper.hear(line, pid)
                    self.exchange.twins.hear(line)
                    if "serf: EventMember" in line:
                        self.echoes.logged(time.monotonic())
                        self.hint(Source.LOG, line.partition("serf: ")[2][:80])
            finally:
                self.hint(Source.LOG, "connection lost")

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
        self.hint(Source.DAEMON, "the subnet moved")

    def _rejoin(self) -> None:
        """Look for the hosts that Serf has lost, more and more rarely while the same ones stay lost."""
        pause, before = RETRY, set[str]()
        while not self.stopping.is_set():
            if self.search.wait(pause if self.report.lost else None):
                self.search.clear()
                pause = RETRY
            lost = self.report.lost
            try:
                joined = calls.rejoin(self.state, lost.values())
            except MeshdError as error:
                log.debug("rejoin: %s", error)
                continue
            pause = RETRY if joined or set(lost) != before else min(pause * 2, LONGEST_SEARCH)
            before = set(lost)


def run(state: State) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT."""
    configure_log(sys.stderr)
    gc.set_threshold(GARBAGE)
    agent = Agent(state)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()


def _interval(hosts: int) -> float:
    """Return the seconds from one full reconcile to the next."""
    return min(max(INTERVAL, hosts / HOSTS_A_SECOND), LONGEST_INTERVAL)


def _notify_service_manager() -> None:
    """Tell systemd that the first reconcile is over, so that dockerd finds the bridge (sd_notify(3))."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def _trim(state: State) -> None:
    """Keep the logs that Serf and a detached daemon append to from filling the disk."""
    for path in (state.serf_log, state.agent_log):
        with suppress(OSError, MeshdError):
            size = path.stat().st_size
            if size > LOG_LIMIT:
                content = files.read(path, 2 * size) or b""
                with path.open("r+b") as file:
                    file.write(content[-LOG_LIMIT // 4 :])
                    file.truncate()
