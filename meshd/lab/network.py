"""The lab's underlay: a switch in a namespace of its own, a cable to each host, and a stand-in for the internet."""

import errno
import re
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from meshd.endpoint import IPAddress
from meshd.errors import InputError, MeshdError

BRIDGE = "underlay"
GATEWAY = IPv4Address("10.10.10.1")
GATEWAY6 = IPv6Address("fd00:10:10::1")
PREFIX_LENGTHS = {4: 24, 6: 64}
# What hosts have on the underlay: each kind's IP versions, the first of which is a host's main address.
UNDERLAYS = {"ipv4": (4,), "ipv6": (6,), "dual": (4, 6)}
CARRIER_TIMEOUT = 5.0
IFA_F_NODAD = 0x02  # include/uapi/linux/if_addr.h
# An address beyond the underlay (TEST-NET-3): hosts and masqueraded containers reach it by the default route.
WORLD = IPv4Address("203.0.113.1")
# One table holds the neighbours of all namespaces (arp(7)): 33 hosts that know each other fill the kernel's 1,024.
FEW, NEIGHBOURS = 30, 1 << 15
_NEIGHBOUR_LIMITS = Path("/proc/sys/net/ipv4/neigh/default")


def addresses(name: str, underlay: str = "ipv4") -> tuple[IPAddress, ...]:
    """Return the underlay addresses of a host: barge7 is 10.10.10.107 and fd00:10:10::6b.

    Raises InputError for another name.
    """
    number = _number(name)
    return tuple(gateway(version) + 99 + number for version in UNDERLAYS[underlay])


def _number(name: str) -> int:
    number = re.fullmatch(r"barge([1-9][0-9]{0,2})", name)
    if number is None or int(number[1]) > 150:
        raise InputError(f"lab hosts are barge1 to barge150, not {name!r}")
    return int(number[1])


def gateway(version: int) -> IPAddress:
    """Return the switch's own address, where the hosts' default routes lead."""
    return GATEWAY6 if version == 6 else GATEWAY


def make_switch(pid: int) -> None:
    """Make the switch's bridge, with the gateway's addresses on it, in the namespace of process `pid`."""
    with closing(_netlink(pid)) as ipr:
        ipr.link("add", ifname=BRIDGE, kind="bridge", br_forward_delay=0)
        for version, length in PREFIX_LENGTHS.items():
            _address(ipr, BRIDGE, gateway(version), length)
        _address(ipr, "lo", WORLD, 32)


def plug_in(switch: int, host: int, name: str, underlay: str, mtu: int) -> None:
    """Lay a cable from the switch to a host, and give the host its addresses and its default routes."""
    from meshd.net.netlink import tolerating  # noqa: PLC0415  as in _netlink

    if _number(name) > FEW:
        _make_room_for_neighbours()
    with closing(_netlink(switch)) as ipr:
        # The cable of a host that has just lost its power is there until the kernel has cleaned up behind it.
        for index in ipr.link_lookup(ifname=name):
            with tolerating(errno.ENODEV):
                ipr.link("del", index=index)
        ipr.link("add", ifname=name, kind="veth", mtu=mtu, peer={"ifname": "eth0", "net_ns_pid": host, "mtu": mtu})
        ipr.link("set", index=_index(ipr, name), master=_index(ipr, BRIDGE), state="up")
    with closing(_netlink(host)) as ipr:
        ipr.link("set", index=_index(ipr, "lo"), state="up")
        for address in addresses(name, underlay):
            _address(ipr, "eth0", address, PREFIX_LENGTHS[address.version])
            ipr.route("add", dst="default", gateway=str(gateway(address.version)), family=_family(address))
        _wait_for_carrier(ipr, "eth0")
    with closing(_netlink(switch)) as ipr:
        _wait_for_carrier(ipr, name)


def _wait_for_carrier(ipr: Any, link: str) -> None:
    """Wait until a cable carries packets: the kernel looks at most once a second (net/core/link_watch.c)."""
    deadline = time.monotonic() + CARRIER_TIMEOUT
    while ipr.link("get", ifname=link)[0].get("operstate") != "UP":
        if time.monotonic() > deadline:
            raise MeshdError(f"the lab's cable {link} has no carrier after {CARRIER_TIMEOUT:g} s")
        time.sleep(0.01)


def _make_room_for_neighbours() -> None:
    """Raise the kernel's limits, permanently: another lab may need them as well. A namespace of one's own has none."""
    for path in _NEIGHBOUR_LIMITS.glob("gc_thresh[123]"):
        if int(path.read_text()) < NEIGHBOURS:
            path.write_text(str(NEIGHBOURS))


def heal() -> str:
    """Return what nft on the switch has to do to let every packet pass."""
    return "table bridge cut {\n}\ndelete table bridge cut\n"


def cut(one: Sequence[str], other: Sequence[str]) -> str:
    """Return what nft on the switch has to do to let nothing pass between two groups of hosts, besides earlier cuts."""
    ports = [", ".join(f'"{name}"' for name in names) for names in (one, other)]
    rules = [f"add rule bridge cut forward iifname {{ {a} }} oifname {{ {b} }} drop" for a, b in (ports, ports[::-1])]
    chain = "add chain bridge cut forward { type filter hook forward priority 0; }"
    return "\n".join(["add table bridge cut", chain, *rules, ""])


def _netlink(pid: int) -> Any:
    from pyroute2 import NetNS  # noqa: PLC0415  200 ms of imports that `meshd lab exec` does without

    return NetNS(f"/proc/{pid}/ns/net")


def _index(ipr: Any, name: str) -> int:
    return int(ipr.link_lookup(ifname=name)[0])


def _family(address: IPAddress) -> int:
    return socket.AF_INET6 if address.version == 6 else socket.AF_INET


def _address(ipr: Any, link: str, ip: IPAddress, length: int) -> None:
    # Nobody else is on this network: an address need not wait until that has been found out.
    flags = {"flags": IFA_F_NODAD} if ip.version == 6 else {}
    ipr.addr("add", index=_index(ipr, link), address=str(ip), prefixlen=length, family=_family(ip), **flags)
    ipr.link("set", index=_index(ipr, link), state="up")
