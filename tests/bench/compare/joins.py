"""`meshd join` of one more host into a mesh of two, from the command's start to its end."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from meshd.lab.hosts import LabHost
from tests.bench.compare.mesh import Mesh, mesh
from tests.bench.compare.pairs import Figures
from tests.bench.compare.processes import in_turn
from tests.bench.compare.revisions import Revision

HOSTS = 3
PAIRS = 12
# After a leave, Serf's handlers are held back by up to 3 s, and a reconcile follows each.
CALM = 4


def run(revisions: Sequence[Revision]) -> Iterator[tuple[Figures, Figures]]:
    """Let both meshes stand, and a host join either in turn."""
    with ExitStack() as stack:
        meshes = [stack.enter_context(mesh(revision, HOSTS - 1, docker=False)) for revision in revisions]
        newcomers = [one.lab.power_on(f"barge{HOSTS}") for one in meshes]
        time.sleep(CALM)
        for pair in range(PAIRS):
            figures = {place: _join(meshes[place], newcomers[place]) for place in in_turn(pair)}
            yield figures[0], figures[1]


def _join(one: Mesh, newcomer: LabHost) -> Figures:
    took = one.join(newcomer)
    newcomer.run([one.revision.meshd, "leave"])
    one.settle()
    time.sleep(CALM)
    return {"wall s": took.wall, "CPU s": took.cpu}
