"""What each client holds: sizes, labels, skew, target tokens. The table that `emberfed data inspect` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from emberfed.data.corpus import Corpus, LoadReport
from emberfed.data.partition import Partition
from emberfed.data.shard import Report, Shard


@final
@dataclass(frozen=True, slots=True)
class ClientData:
    """One client's data.

    Attributes:
        client: Its id.
        report: What making its shard kept and cut.
        kept_apart: Examples it keeps for evaluating its own model; they are in none of the other figures.
        labels: Examples by the value of the column that the partition divides by, else by category.
        skew: Total variation distance between the client's labels and everybody's, 0 (the same) to 1 (disjoint).
    """

    client: str
    report: Report
    kept_apart: int
    labels: Mapping[str, int]
    skew: float


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """All clients' data, and what loading did."""

    load: LoadReport
    clients: tuple[ClientData, ...]

    def clients_json(self) -> dict[str, Any]:
        """Return each client's figures by id."""
        return {
            data.client: {
                **data.report.json(),
                "kept_apart": data.kept_apart,
                "labels": dict(data.labels),
                "skew": data.skew,
            }
            for data in self.clients
        }

    def totals_json(self) -> dict[str, Any]:
        """Return what loading and tokenising did over all clients."""
        reports = [data.report.json() for data in self.clients]
        sums = {name: sum(report[name] for report in reports) for name in reports[0] if name != "examples"}
        return {**self.load.json(), **sums}

    def json(self) -> dict[str, Any]:
        """Return all of it."""
        return {"totals": self.totals_json(), "clients": self.clients_json()}


def inspect(
    corpus: Corpus, divided: Partition, shards: Mapping[str, Shard], training: Mapping[str, Sequence[int]]
) -> Inspection:
    """Describe a partition.

    Args:
        corpus: All records.
        divided: Who holds which.
        shards: What each client trains on.
        training: The rows of these; what a client holds besides, it keeps apart.
    """
    values = [str(value) for value in corpus.train[_label_column(divided)]]
    everybody = Counter(values)
    clients = []
    for client, rows in divided.rows.items():
        trained = training[client]
        labels = Counter(values[row] for row in trained)
        named = {label: labels[label] for label in sorted(everybody) if labels[label]}
        skew, kept = total_variation(labels, everybody), len(rows) - len(trained)
        clients.append(ClientData(client, shards[client].report, kept, named, skew))
    return Inspection(corpus.report, tuple(clients))


def _label_column(divided: Partition) -> str:
    """The column whose skew is of interest; by its own name, every natural client would be all skew."""
    return str(divided.parameters["by"]) if divided.kind in ("dirichlet", "label", "shards") else "category"


def total_variation(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Return half the L1 distance between two histograms, each divided by its sum."""
    size, other_size = sum(one.values()), sum(other.values())
    keys = sorted(set(one) | set(other))
    return sum(abs(one.get(key, 0) / size - other.get(key, 0) / other_size) for key in keys) / 2
