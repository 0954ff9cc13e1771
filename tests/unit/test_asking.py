"""What is asked of the other hosts after a reconcile: pure, with a clock and dice of the test's own."""

import random
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from meshd.daemon.asking import (
    ASK_AGAIN,
    ASK_LOST,
    CALM,
    LONGEST_PAUSE,
    MAX_ASKED_BACK,
    MAX_CLAIMS,
    MAX_JOBS,
    MAX_LOOKUPS,
    PAUSE,
    RENEW_PAUSE,
    VOTE_AGAIN,
    VOTERS,
    Announce,
    Asking,
    CollectVotes,
    Job,
    LookUpRecord,
    PullTombstones,
    RequestConfirmation,
    SyncWith,
)
from meshd.endpoint import Endpoint
from meshd.gossip.messages import AskTombstones
from meshd.mesh.model import FORMER, Host
from meshd.mesh.roster import Roster
from meshd.mesh.votes import Dispute, Vote, Votes, claim_of
from meshd.reconcile.run import Report
from tests.conftest import certificate, delegated, delegation, host, member, record

HOSTS = {f"barge{n}": record(n) for n in (2, 3, 4)}
EVERYBODY = frozenset(HOSTS)
MET = Report(Roster(HOSTS), tuple(member(n) for n in (1, 2, 3, 4)), own=host(1))


def lost(number: int) -> Report:
    return replace(MET, lost={f"barge{number}": Endpoint(IPv4Address("10.0.0.5"), 7946)})


def asking() -> Asking:
    return Asking("barge1", 0.0, random.Random(1))


def after(asked: Asking, report: Report, now: float, queued: int = 0) -> list[Job]:
    return asked.after(report, {}, queued=queued, now=now)


def of_kind(jobs: Sequence[Job], kind: type[Job]) -> list[Job]:
    return [job for job in jobs if isinstance(job, kind)]


def test_a_host_that_meets_many_at_once_was_away_and_asks_them() -> None:
    asked = asking()
    assert PullTombstones(EVERYBODY) in after(asked, MET, 1)
    assert after(asked, MET, 2) == []
    joined = replace(MET, roster=Roster({**HOSTS, "barge5": record(5)}), members=(*MET.members, member(5)))
    assert after(asked, joined, 3) == [], "a single newcomer asks by itself"


def test_the_own_record_is_announced_once_and_again_after_absence() -> None:
    asked = asking()
    assert Announce(record(1)) in after(asked, MET, 1)
    assert of_kind(after(asked, MET, 2), Announce) == []
    newer = record(1, seq=2)
    assert of_kind(after(asked, replace(MET, own=Host("barge1", newer)), 3), Announce) == [Announce(newer)]
    alone = replace(MET, members=(member(1),))
    assert of_kind(after(asked, alone, 4), Announce) == []
    assert of_kind(after(asked, MET, 5), Announce) == [Announce(record(1))], "the others may have forgotten it"


def test_the_tombstone_of_a_lost_host_is_asked_for_during_a_minute() -> None:
    asked = asking()
    after(asked, MET, 1)
    everybody = [PullTombstones(EVERYBODY)]
    assert after(asked, lost(5), 2) == everybody
    assert after(asked, lost(5), 3) == []
    assert after(asked, lost(5), 2 + ASK_LOST) == everybody
    assert after(asked, lost(6), 3 + ASK_LOST) == everybody, "at once for another one"
    late = 3 + ASK_LOST + ASK_AGAIN
    assert PullTombstones(EVERYBODY) not in after(asked, lost(6), late)


def test_any_host_is_asked_for_tombstones_every_minute() -> None:
    asked = asking()
    after(asked, MET, 1)
    assert after(asked, MET, ASK_AGAIN - 1) == []
    (job,) = after(asked, MET, ASK_AGAIN)
    assert isinstance(job, PullTombstones)
    assert len(job.of) == 1
    assert job.of < EVERYBODY


def test_where_most_members_are_no_hosts_one_host_is_met_over_tcp() -> None:
    asked = asking()
    after(asked, MET, 1)
    bogus = tuple(replace(member(9), name=f"bogus{n}") for n in range(5))
    assert of_kind(after(asked, replace(MET, members=MET.members + bogus[:4]), 2), SyncWith) == [], "half of them are"
    (job,) = of_kind(after(asked, replace(MET, members=MET.members + bogus), 3), SyncWith)
    assert isinstance(job, SyncWith)
    assert job.names < EVERYBODY


def test_bogus_members_leave_room_in_the_queue() -> None:
    asked = asking()
    bogus = {f"bogus{n}": "no record" for n in range(100)}
    crowded = replace(MET, roster=Roster(HOSTS, refused=bogus))
    jobs: list[Job] = []
    for now in range(20):
        jobs += after(asked, crowded, now, queued=len(jobs))
    assert len(of_kind(jobs, LookUpRecord)) == MAX_LOOKUPS - 1, "beside the question for tombstones"
    assert len(jobs) < MAX_JOBS // 2
    asked = asking()
    for name in HOSTS:
        jobs += asked.asked(AskTombstones(name, "another"), "own", HOSTS, queued=len(jobs), now=20)
    assert of_kind(after(asked, crowded, ASK_AGAIN, queued=len(jobs)), PullTombstones), "still asked from time to time"


def test_a_refused_member_is_looked_up_once_in_a_while() -> None:
    asked = asking()
    after(asked, MET, 1)
    refused = replace(MET, roster=Roster(HOSTS, refused={"barge9": "no record", "barge2": "older"}))
    assert after(asked, refused, 2) == [LookUpRecord("barge9", EVERYBODY)], "barge2 has a record in force"
    assert after(asked, refused, 3) == []
    assert after(asked, refused, 2 + PAUSE) == [LookUpRecord("barge9", EVERYBODY)]


def test_a_delegated_certificate_is_confirmed_after_a_calm_start_ever_more_slowly() -> None:
    asked = asking()
    own = Host("barge1", record(1, by=delegated("barge1", delegation())))
    joined = replace(MET, own=own)
    assert of_kind(after(asked, joined, 1), RequestConfirmation) == []
    assert of_kind(after(asked, joined, CALM), RequestConfirmation) == [RequestConfirmation()]
    now, pauses = CALM, []
    for _ in range(10):
        asked.not_confirmed()
        begun = now
        while True:
            now += 1
            if of_kind(after(asked, joined, now), RequestConfirmation):
                break
        pauses.append(now - begun)
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE
    assert of_kind(after(asked, MET, now + 1000), RequestConfirmation) == [], "the authority has certified it"


def test_a_certificate_of_version_2_is_renewed_without_haste() -> None:
    """It is good as it is, and an authority of version 2 never answers."""
    asked = asking()
    old = {f"barge{n}": record(n, version=FORMER) for n in (2, 3, 4)}
    own = Host("barge1", record(1, by=certificate("barge1", version=FORMER)))
    former = replace(MET, roster=Roster(old), own=own)
    assert of_kind(after(asked, former, 1), RequestConfirmation) == []
    assert of_kind(after(asked, former, CALM), RequestConfirmation) == [RequestConfirmation()]
    asked.not_confirmed()
    assert of_kind(after(asked, former, RENEW_PAUSE), RequestConfirmation) == []
    assert of_kind(after(asked, former, CALM + RENEW_PAUSE), RequestConfirmation) == [RequestConfirmation()]
    asked.not_confirmed()
    newer = replace(former, roster=Roster({**old, "barge2": record(2)}))
    now = CALM + RENEW_PAUSE + 1
    assert of_kind(after(asked, newer, now), RequestConfirmation) == [RequestConfirmation()], "another one has got one"
    asked.not_confirmed()
    assert of_kind(after(asked, newer, now + PAUSE), RequestConfirmation) == []
    assert of_kind(after(asked, newer, now + LONGEST_PAUSE), RequestConfirmation) == [RequestConfirmation()]


def test_only_hosts_with_other_tombstones_are_asked_back_and_few_at_once() -> None:
    asked = asking()
    hosts = {f"barge{number}": record(2) for number in range(2, 50)}
    jobs: list[Job] = []
    for number in range(100):
        question = AskTombstones(f"invented{number}", "another")
        jobs += asked.asked(question, "own", hosts, queued=len(jobs), now=1)
    jobs += asked.asked(AskTombstones("barge2", "own"), "own", hosts, queued=len(jobs), now=1)
    assert jobs == []
    for name in hosts:
        jobs += asked.asked(AskTombstones(name, "another"), "own", hosts, queued=len(jobs), now=1)
    assert len(jobs) == MAX_ASKED_BACK


@pytest.mark.parametrize("report", [Report(), Report(members=tuple(member(n) for n in (1, 2, 3, 4)))])
def test_nothing_is_asked_of_members_that_are_no_hosts(report: Report) -> None:
    asked = asking()
    for now in (1.0, ASK_AGAIN, 10 * ASK_AGAIN):
        assert after(asked, report, now) == []


CLAIMS = {"barge4": record(4, seq=2), "barge5": record(5, by=certificate("barge5", serial=1))}
IN_DISPUTE = Dispute("subnet", CLAIMS, {"barge2": record(2), "barge3": record(3)})


def disputed(*disputes: Dispute) -> Report:
    return replace(MET, roster=Roster(HOSTS, disputes=disputes))


def votes_asked(asked: Asking, report: Report, now: float, votes: Votes | None = None) -> list[CollectVotes]:
    jobs = asked.after(report, votes or {}, queued=0, now=now)
    return [job for job in jobs if isinstance(job, CollectVotes)]


def test_disputes_are_asked_about_until_they_are_settled() -> None:
    """One job at a time, and the next one a while after its end."""
    asked, report = asking(), disputed(IN_DISPUTE)
    (job,) = votes_asked(asked, report, 1)
    assert [claim.name for claim in job.claims] == ["barge5", "barge4"]
    assert {voter.name for voter in job.voters} == {"barge2", "barge3"}
    assert votes_asked(asked, report, 1000) == []
    asked.voted(1000)
    assert votes_asked(asked, report, 1000 + VOTE_AGAIN / 2) == []
    said = Vote().with_answers(["barge2", "barge3"], {"barge2": True})
    some = {claim_of(name, claim): said for name, claim in CLAIMS.items()}
    (job,) = votes_asked(asked, report, 1000 + VOTE_AGAIN, some)
    assert [voter.name for voter in job.voters] == ["barge3"], "who has said nothing"
    asked.voted(1010)
    both = {claim: vote.with_answers(["barge3"], {"barge3": True}) for claim, vote in some.items()}
    (job,) = votes_asked(asked, report, 1020, both)
    assert {voter.name for voter in job.voters} == {"barge2", "barge3"}, "they disagree, and may change their minds"
    asked.voted(1020)
    no = Vote().with_answers(["barge2", "barge3"], {"barge2": False, "barge3": False})
    settled = {**both, claim_of("barge4", CLAIMS["barge4"]): no}
    assert votes_asked(asked, report, 1030, settled) == []
    assert votes_asked(asked, MET, 1030) == []


def test_each_dispute_has_its_turn() -> None:
    """Whoever quarrels about something else keeps no other dispute from being settled."""
    asked, report = asking(), disputed(IN_DISPUTE, replace(IN_DISPUTE, place="endpoint"))
    for now in (0, 10, 20, 30):
        (job,) = votes_asked(asked, report, now)
        assert len(job.claims) == 2
        asked.voted(now)
    assert sorted(asked._voted.values()) == [20, 30]


def test_few_hosts_are_asked_at_once_about_few_claims() -> None:
    invited = {f"name{n}": record(6, by=delegated(f"name{n}", delegation())) for n in range(2 * MAX_CLAIMS)}
    voters = {f"barge{n}": record(n) for n in range(10, 40)}
    (job,) = votes_asked(asking(), disputed(Dispute("subnet", {**invited, "barge5": record(5)}, voters)), 1)
    assert (job.claims[0].name, len(job.claims), len(job.voters)) == ("barge5", MAX_CLAIMS, VOTERS)


def test_without_voters_nobody_is_asked() -> None:
    assert votes_asked(asking(), disputed(replace(IN_DISPUTE, voters={})), 1) == []
