"""What a person reads of the members."""

from collections.abc import Mapping
from ipaddress import IPv4Address

import pytest

from meshd.cli import views
from meshd.endpoint import Endpoint
from meshd.mesh.model import Member, Record, Status, Tombstone
from meshd.mesh.roster import Roster
from meshd.net.resources import Action, Change, Peer, Route
from meshd.reconcile.run import Report
from meshd.state.directory import Claim, State
from tests.conftest import member, public_key, record

NOW = 1_000_000.0


def rows(
    state: State,
    *members: Member,
    hosts: Mapping[str, Record] | None = None,
    gone: Mapping[str, Tombstone] | None = None,
    refused: Mapping[str, str] | None = None,
    peers: tuple[Peer, ...] = (),
) -> str:
    state.save_claim(Claim(record(1), settled=True))
    roster = Roster(hosts or {}, gone or {}, refused or {})
    return views.members_text(views.members(state, Report(roster, members, peers=peers)), NOW)


def peer(number: int, handshake: float) -> Peer:
    return Peer(public_key(f"barge{number}"), None, (), 25, handshake)


def test_one_aligned_sorted_line_a_member(state: State) -> None:
    text = rows(
        state,
        member(10),
        member(2, Status.FAILED),
        member(1),
        hosts={"barge10": record(10), "barge2": record(2)},
        peers=(peer(10, NOW - 42), peer(2, 0)),
    )
    assert text.splitlines() == [
        "barge1   172.20.101.0/24  10.10.10.101:51820  alive   this-host",
        "barge10  172.20.110.0/24  10.10.10.110:51820  alive   42s-ago",
        "barge2   172.20.102.0/24  10.10.10.102:51820  failed  never",
    ]


def test_a_refused_member_is_shown_with_the_reason(state: State) -> None:
    stranger = Member("mallory", IPv4Address("10.10.10.66"), 7946, Status.ALIVE, {})
    last = rows(state, member(1), stranger, refused={"mallory": "no record"}).splitlines()[-1]
    assert last.split(maxsplit=5) == ["mallory", "-", "10.10.10.66:7946", "refused", "never", "no record"]


def test_a_known_host_whose_newest_record_is_refused_keeps_its_line_and_says_why(state: State) -> None:
    text = rows(state, member(1), member(2), hosts={"barge2": record(2)}, refused={"barge2": "older than 7"})
    assert text.splitlines()[-1].split(maxsplit=5)[3:] == ["refused", "never", "older than 7"]


def test_a_host_that_said_goodbye_has_left(state: State) -> None:
    goodbye = {"barge2": Tombstone(2, public_key("barge2"))}
    text = rows(state, member(1), member(2, Status.LEFT, record(2, seq=2, leaving=True)), gone=goodbye)
    assert text.splitlines()[-1].split()[3] == "left"


def test_a_known_host_that_serf_does_not_list_is_failed(state: State) -> None:
    assert rows(state, member(1), hosts={"barge2": record(2)}).splitlines()[-1].split()[3] == "failed"


def test_without_serf_this_host_is_offline(state: State) -> None:
    assert rows(state).split()[3] == "offline"


def test_what_a_stranger_wrote_cannot_drive_the_terminal(state: State) -> None:
    evil = Member("a\x1b[2Jb\n", IPv4Address("10.10.10.66"), 7946, Status.ALIVE, {"subnet": "\x1b]0;x\x07 y"})
    text = rows(state, evil, refused={evil.name: "no record"})
    assert len(text.splitlines()) == 2
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("age", "shown"),
    [(0, "0s-ago"), (119, "119s-ago"), (120, "2m-ago"), (7200, "2h-ago"), (200_000, "2d-ago"), (-3, "0s-ago")],
)
def test_ages_are_short(age: int, shown: str, state: State) -> None:
    text = rows(state, member(2), hosts={"barge2": record(2)}, peers=(peer(2, NOW - age),))
    assert text.splitlines()[-1].split()[-1] == shown


def test_changes_are_a_line_each_with_a_sign() -> None:
    route = Route(record(2).subnet, "wg0")
    peer_2 = Peer(public_key("barge2"), Endpoint(IPv4Address("10.10.10.102"), 51820), (record(2).subnet,))
    changes = [Change(Action.ADD, route), Change(Action.SET, peer_2), Change(Action.REMOVE, route)]
    assert [line[0] for line in views.changes_text(changes).splitlines()] == ["+", "~", "-"]
    assert views.changes_text([], [changes[2]]).startswith("! withheld without evidence: remove route")
    assert views.changes_text([]) == "no changes"
    (change, *_) = views.changes_json(Report(changes=tuple(changes)))["changes"]
    assert change == {"action": "add", "kind": "route", "resource": "route 172.20.102.0/24 via wg0"}
