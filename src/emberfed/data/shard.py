"""What a client holds and what a training step sees of it, whatever the task."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import torch


class Report(Protocol):
    """What making a shard did: counts, as `data inspect` and partition.json show them."""

    @property
    def examples(self) -> int:
        """Examples kept."""
        ...

    def json(self) -> dict[str, int]:
        """Return the counts."""
        ...


class Batch(ABC):
    """Examples as tensors, on one device."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""

    @property
    @abstractmethod
    def targets(self) -> int:
        """How many predictions carry loss: tokens of responses, or examples with a class."""


class ClassBatch(Batch):
    """Examples with a class each.

    Attributes:
        labels: int64 (B,), which class.
    """

    labels: torch.Tensor

    @abstractmethod
    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what the model is called with, by the name of its argument."""

    @property
    def targets(self) -> int:
        """Examples."""
        return len(self.labels)


class Shard(ABC):
    """A client's examples (or the test split's), in the order of its rows."""

    examples: tuple[Any, ...]
    report: Report

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Return some of the examples as one batch."""

    @abstractmethod
    def digest(self) -> str:
        """Return a SHA-256 of what the examples hold: the same data, the same digest."""

    def only(self, rows: Sequence[int]) -> Self:
        """Return a shard of some of the examples, in the order given."""
        chosen = copy.copy(self)
        object.__setattr__(chosen, "examples", tuple(self.examples[row] for row in rows))
        return chosen

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        """Yield all examples once, `size` at a time (the last may be smaller), in an order drawn from `generator`."""
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield tuple(self.examples[index] for index in order[start : start + size])
