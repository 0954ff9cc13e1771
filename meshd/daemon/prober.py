"""The thread that measures the path MTU of each peer, and what it found until a reconcile takes it up.

paths.py decides what is sent and what follows; here pings are sent and heard.
"""

import logging
import random
import selectors
import time
from collections.abc import Callable, Iterable, Mapping
from threading import Event

from meshd.daemon.hints import Hint, Source
from meshd.errors import MeshdError
from meshd.mesh.model import Host
from meshd.net import icmp
from meshd.net.resources import Peer, Resource
from meshd.reconcile import paths
from meshd.reconcile.machine import wireguard
from meshd.reconcile.paths import Path
from meshd.reconcile.run import Report
from meshd.state.directory import State

log = logging.getLogger("meshd")

# Seconds from one look at the traffic of all peers together to the next.
LOOK = 0.5
# So many paths are measured at a time: a mesh that boots has to measure all of them.
AT_ONCE = 16
# What each peer has sent is read only while there is traffic, and more rarely the more peers there are.
PEERS_A_SECOND = 100


class Prober:
    """One daemon's measurements. `measure` runs in a thread of its own, `after` after each reconcile.

    `mtus` are the path MTUs that are known, by public key; 0 for a path that is as wide as the overlay's MTU.
    """

    def __init__(self, state: State, hint: Callable[[Hint], None], stopping: Event) -> None:
        self.state = state
        self.hint = hint
        self.stopping = stopping
        self.mtus: Mapping[str, int] = {}
        self._report = self._taken = Report()
        self._hosts: dict[str, Host] = {}
        # What the routes have, also by an earlier daemon.
        self._kept: Mapping[str, int] = {}
        self._paths: dict[str, Path] = {}
        self._full = 0
        # When the peers were read last, and how much all of them had been sent by then.
        self._read_at, self._sent = float("-inf"), 0
        self._random = random.Random()  # noqa: S311  no secret
        self._pings: dict[str, icmp.Pings] = {}

    def after(self, report: Report) -> None:
        """Take up the peers that a reconcile has seen."""
        self._report = report

    def measure(self) -> None:
        """Measure what is due until `stopping` is set. Raises ApplyError if the link cannot be looked at."""
        with selectors.DefaultSelector() as selector:
            try:
                look_at = float("-inf")
                while not self.stopping.is_set():
                    self._take_up()
                    if time.monotonic() >= look_at:
                        self._look()
                        look_at = time.monotonic() + LOOK
                    self._begin(selector)
                    if self._pings:
                        self._go_on(selector)
                        self._publish()
                    self._hear(selector, look_at)
            finally:
                for key in [*self._pings]:
                    self._close(selector, key)
                self._paths = {}

    # --- which paths there are -------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        report = self._report
        if report is not self._taken and report.unmet is not None:
            self._taken = report
            self._hosts = {record.public_key: Host(name, record) for name, record in report.roster.hosts.items()}
            self._kept = report.mtus
            self._observe(report.peers)

    def _look(self) -> None:
        """Read the peers while there is traffic that is worth it, and when the link's MTU has changed."""
        link = self.state.settings.wireguard
        full, sent = icmp.link_mtu(link), icmp.sent_bytes(link)
        pause = max(paths.EVERY, len(self._paths) / PEERS_A_SECOND)
        is_busy = sent - self._sent > paths.quiet(full) and time.monotonic() - self._read_at >= pause
        if full != self._full or is_busy or sent < self._sent:
            self._full = full
            self._observe(wireguard(self.state).read())

    def _observe(self, found: Iterable[Resource]) -> None:
        if not self._full:
            return  # before the first look
        self._read_at, self._sent = time.monotonic(), icmp.sent_bytes(self.state.settings.wireguard)
        peers = {r.public_key: r for r in found if isinstance(r, Peer) and r.public_key in self._hosts}
        self._paths = paths.observe(self._paths, peers, self._full, now=self._read_at, kept=self._kept)
        self._publish()

    # --- measuring -------------------------------------------------------------------------------------------------

    def _begin(self, selector: selectors.BaseSelector) -> None:
        """Begin the measurements that are due, first of the peers that have answered before."""
        free, now, unix = AT_ONCE - len(self._pings), time.monotonic(), time.time()
        if free <= 0:
            return
        due = [
            (path.misses, path.due, key)
            for key, path in self._paths.items()
            if path.is_due(now=now, unix=unix) and key not in self._pings
        ]
        for *_, key in sorted(due)[:free]:
            try:
                self._pings[key] = icmp.Pings(self.state.settings.wireguard, self._hosts[key].record.address)
            except MeshdError as error:
                self._fail(key, error)
                continue
            selector.register(self._pings[key], selectors.EVENT_READ, key)
            self._paths[key], sizes = self._paths[key].begun(now=now)
            self._send(key, sizes)

    def _go_on(self, selector: selectors.BaseSelector) -> None:
        """Send what is to be sent now, and end what is over."""
        for key in [*self._pings]:
            if key in self._paths:
                spread = self._random.random()
                self._paths[key], sizes = self._paths[key].stepped(now=time.monotonic(), spread=spread)
                self._send(key, sizes)
            if key not in self._paths or self._paths[key].trial is None:
                self._close(selector, key)

    def _send(self, key: str, sizes: Iterable[int]) -> None:
        try:
            for size in sizes:
                self._pings[key].send(size)
        except MeshdError as error:
            self._fail(key, error)

    def _hear(self, selector: selectors.BaseSelector, until: float) -> None:
        """Wait for pings, until then or until something is to be sent."""
        trials = (path.trial.next for key in self._pings if (path := self._paths[key]).trial is not None)
        timeout = min([until, *trials]) - time.monotonic()
        for chosen, _ in selector.select(timeout):
            key = chosen.data
            try:
                for size in self._pings[key].receive():
                    self._paths[key] = self._paths[key].heard(size, now=time.monotonic())
            except MeshdError as error:
                self._fail(key, error)

    def _fail(self, key: str, error: MeshdError) -> None:
        log.debug("%s", error)
        self._paths[key] = self._paths[key].missed(now=time.monotonic())

    def _close(self, selector: selectors.BaseSelector, key: str) -> None:
        pings = self._pings.pop(key)
        selector.unregister(pings)
        pings.close()

    def _publish(self) -> None:
        """Give the next reconcile what is known, and have one made if a route is to change."""
        mtus = paths.mtus(self._paths)
        before, self.mtus = {**self._kept, **self.mtus}, mtus
        for key, mtu in mtus.items():
            if mtu != before.get(key, 0):
                self.hint(Hint(Source.PATHS, f"{self._hosts[key].name} {mtu or self._full}"))
