"""Who is a host: the members that Serf lists, checked against what is already known. Pure.

Deletion needs evidence. A host is dropped on a goodbye (its own record with `leaving`); one that failed, left
without a goodbye, or is simply not listed keeps its last good record: a dead agent is not a dead data plane.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network

from meshd.addressing import precedence
from meshd.model import Goodbye, Host, Member, Record, Status, is_name
from meshd.tags import RecordError, decode


@dataclass(frozen=True, slots=True)
class Roster:
    """The outcome for all members but oneself: `hosts` are in force, `refused` gives a reason for each name."""

    hosts: Mapping[str, Record] = field(default_factory=dict)
    gone: Mapping[str, Goodbye] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def sorted_hosts(self) -> tuple[Host, ...]:
        return tuple(Host(name, record) for name, record in sorted(self.hosts.items()))


def admit(
    own: Host,
    overlay: IPv4Network,
    length: int,
    members: Iterable[Member],
    known: Roster,
    *,
    left_is_goodbye: bool = False,
) -> Roster:
    """Decide who is a host, from Serf's members and what this host knew before.

    `left_is_goodbye` is for handlers without a daemon, where Serf's own leave is all the goodbye there is.
    """
    hosts, gone, refused = dict(known.hosts), dict(known.gone), {}
    claims: dict[str, Record] = {}
    for member in sorted(members, key=lambda m: m.name):
        if member.name == own.name:
            continue
        try:
            record = _newest(member, overlay, length, known)
        except RecordError as error:
            refused[member.name] = str(error)
            continue
        if record is None:
            continue
        if record.leaving or (left_is_goodbye and member.status is Status.LEFT):
            hosts.pop(member.name, None)
            gone[member.name] = Goodbye(record.seq, record.public_key)
        else:
            claims[member.name] = record
    refused |= _settle(own, hosts, claims)
    gone = {name: goodbye for name, goodbye in gone.items() if name not in hosts}
    return Roster(hosts, gone, refused)


def _newest(member: Member, overlay: IPv4Network, length: int, known: Roster) -> Record | None:
    """Give the member's record if it is news or confirms what is known; None if a goodbye voids it."""
    if not is_name(member.name):
        raise RecordError("its name is not 1 to 63 letters, digits, dots and dashes")
    record = decode(member.tags, overlay, length)
    goodbye = known.gone.get(member.name)
    if goodbye is not None and goodbye.voids(record):
        if member.status is Status.ALIVE and not record.leaving:
            raise RecordError("it said goodbye, or was forgotten: it has to leave and to join again")
        return None
    last = known.hosts.get(member.name)
    if last is not None and record.seq < last.seq:
        raise RecordError(f"its record {record.seq} is older than {last.seq}, which stays in force")
    if last is not None and record.seq == last.seq and record != last:
        raise RecordError(f"two different records with the sequence number {record.seq}; the first stays in force")
    return record


def _settle(own: Host, hosts: dict[str, Record], claims: Mapping[str, Record]) -> dict[str, str]:
    """Put the claims into `hosts` one by one, incumbents first, and give the reasons for those that lose."""
    refused: dict[str, str] = {}
    # Incumbents keep what they have even if their newest record is refused, so they hold it from the start.
    subnets = {record.subnet: name for name, record in hosts.items()} | {own.record.subnet: own.name}
    keys = {record.public_key: name for name, record in hosts.items()} | {own.record.public_key: own.name}
    for name in _by_precedence(hosts, claims):
        record = claims[name]
        holder = subnets.get(record.subnet, name)
        owner = keys.get(record.public_key, name)
        if holder != name:
            refused[name] = f"subnet {record.subnet} is held by {holder}"
        elif owner != name:
            refused[name] = f"its WireGuard key is {owner}'s"
        else:
            old = hosts.get(name)
            if old is not None:
                subnets.pop(old.subnet, None)
                keys.pop(old.public_key, None)
            hosts[name] = record
            subnets[record.subnet], keys[record.public_key] = name, name
    return refused


def _by_precedence(hosts: Mapping[str, Record], claims: Mapping[str, Record]) -> Iterator[str]:
    def rank(name: str) -> tuple[bool, bytes, str]:
        return name not in hosts, precedence(claims[name].public_key), name

    yield from sorted(claims, key=rank)


def bury(known: Roster, gone: Mapping[str, Goodbye]) -> Roster:
    """Give the roster after goodbyes that others have told of; one that a newer record has outlived is nothing."""
    news = {
        name: goodbye
        for name, goodbye in gone.items()
        if (name not in known.hosts or goodbye.voids(known.hosts[name]))
        and (name not in known.gone or goodbye.seq > known.gone[name].seq)
    }
    hosts = {name: record for name, record in known.hosts.items() if name not in news}
    return Roster(hosts, {**known.gone, **news}, known.refused)


def is_void(own: Host, known: Roster) -> bool:
    """Tell whether the others have buried this very host, so that they take its record for an old one."""
    goodbye = known.gone.get(own.name)
    return goodbye is not None and goodbye.voids(own.record)


def subnet_rivals(own: Host, members: Iterable[Member], overlay: IPv4Network, length: int) -> list[str]:
    """Name the members that are alive and whose valid record claims the own subnet."""
    return [name for name, _ in _rivals(own, members, overlay, length)]


def _rivals(own: Host, members: Iterable[Member], overlay: IPv4Network, length: int) -> Iterator[tuple[str, Record]]:
    for member in sorted(members, key=lambda m: m.name):
        if member.name != own.name and member.status is Status.ALIVE:
            record = _valid(member, overlay, length)
            if record is not None and not record.leaving and record.subnet == own.record.subnet:
                yield member.name, record


def superseded_by(own: Host, members: Iterable[Member], known: Roster, overlay: IPv4Network, length: int) -> str | None:
    """Name the member to which this host must leave its subnet, None if it may keep it.

    Two claims of one subnet are settled by the keys alone: after a partition, who was first depends on whom one asks.
    """
    rivals = {
        name: precedence(record.public_key)
        for name, record in _rivals(own, members, overlay, length)
        if name not in known.gone or not known.gone[name].voids(record)
    }
    winner = min(rivals, key=lambda name: rivals[name], default=None)
    return winner if winner is not None and rivals[winner] < precedence(own.record.public_key) else None


def claimed(members: Iterable[Member], own: str, overlay: IPv4Network, length: int) -> set[IPv4Network]:
    """Give the subnets that other members claim, whoever of them will be admitted."""
    records = (_valid(member, overlay, length) for member in members if member.name != own)
    return {record.subnet for record in records if record is not None and not record.leaving}


def _valid(member: Member, overlay: IPv4Network, length: int) -> Record | None:
    try:
        return decode(member.tags, overlay, length)
    except RecordError:
        return None
