"""Every subnet has one owner in the end: no leader, no clock, and no traffic taken from who had it."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from itertools import count, islice

import pytest

from meshd.lab import images
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import addressing
from meshd.state.directory import State
from tests.lab.conftest import SUSPECTED, eventually, init, join, log, members, nothing_in_clear, ping, rtt, run_box

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Six subnets, and no host's last octet is one of them: a host prefers by its name.
SMALL = IPv4Network("172.20.0.0/21")


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    yield
    lab.down()


def names_that_prefer_the_same() -> Iterator[str]:
    def preferred(name: str) -> IPv4Network:
        return addressing.choose(SMALL, 24, (), IPv4Address("10.10.10.101"), name)

    return (name for n in count() if preferred(name := f"host{n}") == preferred("host0"))


def owners(hosts: Mapping[str, LabHost]) -> dict[str, str]:
    """Who has which subnet, if all hosts agree on that, and each has one of its own."""
    lists = [{name: row["subnet"] for name, row in members(host).items()} for host in hosts.values()]
    agreed = all(rows == lists[0] for rows in lists) and len(set(lists[0].values())) == len(hosts)
    return lists[0] if agreed else {}


def reach(hosts: Mapping[str, LabHost]) -> bool:
    addresses = [subnet.partition("/")[0] for subnet in owners(hosts).values()]
    return bool(addresses) and all(ping(host, address) for host in hosts.values() for address in addresses)


def test_five_hosts_preferring_one_subnet_get_five(lab: Lab) -> None:
    """Five hosts that prefer the same subnet and start at once get five."""
    lab.up(5, docker=False)
    hosts = dict(zip(islice(names_that_prefer_the_same(), 5), lab.hosts(), strict=True))
    (first, host), *others = hosts.items()
    with nothing_in_clear(lab):
        invitation = init(host, "--no-docker", f"--overlay={SMALL}", f"--name={first}")
        had = members(host)[first]["subnet"]
        with ThreadPoolExecutor() as pool:
            joined = [pool.submit(join, h, host, invitation, "--no-docker", f"--name={name}") for name, h in others]
            for one in joined:
                one.result()
        eventually(lambda: owners(hosts), 40, "five owners, and all agree")
        eventually(lambda: reach(hosts), 20, "and all reach each other")
    assert owners(hosts)[first] == had, "who had it keeps it"


@pytest.mark.parametrize("used", [False, True], ids=["nobody attached", "a container attached"])
def test_same_subnet_claimed_in_partition_is_resolved(lab: Lab, used: bool) -> None:
    """One of two hosts that claimed the same subnet in a partition moves, and the other loses no packet."""
    lab.up(4, docker=False)
    one, two, three, four = lab.hosts()
    same = list(islice(names_that_prefer_the_same(), 2))
    rivals = dict(zip(same, (two, four), strict=True))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lab.start_docker, rivals.values()))
        list(pool.map(images.build, rivals.values()))
    invitation = init(one, "--no-docker", f"--overlay={SMALL}")
    join(three, one, invitation, "--no-docker")
    lab.cut(["barge1", "barge2"], ["barge3", "barge4"])
    eventually(lambda: members(one)["barge3"]["state"] == "failed", SUSPECTED, "one side has lost the other")
    eventually(lambda: members(three)["barge1"]["state"] == "failed", SUSPECTED, "and the other way round")
    with nothing_in_clear(lab):
        for (name, host), via in zip(rivals.items(), (one, three), strict=True):
            join(host, via, invitation, f"--name={name}", "--timeout=1")
            if used:
                run_box(host)
        contested = {members(host)[name]["subnet"] for name, host in rivals.items()}
        assert len(contested) == 1, "each side has given it away once"
        address = contested.pop().partition("/")[0]
        # A confirmed certificate comes before a delegated one. It must not come while the two settle who moves.
        eventually(lambda: is_confirmed(two), 30, "the authority's side has confirmed its host")
        # Each side talks to its own, and goes on doing so.
        flows = [via.popen(["busybox", "ping", "-i", "0.05", address], stdout=subprocess.PIPE) for via in (one, three)]
        lab.heal()
        hosts = {"barge1": one, "barge3": three, **rivals}
        if used:
            loser = _wait_for_the_loser(rivals)
            assert len({members(host)[name]["subnet"] for name, host in rivals.items()}) == 1, "it stays"
            host = rivals[loser]
            refused = host.run(["meshd", "renumber"], check=False)
            assert refused.returncode == 1
            assert "containers are attached to ovl0: box" in refused.stderr
            moved = host.run(["meshd", "renumber", "--force"]).stdout
            assert re.search(rf"^the subnet of {loser} is 172\.20\.\d\.0/24$", moved, re.MULTILINE)
            assert re.search(r"^container box has the address 172\.20\.\d\.1$", moved, re.MULTILINE)
        eventually(lambda: owners(hosts), 40, "all agree on the owners")
        eventually(lambda: reach(hosts), 20, "and all reach each other")
        winner = next(name for name in rivals if owners(hosts)[name].startswith(f"{address}/"))
        _no_packet_lost(flows, (one, three)[list(rivals).index(winner)], (one, three))
        for name, host in rivals.items():
            assert host.run(["meshd", "plan"]).stdout == "no changes\n", name
            if not used:
                run_box(host)
        containers = [owners(hosts)[name].replace(".0/24", ".1") for name in rivals]
        assert rtt(two, "box", containers[1])
        assert rtt(four, "box", containers[0])


def test_known_hosts_moving_to_one_subnet_are_both_told(lab: Lab) -> None:
    """Two known hosts that move to one subnet in a partition are both told."""
    lab.up(2, docker=False)
    one, two = lab.hosts()
    join(two, one, init(one, "--no-docker"), "--no-docker")
    lab.cut(["barge1"], ["barge2"])
    for host in (one, two):
        host.run(["meshd", "renumber", "--subnet", "172.20.7.0/24"])
    lab.heal()
    for host, other in ((one, "barge2"), (two, "barge1")):
        told = f"subnet: {other} has moved to 172.20.7.0/24, which is this host's: 'meshd renumber'"
        eventually(lambda h=host, t=told: t in h.run(["meshd", "status"], check=False).stdout, 60, "it says so")  # type: ignore[misc]
    two.run(["meshd", "renumber"])
    hosts = {"barge1": one, "barge2": two}
    eventually(lambda: owners(hosts), 20, "each has one of its own")
    assert owners(hosts)["barge1"] == "172.20.7.0/24"
    eventually(lambda: reach(hosts), 20, "and they reach each other")
    for host in (one, two):
        assert "which is this host's" not in host.run(["meshd", "status"]).stdout


def is_confirmed(host: LabHost) -> bool:
    """Return whether a host publishes a certificate by the authority itself."""
    claim = State(host.directory / "meshd").claim()
    return claim is not None and claim.record.certificate.delegation is None


def _wait_for_the_loser(rivals: Mapping[str, LabHost]) -> str:
    """Give the one that says, in its log and in its status, that it has to move."""

    def losers() -> list[str]:
        return [name for name, host in rivals.items() if "which keeps it: 'meshd renumber'" in log(host)]

    eventually(losers, 40, "one of them says so loudly")
    (loser,) = losers()
    status = rivals[loser].run(["meshd", "status"], check=False)
    assert status.returncode == 1
    assert " is also claimed by " in status.stdout
    return loser


def _no_packet_lost(flows: list["subprocess.Popen[str]"], of: LabHost, via: tuple[LabHost, LabHost]) -> None:
    """What went to the owner that keeps the subnet has lost nothing; the other flow ended in the move."""
    for host in via:
        host.run(["pkill", "-INT", "-f", "busybox ping -i"])
    for flow, host in zip(flows, via, strict=True):
        output, _ = flow.communicate(timeout=10)
        if host is of:
            answered = sorted(int(number) for number in re.findall(r"seq=(\d+)", output))
            assert answered == list(range(len(answered)))
            assert len(answered) > 20
            # The last one may be on its way back.
            assert int(output.partition(" packets transmitted")[0].split()[-1]) - len(answered) <= 1
