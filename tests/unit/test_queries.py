"""The question whether a record is applied, and who may ask what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.queries import Question
from meshd.tags import MAX_SEQ


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
