"""`certificates`: a federation's CA, its server's certificate and its clients' keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from emberfed.cli.tables import plain_table
from emberfed.errors import ConfigError
from emberfed.records import Json


def make(
    folder: Path, servers: Sequence[str], clients: Sequence[str], days: int
) -> tuple[dict[str, Json], list[RenderableType]]:
    """Make what is asked for, or add it to what there is.

    Args:
        folder: Where.
        servers: Host names and addresses that clients dial.
        clients: Ids of new clients.
        days: How long the server's certificate is valid.

    Returns:
        What was made as a JSON document, and the same to look at.

    Raises:
        ConfigError: If something cannot be made so, or the extra `flower` is not installed.
        EngineError: If a file that is there cannot be read.
        StorageError: If writing fails.
    """
    try:
        from emberfed.flower import certificates
    except ModuleNotFoundError as missing:
        raise ConfigError(f"certificates need {missing.name}: pip install 'emberfed[flower]'") from missing

    made = certificates.make(folder, servers, clients, days)
    server = certificates.server_files(folder / "server")
    document: dict[str, Json] = {
        "ca_key": str(folder / "ca.key"),
        "made": [str(path) for path in made],
        "hosts": list(server.names),
        "valid_until": server.valid_until.isoformat(),
        "clients": sorted(server.clients),
    }
    sentences = [
        f"The server answers to {', '.join(server.names)} until {server.valid_until:%Y-%m-%d}, and knows "
        f"{len(server.clients)} clients.",
        f"Keep {folder / 'ca.key'} offline: whoever has it can be the server.",
    ]
    return document, [_handed_out(folder, made), *sentences]


def _handed_out(folder: Path, made: Sequence[Path]) -> Table:
    table = plain_table("Copy")
    table.add_column("Folder", no_wrap=True)
    table.add_column("To")
    for path in made:
        table.add_row(str(path), "the server" if path == folder / "server" else f"client {path.name}, and nobody else")
    return table
