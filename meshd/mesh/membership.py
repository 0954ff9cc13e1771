"""Who is a host: the members that Serf lists, checked against the authority and what is already known. Pure.

Whatever a member claims counts only if the owner of the name has signed it (certificates.Trust). Deletion needs
evidence: a host is dropped by its own last record, by the authority's word, or when its certificate ends. A host that
failed, left without a tombstone, or is simply not listed keeps its last good record: a dead agent is not a dead data
plane.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network

from meshd.endpoint import Endpoint, LocalAddresses, unusable
from meshd.mesh import conflicts, tombstones
from meshd.mesh.certificates import CredentialError
from meshd.mesh.model import Host, Member, Record, Status, Tombstone
from meshd.mesh.records import RecordError
from meshd.mesh.roster import REVOKED, Roster, StaleError, View
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones

# Upper bound of the tombstones by reusable invitations that are kept for names that this host has never met. Anyone
# who ever had such an invitation can sign any number of them.
MAX_STRANGERS = 256


@dataclass(slots=True)
class _Heard:
    """What Serf's members say, sorted by what it means."""

    claims: dict[str, Record] = field(default_factory=dict)
    departed: dict[str, Tombstone] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)


def admit(
    view: View,
    members: Collection[Member],
    *,
    heard: Mapping[str, Record] | None = None,
    networks: Callable[[], Collection[IPv4Network]] = tuple,
    local: Callable[[], LocalAddresses] = LocalAddresses,
    left_is_goodbye: bool = False,
) -> Roster:
    """Decide who is a host, from Serf's members and what this host knew before.

    `heard` are records that came another way than by tags. `networks` are this host's own, which no new subnet may
    overlap, and `local` its own addresses, which no new endpoint may be; both are asked for when there is one.
    `left_is_goodbye` is for handlers without a daemon, where Serf's own leave is the only sign that a host left.
    """
    own, known = view.own, view.known
    ended = {name: known.ended(name, record, view.now) for name, record in known.hosts.items()}
    said = _sort(view, members, left_is_goodbye=left_is_goodbye)
    hosts = {name: record for name, record in known.hosts.items() if not ended[name] and name not in said.departed}
    claims = said.claims | _news(view, said.claims, heard or {})
    alive = {member.name for member in members if member.status is Status.ALIVE}
    lost = conflicts.settle(own, hosts, claims, alive, networks=networks, local=local)
    refused = {name: why for name, why in ended.items() if why and name not in known.gone} | said.refused | lost
    gone = {**known.gone, **_kept(known, said.departed)}
    # Of this host itself only what ends it: it goes beyond the tombstone of an earlier host of its name.
    living = {**hosts, own.name: own.record}
    gone = {n: t for n, t in gone.items() if n not in living or (n == own.name and t.voids(own.record))}
    return Roster(hosts, gone, refused, known.revoked, said.stale)


def _sort(view: View, members: Iterable[Member], *, left_is_goodbye: bool) -> _Heard:
    """Sort what the other members say into claims, departures and what is refused."""
    said = _Heard()
    for member in sorted((m for m in members if m.name != view.own.name), key=lambda m: m.name):
        name = member.name
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
            said.departed[name] = tombstones.of_leaving(record)
        elif left_is_goodbye and member.status is Status.LEFT:
            said.departed[name] = tombstones.unproved(record)
        else:
            said.claims[name] = record
    return said


def _kept(known: Roster, departed: Mapping[str, Tombstone]) -> dict[str, Tombstone]:
    """Drop tombstones signed through a reusable invitation for names that are not hosts.

    They never replace the authority's tombstone, and at most MAX_STRANGERS are kept for unknown names.
    """
    doubtful = {name for name, t in departed.items() if name not in known.hosts and t.is_delegated}
    strangers = sorted(doubtful - known.gone.keys())
    room = MAX_STRANGERS - sum(t.is_delegated for t in known.gone.values()) if strangers else 0
    excess = set(strangers[max(room, 0) :])
    excess |= {n for n in doubtful & known.gone.keys() if known.gone[n].has_proof and not known.gone[n].is_delegated}
    return {name: tombstone for name, tombstone in departed.items() if name not in excess}


def _news(view: View, claims: Mapping[str, Record], heard: Mapping[str, Record]) -> dict[str, Record]:
    """Return those of the heard records that are newer than what tags say and what is known."""
    news, known = {}, view.known
    for name, record in heard.items():
        last = max((r.seq for r in (known.hosts.get(name), claims.get(name)) if r is not None), default=0)
        if name == view.own.name or record.seq <= last or record.leaving or known.ended(name, record, view.now):
            continue
        try:
            view.mesh.check(name, record)
        except (RecordError, CredentialError):
            continue
        news[name] = record
    return news


def usable_contacts(contacts: Mapping[str, Endpoint], overlay: IPv4Network) -> dict[str, Endpoint]:
    """Return those gossip addresses at which a host can be: an older version of meshd kept others too."""
    return {name: endpoint for name, endpoint in contacts.items() if not unusable(endpoint.address, overlay)}


def contacts(before: Mapping[str, Endpoint], members: Iterable[Member], roster: Roster) -> dict[str, Endpoint]:
    """Return gossip addresses by host name: what was known before, and what Serf says of them now.

    Serf's address is taken only if it equals the one the host signed: otherwise someone may be using its name.
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
    return kept | named


def lost(contacts: Mapping[str, Endpoint], members: Iterable[Member]) -> dict[str, Endpoint]:
    """Return those of the known gossip addresses whose host is not alive for Serf."""
    alive = {member.name for member in members if member.status is Status.ALIVE}
    return {name: endpoint for name, endpoint in sorted(contacts.items()) if name not in alive}


def merge_tombstones(known: Roster, mesh: Mesh, news: Tombstones, own: Host | None, now: float) -> Roster:
    """Return the roster with the proved tombstones that other hosts told of; the next `admit` acts on them.

    Tombstones older than the current record are ignored. `own` is this host with what it has published.
    """
    living = {**known.hosts, own.name: own.record} if own is not None else known.hosts
    gone = {
        name: tombstone
        for name, tombstone in news.gone.items()
        if (name not in living or tombstone.voids(living[name]))
        and (name not in known.gone or tombstone.seq > known.gone[name].seq)
        and tombstones.is_proved(mesh, name, tombstone)
        and (name not in living or _may_end(living[name], tombstone, known, now, is_own=name not in known.hosts))
    }
    gone = _kept(known, gone)
    revoked = {s: r for s, r in news.revoked.items() if s not in known.revoked and mesh.trust.is_revocation(r)}
    return replace(known, gone={**known.gone, **gone}, revoked={**known.revoked, **revoked})


def _may_end(record: Record, tombstone: Tombstone, known: Roster, now: float, *, is_own: bool) -> bool:
    """Return whether a proved tombstone is the word of someone who can end a host.

    That is the host itself, whatever has become of its certificate; an identity that the authority itself certified
    for its name; or the authority.
    """
    by = tombstone.by
    if by is None or by.identity == record.certificate.identity:
        return True
    if is_own and tombstone.public_key != record.public_key:
        # An earlier host of the own name, which this one has to go beyond (claim.refresh) if the others heed it.
        return not tombstone.is_outranked(record.certificate)
    if by.delegation is not None:
        return False
    return not known.lapsed(by, now)
