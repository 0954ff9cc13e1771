"""One pass: lock, observe, plan, guard, apply, report. The daemon, `meshd sync` and a lone handler all call it."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from meshd import files
from meshd.endpoint import Endpoint
from meshd.errors import ApplyError, ConflictError, InputError, MeshdError, SerfError
from meshd.mesh import membership
from meshd.mesh.membership import Roster
from meshd.mesh.model import Host, Member, Record
from meshd.net import underlay
from meshd.net.netlink import one_socket
from meshd.net.resources import Action, Change, Engine, Peer, Port, Resource, Route, Sysctl
from meshd.reconcile import handshakes, plan
from meshd.reconcile.handshakes import patient_keys
from meshd.reconcile.machine import Failure, Machine
from meshd.state.claim import membership_ended, renewed
from meshd.state.directory import State
from meshd.state.settings import Settings

# WireGuard's own overhead over IPv6: 40 bytes of IP, 8 of UDP, 32 of its own. Over IPv4 it is 20 less.
OVERHEAD = 80
# What a change of members alone can change; a pass after Serf's hint reads nothing else.
MEMBERSHIP = frozenset({"device", "peer", "route", "tags"})
MUST_MOVE = (
    "the subnet {subnet} is also claimed by {rival}, which keeps it: 'meshd renumber' gives this host another one"
)
# All that does not ask Docker, which takes longer than everything else together.
WITHOUT_DOCKER = frozenset(plan.ORDER) - {"network", "iptables"}


@dataclass(frozen=True, slots=True)
class Report:
    """What a pass saw and did.

    `withheld` are removals for which there is no evidence (see plan.guard); `rival` is to have this host's subnet;
    `lost` are the known hosts that Serf does not see alive, with their gossip addresses; `unmet` the public keys of
    those that are to begin the handshake (see plan.speaks_first) and have not; `engine` is what Docker said that it is,
    None if it was not asked.
    """

    roster: Roster = field(default_factory=Roster)
    members: tuple[Member, ...] = ()
    changes: tuple[Change, ...] = ()
    withheld: tuple[Change, ...] = ()
    failures: tuple[Failure, ...] = ()
    peers: tuple[Peer, ...] = ()
    rival: str | None = None
    unmet: frozenset[str] = frozenset()
    engine: Engine | None = None
    lost: Mapping[str, Endpoint] = field(default_factory=dict)

    @property
    def applied(self) -> dict[str, int]:
        """The sequence number of each record, goodbyes too, that this host has in its kernel now."""
        failed = {failure.what for failure in self.failures}
        if failed & {"peer", "route", "device"}:
            return {}
        broken = {
            change.resource.public_key
            for change in self.changes
            if isinstance(change.resource, Peer) and str(change) in failed
        }
        hosts = {n: r.seq for n, r in self.roster.hosts.items() if r.public_key not in broken}
        if "hosts" in failed:
            return hosts  # those that are gone wait for the disk (see _needs_memory)
        return hosts | {n: g.seq for n, g in self.roster.gone.items() if g.public_key not in broken}


def reconcile(
    state: State,
    *,
    dry: bool = False,
    force: bool = False,
    kinds: Collection[str] = plan.ORDER,
    heard: Mapping[str, Record] | None = None,
    overdue: Collection[str] = (),
    engine: Engine | None = None,
    alone: bool = False,
) -> Report:
    """Make one pass. With `dry` nothing is changed or written; with `force` the guard lets everything through.

    `heard` are records that came another way than by tags; `overdue` the public keys of those who were to begin the
    handshake and have not; `engine` is what Docker is, if that is known; `alone` says that this host's own Serf does
    not run, so that nobody is asked: on its port may be somebody else's. Raises InputError for damaged state; whatever
    else fails is in the report.
    """
    settings = state.settings
    with state.lock(), one_socket():
        machine = Machine(state)
        known = state.roster()
        failures: list[Failure] = []
        claim = state.claim()
        if claim is None or not claim.settled:
            raise InputError("this host has not claimed its subnet yet: 'meshd join' has not finished")
        if not dry and (state.is_down or claim.record.leaving):
            raise InputError(f"the mesh {settings.mesh} is down on this host: 'meshd up' starts it")
        now = time.time()
        own = Host(settings.name, (claim if dry else renewed(state, claim, known)).record)
        if ended := membership_ended(own, known, now):
            failures.append(Failure("membership", MeshdError(ended)))
        roster, listed = known, []
        try:
            listed = [] if alone else machine.members()
            roster = _admit(state, own, listed, known, heard=heard, now=now)
        except (SerfError, ApplyError) as error:
            failures.append(Failure("members", error))
        rival = membership.superseded_by(own, listed, state.mesh, known, now)
        if rival is not None and not ended:
            failures.append(Failure("subnet", ConflictError(MUST_MOVE.format(subnet=own.record.subnet, rival=rival))))
        observed, readable, unread = machine.observe(set(kinds) - {"tags"} if alone else kinds)
        failures += unread
        docker = _engine(machine, kinds, readable, failures, engine)
        here = local(settings, own, docker, observed, _mtu(settings, kinds, readable, failures))
        wanted = plan.desired(here, roster.sorted_hosts())
        moved = {
            r.public_key for n, r in roster.hosts.items() if n in known.hosts and r.endpoint != known.hosts[n].endpoint
        }
        patient = patient_keys(settings, own.record, roster, listed)
        changes = plan.diff(wanted, observed, now=now, moved=moved, patient=patient, kinds=readable & set(kinds))
        changes, withheld = (changes, ()) if force else plan.guard(changes, observed, _departed(known, roster))
        changes += handshakes.begin_anew(wanted, observed, patient.intersection(overdue))
        before = state.contacts()
        contacts = membership.contacts(before, listed, roster)
        if dry:
            failures += _tried("disk", partial(files.writable, state.directory))
        else:
            unsaved = _remember(state, known, roster, changes)
            if unsaved:
                missing, kept = {f.what for f in unsaved}, {r.public_key for r in wanted if isinstance(r, Peer)}
                changes = tuple(c for c in changes if _needs_memory(c, kept) not in missing)
            failures += unsaved + machine.apply(changes)
            if contacts != before:
                failures += _tried("contacts", partial(state.save_contacts, contacts))
        return Report(
            roster,
            tuple(listed),
            changes,
            withheld,
            tuple(failures),
            tuple(r for r in observed if isinstance(r, Peer)),
            rival,
            frozenset(patient) - {r.public_key for r in observed if isinstance(r, Peer) and r.handshake},
            docker,
            membership.lost(contacts, listed) if listed else {},
        )


def _admit(
    state: State,
    own: Host,
    listed: Sequence[Member],
    known: Roster,
    *,
    heard: Mapping[str, Record] | None,
    now: float,
) -> Roster:
    settings = state.settings
    return membership.admit(
        own,
        state.mesh,
        listed,
        known,
        now=now,
        heard=heard,
        networks=lambda: underlay.networks(settings.overlay, {settings.wireguard, settings.bridge}),
        left_is_goodbye=not settings.daemon,
    )


def _engine(
    machine: Machine, kinds: Collection[str], readable: set[str], failures: list[Failure], known: Engine | None
) -> Engine | None:
    """Ask Docker what it is; without an answer its rules and its network are left as they are in this pass."""
    if "network" not in kinds or "network" not in readable:
        readable -= {"network", "iptables"}
        return None
    try:
        return known or machine.engine()
    except MeshdError as error:
        readable -= {"network", "iptables"}
        failures.append(Failure("docker", error))
        return None


def _departed(known: Roster, roster: Roster) -> set[str]:
    # `admit` drops and replaces nobody without evidence.
    over = {r.public_key for n, r in known.hosts.items() if r != roster.hosts.get(n)}
    return over | {goodbye.public_key for goodbye in roster.gone.values()}


def _remember(state: State, known: Roster, roster: Roster, changes: Sequence[Change]) -> list[Failure]:
    """Put on disk what must be known before the changes are made: the hosts, and the sysctls to put back."""
    failures: list[Failure] = []
    if (roster.hosts, roster.gone) != (known.hosts, known.gone):
        failures += _tried("hosts", partial(state.save_roster, roster))
    originals = state.originals()
    found = {
        c.resource.path: c.old.value
        for c in changes
        if isinstance(c.resource, Sysctl) and isinstance(c.old, Sysctl) and c.resource.path == plan.IP_FORWARD
    }
    if found.keys() - originals.keys():
        failures += _tried("originals", partial(state.save_originals, found | originals))
    return failures


def _needs_memory(change: Change, kept: Collection[str]) -> str:
    """Give what has to be on disk before this change: else a host that is gone would be back after a reboot, and
    forwarding would stay on after `down`. The empty string for all others.

    `kept` are the public keys that are wanted: to begin anew with them (see plan.begin_anew) is no removal.
    """
    resource = change.resource
    if isinstance(resource, Sysctl) and resource.path == plan.IP_FORWARD:
        return "originals"
    is_host = isinstance(resource, Route) or (isinstance(resource, Peer) and resource.public_key not in kept)
    return "hosts" if is_host and change.action is Action.REMOVE else ""


def _tried(what: str, write: Callable[[], None]) -> list[Failure]:
    try:
        write()
    except MeshdError as error:
        return [Failure(what, error)]
    return []


def _mtu(settings: Settings, kinds: Collection[str], readable: set[str], failures: list[Failure]) -> int:
    """Give the overlay's MTU, 0 in a pass that sets none: asking is a fifth of what a newcomer costs any host.

    While nothing has the underlay address, what has an MTU is left as it is.
    """
    if {"link", "network"}.isdisjoint(kinds):
        return 0
    try:
        return settings.mtu or underlay.mtu(settings.bind) - OVERHEAD
    except MeshdError as error:
        readable -= {"link", "network"}
        failures.append(Failure("underlay", error))
        return 0


def local(settings: Settings, own: Host, engine: Engine | None, observed: Iterable[Resource], mtu: int) -> plan.Local:
    """Put together what the desired state depends on."""
    return plan.Local(
        host=own,
        overlay=settings.overlay,
        wireguard=settings.wireguard,
        port=settings.wireguard_port,
        mtu=mtu,
        keepalive=settings.keepalive,
        owner=settings.owner,
        bridge=settings.bridge if settings.docker else None,
        engine=engine,
        allow=settings.allow,
        loose=tuple(r.link for r in observed if isinstance(r, Port)),
    )


def dismantle(state: State) -> Report:
    """Take away everything that meshd put on this host, and put back what it changed.

    ip_forward goes back only where no Docker engine runs: its containers need it now, whoever turned it on.
    """
    with state.lock(), one_socket():
        machine = Machine(state)
        observed, readable, failures = machine.observe(plan.ORDER)
        # Serf ends with the host's part in the mesh, and with it its tags.
        changes = plan.diff((), observed, now=time.time(), kinds=readable - {"tags"})
        failures = [f for f in failures if f.what != "tags"] + machine.apply(changes)
        if not _docker_runs(machine):
            undo = [Change(Action.SET, sysctl) for sysctl in plan.restored(state.originals())]
            failures += machine.apply(undo)
            changes = (*changes, *undo)
        return Report(changes=changes, failures=tuple(failures))


def _docker_runs(machine: Machine) -> bool:
    try:
        return machine.engine() is not None
    except MeshdError:
        return False
