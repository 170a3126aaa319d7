"""Accuracy and loss of models that choose a class, overall and by true class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch.nn import functional as F

from emberfed.data.shard import ClassBatch, Shard
from emberfed.evaluation.config import EvaluationConfig
from emberfed.evaluation.scores import Score, Scores
from emberfed.models.foundation_model import FoundationModel

_NOTHING = -1


@final
@dataclass(frozen=True, slots=True)
class ClassScore(Score):
    """Share of examples whose class is the one with the largest logit (the first of several), and mean nats."""

    accuracy: float


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """What the model made of one example: its class, the one chosen (-1: none), the cross-entropy."""

    label: int
    chosen: int
    loss: float


def evaluate(
    model: FoundationModel,
    shard: Shard,
    config: EvaluationConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> tuple[Scores[ClassScore], list[Choice]]:
    """Score the model, as it stands (adapter attached, K set), on the shard.

    Args:
        model: The model under evaluation; it knows the names of its classes.
        shard: Held-out examples, whose batches are `ClassBatch`.
        config: Options.
        progress: Called with the examples done and in total.

    Returns:
        The scores, and the choices in the shard's order.
    """
    examples = shard.examples[: config.max_examples]
    choices: list[Choice] = []
    with torch.inference_mode():
        for start in range(0, len(examples), config.batch_size):
            batch = shard.collate(examples[start : start + config.batch_size]).to(model.device)
            assert isinstance(batch, ClassBatch)
            logits = model.lm(**batch.inputs()).logits.float()
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            # A model that overflows chooses nothing: argmax would call it class 0, and right wherever that is true.
            chosen = logits.argmax(dim=-1).where(logits.isfinite().all(dim=-1), _NOTHING)
            rows = zip(batch.labels.tolist(), chosen.tolist(), losses.tolist(), strict=True)
            choices.extend(Choice(*row) for row in rows)
            progress(len(choices), len(examples))
    names = model.lm.config.id2label
    return summarise(choices, [names[label] for label in sorted(names)]), choices


def summarise(choices: Sequence[Choice], classes: Sequence[str]) -> Scores[ClassScore]:
    """Return scores over all choices, and by true class."""
    by_class = {
        name: _score(own)
        for label, name in enumerate(classes)
        if (own := [choice for choice in choices if choice.label == label])
    }
    return Scores(_score(choices), by_class)


def _score(choices: Sequence[Choice]) -> ClassScore:
    right = sum(choice.chosen == choice.label for choice in choices)
    loss = math.fsum(choice.loss for choice in choices) / len(choices)
    return ClassScore(loss, len(choices), right / len(choices))
