"""What a host knows of the others (Roster), and how it checks a member's record against that (View). Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from meshd.mesh.certificates import CredentialError, check_time
from meshd.mesh.model import Certificate, Graves, Host, Member, Record, Revocation, Status, Tombstone
from meshd.mesh.records import RecordError, decode
from meshd.mesh.terms import Mesh
from meshd.mesh.tombstones import Tombstones, latest
from meshd.mesh.votes import Dispute

REVOKED = "its certificate was revoked"
BURIED = "it left, or was forgotten: it has to leave and to join again"
SUPERSEDED = "the authority has given its name to another host since"
TAKEN = (
    "another host has its name and has not left: it needs an invitation for that name ('meshd invite NAME'), or that "
    "one has to be forgotten before it joins ('meshd forget NAME')"
)
CROWDED = (
    "others have used up what is taken by its invitation: it is admitted once the authority has confirmed it ('meshd "
    "status' on the authority's host says if it does not)"
)


class StaleError(RecordError):
    """A member's tags hold an older record than the one that is in force for it."""


@dataclass(frozen=True, slots=True)
class Roster:
    """What is known of all members but oneself: `hosts` are in force, `refused` gives a reason for each name.

    `revoked` are the authority's revocations by serial, `gone` the tombstones by name and identity. `owners` are the
    certificates by which the authority has given a name to another host than before, by name. `stale` are hosts whose
    tags hold an older record than the one in force: Serf is slower than an announcement, or someone replays it.
    `dropped` are the records of hosts that an older version of meshd took, and that no host can have by this one.
    `disputes` are what several hosts claim, and this host does not know, or does not know for long, whose it is.
    `waiting` are those records that are refused only because their invitation's share is used up (mesh.shares).
    """

    hosts: Mapping[str, Record] = field(default_factory=dict)
    gone: Graves = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    revoked: Mapping[int, Revocation] = field(default_factory=dict)
    stale: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, Record] = field(default_factory=dict)
    owners: Mapping[str, Certificate] = field(default_factory=dict)
    disputes: tuple[Dispute, ...] = ()
    waiting: Mapping[str, Record] = field(default_factory=dict)

    def sorted_hosts(self) -> tuple[Host, ...]:
        return tuple(Host(name, record) for name, record in sorted(self.hosts.items()))

    @property
    def all_tombstones(self) -> Tombstones:
        """What has ended, as other hosts are told of it."""
        return Tombstones(self.gone, self.revoked, self.owners)

    def ended(self, name: str, record: Record, now: float) -> str:
        """Return why a record, the one in force or another one of that name, makes no host; else the empty string.

        Only the authority gives a host's name to another identity: a reusable invitation is in many hands.
        """
        if lapsed := self.lapsed(record.certificate, now):
            return lapsed
        owner, certificate = self.owner(name), record.certificate
        if owner is not None and owner.supersedes(certificate):
            return SUPERSEDED
        if self.is_buried(name, record):
            return BURIED
        last = self.hosts.get(name)
        if last is None or last.certificate.identity == certificate.identity or not self.has(name, now):
            return ""
        # An identity that has said goodbye comes back to a name that is free, not to another host's.
        may_take = certificate.delegation is None and certificate.identity not in self.gone.get(name, {})
        return "" if may_take or certificate.supersedes(last.certificate) else TAKEN

    def owner(self, name: str) -> Certificate | None:
        """Return the last certificate of the authority itself for a name that this host has heard of."""
        known = [self.owners[name]] if name in self.owners else []
        known += [self.hosts[name].certificate] if name in self.hosts else []
        return latest([*known, *(t.by for t in self.gone.get(name, {}).values() if t.by is not None)])

    def is_buried(self, name: str, record: Record) -> bool:
        """Return whether a record is of a membership that has ended."""
        return any(tombstone.voids(record) for tombstone in self.gone.get(name, {}).values())

    def lapsed(self, certificate: Certificate, now: float) -> str:
        """Return why a certificate no longer counts, revoked or expired; the empty string while it does."""
        if not self.revoked.keys().isdisjoint(certificate.serials):
            return REVOKED
        try:
            check_time(certificate, now)
        except CredentialError as error:
            return str(error)
        return ""

    def is_over(self, tombstone: Tombstone, now: float) -> bool:
        """Return whether all that a tombstone can end has ended anyway: what its revoked or expired invitation made."""
        return tombstone.by is not None and tombstone.is_delegated and bool(self.lapsed(tombstone.by, now))

    def has(self, name: str, now: float) -> bool:
        """Return whether a host of this name is known, and nothing has ended it."""
        return name in self.hosts and not self.ended(name, self.hosts[name], now)


@dataclass(frozen=True, slots=True)
class View:
    """All by which one host judges members: itself with its own record, its mesh, what it knows, and Unix time."""

    own: Host
    mesh: Mesh
    known: Roster
    now: float

    def newest(self, member: Member) -> Record | None:
        """Return the member's record if it is news or confirms what is known; None if a tombstone voids it.

        Raises StaleError, RecordError or CredentialError for any other.
        """
        last = self.known.hosts.get(member.name)
        record = self.mesh.read(member) if last is None else self._read_again(member, last)
        if why := self.known.ended(member.name, record, self.now):
            if self.known.is_buried(member.name, record) and (member.status is not Status.ALIVE or record.leaving):
                return None
            raise RecordError(why)
        if last is None or last.certificate.identity != record.certificate.identity:
            return record  # each identity counts for itself
        if record.seq < last.seq:
            raise StaleError(f"its record {record.seq} is older than {last.seq}, which stays in force")
        if record != last and not record.replaces(last):
            raise RecordError(f"two different records with the sequence number {record.seq}; the other stays in force")
        return record

    def claims(self, members: Iterable[Member]) -> Iterator[tuple[str, Record]]:
        """Yield the valid records of the other members that stay, sorted by name."""
        for member in sorted(members, key=lambda m: m.name):
            try:
                record = None if member.name == self.own.name else self.newest(member)
            except (RecordError, CredentialError):
                continue
            if record is not None and not record.leaving:
                yield member.name, record

    def _read_again(self, member: Member, last: Record) -> Record:
        """Skip checking the signatures of a record that is the one in force to the last bit."""
        record = decode(member.tags, self.mesh.overlay, self.mesh.subnet_length)
        return last if record == last else self.mesh.read(member)
