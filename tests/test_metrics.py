"""Measures of quality: their names, and which belong together."""

from __future__ import annotations

from emberfed.metrics import CLASSIFICATION, GENERATION, headline, headline_in, loss_beside, recorded_with


def test_names_for_people() -> None:
    assert [GENERATION.title, GENERATION.heading] == ["ROUGE-L", "ROUGE-L"]
    assert [CLASSIFICATION.title, CLASSIFICATION.heading] == ["accuracy", "Accuracy"]
    assert GENERATION.with_unit == "ROUGE-L"
    assert loss_beside(GENERATION).with_unit == "Response loss in nats per token"
    assert loss_beside(CLASSIFICATION).with_unit == "Loss in nats per example"
    assert loss_beside(GENERATION).heading == "Loss"


def test_which_way_is_better() -> None:
    assert (CLASSIFICATION.sign, CLASSIFICATION.direction) == (1, "higher is better")
    assert (loss_beside(CLASSIFICATION).sign, loss_beside(CLASSIFICATION).direction) == (-1, "lower is better")


def test_what_is_recorded_together() -> None:
    assert [metric.key for metric in recorded_with(GENERATION)] == ["rouge_l", "loss", "perplexity"]
    assert [metric.key for metric in recorded_with(CLASSIFICATION)] == ["accuracy", "loss"]


def test_a_headline_is_found_by_its_key() -> None:
    assert headline("accuracy") is CLASSIFICATION
    assert headline("rouge_l") is GENERATION
    assert headline_in({"loss": 1.0, "examples": 3, "accuracy": 0.5}) is CLASSIFICATION
    assert headline_in(["round", "rouge_l", "perplexity"]) is GENERATION
