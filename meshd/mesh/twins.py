"""Whether a host runs on two machines: a copy of its state has its name, its keys and its identity. Pure.

Only the identity's own key can say so. What it signed once may be shown again by anybody, so that a signature counts
only together with a question that nobody could foresee, or with the number of a record that is in force.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from meshd.endpoint import Endpoint
from meshd.mesh.model import Record
from meshd.mesh.records import MAX_SEQ

# Seconds after which two machines of one host count as over, unless they were heard of again; and for how long the word
# of one of them is passed on to the other.
HOLD, FRESH = 20.0, 10.0
# Seconds from one change of what a host says to the next that counts: each one makes others write and reconcile.
PAUSE = 2.0
# Words of a host that are kept: it has two machines.
WORDS = 2
# The most hosts of which a host keeps that they have twins: an invitation in the wrong hands makes any number of them.
MOST = 20
TEXT = (
    "{name} runs on two machines, at {first} and at {later}. Stop the one at {later}, which came later: run "
    "'meshd down' there, or at {first} if that is the copy"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of two machines runs: the number and the endpoint of the record that it publishes."""

    seq: int
    endpoint: Endpoint

    @classmethod
    def of(cls, record: Record) -> "Place":
        return cls(record.seq, record.endpoint)

    @classmethod
    def read(cls, text: str) -> "Place | None":
        """Read what `str` has written, and anyone may have sent; None for anything else."""
        number, _, endpoint = text.partition(" ")
        try:
            seq, place = int(number), Endpoint.parse(endpoint)
        except ValueError:
            return None
        found = cls(seq, place)
        return found if 0 < seq < MAX_SEQ and str(found) == text else None

    def __str__(self) -> str:
        return f"{self.seq} {self.endpoint}"


@dataclass(frozen=True, slots=True)
class Twins:
    """A host that runs at two places. `one` is the place of the machine that has found the other."""

    name: str
    one: Place
    other: Place

    def __str__(self) -> str:
        """Name both places, and the one to stop: a copy starts after the machine that it was made of."""
        first, later = sorted((self.one, self.other), key=lambda place: (place.seq, str(place)))
        return TEXT.format(name=self.name, first=first.endpoint, later=later.endpoint)

    @property
    def says(self) -> str:
        """What the machine at `one` signs."""
        return f"{self.one}, {self.other}"

    @classmethod
    def read(cls, name: str, text: str) -> "Twins | None":
        """Read what `says` has written; None for anything else, and for a single place."""
        one, other = (Place.read(part) for part in _parts(text))
        if one is None or other is None or one.endpoint == other.endpoint:
            return None
        return cls(name, one, other)

    def is_about(self, record: Record, *, own: bool = False) -> bool:
        """Return whether this says something of a host while this record of its identity is in force.

        A host that is alone again publishes another number than these, which ends what was said. With `own`, the record
        is that of the machine that asks, and the word has to be that of the other one about it.
        """
        place = Place.of(record)
        return place == self.other if own else place in (self.one, self.other)


def _parts(text: str) -> tuple[str, str]:
    one, _, other = text.partition(", ")
    return one, other


W = TypeVar("W")


@dataclass(slots=True)
class Sightings(Generic[W]):
    """The hosts of which it is known now that they have twins, by name. `now` is always the monotonic clock.

    Each of a host's machines says it in a word of its own, a W, which others may want to see.
    """

    known: dict[str, Twins] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)
    _changed: dict[str, float] = field(default_factory=dict)
    _words: dict[str, dict[Endpoint, tuple[W, float]]] = field(default_factory=dict)

    def see(self, twins: Twins, now: float, word: W | None = None) -> bool:
        """Keep that a host has a twin; return whether that is news. Once in PAUSE seconds a host has some."""
        name = twins.name
        if name not in self.known and len(self.known) >= MOST:
            return False
        self._until[name] = now + HOLD
        if word is not None:
            words = {place: one for place, one in self._words.get(name, {}).items() if place != twins.one.endpoint}
            self._words[name] = dict([*words.items(), (twins.one.endpoint, (word, now + FRESH))][-WORDS:])
        before = self.known.get(name)
        is_news = before is None or str(before) != str(twins)
        if before is not None and is_news and now < self._changed[name] + PAUSE:
            return False
        self.known[name] = twins
        if is_news:
            self._changed[name] = now
        return is_news

    def words_of(self, name: str, now: float) -> tuple[W, ...]:
        """Return the latest words of a host's machines."""
        return tuple(word for word, until in self._words.get(name, {}).values() if until > now)

    def expire(self, hosts: Mapping[str, Record], now: float) -> dict[str, Twins]:
        """Drop and return what has not been heard of again, or is of no host any more."""
        over = {n: t for n, t in self.known.items() if self._until[n] <= now or n not in hosts}
        for name in over:
            del self.known[name], self._until[name], self._changed[name]
            self._words.pop(name, None)
        return over
