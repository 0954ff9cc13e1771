"""What must not work by what a member says of itself: names that act on a terminal, endpoints where no host can be."""

import base64
import os
from dataclasses import replace
from ipaddress import IPv4Network, ip_address

import pytest

from meshd.endpoint import Endpoint
from meshd.lab.hosts import Lab, LabHost
from meshd.mesh import certificates
from meshd.mesh.model import Certificate, Record
from meshd.mesh.records import encode
from tests.lab.conftest import eventually, log, members, peers
from tests.lab.test_attacks import Scene, is_refused, state

pytestmark = [pytest.mark.root, pytest.mark.lab]

# A holder of the gossip key takes this name: it clears the screen, and writes a line of its own into the log.
HOSTILE = "evil\x1b[2J\n2026-11-26 12:00:00,000 WARNING refused barge2: forged\u202e"


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Scene:
    return Scene(lab)


@pytest.fixture
def member(scene: Scene) -> tuple[bytes, Record]:
    """A host that the authority has certified as barge4, which overreaches: its identity's seed and its record."""
    seed, authority = certificates.new_seed(), state(scene.mesh[0]).authority_key
    assert authority is not None
    unsigned = Certificate(certificates.new_serial(0), 0, certificates.public(seed))
    certificate = certificates.certify(authority, "meshd", "barge4", unsigned)
    key = base64.b64encode(os.urandom(32)).decode()
    endpoint = Endpoint(scene.stranger.address, 51820)
    return seed, Record(key, IPv4Network("172.20.104.0/24"), endpoint, 1, certificate)


def shown(host: LabHost) -> list[str]:
    """Everything that a host's commands print and its daemon logs."""
    commands = (["members"], ["members", "--json"], ["status"], ["status", "--json"], ["plan"], ["plan", "--json"])
    outputs = [host.run(["meshd", *command], check=False) for command in commands]
    return [log(host), *(done.stdout + done.stderr for done in outputs)]


def test_a_hostile_member_name_acts_on_no_terminal_and_forges_no_line(scene: Scene) -> None:
    with scene.agent(HOSTILE, {"subnet": "\x1b]0;owned\x07", "wg": "\u2028"}):
        for host in scene.mesh:
            eventually(lambda h=host: "evil" in log(h), 45, "the alarm is in the log")  # type: ignore[misc]
        for host in scene.mesh:
            for text in shown(host):
                lines = text.split("\n")
                assert all(line.isprintable() for line in lines), text
                assert not any(line.startswith("2026-11-26 12:00:00") for line in lines), text
            names = [name for name in members(host) if name.startswith("evil")]
            assert names == ["evil\\x1b[2J\\x0a2026-11-26 12:00:00,000 WARNING refused barge2: forged\\u202e"]
    scene.unharmed()


def test_a_certified_member_publishes_endpoints_where_no_host_can_be(
    scene: Scene, member: tuple[bytes, Record]
) -> None:
    seed, record = member
    own = scene.mesh[0].address
    for number, (address, reason) in enumerate(
        [
            (f"::ffff:{own}", "an IPv4 address in IPv6 spelling"),
            ("::ffff:127.0.0.1", "an IPv4 address in IPv6 spelling"),
            ("::ffff:172.20.101.0", "an IPv4 address in IPv6 spelling"),
            ("64:ff9b::ac14:6500", "inside the overlay 172.20.0.0/16 in IPv6 spelling"),
            ("172.20.101.0", "inside the overlay 172.20.0.0/16"),
            ("255.255.255.255", "no address of a host"),
            ("224.0.0.251", "no address of a host"),
            ("fe80::1", "local to one link"),
        ],
        start=1,
    ):
        wrong = replace(record, seq=number, endpoint=Endpoint(ip_address(address), 51820))
        with scene.agent("barge4", encode(certificates.sign(seed, "meshd", "barge4", wrong))):
            for host in scene.mesh:
                eventually(lambda h=host, r=reason: is_refused(h, "barge4", f"is {r}"), 45, reason)  # type: ignore[misc]
                assert record.public_key not in peers(host), host.name
    scene.unharmed()
    with scene.agent("barge4", encode(certificates.sign(seed, "meshd", "barge4", replace(record, seq=99)))):
        for host in scene.mesh:
            eventually(lambda h=host: record.public_key in peers(h), 45, "a real one is taken")  # type: ignore[misc]
