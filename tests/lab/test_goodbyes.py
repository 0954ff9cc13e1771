"""Failed is not left: what removes a host from the others, and what does not."""

from collections.abc import Iterator

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import (
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


def test_a_dead_agent_keeps_its_peer_and_routes_on_all_others(hosts: list[LabHost]) -> None:
    one, two, three = hosts
    # The daemon first, which would start it again.
    three.run(["sh", "-ec", f"kill -KILL $(cat {STATE}/agent.pid); kill -KILL $(pgrep -f '^[^ ]*serf agent')"])
    eventually(lambda: state(one, "barge3") == state(two, "barge3") == "failed", 30, "it is seen as failed")
    one.run(["meshd", "sync"])
    assert ping(one, overlay(three))
    assert ping(three, overlay(two))
    assert len(peers(one)) == len(peers(two)) == 2


def test_a_host_that_was_down_hears_of_a_goodbye_when_it_is_back(lab: Lab, hosts: list[LabHost]) -> None:
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


def test_both_sides_of_a_partition_hear_each_others_goodbyes(lab: Lab, hosts: list[LabHost]) -> None:
    one, two, three = hosts
    four = lab.power_on("barge4")
    join(four, one, invitation(one), "--no-docker")
    eventually(lambda: settled([one, two, three, four]), 15, "four hosts are settled")
    lab.cut(["barge1", "barge2"], ["barge3", "barge4"])
    eventually(lambda: state(one, "barge4") == state(four, "barge1") == "failed", 40, "the parts have lost each other")
    two.run(["meshd", "leave"])
    four.run(["meshd", "leave"])
    lab.heal()
    eventually(lambda: gone(one, two) and gone(one, four), 20, "one side has heard the other's")
    eventually(lambda: gone(three, two) and gone(three, four), 20, "and the other way round")
    assert ping(one, overlay(three))


def test_forget_removes_a_dead_host_for_good_and_frees_its_subnet(lab: Lab, hosts: list[LabHost]) -> None:
    one, two, three = hosts
    refused = one.run(["meshd", "forget", "barge3"], check=False)
    assert refused.returncode == 1
    assert "barge3 is alive: run 'meshd leave' there" in refused.stderr
    unknown = one.run(["meshd", "forget", "barge9"], check=False)
    assert unknown.returncode == 2
    assert "no host 'barge9' is known to this mesh; known: barge2, barge3" in unknown.stderr

    lab.power_off(three)
    eventually(lambda: state(one, "barge3") == "failed", 30, "it is seen as failed")
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


def test_an_empty_member_list_deletes_nothing(lab: Lab, hosts: list[LabHost]) -> None:
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


def test_who_left_and_came_again_unheard_is_taken_in_when_the_authority_has_confirmed_it(
    lab: Lab, hosts: list[LabHost]
) -> None:
    one, two, three = hosts
    lab.cut(["barge1", "barge3"], ["barge2"])
    try:
        three.run(["meshd", "leave"])
        join(three, one, invitation(one), "--no-docker", "--timeout=1")
    finally:
        lab.heal()
    eventually(lambda: settled(hosts), 30, "all three are settled")
    assert ping(two, overlay(three))


def test_who_lost_its_disk_is_told_that_it_needs_an_invitation_for_its_name(lab: Lab, hosts: list[LabHost]) -> None:
    one, two, three = hosts
    lab.power_off(three)
    three = lab.power_on("barge3")
    three.run(["sh", "-c", f"rm -rf {STATE}/*"])
    eventually(lambda: state(one, "barge3") == "failed", 30, "it is seen as failed")
    join(three, one, invitation(one), "--no-docker", "--timeout=1")
    for host in (one, two):
        eventually(lambda h=host: "meshd invite NAME" in members(h)["barge3"]["reason"], 20, "it is refused")  # type: ignore[misc]
    named = one.run(["meshd", "invite", "barge3"]).stdout.split("MESHD_INVITE=")[1].split()[0]
    join(three, one, named)
    eventually(lambda: settled([one, two, three]), 15, "it is a host again")


def test_an_invited_host_can_have_the_name_of_one_that_left(hosts: list[LabHost]) -> None:
    one, _, three = hosts
    three.run(["meshd", "leave"])
    join(three, one, invitation(one), "--no-docker")
    eventually(lambda: settled(hosts), 15, "it is back under its name with a new key")
