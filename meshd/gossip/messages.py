"""What hosts ask and tell each other over Serf, as bytes. Pure; whatever comes was written by someone else.

| name          | kind  | says                                                                                        |
|---------------|-------|---------------------------------------------------------------------------------------------|
| meshd-applied | query | "Have you applied this record of NAME's?" Yes, or no and why not: an Answer.                |
| meshd-holds   | query | "Is this record of NAME's the one in force?" Yes, or no: an Answer.                         |
| meshd-gone    | query | "My tombstones have this digest; which are yours?" A host that has the same ones is silent. |
| meshd-gone    | event | "Here are tombstones."                                                                      |
| meshd-bury    | query | "Here are tombstones." A host that has all of them, now or before, says yes: an Answer.     |
| meshd-record  | query | "What is NAME's record?", for tags that anyone with the gossip key can spoil.               |
| meshd-record  | event | "This is my record."                                                                        |
| meshd-confirm | query | "Certify NAME", to the authority, in place of a certificate that a delegation signed.       |
| meshd-where   | query | "Where does NAME run?" That host itself: an Answer with its place. Others: a Sighting.      |
| meshd-twins   | event | "I run on another machine as well", signed.                                                 |

Messages begin with their version and may end with extensions (meshd.mesh.versioned). The three that hosts of version 2
answer as well are sent as their text: words, and behind them extensions, each as NUMBER=HEX.

To add a message: a class with its fields, `read` and, if it is sent, `payload`; a row in MESSAGES; a case in
meshd.gossip.responder.
"""

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from meshd.mesh import versioned
from meshd.mesh.certificates import SIGNATURE
from meshd.mesh.model import FORMER, VERSION, Certificate, Host, Member, is_name
from meshd.mesh.records import MAX_SEQ, RecordError, decode, pack_certificate, read_certificate
from meshd.mesh.roster import Roster
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones, is_within
from meshd.mesh.twins import Twins

APPLIED = "meshd-applied"
HOLDS = "meshd-holds"
GONE = "meshd-gone"
BURY = "meshd-bury"
RECORD = "meshd-record"
CONFIRM = "meshd-confirm"
WHERE = "meshd-where"
TWINS = "meshd-twins"
# Serf's words for the two kinds.
QUERY, EVENT = "query", "user"
# Serf drops a query's answer of more than 1024 bytes and a user event of more than 512, both with its own headers.
ANSWER_LIMIT = 900
EVENT_LIMIT = 470
# Bytes of a public key of either kind, and of what makes a question another one.
KEY, NONCE = 32, 8
# A reason is for people, and travels in an answer.
REASON_LIMIT = 200
# Words of a host's machines in one answer: it has two.
MOST_WORDS = 2
_EXTENSION = re.compile(r"([1-9][0-9]{0,2})=((?:[0-9a-f]{2})*)")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host says to a question: yes, or in `refusal` why not. Its identity has signed it, over the question.

    Anyone with the gossip key can answer in the name of a host.
    """

    refusal: str
    signature: bytes

    def payload(self) -> bytes:
        return versioned.pack(self.refusal, self.signature)

    @classmethod
    def read(cls, payload: bytes) -> Self | None:
        match versioned.unpack(payload):
            case [str(refusal), bytes(signature)]:
                return cls(refusal, signature)
            case _:
                return None


@dataclass(frozen=True, slots=True)
class Applied:
    """Whether a host has in its kernel what an identity published for `name` under `seq`, its goodbye included.

    `public_key` is the WireGuard key in that record. The `nonce` makes each question another one, so that nobody can
    repeat an answer to an earlier one.
    """

    name: str
    seq: int
    identity: bytes
    public_key: str
    nonce: bytes

    @classmethod
    def of(cls, host: Host, nonce: bytes) -> Self:
        """Return the question for a host's record."""
        record = host.record
        return cls(host.name, record.seq, record.certificate.identity, record.public_key, nonce)

    def payload(self) -> bytes:
        key = base64.b64decode(self.public_key)
        return versioned.pack(self.name, self.seq, self.identity, key, self.nonce)

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        match versioned.unpack(payload):
            case [str(name), int(seq), bytes(identity), bytes(key), bytes(nonce)] if (
                is_name(name)
                and is_within(seq, MAX_SEQ)
                and len(identity) == KEY
                and len(key) == KEY
                and len(nonce) == NONCE
            ):
                return cls(name, seq, identity, base64.b64encode(key).decode(), nonce)
            case _:
                return None

    def is_about(self, member: Member, mesh: Mesh) -> bool:
        """Return whether a member's tags say what is asked for."""
        try:
            record = decode(member.tags, mesh.overlay, mesh.subnet_length)
        except RecordError:
            return False
        mine = (self.seq, self.identity, self.public_key)
        return mine == (record.seq, record.certificate.identity, record.public_key)

    def is_answered_by(self, applied: Roster) -> bool:
        """Return whether this record, a newer one of its identity and key, or its end is among what a host has applied.

        With another key it is the record of another machine, or of another life of this one.
        """
        record = applied.hosts.get(self.name)
        if record is not None and record.certificate.identity == self.identity:
            return record.seq >= self.seq and record.public_key == self.public_key
        graves = applied.gone.get(self.name, {}).values()
        return any(tombstone.is_about(self.identity) and tombstone.seq >= self.seq for tombstone in graves)


@dataclass(frozen=True, slots=True)
class Holds:
    """Whether the record of `name` that a host has in force is this one: of `identity`, number and `signature`.

    The signature, since a host can sign two records with one number, and show them to different hosts. The `nonce` is
    as in Applied.
    """

    name: str
    seq: int
    identity: bytes
    signature: bytes
    nonce: bytes

    @classmethod
    def of(cls, host: Host, nonce: bytes) -> Self:
        """Return the question for a host's record."""
        record = host.record
        return cls(host.name, record.seq, record.certificate.identity, record.signature, nonce)

    def payload(self) -> bytes:
        return versioned.pack(self.name, self.seq, self.identity, self.signature, self.nonce)

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        match versioned.unpack(payload):
            case [str(name), int(seq), bytes(identity), bytes(signature), bytes(nonce)] if (
                is_name(name)
                and is_within(seq, MAX_SEQ)
                and len(identity) == KEY
                and len(signature) == SIGNATURE
                and len(nonce) == NONCE
            ):
                return cls(name, seq, identity, signature, nonce)
            case _:
                return None

    def answer(self, roster: Roster) -> bool | None:
        """Return what a host with this roster says; None if it cannot say.

        It cannot while it does not know itself whose the claim is. With a newer record it says nothing of an older one:
        someone may show that again, so that the others deny it.
        """
        record = roster.hosts.get(self.name)
        if record is not None and record.certificate.identity == self.identity and record.seq > self.seq:
            return None
        if record is not None and record.signature == self.signature:
            return True
        mine = [d for d in roster.disputes if self.name in d.claims and d.claims[self.name].signature == self.signature]
        return None if any(dispute.keeper is None for dispute in mine) else False


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
        words = _words(payload, 3)
        return cls(*words) if words and is_name(words[0]) else None

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
        words = _words(payload, 1)
        return cls(*words) if words and is_name(words[0]) else None


@dataclass(frozen=True, slots=True)
class TellRecord:
    """A record besides the tags, as its bytes, unread."""

    name: str
    wire: bytes

    def payload(self) -> bytes:
        return versioned.pack(self.name, self.wire)

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        match versioned.unpack(payload):
            case [str(name), bytes(wire)] if is_name(name):
                return cls(name, wire)
            case _:
                return None


@dataclass(frozen=True, slots=True)
class AskConfirmation(AskRecord):
    """A certificate by the authority itself for `name`.

    The answer to a host of version 2 is the certificate's bytes alone.
    """

    @staticmethod
    def answer(certificate: Certificate) -> bytes:
        packed = pack_certificate(certificate)
        return packed if certificate.version < VERSION else versioned.pack(packed)

    @staticmethod
    def read_answer(answer: bytes) -> Certificate:
        """Return the certificate that anyone may have sent. Raises RecordError."""
        match versioned.unpack(answer):
            case [bytes(packed)]:
                return read_certificate(packed, is_delegated=False, version=VERSION)
            case _:
                return read_certificate(answer, is_delegated=False, version=FORMER)


@dataclass(frozen=True, slots=True)
class Where:
    """Where the host `name` of this identity runs (mesh.twins.Place), which is the text of its own Answer.

    The `nonce` is as in Applied: an answer that somebody shows again is none. Another host answers with a Sighting.
    """

    name: str
    identity: bytes
    nonce: bytes

    def payload(self) -> bytes:
        return versioned.pack(self.name, self.identity, self.nonce)

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        match versioned.unpack(payload):
            case [str(name), bytes(identity), bytes(nonce)] if (
                is_name(name) and len(identity) == KEY and len(nonce) == NONCE
            ):
                return cls(name, identity, nonce)
            case _:
                return None


@dataclass(frozen=True, slots=True)
class TellTwins:
    """That a host runs on two machines: the word of one of them, which its identity has signed as an Answer."""

    twins: Twins
    signature: bytes

    def payload(self) -> bytes:
        return versioned.pack(self.twins.name, self.twins.says, self.signature)

    @classmethod
    def read(cls, payload: bytes, _: Mesh) -> Self | None:
        match versioned.unpack(payload):
            case [str(name), str(text), bytes(signature)] if is_name(name):
                twins = Twins.read(name, text)
                return cls(twins, signature) if twins is not None else None
            case _:
                return None


@dataclass(frozen=True, slots=True)
class Sighting:
    """What another host knows of the one that is asked for: its record in force, and the words of its machines."""

    wire: bytes
    words: tuple[TellTwins, ...] = ()

    def payload(self) -> bytes:
        return versioned.pack(self.wire, [[word.twins.says, word.signature] for word in self.words[:MOST_WORDS]])

    @classmethod
    def read(cls, payload: bytes, name: str) -> Self | None:
        match versioned.unpack(payload):
            case [bytes(wire), list(entries)]:
                words = (_word(name, entry) for entry in entries[:MOST_WORDS])
                return cls(wire, tuple(word for word in words if word is not None))
            case _:
                return None


def _word(name: str, entry: object) -> TellTwins | None:
    match entry:
        case [str(text), bytes(signature)] if (twins := Twins.read(name, text)) is not None:
            return TellTwins(twins, signature)
        case _:
            return None


Message = (
    Applied | Holds | AskTombstones | TellTombstones | AskRecord | TellRecord | AskConfirmation | Where | TellTwins
)

MESSAGES: Mapping[tuple[str, str], Callable[[bytes, Mesh], Message | None]] = {
    (QUERY, APPLIED): Applied.read,
    (QUERY, HOLDS): Holds.read,
    (QUERY, GONE): AskTombstones.read,
    (EVENT, GONE): TellTombstones.read,
    (QUERY, BURY): TellTombstones.read,
    (QUERY, RECORD): AskRecord.read,
    (EVENT, RECORD): TellRecord.read,
    (QUERY, CONFIRM): AskConfirmation.read,
    (QUERY, WHERE): Where.read,
    (EVENT, TWINS): TellTwins.read,
}


def read(kind: str, name: str, payload: bytes, mesh: Mesh) -> Message | None:
    """Return the message in a query's or a user event's payload, which anyone may have sent; None if it is none."""
    reader = MESSAGES.get((kind, name))
    return reader(payload, mesh) if reader is not None else None


def _words(payload: bytes, count: int) -> list[str]:
    """Return the words of a message in text; none if there are fewer, or extensions that this version must not skip."""
    # Serf appends a newline to what it pipes into a handler.
    words = payload.removesuffix(b"\n").decode(errors="replace").split(" ")
    return words[:count] if len(words) >= count and all(map(_may_skip, words[count:])) else []


def _may_skip(word: str) -> bool:
    extension = _EXTENSION.fullmatch(word)
    return extension is not None and versioned.may_skip(int(extension[1]), bytes.fromhex(extension[2]))
