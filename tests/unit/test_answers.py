"""What a host answers to the others' queries."""

import pytest

from meshd.gossip import responder
from meshd.gossip.messages import BURY, EVENT_LIMIT, YES
from meshd.gossip.responder import bury
from meshd.mesh import certificates
from meshd.mesh.tombstones import Graves
from meshd.state.directory import State
from tests.conftest import AUTHORITY


@pytest.fixture
def graves() -> Graves:
    return Graves(revoked={n: certificates.revoke(AUTHORITY, "meshd", n, f"barge{n}") for n in (5, 6)})


def test_who_has_all_tombstones_says_so_and_nobody_else(state: State, graves: Graves) -> None:
    (page,) = graves.pages(EVENT_LIMIT)
    assert responder.answer(state, BURY, page) is None
    bury(state, Graves(revoked={5: graves.revoked[5]}))
    assert responder.answer(state, BURY, page) is None
    bury(state, graves)
    assert responder.answer(state, BURY, page) == YES
    assert responder.answer(state, BURY, b"") is None
