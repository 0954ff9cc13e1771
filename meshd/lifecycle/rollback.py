"""Undo a command that failed half way: the host is as it was before."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from meshd.daemon import service
from meshd.errors import MeshdError
from meshd.gossip import calls, serf, serf_agent
from meshd.interrupts import interruptible
from meshd.lifecycle.containers import attached_containers, disconnect
from meshd.lifecycle.leave import end_quietly, say_goodbye
from meshd.lifecycle.up import stop_serf
from meshd.mesh.model import Status
from meshd.reconcile.run import Report, dismantle
from meshd.state.directory import State

Step = tuple[str, Callable[[], Report | None]]
"""What is undone, for people, and how."""


@contextmanager
def all_or_nothing(state: State) -> Iterator[None]:
    """Undo everything when the block fails or is interrupted; nothing interrupts the undoing."""
    existed = state.directory.exists()
    with undoing(lambda: steps(state, existed=existed)):
        yield


@contextmanager
def undoing(steps: Callable[[], Iterable[Step]]) -> Iterator[None]:
    """Take these steps when the block fails or is interrupted; what is left becomes notes of the error."""
    with interruptible() as ignore:
        try:
            yield
        except BaseException as error:
            ignore()
            for left in undo(steps()):
                error.add_note(left)
            raise


def undo(steps: Iterable[Step]) -> list[str]:
    """Take each step whatever becomes of the others; return what is not undone, and why."""
    left: list[str] = []
    for what, step in steps:
        try:
            report = step()
        except Exception as error:
            left.append(f"not undone: {what}: {error if isinstance(error, MeshdError) else repr(error)}")
        else:
            left += [f"not undone: {failure}" for failure in (report.failures if report else ())]
    return left


def steps(state: State, *, existed: bool, withdraw: Callable[[State], None] | None = None) -> Iterator[Step]:
    """Yield what takes away all that meshd has put on this host, from traffic to files. Each is harmless twice.

    `existed` says whether the state directory was there before. `withdraw` takes back what others have heard.
    """
    withdraw = withdraw or _withdraw
    if state.exists:
        with suppress(Exception):
            state.mark_down()  # it goes with the rest in a moment
        settings = state.settings
        yield "the daemon", lambda: service.stop(state)
        yield "what other hosts have heard of this one", lambda: withdraw(state)
        yield "the Serf agent", lambda: stop_serf(state)
        yield "containers", lambda: disconnect(settings, attached_containers(settings, force=True))
        yield "the network", lambda: dismantle(state)
    yield str(state.directory), state.forget_everything
    if existed:
        yield str(state.directory), lambda: state.directory.mkdir(mode=0o700, exist_ok=True)


def _withdraw(state: State) -> None:
    """Take back a record that some members may have seen; under another host's name, only where somebody has it."""
    if serf.running(state.serf_config) is None:
        return
    if not serf_agent.name_conflict(state):
        say_goodbye(state)
    elif _is_held(state):
        end_quietly(state)


def _is_held(state: State) -> bool:
    """Return whether members, some of them picked at random, have this host's record."""
    claim, name = state.claim(), state.settings.name
    alive = {m.name for m in serf_agent.members(state) if m.status is Status.ALIVE} - {name}
    return claim is not None and bool(alive) and claim.record in calls.look_up_records(state, name, alive)
