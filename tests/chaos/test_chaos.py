"""The run itself in short; `make chaos` is the long one."""

import pytest

from meshd.lab.hosts import Lab
from tests.chaos.faults import FAULTS, draws
from tests.chaos.run import run
from tests.lab.conftest import lab as lab  # noqa: PLC0414

# Its first twelve are partitions, power cuts, a new key and restarts of all kinds.
SEED = 240


@pytest.mark.root
@pytest.mark.lab
def test_the_mesh_stays_true_through_random_faults(lab: Lab) -> None:
    said: list[str] = []
    outcome = run(lab, 12, SEED, said.append)
    print("\n".join(said))  # noqa: T201
    assert outcome.violations == 0, "\n".join(said)
    assert outcome.faults == 12


def test_a_seed_draws_the_same_faults_and_every_one_of_them() -> None:
    first = [draw for draw, _ in zip(draws(7), range(60), strict=False)]
    assert first == [draw for draw, _ in zip(draws(7), range(60), strict=False)]
    assert {draw.name for draw in first} == set(FAULTS)
    assert first != [draw for draw, _ in zip(draws(8), range(60), strict=False)]
