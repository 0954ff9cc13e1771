"""What the daemon logs as wrong: once when it begins, and once when it is over."""

import logging

import pytest

from meshd.daemon.complaints import LAG, MAX_REFUSED, Complaints
from meshd.errors import ApplyError
from meshd.mesh.roster import Roster
from meshd.reconcile.machine import Area, Failure
from meshd.reconcile.run import Report


def test_a_problem_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    caplog.set_level(logging.INFO, "meshd")
    for texts in ({"a", "b"}, {"a", "b"}, {"b"}, {"b"}):
        complaints.log(texts)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "a"),
        ("WARNING", "b"),
        ("INFO", "no longer: a"),
    ]
    assert "b" in complaints
    assert "a" not in complaints


def test_failures_and_refused_members_are_named() -> None:
    report = Report(
        Roster(refused={"barge2": "no record"}), failures=(Failure(Area.READ, ApplyError("no answer"), "route"),)
    )
    assert Complaints().of(report, 0) == {"route: no answer", "refused barge2: no record"}


def test_a_crowd_of_refused_members_is_cut() -> None:
    crowd = Report(Roster(refused={f"bogus{number:03}": "no record" for number in range(500)}))
    found = Complaints().of(crowd, 0)
    assert len(found) == MAX_REFUSED + 1
    assert "refused more than these" in found


def test_old_tags_are_named_after_longer_than_serf_needs() -> None:
    complaints, report = Complaints(), Report(Roster(stale={"barge2": "older"}))
    assert complaints.of(report, 100) == set()
    assert complaints.of(report, 100 + LAG) == set()
    assert complaints.of(report, 101 + LAG) == {"refused the tags of barge2: older"}
    assert complaints.of(Report(), 102 + LAG) == set()
    assert complaints.of(report, 103 + LAG) == set(), "the time begins again"


def test_misplaced_containers_are_wrong_until_docker_is_asked_again() -> None:
    """A reconcile about members alone does not ask Docker, and says nothing of them."""
    complaints = Complaints()
    for misplaced, found in ((("web is",), {"web is"}), (None, {"web is"}), ((), set())):
        assert complaints.of(Report(misplaced=misplaced), 0) == found
