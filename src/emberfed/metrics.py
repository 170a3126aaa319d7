"""The figures that say how good a model is: their names in files, their names for people, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

Headline = Literal["rouge_l", "accuracy"]
"""Key of the figure that a task is judged by; `metric` in `run.json`."""
Aim = Literal["headline", "loss"]
"""Which of the two figures that every evaluation has is aimed at."""


@final
@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of quality.

    Attributes:
        key: Its name in `metrics.jsonl`.
        title: Its name for people, as it stands within a sentence.
        better: Which values are good.
        of: What it is of, if its name does not say so.
        unit: What it is counted in; empty for a plain number.
        by: What held-out examples are grouped by when it is given for each group.
    """

    key: str
    title: str
    better: Literal["higher", "lower"]
    of: str = ""
    unit: str = ""
    by: Literal["category", "class"] = "category"

    @property
    def heading(self) -> str:
        """Its name where a line begins: `Loss`."""
        return _begun(self.title)

    @property
    def full_heading(self) -> str:
        """Its name with what it is of: `Response loss`."""
        return _begun(f"{self.of} {self.title}".strip())

    @property
    def with_unit(self) -> str:
        """The same with its unit: `Response loss in nats per token`."""
        return f"{self.full_heading} in {self.unit}" if self.unit else self.full_heading

    @property
    def direction(self) -> str:
        """Whether higher or lower is better."""
        return f"{self.better} is better"

    @property
    def sign(self) -> Literal[1, -1]:
        """1 if higher is better, -1 if lower is."""
        return 1 if self.better == "higher" else -1

    def reached(self, value: float, target: float) -> bool:
        """Return whether a value is a target or better; NaN is neither."""
        return self.sign * value >= self.sign * target

    def easiest_first(self, targets: Iterable[float]) -> list[float]:
        """Return targets in the order in which a run that gets better reaches them."""
        return sorted(targets, key=lambda target: self.sign * target)


def _begun(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


GENERATION = Metric("rouge_l", "ROUGE-L", "higher")
"""Headline of models that write an answer: mean ROUGE-L F over examples."""
CLASSIFICATION = Metric("accuracy", "accuracy", "higher", by="class")
"""Headline of models that choose a class: share of examples whose class is chosen."""

_RESPONSE_LOSS = Metric("loss", "loss", "lower", "response", "nats per token")
_CLASS_LOSS = Metric("loss", "loss", "lower", "", "nats per example")
_PERPLEXITY = Metric("perplexity", "perplexity", "lower")
_HEADLINES: dict[str, Metric] = {metric.key: metric for metric in (GENERATION, CLASSIFICATION)}
_BESIDE = {GENERATION: (_RESPONSE_LOSS, _PERPLEXITY), CLASSIFICATION: (_CLASS_LOSS,)}


def headline_in(fields: Iterable[str]) -> Metric:
    """Return the headline metric that is among the fields of an evaluation."""
    return next(_HEADLINES[name] for name in fields if name in _HEADLINES)


def headline(key: Headline) -> Metric:
    """Return the headline metric of that key."""
    return _HEADLINES[key]


def loss_beside(headline: Metric) -> Metric:
    """Return the loss that is recorded with a headline metric."""
    return _BESIDE[headline][0]


def aimed_at(headline: Metric, aim: Aim) -> Metric:
    """Return the metric that is meant where this is the headline."""
    metrics: dict[Aim, Metric] = {"headline": headline, "loss": loss_beside(headline)}
    return metrics[aim]


def recorded_with(headline: Metric) -> tuple[Metric, ...]:
    """Return everything an evaluation of this headline holds: the headline, its loss, and what else there is."""
    return (headline, *_BESIDE[headline])
