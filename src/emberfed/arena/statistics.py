"""Means over seeds, and the paired test that says which methods the best one is not told apart from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import final

from scipy.stats import t as student

from emberfed.records import Json

LEVEL = 0.05
"""Two results with a larger p value are called a tie."""


@final
@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation (of the sample, NaN for one value) of `n` values."""

    mean: float
    sd: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """Return the spread of values that are not NaN; None without any."""
        known = [value for value in values if not math.isnan(value)]
        if not known:
            return None
        return Spread(
            math.fsum(known) / len(known), statistics.stdev(known) if len(known) > 1 else math.nan, len(known)
        )

    def json(self) -> dict[str, Json]:
        """Return the figures; a standard deviation of one value is null."""
        return {"mean": self.mean, "sd": None if math.isnan(self.sd) else self.sd, "n": self.n}


@final
@dataclass(frozen=True, slots=True)
class PairedTest:
    """Student's two-sided paired t-test of one method against the best.

    Attributes:
        best: The method with the best mean.
        other: The method it is tested against.
        n: Seeds that both have.
        mean_difference: Mean of best minus other.
        p: Probability of a mean difference at least so large if there were none.
    """

    best: str
    other: str
    n: int
    mean_difference: float
    p: float

    @property
    def tie(self) -> bool:
        """Whether the test does not separate the two."""
        return self.p >= LEVEL

    def json(self) -> dict[str, Json]:
        """Return the figures."""
        return {**asdict(self), "tie": self.tie}


def paired(best: str, one: Mapping[int, float], other: str, two: Mapping[int, float]) -> PairedTest | None:
    """Test two methods' values by seed; None if fewer than two seeds have both.

    t = mean(d) / (sd(d) / sqrt(n)) with n - 1 degrees of freedom, d the differences by seed. Differences that are all
    the same have no spread: p is 1 if they are zero, else 0.
    """
    seeds = sorted(seed for seed in set(one) & set(two) if not math.isnan(one[seed] - two[seed]))
    if len(seeds) < 2:
        return None
    differences = [one[seed] - two[seed] for seed in seeds]
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    if sd == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * student.sf(abs(mean) * math.sqrt(len(seeds)) / sd, len(seeds) - 1))
    return PairedTest(best, other, len(seeds), mean, p)


def least_difference(n: int) -> float:
    """Return the mean difference that a test on `n` pairs needs, in standard deviations of the differences."""
    return float(student.isf(LEVEL / 2, n - 1)) / math.sqrt(n)
