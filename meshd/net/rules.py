"""The firewall rules of a mesh, as data. Pure; `firewall.py` puts them into the kernel.

The nftables tables are meshd's own: no other program's flush of its own rules, and no rule that others insert later,
undoes what they do. Docker's chains get only what nothing but a rule inside them can say.

There is a table for each version of IP and not one of the family inet: a packet meets no rule of the other version,
and a kernel without IPv6 takes the rules as well.
"""

import re
from collections.abc import Collection
from hashlib import sha256
from ipaddress import IPv4Network

from meshd.net.resources import Chain, Engine, IptablesRule, Rule, Table

# Before connection tracking and everybody's DNAT: what is dropped here has the address that its sender wrote.
RAW = -300
# Just before where Docker masquerades (srcnat, 100): a packet that has got its source here keeps it.
BEFORE_SRCNAT = 99
# Before the filter chains of others, so that what is dropped here is not accepted there first.
BEFORE_FILTER = -10

# What the named counters of the rules count: packets, and which ones. Normal life causes each of them, as by a scan, or
# in a host's first second, so that none is a problem by itself.
DROPPED = {
    "in_clear": "for the overlay, which would have left unencrypted",
    "foreign_source": "of containers, to other hosts and with a source outside of this host's subnet",
    "foreign_target": "through the tunnel, to an address outside of this host's subnet",
    "not_of_overlay": "to other hosts, from this host's other networks",
    "into_bridge": "to containers, from outside of the overlay and not by a published port",
    "to_host": "of the overlay to this host itself, which --allow does not admit",
    "to_loopback": "of containers to loopback of this host",
    "to_nobody": "of this host to containers that are none of its own and no other host's",
    "ipv6": "of IPv6 on the mesh's links",
}


def table_name(wireguard: str) -> str:
    """Return the name of the mesh's nftables tables."""
    return "meshd_" + re.sub(r"[^A-Za-z0-9_]", "_", wireguard)


def _drop(counter: str, match: str = "", verdict: str = "drop") -> str:
    """Return a rule that drops, and counts what it has dropped."""
    return f'{match} counter name "{counter}" {verdict}'.lstrip()


def _counters(chains: Collection[Chain]) -> tuple[tuple[str, int], ...]:
    texts = [rule.text for chain in chains for rule in chain.rules]
    return tuple((name, 0) for name in DROPPED if any(f'counter name "{name}"' in text for text in texts))


def rule(text: str) -> Rule:
    """Make a rule that is recognised by a digest of its text."""
    return Rule(sha256(text.encode()).hexdigest()[:16], text)


def table(
    *,
    wireguard: str,
    port: int,
    bridge: str | None,
    overlay: IPv4Network,
    subnet: IPv4Network,
    allow: Collection[str] = (),
) -> Table:
    """Return the mesh's IPv4 table: sources are kept, nothing leaves in clear, only the overlay enters the bridge.

    `port` is WireGuard's UDP port; `allow` what the overlay may reach on the host itself: `tcp/22`, `udp/5000-5010`,
    `all`.
    """
    inside = _names(wireguard, bridge, "lo")
    in_clear = _drop("in_clear", f"ip daddr {overlay} oifname != {inside}")
    chains = (
        _chain("prerouting", "filter", RAW, *_prerouting(wireguard, bridge, subnet)),
        # A plain accept would not stop a later MASQUERADE: each nat chain is asked until one has decided.
        _chain("postrouting", "nat", BEFORE_SRCNAT, f'ip saddr {subnet} oifname "{wireguard}" snat to ip saddr'),
        _chain("forward", "filter", BEFORE_FILTER, *_forward(wireguard, bridge, subnet, in_clear)),
        _chain("output", "filter", BEFORE_FILTER, in_clear, *_output(port, bridge, overlay, subnet)),
        _chain("input", "filter", BEFORE_FILTER, *_input(_names(wireguard, bridge), allow)),
    )
    return Table("ip", table_name(wireguard), chains, _counters(chains))


def ipv6_table(*, wireguard: str, bridge: str | None) -> Table:
    """Return the mesh's IPv6 table: nothing of IPv6 enters by the mesh's links or leaves by them.

    They have no IPv6 either (see Link): this holds while someone has turned it on.
    """
    links = _names(wireguard, bridge)
    inward, outward = (_drop("ipv6", f"{side} {links}") for side in ("iifname", "oifname"))
    chains = (
        _chain("forward", "filter", BEFORE_FILTER, inward, outward),
        _chain("output", "filter", BEFORE_FILTER, outward),
        _chain("input", "filter", BEFORE_FILTER, inward),
    )
    return Table("ip6", table_name(wireguard), chains, _counters(chains))


def _names(*links: str | None) -> str:
    return "{ " + ", ".join(f'"{name}"' for name in links if name) + " }"


def _prerouting(wireguard: str, bridge: str | None, subnet: IPv4Network) -> list[str]:
    """Let what comes through the tunnel go to this host's own subnet alone.

    The tunnel is no way to the host's other addresses, to what Docker has published on one of them (127.0.0.1, for
    instance), or to the networks behind the host.
    """
    tunnel = _drop("foreign_target", f'iifname "{wireguard}" ip daddr != {subnet}')
    if bridge is None:
        return [tunnel]
    # Without its userland proxy, Docker lets the bridge route packets for loopback (route_localnet).
    return [tunnel, _drop("to_loopback", f'iifname "{bridge}" ip daddr 127.0.0.0/8')]


def _forward(wireguard: str, bridge: str | None, subnet: IPv4Network, in_clear: str) -> list[str]:
    """Let this host's containers and the overlay speak. Nearly every packet is one of theirs and meets few rules."""
    # Who is not on the bridge is not on the overlay: not Docker's other networks, and not those of another mesh here.
    # They answer what has come to them by a published port.
    unasked = _drop("not_of_overlay", f'oifname "{wireguard}" ct state != {{ established, related }}')
    if bridge is None:
        return [in_clear, unasked]
    # With the path's ICMP lost, only a segment size that fits gets large answers through (RFC 2923).
    clamp = "tcp flags syn / syn,rst tcp option maxseg size set rt mtu"
    return [
        f'oifname "{wireguard}" {clamp}',
        f'iifname "{bridge}" oifname "{wireguard}" ip saddr {subnet} accept',
        f'iifname "{wireguard}" {clamp}',
        f'iifname "{wireguard}" oifname "{bridge}" ip daddr {subnet} accept',
        # The others' WireGuard drops a source that is not in this host's subnet as well: no container speaks for
        # another host's.
        _drop("foreign_source", f'iifname "{bridge}" oifname "{wireguard}"'),
        in_clear,
        unasked,
        *_guard(bridge),
    ]


def _output(port: int, bridge: str | None, overlay: IPv4Network, subnet: IPv4Network) -> list[str]:
    # wireguard-go forbids routers to fragment, and then nothing large passes a narrow path whose ICMP is lost. The
    # kernel's WireGuard allows it (send4 in drivers/net/wireguard/socket.c).
    fragment = f"udp sport {port} ip frag-off set 0"
    if bridge is None:
        return [fragment]
    # The whole overlay is on-link on the bridge, where any container can answer for an address that nobody has.
    outside = f'oifname "{bridge}" ip daddr {overlay} ip daddr != {subnet}'
    return [fragment, _drop("to_nobody", outside, "reject with icmp type host-unreachable")]


def _input(links: str, allow: Collection[str]) -> list[str]:
    """Close the host itself to the overlay, its own containers included, but for what is allowed and for ICMP."""
    if "all" in allow:
        return []
    ports = [entry.split("/") for entry in sorted(allow)]
    return [
        f"iifname != {links} accept",
        "ct state established,related accept",
        "ip protocol icmp accept",
        *(f"{protocol} dport {port} accept" for protocol, port in ports),
        _drop("to_host"),
    ]


def _guard(bridge: str) -> list[str]:
    """Keep everybody else away from containers, except through published ports and for replies.

    Docker's own FORWARD policy does that only where forwarding was off when it started.
    """
    return [
        f'oifname "{bridge}" iifname "{bridge}" accept',
        f'oifname "{bridge}" ct state established,related accept',
        f'oifname "{bridge}" ct status dnat accept',
        _drop("into_bridge", f'oifname "{bridge}"'),
    ]


def _chain(name: str, kind: str, priority: int, *texts: str) -> Chain:
    return Chain(name, kind, name, priority, tuple(rule(text) for text in texts))


def iptables(
    *, wireguard: str, bridge: str, subnet: IPv4Network, engine: Engine, owner: str
) -> tuple[IptablesRule, ...]:
    """Return the rules inside Docker's own chains that admit the overlay's packets to containers.

    Docker's FORWARD policy is DROP; from version 28 on it also drops, in raw, what is routed to a container's address.
    Its nftables backend has neither chain. With these the overlay survives an `iptables -F`, which leaves the policy,
    and takes Docker's own rules away, the way back and the jump to DOCKER-USER among them.
    """
    if not engine.firewall.startswith("iptables"):
        return ()
    admitted = (
        IptablesRule("filter", "DOCKER-USER", ("-i", bridge, "-o", wireguard, "-j", "ACCEPT"), owner),
        IptablesRule("filter", "DOCKER-USER", ("-i", wireguard, "-o", bridge, "-j", "ACCEPT"), owner),
        IptablesRule("filter", "FORWARD", ("-j", "DOCKER-USER"), owner),
    )
    if _major(engine.version) < 28:
        return admitted
    return *admitted, IptablesRule("raw", "PREROUTING", ("-d", str(subnet), "-i", wireguard, "-j", "ACCEPT"), owner)


def _major(version: str) -> int:
    """Read the major version; one that cannot be read is taken for a new one, whose rules do no harm on an old one."""
    number = version.partition(".")[0]
    return int(number) if number.isascii() and number.isdigit() else 9999
