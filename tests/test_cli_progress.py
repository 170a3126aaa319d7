"""What the command line shows: progress on a terminal and elsewhere, time left, the summary at the end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from run_folder_example import make_classification, write_run

from emberfed import events
from emberfed.cli import tables
from emberfed.cli.progress import Bars, Lines, Plan, Position
from emberfed.cli.summary import summarise
from emberfed.metrics import CLASSIFICATION, GENERATION


def quickstart_events() -> list[events.Event]:
    """What a run of two clients, one tier and one round says, with one client that fails."""
    return [
        events.RoundStarted(0, 1, 0),
        events.EvaluationProgress(0, "phone", 1, 2),
        events.EvaluationProgress(0, "phone", 2, 2),
        events.RoundDone(0, {"phone": 0.25}, 3.0),
        events.RoundStarted(1, 1, 2),
        events.Step("c0", 1, 1, 2.5),
        events.ClientDone(1, "c0", None),
        events.ClientDone(1, "c1", "failed: [bold]no[/bold] memory"),
        events.Notice("warning", "look [here]"),
        events.EvaluationProgress(1, "phone", 2, 2),
        events.RoundDone(1, {"phone": 0.5}, 4.0),
    ]


def test_bars_keep_rounds_and_problems_above_them() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80, markup=False, highlight=False, color_system=None)
    with Bars(Plan(rounds=1, clients=2, tiers=1, every=1, headline=GENERATION), console) as bars:
        for event in quickstart_events():
            bars(event)
        assert bars.position.done == bars.position.plan.total == 4
    text = terminal.getvalue().replace("\xa0", " ")
    for line in (
        "before         3.00 s  phone 0.250",
        "round 1        4.00 s  phone 0.500",
        "round 1: client c1 failed: [bold]no[/bold] memory",
        "warning: look [here]",
    ):
        assert line in text, line
    assert text.count("ROUGE-L by tier") == 1


def test_lines_are_one_per_client_and_round(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines(Plan(rounds=1, clients=2, tiers=1, every=1, headline=GENERATION)) as lines:
        for event in quickstart_events():
            lines(event)
    assert capsys.readouterr().err.splitlines() == [
        "before training: evaluating",
        "before training: done in 3.00 s, ROUGE-L phone 0.250",
        "round 1 of 1: 2 clients to train",
        "round 1: client c0 done (1 of 2), 1 step, loss 2.50",
        "round 1: client c1 failed: [bold]no[/bold] memory",
        "warning: look [here]",
        "round 1 of 1: done in 4.00 s, ROUGE-L phone 0.500",
    ]


def test_scores_are_called_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(rounds=1, clients=2, tiers=1, every=1, headline=CLASSIFICATION)
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=80, markup=False, highlight=False, color_system=None)
    for display in (Lines(plan), Bars(plan, console)):
        with display:
            for event in quickstart_events():
                display(event)
    assert "before training: done in 3.00 s, accuracy phone 0.250" in capsys.readouterr().err.splitlines()
    assert drawn.getvalue().count("accuracy by tier") == 1


def test_the_plan_counts_work_by_hand() -> None:
    """4 rounds of 3 clients; evaluations of 2 tiers before round 1, after rounds 2 and 4 (every 2nd and the last)."""
    plan = Plan(rounds=4, clients=3, tiers=2, every=2, headline=GENERATION)
    assert plan.total == 4 * 3 + 3 * 2
    assert plan.units(range(3)) == 2 + 3 + 3 + 2
    assert Plan(rounds=0, clients=0, tiers=5, every=0, headline=GENERATION).total == 5
    assert Plan(rounds=3, clients=1, tiers=1, every=0, headline=GENERATION).total == 3 + 2


def test_time_left_by_hand() -> None:
    """2 clients took 10 s each, a tier 3 s; left: 2 clients of this round, 4 of the next, 1 + 1 tiers."""
    position = Position(Plan(rounds=2, clients=4, tiers=1, every=1, headline=GENERATION), 100.0)
    assert position.seconds_left is None
    position = position.after(events.EvaluationProgress(0, "phone", 4, 4), 103.0)
    assert position.seconds_left is None, "nobody has trained yet"
    position = position.after(events.RoundStarted(1, 2, 4), 104.0)
    position = position.after(events.ClientDone(1, "c0", None), 114.0)
    position = position.after(events.ClientDone(1, "c1", "failed: no"), 124.0)
    assert position.seconds_left == pytest.approx(6 * 10 + 2 * 3)
    assert position.done == 1 + 2


@given(
    rounds=st.integers(1, 4),
    clients=st.integers(1, 5),
    tiers=st.integers(1, 4),
    every=st.integers(0, 3),
    kept=st.integers(0, 4),
    steps=st.integers(1, 3),
)
def test_progress_never_goes_back_and_ends_at_the_end(
    rounds: int, clients: int, tiers: int, every: int, kept: int, steps: int
) -> None:
    """Any run, the first round of it resumed with some clients already kept."""
    plan = Plan(rounds, clients, tiers, every, GENERATION)
    heard: list[events.Event] = []
    for round in range(rounds + 1):
        waiting = 0 if round == 0 else max(clients - kept, 0) if round == 1 else clients
        heard.append(events.RoundStarted(round, rounds, waiting))
        for client in range(waiting):
            heard += [events.Step(f"c{client}", step + 1, steps, 1.0) for step in range(steps)]
            heard.append(events.ClientDone(round, f"c{client}", None))
        if plan.evaluated(round):
            heard += [events.EvaluationProgress(round, f"t{tier}", done, 2) for tier in range(tiers) for done in (1, 2)]
        heard.append(events.RoundDone(round, {}, 1.0))
    position = Position(plan, 0.0)
    for second, event in enumerate(heard, start=1):
        after = position.after(event, float(second))
        assert after.done >= position.done, event
        assert after.seconds_left is None or after.seconds_left >= 0
        position = after
    assert position.done == pytest.approx(plan.total)
    assert position.seconds_left in (None, 0.0) if kept >= clients and rounds == 1 else position.seconds_left == 0


def test_the_summary_adds_up(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["event"] == "round"]
    summary = summarise(path)
    assert summary.rounds == 3
    assert summary.bytes_down == sum(line["bytes_down"] for line in rounds)
    before = sum(line["seconds"] for line in lines if line["event"] == "evaluation" and line["round"] == 0)
    assert summary.seconds == pytest.approx(before + sum(line["seconds"] for line in rounds))
    assert summary.problems == ("round 2: client c3 failed: non-finite loss at step 4",)
    assert [tier.top_k for tier in summary.tiers] == [1, 2, 4, 8]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit(tmp_path: Path, width: int) -> None:
    """No number is cut off, whatever the width of the terminal."""
    summary = summarise(write_run(tmp_path / "run"))
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(tables.quality(summary), tables.costs(summary))
    text = capture.get()
    assert max(len(line) for line in text.splitlines()) <= width
    for tier in summary.tiers:
        assert f"{tier.before['rouge_l']:.3f} → {tier.after['rouge_l']:.3f}" in text
    assert "…" not in text


def test_a_run_without_metrics_has_a_summary(tmp_path: Path) -> None:
    """Nothing recorded is null in JSON, not zero."""
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    summary = summarise(tmp_path)
    assert summary.tiers == ()
    assert summary.rounds == 0
    assert summary.seconds != summary.seconds, "not a number: nothing was recorded"


def printed(*renderables: RenderableType) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(*renderables)
    return " ".join(capture.get().split())


def test_a_classifier_s_summary(tmp_path: Path) -> None:
    """What is shown and what is JSON: accuracy, the adapter's k, and the clients' own models."""
    summary = summarise(make_classification(write_run(tmp_path / "run")))
    text = printed(tables.quality(summary), *tables.personal(summary), tables.next_steps(summary))
    assert "Tier k Accuracy Change Loss Change" in text
    first, last = summary.personal
    assert f"own models mean accuracy {first.mean:.3f} → {last.mean:.3f}, worst tenth {first.worst_decile:.3f}" in text
    assert "over 8 clients" in text
    assert "--adapter-top-k 1,2,4,8" in text
    values = summary.json()
    assert values["metric"] == "accuracy"
    assert [tier["adapter_top_k"] for tier in values["tiers"]] == [1, 2, 4, 8]
    assert values["tiers"][0]["accuracy_after"] == summary.tiers[0].after["accuracy"]
    assert values["personal"][1]["worst_decile"] == last.worst_decile
    json.dumps(values)


def test_tiers_that_activate_the_same_have_no_column_of_it(tmp_path: Path) -> None:
    path = make_classification(write_run(tmp_path / "run", clients=4, rounds=1, layers=1, experts=4))
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "experts": "model"}))
    text = printed(tables.quality(summarise(path)), tables.next_steps(summarise(path)))
    assert "Tier Accuracy Change Loss Change" in text
    assert "--top-k" not in text


def test_a_run_without_own_models_has_no_line_on_them(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path / "run", clients=2, rounds=1, layers=1, experts=4))
    assert tables.personal(summary) == ()
    assert summary.json()["personal"] == []


def test_evaluations_of_a_classifier() -> None:
    """The number that differs is shown; a figure that overflowed is a dash."""
    shared = {"round": 2, "top_k": 1, "examples": 9, "loss": 1.5, "seconds": 2.0}
    lines: list[dict[str, Any]] = [
        {**shared, "tier": "k=1", "adapter_top_k": 1, "accuracy": 0.25, "categories": _classes(0.25, 0.5)},
        {**shared, "tier": "k=2", "adapter_top_k": 2, "accuracy": None, "categories": _classes(0.125, 0.75)},
    ]
    text = printed(tables.evaluations(lines))
    assert "Tier k Accuracy Loss Time" in text
    assert "k=1 1 0.250 1.500 2.00 s" in text
    assert "k=2 2 – 1.500 2.00 s" in text
    text = printed(tables.categories(lines))
    assert text.startswith("Accuracy by class Class Examples k = 1 k = 2")
    assert "ring 3 0.500 0.750" in text


def _classes(disc: float, ring: float) -> dict[str, dict[str, float]]:
    scores = {"disc": disc, "ring": ring}
    return {name: {"accuracy": accuracy, "loss": 1.0, "examples": 3} for name, accuracy in scores.items()}


def test_evaluations_of_a_generator() -> None:
    line = {"round": 1, "tier": "phone", "top_k": 1, "examples": 9, "rouge_l": 0.25, "loss": 1.0, "seconds": 2.0}
    text = printed(tables.evaluations([{**line, "perplexity": 2.718}]))
    assert "Tier K ROUGE-L Loss Perplexity Time" in text
    assert "phone 1 0.250 1.000 2.72 2.00 s" in text


def test_a_comparison_s_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    result = invoke("resume", tmp_path)
    assert result.exit_code != 0
    assert "is the folder of a comparison: repeat `emberfed compare` to go on with it" in " ".join(
        result.stderr.split()
    )
