"""What becomes of a host is shown in tests/lab; here is what needs no host."""

import pytest

from meshd.daemon.exchange import PATIENCE
from meshd.gossip import delivery
from meshd.lifecycle import change
from meshd.state.settings import OPTIONS, UP


@pytest.mark.parametrize(("hosts", "seconds"), [(1, 1.0), (4, 1.0), (50, 2.5), (100, 3.0)])
def test_ask_timeout_grows_with_hosts(hosts: int, seconds: float) -> None:
    """The timeout of a query grows with the number of hosts, and stays below the time that they keep it."""
    assert delivery._ask_timeout(hosts) == pytest.approx(seconds, abs=0.1)
    assert delivery._ask_timeout(hosts) < PATIENCE, "who is asked keeps the question for longer"


def test_what_a_change_restarts_is_what_can_change() -> None:
    """Serf is started with nothing else that `up` changes, and all ports are looked at."""
    changing = {name for name, option in OPTIONS.items() if option.later == UP}
    assert changing == change.OF_SERF | {"wireguard_port", "mtu", "keepalive", "allow"}
    assert {name for name in changing if name.endswith("_port")} <= change.PORTS.keys() <= changing
