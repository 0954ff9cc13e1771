"""What the daemon makes of what others tell it; tests/lab has it at work."""

from threading import Event

from meshd.exchange import Exchange
from meshd.membership import Roster
from meshd.reconcile import Report
from meshd.state import State
from tests.conftest import record


def test_an_announced_record_that_the_tags_brought_already_is_no_reason_for_a_pass(state: State) -> None:
    hints: list[str] = []
    exchange = Exchange(state, hints.append, Event())
    exchange.after(Report(Roster({"barge2": record(2, seq=5)})))
    exchange._hear("barge2", record(2, seq=5))
    assert hints == []
    exchange._hear("barge2", record(2, seq=6))
    assert hints == ["serf: record of barge2"]
