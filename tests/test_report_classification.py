"""The report of runs that are judged by accuracy, that train a sparse adapter, and whose clients have own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folder_example import TIERS, make_classification, read_lines, write_json, write_lines, write_run
from test_report import Page, plain, report

from emberfed.report.page import summary
from emberfed.report.picture import write_picture
from emberfed.report.reading import read_run
from emberfed.report.views import coefficient_of_variation, shared_tiers, summed_counts, tiers_of, what_tells_apart


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pictures"
    return make_classification(write_run(folder, clients=8, rounds=2, layers=1, experts=4))


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report([run], tmp_path_factory.mktemp("page"))


def lines_of(run: Path, event: str) -> list[Any]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["event"] == event]


def change_info(folder: Path, **values: Any) -> Path:
    write_json(folder / "run.json", {**json.loads((folder / "run.json").read_text()), **values})
    return folder


def test_no_word_of_generation_is_left(page: Page) -> None:
    assert "ROUGE" not in page.source
    assert "erplexity" not in page.source
    assert "per token (lower" not in page.source
    assert "Accuracy (higher is better)" in page.text
    assert "Loss, nats per example (lower is better)" in page.text
    assert "Accuracy by class: the first evaluation" in page.text


def test_quality_table_shows_the_input(run: Path, page: Page) -> None:
    _, *rows = page.tables["Quality of the global model by tier and round"]
    assert [row[0] for row in rows] == ["Accuracy"] * 4 + ["Loss"] * 4
    for row, (tier, top_k) in zip(rows, TIERS, strict=False):
        values = [line["accuracy"] for line in lines_of(run, "evaluation") if line["tier"] == tier]
        assert plain(row[1]) == f"{tier} (k = {top_k})"
        assert row[2:5] == [f"{value:.3f}" for value in values]


def test_the_words_are_those_of_an_adapter(run: Path, page: Page) -> None:
    first, last = (line["accuracy"] for line in lines_of(run, "evaluation")[:: 2 * len(TIERS)])
    assert f"At k = 1 (phone) accuracy rose from {first:.3f} to {last:.3f} in 2 rounds." in plain(page.text)
    assert "at each tier’s k, by round" in page.text
    assert "Experts of the adapter" in page.text
    assert "Share of a client’s activations per expert of the adapter in round 2" in page.text


def test_personal_tables_show_the_input(run: Path, page: Page) -> None:
    head, *rows = page.tables["Clients’ own models, over clients"]
    assert head == ["", "Clients", "Mean accuracy", "Worst tenth", "Standard deviation", "Mean loss"]
    for row, line in zip(rows, lines_of(run, "personal_summary"), strict=True):
        figures = (line["mean"], line["worst_decile"], line["spread"], line["loss_mean"])
        assert row[1:] == ["8", *(f"{figure:.3f}" for figure in figures)]
    assert [row[0] for row in rows] == ["Before training", "Round 1", "Round 2"]
    _, *rows = page.tables["Clients’ own models, from the first evaluation to the last"]
    assert [row[0] for row in rows] == [f"c{number}" for number in range(8)]
    own = [line for line in lines_of(run, "personal") if line["client"] == "c5"]
    assert plain(rows[5][1]) == "tablet (k = 2)"
    assert rows[5][2] == "12"
    assert rows[5][3] == f"{own[0]['accuracy']:.3f} → {own[-1]['accuracy']:.3f}"


def test_personal_models_by_tier_by_hand(tmp_path: Path) -> None:
    """Phones go from 0.2 and 0.4 to 0.5 and 0.9: their means are 0.3 and 0.7, worst and best are what they are."""
    folder = make_classification(write_run(tmp_path / "run", clients=5, rounds=1, layers=1, experts=4))
    scores = {("c0", 0): 0.2, ("c4", 0): 0.4, ("c0", 1): 0.5, ("c4", 1): 0.9}
    lines = read_lines(folder / "metrics.jsonl")
    for line in lines:
        if (key := (line.get("client"), line["round"])) in scores:
            line["accuracy"] = scores[key]
    write_lines(folder / "metrics.jsonl", lines)
    _, phones, *_ = report([folder], tmp_path).tables[
        "Clients’ own models by tier, from the first evaluation to the last"
    ]
    assert phones[1:] == ["2", "0.300 → 0.700", "0.200 → 0.500", "0.400 → 0.900"]


def test_the_figure_of_clients_puts_the_best_first(run: Path, page: Page) -> None:
    told = next(text for text in page.drawings if text.startswith("Accuracy of each client’s own model"))
    last = {line["client"]: line["accuracy"] for line in lines_of(run, "personal") if line["round"] == 2}
    order = [part.split()[0] for part in told.split(": ", 1)[1].split("; ")]
    assert order == sorted(last, key=lambda name: -last[name])


def test_the_summary_tells_of_own_models(run: Path) -> None:
    last = lines_of(run, "personal_summary")[-1]
    assert (
        f"On their own held-out examples, the 8 clients’ own models have a mean accuracy of {last['mean']:.3f} after "
        f"round 2, the worst tenth of them {last['worst_decile']:.3f}."
    ) in summary(read_run(run))


def test_without_personal_lines_there_is_no_section(run: Path, tmp_path: Path) -> None:
    folder = make_classification(write_run(tmp_path / "run", clients=2, rounds=1, layers=1, experts=4))
    lines = [line for line in read_lines(folder / "metrics.jsonl") if not line["event"].startswith("personal")]
    write_lines(folder / "metrics.jsonl", lines)
    assert "own model" not in report([folder], tmp_path).text


def test_a_personal_line_without_accuracy_is_a_dash(tmp_path: Path) -> None:
    folder = make_classification(write_run(tmp_path / "run", clients=4, rounds=1, layers=1, experts=4))
    lines = read_lines(folder / "metrics.jsonl")
    for line in lines:
        if line.get("client") == "c1":
            line["accuracy"] = None
    write_lines(folder / "metrics.jsonl", lines)
    page = report([folder], tmp_path)
    assert page.tables["Clients’ own models, from the first evaluation to the last"][2][3] == "– → –"
    told = next(text for text in page.drawings if text.startswith("Accuracy of each client’s own model"))
    assert told.endswith("c1 – to –.")


def test_runs_with_different_metrics_have_panels_of_their_own(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "words", clients=2, rounds=1, layers=1, experts=4, seed=7)
    page = report([run, other], tmp_path)
    head, first, second = page.tables["Runs side by side: last accuracy or ROUGE-L and its change"]
    columns = [plain(text) for text in head]
    accuracy, rouge = columns.index("Accuracy, phone (k = 1)"), columns.index("ROUGE-L, phone (K = 1)")
    value = [line["accuracy"] for line in lines_of(run, "evaluation") if line["tier"] == "phone"][-1]
    assert first[accuracy].startswith(f"{value:.3f} (+")
    assert (first[rouge], second[accuracy]) == ("–", "–")
    assert "Accuracy or ROUGE-L of every run at each tier’s budget, by round." in page.text
    assert "Accuracy, tablet (k = 2)" in plain(page.text)
    assert "ROUGE-L, tablet (K = 2)" in plain(page.text)


def test_tiers_with_the_same_k_go_by_their_names(tmp_path: Path) -> None:
    """What a tier affords of an adapter that the method does not have tells nothing."""
    folder = make_classification(write_run(tmp_path / "run", clients=4, rounds=1, layers=1, experts=4))
    change_info(folder, experts="model")
    read = read_run(folder)
    assert [tier.label for tier in tiers_of(read)] == ["phone", "tablet", "laptop", "workstation"]
    assert what_tells_apart(tiers_of(read)) == "budget"
    assert "At phone accuracy rose from" in summary(read)
    assert "Experts of the adapter" not in report([folder], tmp_path).text
    assert write_picture(folder, tmp_path / "run.svg").stat().st_size > 1000


def test_a_sparse_adapter_in_one_run_tells_the_tiers_of_all_apart(run: Path, tmp_path: Path) -> None:
    folder = make_classification(write_run(tmp_path / "run", clients=4, rounds=1, layers=1, experts=4))
    plain_run = read_run(change_info(folder, experts="model"))
    labels = [plain(label) for label in shared_tiers([plain_run, read_run(run)]).values()]
    assert labels == ["phone (k = 1)", "tablet (k = 2)", "laptop (k = 4)", "workstation (k = 8)"]


def test_runs_that_disagree_on_a_tier_s_k_share_its_name(run: Path, tmp_path: Path) -> None:
    folder = make_classification(write_run(tmp_path / "run", clients=4, rounds=1, layers=1, experts=4))
    lines = [
        {**line, **({"adapter_top_k": 3} if line.get("tier") == "phone" else {})}
        for line in read_lines(folder / "metrics.jsonl")
    ]
    write_lines(folder / "metrics.jsonl", lines)
    assert "phone" in shared_tiers([read_run(folder), read_run(run)]).values()


def test_an_unknown_metric_is_said(tmp_path: Path) -> None:
    folder = change_info(write_run(tmp_path / "run", clients=2, rounds=1, layers=1, experts=4), metric="bleu")
    (notice,) = read_run(folder).notices
    assert notice.startswith("run.json was left out: metric: input should be 'rouge_l' or 'accuracy'")


def test_use_of_experts_by_hand(tmp_path: Path) -> None:
    """Layer 0: 3+1, 1+3, 0, 0 has mean 2 and standard deviation 2: 1. Layer 1: equal use: 0. Two of 8 never used."""
    folder = write_run(tmp_path / "run", clients=2, rounds=1, layers=2, experts=4)
    counts = {"c0": [[3, 1, 0, 0], [2, 2, 2, 2]], "c1": [[1, 3, 0, 0], [5, 5, 5, 5]]}
    lines = [line | {"activation_counts": counts[line["client"]]} for line in read_lines(folder / "clients.jsonl")]
    write_lines(folder / "clients.jsonl", lines)
    assert summed_counts(read_run(folder), 1) == ((4, 4, 0, 0), (7, 7, 7, 7))
    _, row = report([folder], tmp_path).tables["Use of experts by round, all clients together"]
    assert row == ["1", "8", "2", "0.500", "1.000"]


def test_layers_without_experts_and_clients_without_counts_do_not_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=2, rounds=1, layers=2, experts=4)
    counts = {"c0": [[], [6, 0]], "c1": None}
    lines = [line | {"activation_counts": counts[line["client"]]} for line in read_lines(folder / "clients.jsonl")]
    write_lines(folder / "clients.jsonl", lines)
    _, row = report([folder], tmp_path).tables["Use of experts by round, all clients together"]
    assert row == ["1", "2", "1", "1.000", "1.000"]


def test_variation_of_nothing_is_not_a_number() -> None:
    assert coefficient_of_variation([5, 5]) == 0
    assert str(coefficient_of_variation([0, 0])) == "nan"
    assert str(coefficient_of_variation([])) == "nan"
