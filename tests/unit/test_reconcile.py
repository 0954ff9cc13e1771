"""One reconcile from Serf's members to changes, on a machine in memory; tests/lab has it on real hosts."""

from collections import Counter
from dataclasses import replace
from ipaddress import IPv4Network, ip_address
from typing import ClassVar, TypeVar

import pytest

from meshd import files
from meshd.daemon.complaints import Complaints
from meshd.endpoint import Endpoint, LocalAddresses
from meshd.errors import ApplyError, InputError, MeshdError, MissingError, SerfError, WrongMachineError
from meshd.gossip.messages import Applied
from meshd.mesh import certificates, tombstones
from meshd.mesh.model import Host, Member, Status
from meshd.mesh.roster import Roster
from meshd.mesh.tombstones import grave
from meshd.mesh.twins import Place, Twins
from meshd.mesh.votes import Vote, claim_of
from meshd.net import conntrack
from meshd.net.links import Links
from meshd.net.resources import (
    Action,
    Change,
    Diversion,
    Engine,
    Link,
    Network,
    Peer,
    PolicyRule,
    Resource,
    Route,
    RunningContainer,
    StoppedContainer,
    Sysctl,
    Table,
    Tags,
)
from meshd.reconcile import plan
from meshd.reconcile.handshakes import Unmet
from meshd.reconcile.machine import Area, Machine, this_machine
from meshd.reconcile.renumber import renumber
from meshd.reconcile.run import CLAIMED, MEMBERSHIP, WITHOUT_DOCKER, Options, Report, reconcile, tear_down
from meshd.state.authority import confirm
from meshd.state.claim import UnfinishedError, publish
from meshd.state.directory import ASIDE, State
from tests.adapters import InMemory, keeps_its_promises
from tests.conftest import AUTHORITY, MESH, NOW, certificate, delegated, delegation, member, public_key, record

ENGINE = Engine("29.0")
FORWARD = Sysctl(plan.IP_FORWARD, "0")
T = TypeVar("T")


class Fake:
    """A machine in memory. What it lists, and whether each part answers, is the test's."""

    def __init__(self, *resources: Resource) -> None:
        self.members: list[Member] = [member(1), member(2)]
        self.silent: MeshdError | None = None
        self.docker: Engine | MeshdError = ENGINE
        self.underlay: int | MeshdError = 1500
        self.asked_docker = 0
        self.adapters = {kind: InMemory({kind}, *(r for r in resources if r.kind == kind)) for kind in plan.ORDER}
        self.adapters["sysctl"].resources |= {("sysctl", FORWARD.key): FORWARD}
        self.machine = Machine(
            [*self.adapters.values()],
            self.list_members,
            engine=self.engine,
            mtu=lambda: raised(self.underlay),
            networks=tuple,
        )

    def list_members(self) -> list[Member]:
        return raised(self.silent or self.members)

    def engine(self) -> Engine:
        self.asked_docker += 1
        return raised(self.docker)

    def has(self, kind: str) -> list[Resource]:
        return list(self.adapters[kind].resources.values())

    @property
    def peers(self) -> set[str]:
        return {resource.key for resource in self.has("peer")}


def raised(value: "T | MeshdError") -> T:
    if isinstance(value, MeshdError):
        raise value
    return value


@pytest.fixture
def host(state: State) -> State:
    """A host whose record is settled; its own key is barge1's real one."""
    own = record(1)
    publish(state, None, subnet=own.subnet, endpoint=own.endpoint, settled=True, now=NOW)
    return state


def run(state: State, fake: Fake, **options: object) -> Report:
    return reconcile(state, fake.machine, NOW, Options(**options))  # type: ignore[arg-type]


def key(number: int) -> str:
    return public_key(f"barge{number}")


def areas(report: Report) -> set[tuple[Area, str]]:
    return {(failure.area, failure.subject) for failure in report.failures}


def test_the_machine_in_memory_keeps_the_contract() -> None:
    first = Route(IPv4Network("172.20.7.0/24"), "wg0")
    keeps_its_promises(InMemory({"route"}), first, replace(first, source=record(1).address))


def test_a_new_host_gets_everything_and_then_nothing_is_left_to_do(host: State) -> None:
    fake = Fake()
    report = run(host, fake)
    assert report.failures == ()
    assert {change.action for change in report.changes} <= {Action.ADD, Action.SET}
    assert fake.peers == {key(2)}
    assert {type(r) for kind in fake.adapters for r in fake.has(kind)} >= {Table, Link, Peer, Route, Network, Tags}
    claim = host.claim()
    assert claim is not None
    assert report.own == Host("barge1", claim.record)
    assert host.roster().hosts == {"barge2": record(2)}
    assert host.originals() == {plan.IP_FORWARD: "0"}
    again = run(host, fake)
    assert (again.changes, again.failures) == ((), ())
    assert again.applied == Roster({"barge2": record(2)})


def test_own_policy_rule_is_there_as_long_as_another_takes_the_overlay(host: State) -> None:
    fake = Fake()
    rules = fake.adapters["rule"]
    taking = Diversion("rule 5270", before=5269)
    rules.resources["diversion", taking.key] = taking
    assert PolicyRule(host.settings.overlay, 5269) in [change.resource for change in run(host, fake).changes]
    again = run(host, fake, kinds=MEMBERSHIP)
    assert (again.changes, again.failures, again.notices) == ((), (), ()), "what works is no problem"
    del rules.resources["diversion", taking.key]
    assert [change.action for change in run(host, fake, kinds=MEMBERSHIP).changes] == [Action.REMOVE]
    assert rules.resources == {}


def test_what_takes_the_overlay_is_told_of_and_left_alone(host: State) -> None:
    fake = Fake()
    taking = Diversion("the route 172.20.2.0/25 dev eth0")
    fake.adapters["route"].resources["diversion", taking.key] = taking
    for kinds in (plan.ORDER, MEMBERSHIP, frozenset({"route"})):
        assert run(host, fake, kinds=kinds).notices == (taking.text,)
    assert tear_down(host, fake.machine, NOW).failures == ()
    assert list(fake.adapters["route"].resources.values()) == [taking]


def test_a_path_mtu_is_on_the_route_until_it_is_measured_anew(host: State) -> None:
    fake = Fake()
    run(host, fake)

    def mtu() -> int:
        return next(r.mtu for r in fake.has("route") if isinstance(r, Route) and r.link is not None)

    assert mtu() == 0
    report = run(host, fake, kinds=MEMBERSHIP, mtus={key(2): 928})
    assert [(c.action, str(c.resource)) for c in report.changes] == [
        (Action.SET, "route 172.20.102.0/24 via wg0 from 172.20.101.0, mtu 928")
    ]
    report = run(host, fake)
    assert (report.changes, report.mtu, report.mtus, mtu()) == ((), 1420, {key(2): 928}, 928)
    run(host, fake, mtus={key(2): 0})
    assert mtu() == 0


def test_an_unfinished_join_is_told_apart(state: State) -> None:
    with pytest.raises(UnfinishedError, match="has not finished joining 'meshd'"):
        run(state, Fake())
    publish(state, None, subnet=record(1).subnet, endpoint=record(1).endpoint, settled=False)
    with pytest.raises(UnfinishedError):
        run(state, Fake())


def test_a_host_that_is_down_or_leaves_changes_nothing(host: State) -> None:
    host.mark_down()
    fake = Fake()
    with pytest.raises(InputError, match="is down on this host: 'meshd up' starts it"):
        run(host, fake)
    assert run(host, fake, dry=True).changes != (), "but it can be looked at"
    assert all(not adapter.applied for adapter in fake.adapters.values())


def test_dry_changes_and_writes_nothing(host: State) -> None:
    fake = Fake()
    _ = host.wireguard_key  # is made when it is first needed
    before = {path.name: path.read_bytes() for path in host.directory.iterdir()}
    report = run(host, fake, dry=True)
    assert all(not adapter.applied for adapter in fake.adapters.values())
    assert {path.name: path.read_bytes() for path in host.directory.iterdir()} == before
    assert report.changes == run(host, fake).changes, "and says what would be done"


def test_alone_nobody_is_asked_and_what_is_known_stays(host: State) -> None:
    fake = Fake()
    run(host, fake)
    fake.silent = SerfError("another agent")
    fake.adapters["tags"].unreadable = SerfError("another agent")
    report = run(host, fake, alone=True)
    assert (report.failures, report.changes, report.members) == ((), (), ())
    assert fake.peers == {key(2)}
    assert areas(run(host, fake)) == {(Area.MEMBERS, "")}, "and it is not asked again for the tags"
    assert fake.peers == {key(2)}, "a silent Serf is no evidence"


def test_a_member_that_is_not_listed_any_more_keeps_its_peer(host: State) -> None:
    fake = Fake()
    run(host, fake)
    fake.members = [member(1)]
    assert run(host, fake).changes == ()
    fake.members = [member(1), member(2, Status.FAILED)]
    assert run(host, fake).changes == ()
    assert sorted(run(host, fake).lost) == ["barge2"]


def test_a_host_that_leaves_goes_with_its_route(host: State) -> None:
    fake = Fake()
    run(host, fake)
    last = record(2, seq=2, leaving=True)
    fake.members = [member(1), member(2, of=last)]
    report = run(host, fake)
    assert [str(change).split()[:2] for change in report.changes] == [["remove", "route"], ["remove", "peer"]]
    assert fake.peers == set()
    assert report.applied == Roster(gone=grave("barge2", tombstones.of_leaving(last))), "its tombstone is applied"
    assert host.roster().gone == grave("barge2", tombstones.of_leaving(last))


def test_refused_record_is_an_obstacle_with_its_reason(host: State) -> None:
    """Who asks whether a refused record is applied learns why not; who asks for an earlier one of the host does not."""
    fake = Fake()
    run(host, fake)
    taken = record(3, subnet=record(2).subnet)
    fake.members = [member(1), member(2), member(3, of=taken)]
    report = run(host, fake)
    question = Applied.of(Host("barge3", taken), bytes(8))
    assert not question.is_answered_by(report.applied)
    assert report.obstacle(question, MESH) == report.roster.refused["barge3"]
    assert report.obstacle(replace(question, seq=9), MESH) is None


def test_the_guard_withholds_what_nobody_said_and_force_does_it(host: State) -> None:
    stranger = Peer(public_key("stranger"), record(3).endpoint, (IPv4Network("172.20.77.0/24"),))
    fake = Fake(stranger)
    fake.members = [member(1)]
    report = run(host, fake)
    assert [change.resource for change in report.withheld] == [stranger]
    assert fake.peers == {stranger.key}
    run(host, fake, force=True)
    assert fake.peers == set()


def test_what_cannot_be_read_is_left_as_it_is(host: State) -> None:
    fake = Fake()
    fake.adapters["route"].unreadable = ApplyError("no answer")
    report = run(host, fake)
    assert areas(report) == {(Area.READ, "route")}
    assert fake.has("route") == []
    assert fake.peers == {key(2)}
    assert report.applied == Roster(), "without its route a host is not ready"


def test_a_change_that_fails_stops_no_other(host: State) -> None:
    fake = Fake()
    fake.adapters["peer"].broken = ApplyError("refused")
    report = run(host, fake)
    ((area, subject),) = areas(report)
    assert area is Area.CHANGE
    assert subject.startswith(f"add peer {key(2)}")
    assert report.applied == Roster()
    question = Applied.of(Host("barge2", record(2)), bytes(8))
    assert report.obstacle(question, MESH) == f"{subject}: refused"
    other = Applied.of(Host("barge2", record(2, seq=2)), bytes(8))
    assert report.obstacle(other, MESH) is None, "it may be on its way"
    assert fake.has("route") != []


def test_a_late_handshake_is_started_again_unless_it_has_come_meanwhile(
    host: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    report = run(host, fake)
    assert report.unmet == {key(2): Unmet(is_initiator=True, is_alive=True, is_new=True)}
    assert report.restarted == frozenset()
    peers = fake.adapters["peer"]
    peers.applied.clear()
    report = run(host, fake, overdue={key(2): 0})
    assert [(c.action, c.resource.key) for c in peers.applied] == [(Action.REMOVE, key(2)), (Action.ADD, key(2))]
    assert report.restarted == {key(2)}
    assert report.changes == tuple(peers.applied)
    assert report.applied == Roster({"barge2": record(2)})

    def read() -> list[Resource]:
        found = list(peers.resources.values())
        peers.resources = {at: replace(r, handshake=NOW) for at, r in peers.resources.items() if isinstance(r, Peer)}
        return found

    peers.applied.clear()
    with monkeypatch.context() as patched:
        patched.setattr(peers, "read", read)
        assert run(host, fake, overdue={key(2): 0}).restarted == frozenset(), "it has come between the two readings"
    assert peers.applied == []
    assert run(host, fake).unmet == {}


def test_without_keepalives_or_peers_nothing_is_late(host: State) -> None:
    fake = Fake()
    fake.adapters["peer"].unreadable = ApplyError("gone")
    assert run(host, fake).unmet is None
    fake = Fake()
    host.save_settings(replace(host.settings, keepalive=0))
    assert run(host, fake).unmet == {}


def test_only_a_daemon_waits_for_the_other_side(host: State) -> None:
    """This host's record is the older one, so that the other host is the initiator."""
    newer = int(2e9)
    for daemon, keepalive in ((True, 0), (False, 25)):
        host.save_settings(replace(host.settings, daemon=daemon))
        fake = Fake()
        fake.members = [member(1), member(2, of=record(2, seq=newer))]
        run(host, fake)
        (peer,) = fake.has("peer")
        assert isinstance(peer, Peer)
        assert peer.keepalive == keepalive


def test_without_docker_its_network_and_rules_are_left_as_they_are(host: State) -> None:
    fake = Fake()
    run(host, fake)
    network = fake.has("network")
    fake.docker = ApplyError("hangs")
    report = run(host, fake)
    assert (areas(report), report.changes) == ({(Area.DOCKER, "")}, ())
    assert fake.has("network") == network
    asked = fake.asked_docker
    assert run(host, fake, engine=ENGINE).failures == ()
    assert run(host, fake, kinds=WITHOUT_DOCKER).failures == ()
    assert run(host, fake, kinds=MEMBERSHIP).failures == ()
    assert fake.asked_docker == asked, "not asked where it is known, or not needed"


class Forgetful(InMemory):
    """Docker with a stopped container, which loses a network that is made anew."""

    def apply(self, change: Change) -> None:
        super().apply(change)
        if isinstance(change.resource, Network):
            web = StoppedContainer("0123", "web", None)
            self.resources[web.kind, web.key] = web


def test_stopped_containers_are_taken_over_with_the_network_that_replaces_theirs(host: State) -> None:
    fake = Fake()
    run(host, fake)
    docker = Forgetful({"network", "stopped"}, *fake.has("network"))
    others = [adapter for kind, adapter in fake.adapters.items() if kind not in docker.kinds]
    fake.machine.adapters = (*others, docker)
    fake.underlay = 1400
    report = run(host, fake)
    assert report.failures == ()
    made = [c.resource for c in report.changes if c.resource.kind in docker.kinds]
    assert [type(resource) for resource in made] == [Network, StoppedContainer]
    assert made[1] == StoppedContainer("0123", "web", "ovl0")
    assert run(host, fake).changes == (), "and once only"


def test_without_an_underlay_the_mtu_stays(host: State) -> None:
    fake = Fake()
    run(host, fake)
    links = fake.has("link")
    fake.underlay = InputError("no link has that address")
    fake.adapters["link"].resources.popitem()
    report = run(host, fake)
    assert areas(report) == {(Area.UNDERLAY, "")}
    assert len(fake.has("link")) == len(links) - 1
    assert run(host, fake, kinds=MEMBERSHIP).failures == (), "and is not asked for"


def fail_writing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MeshdError(f"writing {name}: No space left on device")

    monkeypatch.setattr(State, name, refuse)


def test_a_removal_waits_for_the_disk(host: State, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    run(host, fake)
    fake.members = [member(1), member(2, of=record(2, seq=2, leaving=True)), member(3)]
    fail_writing("save_roster", monkeypatch)
    report = run(host, fake)
    assert areas(report) == {(Area.DISK, "hosts")}
    assert fake.peers == {key(2), key(3)}, "a host is added, none removed: a reboot would bring it back"
    assert report.applied == Roster({"barge3": record(3)}), "nor is its tombstone confirmed"


def test_forwarding_waits_for_the_disk(host: State, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    fail_writing("save_originals", monkeypatch)
    assert areas(run(host, fake)) == {(Area.DISK, "originals")}
    assert FORWARD in fake.has("sysctl"), "'meshd down' would not know what to put back"
    assert fake.peers == {key(2)}


def test_a_revoked_host_says_so(host: State) -> None:
    own = host.certificate
    revocation = certificates.revoke(AUTHORITY, "meshd", own.serial, "barge1")
    host.save_roster(Roster(revoked={own.serial: revocation}))
    report = run(host, Fake())
    (failure,) = report.failed(Area.MEMBERSHIP)
    assert "the authority has revoked this host" in str(failure)


def test_a_rival_for_the_subnet_is_named(host: State) -> None:
    fake = Fake()
    for serial, rival, failures in ((1, "barge2", {(Area.SUBNET, "")}), (2**62, None, set[tuple[Area, str]]())):
        claim = record(2, subnet=record(1).subnet, by=certificate("barge2", serial=serial))
        fake.members = [member(1), member(2, of=claim)]
        report = run(host, fake)
        assert (report.rival, areas(report)) == (rival, failures)
        assert bool(report.notices) == (rival is None)
        assert fake.peers == set()


def test_whoever_claims_the_subnet_of_this_host_is_named_until_it_is_known_who_keeps_it(host: State) -> None:
    fake, claim = Fake(), record(2, subnet=record(1).subnet, by=certificate("barge2", serial=1))
    fake.members = [member(1), member(3)]
    run(host, fake)
    fake.members += [member(2, of=claim)]
    report = run(host, fake)
    assert (report.rival, report.failures) == (None, ())
    assert report.notices == (CLAIMED.format(subnet=claim.subnet, rivals="barge2"),)
    (dispute,) = report.roster.disputes
    said = {
        claim_of(n, r): Vote().with_answers(["barge3"], {"barge3": n == "barge2"}) for n, r in dispute.claims.items()
    }
    assert run(host, fake, votes=said).rival == "barge2"


def test_heard_records_count_before_the_tags_bring_them(host: State) -> None:
    fake = Fake()
    run(host, fake)
    moved = record(2, seq=2, key="renewed")
    run(host, fake, heard={"barge2": moved})
    assert fake.peers == {public_key("renewed")}


MAPPED = Endpoint(ip_address("::ffff:10.10.10.102"), 51820)


def test_hosts_that_older_version_took_are_dropped(host: State, caplog: pytest.LogCaptureFixture) -> None:
    """A host, or a contact, at an address where none can be goes with its peer, is named once, and stops nothing."""
    fake, elsewhere = Fake(), {"barge3": record(3), "barge4": record(4)}
    fake.members = [member(1), member(3), member(4)]
    run(host, fake)
    host.save_roster(replace(host.roster(), hosts={**elsewhere, "barge2": record(2, endpoint=MAPPED)}))
    host.save_contacts({**host.contacts(), "barge2": MAPPED})
    peer = Peer(key(2), MAPPED, (record(2).subnet,))
    fake.adapters["peer"].resources[peer.kind, peer.key] = peer
    report = run(host, fake)
    assert (report.failures, report.withheld, fake.peers) == ((), (), {key(3), key(4)})
    assert caplog.messages == [
        f"dropped barge2 from hosts.json: its endpoint {MAPPED} is an IPv4 address in IPv6 spelling",
        f"dropped barge2 from contacts.json: no host can be at {MAPPED}",
    ]
    caplog.clear()
    assert host.roster().hosts == elsewhere
    assert "barge2" not in host.saved_contacts()
    again = run(host, fake)
    assert (again.changes, caplog.messages) == ((), [])


def test_a_host_that_cannot_read_its_hosts_removes_none(host: State) -> None:
    """A hosts.json that is too large is set aside. Hosts are learnt again, and whoever is not listed keeps its peer."""
    fake = Fake()
    fake.members = [member(n) for n in (1, 2, 3, 4)]
    run(host, fake)
    with (host.directory / "hosts.json").open("r+b") as file:
        file.truncate(files.LIMIT + 1)
    fake.members = [member(n) for n in (1, 2, 3)]
    dry = run(host, fake, dry=True)
    assert [text for text in dry.notices if "is larger than" in text]
    for _ in range(2):
        report = run(host, fake)
        assert (report.failures, fake.peers) == ((), {key(2), key(3), key(4)})
        assert [c.resource.key for c in report.withheld if isinstance(c.resource, Peer)] == [key(4)]
        assert [text for text in report.notices if f"{ASIDE} is larger than" in text]
        assert host.roster().hosts == {"barge2": record(2), "barge3": record(3)}
    fake.members = [member(n) for n in (1, 2, 3, 4)]
    assert run(host, fake).withheld == ()
    (host.directory / ASIDE).unlink()
    assert run(host, fake).notices == ()


def test_an_invitation_that_is_used_up_is_a_problem_where_the_authority_is(host: State) -> None:
    """It is no failure: nothing is tried again for it. What is damaged does not end the reconcile."""
    host.save_authority_key(AUTHORITY)
    few = delegation(expires=0, hosts=1)
    joined = {f"barge{n}": record(n, by=delegated(f"barge{n}", few)) for n in (2, 3)}
    fake = Fake()
    fake.members = [member(1), *(member(int(name[-1]), of=r) for name, r in joined.items())]
    run(host, fake)
    confirm(host, "barge2", joined["barge2"])
    report = run(host, fake)
    (text,) = report.notices
    assert "is used up: the authority has confirmed 1 by it" in text
    assert report.failures == ()
    assert text in Complaints().of(report, 0)
    (host.directory / "issued.json").write_text("{")
    (text,) = run(host, fake).notices
    assert "issued.json is damaged" in text


def test_what_ends_soon_is_a_problem_here_and_where_the_authority_is(state: State) -> None:
    """The end of this host's own certificate is told everywhere, that of others' where it can be renewed."""
    soon = int(NOW) + 86400
    ends = {number: certificate(f"barge{number}", serial=1 << 20, expires=soon) for number in (1, 2)}
    state.save_certificate(ends[1])
    own, other = record(1, by=ends[1]), record(2, by=ends[2])
    publish(state, None, subnet=own.subnet, endpoint=own.endpoint, settled=True, now=NOW)
    fake = Fake()
    fake.members = [member(1, of=own), member(2, of=other)]
    assert [text.split()[0] for text in run(state, fake).notices] == ["this"]
    state.save_authority_key(AUTHORITY)
    report = run(state, fake)
    assert [text.split()[0] for text in report.notices] == ["this", "barge2's"]
    assert Complaints().of(report, NOW) == set(report.notices)


def test_dropped_host_is_named_once_while_serf_is_silent(host: State, caplog: pytest.LogCaptureFixture) -> None:
    """To drop it takes no word of Serf's, and it is not named again by each reconcile until Serf answers."""
    fake = Fake()
    fake.silent = SerfError("another agent")
    host.save_roster(Roster({"barge2": record(2, endpoint=MAPPED), "barge3": record(3)}))
    for _ in range(2):
        run(host, fake)
    assert [text for text in caplog.messages if "barge2" in text] == [
        f"dropped barge2 from hosts.json: its endpoint {MAPPED} is an IPv4 address in IPv6 spelling"
    ]
    assert host.roster().hosts == {"barge3": record(3)}


def test_own_endpoint_of_no_host_is_reported(state: State) -> None:
    """A host that an older version let advertise such an address goes on, and says why the others refuse it."""
    state.save_settings(replace(state.settings, advertise=MAPPED.address))
    publish(state, None, subnet=record(1).subnet, endpoint=MAPPED, settled=True, now=NOW)
    fake = Fake()
    report = run(state, fake)
    assert fake.peers == {key(2)}
    assert [failure.area for failure in report.failures] == [Area.UNDERLAY]
    assert f"since its endpoint {MAPPED} is an IPv4 address in IPv6 spelling" in str(report.failures[0])
    assert "run 'meshd up --advertise ADDRESS'" in str(report.failures[0])


def test_newcomer_at_own_address_is_refused(host: State) -> None:
    """The addresses of the machine are asked for, and no newcomer has one of them with this host's port."""
    fake = Fake()
    fake.machine.local = lambda: LocalAddresses(frozenset({record(2).endpoint.address}))
    assert run(host, fake).roster.refused == {"barge2": "its endpoint 10.10.10.102:51820 is this host's own"}


def test_contacts_are_kept(host: State, monkeypatch: pytest.MonkeyPatch) -> None:
    run(host, Fake())
    assert {name: str(e) for name, e in host.contacts().items()} == {"barge2": "10.10.10.102:7946"}
    fail_writing("save_contacts", monkeypatch)
    fake = Fake()
    fake.members.append(member(3))
    assert areas(run(host, fake)) == {(Area.DISK, "contacts")}


def test_tear_down_takes_everything_and_puts_forwarding_back(host: State) -> None:
    fake = Fake()
    run(host, fake)
    fake.docker = MissingError("no engine")
    report = tear_down(host, fake.machine, NOW)
    assert report.failures == ()
    assert {kind for kind in fake.adapters if fake.has(kind)} == {"sysctl", "tags"}, "the tags end with Serf"
    assert FORWARD in fake.has("sysctl")


def test_tear_down_leaves_forwarding_on_for_a_running_engine(host: State) -> None:
    fake = Fake()
    run(host, fake)
    tear_down(host, fake.machine, NOW)
    assert FORWARD not in fake.has("sysctl")


class Puzzled:
    """An adapter that meets what nobody has thought of."""

    kinds: ClassVar[frozenset[str]] = frozenset({"iptables"})

    def read(self) -> list[Resource]:
        b"caf\xe9".decode()
        return []

    def apply(self, change: Change) -> None:
        raise AssertionError(change)


def test_observe_continues_after_an_unforeseen_error() -> None:
    machine = Machine([Puzzled(), Links(("lo",), ())], list, engine=lambda: None, mtu=lambda: 1500, networks=tuple)
    resources, read, failures = machine.observe({"iptables", "link"})
    assert any(isinstance(resource, Link) for resource in resources)
    assert "link" in read
    (failure,) = failures
    assert str(failure).startswith("iptables: reading failed: UnicodeDecodeError('utf-8', b'caf\\xe9'")


def test_renumber_is_refused_while_leaving(state: State) -> None:
    """A host that has begun to leave does not claim another subnet."""
    own = record(1)
    last = publish(state, None, subnet=own.subnet, endpoint=own.endpoint, settled=True, leaving=True)
    with pytest.raises(InputError, match="has begun to leave 'meshd': run 'meshd leave' again"):
        renumber(state)
    assert state.claim() == last


def test_damaged_wireguard_key_is_an_error(state: State) -> None:
    """A damaged key ends the command; it is not taken for a host without WireGuard."""
    (state.directory / "wireguard.key").write_text("{")
    with pytest.raises(InputError, match=r"wireguard\.key is damaged"):
        this_machine(state)


def test_host_at_another_address_does_not_start_before_its_daemon(host: State) -> None:
    """It may run at the old address on another machine, which the daemon asks first: the machine is left as it is."""
    host.save_settings(replace(host.settings, bind=ip_address("10.10.10.104")))
    fake = Fake()
    with pytest.raises(WrongMachineError, match=r"barge1 was at 10\.10\.10\.101:51820 and is at 10\.10\.10\.104 now"):
        run(host, fake)
    assert fake.has("device") == []
    report = run(host, fake, dry=True)
    assert [notice for notice in report.notices if "'meshd up' asks first" in notice], report.notices
    with host.agent_lock():
        assert run(host, fake).failures == ()
    claim = host.claim()
    assert claim is not None
    assert claim.moved == int(NOW)
    host.save_settings(replace(host.settings, wireguard_port=51821))
    run(host, fake)
    claim = host.claim()
    assert claim is not None
    assert claim.moved == int(NOW), "another port is no other address"


def test_host_that_had_a_twin_publishes_beyond_it_once(host: State) -> None:
    own = host.claim()
    assert own is not None
    beyond = own.record.seq + 7
    first = run(host, Fake(), beyond=beyond).own
    assert first is not None
    assert first.record.seq == beyond + 1
    assert run(host, Fake(), beyond=beyond).own == first


def test_known_twins_are_reported_while_a_daemon_runs(host: State) -> None:
    two = Twins("barge2", Place(2, record(2).endpoint), Place(1, record(3).endpoint))
    host.save_twins({"barge2": two})
    assert str(two) not in run(host, Fake(), dry=True).notices
    with host.agent_lock():
        assert str(two) in run(host, Fake(), dry=True).notices
        assert str(two) in run(host, Fake()).notices


REWRITTEN = conntrack.REWRITTEN


class Tracked:
    """What the kernel answers when it is to end connections, each time it is asked."""

    def __init__(self, *answers: tuple[Counter[str], int] | MeshdError) -> None:
        self.answers = list(answers)
        self.asked: list[conntrack.Admission] = []

    def end(self, admission: conntrack.Admission) -> tuple[Counter[str], int]:
        self.asked.append(admission)
        return raised(self.answers.pop(0))


def test_connections_are_ended_once_the_table_is_laid_and_then_no_more(
    host: State, caplog: pytest.LogCaptureFixture
) -> None:
    fake, tracked = Fake(), Tracked((Counter({REWRITTEN: 2}), 0), (Counter({REWRITTEN: 1}), 0))
    fake.machine.end_connections = tracked.end
    run(host, fake, dry=True)
    assert tracked.asked == [], "a look changes nothing"
    assert run(host, fake).unended == ""
    (admission,) = tracked.asked
    assert (admission.overlay, admission.subnet, admission.bridge) == (MESH.overlay, record(1).subnet, True)
    assert caplog.messages == ["ended 2 connections whose source another rule had rewritten"]
    for _ in range(3):
        assert run(host, fake).changes == ()
    fake.adapters["table"].resources.pop(("table", "ip6 meshd_wg0"))
    assert run(host, fake).changes != ()
    assert len(tracked.asked) == 1, "that of IPv6 keeps no connection"
    fake.adapters["table"].resources.pop(("table", "ip meshd_wg0"))
    run(host, fake)
    assert caplog.messages[1:] == ["ended 1 connection whose source another rule had rewritten"]


def test_connections_that_could_not_be_ended_are_ended_later(host: State) -> None:
    """The reconcile has not failed; each next one tries it again until it is done, also one about members alone."""
    fake = Fake()
    tracked = Tracked(ApplyError("no buffer space"), (Counter(), 3), (Counter(), 0))
    fake.machine.end_connections = tracked.end
    first = run(host, fake)
    assert (first.failures, first.unended) == ((), "no buffer space")
    assert "no buffer space" in Complaints().of(first, 0.0), "which the log tells"
    second = run(host, fake, unended=first.unended, kinds=MEMBERSHIP)
    assert second.unended == "connections that contradict the firewall's rules cannot be ended yet: 3"
    third = run(host, fake, unended=second.unended)
    assert (third.unended, third.notices) == ("", ())
    assert len(tracked.asked) == 3


def test_connections_wait_for_the_table(host: State) -> None:
    """What ends while the rules are not there would begin again without them."""
    fake, tracked = Fake(), Tracked((Counter(), 0))
    fake.machine.end_connections = tracked.end
    fake.adapters["table"].broken = ApplyError("nft hangs")
    report = run(host, fake, unended="no buffer space")
    assert (tracked.asked, report.unended) == ([], "no buffer space")
    fake.adapters["table"].broken = None
    assert run(host, fake, unended=report.unended).unended == ""


def test_kernel_that_lists_no_connections_is_told_of_once(host: State, caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake()
    fake.machine.end_connections = Tracked(MissingError("this kernel lists no connections")).end
    report = run(host, fake)
    assert (report.failures, report.notices, report.unended) == ((), (), "")
    assert caplog.messages == ["this kernel lists no connections"]


def test_misplaced_container_is_told_of_and_left_alone(host: State) -> None:
    fake = Fake()
    run(host, fake)
    outside = RunningContainer("web", record(2).address + 7)
    fake.adapters["network"].resources["running", "web"] = outside
    report = run(host, fake)
    assert (report.changes, report.failures) == ((), ())
    (text,) = report.misplaced or ()
    assert text.startswith(f"container web has the address {outside.address} outside of this host's subnet")
    assert run(host, fake, kinds=MEMBERSHIP).misplaced is None
    fake.docker = MissingError("hangs")
    assert run(host, fake).misplaced is None


def test_report_has_what_the_counters_have_counted(host: State) -> None:
    fake = Fake()
    assert run(host, fake).dropped == {}
    (table, *_) = (r for r in fake.has("table") if isinstance(r, Table))
    counted = replace(table, counters=(("in_clear", 3), ("to_host", 0)))
    fake.adapters["table"].resources["table", table.key] = counted
    report = run(host, fake, dry=True)
    assert (report.dropped, report.changes) == ({"in_clear": 3}, ())
