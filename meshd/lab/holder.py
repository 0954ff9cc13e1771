"""The init process of one lab host: it sets up the host's mounts, then holds its namespaces open.

Run by path, isolated and with the standard library alone, as process 1 of a new process namespace:

    python3 -I -S holder.py LAB-DIRECTORY HOST-NAME UNDERLAY

The last word is not read here: the lab finds its hosts, and what they are, by these arguments.
Everything on the host dies with it, so ending it is the host's power switch.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Prepare the namespaces, say `ready`, and wait to be killed."""
    directory, name = Path(sys.argv[1]), sys.argv[2]
    socket.sethostname(name)
    mount("--make-rprivate", "/")
    state = directory / name / "meshd"
    state.mkdir(parents=True, exist_ok=True)
    _bind(state, Path("/var/lib/meshd"))
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for folder in ("wireguard", "lock"):
        Path("/run", folder).mkdir()
    if not Path("/var/run").is_symlink():
        mount("--bind", "/run", "/var/run")
    os.chdir("/")
    # Orphans come to process 1; ignoring their end is what reaps them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    while True:
        signal.pause()


def _bind(source: Path, target: Path) -> None:
    for left in reversed(range(5)):
        target.mkdir(exist_ok=True)
        try:
            mount("--bind", str(source), str(target))
        except subprocess.CalledProcessError:
            # The end of another lab may have removed the empty directory just now.
            if not left:
                raise
        else:
            return


def mount(*arguments: str) -> None:
    """Mount by util-linux's program, which every Debian has."""
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main()
