"""What must not work by what a member says of itself: names that act on a terminal, endpoints where no host can be."""

import base64
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Network, ip_address
from typing import Any

import pytest

from meshd.endpoint import Endpoint
from meshd.gossip.messages import RECORD, TellRecord
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import certificates
from meshd.mesh.model import Certificate, Record
from meshd.mesh.records import encode, to_wire
from meshd.printable import LIMIT
from meshd.state.directory import Claim
from tests.lab.conftest import eventually, init, invitation, log, members, overlay, peers, ping
from tests.lab.test_attacks import Scene, is_refused, keys, state

pytestmark = [pytest.mark.root, pytest.mark.lab]

# What a holder of the gossip key calls itself: it clears the screen and writes a line of its own into the log, turns
# the text around, looks like a row of other columns, or fills the screen.
FORGED = "2026-11-26 12:00:00,000 WARNING refused barge2: forged"
NAMES = {
    "a line": f"evil\x1b[2J\n{FORGED}",
    "another direction": "evil\u202eegrab\u2066\u200b\u2028x\x85\x9b31m\r\t\x07",
    "columns": "evil  172.20.2.0/24  10.10.10.102:51820  alive  1s-ago",
    "length": "evil" + "\x1b" * 600,
}


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    return Scene(lab)


# --- text ------------------------------------------------------------------------------------------------------------


def texts(value: Any) -> list[str]:
    """All texts and keys in a JSON value."""
    if isinstance(value, dict):
        return [*value, *(text for entry in value.values() for text in texts(entry))]
    return [text for entry in value for text in texts(entry)] if isinstance(value, list) else [str(value)]


def said(host: LabHost) -> list[str]:
    """All lines that the commands on a host print, and all texts in their JSON."""
    outputs = [host.run(["meshd", *words], check=False) for words in (["members"], ["status"], ["plan"], ["up"])]
    found = []
    for done in outputs:
        found += [*done.stdout.split("\n"), *done.stderr.split("\n")]
    for command in ("members", "status", "plan"):
        found += texts(json.loads(host.run(["meshd", command, "--json"], check=False).stdout))
    return found


@pytest.mark.parametrize("kind", NAMES)
def test_hostile_name_acts_on_no_terminal_and_forges_no_line(scene: Scene, kind: str) -> None:
    """Names and tags of a member reach log, commands and JSON as harmless text on one line, and long ones are cut."""
    with scene.agent(NAMES[kind], {"subnet": "\x1b]0;owned\x07\n" + FORGED, "wg": "\u2028", "\x1b": "\n"}):
        for host in scene.mesh:
            eventually(lambda h=host: any(n.startswith("evil") for n in members(h)), 45, "it is listed")  # type: ignore[misc]
            eventually(lambda h=host: "refused evil" in log(h), 10, "the alarm is in the log")  # type: ignore[misc]
        one = scene.mesh[0]
        lines = said(one)
        for line in [*lines, *(line for host in scene.mesh for line in log(host).split("\n"))]:
            assert line.isprintable(), repr(line)
            assert not line.startswith("2026-11-26 12:00:00"), line
        row = next(line for line in lines if line.startswith("evil"))
        assert row.split()[3:5] == ["refused", "never"], row
        assert all(len(name) <= LIMIT for name in members(one))
    scene.unharmed()


# --- endpoints -------------------------------------------------------------------------------------------------------


class Member:
    """A host that the authority has certified, which overreaches: its name, its identity's seed and its key."""

    def __init__(self, scene: Scene, name: str, subnet: str) -> None:
        self.scene, self.name, self.seed = scene, name, certificates.new_seed()
        founder = state(scene.mesh[0]).authority_key
        assert founder is not None
        unsigned = Certificate(certificates.new_serial(0), 0, certificates.public(self.seed))
        certificate = certificates.certify(founder, "meshd", name, unsigned)
        key = base64.b64encode(os.urandom(32)).decode()
        self.record = Record(key, IPv4Network(subnet), Endpoint(scene.stranger.address, 51820), 1, certificate)

    def at(self, address: str, port: int = 51820) -> Record:
        """Its next record, with this endpoint."""
        there = Endpoint(ip_address(address), port)
        # A number that a clock gives: the authority forgets no host with a greater one.
        self.record = replace(self.record, seq=max(self.record.seq + 1, int(time.time())))
        return certificates.sign(self.seed, "meshd", self.name, replace(self.record, endpoint=there))

    def is_peer(self, host: LabHost) -> bool:
        return self.record.public_key in peers(host)

    @contextmanager
    def publishes(self, record: Record) -> Iterator[None]:
        with self.scene.agent(self.name, encode(record)):
            yield

    def announces(self, record: Record) -> None:
        """Tell all by an event, as a member's root can in anybody's name."""
        payload = TellRecord(self.name, to_wire(record)).payload().hex()
        script = (
            "import sys; from meshd.gossip import calls; from meshd.state.directory import State\n"
            f"with calls.rpc(State()) as serf: serf.event({RECORD!r}, bytes.fromhex(sys.argv[1]))"
        )
        self.scene.mesh[2].run([sys.executable, "-c", script, payload])

    def refused(self, record: Record, reason: str, *hosts: LabHost) -> None:
        """Require that these hosts refuse its record for this reason."""
        full = f"ndpoint {record.endpoint} is {reason}"
        for host in hosts:
            eventually(lambda h=host: is_refused(h, self.name, full), 45, full)  # type: ignore[misc]

    def forgotten(self) -> None:
        """Take it out of the mesh as soon as Serf knows that it is dead, and wait until it is."""
        one = self.scene.mesh[0]
        eventually(lambda: self.scene.listed()[self.name]["status"] != "alive", 45, "Serf knows that it is dead")
        one.run(["meshd", "forget", self.name])
        for host in self.scene.mesh:
            eventually(lambda h=host: not self.is_peer(h), 30, "it is forgotten")  # type: ignore[misc]


NOWHERE = {
    "::ffff:127.0.0.1": "an IPv4 address in IPv6 spelling",
    "::ffff:172.20.101.0": "an IPv4 address in IPv6 spelling",
    "::ffff:10.10.10.101": "an IPv4 address in IPv6 spelling",
    "64:ff9b::172.20.101.0": "inside the overlay 172.20.0.0/16 in IPv6 spelling",
    "2002:7f00:1::": "no address of a host in IPv6 spelling",
    "172.20.101.0": "inside the overlay 172.20.0.0/16",
    "127.0.0.1": "no address of a host",
    "0.0.0.0": "no address of a host",
    "255.255.255.255": "no address of a host",
    "224.0.0.251": "no address of a host",
    "::1": "no address of a host",
    "ff02::1": "no address of a host",
    "fe80::1": "local to one link",
}


@pytest.mark.parametrize("address", NOWHERE)
def test_endpoint_where_no_host_can_be_is_refused(scene: Scene, address: str) -> None:
    """A certified member publishes it, in tags and by events: no host makes a peer of it."""
    rogue = Member(scene, "barge4", "172.20.104.0/24")
    wrong = rogue.at(address)
    with rogue.publishes(wrong):
        rogue.refused(wrong, NOWHERE[address], *scene.mesh)
        rogue.announces(rogue.at(address))
        for host in scene.mesh:
            host.run(["meshd", "sync"])
            assert not rogue.is_peer(host), host.name
    scene.unharmed()


def test_known_host_moves_to_endpoint_where_no_host_can_be(scene: Scene) -> None:
    """The record before stays in force, whether the new one comes by tags or by an event."""
    rogue = Member(scene, "barge5", "172.20.105.0/24")
    good = rogue.at(str(scene.stranger.address))
    with rogue.publishes(good):
        for host in scene.mesh:
            eventually(lambda h=host: rogue.is_peer(h), 45, "a real endpoint is taken")  # type: ignore[misc]
        rogue.announces(rogue.at("172.20.101.0"))
        later = rogue.at(str(scene.stranger.address), 51821)
        rogue.announces(later)
        for host in scene.mesh:
            eventually(lambda h=host: endpoint(h, rogue) == str(later.endpoint), 20, "events are heard")  # type: ignore[misc]
    wrong = rogue.at("::ffff:10.10.10.101")
    with rogue.publishes(wrong):
        rogue.refused(wrong, "an IPv4 address in IPv6 spelling", *scene.mesh)
        assert [endpoint(host, rogue) for host in scene.mesh] == [str(later.endpoint)] * 3
    rogue.forgotten()
    scene.unharmed()


def endpoint(host: LabHost, member: Member) -> str:
    """Where a host's WireGuard sends to a member."""
    lines = host.run(["wg", "show", "wg0", "endpoints"]).stdout.splitlines()
    return dict(line.split() for line in lines).get(member.record.public_key, "")


def test_own_and_broadcast_addresses_are_no_endpoints_of_others(scene: Scene) -> None:
    """A host refuses its own addresses on whatever link, and those by which it broadcasts; others cannot know them."""
    one, two, three = scene.mesh
    two.run(["ip", "addr", "replace", "192.0.2.7/32", "dev", "lo"])
    rogue = Member(scene, "barge6", "172.20.106.0/24")
    for address, port, reason, hosts in (
        ("10.10.10.255", 7, "a broadcast address", scene.mesh),
        (str(one.address), 51820, "held by barge1", scene.mesh),
        ("192.0.2.7", 51820, "this host's own", [two]),
    ):
        wrong = rogue.at(address, port)
        with rogue.publishes(wrong):
            rogue.refused(wrong, reason, *hosts)
            assert not any(rogue.is_peer(host) for host in hosts)
            for host in (one, three) if hosts == [two] else ():
                eventually(lambda h=host: rogue.is_peer(h), 45, "it may be another host's there")  # type: ignore[misc]
    two.run(["ip", "addr", "del", "192.0.2.7/32", "dev", "lo"])
    rogue.forgotten()
    scene.unharmed()


TYPED = [
    (["init", "--advertise", "127.0.0.1"], "--advertise 127.0.0.1 is no address of a host"),
    (["init", "--advertise", "fe80::1"], "--advertise fe80::1 is local to one link"),
    (["init", "--bind", "127.0.0.1"], "--bind 127.0.0.1 is no address of a host"),
    (["join", "10.10.10.101", "--advertise", "172.20.7.7"], "--advertise 172.20.7.7 is inside the overlay"),
    (["join", "10.10.10.101", "--advertise", "::ffff:10.10.10.104"], "is an IPv4 address in IPv6 spelling"),
    (["join", "127.0.0.1"], "127.0.0.1 is no address of a host: give a member's underlay address"),
    (["join", "::ffff:10.10.10.101"], "is an IPv4 address in IPv6 spelling: give a member's underlay address"),
]


@pytest.mark.parametrize(("words", "error"), TYPED, ids=[" ".join(words) for words, _ in TYPED])
def test_typed_address_of_no_host_is_an_error_before_anything_is_written(
    scene: Scene, words: list[str], error: str
) -> None:
    """It is told as the typing error that it is, with exit code 2, and neither a file nor a process is left."""
    stranger, secret = scene.stranger, {"MESHD_INVITE": invitation(scene.mesh[0])}
    done = stranger.run(["meshd", *words, "--no-docker"], check=False, env=secret)
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr
    assert sorted(path.name for path in (stranger.directory / "meshd").iterdir()) == []
    assert stranger.run(["pgrep", "-af", "serf agent|wireguard-go|meshd.* agent"], check=False).stdout == ""


def test_state_of_older_version_stops_no_daemon(scene: Scene) -> None:
    """Endpoints that an older version took are on disk: they are dropped and logged, and the host goes on."""
    two, rogue = scene.mesh[1], Member(scene, "barge7", "172.20.107.0/24")
    two.run(["meshd", "down"])
    files, claim, wrong = state(two), state(two).claim(), rogue.at("::ffff:10.10.10.103")
    assert claim is not None
    roster = files.roster()
    files.save_roster(replace(roster, hosts={**roster.hosts, "barge7": wrong}))
    files.save_contacts({**files.contacts(), "barge7": Endpoint(wrong.endpoint.address, 7946)})
    mapped = Endpoint(ip_address(f"::ffff:{two.address}"), 51820)
    own = certificates.sign(keys(two)[0], "meshd", two.name, replace(claim.record, endpoint=mapped))
    files.save_claim(Claim(own, settled=True))
    done = two.run(["meshd", "up"])
    told = done.stderr + log(two)  # by whichever reconcile comes first
    assert f"dropped barge7 from hosts.json: its endpoint {wrong.endpoint} is an IPv4 address in IPv6 spelling" in told
    assert "dropped barge7 from contacts.json" in told
    assert not rogue.is_peer(two)
    assert "barge7" not in members(two)
    again = state(two).claim()
    assert again is not None
    assert again.record.endpoint == claim.record.endpoint
    assert again.record.subnet == claim.record.subnet
    eventually(lambda: all(ping(host, overlay(two)) for host in scene.mesh), 20, "it is reached as before")
    eventually(scene.is_whole, 30, "the mesh is whole")
    scene.unharmed()


def test_host_with_advertised_address_of_older_version_goes_on(scene: Scene) -> None:
    """A host whose settings hold an address where none can be runs, and says why the others refuse it."""
    stranger = scene.stranger
    init(stranger, "--no-docker")
    files = state(stranger)
    files.save_settings(replace(files.settings, advertise=ip_address("::ffff:10.10.10.104")))
    stranger.run(["meshd", "down"])
    done = stranger.run(["meshd", "up"], check=False)
    problem = "the other hosts refuse this one, since its endpoint [::ffff:a0a:a68]:51820 is an IPv4 address in IPv6"
    assert problem in done.stderr
    status = json.loads(stranger.run(["meshd", "status", "--json"], check=False).stdout)
    assert status["daemon_pid"]
    assert [problem in line for line in status["problems"]] == [True]
    stranger.run(["meshd", "leave", "--force"])
