"""Every error that meshd raises on purpose.

    MeshdError
    ├── InputError           what a user typed or a file holds is wrong; nothing was changed
    ├── MissingError         a program, kernel feature or service that meshd needs is not there
    ├── ConflictError        something that is not meshd's is in the way
    ├── SerfError            the Serf agent did not answer, or said no
    ├── WrongMachineError    this host is another machine, as far as anyone can tell
    └── ApplyError           the kernel or an engine refused a read or a change
        └── InUseError       containers use what is to be replaced: it is replaced once they are gone

Each message names the action, its object and, for a user, what to do next.
"""


class MeshdError(Exception):
    """The root: `meshd` prints it as `Error: …` and exits with `exit_code`."""

    exit_code = 1


class InputError(MeshdError):
    """What was typed, or what a file or an invitation holds, is wrong."""

    exit_code = 2


class MissingError(MeshdError):
    """Something that meshd needs from the machine is missing or stopped."""


class ConflictError(MeshdError):
    """Something that is not meshd's occupies a name, a port or a prefix."""


class WrongMachineError(MeshdError):
    """The state is a copy: it belongs to another machine, or this host's identity answers on one."""

    # EX_CONFIG of sysexits(3). The systemd unit does not start the daemon again after it.
    exit_code = 78


class SerfError(MeshdError):
    """The Serf agent is unreachable, or it refused a command."""


class ApplyError(MeshdError):
    """Reading or changing the machine's network failed."""


class InUseError(ApplyError):
    """Containers use what is to be replaced."""
