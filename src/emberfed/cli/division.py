"""`data inspect`: how a configuration's data divides among its clients. No model is loaded, only its tokenizer."""

from __future__ import annotations

from collections import Counter

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from emberfed import assembly
from emberfed.cli.tables import plain_table
from emberfed.config import RunConfig
from emberfed.data.inspect import ClientData, Inspection
from emberfed.report import numbers
from emberfed.seeds import Seeds

_WIDEST_MATRIX = 10
"""Clients up to which labels are a table of their own, a column per client; it fits 80 characters."""

_MOST_FREQUENT = "Most frequent labels"

_COLUMNS = {
    "target_tokens": "Target tokens",
    "truncated_prompts": "Cut prompts",
    "truncated_responses": "Cut responses",
    "without_target": "Dropped",
    "tokens": "Tokens",
    "truncated": "Cut",
    "resized": "Resized",
}
"""Headings of what a shard reports."""


def inspect_data(config: RunConfig) -> Inspection:
    """Load, divide and make examples as a run would. Raises: DataError, ModelError."""
    return assembly.divide(config, Seeds(config.seed)).inspection


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
    counted = [name for name in inspection.clients[0].report.json() if name != "examples"]
    for name in ("Examples", *(_COLUMNS.get(name, name) for name in counted), *label_columns):
        table.add_column(name, justify="left" if name == _MOST_FREQUENT else "right")
    for data in inspection.clients:
        report = data.report.json()
        cells = [numbers.count(report[name]) for name in ("examples", *counted)]
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
    left_out = {"duplicates": load.duplicates, "empty": load.empty, "over data.limit": load.over_limit}
    reasons = ", ".join(f"{numbers.count(count)} {why}" for why, count in left_out.items() if count)
    meanings = {
        "truncated_prompts": "Cut: shortened to data.max_length. Dropped: no response token.",
        "truncated": "Cut: shortened to data.max_length.",
        "resized": "Resized: of another size than the model's.",
    }
    counted = inspection.clients[0].report.json()
    kept = sum(data.kept_apart for data in inspection.clients)
    lines = [
        f"{numbers.count(load.read)} records read as {load.format}: {numbers.count(load.train)} to train on, "
        f"{numbers.count(load.test)} held out; left out: {reasons or 'none'}.",
        *(
            [f"Of those to train on, clients keep {numbers.count(kept)} for evaluating their own models."]
            if kept
            else []
        ),
        *(meaning for name, meaning in meanings.items() if name in counted),
        "Skew: distance between a client's labels and everybody's, from 0 to 1.",
    ]
    return Text("\n".join(lines))


def _total_labels(inspection: Inspection) -> Counter[str]:
    totals: Counter[str] = Counter()
    for data in inspection.clients:
        totals.update(data.labels)
    return totals
