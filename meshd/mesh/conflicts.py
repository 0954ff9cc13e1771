"""Who keeps a subnet, a WireGuard key or an endpoint that two hosts claim. Pure.

A host that has it keeps it. Between others the word of the mesh decides (votes.winner).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from ipaddress import IPv4Network

from meshd.endpoint import LocalAddresses, destination
from meshd.mesh.model import Host, Member, Record, Status
from meshd.mesh.roster import View
from meshd.mesh.votes import Dispute, Votes, most_voted, winner

OPEN = "{what} is claimed by {rivals} as well, and the other hosts do not agree, or have not said yet, whose it is"
# Of any number of rivals, so many are named.
MOST_NAMED = 3


def disputes(
    own: Host, hosts: Mapping[str, Record], claims: Mapping[str, Record], alive: Collection[str], *, is_newcomer: bool
) -> tuple[Dispute, ...]:
    """Return what several hosts claim and no known host keeps, with those who can say whose it is.

    By the order in which this host meets them, a member could take the place of a host that the others know already.
    For a newcomer nobody has kept anything for long enough.
    """
    if not is_newcomer and all(hosts.get(name) == record for name, record in claims.items()):
        return ()  # nobody claims anything else than before, as in most reconciles
    kept = {name: claims.get(name, record) for name, record in hosts.items()}
    held = {*_places(own.record)}
    claimants: dict[str, dict[str, Record]] = defaultdict(dict)
    for name, record in hosts.items():
        keeps = {*_places(record, is_alive=name in alive)} & {*_places(kept[name], is_alive=name in alive)}
        held |= keeps if not is_newcomer else set()
    for name, record in sorted({**kept, **claims}.items()):
        for place in _places(record, is_alive=name in alive):
            if place not in held:
                claimants[place][name] = record
    certified = {n: r for n, r in sorted({**claims, **hosts}.items()) if r.certificate.delegation is None}
    return tuple(
        Dispute(
            place,
            records,
            {name: certified[name] for name in certified.keys() - records.keys()},
            next((name for name in records if name in hosts and place in _places(hosts[name])), None),
        )
        for place, records in claimants.items()
        if len(records) > 1 and not _moves_undisturbed(hosts, records)
    )


def _moves_undisturbed(hosts: Mapping[str, Record], records: Mapping[str, Record]) -> bool:
    """Return whether a known host comes before strangers that anyone with a reusable invitation can make."""
    return sum(name in hosts or r.certificate.delegation is None for name, r in records.items()) == 1 and any(
        name in hosts for name in records
    )


def losers(hosts: dict[str, Record], found: Iterable[Dispute], votes: Votes) -> dict[str, str]:
    """Return why claims lose to another one, by name, or wait until it is known which one does.

    Who has a place in `hosts` keeps it until it is known that somebody else has it, and is no host then.
    """
    lost: dict[str, str] = {}
    for dispute in found:
        has_it = winner(dispute, votes) or dispute.keeper
        if dispute.keeper is not None and has_it != dispute.keeper:
            hosts.pop(dispute.keeper, None)
        for name in dispute.claims.keys() - {has_it}:
            lost[name] = _lost(dispute, name, has_it)
    return lost


def _places(record: Record, *, is_alive: bool = True) -> Iterator[str]:
    """Yield what only one host can have. An address may be handed on: only a host that is alive holds its endpoint."""
    yield f"subnet {record.subnet}"
    yield f"WireGuard key {record.public_key}"
    if is_alive:
        yield f"endpoint {destination(record.endpoint)}"


def _lost(dispute: Dispute, name: str, has_it: str | None) -> str:
    if has_it is not None:
        return f"{dispute.place} is held by {has_it}"
    return OPEN.format(what=dispute.place, rivals=rivals_of(dispute, name))


def rivals_of(dispute: Dispute, name: str | None) -> str:
    """Return the names of the others that claim the same, for people."""
    rivals = [rival for rival in dispute.claims if rival != name]
    more = ["others"] if len(rivals) > MOST_NAMED else []
    return " and ".join([*rivals[:MOST_NAMED], *more])


def settle(
    own: Host,
    hosts: dict[str, Record],
    claims: Mapping[str, Record],
    alive: Collection[str],
    *,
    lost: Mapping[str, str],
    networks: Callable[[], Collection[IPv4Network]],
    local: Callable[[], LocalAddresses],
) -> dict[str, str]:
    """Put the claims into `hosts` one by one, incumbents first; return the reasons for those that lose.

    `lost` are those that have lost already (see `losers`).
    """
    refused = dict(lost)
    ours, here = cache(networks), cache(local)
    # Incumbents keep what they have even if their newest record is refused, so they hold it from the start.
    subnets = {record.subnet: name for name, record in hosts.items()} | {own.record.subnet: own.name}
    keys = {record.public_key: name for name, record in hosts.items()} | {own.record.public_key: own.name}
    # Addresses may be handed on: only a host that is alive now can hold an endpoint.
    endpoints = {destination(own.record.endpoint): own.name}
    for name in _by_precedence(hosts, {name: record for name, record in claims.items() if name not in lost}):
        record = claims[name]
        place = destination(record.endpoint)
        holder = subnets.get(record.subnet, name)
        owner = keys.get(record.public_key, name)
        neighbour = endpoints.get(place, name)
        old = hosts.get(name)
        if holder != name:
            refused[name] = f"subnet {record.subnet} is held by {holder}"
        elif owner != name:
            refused[name] = f"WireGuard key {record.public_key} is held by {owner}"
        elif neighbour != name:
            refused[name] = f"endpoint {place} is held by {neighbour}"
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


def over_own_subnet(view: View, members: Iterable[Member]) -> Dispute | None:
    """Return the dispute about the own subnet with others that claim it and are alive; None if there are none."""
    own, known = view.own, view.known
    # A host that has left takes no other's.
    rivals = subnet_rivals(view, (m for m in members if m.status is Status.ALIVE and m.name not in known.gone))
    if not rivals:
        return None
    certified = {n: r for n, r in sorted(known.hosts.items()) if r.certificate.delegation is None and n not in rivals}
    return Dispute(f"subnet {own.record.subnet}", {own.name: own.record, **rivals}, certified, own.name)


def superseded_by(
    dispute: Dispute | None, votes: Votes | None, *, known: Collection[str], is_newcomer: bool
) -> str | None:
    """Return to whom the keeper of a disputed place must leave it, None if the keeper may keep it.

    The host has it that most of the voters know as its holder. Who is a newcomer, or has nobody to ask, goes by the
    certificates alone: after a partition, the answer to who was first depends on who is asked. Others wait for the
    voters, since a stranger can have an older certificate. Only hosts that have not known each other can have come to
    claim the same by themselves: one of the `known`, which was here under another subnet, wins by votes alone.
    """
    if dispute is None:
        return None
    has_it = most_voted(dispute, votes or {})
    if has_it is None and (is_newcomer or votes is None or not dispute.voters):
        strangers = {name: record for name, record in dispute.claims.items() if name not in known}
        has_it = min(strangers, key=lambda name: (strangers[name].certificate.rank, name))
    return has_it if has_it != dispute.keeper else None


def contested(view: View, members: Iterable[Member]) -> list[str]:
    """Return the names of known hosts that claim the own subnet as well.

    Either both moved there at once, or one moved onto the other's. Nothing that both see tells these two cases apart,
    so neither moves by itself.
    """
    return [name for name in subnet_rivals(view, members) if name in view.known.hosts]


def claimed(view: View, members: Iterable[Member]) -> set[IPv4Network]:
    """Return the subnets that other members claim, whether they will be admitted or not."""
    return {record.subnet for _, record in view.claims(members)}
