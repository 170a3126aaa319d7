"""Texts with a class each: loading, shards and batches.

Shapes: B texts of a batch, S positions (the longest of the batch).
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

from emberfed.data.classes import check_columns, check_learnable, class_names, declared
from emberfed.data.config import TextClassDataConfig
from emberfed.data.corpus import Corpus, LoadReport
from emberfed.data.loading import read_table
from emberfed.data.own import check_known
from emberfed.data.shard import ClassBatch, Shard
from emberfed.errors import DataError
from emberfed.seeds import Seeds


@final
@dataclass(frozen=True, slots=True, eq=False)
class TextExample:
    """One text: `input_ids` int32, with the tokenizer's special tokens, and the number of its class."""

    input_ids: NDArray[np.int32]
    label: int


@final
@dataclass(frozen=True, slots=True)
class TextShardReport:
    """What tokenising did: texts kept, their tokens, how many were cut at their end."""

    examples: int
    tokens: int
    truncated: int

    def json(self) -> dict[str, int]:
        """Return the counts."""
        return asdict(self)


@final
@dataclass(frozen=True, slots=True, eq=False)
class TextBatch(ClassBatch):
    """Right-padded texts: `input_ids` and `attention_mask` int64 (B, S), `labels` int64 (B,)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> TextBatch:
        """Return the batch on a device."""
        return TextBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the texts and what of them is padding."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


@final
@dataclass(frozen=True, slots=True, eq=False)
class TextShard(Shard):
    """Tokenised texts."""

    examples: tuple[TextExample, ...]
    report: TextShardReport
    pad_token_id: int

    def collate(self, examples: Sequence[TextExample]) -> TextBatch:
        """Return some of the examples as one right-padded batch."""
        length = max(len(example.input_ids) for example in examples)
        input_ids = torch.full((len(examples), length), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, example in enumerate(examples):
            input_ids[row, : len(example.input_ids)] = torch.from_numpy(example.input_ids.astype(np.int64))
            attention_mask[row, : len(example.input_ids)] = 1
        return TextBatch(input_ids, attention_mask, torch.tensor([example.label for example in examples]))

    def digest(self) -> str:
        """Return a SHA-256 of the texts' tokens and the numbers of their classes."""
        told = hashlib.sha256()
        for example in self.examples:
            told.update(f"{example.label} {len(example.input_ids)} ".encode())
            told.update(example.input_ids.astype("<i4").tobytes())
        return told.hexdigest()


def load_texts(config: TextClassDataConfig, seeds: Seeds) -> Corpus:
    """Load texts, drop empty ones and those that came before, shuffle, limit, hold out.

    No text is on both sides of the split (letter case and spaces aside); of two the first stays, whatever their
    classes. The shuffle is drawn from `seeds`.

    Returns:
        Records with columns `text`, `category` and that of the label (both the class's name), and the source's scalar
        ones.

    Raises:
        DataError: if the texts cannot be found or read, have no classes or one, if there are too few, or if none of
            some class is left to train on.
    """
    where = f"data {config.path}"
    if config.path == "builtin":
        raise DataError("there is no built-in data for task text_classification; give data.path a file or folder")
    usable = _usable(config)
    order = seeds.numpy("data order").permutation(len(usable.rows))[: config.limit]
    if len(order) <= config.test_size:
        raise DataError(
            f"{where} has {len(order)} usable texts ({usable.read} read, {usable.empty} empty); data.test_size "
            f"{config.test_size} leaves none to train on; lower it or give more data"
        )
    chosen = usable.records(config, [usable.rows[index] for index in order])
    train, test = chosen.select(range(config.test_size, len(order))), chosen.select(range(config.test_size))
    classes = declared(usable.raw, config.label, usable.names)
    check_learnable(classes, train["category"], test["category"], where)
    report = LoadReport(
        format="texts",
        read=usable.read,
        duplicates=usable.read - usable.empty - len(usable.rows),
        empty=usable.empty,
        over_limit=len(usable.rows) - len(order),
        train=len(train),
        test=len(test),
    )
    return Corpus(train, test, report, classes)


def load_own_texts(config: TextClassDataConfig, classes: Sequence[str] | None) -> datasets.Dataset:
    """Load what is all a client's: as `load_texts` does, in the order of the files, nothing held out or left out.

    Raises: DataError if the texts cannot be found or read, one has a label that is none of the classes, or all are
        empty.
    """
    usable = _usable(config)
    check_known(usable.names, classes, f"data {config.path}")
    if not usable.rows:
        raise DataError(f"data {config.path} has no usable text ({usable.read} read, all empty); give it some")
    return usable.records(config, usable.rows)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Usable:
    """A table, each of its records' class, the rows that are neither empty nor came before, and how many are empty."""

    raw: datasets.Dataset
    names: Sequence[str]
    rows: Sequence[int]
    empty: int

    @property
    def read(self) -> int:
        """Records of the table."""
        return len(self.names)

    def records(self, config: TextClassDataConfig, rows: Sequence[int]) -> datasets.Dataset:
        """Return some of the rows with columns `text`, `category`, that of the label, and the scalar ones."""
        scalars = [
            name
            for name, feature in self.raw.features.items()
            if isinstance(feature, datasets.Value) and name not in (config.text, config.label, "text", "category")
        ]
        taken, classed = self.raw.select(rows), [self.names[row] for row in rows]
        own = {config.label: classed, "text": list(taken[config.text]), "category": classed}
        return datasets.Dataset.from_dict({**own, **{name: list(taken[name]) for name in scalars}})


def _usable(config: TextClassDataConfig) -> _Usable:
    """Read a table and find the rows that count."""
    where = f"data {config.path}"
    raw = read_table(config)
    check_columns(raw, {"text": config.text, "label": config.label}, where)
    names = class_names(raw, config.label, where)
    kept: dict[str, int] = {}
    empty = 0
    for row, text in enumerate(raw[config.text]):
        if not isinstance(text, str):
            raise DataError(f"{where}, record {row + 1}: {text!r} is no text; mend column {config.text!r}")
        key = " ".join(text.casefold().split())
        empty += not key
        if key:
            kept.setdefault(key, row)
    return _Usable(raw, names, list(kept.values()), empty)


def tokenise_texts(
    records: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: TextClassDataConfig,
    classes: Sequence[str],
    where: str,
) -> TextShard:
    """Tokenise texts with the special tokens their model expects; longer ones are cut to `config.max_length`.

    Raises: DataError if there are no texts; `where` says whose they would be.
    """
    if len(records) == 0:
        raise DataError(f"{where} has no examples; use fewer clients, a larger data.partition alpha, or more data")
    numbers = {name: number for number, name in enumerate(classes)}
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False, "split_special_tokens": True}
    whole = tokenizer(list(records["text"]), **options)["input_ids"]
    cut = tokenizer(list(records["text"]), truncation=True, max_length=config.max_length, **options)["input_ids"]
    examples = tuple(
        TextExample(np.asarray(ids, dtype=np.int32), numbers[name])
        for ids, name in zip(cut, records["category"], strict=True)
    )
    report = TextShardReport(
        examples=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        truncated=sum(len(ids) < len(all_ids) for ids, all_ids in zip(cut, whole, strict=True)),
    )
    pad = tokenizer.pad_token_id
    return TextShard(examples, report, 0 if pad is None else int(pad))
