"""An underlay of IPv6 alone, and hosts that have both: the overlay is the same IPv4 network on each."""

from collections.abc import Iterator

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import (
    assemble,
    capture,
    dropping,
    eventually,
    full_reach,
    init,
    join,
    members,
    nothing_in_clear,
    overlay,
    peers,
    ping,
    rtt,
    serf,
    settled,
)

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    """Two hosts with Docker and one without, which have no IPv4 address on the underlay at all."""
    return assemble(lab, docker=2, plain=1, underlay="ipv6")


def endpoints(host: LabHost) -> set[str]:
    return {line.split()[1] for line in host.run(["wg", "show", "wg0", "endpoints"]).stdout.splitlines()}


def test_mesh_on_ipv6_only_underlay(lab: Lab, hosts: list[LabHost]) -> None:
    """A mesh works on an underlay without IPv4."""
    one, two, three = hosts
    assert "10.10.10." not in one.run(["ip", "-4", "addr"]).stdout
    assert endpoints(one) == {"[fd00:10:10::66]:51820", "[fd00:10:10::67]:51820"}
    assert {row["endpoint"] for row in members(one).values()} == {f"[{host.address}]:51820" for host in hosts}
    with nothing_in_clear(lab), capture(lab, "ip6 and udp port 51820") as heard:
        assert full_reach(hosts)
        assert rtt(one, "box", overlay(two, 1), count=5)
        assert rtt(two, "box", overlay(three))
    assert len(heard[0]) > 3000, "it went by IPv6"
    assert settled(hosts)


def test_large_packets_on_ipv6_underlay(hosts: list[LabHost]) -> None:
    """The overlay's MTU leaves room for an IPv6 header, which is 20 bytes longer."""
    one, two, _ = hosts
    assert "mtu 1420" in one.run(["ip", "link", "show", "wg0"]).stdout
    for size in (1392, 10000):
        done = one.run(["docker", "exec", "box", "ping", "-c", "3", "-i", "0.2", "-s", str(size), overlay(two, 1)])
        assert "3 packets received" in done.stdout


def test_path_of_ipv6_that_drops_large_packets_is_measured(lab: Lab, hosts: list[LabHost]) -> None:
    """A path that drops large packets is measured on an underlay of IPv6 as well, also by a host without Docker."""
    one, _, three = hosts

    def mtus() -> list[object]:
        return [members(host)[other.name]["mtu"] for host, other in ((one, three), (three, one))]

    def passes() -> bool:
        return bool(
            one.run(["busybox", "ping", "-c", "1", "-W", "1", "-s", "10000", overlay(three)], check=False).returncode
            == 0
        )

    assert mtus() == [1420, 1420]
    with dropping(lab, 1000):
        # 80 bytes are WireGuard's, which sends multiples of 16.
        eventually(lambda: passes() and mtus() == [912, 912], 10, "the path is measured")
    eventually(lambda: passes() and mtus() == [1420, 1420], 15, "the path has grown")


def test_power_cut_on_ipv6_underlay_heals(lab: Lab, hosts: list[LabHost]) -> None:
    """A host is back after a power cut."""
    one, _, three = hosts
    lab.power_off(three)
    back = lab.power_on(three.name, underlay="ipv6")
    back.run(["meshd", "up"])
    eventually(lambda: ping(one, overlay(back)) and ping(back, overlay(one)), 15, "they reach each other")


def test_leave_on_ipv6_underlay(lab: Lab, hosts: list[LabHost]) -> None:
    """The others remove a host that leaves."""
    one, two, _ = hosts
    lab.host("barge3").run(["meshd", "leave"])
    eventually(lambda: len(peers(one)) == len(peers(two)) == 1, 5, "the others drop it")
    assert rtt(one, "box", overlay(two, 1))


@pytest.fixture
def dual(lab: Lab) -> Iterator[list[LabHost]]:
    """Three plain hosts with an IPv4 and an IPv6 address, without a mesh."""
    lab.down()
    lab.up(3, docker=False, underlay="dual")
    yield lab.hosts()
    lab.down()


@pytest.mark.parametrize("version", [4, 6])
def test_dual_stack_hosts_use_version_of_first(lab: Lab, dual: list[LabHost], version: int) -> None:
    """IPv4 where nothing is said; who joins takes the address that leads to the member it was given."""
    places = [next(a for a in host.addresses if a.version == version) for host in dual]
    chosen = [] if version == 4 else ["--bind", str(places[0])]
    invitation = init(dual[0], "--no-docker", *chosen)
    with nothing_in_clear(lab):
        for number in (1, 2):
            join(dual[number], dual[number - 1], invitation, "--no-docker", version=version)
        assert full_reach(dual)
    for host in dual:
        assert {row["endpoint"].rpartition(":")[0].strip("[]") for row in members(host).values()} == set(
            map(str, places)
        )
    for place in places:
        assert str(place) in serf(dual[0], "members")
