"""The question whether a record is applied, and who may ask what."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.model import Goodbye
from meshd.queries import (
    ANSWER_LIMIT,
    EVENT_LIMIT,
    GoneQuestion,
    Question,
    answer_gone,
    digest,
    pages,
    read_page,
)
from meshd.tags import MAX_SEQ
from tests.conftest import public_key

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?", fullmatch=True)
goodbyes = st.dictionaries(
    names, st.builds(Goodbye, st.integers(1, MAX_SEQ - 1), st.integers().map(lambda n: public_key(str(n)))), max_size=40
)


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


@given(goodbyes, st.sampled_from([EVENT_LIMIT, ANSWER_LIMIT]))
def test_goodbyes_survive_their_way_in_messages_that_serf_carries(gone: dict[str, Goodbye], limit: int) -> None:
    messages = list(pages(gone, limit))
    assert all(len(message) <= limit for message in messages)
    found: dict[str, Goodbye] = {}
    for message in messages:
        found |= read_page(message)
    assert found == gone


@given(st.binary(max_size=1024))
def test_whatever_comes_as_goodbyes_is_goodbyes_or_nothing(payload: bytes) -> None:
    for name, goodbye in read_page(payload).items():
        assert len(name) <= 63
        assert 0 < goodbye.seq < MAX_SEQ


def test_what_is_no_goodbye_is_left_out_of_a_message() -> None:
    good, key = ["barge1", 5, bytes(31) + b"x"], bytes(32)
    bad = [["", 5, good[2]], ["a b", 5, good[2]], ["b", 0, good[2]], ["c", True, good[2]], ["d", 5, key], ["e", 5], 7]
    assert list(read_page(msgpack.packb([*bad, good]))) == ["barge1"]


@given(goodbyes)
def test_asking_page_by_page_gives_all(gone: dict[str, Goodbye]) -> None:
    found: dict[str, Goodbye] = {}
    after = ""
    for _ in range(len(gone) + 1):
        question = GoneQuestion.parse(GoneQuestion("asker", "0" * 16, after).payload())
        assert question is not None
        page = read_page(answer_gone(question, gone))
        if not page:
            break
        found |= page
        after = max(page)
    assert found == gone


def test_who_knows_the_same_goodbyes_keeps_silent() -> None:
    gone = {"barge1": Goodbye(5, public_key("barge1"))}
    assert answer_gone(GoneQuestion("asker", digest(gone)), gone) == b""
    assert answer_gone(GoneQuestion("asker", digest({})), gone) != b""


@pytest.mark.parametrize("payload", [b"", b"a", b"a b", b"a b c d", b"\xff b ", b"a b /"])
def test_nonsense_does_not_ask_for_goodbyes(payload: bytes) -> None:
    assert GoneQuestion.parse(payload) is None
