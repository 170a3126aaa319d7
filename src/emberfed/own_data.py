"""Data where it belongs to clients: reading one's own, and handing a corpus out to those who will hold it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import datasets

from emberfed import storage
from emberfed.data.config import CorpusConfig
from emberfed.data.corpus import Corpus
from emberfed.data.loading import quietly
from emberfed.data.partition import split_client
from emberfed.data.shard import Shard
from emberfed.seeds import Seeds
from emberfed.tasks import Task

_FILE = "data.parquet"
"""Of the formats that all tasks read, the one that keeps every value's type: words such as 2024-01-01 in a JSON file
come back as dates."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class OwnData:
    """What a client works with.

    Attributes:
        train: What it trains on.
        held_out: What it keeps for evaluating its own model; None if `data.client_test_share` is 0.
    """

    train: Shard
    held_out: Shard | None


def own_shards(
    task: Task,
    config: CorpusConfig,
    folder: Path,
    processor: Any,
    classes: Sequence[str],
    client: str,
    seeds: Seeds,
) -> OwnData:
    """Read a client's own folder and make examples of it.

    A folder that `hand_out` wrote gives the shards that the client has when a run divides the same corpus.

    Args:
        task: What is learnt.
        config: The `data` section.
        folder: The client's data.
        processor: What makes the model's inputs of records.
        classes: Names of all classes of the federation; empty if the task has none.
        client: The client's id.
        seeds: The run's.

    Raises:
        DataError: if the folder holds nothing that can be used, a label that is no class, or too little to keep some
            apart.
    """
    records = task.own_records(config, folder, classes)
    rows = tuple(range(len(records)))

    def shard(chosen: Sequence[int], where: str) -> Shard:
        return task.shard(records.select(chosen), processor, config, classes, where)

    if config.client_test_share == 0:
        return OwnData(shard(rows, client), None)
    training, kept = split_client(client, rows, config.client_test_share, seeds)
    return OwnData(shard(training, client), shard(kept, f"{client} (kept apart)"))


def hand_out(task: Task, config: CorpusConfig, corpus: Corpus, rows: Mapping[str, Sequence[int]], target: Path) -> None:
    """Write each client's records into a folder of its own, named by its id, below `target`.

    Args:
        task: What is learnt.
        config: The `data` section.
        corpus: All records.
        rows: Of the training split, by client id.
        target: A folder, absent or empty; it appears when it is whole.

    Raises: StorageError.
    """
    with storage.new_folder(target) as filled, quietly():
        for client, numbers in rows.items():
            records = task.handed_out(corpus.train.select(numbers), config, corpus.report.format)
            _write(records, filled / client / _FILE)


def _write(records: datasets.Dataset, file: Path) -> None:
    """Write a table, to the disk itself. Raises: StorageError."""
    with storage.explained(file):
        file.parent.mkdir(parents=True)
        with file.open("wb") as opened:
            records.to_parquet(opened)
            opened.flush()
            os.fsync(opened.fileno())
