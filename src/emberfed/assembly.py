"""From a configuration to all that the main loop works with; everything that can be wrong is found here, early."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import datasets
import psutil
import torch

import emberfed
from emberfed import clients, events
from emberfed.checkpoint import RunFolder
from emberfed.clients import Budget, Client
from emberfed.config import RunConfig
from emberfed.data.corpus import Corpus
from emberfed.data.inspect import Inspection, inspect
from emberfed.data.partition import Partition, partition, split_client
from emberfed.data.shard import Shard
from emberfed.errors import ConfigError, DataError, RunFolderError
from emberfed.evaluation import Score, Scores
from emberfed.models.config import ModelConfig
from emberfed.models.fingerprint import fingerprint
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Json
from emberfed.rounds import Federation
from emberfed.seeds import Seeds
from emberfed.training import Trainer, check_possible
from emberfed.worker import MemoryFolder, Worker


@final
@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Model and data of a configuration, loaded, divided and made into examples.

    Attributes:
        model: The model.
        processor: What makes its inputs of records.
        corpus: All records.
        partition: Who holds which.
        shards: What each client trains on, by its id.
        held_out: What each client keeps for evaluating its own model; empty if `data.client_test_share` is 0.
        test: Held out on the server.
        inspection: What clients hold, in figures.
        clients: All clients.
        budgets: Those of all tiers.
    """

    model: FoundationModel
    processor: Any
    corpus: Corpus
    partition: Partition
    shards: Mapping[str, Shard]
    held_out: Mapping[str, Shard]
    test: Shard
    inspection: Inspection
    clients: tuple[Client, ...]
    budgets: tuple[Budget, ...]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Divided:
    """The part of the material that is made of the data section, with the model's processor."""

    processor: Any
    corpus: Corpus
    partition: Partition
    shards: Mapping[str, Shard]
    held_out: Mapping[str, Shard]
    test: Shard
    inspection: Inspection


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
            model,
            data.processor,
            data.corpus,
            data.partition,
            data.shards,
            data.held_out,
            data.test,
            data.inspection,
            enrolled,
            tuple(budgets),
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
    method = config.method_type(config.method, config.adapter, Trainer(config.training))
    method.init(material.model, material.budgets, Seeds(config.seed).at(purpose="init"))
    return RunFolder.create(path, config.yaml(), describe(config, path.name, material), partition_record(material))


def check_same_data(folder: RunFolder, material: Material) -> None:
    """Check that the data is what it was when the run began. Raises: RunFolderError."""
    if folder.read_json("partition.json") != partition_record(material):
        raise RunFolderError(
            f"the data is not what it was when {folder.path} began (partition.json differs); "
            f"put the data back, or start a new run"
        )


def check_same_model(folder: RunFolder, model: FoundationModel, ignoring: Collection[str] = ()) -> None:
    """Check that the base model is the one the run began with, but for some of its record's keys.

    Raises: RunFolderError naming what differs.
    """
    began, now = folder.read_object("run.json").get("model"), _identity(model)
    recorded = began if isinstance(began, dict) else {}
    changed = [key for key, value in now.items() if recorded.get(key) != value and key not in ignoring]
    if changed:
        raise RunFolderError(
            f"the base model is not the one {folder.path} began with ({', '.join(changed)} differ); put it back, or "
            f"start a new run"
        )


def check_same_settings(folder: RunFolder, config: RunConfig) -> None:
    """Check that config.yaml still says what the run began with, but for what may change.

    Raises: RunFolderError naming the keys that differ.
    """
    changed = changed_settings(folder, config)
    if changed:
        raise RunFolderError(
            f"{folder.path / 'config.yaml'} was changed since the run began ({', '.join(changed)}); one run is one "
            f"experiment: put it back, or start a new run"
        )


def changed_settings(folder: RunFolder, config: RunConfig) -> list[str]:
    """Return the keys of the settings that are not those the run began with, of those that must stay as they are."""
    began, now = folder.read_object("run.json").get("settings", {}), fixed_settings(config)
    return sorted(key for key in {*began, *now} if began.get(key) != now.get(key))


PLACES = ("data.path", "model.path", "adapter.start_from")
"""Settings that say where something is; it may move while a run goes on."""


def fixed_settings(config: RunConfig) -> dict[str, Json]:
    """Return, by key, the settings that must stay as they are for the whole of a run."""
    flat = {
        f"{section}.{key}": value
        for section, values in config.values().items()
        if section not in ("seed", "engine", "output", "evaluation")
        for key, value in values.items()
    }
    free = ("training.rounds", "clients.min_replies", "model.threads", "model.device", *PLACES)
    return {"seed": config.seed, **{key: value for key, value in flat.items() if key not in free}}


def federate(
    config: RunConfig, folder: RunFolder, material: Material, listen: events.Listener = events.ignore
) -> Federation:
    """Put the parts together."""
    seeds = Seeds(config.seed)
    task = config.task
    method = config.method_type(config.method, config.adapter, Trainer(config.training, listen))

    def assess(client: str, model: FoundationModel) -> Scores[Score]:
        return task.evaluate(model, material.processor, material.held_out[client], config.evaluation, _unheard)

    worker = Worker(
        method=method,
        model=material.model,
        clients={client.id: client for client in material.clients},
        shards=material.shards.__getitem__,
        memory=MemoryFolder(folder.path / "memory"),
        seeds=seeds,
        assess=assess,
    )
    return Federation(
        rounds=config.training.rounds,
        seeds=seeds,
        method=method,
        engine=config.engine_type(config.engine, worker),
        model=material.model,
        task=task,
        processor=material.processor,
        clients=material.clients,
        participation=config.clients,
        budgets=material.budgets,
        evaluated=tuple(budget for budget in material.budgets if config.evaluation.includes(budget.tier)),
        test=material.test,
        personal=bool(material.held_out),
        evaluation=config.evaluation,
        keep_uploads=config.output.keep_uploads,
        timing=config.clock if all(budget.device is not None for budget in material.budgets) else None,
    )


def _unheard(done: int, total: int) -> None:
    """Hear of no progress: a client does not tell it."""


def _identity(model: FoundationModel) -> dict[str, Json]:
    """Return what tells one base model from another."""
    shape = model.shape
    return {
        "family": model.family.model_type,
        "parameters": shape.parameters,
        "layers": shape.num_layers,
        "num_experts": shape.num_experts,
        "native_top_k": shape.native_top_k,
        "sha256": fingerprint(model.lm),
    }


def partition_record(material: Material) -> dict[str, Json]:
    """Return what partition.json keeps: who got which rows, and what they hold."""
    digests = {id_: shard.digest() for id_, shard in material.shards.items()}
    kept = {f"{id_} (kept apart)": shard.digest() for id_, shard in material.held_out.items()}
    return {
        **material.partition.json(),
        "clients": material.inspection.clients_json(),
        "sha256": {**digests, **kept, "test split": material.test.digest()},
    }


_LIMITS = ("rank", "adapter_top_k", "tuned_experts", "held_experts")
"""What a tier may limit besides K."""


def describe(config: RunConfig, name: str, material: Material) -> dict[str, Json]:
    """Return what run.json keeps: versions, seeds, hardware, model, data, tiers, the method's paper."""
    share = {tier.name: tier.share for tier in config.clients.tiers}
    return {
        "name": name,
        "emberfed_version": emberfed.__version__,
        "git": _git_hash(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "method": {
            "name": config.method_name,
            "title": config.method_type.title,
            "paper": config.method_type.paper,
        },
        "versions": versions(),
        "hardware": hardware(),
        "metric": config.task.metric.key,
        **({"classes": list(material.corpus.classes)} if material.corpus.classes else {}),
        "experts": config.method_type.experts,
        "model": {"path": config.model.path, **_identity(material.model)},
        "data": material.inspection.totals_json(),
        "settings": fixed_settings(config),
        "tiers": [
            {
                "name": budget.tier,
                "top_k": budget.top_k,
                "share": share[budget.tier],
                **{key: value for key in _LIMITS if (value := getattr(budget, key)) is not None},
                **({} if budget.device is None else {"device": budget.device.model_dump(mode="json")}),
            }
            for budget in material.budgets
        ],
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    names = ("torch", "transformers", "peft", "datasets", "flwr-datasets", "safetensors", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def hardware() -> dict[str, Any]:
    """Return what this machine offers."""
    cuda = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if cuda
        else [],
    }


def _git_hash() -> str | None:
    """Return the commit of the source tree, if emberfed runs from one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
