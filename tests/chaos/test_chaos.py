"""The run itself in short; `make chaos` is the long one."""

import re

import pytest

from meshd.lab.hosts import Lab
from tests.chaos.faults import FAULTS, MEANWHILE, draws
from tests.chaos.run import run
from tests.lab.conftest import lab as lab  # noqa: PLC0414

# Its first twelve: a partition, a power cut of all, another address and key, an upgrade, a flush, who leaves and joins.
SEED = 53640


@pytest.mark.root
@pytest.mark.lab
def test_mesh_survives_random_faults(lab: Lab) -> None:
    """Random faults violate no promise."""
    said: list[str] = []
    outcome = run(lab, 12, SEED, said.append)
    print("\n".join(said))  # noqa: T201
    assert outcome.violations == 0, "\n".join(said)
    assert re.fullmatch(rf"chaos: 12 faults, {outcome.checks} checks, 0 violations; seed {SEED}, \d+ s", said[-1])
    assert outcome.checks > 12 * 60


def test_seed_repeats_faults_and_covers_all() -> None:
    """A seed draws the same faults each time, and sixty draws cover all kinds."""
    first = [draw for draw, _ in zip(draws(7), range(60), strict=False)]
    assert first == [draw for draw, _ in zip(draws(7), range(60), strict=False)]
    assert {draw.name for draw in first} == set(FAULTS)
    assert isinstance(MEANWHILE, tuple), "what is drawn from has an order"
    assert first != [draw for draw, _ in zip(draws(8), range(60), strict=False)]
