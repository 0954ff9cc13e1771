"""Two revisions in pairs of measurements: the ratio, and the interval that holds it with 95 % confidence.

What disturbs a machine disturbs both of a pair about equally, so each pair gives one ratio. Of these the estimate is
Hodges and Lehmann's, and the interval is that of Wilcoxon's signed-rank test, both of the logarithms. It is exact for
any number of pairs, needs no normal distribution, and one pair that went wrong hardly moves it.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

CONFIDENCE = 0.95
# Less than this is no difference that anybody would notice.
MARGIN = 1.05

# What one measurement gave, by its name with the unit.
Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the new revision costs in terms of the old one; below 1 it costs less."""

    what: str
    old: float
    new: float
    ratio: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, what: str, pairs: Sequence[tuple[float, float]]) -> "Comparison":
        old, new = (statistics.median(pair[place] for pair in pairs) for place in (0, 1))
        return cls(what, old, new, *ratio([new / old for old, new in pairs]), len(pairs))

    @property
    def verdict(self) -> str:
        if self.high < 1:
            return "less"
        if self.low > 1:
            return "more"
        if self.low >= 1 / MARGIN and self.high <= MARGIN:
            return "the same"
        return "cannot tell"


def compare(pairs: Sequence[tuple[Figures, Figures]]) -> Iterator[Comparison]:
    """Compare each figure of all pairs."""
    for what in pairs[0][0]:
        yield Comparison.of(what, [(old[what], new[what]) for old, new in pairs])


def ratio(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the estimate of the ratio and both ends of its interval: 0 and infinity for fewer than six ratios."""
    logs = [math.log(value) for value in ratios]
    means = sorted((one + other) / 2 for place, one in enumerate(logs) for other in logs[place:])
    estimate, outside = math.exp(statistics.median(means)), _outside(len(logs))
    if outside == 0:
        return estimate, 0.0, math.inf
    return estimate, math.exp(means[outside - 1]), math.exp(means[-outside])


def _outside(count: int) -> int:
    """Return which of the sorted means of `count` values ends the interval, counted from either end; 0 for none.

    The sum of the ranks of the values above the true one is that of a random subset of 1 … count.
    """
    subsets = [1]
    for rank in range(1, count + 1):
        without, extended = subsets + [0] * rank, [0] * rank + subsets
        subsets = [one + other for one, other in zip(without, extended, strict=True)]
    allowed = (1 - CONFIDENCE) / 2 * 2**count
    return sum(below <= allowed for below in accumulate(subsets))
