"""The server of a deployment: clients have data of their own and come to it; what it knows of them, they told."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from emberfed import assembly, clients
from emberfed.checkpoint import RunFolder
from emberfed.clients import Budget, Client
from emberfed.config import RunConfig
from emberfed.data.shard import Shard
from emberfed.errors import RunFolderError, closest, one_of
from emberfed.handshake import described, differences
from emberfed.material import Material
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Json
from emberfed.seeds import Seeds
from emberfed.training import check_possible

KIND = "deployment"
"""Kind of the partition that partition.json tells of."""

_LARGEST_COUNT = 2**53
"""Whole numbers above it are not all exact as float64, in which weights are formed."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Home:
    """What the server has before any client came.

    Attributes:
        config: The configuration.
        model: The model.
        processor: What makes its inputs of records.
        classes: Names of the classes; empty if the task has none.
        test: What the global model is evaluated on.
        expected: What clients must have too.
    """

    config: RunConfig
    model: FoundationModel
    processor: Any
    classes: tuple[str, ...]
    test: Shard
    expected: Mapping[str, Json]


def home(config: RunConfig) -> Home:
    """Load the server's part: the model, and of the data only what is held out. Raises: EmberfedError."""
    task = config.task
    processor = task.processor(config.model)
    corpus = task.corpus(config.data, Seeds(config.seed))
    test = task.shard(corpus.test, processor, config.data, corpus.classes, "test split")
    model = task.model(config.model, processor, corpus.classes)
    check_possible(model, config.training)
    assembly.check_length(model, config)
    expected = described(config, model, processor, corpus.classes, assembly.method(config))
    return Home(config, model, processor, corpus.classes, test, expected)


@final
@dataclass(frozen=True, slots=True)
class Enrolled:
    """A client of a deployment, as it told of itself.

    Attributes:
        id: Its id.
        tier: The name of its tier.
        counts: What its data came to: `examples`, and what else the task counts; `kept_apart` are not in `examples`.
    """

    id: str
    tier: str
    counts: Mapping[str, int]


def read_description(told: Mapping[str, Json], id: str, home: Home) -> Enrolled | str:
    """Return the client that described itself, or one line that says why it cannot take part."""
    problem = told.get("problem")
    if isinstance(problem, str):
        return problem
    own, tier, counts = told.get("own"), told.get("tier"), told.get("counts")
    if not (isinstance(own, dict) and isinstance(tier, str) and isinstance(counts, dict)):
        return "it did not describe itself as this version of emberfed does; install the server's version there"
    found = differences(home.expected, own)
    if found:
        return "; ".join(found)
    if told.get("client") != id:
        return f"it says it is client {told.get('client')!r}; its key is registered as {id!r}"
    tiers = [named.name for named in home.config.clients.tiers]
    if tier not in tiers:
        return f"its tier {tier!r} is not known{closest(tier, tiers)} (there are {one_of(tiers)})"
    wanted = {*home.test.report.json(), "examples", "kept_apart"}
    if set(counts) != wanted:
        return f"it counts {', '.join(sorted(counts)) or 'nothing'} of its data, not {', '.join(sorted(wanted))}"
    if not all(type(value) is int and 0 <= value <= _LARGEST_COUNT for value in counts.values()):
        return f"what it counts of its data are not whole numbers from 0 to {_LARGEST_COUNT}"
    if counts["examples"] < 1:
        return "it has no examples"
    if home.config.data.client_test_share > 0 and counts["kept_apart"] < 1:
        return "it keeps no examples for evaluating its own model (data.client_test_share)"
    return Enrolled(id, tier, counts)


@final
@dataclass(frozen=True, slots=True)
class Roll:
    """Who takes part in a deployment's run, fixed for the whole of it.

    Attributes:
        run: The run's identity, by which clients tell its memories from those of other runs.
        clients: Sorted by id.
        test_digest: Of the server's held-out examples.
    """

    run: str
    clients: tuple[Enrolled, ...]
    test_digest: str

    @staticmethod
    def of(clients: Sequence[Enrolled], test: Shard) -> Roll:
        """Return the roll of a new run."""
        return Roll(uuid.uuid4().hex, tuple(sorted(clients, key=lambda client: client.id)), test.digest())

    @staticmethod
    def read(folder: RunFolder) -> Roll:
        """Return the roll of a run that began. Raises: RunFolderError if it is not a deployment's, or damaged."""
        kept = folder.read_object("partition.json")
        if kept.get("kind") != KIND:
            raise RunFolderError(f"{folder.path} is not the run of a deployment; go on with: emberfed resume")
        try:
            found = tuple(
                Enrolled(id_, one["tier"], {key: value for key, value in one.items() if type(value) is int})
                for id_, one in kept["clients"].items()
            )
            roll = Roll(kept["run"], found, kept["sha256"]["test split"])
        except (KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{folder.path / 'partition.json'} is damaged ({error!r})") from None
        texts = (roll.run, roll.test_digest, *(one.tier for one in found))
        if not all(isinstance(text, str) for text in texts) or any("examples" not in one.counts for one in found):
            raise RunFolderError(f"{folder.path / 'partition.json'} is damaged (a value is missing or no text)")
        return roll

    def record(self) -> dict[str, Json]:
        """Return what partition.json keeps; which rows are whose, the server does not know."""
        return {
            "kind": KIND,
            "run": self.run,
            "parameters": {},
            "rows": {},
            "clients": {one.id: {**one.counts, "tier": one.tier, "labels": {}} for one in self.clients},
            "sha256": {"test split": self.test_digest},
        }

    def totals(self) -> dict[str, Json]:
        """Return the sums of what clients count."""
        keys = sorted({key for one in self.clients for key in one.counts})
        return {key: sum(one.counts.get(key, 0) for one in self.clients) for key in keys}


def reopened(config: RunConfig, folder: RunFolder) -> Material:
    """Return what the server of a run that began works with. Raises: EmberfedError."""
    return material(home(config), Roll.read(folder))


def is_one(folder: RunFolder) -> bool:
    """Return whether a run is that of a deployment. Raises: RunFolderError."""
    return bool(folder.read_object("partition.json").get("kind") == KIND)


def material(home: Home, roll: Roll) -> Material:
    """Return what the server works with. Raises: RunFolderError if a client's tier is none of the configuration's."""
    budgets = _budgets(home.config, home.model)
    of_tier = {budget.tier: budget for budget in budgets}
    for one in roll.clients:
        if one.tier not in of_tier:
            raise RunFolderError(
                f"client {one.id!r} joined on tier {one.tier!r}, which is not one of clients.tiers (there are "
                f"{one_of(of_tier)}); put the tier back, or start a new run"
            )
    return Material(
        model=home.model,
        processor=home.processor,
        classes=home.classes,
        test=home.test,
        shards={},
        held_out={},
        members=replace(roll, test_digest=home.test.digest()),
        clients=tuple(Client(one.id, of_tier[one.tier], one.counts["examples"]) for one in roll.clients),
        budgets=budgets,
    )


def _budgets(config: RunConfig, model: FoundationModel) -> tuple[Budget, ...]:
    return tuple(clients.resolve(config.clients.tiers, model.native_top_k, model.largest_top_k))
