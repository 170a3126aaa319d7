"""Accuracy and loss of models that choose a class: worked by hand, ties, classes, batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLASSES, save_tiny_family
from federations import Vision, config, write_texts
from hypothesis import given
from hypothesis import strategies as st

from emberfed import assembly
from emberfed.config import parse
from emberfed.data.shard import Shard
from emberfed.evaluation import EvaluationConfig
from emberfed.evaluation.classes import Choice, ClassScore, evaluate, summarise
from emberfed.material import Divided, Material
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.head import initial_head
from emberfed.models.sparse_adapter import attached


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A tiny ViT with ten held-out images of five classes."""
    vision = Vision.made(tmp_path_factory.mktemp("vision"))
    return assembly.gather(parse(vision.config(data={"test_size": 10})))


def with_biases(model: FoundationModel, shard: Shard, biases: Sequence[float], **options: Any) -> list[Choice]:
    """What a head makes of the shard whose logits are these numbers, whatever the image."""
    weight = torch.zeros_like(initial_head(model)["head.weight"])
    with attached(model, {"head.weight": weight, "head.bias": torch.tensor(biases, dtype=torch.float32)}, 1):
        return evaluate(model, shard, EvaluationConfig(**options))[1]


def test_figures_by_hand() -> None:
    """Three of a, of which two are right: 2/3. One of c, wrong. In all 2/4, and a loss of (0.5 + 1 + 3 + 1.5) / 4."""
    choices = [Choice(0, 0, 0.5), Choice(2, 1, 3.0), Choice(0, 0, 1.0), Choice(0, 2, 1.5)]
    scores = summarise(choices, ["a", "b", "c"])
    assert scores.overall == ClassScore(loss=1.5, examples=4, accuracy=0.5)
    assert scores.categories == {
        "a": ClassScore(loss=1.0, examples=3, accuracy=2 / 3),
        "c": ClassScore(loss=3.0, examples=1, accuracy=0.0),
    }
    assert scores.json() == {
        "accuracy": 0.5,
        "loss": 1.5,
        "examples": 4,
        "categories": {
            "a": {"accuracy": 2 / 3, "loss": 1.0, "examples": 3},
            "c": {"accuracy": 0.0, "loss": 3.0, "examples": 1},
        },
    }


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0, 50)), min_size=1, max_size=30))
def test_the_whole_is_the_weighted_mean_of_its_classes(rows: list[tuple[int, int, float]]) -> None:
    scores = summarise([Choice(*row) for row in rows], ["a", "b", "c", "d"])
    parts = scores.categories.values()
    assert sum(part.examples for part in parts) == scores.overall.examples == len(rows)
    for name in ("accuracy", "loss"):
        mean = math.fsum(getattr(part, name) * part.examples for part in parts) / len(rows)
        assert getattr(scores.overall, name) == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize(
    ("biases", "chosen"),
    [([0, 0, 0, 0, 0], 0), ([1, 2, 2, 0, 2], 1), ([-1, -1, -1, -3, -1], 0), ([0, 0, 0, 0, 1e-3], 4)],
)
def test_of_equal_logits_the_first_class_is_chosen(material: Material, biases: list[float], chosen: int) -> None:
    """Each example's loss is the log-sum-exp of the logits less that of its class."""
    for choice in with_biases(material.model, material.test, biases):
        assert choice.chosen == chosen
        expected = math.log(sum(map(math.exp, biases))) - biases[choice.label]
        assert choice.loss == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_loss_of_guessing(material: Material) -> None:
    labels = [example.label for example in material.test.examples]
    choices = with_biases(material.model, material.test, [0.0] * 5)
    scores = summarise(choices, CLASSES).overall
    assert scores.loss == pytest.approx(math.log(5), rel=1e-6)
    assert scores.accuracy == labels.count(0) / 10


def test_classes_have_the_names_and_numbers_of_the_data(material: Material) -> None:
    scores, choices = evaluate(material.model, material.test, EvaluationConfig())
    assert [choice.label for choice in choices] == [example.label for example in material.test.examples]
    assert isinstance(material.members, Divided)
    held_out = material.members.corpus.test["category"]
    assert {name: score.examples for name, score in scores.categories.items()} == {
        name: held_out.count(name) for name in CLASSES if name in held_out
    }
    right = [CLASSES[choice.chosen] == name for choice, name in zip(choices, held_out, strict=True)]
    assert scores.overall.accuracy == sum(right) / len(right)


def slow(model: FoundationModel, shard: Shard) -> list[Choice]:
    """One example at a time, in float64 behind the model."""
    found = []
    for example in shard.examples:
        batch: Any = shard.collate([example])
        with torch.inference_mode():
            [logits] = model.lm(**batch.inputs()).logits.double().tolist()
        loss = math.log(math.fsum(map(math.exp, logits))) - logits[example.label]
        found.append(Choice(example.label, logits.index(max(logits)), loss))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_images_in_any_batches_are_those_one_at_a_time(material: Material, batch_size: int) -> None:
    check_batches(material, batch_size)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A tiny BERT with ten held-out texts of different lengths."""
    folder: Path = tmp_path_factory.mktemp("texts")
    model, data = save_tiny_family("bert", folder / "bert"), write_texts(folder / "data.jsonl")
    return assembly.gather(parse(config(model, data, data={"task": "text_classification", "test_size": 10})))


@pytest.mark.parametrize("batch_size", [3, 10])
def test_padded_texts_in_any_batches_are_those_one_at_a_time(texts: Material, batch_size: int) -> None:
    assert len({len(example.input_ids) for example in texts.test.examples}) > 1
    check_batches(texts, batch_size)


def check_batches(material: Material, batch_size: int) -> None:
    expected = slow(material.model, material.test)
    heard: list[tuple[int, int]] = []
    options = EvaluationConfig(batch_size=batch_size)
    _, found = evaluate(material.model, material.test, options, lambda done, total: heard.append((done, total)))
    for one, other in zip(found, expected, strict=True):
        assert (one.label, one.chosen) == (other.label, other.chosen)
        assert one.loss == pytest.approx(other.loss, rel=1e-4, abs=1e-5)
    assert heard == [(min(done, 10), 10) for done in range(batch_size, 10 + batch_size, batch_size)]


def test_a_cap_takes_the_first_examples(material: Material) -> None:
    whole = evaluate(material.model, material.test, EvaluationConfig())[1]
    scores, choices = evaluate(material.model, material.test, EvaluationConfig(max_examples=4))
    assert [choice.label for choice in choices] == [choice.label for choice in whole[:4]]
    assert scores.overall.examples == 4


def test_a_loss_that_is_not_finite_is_null(material: Material) -> None:
    choices = with_biases(material.model, material.test, [math.inf, 0, 0, 0, 0])
    values = summarise(choices, CLASSES).json()
    assert values["loss"] is None
    assert values["accuracy"] == 0, "an overflow chooses nothing, not class 0"
    assert {choice.chosen for choice in choices} == {-1}
