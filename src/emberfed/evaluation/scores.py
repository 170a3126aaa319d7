"""Scores, whatever the task: over all held-out examples, and over those of each category."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar, final

from emberfed.records import Json


@dataclass(frozen=True, slots=True)
class Score(ABC):
    """Quality on some examples; what else there is depends on the task.

    Attributes:
        loss: Nats per target.
        examples: How many.
    """

    loss: float
    examples: int

    def json(self) -> dict[str, Json]:
        """Return the figures; one that is not finite (an overflow in the model) is null, as JSON has no NaN."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


S = TypeVar("S", bound=Score, covariant=True)


@final
@dataclass(frozen=True, slots=True)
class Scores(Generic[S]):
    """Quality on a held-out split and on each of its categories."""

    overall: S
    categories: Mapping[str, S]

    def json(self) -> dict[str, Json]:
        """Return the fields of an evaluation's line in `metrics.jsonl`."""
        return {**self.overall.json(), "categories": {name: score.json() for name, score in self.categories.items()}}
