"""Start and stop the mesh on this host, which stays a member."""

import time
from collections.abc import Callable
from contextlib import suppress

from meshd.daemon import hints, service
from meshd.daemon.follow import Follower, follow
from meshd.daemon.twins import settle
from meshd.errors import InputError, InUseError, MeshdError, SerfError
from meshd.gossip import serf, serf_agent
from meshd.gossip.delivery import ASK
from meshd.lifecycle import preflight
from meshd.lifecycle.containers import attached_containers, disconnect, stopped_containers
from meshd.net import links
from meshd.net.docker import Attachment, LeftOffError
from meshd.net.resources import Action
from meshd.reconcile.machine import Area, Failure
from meshd.reconcile.run import Report, dismantle, sync
from meshd.state import machine_id
from meshd.state.claim import staying
from meshd.state.directory import State


def up(state: State, *, moved: bool = False) -> Report:
    """Start what `down` stopped: the same keys, the same subnet. What is in the way now stops it before it begins.

    With `moved` the state becomes this machine's. Raises WrongMachineError while this host runs on another one.
    """
    staying(state)
    if state.is_down:
        preflight.check_again(state)
    ask_elsewhere(state)
    if moved:
        machine_id.bind(state)
    state.mark_up()
    return begin(state)


def ask_elsewhere(state: State) -> None:
    """Require of a host that is not up that it does not run on another machine. Raises WrongMachineError."""
    if state.agent_pid() is None:
        with suppress(MeshdError):
            follow(state, Follower(), time.monotonic())
        settle(state)


def down(state: State, *, force: bool = False, say: Callable[[str], None] = lambda _: None) -> Report:
    """Stop everything and leave the host as it was found; keep the identity and the subnet; say no goodbye.

    `say` is told which stopped containers cannot start without the overlay.
    """
    settings, was_up = state.settings, _is_up(state)
    containers = attached_containers(settings, force=force)
    # Before anything else: a disk that is full stops it here, and from here on nobody brings back what is taken down.
    state.mark_down()
    report = take_down(state, containers)
    # What an earlier `down` could not take away, as from an engine that hung, is no tunnel and no process.
    if not was_up and not report.failures and all(change.action is not Action.REMOVE for change in report.changes):
        raise InputError(f"the mesh {settings.mesh} is not up on this host")
    if stopped := stopped_containers(settings):
        say(f"stopped containers of {settings.bridge}, which start again after 'meshd up': {stopped}")
    return report


def begin(state: State) -> Report:
    """Start the daemon and reconcile once here, so that the user is told what fails."""
    if state.settings.daemon:
        service.start(state)
        serf_agent.connect(state).close()
        _let_the_daemon_begin(state)
    report = sync(state)
    failures = [failure for failure in report.failures if not _can_wait(failure, daemon=state.settings.daemon)]
    if failures:
        raise failures[0].error if len(failures) == 1 else MeshdError("\n".join(map(str, failures)))
    hints.wake(state.socket, "configured")
    return report


def _can_wait(failure: Failure, *, daemon: bool) -> bool:
    """Return whether a failure of the first reconcile is left to the daemon, or to the handlers.

    A rival for the subnet, one that joins just now, is the daemon's to settle. So is a Serf that starts again at this
    moment: it has answered already. A Docker network with another MTU is replaced once no container is attached, and a
    stopped container that Docker does not let us attach is no part of the mesh. Without a daemon there is no Serf agent
    yet that lists members and takes tags.
    """
    if isinstance(failure.error, InUseError | LeftOffError):
        return True
    if daemon:
        return failure.area is Area.SUBNET or isinstance(failure.error, SerfError)
    return failure.area is Area.MEMBERS or (failure.area is Area.READ and failure.subject == "tags")


def _let_the_daemon_begin(state: State) -> None:
    """Where systemd confines the daemon, have it start wireguard-go, which is then confined as well."""
    deadline = time.monotonic() + ASK
    hints.wake(state.socket, "begin")
    while service.has_systemd() and state.settings.wireguard not in links.link_names() and time.monotonic() < deadline:
        time.sleep(0.02)


def take_down(state: State, containers: list[Attachment]) -> Report:
    service.stop(state)
    stop_serf(state)
    # Who stays attached is named when the network is to go.
    with suppress(MeshdError):
        disconnect(state.settings, containers)
    return dismantle(state)


def stop_serf(state: State) -> None:
    if state.settings.daemon:
        serf_agent.stop(state)


def _is_up(state: State) -> bool:
    return (
        state.agent_pid() is not None
        or serf.running(state.serf_config) is not None
        or state.settings.wireguard in links.link_names()
    )
