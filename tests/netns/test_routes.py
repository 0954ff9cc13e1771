"""meshd's routes in a real namespace, checked from outside with `ip`."""

import json
import subprocess
import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from meshd.errors import ApplyError, ConflictError
from meshd.net.netlink import PROTOCOL
from meshd.net.resources import Action, Change, Diversion, Route
from meshd.net.routes import Routes, overlapping

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("sockets")]

OVERLAY = IPv4Network("172.20.0.0/16")
OWN = IPv4Address("172.20.101.0")
PEER = Route(IPv4Network("172.20.7.0/24"), "wg0", OWN)
GUARD = Route(OVERLAY, None, metric=4_000_000_000)


def ip(*words: str) -> Any:
    out = subprocess.run(["ip", "-json", "-details", *words], check=True, capture_output=True, text=True).stdout
    return json.loads(out or "[]")


@pytest.fixture
def routes(netns: object) -> Routes:
    assert netns
    for name in ("wg0", "other"):
        ip("link", "add", name, "type", "bridge")
        ip("link", "set", name, "up")
    ip("addr", "add", f"{OWN}/32", "dev", "wg0")
    return Routes("wg0", OVERLAY)


def change(routes: Routes, action: Action, *wanted: Route) -> None:
    for route in wanted:
        routes.apply(Change(action, route))


def test_routes_round_trip(routes: Routes) -> None:
    """Routes are read back, and `ip` shows them."""
    assert routes.read() == []
    change(routes, Action.ADD, PEER, GUARD)
    assert routes.read() == [GUARD, PEER]
    shown = {route["dst"]: route for route in ip("route", "show", "proto", str(PROTOCOL))}
    assert shown["172.20.7.0/24"]["dev"] == "wg0"
    assert shown["172.20.7.0/24"]["prefsrc"] == str(OWN)
    assert shown["172.20.7.0/24"]["scope"] == "link"
    assert shown["172.20.0.0/16"]["type"] == "unreachable"
    assert shown["172.20.0.0/16"]["metric"] == 4_000_000_000


def test_routes_of_several_messages_are_read(routes: Routes) -> None:
    """A dump of several netlink messages is read whole."""
    wanted = [Route(IPv4Network((f"172.20.{n // 4}.{n % 4 * 64}", 26)), "wg0", OWN) for n in range(1000)]
    lines = [f"route add {r.prefix} dev wg0 scope link src {OWN} proto {PROTOCOL}\n" for r in wanted]
    foreign = "route add 172.21.0.0/24 dev wg0\n"
    subprocess.run(["ip", "-batch", "-"], input="".join([*lines, foreign]), text=True, check=True)
    assert routes.read() == wanted


def test_routes_apply_is_idempotent(routes: Routes) -> None:
    """Adding or removing everything twice is harmless."""
    for _ in range(2):
        change(routes, Action.ADD, PEER, GUARD)
    assert routes.read() == [GUARD, PEER]
    for _ in range(2):
        change(routes, Action.REMOVE, PEER, GUARD)
    assert routes.read() == []


def test_routes_set_replaces_route(routes: Routes) -> None:
    """A changed route replaces the old one."""
    change(routes, Action.ADD, Route(PEER.prefix, "wg0"))
    routes.apply(Change(Action.SET, PEER, Route(PEER.prefix, "wg0")))
    assert routes.read() == [PEER]


def test_route_with_the_mtu_of_its_path(routes: Routes) -> None:
    """The MTU of a path is on its route, comes and goes without the route, and goes with it."""
    narrow = replace(PEER, mtu=928)
    routes.apply(Change(Action.ADD, PEER))
    with Popen(["ip", "-o", "monitor", "route"], stdout=PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        try:
            time.sleep(0.2)  # `ip` does not say when it listens
            routes.apply(Change(Action.SET, narrow, PEER))
            assert routes.read() == [narrow]
            assert ip("route", "get", "172.20.7.9")[0]["metrics"] == [{"mtu": 928}]
            routes.apply(Change(Action.SET, PEER, narrow))
            assert routes.read() == [PEER]
            assert "metrics" not in ip("route", "get", "172.20.7.9")[0]
            time.sleep(0.2)
        finally:
            monitor.terminate()
        assert "Deleted" not in monitor.stdout.read(), "there was a route all the time"
    change(routes, Action.ADD, narrow)
    change(routes, Action.REMOVE, PEER)
    assert routes.read() == []


def test_routes_of_two_meshes_are_separate(routes: Routes) -> None:
    """Two meshes on one host do not see each other's routes."""
    other = Routes("other", IPv4Network("172.21.0.0/16"))
    theirs = Route(IPv4Network("172.21.7.0/24"), "other")
    change(routes, Action.ADD, PEER, GUARD)
    change(other, Action.ADD, theirs, Route(IPv4Network("172.21.0.0/16"), None, metric=9))
    assert routes.read() == [GUARD, PEER]
    assert other.read() == [Route(IPv4Network("172.21.0.0/16"), None, metric=9), theirs]


def test_foreign_routes_are_kept(routes: Routes) -> None:
    """A route of someone else is neither replaced nor removed, and it is named."""
    ip("route", "add", "172.20.7.0/24", "dev", "other")
    (diversion,) = routes.read()
    assert str(diversion.key).startswith("the route 172.20.7.0/24 dev other takes packets for the overlay: remove it")
    with pytest.raises(ConflictError, match=r"adding route 172\.20\.7\.0/24 via wg0 .*other"):
        change(routes, Action.ADD, PEER)
    change(routes, Action.REMOVE, PEER)
    assert ip("route", "show", "172.20.7.0/24")[0]["dev"] == "other"


def test_route_via_missing_link(routes: Routes) -> None:
    """A missing link raises an error when a route is added, and none when it is removed."""
    missing = Route(PEER.prefix, "wg9")
    with pytest.raises(ApplyError, match=r"adding route 172\.20\.7\.0/24 via wg9: there is no link wg9"):
        change(routes, Action.ADD, missing)
    change(routes, Action.REMOVE, missing)


def test_route_with_foreign_source_is_refused(routes: Routes) -> None:
    """A source address that the host lacks is refused by the kernel."""
    with pytest.raises(ApplyError, match=r"adding route 172\.20\.7\.0/24 via wg0 from 192\.0\.2\.1: Invalid argument"):
        change(routes, Action.ADD, Route(PEER.prefix, "wg0", IPv4Address("192.0.2.1")))


def test_routes_of_other_tables_are_ignored(routes: Routes) -> None:
    """Routes of other tables are not meshd's."""
    ip("route", "add", "172.20.8.0/24", "dev", "wg0", "proto", str(PROTOCOL), "table", "100")
    assert routes.read() == []


def named(routes: Routes) -> list[str]:
    """The routes of others that are named, and for those that can be removed by a command, that command."""
    texts = [found.text for found in routes.read() if isinstance(found, Diversion)]
    return [text.partition("'")[2].partition("'")[0] or text for text in texts]


def test_routes_that_take_packets_are_named(routes: Routes) -> None:
    """The command that is named removes just that route, whatever its kind."""
    change(routes, Action.ADD, PEER, GUARD)
    ip("addr", "add", "10.9.0.1/24", "dev", "other")
    for taking in (
        "172.20.7.0/25 dev other proto static",
        "172.20.7.128/25 via 10.9.0.7 dev other metric 5 proto zebra",
        "blackhole 172.20.7.9",
        "172.20.9.0/24 nexthop dev other nexthop via 10.9.0.9",
        "172.20.0.0/16 dev other metric 7",
    ):
        ip("route", "add", *taking.split())
        (command,) = named(routes)
        assert command.startswith("ip route del ")
        ip(*command.split()[1:])
        assert named(routes) == [], taking
    assert routes.read() == [GUARD, PEER]


def test_routes_that_take_nothing_are_not_named(routes: Routes) -> None:
    """A shorter route, one of a greater metric, one by wg0 and the bridge's own are nobody's fault."""
    change(routes, Action.ADD, PEER, GUARD)
    ip("route", "add", "default", "dev", "other")
    ip("route", "add", "172.16.0.0/12", "dev", "other")
    ip("route", "add", str(PEER.prefix), "dev", "other", "metric", "9")
    ip("route", "add", "172.20.7.0/25", "dev", "wg0")
    ip("addr", "add", f"{OWN}/16", "dev", "other")
    assert [*Routes("wg0", OVERLAY, "other").read()] == [GUARD, PEER]
    (text,) = named(routes)
    assert "take the address that it belongs to from other" in text


def test_only_some_of_many_routes_are_named(routes: Routes) -> None:
    for number in range(14):
        ip("route", "add", f"172.20.9.{number}", "dev", "other")
    assert named(routes)[10:] == ["4 more routes of others take packets for the overlay"]


def test_thousand_routes_are_read_in_time(routes: Routes, tmp_path: Path) -> None:
    """A thousand routes are read back within seconds."""
    wanted = [Route(IPv4Network(f"172.20.{n // 4}.{n % 4 * 64}/26"), "wg0", OWN) for n in range(1000)]
    batch = tmp_path / "batch"
    batch.write_text("".join(f"route add {r.prefix} dev wg0 src {OWN} proto {PROTOCOL} scope link\n" for r in wanted))
    subprocess.run(["ip", "-batch", batch], check=True)
    started = time.monotonic()
    assert routes.read() == wanted
    assert time.monotonic() - started < 5  # 0.03 s, but 1 s in an emulated machine


def test_overlapping_finds_foreign_routes(routes: Routes) -> None:
    """Routes of others that overlap the overlay are found."""
    change(routes, Action.ADD, PEER, GUARD)
    assert overlapping(OVERLAY, ["wg0"]) == []
    ip("route", "add", "172.16.0.0/12", "dev", "other")
    ip("route", "add", "172.20.9.0/24", "dev", "other")
    ip("route", "add", "default", "dev", "other")
    ip("route", "add", "blackhole", "172.20.10.0/24")
    ip("route", "add", "10.0.0.0/8", "dev", "other")
    assert overlapping(OVERLAY, ["wg0"]) == [
        (IPv4Network("172.16.0.0/12"), "other"),
        (IPv4Network("172.20.9.0/24"), "other"),
        (IPv4Network("172.20.10.0/24"), "blackhole"),
    ]
    assert (PEER.prefix, "wg0") in overlapping(OVERLAY, [])
