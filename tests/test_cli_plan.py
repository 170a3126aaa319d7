"""`emberfed plan`: what it counts is what a run then reports."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from commands import invoke, write_config
from federations import config
from hypothesis import given
from hypothesis import strategies as st

import emberfed
from emberfed import config as configuration
from emberfed.cli.plan import TierPlan, plan, reached, tables, warnings
from emberfed.devices import Device
from emberfed.federated_experts import ExpertTuningConfig
from emberfed.method import load_method, method_names


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


COUNTED_OFTEN = ("a3smoe", "fft_moe", "flora", "flux")
"""Each sends something else; `make test-slow` counts all methods."""


@pytest.mark.parametrize(
    "method",
    [
        name if name in COUNTED_OFTEN else pytest.param(name, marks=pytest.mark.slow)
        for name in method_names()
        if name != "linear_probe"
    ],
)
def test_plan_counts_what_each_method_sends_and_trains(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Bytes are those of the first round's payloads but for headers; FLOPs those that clients report.

    Where clients hold few experts, FLOPs depend on what their data use, and are about those.
    """
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
        assert all(abs(line["bytes_down"] - found.download_bytes) <= 16 for line in clients)
        assert all(0 < line["bytes_up"] - found.upload_bytes < 20_000 for line in clients)
        flops = sum(line["flops"] for line in clients) // len(clients)
        exact = load_method(method).AdapterConfig is not ExpertTuningConfig
        assert found.round_flops == flops if exact else found.round_flops == pytest.approx(flops, rel=0.3)
        read = [line["disk_bytes"] for line in clients]
        assert found.disk_bytes >= sum(read) // len(read)
        assert (found.disk_bytes == 0) == (max(read) == 0)


EXPERT_BYTES = 3 * 16 * 32 * 4
"""Of the tiny model, which has 2 layers of 8."""


def rooms(*held: int) -> list[dict[str, Any]]:
    """Tiers that differ in how many experts they hold."""
    return [
        {"name": f"t{number}", "share": 1 / len(held), "top_k": 2, "tuned_experts": 2, "held_experts": number}
        for number in held
    ]


@pytest.mark.parametrize("method", ["flux", "fmes", "fmd"])
def test_memory_grows_by_the_experts_that_are_held(method: str, tiny_model_folder: Path, tiny_data: Path) -> None:
    tiers = rooms(6, 7, 10, 16)
    values = config(tiny_model_folder, tiny_data, method={"name": method}, clients={"tiers": tiers})
    plans = plan(configuration.parse(values))
    assert [found.held_experts for found in plans] == [6, 7, 10, 16]
    first, *_ = (found.memory for found in plans)
    grown = [found.memory.weight_bytes - first.weight_bytes for found in plans]
    assert grown == [number * EXPERT_BYTES for number in (0, 1, 4, 10)]
    assert {found.memory.adapter_bytes for found in plans} == {first.adapter_bytes}
    whole = plan(configuration.parse(config(tiny_model_folder, tiny_data)))[0].memory.weight_bytes
    assert plans[-1].memory.weight_bytes == whole


def test_experts_in_few_bits_take_less(tiny_model_folder: Path, tiny_data: Path) -> None:
    """4 and 8 bits an expert's weight instead of 32, and as much for scales and minima of its groups."""
    clients = {"tiers": rooms(16)}
    found = {}
    for bits in (4, 8):
        method = {"name": "fmq", "bits": bits}
        (found[bits],) = plan(configuration.parse(config(tiny_model_folder, tiny_data, method=method, clients=clients)))
    assert found[8].memory.weight_bytes - found[4].memory.weight_bytes == 16 * EXPERT_BYTES // 8
    assert (found[4].tuned_experts, found[4].held_experts) == (None, None)


def test_memory_is_that_of_the_round_that_trains_most(tiny_model_folder: Path, tiny_data: Path) -> None:
    """FLUX trains 1 expert of 4 in round 1, and all from round 2 on; what it sends is that of round 1."""
    tiers = [{**tier, "tuned_experts": 4} for tier in rooms(8)]
    method = {"name": "flux", "epsilon_first": 0.25, "epsilon_last": 1.0, "epsilon_rounds": 2}
    found: list[TierPlan] = []
    for rounds in (1, 2):
        training = {"rounds": rounds}
        values = config(
            tiny_model_folder,
            tiny_data,
            method=method,
            clients={"tiers": tiers},
            training=training,
            adapter={"rank": 2},
        )
        found += plan(configuration.parse(values))
    one, two = found
    assert two.memory.adapter_bytes == 4 * one.memory.adapter_bytes
    assert two.upload_bytes == one.upload_bytes
    assert two.memory.total_bytes > one.memory.total_bytes


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
def test_reached_counts_the_draws(members: int, choices: int, top_k: int) -> None:
    choices = max(members, choices, top_k)
    draws = list(itertools.combinations(range(choices), top_k))
    expected = sum(any(chosen < members for chosen in draw) for draw in draws) / len(draws)
    assert reached(members, choices, top_k) == pytest.approx(expected)


def test_a_device_that_is_too_small(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """One line for each tier that does not fit: what it needs, what there is, and what to do."""
    device = Device(
        name="tiny",
        flops_per_second=1e9,
        memory_bytes_per_second=1e9,
        memory_bytes=300_000,
        disk_bytes_per_second=1e9,
        download_bytes_per_second=1e6,
        upload_bytes_per_second=1e6,
    )
    roomy = device.model_copy(update={"name": "roomy", "memory_bytes": 10**9})
    tiers = rooms(6, 16)
    for tier, own in zip(tiers, (device, roomy), strict=True):
        tier["device"] = own.model_dump()
    values = config(tiny_model_folder, tiny_data, method={"name": "flux"}, clients={"tiers": tiers})
    small, large = plan(configuration.parse(values))
    assert small.memory.total_bytes > 300_000
    [line] = warnings([small, large])
    assert line.startswith("tier 't6' needs ")
    assert "but its device has 300\xa0kB; lower its held_experts, or training.micro_batch_size (or batch_size)" in line
    file = write_config(tmp_path / "few.yaml", values)
    shown = invoke("plan", file)
    assert f"warning: {line}".replace("\xa0", " ") in " ".join(shown.stdout.split())
    assert "Tuned" in shown.stdout
    assert json.loads(invoke("plan", file, "--json").stdout)["warnings"] == [line]
    seconds = large.download_bytes / 1e6 + large.upload_bytes / 1e6 + large.round_flops / 1e9
    assert large.clock_seconds == pytest.approx(seconds)
