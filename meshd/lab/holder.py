"""The init process of one lab host: it sets up the host's mounts, then holds its namespaces open.

Run by path, isolated and with the standard library alone, as process 1 of a new process namespace:

    python3 -I -S holder.py LAB-DIRECTORY HOST-NAME UNDERLAY [ROOT FOLDER…]

UNDERLAY is not read here: the lab finds its hosts, and what they are, by these arguments.
With ROOT, what the host sees is that folder below a disk of its own, and of this machine nothing but the FOLDERs.
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
    directory, name, _, *folders = map(Path, sys.argv[1:])
    socket.sethostname(str(name))
    mount("--make-rprivate", "/")
    state = directory / name / "meshd"
    state.mkdir(parents=True, exist_ok=True)
    root = _other_root(directory / name, *folders) if folders else Path("/")
    _bind(state, root / "var/lib/meshd")
    _give_machine_id(directory / name / "machine-id", root / "etc/machine-id")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "run"))
    for folder in ("wireguard", "lock"):
        (root / "run" / folder).mkdir()
    if not (root / "var/run").is_symlink():
        mount("--bind", str(root / "run"), str(root / "var/run"))
    os.chroot(root)
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


def _other_root(host: Path, lower: Path, *folders: Path) -> Path:
    """Lay the host's own disk over the folder `lower`, and `folders` of this machine into it; return where that is."""
    root, disk, work = (host / part for part in ("root", "disk", "work"))
    for folder in (root, disk, work):
        folder.mkdir(exist_ok=True)
    mount("-t", "overlay", "-o", f"lowerdir={lower},upperdir={disk},workdir={work}", "overlay", str(root))
    mount("-t", "proc", "proc", str(root / "proc"))
    mount("-t", "sysfs", "sysfs", str(root / "sys"))
    mount("--rbind", "/dev", str(root / "dev"))
    for folder in folders:
        inside = root / folder.relative_to("/")
        inside.mkdir(parents=True, exist_ok=True)
        mount("-o", "bind,ro", str(folder), str(inside))
    return root


def _give_machine_id(own: Path, target: Path) -> None:
    """Give the host a machine-id(5) of its own, which it has on its disk; a machine without any has hosts without."""
    if not own.exists():
        own.write_text(f"{os.urandom(16).hex()}\n")
    if target.exists():
        mount("--bind", str(own), str(target))


def _bind(source: Path, target: Path) -> None:
    for left in reversed(range(5)):
        target.mkdir(parents=True, exist_ok=True)
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
