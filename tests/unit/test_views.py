"""What a person reads of the members."""

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from meshd.cli import views
from meshd.endpoint import Endpoint
from meshd.errors import MissingError
from meshd.mesh.model import Graves, Host, Member, Record, Status, Tombstone
from meshd.mesh.roster import BURIED, Roster
from meshd.mesh.tombstones import grave
from meshd.net.resources import Action, Change, Engine, Peer, Route
from meshd.reconcile.machine import Area, Failure
from meshd.reconcile.run import Report
from meshd.state.directory import State
from tests.conftest import member, public_key, record

NOW = 1_000_000.0
OWN = Host("barge1", record(1))


def rows(
    *members: Member,
    hosts: Mapping[str, Record] | None = None,
    gone: Graves | None = None,
    refused: Mapping[str, str] | None = None,
    peers: tuple[Peer, ...] = (),
) -> str:
    report = Report(Roster(hosts or {}, gone or {}, refused or {}), members, peers=peers, own=OWN)
    return "\n".join(views.members_lines(views.members(report), NOW))


def peer(number: int, handshake: float) -> Peer:
    return Peer(public_key(f"barge{number}"), None, (), 25, handshake)


def test_members_text_has_one_sorted_line_per_member() -> None:
    """The members are shown in aligned lines, sorted by name."""
    text = rows(
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


def test_members_json_has_the_mtu_of_each_path() -> None:
    """The overlay's MTU, or that of the path if it is narrower; nothing for this host and for who is none."""
    roster = Roster({"barge2": record(2), "barge3": record(3)}, refused={"mallory": "no record"})
    report = Report(roster, own=OWN, mtu=1420, mtus={public_key("barge2"): 928, public_key("barge3"): 0})

    def mtus(report: Report) -> dict[str, int | None]:
        return {row["name"]: row["mtu"] for row in views.members_json(views.members(report))}

    assert mtus(report) == {"barge1": None, "barge2": 928, "barge3": 1420, "mallory": None}
    assert mtus(replace(report, mtu=0))["barge3"] is None, "the overlay's MTU was not read"


def test_members_text_shows_reason_of_refusal() -> None:
    """A refused member is shown with the reason."""
    stranger = Member("mallory", IPv4Address("10.10.10.66"), 7946, Status.ALIVE, {})
    last = rows(member(1), stranger, refused={"mallory": "no record"}).splitlines()[-1]
    assert last.split(maxsplit=5) == ["mallory", "-", "10.10.10.66:7946", "refused", "never", "no record"]


def test_members_text_shows_refused_record_of_known_host() -> None:
    """A known host whose newest record is refused keeps its line and shows the reason."""
    text = rows(member(1), member(2), hosts={"barge2": record(2)}, refused={"barge2": "older than 7"})
    assert text.splitlines()[-1].split(maxsplit=5)[3:] == ["refused", "never", "older than 7"]


def test_members_text_shows_left_host() -> None:
    """A host that has left is shown as `left`."""
    goodbye = grave("barge2", Tombstone(2, public_key("barge2")))
    text = rows(member(1), member(2, Status.LEFT, record(2, seq=2, leaving=True)), gone=goodbye)
    assert text.splitlines()[-1].split()[3] == "left"


def test_members_text_shows_why_returning_host_is_refused() -> None:
    """A host that has left and is refused now that it is back has the reason in its line."""
    gone = grave("barge2", Tombstone(2, public_key("barge2")))
    text = rows(member(1), member(2), gone=gone, refused={"barge2": BURIED})
    assert text.splitlines()[-1].split(maxsplit=5)[3:] == ["refused", "never", BURIED]


def test_members_text_shows_unlisted_host_as_failed() -> None:
    """A known host that Serf does not list is shown as `failed`."""
    assert rows(member(1), hosts={"barge2": record(2)}).splitlines()[-1].split()[3] == "failed"


def test_members_text_without_serf_shows_offline() -> None:
    """Without Serf, this host is shown as `offline`."""
    assert rows().split()[3] == "offline"


def test_members_text_escapes_control_characters() -> None:
    """Control characters in names and tags do not reach the terminal."""
    evil = Member("a\x1b[2Jb\n", IPv4Address("10.10.10.66"), 7946, Status.ALIVE, {"subnet": "\x1b]0;x\x07 y"})
    text = rows(evil, refused={evil.name: "no record"})
    assert len(text.splitlines()) == 2
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("age", "shown"),
    [(0, "0s-ago"), (119, "119s-ago"), (120, "2m-ago"), (7200, "2h-ago"), (200_000, "2d-ago"), (-3, "0s-ago")],
)
def test_members_text_shortens_ages(age: int, shown: str) -> None:
    """Ages of handshakes are shown in one unit."""
    text = rows(member(2), hosts={"barge2": record(2)}, peers=(peer(2, NOW - age),))
    assert text.splitlines()[-1].split()[-1] == shown


def test_changes_text_and_json() -> None:
    """Each change has a line with a sign, and an object in JSON."""
    route = Route(record(2).subnet, "wg0")
    peer_2 = Peer(public_key("barge2"), Endpoint(IPv4Address("10.10.10.102"), 51820), (record(2).subnet,))
    changes = [Change(Action.ADD, route), Change(Action.SET, peer_2), Change(Action.REMOVE, route)]
    assert [line[0] for line in views.changes_lines(changes)] == ["+", "~", "-"]
    assert views.changes_lines([], [changes[2]])[0].startswith(
        "! not removed, because nobody said that it left: route "
    )
    assert views.changes_lines([]) == ["no changes"]
    (change, *_) = views.changes_json(Report(changes=tuple(changes)))["changes"]
    assert change == {"action": "add", "kind": "route", "resource": "route 172.20.102.0/24 via wg0"}


def facts(state: State, report: Report, *blocked: str) -> views.Facts:
    return views.facts(state, replace(report, own=OWN), "userspace", blocked, NOW)


def test_status_json_has_values(state: State) -> None:
    """The JSON of status has values, and keys that a program can use."""
    roster = Roster({"barge2": record(2)}, refused={"mallory": "no record"})
    listed = (member(1), member(2, Status.FAILED), member(3, Status.LEFT))
    report = Report(roster, listed, peers=(peer(2, NOW - 42), peer(3, NOW - 200)), engine=Engine("20.10.24"))
    assert views.status_json(facts(state, report, "UDP port 51820 is blocked")) == {
        "mesh": "meshd",
        "host": "barge1",
        "overlay": "172.20.0.0/16",
        "subnet": "172.20.101.0/24",
        "address": "172.20.101.0",
        "endpoint": "10.10.10.101:51820",
        "state_dir": str(state.directory),
        "daemon": True,
        "daemon_pid": None,
        "serf_members": 2,
        "serf_members_alive": 1,
        "wireguard_interface": "wg0",
        "wireguard_backend": "userspace",
        "wireguard_port": 51820,
        "docker": True,
        "docker_version": "20.10.24",
        "docker_firewall": "iptables",
        "docker_error": None,
        "allow": [],
        "peers": 2,
        "peers_with_recent_handshake": 1,
        "pending": [],
        "refused": {"mallory": "no record"},
        "dropped": {},
        "problems": ["UDP port 51820 is blocked"],
    }


def test_status_text_renders_facts(state: State) -> None:
    """The text of status shows the same facts in aligned lines."""
    running = Report(members=(member(1), member(2)), engine=Engine("20.10.24"))
    assert views.status_lines(facts(state, running, "a", "b")) == [
        "mesh:                     meshd",
        "host:                     barge1",
        "overlay:                  172.20.0.0/16",
        "subnet:                   172.20.101.0/24",
        "address:                  172.20.101.0",
        "endpoint:                 10.10.10.101:51820",
        "daemon:                   not running",
        "serf:                     2 of 2 members alive",
        "wireguard:                wg0 (userspace), udp port 51820",
        "docker:                   20.10.24 (iptables)",
        "reachable by the overlay: ICMP ('meshd up --allow tcp/PORT' allows more)",
        "peers:                    0, 0 with a handshake in the last 3 minutes",
        "pending:                  none",
        "refused:                  none",
        "dropped:                  none",
        "problems:                 2",
        "  a",
        "  b",
        f"state directory:          {state.directory}",
    ]


def test_status_says_what_was_dropped_and_which_containers_are_misplaced(state: State) -> None:
    """What was dropped is no problem, since normal life does that as well; a container that is cut off is one."""
    shown = facts(state, Report(dropped={"in_clear": 3, "of_a_later_version": 1}))
    assert (shown.dropped, shown.problems) == ({"in_clear": 3, "of_a_later_version": 1}, [])
    lines = views.status_lines(shown)
    place = lines.index("dropped:                  2")
    assert lines[place + 1 : place + 3] == [
        "  in_clear: 3 packets for the overlay, which would have left unencrypted",
        "  of_a_later_version: 1 packets",
    ]
    assert facts(state, Report(misplaced=("container web is",))).problems == ["container web is"]


def test_status_text_shows_what_does_not_answer(state: State) -> None:
    """Docker may die at any moment: status says so from what the reconcile saw, and asks nobody again."""
    silent = Failure(Area.DOCKER, MissingError("the Docker engine does not answer"))
    text = "\n".join(views.status_lines(facts(state, Report(failures=(silent,)))))
    assert "\nserf:                     not answering\n" in text
    assert "\ndocker:                   not answering (the Docker engine does not answer)\n" in text
    assert "\n  docker: the Docker engine does not answer\n" in text
    state.save_settings(replace(state.settings, docker=False, daemon=False, allow=("tcp/22", "all")))
    text = "\n".join(views.status_lines(facts(state, Report())))
    assert "\ndocker:                   not used\n" in text
    assert "\ndaemon:                   none (Serf's handlers)\n" in text
    assert "\nreachable by the overlay: ICMP, tcp/22, all\n" in text
