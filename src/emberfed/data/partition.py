"""Dividing the training examples over clients, with the partitioners of flwr-datasets."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import datasets
import numpy as np
from flwr_datasets import partitioner as flwr

from emberfed.clients import client_ids
from emberfed.data.config import (
    DirichletPartition,
    IidPartition,
    LabelPartition,
    NaturalPartition,
    PartitionConfig,
    ShardsPartition,
    SizePartition,
)
from emberfed.errors import DataError, closest
from emberfed.seeds import Seeds

_ROW = "emberfed row"
_DIRICHLET_SEEDS = 20
_SIZES = {
    "linear": flwr.LinearPartitioner,
    "square": flwr.SquarePartitioner,
    "exponential": flwr.ExponentialPartitioner,
}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Who holds which rows of the training split; every row is with exactly one client.

    Attributes:
        kind: Kind of partition.
        parameters: Its other options.
        rows: Row numbers by client id.
    """

    kind: str
    parameters: Mapping[str, Any]
    rows: Mapping[str, tuple[int, ...]]

    def json(self) -> dict[str, Any]:
        """Return it as JSON; `from_json` gives it back."""
        rows = {client: list(numbers) for client, numbers in self.rows.items()}
        return {"kind": self.kind, "parameters": dict(self.parameters), "rows": rows}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Partition:
        """Inverse of `json`."""
        rows = {client: tuple(numbers) for client, numbers in value["rows"].items()}
        return Partition(value["kind"], value["parameters"], rows)


def partition(records: datasets.Dataset, config: PartitionConfig, clients: int, seeds: Seeds) -> Partition:
    """Divide the records over clients; the same seed gives the same partition.

    Raises:
        DataError: if there are fewer records than clients, the column does not exist, a client would get nothing, or
            the partition cannot be made; it says what to change.
    """
    if len(records) < clients:
        raise DataError(f"{len(records)} training examples cannot be divided over {clients} clients; use fewer clients")
    if not isinstance(config, IidPartition | SizePartition):
        _check_column(records, config.by, config.kind)
    # Ordered input would make "IID" shares ordered ones; rows carry their number so that the shares can be read back.
    order = seeds.numpy("partition order").permutation(len(records))
    columns = {_ROW: order.tolist()}
    if not isinstance(config, IidPartition | SizePartition):
        values = records[config.by]
        columns["label"] = [str(values[index]) for index in order]
    table = datasets.Dataset.from_dict(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # failed draws are repeated below and told in one line if all fail
        shares = _shares(table, config, clients, seeds)
    parameters = config.model_dump(mode="json", exclude={"kind"})
    rows_by_client = {id_: tuple(sorted(rows)) for id_, rows in zip(client_ids(clients), shares, strict=True)}
    return Partition(config.kind, parameters, rows_by_client)


def split_client(
    client: str, rows: Sequence[int], share: float, seeds: Seeds
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide a client's rows into those it trains on and those kept for evaluating its own model.

    Args:
        client: Its id.
        rows: Its rows of the training split.
        share: How much is kept, above 0 and at most 0.5; rounded to whole rows, at least one.
        seeds: Where the draw is made; the client's id is added to the address here.

    Returns:
        Rows to train on and rows kept, each sorted, neither empty.

    Raises:
        DataError: if the client has fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(
            f"client {client} has {len(rows)} example; data.client_test_share {share:g} needs two, one to train on and "
            f"one to be evaluated on; use fewer clients, more data, or a partition that gives everybody more"
        )
    order = seeds.at(client=client).numpy("client test rows").permutation(len(rows))
    kept = max(1, round(share * len(rows)))
    return tuple(sorted(rows[index] for index in order[kept:])), tuple(sorted(rows[index] for index in order[:kept]))


def _shares(table: datasets.Dataset, config: PartitionConfig, clients: int, seeds: Seeds) -> list[list[int]]:
    if isinstance(config, IidPartition):
        return _divide(flwr.IidPartitioner(num_partitions=clients), table)
    if isinstance(config, SizePartition):
        try:
            return _divide(_SIZES[config.sizes](num_partitions=clients), table)
        except ValueError:
            raise DataError(
                f"partition 'size': {config.sizes} sizes leave some of {clients} clients without any of {len(table)} "
                f"examples; use fewer clients, more data, or sizes: linear"
            ) from None
    if isinstance(config, NaturalPartition):
        return _natural(table, config, clients)
    if isinstance(config, LabelPartition):
        return _by_label(table, config, clients, seeds)
    if isinstance(config, ShardsPartition):
        return _sorted_shards(table, config, clients, seeds)
    return _dirichlet(table, config, clients, seeds)


def _divide(divider: Any, table: datasets.Dataset) -> list[list[int]]:
    divider.dataset = table
    return [list(divider.load_partition(number)[_ROW]) for number in range(divider.num_partitions)]


def _dirichlet(table: datasets.Dataset, config: DirichletPartition, clients: int, seeds: Seeds) -> list[list[int]]:
    for attempt in range(_DIRICHLET_SEEDS):
        divider = flwr.DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=config.min_examples,
            seed=seeds.integer(f"dirichlet {attempt}"),
        )
        try:
            return _divide(divider, table)
        except ValueError:  # after ten draws that left a client with too few
            continue
    raise DataError(
        f"partition 'dirichlet': no draw with alpha {config.alpha:g} gave each of {clients} clients at least "
        f"{config.min_examples} of {len(table)} examples; raise alpha, lower min_examples, or use fewer clients"
    )


def _by_label(table: datasets.Dataset, config: LabelPartition, clients: int, seeds: Seeds) -> list[list[int]]:
    labels = sorted(set(table["label"]))
    if config.labels_per_client > len(labels):
        raise DataError(
            f"partition 'label': labels_per_client {config.labels_per_client} is more than the {len(labels)} values of "
            f"column {config.by!r}"
        )
    if config.labels_per_client * clients < len(labels):
        raise DataError(
            f"partition 'label': {clients} clients with {config.labels_per_client} labels each cannot hold the "
            f"{len(labels)} values of column {config.by!r}; raise labels_per_client or the number of clients"
        )
    # Not flwr's PathologicalPartitioner: it can leave labels, and so rows, with nobody.
    drawn = seeds.numpy("labels").permutation(len(labels))
    dealt = [
        [
            labels[drawn[(client * config.labels_per_client + place) % len(labels)]]
            for place in range(config.labels_per_client)
        ]
        for client in range(clients)
    ]
    shares: list[list[int]] = [[] for _ in range(clients)]
    values, rows = np.asarray(table["label"]), np.asarray(table[_ROW])
    for label in labels:
        holders = [client for client in range(clients) if label in dealt[client]]
        having = rows[values == label]
        if len(having) < len(holders):
            raise DataError(
                f"partition 'label': {len(holders)} clients hold {config.by} {label!r}, which has "
                f"{len(having)} examples; "
                f"lower labels_per_client or use fewer clients"
            )
        for client, part in zip(holders, np.array_split(having, len(holders)), strict=True):
            shares[client].extend(part.tolist())
    return shares


def _sorted_shards(table: datasets.Dataset, config: ShardsPartition, clients: int, seeds: Seeds) -> list[list[int]]:
    """Deal equal pieces of the rows sorted by label; McMahan et al. 2017, section 3."""
    pieces = clients * config.shards_per_client
    if pieces > len(table):
        raise DataError(
            f"partition 'shards': {len(table)} examples cannot be cut into {clients} clients x "
            f"{config.shards_per_client} = {pieces} pieces; lower shards_per_client or use fewer clients"
        )
    by_label = np.argsort(np.asarray(table["label"]), kind="stable")
    cut = np.array_split(np.asarray(table[_ROW])[by_label], pieces)
    dealt = seeds.numpy("shards").permutation(pieces).reshape(clients, config.shards_per_client)
    return [np.concatenate([cut[piece] for piece in hand]).tolist() for hand in dealt]


def _natural(table: datasets.Dataset, config: NaturalPartition, clients: int) -> list[list[int]]:
    names = sorted(set(table["label"]), key=_natural_order)
    if len(names) != clients:
        raise DataError(
            f"partition 'natural': column {config.by!r} has {len(names)} different values, clients.count is {clients}; "
            f"set clients.count to {len(names)}"
        )
    divider = flwr.NaturalIdPartitioner(partition_by="label")
    divider.dataset = table
    with contextlib.redirect_stderr(io.StringIO()):  # it shows a progress bar of its own
        by_name = {
            divider.partition_id_to_natural_id[number]: list(divider.load_partition(number)[_ROW])
            for number in range(divider.num_partitions)
        }
    return [by_name[name] for name in names]


def _natural_order(name: str) -> tuple[bool, int, str]:
    """Numbers by value, then words by letters."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def _check_column(records: datasets.Dataset, column: str, kind: str) -> None:
    usable = [
        name for name in records.column_names if name not in ("instruction", "context", "response", "history", "image")
    ]
    if column not in usable:
        raise DataError(
            f"partition {kind!r}: the data has no column {column!r}{closest(column, usable)} "
            f"(there are {sorted(usable)})"
        )
    values = list(records[column])
    without = sum(value is None for value in values)
    if without:
        raise DataError(
            f"partition {kind!r}: {without} of {len(values)} examples have no {column!r}; fill it or choose "
            f"another column"
        )
    if kind != "natural" and len(set(values)) < 2:
        raise DataError(f"partition {kind!r}: column {column!r} has one value in all examples; choose another column")
