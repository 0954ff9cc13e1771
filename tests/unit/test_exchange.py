"""What the daemon hears from the other hosts, and what it answers; test_asking.py has what it asks."""

import sys
import threading
import time
from collections.abc import Collection, Iterator
from threading import Event

import pytest

from meshd.daemon.asking import PullTombstones
from meshd.daemon.exchange import MAX_HEARD, MAX_WAITING, Exchange
from meshd.daemon.hints import READINESS, Hint, Source
from meshd.gossip.calls import gather
from meshd.gossip.messages import (
    ANSWER_LIMIT,
    APPLIED,
    EVENT,
    GONE,
    QUERY,
    RECORD,
    AskTombstones,
    TellRecord,
)
from meshd.mesh import certificates
from meshd.mesh.records import to_wire
from meshd.mesh.roster import Roster
from meshd.mesh.tombstones import Tombstones
from meshd.reconcile.run import Report
from meshd.state.directory import State
from tests.conftest import AUTHORITY, MESH, applied, certificate, delegated, delegation, member, record, refusal, seed


def exchange_of(state: State, hints: list[Hint] | None = None) -> Exchange:
    return Exchange(state, (hints if hints is not None else []).append, Event())


def announce(exchange: Exchange, number: int, seq: int) -> None:
    name = f"barge{number}"
    payload = TellRecord(name, to_wire(record(number, seq=seq))).payload()
    exchange.receive(EVENT, RECORD, payload, None)


def test_a_heard_record_is_kept_for_the_next_reconcile_if_it_is_newer(state: State) -> None:
    hints: list[Hint] = []
    exchange = exchange_of(state, hints)
    exchange.after(Report(Roster({"barge2": record(2, seq=5)})))
    announce(exchange, 2, seq=5)
    assert (exchange.heard, hints) == ({}, []), "the tags have brought it already"
    announce(exchange, 2, seq=6)
    assert exchange.heard == {"barge2": record(2, seq=6)}
    assert hints == [Hint(Source.MESH, "record of barge2")]
    announce(exchange, 2, seq=6)
    assert len(hints) == 1


def test_a_record_that_never_counts_is_not_kept(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = exchange_of(state)
    exchange.after(Report(Roster({"barge2": record(2)})))
    usurper = record(2, seq=2**40, by=delegated("barge2", delegation()))  # whose certificate has expired
    for name in ("barge2", "barge3"):
        exchange.hear(name, usurper)
    exchange.hear("barge2", record(2, seq=9, leaving=True))
    assert exchange.heard == {}
    exchange.hear("barge2", record(2, seq=5))
    assert exchange.heard == {"barge2": record(2, seq=5)}
    brief = certificate("barge3", expires=int(time.time()) + 60)
    exchange.hear("barge3", record(3, by=brief))
    exchange.after(Report())
    assert sorted(exchange.heard) == ["barge2", "barge3"]
    monkeypatch.setattr("meshd.daemon.exchange.time.time", lambda: float(brief.expires))
    exchange.after(Report())
    assert sorted(exchange.heard) == ["barge2"]


def test_heard_records_are_bounded(state: State) -> None:
    exchange = exchange_of(state)
    for number in range(2 * MAX_HEARD):
        exchange.hear(f"name{number}", record(3))
    assert len(exchange.heard) == MAX_HEARD


def test_readiness_waits_for_the_reconcile_that_applies_the_record(state: State) -> None:
    hints: list[Hint] = []
    exchange, answers = exchange_of(state, hints), list[bytes]()
    question = applied(record(2, seq=5))
    exchange.receive(QUERY, APPLIED, question, answers.append)
    assert (answers, hints, exchange.is_asked) == ([], [READINESS], True)
    exchange.after(Report(Roster({"barge2": record(2, seq=5)})))
    assert ([refusal(APPLIED, question, a) for a in answers], exchange.is_asked) == ([""], False)
    exchange.receive(QUERY, APPLIED, question, answers.append)
    assert (len(answers), hints) == (2, [READINESS]), "answered at once, and no reason to look again"
    exchange.receive(QUERY, APPLIED, applied(record(1, seq=5), 1), answers.append)
    assert not exchange.is_asked, "a host does not confirm its own record"


def test_refused_record_is_answered_with_the_reason(state: State) -> None:
    """A host that refuses a record says so, and why; it stays silent about a record that is on its way."""
    exchange, answers = exchange_of(state), list[bytes]()
    refused = Report(Roster(refused={"barge2": "its subnet is\x1b taken"}), (member(1), member(2)))
    exchange.after(refused)
    exchange.receive(QUERY, APPLIED, applied(record(2, seq=2)), answers.append)
    assert (answers, exchange.is_asked) == ([], True)
    question = applied(record(2))
    exchange.receive(QUERY, APPLIED, question, answers.append)
    assert [refusal(APPLIED, question, answer) for answer in answers] == ["its subnet is\\x1b taken"]
    exchange.after(Report(Roster(refused={"barge2": "ü" * 1000}), refused.members))
    exchange.receive(QUERY, APPLIED, question, answers.append)
    assert len(answers[1]) < ANSWER_LIMIT


def test_stale_record_is_no_answer_for_another_machine(state: State) -> None:
    """Who shows an older record of its identity than the one in force is told so, and not yes."""
    exchange, answers = exchange_of(state), list[bytes]()
    stale = Roster({"barge2": record(2, seq=6)}, stale={"barge2": "its record 5 is older"})
    exchange.after(Report(stale, (member(1), member(2, of=record(2, seq=5)))))
    question = applied(record(2, seq=5))
    exchange.receive(QUERY, APPLIED, question, answers.append)
    assert [refusal(APPLIED, question, answer) for answer in answers] == ["its record 5 is older"]


def test_questions_that_wait_are_bounded(state: State) -> None:
    """A flood of questions does not fill the memory."""
    exchange = exchange_of(state)
    for number in range(2 * MAX_WAITING):
        exchange.receive(QUERY, APPLIED, applied(record(2, seq=5), number), lambda _: None)
    assert len(exchange._waiting) == MAX_WAITING


def test_a_host_that_knows_other_tombstones_is_asked_back(state: State) -> None:
    exchange = exchange_of(state)
    question = AskTombstones("barge2", "another").payload()
    exchange.receive(QUERY, GONE, question, lambda _: None)
    assert exchange._jobs.empty(), "barge2 is no host"
    exchange.after(Report(Roster({"barge2": record(2)})))
    exchange.receive(QUERY, GONE, question, lambda _: None)
    assert exchange._jobs.get_nowait() == PullTombstones(frozenset({"barge2"}))


def test_threads_share_an_exchange(state: State) -> None:
    exchange, ended = exchange_of(state), Event()
    met = Report(Roster({"barge2": record(2)}), (member(1), member(2)))

    def hear(thread: int) -> None:
        number = 0
        while not ended.is_set():
            exchange.hear(f"barge{thread}-{number}", record(2))
            exchange.receive(QUERY, GONE, AskTombstones("barge2", str(number)).payload(), lambda _: None)
            exchange._jobs.queue.clear()
            number += 1

    threads = [threading.Thread(target=hear, args=(thread,)) for thread in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(200):
            exchange.after(met)
    finally:
        ended.set()
        sys.setswitchinterval(before)
        for thread in threads:
            thread.join()
    assert exchange.heard


def revocations(numbers: range, by: bytes) -> Tombstones:
    return Tombstones(revoked={n: certificates.revoke(by, "meshd", n, "barge2") for n in numbers})


def test_gather_does_not_follow_a_host_that_makes_up_tombstones() -> None:
    all_of_them, asked = revocations(range(1, 40), AUTHORITY), []

    def ask(names: Collection[str], begin: str) -> Iterator[tuple[str, bytes]]:
        asked.append(begin)
        assert len(asked) < 100, "without end"
        for name in names:
            if name == "barge2":
                yield name, AskTombstones("barge1", "", begin).page(all_of_them)
            else:
                (page,) = revocations(range(len(asked), len(asked) + 1), seed("thief")).pages(ANSWER_LIMIT)
                yield name, page

    assert gather(ask, ["thief"], MESH, "", 30) == (Tombstones(), "")
    assert len(asked) == 1
    assert gather(ask, ["barge2", "thief"], MESH, "", 30) == (all_of_them, ""), "nor does it hide others' answers"


def test_gather_ends_in_time_and_resumes() -> None:
    all_of_them = revocations(range(1, 40), AUTHORITY)

    def ask(names: Collection[str], begin: str) -> Iterator[tuple[str, bytes]]:
        time.sleep(0.01)
        for name in names:
            yield name, AskTombstones("barge1", "", begin).page(all_of_them)

    found, begin, rounds = Tombstones(), "", 0
    while rounds == 0 or begin:
        more, begin = gather(ask, ["barge2"], MESH, begin, 0.005)
        found, rounds = found.merged(more), rounds + 1
    assert found == all_of_them
    assert rounds > 2
