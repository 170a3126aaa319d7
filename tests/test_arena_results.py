"""What is made of results: tables, tests and figures, from numbers put in by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberfed.arena import grid as grids
from emberfed.arena.grid import Grid
from emberfed.arena.markdown import markdown
from emberfed.arena.page import page, summary
from emberfed.arena.results import CellResult, Comparison, TierResult
from emberfed.metrics import GENERATION, loss_beside
from emberfed.report import numbers

A = {"method": {"name": "a3smoe"}}
B = {"method": {"name": "a3smoe", "temperature": 0}}
COLUMNS = {"IID": {"data.partition.alpha": 5.0}, "non-IID": {"data.partition.alpha": 0.5}}
Scores = Mapping[tuple[str, str], Sequence[float]]
"""ROUGE-L by (column, contestant), a value per seed."""


def tier(rouge_l: float, name: str = "small", top_k: int = 1) -> TierResult:
    return TierResult(
        tier=name,
        top_k=top_k,
        quality={"rouge_l": rouge_l, "loss": 4 - rouge_l},
        before={"rouge_l": 0.05, "loss": 5.0},
        examples=10,
        flops=2e9 * top_k,
        bytes_down=3e6,
        bytes_up=1e6,
        seconds=1.5,
        peak_memory_bytes=5e8,
    )


def result(cell: grids.Cell, tiers: Sequence[TierResult], problem: str | None = None) -> CellResult:
    state = "done" if tiers else "failed" if problem else "missing"
    return CellResult(cell, state, problem, 2, 8e9, 12e6, 4e6, 6e8, 30.0, tuple(tiers), GENERATION)  # type: ignore[arg-type]


def comparison(grid: Grid, scores: Scores, problems: Mapping[str, str] = {}) -> Comparison:
    cells = []
    for cell in grid.cells:
        values = scores.get((cell.column, cell.swept or cell.method), ())
        known = cell.seed < len(values)
        cells.append(result(cell, [tier(values[cell.seed])] if known else [], problems.get(cell.method)))
    return Comparison(grid, tuple(cells))


def two_columns(**keys: Any) -> Grid:
    return grids.load({"title": "Two", "methods": {"A": A, "B": B}, "columns": COLUMNS, "seeds": 3, **keys})


SCORES: Scores = {
    ("IID", "A"): [0.1, 0.2, 0.3],
    ("IID", "B"): [0.1, 0.1, 0.1],
    ("non-IID", "A"): [0.3, 0.4, 0.5],
    ("non-IID", "B"): [0.1, 0.21, 0.3],
}


def test_the_table_is_the_papers_by_hand() -> None:
    """IID: differences 0, .1, .2 have mean .1 and sd .1, so t = sqrt 3 and p = 1 - sqrt 3 / sqrt 5 = .23: a tie.
    Non-IID: differences .2, .19, .2 have mean .1967 and sd .0058, so t = 59 and p < .001: no tie."""
    text = markdown(comparison(two_columns(), SCORES)).replace(numbers.SPACE, " ")
    table = text.split("## ROUGE-L (higher is better)\n\n")[1].split("\n\n")[0]
    assert table == (
        "| budget | IID · A | IID · B | non-IID · A | non-IID · B |\n"
        "| :-- | --: | --: | --: | --: |\n"
        "| small (K = 1) | **0.2000 ± 0.1000** | 0.1000 ± 0.0000 ≈ | **0.4000 ± 0.1000** | 0.2033 ± 0.1002 |"
    )
    assert "With 3 seeds the test is weak" in text
    assert "more than 2.5 times" in text
    assert "two-sided paired t-test" in text
    assert "| IID · small (K = 1) · A | 2.00 GFLOP | 3.00 MB | 1.00 MB | 500 MB | 1.50 s |" in text


def test_lower_loss_is_better() -> None:
    found = comparison(two_columns(), SCORES)
    (place, _) = found.places()
    assert found.contest(place, loss_beside(GENERATION)).best == found.contest(place, GENERATION).best == "A"


def test_the_document_holds_every_figure() -> None:
    document = comparison(two_columns(), SCORES).json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    mean = next(row for row in document["means"] if (row["column"], row["contestant"]) == ("non-IID", "B"))
    assert mean["rouge_l"] == {"mean": pytest.approx(0.61 / 3), "sd": pytest.approx(0.1002, abs=1e-4), "n": 3}
    assert mean["flops"] == {"mean": 2e9, "sd": 0.0, "n": 3}
    (test,) = next(row for row in document["contests"] if row["column"] == "IID")["tests"]
    assert (test["best"], test["other"], test["n"], test["tie"]) == ("A", "B", 3, True)
    assert test["p"] == pytest.approx(1 - math.sqrt(3 / 5))
    run = document["runs"][0]
    assert (run["run"], run["state"], run["flops"], run["bytes_up"]) == ("runs/IID_A_seed-0", "done", 8e9, 4e6)
    assert run["tiers"][0]["loss"] == 3.9


def test_missing_results_are_said_and_not_tested() -> None:
    """B has one seed of three in one column and none in the other."""
    scores = {**SCORES, ("IID", "B"): [0.7], ("non-IID", "B"): []}
    found = comparison(two_columns(), scores, {"B": "it is broken"})
    text = markdown(found).replace(numbers.SPACE, " ")
    assert "| 0.2000 ± 0.1000 | **0.7000 (n = 1)** | 0.4000 ± 0.1000 | – |" in text
    assert "No test was made" in text
    assert "failed: it is broken (non-IID, B, seed 0; IID, B, seed 1; non-IID, B, seed 1;" in text
    assert "7 of 12 runs are done" in text


def test_values_of_a_sweep_compete_where_there_is_one_method() -> None:
    grid = two_columns(
        methods={"A": A}, columns={}, sweep={"key": "method.temperature", "values": [0, 2], "label": "γ"}
    )
    found = comparison(grid, {("", "γ=0"): [0.1, 0.1, 0.2], ("", "γ=2"): [0.3, 0.3, 0.4]})
    assert found.contestants == ("γ=0", "γ=2")
    (place,) = found.places()
    contest = found.contest(place, GENERATION)
    assert (contest.best, contest.ties) == ("γ=2", frozenset())
    assert "| budget | γ=0 | γ=2 |" in markdown(found)
    assert 'id="sweep"' in page(found)
    assert 'id="budgets"' not in page(found)


def test_methods_compete_at_each_value_of_a_sweep() -> None:
    grid = two_columns(columns={}, sweep={"key": "data.partition.alpha", "values": [0.1, 9.0], "label": "α"})
    found = comparison(grid, {("", "α=0.1"): [0.1, 0.1, 0.2], ("", "α=9"): [0.3, 0.3, 0.4]})
    assert found.contestants == ("A", "B")
    assert [place.sweep for place in found.places()] == [0.1, 9.0]
    assert [found.contest(place, GENERATION).spreads["A"].n for place in found.places()] == [3, 3]
    assert "## ROUGE-L, α=9 (higher is better)" in markdown(found)


SCORES_OF_TWO = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3)


@given(SCORES_OF_TWO)
def test_nobody_beats_the_best(pairs: list[tuple[float, float]]) -> None:
    found = comparison(GRID, {("", "A"): [a for a, _ in pairs], ("", "B"): [b for _, b in pairs]})
    for metric in (GENERATION, loss_beside(GENERATION)):
        (place,) = found.places()
        contest = found.contest(place, metric)
        assert contest.best is not None
        best = contest.spreads[contest.best].mean
        assert all(metric.sign * (best - spread.mean) >= 0 for spread in contest.spreads.values())
        assert len(contest.tests) == (len(pairs) > 1)
        assert contest.best not in contest.ties


GRID = two_columns(columns={})


class Elements(HTMLParser):
    """Counts elements and collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.names.append(tag)
        self.ids += [value] if (value := values.get("id")) else []
        self.references += [value for key in ("src", "href") if (value := values.get(key))]


def test_the_page_is_whole_and_self_contained() -> None:
    grid = two_columns(on_top=[["B", "A"]], title="A <b>& C")
    text = page(comparison(grid, SCORES))
    found = Elements()
    found.feed(text)
    assert text.startswith("<!doctype html>")
    assert "<h1>A &lt;b&gt;&amp; C</h1>" in text
    assert {"budgets", "on-top", "costs"} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids)
    assert found.names.count("svg") == 4 + 2 + 6  # metrics by columns, pairs by columns, costs by columns
    assert all(link.startswith(("runs/", "#")) for link in found.references), found.references
    assert "runs/IID_A_seed-0/report.html" in found.references
    assert "<script" not in text
    assert page(comparison(grid, SCORES)) == text
    labels = re.findall(r'aria-label="([^"]+)"', text)
    assert any("ROUGE-L at small. A: 0.200; B: 0.100." in label for label in labels)
    assert any("ROUGE-L of B and A. small: 0.100 without, 0.200 with." in label for label in labels)


def test_the_summary_is_made_of_the_numbers() -> None:
    told = summary(comparison(two_columns(), SCORES))
    assert told.startswith("12 of 12 runs are done, over 3 seeds. ROUGE-L, of 2 comparisons: best is A at 2; ")
    assert "a test separates the best from all others at 1." in told


def test_a_comparison_without_results_has_a_page_too() -> None:
    text = page(comparison(two_columns(), {}))
    assert "0 of 12 runs are done" in text
    assert "missing (" in text
    assert "<svg" not in text


def test_one_seed_is_not_tested() -> None:
    found = comparison(two_columns(seeds=1), {key: values[:1] for key, values in SCORES.items()})
    text = markdown(found)
    assert "No test was made" in text
    assert "±" not in text.split("## Costs")[0]
