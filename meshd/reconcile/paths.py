"""The path MTU of a pair of hosts: when it is measured, with which pings, and what follows. Pure: the clock is given.

A ping of a size that comes back has passed the path whole. A path that fragments WireGuard's packets lets every size
pass, and stays as wide as the overlay. One ping alone proves nothing by its absence: packets are lost on the best of
paths. So sizes that are missing are asked for again, beside smaller ones that do come back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from meshd.net.resources import Peer
from meshd.reconcile.plan import FRESH

# Seconds from one measurement to the next: of a path with traffic, and of one without.
EVERY, SELDOM = 3.0, 600.0
# WireGuard pads a packet to a multiple of this, so that other sizes are as good as the next multiple.
STEP = 16
# IPv4's least datagram that every host takes, and the least MTU of an overlay: no path is taken to be narrower.
SMALLEST = 576
# So many sizes are asked for at once. Those that are missing are lost when the next smaller one has come back so many
# times beside them; where that takes too many tries, nothing is known.
WIDTH, PROOFS, TRIES = 8, 5, 20
# Seconds until a ping is taken for lost: where nothing is known of the path, at least, and at most.
PATIENCE, LONGEST_PATIENCE = 0.4, 2.0
# Seconds that remain for the other pings once the one that was sent last is back.
GAP = 0.1
# What WireGuard adds to a ping, its padding included.
OVERHEAD = 32 + STEP


@dataclass(frozen=True, slots=True)
class Trial:
    """A measurement under way.

    `sizes` are those that were sent last, the largest first; `tries` counts how often. At the time `next` they are sent
    again, or the next ones. `low` is the largest that came back, `proofs` times by now, and `high` the smallest that is
    proved lost.
    """

    sizes: tuple[int, ...]
    high: int
    started: float
    next: float
    low: int = 0
    proofs: int = 0
    tries: int = 1
    is_search: bool = False


@dataclass(frozen=True, slots=True)
class Path:
    """The path to one peer. `full` is the overlay's MTU, `mtu` the path's, 0 while that is not known.

    It is measured at the time `due`, and was at `checked`; `misses` counts the measurements since then that nothing
    answered. `rtt` is how long a ping took. Since the time `since`, when WireGuard had `sent` so many bytes, `own`
    bytes were pings. `peer` is how it was observed last.
    """

    full: int
    peer: Peer
    due: float
    since: float
    sent: int
    own: int = 0
    mtu: int = 0
    checked: float = float("-inf")
    misses: int = 0
    rtt: float = 0.0
    trial: Trial | None = None

    @property
    def patience(self) -> float:
        """Seconds until a ping is taken for lost."""
        return min(max(PATIENCE, 2 * self.rtt + GAP), LONGEST_PATIENCE)

    @property
    def pause(self) -> float:
        """Seconds from one measurement to the next while there is traffic."""
        return min(EVERY * 2.0**self.misses, SELDOM)

    def observed(self, peer: Peer, full: int, *, now: float) -> "Path":
        """Return the path as the peer's counters, its endpoint and the overlay's MTU now suggest."""
        if full != self.full:
            return new(peer, full, now=now)
        due, sent = self.due, peer.sent - self.sent - self.own
        is_elsewhere, is_met = peer.endpoint != self.peer.endpoint, peer.handshake != self.peer.handshake
        if is_elsewhere or (is_met and self.misses):
            due = min(due, max(now, self.checked + EVERY))
        if sent > quiet(full):
            due = min(due, max(now, self.checked + self.pause))
        elif now - self.since < EVERY and peer.sent >= self.sent:
            return replace(self, due=due, peer=peer) if is_elsewhere or is_met else self
        return replace(self, due=due, peer=peer, since=now, sent=peer.sent, own=0)

    def is_due(self, *, now: float, unix: float) -> bool:
        """Return whether to measure now; `unix` is the Unix time, by which WireGuard tells of handshakes.

        To a peer without a session, a ping would start a handshake.
        """
        return self.trial is None and self.due <= now and unix - self.peer.handshake < FRESH

    def begun(self, *, now: float) -> tuple["Path", tuple[int, ...]]:
        """Return the path with a measurement that has begun, and the sizes to send: that which should pass, first."""
        sizes = {self.full, self.mtu, self.mtu + STEP} if self.mtu else {self.full}
        asked = tuple(sorted((size for size in sizes if size <= self.full), reverse=True))
        return self._sending(Trial(asked, self.full + 1, started=now, next=now), now=now)

    def heard(self, size: int, *, now: float) -> "Path":
        """Return the path after a ping of `size` came back."""
        trial, path = self.trial, self
        if trial is None:
            return self
        if not trial.low:
            path = replace(self, rtt=now - trial.started)
        if size > trial.low:
            trial = replace(trial, low=size, proofs=1)
        elif size == trial.low:
            trial = replace(trial, proofs=trial.proofs + 1)
        if trial.low >= trial.sizes[0]:
            trial = replace(trial, next=now)
        elif size <= trial.sizes[-1]:
            trial = replace(trial, next=min(trial.next, now + GAP))
        return replace(path, trial=trial)

    def stepped(self, *, now: float, spread: float = 0.0) -> tuple["Path", tuple[int, ...]]:
        """Return the path after what is due of its measurement, and the sizes to send.

        `spread`, from 0 to 1, makes the next measurements of many paths fall apart.
        """
        trial = self.trial
        if trial is None or now < trial.next:
            return self, ()
        if not trial.is_search:
            if trial.low and trial.low in {self.mtu, self.full}:
                return self._over(trial.low, now=now, spread=spread), ()
            return self._searching(trial, now=now, spread=spread)
        if trial.low < trial.sizes[0] and trial.proofs < PROOFS:
            if trial.tries >= (TRIES if trial.low else PROOFS):
                return self.missed(now=now), ()
            sizes = tuple(size for size in trial.sizes if size >= trial.low)
            return self._sending(replace(trial, sizes=sizes, tries=trial.tries + 1), now=now)
        high = min((size for size in trial.sizes if size > trial.low), default=trial.high)
        is_refuted = not self.mtu or self.mtu >= high or self.mtu < trial.low
        path = replace(self, mtu=trial.low) if is_refuted else self
        return path._searching(replace(trial, high=high), now=now, spread=spread)

    def missed(self, *, now: float) -> "Path":
        """Return the path after a measurement that nothing came of: it is known as before, and tried more rarely."""
        path = replace(self, trial=None, misses=self.misses + 1, checked=now)
        return replace(path, due=now + path.pause)

    def _searching(self, trial: Trial, *, now: float, spread: float) -> tuple["Path", tuple[int, ...]]:
        """Go on between what came back and what did not, until nothing is between."""
        between = [size for size in (*range(SMALLEST, self.full, STEP), self.full) if trial.low < size < trial.high]
        if not between:
            return self._over(trial.low, now=now, spread=spread), ()
        count = min(WIDTH, len(between))
        chosen = {between[(n + 1) * len(between) // count - 1] for n in range(count)}
        chosen.add(trial.low or SMALLEST)  # that comes back, if anything does
        sizes = tuple(sorted(chosen, reverse=True))
        return self._sending(replace(trial, sizes=sizes, proofs=0, tries=1, is_search=True), now=now)

    def _sending(self, trial: Trial, *, now: float) -> tuple["Path", tuple[int, ...]]:
        own = self.own + sum(size + OVERHEAD for size in trial.sizes)
        return replace(self, own=own, trial=replace(trial, next=now + self.patience)), trial.sizes

    def _over(self, mtu: int, *, now: float, spread: float) -> "Path":
        due = now + SELDOM * (1 - spread / 10)
        return replace(self, mtu=mtu, trial=None, misses=0, checked=now, due=due)


def quiet(full: int) -> int:
    """Return how many bytes sent are no traffic yet: two answers to the other host, which measures as well."""
    return 2 * (full + OVERHEAD)


def new(peer: Peer, full: int, *, now: float, kept: int = 0) -> Path:
    """Return a path that is to be measured, and of which nothing is known but the MTU that its route kept, if any."""
    return Path(full, peer, due=now, since=now, sent=peer.sent, mtu=kept if SMALLEST <= kept < full else 0)


def observe(
    paths: Mapping[str, Path],
    peers: Mapping[str, Peer],
    full: int,
    *,
    now: float,
    kept: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Path]:
    """Return the paths of these peers, by public key, as they are now; `kept` are the MTUs that routes have."""
    return {
        key: paths[key].observed(peer, full, now=now)
        if key in paths
        else new(peer, full, now=now, kept=kept.get(key, 0))
        for key, peer in peers.items()
    }


def mtus(paths: Mapping[str, Path]) -> dict[str, int]:
    """Return the path MTUs that are known, by public key; 0 for a path as wide as the overlay's."""
    return {key: path.mtu if path.mtu < path.full else 0 for key, path in paths.items() if path.mtu}
