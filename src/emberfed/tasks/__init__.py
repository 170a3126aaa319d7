"""Tasks: what a model is trained to do. One file each; its name is `data.task` in the configuration.

A task ties together what belongs together: a section of data, what the records become, the loss of a batch, and how
good a model is. Methods, engines and rounds know none of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import datasets
import torch
from torch.nn import functional as F

from emberfed import plugins
from emberfed.costs import Work
from emberfed.data.config import CorpusConfig
from emberfed.data.corpus import Corpus
from emberfed.data.shard import ClassBatch, Shard
from emberfed.evaluation import EvaluationConfig, Score, Scores
from emberfed.metrics import Metric
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.seeds import Seeds

Progress = Callable[[int, int], None]
"""Called with the examples done and in total."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What a forward pass over a batch gives.

    Attributes:
        loss: Scalar, summed over the batch's targets, in nats.
        auxiliary: Scalar, the model's own load-balancing loss times its coefficient; 0 without.
        tokens: Positions that are not padding.
        work: What was computed.
    """

    loss: torch.Tensor
    auxiliary: torch.Tensor
    tokens: int
    work: Work


class Task(ABC):
    """What a model is trained to do. Tasks are final, and hold nothing.

    Attributes:
        Config: The `data` section.
        metric: The figure that tells how good a model is.
    """

    Config: ClassVar[type[CorpusConfig]]
    metric: ClassVar[Metric]

    @abstractmethod
    def processor(self, config: ModelConfig) -> Any:
        """Load what makes a model's inputs of records: a tokenizer, or the processing of images. Raises: ModelError."""

    @abstractmethod
    def corpus(self, config: Any, seeds: Seeds) -> Corpus:
        """Load records, drop duplicates, hold out some. Raises: DataError."""

    @abstractmethod
    def own_records(self, config: Any, folder: Path, classes: Sequence[str] | None) -> datasets.Dataset:
        """Load all that lies in a client's own folder (or file), in its order, duplicates and empty records dropped.

        Args:
            config: The `data` section, for how records are read; where, is told by the folder.
            folder: What the client has.
            classes: Names of all classes of the federation; empty if the task has none. None: the server has not told
                them yet, so any label may be one.

        Returns:
            Records as those of `corpus`.

        Raises: DataError naming the folder, if it holds nothing that can be used, or a label that is no class.
        """

    @abstractmethod
    def handed_out(self, records: datasets.Dataset, config: Any, format: str) -> datasets.Dataset:
        """Return records of a corpus with the columns that `own_records` reads by the same section.

        Args:
            records: Some of the corpus.
            config: The `data` section.
            format: What the corpus was read as, by its report.
        """

    @abstractmethod
    def model(self, config: ModelConfig, processor: Any, classes: Sequence[str]) -> FoundationModel:
        """Load the model. Raises: ModelError if it cannot be read, or does not go with the processor or the task."""

    @abstractmethod
    def shard(
        self, records: datasets.Dataset, processor: Any, config: Any, classes: Sequence[str], where: str
    ) -> Shard:
        """Return records as examples; `where` says whose they are. Raises: DataError."""

    @abstractmethod
    def longest(self, config: Any, evaluation: EvaluationConfig) -> tuple[int, str]:
        """Return the positions that an input may take, and the keys they are set by; 0 where the model fixes them."""

    @abstractmethod
    def forward(self, model: FoundationModel, batch: Any, router_aux_loss_coef: float = 0.0) -> Pass:
        """Run the model on a batch of the task's shards."""

    @abstractmethod
    def work(self, model: FoundationModel, batch: Any) -> Work:
        """Return what a forward pass over a batch would compute, without running it."""

    @abstractmethod
    def evaluate(
        self, model: FoundationModel, processor: Any, shard: Any, config: EvaluationConfig, progress: Progress
    ) -> Scores[Score]:
        """Score the model as it stands (adapter attached, K set) on a shard."""


def classified(model: FoundationModel, batch: ClassBatch, work: Work) -> Pass:
    """Run a model that chooses a class, and return the cross-entropy."""
    logits = model.lm(**batch.inputs()).logits.float()
    loss = F.cross_entropy(logits, batch.labels, reduction="sum")
    return Pass(loss, torch.zeros_like(loss), work.routed_tokens, work)


def task_names() -> list[str]:
    """Return the names that `data.task` takes."""
    return plugins.names("emberfed.tasks")


def load_task(name: str) -> Task:
    """Return the task of that name. Raises: ConfigError listing what exists if it is unknown."""
    found: type[Task] = plugins.load("emberfed.tasks", name, Task)  # type: ignore[type-abstract]
    return found()
