"""A mesh of lab hosts without Docker that several measurements share: building one of 50 takes minutes."""

import atexit
import subprocess
import time
from contextlib import ExitStack
from functools import cache

from meshd.lab.hosts import MOST, Lab, LabHost
from tests.lab import conftest


class Mesh:
    """The hosts barge1 … bargeN in one lab, each joined by the one before."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
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
                conftest.init(host, "--no-docker")
                self.invitation = conftest.invitation(host, "--hosts", str(MOST))
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
    stack = ExitStack()
    atexit.register(stack.close)
    return Mesh(stack.enter_context(conftest.empty_lab("meshd-bench-")))
