"""Means and tests over seeds, against numbers worked out by hand and against SciPy's own test."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from emberfed.arena.statistics import Spread, least_difference, paired


def test_spread_by_hand() -> None:
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, over n - 1 = 2 gives 7."""
    spread = Spread.of([1.0, 2.0, 6.0, math.nan])
    assert spread == Spread(3.0, pytest.approx(math.sqrt(7)), 3)  # type: ignore[arg-type]
    alone = Spread.of([2.5])
    assert alone is not None
    assert alone.json() == {"mean": 2.5, "sd": None, "n": 1}
    assert Spread.of([math.nan]) is None


def test_paired_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, sd 1, t = 2 / (1 / sqrt 3) = 2 sqrt 3; on 2 degrees of freedom the two-sided p is
    1 - t / sqrt(2 + t^2) = 1 - 2 sqrt 3 / sqrt 14."""
    test = paired("A", {0: 2.0, 1: 4.0, 2: 6.0, 7: 9.0}, "B", {0: 1.0, 1: 2.0, 2: 3.0, 8: 0.0})
    assert test is not None
    assert (test.n, test.mean_difference) == (3, 2.0)
    assert test.p == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(14))
    assert test.tie
    assert test.json()["tie"] is True


def test_differences_without_spread() -> None:
    same = paired("A", {0: 1.0, 1: 2.0}, "B", {0: 1.0, 1: 2.0})
    shifted = paired("A", {0: 1.5, 1: 2.5}, "B", {0: 1.0, 1: 2.0})
    assert same is not None
    assert shifted is not None
    assert (same.p, same.tie) == (1.0, True)
    assert (shifted.p, shifted.tie) == (0.0, False)


def test_no_test_on_fewer_than_two_seeds() -> None:
    assert paired("A", {0: 1.0, 1: 2.0}, "B", {1: 1.0, 2: 2.0}) is None
    assert paired("A", {0: 1.0, 1: math.nan}, "B", {0: 1.0, 1: 2.0}) is None


@given(st.lists(st.tuples(st.integers(-999, 999), st.integers(-999, 999)), min_size=2, max_size=9))
def test_paired_is_scipy_s(pairs: list[tuple[int, int]]) -> None:
    one = {seed: a / 8 for seed, (a, _) in enumerate(pairs)}
    two = {seed: b / 8 for seed, (_, b) in enumerate(pairs)}
    test = paired("A", one, "B", two)
    assert test is not None
    if len({a - b for a, b in pairs}) > 1:
        assert test.p == pytest.approx(float(ttest_rel(list(one.values()), list(two.values())).pvalue), abs=1e-9)


def test_least_difference_by_hand() -> None:
    """On 2 degrees of freedom p = 1 - t / sqrt(2 + t^2) = 0.05 at t = 0.95 sqrt(2 / (1 - 0.95^2)) = 4.3027."""
    assert least_difference(3) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3))
