"""What all tests share: records, members and a state directory that are right unless a test says otherwise."""

import base64
import time
from collections.abc import Callable
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from meshd.config import Settings
from meshd.model import Endpoint, Host, Member, Record, Status
from meshd.state import State
from meshd.tags import encode

OVERLAY = IPv4Network("172.20.0.0/16")
GOLDEN = Path(__file__).parent / "golden"


def public_key(name: str) -> str:
    return base64.b64encode(sha256(name.encode()).digest()).decode()


def record(number: int, *, seq: int = 1, key: str | None = None, leaving: bool = False) -> Record:
    """The record of host bargeN: subnet 172.20.10N.0/24, underlay 10.10.10.10N."""
    return Record(
        public_key=public_key(key or f"barge{number}"),
        subnet=IPv4Network(f"172.20.{100 + number}.0/24"),
        endpoint=Endpoint(IPv4Address(f"10.10.10.{100 + number}"), 51820),
        seq=seq,
        leaving=leaving,
    )


def host(number: int) -> Host:
    return Host(f"barge{number}", record(number))


def member(number: int, status: Status = Status.ALIVE, of: Record | None = None) -> Member:
    return Member(f"barge{number}", IPv4Address(f"10.10.10.{100 + number}"), 7946, status, encode(of or record(number)))


def eventually(condition: Callable[[], object], timeout: float, what: str) -> float:
    """Wait until a condition holds; give the seconds it took, and fail with `what` after `timeout`."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout, f"not within {timeout:g} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - begun


@pytest.fixture
def state(tmp_path: Path) -> State:
    """A state directory of a host that was set up as barge1."""
    state = State(tmp_path)
    state.save_settings(Settings(name="barge1", bind=IPv4Address("10.10.10.101")))
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
