"""What hosts ask and tell each other over Serf, as bytes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshd.gossip import messages
from meshd.gossip.messages import (
    APPLIED,
    EVENT,
    EVENT_LIMIT,
    GONE,
    QUERY,
    RECORD,
    Applied,
    AskTombstones,
    TellRecord,
)
from meshd.mesh.records import MAX_SEQ, to_wire
from meshd.mesh.tombstones import Tombstones
from tests.conftest import MESH, record
from tests.unit.test_tombstones import all_tombstones


@given(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?", fullmatch=True), st.integers(1, MAX_SEQ - 1))
def test_applied_round_trip(name: str, seq: int) -> None:
    message = Applied(name, seq)
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


@pytest.mark.parametrize(
    "payload", [b"", b"barge1", b"barge1 ", b" 5", b"barge1 -5", b"barge1 9999999999999999", b"a \xd9\xa3", b"a/b 5"]
)
def test_applied_refuses_nonsense(payload: bytes) -> None:
    assert messages.read(QUERY, APPLIED, payload, MESH) is None


def test_applied_is_answered_by_that_record_or_a_newer_one() -> None:
    question = Applied("barge1", 7)
    assert question.is_answered_by({"barge1": 7})
    assert question.is_answered_by({"barge1": 8})
    assert not question.is_answered_by({"barge1": 6})
    assert not question.is_answered_by({"barge2": 7})


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
