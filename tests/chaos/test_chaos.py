"""The run itself in short; `make chaos` is the long one."""

import re
from itertools import count, islice

import pytest

from meshd.lab.hosts import Lab
from tests.chaos.faults import FAULTS, MEANWHILE, draws
from tests.chaos.run import run
from tests.lab.conftest import lab as lab  # noqa: PLC0414

# How many faults, which of them in any case, and which are left to `make chaos`: Serf needs a minute or more for those.
SHORT = 7
ALWAYS = {"partition", "power cut of all", "leaves and joins", "package upgraded"}
LONG = {"another underlay address", "partition that Serf forgets", "partition from a newcomer"}


def short_seed() -> int:
    """Return the first seed that draws these; it is another one when there are other faults."""
    for seed in count():
        names = {draw.name for draw in islice(draws(seed), SHORT)}
        if names >= ALWAYS and not names & LONG:
            return seed
    raise AssertionError


@pytest.mark.root
@pytest.mark.lab
def test_mesh_survives_random_faults(lab: Lab) -> None:
    """Random faults violate no promise."""
    said, seed = list[str](), short_seed()
    outcome = run(lab, SHORT, seed, said.append)
    print("\n".join(said))  # noqa: T201
    assert outcome.violations == 0, "\n".join(said)
    assert re.fullmatch(rf"chaos: {SHORT} faults, {outcome.checks} checks, 0 violations; seed {seed}, \d+ s", said[-1])
    assert outcome.checks > SHORT * 60


def test_seed_repeats_faults_and_covers_all() -> None:
    """A seed draws the same faults each time, and sixty draws cover all kinds."""
    first = [draw for draw, _ in zip(draws(7), range(60), strict=False)]
    assert first == [draw for draw, _ in zip(draws(7), range(60), strict=False)]
    assert {draw.name for draw in first} == set(FAULTS)
    assert isinstance(MEANWHILE, tuple), "what is drawn from has an order"
    assert first != [draw for draw, _ in zip(draws(8), range(60), strict=False)]
