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

from meshd.endpoint import Endpoint
from meshd.mesh import tombstones
from meshd.mesh.certificates import CredentialError, check_time
from meshd.mesh.model import Certificate, Host, Member, Record, Revocation, Status, Tombstone
from meshd.mesh.records import RecordError, decode
from meshd.mesh.terms import Mesh

# Goodbyes by reusable invitations that are kept of names that this host has never met: anybody who ever had such an
# invitation can say any number of them.
MOST_STRANGERS = 256
REVOKED = "its certificate was revoked"
BURIED = "it said goodbye, or was forgotten: it has to leave and to join again"
TAKEN = (
    "another host has its name and has not left: it needs an invitation for that name ('meshd invite NAME'), or that "
    "one has to be forgotten before it joins ('meshd forget NAME')"
)


class StaleError(RecordError):
    """A member's tags hold an older record than the one that is in force for it."""


@dataclass(frozen=True, slots=True)
class Roster:
    """The outcome for all members but oneself: `hosts` are in force, `refused` gives a reason for each name.

    `revoked` are the authority's revocations, by serial; `gone` the goodbyes, by name. `stale` are hosts whose tags
    hold an older record than the one in force: Serf is slower than an announcement, or somebody replays it.
    """

    hosts: Mapping[str, Record] = field(default_factory=dict)
    gone: Mapping[str, Tombstone] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    revoked: Mapping[int, Revocation] = field(default_factory=dict)
    stale: Mapping[str, str] = field(default_factory=dict)

    def sorted_hosts(self) -> tuple[Host, ...]:
        return tuple(Host(name, record) for name, record in sorted(self.hosts.items()))

    @property
    def all_tombstones(self) -> tombstones.Tombstones:
        """The tombstones and revocations, as they are told to others."""
        return tombstones.Tombstones(self.gone, self.revoked)

    def ended(self, name: str, record: Record, now: float) -> str:
        """Say why a record, the one in force or another one of that name, makes no host, or the empty string."""
        if lapsed := self.lapsed(record.certificate, now):
            return lapsed
        goodbye = self.gone.get(name)
        if goodbye is not None and goodbye.voids(record):
            return "" if goodbye.is_outranked(record.certificate) else BURIED
        # The authority alone gives a host's name to another identity: a reusable invitation is in many hands.
        last = self.hosts.get(name)
        if last is None or record.certificate.delegation is None:
            return ""
        return TAKEN if record.certificate.identity != last.certificate.identity and self.has(name, now) else ""

    def lapsed(self, certificate: Certificate, now: float) -> str:
        """Say why a certificate is good for nothing any more, revoked or expired, or the empty string."""
        if not self.revoked.keys().isdisjoint(certificate.serials):
            return REVOKED
        try:
            check_time(certificate, now)
        except CredentialError as error:
            return str(error)
        return ""

    def has(self, name: str, now: float) -> bool:
        """Tell whether a host of this name is known, and nothing has ended it."""
        return name in self.hosts and not self.ended(name, self.hosts[name], now)


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
    departed: dict[str, Tombstone] = {}
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
            departed[member.name] = tombstones.of_leaving(record)
        elif left_is_goodbye and member.status is Status.LEFT:
            departed[member.name] = tombstones.unproved(record)
        else:
            claims[member.name] = record
    gone |= _kept(known, departed)
    for name in departed:
        hosts.pop(name, None)
    claims |= _news(own, mesh, known, claims, heard=heard or {}, now=now)
    alive = {member.name for member in members if member.status is Status.ALIVE}
    refused |= _settle(own, hosts, claims, alive, networks)
    # Of this host itself only what ends it: it goes beyond what was said of an earlier host of its name.
    living = {**hosts, own.name: own.record}
    gone = {n: g for n, g in gone.items() if n not in living or (n == own.name and g.voids(own.record))}
    return Roster(hosts, gone, refused, known.revoked, stale)


def _kept(known: Roster, goodbyes: Mapping[str, Tombstone]) -> dict[str, Tombstone]:
    """Give those goodbyes that are kept, without what reusable invitations may say of any name that is no host's.

    It does not take the place of the authority's word, and there is room for so many of names never met.
    """

    doubtful = {name for name, g in goodbyes.items() if name not in known.hosts and g.is_delegated}
    strangers = sorted(doubtful - known.gone.keys())
    room = MOST_STRANGERS - sum(t.is_delegated for t in known.gone.values()) if strangers else 0
    excess = set(strangers[max(room, 0) :])
    excess |= {n for n in doubtful & known.gone.keys() if known.gone[n].has_proof and not known.gone[n].is_delegated}
    return {name: goodbye for name, goodbye in goodbyes.items() if name not in excess}


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
    kept = {
        name: endpoint
        for name, endpoint in before.items()
        if name in roster.hosts or not (name in roster.gone or roster.refused.get(name) == REVOKED)
    }
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


def merge_tombstones(known: Roster, mesh: Mesh, news: tombstones.Tombstones, own: Host | None, now: float) -> Roster:
    """Give the roster with the tombstones that others have told of and proved; the next `admit` acts on them.

    A goodbye that a newer record has outlived is nothing. `own` is this host with what it has published.
    """
    living = {**known.hosts, own.name: own.record} if own is not None else known.hosts
    gone = {
        name: goodbye
        for name, goodbye in news.gone.items()
        if (name not in living or goodbye.voids(living[name]))
        and (name not in known.gone or goodbye.seq > known.gone[name].seq)
        and tombstones.is_proved(mesh, name, goodbye)
        and (name not in living or _may_end(living[name], goodbye, known, now, is_own=name not in known.hosts))
    }
    gone = _kept(known, gone)
    revoked = {s: r for s, r in news.revoked.items() if s not in known.revoked and mesh.trust.is_revocation(r)}
    return replace(known, gone={**known.gone, **gone}, revoked={**known.revoked, **revoked})


def _may_end(record: Record, goodbye: Tombstone, known: Roster, now: float, *, is_own: bool) -> bool:
    """Tell whether a proved goodbye is the word of who can end a host: itself, whatever has become of its certificate,
    or who has the authority's own certificate for its name, or the authority.
    """
    by = goodbye.by
    if by is None or by.identity == record.certificate.identity:
        return True
    if is_own and goodbye.public_key != record.public_key:
        # An earlier host of the own name, which this one has to go beyond (State.publish) if the others heed it.
        return not goodbye.is_outranked(record.certificate)
    if by.delegation is not None:
        return False
    return not known.lapsed(by, now)


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


def contested(own: Host, members: Iterable[Member], mesh: Mesh, known: Roster, now: float) -> list[str]:
    """Name the known hosts that claim the own subnet as well: both moved there at once, or one onto the other's.

    Nothing that both see tells these two cases apart, so that nobody moves by itself.
    """
    return [name for name in subnet_rivals(own, members, mesh, known, now) if name in known.hosts]


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
