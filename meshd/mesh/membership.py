"""Who is a host: the members that Serf lists, checked against the authority and what is already known. Pure.

Whatever a member claims counts only if the owner of the name has signed it (certificates.Trust). Deletion needs
evidence: a host is dropped by its own last record, by the authority's word, or when its certificate ends. A host that
failed, left without a tombstone, or is simply not listed keeps its last good record: a dead agent is not a dead data
plane.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Network

from meshd.endpoint import Endpoint, LocalAddresses, unusable
from meshd.mesh import conflicts, tombstones
from meshd.mesh.certificates import CredentialError, check_time
from meshd.mesh.model import Certificate, Graves, Host, Member, Record, Status, Tombstone
from meshd.mesh.records import RecordError, decode
from meshd.mesh.roster import CROWDED, REVOKED, SUPERSEDED, Roster, StaleError, View
from meshd.mesh.shares import Shares
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones, grave
from meshd.mesh.votes import Dispute, Votes


@dataclass(slots=True)
class _Heard:
    """What Serf's members say, sorted by what it means."""

    claims: dict[str, Record] = field(default_factory=dict)
    departed: dict[str, dict[bytes, Tombstone]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)


def admit(
    view: View,
    members: Collection[Member],
    *,
    heard: Mapping[str, Record] | None = None,
    votes: Votes | None = None,
    is_newcomer: bool = False,
    networks: Callable[[], Collection[IPv4Network]] = tuple,
    local: Callable[[], LocalAddresses] = LocalAddresses,
    left_is_goodbye: bool = False,
) -> Roster:
    """Decide who is a host, from Serf's members and what this host knew before.

    `heard` are records that came another way than by tags. `votes` are what the other hosts say of claims that this one
    cannot settle; None where nobody asks them, and the certificate's rank decides. For a newcomer they also settle
    whether another host has what a known one has. `networks` are this host's own, which no new subnet may overlap, and
    `local` its own addresses, which no new endpoint may be; both are asked for when there is one. `left_is_goodbye` is
    for handlers without a daemon, where Serf's own leave is the only sign that a host left.
    """
    own, known = view.own, replace(view.known, gone=_counting(view.known, view.now))
    ended = {name: known.ended(name, record, view.now) for name, record in known.hosts.items()}
    said = _sort(view, members, left_is_goodbye=left_is_goodbye)
    departed = _kept(known, said.departed)
    gone = tombstones.joined(known.gone, departed)
    hosts = {name: record for name, record in known.hosts.items() if not ended[name] and name not in departed}
    claims = said.claims | _news(view, said.claims, heard or {})
    waiting = _crowded(hosts, gone, claims)
    claims = {name: record for name, record in claims.items() if name not in waiting}
    alive = {member.name for member in members if member.status is Status.ALIVE}
    disputes: tuple[Dispute, ...] = ()
    if votes is not None:
        disputes = conflicts.disputes(own, hosts, claims, alive, is_newcomer=is_newcomer)
    losers = conflicts.losers(hosts, disputes, votes or {})
    lost = conflicts.settle(own, hosts, claims, alive, lost=losers, networks=networks, local=local)
    refused = {n: why for n, why in ended.items() if why and not known.is_buried(n, known.hosts[n])}
    refused |= said.refused | lost | dict.fromkeys(waiting, CROWDED)
    owners = _owners(replace(known, gone=gone), hosts, refused)
    gone = tombstones.where(gone, partial(_counts, {**hosts, own.name: own.record}, owners))
    return Roster(hosts, gone, refused, known.revoked, said.stale, owners=owners, disputes=disputes, waiting=waiting)


def _counting(known: Roster, now: float) -> Graves:
    """Return the tombstones without those of invitations that are revoked or have expired."""
    return tombstones.where(known.gone, lambda _n, _i, tombstone: not known.is_over(tombstone, now))


def _crowded(hosts: Mapping[str, Record], gone: Graves, claims: Mapping[str, Record]) -> dict[str, Record]:
    """Return those claims for which their invitation's share has no place; who is a host by it already has one."""
    without = {
        name: record
        for name, record in claims.items()
        if record.certificate.delegation is not None
        and not (name in hosts and _is_by_same(hosts[name].certificate, record.certificate))
    }
    if not without:
        return without
    shares = Shares(hosts, gone)
    ranked = sorted(without.items(), key=lambda claim: (claim[1].certificate.rank, claim[0]))
    return {name: record for name, record in ranked if not shares.take_host(record)}


def _is_by_same(one: Certificate, other: Certificate) -> bool:
    """Return whether two certificates are of one identity and one reusable invitation."""
    mine, others = one.delegation, other.delegation
    is_same = mine is not None and others is not None and mine.serial == others.serial
    return is_same and one.identity == other.identity


def _owners(known: Roster, hosts: Mapping[str, Record], refused: Mapping[str, str]) -> dict[str, Certificate]:
    """Return the owners of all names that the authority has given to more than one identity, as far as is known.

    The earlier identity has its certificate still. Without its owner a host that has never met the later one, or no
    longer knows it, would take the earlier one back.
    """
    owners = dict(known.owners)
    told = {name for name, why in refused.items() if why == SUPERSEDED}
    for name in told | {name for name in hosts if _had_another(known, name, hosts[name])}:
        given = [known.owner(name), hosts[name].certificate if name in hosts else None]
        owner = tombstones.latest(certificate for certificate in given if certificate is not None)
        if owner is not None:
            owners[name] = owner
    return owners


def _had_another(known: Roster, name: str, record: Record) -> bool:
    """Return whether the authority has given the name to another identity than that of the host that has it."""
    before = known.hosts.get(name)
    earlier = [before.certificate] if before is not None and before is not record else []
    earlier += [t.by for t in known.gone.get(name, {}).values() if t.by is not None]
    return any(c.delegation is None and c.identity != record.certificate.identity for c in earlier)


def _counts(
    living: Mapping[str, Record], owners: Mapping[str, Certificate], name: str, _: bytes, tombstone: Tombstone
) -> bool:
    """Return whether a tombstone is to be kept: not one that its host has gone beyond by joining again."""
    if tombstone.by is not None and name in owners and owners[name].supersedes(tombstone.by):
        return False
    record = living.get(name)
    # That of another identity outlasts the host which has the name now: else the other one would be back after that.
    return record is None or not tombstone.is_about(record.certificate.identity) or tombstone.voids(record)


def _sort(view: View, members: Iterable[Member], *, left_is_goodbye: bool) -> _Heard:
    """Sort what the other members say into claims, departures and what is refused."""
    said, shares = _Heard(), Shares(view.known.hosts, view.known.gone)
    for member in sorted((m for m in members if m.name != view.own.name), key=lambda m: m.name):
        name = member.name
        if member.status is not Status.ALIVE and _is_idle_stranger(view, shares, member):
            continue
        try:
            record = view.newest(member)
        except StaleError as error:
            said.stale[name] = str(error)
            continue
        except (RecordError, CredentialError) as error:
            # A member that is neither known nor alive is not worth a word.
            if member.status is Status.ALIVE or name in view.known.hosts:
                said.refused[name] = str(error)
            continue
        if record is None:
            continue
        if record.leaving:
            said.departed |= grave(name, tombstones.of_leaving(record))
        elif left_is_goodbye and member.status is Status.LEFT:
            said.departed |= grave(name, tombstones.unproved(record))
        else:
            said.claims[name] = record
    return said


def _is_idle_stranger(view: View, shares: Shares, member: Member) -> bool:
    """Return whether what a member says that is no host here changes nothing, whoever has signed it.

    Serf lists the dead for a day. Checking the signatures of thousands would take longer than all else.
    """
    if member.name in view.known.hosts or member.name in view.known.gone:
        return False
    try:
        record = decode(member.tags, view.mesh.overlay, view.mesh.subnet_length)
    except RecordError:
        return True
    by = record.certificate.delegation
    is_without_place = by is not None and not shares.has_room(by, leaving=record.leaving)
    return is_without_place or bool(view.known.lapsed(record.certificate, view.now))


def _kept(known: Roster, departed: Graves) -> Graves:
    """Drop the tombstones for which their invitation's share has no place; that of a host has one already.

    A host that the authority itself has certified is not ended by what it says by an invitation.
    """
    idle = {(name, identity) for name, identity, t in tombstones.each(departed) if _is_idle(known, name, t)}
    strange = [(n, identity, t) for n, identity, t in tombstones.each(departed) if not _has_place(known, n, t)]
    shares = Shares(known.hosts, known.gone) if strange else Shares({}, {})
    excess = {(name, identity) for name, identity, t in strange if not shares.take_stranger(t)}
    dropped = idle | excess
    return tombstones.where(departed, lambda name, identity, _: (name, identity) not in dropped)


def _is_idle(known: Roster, name: str, tombstone: Tombstone) -> bool:
    """Return whether a tombstone is of the identity that a host has, and does not end it."""
    host = known.hosts.get(name)
    return host is not None and tombstone.is_about(host.certificate.identity) and not tombstone.voids(host)


def _has_place(known: Roster, name: str, tombstone: Tombstone) -> bool:
    """Return whether a tombstone takes over the place of its host, or of the one before, or needs none."""
    host, before = known.hosts.get(name), known.gone.get(name, {}).get(tombstone.identity)
    if tombstone.by is None or tombstone.delegation is None:
        return True
    is_hosts = host is not None and _is_by_same(host.certificate, tombstone.by)
    was_hosts = before is not None and before.by is not None and _is_by_same(before.by, tombstone.by)
    return is_hosts or was_hosts


def _news(view: View, claims: Mapping[str, Record], heard: Mapping[str, Record]) -> dict[str, Record]:
    """Return those of the heard records that are newer than what tags say and what is known."""
    news, known = {}, view.known
    for name, record in heard.items():
        if name == view.own.name or record.leaving or known.ended(name, record, view.now):
            continue
        if not is_news(record, known.hosts.get(name)) or (name in claims and not record.replaces(claims[name])):
            continue
        try:
            view.mesh.check(name, record)
        except (RecordError, CredentialError):
            continue
        news[name] = record
    return news


def is_news(record: Record, last: Record | None) -> bool:
    """Return whether a record that counts is newer than the last one. Each identity has numbers of its own."""
    return last is None or last.certificate.identity != record.certificate.identity or record.replaces(last)


def usable_contacts(contacts: Mapping[str, Endpoint], overlay: IPv4Network) -> dict[str, Endpoint]:
    """Return those gossip addresses at which a host can be: an older version of meshd kept others too."""
    return {name: endpoint for name, endpoint in contacts.items() if not unusable(endpoint.address, overlay)}


def contacts(
    before: Mapping[str, Endpoint], members: Iterable[Member], roster: Roster, port: int
) -> dict[str, Endpoint]:
    """Return gossip addresses by host name: what was known before, and what Serf says of them now.

    Serf's address is taken only if it equals the one the host signed: otherwise someone may be using its name. A host
    is looked for at the address that it signed last, also where Serf still has it at an older one. The port is the one
    that Serf once had for it, or else this host's own `port`.
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
        # The address that was joined through has no name yet; it goes when the first host is known by its name.
        kept.pop("", None)
    signed = {
        name: Endpoint(record.endpoint.address, kept[name].port if name in kept else port)
        for name, record in roster.hosts.items()
    }
    return kept | signed | named


def lost(contacts: Mapping[str, Endpoint], members: Iterable[Member]) -> dict[str, Endpoint]:
    """Return those of the known gossip addresses whose host is not alive for Serf."""
    alive = {member.name for member in members if member.status is Status.ALIVE}
    return {name: endpoint for name, endpoint in sorted(contacts.items()) if name not in alive}


def merge_tombstones(known: Roster, mesh: Mesh, news: Tombstones, own: Host | None, now: float) -> Roster:
    """Return the roster with the proved tombstones that other hosts told of; the next `admit` acts on them.

    Tombstones older than the current record are ignored. `own` is this host with what it has published, `now` Unix
    time.
    """
    living = {**known.hosts, own.name: own.record} if own is not None else known.hosts
    news = news.without(known.all_tombstones)
    # What counts no more is not worth checking its signatures.
    news = replace(news, gone=tombstones.where(news.gone, lambda _n, _i, t: not known.is_over(t, now))).proved(mesh)
    known = replace(known, revoked={**known.revoked, **news.revoked})
    known = replace(known, gone=_counting(known, now))
    owners = {name: c for name, c in news.owners.items() if not _is_too_late(living.get(name), c, now)}

    def counts(name: str, identity: bytes, tombstone: Tombstone) -> bool:
        if known.is_over(tombstone, now) or _is_too_late(living.get(name), tombstone.by, now):
            return False
        return _counts(living, {**known.owners, **owners}, name, identity, tombstone)

    more = Tombstones(_kept(known, tombstones.where(news.gone, counts)), {}, owners)
    merged = known.all_tombstones.merged(more)
    return replace(known, gone=merged.gone, owners=merged.owners)


def _is_too_late(record: Record | None, later: Certificate | None, now: float) -> bool:
    """Return whether a later certificate for a host's name has expired, while that host's own still holds.

    Where it was known in time, the name's earlier owner has ended for good.
    """
    if record is None or later is None or not later.supersedes(record.certificate):
        return False
    return _has_expired(later, now) and not _has_expired(record.certificate, now)


def _has_expired(certificate: Certificate, now: float) -> bool:
    try:
        check_time(certificate, now)
    except CredentialError:
        return True
    return False
