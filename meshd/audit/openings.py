"""What meshd needs open on a host, and what a user is told where a firewall surely blocks it. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshd.audit import Chain, Packet, blocked_by, iptables, nft
from meshd.state.settings import Settings


@dataclass(frozen=True, slots=True)
class Opening:
    """A packet that has to pass, how it is called, and the commands that let it in permanently, by firewall."""

    what: str
    packet: Packet
    remedies: Mapping[str, str]


def needed(settings: Settings, underlay: str | None, version: int) -> Iterator[Opening]:
    """Return what has to pass on a host whose link `underlay`, None if it is gone, leads to the others.

    `version` is the underlay's version of IP.
    """
    ports = (("gossip", "tcp", settings.gossip_port), ("gossip", "udp", settings.gossip_port))
    for name, protocol, port in (*ports, ("WireGuard", "udp", settings.wireguard_port)):
        packet = Packet("input", underlay, protocol=protocol, port=port, version=version)
        remedies = {
            "firewalld": f"firewall-cmd --permanent --add-port={port}/{protocol}; firewall-cmd --reload",
            "ufw": f"ufw allow {port}/{protocol}",
        }
        yield Opening(f"{protocol.upper()} port {port} ({name}) on {underlay or 'the underlay'}", packet, remedies)
    if settings.docker:
        yield from _forwarded(settings.wireguard, settings.bridge)


def _forwarded(wireguard: str, bridge: str) -> Iterator[Opening]:
    trusted = f"firewall-cmd --permanent --zone=trusted --add-interface={wireguard}; firewall-cmd --reload"
    # Docker does so when it starts, if firewalld runs, and refuses a bridge that is in another zone.
    docker = f"restart Docker, which puts {bridge} into its own zone"
    for source, target, remedy in ((wireguard, bridge, trusted), (bridge, wireguard, docker)):
        remedies = {"firewalld": remedy, "ufw": f"ufw route allow in on {source} out on {target}"}
        yield Opening(f"the way from {source} to {target}", Packet("forward", source, target), remedies)


def blocked(
    openings: Iterable[Opening], ruleset: Iterable[Mapping[str, Any]], saved: Mapping[int, str]
) -> Iterator[str]:
    """Yield a line for each opening that is surely blocked: which, by what, and what opens it.

    `ruleset` is the list in the output of `nft -j list ruleset`, `saved` that of iptables-save by version of IP.
    """
    ruleset = list(ruleset)
    for opening in openings:
        packet = opening.packet
        rules = iptables.chains(saved.get(packet.version, ""), packet)
        for chain in (*blocked_by(packet, nft.chains(ruleset, packet)), *blocked_by(packet, rules)):
            yield _line(opening, chain, rules)


def _line(opening: Opening, chain: Chain, rules: Mapping[str, Chain]) -> str:
    if chain.name not in rules:
        owner, where = ("firewalld" if " firewalld" in chain.name else ""), f"nftables' chain {chain.name}"
    else:
        marks = {"INPUT_ZONES": "firewalld", "ufw-user-input": "ufw", "ufw6-user-input": "ufw"}
        owner, where = next((marks[name] for name in marks if name in rules), ""), f"iptables' chain {chain.name}"
    remedy = opening.remedies.get(owner, "add a rule there that accepts it")
    return f"{opening.what} is blocked by {owner or where}; to open it: {remedy}"
