"""What hosts ask and tell each other over Serf, as bytes. Pure; whatever comes was written by somebody else.

`meshd-applied` proves readiness: "have you applied NAME's record SEQ?". Only a yes is ever answered.

`meshd-gone` makes goodbyes known to those who were away when they were said, whom Serf never tells. As a query it is
"these are mine, by their digest; which are yours?", and who has the same ones keeps silent. As a user event it tells.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar

import msgpack

from meshd.model import Goodbye, is_name
from meshd.tags import MAX_SEQ, is_public_key

APPLIED = "meshd-applied"
GONE = "meshd-gone"
# Serf drops a query's answer of more than 1024 bytes and a user event of more than 512, both with its own headers.
ANSWER_LIMIT = 900
EVENT_LIMIT = 400


@dataclass(frozen=True, slots=True)
class Question:
    """Whether a host has in its kernel what `name` published under `seq`, its goodbye included."""

    YES: ClassVar[bytes] = b"yes"
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
    """Which goodbyes a host knows, from the name after `after` on, if not those with this digest.

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
        if len(words) != 3 or not is_name(words[0]) or not (words[2] == "" or is_name(words[2])):
            return None
        return cls(*words)


def digest(gone: Mapping[str, Goodbye]) -> str:
    """Give 16 hexadecimal digits by which two hosts see that they know of the same goodbyes."""
    text = "".join(f"{name} {g.seq} {g.public_key}\n" for name, g in sorted(gone.items()))
    return sha256(text.encode()).hexdigest()[:16]


def pages(gone: Mapping[str, Goodbye], limit: int, after: str = "") -> Iterator[bytes]:
    """Give the goodbyes by name, those after `after`, in messages of at most `limit` bytes."""
    page: list[tuple[str, int, bytes]] = []
    for name, goodbye in sorted(gone.items()):
        if name <= after:
            continue
        entry = (name, goodbye.seq, base64.b64decode(goodbye.public_key))
        if len(msgpack.packb([*page, entry])) > limit:
            yield msgpack.packb(page)
            page = []
        page.append(entry)
    if page:
        yield msgpack.packb(page)


def read_page(payload: bytes) -> dict[str, Goodbye]:
    """Read a message of goodbyes; what is none in it is left out."""
    try:
        entries = msgpack.unpackb(payload, strict_map_key=False)
    except (ValueError, msgpack.UnpackException, RecursionError):
        return {}
    found = {}
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, list) or len(entry) != 3:
            continue
        name, seq, raw = entry
        if not (isinstance(name, str) and is_name(name) and type(seq) is int and 0 < seq < MAX_SEQ):
            continue
        key = base64.b64encode(raw).decode() if isinstance(raw, bytes) else ""
        if is_public_key(key):
            found[name] = Goodbye(seq, key)
    return found


def answer_gone(question: GoneQuestion, gone: Mapping[str, Goodbye]) -> bytes:
    """Give what to answer; nothing if there is nothing that the asker does not know."""
    if question.digest == digest(gone):
        return b""
    return next(pages(gone, ANSWER_LIMIT, question.after), b"")
