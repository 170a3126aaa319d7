"""Answering: a causal language model learns the responses to instructions. Only they carry loss.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import datasets
import torch
from torch.nn import functional as F

from emberfed import metrics
from emberfed.costs import Work
from emberfed.data.config import DataConfig
from emberfed.data.corpus import Corpus
from emberfed.data.formats import SCHEMA
from emberfed.data.loading import load, load_own
from emberfed.data.own import own_section, source_columns
from emberfed.data.tokenise import IGNORED, ResponseBatch, ResponseShard, check_vocabulary, tokenise
from emberfed.evaluation import EvaluationConfig, Score, Scores, evaluate
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import check_family, load_model, load_tokenizer
from emberfed.seeds import Seeds
from emberfed.tasks import Pass, Progress, Task


@final
class Generation(Task):
    """Instruction tuning."""

    Config = DataConfig
    metric = metrics.GENERATION

    def processor(self, config: ModelConfig) -> Any:
        """Load the tokenizer."""
        check_family(config, "generation")
        return load_tokenizer(config)

    def corpus(self, config: DataConfig, seeds: Seeds) -> Corpus:
        """Load records of instructions and responses."""
        return load(config, seeds)

    def own_records(self, config: DataConfig, folder: Path, classes: Sequence[str] | None) -> datasets.Dataset:
        """Load a client's records of instructions and responses."""
        return load_own(own_section(config, folder))

    def handed_out(self, records: datasets.Dataset, config: DataConfig, format: str) -> datasets.Dataset:
        """Give records the columns they came with."""
        rows = records.to_list()
        besides = [{name: row[name] for name in row if name not in SCHEMA or name == "category"} for row in rows]
        written = source_columns(format, rows)
        return datasets.Dataset.from_list([{**one, **other} for one, other in zip(besides, written, strict=True)])

    def model(self, config: ModelConfig, processor: Any, classes: Sequence[str]) -> FoundationModel:
        """Load the model, which must embed every token."""
        model = load_model(config, task="generation")
        check_vocabulary(processor, model.shape.vocabulary)
        return model

    def shard(
        self, records: datasets.Dataset, processor: Any, config: DataConfig, classes: Sequence[str], where: str
    ) -> ResponseShard:
        """Tokenise records."""
        return tokenise(records, processor, config, where)

    def longest(self, config: DataConfig, evaluation: EvaluationConfig) -> tuple[int, str]:
        """Count a prompt and its answer."""
        return config.max_length + evaluation.max_new_tokens, "data.max_length + evaluation.max_new_tokens ="

    def forward(self, model: FoundationModel, batch: ResponseBatch, router_aux_loss_coef: float = 0.0) -> Pass:
        """Return the cross-entropy of the response tokens.

        Logits are formed only at positions where some sequence of the batch has a target: with large vocabularies they
        would otherwise be the largest tensor of all.
        """
        positions = _head_positions(batch)
        output = model.lm(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=positions,
            use_cache=False,
            output_router_logits=router_aux_loss_coef > 0,
        )
        targets = batch.labels[:, positions + 1]
        logits = output.logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        auxiliary = router_aux_loss_coef * output.aux_loss if router_aux_loss_coef > 0 else torch.zeros_like(loss)
        work = self.work(model, batch)
        return Pass(loss, auxiliary, work.routed_tokens, work)

    def work(self, model: FoundationModel, batch: ResponseBatch) -> Work:
        """Count positions, pairs and logits."""
        sequences, length = batch.input_ids.shape
        return Work(
            tokens=sequences * length,
            routed_tokens=int(batch.attention_mask.sum()),
            attended_pairs=sequences * length**2,
            top_k=model.top_k,
            head_tokens=sequences * len(_head_positions(batch)),
        )

    def evaluate(
        self,
        model: FoundationModel,
        processor: Any,
        shard: ResponseShard,
        config: EvaluationConfig,
        progress: Progress,
    ) -> Scores[Score]:
        """Return ROUGE-L of greedy answers, and the loss of the responses."""
        return evaluate(model, processor, shard, config, progress)[0]


def _head_positions(batch: ResponseBatch) -> torch.Tensor:
    """Return the positions whose logits are needed."""
    return (batch.labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
