"""Tokenised examples, shards and batches. Only the response and the end of text after it carry loss.

Shapes: B sequences, S positions (the longest of the batch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from emberfed.data.config import DataConfig
from emberfed.data.shard import Batch, Shard
from emberfed.data.templates import prompt
from emberfed.errors import DataError, ModelError

IGNORED = -100
"""Label of positions without loss, as in torch's cross-entropy."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised example.

    Attributes:
        input_ids: int32, prompt then response then end of text.
        prompt_length: Tokens of the prompt.
        reference: The response as text, for ROUGE.
        category: Its task category; empty if it has none.
    """

    input_ids: NDArray[np.int32]
    prompt_length: int
    reference: str
    category: str

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss."""
        return len(self.input_ids) - self.prompt_length


@final
@dataclass(frozen=True, slots=True)
class ShardReport:
    """What tokenising did: examples kept, cut at either end, dropped for want of a target."""

    examples: int
    target_tokens: int
    truncated_prompts: int
    truncated_responses: int
    without_target: int

    def json(self) -> dict[str, int]:
        """Return the counts."""
        return asdict(self)


@final
@dataclass(frozen=True, slots=True, eq=False)
class ResponseBatch(Batch):
    """Right-padded sequences: int64 (B, S) each; `labels` is `IGNORED` on prompts and padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> ResponseBatch:
        """Return the batch on a device."""
        return ResponseBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    @property
    def targets(self) -> int:
        """Tokens that carry loss; a sequence's first token is never predicted."""
        return int((self.labels[:, 1:] != IGNORED).sum())


@final
@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Left-padded prompts for generation: int64 (B, S) each."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class ResponseShard(Shard):
    """Prompts and responses."""

    examples: tuple[Example, ...]
    report: ShardReport
    pad_token_id: int

    def digest(self) -> str:
        """Return a SHA-256 of the examples' tokens and prompts' lengths: the same data, the same digest."""
        told = hashlib.sha256()
        for example in self.examples:
            told.update(f"{example.prompt_length} {len(example.input_ids)} ".encode())
            told.update(example.input_ids.astype("<i4").tobytes())
        return told.hexdigest()

    def collate(self, examples: Sequence[Example]) -> ResponseBatch:
        """Return some of the examples as one right-padded batch."""
        return collate(examples, self.pad_token_id)


def tokenise(
    records: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, where: str
) -> ResponseShard:
    """Tokenise records of the schema of `formats`.

    Examples longer than `max_length` first lose the left of their prompt, down to half of `max_length` (its end,
    with the marker of the response, stays), then the end of their response. What is left always has a target.

    Args:
        records: Rows with instruction, context, response, category, history.
        tokenizer: The model's tokenizer.
        config: The `data` section.
        where: Whose records they are, for errors.

    Raises:
        DataError: if there are no records, or none with a target.
        ModelError: if the tokenizer has no end-of-text token.
    """
    if len(records) == 0:
        raise DataError(f"{where} has no examples; use fewer clients, a larger data.partition alpha, or more data")
    end = end_of_text(tokenizer)
    texts = [prompt(record, config.template, tokenizer) for record in records]
    # A chat template writes its special tokens itself; other prompts get those the tokenizer puts before a text.
    chat = config.template == "chat"
    prompts = _token_ids(tokenizer, texts, add_special_tokens=not chat, split_special_tokens=not chat)
    responses = _token_ids(tokenizer, list(records["response"]), add_special_tokens=False, split_special_tokens=True)
    examples, cut_prompts, cut_responses = [], 0, 0
    for record, prompt_ids, response_ids in zip(records, prompts, responses, strict=True):
        if not response_ids:
            continue
        opening = prompt_ids[:-1] if prompt_ids and prompt_ids[-1] == end and config.template != "chat" else prompt_ids
        target = [*response_ids, end]
        room = max(config.max_length - len(target), config.max_length // 2)
        starts = int(bool(opening) and opening[0] == tokenizer.bos_token_id)
        kept_prompt = opening if len(opening) <= room else [*opening[:starts], *opening[starts - room :]]
        kept_target = target[: config.max_length - len(kept_prompt)]
        cut_prompts += len(kept_prompt) < len(opening)
        cut_responses += len(kept_target) < len(target)
        ids = np.asarray([*kept_prompt, *kept_target], dtype=np.int32)
        examples.append(Example(ids, len(kept_prompt), record["response"], record["category"]))
    if not examples:
        raise DataError(f"{where}: none of the {len(records)} examples has a response the tokenizer can see")
    report = ShardReport(
        examples=len(examples),
        target_tokens=sum(example.target_tokens for example in examples),
        truncated_prompts=cut_prompts,
        truncated_responses=cut_responses,
        without_target=len(records) - len(examples),
    )
    pad = tokenizer.pad_token_id
    return ResponseShard(tuple(examples), report, end if pad is None else int(pad))


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: bool) -> list[list[int]]:
    """Tokenise texts; with `split_special_tokens`, `<|endoftext|>` written in the data is text, not an end."""
    ids: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]
    return ids


def collate(examples: Sequence[Example], pad_token_id: int) -> ResponseBatch:
    """Return the examples as one right-padded batch."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, example.prompt_length : len(ids)] = ids[example.prompt_length :]
    return ResponseBatch(input_ids, attention_mask, labels)


def left_padded(examples: Sequence[Example], pad_token_id: int) -> Prompts:
    """Return the examples' prompts as one left-padded batch, so that all end where generation begins."""
    length = max(example.prompt_length for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids[: example.prompt_length].astype(np.int64))
        input_ids[row, length - len(ids) :] = ids
        attention_mask[row, length - len(ids) :] = 1
    return Prompts(input_ids, attention_mask)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a response. Raises: ModelError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token (eos_token); answers could not learn to stop. Set one")
    return int(tokenizer.eos_token_id)


def check_vocabulary(tokenizer: Any, embeddings: int) -> None:
    """Check that the model can embed every id of the tokenizer.

    Raises: ModelError naming both sizes if some id has no row in the model's embedding.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= embeddings:
        raise ModelError(
            f"tokenizer and model do not belong together: the tokenizer has ids up to {largest}, "
            f"the model {embeddings} embeddings; give the model's own tokenizer (model.tokenizer)"
        )
