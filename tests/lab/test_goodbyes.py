"""Failed is not left: what removes a host from the others, and what does not."""

from collections.abc import Iterator

import pytest

from meshd.lab.hosts import Lab, LabHost
from meshd.state.directory import State
from tests.lab.conftest import (
    SUSPECTED,
    assemble,
    eventually,
    invitation,
    join,
    members,
    nothing_in_clear,
    overlay,
    peers,
    ping,
    settled,
)

pytestmark = [pytest.mark.root, pytest.mark.lab]

STATE = "/var/lib/meshd"


@pytest.fixture
def hosts(lab: Lab) -> Iterator[list[LabHost]]:
    hosts = assemble(lab, docker=0, plain=3)
    try:
        with nothing_in_clear(lab):
            yield hosts
    finally:
        lab.down()


def state(host: LabHost, name: str) -> str:
    row = members(host).get(name)
    return row["state"] if row else ""


def gone(host: LabHost, other: LabHost) -> bool:
    """Tell whether nothing of another host is left on this one."""
    return f"{overlay(other)}/24" not in host.run(["ip", "route"]).stdout and len(peers(host)) == 1


def routes(host: LabHost) -> list[str]:
    """The routes to the others' subnets."""
    return host.run(["ip", "route", "show", "proto", "77", "dev", "wg0"]).stdout.splitlines()


def test_dead_agent_keeps_peer_and_routes(hosts: list[LabHost]) -> None:
    """The peer and routes of a host whose agents have died stay on all others."""
    one, two, three = hosts
    # The daemon first, which would start it again.
    three.run(["sh", "-ec", f"kill -KILL $(cat {STATE}/agent.pid); kill -KILL $(pgrep -f '^[^ ]*serf agent')"])
    eventually(lambda: state(one, "barge3") == state(two, "barge3") == "failed", SUSPECTED, "it is seen as failed")
    one.run(["meshd", "sync"])
    assert ping(one, overlay(three))
    assert ping(three, overlay(two))
    assert len(peers(one)) == len(peers(two)) == 2


def test_leave_reaches_host_that_was_down(lab: Lab, hosts: list[LabHost]) -> None:
    """A host that was down learns of a leave when it is back."""
    one, two, three = hosts
    lab.power_off(two)
    three.run(["meshd", "leave"])
    eventually(lambda: state(one, "barge3") == "left", 5, "the one that is up has heard it")
    lab.power_off(three)
    two = lab.power_on("barge2")
    two.run(["meshd", "up"])
    eventually(lambda: gone(two, three), 5, "the one that was down has heard it")
    # And it knows it by itself now: the one that told it may go.
    assert "barge3" in two.run(["cat", f"{STATE}/hosts.json"]).stdout


def test_leave_reaches_other_side_of_partition(lab: Lab, hosts: list[LabHost]) -> None:
    """Hosts that leave on both sides of a partition are removed everywhere after it heals."""
    one, two, three = hosts
    four = lab.power_on("barge4")
    join(four, one, invitation(one), "--no-docker")
    eventually(lambda: settled([one, two, three, four]), 15, "four hosts are settled")
    lab.cut(["barge1", "barge2"], ["barge3", "barge4"])
    eventually(
        lambda: state(one, "barge4") == state(four, "barge1") == "failed", SUSPECTED, "the parts have lost each other"
    )
    two.run(["meshd", "leave"])
    four.run(["meshd", "leave"])
    lab.heal()
    eventually(lambda: gone(one, two) and gone(one, four), 20, "one side has heard the other's")
    eventually(lambda: gone(three, two) and gone(three, four), 20, "and the other way round")
    assert ping(one, overlay(three))


def test_forget_removes_dead_host_and_frees_subnet(lab: Lab, hosts: list[LabHost]) -> None:
    """`forget` removes a dead host everywhere and frees its subnet; should it come back, it is refused."""
    one, two, three = hosts
    refused = one.run(["meshd", "forget", "barge3"], check=False)
    assert refused.returncode == 1
    assert "barge3 is alive: run 'meshd leave' there" in refused.stderr
    unknown = one.run(["meshd", "forget", "barge9"], check=False)
    assert unknown.returncode == 2
    assert "no host 'barge9' is known to this mesh; known: barge2, barge3" in unknown.stderr

    lab.power_off(three)
    eventually(lambda: state(one, "barge3") == "failed", SUSPECTED, "it is seen as failed")
    one.run(["meshd", "forget", "barge3"])
    eventually(lambda: gone(one, three) and gone(two, three), 5, "it is gone everywhere")

    # Its subnet is free: somebody else can have it.
    four = lab.power_on("barge4")
    join(four, two, invitation(one), "--no-docker", "--subnet", "172.20.103.0/24")
    eventually(lambda: ping(one, overlay(three)), 5, "the subnet has a new owner")

    # And should it come back, it is nobody, takes nothing from anybody, and is told so.
    three = lab.power_on("barge3")
    three.run(["meshd", "up", "--timeout", "2"], check=False)
    eventually(lambda: "has forgotten this host" in three.run(["meshd", "status"], check=False).stdout, 15, "it knows")
    assert members(one)["barge4"]["state"] == "alive"
    assert members(one)["barge4"]["subnet"] == "172.20.103.0/24"
    three.run(["meshd", "leave", "--force"])
    join(three, one, invitation(one), "--no-docker")
    eventually(lambda: settled([one, two, three, four]), 15, "it has joined anew")


def test_empty_member_list_removes_nothing(lab: Lab, hosts: list[LabHost]) -> None:
    """A host that lists nobody but itself removes no peer and no route."""
    one, two, _ = hosts
    before = peers(one), routes(one)
    lab.cut(["barge1"], ["barge2", "barge3"])
    try:
        # A restart without a snapshot: it lists itself alone, for as long as nobody answers.
        one.run(["sh", "-ec", "kill -KILL $(pgrep -f '^[^ ]*serf agent')"])
        eventually(lambda: "1 of 1 members alive" in one.run(["meshd", "status"]).stdout, 10, "it lists itself alone")
        assert one.run(["meshd", "sync"]).stdout == "no changes\n"
        assert (peers(one), routes(one)) == before
        assert len(peers(one)) == len(routes(one)) == 2
    finally:
        lab.heal()
    eventually(lambda: ping(one, overlay(two)), 10, "traffic goes on")
    eventually(lambda: settled(hosts), 30, "and the mesh is whole again")


def test_unheard_rejoin_is_admitted_after_confirmation(lab: Lab, hosts: list[LabHost]) -> None:
    """A host that leaves and joins again unheard is admitted when the authority has confirmed it."""
    one, two, three = hosts
    lab.cut(["barge1", "barge3"], ["barge2"])
    try:
        three.run(["meshd", "leave"])
        join(three, one, invitation(one), "--no-docker", "--timeout=1")
    finally:
        lab.heal()
    eventually(lambda: settled(hosts), 30, "all three are settled")
    assert ping(two, overlay(three))


def test_rejoin_after_disk_loss_needs_named_invitation(lab: Lab, hosts: list[LabHost]) -> None:
    """A host that lost its disk is refused by a reusable invitation and admitted by one for its name."""
    one, two, three = hosts
    known = [State(host.directory / "meshd") for host in (one, two)]
    eventually(
        lambda: all(s.roster().hosts["barge3"].certificate.delegation is None for s in known), 60, "it is confirmed"
    )
    lab.power_off(three)
    three = lab.power_on("barge3")
    three.run(["sh", "-c", f"rm -rf {STATE}/*"])
    eventually(lambda: state(one, "barge3") == "failed", SUSPECTED, "it is seen as failed")
    before, command = peers(one), ["meshd", "join", str(one.address), "--no-docker"]
    refused = three.run(command, env={"MESHD_INVITE": invitation(one)}, check=False)
    assert refused.returncode == 1
    assert "use an invitation for that name ('meshd invite barge3')" in refused.stderr
    assert peers(one) == before, "what is known of it stays"
    named = one.run(["meshd", "invite", "barge3"]).stdout.split("MESHD_INVITE=")[1].split()[0]
    join(three, one, named, "--no-docker")
    eventually(lambda: settled([one, two, three]), 15, "it is a host again")


def test_name_of_left_host_can_be_used_again(hosts: list[LabHost]) -> None:
    """An invited host can take the name of one that has left."""
    one, _, three = hosts
    three.run(["meshd", "leave"])
    join(three, one, invitation(one), "--no-docker")
    eventually(lambda: settled(hosts), 15, "it is back under its name with a new key")
