"""`emberfed upcycle`: a dense model's folder made sparse, and what came of it in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from emberfed.cli.stopping import Stop
from emberfed.models.upcycle import UpcycleConfig, Upcycled, upcycle
from emberfed.sections import validate


def run(dense: Path, output: Path, values: dict[str, Any]) -> tuple[dict[str, Any], Text]:
    """Upcycle and return the result as a document and in words. Raises: EmberfedError."""
    options = validate(UpcycleConfig, values, "upcycle")
    console = Console(stderr=True)
    unseen = not sys.stderr.isatty()
    with Stop().on_signals(), Progress(console=console, transient=True, disable=unseen) as bar:
        task = bar.add_task("layers", total=None)
        written = upcycle(dense, output, options, lambda done, of: bar.update(task, completed=done, total=of))
    used = options.model_dump() | {"output_scale": options.scale}
    return used | written.json(), Text(_words(written, options))


def _words(written: Upcycled, options: UpcycleConfig) -> str:
    return (
        f"{written.path} written: {written.layers} layers, {options.num_experts} experts of "
        f"{written.expert_intermediate} neurons in each, {options.top_k} active per token.\n"
        f"Parameters: {written.parameters:,}, of which a token uses {written.active_parameters:,}; "
        f"the dense model has {written.dense_parameters:,}.\n"
        f"Fine-tune it, with tiers of top_k 1 to {options.num_experts}: "
        f"emberfed run CONFIG --set model.path={written.path}"
    )
