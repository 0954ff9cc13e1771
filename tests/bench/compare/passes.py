"""Reconciles among 1,000 simulated hosts: a cold one, and those with nothing to do."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from tests.bench.compare.pairs import Figures
from tests.bench.compare.processes import answer, in_turn, standing
from tests.bench.compare.revisions import Revision

MEMBERS = 1000
PAIRS = 12
# Reconciles with nothing to do, of each kind, for one figure of a pair.
REPEAT = 7

Ask = Callable[[str], dict[str, Any]]


def run(revisions: Sequence[Revision]) -> Iterator[tuple[Figures, Figures]]:
    """Start both again for each pair: where its memory lies makes a process a little faster or slower."""
    for pair in range(PAIRS):
        with ExitStack() as stack:
            asks = [stack.enter_context(_daemon(revision)) for revision in revisions]
            yield _measure(asks, pair)


def _measure(asks: Sequence[Ask], pair: int) -> tuple[Figures, Figures]:
    cold = _both(asks, "full", pair)
    _both(asks, "full", pair)  # the first one that reads what the cold one has made
    full, hint = [], []
    for repetition in range(REPEAT):
        full.append(_both(asks, "full", pair + repetition))
        hint.append(_both(asks, "hint", pair + repetition))
    old, new = (
        {
            "cold, CPU ms": cold[place]["cpu"] * 1e3,
            "no-op, CPU ms": _median([costs[place] for costs in full]),
            "no-op by hint, CPU ms": _median([costs[place] for costs in hint]),
            "peak, MB": hint[-1][place]["memory"],
        }
        for place in (0, 1)
    )
    return old, new


def _both(asks: Sequence[Ask], what: str, pair: int) -> dict[int, dict[str, Any]]:
    return {place: asks[place](what) for place in in_turn(pair)}


def _median(costs: Sequence[dict[str, Any]]) -> float:
    if any(cost["changes"] for cost in costs):
        raise click.ClickException("a reconcile with nothing to do has changed something: run make bench BENCH=passes")
    return float(statistics.median(cost["cpu"] for cost in costs)) * 1e3


@contextmanager
def _daemon(revision: Revision) -> Iterator[Ask]:
    """Start a process that reconciles as the revision's daemon does. The result asks for one and returns its cost."""
    with standing(revision, MEMBERS) as stand:
        with stand.space.entered():
            process = revision.popen("-m", "tests.bench.daemon", stand.directory)

        def ask(what: str) -> dict[str, Any]:
            assert process.stdin is not None
            print(what, file=process.stdin, flush=True)
            return answer(revision, process)

        with process:
            yield ask
