"""`data split`: a configuration's data, handed out to folders that clients of a deployment read. No model is loaded."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from rich.console import RenderableType
from rich.text import Text

from emberfed import assembly, clients, own_data
from emberfed.checkpoint import check_free
from emberfed.cli.stopping import Stop
from emberfed.cli.tables import plain_table
from emberfed.config import RunConfig
from emberfed.report import numbers
from emberfed.seeds import Seeds


@final
@dataclass(frozen=True, slots=True)
class ClientPart:
    """What a client was given.

    Attributes:
        client: Its id.
        tier: The name of the tier it is on when a run divides the same data.
        examples: What it trains on.
        kept_apart: What it keeps for evaluating its own model.
        folder: Where its records are.
    """

    client: str
    tier: str
    examples: int
    kept_apart: int
    folder: Path

    def json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "folder": str(self.folder)}


def split(config: RunConfig, target: Path) -> tuple[ClientPart, ...]:
    """Divide the data as a run would, and write each client's records into a folder of its own below `target`.

    Raises: RunFolderError if `target` is neither absent nor empty; ConfigError, DataError, ModelError; StorageError.
    """
    check_free(target)
    seeds = Seeds(config.seed)
    with Stop().on_signals():
        data = assembly.divide(config, seeds)
        sizes = {id_: len(shard.examples) for id_, shard in data.shards.items()}
        # Any K does: which tier a client is on does not depend on the model, which is not loaded here.
        enrolled = clients.enrol(sizes, config.clients, native_top_k=1, largest_top_k=sys.maxsize, seeds=seeds)
        own_data.hand_out(config.task, config.data, data.corpus, data.partition.rows, target)
    return tuple(
        ClientPart(
            client.id,
            client.budget.tier,
            client.examples,
            len(data.held_out[client.id].examples) if client.id in data.held_out else 0,
            target / client.id,
        )
        for client in enrolled
    )


def document(parts: tuple[ClientPart, ...], target: Path) -> dict[str, Any]:
    """Return what was written, for `--json`."""
    return {"output": str(target), "clients": [part.json() for part in parts]}


def tables(parts: tuple[ClientPart, ...], target: Path) -> list[RenderableType]:
    """Return what was written, and how one client is started with its part."""
    keeping = any(part.kept_apart for part in parts)
    table = plain_table("Clients")
    for heading in ("Client", "Tier"):
        table.add_column(heading, overflow="fold")
    for heading in ("Examples", *(["Kept apart"] if keeping else [])):
        table.add_column(heading, justify="right")
    for part in parts:
        kept = [numbers.count(part.kept_apart)] if keeping else []
        table.add_row(part.client, part.tier, numbers.count(part.examples), *kept)
    first = parts[0]
    command = (
        f"emberfed client CONFIG --server HOST:PORT --certificates DIR --name {first.client} --tier "
        f"{shlex.quote(first.tier)} --data {shlex.quote(str(first.folder))}"
    )
    return [table, Text(f"Written to {target}, a folder for each client. One of them takes part by:\n{command}")]
