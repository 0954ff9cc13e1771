"""What hosts ask and tell each other over Serf, as bytes. Pure; whatever comes was written by someone else.

| name          | kind  | says                                                                                        |
|---------------|-------|---------------------------------------------------------------------------------------------|
| meshd-applied | query | "Have you applied NAME's record SEQ?" Only a yes is ever answered.                          |
| meshd-gone    | query | "My tombstones have this digest; which are yours?" A host that has the same ones is silent. |
| meshd-gone    | event | "Here are tombstones."                                                                      |
| meshd-bury    | query | "Here are tombstones." A host that has all of them, now or before, says yes.                |
| meshd-record  | query | "What is NAME's record?", for tags that anyone with the gossip key can spoil.               |
| meshd-record  | event | "This is my record."                                                                        |
| meshd-confirm | query | "Certify NAME", to the authority, in place of a certificate that a delegation signed.       |

To add a message: a class with its fields, `read` and, if it is sent, `payload`; a row in MESSAGES; a case in
meshd.gossip.responder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import msgpack

from meshd.mesh.model import is_name
from meshd.mesh.records import MAX_SEQ
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones, unpack_list

APPLIED = "meshd-applied"
GONE = "meshd-gone"
BURY = "meshd-bury"
RECORD = "meshd-record"
CONFIRM = "meshd-confirm"
# Serf's words for the two kinds.
QUERY, EVENT = "query", "user"
# Serf drops a query's answer of more than 1024 bytes and a user event of more than 512, both with its own headers.
ANSWER_LIMIT = 900
EVENT_LIMIT = 470
YES = b"yes"


@dataclass(frozen=True, slots=True)
class Applied:
    """Whether a host has in its kernel what `name` published under `seq`, its tombstone included."""

    name: str
    seq: int

    def payload(self) -> bytes:
        return f"{self.name} {self.seq}".encode()

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        name, _space, seq = _text(payload).partition(" ")
        if not (is_name(name) and seq.isascii() and seq.isdigit() and len(seq) <= 15 and int(seq) < MAX_SEQ):
            return None
        return cls(name, int(seq))

    def is_answered_by(self, applied: Mapping[str, int]) -> bool:
        return applied.get(self.name, 0) >= self.seq


@dataclass(frozen=True, slots=True)
class AskTombstones:
    """Which tombstones a host knows, from the one after `after` on, unless theirs have this digest.

    `asker` is who may be asked back: Serf does not say who sent a query.
    """

    asker: str
    digest: str
    after: str = ""

    def payload(self) -> bytes:
        return f"{self.asker} {self.digest} {self.after}".encode()

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        words = _text(payload).split(" ")
        return cls(*words) if len(words) == 3 and is_name(words[0]) else None

    def page(self, known: Tombstones) -> bytes:
        """Return the answer; nothing if the asker knows the same ones."""
        return b"" if self.digest == known.digest else next(known.pages(ANSWER_LIMIT, self.after), b"")


@dataclass(frozen=True, slots=True)
class TellTombstones:
    """Tombstones, whose pages are the payload."""

    tombstones: Tombstones

    @classmethod
    def read(cls, payload: bytes, mesh: Mesh) -> Self | None:
        tombstones = Tombstones.read(payload, mesh)
        return cls(tombstones) if tombstones else None


@dataclass(frozen=True, slots=True)
class AskRecord:
    """The newest record of `name`."""

    name: str

    def payload(self) -> bytes:
        return self.name.encode()

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        name = _text(payload)
        return cls(name) if is_name(name) else None


@dataclass(frozen=True, slots=True)
class TellRecord:
    """A record besides the tags, as its bytes, unread."""

    name: str
    wire: bytes

    def payload(self) -> bytes:
        return bytes(msgpack.packb([self.name, self.wire]))

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        match unpack_list(payload):
            case [str(name), bytes(wire)] if is_name(name):
                return cls(name, wire)
            case _:
                return None


@dataclass(frozen=True, slots=True)
class AskConfirmation(AskRecord):
    """A certificate by the authority itself for `name`."""


Message = Applied | AskTombstones | TellTombstones | AskRecord | TellRecord | AskConfirmation

MESSAGES: Mapping[tuple[str, str], Callable[[bytes, Mesh], Message | None]] = {
    (QUERY, APPLIED): Applied.read,
    (QUERY, GONE): AskTombstones.read,
    (EVENT, GONE): TellTombstones.read,
    (QUERY, BURY): TellTombstones.read,
    (QUERY, RECORD): AskRecord.read,
    (EVENT, RECORD): TellRecord.read,
    (QUERY, CONFIRM): AskConfirmation.read,
}


def read(kind: str, name: str, payload: bytes, mesh: Mesh) -> Message | None:
    """Return the message in a query's or a user event's payload, which anyone may have sent; None if it is none."""
    reader = MESSAGES.get((kind, name))
    return reader(payload, mesh) if reader is not None else None


def _text(payload: bytes) -> str:
    # Serf appends a newline to what it pipes into a handler.
    return payload.removesuffix(b"\n").decode(errors="replace")
