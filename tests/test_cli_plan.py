"""`emberfed plan`: what it counts is what a run then reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import invoke, write_config
from federations import config

import emberfed
from emberfed import config as configuration
from emberfed.cli.plan import plan, tables
from emberfed.method import method_names


@pytest.fixture(scope="module")
def values(tiny_model_folder: Path, tiny_data: Path) -> dict[str, Any]:
    """A federation of which one client trains two epochs in micro batches of unequal size."""
    training = {"rounds": 1, "local_epochs": 2, "batch_size": 4, "micro_batch_size": 3}
    return config(tiny_model_folder, tiny_data, training=training)


def test_plan_is_what_a_run_reports(values: dict[str, Any], tmp_path: Path) -> None:
    file = write_config(tmp_path / "tiny.yaml", values)
    plans = plan(configuration.load(file))
    path = emberfed.run(file, output=tmp_path / "run").path
    lines = [json.loads(line) for line in (path / "clients.jsonl").read_text().splitlines()]
    assert [(tier.tier, tier.top_k, tier.clients) for tier in plans] == [
        ("small", 1, 2),
        ("middle", 2, 1),
        ("large", 4, 1),
    ]
    for tier in plans:
        flops = [line["flops"] for line in lines if line["tier"] == tier.tier]
        assert tier.round_flops == sum(flops) // len(flops)
        (down,) = {line["bytes_down"] for line in lines if line["tier"] == tier.tier}
        assert tier.download_bytes == pytest.approx(down, abs=8)  # the client's id is in it
        ups = [line["bytes_up"] for line in lines if line["tier"] == tier.tier]
        assert all(tier.upload_bytes < up < tier.upload_bytes + 12_000 for up in ups)


def test_command_prints_tables_and_json(values: dict[str, Any], tmp_path: Path) -> None:
    file = write_config(tmp_path / "tiny.yaml", values)
    shown = invoke("plan", file)
    assert shown.exit_code == 0
    assert "Largest step" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120
    (small, *_) = json.loads(invoke("plan", file, "--json").stdout)["tiers"]
    assert small["tier"] == "small"
    assert small["step"] == {
        "sequences": 3,
        "length": small["step"]["length"],
        "head_positions": small["step"]["head_positions"],
        "micro_batches": 2,
        "checkpointing": False,
        "anchored": False,
        "adapter_top_k": 0,
    }
    assert small["recomputed_flops"] == 0 < small["memory"]["total_bytes"]
    again = json.loads(invoke("plan", file, "--json", "--set", "training.gradient_checkpointing=true").stdout)
    assert 0 < again["tiers"][0]["recomputed_flops"] < small["forward_flops"]
    assert again["tiers"][0]["memory"]["activation_bytes"] < small["memory"]["activation_bytes"]


def test_every_tier_has_a_row_in_every_table(values: dict[str, Any], tmp_path: Path) -> None:
    plans = plan(configuration.load(write_config(tmp_path / "tiny.yaml", values)))
    *shown, _ = tables(plans)
    assert [table.row_count for table in shown] == [3, 3, 3]  # type: ignore[union-attr]


def test_what_is_wrong_is_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    result = invoke("plan", write_config(tmp_path / "tiny.yaml", values), "--set", "training.batch_sise=2")
    assert result.exit_code == 2
    assert "batch_sise" in result.stderr
    assert invoke("plan", "--help").stdout.count("Example: emberfed plan") == 1


def test_fedprox_holds_a_second_adapter(tiny_model_folder: Path, tiny_data: Path) -> None:
    plain, held = (
        plan(configuration.parse(config(tiny_model_folder, tiny_data, training={"proximal_mu": mu})))
        for mu in (0.0, 0.1)
    )
    for one, other in zip(plain, held, strict=True):
        assert other.memory.adapter_bytes == 2 * one.memory.adapter_bytes
        assert other.memory.total_bytes == one.memory.total_bytes + one.memory.adapter_bytes


@pytest.mark.parametrize("method", [name for name in method_names() if name != "linear_probe"])
def test_plan_counts_what_each_method_sends_and_trains(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Bytes are those of the first round's payloads but for headers; FLOPs those that clients report."""
    values = config(
        tiny_model_folder,
        tiny_data,
        method={"name": method},
        training={"rounds": 1},
        evaluation={"every": 0, "max_examples": 2},
    )
    plans = {found.tier: found for found in plan(configuration.parse(values))}
    run = emberfed.run(values, output=tmp_path / "run")
    lines = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
    for tier, found in plans.items():
        clients = [line for line in lines if line["tier"] == tier]
        assert {line["top_k"] for line in clients} == {found.top_k}
        assert {line["bytes_down"] for line in clients} == {found.download_bytes}
        assert all(0 < line["bytes_up"] - found.upload_bytes < 20_000 for line in clients)
        assert found.round_flops == sum(line["flops"] for line in clients) // len(clients)
