"""The lab's underlay: a switch in a namespace of its own, a cable to each host, and a stand-in for the internet."""

import errno
import re
from collections.abc import Sequence
from contextlib import closing
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from meshd.errors import InputError

BRIDGE = "underlay"
GATEWAY = IPv4Address("10.10.10.1")
PREFIX_LENGTH = 24
# An address beyond the underlay (TEST-NET-3): hosts and masqueraded containers reach it by the default route.
WORLD = IPv4Address("203.0.113.1")
# One table holds the neighbours of all namespaces (arp(7)): 33 hosts that know each other fill the kernel's 1,024.
NEIGHBOURS = 1 << 15
_NEIGHBOUR_LIMITS = Path("/proc/sys/net/ipv4/neigh/default")


def address(name: str) -> IPv4Address:
    """Give the underlay address of a host: barge7 is 10.10.10.107. Raises InputError for another name."""
    number = re.fullmatch(r"barge([1-9][0-9]{0,2})", name)
    if number is None or int(number[1]) > 150:
        raise InputError(f"lab hosts are barge1 to barge150, not {name!r}")
    return IPv4Address(int(GATEWAY) + 99 + int(number[1]))


def make_switch(pid: int) -> None:
    """Make the switch's bridge, with the gateway's address on it, in the namespace of process `pid`."""
    _make_room_for_neighbours()
    with closing(_netlink(pid)) as ipr:
        ipr.link("add", ifname=BRIDGE, kind="bridge", br_forward_delay=0)
        _address(ipr, BRIDGE, GATEWAY, PREFIX_LENGTH)
        _address(ipr, "lo", WORLD, 32)


def plug_in(switch: int, host: int, name: str, mtu: int) -> None:
    """Lay a cable from the switch to a host, and give the host its address and its default route."""
    from meshd.netlink import tolerating  # noqa: PLC0415  as in _netlink

    with closing(_netlink(switch)) as ipr:
        # The cable of a host that has just lost its power is there until the kernel has cleaned up behind it.
        for index in ipr.link_lookup(ifname=name):
            with tolerating(errno.ENODEV):
                ipr.link("del", index=index)
        ipr.link("add", ifname=name, kind="veth", mtu=mtu, peer={"ifname": "eth0", "net_ns_pid": host, "mtu": mtu})
        ipr.link("set", index=_index(ipr, name), master=_index(ipr, BRIDGE), state="up")
    with closing(_netlink(host)) as ipr:
        ipr.link("set", index=_index(ipr, "lo"), state="up")
        _address(ipr, "eth0", address(name), PREFIX_LENGTH)
        ipr.route("add", dst="default", gateway=str(GATEWAY))


def _make_room_for_neighbours() -> None:
    """Raise the kernel's limits, for good: another lab may need them as well. A namespace of one's own has none."""
    for path in _NEIGHBOUR_LIMITS.glob("gc_thresh[123]"):
        if int(path.read_text()) < NEIGHBOURS:
            path.write_text(str(NEIGHBOURS))


def heal() -> str:
    """Give what nft on the switch has to do to let every packet pass."""
    return "table bridge cut {\n}\ndelete table bridge cut\n"


def cut(one: Sequence[str], other: Sequence[str]) -> str:
    """Give what nft on the switch has to do to let nothing pass between two groups of hosts, besides earlier cuts."""
    ports = [", ".join(f'"{name}"' for name in names) for names in (one, other)]
    rules = [f"add rule bridge cut forward iifname {{ {a} }} oifname {{ {b} }} drop" for a, b in (ports, ports[::-1])]
    chain = "add chain bridge cut forward { type filter hook forward priority 0; }"
    return "\n".join(["add table bridge cut", chain, *rules, ""])


def _netlink(pid: int) -> Any:
    from pyroute2 import NetNS  # noqa: PLC0415  200 ms of imports that `meshd lab exec` does without

    return NetNS(f"/proc/{pid}/ns/net")


def _index(ipr: Any, name: str) -> int:
    return int(ipr.link_lookup(ifname=name)[0])


def _address(ipr: Any, link: str, ip: IPv4Address, length: int) -> None:
    ipr.addr("add", index=_index(ipr, link), address=str(ip), prefixlen=length)
    ipr.link("set", index=_index(ipr, link), state="up")
