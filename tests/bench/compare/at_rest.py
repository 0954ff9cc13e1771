"""The daemons of two meshes with Docker in which nothing happens: each beside its counterpart, at the same time."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from tests.bench.at_rest import Usage, processes, usage
from tests.bench.compare.mesh import mesh
from tests.bench.compare.pairs import Figures
from tests.bench.compare.revisions import Revision

HOSTS = 6
CALM = 20
SECONDS = 120


def run(revisions: Sequence[Revision]) -> Iterator[tuple[Figures, Figures]]:
    """Let both rest together: they take a few percent of a core."""
    with ExitStack() as stack:
        meshes = [stack.enter_context(mesh(revision, HOSTS, docker=True)) for revision in revisions]
        daemons = [[dict(processes(host))["daemon"] for host in one.hosts] for one in meshes]
        time.sleep(CALM)
        before = [[usage(pid) for pid in pids] for pids in daemons]
        time.sleep(SECONDS)
        after = [[usage(pid) for pid in pids] for pids in daemons]
    old, new = ([_figures(*pair) for pair in zip(*of, strict=True)] for of in zip(before, after, strict=True))
    yield from zip(old, new, strict=True)


def _figures(before: Usage, after: Usage) -> Figures:
    return {"CPU %": (after.cpu - before.cpu) / SECONDS * 100, "memory, MB": after.memory, "peak, MB": after.peak}
