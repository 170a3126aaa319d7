"""What `emberfed compare` shows while it runs, and after."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from commands import invoke, write_config
from federations import config
from rich.console import Console

from emberfed.arena import grid as grids
from emberfed.arena import running
from emberfed.cli.compare import Bars, seeds
from emberfed.errors import ConfigError


def arena(model: Path, data: Path) -> dict[str, Any]:
    values = config(model, data, evaluation={"every": 0, "max_examples": 2}, training={"rounds": 1})
    broken = {"adapter.start_from": "/nowhere"}
    return {"config": values, "methods": {"plain": {}, "broken": broken}, "seeds": [1, 2]}


def test_bars_say_what_is_done(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """On a terminal of 80 columns: a line for each run that ended stays, and the bars are taken away."""
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=80, markup=False, highlight=False)
    with Bars(console) as bars:
        running.carry_out(grids.load(arena(tiny_model_folder, tiny_data)), tmp_path / "out", listen=bars)
    text = drawn.getvalue()
    assert "plain, seed 1: done" in text
    assert "plain, seed 2: done" in text
    assert "broken, seed 2: /nowhere" in text
    assert "4 of 4 runs" in text


def test_lines_and_tables(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "arena.yaml", arena(tiny_model_folder, tiny_data))
    result = invoke("compare", file, "--output", tmp_path / "out", "--methods", "plain")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[:2] == ["2 runs, 0 of them done", "plain, seed 1: starting"]
    assert lines[2].startswith("plain, seed 1: before training, ")
    assert lines[3].startswith("plain, seed 1: round 1 of 1, ")
    assert lines[4].startswith("plain, seed 1: done (1 of 2 runs, about ")
    assert lines[-1] == "plain, seed 2: done (2 of 2 runs)"
    assert "ROUGE-L (higher is better)" in result.stdout
    assert "small K=1" in result.stdout
    assert str(tmp_path / "out" / "comparison.html") in result.stdout
    assert "\x1b" not in result.output


def test_seeds_are_a_number_or_a_list() -> None:
    assert seeds("3") == 3
    assert seeds("0, 4") == [0, 4]
    with pytest.raises(ConfigError, match="--seeds '1,x'"):
        seeds("1,x")
