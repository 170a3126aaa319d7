"""The clock: hand-computed seconds, what must hold of any, targets, the deadline, and runs on it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from federations import Vision, bits, config
from hypothesis import given
from hypothesis import strategies as st

import emberfed
from emberfed.clock import (
    ClientTime,
    ClockConfig,
    Effort,
    ServerClock,
    client_seconds,
    client_time,
    elapsed,
    lateness,
    newly_reached,
    round_seconds,
    server_seconds,
    work_seconds,
)
from emberfed.devices import Device
from emberfed.errors import ConfigError, RoundFailed
from emberfed.metrics import CLASSIFICATION, Aim, aimed_at
from emberfed.sections import validate

BOX = Device(
    name="box",
    flops_per_second=2e9,
    memory_bytes_per_second=4e9,
    memory_bytes=8_000_000_000,
    disk_bytes_per_second=5e8,
    download_bytes_per_second=1e6,
    upload_bytes_per_second=5e5,
)
amounts = st.floats(0, 1e15)
parts = st.lists(st.builds(ClientTime, st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=5)


def test_a_client_s_seconds_by_hand() -> None:
    """6 GFLOP at 2 GFLOP/s are 3 s; 8 GB at 4 GB/s are 2 s; 1 GB from disk at 0.5 GB/s is 2 s: 7 s.

    4 MB down at 1 MB/s are 4 s, and 1 MB up at 0.5 MB/s is 2 s: 13 s in all.
    """
    effort = Effort(flops=6e9, memory_traffic_bytes=8e9, disk_bytes=1e9)
    assert work_seconds(BOX, effort) == 7.0
    assert client_seconds(BOX, effort, 4_000_000, 1_000_000) == 13.0


def test_stats_without_some_kind_of_work_count_none_of_it() -> None:
    """2 GFLOP are 1 s, 0.5 GB from disk and 1 MB down too; 4 GFLOP and 12 GB of idle work are 2 + 3 s."""
    assert client_time(BOX, {"flops": 2e9}, 0, 0) == ClientTime(1.0, 0.0)
    stats = {"flops": 2e9, "disk_bytes": 5e8, "idle_flops": 4e9, "idle_memory_traffic_bytes": 12e9, "steps": 3}
    assert client_time(BOX, stats, 1_000_000, 0) == ClientTime(1.0 + 1.0 + 1.0, 5.0)


def test_a_round_waits_for_the_slowest_client_and_for_idle_work_beyond_the_server_s() -> None:
    """Clients of 5 and 9 s and 1 s on the server: 10 s. Six idle seconds of the first hide behind that: 11 > 10."""
    assert round_seconds([ClientTime(5.0), ClientTime(9.0)], 1.0) == 10.0
    assert round_seconds([ClientTime(5.0, 4.0), ClientTime(9.0)], 1.0) == 10.0
    assert round_seconds([ClientTime(5.0, 6.0), ClientTime(9.0)], 1.0) == 11.0


def test_a_missed_deadline_is_waited_for() -> None:
    assert round_seconds([ClientTime(5.0), ClientTime(9.0)], 1.0, missed_deadline=20.0) == 21.0
    assert round_seconds([], 0.5, missed_deadline=20.0) == 20.5


def test_the_server_s_seconds_by_hand() -> None:
    assert server_seconds(ServerClock(memory_bytes_per_second=2e9), 500_000_000) == 0.25


@given(amounts, amounts, amounts, amounts, amounts, amounts)
def test_more_work_never_takes_less(
    flops: float, traffic: float, disk: float, more_flops: float, more_traffic: float, more_disk: float
) -> None:
    less = work_seconds(BOX, Effort(flops, traffic, disk))
    assert work_seconds(BOX, Effort(flops + more_flops, traffic + more_traffic, disk + more_disk)) >= less >= 0


@given(amounts, amounts, amounts, st.floats(1, 100))
def test_a_faster_device_never_takes_longer(flops: float, traffic: float, disk: float, factor: float) -> None:
    rates = ("flops_per_second", "memory_bytes_per_second", "disk_bytes_per_second", "upload_bytes_per_second")
    effort = Effort(flops, traffic, disk)
    slow = client_seconds(BOX, effort, 10, 10)
    for rate in rates:
        faster = BOX.model_copy(update={rate: getattr(BOX, rate) * factor})
        assert client_seconds(faster, effort, 10, 10) <= slow


@given(parts, st.floats(0, 1e6))
def test_a_round_is_never_shorter_than_any_part_of_it(clients: list[ClientTime], server: float) -> None:
    seconds = round_seconds(clients, server)
    assert all(seconds >= part.busy_seconds + max(part.idle_seconds, server) for part in clients if not server)
    assert all(
        seconds >= part.busy_seconds + server and seconds >= part.busy_seconds + part.idle_seconds for part in clients
    )
    assert round_seconds(clients[::-1], server) == seconds, "the order of clients is nothing"
    assert round_seconds([*clients, clients[0]], server) == seconds


def test_who_is_late() -> None:
    timed = ClockConfig(deadline_seconds=2.5)
    assert lateness(timed, 2.5) is None
    assert lateness(ClockConfig(), 1e9) is None
    assert lateness(timed, 2.75) == "missed the deadline: 2.75 s on its device, clock.deadline_seconds is 2.5"


def evaluation(round: int, tier: str, accuracy: float, seconds: float, loss: float | None = 1.0) -> dict[str, Any]:
    place = {"round": round, "event": "evaluation", "tier": tier}
    return {**place, "accuracy": accuracy, "loss": loss, "clock_seconds": seconds}


def test_a_target_is_told_once_when_it_is_first_reached() -> None:
    targets = ClockConfig(targets=[0.5, 0.25])
    first = newly_reached(targets, [evaluation(1, "a", 0.3, 4.0), evaluation(1, "b", 0.1, 4.0)], [])
    line = {"round": 1, "event": "time_to_accuracy", "tier": "a", "metric": "accuracy"}
    assert first == [{**line, "target": 0.25, "clock_seconds": 4.0}]
    later = [evaluation(2, "a", 0.5, 9.0), evaluation(2, "b", 0.7, 9.0)]
    second = newly_reached(targets, later, [evaluation(1, "a", 0.3, 4.0), *first])
    assert [(row["tier"], row["target"]) for row in second] == [("a", 0.5), ("b", 0.25), ("b", 0.5)]
    assert newly_reached(targets, [evaluation(3, "a", 0.9, 12.0)], [*first, *second]) == []


def test_a_loss_is_reached_from_above() -> None:
    """Targets 2 and 1.5: 1.75 reaches the first alone, 1.5 exactly both. A loss that overflowed (null) reaches none."""
    aimed = ClockConfig(metric="loss", targets=[1.5, 2.0])
    first = newly_reached(aimed, [evaluation(1, "a", 0.9, 4.0, 1.75), evaluation(1, "b", 0.9, 4.0, None)], [])
    line = {"round": 1, "event": "time_to_accuracy", "tier": "a", "metric": "loss"}
    assert first == [{**line, "target": 2.0, "clock_seconds": 4.0}]
    later = [evaluation(2, "a", 0.0, 9.0, 2.5), evaluation(2, "b", 0.0, 9.0, 1.5)]
    second = newly_reached(aimed, later, first)
    assert [(row["tier"], row["target"]) for row in second] == [("b", 2.0), ("b", 1.5)], "the easiest first"


@given(st.sampled_from(["headline", "loss"]), st.floats(0.01, 9), st.lists(st.floats(0.01, 9), min_size=1))
def test_who_reaches_a_target_has_reached_all_easier_ones(aim: Aim, value: float, targets: list[float]) -> None:
    metric = aimed_at(CLASSIFICATION, aim)
    found = [metric.reached(value, target) for target in metric.easiest_first(targets)]
    assert found == sorted(found, reverse=True)
    assert metric.reached(value, value)
    assert not metric.reached(math.nan, value)


def test_a_loss_may_be_aimed_at_above_1() -> None:
    assert validate(ClockConfig, {"metric": "loss", "targets": [2.5, 0.5]}, "clock").targets == [2.5, 0.5]


def test_elapsed_is_of_the_newest_line() -> None:
    assert elapsed([]) == 0.0
    rounds: list[dict[str, Any]] = [{"event": "round", "clock_total_seconds": 2.0}, {"event": "evaluation"}]
    assert elapsed([*rounds, {"event": "round", "clock_total_seconds": 3.5}]) == 3.5


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"deadline_seconds": 0}, "clock.deadline_seconds.*greater than 0"),
        ({"targets": [0.5, 0]}, "targets must lie above 0 and be 1 at most, found 0"),
        ({"targets": [1.5]}, "targets must lie above 0 and be 1 at most, found 1.5"),
        ({"targets": [1.5]}, r"found 1.5 \(values of clock.metric: headline\)"),
        ({"metric": "loss", "targets": [2, 0]}, r"lie above 0, found 0 \(values of clock.metric: loss\)"),
        ({"metric": "loss", "targets": [-1]}, "lie above 0, found -1"),
        ({"metric": "loss", "targets": [float("inf")]}, "clock.targets.0.*finite number, found inf"),
        ({"metric": "accuracy"}, "clock.metric.*'headline' or 'loss'"),
        ({"targets": [0.5, 0.5]}, "targets must differ"),
        ({"deadline": 3}, "unknown key 'clock.deadline'; did you mean 'deadline_seconds'"),
        (
            {"server": {"memory_bytes_per_second": -1}},
            "clock.server.memory_bytes_per_second.*greater than or equal to 1",
        ),
    ],
)
def test_bad_settings_are_told_by_their_key(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(ClockConfig, section, "clock")


TIERS = [
    {"name": "slow", "share": 0.5, "top_k": 1, "rank": 2, "device": {**BOX.model_dump(), "flops_per_second": 2e7}},
    {"name": "fast", "share": 0.5, "top_k": 2, "rank": 3, "device": BOX.model_dump()},
]


def timed(model: Path, data: Path, **sections: Any) -> dict[str, Any]:
    """Return the tiny federation's config, with devices: two clients are a hundred times slower than two others."""
    return config(model, data, clients={"tiers": TIERS}, **sections)


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = timed(tiny_model_folder, tiny_data, training={"rounds": 3})
    return emberfed.run(values, output=tmp_path_factory.mktemp("clock") / "run").path


def test_a_run_s_seconds_are_those_of_its_counted_work(reference: Path) -> None:
    total = 0.0
    for row in (line for line in lines(reference) if line["event"] == "round"):
        clients = [line for line in lines(reference, "clients.jsonl") if line["round"] == row["round"]]
        found = []
        for line in clients:
            assert line["memory_traffic_bytes"] > 0
            device = Device.model_validate(TIERS[0 if line["tier"] == "slow" else 1]["device"])
            effort = Effort(line["flops"], line["memory_traffic_bytes"])
            found.append(client_seconds(device, effort, line["bytes_down"], line["bytes_up"]))
        assert [line["clock_seconds"] for line in clients] == found
        assert row["clock_seconds"] == max(found) + row["bytes_up"] / 1e11
        total += row["clock_seconds"]
        assert row["clock_total_seconds"] == pytest.approx(total)
        told = [line for line in lines(reference) if line["event"] == "evaluation" and line["round"] == row["round"]]
        assert [line["clock_seconds"] for line in told] == [row["clock_total_seconds"]] * 2
    start = [line for line in lines(reference) if line["round"] == 0]
    assert [line["clock_seconds"] for line in start] == [0.0, 0.0]


def test_a_resumed_run_shows_the_same_clock(reference: Path, tmp_path: Path) -> None:
    emberfed.run(reference / "config.yaml", overrides=["training.rounds=1"], output=tmp_path / "run")
    emberfed.resume(tmp_path / "run", rounds=3)
    assert bits(tmp_path / "run") == bits(reference)
    keys = ("round", "event", "tier", "clock_seconds", "clock_total_seconds")
    shown = [[{key: line.get(key) for key in keys} for line in lines(path)] for path in (reference, tmp_path / "run")]
    assert shown[0] == shown[1]


def test_the_clock_changes_nothing_else(
    reference: Path, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = timed(tiny_model_folder, tiny_data, training={"rounds": 3})
    for tier in (bare := [{**tier} for tier in TIERS]):
        del tier["device"]
    values["clients"]["tiers"] = bare
    run = emberfed.run(values, output=tmp_path / "run").path
    assert bits(run) == bits(reference)
    assert not any("clock_seconds" in line for line in [*lines(run), *lines(run, "clients.jsonl")])


def test_a_late_client_is_refused_by_name_and_the_round_lasts_the_deadline(reference: Path, tmp_path: Path) -> None:
    of = {line["client"]: line for line in lines(reference, "clients.jsonl") if line["round"] == 1}
    slow = sorted(name for name, line in of.items() if line["tier"] == "slow")
    fast = sorted(set(of) - set(slow))
    deadline = (max(of[name]["clock_seconds"] for name in fast) + min(of[name]["clock_seconds"] for name in slow)) / 2
    overrides = [f"clock.deadline_seconds={deadline}", "training.rounds=1"]
    run = emberfed.run(reference / "config.yaml", overrides=overrides, output=tmp_path / "run").path
    row = lines(run)[-1]
    assert (row["replied"], sorted(row["refused"]), row["failed"]) == (fast, slow, {})
    assert all(why.startswith("missed the deadline: ") for why in row["refused"].values())
    assert row["clock_seconds"] == deadline + row["bytes_up"] / 1e11
    assert [line["client"] for line in lines(run, "clients.jsonl")] == fast
    with pytest.raises(RoundFailed, match="0 of 4 clients gave a usable upload.*missed the deadline"):
        emberfed.run(reference / "config.yaml", overrides=["clock.deadline_seconds=1e-9"], output=tmp_path / "nobody")


@pytest.mark.parametrize(("metric", "key", "never"), [("headline", "accuracy", 1.0), ("loss", "loss", 1e-9)])
def test_a_run_says_when_it_reached_a_target(metric: str, key: str, never: float, tmp_path: Path) -> None:
    """Every value that a run had is a target of a second one, and one that it never reaches."""
    tiers = [{"name": "all", "share": 1.0, "top_k": 1, "adapter_top_k": 2, "device": BOX.model_dump()}]
    values = Vision.made(tmp_path).config(
        method={"name": "fft_moe"},
        clients={"tiers": tiers},
        training={"rounds": 3, "learning_rate": 0.05},
        data={"test_size": 20},
    )
    plain = [
        line for line in lines(emberfed.run(values, output=tmp_path / "plain").path) if line["event"] == "evaluation"
    ]
    targets = sorted({line[key] for line in plain if line[key] > 0} - {never})
    assert len(targets) > 1, "it moves"
    values["clock"] = {"metric": metric, "targets": [*targets, never]}
    emberfed.run(values, overrides=["training.rounds=1"], output=tmp_path / "run")
    run = emberfed.resume(tmp_path / "run", rounds=3).path
    expected: dict[float, tuple[int, float]] = {}
    for target in [*targets, never]:
        for line in plain:
            if line[key] == target or (line[key] > target) == (metric == "headline"):
                expected.setdefault(target, (line["round"], line["clock_seconds"]))
    reached = [line for line in lines(run) if line["event"] == "time_to_accuracy"]
    assert {line["target"]: (line["round"], line["clock_seconds"]) for line in reached} == expected
    assert len(reached) == len(expected)
    assert {(line["tier"], line["metric"]) for line in reached} == {("all", key)}


def test_a_target_needs_devices(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    for section, key in (({"targets": [0.5]}, "targets"), ({"deadline_seconds": 1}, "deadline_seconds")):
        values = config(tiny_model_folder, tiny_data, clock=section)
        with pytest.raises(
            ConfigError, match=f"'clock.{key}' needs to know how fast.*'large', 'middle', 'small' have no"
        ):
            emberfed.run(values, output=tmp_path / "run")


def test_run_json_keeps_the_device_of_each_tier(reference: Path) -> None:
    told = json.loads((reference / "run.json").read_text())["tiers"]
    assert [Device.model_validate(tier["device"]) for tier in told] == [
        Device.model_validate(tier["device"]) for tier in TIERS
    ]
