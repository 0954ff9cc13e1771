"""Undo a command that failed half way: the host is as it was before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from meshd.daemon import service
from meshd.errors import MeshdError
from meshd.gossip import serf
from meshd.lifecycle.containers import attached_containers, disconnect
from meshd.lifecycle.interrupts import interruptible
from meshd.lifecycle.leave import say_goodbye
from meshd.lifecycle.up import stop_serf
from meshd.reconcile.run import Report, dismantle
from meshd.state.directory import State


@contextmanager
def all_or_nothing(state: State) -> Iterator[None]:
    """Undo everything when the block fails or is interrupted; then nothing interrupts it."""
    existed = state.directory.exists()
    with interruptible() as ignore:
        try:
            yield
        except BaseException as error:
            ignore()
            for left in undo(state, existed=existed):
                error.add_note(left)
            raise


def undo(state: State, *, existed: bool) -> list[str]:
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
        attempt("the Serf agent", lambda: stop_serf(state))
        attempt("containers", lambda: disconnect(state.settings, attached_containers(state.settings, force=True)))
        attempt("the network", lambda: dismantle(state))
    attempt(str(state.directory), state.forget_everything)
    if existed and not state.directory.exists():
        attempt(str(state.directory), lambda: state.directory.mkdir(mode=0o700))
    return left


def _withdraw(state: State) -> None:
    """Take back a claim that some members may have seen; not under a name that is another host's."""
    if serf.running(state.serf_config) is not None and not serf.name_conflict(state.serf_log):
        say_goodbye(state)
