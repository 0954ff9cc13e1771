"""Links, addresses and sysctls in a real namespace, checked from outside with `ip`."""

import gc
import json
import os
import subprocess
from dataclasses import replace
from ipaddress import IPv4Interface, ip_address
from pathlib import Path
from typing import Any

import pytest

from meshd.errors import ApplyError, ConflictError, InputError
from meshd.net import links, netlink, underlay
from meshd.net.resources import Action, Address, Change, Link, Sysctl
from tests.conftest import eventually

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("netns", "sockets")]

BRIDGE = Link("ovl0", "bridge", 1420, mac="02:42:ac:14:65:00")
ADDRESS = Address("ovl0", IPv4Interface("172.20.101.0/16"))
PROXY_ARP = Sysctl("net/ipv4/conf/ovl0/proxy_arp", "1")
PROTOCOL = 77


def ip(*words: str) -> Any:
    out = subprocess.run(["ip", "-json", "-details", *words], check=True, capture_output=True, text=True).stdout
    return json.loads(out or "[]")


def add(adapter: links.Links, *resources: Any) -> None:
    for resource in resources:
        adapter.apply(Change(Action.ADD, resource))


def remove(adapter: links.Links, *resources: Any) -> None:
    for resource in resources:
        adapter.apply(Change(Action.REMOVE, resource))


@pytest.fixture
def adapter() -> links.Links:
    return links.Links(["ovl0", "wg0"], [PROXY_ARP.path, "net/ipv4/ip_forward"])


def test_links_round_trip(adapter: links.Links) -> None:
    """Links, addresses and sysctls are read back, and `ip` shows them."""
    assert adapter.read() == [Sysctl("net/ipv4/ip_forward", "0")]
    add(adapter, BRIDGE, ADDRESS, PROXY_ARP, Sysctl("net/ipv4/ip_forward", "1"))
    assert adapter.read() == [BRIDGE, ADDRESS, PROXY_ARP, Sysctl("net/ipv4/ip_forward", "1")]
    link = ip("link", "show", "ovl0")[0]
    assert link["linkinfo"]["info_kind"] == "bridge"
    assert link["mtu"] == 1420
    assert "UP" in link["flags"]
    assert [(a["local"], a["prefixlen"], a["scope"]) for a in ip("-4", "addr", "show", "ovl0")[0]["addr_info"]] == [
        ("172.20.101.0", 16, "global")
    ]


def test_hardened_link_forwards() -> None:
    """A link that is made while hardening lets no new one forward is read as it is, and set alone."""
    found = Sysctl("net/ipv4/conf/ovl0/forwarding", "0")
    kept = links.Links(["ovl0"], [found.path, "net/ipv4/ip_forward"])
    add(kept, Sysctl("net/ipv4/ip_forward", "1"))
    Path("/proc/sys/net/ipv4/conf/default/forwarding").write_text("0\n")
    add(kept, BRIDGE, Sysctl("net/ipv4/ip_forward", "1"))
    assert found in kept.read(), "ip_forward, which is 1 already, turns nothing on"
    kept.apply(Change(Action.SET, replace(found, value="1"), found))
    assert kept.read() == [BRIDGE, replace(found, value="1"), Sysctl("net/ipv4/ip_forward", "1")]
    assert Path("/proc/sys/net/ipv4/conf/default/forwarding").read_text() == "0\n"


def test_bridge_keeps_connected_route(adapter: links.Links) -> None:
    """The address of the bridge brings its connected route."""
    add(adapter, BRIDGE, ADDRESS)
    assert [route["dst"] for route in ip("route", "show", "dev", "ovl0")] == ["172.20.0.0/16"]


def test_foreign_bridge_gets_mac_address(adapter: links.Links) -> None:
    """A bridge that someone else has made gets the MAC address and announces it by ARP."""
    ip("link", "add", "ovl0", "type", "bridge")
    add(adapter, ADDRESS)
    adapter.apply(Change(Action.SET, BRIDGE))
    assert BRIDGE in adapter.read()
    assert ip("link", "show", "ovl0")[0]["address"] == BRIDGE.mac
    assert Path("/proc/sys/net/ipv4/conf/ovl0/arp_notify").read_text() == "1\n"


def test_bridge_keeps_mac_address_with_new_port(adapter: links.Links) -> None:
    """The MAC address of the bridge stays when a port with a lower one is added."""
    add(adapter, BRIDGE)
    ip("link", "add", "low", "address", "00:00:00:00:00:01", "type", "veth", "peer", "name", "end")
    ip("link", "set", "low", "master", "ovl0")
    assert BRIDGE in adapter.read()


def ipv6_of(link: str) -> list[str]:
    return [a["local"] for row in ip("-6", "addr", "show", link) for a in row.get("addr_info", [])]


def plug_in(end: str) -> None:
    """Put one end of a cable on the bridge: with a carrier IPv6 gives it an address at once."""
    ip("link", "add", "port", "mtu", "1420", "type", "veth", "peer", "name", end)
    ip("link", "set", "port", "master", "ovl0", "up")
    ip("link", "set", end, "up")


def test_own_link_has_no_ipv6(adapter: links.Links) -> None:
    """A link of meshd's has no IPv6."""
    add(adapter, BRIDGE)
    plug_in("end")
    eventually(lambda: ipv6_of("end"), 5, "the other end has some")
    assert ipv6_of("ovl0") == []
    conf = Path("/proc/sys/net/ipv6/conf")
    assert [(conf / "ovl0" / name).read_text() for name in ("accept_ra", "disable_ipv6")] == ["0\n", "1\n"]
    assert (conf / "all/disable_ipv6").read_text() == (conf / "default/disable_ipv6").read_text() == "0\n"


def test_foreign_ipv6_on_link_is_turned_off(adapter: links.Links) -> None:
    """IPv6 on a link that someone else made or turned on is turned off."""
    ip("link", "add", "ovl0", "address", str(BRIDGE.mac), "type", "bridge")
    ip("link", "set", "ovl0", "up", "mtu", "1420")
    plug_in("end")
    for _ in range(2):
        eventually(lambda: ipv6_of("ovl0"), 5, "it has some")
        assert adapter.read()[0] == replace(BRIDGE, ipv6=True)
        adapter.apply(Change(Action.SET, BRIDGE))
        assert adapter.read()[0] == BRIDGE
        assert ipv6_of("ovl0") == []
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("0\n")
    assert Path("/proc/sys/net/ipv6/conf/ovl0/accept_ra").read_text() == "0\n", "nor is there a moment for routers"


def test_link_too_small_for_ipv6(adapter: links.Links) -> None:
    """A link that is too small for IPv6 has none until it grows."""
    small = replace(BRIDGE, mtu=1200)
    add(adapter, small)
    assert not Path("/proc/sys/net/ipv6/conf/ovl0").exists()
    assert adapter.read()[0] == small
    plug_in("end")
    adapter.apply(Change(Action.SET, BRIDGE, small))
    assert adapter.read()[0] == BRIDGE
    assert ipv6_of("ovl0") == []


def test_a_host_without_ipv6_has_links_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `ipv6.disable=1` for the kernel the folder of its parameters is not there."""
    assert links.has_ipv6()
    folder = links.PROC_SYS
    with monkeypatch.context() as patch:
        patch.setattr(links, "PROC_SYS", folder / "net/ipv4")
        assert not links.has_ipv6()
        add(links.Links(["ovl0"], []), BRIDGE)
        assert links.Links(["ovl0"], []).read() == [BRIDGE]


def test_links_apply_is_idempotent(adapter: links.Links) -> None:
    """Adding or removing everything twice is harmless."""
    for _ in range(2):
        add(adapter, BRIDGE, ADDRESS, PROXY_ARP)
    assert len(adapter.read()) == 4
    for _ in range(2):
        remove(adapter, PROXY_ARP, ADDRESS, BRIDGE, ADDRESS)
    assert adapter.read() == [Sysctl("net/ipv4/ip_forward", "0")]


def test_links_set_restores_drifted_link(adapter: links.Links) -> None:
    """A link whose MTU and state have drifted is restored."""
    add(adapter, BRIDGE)
    ip("link", "set", "ovl0", "down", "mtu", "1300")
    old = replace(BRIDGE, mtu=1300, up=False)
    assert old in adapter.read()
    adapter.apply(Change(Action.SET, BRIDGE, old))
    assert BRIDGE in adapter.read()


def test_link_of_another_type_is_conflict(adapter: links.Links) -> None:
    """A link of another type raises ConflictError that names both types."""
    ip("link", "add", "ovl0", "type", "veth", "peer", "name", "other")
    with pytest.raises(ConflictError, match=r"ovl0 .*veth.* bridge"):
        add(adapter, BRIDGE)
    with pytest.raises(ConflictError, match="veth"):
        remove(adapter, BRIDGE)
    assert ip("link", "show", "ovl0")


def test_tun_link_reads_as_wireguard(adapter: links.Links) -> None:
    """A TUN link with the name of the device is read as WireGuard's."""
    ip("tuntap", "add", "wg0", "mode", "tun")
    add(adapter, Link("wg0", "wireguard", 1380))
    assert Link("wg0", "wireguard", 1380) in adapter.read()
    remove(adapter, Link("wg0", "wireguard", 1380))
    assert "wg0" not in links.link_names()


def test_missing_link_is_named_in_error(adapter: links.Links) -> None:
    """The error names the link that is missing."""
    with pytest.raises(ApplyError, match=r"setting link wg0 .*there is no link wg0"):
        add(adapter, Link("wg0", "wireguard", 1420))
    with pytest.raises(ApplyError, match=r"adding address 172\.20\.101\.0/16 dev ovl0: there is no link ovl0"):
        add(adapter, ADDRESS)
    with pytest.raises(ApplyError, match=r"setting sysctl net/ipv4/conf/ovl0/proxy_arp = 1: No such file"):
        add(adapter, PROXY_ARP)


@pytest.mark.parametrize("path", ["../etc/passwd", "/etc/passwd", "net//ipv4", "net/./x", ""])
def test_sysctl_path_stays_below_proc_sys(adapter: links.Links, path: str) -> None:
    """A path that leads out of /proc/sys is refused."""
    with pytest.raises(ApplyError, match="not a path below"):
        add(adapter, Sysctl(path, "1"))


def test_refused_sysctl_value_raises_error(adapter: links.Links) -> None:
    """A value that the kernel refuses raises ApplyError."""
    with pytest.raises(ApplyError, match="Invalid argument"):
        add(adapter, Sysctl("net/ipv4/ip_forward", "perhaps"))


def test_one_socket_is_reused_until_it_breaks() -> None:
    """One rtnetlink socket is used until it fails, and then a new one."""

    def used() -> Any:
        with netlink.rtnetlink("looking") as ipr:
            return ipr

    with netlink.one_socket():
        first = used()
        assert used() is first
        with pytest.raises(ApplyError, match="looking: it broke"), netlink.rtnetlink("looking"):
            raise OSError(5, "it broke")
        assert used() is not first
    with netlink.one_socket():
        assert used() is not first


def test_links_leak_no_descriptor(adapter: links.Links) -> None:
    """Neither success nor failure leaves a descriptor open."""

    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # each entry only counts

    add(adapter, BRIDGE, ADDRESS)
    before = descriptors()
    for _ in range(20):
        adapter.read()
        add(adapter, BRIDGE, ADDRESS)
        with pytest.raises(ApplyError):
            add(adapter, Link("wg0", "wireguard", 1420))
    assert descriptors() == before


# --- the machine ---------------------------------------------------------------------------------------------------


def make_underlay() -> None:
    ip("link", "add", "u0", "mtu", "1480", "type", "veth", "peer", "name", "u1")
    ip("link", "set", "u0", "up")
    ip("link", "set", "u1", "up")
    ip("addr", "add", "10.10.10.101/24", "dev", "u0")
    ip("addr", "add", "10.10.11.101/24", "dev", "u0")


def test_source_address_is_kernel_choice() -> None:
    """The underlay address is the source that the kernel would use."""
    make_underlay()
    assert underlay.source_address(ip_address("10.10.10.7")) == ip_address("10.10.10.101")
    assert underlay.source_address(ip_address("10.10.11.7")) == ip_address("10.10.11.101")
    assert underlay.mtu(ip_address("10.10.11.101")) == 1480
    assert underlay.holder(ip_address("10.10.10.101")) == "u0"
    assert underlay.holder(ip_address("10.10.10.102")) is None
    assert links.link_names() == {"lo": "device", "u0": "veth", "u1": "veth"} | {
        name: kind for name, kind in links.link_names().items() if name not in ("lo", "u0", "u1")
    }


@pytest.mark.parametrize(
    ("route", "source"),
    [
        (("default", "via", "10.10.11.1"), "10.10.11.101"),
        (("default", "dev", "u0"), "10.10.10.101"),
        (("default", "dev", "u0", "src", "10.10.11.101"), "10.10.11.101"),
        (("default", "nexthop", "via", "10.10.11.1", "nexthop", "via", "10.10.10.1"), "10.10.11.101"),
    ],
)
def test_source_address_of_default_route(route: tuple[str, ...], source: str) -> None:
    """Without a target, the default route decides."""
    make_underlay()
    ip("route", "add", *route)
    assert underlay.source_address(None) == ip_address(source)


def test_source_address_of_lowest_metric() -> None:
    """The default route of the lowest metric decides."""
    make_underlay()
    ip("route", "add", "default", "via", "10.10.11.1", "metric", "200")
    ip("route", "add", "default", "via", "10.10.10.1", "metric", "100")
    assert underlay.source_address(None) == ip_address("10.10.10.101")


def test_source_address_over_ipv6() -> None:
    """The underlay address is found over IPv6 as well."""
    make_underlay()
    ip("-6", "addr", "add", "fd00::5/64", "dev", "u0", "nodad")
    assert underlay.source_address(ip_address("fd00::9")) == ip_address("fd00::5")
    assert underlay.holder(ip_address("fd00::5")) == "u0"
    ip("-6", "route", "add", "default", "via", "fd00::1")
    assert underlay.source_address(None) == ip_address("fd00::5")


@pytest.mark.parametrize("towards", [None, "192.0.2.1", "2001:db8::1"])
def test_missing_route_error_names_bind(towards: str | None) -> None:
    """The error for a missing route names `--bind`."""
    with pytest.raises(InputError, match=r"no route .*--bind"):
        underlay.source_address(ip_address(towards) if towards else None)


def test_unreachable_route_counts_as_missing() -> None:
    """An unreachable, prohibit or blackhole route counts as no route."""
    for kind in ("unreachable", "prohibit", "blackhole"):
        ip("route", "replace", kind, "192.0.2.0/24")
        with pytest.raises(InputError, match="no route"):
            underlay.source_address(ip_address("192.0.2.1"))


def test_mtu_of_foreign_address_names_bind() -> None:
    """The error for an address that this host lacks names `--bind`."""
    with pytest.raises(InputError, match="--bind"):
        underlay.mtu(ip_address("192.0.2.1"))
