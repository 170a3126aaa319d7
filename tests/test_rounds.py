"""The main loop end to end on a tiny model: same bits whatever happens, bad clients refused, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import save_tiny_model
from federations import bits, config

import emberfed
from emberfed import events
from emberfed.errors import ConfigError, EmberfedError, RoundFailed, RunFolderError


@pytest.fixture(scope="module")
def reference(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds without any trouble."""
    path = tmp_path_factory.mktemp("reference") / "run"
    return emberfed.run(config(tiny_model_folder, tiny_data, training={"rounds": 3}), output=path).path


def lines(run: Path, table: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / table).read_text().splitlines()]


def scores(run: Path) -> list[tuple[int, str, float, float]]:
    rows = lines(run, "metrics.jsonl")
    return [(row["round"], row["tier"], row["rouge_l"], row["loss"]) for row in rows if row["event"] == "evaluation"]


def test_a_run_leaves_what_the_documentation_says(reference: Path) -> None:
    evaluations = scores(reference)
    assert [(round, tier) for round, tier, *_ in evaluations] == [
        (round, tier) for round in range(4) for tier in ("small", "middle", "large")
    ]
    first, last = evaluations[:3], evaluations[-3:]
    assert all(after[3] < before[3] for before, after in zip(first, last, strict=True)), "loss falls at every tier"
    summaries = [row for row in lines(reference, "metrics.jsonl") if row["event"] == "round"]
    for row in summaries:
        assert row["replied"] == ["c0", "c1", "c2", "c3"]
        assert row["failed"] == row["refused"] == {}
        assert 0 < row["share_of_experts_trained"] <= 1
        clients = [line for line in lines(reference, "clients.jsonl") if line["round"] == row["round"]]
        for column in ("bytes_up", "bytes_down", "flops"):
            assert row[column] == sum(line[column] for line in clients) > 0
    uploads = sorted((reference / "rounds" / "0003" / "clients").glob("*.safetensors"))
    by_client = {line["client"]: line["bytes_up"] for line in clients}
    assert {path.stem: path.stat().st_size for path in uploads} == by_client
    assert (reference / "final").resolve() == (reference / "rounds" / "0003").resolve()
    assert "<html" in (reference / "report.html").read_text()
    for name in ("config.yaml", "run.json", "partition.json"):
        assert (reference / name).is_file()
    assert not (reference / "events.jsonl").exists()
    told = json.loads((reference / "run.json").read_text())
    assert (told["metric"], told["experts"]) == ("rouge_l", "model")
    assert "classes" not in told


def test_counts_are_tokens_times_k(reference: Path) -> None:
    for line in lines(reference, "clients.jsonl"):
        assert [sum(layer) for layer in line["activation_counts"]] == [line["tokens"] * line["top_k"]] * 2


def test_the_same_config_gives_the_same_bits_from_its_resolved_form(reference: Path, tmp_path: Path) -> None:
    again = emberfed.run(reference / "config.yaml", output=tmp_path / "again")
    assert bits(again.path) == bits(reference)
    assert scores(again.path) == scores(reference)
    assert len(bits(reference)) == 4 * 2 + 3 * 4


def test_another_seed_gives_other_bits(reference: Path, tmp_path: Path) -> None:
    other = emberfed.run(
        reference / "config.yaml", overrides=["seed=4", "training.rounds=1"], output=tmp_path / "other"
    )
    assert bits(other.path)["rounds/0001/state.safetensors"] != bits(reference)["rounds/0001/state.safetensors"]


def test_two_rounds_and_one_more_are_three(reference: Path, tmp_path: Path) -> None:
    emberfed.run(reference / "config.yaml", overrides=["training.rounds=2"], output=tmp_path / "run")
    run = emberfed.resume(tmp_path / "run", rounds=3)
    assert bits(run.path) == bits(reference)
    assert scores(run.path) == scores(reference)
    assert emberfed.resume(run.path).metrics() == run.metrics(), "a finished run is left alone"
    with pytest.raises(ConfigError, match="has 3 rounds already"):
        emberfed.resume(run.path, rounds=2)


def test_shuffled_and_late_replies_change_nothing(reference: Path, tmp_path: Path) -> None:
    engine = ["engine={name: flaky, shuffle: true, seed: 9, delay_seconds: 0.001}"]
    run = emberfed.run(reference / "config.yaml", overrides=engine, output=tmp_path / "run")
    assert bits(run.path) == bits(reference)


FAULTS = {
    "drop": ("failed", "no reply"),
    "raise": ("failed", "not a bundle"),
    "nan": ("refused", "not finite"),
    "shape": ("refused", "shape"),
    "dtype": ("refused", "dtype"),
    "missing": ("refused", "is missing"),
    "foreign": ("refused", "foreign tensor 'a.stranger'"),
    "weight": ("refused", "'examples'"),
    "old_round": ("refused", "belongs to round"),
    "twice": ("refused", "answered twice"),
    "garbage": ("refused", "not a bundle"),
    "stranger": ("refused", "comes from 'nobody'"),
}


def test_every_bad_client_is_named_and_the_round_goes_on(reference: Path, tmp_path: Path) -> None:
    """Every kind of trouble gives the bits of a round in which that client was simply silent."""
    silent: dict[str, str] = {}
    for fault, (kind, words) in FAULTS.items():
        overrides = [f"engine={{name: flaky, faults: {{c1: {fault}}}}}", "training.rounds=1", "evaluation.every=0"]
        run = emberfed.run(reference / "config.yaml", overrides=overrides, output=tmp_path / fault)
        summary = run.metrics()[-1]
        assert summary["replied"] == ["c0", "c2", "c3"], fault
        assert words in summary[kind]["c1"], fault
        assert "c1" in lines(run.path, "events.jsonl")[0]["message"]
        state = bits(run.path)["rounds/0001/state.safetensors"]
        silent.setdefault("bits", state)
        assert state == silent["bits"], fault
    assert silent["bits"] != bits(reference)["rounds/0001/state.safetensors"]


def test_below_min_replies_the_round_fails_loudly_and_can_be_resumed(reference: Path, tmp_path: Path) -> None:
    overrides = [
        "engine={name: flaky, faults: {c1: drop, c2: nan}, rounds: [2]}",
        "clients.min_replies=3",
        "evaluation.every=0",
    ]
    with pytest.raises(RoundFailed, match="round 2: 2 of 4 clients .*c1 failed: no reply.* c2 refused: .*not finite"):
        emberfed.run(reference / "config.yaml", overrides=overrides, output=tmp_path / "run")
    written = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(written.read_text())
    written.write_text(yaml.safe_dump({**values, "engine": {"name": "local"}}))
    run = emberfed.resume(tmp_path / "run")
    assert bits(run.path) == bits(reference)


def test_a_damaged_round_is_said_and_made_again(reference: Path, tmp_path: Path) -> None:
    run = emberfed.run(reference / "config.yaml", output=tmp_path / "run")
    state = run.path / "rounds" / "0003" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    heard: list[events.Event] = []
    emberfed.resume(run.path, listen=heard.append)
    notices = [event.message for event in heard if isinstance(event, events.Notice)]
    assert len(notices) == 1
    assert "round 3 is damaged" in notices[0]
    assert "going on from round 2" in notices[0]
    assert bits(run.path) == bits(reference)
    assert lines(run.path, "events.jsonl")[-1]["message"] == notices[0]


def test_changed_data_is_noticed_on_resume(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(tiny_data.read_bytes())
    run = emberfed.run(config(tiny_model_folder, data, training={"rounds": 1}), output=tmp_path / "run")
    rows = data.read_text().splitlines()
    data.write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(RunFolderError, match="data is not what it was"):
        emberfed.resume(run.path, rounds=2)
    assert len(bits(run.path)) == 2 * 2 + 4, "nothing was lost"


def test_data_of_the_same_size_but_other_words_is_noticed(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(tiny_data.read_bytes())
    run = emberfed.run(config(tiny_model_folder, data, training={"rounds": 1}), output=tmp_path / "run")
    data.write_text(data.read_text().replace('"response": "w1', '"response": "w2'))
    with pytest.raises(RunFolderError, match="data is not what it was"):
        emberfed.resume(run.path, rounds=2)


def test_one_run_is_one_experiment(reference: Path, tmp_path: Path) -> None:
    run = emberfed.run(reference / "config.yaml", overrides=["training.rounds=1"], output=tmp_path / "run")
    written = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(written.replace("alpha: 4.0", "alpha: 8.0"))
    with pytest.raises(RunFolderError, match=r"was changed since the run began \(adapter.alpha\)"):
        emberfed.resume(run.path, rounds=2)
    with pytest.raises(RunFolderError, match=r"adapter.alpha"):
        emberfed.evaluate(run.path)
    (run.path / "config.yaml").write_text(written)
    assert emberfed.resume(run.path, rounds=3).metrics()[-1]["round"] == 3
    assert bits(run.path) == bits(reference)


@pytest.mark.parametrize(
    ("overrides", "differ"),
    [
        pytest.param({"hidden_size": 48}, "parameters, sha256", marks=pytest.mark.slow),
        ({"seed": 1}, "sha256"),
        pytest.param({"num_experts_per_tok": 3}, "native_top_k", marks=pytest.mark.slow),
    ],
)
def test_another_base_model_is_noticed(
    overrides: dict[str, int], differ: str, reference: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Other sizes, the same sizes with other weights, or the same weights read in another way."""
    run = emberfed.run(reference / "config.yaml", overrides=["training.rounds=1"], output=tmp_path / "run")
    before = bits(run.path)
    values = yaml.safe_load((run.path / "config.yaml").read_text())

    def resume_on(folder: Path) -> None:
        values["model"]["path"] = str(folder)
        (run.path / "config.yaml").write_text(yaml.safe_dump(values))
        emberfed.resume(run.path, rounds=2)

    other = save_tiny_model(tmp_path / "other", **overrides)
    with pytest.raises(RunFolderError, match=rf"base model is not the one .* began with \({differ} differ\)"):
        resume_on(other)
    with pytest.raises(RunFolderError, match="base model is not the one"):
        emberfed.evaluate(run.path)
    assert bits(run.path) == before
    resume_on(Path(shutil.copytree(tiny_model_folder, tmp_path / "moved")))  # the same model in another place will do


def test_an_adapter_that_cannot_be_made_leaves_no_run_behind(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = config(tiny_model_folder, tiny_data, adapter={"rank": 2, "alpha": 4, "shared_experts": True})
    with pytest.raises(EmberfedError, match="shared"):
        emberfed.run(values, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["x" * 240, "a\0b"])
def test_names_no_folder_can_have(name: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be a folder"):
        emberfed.run(config(tiny_model_folder, tiny_data), output=tmp_path / name)


@pytest.mark.parametrize("top_k", [[0], [1.5], [], [2, 2]])
def test_impossible_numbers_of_experts_to_evaluate_at(top_k: Any, reference: Path) -> None:
    with pytest.raises(ConfigError, match="expected different whole numbers from 1"):
        emberfed.evaluate(reference, top_k=top_k)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000])
def test_a_damaged_run_record(text: str, reference: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference, tmp_path / "run"))
    (folder / "run.json").write_text(text)
    with pytest.raises(RunFolderError, match="run.json"):
        emberfed.resume(folder)


def test_a_model_that_overflows_is_told_and_the_run_goes_on(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = config(
        tiny_model_folder,
        tiny_data,
        model={"dtype": "float16"},
        training={"rounds": 1, "learning_rate": 1e6, "max_steps": 1, "max_grad_norm": None},
    )
    heard: list[events.Event] = []
    run = emberfed.run(values, output=tmp_path / "run", listen=heard.append)
    last = [row for row in run.metrics() if row["event"] == "evaluation"][-1]
    assert last["loss"] is None
    assert any(isinstance(event, events.Notice) and "not finite" in event.message for event in heard)
    assert "<html" in (run.path / "report.html").read_text()


def test_an_output_folder_in_use_is_left_alone(reference: Path, tmp_path: Path) -> None:
    before = bits(reference)
    with pytest.raises(RunFolderError, match="already holds a run"):
        emberfed.run(reference / "config.yaml", output=reference)
    assert bits(reference) == before


def test_evaluate_gives_the_scores_of_the_last_round_and_of_any_k(reference: Path) -> None:
    rows = emberfed.evaluate(reference)
    assert [(row["round"], row["tier"], row["rouge_l"], row["loss"]) for row in rows] == scores(reference)[-3:]
    rows = emberfed.evaluate(reference, top_k=[1, 3])
    assert [(row["tier"], row["top_k"]) for row in rows] == [("K=1", 1), ("K=3", 3)]
    assert rows[0]["loss"] == scores(reference)[-3][3]
    with pytest.raises(ConfigError, match="top_k|K"):
        emberfed.evaluate(reference, top_k=[99])


def test_sampled_cohorts_are_the_same_after_a_resume(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    values = config(tiny_model_folder, tiny_data, training={"rounds": 4}, evaluation={"every": 0})
    values["clients"] = {**values["clients"], "per_round": 2}
    whole = emberfed.run(values, output=tmp_path / "whole")
    values["training"] = {**values["training"], "rounds": 1}
    emberfed.run(values, output=tmp_path / "parts")
    parts = emberfed.resume(tmp_path / "parts", rounds=4)
    replied = [row["replied"] for row in parts.metrics() if row["event"] == "round"]
    assert all(len(clients) == 2 for clients in replied)
    assert len({tuple(clients) for clients in replied}) > 1
    assert bits(parts.path) == bits(whole.path)


def test_listeners_hear_everything_in_order(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    heard: list[events.Event] = []
    emberfed.run(
        config(tiny_model_folder, tiny_data, training={"rounds": 1}), output=tmp_path / "run", listen=heard.append
    )
    kinds = [type(event).__name__ for event in heard]
    assert kinds[0] == "RoundStarted"
    assert kinds.count("ClientDone") == 4
    assert kinds[-1] == "RoundDone"
    steps = [event for event in heard if isinstance(event, events.Step)]
    assert {event.client for event in steps} == {"c0", "c1", "c2", "c3"}
    assert all(1 <= event.step <= event.steps for event in steps)
