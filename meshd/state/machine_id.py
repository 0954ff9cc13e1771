"""To which machine the state belongs: a copy of it on another one must not act as this host.

That is decided by /etc/machine-id alone (machine-id(5)). A new disk, network card or hypervisor is no new machine.
"""

import hmac
import re
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from meshd import files
from meshd.errors import InputError, MeshdError, WrongMachineError
from meshd.state.directory import State

PATH = Path("/etc/machine-id")
# The id itself must not leave the machine (machine-id(5)). What is kept is of this application alone.
APPLICATION = b"meshd state directory"
_ID, _DIGEST = re.compile(rb"[0-9a-f]{32}"), re.compile(rb"[0-9a-f]{64}|")
COPIED = (
    "the state in {directory} is that of {name} on another machine, which has another /etc/machine-id. If that machine "
    "is gone for good, or this is it with a new id, run 'meshd up --moved'. If this machine is a copy, remove "
    "{directory}, then run 'meshd join' with an invitation of its own"
)


def digest(path: Path = PATH) -> str | None:
    """Return what stands for this machine, 64 hexadecimal digits; None for one that has no id, or none yet."""
    try:
        content = path.read_bytes().strip()
    except OSError:
        return None
    return hmac.new(content, APPLICATION, sha256).hexdigest() if _ID.fullmatch(content) else None


def bind(state: State, path: Path = PATH) -> None:
    """Bind the state to this machine, if it has an id. Raises MeshdError."""
    own = digest(path)
    if own is not None and own != _bound(state):
        files.write(state.directory / "machine", own.encode())


def mismatch(state: State, path: Path = PATH) -> str:
    """Return why this host must not act as the one in the state, and what to do; the empty string if it may."""
    own, bound = digest(path), _bound(state)
    if own is None or bound in {own, ""}:
        return ""
    return COPIED.format(directory=state.directory, name=state.settings.name)


def check(state: State, path: Path = PATH) -> None:
    """Require that the state is this machine's, and bind one that is not bound yet. Raises WrongMachineError."""
    if problem := mismatch(state, path):
        raise WrongMachineError(problem)
    if state.exists:
        # An earlier version did not bind it. On a full disk that waits for the next command.
        with suppress(MeshdError):
            bind(state, path)


def _bound(state: State) -> str:
    """Return the digest of the machine to which the state is bound, the empty string for none."""
    path = state.directory / "machine"
    content = (files.read(path) or b"").strip()
    if not _DIGEST.fullmatch(content):
        raise InputError(f"{path} is damaged: remove it, and the next start binds the state to this machine")
    return content.decode()
