"""What hosts ask and tell each other over Serf, as bytes."""

from contextlib import suppress
from dataclasses import replace

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshd.gossip import messages
from meshd.gossip.messages import (
    APPLIED,
    CONFIRM,
    EVENT,
    EVENT_LIMIT,
    GONE,
    HOLDS,
    QUERY,
    RECORD,
    Answer,
    Applied,
    AskConfirmation,
    AskTombstones,
    Holds,
    TellRecord,
)
from meshd.mesh.model import FORMER, VERSION, Host, Record, Tombstone
from meshd.mesh.records import MAX_SEQ, RecordError, pack_certificate, to_wire
from meshd.mesh.roster import Roster
from meshd.mesh.tombstones import Tombstones, grave, of_leaving
from meshd.mesh.votes import Dispute
from tests.conftest import MESH, certificate, public_key, record, seed
from tests.unit.test_tombstones import all_tombstones


@given(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?", fullmatch=True), st.integers(1, MAX_SEQ - 1))
def test_applied_round_trip(name: str, seq: int) -> None:
    """A question is read as it was asked."""
    message = Applied(name, seq, seed("identity"), public_key("key"), bytes(8))
    assert messages.read(QUERY, APPLIED, message.payload(), MESH) == message
    assert messages.read(QUERY, APPLIED, message.payload() + b"\n", MESH) == message, "as a handler gets it"


@pytest.mark.parametrize("kind", [QUERY, EVENT])
@pytest.mark.parametrize("name", sorted({name for _, name in messages.MESSAGES} | {"other"}))
@given(payload=st.binary(max_size=1024))
@example(payload=b"\x82\x00\x00\x80\x00")
@example(payload=b"\xff b ")
def test_any_payload_is_a_message_or_nothing(kind: str, name: str, payload: bytes) -> None:
    message = messages.read(kind, name, payload, MESH)
    if isinstance(message, Applied):
        assert 0 <= message.seq < MAX_SEQ
    assert len(getattr(message, "name", "")) <= 63


ASKED = ["barge1", 5, bytes(32), bytes(32), bytes(8)]


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, "a/b"), (0, b"barge1"), (1, 0), (1, -5), (1, 2**48), (1, True), (1, "5"), (2, bytes(31)), (3, ""), (4, b"")],
)
def test_applied_refuses_nonsense(at: int, value: object) -> None:
    """A question with a field that is none is no question."""
    assert messages.read(QUERY, APPLIED, msgpack.packb(ASKED), MESH) is not None
    assert messages.read(QUERY, APPLIED, msgpack.packb([*ASKED[:at], value, *ASKED[at + 1 :]]), MESH) is None
    assert messages.read(QUERY, APPLIED, msgpack.packb(ASKED[:at]), MESH) is None


def test_extensions_of_a_message_are_skipped_unless_critical() -> None:
    """Behind the fields may be what a later version adds; version 2 sent the fields alone."""
    message = messages.read(QUERY, APPLIED, msgpack.packb(ASKED), MESH)
    assert message is not None

    def read(*fields: object) -> messages.Message | None:
        return messages.read(QUERY, APPLIED, msgpack.packb(fields), MESH)

    assert read(3, *ASKED) == read(3, *ASKED, {5: b"later"}) == read(3, *ASKED, {}) == message
    assert msgpack.unpackb(message.payload()) == [3, *ASKED]  # type: ignore[union-attr]
    for refused in ({0x85: b""}, {5: b"", 0x85: b""}, {0: b""}, {256: b""}, {5: "x"}, {"5": b"x"}, {True: b"x"}):
        assert read(3, *ASKED, refused) is None
    assert read(4, *ASKED) is None, "of a later version"
    assert read(3, *ASKED, b"more") is None
    assert read(3) is None


@pytest.mark.parametrize(
    ("name", "text"), [(GONE, "barge1 0123456789abcdef "), (RECORD, "barge1"), (CONFIRM, "barge1")]
)
def test_text_of_version_2_may_have_extensions(name: str, text: str) -> None:
    """What hosts of version 2 answer as well stays text; unknown extensions behind it are skipped unless critical."""

    def read(more: str) -> messages.Message | None:
        return messages.read(QUERY, name, f"{text}{more}".encode(), MESH)

    message = read("")
    assert message is not None
    assert message.payload() == text.encode(), "as version 2 reads it"  # type: ignore[union-attr]
    assert read(" 5=00ff") == read(" 5= 127=00\n") == message
    for refused in (" 133=", " 5=00 133=00", " 0=", " 128=", " 256=", " 5=0", " 5=XY", " 5", " ", " =", " 5=00  6=00"):
        assert read(refused) is None, refused


@pytest.mark.parametrize("version", [FORMER, VERSION])
def test_confirmation_round_trip(version: int) -> None:
    """A host of version 2 gets the bytes that it reads, and a host of version 3 can tell which it has got."""
    given = certificate("barge1", version=version)
    answer = AskConfirmation.answer(given)
    assert AskConfirmation.read_answer(answer) == given
    assert (answer == pack_certificate(given)) is (version == FORMER)


@given(st.binary(max_size=200))
def test_any_confirmation_is_a_certificate_or_an_error(answer: bytes) -> None:
    with suppress(RecordError):
        assert AskConfirmation.read_answer(answer).delegation is None


@given(st.binary(max_size=200))
def test_any_answer_is_read_or_none(payload: bytes) -> None:
    """An answer by anybody is one that can be written again, or none."""
    answer = Answer.read(payload)
    assert answer is None or Answer.read(answer.payload()) == answer


def test_applied_is_answered_by_that_record_or_a_newer_one_of_its_identity() -> None:
    """Neither another identity's record, nor one with another key, whatever its number, answers a question."""
    question = Applied.of(Host("barge1", record(1, seq=7)), bytes(8))

    def answers(of: Record, name: str = "barge1") -> bool:
        return question.is_answered_by(Roster({name: of}))

    assert answers(record(1, seq=7))
    assert answers(record(1, seq=8))
    assert not answers(record(1, seq=8, key="another"))
    assert not answers(record(1, seq=6))
    assert not answers(record(1, seq=7, key="another"))
    assert not answers(record(1, seq=7), "barge2")
    assert not answers(record(2, seq=9))


def test_applied_is_answered_by_the_end_of_the_membership() -> None:
    """The goodbye of an identity, or the authority's word, answers a question for its last record."""
    last = record(1, seq=7, leaving=True)
    question = Applied.of(Host("barge1", last), bytes(8))

    def answers(tombstone: Tombstone, **hosts: Record) -> bool:
        return question.is_answered_by(Roster(hosts, grave("barge1", tombstone)))

    assert answers(of_leaving(last))
    assert answers(of_leaving(last), barge1=record(2)), "another one has the name by now"
    assert answers(Tombstone(7, last.public_key))
    assert not answers(Tombstone(6, last.public_key))
    assert not answers(of_leaving(record(2, seq=7, leaving=True)))


@given(all_tombstones)
def test_tombstones_asked_page_by_page_are_all(known: Tombstones) -> None:
    found = Tombstones()
    after = ""
    entries = sum(map(len, known.gone.values())) + len(known.revoked) + len(known.owners)
    for _ in range(entries + 1):
        question = AskTombstones("asker", "0" * 16, after)
        assert messages.read(QUERY, GONE, question.payload(), MESH) == question
        page = Tombstones.read(question.page(known), MESH)
        if not page:
            break
        found, after = found.merged(page), page.last
    assert found == known


@given(all_tombstones)
def test_a_host_with_the_same_tombstones_is_silent(known: Tombstones) -> None:
    assert AskTombstones("asker", known.digest).page(known) == b""
    assert not known or AskTombstones("asker", Tombstones().digest).page(known) != b""


@pytest.mark.parametrize("payload", [b"", b"a", b"a b", b"a b c d", b"\xff b ", b"/ b a"])
def test_ask_tombstones_refuses_nonsense(payload: bytes) -> None:
    assert messages.read(QUERY, GONE, payload, MESH) is None


def test_tell_record_round_trip_fits_into_a_user_event() -> None:
    message = TellRecord("barge1", to_wire(record(1)))
    assert messages.read(EVENT, RECORD, message.payload(), MESH) == message
    assert len(message.payload()) <= EVENT_LIMIT


def holds(of: Record) -> Holds:
    return Holds.of(Host("barge2", of), bytes(8))


@pytest.mark.parametrize(
    ("at", "value"), [(0, "a/b"), (0, 1), (1, 0), (2, bytes(31)), (3, bytes(63)), (3, ""), (4, b""), (4, bytes(9))]
)
def test_question_who_holds_refuses_nonsense(at: int, value: object) -> None:
    """A question with a field that is none is no question."""
    message = holds(record(2))
    asked = ["barge2", 1, record(2).certificate.identity, record(2).signature, bytes(8)]
    assert messages.read(QUERY, HOLDS, message.payload() + b"\n", MESH) == message
    assert messages.read(QUERY, HOLDS, msgpack.packb(asked), MESH) == message
    assert messages.read(QUERY, HOLDS, msgpack.packb([*asked[:at], value, *asked[at + 1 :]]), MESH) is None
    assert messages.read(QUERY, HOLDS, msgpack.packb(asked[:at]), MESH) is None


def test_host_says_whether_this_very_record_is_in_force() -> None:
    """A host can sign two records with one number, and someone can show an older one again."""
    known = Roster({"barge2": record(2, seq=5)})
    assert holds(record(2, seq=5)).answer(known) is True
    assert holds(record(2, seq=5, subnet=record(9).subnet)).answer(known) is False
    assert holds(record(2, seq=6)).answer(known) is False
    assert holds(record(2, seq=4)).answer(known) is None, "it was, perhaps"
    assert replace(holds(record(2, seq=4)), identity=bytes(32)).answer(known) is False
    assert holds(record(2)).answer(Roster()) is False
    dispute = Dispute("subnet", {"barge2": record(2, seq=6), "barge3": record(3)}, {})
    undecided = replace(known, disputes=(dispute,))
    assert holds(record(2, seq=6)).answer(undecided) is None, "it waits for others itself"
    assert holds(record(2, seq=7)).answer(undecided) is False
    kept = replace(known, disputes=(replace(dispute, keeper="barge3"),))
    assert holds(record(2, seq=6)).answer(kept) is False, "another host has it here"
