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
    return assemble(lab, docker=2)


@pytest.mark.parametrize(
    "fault", [kill_daemon, kill_serf, kill_both, leave_serf, sync_in_a_loop, upgrade], ids=lambda f: f.__name__
)
def test_a_restart_loses_no_packet(lab: Lab, hosts: list[LabHost], fault: Callable[[LabHost], None]) -> None:
    with nothing_in_clear(lab, *hosts), traffic(*hosts):
        fault(hosts[1])
        eventually(lambda: settled(hosts), 40, "both see each other alive, and nothing is to be changed")


def test_what_was_restarted_is_logged(hosts: list[LabHost]) -> None:
    assert "serf started" in log(hosts[1])
    assert "withheld" not in log(hosts[0]) + log(hosts[1])
    assert "remove peer" not in log(hosts[0]) + log(hosts[1])
