"""Whose a claim is that a host cannot settle by itself: what the others say of it."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint
from meshd.mesh import conflicts
from meshd.mesh.membership import admit
from meshd.mesh.model import Member, Record, Status, Tombstone
from meshd.mesh.roster import Roster, View
from meshd.mesh.tombstones import grave
from meshd.mesh.votes import Dispute, Vote, Votes, claim_of, is_open, winner
from tests.conftest import MESH, NOW, certificate, delegated, delegation, host, member, public_key, record

# barge2, whose certificate has the lower serial, claims the subnet of barge3.
OLDER = certificate("barge2", serial=1)
CLAIMS = {"barge2": record(2, subnet=record(3).subnet, by=OLDER), "barge3": record(3)}
VOTERS = ("barge5", "barge6", "barge7")
DISPUTE = Dispute("subnet", CLAIMS, {f"barge{n}": record(n) for n in (5, 6, 7)})


def vote(yes: Collection[str] = (), no: Collection[str] = (), asked: Collection[str] = VOTERS) -> Vote:
    return Vote().with_answers(asked, dict.fromkeys(yes, True) | dict.fromkeys(no, False))


def invited(number: int, subnet: int = 3) -> Record:
    """The record of a host that came by a reusable invitation."""
    return record(number, subnet=record(subnet).subnet, by=delegated(f"barge{number}", delegation()))


def votes(claims: Mapping[str, Record] = CLAIMS, /, **of: Vote) -> Votes:
    return {claim_of(name, claims[name]): vote for name, vote in of.items()}


def test_claim_that_only_one_host_is_said_to_have_wins() -> None:
    assert winner(DISPUTE, votes(barge2=vote(no=VOTERS), barge3=vote(VOTERS))) == "barge3"


def test_nobody_wins_before_most_voters_have_answered_on_each_claim() -> None:
    """One voter that lies, and keeps the others from being heard, decides nothing."""
    assert winner(DISPUTE, {}) is None
    assert winner(DISPUTE, votes(barge3=vote(VOTERS))) is None, "the other one was not asked about"
    for other in (vote(), vote(no=VOTERS[:1]), vote(no=VOTERS, asked=())):
        assert winner(DISPUTE, votes(barge2=vote(["barge5"], VOTERS[1:]), barge3=other)) is None
    assert winner(DISPUTE, votes(barge2=vote(no=VOTERS[:2]), barge3=vote(["barge5"], ["barge6"]))) == "barge3"


def test_nobody_wins_while_voters_disagree() -> None:
    said = votes(barge2=vote(["barge5"], VOTERS[1:]), barge3=vote(VOTERS[1:], ["barge5"]))
    assert winner(DISPUTE, said) is None


def test_word_of_who_is_no_voter_any_more_does_not_count() -> None:
    """A host may be revoked after it was asked."""
    said = votes(barge2=vote(["barge9"], VOTERS, [*VOTERS, "barge9"]), barge3=vote(VOTERS))
    assert winner(DISPUTE, said) == "barge3"


def test_rank_decides_if_all_voters_say_that_nobody_has_it() -> None:
    assert winner(DISPUTE, votes(barge2=vote(no=VOTERS), barge3=vote(no=VOTERS))) == "barge2"
    assert winner(DISPUTE, votes(barge2=vote(no=VOTERS), barge3=vote(no=VOTERS[1:]))) is None
    assert winner(DISPUTE, votes(barge2=vote(no=VOTERS))) is None


def test_without_voters_the_only_certified_host_comes_first() -> None:
    assert winner(Dispute("subnet", CLAIMS, {}), {}) is None, "both are certified"
    one = {"barge2": invited(2), "barge3": record(3), "barge4": invited(4)}
    assert winner(Dispute("subnet", one, {}), {}) == "barge3"
    assert winner(Dispute("subnet", {"barge2": invited(2), "barge4": invited(4)}, {}), {}) is None


def test_claims_by_invitation_that_were_not_asked_about_stop_nobody() -> None:
    """Anyone with a reusable invitation makes more claims than are asked about."""
    claims = {"barge2": invited(2), "barge3": record(3), "barge4": invited(4)}
    dispute = Dispute("subnet", claims, DISPUTE.voters)
    assert winner(dispute, votes(claims, barge3=vote(VOTERS))) == "barge3"
    assert winner(dispute, votes(claims, barge3=vote(no=VOTERS))) is None, "one of the others may have it"
    assert winner(dispute, votes(claims, barge3=vote(no=VOTERS), barge4=vote(VOTERS))) == "barge4"


def test_later_answer_of_a_voter_replaces_the_earlier_one() -> None:
    first = vote(["barge5"], VOTERS[1:])
    assert first.has(True, VOTERS) == {"barge5"}
    assert first.with_answers(["barge5"], {"barge5": False}).has(True, VOTERS) == set()
    assert first.with_answers(["barge5"], {}).has(True, VOTERS) == {"barge5"}, "it did not answer"


# --- admission -----------------------------------------------------------------------------------------------------


def admitted(
    members: list[Member],
    said: Votes | None,
    known: Mapping[str, Record] | None = None,
    *,
    is_newcomer: bool = False,
) -> Roster:
    return admit(View(host(1), MESH, Roster(known or {}), NOW), members, votes=said, is_newcomer=is_newcomer)


def claims(**of: Record) -> list[Member]:
    return [member(int(name.removeprefix("barge")), of=record) for name, record in of.items()]


def disputed(roster: Roster) -> list[list[str]]:
    return [sorted(dispute.claims) for dispute in roster.disputes]


SAME = {
    "subnet": CLAIMS["barge2"],
    "WireGuard key": record(2, key="barge3", by=OLDER),
    "endpoint": record(2, endpoint=record(3).endpoint, by=OLDER),
}


@pytest.mark.parametrize("what", SAME)
def test_newcomer_gives_to_nobody_what_two_strangers_claim(what: str) -> None:
    """It gives it to the one that others have in force, whatever the certificates say."""
    members = claims(barge2=SAME[what], barge3=record(3), barge5=record(5), barge6=invited(6, 6))
    roster = admitted(members, {})
    assert sorted(roster.hosts) == ["barge5", "barge6"]
    assert disputed(roster) == [["barge2", "barge3"]]
    assert sorted(roster.disputes[0].voters) == ["barge5"], "the authority itself has certified it"
    assert roster.refused["barge2"].startswith(what)
    assert "is claimed by barge3 as well, and the other hosts do not agree" in roster.refused["barge2"]
    said = {claim_of("barge2", SAME[what]): vote(no=VOTERS), claim_of("barge3", record(3)): vote(VOTERS)}
    roster = admitted(members, said)
    assert sorted(roster.hosts) == ["barge3", "barge5", "barge6"]
    assert roster.refused["barge2"].startswith(what)
    assert roster.refused["barge2"].endswith(" is held by barge3")
    assert sorted(admitted(members, {}, roster.hosts).hosts) == ["barge3", "barge5", "barge6"], "it is known now"


def test_party_of_one_dispute_votes_on_another() -> None:
    """Otherwise one record would take the vote from several hosts."""
    members = claims(
        barge2=record(2, subnet=record(3).subnet, endpoint=record(5).endpoint), barge3=record(3), barge5=record(5)
    )
    voters = {dispute.place.split()[0]: sorted(dispute.voters) for dispute in admitted(members, {}).disputes}
    assert voters == {"subnet": ["barge5"], "endpoint": ["barge3"]}


def test_dead_host_votes() -> None:
    """Whoever has the gossip key can make a host look dead."""
    dead = member(5, Status.FAILED)
    assert list(admitted([*claims(**CLAIMS), dead], {}).disputes[0].voters) == ["barge5"]


def test_known_host_takes_no_strangers_subnet() -> None:
    known = {"barge2": record(2)}
    moved = record(2, seq=2, subnet=record(3).subnet)
    roster = admitted(claims(barge2=moved, barge3=record(3)), {}, known)
    assert (roster.hosts, disputed(roster)) == (known, [["barge2", "barge3"]])


def test_known_host_moves_whatever_invited_strangers_claim() -> None:
    known = {"barge2": record(2)}
    moved = record(2, seq=2, subnet=record(9).subnet)
    roster = admitted(claims(barge2=moved, barge3=invited(3, 9), barge4=invited(4, 9)), {}, known)
    assert (roster.hosts, roster.disputes) == ({"barge2": moved}, ())


def test_what_a_known_host_has_is_not_disputed() -> None:
    known = {"barge3": record(3)}
    members = claims(barge2=CLAIMS["barge2"], barge3=record(3), barge4=record(4, subnet=record(3).subnet))
    roster = admitted(members, {}, known)
    assert (roster.hosts, roster.disputes) == (known, ())
    assert roster.refused["barge2"] == f"subnet {record(3).subnet} is held by barge3"


def test_subnet_that_a_known_host_gives_up_is_disputed() -> None:
    known = {"barge4": record(4)}
    members = claims(
        barge2=record(2, subnet=record(4).subnet),
        barge3=record(3, subnet=record(4).subnet),
        barge4=record(4, seq=2, subnet=record(9).subnet),
    )
    roster = admitted(members, {}, known)
    assert (sorted(roster.hosts), disputed(roster)) == (["barge4"], [["barge2", "barge3"]])


def test_newcomer_that_met_the_thief_first_takes_the_others_word() -> None:
    """Whoever has the gossip key can hide a host's tags from a newcomer for a while."""
    met = admitted(claims(barge2=CLAIMS["barge2"], barge5=record(5)), {}, is_newcomer=True)
    assert sorted(met.hosts) == ["barge2", "barge5"]
    members = claims(**CLAIMS, barge5=record(5))
    undecided = admitted(members, {}, met.hosts, is_newcomer=True)
    assert (undecided.hosts, disputed(undecided)) == (met.hosts, [["barge2", "barge3"]]), "it keeps it until then"
    assert undecided.refused == {"barge3": f"subnet {record(3).subnet} is held by barge2"}
    said = votes(barge2=vote(no=["barge5"], asked=["barge5"]), barge3=vote(["barge5"], asked=["barge5"]))
    roster = admitted(members, said, met.hosts, is_newcomer=True)
    assert sorted(roster.hosts) == ["barge3", "barge5"]
    assert roster.refused == {"barge2": f"subnet {record(3).subnet} is held by barge3"}
    assert admitted(members, said, met.hosts).hosts == met.hosts, "a host that is no newcomer keeps whom it knows"


def test_own_subnet_is_not_disputed() -> None:
    members = claims(barge2=record(2, subnet=record(1).subnet), barge3=record(3, subnet=record(1).subnet))
    roster = admitted(members, {}, is_newcomer=True)
    assert roster.disputes == ()
    assert roster.refused == dict.fromkeys(("barge2", "barge3"), f"subnet {record(1).subnet} is held by barge1")


def test_dead_host_does_not_claim_an_endpoint() -> None:
    dead = member(2, Status.FAILED, of=record(2, endpoint=Endpoint(record(3).endpoint.address, 51820)))
    roster = admitted([*claims(barge3=record(3)), dead], {})
    assert (sorted(roster.hosts), roster.disputes) == (["barge3"], ())


def test_many_rivals_are_not_all_named() -> None:
    members = claims(**{f"barge{n}": record(n, subnet=record(9).subnet) for n in (2, 3, 4, 5, 6)})
    assert "is claimed by barge3 and barge4 and barge5 and others as well" in admitted(members, {}).refused["barge2"]


def test_without_a_daemon_the_rank_decides() -> None:
    assert sorted(admitted(claims(**CLAIMS), None).hosts) == ["barge2"]


@given(st.permutations([2, 3, 4]), st.sampled_from([2, 3, 4]))
def test_order_of_members_does_not_matter(order: list[int], holder: int) -> None:
    records = {f"barge{n}": record(n, subnet=record(9).subnet) for n in (2, 3, 4)}
    members = [*(member(n, of=records[f"barge{n}"]) for n in order), member(5)]
    said = {
        claim_of(name, r): Vote().with_answers(["barge5"], {"barge5": name == f"barge{holder}"})
        for name, r in records.items()
    }
    assert sorted(admitted(members, said).hosts) == sorted([f"barge{holder}", "barge5"])


# --- this host's own subnet ------------------------------------------------------------------------------------------

# barge3 is this host, and barge2 is a stranger with an older certificate.
OWN_DISPUTE = replace(DISPUTE, keeper="barge3")


def superseded(
    said: Votes | None, dispute: Dispute = OWN_DISPUTE, *, known: Collection[str] = (), is_newcomer: bool = False
) -> str | None:
    return conflicts.superseded_by(dispute, said, known=known, is_newcomer=is_newcomer)


@pytest.mark.parametrize("is_newcomer", [True, False])
def test_no_older_certificate_takes_the_subnet_of_a_host_that_the_others_know(is_newcomer: bool) -> None:
    """An invitation that was never used may be older than most hosts."""
    said = votes(barge2=vote(no=VOTERS), barge3=vote(VOTERS[:2], VOTERS[2:]))
    assert superseded(said, is_newcomer=is_newcomer) is None
    one_lies = votes(barge2=vote(VOTERS[:1], VOTERS[1:]), barge3=vote(VOTERS[1:], VOTERS[:1]))
    assert superseded(one_lies, is_newcomer=is_newcomer) is None
    assert superseded(votes(barge2=vote(VOTERS), barge3=vote(no=VOTERS)), is_newcomer=is_newcomer) == "barge2"


def test_a_host_with_an_older_certificate_moves_if_the_others_know_another_holder() -> None:
    """Else two hosts would keep one subnet: the other one does not move."""
    own = replace(DISPUTE, keeper="barge2")
    said = votes(barge2=vote(no=VOTERS), barge3=vote(VOTERS))
    assert (superseded(said, own), superseded(said)) == ("barge3", None)


def test_newcomer_goes_by_the_rank_until_the_voters_speak_and_others_wait() -> None:
    for said in ({}, votes(barge3=vote(asked=VOTERS)), votes(barge2=vote(["barge5"], asked=VOTERS), barge3=vote())):
        assert superseded(said, is_newcomer=True) == "barge2"
        assert superseded(said) is None
    nobody = replace(OWN_DISPUTE, voters={})
    assert superseded({}, nobody) == superseded(None) == "barge2", "nobody can be asked"


@pytest.mark.parametrize("is_newcomer", [True, False])
def test_known_host_takes_a_subnet_by_votes_alone(is_newcomer: bool) -> None:
    """It has left another subnet for this one: an older certificate gives it nothing."""
    assert superseded({}, known={"barge2"}, is_newcomer=is_newcomer) is None
    assert superseded({}, replace(OWN_DISPUTE, voters={}), known={"barge2"}, is_newcomer=is_newcomer) is None
    said = votes(barge2=vote(VOTERS), barge3=vote(no=VOTERS))
    assert superseded(said, known={"barge2"}, is_newcomer=is_newcomer) == "barge2"


VERDICTS = st.dictionaries(st.sampled_from(VOTERS), st.tuples(st.booleans(), st.booleans()), min_size=2)


@given(VERDICTS)
def test_both_parties_come_to_the_same_answer(verdicts: Mapping[str, tuple[bool, bool]]) -> None:
    """Whatever the voters say, exactly one of two hosts that have heard the same moves, if any of them is a holder."""
    two, three = ({voter: said[n] for voter, said in verdicts.items()} for n in (0, 1))
    said = votes(barge2=Vote().with_answers(VOTERS, two), barge3=Vote().with_answers(VOTERS, three))
    moves = superseded(said, replace(DISPUTE, keeper="barge2")), superseded(said)
    if any(two.values()) or any(three.values()):
        assert moves in {("barge3", None), (None, "barge2")}
    else:
        assert moves == (None, None)


def test_voters_are_asked_about_the_own_subnet_as_long_as_it_is_disputed() -> None:
    """After a partition, those who were asked first may all be of one side; and what they say changes."""
    some = votes(barge2=vote(no=VOTERS[:2], asked=VOTERS[:2]), barge3=vote(VOTERS[:2], asked=VOTERS[:2]))
    assert is_open(OWN_DISPUTE, some, "barge3")
    assert not is_open(DISPUTE, some, "barge1"), "of others it is enough to know the holder"
    every = votes(barge2=vote(no=VOTERS), barge3=vote(VOTERS))
    assert is_open(OWN_DISPUTE, every, "barge3")
    assert not is_open(DISPUTE, every, "barge1")


def test_only_who_is_alive_and_has_not_left_disputes_the_own_subnet() -> None:
    own, certified = host(3), {"barge5": record(5), "barge6": invited(6, 6)}
    listed = [member(2, of=CLAIMS["barge2"]), member(5), member(6, of=invited(6, 6))]
    view = View(own, MESH, Roster(certified), NOW)
    dispute = conflicts.over_own_subnet(view, listed)
    assert dispute == Dispute(f"subnet {own.record.subnet}", CLAIMS, {"barge5": record(5)}, "barge3")
    known = View(own, MESH, Roster({**certified, "barge2": record(2)}), NOW)
    assert conflicts.over_own_subnet(known, listed) is None, "the record of this number is another one"
    left = View(own, MESH, Roster(certified, grave("barge2", Tombstone(1, public_key("old")))), NOW)
    assert conflicts.over_own_subnet(left, listed) is None
    assert conflicts.over_own_subnet(view, [member(2, Status.FAILED, CLAIMS["barge2"])]) is None
