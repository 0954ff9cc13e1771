"""The question whether a record is applied, and who may ask what."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshd.gossip.messages import GoneQuestion, Question, announcement, answer_gone, name_question, read_announcement
from meshd.mesh.records import MAX_SEQ, to_wire
from meshd.mesh.tombstones import Graves
from tests.conftest import record
from tests.unit.test_tombstones import graves


@given(st.from_regex(r"[A-Za-z0-9.-]{1,63}", fullmatch=True), st.integers(1, MAX_SEQ - 1))
def test_a_question_survives_its_way(name: str, seq: int) -> None:
    assert Question.parse(Question(name, seq).payload()) == Question(name, seq)


@given(st.binary(max_size=1024))
def test_whatever_comes_is_a_question_or_nothing(payload: bytes) -> None:
    question = Question.parse(payload)
    assert question is None or 0 <= question.seq < MAX_SEQ


@pytest.mark.parametrize(
    "payload", [b"", b"barge1", b"barge1 ", b" 5", b"barge1 -5", b"barge1 9999999999999999", b"a \xd9\xa3"]
)
def test_nonsense_is_no_question(payload: bytes) -> None:
    assert Question.parse(payload) is None


def test_only_who_has_applied_that_record_or_a_newer_one_says_yes() -> None:
    question = Question("barge1", 7)
    assert question.answered_by({"barge1": 7})
    assert question.answered_by({"barge1": 8})
    assert not question.answered_by({"barge1": 6})
    assert not question.answered_by({"barge2": 7})


@given(graves)
def test_asking_page_by_page_gives_all(known: Graves) -> None:
    found = Graves()
    after = ""
    for _ in range(len(known.gone) + len(known.revoked) + 1):
        question = GoneQuestion.parse(GoneQuestion("asker", "0" * 16, after).payload())
        assert question is not None
        page = Graves.read(answer_gone(question, known))
        if not page:
            break
        found, after = found.merged(page), page.last
    assert found == known


@given(graves)
def test_who_knows_the_same_tombstones_keeps_silent(known: Graves) -> None:
    assert answer_gone(GoneQuestion("asker", known.digest), known) == b""
    assert not known or answer_gone(GoneQuestion("asker", Graves().digest), known) != b""


@pytest.mark.parametrize("payload", [b"", b"a", b"a b", b"a b c d", b"\xff b ", b"/ b a"])
def test_nonsense_does_not_ask_for_tombstones(payload: bytes) -> None:
    assert GoneQuestion.parse(payload) is None


def test_an_announcement_survives_its_way_and_fits_into_a_user_event() -> None:
    wire = to_wire(record(1))
    assert read_announcement(announcement("barge1", wire)) == ("barge1", wire)


@given(st.binary(max_size=512))
@example(b"\x82\x00\x00\x80\x00")
def test_whatever_comes_is_an_announcement_or_nothing(payload: bytes) -> None:
    news = read_announcement(payload)
    assert news is None or len(news[0]) <= 63
    name = name_question(payload)
    assert name is None or len(name) <= 63
