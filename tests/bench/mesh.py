"""A mesh of lab hosts without Docker that several measurements share: building one of 50 takes minutes."""

import atexit
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

from meshd.lab.hosts import Lab, LabHost
from tests.lab import conftest


class Mesh:
    """The hosts barge1 … bargeN in one lab, each joined by the one before."""

    def __init__(self, directory: Path) -> None:
        self.lab = Lab(directory)
        self.hosts: list[LabHost] = []
        self.invitation = ""

    def grow(self, size: int) -> list[float]:
        """Let hosts join, one after the other, until there are `size`; give what each `meshd join` took, in seconds."""
        times = []
        while len(self.hosts) < size:
            host = self.next_host()
            begun = time.monotonic()
            if self.hosts:
                conftest.join(host, self.hosts[-1], self.invitation, "--no-docker")
            else:
                self.invitation = conftest.init(host, "--no-docker")
            times.append(time.monotonic() - begun)
            self.hosts.append(host)
        return times

    def join_command(self, host: LabHost) -> "subprocess.Popen[str]":
        """Start `meshd join` on a host, through the last one that joined."""
        command = ["meshd", "join", str(self.hosts[-1].address), "--no-docker"]
        return host.popen(
            ["env", f"MESHD_INVITE={self.invitation}", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def admit(self, host: LabHost) -> None:
        """Let a host join by an invitation of its own: what revokes the host then revokes no other."""
        line = self.hosts[0].run(["meshd", "invite", host.name]).stdout
        conftest.join(host, self.hosts[-1], line.split("MESHD_INVITE=")[1].split()[0], "--no-docker")

    def next_host(self) -> LabHost:
        """Give the host with the next number; it is up, and not in the mesh."""
        name = f"barge{len(self.hosts) + 1}"
        running = {host.name: host for host in self.lab.hosts()}
        return running.get(name) or self.lab.power_on(name)


@cache
def standing() -> Mesh:
    """Give the one mesh of this run, which is removed when the run ends."""
    # A unix socket's path is short.
    directory = Path(tempfile.mkdtemp(prefix="meshd-bench-", dir="/var/tmp"))
    mesh = Mesh(directory / "lab")

    def remove() -> None:
        mesh.lab.down()
        shutil.rmtree(directory)

    atexit.register(remove)
    return mesh
