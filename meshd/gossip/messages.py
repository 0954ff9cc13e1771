"""What hosts ask and tell each other over Serf, as bytes. Pure; whatever comes was written by somebody else.

`meshd-applied` proves readiness: "have you applied NAME's record SEQ?". Only a yes is ever answered.

`meshd-gone` makes tombstones (goodbyes, revocations) known to those who were away when they were said, whom Serf never
tells. As a query it is "these are mine, by their digest; which are yours?", and who has the same ones keeps silent. As
a user event it tells.

`meshd-bury` is the same tombstones as a query: who has them all, now or before, says yes.

`meshd-record` carries a signed record besides the tags, which anybody with the gossip key can spoil: as a query, "what
is NAME's?"; as a user event, "this is mine".

`meshd-confirm` asks the authority for a certificate of its own in the place of one that a delegation signed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgpack

from meshd.mesh.model import is_name
from meshd.mesh.records import MAX_SEQ
from meshd.mesh.tombstones import Graves, unpack_list

APPLIED = "meshd-applied"
GONE = "meshd-gone"
BURY = "meshd-bury"
RECORD = "meshd-record"
CONFIRM = "meshd-confirm"
# Serf drops a query's answer of more than 1024 bytes and a user event of more than 512, both with its own headers.
ANSWER_LIMIT = 900
EVENT_LIMIT = 470
YES = b"yes"


@dataclass(frozen=True, slots=True)
class Question:
    """Whether a host has in its kernel what `name` published under `seq`, its goodbye included."""

    name: str
    seq: int

    def payload(self) -> bytes:
        return f"{self.name} {self.seq}".encode()

    @classmethod
    def parse(cls, payload: bytes) -> "Question | None":
        """Read what anybody may have sent; None if it is no question."""
        name, _, seq = payload.decode(errors="replace").partition(" ")
        if not (name and seq.isascii() and seq.isdigit() and len(seq) <= 15 and int(seq) < MAX_SEQ):
            return None
        return cls(name, int(seq))

    def answered_by(self, applied: Mapping[str, int]) -> bool:
        return applied.get(self.name, 0) >= self.seq


@dataclass(frozen=True, slots=True)
class GoneQuestion:
    """Which tombstones a host knows, from the one after `after` on, if not those with this digest.

    `asker` is who may be asked back: Serf does not say who sent a query.
    """

    asker: str
    digest: str
    after: str = ""

    def payload(self) -> bytes:
        return f"{self.asker} {self.digest} {self.after}".encode()

    @classmethod
    def parse(cls, payload: bytes) -> "GoneQuestion | None":
        """Read what anybody may have sent; None if it is no question."""
        words = payload.decode(errors="replace").split(" ")
        if len(words) != 3 or not is_name(words[0]):
            return None
        return cls(*words)


def answer_gone(question: GoneQuestion, graves: Graves) -> bytes:
    """Give what to answer; nothing if there is nothing that the asker does not know."""
    if question.digest == graves.digest:
        return b""
    return next(graves.pages(ANSWER_LIMIT, question.after), b"")


def name_question(payload: bytes) -> str | None:
    """Read the name that a `meshd-record` or `meshd-confirm` query asks for; None if it is none."""
    name = payload.decode(errors="replace")
    return name if is_name(name) else None


def announcement(name: str, wire: bytes) -> bytes:
    """Give the user event that publishes a record besides the tags."""
    return bytes(msgpack.packb([name, wire]))


def read_announcement(payload: bytes) -> tuple[str, bytes] | None:
    """Read what anybody may have sent: a name and a record's bytes, unread; None if it is none."""
    match unpack_list(payload):
        case [str(name), bytes(wire)] if is_name(name):
            return name, wire
        case _:
            return None
