"""What a host publishes changes, or what WireGuard learns of it: the others follow, and nothing is reset."""

import time

import pytest

from meshd.daemon import hints
from meshd.lab.hosts import Lab, LabHost
from meshd.state.directory import State
from tests.lab.conftest import assemble, eventually, log, nothing_in_clear, overlay, peers, ping, settled
from tests.lab.faults import new_key, readdress, rewritten

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Seconds until all have a new key, between two full reconciles without a hint, and until all have a new address.
LEARNED, FULL, MOVED = 5.0, 10.0, 5.0
# Seconds that WireGuard waits before it repeats a handshake.
CROSSED = 5.0
LOSE = """
table bridge lose {
    chain forward {
        type filter hook forward priority 0;
        udp dport 51820 counter drop
    }
}
"""


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    return assemble(lab, docker=0, plain=3)


def key(host: LabHost) -> str:
    return host.run(["wg", "show", "wg0", "public-key"]).stdout.strip()


def test_new_key_after_restart_reaches_all(lab: Lab, hosts: list[LabHost]) -> None:
    """Serf raises no event at all for a restart as quick as this one: a leave and a join in one window are nothing."""
    one, two, three = hosts
    before = key(two)
    with nothing_in_clear(lab, *hosts):
        new_key(two)
        eventually(lambda: key(two) != before, 5, "its device has the new key")
        # The restart itself takes as long as the machine is busy.
        begun = time.monotonic()
        after = key(two)
        eventually(lambda: peers(one) == sorted([after, key(three)]), LEARNED, "one has the new key, and no old one")
        eventually(lambda: peers(three) == sorted([after, key(one)]), LEARNED, "so has three")
        took = time.monotonic() - begun
        eventually(lambda: ping(one, overlay(two)) and ping(two, overlay(three)), 2, "traffic goes on")
    print(f"a new key is everywhere after {took:.2f} s")  # noqa: T201
    assert took < LEARNED
    assert "EventMemberFailed: barge2" not in (one.directory / "meshd" / "serf.log").read_text(), "it was that quick"
    eventually(lambda: settled(hosts), 40, "all agree")


def test_simultaneous_first_handshakes_do_not_collide(hosts: list[LabHost]) -> None:
    """Two hosts that add each other at once complete a handshake without the 5 s that crossing ones lose."""
    one, two, _ = hosts
    keys = {one: key(two), two: key(one)}
    took = []
    for _ in range(16):
        for host, other in keys.items():
            host.run(["wg", "set", "wg0", "peer", other, "remove"])
        begun = time.monotonic()
        for host in keys:
            assert hints.wake(State(host.directory / "meshd").socket, "test", "serf")
        eventually(lambda: ping(one, overlay(two)) and ping(two, overlay(one)), 10, "they reach each other")
        took.append(time.monotonic() - begun)
    print(f"reach after two hosts have met: at most {max(took):.2f} s")  # noqa: T201
    assert max(took) < CROSSED
    eventually(lambda: all(keepalives(host) == {"25"} for host in keys), 2, "and both keep at it")


def test_lost_first_handshake_is_started_again_early(lab: Lab, hosts: list[LabHost]) -> None:
    """A first handshake that was lost is started again before WireGuard itself would do so, after 5 s."""
    one, two, _ = hosts
    lab.switch.run(["nft", "-f", "-"], text=LOSE)
    try:
        for host, other in ((one, key(two)), (two, key(one))):
            host.run(["wg", "set", "wg0", "peer", other, "remove"])
            assert hints.wake(State(host.directory / "meshd").socket, "test", "serf")
        eventually(lambda: lost_packets(lab) >= 2, 5, "the first message of each is lost")
    finally:
        lab.switch.run(["nft", "delete", "table", "bridge", "lose"])
    # A ping that waits for the tunnel is lost when its peer is re-created, and says so after 2 s: it is no clock.
    took = eventually(lambda: handshake(one, two) and handshake(two, one), 10, "both have a handshake")
    print(f"a handshake after the first messages were lost: {took:.2f} s")  # noqa: T201
    assert took < CROSSED - 2
    assert ping(one, overlay(two))
    assert ping(two, overlay(one))
    eventually(lambda: all(keepalives(host) == {"25"} for host in (one, two)), 2, "and both keep at it")


def handshake(host: LabHost, other: LabHost) -> bool:
    rows = dict(line.split() for line in host.run(["wg", "show", "wg0", "latest-handshakes"]).stdout.splitlines())
    return rows.get(key(other), "0") != "0"


def lost_packets(lab: Lab) -> int:
    rules = lab.switch.run(["nft", "list", "table", "bridge", "lose"]).stdout
    return int(rules.partition("counter packets ")[2].split()[0])


def keepalives(host: LabHost) -> set[str]:
    rows = host.run(["wg", "show", "wg0", "persistent-keepalive"]).stdout.splitlines()
    return {row.split()[1] for row in rows}


def endpoint(host: LabHost, of: str) -> str:
    rows = dict(line.split() for line in host.run(["wg", "show", "wg0", "endpoints"]).stdout.splitlines())
    return rows[of]


def test_learned_endpoint_is_kept(lab: Lab, hosts: list[LabHost]) -> None:
    """An endpoint that WireGuard has learned is kept by every reconcile while its handshake is fresh."""
    one, two, _ = hosts
    other = key(two)
    eventually(lambda: endpoint(one, other) == f"{two.address}:51820", 5, "the endpoint is the published one")
    before = len(log(one))
    with nothing_in_clear(lab, *hosts), rewritten(lab, two, 40000):
        # What the host itself sends is what moves its tunnel.
        assert ping(two, overlay(one))
        assert endpoint(one, other) == f"{two.address}:40000"
        until = time.monotonic() + FULL + 2
        while time.monotonic() < until:
            assert one.run(["meshd", "sync"]).stdout == "no changes\n"
            assert ping(one, overlay(two)), "one sends to where it has learned"
            assert endpoint(one, other) == f"{two.address}:40000"
            time.sleep(1)
    assert log(one)[before:] == "", "no pass of the daemon has touched it either"
    assert ping(two, overlay(one))
    assert endpoint(one, other) == f"{two.address}:51820", "and it moves back in the same way"


def test_new_underlay_address_reaches_all(lab: Lab, hosts: list[LabHost]) -> None:
    """The others follow a host to another underlay address by its announcement; Serf itself takes some 40 s."""
    one, two, three = hosts
    eventually(lambda: settled(hosts), 40, "all agree before")
    with nothing_in_clear(lab, *hosts):
        begun = time.monotonic()
        # As DHCP does it. The daemon looks before the new one is there, and nobody tells it of that.
        readdress(three, str(three.address), "10.10.10.133", without=0.5)
        eventually(lambda: follows(one, three) and follows(two, three), MOVED, "their tunnels have moved and work")
        took = time.monotonic() - begun
    print(f"a host at another address is reached after {took:.2f} s")  # noqa: T201
    eventually(lambda: settled(hosts), 90, "Serf believes it at last")


def follows(host: LabHost, moved: LabHost) -> bool:
    endpoints = host.run(["wg", "show", "wg0", "endpoints"]).stdout
    return "10.10.10.133:51820" in endpoints and ping(host, overlay(moved))
