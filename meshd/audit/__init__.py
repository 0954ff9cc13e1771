"""Whether a host's packet filters, those of other programs too, surely drop a packet. Pure; net.firewall reads them.

They are said to drop it only where the rules leave no doubt. What cannot be read (named sets and maps, addresses,
marks, limits, the extensions of iptables) may admit a packet and never drops it: a wrong alarm is worse than none.
Only the hooks input and forward are looked at, and there the first packet of a connection.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

# Of a condition, or of a whole rule: it holds, it does not, or that cannot be told.
Truth = bool | None


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection. `version` is IP's; None is what is not known of it."""

    hook: str
    link_in: str | None
    link_out: str = ""
    protocol: str | None = None
    port: int | None = None
    version: int = 4

    @property
    def family(self) -> str:
        """nft's name of the packet's version of IP."""
        return "ip" if self.version == 4 else "ip6"

    def may_be(self, protocol: str) -> bool:
        """Return whether it may have a header of this protocol of nft's."""
        if protocol in {"ip", "ip6"}:
            return protocol == self.family
        return self.protocol in {None, protocol} or protocol in {"th", "ether", "vlan"}


@dataclass(frozen=True, slots=True)
class Step:
    """What a rule that may hold for the packet does with it: accept, drop, return, or jump and goto a chain."""

    verdict: str
    certain: bool
    target: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain as one packet sees it. A chain without a hook is only jumped to."""

    name: str
    hook: str
    policy: str
    steps: Sequence[Step]


def blocked_by(packet: Packet, chains: Mapping[str, Chain]) -> Iterator[Chain]:
    """Yield each base chain that surely drops the packet: one is enough, whatever the others say (nft(8), VERDICT)."""
    for chain in chains.values():
        if chain.hook == packet.hook and (_walk(chain, chains) or chain.policy) == "drop":
            yield chain


def _walk(chain: Chain, chains: Mapping[str, Chain], depth: int = 16) -> str | None:
    """Return "drop" if the rules surely drop the packet, "accept" if they may admit it, None if they may ignore it."""
    sure = True
    for step in chain.steps:
        found: str | None = step.verdict
        if found in {"jump", "goto"}:
            found = _walk(chains[step.target], chains, depth - 1) if depth and step.target in chains else "accept"
            if found is None and step.verdict == "goto":
                found = "return"
        if found == "accept" or (found == "drop" and sure and step.certain):
            return found
        if found == "return" and step.certain:
            return None
        sure = sure and found != "return"
    return None


def equal(value: str | int | None, wanted: Any) -> Truth:
    """Compare what is known of the packet with a value, a range or a set of them, as nft's JSON writes it."""
    match wanted:
        case {"set": members} | {"|": members} | list(members):
            return _any(equal(value, member) for member in members)
        case {"elem": {"val": member}}:
            return equal(value, member)
        case {"range": [int(low), int(high)]} if isinstance(value, int):
            return low <= value <= high
        case int() if isinstance(value, int):
            return value == wanted
        case str() if isinstance(value, str) and not wanted.startswith("@"):
            return fnmatchcase(value, wanted)
    return None


def _any(truths: Iterable[Truth]) -> Truth:
    found = set(truths)
    return True if True in found else None if None in found else False


def every(truths: Iterable[Truth]) -> Truth:
    """Return whether all hold."""
    found = set(truths)
    return False if False in found else None if None in found else True


def opposite(truth: Truth) -> Truth:
    """Return whether it does not hold."""
    return None if truth is None else not truth
