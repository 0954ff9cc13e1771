"""A clock that was 30 days ahead, and is right again: what it has left behind keeps nobody out.

barge1 to barge3 are the mesh, and barge4 comes and goes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import meshd
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh.model import Record
from meshd.state.directory import State
from tests.lab.conftest import assemble, eventually, invitation, join, overlay, peers, ping
from tests.lab.faults import STATE, new_key

pytestmark = [pytest.mark.root, pytest.mark.lab]

AHEAD = 30 * 86400.0
# Seconds until all hosts have the one that the authority has certified anew.
IN = 15.0
# Lab hosts share one clock: what is shifted is what meshd reads.
CODE = """
import time as _time
_right = _time.time
_time.time = lambda: _right() + {seconds}
"""


@pytest.fixture(scope="module")
def mesh(lab: Lab) -> list[LabHost]:
    hosts = assemble(lab, docker=0, plain=3)
    rosters = [State(host.directory / "meshd").roster for host in hosts]

    def are_confirmed() -> bool:
        """Tell whether no certificate ends with the invitation: those would have expired where the clock is ahead."""
        return all(r.certificate.delegation is None for roster in rosters for r in roster().hosts.values())

    eventually(are_confirmed, 60, "the authority has confirmed all")
    return hosts


@pytest.fixture
def four(lab: Lab) -> Iterator[LabHost]:
    host = lab.power_on("barge4")
    yield host
    lab.host("barge4").run(["meshd", "leave", "--force"], check=False)
    lab.power_off(lab.host("barge4"))


@contextmanager
def clock_ahead(host: LabHost) -> Iterator[None]:
    """Have the processes of meshd that start on a host meanwhile see a clock that is ahead, also afterwards."""
    source, installed = host.directory / "ahead.py", Path(meshd.__file__)
    source.write_text(installed.read_text() + CODE.format(seconds=AHEAD))
    host.run(["mount", "--bind", str(source), str(installed)])
    try:
        yield
    finally:
        host.run(["umount", str(installed)])


def invite(host: LabHost, name: str) -> str:
    return host.run(["meshd", "invite", name]).stdout.split("MESHD_INVITE=")[1].split()[0]


def own(host: LabHost) -> Record:
    claim = State(host.directory / "meshd").claim()
    assert claim is not None
    return claim.record


def has(host: LabHost, name: str, record: Record) -> bool:
    """Tell whether a host has this identity and key for a name, in its roster and in WireGuard."""
    known = State(host.directory / "meshd").roster().hosts.get(name)
    same = known is not None and known.certificate.identity == record.certificate.identity
    return same and known is not None and known.public_key == record.public_key in peers(host)


def is_ahead(number: float) -> bool:
    return number > time.time() + AHEAD - 3600


def is_in(mesh: list[LabHost], host: LabHost) -> float:
    """Require that all have a host soon, and reach it; return the seconds that took."""
    took = eventually(lambda: all(has(other, "barge4", own(host)) for other in mesh), IN, "all have it")
    eventually(lambda: all(ping(other, overlay(host)) for other in mesh), 10, "and reach it")
    assert host.run(["meshd", "status"], check=False).returncode == 0
    return took


def join_in_time(host: LabHost, via: LabHost, offer: str) -> None:
    """Join, and require that the others say yes in time: to this life of the host, and not to the one before."""
    command = ["meshd", "join", str(via.address), "--no-docker", f"--timeout={IN:g}"]
    assert "4/4 hosts ready" in host.run(command, env={"MESHD_INVITE": offer}).stderr


@pytest.mark.parametrize("end", ["left", "wiped", "wiped, and uses its invitation again"])
def test_second_life_is_in_whatever_number_the_first_one_reached(
    lab: Lab, mesh: list[LabHost], four: LabHost, end: str
) -> None:
    """A host whose first life had a clock in the future, and that is invited anew, is in within 15 s."""
    first = invite(mesh[0], "barge4")
    with clock_ahead(four):
        join(four, mesh[1], first, "--no-docker")
    before = own(four)
    assert is_ahead(before.seq)
    is_in(mesh, four)
    if end == "left":
        four.run(["meshd", "leave"])
        eventually(lambda: not any(before.public_key in peers(host) for host in mesh), 10, "it has left")
        offer = invitation(mesh[0])
    else:
        lab.power_off(four)
        four = lab.power_on("barge4")
        four.run(["sh", "-c", f"rm -rf {STATE}/*"])
        offer = first if "again" in end else invite(mesh[0], "barge4")
    join_in_time(four, mesh[2], offer)
    is_in(mesh, four)
    assert own(four).public_key != before.public_key
    if "again" not in end:
        assert not is_ahead(own(four).seq), "it has a number of its own"
    assert not any(before.public_key in peers(host) for host in mesh)


def test_authority_whose_clock_was_ahead_invites_again(lab: Lab, mesh: list[LabHost], four: LabHost) -> None:
    """What a copy of the authority certifies anew counts, though it does not know what was given by a wrong clock."""
    one, two, _ = mesh
    for host, command in ((one, "export"), (two, "import")):
        secret = ["--passphrase-file", "-"]
        host.run(["meshd", "authority", command, str(one.directory / "exported"), *secret], text="of the lab\n")
    with clock_ahead(one):
        offer = invite(one, "barge4")
    join(four, two, offer, "--no-docker")
    assert is_ahead(own(four).certificate.since), "the clock was ahead"
    is_in(mesh, four)

    def wiped() -> LabHost:
        lab.power_off(lab.host("barge4"))
        host = lab.power_on("barge4")
        host.run(["sh", "-c", f"rm -rf {STATE}/*"])
        return host

    # Its own clock is right again.
    four = wiped()
    join(four, two, invite(one, "barge4"), "--no-docker")
    is_in(mesh, four)
    # The copy was made before, and has never heard of these serials.
    four = wiped()
    join_in_time(four, one, invite(two, "barge4"))
    is_in(mesh, four)


def test_member_whose_clock_was_ahead_stays(mesh: list[LabHost], four: LabHost) -> None:
    """A member whose clock was ahead for a while is heard as before, and hears those again whom it took for expired."""
    one, two, three = mesh
    # It has ended by the clock that is ahead, and is not so near its end that `status` warns of it.
    brief = one.run(["meshd", "invite", "barge4", "--ttl=20d"]).stdout.split("MESHD_INVITE=")[1].split()[0]
    join(four, one, brief, "--no-docker")
    is_in(mesh, four)
    with clock_ahead(three):
        new_key(three)
    assert is_ahead(own(three).seq)
    eventually(lambda: all(has(host, "barge3", own(three)) for host in (one, two)), IN, "they have its key")
    eventually(lambda: not has(three, "barge4", own(four)), IN, "it takes another one's certificate for expired")
    before = own(three)
    new_key(three)
    assert own(three).public_key != before.public_key
    eventually(lambda: all(has(host, "barge3", own(three)) for host in (one, two, four)), IN, "they have its new key")
    eventually(lambda: has(three, "barge4", own(four)), IN, "and it has the other one again")
    eventually(lambda: all(ping(three, overlay(host)) for host in (one, two, four)), 10, "it reaches all")
    assert three.run(["meshd", "status"], check=False).returncode == 0
