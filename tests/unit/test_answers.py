"""What a host answers to the others' queries."""

import pytest

from meshd import answers, credentials
from meshd.queries import BURY, EVENT_LIMIT, YES
from meshd.reconcile import bury
from meshd.state import State
from meshd.tombstones import Graves
from tests.conftest import AUTHORITY


@pytest.fixture
def graves() -> Graves:
    return Graves(revoked={n: credentials.revoke(AUTHORITY, "meshd", n, f"barge{n}") for n in (5, 6)})


def test_who_has_all_tombstones_says_so_and_nobody_else(state: State, graves: Graves) -> None:
    (page,) = graves.pages(EVENT_LIMIT)
    assert answers.answer(state, BURY, page) is None
    bury(state, Graves(revoked={5: graves.revoked[5]}))
    assert answers.answer(state, BURY, page) is None
    bury(state, graves)
    assert answers.answer(state, BURY, page) == YES
    assert answers.answer(state, BURY, b"") is None
