"""Comparisons, really run on tiny federations: what runs, what is kept, what is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from commands import invoke, start, write_config
from federations import bits, config

import emberfed
from emberfed.arena import grid as grids
from emberfed.arena import running
from emberfed.arena.results import Comparison
from emberfed.errors import ConfigError, RunFolderError

QUICK: dict[str, Any] = {"evaluation": {"every": 0, "max_examples": 2}, "training": {"rounds": 1}}
METHODS = {"eq. 7": {"method": {"name": "a3smoe"}}, "FedAvg": {"method": {"name": "a3smoe", "temperature": 0}}}
BROKEN = {"broken": {"adapter.start_from": "/nowhere"}}


def arena(model: Path, data: Path, /, **keys: Any) -> dict[str, Any]:
    return {"config": config(model, data, **QUICK), "methods": METHODS, "seeds": 2, **keys}


class Heard:
    """Remembers what a comparison tells."""

    def __init__(self) -> None:
        self.events: list[running.Event] = []

    def __call__(self, event: running.Event) -> None:
        self.events.append(event)

    def started(self) -> list[str]:
        return [event.cell.name for event in self.events if isinstance(event, running.CellStarted)]


def all_bits(folder: Path) -> dict[str, dict[str, str]]:
    return {run.name: bits(run) for run in sorted((folder / "runs").iterdir())}


@pytest.fixture(scope="module")
def finished(
    tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Comparison]:
    """A finished comparison of two methods over two seeds. Do not write to it."""
    folder = tmp_path_factory.mktemp("arena") / "two"
    return folder, emberfed.compare(arena(tiny_model_folder, tiny_data), output=folder)


def test_a_cell_is_the_run_of_its_configuration(
    finished: tuple[Path, Comparison], tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The last cell, which others shared model and data with before: the bits are those of a run alone."""
    folder, comparison = finished
    cell = comparison.grid.cells[-1]
    alone = emberfed.run(cell.config.values(), output=tmp_path / "alone")
    assert bits(alone.path) == bits(folder / "runs" / cell.name) != {}


def test_finished_runs_are_kept_and_missing_ones_run(
    finished: tuple[Path, Comparison], tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, symlinks=True)
    shutil.rmtree(folder / "runs" / "FedAvg_seed-4")
    written = (folder / "comparison.json").read_bytes()
    (folder / "comparison.json").unlink()
    heard = Heard()
    emberfed.compare(arena(tiny_model_folder, tiny_data), output=folder, listen=heard)
    assert heard.started() == ["FedAvg_seed-4"]
    assert all_bits(folder) == all_bits(finished[0])
    before, after = json.loads(written), json.loads((folder / "comparison.json").read_bytes())
    assert [run["tiers"][0]["loss"] for run in after["runs"]] == [run["tiers"][0]["loss"] for run in before["runs"]]
    again = Heard()
    emberfed.compare(arena(tiny_model_folder, tiny_data), output=folder, listen=again)
    assert again.started() == []
    assert json.loads((folder / "comparison.json").read_bytes()) == after


def test_an_interrupted_comparison_goes_on(
    finished: tuple[Path, Comparison], tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Stopped when the third of its clients replies: the same call finishes, with the bits of one without a stop."""

    def stop(event: running.Event) -> None:
        if isinstance(event, running.CellProgress) and getattr(event.event, "client", None) == "c2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emberfed.compare(arena(tiny_model_folder, tiny_data), output=tmp_path / "arena", listen=stop)
    kept = sorted((tmp_path / "arena" / "runs").glob("*/rounds/0001.partial/clients/*.safetensors"))
    assert [path.stem for path in kept] == ["c0", "c1"]
    emberfed.compare(arena(tiny_model_folder, tiny_data), output=tmp_path / "arena")
    assert all_bits(tmp_path / "arena") == all_bits(finished[0])


@pytest.mark.slow
def test_two_processes_give_the_same_bits(
    finished: tuple[Path, Comparison], tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    heard = Heard()
    emberfed.compare(arena(tiny_model_folder, tiny_data), output=tmp_path / "arena", jobs=2, listen=heard)
    assert all_bits(tmp_path / "arena") == all_bits(finished[0])
    first = [type(event).__name__ for event in heard.events[:3]]
    assert first == ["Planned", "CellStarted", "CellStarted"]
    ended = [event.cell.name for event in heard.events if isinstance(event, running.CellDone)]
    assert sorted(ended) == sorted(cell.name for cell in finished[1].grid.cells)


@pytest.mark.slow
def test_killed_and_gone_on_with(
    finished: tuple[Path, Comparison], tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """SIGKILL to a real process, twice; its lock goes with it, and the third one finishes."""
    file = write_config(tmp_path / "arena.yaml", arena(tiny_model_folder, tiny_data))
    folder = tmp_path / "out"
    for files in (1, 12):
        process = start("compare", file, "--output", folder)
        while process.poll() is None and _tensor_files(folder) < files:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    emberfed.compare(file, output=folder)
    assert all_bits(folder) == all_bits(finished[0])


@pytest.mark.slow
def test_processes_end_with_the_one_that_asked(
    finished: tuple[Path, Comparison], tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """SIGKILL to the command alone: its processes notice, leave whole runs behind, and take nothing for a failure."""
    file = write_config(tmp_path / "arena.yaml", arena(tiny_model_folder, tiny_data))
    folder = tmp_path / "out"
    process = start("compare", file, "--output", folder, "--jobs", "2")
    while process.poll() is None and _tensor_files(folder) < 1:
        time.sleep(0.01)
    hands = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(hands, timeout=120)
    process.communicate()
    assert len(hands) >= 2
    assert not alive
    assert not list((folder / "runs").glob("*/events.jsonl"))
    emberfed.compare(file, output=folder)
    assert all_bits(folder) == all_bits(finished[0])


def _tensor_files(folder: Path) -> int:
    return sum(name.endswith(".safetensors") for _, _, names in os.walk(folder) for name in names)


def test_model_and_data_are_loaded_once(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Both are gone from the disk as soon as the first run has begun; cells of the same seed need them no more."""
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    data = shutil.copy(tiny_data, tmp_path / "data.jsonl")

    def remove(event: running.Event) -> None:
        if isinstance(event, running.CellProgress):
            shutil.rmtree(model, ignore_errors=True)
            Path(data).unlink(missing_ok=True)

    found = emberfed.compare(arena(model, Path(data), seeds=1), output=tmp_path / "out", listen=remove)
    assert not model.exists()
    assert [one.state for one in found.cells] == ["done", "done"]


def test_a_failing_cell_does_not_stop_the_others(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    values = arena(tiny_model_folder, tiny_data, seeds=1, methods={**BROKEN, **METHODS})
    file = write_config(tmp_path / "arena.yaml", values)
    result = invoke("compare", file, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    states = {run["method"]: run["state"] for run in document["runs"]}
    assert states == {"broken": "failed", "eq. 7": "done", "FedAvg": "done"}
    reason = next(run["problem"] for run in document["runs"] if run["method"] == "broken")
    assert "/nowhere" in reason
    assert "\n" not in reason
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert f"failed: {reason} (broken, seed 3)" in text
    assert "/nowhere" in (tmp_path / "out" / "comparison.html").read_text()
    assert "broken, seed 3: failed" in result.stderr
    shown = invoke("compare", file, "--output", tmp_path / "out")
    assert shown.exit_code == 1
    assert "3 runs, 2 of them done" in shown.stderr
    assert "/nowhere" in shown.stdout


def test_runs_of_other_settings_are_refused(
    finished: tuple[Path, Comparison], tiny_model_folder: Path, tiny_data: Path
) -> None:
    folder, _ = finished
    for override, words in (
        ("training.learning_rate=0.5", "was run with other settings (training.learning_rate)"),
        ("evaluation.max_new_tokens=9", "was run with other settings (evaluation.max_new_tokens)"),
    ):
        with pytest.raises(RunFolderError) as caught:
            emberfed.compare(arena(tiny_model_folder, tiny_data), overrides=[override], output=folder)
        assert words in str(caught.value)
        assert "give another --output" in str(caught.value)


def test_more_rounds_extend_and_fewer_are_refused(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    values = arena(tiny_model_folder, tiny_data, seeds=1)
    emberfed.compare(values, output=tmp_path / "out")
    longer = emberfed.compare(values, output=tmp_path / "out", overrides=["training.rounds=2"])
    assert [one.rounds for one in longer.cells] == [2, 2]
    at_once = emberfed.run(longer.grid.cells[0].config.values(), output=tmp_path / "alone")
    assert bits(at_once.path) == bits(tmp_path / "out" / "runs" / longer.grid.cells[0].name)
    with pytest.raises(RunFolderError, match="has 2 rounds already, more than the 1"):
        emberfed.compare(values, output=tmp_path / "out")


def test_data_elsewhere_is_looked_at(
    finished: tuple[Path, Comparison], tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The same data at another place is fine; other data there is not comparable."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, symlinks=True)
    moved = shutil.copy(tiny_data, tmp_path / "moved.jsonl")
    found = emberfed.compare(arena(tiny_model_folder, Path(moved)), output=folder)
    assert [one.state for one in found.cells] == ["done"] * 4
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(tiny_data).read_text().splitlines(keepends=True)[:-1]))
    found = emberfed.compare(arena(tiny_model_folder, other), output=folder)
    assert [one.state for one in found.cells] == ["failed"] * 4
    assert "the data is not what it was" in str(found.cells[0].problem)


def test_two_comparisons_on_one_folder_do_not_collide(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    values = arena(tiny_model_folder, tiny_data, seeds=1)
    refusals: list[str] = []

    def second(event: running.Event) -> None:
        if isinstance(event, running.Planned):
            with pytest.raises(RunFolderError) as caught:
                emberfed.compare(values, output=tmp_path / "out")
            refusals.append(str(caught.value))

    emberfed.compare(values, output=tmp_path / "out", listen=second)
    assert "another process is working on" in refusals[0]


def test_only_some_tiers_are_evaluated(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    values = arena(tiny_model_folder, tiny_data, seeds=1, set={"evaluation.tiers": ["middle"]})
    found = emberfed.compare(values, output=tmp_path / "out")
    assert {(tier.tier, tier.top_k) for one in found.cells for tier in one.tiers} == {("middle", 2)}
    with pytest.raises(ConfigError, match=r"'evaluation\.tiers': no tier is called 'midle'; did you mean 'middle'\?"):
        grids.load({**values, "set": {"evaluation.tiers": ["midle"]}})


def test_costs_are_those_of_a_tier_s_clients(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Also of a method whose clients all train with the model's own K, whatever their tier's is."""
    ranks = {f"clients.tiers.{place}.rank": place + 1 for place in range(3)}
    methods = {"Homo-LoRA": {"method": {"name": "homolora"}}}
    values = arena(tiny_model_folder, tiny_data, seeds=1, methods=methods, set=ranks)
    (found,) = emberfed.compare(values, output=tmp_path / "out").cells
    lines = (tmp_path / "out" / "runs" / found.cell.name / "clients.jsonl").read_text().splitlines()
    clients = [json.loads(line) for line in lines]
    assert {client["top_k"] for client in clients} == {2}
    assert [(tier.tier, tier.top_k) for tier in found.tiers] == [("small", 1), ("middle", 2), ("large", 4)]
    for tier in found.tiers:
        own = [client for client in clients if client["tier"] == tier.tier]
        assert tier.flops == pytest.approx(sum(client["flops"] for client in own) / len(own))
        assert tier.peak_memory_bytes == max(client["peak_memory_bytes"] for client in own)
    assert found.bytes_up == sum(client["bytes_up"] for client in clients)


@pytest.mark.slow
def test_the_command_stops_on_ctrl_c_and_goes_on(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "arena.yaml", arena(tiny_model_folder, tiny_data))
    process = start("compare", file, "--output", tmp_path / "out", "--jobs", "2")
    while process.poll() is None and _tensor_files(tmp_path / "out") < 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == "emberfed: stopped; what is finished is kept. Go on with the same command"
    assert "Traceback" not in told
    result = invoke("compare", file, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert {run["state"] for run in json.loads(result.stdout)["runs"]} == {"done"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{tmp}/absent.yaml",), "does not exist"),
        (("{file}",), "name the methods to compare"),
        (("{file}", "--methods", "a3smo"), "did you mean 'a3smoe'"),
        (("{file}", "--methods", "a3smoe", "--seeds", "many"), "--seeds 'many': expected a number of seeds"),
        (("{file}", "--methods", "a3smoe", "--seeds", "0"), "expected a number of seeds from 1"),
        (("{file}", "--methods", "a3smoe", "--set", "training.round=1"), "did you mean 'rounds'"),
    ],
)
def test_bad_commands_are_one_line(
    arguments: tuple[str, ...], words: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "run.yaml", config(tiny_model_folder, tiny_data))
    result = invoke("compare", *[argument.format(tmp=tmp_path, file=file) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("emberfed: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_the_arena_can_be_a_file_with_a_base(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "base.yaml", config(tiny_model_folder, tiny_data, **QUICK))
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", "methods": METHODS, "seeds": [3]}))
    found = emberfed.compare(file, output=tmp_path / "out")
    assert [one.state for one in found.cells] == ["done", "done"]
    assert (tmp_path / "out" / "comparison.html").read_text().startswith("<!doctype html>")
