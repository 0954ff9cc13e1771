"""Who keeps a subnet, a WireGuard key or an endpoint that two hosts claim. Pure.

A host that has it keeps it. Between newcomers the certificate's rank decides (Certificate.rank).
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from ipaddress import IPv4Network

from meshd.endpoint import LocalAddresses, destination
from meshd.mesh.model import Host, Member, Record, Status
from meshd.mesh.roster import View


def settle(
    own: Host,
    hosts: dict[str, Record],
    claims: Mapping[str, Record],
    alive: Collection[str],
    *,
    networks: Callable[[], Collection[IPv4Network]],
    local: Callable[[], LocalAddresses],
) -> dict[str, str]:
    """Put the claims into `hosts` one by one, incumbents first; return the reasons for those that lose."""
    refused: dict[str, str] = {}
    ours, here = cache(networks), cache(local)
    # Incumbents keep what they have even if their newest record is refused, so they hold it from the start.
    subnets = {record.subnet: name for name, record in hosts.items()} | {own.record.subnet: own.name}
    keys = {record.public_key: name for name, record in hosts.items()} | {own.record.public_key: own.name}
    # Addresses may be handed on: only a host that is alive now can hold an endpoint.
    endpoints = {destination(own.record.endpoint): own.name}
    for name in _by_precedence(hosts, claims):
        record = claims[name]
        place = destination(record.endpoint)
        holder = subnets.get(record.subnet, name)
        owner = keys.get(record.public_key, name)
        neighbour = endpoints.get(place, name)
        old = hosts.get(name)
        if holder != name:
            refused[name] = f"subnet {record.subnet} is held by {holder}"
        elif owner != name:
            refused[name] = f"its WireGuard key is {owner}'s"
        elif neighbour != name:
            refused[name] = f"its endpoint {record.endpoint} is {neighbour}'s"
        elif (old is None or old.endpoint != record.endpoint) and (
            taken := here().occupied(place, own.record.endpoint.port)
        ):
            refused[name] = f"its endpoint {record.endpoint} is {taken}"
        elif (old is None or old.subnet != record.subnet) and (overlapped := _overlapped(record.subnet, ours())):
            refused[name] = f"subnet {record.subnet} overlaps this host's own network {overlapped}"
        else:
            if old is not None:
                subnets.pop(old.subnet, None)
                keys.pop(old.public_key, None)
            hosts[name] = record
            subnets[record.subnet], keys[record.public_key] = name, name
            if name in alive:
                endpoints[place] = name
    return refused


def _overlapped(subnet: IPv4Network, networks: Collection[IPv4Network]) -> IPv4Network | None:
    return next((network for network in networks if network.overlaps(subnet)), None)


def _by_precedence(hosts: Mapping[str, Record], claims: Mapping[str, Record]) -> list[str]:
    def rank(name: str) -> tuple[bool, bool, tuple[bool, int, int], str]:
        known = hosts.get(name)
        # A host that moves to an endpoint comes after the one that has it.
        moves = known is None or known.endpoint != claims[name].endpoint
        return known is None, moves, claims[name].certificate.rank, name

    return sorted(claims, key=rank)


def subnet_rivals(view: View, members: Iterable[Member]) -> dict[str, Record]:
    """Return the members whose valid record claims the own subnet."""
    # A valid record spells its subnet in one way only, so the tag tells before the record is read.
    subnet = str(view.own.record.subnet)
    return dict(view.claims(member for member in members if member.tags.get("subnet") == subnet))


def superseded_by(view: View, members: Iterable[Member]) -> str | None:
    """Return the name of the member to which this host must leave its subnet, None if it may keep it.

    Two claims of one subnet are settled by the certificates alone: after a partition, the answer to who was first
    depends on who is asked. Only hosts that have not known each other can have come to claim the same: a host that was
    here under another subnet, or has left, takes no other's.
    """
    met = view.known.hosts.keys() | view.known.gone.keys()
    strangers = (member for member in members if member.status is Status.ALIVE and member.name not in met)
    rivals = subnet_rivals(view, strangers)
    winner = min(rivals, key=lambda name: rivals[name].certificate.rank, default=None)
    if winner is None or rivals[winner].certificate.rank > view.own.record.certificate.rank:
        return None
    return winner


def contested(view: View, members: Iterable[Member]) -> list[str]:
    """Return the names of known hosts that claim the own subnet as well.

    Either both moved there at once, or one moved onto the other's. Nothing that both see tells these two cases apart,
    so neither moves by itself.
    """
    return [name for name in subnet_rivals(view, members) if name in view.known.hosts]


def claimed(view: View, members: Iterable[Member]) -> set[IPv4Network]:
    """Return the subnets that other members claim, whether they will be admitted or not."""
    return {record.subnet for _, record in view.claims(members)}
