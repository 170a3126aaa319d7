"""What a run works with: model, data, clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

from emberfed.clients import Budget, Client
from emberfed.data.corpus import Corpus
from emberfed.data.inspect import Inspection
from emberfed.data.partition import Partition
from emberfed.data.shard import Shard
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Json


class Members(Protocol):
    """Who takes part with what data, as far as the server knows."""

    def record(self) -> dict[str, Json]:
        """Return what partition.json keeps, and what must be the same when a run goes on."""
        ...

    def totals(self) -> dict[str, Json]:
        """Return what run.json says of the data."""
        ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class ClientsHere:
    """Clients whose data is in this process, and the model they share.

    Attributes:
        model: The model.
        processor: What made its inputs of records.
        clients: The clients.
        shards: What each trains on, by its id.
        held_out: What each keeps for evaluating its own model; empty if `data.client_test_share` is 0.
    """

    model: FoundationModel
    processor: Any
    clients: tuple[Client, ...]
    shards: Mapping[str, Shard]
    held_out: Mapping[str, Shard]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Model and data of a configuration, loaded and made into examples.

    Attributes:
        model: The model.
        processor: What made its inputs of records.
        classes: Names of the classes, in the order of their numbers; empty if the task has none.
        test: Held out on the server, as examples.
        shards: What each client trains on, by its id; empty where clients have data of their own.
        held_out: What each client keeps for evaluating its own model; empty too if `data.client_test_share` is 0.
        members: Who has which data.
        clients: All clients.
        budgets: Those of all tiers.
    """

    model: FoundationModel
    processor: Any
    classes: tuple[str, ...]
    test: Shard
    shards: Mapping[str, Shard]
    held_out: Mapping[str, Shard]
    members: Members
    clients: tuple[Client, ...]
    budgets: tuple[Budget, ...]

    @property
    def here(self) -> ClientsHere:
        """The clients, where their data is here."""
        return ClientsHere(self.model, self.processor, self.clients, self.shards, self.held_out)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Divided:
    """Data that was loaded and divided over clients here, made into examples with the model's processor.

    Attributes:
        processor: What made them.
        corpus: All records.
        partition: Who holds which.
        shards: What each client trains on.
        held_out: What each client keeps.
        test: Held out on the server.
        inspection: What clients hold, in figures.
    """

    processor: Any
    corpus: Corpus
    partition: Partition
    shards: Mapping[str, Shard]
    held_out: Mapping[str, Shard]
    test: Shard
    inspection: Inspection

    def record(self) -> dict[str, Json]:
        """Return who got which rows, and what they hold."""
        digests = {id_: shard.digest() for id_, shard in self.shards.items()}
        kept = {f"{id_} (kept apart)": shard.digest() for id_, shard in self.held_out.items()}
        return {
            **self.partition.json(),
            "clients": self.inspection.clients_json(),
            "sha256": {**digests, **kept, "test split": self.test.digest()},
        }

    def totals(self) -> dict[str, Json]:
        """Return what loading and tokenising did."""
        return self.inspection.totals_json()
