"""A Docker engine for each lab host, in the host's namespaces."""

import hashlib
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from meshd.errors import MeshdError

CGROUPS = Path("/sys/fs/cgroup")
START_TIMEOUT = 30.0


def start(host: Any, lab: Path, root: Path | None = None, options: Sequence[str] = ()) -> None:
    """Start dockerd unless it runs, and wait until it answers. Raises MeshdError with the end of its log.

    With `root`, the engine is the one unpacked in that folder; runc stays the machine's. `options` are dockerd's own.
    """
    if answers(host):
        return
    config = host.directory / "daemon.json"
    config.write_text("{}\n")
    path = host.environment()["PATH"]
    command = [
        "env",
        f"PATH={root}/usr/sbin:{root}/usr/bin:{path}" if root else f"PATH={path}",
        "dockerd",
        f"--config-file={config}",
        f"--data-root={host.directory / 'docker'}",
        "--exec-root=/run/docker",
        "--pidfile=/run/docker.pid",
        "--host=unix:///run/docker.sock",
        "--storage-driver=overlay2",
        f"--cgroup-parent={cgroup(lab)}/{host.name}",
        *options,
    ]
    log = host.directory / "dockerd.log"
    with log.open("a") as output:
        process = host.popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
        )
    deadline = time.monotonic() + START_TIMEOUT
    while not answers(host):
        if process.poll() is not None or time.monotonic() > deadline:
            raise MeshdError(f"dockerd on {host.name} did not start; the end of {log}:\n{log.read_text()[-1000:]}")
        time.sleep(0.05)
    process.returncode = 0  # it outlives this command


def answers(host: Any) -> bool:
    """Return whether the host's engine answers."""
    return bool(host.run(["docker", "version"], check=False).returncode == 0)


def cgroup(lab: Path) -> str:
    """Return the cgroup below which all containers of a lab are."""
    return f"/meshd-lab-{hashlib.sha256(str(lab).encode()).hexdigest()[:8]}"


def remove_cgroups(lab: Path, host: str = "") -> None:
    """Remove the cgroups that the containers of a lab, or of one of its hosts, have left behind."""
    name = cgroup(lab).lstrip("/")
    # Version 1 has a tree for each controller, version 2 one for all.
    for tree in (CGROUPS, *CGROUPS.glob("*/")):
        top = tree / name / host if host else tree / name
        if top.is_dir():
            for folder in sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True):
                with suppress(OSError):
                    folder.rmdir()
            with suppress(OSError):
                top.rmdir()
