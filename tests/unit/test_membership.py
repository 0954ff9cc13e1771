"""Who is admitted, who is refused and why, and what it takes to be dropped."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.membership import Roster, admit, claimed, subnet_rivals
from meshd.model import Goodbye, Member, Status
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
    assert "older than its goodbye" in roster.refused["barge2"]
    assert admitted([member(2, Status.LEFT, of=record(2, seq=2, leaving=True))], gone).refused == {}


def test_a_newer_record_brings_a_departed_host_back() -> None:
    gone = Roster(gone={"barge2": Goodbye(2, public_key("barge2"))})
    roster = admitted([member(2, of=record(2, seq=3))], gone)
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
