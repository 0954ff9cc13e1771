"""One reconcile: look who is there, read the machine, decide, write. The daemon, `meshd sync` and handlers call it."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from meshd import files
from meshd.endpoint import Endpoint
from meshd.errors import (
    ApplyError,
    ConflictError,
    InputError,
    MeshdError,
    MissingError,
    SerfError,
    WrongMachineError,
)
from meshd.gossip.messages import Applied
from meshd.mesh import conflicts, endings, membership, tombstones
from meshd.mesh.model import Host, Member, Record
from meshd.mesh.roster import Roster, View
from meshd.mesh.terms import Mesh
from meshd.mesh.votes import Votes
from meshd.net import conntrack
from meshd.net.netlink import one_socket
from meshd.net.resources import (
    Action,
    Change,
    Diversion,
    Engine,
    Network,
    Peer,
    Port,
    Resource,
    Route,
    RunningContainer,
    StoppedContainer,
    Sysctl,
    Table,
)
from meshd.reconcile import handshakes, plan
from meshd.reconcile.handshakes import Unmet
from meshd.reconcile.machine import Area, Failure, Machine, this_machine
from meshd.state import authority, machine_id
from meshd.state import claim as own_claim
from meshd.state.claim import NumbersError
from meshd.state.directory import State
from meshd.state.settings import Settings

log = logging.getLogger("meshd")

# WireGuard's own overhead over IPv6: 40 bytes of IP, 8 of UDP, 32 of its own. Over IPv4 it is 20 less.
OVERHEAD = 80
# What a change of members alone can change, and what takes packets from it: after Serf's hint nothing else is read.
MEMBERSHIP = frozenset({"device", "peer", "route", "rule", "tags"})
# Everything that does not ask Docker, which takes longer than all the rest together.
WITHOUT_DOCKER = frozenset(plan.ORDER) - {"network", "stopped", "iptables"}
MUST_MOVE = (
    "the subnet {subnet} is also claimed by {rival}, which keeps it: 'meshd renumber' gives this host another one"
)
CLAIMED = (
    "the subnet {subnet} is also claimed by {rivals}: that host keeps it which the others know as its holder. If this "
    "one has to move, its log says so"
)
MISPLACED = (
    "the other hosts refuse this one, since its {problem}: run 'meshd up --advertise ADDRESS' with an address by which "
    "they reach it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one reconcile is to do.

    `kinds` are the resources to look at. `heard` are records that came another way than by tags, `votes` what the other
    hosts say of claims, which for one that `is_newcomer` count more (see conflicts.disputes). `overdue` are the peers
    whose first handshake is to be started again (see handshakes.restarts). `mtus` are the path MTUs that were measured,
    by public key. `beyond` is what the own record's number has to exceed, since a twin of this host has signed up to
    it. `engine` is what Docker is, if that is known, `unended` the last report's. `alone` says that this host's own
    Serf does not run, so that nobody is asked: another agent may hold its RPC port. With `dry` nothing is changed or
    written; with `force` the guard withholds nothing.
    """

    kinds: Collection[str] = plan.ORDER
    heard: Mapping[str, Record] = field(default_factory=dict)
    votes: Votes = field(default_factory=dict)
    is_newcomer: bool = False
    overdue: Mapping[str, int] = field(default_factory=dict)
    mtus: Mapping[str, int] = field(default_factory=dict)
    beyond: int = 0
    engine: Engine | None = None
    unended: str = ""
    alone: bool = False
    dry: bool = False
    force: bool = False


EVERYTHING = Options()


@dataclass(frozen=True, slots=True)
class Report:
    """What a reconcile saw and did.

    `own` is this host with the record that it publishes. `withheld` are removals without evidence (see plan.guard);
    `rival` is the host that keeps this host's subnet; `lost` are the known hosts that Serf does not see alive, with
    their gossip addresses; `unmet` the peers without a handshake, None if the peers were not read; `restarted` the
    public keys of those whose handshake was started again; `engine` is what Docker said that it is, None if it was not
    asked; `mtu` is the overlay's, 0 if it was not asked for, `mtus` the paths' by public key (see plan.path_mtus).
    `notices` are problems with which nothing failed; `unended` is the one of them that says why connections that
    contradict the rules were not ended, which is then still to be done. `misplaced` are problems with containers, None
    if Docker was not asked; `dropped` is what the firewall's named counters (see rules.DROPPED) have counted.
    """

    roster: Roster = field(default_factory=Roster)
    members: tuple[Member, ...] = ()
    changes: tuple[Change, ...] = ()
    withheld: tuple[Change, ...] = ()
    failures: tuple[Failure, ...] = ()
    peers: tuple[Peer, ...] = ()
    rival: str | None = None
    unmet: Mapping[str, Unmet] | None = None
    restarted: frozenset[str] = frozenset()
    engine: Engine | None = None
    lost: Mapping[str, Endpoint] = field(default_factory=dict)
    own: Host | None = None
    mtu: int = 0
    mtus: Mapping[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    unended: str = ""
    misplaced: tuple[str, ...] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)

    def failed(self, *areas: Area) -> tuple[Failure, ...]:
        """Return the failures of these areas."""
        return tuple(failure for failure in self.failures if failure.area in areas)

    @property
    def applied(self) -> Roster:
        """The hosts and the tombstones that this host has in its kernel now."""
        if not {"peer", "route", "device"}.isdisjoint(failure.subject for failure in self.failed(Area.READ)):
            return Roster()
        broken = self._broken
        hosts = {n: r for n, r in self.roster.hosts.items() if r.public_key not in broken}
        if any(failure.subject == HOSTS for failure in self.failed(Area.DISK)):
            return Roster(hosts)  # the removal of hosts that left waits for the disk (see _needs_memory)
        return Roster(hosts, tombstones.where(self.roster.gone, lambda _n, _i, grave: grave.public_key not in broken))

    def obstacle(self, question: Applied, mesh: Mesh) -> str | None:
        """Return why this host has not applied the record that is asked for; None if that may be on its way."""
        name, broken = question.name, self._broken
        if not any(question.is_about(member, mesh) for member in self.members if member.name == name):
            return None
        record = self.roster.hosts.get(name)
        failed = broken.get(record.public_key) if record is not None else None
        return self.roster.refused.get(name) or self.roster.stale.get(name) or failed

    @property
    def _broken(self) -> dict[str, str]:
        """Why a change of a peer failed, by its public key."""
        undone = {failure.subject: str(failure) for failure in self.failed(Area.CHANGE)}
        return {
            change.resource.public_key: undone[str(change)]
            for change in self.changes
            if isinstance(change.resource, Peer) and str(change) in undone
        }


# What is written in a reconcile, as the subjects of Area.DISK.
HOSTS, ORIGINALS, CONTACTS = "hosts", "originals", "contacts"


@dataclass(frozen=True, slots=True)
class _Seen:
    """Who is there: what Serf lists, who of them is a host, and who keeps this host's subnet."""

    members: tuple[Member, ...]
    roster: Roster
    rival: str | None
    failures: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is on the machine. Of a kind that is not `readable` nothing is changed."""

    resources: tuple[Resource, ...]
    readable: frozenset[str]
    engine: Engine | None
    mtu: int
    failures: tuple[Failure, ...]

    @property
    def peers(self) -> tuple[Peer, ...]:
        return tuple(r for r in self.resources if isinstance(r, Peer))

    @property
    def diversions(self) -> tuple[Diversion, ...]:
        return tuple(r for r in self.resources if isinstance(r, Diversion))


@dataclass(frozen=True, slots=True)
class _Decision:
    """What to change; `peers` are all that are wanted, `unmet` those without a handshake, `mtus` the paths' MTUs."""

    changes: tuple[Change, ...]
    withheld: tuple[Change, ...]
    peers: tuple[Peer, ...]
    unmet: Mapping[str, Unmet]
    mtus: Mapping[str, int]


def sync(state: State, options: Options = EVERYTHING) -> Report:
    """Reconcile this machine now, under the lock. Raises InputError for damaged state, MeshdError for a busy lock."""
    _ = state.settings  # where no mesh is set up, not even the lock's file is made
    with state.lock(), one_socket():
        # A command may have changed them, or taken that back, while this waited: what it put back would be undone.
        state.reload_settings()
        return reconcile(state, this_machine(state), time.time(), options)


def reconcile(state: State, machine: Machine, now: float, options: Options = EVERYTHING) -> Report:
    """Bring the machine to the desired state at Unix time `now`; the caller holds the lock.

    Raises InputError for damaged state and on a host that is down or leaves; whatever else fails is in the report.
    """
    claim = own_claim.settled(state)
    if not options.dry and (state.is_down or claim.record.leaving):
        raise InputError(f"the mesh {state.settings.mesh} is down on this host: 'meshd up' starts it")
    known = state.roster()
    if not options.dry:
        if problem := own_claim.unasked(state, claim):
            raise WrongMachineError(problem)
        claim = own_claim.refresh(state, claim, known, now, beyond=options.beyond)
    return _Run(state, machine, now, options, Host(state.settings.name, claim.record), known).report()


@dataclass(frozen=True, slots=True)
class _Run:
    """The steps of one reconcile. `own` is this host, `known` what it knew before."""

    state: State
    machine: Machine
    now: float
    options: Options
    own: Host
    known: Roster

    def report(self) -> Report:
        """Take all steps, and return what came of them."""
        seen = self.look()
        facts = self.read(silent=any(failure.area is Area.MEMBERS for failure in seen.failures))
        decision = self.decide(seen, facts)
        before = self.state.saved_contacts()
        usable = membership.usable_contacts(before, self.state.settings.overlay)
        contacts = membership.contacts(usable, seen.members, seen.roster, self.state.settings.gossip_port)
        restarts: tuple[Change, ...] = ()
        unended = ""
        if self.options.dry:
            changes, failures = decision.changes, _tried("disk", partial(files.writable, self.state.directory))
        else:
            changes, failures = self.write(seen.roster, decision)
            unended = self.end_connections(changes, failures)
            taken, failed = self.take_over(changes)
            changes, failures = (*changes, *taken), failures + failed
            restarts, failed = self.restart_handshakes(decision)
            failures += failed
            self.tell_dropped({name: before[name] for name in before.keys() - usable.keys()})
            if contacts != before:
                failures += _tried(CONTACTS, partial(self.state.save_contacts, contacts))
        return Report(
            roster=seen.roster,
            members=seen.members,
            changes=(*changes, *restarts),
            withheld=decision.withheld,
            failures=(*seen.failures, *facts.failures, *failures),
            peers=facts.peers,
            rival=seen.rival,
            unmet=decision.unmet if "peer" in facts.readable else None,
            restarted=frozenset(c.resource.public_key for c in restarts if isinstance(c.resource, Peer)),
            engine=facts.engine,
            lost=membership.lost(contacts, seen.members) if seen.members else {},
            own=self.own,
            mtu=facts.mtu,
            mtus=decision.mtus,
            notices=(*self.notices(seen, facts), *filter(None, [unended])),
            unended=unended,
            misplaced=self.misplaced(seen, facts),
            dropped=dict(sorted(n for r in facts.resources if isinstance(r, Table) for n in r.counters if n[1])),
        )

    def misplaced(self, seen: _Seen, facts: _Facts) -> tuple[str, ...] | None:
        """Return what is wrong with the addresses of containers, None if Docker was not asked."""
        if "network" not in facts.readable:
            return None
        containers = [r for r in facts.resources if isinstance(r, RunningContainer)]
        return plan.misplaced(containers, self.own, seen.roster.sorted_hosts())

    def notices(self, seen: _Seen, facts: _Facts) -> tuple[str, ...]:
        """Return what is wrong though nothing failed."""
        own = self.own
        # What a known host does, `meshd status` says in other words (see conflicts.contested).
        over_own = [
            d
            for d in seen.roster.disputes
            if d.keeper == own.name and seen.rival is None and not d.claims.keys() <= {own.name, *self.known.hosts}
        ]
        claimed = [CLAIMED.format(subnet=own.record.subnet, rivals=conflicts.rivals_of(d, own.name)) for d in over_own]
        ends = endings.of_own(own, self.now)
        try:
            ends += authority.ending(self.state, seen.roster, self.now)
            used_up = authority.used_up(self.state, seen.roster)
        except MeshdError as error:
            used_up = [str(error)]
        diverted = [diversion.text for diversion in facts.diversions if diversion.before is None]
        return (*claimed, *ends, *used_up, *diverted, *self.state.set_aside(), *self.machines())

    def machines(self) -> list[str]:
        """Return which hosts run on two machines at once, and on `dry` why this one may not be the one in the state.

        A reconcile that changes things has passed that before.
        """
        state = self.state
        try:
            twins = state.twins()
            texts = [*map(str, twins.values())] if twins and state.agent_pid() is not None else []
            if self.options.dry:
                texts += [machine_id.mismatch(state), own_claim.unasked(state, own_claim.settled(state))]
        except MeshdError as error:
            return [str(error)]
        return [text for text in texts if text]

    def tell_dropped(self, contacts: Mapping[str, Endpoint]) -> None:
        """Log what an older version of meshd kept on disk, and this one drops."""
        for name, record in sorted(self.known.dropped.items()):
            log.warning("dropped %s from hosts.json: its %s", name, self.state.mesh.misplaced(record))
        for name, endpoint in sorted(contacts.items()):
            log.warning("dropped %s from contacts.json: no host can be at %s", name, endpoint)

    def look(self) -> _Seen:
        """Ask Serf who is there, and decide who of them is a host. Without an answer what was known stays."""
        own, known = self.own, self.known
        view = View(own, self.state.mesh, known, self.now)
        failures: list[Failure] = []
        if ended := own_claim.ended(own, known, self.now):
            failures.append(Failure(Area.MEMBERSHIP, MeshdError(ended)))
        roster, listed = replace(known, dropped={}), list[Member]()
        votes = self.options.votes if self.state.settings.daemon else None
        try:
            listed = [] if self.options.alone else self.machine.members()
            roster = membership.admit(
                view,
                listed,
                heard=self.options.heard,
                votes=votes,
                is_newcomer=self.options.is_newcomer,
                networks=self.machine.networks,
                local=self.machine.local,
                left_is_goodbye=not self.state.settings.daemon,
            )
        except (SerfError, ApplyError) as error:
            failures.append(Failure(Area.MEMBERS, error))
        dispute = conflicts.over_own_subnet(view, listed)
        newcomer = self.options.is_newcomer
        rival = conflicts.superseded_by(dispute, votes, known=known.hosts, is_newcomer=newcomer)
        if rival is not None and not ended:
            text = MUST_MOVE.format(subnet=own.record.subnet, rival=rival)
            failures.append(Failure(Area.SUBNET, ConflictError(text)))
        if own.record.seq >= own_claim.LAST:
            failures.append(Failure(Area.MEMBERSHIP, NumbersError(own_claim.USED_UP)))
        if problem := self.state.mesh.misplaced(own.record):
            failures.append(Failure(Area.UNDERLAY, InputError(MISPLACED.format(problem=problem))))
        if dispute is not None:
            roster = replace(roster, disputes=(*roster.disputes, dispute))
        return _Seen(tuple(listed), roster, rival, tuple(failures))

    def read(self, *, silent: bool) -> _Facts:
        """Read the machine. What depends on something that does not answer is left as it is.

        `silent` says that Serf did not answer, which is then not asked again for this host's tags.
        """
        kinds = frozenset(self.options.kinds)
        without = {"tags"} if silent or self.options.alone else set[str]()
        resources, readable, failures = self.machine.observe(kinds - without)
        readable &= kinds
        engine, unasked = _engine(self.machine, readable, self.options.engine)
        mtu, unmeasured = _mtu(self.machine, self.state.settings, kinds)
        if engine is None:
            readable &= WITHOUT_DOCKER
        if unmeasured:
            readable -= {"link", "network", "stopped"}
        return _Facts(tuple(resources), readable, engine, mtu, (*failures, *unasked, *unmeasured))

    def decide(self, seen: _Seen, facts: _Facts) -> _Decision:
        """Compare what should be with what is. Pure."""
        settings, known, roster = self.state.settings, self.known.hosts, seen.roster
        loose = tuple(r.link for r in facts.resources if isinstance(r, Port))
        hosts = roster.sorted_hosts()
        mtus = plan.path_mtus(hosts, facts.resources, self.options.mtus, mtu=facts.mtu)
        here = plan.Local(
            host=self.own,
            settings=settings,
            mtu=facts.mtu,
            engine=facts.engine,
            ipv6=self.machine.ipv6,
            loose=loose,
            before=next((d.before for d in facts.diversions if d.before is not None), None),
            mtus=mtus,
            lost=tuple(r for r in facts.resources if isinstance(r, StoppedContainer)),
        )
        wanted = plan.desired(here, hosts)
        moved = {r.public_key for n, r in roster.hosts.items() if n in known and r.endpoint != known[n].endpoint}
        late = handshakes.unmet(self.own.record, roster, seen.members, facts.peers) if settings.keepalive else {}
        # Without a daemon nobody starts the handshake that the other host did not start.
        patient = handshakes.awaited(late) if settings.daemon else ()
        changes = plan.diff(wanted, facts.resources, now=self.now, moved=moved, patient=patient, kinds=facts.readable)
        withheld: tuple[Change, ...] = ()
        if not self.options.force:
            is_forgetful = bool(self.state.set_aside())
            departed = _departed(self.known, roster)
            changes, withheld = plan.guard(changes, facts.resources, departed, is_forgetful=is_forgetful)
        return _Decision(changes, withheld, tuple(r for r in wanted if isinstance(r, Peer)), late, mtus)

    def write(self, roster: Roster, decision: _Decision) -> tuple[tuple[Change, ...], list[Failure]]:
        """Keep on disk what must be known first, then make the changes: return those that were tried, and failures."""
        unsaved = _remember(self.state, self.known, roster, decision.changes)
        missing = {failure.subject for failure in unsaved}
        changes = tuple(c for c in decision.changes if _needs_memory(c) not in missing)
        return changes, unsaved + self.machine.apply(changes)

    def end_connections(self, changes: Collection[Change], failures: Collection[Failure]) -> str:
        """End the connections that contradict the firewall's rules if these were just laid, or if that is still to do.

        Return why it was not done, the empty string if nothing is left to do. To look at all connections is for these
        moments alone: there may be hundreds of thousands.
        """
        laid = {str(c) for c in changes if isinstance(c.resource, Table) and c.resource.family == "ip"}
        if not (laid or self.options.unended) or not laid.isdisjoint(failure.subject for failure in failures):
            return self.options.unended
        settings = self.state.settings
        try:
            admission = conntrack.Admission(
                overlay=settings.overlay,
                subnet=self.own.record.subnet,
                bridge=settings.docker,
                allow=settings.allow,
                local=self.machine.local().addresses,
            )
            ended, left = self.machine.end_connections(admission)
        except MissingError as error:
            log.warning("%s", error)
            return ""
        except MeshdError as error:
            return str(error)
        for why, count in sorted(ended.items()):
            log.warning("ended %d connection%s %s", count, "s" * (count != 1), why)
        return f"connections that contradict the firewall's rules cannot be ended yet: {left}" if left else ""

    def take_over(self, made: Collection[Change]) -> tuple[tuple[Change, ...], list[Failure]]:
        """After the Docker network was made anew, have its stopped containers start on the new one: changes, failures.

        Only now they have lost it.
        """
        networks = [c.resource for c in made if isinstance(c.resource, Network) and c.action is Action.SET]
        if not networks:
            return (), []
        observed, readable, failures = self.machine.observe({"stopped"})
        lost = [r for r in observed if isinstance(r, StoppedContainer)]
        wanted = [plan.taken_over(container, networks[0].name, self.own.record.subnet) for container in lost]
        changes = plan.diff(wanted, lost, now=self.now, kinds=readable & {"stopped"})
        return changes, failures + self.machine.apply(changes)

    def restart_handshakes(self, decision: _Decision) -> tuple[tuple[Change, ...], list[Failure]]:
        """Start again what is overdue: return the changes, and failures. The peers are read once more right before.

        What was read first may be seconds old on a busy machine, and a session that has begun meanwhile is not cut.
        """
        if self.options.overdue.keys().isdisjoint(decision.unmet):
            return (), []
        observed, _, failures = self.machine.observe({"peer"})
        changes = handshakes.restarts(decision.peers, observed, self.options.overdue)
        return changes, failures + self.machine.apply(changes)


def _engine(
    machine: Machine, readable: Collection[str], known: Engine | None
) -> tuple[Engine | None, tuple[Failure, ...]]:
    """Ask Docker what it is, if its network is to be set and that is not `known`."""
    if "network" not in readable:
        return None, ()
    try:
        return known or machine.engine(), ()
    except MeshdError as error:
        return None, (Failure(Area.DOCKER, error),)


def _mtu(machine: Machine, settings: Settings, kinds: Collection[str]) -> tuple[int, tuple[Failure, ...]]:
    """Return the overlay's MTU, 0 where none is to be set: asking is a fifth of what a newcomer costs any host."""
    if {"link", "network"}.isdisjoint(kinds):
        return 0, ()
    try:
        return settings.mtu or machine.mtu() - OVERHEAD, ()
    except MeshdError as error:
        return 0, (Failure(Area.UNDERLAY, error),)


def _departed(known: Roster, roster: Roster) -> set[str]:
    # `admit` drops and replaces nobody without evidence.
    over = {r.public_key for n, r in known.hosts.items() if r != roster.hosts.get(n)}
    over |= {r.public_key for r in known.dropped.values()}
    return over | {goodbye.public_key for _, _, goodbye in tombstones.each(roster.gone)}


def _remember(state: State, known: Roster, roster: Roster, changes: Sequence[Change]) -> list[Failure]:
    """Put on disk what must be known before the changes are made: the hosts, and the sysctls to put back."""
    failures: list[Failure] = []
    if known.dropped or (roster.hosts, roster.all_tombstones) != (known.hosts, known.all_tombstones):
        failures += _tried(HOSTS, partial(state.save_roster, roster))
    originals = state.originals()
    found = {
        c.resource.path: c.old.value
        for c in changes
        if isinstance(c.resource, Sysctl) and isinstance(c.old, Sysctl) and c.resource.path == plan.IP_FORWARD
    }
    if found.keys() - originals.keys():
        failures += _tried(ORIGINALS, partial(state.save_originals, found | originals))
    return failures


def _needs_memory(change: Change) -> str:
    """Return what has to be on disk before this change, the empty string for most of them.

    Otherwise a host that left would be back after a reboot, and forwarding would stay on after `meshd down`.
    """
    resource = change.resource
    if isinstance(resource, Sysctl) and resource.path == plan.IP_FORWARD:
        return ORIGINALS
    return HOSTS if isinstance(resource, Route | Peer) and change.action is Action.REMOVE else ""


def _tried(subject: str, write: Callable[[], None]) -> list[Failure]:
    try:
        write()
    except MeshdError as error:
        return [Failure(Area.DISK, error, subject)]
    return []


def dismantle(state: State) -> Report:
    """Remove everything that meshd put on this host, and put back what it changed."""
    with state.lock(), one_socket():
        return tear_down(state, this_machine(state), time.time())


def tear_down(state: State, machine: Machine, now: float) -> Report:
    """Remove everything that is meshd's from the machine; the caller holds the lock.

    ip_forward goes back only where no Docker engine runs: its containers need it now, whoever turned it on.
    """
    # Serf ends with the host's part in the mesh, and its tags with it.
    observed, readable, failures = machine.observe(frozenset(plan.ORDER) - {"tags"})
    changes = plan.diff((), observed, now=now, kinds=readable)
    failures += machine.apply(changes)
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
