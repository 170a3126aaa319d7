"""Image classification: a vision model with a head of its own for the classes of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import datasets

from emberfed import metrics
from emberfed.costs import Work
from emberfed.data.config import ImageDataConfig
from emberfed.data.corpus import Corpus
from emberfed.data.images import (
    ImageBatch,
    ImageShard,
    encode_images,
    load_images,
    load_own_images,
    load_preprocessing,
    with_their_files,
)
from emberfed.data.own import named_columns, own_section
from emberfed.evaluation import EvaluationConfig, Score, Scores
from emberfed.evaluation import classes as choosing
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import load_model
from emberfed.seeds import Seeds
from emberfed.tasks import Pass, Progress, Task, classified


@final
class ImageClassification(Task):
    """One class for each image."""

    Config = ImageDataConfig
    metric = metrics.CLASSIFICATION

    def processor(self, config: ModelConfig) -> Any:
        """Load how the model wants its images."""
        return load_preprocessing(config)

    def corpus(self, config: ImageDataConfig, seeds: Seeds) -> Corpus:
        """Load images and their classes."""
        return load_images(config, seeds)

    def own_records(self, config: ImageDataConfig, folder: Path, classes: Sequence[str] | None) -> datasets.Dataset:
        """Load a client's images and their classes."""
        return load_own_images(own_section(config, folder), classes)

    def handed_out(self, records: datasets.Dataset, config: ImageDataConfig, format: str) -> datasets.Dataset:
        """Give images, as bytes, and classes the columns that the configuration names."""
        named = named_columns(records, "image", config.image, config.label)
        return with_their_files(named, config.path)

    def model(self, config: ModelConfig, processor: Any, classes: Sequence[str]) -> FoundationModel:
        """Load the model with a head for these classes."""
        return load_model(config, classes, "image_classification")

    def shard(
        self, records: datasets.Dataset, processor: Any, config: ImageDataConfig, classes: Sequence[str], where: str
    ) -> ImageShard:
        """Read images in the model's size."""
        return encode_images(records, processor, classes, where)

    def longest(self, config: ImageDataConfig, evaluation: EvaluationConfig) -> tuple[int, str]:
        """Say nothing: images are made of one size."""
        return 0, ""

    def forward(self, model: FoundationModel, batch: ImageBatch, router_aux_loss_coef: float = 0.0) -> Pass:
        """Return the cross-entropy of the classes."""
        return classified(model, batch, self.work(model, batch))

    def work(self, model: FoundationModel, batch: ImageBatch) -> Work:
        """Count patches, pairs and logits; every image has as many."""
        assert model.shape.image is not None, "a model of images"
        images, length = len(batch.labels), model.shape.image.positions
        return Work.of_batch(images, length, model.top_k, images)

    def evaluate(
        self, model: FoundationModel, processor: Any, shard: ImageShard, config: EvaluationConfig, progress: Progress
    ) -> Scores[Score]:
        """Return accuracy and loss."""
        return choosing.evaluate(model, shard, config, progress)[0]
