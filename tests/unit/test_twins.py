"""A host that runs on two machines: who can say so, and for how long it counts."""

import time
from dataclasses import replace
from ipaddress import IPv4Address
from threading import Event

import pytest

from meshd.daemon.exchange import Exchange
from meshd.daemon.hints import Hint
from meshd.endpoint import Endpoint
from meshd.gossip import calls, messages
from meshd.gossip.messages import ANSWER_LIMIT, EVENT, EVENT_LIMIT, QUERY, TWINS, WHERE, Sighting, TellTwins, Where
from meshd.gossip.responder import respond
from meshd.mesh import certificates
from meshd.mesh.model import Host, Record
from meshd.mesh.records import to_wire
from meshd.mesh.roster import Roster
from meshd.mesh.twins import HOLD, MOST, PAUSE, Place, Sightings, Twins
from meshd.reconcile.run import Report
from meshd.state.directory import Claim, State
from tests.conftest import MESH, certificate, record, refusal, seed

HERE, THERE, FAR = (Endpoint(IPv4Address(f"10.10.10.{number}"), 51820) for number in (101, 104, 105))
QUESTION = Where("barge1", record(1).certificate.identity, bytes(8))


def word(twins: Twins, by: str = "barge1") -> TellTwins:
    """What the machine at `twins.one` tells everybody, signed by the identity of `by`."""
    signature = certificates.answer(seed(f"identity of {by}"), "meshd", twins.name, TWINS, b"", refusal=twins.says)
    return TellTwins(twins, signature)


# The other machine says that it has found this one, whose record 5 is in force.
BOTH = Twins("barge1", Place(9, THERE), Place(5, HERE))
OWN = record(1, seq=5)


@pytest.fixture
def hints() -> list[Hint]:
    return []


@pytest.fixture
def exchange(state: State, hints: list[Hint]) -> Exchange:
    """The daemon of barge1, which knows barge2."""
    state.save_claim(Claim(OWN, settled=True))
    exchange = Exchange(state, hints.append, Event())
    exchange.after(Report(Roster({"barge2": record(2, seq=5)})))
    return exchange


def hear(exchange: Exchange, told: TellTwins) -> None:
    exchange.receive(EVENT, TWINS, told.payload(), None)


def test_later_machine_is_the_one_to_stop() -> None:
    """Both places are named, whoever found the other, and the one that came later is to be stopped."""
    text = "barge1 runs on two machines, at 10.10.10.101:51820 and at 10.10.10.104:51820. Stop the one at 10.10.10.104"
    assert str(BOTH).startswith(text)
    assert str(Twins("barge1", BOTH.other, BOTH.one)) == str(BOTH)


@pytest.mark.parametrize(
    "text",
    ["", "5", "x 10.0.0.1:1", "0 10.0.0.1:1", f"{2**48} 10.0.0.1:1", "5 10.0.0.1", "5  10.0.0.1:1", "05 10.0.0.1:1"],
)
def test_place_is_read_in_one_way_alone(text: str) -> None:
    assert Place.read(text) is None
    assert Place.read("5 [fd00::1]:51820") is not None


def test_message_round_trip() -> None:
    """Question and word are read as they were sent; the longest word fits into an event."""
    assert messages.read(QUERY, WHERE, QUESTION.payload() + b"\n", MESH) == QUESTION
    far = Endpoint(HERE.address.__class__("255.255.255.254"), 65535)
    told = word(Twins("barge1", Place(2**48 - 1, far), Place(2**48 - 2, HERE)))
    assert messages.read(EVENT, TWINS, told.payload(), MESH) == told
    assert len(told.payload()) + 60 + 60 < EVENT_LIMIT, "also with the longest name and IPv6 addresses"
    one_place = TellTwins(Twins("barge1", BOTH.one, BOTH.one), bytes(64))
    assert messages.read(EVENT, TWINS, one_place.payload(), MESH) is None


def test_host_says_where_it_runs_to_questions_for_its_identity(state: State) -> None:
    """The answer is signed over the question; nobody else answers, nor a host that has not joined or leaves."""
    query = QUESTION.payload()
    assert respond(state, QUESTION, query).answer is None, "it has not joined"
    state.save_claim(Claim(OWN, settled=True))
    answer = respond(state, QUESTION, query).answer
    assert refusal(WHERE, query, answer) == f"5 {HERE}"
    assert refusal(WHERE, replace(QUESTION, nonce=b"another1").payload(), answer) is None, "an answer shown again"
    for other in (replace(QUESTION, name="barge2"), replace(QUESTION, identity=bytes(32))):
        assert respond(state, other, other.payload()).answer is None
    state.save_claim(Claim(record(1, seq=6, leaving=True), settled=True))
    assert respond(state, QUESTION, query).answer is None


def test_third_host_says_what_it_knows(exchange: Exchange, state: State) -> None:
    """Two machines of which the others know neither hear of each other by what a third host has heard."""
    two = record(2, seq=5)
    asked = Where("barge2", two.certificate.identity, bytes(8))
    answers: list[bytes] = []

    def ask() -> Sighting:
        exchange.receive(QUERY, WHERE, asked.payload(), answers.append)
        answer = Sighting.read(answers[-1], "barge2")
        assert answer is not None
        return answer

    assert ask() == Sighting(to_wire(two))
    told = [word(Twins("barge2", Place(5, two.endpoint), Place(8, THERE)), "barge2")]
    told.append(word(Twins("barge2", told[0].twins.other, told[0].twins.one), "barge2"))
    for one in told:
        hear(exchange, one)
    assert set(ask().words) == set(told)
    assert len(answers[-1]) < ANSWER_LIMIT
    # What the machine that asks makes of that.
    for at, place in ((THERE, told[0].twins.one), (two.endpoint, told[0].twins.other)):
        own = Host("barge2", replace(two, seq=8, endpoint=THERE) if at == THERE else two)
        assert calls._sighted(state, own, at, ask()) == calls.Found(place, is_live=True)


@pytest.mark.parametrize(
    ("others", "found"),
    [
        (record(1, seq=6, endpoint=THERE), calls.Found(Place(6, THERE))),
        (record(1, seq=4, endpoint=THERE), None),
        (record(1, seq=5), None),
        (record(1, seq=6), None),
        (replace(record(1, seq=6), endpoint=THERE), None),
        (record(1, seq=6, endpoint=THERE, leaving=True), None),
        (record(1, seq=6, endpoint=THERE, by=certificate("barge2")), None),
    ],
    ids=["never given", "an old one, shown again", "the own one", "the own endpoint", "forged", "a goodbye", "another"],
)
def test_record_with_number_never_given_is_of_another_machine(
    state: State, others: Record, found: calls.Found | None
) -> None:
    """Of the records that others know, only one that this host has not signed proves that it runs elsewhere."""
    assert calls._sighted(state, Host("barge1", OWN), HERE, Sighting(to_wire(others))) == found


def test_own_question_is_not_answered(exchange: Exchange) -> None:
    """Serf hands on one answer of each name: a host that answers itself would not hear the other machine."""
    answers: list[bytes] = []
    exchange.receive(QUERY, WHERE, QUESTION.payload(), answers.append)
    assert len(answers) == 1
    exchange.twins._asks(QUESTION.payload())
    exchange.receive(QUERY, WHERE, QUESTION.payload(), answers.append)
    assert len(answers) == 1


def test_word_of_other_machine_counts(exchange: Exchange, state: State, hints: list[Hint]) -> None:
    """A host hears from its twin that there are two, and keeps that for `meshd status`; so does a third host."""
    hear(exchange, word(BOTH))
    assert state.twins() == {"barge1": BOTH}
    assert len(hints) == 1
    other = Twins("barge2", Place(5, record(2).endpoint), Place(8, THERE))
    hear(exchange, word(other, "barge2"))
    assert state.twins() == {"barge1": BOTH, "barge2": other}


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(word(BOTH, "barge2"), id="another identity"),
        pytest.param(replace(word(BOTH), twins=replace(BOTH, one=Place(10, THERE))), id="changed on its way"),
        pytest.param(word(Twins("barge1", BOTH.other, BOTH.one)), id="this machine's own word, shown again"),
        pytest.param(word(replace(BOTH, other=Place(4, HERE))), id="of an earlier record, shown again"),
        pytest.param(
            word(Twins("barge2", Place(4, HERE), Place(3, THERE)), "barge2"), id="of another's earlier record"
        ),
        pytest.param(
            word(Twins("barge2", Place(5, record(2).endpoint), Place(9, HERE)), "barge2"), id="of another host"
        ),
        pytest.param(word(Twins("barge9", Place(4, HERE), Place(3, THERE)), "barge9"), id="of nobody"),
    ],
)
def test_word_that_proves_nothing_is_ignored(
    exchange: Exchange, state: State, hints: list[Hint], told: TellTwins
) -> None:
    """Nobody but the identity itself can say that it has a twin, and only of a record that is in force."""
    hear(exchange, told)
    assert (state.twins(), hints) == ({}, [])


def test_host_that_changes_its_word_is_heard_at_times(exchange: Exchange, hints: list[Hint]) -> None:
    """A hostile host makes others write and reconcile once in PAUSE seconds at most."""
    for number in range(50):
        endpoint = Endpoint(IPv4Address(f"10.9.9.{number}"), 51820)
        hear(exchange, word(Twins("barge2", Place(5, record(2).endpoint), Place(8, endpoint)), "barge2"))
    assert len(hints) == 1
    assert PAUSE >= 1


def test_sightings_end_and_are_bounded() -> None:
    """What is not heard again is over after HOLD seconds, and so is what is of no host any more."""
    sightings: Sightings[TellTwins] = Sightings()
    names = [f"barge{number}" for number in range(MOST + 5)]
    hosts: dict[str, Record] = dict.fromkeys(names, OWN)
    assert [sightings.see(replace(BOTH, name=name), 0.0) for name in names].count(True) == MOST
    assert not sightings.see(replace(BOTH, name=names[0]), 10.0), "the same is no news"
    assert sightings.see(replace(BOTH, name=names[0], one=Place(12, FAR)), 10.0)
    del hosts[names[1]]
    assert sightings.expire(hosts, HOLD - 1).keys() == {names[1]}
    assert len(sightings.expire(hosts, HOLD)) == MOST - 2
    assert sightings.known.keys() == {names[0]}


def test_host_that_is_alone_again_publishes_beyond_both(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other machine published counts no more, and neither does what both have said."""
    now = 1000.0
    monkeypatch.setattr("meshd.daemon.twins.time.monotonic", lambda: now)
    hear(exchange, word(BOTH))
    exchange.twins._expire(OWN)
    assert exchange.twins.beyond == 0
    now += HOLD
    exchange.twins._expire(OWN)
    assert exchange.twins.beyond == 9
    assert not exchange.twins._is_in_doubt(Claim(OWN, moved=int(time.time()))), "the others have the other's record"
    assert exchange.twins._is_in_doubt(Claim(record(1, seq=10), moved=int(time.time())))
