"""Comparisons that are judged by accuracy, with sparse adapters and with clients' own models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from run_folder_example import make_classification, read_lines, write_run

from emberfed.arena import grid as grids
from emberfed.arena.figures import costs
from emberfed.arena.grid import Grid
from emberfed.arena.markdown import markdown
from emberfed.arena.page import page, summary
from emberfed.arena.results import CellResult, Comparison, PersonalResult, TierResult, collect
from emberfed.cli.compare import tables
from emberfed.errors import RunFolderError
from emberfed.metrics import CLASSIFICATION
from emberfed.report import numbers

METHODS = {"adapter": {"method": {"name": "a3smoe"}}, "LoRA": {"method": {"name": "a3smoe", "temperature": 0}}}
ACCURACY = {"adapter": (0.6, 0.8), "LoRA": (0.5, 0.6)}
"""By method, of the tiers, for seed 0; seed 1 has 0.02 more."""


def grid(**keys: Any) -> Grid:
    return grids.load({"title": "Vision", "methods": METHODS, "seeds": 2, **keys})


def tier(name: str, accuracy: float, flops: float, adapter_top_k: int | None) -> TierResult:
    quality = {"accuracy": accuracy, "loss": 2 - accuracy}
    before = {"accuracy": 0.1, "loss": 2.3}
    return TierResult(name, 1, quality, before, 50, flops, 3e6, 1e6, 1.5, 5e8, adapter_top_k)


def comparison(found: Grid, active: Mapping[str, tuple[int, int] | None], personal: bool = True) -> Comparison:
    """Return results whose larger tier spends less; `active`: each method's `adapter_top_k` by tier."""
    cells = []
    for cell in found.cells:
        own = active[cell.method] or (None, None)
        scores = [accuracy + 0.02 * cell.seed for accuracy in ACCURACY[cell.method]]
        results = tuple(map(tier, ("phone", "laptop"), scores, (2e9, 1e9), own))
        clients = PersonalResult(4, scores[0], scores[0] - 0.2, 0.05, 1.1) if personal else None
        costs_ = (2, 8e9, 12e6, 4e6, 6e8, 30.0)
        cells.append(CellResult(cell, "done", None, *costs_, results, CLASSIFICATION, clients))
    return Comparison(found, tuple(cells))


SPARSE = comparison(grid(), {"adapter": (1, 4), "LoRA": None})


def said(text: str) -> str:
    return text.replace(numbers.SPACE, " ")


def test_accuracy_takes_the_place_of_rouge_by_hand() -> None:
    """Two seeds that differ by 0.02 have a standard deviation of 0.02 / sqrt 2 = 0.0141. Their differences are the
    same for both seeds, so that the test separates the methods."""
    text = said(markdown(SPARSE))
    assert "ROUGE" not in text
    table = text.split("## Accuracy (higher is better)\n\n")[1].split("\n\n")[0]
    assert table.splitlines()[2:] == [
        "| phone (k = 1) | **0.6100 ± 0.0141** | 0.5100 ± 0.0141 |",
        "| laptop (k = 4) | **0.8100 ± 0.0141** | 0.6100 ± 0.0141 |",
    ]
    assert "## Loss in nats per example (lower is better)" in text
    assert "Before training, accuracy and loss, mean over the runs: phone (k = 1) 0.100 and 2.300;" in text
    assert "methods without one do not use it" in text
    assert summary(SPARSE).startswith("4 of 4 runs are done, over 2 seeds. Accuracy, of 2 comparisons: best is adapter")


def test_the_personal_table_by_hand() -> None:
    text = said(markdown(SPARSE))
    table = text.split("## Clients’ own models\n\n")[1].split("\n\n")[1]
    assert table.splitlines()[2:] == [
        "| adapter | 4 | 0.610 ± 0.014 | 0.410 ± 0.014 | 0.050 ± 0.000 | 1.100 ± 0.000 |",
        "| LoRA | 4 | 0.510 ± 0.014 | 0.310 ± 0.014 | 0.050 ± 0.000 | 1.100 ± 0.000 |",
    ]
    without = comparison(grid(), {"adapter": (1, 4), "LoRA": None}, personal=False)
    assert "own models" not in markdown(without)
    assert "own models" not in page(without)
    assert "personal" not in without.json()


def test_the_document_holds_personal_results_and_adapters() -> None:
    document = SPARSE.json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    own = document["personal"][0]
    assert (own["contestant"], own["column"], own["sweep"]) == ("adapter", "", None)
    assert own["worst_decile"] == {"mean": pytest.approx(0.41), "sd": pytest.approx(0.02 / math.sqrt(2)), "n": 2}
    runs = {run["method"]: run for run in document["runs"]}
    assert [one["adapter_top_k"] for one in runs["adapter"]["tiers"]] == [1, 4]
    assert "adapter_top_k" not in runs["LoRA"]["tiers"][0]
    assert runs["LoRA"]["tiers"][0]["accuracy_before"] == 0.1
    assert document["means"][0]["accuracy"]["mean"] == pytest.approx(0.61)
    assert {contest["metric"] for contest in document["contests"]} == {"accuracy", "loss"}


def test_tiers_are_told_apart_by_what_differs() -> None:
    """Nothing where no method has a sparse adapter; nothing where methods have different ones in the same tier."""
    dense = comparison(grid(), {"adapter": None, "LoRA": None})
    assert [place.label for place in dense.places()] == ["phone", "laptop"]
    assert "K = " not in said(markdown(dense))
    assert "`active_experts`" not in markdown(dense)
    differing = comparison(grid(), {"adapter": (1, 4), "LoRA": (2, 4)})
    assert [said(place.label) for place in differing.places()] == ["phone", "laptop (k = 4)"]


def test_the_page_shows_own_models() -> None:
    text = page(SPARSE)
    assert 'id="personal"' in text
    labels = re.findall(r'aria-label="([^"]+)"', text)
    told = "Accuracy of the clients’ own models. adapter: mean 0.610, worst tenth 0.410; LoRA: mean 0.510, worst tenth"
    assert any(label.startswith(told) for label in labels)
    assert any(label.startswith("Accuracy at phone, laptop. adapter: 0.610, 0.810;") for label in labels)


def test_lines_against_cost_go_from_cheap_to_dear() -> None:
    labels = re.findall(r'aria-label="([^"]+)"', costs(SPARSE, "costs"))
    assert any("adapter: 0.810 at 1.00 GFLOP, 0.610 at 2.00 GFLOP;" in said(label) for label in labels)


def test_the_console_needs_no_colour() -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(*tables(SPARSE, Path("out")))
    text = said(capture.get())
    assert "phone k=1" in text
    assert "0.610 ± 0.014 *" in text
    assert "*: the best mean of its row" in " ".join(text.split())
    assert "Green" not in text
    assert "Clients’ own models, accuracy (higher is better)" in text


def test_the_set_up_tells_methods_apart() -> None:
    text = markdown(comparison(grid(set={"model.path": "Someone/A-Model"}), {"adapter": None, "LoRA": None}))
    assert "Base model `Someone/A-Model`; data `builtin`; rounds `" in text
    assert "* adapter: `method.temperature: 2.0`\n* LoRA: `method.temperature: 0.0`" in text


def test_the_set_up_changes_one_axis_at_a_time() -> None:
    found = grid(columns={"IID": {"data.partition.alpha": 5.0}, "non-IID": {"data.partition.alpha": 0.5}})
    text = markdown(comparison(found, {"adapter": None, "LoRA": None}))
    assert "* adapter: `method.temperature: 2.0`\n" in text
    assert "* non-IID: `data.partition.alpha: 0.5`" in text


def place_runs(found: Grid, folder: Path, classified: Mapping[str, bool]) -> None:
    for cell in found.cells:
        run = write_run(folder / "runs" / cell.name, clients=4, rounds=cell.config.training.rounds, layers=1, experts=4)
        if classified[cell.method]:
            make_classification(run)
        (run / "rounds" / f"{cell.config.training.rounds:04d}").mkdir(parents=True)
        (run / "rounds" / f"{cell.config.training.rounds:04d}" / "state.json").write_text("{}")
        (run / "final").symlink_to("rounds")


def test_run_folders_are_read_with_their_personal_results(tmp_path: Path) -> None:
    found = grid(seeds=1)
    place_runs(found, tmp_path, {"adapter": True, "LoRA": True})
    read = collect(found, tmp_path, {})
    lines = read_lines(tmp_path / "runs" / found.cells[0].name / "metrics.jsonl")
    last = [line for line in lines if line["event"] == "personal_summary"][-1]
    assert read.headline is CLASSIFICATION
    assert read.cells[0].personal == PersonalResult(
        4, last["mean"], last["worst_decile"], last["spread"], last["loss_mean"]
    )
    assert [said(place.budget) for place in read.places()] == ["k = 1", "k = 2", "k = 4", "k = 8"]


def test_runs_judged_by_different_metrics_are_refused(tmp_path: Path) -> None:
    found = grid(seeds=1)
    place_runs(found, tmp_path, {"adapter": True, "LoRA": False})
    told = r"judged by different metrics \(accuracy in 'adapter, seed 0', ROUGE-L in 'LoRA, seed 0'\), which cannot"
    with pytest.raises(RunFolderError, match=told):
        collect(found, tmp_path, {})


def test_a_part_of_an_arena_says_what_it_leaves_out(tmp_path: Path) -> None:
    place_runs(grid(seeds=1), tmp_path, {"adapter": True, "LoRA": True})
    told = "left out: LoRA_seed-0 (1 in all)."
    part = collect(grids.load({"methods": METHODS, "seeds": 1}, methods=["adapter"]), tmp_path, {})
    assert told in markdown(part)
    assert told in page(part)
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(*tables(part, tmp_path))
    assert told in capture.get()
    assert collect(grid(seeds=1), tmp_path, {}).others == ()
    assert "left out" not in markdown(SPARSE)


def test_nothing_is_judged_before_anything_has_begun(tmp_path: Path) -> None:
    read = collect(grid(), tmp_path, {})
    assert (read.metrics, read.places(), list(read.contests())) == ((), (), [])
    assert "0 of 4 runs are done." in markdown(read)


@given(st.permutations(["phone", "tablet", "laptop"]), st.permutations([1, 2, 4]))
def test_tiers_come_in_the_order_of_their_adapter(names: list[str], active: list[int]) -> None:
    found = grid(seeds=1)
    results = tuple(tier(name, 0.5, 1e9, k) for name, k in zip(names, active, strict=True))
    cells = [CellResult(cell, "done", None, 2, 1, 1, 1, 1, 1, results, CLASSIFICATION) for cell in found.cells]
    places = Comparison(found, tuple(cells)).places()
    assert [said(place.budget) for place in places] == ["k = 1", "k = 2", "k = 4"]
    assert {place.tier: int(place.budget[-1]) for place in places} == dict(zip(names, active, strict=True))
