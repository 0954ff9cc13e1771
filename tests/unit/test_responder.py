"""What a host does with the other hosts' messages, by the daemon and by a lone handler."""

from dataclasses import replace

import pytest

from meshd.gossip.messages import (
    APPLIED,
    BURY,
    EVENT_LIMIT,
    Answer,
    Applied,
    AskConfirmation,
    AskRecord,
    AskTombstones,
    TellRecord,
    TellTombstones,
)
from meshd.gossip.responder import NOTHING, merge_tombstones, respond, signed
from meshd.mesh import certificates, extensions, tombstones
from meshd.mesh.membership import admit
from meshd.mesh.model import FORMER, VERSION, Host
from meshd.mesh.records import read_certificate, to_wire
from meshd.mesh.roster import Roster, View
from meshd.mesh.tombstones import Tombstones, grave
from meshd.state.directory import Claim, State
from tests.conftest import AUTHORITY, MESH, NOW, certificate, delegated, delegation, host, member, record, refusal


@pytest.fixture
def two() -> Tombstones:
    return Tombstones(revoked={n: certificates.revoke(AUTHORITY, "meshd", n, f"barge{n}") for n in (5, 6)})


def test_tombstones_are_confirmed_by_a_host_that_has_all_of_them(state: State, two: Tombstones) -> None:
    first = Tombstones(revoked={5: two.revoked[5]})
    assert refusal(BURY, b"first", respond(state, TellTombstones(first), b"first").answer) == ""
    forged = Tombstones(revoked={7: replace(two.revoked[5], serial=7)})
    reply = respond(state, TellTombstones(forged.merged(first)), b"forged")
    assert (reply.answer, reply.tombstones) == (None, None), "one of them was not signed by the authority"
    reply = respond(state, TellTombstones(two), b"two")
    assert (refusal(BURY, b"two", reply.answer), reply.tombstones) == ("", two)
    assert state.roster().all_tombstones == two, "on disk before it is confirmed"
    assert respond(state, TellTombstones(two), b"two").tombstones is None, "no longer news"
    assert respond(state, TellTombstones(two)).answer is None, "nobody answers an event"


def test_answer_counts_for_its_own_question_and_host(state: State, two: Tombstones) -> None:
    """A signed answer is of one host, to one question; as a handler gets the question it has a newline more."""
    answer = respond(state, TellTombstones(two), b"question\n").answer
    assert refusal(BURY, b"question", answer) == ""
    assert refusal(BURY, b"another", answer) is None
    assert refusal(APPLIED, b"question", answer) is None
    assert refusal(BURY, b"question", answer, host(2)) is None
    assert refusal(BURY, b"question", answer, Host("barge2", record(1))) is None
    no = signed(state, BURY, b"question", "why not")
    assert refusal(BURY, b"question", no) == "why not"
    read = Answer.read(no)
    assert read is not None
    assert refusal(BURY, b"question", replace(read, refusal="").payload()) is None


def test_a_host_answers_with_the_tombstones_that_the_asker_lacks(state: State, two: Tombstones) -> None:
    merge_tombstones(state, two)
    answer = respond(state, AskTombstones("barge2", Tombstones().digest)).answer
    assert answer
    assert Tombstones.read(answer, MESH) == two
    assert respond(state, AskTombstones("barge2", two.digest)).answer == b""


def test_a_host_answers_with_its_own_and_with_known_records(state: State) -> None:
    state.save_roster(Roster({"barge2": record(2)}))
    assert respond(state, AskRecord("barge2")).answer == to_wire(record(2))
    assert respond(state, AskRecord("barge1")).answer is None, "not published yet"
    state.save_claim(Claim(record(1), settled=True))
    assert respond(state, AskRecord("barge1")).answer == to_wire(record(1))
    assert respond(state, AskRecord("barge3")).answer is None


@pytest.mark.parametrize("by", ["authority", "delegation"])
def test_a_record_with_unknown_extensions_is_passed_on_bit_by_bit(state: State, by: str) -> None:
    """From its tags into the roster, to disk, into an answer, and as a goodbye into a tombstone."""
    block = extensions.pack({5: b"of a later version", 9: b""})
    signed = {
        "authority": certificate("barge2", extensions=block),
        "delegation": delegated("barge2", delegation(expires=0, extensions=block)),
    }[by]
    newer = record(2, by=signed, extensions=block)
    wire = to_wire(newer)
    view = View(Host("barge1", record(1)), MESH, Roster(), NOW)
    roster = admit(view, [member(2, of=newer)])
    assert roster.refused == {}
    state.save_roster(roster)
    assert State(state.directory).roster().hosts == {"barge2": newer}
    assert respond(state, AskRecord("barge2")).answer == wire
    announced = TellRecord.read(TellRecord("barge2", wire).payload(), MESH)
    assert announced is not None
    assert respond(state, announced).record == newer
    goodbye = record(2, by=signed, extensions=block, leaving=True, seq=2)
    told = Tombstones(grave("barge2", tombstones.of_leaving(goodbye)))
    (event,) = told.pages(EVENT_LIMIT)
    message = TellTombstones.read(event, MESH)
    assert message is not None
    assert respond(state, message).tombstones == told
    page = respond(State(state.directory), AskTombstones("barge3", "")).answer
    assert page == event
    assert to_wire(goodbye) in page


def test_an_announced_record_counts_if_its_owner_signed_it(state: State) -> None:
    reply = respond(state, TellRecord("barge2", to_wire(record(2))))
    assert (reply.name, reply.record, reply.answer) == ("barge2", record(2), None)
    assert respond(state, TellRecord("barge3", to_wire(record(2)))) == NOTHING
    assert respond(state, TellRecord("barge2", b"noise")) == NOTHING


def test_the_authority_alone_confirms_and_only_known_hosts(state: State) -> None:
    joined = record(2, by=delegated("barge2", delegation(expires=0)))
    state.save_roster(Roster({"barge2": joined, "barge3": record(3)}))
    assert respond(state, AskConfirmation("barge2")).answer is None, "this host does not hold the authority"
    state.save_authority_key(AUTHORITY)
    answer = respond(state, AskConfirmation("barge2")).answer
    assert answer
    certificate = AskConfirmation.read_answer(answer)
    MESH.trust.check_certificate("barge2", certificate)
    assert certificate.identity == joined.certificate.identity
    assert respond(state, AskConfirmation("barge3")).answer is None, "certified by the authority already"
    assert respond(state, AskConfirmation("barge4")).answer is None


def test_the_authority_confirms_whom_it_cannot_take_before(state: State) -> None:
    """A host that waits since its invitation's share is used up waits for nothing else."""
    state.save_authority_key(AUTHORITY)
    waiting = {"barge2": record(2, by=delegated("barge2", delegation(expires=0)))}
    assert respond(state, AskConfirmation("barge2"), b"").answer is None
    answer = respond(state, AskConfirmation("barge2"), b"", waiting=waiting).answer
    assert answer
    MESH.trust.check_certificate("barge2", AskConfirmation.read_answer(answer))


def test_a_revocation_alone_makes_the_file_small_again(state: State) -> None:
    """All tombstones by a reusable invitation go with it, in the moment in which the host hears of that."""
    by = delegation(expires=0)
    left = {n: tombstones.of_leaving(record(n, by=delegated(f"barge{n}", by), leaving=True)) for n in range(20, 120)}
    assert merge_tombstones(state, Tombstones({f"barge{n}": {t.identity: t} for n, t in left.items()}))
    size = (state.directory / "hosts.json").stat().st_size
    word = certificates.revoke(AUTHORITY, "meshd", by.serial, "invitation")
    assert merge_tombstones(state, Tombstones(revoked={by.serial: word}))
    assert state.roster() == Roster(revoked={by.serial: word})
    assert (state.directory / "hosts.json").stat().st_size < size / 50
    assert not merge_tombstones(state, Tombstones(grave("barge20", left[20]))), "no news any more"


def test_the_authority_confirms_its_own_host_and_those_of_version_2(state: State) -> None:
    """A certificate of version 2 is given anew in version 3, to a host whose record says that it can read it."""
    state.save_authority_key(AUTHORITY)
    old = {n: certificate(f"barge{n}", version=FORMER) for n in (1, 2, 3)}
    state.save_claim(Claim(record(1, by=old[1]), settled=True))
    state.save_roster(Roster({"barge2": record(2, by=old[2]), "barge3": record(3, version=FORMER)}))
    for number in (1, 2):
        answer = respond(state, AskConfirmation(f"barge{number}")).answer
        assert answer
        read = AskConfirmation.read_answer(answer)
        MESH.trust.check_certificate(f"barge{number}", read)
        assert read == certificate(f"barge{number}")
        assert read.improves(old[number])
        assert not read.improves(read)
    assert respond(state, AskConfirmation("barge3")).answer is None


def test_a_host_of_version_2_is_confirmed_in_version_2(state: State) -> None:
    """A host that still runs version 2 could read no other certificate."""
    state.save_authority_key(AUTHORITY)
    joined = record(2, by=delegated("barge2", delegation(version=FORMER, expires=0)), version=FORMER)
    state.save_roster(Roster({"barge2": joined}))
    answer = respond(state, AskConfirmation("barge2")).answer
    assert answer
    given = read_certificate(answer, is_delegated=False, version=FORMER)
    MESH.trust.check_certificate("barge2", given)
    # Later it runs version 3, with the certificate that it got: serial and date stay.
    state.save_roster(Roster({"barge2": record(2, by=given)}))
    newer = AskConfirmation.read_answer(respond(state, AskConfirmation("barge2")).answer or b"")
    assert (newer.version, newer.serial, newer.since) == (VERSION, given.serial, given.since)


def test_readiness_is_left_to_the_caller(state: State) -> None:
    assert respond(state, Applied.of(host(2), bytes(8)), b"question") == NOTHING


def test_own_tombstone_of_a_leaving_host_does_not_end_it(state: State) -> None:
    """Serf delivers a user event to its sender as well: without a daemon, the handler hears of its own host."""
    last = record(1, seq=9, leaving=True)
    state.save_claim(Claim(last, settled=True))
    assert not merge_tombstones(state, Tombstones(grave("barge1", tombstones.of_leaving(last))))
    assert state.roster().gone == {}
