"""The statistics of `make bench-compare`: known ratios give known intervals."""

import math
import random

import pytest

from tests.bench.compare.pairs import Comparison, compare, ratio


def test_interval_agrees_with_r() -> None:
    """wilcox.test(1:10, conf.int=TRUE) gives 5.5 and 3 to 8."""
    found = ratio([math.exp(number) for number in range(1, 11)])
    assert [math.log(value) for value in found] == pytest.approx([5.5, 3, 8])


@pytest.mark.parametrize(("count", "place"), [(6, 1), (8, 4), (12, 14), (20, 53), (50, 435)])
def test_interval_ends_where_tables_of_the_test_say(count: int, place: int) -> None:
    """The critical values of Wilcoxon's test, 5 % and two-sided, are one less: 0, 3, 13, 52, 434."""
    # The sum of any two powers is another one: the mean at each place is known.
    logs = [2.0**number / 2**count for number in range(count)]
    means = sorted((one + other) / 2 for at, one in enumerate(logs) for other in logs[at:])
    _, low, high = ratio([math.exp(log) for log in logs])
    assert math.log(low) == pytest.approx(means[place - 1])
    assert math.log(high) == pytest.approx(means[-place])


def test_five_pairs_tell_nothing() -> None:
    assert ratio([2.0] * 5)[1:] == (0, math.inf)


def test_one_wrong_pair_hardly_moves_the_interval() -> None:
    _, low, high = ratio([0.98, 0.99, 0.99, 1, 1, 1, 1, 1.01, 1.01, 1.02, 1.02, 100])
    assert 0.99 < low < high < 1.03


def test_interval_holds_the_true_ratio_19_times_of_20() -> None:
    draw, runs = random.Random(14), 1000
    held = 0
    for _ in range(runs):
        # Heavy tails, as a machine has that others use.
        _, low, high = ratio([1.1 * math.exp(draw.gauss(0, 0.05) / max(draw.random(), 0.05)) for _ in range(12)])
        held += low <= 1.1 <= high
    assert 0.93 < held / runs < 0.98


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ([0.90, 0.95], "less"),
        ([1.02, 1.04], "more"),
        ([0.97, 1.02], "the same"),
        ([0.80, 1.02], "cannot tell"),
        ([0.97, 1.30], "cannot tell"),
    ],
)
def test_verdict_says_when_the_interval_is_too_wide(new: list[float], verdict: str) -> None:
    assert Comparison.of("CPU ms", [(10, 10 * value) for value in new * 6]).verdict == verdict


def test_each_figure_is_compared_by_pairs() -> None:
    """A machine that slows down from pair to pair makes no difference."""
    pairs = [({"wall": speed, "CPU": 2.0}, {"wall": 3 * speed, "CPU": 1.0}) for speed in (1, 2, 3, 4, 5, 6, 7)]
    wall, cpu = compare(pairs)
    assert (wall.what, wall.old, wall.new, wall.pairs, wall.verdict) == ("wall", 4, 12, 7, "more")
    assert (wall.low, wall.ratio, wall.high) == pytest.approx((3, 3, 3))
    assert (cpu.low, cpu.ratio, cpu.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (cpu.what, cpu.verdict) == ("CPU", "less")
