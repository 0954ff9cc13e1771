"""What should be on a host, and the changes that lead there."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.endpoint import Endpoint
from meshd.net.resources import (
    Action,
    Address,
    Change,
    Engine,
    Link,
    Network,
    Peer,
    Port,
    Resource,
    Route,
    RunningContainer,
    StoppedContainer,
    Sysctl,
    Table,
    Tags,
)
from meshd.reconcile import plan
from meshd.state.settings import Settings
from tests.conftest import OVERLAY, host, public_key, record

NOW = 1_000_000.0
ENGINES = {
    "docker-20.10": Engine("20.10.24+dfsg1"),
    "docker-26.1": Engine("26.1.5+dfsg1"),
    "docker-28.0": Engine("28.0.4"),
    "docker-28.5": Engine("28.5.2+dfsg3"),
    "docker-29": Engine("29.7.2"),
    "docker-29-nftables": Engine("29.7.2", "nftables"),
    "docker-28-firewalld": Engine("28.5.2", "iptables+firewalld"),
}


def local(engine: Engine | None = ENGINES["docker-20.10"], bridge: str | None = "ovl0") -> plan.Local:
    return plan.Local(
        host=host(1), settings=Settings(name="barge1", docker=bridge is not None), mtu=1420, engine=engine
    )


def wanted(*numbers: int, of: plan.Local | None = None) -> tuple[Resource, ...]:
    return plan.desired(of or local(), [host(n) for n in numbers])


def text(resources: tuple[Resource, ...]) -> str:
    """Every resource in order, with the text of every firewall rule and every option of the network."""
    lines: list[str] = []
    for resource in resources:
        lines.append(str(resource))
        if isinstance(resource, Table):
            for chain in resource.chains:
                lines.append(f"  chain {chain.name} {chain.type} {chain.hook} {chain.priority}")
                lines += [f"    {rule.text}" for rule in chain.rules]
        if isinstance(resource, Network):
            lines += [f"  {name} = {value}" for name, value in resource.options]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [*ENGINES, "no-docker"])
def test_desired_resources_by_docker_version(name: str, golden: Callable[[str, str], None]) -> None:
    """The desired resources are those of the golden file for each version of Docker."""
    of = local(ENGINES[name]) if name in ENGINES else local(None, None)
    golden(f"{name}.txt", text(tuple(change.resource for change in plan.diff(wanted(2, 3, of=of), (), now=NOW))))


def test_desired_resources_beside_another_vpn(golden: Callable[[str, str], None]) -> None:
    """Where another policy rule takes the overlay, meshd's own one comes before it."""
    of = replace(local(None, None), before=5269)
    golden("another-vpn.txt", text(tuple(change.resource for change in plan.diff(wanted(2, of=of), (), now=NOW))))


def test_path_mtus_are_what_was_measured_and_else_what_the_routes_have() -> None:
    """A path MTU goes to the route of its host, and stays there while nobody has measured anew."""
    hosts = [host(n) for n in (2, 3, 4)]
    two, three, four = (h.record for h in hosts)

    def routes(mtus: Mapping[str, int]) -> list[Route]:
        here = replace(local(), mtus=mtus)
        return [r for r in plan.desired(here, hosts) if isinstance(r, Route) and r.link is not None]

    observed = routes({two.public_key: 928, three.public_key: 1000})
    assert [route.mtu for route in observed] == [928, 1000, 0]
    measured = {three.public_key: 0, four.public_key: 1200}
    kept = plan.path_mtus(hosts, observed, measured, mtu=1420)
    assert [route.mtu for route in routes(kept)] == [928, 0, 1200]
    assert plan.path_mtus(hosts, observed, {}, mtu=0) == {two.public_key: 928, three.public_key: 1000}
    assert plan.path_mtus(hosts, observed, {}, mtu=1000) == {two.public_key: 928}, "no wider than the overlay"
    assert plan.path_mtus(hosts, routes({}), measured, mtu=1420) == measured


def test_diff_does_not_depend_on_order() -> None:
    """The order of the input does not change the result."""
    assert plan.diff(wanted(2, 3, 4), (), now=NOW) == plan.diff(wanted(4, 2, 3), (), now=NOW)
    observed = wanted(3, 4, 5)
    forward = plan.diff(wanted(2, 3), observed, now=NOW)
    assert forward == plan.diff(reversed(wanted(3, 2)), reversed(observed), now=NOW)


def test_diff_of_equal_sets_is_empty() -> None:
    """What is as desired needs no change."""
    assert plan.diff(wanted(2, 3), wanted(2, 3), now=NOW) == ()


def test_changes_are_ordered_so_that_nothing_leaks() -> None:
    """Changes are ordered so that nothing leaves in clear, and removals in reverse."""
    changes = plan.diff(wanted(2), (), now=NOW)
    places = [plan.ORDER.index(c.resource.kind) for c in changes if c.resource.kind != "sysctl"]
    assert places == sorted(places)
    assert isinstance(changes[0].resource, Table)
    assert isinstance(changes[-1].resource, Tags)
    routes = [c.resource for c in changes if isinstance(c.resource, Route)]
    assert [route.link for route in routes] == [None, "wg0"], "unreachable first"
    removals = [c.resource for c in plan.diff((), wanted(2), now=NOW)]
    assert [r for r in removals if r.kind != "sysctl"] == [
        r for r in reversed([c.resource for c in changes]) if r.kind != "sysctl"
    ]


def test_sysctls_are_set_but_never_removed() -> None:
    """Sysctls are set and never removed."""
    sysctl = Sysctl(plan.IP_FORWARD, "0")
    assert plan.diff((), [sysctl], now=NOW) == ()
    (change,) = plan.diff([replace(sysctl, value="1")], [sysctl], now=NOW)
    assert (change.action, change.old) == (Action.SET, sysctl)


def test_unread_kinds_are_left_alone() -> None:
    """Kinds of resources that were not read are left alone."""
    changes = plan.diff(wanted(2), [], now=NOW, kinds={"peer"})
    assert [c.resource.kind for c in changes] == ["peer"]
    assert plan.diff([], wanted(2), now=NOW, kinds=set()) == ()


ELSEWHERE = Endpoint(IPv4Address("192.0.2.9"), 40000)


@pytest.mark.parametrize(
    ("age", "moved", "kept"),
    [(10.0, (), True), (179.0, (), True), (181.0, (), False), (-5.0, (), False), (10.0, ("barge2",), False)],
    ids=["fresh", "just fresh", "stale", "from the future", "published anew"],
)
def test_learned_endpoint_stays_while_handshake_is_fresh(age: float, moved: tuple[str, ...], kept: bool) -> None:
    """An endpoint that WireGuard has learned stays while its handshake is fresh."""
    roamed = tuple(replace(r, endpoint=ELSEWHERE, handshake=NOW - age) if isinstance(r, Peer) else r for r in wanted(2))
    changes = plan.diff(wanted(2), roamed, now=NOW, moved={public_key(name) for name in moved})
    assert [c.action for c in changes] == ([] if kept else [Action.SET])


def test_roaming_peer_is_set_without_its_endpoint() -> None:
    """Other differences of a roaming peer are set without its endpoint."""
    roamed = tuple(
        replace(r, endpoint=ELSEWHERE, handshake=NOW - 1, keepalive=0) if isinstance(r, Peer) else r for r in wanted(2)
    )
    (change,) = plan.diff(wanted(2), roamed, now=NOW)
    assert isinstance(change.resource, Peer)
    assert (change.resource.endpoint, change.resource.keepalive) == (ELSEWHERE, 25)


def test_new_key_is_new_peer() -> None:
    """A new key is a new peer, and the old one is removed."""
    renewed = replace(host(2), record=record(2, seq=2, key="another"))
    changes = plan.diff(plan.desired(local(), [renewed]), wanted(2), now=NOW)
    assert [(c.action, c.resource.key) for c in changes] == [
        (Action.ADD, public_key("another")),
        (Action.REMOVE, public_key("barge2")),
    ]


def test_responder_is_quiet_until_handshake_or_timeout() -> None:
    """The responder keeps quiet until there is a handshake or its patience ends."""
    patient, rest = {public_key("barge2")}, {public_key("barge3")}
    changes = plan.diff(wanted(2, 3), (), now=NOW, patient=patient)
    added = {c.resource.key: c.resource.keepalive for c in changes if isinstance(c.resource, Peer)}
    assert added == dict.fromkeys(patient, 0) | dict.fromkeys(rest, 25)
    quiet = tuple(replace(r, keepalive=added[r.key]) if isinstance(r, Peer) else r for r in wanted(2, 3))
    assert plan.diff(wanted(2, 3), quiet, now=NOW, patient=patient) == ()
    for observed, left in ((quiet, ()), (_with_handshakes(quiet), patient)):
        (change,) = plan.diff(wanted(2, 3), observed, now=NOW, patient=left)
        assert isinstance(change.resource, Peer)
        assert (change.resource.key, change.resource.keepalive) == (public_key("barge2"), 25)
    # What has been said is not taken back.
    assert plan.diff(wanted(2, 3), wanted(2, 3), now=NOW, patient=patient) == ()


def _with_handshakes(resources: tuple[Resource, ...]) -> tuple[Resource, ...]:
    return tuple(replace(r, handshake=NOW - 1) if isinstance(r, Peer) else r for r in resources)


# --- the guard -----------------------------------------------------------------------------------------------------


def guarded(left: int, observed: int, departed: set[str]) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
    there = wanted(*range(2, 2 + observed))
    changes = plan.diff(wanted(*range(2, 2 + left)), there, now=NOW)
    return plan.guard(changes, there, departed)


def test_guard_passes_half_of_peers() -> None:
    """The removal of up to half of the peers passes the guard."""
    made, withheld = guarded(left=2, observed=4, departed=set())
    assert len(made) == 4  # two peers, two routes
    assert withheld == ()


def test_guard_withholds_more_than_half_of_peers() -> None:
    """The removal of more than half of the peers without evidence is withheld, with their routes."""
    made, withheld = guarded(left=1, observed=4, departed=set())
    assert made == ()
    assert sorted(c.resource.kind for c in withheld) == ["peer"] * 3 + ["route"] * 3


def test_guard_passes_departed_peers() -> None:
    """All peers may be removed if their hosts have left."""
    made, withheld = guarded(left=0, observed=4, departed={public_key(f"barge{n}") for n in range(2, 6)})
    assert len(made) == 8
    assert withheld == ()


def test_guard_withholds_only_doubtful_peers() -> None:
    """Only the removals without evidence are withheld."""
    made, withheld = guarded(left=0, observed=4, departed={public_key("barge2")})
    assert {c.resource.key for c in made} == {public_key("barge2"), "172.20.102.0/24 metric 0"}
    assert len(withheld) == 6


@given(st.sets(st.integers(2, 40)), st.sets(st.integers(2, 40)), st.sets(st.integers(2, 40)))
def test_guard_loses_at_most_half_of_peers(want: set[int], have: set[int], departed: set[int]) -> None:
    """What the guard passes loses at most half of the peers without evidence."""
    there = wanted(*have)
    keys = {public_key(f"barge{n}") for n in departed}
    made, withheld = plan.guard(plan.diff(wanted(*want), there, now=NOW), there, keys)
    doubtful = [
        c
        for c in made
        if c.action is Action.REMOVE and isinstance(c.resource, Peer) and c.resource.public_key not in keys
    ]
    assert len(doubtful) * 2 <= len(have)
    assert not any(c.action is not Action.REMOVE for c in withheld)


def test_restored_returns_original_sysctls() -> None:
    """The original values of sysctls are restored."""
    assert plan.restored({"net/b": "1", "net/a": "0"}) == (Sysctl("net/a", "0"), Sysctl("net/b", "1"))


def test_desired_without_docker_has_guards_and_no_bridge() -> None:
    """A host without Docker has no bridge, and the table and the unreachable route all the same."""
    resources = wanted(2, of=local(None, None))
    kinds = {r.kind for r in resources}
    assert kinds == {"table", "device", "link", "address", "peer", "route", "tags"}
    assert Route(IPv4Network(OVERLAY), None, metric=plan.LAST_METRIC) in resources
    assert [r for r in resources if isinstance(r, Address)] == [Address("wg0", IPv4Interface("172.20.101.0/32"))]
    assert [r.name for r in resources if isinstance(r, Link)] == ["wg0"]


def test_desired_has_table_per_ip_version() -> None:
    """Each version of IP that the kernel has gets a table."""
    for of in (local(), local(None, None)):
        for ipv6, families in ((True, ["ip", "ip6"]), (False, ["ip"])):
            resources = wanted(2, of=replace(of, ipv6=ipv6))
            assert [r.family for r in resources if isinstance(r, Table)] == families
            assert not [r for r in resources if isinstance(r, Link) and r.ipv6]


def test_old_table_is_replaced_in_place() -> None:
    """It has the same family and name: nft does that in one transaction."""
    (new,) = (r for r in wanted(2) if isinstance(r, Table) and r.family == "ip")
    old = replace(new, chains=new.chains[1:])
    changes = plan.diff(wanted(2), [old], now=NOW, kinds={"table"})
    assert [(c.action, c.resource.key) for c in changes] == [
        (Action.SET, "ip meshd_wg0"),
        (Action.ADD, "ip6 meshd_wg0"),
    ]
    assert [c.action for c in plan.diff((), [old], now=NOW)] == [Action.REMOVE]


def test_link_with_ipv6_is_set() -> None:
    """A link that has IPv6 is set to have none."""
    observed = [replace(r, ipv6=True) if isinstance(r, Link) else r for r in wanted(2)]
    assert [str(change) for change in plan.diff(wanted(2), observed, now=NOW)] == [
        "set link ovl0 (bridge 02:42:ac:14:65:00, mtu 1420, up)",
        "set link wg0 (wireguard, mtu 1420, up)",
    ]
    assert str(observed[2]) == "link wg0 (wireguard, mtu 1420, up, with IPv6)"


def test_loose_port_is_attached_after_bridge() -> None:
    """A container that lost its bridge is attached after the bridge is made."""
    loose = Port("veth1", None)
    without_bridge = [r for r in wanted(2) if not isinstance(r, Link) or r.name != "ovl0"]
    changes = plan.diff(wanted(2, of=replace(local(), loose=("veth1",))), [*without_bridge, loose], now=NOW)
    assert [str(change) for change in changes] == [
        "add link ovl0 (bridge 02:42:ac:14:65:00, mtu 1420, up)",
        "set port veth1 of ovl0",
    ]


def test_port_is_never_removed() -> None:
    """The port of a container is never removed."""
    assert plan.diff((), [Port("veth1", None)], now=NOW) == ()


def boxes(*addresses: str) -> list[RunningContainer]:
    return [RunningContainer(f"box{number}", IPv4Address(address)) for number, address in enumerate(addresses)]


def test_container_outside_of_the_subnet_is_named_with_a_free_address() -> None:
    """The container, its address, whose that is, and one that would do."""
    assert plan.misplaced(boxes("172.20.101.1", "172.20.101.254"), host(1), [host(2)]) == ()
    nobodys, theirs = plan.misplaced(
        boxes("172.20.101.1", "172.20.250.9", "172.20.102.7", "172.20.101.254"), host(1), [host(2), host(3)]
    )
    assert nobodys == (
        "container box1 has the address 172.20.250.9 outside of this host's subnet 172.20.101.0/24: other hosts do not "
        "reach it; start it again with --ip 172.20.101.253, which is free, or without --ip"
    )
    assert theirs.startswith(
        "container box2 has the address 172.20.102.7 outside of this host's subnet 172.20.101.0/24, in that of barge2: "
    )


def test_container_is_misplaced_also_where_no_address_is_free() -> None:
    """A full subnet leaves no address to name."""
    full = boxes(*(f"172.20.101.{last}" for last in range(1, 255)), "172.20.250.9")
    (text,) = plan.misplaced(full, host(1), [])
    assert text.endswith("other hosts do not reach it; start it without --ip")


@pytest.mark.parametrize(
    ("fixed", "kept"), [(None, None), ("172.20.101.50", "172.20.101.50"), ("172.20.102.50", None)], ids=str
)
def test_lost_container_gets_network_back(fixed: str | None, kept: str | None) -> None:
    """A stopped container that has lost the network gets it back, and keeps a fixed address of this host's subnet."""
    lost = StoppedContainer("0123", "web", None, IPv4Address(fixed) if fixed else None)
    resources = wanted(of=replace(local(), lost=(lost,)))
    changes = plan.diff(resources, [lost], now=NOW)
    (change,) = [change for change in changes if isinstance(change.resource, StoppedContainer)]
    assert change == Change(
        Action.SET, StoppedContainer("0123", "web", "ovl0", IPv4Address(kept) if kept else None), lost
    )
    order = [change.resource.kind for change in changes]
    assert order.index("network") < order.index("stopped")
    assert plan.diff((), [lost], now=NOW) == (), "nor is it removed with the network"
