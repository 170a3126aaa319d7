"""Grids: what cells there are, in which order, and that every mistake is one line before anything runs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from emberfed.arena import grid as grids
from emberfed.assembly import data_key, model_key
from emberfed.errors import ConfigError

ROOT = Path(__file__).parents[1]
METHODS = {"A": {"method": {"name": "a3smoe"}}, "B": {"method": {"name": "a3smoe", "temperature": 0}}}


def arena(**keys: Any) -> dict[str, Any]:
    return {"base": "quickstart", "methods": METHODS, **keys}


def test_every_combination_is_a_cell() -> None:
    grid = grids.load(
        arena(
            seeds=[4, 9],
            columns={"even": {"data.partition.alpha": 5.0}, "skewed": {"data.partition.alpha": 0.5}},
            rows={"8 clients": {"clients.count": 8}, "12 clients": {"clients.count": 12}},
            sweep={"key": "training.learning_rate", "values": [0.001, 0.01], "label": "lr"},
            set={"training.rounds": 1},
        ),
        overrides=["data.limit=200"],
    )
    assert len(grid.cells) == 2 * 2 * 2 * 2 * 2
    cell = next(cell for cell in grid.cells if cell.name == "skewed_12-clients_B_lr=0.01_seed-9")
    assert cell.title == "skewed, 12 clients, B, lr=0.01, seed 9"
    values = cell.config.values()
    assert values["data"]["partition"]["alpha"] == 0.5
    assert values["clients"]["count"] == 12
    assert values["method"]["temperature"] == 0
    assert values["training"]["learning_rate"] == 0.01
    assert (values["training"]["rounds"], values["data"]["limit"], values["seed"]) == (1, 200, 9)
    assert grid.seeds == (4, 9)


def test_cells_that_share_model_and_data_follow_each_other() -> None:
    """Methods on two models, on two partitions: each model once, and within it each division of the data once."""
    grid = grids.load(
        arena(
            seeds=2,
            methods={**METHODS, "C": {"model.path": "elsewhere"}},
            columns={"even": {"data.partition.alpha": 5.0}, "skewed": {"data.partition.alpha": 0.5}},
        )
    )
    for keys in ([model_key(cell.config) for cell in grid.cells], [data_key(cell.config) for cell in grid.cells]):
        changes = sum(one != two for one, two in itertools.pairwise(keys))
        assert changes == len(set(keys)) - 1


def test_methods_of_a_run_s_configuration_keep_its_own_options() -> None:
    values = yaml.safe_load((ROOT / "src" / "emberfed" / "configs" / "quickstart.yaml").read_text())
    values["method"]["temperature"] = 3.0
    values["seed"] = 5
    grid = grids.load(values, methods=["a3smoe"], seeds=2)
    assert [cell.config.values()["method"]["temperature"] for cell in grid.cells] == [3.0, 3.0]
    assert grid.seeds == (5, 6)
    assert len(grids.load(values, methods=["a3smoe"]).cells) == 3


def test_some_methods_of_an_arena() -> None:
    assert [cell.method for cell in grids.load(arena(seeds=1), methods=["B"]).cells] == ["B"]
    assert len(grids.load(arena(seeds=1, on_top=[["A", "B"]]), methods=["B"]).on_top) == 0


def test_a_base_is_found_beside_the_arena(tmp_path: Path) -> None:
    quickstart = yaml.safe_load((ROOT / "src" / "emberfed" / "configs" / "quickstart.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**quickstart, "seed": 7}))
    (tmp_path / "arenas").mkdir()
    file = tmp_path / "arenas" / "mine.yaml"
    file.write_text(yaml.safe_dump(arena(base="../base.yaml")))
    grid = grids.load(file)
    assert grid.seeds == (7, 8, 9)
    assert grid.title == "mine"
    assert grid.folder == Path("runs/compare-mine")


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (arena(metods=METHODS), {}, "unknown key 'metods'; did you mean 'methods'?"),
        (arena(config={}), {}, "give base or config, not both"),
        (arena(methods={}), {}, "'methods'"),
        (arena(seeds=0), {}, "seeds 0: expected a number of seeds from 1"),
        (arena(seeds=[1, 1]), {}, "different seeds"),
        (arena(on_top=[["A", "Bb"]]), {}, "on_top names the method 'Bb'"),
        (arena(methods={"A": {"method": {"name": "a3smo"}}}), {}, "A: unknown"),
        (arena(columns={"x": {"training.round": 2}}), {}, "x, A: unknown key 'training.round'; did you mean 'rounds'?"),
        (arena(sweep={"key": "method.temperature", "values": [1, -2]}), {}, "A, method.temperature=-2: "),
        (arena(sweep={"key": "method.temperatur", "values": [1]}), {}, "did you mean 'temperature'?"),
        (
            arena(columns={"x": {"method.temperature": 1}}),
            {},
            "methods replaces 'method', so that 'method.temperature'",
        ),
        (arena(rows={"x": {"seed": 1}}), {}, "seeds replaces 'seed', so that 'seed' of rows"),
        (arena(rows={"x": {}}, columns={"x.": {}, "x!": {}, "x?": {}}), {}, "name them more differently"),
        (arena(), {"methods": ["Aa"]}, "the arena has no method 'Aa'"),
        (arena(), {"overrides": ["method.temperature=1"]}, "would have no effect"),
        (arena(set={"training": "x.y"}), {}, "training"),
        (None, {}, "--methods a3smoe,flame"),
        (None, {"methods": ["a3smoe", "a3smoe"]}, "named twice"),
        (None, {"methods": ["a3smo"]}, "did you mean 'a3smoe'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_one_line(values: dict[str, Any] | None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grids.load(values, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "paper").glob("*.yaml")), ids=lambda path: path.name)
def test_the_papers_configurations_are_grids(file: Path) -> None:
    grid = grids.load(file)
    shape = (grid.methods, grid.columns, grid.rows, grid.values, grid.seeds)
    assert len(grid.cells) == math.prod(map(len, shape))
    ranks = [[tier.rank for tier in cell.config.clients.tiers] for cell in grid.cells]
    assert not file.stem.startswith(("table", "figure3")) or all(None not in row for row in ranks)
