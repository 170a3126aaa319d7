"""Text classification: an encoder with a head of its own for the classes of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import datasets

from emberfed import metrics
from emberfed.costs import Work
from emberfed.data.config import TextClassDataConfig
from emberfed.data.corpus import Corpus
from emberfed.data.own import named_columns, own_section
from emberfed.data.text_classes import TextBatch, TextShard, load_own_texts, load_texts, tokenise_texts
from emberfed.data.tokenise import check_vocabulary
from emberfed.evaluation import EvaluationConfig, Score, Scores
from emberfed.evaluation import classes as choosing
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import check_family, load_model, load_tokenizer
from emberfed.seeds import Seeds
from emberfed.tasks import Pass, Progress, Task, classified


@final
class TextClassification(Task):
    """One class for each text."""

    Config = TextClassDataConfig
    metric = metrics.CLASSIFICATION

    def processor(self, config: ModelConfig) -> Any:
        """Load the tokenizer."""
        check_family(config, "text_classification")
        return load_tokenizer(config)

    def corpus(self, config: TextClassDataConfig, seeds: Seeds) -> Corpus:
        """Load texts and their classes."""
        return load_texts(config, seeds)

    def own_records(self, config: TextClassDataConfig, folder: Path, classes: Sequence[str] | None) -> datasets.Dataset:
        """Load a client's texts and their classes."""
        return load_own_texts(own_section(config, folder), classes)

    def handed_out(self, records: datasets.Dataset, config: TextClassDataConfig, format: str) -> datasets.Dataset:
        """Give texts and classes the columns that the configuration names."""
        return named_columns(records, "text", config.text, config.label)

    def model(self, config: ModelConfig, processor: Any, classes: Sequence[str]) -> FoundationModel:
        """Load the model, which must embed every token, with a head for these classes."""
        model = load_model(config, classes, "text_classification")
        check_vocabulary(processor, model.lm.get_input_embeddings().num_embeddings)
        return model

    def shard(
        self, records: datasets.Dataset, processor: Any, config: TextClassDataConfig, classes: Sequence[str], where: str
    ) -> TextShard:
        """Tokenise texts."""
        return tokenise_texts(records, processor, config, classes, where)

    def longest(self, config: TextClassDataConfig, evaluation: EvaluationConfig) -> tuple[int, str]:
        """Count a text."""
        return config.max_length, "data.max_length"

    def forward(self, model: FoundationModel, batch: TextBatch, router_aux_loss_coef: float = 0.0) -> Pass:
        """Return the cross-entropy of the classes."""
        return classified(model, batch, self.work(model, batch))

    def work(self, model: FoundationModel, batch: TextBatch) -> Work:
        """Count positions and pairs; there is one row of logits for each text."""
        texts, length = batch.input_ids.shape
        return Work(
            tokens=texts * length,
            routed_tokens=int(batch.attention_mask.sum()),
            attended_pairs=texts * length**2,
            top_k=model.top_k,
            head_tokens=texts,
        )

    def evaluate(
        self, model: FoundationModel, processor: Any, shard: TextShard, config: EvaluationConfig, progress: Progress
    ) -> Scores[Score]:
        """Return accuracy and loss."""
        return choosing.evaluate(model, shard, config, progress)[0]
