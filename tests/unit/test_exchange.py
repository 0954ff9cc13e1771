"""What the daemon makes of what others tell it; tests/lab has it at work."""

import time
from dataclasses import replace
from ipaddress import IPv4Address
from threading import Event

from meshd.exchange import ASK_AGAIN, Exchange
from meshd.membership import Roster
from meshd.model import Endpoint
from meshd.reconcile import Report
from meshd.state import State
from tests.conftest import member, record


def test_an_announced_record_that_the_tags_brought_already_is_no_reason_for_a_pass(state: State) -> None:
    hints: list[str] = []
    exchange = Exchange(state, hints.append, Event())
    exchange.after(Report(Roster({"barge2": record(2, seq=5)})))
    exchange._hear("barge2", record(2, seq=5))
    assert hints == []
    exchange._hear("barge2", record(2, seq=6))
    assert hints == ["serf: record of barge2"]


def test_while_a_host_is_lost_the_others_are_asked_whether_it_has_said_goodbye(state: State) -> None:
    exchange = Exchange(state, lambda _: None, Event())
    met = Report(members=tuple(member(n) for n in (1, 2, 3, 4)))
    exchange.after(met)
    exchange._jobs.get_nowait()  # who meets many at once has been away
    exchange.after(met)
    assert exchange._jobs.empty()
    lost = replace(met, lost={"barge5": Endpoint(IPv4Address("10.0.0.5"), 7946)})
    exchange.after(lost)
    exchange.after(lost)
    assert exchange._jobs.qsize() == 1, "once, until it is time again"
    exchange.after(replace(met, lost={"barge6": Endpoint(IPv4Address("10.0.0.6"), 7946)}))
    assert exchange._jobs.qsize() == 2, "but at once of another"
    exchange._asked_at.clear()  # as when the pause is over
    exchange._lost_since = time.monotonic() - ASK_AGAIN
    exchange.after(replace(met, lost={"barge6": Endpoint(IPv4Address("10.0.0.6"), 7946)}))
    assert exchange._jobs.qsize() == 2, "and no longer of the same after a minute"
