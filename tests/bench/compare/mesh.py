"""A mesh of lab hosts that all run one revision."""

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from meshd.lab.hosts import Lab, LabHost
from tests.bench.compare.processes import Spent, spent
from tests.bench.compare.revisions import Revision
from tests.conftest import eventually
from tests.lab.conftest import empty_lab

# A mesh on a busy machine takes this many seconds to agree.
PATIENCE = 60


class Mesh:
    """The hosts barge1 … bargeN of one lab; `docker` says whether each has an engine."""

    def __init__(self, revision: Revision, lab: Lab, *, docker: bool) -> None:
        self.revision, self.lab = revision, lab
        self.options = [] if docker else ["--no-docker"]
        self.hosts: list[LabHost] = []
        self.invitation = ""

    def grow(self, size: int) -> None:
        """Let hosts join until there are `size`, and wait until they know each other."""
        new = [self.lab.power_on(f"barge{number}") for number in range(1, size + 1)]
        if not self.options:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(self.lab.start_docker, new))
        first, *others = new
        printed = first.run([self.revision.meshd, "init", *self.options]).stdout
        found = re.search(r"MESHD_INVITE=(\S+)", printed)
        assert found, printed
        self.invitation = found[1]
        self.hosts.append(first)
        for host in others:
            self.join(host)
            self.hosts.append(host)
        self.settle()

    def join(self, host: LabHost) -> Spent:
        """Run `meshd join` on a host, through the first one; return what the command took."""
        command = [self.revision.meshd, "join", str(self.hosts[0].address), *self.options]
        environment = host.environment({"MESHD_INVITE": self.invitation})
        return spent(host.argv(command), environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def settle(self) -> None:
        """Wait until each host lists exactly the hosts of this mesh as alive."""
        names = {host.name for host in self.hosts}
        for host in self.hosts:
            eventually(partial(self._lists, host, names), PATIENCE, f"{host.name} lists {sorted(names)}")

    def _lists(self, host: LabHost, names: set[str]) -> bool:
        rows = json.loads(host.run([self.revision.meshd, "members", "--json"]).stdout)
        return {row["name"] for row in rows if row["state"] == "alive"} == names


@contextmanager
def mesh(revision: Revision, size: int, *, docker: bool) -> Iterator[Mesh]:
    """A mesh of this size while the block runs."""
    with empty_lab("meshd-bench-") as lab:
        one = Mesh(revision, lab, docker=docker)
        one.grow(size)
        yield one
