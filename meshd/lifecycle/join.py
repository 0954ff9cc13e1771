"""What happens to a host: it begins a mesh, joins one, goes up and down, and leaves. All or nothing."""

import math
import shlex
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Network

from meshd import files
from meshd.daemon import service
from meshd.errors import ConflictError, InputError, MeshdError, SerfError
from meshd.gossip import calls, serf
from meshd.gossip.messages import APPLIED, YES, Question
from meshd.lifecycle import preflight
from meshd.mesh import addressing, membership, tombstones
from meshd.mesh.invitations import Admission, Invitation
from meshd.mesh.membership import Roster
from meshd.mesh.model import Action, Endpoint, Host, Member, Record, Status
from meshd.mesh.tombstones import Graves
from meshd.net import links
from meshd.net.docker import Attachment, Bridge
from meshd.reconcile.run import Report, bury, dismantle, endpoint, members, membership_ended, reconcile
from meshd.reconcile.run import renumber as move
from meshd.state import authority
from meshd.state.directory import Claim, State
from meshd.state.settings import Settings

# An asker hears within this time from everybody who is ready; who is not is asked again. Gossip takes as long as the
# logarithm of the mesh: of 50 hosts the last hear a question after 0.7 s, and Serf drops what is answered later.
ASK, ASK_TENFOLD = 1.0, 1.5
GOODBYE_TIMEOUT = 5.0
# How often everybody alive is told of a tombstone: by gossip, and then those who have not said that they have it.
TELLINGS = 4
# Who has not said after so many questions that it is ready may not have heard them.
PATIENCE = 2
# Seconds for meeting who has not said that it has a tombstone.
MEETING = 10.0
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Readiness:
    """The outcome of waiting for the others: those who have done what was asked, and those who did not say so."""

    ready: frozenset[str]
    missing: frozenset[str]


def init(state: State, settings: Settings) -> None:
    """Make a mesh with this host as its first. On any error the host is as it was before."""
    _not_set_up(state)
    with _all_or_nothing(state):
        _settle_in(state, settings)
        authority.found(state, settings.mesh, settings.name)
        subnet = settings.subnet or addressing.choose(
            settings.overlay, settings.subnet_length, (), settings.advertised, settings.name
        )
        state.publish(subnet=subnet, endpoint=endpoint(settings), settled=True)
        _begin(state)


def join(state: State, settings: Settings, invitation: Invitation, admission: Admission, member: Endpoint) -> None:
    """Join the mesh of the member at `member`. On any error the host is as it was before."""
    _not_set_up(state)
    preflight.reachable(member)
    with _all_or_nothing(state):
        _settle_in(state, settings, invitation.gossip_key)
        state.save_authority(invitation.authority)
        state.save_certificate(admission.certificate, admission.seed)
        state.save_contacts({"": member})
        allowed = admission.certificate.subnets
        if settings.subnet is not None and not addressing.is_allowed(settings.subnet, allowed):
            raise InputError(
                f"the invitation allows subnets of {', '.join(map(str, allowed))} only, not {settings.subnet}"
            )
        subnet = settings.subnet or addressing.choose(
            settings.overlay, settings.subnet_length, (), settings.advertised, settings.name, allowed=allowed
        )
        # Without a daemon nobody can be asked before the agent is started by hand.
        state.publish(subnet=subnet, endpoint=endpoint(settings), settled=not settings.daemon)
        if settings.daemon:
            service.start(state)
            _enter(state, member)
        _begin(state)


def _enter(state: State, member: Endpoint) -> None:
    """Join the gossip, and settle the claim against those of all members."""
    settings = state.settings
    with calls.connect(state) as client:
        try:
            client.join([str(member)])
        except SerfError as error:
            raise InputError(
                f"{member} answers, but not as a member of the mesh {settings.mesh!r}: the invitation is of another "
                f"mesh, or another program uses that port ({error})"
            ) from None
        if holder := serf.name_conflict(state.serf_log):
            raise ConflictError(f"the name {settings.name} is already in the mesh ({holder}): pass --name")
        claim = _settled(state, client.members())
        state.publish(subnet=claim, endpoint=endpoint(settings), settled=True)


def _settled(state: State, listed: list[Member]) -> IPv4Network:
    """Give the subnet to take: the one claimed already unless another member claims it too."""
    settings, record, now = state.settings, _record(state.claim()), time.time()
    taken = membership.claimed(settings.name, listed, state.mesh, Roster(), now)
    if settings.subnet is not None and settings.subnet in taken:
        rivals = membership.subnet_rivals(Host(settings.name, record), listed, state.mesh, Roster(), now)
        raise ConflictError(f"the subnet {settings.subnet} is taken by {', '.join(rivals)}: pass another --subnet")
    return addressing.choose(
        settings.overlay,
        settings.subnet_length,
        taken,
        settings.advertised,
        settings.name,
        persisted=record.subnet,
        allowed=record.certificate.subnets,
    )


def renew(state: State, admission: Admission) -> None:
    """Take over a new certificate for this host, if it is one; nothing else changes, and no packet is lost."""
    preflight.root()
    if admission.certificate == state.certificate:
        return
    with state.lock():
        state.save_certificate(admission.certificate, admission.seed)
    state.hint("cli: a new certificate")


def up(state: State) -> Report:
    """Start what `down` stopped: the same keys, the same subnet."""
    preflight.root()
    settings, claim = state.settings, state.claim()
    if claim is None or not claim.settled:
        raise InputError(
            f"this host has not finished joining {settings.mesh!r}: run 'meshd leave --force', then 'meshd join' again"
        )
    if claim.record.leaving:
        raise InputError(f"this host has begun to leave {settings.mesh!r}: run 'meshd leave' again to finish that")
    state.mark_up()
    return _begin(state)


def allow(state: State, entries: tuple[str, ...]) -> None:
    """Set what the overlay may reach on this host itself, from the next pass on. Raises InputError."""
    preflight.root()
    with state.lock():
        state.save_settings(replace(state.settings, allow=entries))
    state.hint("cli: settings")


def down(state: State, *, force: bool = False) -> Report:
    """Stop everything and leave the host as it was found; keep the identity and the subnet; say no goodbye."""
    preflight.root()
    settings, was_up = state.settings, _is_up(state)
    containers = _attached(settings, force=force)
    # Before anything else: a disk that is full stops it here, and from here on nobody brings back what is taken down.
    state.mark_down()
    report = _take_down(state, containers)
    # What an earlier `down` could not take away, as from an engine that hung, is no tunnel and no process.
    if not was_up and not report.failures and all(change.action is not Action.REMOVE for change in report.changes):
        raise InputError(f"the mesh {settings.mesh} is not up on this host")
    return report


def leave(state: State, *, force: bool = False, say: Callable[[str], None] = lambda _: None) -> Report:
    """Say goodbye, so that the others remove this host and free its subnet; then remove everything here.

    Where no goodbye can be said, raises MeshdError and changes nothing; with `force` it goes on, and `say` is told.
    """
    preflight.root()
    settings = state.settings
    if not force and state.authority_key is not None and not state.authority_exported and state.roster().hosts:
        raise ConflictError(
            f"this host holds the authority of the mesh {settings.mesh!r}: hand it on first ('meshd authority export' "
            "here, 'import' on another host), or pass --force, and nobody can be invited or revoked any more"
        )
    containers, others = _attached(settings, force=force), _others(state)
    forget = f"run 'meshd forget {settings.name}' on the host that holds the authority, or {others} will keep this host"
    try:
        unheard = _say_goodbye(state)
    except MeshdError as error:
        unheard = str(error)
        # An agent that somebody runs by hand may have left by itself, and that is a goodbye too.
        if others and not force and (settings.daemon or not isinstance(error, SerfError)):
            raise MeshdError(
                f"the goodbye to {others} cannot be said: {error}\nPut that right; or pass --force, and then {forget}"
            ) from error
    if others and unheard:
        say(f"nobody has heard the goodbye ({unheard}): {forget}")
    with suppress(MeshdError):
        state.mark_down()  # a claim that is leaving keeps others from bringing it back as well
    report = _take_down(state, containers)
    if not report.failures or force:
        state.forget_everything()
    return report


def _others(state: State) -> str:
    try:
        return ", ".join(sorted(state.roster().hosts))
    except InputError:
        return "the others"


def _say_goodbye(state: State) -> str:
    """Publish the record once more as leaving, wait until the others have applied that, then leave Serf.

    Say why nobody has heard it, the empty string if somebody has or need not. Raises MeshdError before it has begun.
    """
    claim = state.claim()
    if claim is None:
        return ""
    adopted = serf.running(state.serf_config) is not None or not state.settings.daemon
    # An agent that somebody runs by hand is not ours to start; without one there is nobody to tell.
    connect = calls.start if state.settings.daemon else calls.rpc
    with connect(state) as client:
        # A pass that is under way publishes what it has read: it would take the goodbye back.
        with state.lock():
            record = claim.record
            claim = state.publish(subnet=record.subnet, endpoint=record.endpoint, settled=True, leaving=True)
        service.stop(state)
        # The others must all have heard it before Serf's own leave: what Serf says of a left member is no evidence.
        try:
            calls.spread(state, ASK)
            if not adopted:
                calls.rejoin(state, membership.lost(state.contacts(), client.members()).values())
            told = wait_ready(state, claim.record.seq, GOODBYE_TIMEOUT, meeting=False)
            over = bool(ended(state))
            met = _tell_in_person(state, claim.record, told.missing) if told.missing and not over else 0
        except MeshdError as error:
            return str(error)
        # Among many that swallow it Serf may not see its leave go out in time. What counts has been said.
        with suppress(SerfError):
            client.leave()
    return "" if told.ready or met or over else "no other host has confirmed it"


def _tell_in_person(state: State, record: Record, missing: Collection[str]) -> int:
    """Bring the goodbye to those who have not said that they heard it; give the number of those who were met.

    As an event, too, which they go on telling each other when this host is no longer there.
    """
    try:
        calls.tell_gone(state, Graves({state.settings.name: tombstones.said(record)}))
        return calls.meet(state, missing, MEETING)
    except MeshdError:
        return 0


def forget(state: State, name: str) -> Readiness:
    """Bury a host that will not come back: all others drop it, and its subnet is free. Give who has heard of it.

    Raises InputError for a name that is not known or without the authority, ConflictError for a host that is alive.
    """
    preflight.root()
    settings, roster = state.settings, state.roster()
    if name == settings.name:
        raise InputError(f"{name} is this host: 'meshd leave' says its goodbye")
    record = roster.hosts.get(name)
    if record is None:
        known = ", ".join(sorted(roster.hosts)) or "none"
        raise InputError(f"no host {name!r} is known to this mesh; known: {known}")
    goodbye = authority.forget(state, name, record)
    with calls.rpc(state) as client:
        member = next((m for m in client.members() if m.name == name), None)
        if member is not None and member.status is Status.ALIVE:
            raise ConflictError(f"{name} is alive: run 'meshd leave' there, or stop it first")
    return _end(state, name, Graves({name: goodbye}))


def revoke(state: State, name: str) -> tuple[list[str], Readiness]:
    """Cut a host off everywhere, or end a reusable invitation.

    Give the names of all that is revoked with it, and who has heard of it.
    """
    preflight.root()
    if name == state.settings.name:
        raise InputError(f"{name} is this host: bring the authority to another one and revoke it from there")
    revoked = authority.revoke(state, name)
    told = _end(state, name, Graves(revoked=revoked))
    return sorted({revocation.name for revocation in revoked.values()}), told


def _end(state: State, name: str, graves: Graves) -> Readiness:
    bury(state, graves)
    with suppress(SerfError), calls.rpc(state) as client:
        member = next((m for m in client.members() if m.name == name), None)
        if member is not None and member.status in {Status.FAILED, Status.LEFT}:
            client.force_leave(name, prune=True)
    with suppress(SerfError):
        calls.tell_gone(state, graves)
    reconcile(state)
    state.hint("cli: tombstones")
    return _told(state, graves)


def _told(state: State, graves: Graves) -> Readiness:
    """Tell of tombstones until all alive, admitted hosts say that they have them; who does not asks for them later."""
    having: set[str] = set()
    missing = set(state.roster().hosts)
    with suppress(SerfError):
        for telling in range(TELLINGS):
            missing = _expected(state) - having
            if not missing:
                break
            if telling:
                calls.meet(state, missing, MEETING)
            having |= calls.bury(state, graves, missing)
            missing -= having
    return Readiness(frozenset(having), frozenset(missing))


def renumber(state: State, subnet: IPv4Network | None, *, force: bool, say: Callable[[str], None]) -> None:
    """Give this host another subnet, and with `force` its containers other addresses. `say` is told of each step."""
    preflight.root()
    settings, claim = state.settings, state.claim()
    if subnet is not None:
        replace(settings, subnet=subnet)  # its checks
    if claim is not None and claim.record.subnet == subnet:
        raise InputError(f"this host has the subnet {subnet} already")
    containers = _attached(settings, force=force)
    with _interrupts() as ignore:
        try:
            _disconnect(settings, containers)
            record = move(state, subnet)
            say(f"the subnet of {settings.name} is {record.subnet}")
        finally:
            ignore()
            try:
                report = reconcile(state)
            finally:
                off = _attach(Bridge(settings.mesh, settings.bridge), containers, say)
    if report.failures:
        raise report.failures[0].error
    state.hint("cli: renumbered")
    if off:
        raise MeshdError(f"containers are off the overlay: {', '.join(off)}")


def _attach(bridge: Bridge, containers: Iterable[Attachment], say: Callable[[str], None]) -> list[str]:
    """Attach containers again, each whatever becomes of the others; give the names of those that are left off."""
    off, told = [], []
    for container in containers:
        try:
            if address := bridge.attach(container):
                told.append(f"container {container.name} has the address {address}")
        except MeshdError as error:
            off.append(container.name)
            options = [f"--alias={alias}" for alias in container.aliases]
            again = shlex.join(["docker", "network", "connect", *options, bridge.name, container.name])
            told.append(f"container {container.name} is off the overlay ({error}): {again}")
    # Only now: the terminal may be closed.
    for text in told:
        say(text)
    return off


def wait_ready(
    state: State, seq: int, timeout: float, progress: Progress = lambda *_: None, *, meeting: bool = True
) -> Readiness:
    """Ask the others until all alive, admitted hosts have applied this host's record `seq`, or time is over.

    `progress` gets the number that is ready and the number of all, this host included. With `meeting` those who do not
    answer are met in person.
    """
    settings = state.settings
    question = Question(settings.name, seq)
    ready: set[str] = set()
    deadline = time.monotonic() + timeout
    asked = 0

    while True:
        expected = _expected(state)
        progress(len(ready & expected) + 1, len(expected) + 1)
        missing = expected - ready
        if not missing or time.monotonic() >= deadline or ended(state):
            return Readiness(frozenset(ready & expected), frozenset(missing))
        if asked:
            calls.spread(state, ASK)
        if meeting and asked >= PATIENCE:
            calls.meet(state, missing, ASK)
        nodes = calls.named(missing)
        wait = min(_ask_timeout(len(expected)), max(ASK, deadline - time.monotonic()))
        with calls.rpc(state) as client:
            for name, answer in client.query(APPLIED, question.payload(), timeout=wait, nodes=nodes):
                if answer == YES and name in expected:
                    ready.add(name)
                    progress(len(ready & expected) + 1, len(expected) + 1)
                if expected <= ready:
                    break
        asked += 1


def _ask_timeout(hosts: int) -> float:
    """Give the seconds that a question has for its way to so many hosts, and their answers for theirs."""
    return max(ASK, ASK_TENFOLD * math.log10(hosts))


def ended(state: State) -> str:
    """Say why this host is no member any more, as far as it has heard; the empty string while it is one."""
    claim = state.claim()
    return membership_ended(Host(state.settings.name, claim.record), state.roster(), time.time()) if claim else ""


def _expected(state: State) -> set[str]:
    admitted = state.roster().hosts
    return {m.name for m in members(state) if m.status is Status.ALIVE and m.name in admitted}


def _not_set_up(state: State) -> None:
    preflight.root()
    if state.exists:
        settings = state.settings
        raise ConflictError(
            f"this host is already in the mesh {settings.mesh!r} as {settings.name}: "
            "'meshd up' starts it, 'meshd leave' ends it"
        )


def _settle_in(state: State, settings: Settings, gossip_key: bytes | None = None) -> None:
    """Check the machine, then write everything that starting needs."""
    files.private_directory(state.directory)
    preflight.check(settings, state.wireguard_key)
    if gossip_key is not None:
        state.save_gossip_key(gossip_key)
    _ = state.gossip_key, state.rpc_key
    state.save_settings(settings)


def _begin(state: State) -> Report:
    """Start the daemon and make the first pass here, so that what fails is said to the person who asked."""
    if state.settings.daemon:
        service.start(state)
        calls.connect(state).close()
        _let_the_daemon_begin(state)
    report = reconcile(state)
    # Without a daemon there is no agent yet to list members and to take the tags; the handler publishes them. A rival
    # for the subnet, one that joins just now, is the daemon's to settle.
    others = {"subnet"} if state.settings.daemon else {"members", "tags"}
    failures = [f for f in report.failures if f.what not in others]
    if failures:
        raise failures[0].error if len(failures) == 1 else MeshdError("\n".join(map(str, failures)))
    state.hint("cli: configured")
    return report


def _let_the_daemon_begin(state: State) -> None:
    """Where systemd confines the daemon, have it start wireguard-go, which is then confined as well."""
    deadline = time.monotonic() + ASK
    state.hint("cli: begin")
    while service.has_systemd() and state.settings.wireguard not in links.link_names() and time.monotonic() < deadline:
        time.sleep(0.02)


@contextmanager
def _all_or_nothing(state: State) -> Iterator[None]:
    """Undo everything when the block fails or is interrupted; then nothing interrupts it."""
    existed = state.directory.exists()
    with _interrupts() as ignore:
        try:
            yield
        except BaseException as error:
            ignore()
            for left in _undo(state, existed=existed):
                error.add_note(left)
            raise


@contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """Let interrupts, also a closed terminal, end the block like errors, until what this gives is called: then none."""
    interrupts = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _interrupted) for number in interrupts}

    def ignore() -> None:
        for number in interrupts:
            signal.signal(number, signal.SIG_IGN)

    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _undo(state: State, *, existed: bool) -> list[str]:
    """Take away all that there is, each part whatever becomes of the others; say what is left and why."""
    left: list[str] = []

    def attempt(what: str, step: Callable[[], Report | None]) -> None:
        try:
            report = step()
        except Exception as error:
            left.append(f"not undone: {what}: {error if isinstance(error, MeshdError) else repr(error)}")
        else:
            left.extend(f"not undone: {failure}" for failure in (report.failures if report else ()))

    if state.exists:
        with suppress(Exception):
            state.mark_down()  # it goes with the rest in a moment
        attempt("the daemon", lambda: service.stop(state))
        attempt("what others have heard of this host", lambda: _withdraw(state))
        attempt("the Serf agent", lambda: _stop_serf(state))
        attempt("containers", lambda: _disconnect(state.settings, _attached(state.settings, force=True)))
        attempt("the network", lambda: dismantle(state))
    attempt(str(state.directory), state.forget_everything)
    if existed and not state.directory.exists():
        attempt(str(state.directory), lambda: state.directory.mkdir(mode=0o700))
    return left


def _withdraw(state: State) -> None:
    """Take back a claim that some members may have seen; not under a name that is another host's."""
    if serf.running(state.serf_config) is not None and not serf.name_conflict(state.serf_log):
        _say_goodbye(state)


def _take_down(state: State, containers: list[Attachment]) -> Report:
    service.stop(state)
    _stop_serf(state)
    # Who stays attached is named when the network is to go.
    with suppress(MeshdError):
        _disconnect(state.settings, containers)
    return dismantle(state)


def _stop_serf(state: State) -> None:
    if state.settings.daemon:
        calls.stop(state)


def _disconnect(settings: Settings, containers: list[Attachment]) -> None:
    if containers:
        Bridge(settings.mesh, settings.bridge).disconnect(containers)


def _attached(settings: Settings, *, force: bool) -> list[Attachment]:
    """Give the containers that are attached, which `force` is to disconnect; without it, refuse if there are any."""
    if not settings.docker:
        return []
    try:
        attached = Bridge(settings.mesh, settings.bridge).attachments()
    except MeshdError:
        return []  # no engine, no running containers
    if attached and not force:
        raise ConflictError(
            f"containers are attached to {settings.bridge}: {', '.join(sorted(c.name for c in attached))}; "
            "stop them, or pass --force to disconnect them"
        )
    return attached


def _is_up(state: State) -> bool:
    return (
        state.agent_pid() is not None
        or serf.running(state.serf_config) is not None
        or state.settings.wireguard in links.link_names()
    )


def _record(claim: Claim | None) -> Record:
    if claim is None:
        raise InputError("the claim of this host is missing from its state directory")
    return claim.record
