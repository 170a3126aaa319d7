"""The commands that work on a run folder: the calls of `emberfed.api`, with progress and stopping around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from emberfed import api
from emberfed import config as configuration
from emberfed.checkpoint import RunFolder
from emberfed.cli import tables
from emberfed.cli.output import Output
from emberfed.cli.progress import Plan, display
from emberfed.cli.stopping import Stop, resumable
from emberfed.cli.summary import Summary, summarise
from emberfed.config import RunConfig
from emberfed.errors import RunFolderError


def run(source: Path | None, overrides: Sequence[str], path: Path, checked: RunConfig) -> Summary:
    """Run from start to report in the folder `path`. Raises: EmberfedError."""
    stop = Stop()
    with resumable(path), stop.on_signals(), display(Plan.of(checked)) as shown:
        api.run(source, overrides=overrides, output=path, listen=stop.before(shown))
    return summarise(path)


def resume(path: Path, rounds: int | None) -> Summary:
    """Go on with the run in `path`. Raises: EmberfedError."""
    checked = _config_of(path)
    stop = Stop()
    with resumable(path), stop.on_signals(), display(Plan.of(checked, rounds)) as shown:
        api.resume(path, rounds=rounds, listen=stop.before(shown))
    return summarise(path)


def evaluate(
    path: Path, top_k: Sequence[int] | None, adapter_top_k: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Evaluate the newest round of the run in `path`. Raises: EmberfedError."""
    asked, plan = top_k or adapter_top_k, Plan.of(_config_of(path))
    tiers = plan.tiers if asked is None else len(asked)
    stop = Stop()
    with stop.on_signals(), display(replace(plan, rounds=0, clients=0, tiers=tiers, every=0)) as shown:
        return api.evaluate(path, top_k=top_k, adapter_top_k=adapter_top_k, listen=stop.before(shown))


def show(output: Output, summary: Summary) -> None:
    """Give what a run came to."""
    shown: list[RenderableType] = [tables.quality(summary), *tables.personal(summary), tables.costs(summary)]
    if summary.problems:
        shown.append(tables.problems(summary))
    output.result(summary.json(), *shown, tables.next_steps(summary))


def _config_of(path: Path) -> RunConfig:
    if (path / "comparison.json").is_file():
        raise RunFolderError(
            f"{path} is the folder of a comparison: repeat `emberfed compare` to go on with it, or name one of the "
            f"run folders in {path / 'runs'}"
        )
    return configuration.load(RunFolder.open(path).path / "config.yaml")
