"""`python -m tests.chaos`: the run for a person; exit code 1 with violations."""

import random
import sys

import click

from tests.chaos.run import run
from tests.lab.conftest import empty_lab


@click.command()
@click.option("--faults", type=int, default=200, show_default=True, help="How many.")
@click.option("--seed", type=int, default=None, help="That of an earlier run, to draw the same.  [default: drawn]")
def main(faults: int, seed: int | None) -> None:
    """Do random faults to a mesh of five hosts in namespaces, and check everything after each."""
    with empty_lab() as lab:
        outcome = run(lab, faults, random.randrange(10_000) if seed is None else seed, click.echo)
    sys.exit(1 if outcome.violations else 0)


if __name__ == "__main__":
    main()
