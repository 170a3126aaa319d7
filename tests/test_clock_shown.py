"""What reports, comparisons and commands show of the clients' clock."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import invoke, write_config
from federations import config
from run_folder_example import write_lines, write_run
from test_report import plain, report

from emberfed.arena import grid as grids
from emberfed.arena.markdown import markdown
from emberfed.arena.page import page
from emberfed.arena.results import CellResult, Comparison, TierResult
from emberfed.devices import Device, known_device
from emberfed.errors import ConfigError
from emberfed.metrics import GENERATION
from emberfed.report import numbers


def on_clock(folder: Path, targets: str) -> Path:
    """A run whose rounds take 10 s each, with all tiers at ROUGE-L 0.1, 0.2, ... after round 0, 1, ..."""
    run = write_run(folder, clients=4, rounds=3, layers=1, experts=8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "evaluation":
            line |= {"rouge_l": 0.1 * (line["round"] + 1), "clock_seconds": 10.0 * line["round"]}
    write_lines(run / "metrics.jsonl", lines)
    (run / "config.yaml").write_text(f"{(run / 'config.yaml').read_text()}clock: {{targets: {targets}}}\n")
    return run


def test_a_report_shows_quality_over_seconds_and_when_targets_were_reached(tmp_path: Path) -> None:
    shown = report([on_clock(tmp_path / "run", "[0.35, 0.15, 0.9]")], tmp_path / "page")
    (table,) = (rows for name, rows in shown.tables.items() if name.startswith("Seconds on the clients’ clock"))
    assert [row[0] for row in table[1:]] == ["0.150", "0.350", "0.900"]
    for row, expected in zip(table[1:], ("10.0 s (round 1)", "30.0 s (round 3)", "not reached"), strict=True):
        assert [plain(cell) for cell in row[1:]] == [expected] * 4
    (drawing,) = (text for text in shown.drawings if "against seconds" in text)
    assert "0.100 at 0 s, 0.200 at 10.0 s, 0.300 at 20.0 s, 0.400 at 30.0 s" in plain(drawing)


def test_a_report_shows_a_loss_over_seconds_where_targets_are_losses(tmp_path: Path) -> None:
    """Losses 3, 2.5, 2, 1.5 after 0, 10, 20, 30 s; the easiest target, the highest loss, stands first."""
    run = on_clock(tmp_path / "run", "[1.0, 2.75, 2.0], metric: loss")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [{**line, "loss": 3 - line["round"] / 2} if line["event"] == "evaluation" else line for line in lines]
    write_lines(run / "metrics.jsonl", told)
    shown = report([run], tmp_path / "page")
    (name,) = (name for name in shown.tables if name.startswith("Seconds on the clients’ clock"))
    assert name == "Seconds on the clients’ clock until loss first reached a target"
    found = {row[0]: plain(row[1]) for row in shown.tables[name][1:]}
    assert list(found.items()) == [
        ("2.750", "10.0 s (round 1)"),
        ("2.000", "20.0 s (round 2)"),
        ("1.000", "not reached"),
    ]
    (drawing,) = (text for text in shown.drawings if "against seconds" in text)
    assert "3.000 at 0 s, 2.500 at 10.0 s, 2.000 at 20.0 s, 1.500 at 30.0 s" in plain(drawing)


def test_a_metric_that_is_unknown_is_noticed_and_its_targets_left_out(tmp_path: Path) -> None:
    shown = report([on_clock(tmp_path / "run", "[0.15], metric: lost")], tmp_path / "page")
    assert "clock.metric is 'lost', which is unknown; its targets are left out." in shown.text
    assert not any(name.startswith("Seconds on the clients’ clock") for name in shown.tables)


def test_a_run_without_a_clock_has_no_such_section(tmp_path: Path) -> None:
    shown = report([write_run(tmp_path / "run", clients=4, rounds=1, layers=1, experts=8)], tmp_path / "page")
    assert "clients’ clock" not in shown.text


@pytest.mark.parametrize("targets", ["[a, true, 0.15]", "none", "3"])
def test_targets_that_are_no_numbers_are_left_out(targets: str, tmp_path: Path) -> None:
    shown = report([on_clock(tmp_path / "run", targets)], tmp_path / "page")
    tables = [rows for name, rows in shown.tables.items() if name.startswith("Seconds on the clients’ clock")]
    assert [row[0] for rows in tables for row in rows[1:]] == (["0.150"] if "0.15" in targets else [])


def tier(curve: Sequence[tuple[float, float]]) -> TierResult:
    quality = {"rouge_l": curve[-1][1], "loss": 1.0}
    return TierResult(
        "all", 1, quality, {"rouge_l": curve[0][1], "loss": 2.0}, 10, 1.0, 1.0, 1.0, 1.0, 1.0, curve=tuple(curve)
    )


DEVICES = {"clock.targets": [0.2, 0.4], "clients.tiers": [{"name": "all", "share": 1.0, "top_k": 1, "device": "l20"}]}
CURVES: Mapping[str, Sequence[Sequence[tuple[float, float]]]] = {
    "slow": ([(0.0, 0.1), (40.0, 0.2), (80.0, 0.4)], [(0.0, 0.1), (60.0, 0.3), (120.0, 0.5)]),
    "fast": ([(0.0, 0.1), (10.0, 0.2), (20.0, 0.3)], [(0.0, 0.1), (30.0, 0.2), (40.0, 0.4)]),
}


def comparison(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]] = CURVES, **keys: Any) -> Comparison:
    """Two methods, two seeds: the curves above, or others."""
    methods = {"slow": {"method": {"name": "a3smoe"}}, "fast": {"method": {"name": "homolora"}}}
    grid = grids.load({"methods": methods, "set": DEVICES, "seeds": 2, **keys})
    cells = (
        CellResult(cell, "done", None, 2, 1.0, 1.0, 1.0, 1.0, 1.0, (tier(curves[cell.method][cell.seed]),), GENERATION)
        for cell in grid.cells
    )
    return Comparison(grid, tuple(cells))


def test_times_and_speed_ups_by_hand() -> None:
    """0.2: slow after 40 and 60 s, fast after 10 and 30 s; means 50 and 20: 2.5 times. 0.4: fast did with one seed."""
    found = comparison()
    (place,) = found.places()
    assert found.times_to(place, "slow", 0.2) == (40.0, 60.0)
    assert found.speed_up(place, "fast", 0.2) == 2.5
    assert found.times_to(place, "fast", 0.4) == (math.inf, 40.0)
    assert math.isnan(found.speed_up(place, "fast", 0.4))
    assert found.curve(place, "fast") == ((0.0, 0.1), (20.0, 0.2), (30.0, pytest.approx(0.35)))
    text = markdown(found).replace(numbers.SPACE, " ")
    table = text.split("## Time to accuracy\n\n")[1].split("\n\n")[1]
    assert table == (
        "| of | slow | fast |\n| :-- | --: | --: |\n"
        "| all (K = 1) · 0.200 | 50.0 s | 20.0 s (2.50×) |\n"
        "| all (K = 1) · 0.400 | 1 min 40 s | 1 of 2 reached it |"
    )


def test_speed_ups_are_against_the_named_reference() -> None:
    found = comparison(reference="fast")
    (place,) = found.places()
    assert (found.speed_up(place, "slow", 0.2), found.speed_up(place, "fast", 0.2)) == (0.4, 1.0)
    document = found.json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    first = document["time_to_accuracy"][0]
    assert (first["contestant"], first["target"], first["clock_seconds"]) == ("slow", 0.2, [40.0, 60.0])
    assert (first["reference"], first["speed_up"]) == ("fast", 0.4)
    assert document["time_to_accuracy"][3]["clock_seconds"] == [None, 40.0]
    shown = page(found).replace(numbers.SPACE, " ")
    assert "50.0 s (0.40×)" in shown
    assert "times sooner that is than fast" in shown


LOSSES = {"clock.metric": "loss", "clock.targets": [2.0, 2.5], "clients.tiers": DEVICES["clients.tiers"]}


def test_times_and_speed_ups_to_a_loss_by_hand() -> None:
    """Where ROUGE-L was q, let the loss be 3 - 2.5 q, so that 2.5 and 2 are where 0.2 and 0.4 were: the same times."""
    losses = {name: [[(at, 3 - 2.5 * q) for at, q in curve] for curve in curves] for name, curves in CURVES.items()}
    found = comparison(losses, set=LOSSES)
    (place,) = found.places()
    assert found.targets == (2.5, 2.0)
    assert found.times_to(place, "slow", 2.5) == (40.0, 60.0)
    assert found.speed_up(place, "fast", 2.5) == 2.5
    text = markdown(found).replace(numbers.SPACE, " ")
    assert "until loss first reached the target" in text
    assert text.split("## Time to loss\n\n")[1].split("\n\n")[1].splitlines()[2:] == [
        "| all (K = 1) · 2.500 | 50.0 s | 20.0 s (2.50×) |",
        "| all (K = 1) · 2.000 | 1 min 40 s | 1 of 2 reached it |",
    ]
    document = found.json()
    assert document["clock_metric"] == "loss"
    assert [(one["metric"], one["target"]) for one in document["time_to_accuracy"][:2]] == [
        ("loss", 2.5),
        ("loss", 2.0),
    ]
    shown = page(found)
    assert "Response loss against seconds" in shown
    assert "Loss, nats per token" in shown


def test_runs_of_an_arena_aim_at_one_metric() -> None:
    methods = {"slow": {}, "fast": {"clock.metric": "loss"}}
    with pytest.raises(ConfigError, match="has clock.metric headline and .*fast.* has loss, whose targets cannot be"):
        grids.load({"base": "quickstart", "methods": methods, "seeds": 1})


@pytest.mark.parametrize(("factor", "words"), [(2, "clients’ clock<"), (20, "clients’ clock, logarithmic<")])
def test_time_is_logarithmic_where_one_method_would_crush_another(factor: float, words: str) -> None:
    """Ends at 20 and 40 s share a linear axis; at 20 and 400 s they do not, and ticks are 1 and 3 times powers of 10.

    The first evaluation after 0 is at 10 s, the last at 400 s: 10, 30, 100, 300, beside 0.
    """
    slow, fast = ([(0.0, 0.1), (10.0 * by, 0.3), (20.0 * by, 0.4)] for by in (factor, 1))
    section = (
        page(comparison({"slow": (slow, slow), "fast": (fast, fast)})).split('id="clock"')[1].split("</figure>")[0]
    )
    assert words in section
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", section)
    assert {"0.200", "0.400"} <= set(labels), "targets are named"
    if factor == 20:
        assert labels[:5] == ["0", "10", "30", "100", "300"]


def test_a_reference_is_one_of_the_methods() -> None:
    with pytest.raises(ConfigError, match="reference names the method 'fats'; did you mean 'fast'"):
        comparison(reference="fats")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0 s"), (0.00123, "0.00123 s"), (9.5, "9.5 s"), (20.0, "20.0 s"), (100, "1 min 40 s"), (math.inf, "never")],
)
def test_seconds_of_the_clock_as_people_read_them(value: float, shown: str) -> None:
    assert plain(numbers.clock(value)) == shown


@pytest.mark.slow
def test_doctor_measures_this_machine_as_a_tier_s_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = Device.model_validate(json.loads(invoke("doctor", "--measure", "--json").stdout)["device"])
    assert found.name == "measured"
    assert "network assumed" in found.source
    assert found.memory_bytes == psutil.virtual_memory().total
    assert 1e8 < found.flops_per_second < 1e15
    assert 1e8 < found.memory_bytes_per_second < 1e14
    assert 1e6 < found.disk_bytes_per_second < 1e12
    assert list((tmp_path / "runs").iterdir()) == [], "the file that was read is gone"


def test_plan_says_how_long_a_client_takes_at_least(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """FLOP over the rate and bytes over theirs; in a run memory traffic comes on top."""
    values = config(tiny_model_folder, tiny_data)
    for tier_ in values["clients"]["tiers"]:
        tier_["device"] = "phone"
    phone = known_device("phone")
    told = invoke("plan", write_config(tmp_path / "tiny.yaml", values), "--json")
    for planned in json.loads(told.stdout)["tiers"]:
        network = planned["download_bytes"] / phone.download_bytes_per_second
        network += planned["upload_bytes"] / phone.upload_bytes_per_second
        assert planned["clock_seconds"] == pytest.approx(network + planned["round_flops"] / phone.flops_per_second)
