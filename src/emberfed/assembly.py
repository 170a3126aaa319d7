"""From a configuration to all that the main loop works with; everything that can be wrong is found here, early."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

import datasets

from emberfed import clients, events, provenance
from emberfed.checkpoint import RunFolder
from emberfed.config import RunConfig
from emberfed.data.corpus import Corpus
from emberfed.data.inspect import inspect
from emberfed.data.partition import Partition, partition, split_client
from emberfed.data.shard import Shard
from emberfed.engine import Engine
from emberfed.errors import ConfigError, DataError
from emberfed.evaluation import Score, Scores
from emberfed.material import ClientsHere, Divided, Material
from emberfed.method import Method
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import cpu_threads
from emberfed.rounds import Federation
from emberfed.seeds import Seeds
from emberfed.training import Trainer, check_possible
from emberfed.worker import MemoryFolder, Worker


@final
class Materials:
    """Gathers material, one run's after another's; whoever asks for the last model or data again is given the same."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._models: dict[str, FoundationModel] = {}
        self._data: dict[str, Divided] = {}

    def gather(self, config: RunConfig) -> Material:
        """Load and check everything a run needs. Raises: ConfigError, DataError, ModelError."""
        seeds = Seeds(config.seed)
        data = self._divided(config, seeds)
        model = self._model(config, data)
        check_possible(model, config.training)
        check_length(model, config)
        budgets = clients.resolve(config.clients.tiers, model.native_top_k, model.largest_top_k)
        sizes = {id_: len(shard.examples) for id_, shard in data.shards.items()}
        enrolled = clients.enrol(sizes, config.clients, model.native_top_k, model.largest_top_k, seeds)
        return Material(
            model=model,
            processor=data.processor,
            classes=data.corpus.classes,
            test=data.test,
            shards=data.shards,
            held_out=data.held_out,
            members=data,
            clients=enrolled,
            budgets=tuple(budgets),
        )

    def _model(self, config: RunConfig, data: Divided) -> FoundationModel:
        key = repr((config.data.task, model_key(config), data.corpus.classes))
        if key not in self._models:
            self._models.clear()  # before the next one is loaded: two may not fit
            self._models[key] = config.task.model(config.model, data.processor, data.corpus.classes)
        return self._models[key]

    def _divided(self, config: RunConfig, seeds: Seeds) -> Divided:
        key = data_key(config)
        if key not in self._data:
            self._data.clear()
            self._data[key] = divide(config, seeds)
        return self._data[key]


def check_length(model: FoundationModel, config: RunConfig) -> None:
    """Check that a model whose positions are embedded has one for each token of an input. Raises: ConfigError."""
    longest, keys = config.task.longest(config.data, config.evaluation)
    if model.positions is not None and longest > model.positions:
        raise ConfigError(
            f"{keys} {longest} is more than the {model.positions} positions that this {model.family.model_type} model "
            f"has; lower it to that"
        )


def divide(config: RunConfig, seeds: Seeds) -> Divided:
    """Load data, divide it over clients and make examples of it. Raises: ConfigError, DataError, ModelError."""
    task, section = config.task, config.data
    processor = task.processor(config.model)
    corpus = task.corpus(section, seeds)
    divided = partition(corpus.train, section.partition, config.clients.count, seeds)
    training, held_out = _kept_apart(divided, section.client_test_share, seeds)
    _check_classes(corpus, training, held_out, section.path)

    def shard(records: datasets.Dataset, where: str) -> Shard:
        return task.shard(records, processor, section, corpus.classes, where)

    shards = {id_: shard(corpus.train.select(rows), id_) for id_, rows in training.items()}
    own = {id_: shard(corpus.train.select(rows), f"{id_} (kept apart)") for id_, rows in held_out.items()}
    test = shard(corpus.test, "test split")
    return Divided(processor, corpus, divided, shards, own, test, inspect(corpus, divided, shards, training))


def _kept_apart(divided: Partition, share: float, seeds: Seeds) -> tuple[_Rows, _Rows]:
    """Return the rows that clients train on, and those they keep for evaluation; no client keeps any if the share is 0.

    Raises: DataError if a client has too few.
    """
    if share == 0:
        return divided.rows, {}
    parts = {id_: split_client(id_, rows, share, seeds) for id_, rows in divided.rows.items()}
    return {id_: training for id_, (training, _) in parts.items()}, {id_: kept for id_, (_, kept) in parts.items()}


_Rows = Mapping[str, tuple[int, ...]]


def _check_classes(corpus: Corpus, training: _Rows, held_out: _Rows, path: str) -> None:
    """Check that some client trains on each class, once all keep examples apart. Raises: DataError."""
    if not (corpus.classes and held_out):
        return  # the corpus has training examples of each, and clients train on all of them
    names = corpus.train["category"]
    trained = {names[row] for rows in training.values() for row in rows}
    for name in corpus.classes:
        if name not in trained:
            raise DataError(
                f"data {path}: all training examples of class {name!r} are kept apart on clients "
                f"(data.client_test_share), so no client trains on it; give it more, lower the share, or leave the "
                f"class out"
            )


def model_key(config: RunConfig) -> ModelConfig:
    """Return what runs that share a loaded model agree on."""
    return config.model.model_copy(update={"threads": None})


def data_key(config: RunConfig) -> str:
    """Return what runs that share divided data, made into examples, agree on."""
    processor = config.model.tokenizer or config.model.path, config.model.revision
    return repr((config.seed, config.data, config.clients.count, processor))


def gather(config: RunConfig) -> Material:
    """Load and check everything a run needs. Raises: ConfigError, DataError, ModelError."""
    return Materials().gather(config)


def start(config: RunConfig, path: Path, material: Material) -> RunFolder:
    """Make the run folder, once the method has shown that it can begin.

    Raises: RunFolderError, StorageError; ConfigError or ModelError if the adapter cannot be made.
    """
    method(config).init(material.model, material.budgets, Seeds(config.seed).at(purpose="init"))
    told = provenance.describe(config, path.name, material)
    return RunFolder.create(path, config.yaml(), told, material.members.record())


def federate(
    config: RunConfig, folder: RunFolder, material: Material, listen: events.Listener = events.ignore
) -> Federation:
    """Put the parts together, with the clients whose data is here."""
    clients_here = worker(config, folder.path, material.here, listen)
    engine = config.engine_type(config.engine, clients_here, WorkerRecipe(config, folder.path, Path.cwd()))
    return federation(config, material, method(config, listen), engine)


def federation(config: RunConfig, material: Material, method: Method, engine: Engine) -> Federation:
    """Put the parts together, with clients wherever the engine has them."""
    return Federation(
        rounds=config.training.rounds,
        seeds=Seeds(config.seed),
        method=method,
        engine=engine,
        model=material.model,
        task=config.task,
        processor=material.processor,
        clients=material.clients,
        participation=config.clients,
        budgets=material.budgets,
        evaluated=tuple(budget for budget in material.budgets if config.evaluation.includes(budget.tier)),
        test=material.test,
        personal=config.data.client_test_share > 0,
        evaluation=config.evaluation,
        keep_uploads=config.output.keep_uploads,
        timing=config.clock if all(budget.device is not None for budget in material.budgets) else None,
    )


def method(config: RunConfig, listen: events.Listener = events.ignore) -> Method:
    """Return the method, with what it trains by."""
    return config.method_type(config.method, config.adapter, Trainer(config.training, listen))


def worker(config: RunConfig, folder: Path, here: ClientsHere, listen: events.Listener = events.ignore) -> Worker:
    """Return who answers for clients.

    Args:
        config: The configuration.
        folder: Where they keep their memories: the run's, or a client's own.
        here: Their model and data.
        listen: Hears of training.
    """
    task = config.task

    def assess(client: str, model: FoundationModel) -> Scores[Score]:
        return task.evaluate(model, here.processor, here.held_out[client], config.evaluation, _unheard)

    return Worker(
        method=method(config, listen),
        model=here.model,
        clients={client.id: client for client in here.clients},
        shards=here.shards.__getitem__,
        memory=MemoryFolder(folder / "memory"),
        seeds=Seeds(config.seed),
        assess=assess,
    )


@final
@dataclass(frozen=True, slots=True)
class WorkerRecipe:
    """How to make a run's worker again, in another process.

    Attributes:
        config: The run's configuration.
        folder: The run's folder.
        directory: Where relative paths of the configuration begin.
    """

    config: RunConfig
    folder: Path
    directory: Path

    def on(self, device: Literal["cpu", "cuda"]) -> WorkerRecipe:
        """Return the recipe of a worker whose model is on that kind of device."""
        model = self.config.model.model_copy(update={"device": device})
        return replace(self, config=replace(self.config, model=model))

    @contextmanager
    def open(self) -> Iterator[Worker]:
        """Load model and data in this process, which is the worker's alone: its working directory changes.

        Raises: EmberfedError.
        """
        os.chdir(self.directory)
        with cpu_threads(self.config.model.threads):
            yield worker(self.config, self.folder, gather(self.config).here)


def _unheard(done: int, total: int) -> None:
    """Hear of no progress: a client does not tell it."""
