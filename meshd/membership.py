"""Who is a host: the members that Serf lists, checked against the authority and what is already known. Pure.

Whatever a member claims counts only if it is signed by who owns the name (credentials.Trust). And deletion needs
evidence: a host is dropped on a goodbye (its own last record), on the authority's word, or when its certificate ends;
one that failed, left without a goodbye, or is simply not listed keeps its last good record: a dead agent is not a dead
data plane.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from ipaddress import IPv4Network

from meshd import tombstones
from meshd.credentials import CredentialError, Trust, check_time
from meshd.model import Endpoint, Goodbye, Host, Member, Record, Revocation, Status, is_name
from meshd.tags import RecordError, decode

# Seconds after its last new record (whose number is at least the clock's) in which a host may still have to move.
SETTLING = 60
REVOKED = "its certificate was revoked"
BURIED = "it said goodbye, or was forgotten: it has to leave and to join again"


class StaleError(RecordError):
    """A member's tags hold an older record than the one that is in force for it."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """What all hosts of a mesh agree on."""

    overlay: IPv4Network
    subnet_length: int
    trust: Trust

    def read(self, member: Member) -> Record:
        """Give the record in a member's tags, which its owner has signed. Raises RecordError or CredentialError."""
        if not is_name(member.name):
            raise RecordError("its name is not 1 to 63 letters, digits, dots and dashes")
        record = decode(member.tags, self.overlay, self.subnet_length)
        self.trust.check(member.name, record)
        return record


@dataclass(frozen=True, slots=True)
class Roster:
    """The outcome for all members but oneself: `hosts` are in force, `refused` gives a reason for each name.

    `revoked` are the authority's revocations, by serial; `gone` the goodbyes, by name. `stale` are hosts whose tags
    hold an older record than the one in force: Serf is slower than an announcement, or somebody replays it.
    """

    hosts: Mapping[str, Record] = field(default_factory=dict)
    gone: Mapping[str, Goodbye] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    revoked: Mapping[int, Revocation] = field(default_factory=dict)
    stale: Mapping[str, str] = field(default_factory=dict)

    def sorted_hosts(self) -> tuple[Host, ...]:
        return tuple(Host(name, record) for name, record in sorted(self.hosts.items()))

    @property
    def graves(self) -> tombstones.Graves:
        """What has ended, as it is told to others."""
        return tombstones.Graves(self.gone, self.revoked)

    def ended(self, name: str, record: Record, now: float) -> str:
        """Say why a host is none any more, or the empty string."""
        if not self.revoked.keys().isdisjoint(record.certificate.serials):
            return REVOKED
        try:
            check_time(record.certificate, now)
        except CredentialError as error:
            return str(error)
        goodbye = self.gone.get(name)
        if goodbye is not None and goodbye.voids(record):
            return BURIED
        return ""


def admit(
    own: Host,
    mesh: Mesh,
    members: Iterable[Member],
    known: Roster,
    *,
    now: float,
    heard: Mapping[str, Record] | None = None,
    networks: Callable[[], Collection[IPv4Network]] = tuple,
    left_is_goodbye: bool = False,
) -> Roster:
    """Decide who is a host, from Serf's members and what this host knew before.

    `heard` are records that came another way than by tags, `networks` this host's own, which no new subnet may overlap;
    they are asked for when there is one.
    `left_is_goodbye` is for handlers without a daemon, where Serf's own leave is all the goodbye there is.
    """
    members = sorted((m for m in members if m.name != own.name), key=lambda m: m.name)
    ended = {name: known.ended(name, record, now) for name, record in known.hosts.items()}
    hosts = {name: record for name, record in known.hosts.items() if not ended[name]}
    gone, refused = dict(known.gone), {n: why for n, why in ended.items() if why and n not in known.gone}
    claims: dict[str, Record] = {}
    stale: dict[str, str] = {}
    for member in members:
        try:
            record = _newest(member, mesh, known, now)
        except StaleError as error:
            stale[member.name] = str(error)
            continue
        except (RecordError, CredentialError) as error:
            # Who is neither known nor there is not worth a word.
            if member.status is Status.ALIVE or member.name in known.hosts:
                refused[member.name] = str(error)
            continue
        if record is None:
            continue
        if record.leaving:
            hosts.pop(member.name, None)
            gone[member.name] = tombstones.said(record)
        elif left_is_goodbye and member.status is Status.LEFT:
            hosts.pop(member.name, None)
            gone[member.name] = tombstones.seen(record)
        else:
            claims[member.name] = record
    claims |= _news(own, mesh, known, claims, heard=heard or {}, now=now)
    alive = {member.name for member in members if member.status is Status.ALIVE}
    refused |= _settle(own, hosts, claims, alive, networks)
    gone = {name: goodbye for name, goodbye in gone.items() if name not in hosts}
    return Roster(hosts, gone, refused, known.revoked, stale)


def _newest(member: Member, mesh: Mesh, known: Roster, now: float) -> Record | None:
    """Give the member's record if it is news or confirms what is known; None if a goodbye voids it."""
    last = known.hosts.get(member.name)
    record = mesh.read(member) if last is None else _cheaply(member, mesh, last)
    if why := known.ended(member.name, record, now):
        if member.name in known.gone and (member.status is not Status.ALIVE or record.leaving):
            return None
        raise RecordError(why)
    if last is not None and record.seq < last.seq:
        raise StaleError(f"its record {record.seq} is older than {last.seq}, which stays in force")
    if last is not None and record.seq == last.seq and record != last:
        raise RecordError(f"two different records with the sequence number {record.seq}; the first stays in force")
    return record


def _cheaply(member: Member, mesh: Mesh, last: Record) -> Record:
    """Spare the signatures of a record that is the one in force to the last bit."""
    record = decode(member.tags, mesh.overlay, mesh.subnet_length)
    return last if record == last else mesh.read(member)


def _news(
    own: Host, mesh: Mesh, known: Roster, claims: Mapping[str, Record], *, heard: Mapping[str, Record], now: float
) -> dict[str, Record]:
    """Give those of the heard records that are newer than what tags say and what is known."""
    news = {}
    for name, record in heard.items():
        last = max((r.seq for r in (known.hosts.get(name), claims.get(name)) if r is not None), default=0)
        if name == own.name or record.seq <= last or record.leaving or known.ended(name, record, now):
            continue
        try:
            mesh.trust.check(name, record)
        except CredentialError:
            continue
        news[name] = record
    return news


def _settle(
    own: Host,
    hosts: dict[str, Record],
    claims: Mapping[str, Record],
    alive: Collection[str],
    networks: Callable[[], Collection[IPv4Network]],
) -> dict[str, str]:
    """Put the claims into `hosts` one by one, incumbents first, and give the reasons for those that lose."""
    refused: dict[str, str] = {}
    ours = cache(networks)
    # Incumbents keep what they have even if their newest record is refused, so they hold it from the start.
    subnets = {record.subnet: name for name, record in hosts.items()} | {own.record.subnet: own.name}
    keys = {record.public_key: name for name, record in hosts.items()} | {own.record.public_key: own.name}
    # Addresses may be handed on: only whom this host hears of now at an endpoint can hold it.
    endpoints = {own.record.endpoint: own.name}
    for name in _by_precedence(hosts, claims):
        record = claims[name]
        holder = subnets.get(record.subnet, name)
        owner = keys.get(record.public_key, name)
        neighbour = endpoints.get(record.endpoint, name)
        old = hosts.get(name)
        if holder != name:
            refused[name] = f"subnet {record.subnet} is held by {holder}"
        elif owner != name:
            refused[name] = f"its WireGuard key is {owner}'s"
        elif neighbour != name:
            refused[name] = f"its endpoint {record.endpoint} is {neighbour}'s"
        elif (old is None or old.subnet != record.subnet) and (own_one := _overlapped(record.subnet, ours())):
            refused[name] = f"subnet {record.subnet} overlaps this host's own network {own_one}"
        else:
            if old is not None:
                subnets.pop(old.subnet, None)
                keys.pop(old.public_key, None)
            hosts[name] = record
            subnets[record.subnet], keys[record.public_key] = name, name
            if name in alive:
                endpoints[record.endpoint] = name
    return refused


def _overlapped(subnet: IPv4Network, networks: Collection[IPv4Network]) -> IPv4Network | None:
    return next((network for network in networks if network.overlaps(subnet)), None)


def _by_precedence(hosts: Mapping[str, Record], claims: Mapping[str, Record]) -> Iterator[str]:
    def rank(name: str) -> tuple[bool, bool, tuple[bool, int], str]:
        known = hosts.get(name)
        # Who moves to an endpoint comes after who has it.
        moves = known is None or known.endpoint != claims[name].endpoint
        return known is None, moves, claims[name].certificate.rank, name

    yield from sorted(claims, key=rank)


def contacts(before: Mapping[str, Endpoint], members: Iterable[Member], roster: Roster) -> dict[str, Endpoint]:
    """Give where to find the hosts again, by name: what was known before, and what Serf says of them now.

    A host has signed its address; where Serf says another one, somebody may be using its name.
    """
    kept = {name: endpoint for name, endpoint in before.items() if name not in roster.gone}
    named = {
        member.name: Endpoint(member.address, member.port)
        for member in members
        if member.name in roster.hosts and member.address == roster.hosts[member.name].endpoint.address
    }
    if named:
        # The address that was joined through has no name yet; it goes when the first host is known by its own.
        kept.pop("", None)
    return kept | named


def lost(contacts: Mapping[str, Endpoint], members: Iterable[Member]) -> dict[str, Endpoint]:
    """Give those of the known gossip addresses whose host is not alive for Serf."""
    alive = {member.name for member in members if member.status is Status.ALIVE}
    return {name: endpoint for name, endpoint in sorted(contacts.items()) if name not in alive}


def bury(known: Roster, mesh: Mesh, graves: tombstones.Graves) -> Roster:
    """Give the roster with the tombstones that others have told of and proved; the next `admit` acts on them.

    A goodbye that a newer record has outlived is nothing.
    """
    news = {
        name: goodbye
        for name, goodbye in graves.gone.items()
        if (name not in known.hosts or goodbye.voids(known.hosts[name]))
        and (name not in known.gone or goodbye.seq > known.gone[name].seq)
        and tombstones.is_proved(mesh.trust, name, goodbye, mesh.overlay, mesh.subnet_length)
    }
    revoked = {s: r for s, r in graves.revoked.items() if s not in known.revoked and mesh.trust.is_revocation(r)}
    return replace(known, gone={**known.gone, **news}, revoked={**known.revoked, **revoked})


def subnet_rivals(own: Host, members: Iterable[Member], mesh: Mesh, known: Roster, now: float) -> dict[str, Record]:
    """Give the members whose valid record claims the own subnet."""
    # A valid record's subnet is spelled in one way only, so that the tag tells before the record is read.
    subnet = str(own.record.subnet)
    rivals = (member for member in members if member.tags.get("subnet") == subnet)
    return dict(_claims(own.name, rivals, mesh, known, now))


def superseded_by(own: Host, members: Iterable[Member], mesh: Mesh, known: Roster, now: float) -> str | None:
    """Name the member to which this host must leave its subnet, None if it may keep it.

    Two claims of one subnet are settled by the certificates alone: after a partition, who was first depends on whom one
    asks. Only hosts that have not known each other can have come to claim the same: who was here under another subnet,
    or has said goodbye, takes nobody's.
    """
    met = known.hosts.keys() | known.gone.keys()
    strangers = (member for member in members if member.status is Status.ALIVE and member.name not in met)
    rivals = subnet_rivals(own, strangers, mesh, known, now)
    winner = min(rivals, key=lambda name: rivals[name].certificate.rank, default=None)
    if winner is None or rivals[winner].certificate.rank > own.record.certificate.rank:
        return None
    return winner


def claimed(own: str, members: Iterable[Member], mesh: Mesh, known: Roster, now: float) -> set[IPv4Network]:
    """Give the subnets that other members claim, whoever of them will be admitted."""
    return {record.subnet for _, record in _claims(own, members, mesh, known, now)}


def _claims(own: str, members: Iterable[Member], mesh: Mesh, known: Roster, now: float) -> Iterator[tuple[str, Record]]:
    for member in sorted(members, key=lambda m: m.name):
        try:
            record = None if member.name == own else _newest(member, mesh, known, now)
        except (RecordError, CredentialError):
            continue
        if record is not None and not record.leaving:
            yield member.name, record
