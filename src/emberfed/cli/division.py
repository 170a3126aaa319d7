"""`data inspect`: how a configuration's data divides among its clients. No model is loaded, only its tokenizer."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from emberfed.cli.tables import plain_table
from emberfed.config import RunConfig
from emberfed.data.inspect import ClientData, Inspection, inspect
from emberfed.data.loading import load
from emberfed.data.partition import partition
from emberfed.data.tokenise import tokenise
from emberfed.models.loading import load_tokenizer
from emberfed.report import numbers
from emberfed.seeds import Seeds

_WIDEST_MATRIX = 10
"""Clients up to which labels are a table of their own, a column per client; it fits 80 characters."""

_MOST_FREQUENT = "Most frequent labels"


def inspect_data(config: RunConfig) -> Inspection:
    """Load, divide and tokenise as a run would. Raises: DataError, ModelError."""
    seeds = Seeds(config.seed)
    tokenizer = load_tokenizer(config.model)
    corpus = load(config.data, seeds)
    divided = partition(corpus.train, config.data.partition, config.clients.count, seeds)
    shards = {
        id_: tokenise(corpus.train.select(rows), tokenizer, config.data, id_) for id_, rows in divided.rows.items()
    }
    return inspect(corpus, divided, shards)


def tables(inspection: Inspection) -> list[RenderableType]:
    """Return what there is to see: clients, labels where there are several, and what loading did."""
    totals = _total_labels(inspection)
    if len(totals) < 2:
        return [_clients(inspection, ()), _loading(inspection)]
    if len(inspection.clients) <= _WIDEST_MATRIX:
        return [_clients(inspection, ("Skew",)), _labels(inspection, totals), _loading(inspection)]
    return [_clients(inspection, ("Skew", _MOST_FREQUENT)), _loading(inspection)]


def _clients(inspection: Inspection, label_columns: tuple[str, ...]) -> Table:
    table = plain_table("Clients")
    table.add_column("Client", no_wrap=True)
    for name in ("Examples", "Target tokens", "Cut", "Dropped", *label_columns):
        table.add_column(name, justify="left" if name == _MOST_FREQUENT else "right")
    for data in inspection.clients:
        report = data.report
        cells = [
            numbers.count(report.examples),
            numbers.count(report.target_tokens),
            numbers.count(report.truncated_prompts + report.truncated_responses),
            numbers.count(report.without_target),
        ]
        labels = {"Skew": f"{data.skew:.2f}", _MOST_FREQUENT: _most_frequent(data)}
        table.add_row(data.client, *cells, *(labels[name] for name in label_columns))
    return table


def _most_frequent(data: ClientData) -> str:
    return ", ".join(f"{label} {count}" for label, count in Counter(data.labels).most_common(2))


def _labels(inspection: Inspection, totals: Counter[str]) -> Table:
    table = plain_table("Examples by label")
    table.add_column("Label")
    for name in (*(data.client for data in inspection.clients), "All"):
        table.add_column(name, justify="right", no_wrap=True)
    for label in sorted(totals):
        cells = [str(data.labels.get(label) or numbers.MISSING) for data in inspection.clients]
        table.add_row(label, *cells, str(totals[label]))
    return table


def _loading(inspection: Inspection) -> Text:
    load = inspection.load
    left_out = {"duplicates": load.duplicates, "without a response": load.empty, "over data.limit": load.over_limit}
    reasons = ", ".join(f"{numbers.count(count)} {why}" for why, count in left_out.items() if count)
    return Text(
        f"{numbers.count(load.read)} records read as {load.format}: {numbers.count(load.train)} to train on, "
        f"{numbers.count(load.test)} held out; left out: {reasons or 'none'}.\n"
        "Cut: shortened to data.max_length. Dropped: no response token.\n"
        "Skew: distance between a client's labels and everybody's, from 0 to 1."
    )


def _total_labels(inspection: Inspection) -> Counter[str]:
    totals: Counter[str] = Counter()
    for data in inspection.clients:
        totals.update(data.labels)
    return totals
