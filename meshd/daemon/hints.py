"""Hints: why the daemon should look again. They say where to look, and nothing that is believed."""

import math
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from meshd.printable import printable

# One datagram, from handlers/meshd_event.py or from a command.
LENGTH = 512
# Serf's handlers hear of an event at most this much later than its log tells: Serf holds events back for up to 3 s,
# and with each of them repeats the last update of every member.
HELD_BACK = 5.0


class Source(StrEnum):
    """Where a hint comes from."""

    LOG = "serf log"
    HANDLER = "serf handler"
    MESH = "mesh"  # another host said something
    NETLINK = "netlink"
    NFTABLES = "nftables"
    DOCKER = "docker"
    ENGINE = "docker engine"  # it went away or came back, perhaps as another version
    COMMAND = "cli"
    DAEMON = "daemon"
    PATHS = "path mtu"  # that of a peer was measured, and is another one


# What such a hint tells can have changed members, or the routes to them, alone.
ABOUT_MEMBERS = frozenset({Source.LOG, Source.HANDLER, Source.MESH, Source.PATHS})
# How datagrams name their sources.
_SENDERS = {"serf": Source.HANDLER, "cli": Source.COMMAND}


@dataclass(frozen=True, slots=True, order=True)
class Hint:
    """One reason to look again; `text` is for people."""

    source: Source
    text: str

    def __str__(self) -> str:
        return f"{self.source}: {self.text}"


READINESS = Hint(Source.MESH, "asked for readiness")
"""Another host waits for the next reconcile."""


def read(datagram: bytes) -> Hint:
    """Return the hint in a datagram. Whatever does not name a known sender is taken for a command's."""
    text = printable(datagram.decode(errors="replace"), LENGTH)
    sender, colon, rest = text.partition(": ")
    return Hint(_SENDERS[sender], rest) if colon and sender in _SENDERS else Hint(Source.COMMAND, text)


def wake(path: Path, text: str, sender: str = "cli") -> bool:
    """Send a hint to the daemon's socket; return False if no daemon listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        try:
            client.sendto(f"{sender}: {text}".encode()[:LENGTH], str(path))
        except BlockingIOError:
            return True  # enough hints wait already
        except OSError:
            return False
    return True


class Echoes:
    """Hints that repeat what the daemon knows: the kernel reporting its own changes, a handler repeating Serf's log."""

    def __init__(self) -> None:
        self._own: set[Hint] = set()
        self._logged = -math.inf

    def expect(self, hints: Iterable[Hint]) -> None:
        """Expect these hints, once each, from the changes that were just made."""
        self._own = set(hints)

    def logged(self, now: float) -> None:
        """Note that Serf's log told of a member event at monotonic time `now`."""
        self._logged = now

    def repeats(self, hint: Hint, now: float) -> bool:
        """Return whether a hint tells nothing new. A second report by the kernel means that someone else did it."""
        if hint in self._own:
            self._own.remove(hint)
            return True
        return hint.source is Source.HANDLER and hint.text.startswith("member-") and now < self._logged + HELD_BACK
