"""Leave the mesh: tell the others, then take everything away."""

from collections.abc import Callable, Collection
from contextlib import suppress

from meshd.daemon import service
from meshd.errors import ConflictError, InputError, MeshdError, SerfError, WrongMachineError
from meshd.gossip import calls, serf, serf_agent
from meshd.gossip.delivery import ASK, MEETING, TELLINGS, expected_hosts, wait_ready
from meshd.lifecycle.containers import attached_containers, stopped_containers
from meshd.lifecycle.up import ask_elsewhere, take_down
from meshd.mesh import membership, tombstones
from meshd.mesh.tombstones import Tombstones
from meshd.reconcile.run import Report
from meshd.state.claim import has_ended, publish
from meshd.state.directory import Claim, State

GOODBYE_TIMEOUT = 5.0


def leave(state: State, *, force: bool = False, say: Callable[[str], None] = lambda _: None) -> Report:
    """Say goodbye, so that the others remove this host and free its subnet; then remove everything here.

    Where no goodbye can be said, raises MeshdError and changes nothing; with `force` it goes on, and `say` is told.
    """
    settings = state.settings
    # A copy would say the goodbye of the other machine.
    ask_elsewhere(state)
    if (twins := state.twins().get(settings.name)) is not None and state.agent_pid() is not None:
        raise WrongMachineError(str(twins))
    if not force and state.authority_key is not None and not state.authority_exported and state.roster().hosts:
        raise ConflictError(
            f"this host holds the authority of the mesh {settings.mesh!r}: hand it on first ('meshd authority export' "
            "here, 'import' on another host), or pass --force, and nobody can be invited or revoked any more"
        )
    containers, others = attached_containers(settings, force=force), _others(state)
    forget = f"run 'meshd forget {settings.name}' on the host that holds the authority, or {others} will keep this host"
    try:
        unheard = say_goodbye(state)
    except MeshdError as error:
        unheard = str(error)
        # An agent that someone runs by hand may have left by itself, and that is a goodbye too.
        if others and not force and (settings.daemon or not isinstance(error, SerfError)):
            raise MeshdError(
                f"cannot tell {others} that this host is leaving: {error}\nFix that, or use --force and then {forget}"
            ) from error
    if others and unheard:
        say(f"no other host knows that this one has left ({unheard}): {forget}")
    with suppress(MeshdError):
        state.mark_down()  # a claim that is leaving keeps others from bringing it back as well
    report = take_down(state, containers)
    if stopped := stopped_containers(settings):
        say(f"stopped containers of {settings.bridge}, which cannot start without it: {stopped}")
    if not report.failures or force:
        state.forget_everything()
    return report


def _others(state: State) -> str:
    try:
        return ", ".join(sorted(state.roster().hosts))
    except InputError:
        return "the others"


def say_goodbye(state: State) -> str:
    """Publish the record once more as leaving, wait until the others have applied that, then leave Serf.

    Say why nobody has heard it, the empty string if someone has or need not. Raises MeshdError before it has begun.
    """
    claim = state.claim()
    if claim is None:
        return ""
    adopted = serf.running(state.serf_config) is not None or not state.settings.daemon
    # An agent that someone runs by hand is not ours to start; without one there is nobody to tell.
    connect = serf_agent.start if state.settings.daemon else serf_agent.rpc
    with connect(state) as client:
        goodbye = _end_record(state, claim)
        service.stop(state)
        # The others must all have heard it before Serf's own leave: what Serf says of a left member is no evidence.
        try:
            calls.rebroadcast(state, ASK)
            if not adopted:
                calls.rejoin(state, membership.lost(state.contacts(), client.members()).values())
            told = wait_ready(state, GOODBYE_TIMEOUT, meeting=False)
            over = bool(has_ended(state))
            met = _tell_in_person(state, goodbye, told.missing) if told.missing and not over else 0
        except MeshdError as error:
            return str(error)
        # Among many that swallow it Serf may not see its leave go out in time. What counts has been said.
        with suppress(SerfError):
            client.leave()
    return "" if told.ready or met or over else "no other host has confirmed it"


def end_quietly(state: State) -> None:
    """End this host's record, where another host has its name, and wait until somebody has confirmed that.

    Serf hears of no leave: that is of a name, and those that have the other host under it would list it as leaving.
    Raises MeshdError, also if nobody has confirmed it.
    """
    if (claim := state.claim()) is None:
        return
    end = _end_record(state, claim)
    calls.broadcast_tombstones(state, end)
    calls.rebroadcast(state, ASK)
    # Others tell each other. An event alone may not be out yet when Serf ends.
    if (hosts := expected_hosts(state)) and not any(
        calls.deliver_tombstones(state, end, hosts) for _ in range(TELLINGS)
    ):
        raise MeshdError(f"no other host has confirmed it: run 'meshd forget {state.settings.name}' if one lists it")


def _end_record(state: State, claim: Claim) -> Tombstones:
    """Make this host's record its last one; return the tombstone that it is. Raises MeshdError."""
    # A reconcile that is under way publishes what it has read: it would take the goodbye back.
    with state.lock():
        last = state.claim() or claim
        record = last.record
        claim = publish(state, last, subnet=record.subnet, endpoint=record.endpoint, settled=True, leaving=True)
    return Tombstones(tombstones.grave(state.settings.name, tombstones.of_leaving(claim.record)))


def _tell_in_person(state: State, goodbye: Tombstones, missing: Collection[str]) -> int:
    """Bring the goodbye to those who have not said that they heard it; return the number of those who were met.

    As an event, too, which they go on telling each other when this host is no longer there.
    """
    try:
        calls.broadcast_tombstones(state, goodbye)
        return calls.sync_with(state, missing, MEETING)
    except MeshdError:
        return 0
