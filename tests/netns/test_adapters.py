"""One contract for the adapters of the real kernel and for the one in memory that the unit tests use."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network

import pytest

from meshd.net import rules
from meshd.net.firewall import Nftables
from meshd.net.links import Links
from meshd.net.policy import Policy
from meshd.net.resources import Adapter, Link, PolicyRule, Resource, Route
from meshd.net.routes import Routes
from tests.adapters import InMemory, keeps_its_promises
from tests.conftest import OVERLAY
from tests.netns.conftest import Namespace

pytestmark = [pytest.mark.root]

ROUTES = (
    Route(IPv4Network("172.20.7.0/24"), "u0", None),
    Route(IPv4Network("172.20.7.0/24"), "u0", IPv4Address("10.9.0.1"), mtu=928),
)
RULES = tuple(PolicyRule(OVERLAY, priority) for priority in (5269, 5199))
LINKS = tuple(Link("ovl0", "bridge", mtu, mac="02:42:ac:14:01:00") for mtu in (1400, 1300))
TABLES = tuple(
    rules.table(wireguard="wg0", port=port, bridge="ovl0", overlay=OVERLAY, subnet=IPv4Network("172.20.1.0/24"))
    for port in (51820, 51821)
)
TABLES_OF_IPV6 = tuple(rules.ipv6_table(wireguard="wg0", bridge=bridge) for bridge in ("ovl0", None))

Case = tuple[Callable[[], Adapter], tuple[Resource, ...]]
CASES: dict[str, Case] = {
    "routes": (lambda: Routes("u0", OVERLAY), ROUTES),
    "policy": (lambda: Policy(OVERLAY, ("wg0",)), RULES),
    "links": (lambda: Links(("ovl0",), ()), LINKS),
    "nftables": (lambda: Nftables(TABLES[0].name, ("ip", "ip6")), TABLES),
    "nftables, IPv6": (lambda: Nftables(TABLES[0].name, ("ip", "ip6")), TABLES_OF_IPV6),
    "in memory": (lambda: InMemory({"route"}), ROUTES),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_adapter_keeps_its_promises(case: Case, netns_pair: tuple[Namespace, Namespace]) -> None:
    adapter, (first, second) = case
    with netns_pair[0].entered():
        keeps_its_promises(adapter(), first, second)
