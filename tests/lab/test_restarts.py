"""A restart is invisible: under steady traffic between containers, nothing of meshd's may cost a packet."""

from collections.abc import Callable

import pytest

from meshd.lab.hosts import Lab, LabHost
from tests.lab.conftest import assemble, eventually, log, nothing_in_clear, settled
from tests.lab.faults import kill_both, kill_daemon, kill_serf, leave_serf, sync_in_a_loop, upgrade
from tests.lab.traffic import traffic

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> list[LabHost]:
    hosts = assemble(lab, docker=2)
    # On a busy machine two that meet may begin their first handshake anew.
    eventually(lambda: settled(hosts), 40, "they have met")
    return hosts


@pytest.fixture(scope="module")
def before(hosts: list[LabHost]) -> list[int]:
    """What the daemons had logged before the first fault, in characters."""
    return [len(log(host)) for host in hosts]


@pytest.mark.parametrize(
    "fault", [kill_daemon, kill_serf, kill_both, leave_serf, sync_in_a_loop, upgrade], ids=lambda f: f.__name__
)
@pytest.mark.usefixtures("before")
def test_restart_loses_no_packet(lab: Lab, hosts: list[LabHost], fault: Callable[[LabHost], None]) -> None:
    """A restart of daemon, Serf or both, a sync or an upgrade loses no packet between containers."""
    with nothing_in_clear(lab), traffic(*hosts):
        fault(hosts[1])
        eventually(lambda: settled(hosts), 40, "both see each other alive, and nothing is to be changed")


def test_restart_is_logged_and_removes_nothing(hosts: list[LabHost], before: list[int]) -> None:
    """A restart of Serf is logged, and no peer or route was removed at any time."""
    one, two = (log(host)[length:] for host, length in zip(hosts, before, strict=True))
    assert "serf started" in two
    assert "withheld" not in one + two
    assert "remove " not in one + two, "no peer and no route has gone, not even for a moment"
