"""What the daemon makes of what others tell it; tests/lab has it at work."""

import math
import sys
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from threading import Event

from meshd.daemon.exchange import ASK_AGAIN, MOST_HEARD, MOST_JOBS, Exchange
from meshd.endpoint import Endpoint
from meshd.gossip.calls import gather
from meshd.gossip.messages import ANSWER_LIMIT, GoneQuestion, answer_gone
from meshd.mesh import certificates
from meshd.mesh.membership import Roster
from meshd.mesh.tombstones import Graves
from meshd.reconcile.run import Report
from meshd.state.directory import State
from tests.conftest import AUTHORITY, MESH, certificate, delegated, delegation, member, record, seed


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
    met = Report(Roster({f"barge{n}": record(n) for n in (2, 3, 4)}), tuple(member(n) for n in (1, 2, 3, 4)))
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
    exchange._asked_at = {"anybody": math.inf}  # as when the pause of all else is over
    exchange._lost_since = time.monotonic() - ASK_AGAIN
    exchange.after(replace(met, lost={"barge6": Endpoint(IPv4Address("10.0.0.6"), 7946)}))
    assert exchange._jobs.qsize() == 2, "and no longer of the same after a minute"


def test_a_crowd_of_bogus_members_stands_before_no_question_for_goodbyes(state: State) -> None:
    exchange = Exchange(state, lambda _: None, Event())
    hosts, bogus = {f"barge{n}": record(n) for n in (2, 3, 4)}, {f"bogus{n}": "no record" for n in range(100)}
    met = Report(Roster(hosts, refused=bogus), tuple(member(n) for n in (1, 2, 3, 4)))
    for _ in range(20):
        exchange.after(met)
    assert exchange._jobs.qsize() < MOST_JOBS // 2, "bogus members leave room"
    exchange._jobs.queue.clear()
    exchange._asked_at = {"anybody": math.inf}
    exchange.after(met)
    assert exchange._meet_anybody not in exchange._jobs.queue, "where most members are hosts, gossip will do"
    crowd = tuple(replace(member(9), name=name) for name in bogus)
    exchange.after(replace(met, members=met.members + crowd[:4]))
    assert exchange._meet_anybody not in exchange._jobs.queue, "as where half of them are"
    for name in hosts:
        exchange._ask_back(GoneQuestion(name, "another"))
    exchange._asked_at.pop("anybody")
    exchange.after(replace(met, members=met.members + crowd[:5]))
    assert exchange._meet_anybody in exchange._jobs.queue, "they meet in a crowd"
    assert exchange._ask_anybody in exchange._jobs.queue, "and ask from time to time, whatever else is to be asked"


def test_a_record_that_never_counts_is_not_kept_and_stands_before_no_other(state: State) -> None:
    exchange = Exchange(state, lambda _: None, Event())
    exchange.after(Report(Roster({"barge2": record(2)})))
    usurper = record(2, seq=2**40, by=delegated("barge2", delegation()))  # which has ended
    for name in ("barge2", "barge3"):
        exchange._hear(name, usurper)
    exchange._hear("barge2", record(2, seq=9, leaving=True))
    assert exchange.heard == {}
    exchange._hear("barge2", record(2, seq=5))
    assert exchange.heard == {"barge2": record(2, seq=5)}
    brief = certificate("barge3", expires=int(time.time()) + 1)
    exchange._hear("barge3", record(3, by=brief))
    exchange.after(Report())
    assert sorted(exchange.heard) == ["barge2", "barge3"]
    time.sleep(max(0.0, brief.expires - time.time()))
    exchange.after(Report())
    assert sorted(exchange.heard) == ["barge2"]
    for number in range(2 * MOST_HEARD):
        exchange._hear(f"name{number}", record(3))
    assert len(exchange.heard) == MOST_HEARD


def test_only_hosts_are_asked_back_and_so_many_at_once(state: State) -> None:
    exchange = Exchange(state, lambda _: None, Event())
    hosts = {f"barge{number}": record(2) for number in range(2, 50)}
    exchange.after(Report(Roster(hosts)))
    for number in range(100):
        exchange._ask_back(GoneQuestion(f"invented{number}", "another"))
    assert exchange._jobs.empty()
    for name in hosts:
        exchange._ask_back(GoneQuestion(name, "another"))
    assert exchange._jobs.qsize() == MOST_JOBS // 2


def test_whom_the_gossip_key_alone_makes_a_member_is_asked_nothing(state: State) -> None:
    exchange = Exchange(state, lambda _: None, Event())
    exchange.after(Report(members=tuple(member(n) for n in (1, 2, 3, 4))))
    assert exchange._jobs.empty()


def test_records_are_heard_while_a_pass_ends(state: State) -> None:
    exchange, ended = Exchange(state, lambda _: None, Event()), Event()

    def hear(thread: int) -> None:
        number = 0
        while not ended.is_set():
            exchange._hear(f"barge{thread}-{number}", record(2))
            exchange._ask_soon(lambda: None, (thread, number))
            exchange._jobs.queue.clear()
            number += 1

    threads = [threading.Thread(target=hear, args=(thread,)) for thread in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(200):
            exchange.after(Report())
            exchange._ask_soon(lambda: None, "more")
    finally:
        ended.set()
        sys.setswitchinterval(before)
        for thread in threads:
            thread.join()
    assert exchange.heard


def revocations(numbers: range, by: bytes) -> Graves:
    return Graves(revoked={n: certificates.revoke(by, "meshd", n, "barge2") for n in numbers})


def test_who_makes_up_tombstones_without_end_is_not_asked_on() -> None:
    all_of_them, asked = revocations(range(1, 40), AUTHORITY), []

    def ask(names: Collection[str], begin: str) -> Iterator[tuple[str, bytes]]:
        asked.append(begin)
        assert len(asked) < 100, "for ever"
        for name in names:
            if name == "barge2":
                yield name, answer_gone(GoneQuestion("barge1", "", begin), all_of_them)
            else:
                (page,) = revocations(range(len(asked), len(asked) + 1), seed("thief")).pages(ANSWER_LIMIT)
                yield name, page

    assert gather(ask, ["thief"], MESH, "", 30) == (Graves(), "")
    assert len(asked) == 1
    assert gather(ask, ["barge2", "thief"], MESH, "", 30) == (all_of_them, ""), "nor does it hide the others' answers"


def test_asking_for_tombstones_ends_in_time_and_goes_on_where_it_has_ended() -> None:
    all_of_them = revocations(range(1, 40), AUTHORITY)

    def ask(names: Collection[str], begin: str) -> Iterator[tuple[str, bytes]]:
        time.sleep(0.01)
        for name in names:
            yield name, answer_gone(GoneQuestion("barge1", "", begin), all_of_them)

    found, begin, rounds = Graves(), "", 0
    while rounds == 0 or begin:
        more, begin = gather(ask, ["barge2"], MESH, begin, 0.005)
        found, rounds = found.merged(more), rounds + 1
    assert found == all_of_them
    assert rounds > 2
