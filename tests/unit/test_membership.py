"""Who is admitted, who is refused and why, and what it takes to be dropped."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.membership import Roster, admit, bury, claimed, is_void, subnet_rivals, superseded_by
from meshd.model import Goodbye, Host, Member, Record, Status
from meshd.tags import encode
from tests.conftest import OVERLAY, host, member, public_key, record

OWN = host(1)


def admitted(members: Sequence[Member], known: Roster | None = None, *, left_is_goodbye: bool = False) -> Roster:
    return admit(OWN, OVERLAY, 24, members, known or Roster(), left_is_goodbye=left_is_goodbye)


def test_valid_members_are_admitted_and_the_own_name_is_not_a_peer() -> None:
    roster = admitted([member(1), member(2), member(3)])
    assert [h.name for h in roster.sorted_hosts()] == ["barge2", "barge3"]
    assert roster.refused == {}


@pytest.mark.parametrize("status", [Status.FAILED, Status.LEFT, Status.LEAVING, Status.NONE])
def test_a_known_host_stays_whatever_serf_says_of_it(status: Status) -> None:
    known = admitted([member(2)])
    assert admitted([member(2, status)], known).hosts == known.hosts


def test_a_known_host_stays_when_it_is_not_listed() -> None:
    known = admitted([member(2)])
    assert admitted([], known).hosts == known.hosts


def test_a_goodbye_drops_a_host_and_is_remembered() -> None:
    known = admitted([member(2)])
    roster = admitted([member(2, of=record(2, seq=2, leaving=True))], known)
    assert roster.hosts == {}
    assert roster.gone == {"barge2": Goodbye(2, public_key("barge2"))}


def test_an_older_record_does_not_bring_a_departed_host_back() -> None:
    gone = Roster(gone={"barge2": Goodbye(2, public_key("barge2"))})
    roster = admitted([member(2, of=record(2, seq=2))], gone)
    assert roster.hosts == {}
    assert "said goodbye, or was forgotten" in roster.refused["barge2"]
    assert admitted([member(2, Status.LEFT, of=record(2, seq=2, leaving=True))], gone).refused == {}


def test_a_newer_record_with_a_new_key_brings_a_departed_host_back() -> None:
    gone = Roster(gone={"barge2": Goodbye(2, public_key("barge2"))})
    assert admitted([member(2, of=record(2, seq=3))], gone).hosts == {}, "the same key: it has not joined again"
    roster = admitted([member(2, of=record(2, seq=3, key="new"))], gone)
    assert roster.hosts["barge2"].seq == 3
    assert roster.gone == {}


def test_left_is_a_goodbye_only_without_a_daemon() -> None:
    known = admitted([member(2)])
    roster = admitted([member(2, Status.LEFT)], known, left_is_goodbye=True)
    assert roster.hosts == {}
    assert "barge2" in roster.gone


def test_a_new_key_with_a_newer_record_replaces_the_old_one() -> None:
    known = admitted([member(2)])
    roster = admitted([member(2, of=record(2, seq=2, key="new"))], known)
    assert roster.hosts["barge2"].public_key == public_key("new")


@pytest.mark.parametrize(
    ("seq", "reason"), [(4, "older than 5"), (5, "two different records")], ids=["older", "equal but different"]
)
def test_a_worse_record_is_refused_and_the_last_good_one_stays(seq: int, reason: str) -> None:
    known = Roster(hosts={"barge2": record(2, seq=5)})
    roster = admitted([member(2, of=record(2, seq=seq, key="thief"))], known)
    assert roster.hosts == known.hosts
    assert reason in roster.refused["barge2"]


def test_bad_tags_leave_the_last_good_record_in_force_and_harm_nobody_else() -> None:
    known = admitted([member(2)])
    spoiled = replace(member(2), tags={**member(2).tags, "subnet": "0.0.0.0/0"})
    roster = admitted([spoiled, member(3)], known)
    assert roster.hosts["barge2"] == record(2)
    assert roster.hosts["barge3"] == record(3)
    assert "outside of the overlay" in roster.refused["barge2"]


def test_the_own_subnet_is_never_given_away() -> None:
    thief = replace(member(2), tags=encode(replace(record(2), subnet=OWN.record.subnet)))
    roster = admitted([thief])
    assert roster.hosts == {}
    assert roster.refused["barge2"] == "subnet 172.20.101.0/24 is held by barge1"
    assert subnet_rivals(OWN, [member(1), thief, member(3)], OVERLAY, 24) == ["barge2"]


def test_an_incumbent_keeps_its_subnet() -> None:
    known = admitted([member(3)])
    claimant = replace(member(2), tags=encode(replace(record(2), subnet=record(3).subnet)))
    roster = admitted([claimant, member(3)], known)
    assert roster.refused == {"barge2": "subnet 172.20.103.0/24 is held by barge3"}


def test_an_incumbent_that_moves_onto_a_held_subnet_keeps_its_old_one() -> None:
    known = admitted([member(2), member(3)])
    mover = replace(member(2), tags=encode(replace(record(2, seq=2), subnet=record(3).subnet)))
    roster = admitted([mover, member(3)], known)
    assert roster.hosts == known.hosts
    assert "barge2" in roster.refused


def test_a_moved_host_frees_its_old_subnet() -> None:
    known = admitted([member(2)])
    moved = replace(member(2), tags=encode(replace(record(2, seq=2), subnet=record(9).subnet)))
    heir = replace(member(3), tags=encode(replace(record(3), subnet=record(2).subnet)))
    roster = admitted([moved, heir], known)
    assert roster.refused == {}
    assert roster.hosts["barge3"].subnet == record(2).subnet


def test_a_stolen_key_is_refused() -> None:
    roster = admitted([replace(member(2), tags=encode(record(2, key="barge1")))])
    assert roster.refused["barge2"] == "its WireGuard key is barge1's"


@given(st.permutations([2, 3, 4]))
def test_all_hosts_agree_on_the_winner_of_simultaneous_claims(order: list[int]) -> None:
    same = record(50).subnet
    members = [replace(member(n), tags=encode(replace(record(n), subnet=same))) for n in order]
    winners = set(admitted(members).hosts)
    assert len(winners) == 1
    assert winners == set(admitted(sorted(members, key=lambda m: m.name)).hosts)


def test_claims_of_departed_and_invalid_members_do_not_count() -> None:
    noise = replace(member(3), tags={"wg": "x"})
    goodbye = member(4, of=record(4, leaving=True))
    assert claimed([member(1), member(2), noise, goodbye], "barge1", OVERLAY, 24) == {record(2).subnet}


# --- goodbyes that others tell of, and subnets that two hosts claim -------------------------------------------------


def test_a_goodbye_that_others_tell_of_drops_the_host() -> None:
    known = Roster({"barge2": record(2, seq=5), "barge3": record(3)})
    roster = bury(known, {"barge2": Goodbye(5, public_key("barge2"))})
    assert sorted(roster.hosts) == ["barge3"]
    assert roster.gone == {"barge2": Goodbye(5, public_key("barge2"))}
    assert bury(roster, {"barge2": Goodbye(4, public_key("barge2"))}) == roster, "older news is no news"


def test_a_goodbye_of_an_earlier_life_does_not_touch_the_host_that_joined_anew() -> None:
    known = Roster({"barge2": record(2, seq=9, key="new")})
    assert bury(known, {"barge2": Goodbye(5, public_key("barge2"))}) == known


def test_a_host_that_the_others_have_buried_is_void() -> None:
    own = host(1)
    assert not is_void(own, Roster())
    assert is_void(own, Roster(gone={"barge1": Goodbye(1, public_key("barge1"))}))
    assert not is_void(own, Roster(gone={"barge1": Goodbye(0, public_key("earlier"))}))


def rival_record(key: str) -> Record:
    """What a barge2 publishes that claims the subnet of barge1."""
    return replace(record(2, key=key), subnet=record(1).subnet)


def test_of_two_hosts_that_claim_one_subnet_both_name_the_same_loser() -> None:
    for n in range(20):
        one = Host("barge1", record(1, key=f"one{n}"))
        two = Host("barge2", replace(record(2, key=f"two{n}"), subnet=record(1).subnet))
        ones, twos = member(1, of=one.record), member(2, of=two.record)
        verdicts = {
            superseded_by(one, [ones, twos], Roster(), OVERLAY, 24),
            superseded_by(two, [ones, twos], Roster(), OVERLAY, 24),
        }
        assert verdicts in ({None, "barge1"}, {None, "barge2"})


@pytest.mark.parametrize("why", ["dead", "departed", "leaving", "elsewhere"])
def test_who_is_not_there_takes_no_subnet(why: str) -> None:
    # Some key goes before barge1's: nobody would have to try long.
    records = (rival_record(f"k{n}") for n in range(99))
    winning = next(r for r in records if superseded_by(OWN, [member(2, of=r)], Roster(), OVERLAY, 24))
    claim = {"leaving": replace(winning, leaving=True), "elsewhere": replace(winning, subnet=record(2).subnet)}
    gone = {"barge2": Goodbye(1, winning.public_key)} if why == "departed" else {}
    found = member(2, Status.FAILED if why == "dead" else Status.ALIVE, claim.get(why, winning))
    assert superseded_by(OWN, [found], Roster(gone=gone), OVERLAY, 24) is None
