"""What all tests share: records, members and a state directory that are right unless a test says otherwise."""

import base64
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import hypothesis
import pytest

from meshd.endpoint import Endpoint
from meshd.gossip.messages import Answer, Applied
from meshd.mesh import certificates, tombstones
from meshd.mesh.certificates import Trust
from meshd.mesh.model import VERSION, Certificate, Delegation, Host, Member, Record, Status, Tombstone
from meshd.mesh.records import encode
from meshd.mesh.terms import Mesh
from meshd.state.directory import State
from meshd.state.settings import Settings

OVERLAY = IPv4Network("172.20.0.0/16")
GOLDEN = Path(__file__).parent / "golden"


# What hangs fails; what a busy machine delays does not, as it would by hypothesis' own 0.2 s for an example.
hypothesis.settings.register_profile(
    "meshd", deadline=timedelta(seconds=10), suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("meshd")
# `make fuzz`: pytest --hypothesis-profile=fuzz
hypothesis.settings.register_profile("fuzz", hypothesis.settings.get_profile("meshd"), max_examples=20_000)


def seed(name: str) -> bytes:
    """A secret that is the same in each run."""
    return sha256(name.encode()).digest()


AUTHORITY = seed("authority")
MESH = Mesh(OVERLAY, 24, Trust("meshd", certificates.public(AUTHORITY)))
# Before every certificate of the tests that expires, and after those that have.
NOW = 1_000_000.0


def public_key(name: str) -> str:
    return base64.b64encode(seed(name)).decode()


@cache
def certificate(
    name: str,
    *,
    serial: int = 0,
    expires: int = 0,
    subnets: tuple[IPv4Network, ...] = (),
    extensions: bytes = b"",
    version: int = VERSION,
) -> Certificate:
    """What the authority gives to a host of this name; its serial is the name's digest unless it is given."""
    serial = serial or int.from_bytes(seed(name)[:7], "big")
    unsigned = Certificate(
        serial,
        expires,
        certificates.public(seed(f"identity of {name}")),
        subnets,
        since=certificates.since(serial),
        extensions=extensions,
        version=version,
    )
    return certificates.certify(AUTHORITY, "meshd", name, unsigned)


@cache
def delegation(
    prefix: str = "",
    *,
    expires: int = int(NOW) + 60,
    subnets: tuple[IPv4Network, ...] = (),
    extensions: bytes = b"",
    version: int = VERSION,
    hosts: int = 64,
    serial: int = 7,
) -> Delegation:
    """What a reusable invitation carries; its seed is seed("delegate")."""
    unsigned = Delegation(
        serial,
        expires,
        certificates.public(seed("delegate")),
        prefix,
        subnets,
        hosts=hosts * (version >= VERSION),
        extensions=extensions,
        version=version,
    )
    return certificates.delegate(AUTHORITY, "meshd", unsigned)


def delegated(name: str, by: Delegation) -> Certificate:
    """What a host of this name makes itself with a reusable invitation."""
    identity = certificates.public(seed(f"identity of {name}"))
    return certificates.certify_by(seed("delegate"), "meshd", name, identity, by)


def record(
    number: int,
    *,
    seq: int = 1,
    key: str | None = None,
    leaving: bool = False,
    subnet: IPv4Network | None = None,
    endpoint: Endpoint | None = None,
    by: Certificate | None = None,
    extensions: bytes = b"",
    version: int = VERSION,
) -> Record:
    """The signed record of host bargeN: subnet 172.20.10N.0/24, underlay 10.10.10.10N."""
    name = f"barge{number}"
    unsigned = Record(
        public_key=public_key(key or name),
        subnet=subnet or IPv4Network(f"172.20.{100 + number}.0/24"),
        endpoint=endpoint or Endpoint(IPv4Address(f"10.10.10.{100 + number}"), 51820),
        seq=seq,
        certificate=by or certificate(name, version=version),
        leaving=leaving,
        extensions=extensions,
        version=version,
    )
    return certificates.sign(seed(f"identity of {name}"), "meshd", name, unsigned)


def forgotten(of: Record, number: int, by: bytes = AUTHORITY) -> Tombstone:
    """The authority's word, or that of another seed, that bargeN with this record is dead."""
    return certificates.forget(by, "meshd", f"barge{number}", tombstones.dead(of))


def host(number: int) -> Host:
    return Host(f"barge{number}", record(number))


def member(number: int, status: Status = Status.ALIVE, of: Record | None = None) -> Member:
    return Member(f"barge{number}", IPv4Address(f"10.10.10.{100 + number}"), 7946, status, encode(of or record(number)))


def applied(of: Record, number: int = 2) -> bytes:
    """The question whether a host has applied a record of bargeN's."""
    return Applied.of(Host(f"barge{number}", of), bytes(8)).payload()


def refusal(query: str, question: bytes, answer: bytes | None, by: Host | None = None) -> str | None:
    """What a host, by default barge1, has answered: why not, or the empty string for yes; None if that is no answer."""
    read = Answer.read(answer or b"")
    assert read is not None
    by = by or host(1)
    return read.refusal if MESH.trust.is_answer(by, query, question, read.refusal, read.signature) else None


def eventually(condition: Callable[[], object], timeout: float, what: str) -> float:
    """Wait until a condition holds; return the seconds it took, and fail with `what` after `timeout`.

    Between two tries it rests for as long as a try takes, so that a test leaves a core to what it waits for.
    """
    begun = time.monotonic()
    while True:
        tried = time.monotonic()
        if condition():
            return time.monotonic() - begun
        now = time.monotonic()
        assert now - begun < timeout, f"not within {timeout:g} s: {what}"
        time.sleep(min(max(0.05, now - tried), 1.0))


@pytest.fixture
def state(tmp_path: Path) -> State:
    """A state directory of a host that was set up as barge1."""
    state = State(tmp_path)
    state.save_settings(Settings(name="barge1", bind=IPv4Address("10.10.10.101")))
    state.save_authority(MESH.trust.authority)
    state.save_certificate(certificate("barge1"), seed("identity of barge1"))
    return state


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file in tests/golden; `pytest --golden-update` writes it."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--golden-update"):
            path.write_text(text)
        assert text == path.read_text(), f"differs from {path}; --golden-update writes it anew"

    return check


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-update", action="store_true", help="write the golden files anew")


# The files that take longest, the longest first: workers end at about the same time only if none of these comes last.
LONGEST = (
    *("attacks", "attacks_bounds", "partitions", "goodbyes", "subnets", "hands", "attacks_serf", "attacks_packets"),
    *("bad_input", "upgrade", "attacks_claims", "attacks_memory", "firewalls", "mesh", "chaos", "undone", "changes"),
    *("handshakes", "handlers", "alone", "invitations", "boot", "mtu", "two_meshes", "ipv6", "attacks_local"),
    *("restarts", "attacks_inputs"),
)


def _place(item: pytest.Item) -> int:
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long files first, and leave out tests of the kernel's WireGuard unless asked for: `make test-kernel` does."""
    items.sort(key=_place)
    if os.environ.get("MESHD_TEST_KERNEL") == "1":
        return
    left_out = [item for item in items if item.get_closest_marker("kernel")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("kernel")]
