"""Tasks from end to end: names, data and models that do not go together, whole runs, evaluating, exporting."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLASSES, save_tiny_family
from commands import invoke
from federations import Vision, bits, config, write_data
from transformers import AutoModelForImageClassification

import emberfed
from emberfed import assembly
from emberfed.config import parse
from emberfed.errors import ConfigError, DataError, EmberfedError, ModelError, RunFolderError
from emberfed.evaluation import EvaluationConfig
from emberfed.method import method_names
from emberfed.models.families import load_family
from emberfed.tasks import load_task, task_names

FAMILY = {"generation": "llama", "text_classification": "bert", "image_classification": "vit"}
"""A dense family for each task."""

PAIRS = list(permutations(sorted(FAMILY), 2))
"""A task, and another one."""

NEEDS_EXPERTS = ("a3smoe", "flame", "flux", "fmd", "fmes", "fmq")
"""Methods for models with experts, and no family of classifiers has any."""

TRAINS_CLASSIFIERS = [name for name in method_names() if name not in NEEDS_EXPERTS]


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    return Vision.made(tmp_path_factory.mktemp("vision"))


Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny model for each task."""
    return cache(lambda task: save_tiny_family(FAMILY[task], tmp_path_factory.mktemp(task)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Data of each task."""
    return cache(lambda task: write_data(task, tmp_path_factory.mktemp(task)))


def federation(task: str, models: Made, data: Made, **sections: Any) -> dict[str, Any]:
    method = {"name": "homolora", **sections.pop("method", {})}
    tiers = [{"name": "all", "share": 1.0, "top_k": 1, "rank": 2}]
    given = {"method": method, "clients": {"tiers": tiers}, **sections}
    return config(models(task), data(task), **{**given, "data": {"task": task, **given.get("data", {})}})


# Names.


def test_every_task_on_disk_is_tried_here() -> None:
    assert set(task_names()) == set(FAMILY)
    for name in task_names():
        assert load_task(name).metric.key == ("rouge_l" if name == "generation" else "accuracy")
        assert load_family(FAMILY[name]).task == name


def test_an_unknown_task_names_the_closest(vision: Vision) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(vision.config(data={"task": "image_clasification"}))
    message = str(caught.value)
    assert message.startswith("'data.task': unknown 'image_clasification'; did you mean 'image_classification'?")
    assert "'generation'" in message
    assert "'text_classification'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("task", "key"),
    [("image_classification", "template"), ("text_classification", "image"), ("generation", "label")],
)
def test_a_key_of_another_tasks_data_is_unknown(tmp_path: Path, task: str, key: str) -> None:
    values = config(tmp_path, tmp_path, data={"task": task, key: "short"})
    with pytest.raises(ConfigError, match=f"unknown key 'data.{key}'"):
        parse(values)


@pytest.mark.parametrize("task", sorted(FAMILY))
def test_a_configuration_keeps_its_task(tmp_path: Path, task: str) -> None:
    checked = parse(config(tmp_path, tmp_path, data={"task": task}))
    assert checked.data.task == task
    assert parse(checked.values()) == checked
    assert checked.task.metric == load_task(task).metric


# What does not go together.


@pytest.mark.parametrize(("task", "other"), PAIRS)
def test_a_model_of_another_task_is_refused_in_one_line(models: Made, data: Made, task: str, other: str) -> None:
    values = federation(task, models, data, model={"path": str(models(other))})
    with pytest.raises(ModelError) as caught:
        assembly.gather(parse(values))
    message = str(caught.value)
    assert "data.task" in message
    assert task in message
    assert FAMILY[other] in message or other in message
    assert "\n" not in message


@pytest.mark.parametrize(("task", "other"), PAIRS)
def test_data_of_another_task_is_refused_in_one_line(models: Made, data: Made, task: str, other: str) -> None:
    values = federation(task, models, data)
    values["data"]["path"] = str(data(other))
    with pytest.raises(DataError) as caught:
        assembly.gather(parse(values))
    message = str(caught.value)
    assert "data" in message
    assert "\n" not in message


def test_there_is_no_builtin_text_classification(models: Made, data: Made) -> None:
    values = federation("text_classification", models, data)
    with pytest.raises(DataError, match="no built-in data for task text_classification; give data.path"):
        assembly.gather(parse({**values, "data": {**values["data"], "path": "builtin"}}))
    with pytest.raises(ModelError, match="no model for text classification comes with the package"):
        assembly.gather(parse({**values, "model": {"path": "builtin"}}))


def test_a_class_that_nobody_could_learn_is_named(vision: Vision, tmp_path: Path) -> None:
    """A folder without images is a class without a training example."""
    (tmp_path / "images").mkdir()
    for name in CLASSES:
        (tmp_path / "images" / name).symlink_to(vision.data / name)
    (tmp_path / "images" / "hen").mkdir()
    with pytest.raises(DataError, match=r"class 'hen' has no training example on any client"):
        assembly.gather(parse(vision.config(data={"path": str(tmp_path / "images")})))


# Losses and work of a batch.


@pytest.mark.parametrize("task", ["image_classification", "text_classification"])
def test_the_loss_is_the_sum_over_examples(models: Made, data: Made, task: str) -> None:
    """By hand from the logits; the work of a pass is that said without running it."""
    material = assembly.gather(parse(federation(task, models, data)))
    model, shard, chosen = material.model, material.test, load_task(task)
    batch: Any = shard.collate(shard.examples[:5])
    with torch.inference_mode():
        done = chosen.forward(model, batch)
        logits = model.lm(**batch.inputs()).logits.double()
    expected = sum(float(row.logsumexp(-1) - row[label]) for row, label in zip(logits, batch.labels, strict=True))
    assert float(done.loss) == pytest.approx(expected, rel=1e-5)
    assert float(done.auxiliary) == 0
    assert batch.targets == 5
    assert done.work == chosen.work(model, batch)
    real = int(batch.attention_mask.sum()) if task == "text_classification" else 5 * 5
    assert done.tokens == done.work.routed_tokens == real
    assert done.work.head_tokens == 5


@pytest.mark.parametrize("task", sorted(FAMILY))
def test_evaluating_changes_nothing_and_reports_how_far_it_is(models: Made, data: Made, task: str) -> None:
    material = assembly.gather(parse(federation(task, models, data)))
    heard: list[tuple[int, int]] = []
    options = EvaluationConfig(batch_size=4, max_new_tokens=3)

    def score() -> Any:
        return load_task(task).evaluate(
            material.model, material.processor, material.test, options, lambda done, total: heard.append((done, total))
        )

    assert score().json() == score().json()
    assert heard[-1] == (6, 6)
    assert load_task(task).metric.key in score().json()


# Whole runs.


OFTEN = ("fft_moe", "flora", "linear_probe")
"""One of each adapter; `make test-slow` runs all methods."""


@pytest.mark.parametrize(
    "method", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in TRAINS_CLASSIFIERS]
)
def test_a_whole_run_of_image_classification(vision: Vision, tmp_path: Path, method: str) -> None:
    """The brighter an image the later its class: three rounds lower the loss at every tier."""
    values = vision.config(method={"name": method}, training={"rounds": 3, "local_epochs": 2})
    run = emberfed.run(values, output=tmp_path / "run")
    lines = [line for line in run.metrics() if line["event"] == "evaluation"]
    assert [line["round"] for line in lines] == [round for round in range(4) for _ in range(3)]
    for before, after in zip(lines[:3], lines[-3:], strict=True):
        assert after["loss"] < before["loss"]
    for line in lines:
        assert {"accuracy", "loss", "examples", "categories"} <= set(line)
        assert not {"rouge_l", "perplexity"} & set(line)
        assert set(line["categories"]) <= set(CLASSES)
        assert line["examples"] == sum(part["examples"] for part in line["categories"].values()) == 6
    told = json.loads((run.path / "run.json").read_text())
    assert told["metric"] == "accuracy"
    assert told["classes"] == list(CLASSES)
    assert "<html" in (run.path / "report.html").read_text()


@pytest.mark.parametrize("method", ["fft_moe", "linear_probe"])
def test_a_whole_run_of_text_classification(models: Made, data: Made, tmp_path: Path, method: str) -> None:
    tiers = [{"name": "all", "share": 1.0, "top_k": 1, "adapter_top_k": 2}]
    values = federation(
        "text_classification", models, data, method={"name": method}, clients={"tiers": tiers},
        training={"rounds": 3, "local_epochs": 2},
    )  # fmt: skip
    first, *_, last = [row for row in emberfed.run(values, output=tmp_path / "run").metrics() if "accuracy" in row]
    assert last["loss"] < first["loss"]


# Evaluating and exporting a run.


@pytest.fixture(scope="module")
def runs(vision: Vision, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One round of image classification with each method."""

    def run(method: str) -> Path:
        values = vision.config(method={"name": method}, training={"rounds": 1}, evaluation={"every": 0})
        return emberfed.run(values, output=tmp_path_factory.mktemp(method) / "run").path

    return cache(run)


def test_a_run_is_evaluated_at_any_k_of_its_adapter(runs: Callable[[str], Path]) -> None:
    path = runs("fft_moe")
    before = bits(path)
    recorded = {
        line["adapter_top_k"]: (line["accuracy"], line["loss"])
        for line in emberfed.Run(path).metrics()
        if line["event"] == "evaluation" and line["round"] == 1
    }
    assert sorted(recorded) == [1, 2, 4]
    found = emberfed.evaluate(path, adapter_top_k=[4, 3, 1])
    assert [(line["tier"], line["top_k"], line["adapter_top_k"]) for line in found] == [
        ("k=4", 1, 4),
        ("k=3", 1, 3),
        ("k=1", 1, 1),
    ]
    for line in (found[0], found[2]):
        assert (line["accuracy"], line["loss"]) == recorded[line["adapter_top_k"]]
    assert found[1]["loss"] not in (found[0]["loss"], found[2]["loss"])
    assert bits(path) == before


def test_the_command_line_evaluates_at_any_k_of_the_adapter(runs: Callable[[str], Path]) -> None:
    done = invoke("evaluate", runs("fft_moe"), "--adapter-top-k", "1,3", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["evaluations"]
    assert [row["adapter_top_k"] for row in rows] == [1, 3]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter_top_k": [5]}, "adapter_top_k 5"),
        ({"adapter_top_k": [0]}, "whole numbers from 1"),
        ({"adapter_top_k": []}, "whole numbers from 1"),
        ({"adapter_top_k": [1.5]}, "whole numbers from 1"),
        ({"adapter_top_k": [1], "top_k": [1]}, "give top_k or adapter_top_k, not both"),
        ({"top_k": [1]}, "adapter_top_k"),
    ],
    ids=str,
)
def test_impossible_ks_are_refused_in_one_line(
    runs: Callable[[str], Path], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        emberfed.evaluate(runs("fft_moe"), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exported_adapter_opens_on_transformers_own_model(
    vision: Vision, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """The folder of the newest round, by the command line; its accuracy is the recorded one, at the largest k."""
    path = runs("fft_moe")
    done = invoke("export", path, "--output", tmp_path / "adapter", "--format", "adapter")
    assert done.exit_code == 0, done.output
    for file in (tmp_path / "adapter").iterdir():
        assert file.read_bytes() == (path / "rounds" / "0001" / file.name).read_bytes()
    material = assembly.gather(parse(vision.config(method={"name": "fft_moe"})))
    batch: Any = material.test.collate(material.test.examples)
    lm = AutoModelForImageClassification.from_pretrained(vision.model)
    with emberfed.load_adapter(lm, tmp_path / "adapter") as adapter, torch.inference_mode():
        assert adapter.top_k == 4
        chosen = lm(**batch.inputs()).logits.argmax(-1)
    [line] = [line for line in emberfed.Run(path).metrics() if line.get("adapter_top_k") == 4 and line["round"] == 1]
    assert float((chosen == batch.labels).double().mean()) == pytest.approx(line["accuracy"])


FORMATS = {"homolora": ("adapter", "peft", "merged"), "fft_moe": ("adapter",), "dense_adapter": ("adapter",)}
FORMATS |= {"linear_probe": ("adapter",)}


@pytest.mark.parametrize("method", sorted(FORMATS))
@pytest.mark.parametrize("format", ["adapter", "merged", "peft"])
def test_a_run_is_exported_in_its_own_formats_alone(
    runs: Callable[[str], Path], tmp_path: Path, method: str, format: Any
) -> None:
    path = runs(method)
    if format in FORMATS[method]:
        assert any(emberfed.export(path, output=tmp_path / "out", format=format).iterdir())
        return
    with pytest.raises(EmberfedError) as caught:
        emberfed.export(path, output=tmp_path / "out", format=format)
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in FORMATS[method])
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_and_an_absent_round(runs: Callable[[str], Path], tmp_path: Path) -> None:
    wrong: Any = "onnx"
    with pytest.raises(ConfigError, match="export format 'onnx' is unknown; there are 'adapter', 'merged' and 'peft'"):
        emberfed.export(runs("fft_moe"), output=tmp_path / "out", format=wrong)
    with pytest.raises(RunFolderError, match="has no round 7"):
        emberfed.export(runs("fft_moe"), output=tmp_path / "out", format="adapter", round=7)
