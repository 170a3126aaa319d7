"""What is compared: named axes of overrides on one base configuration; each combination with each seed is a cell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self, final

from pydantic import Field, model_validator

from emberfed import config
from emberfed.assembly import data_key, model_key
from emberfed.config import RunConfig
from emberfed.errors import ConfigError, closest, one_of
from emberfed.sections import Section, override, read_yaml, validate

Overrides = dict[str, Any]
"""Values by dotted key, such as `{"data.partition.alpha": 0.5}`; the value replaces the key's whole value."""


class Sweep(Section):
    """One key at several values, the x axis of a curve.

    Attributes:
        key: The dotted key.
        values: Its values, in the order of the curve.
        label: What the axis is called; null: the key.
    """

    key: str = Field(min_length=1)
    values: list[float | int] = Field(min_length=1)
    label: str | None = None


class ArenaConfig(Section):
    """An arena file.

    Attributes:
        title: What the comparison is called; null: the file's name.
        base: `quickstart`, or a run's configuration file, relative to the arena file.
        config: Instead of `base`: the sections of a run's configuration.
        set: Overrides for all runs.
        seeds: Their number, counted up from the base's own, or the seeds.
        methods: Overrides by name: what is compared.
        columns: Overrides by name: the table's columns, for instance how data is divided.
        rows: Overrides by name: the table's rows, for instance the number of clients.
        sweep: One key at several values.
        on_top: Names of two methods, the second made of the first, that are drawn beside each other.
        reference: The method that speed-ups on the clients' clock are against; null: the first.
    """

    title: str | None = None
    base: str | None = None
    config: dict[str, Any] | None = None
    set: Overrides = Field(default_factory=dict)
    seeds: int | list[int] = 3
    methods: dict[str, Overrides] = Field(min_length=1)
    columns: dict[str, Overrides] = Field(default_factory=dict)
    rows: dict[str, Overrides] = Field(default_factory=dict)
    sweep: Sweep | None = None
    on_top: list[tuple[str, str]] = Field(default_factory=list)
    reference: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.base is not None and self.config is not None:
            raise ValueError("give base or config, not both")
        for name in (name for pair in self.on_top for name in pair):
            if name not in self.methods:
                raise ValueError(
                    f"on_top names the method {name!r}{closest(name, self.methods) or ', which is absent'}"
                )
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(
                f"reference names the method {self.reference!r}{closest(self.reference, self.methods)} "
                f"(there are {one_of(self.methods)})"
            )
        return self


_ARENA_KEYS = frozenset(ArenaConfig.model_fields)


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid.

    Attributes:
        method: Its method's name in the grid.
        column: Its column; empty where there is only one.
        row: Its row; empty where there is only one.
        sweep: The swept key's value; None where nothing is swept.
        swept: The same in words, with what it is called; empty where nothing is swept.
        config: Its checked configuration.
    """

    method: str
    column: str
    row: str
    sweep: float | None
    swept: str
    config: RunConfig

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.config.seed

    @property
    def labels(self) -> tuple[str, ...]:
        """What tells it from the others, in words."""
        return (*(label for label in (self.column, self.row, self.method, self.swept) if label), f"seed {self.seed}")

    @property
    def title(self) -> str:
        """Its name for people."""
        return ", ".join(self.labels)

    @property
    def name(self) -> str:
        """Its name as a folder."""
        words = (re.sub(r"\s*=\s*", "=", label) for label in self.labels)
        return "_".join(re.sub(r"[^\w.=+]+", "-", label).strip("-") for label in words)


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """Everything that is compared.

    Attributes:
        title: What the comparison is called.
        methods, columns, rows: Names along these axes; one empty name where there is no axis.
        values: Values of the swept key; a single None where nothing is swept.
        sweep_label: What the swept key is called.
        on_top: Pairs of methods, the second made of the first.
        reference: The method that speed-ups are against.
        cells: All runs, those that share model and data beside each other.
        folder: Where runs of the base configuration go.
    """

    title: str
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[float | None, ...]
    sweep_label: str
    on_top: tuple[tuple[str, str], ...]
    reference: str
    cells: tuple[Cell, ...]
    folder: Path

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds, in order."""
        return tuple(sorted({cell.seed for cell in self.cells}))

    def swept(self, value: float | None) -> str:
        """Return a value of the sweep in words."""
        return _swept(self.sweep_label, value)


def load(
    source: str | Path | Mapping[str, Any] | None,
    *,
    methods: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> Grid:
    """Check a grid, all cells of it.

    Args:
        source: An arena file or a run's configuration file, either as a mapping, or None for the quickstart.
        methods: For a run's configuration: names of methods; its own keeps the options it has there. For an arena:
            only these of its methods.
        seeds: Their number or themselves; None: as the arena says, 3 for a run's configuration.
        overrides: Assignments such as `training.rounds=2`, for all cells.

    Raises: ConfigError naming the cell that cannot be run.
    """
    values = _read(source)
    stem = "arena" if isinstance(source, Mapping) else "quickstart" if source is None else Path(source).stem
    if _is_arena(values):
        arena = validate(ArenaConfig, values, "")
        base = _base(arena, Path() if isinstance(source, Mapping) or source is None else Path(source).parent)
        arena = arena if methods is None else _only(arena, methods)
    else:
        base = values
        arena = _of_methods(base, methods)
    base = override(base, _assignments(arena.set, "set") + list(overrides))
    fixed = [*arena.set, *(text.partition("=")[0].strip() for text in overrides)]
    _check_apart(arena, fixed)
    checked = config.parse(base)
    chosen = arena.seeds if seeds is None else seeds
    cells = tuple(_cells(arena, base, _seeds(chosen, checked.seed)))
    _check_alike(cells, "data.task", lambda run: run.data.task, "whose scores cannot be compared")
    _check_alike(cells, "clock.metric", lambda run: run.clock.metric, "whose targets cannot be compared")
    _check_names(cells)
    return Grid(
        title=arena.title or stem,
        methods=tuple(arena.methods),
        columns=tuple(arena.columns or [""]),
        rows=tuple(arena.rows or [""]),
        values=_values(arena.sweep),
        sweep_label=_label(arena.sweep),
        on_top=tuple(arena.on_top),
        reference=next(iter(arena.methods)) if arena.reference is None else arena.reference,
        cells=_grouped(cells),
        folder=Path(checked.output.folder) / f"compare-{stem}",
    )


def _read(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    return read_yaml(config.quickstart_path() if source is None else Path(source))


def _is_arena(values: Mapping[str, Any]) -> bool:
    """Return whether values are an arena's: no key of one is a section of a run's configuration."""
    return any(key in _ARENA_KEYS for key in values)


def _base(arena: ArenaConfig, folder: Path) -> dict[str, Any]:
    if arena.config is not None:
        return arena.config
    named = arena.base or "quickstart"
    found = read_yaml(config.quickstart_path() if named == "quickstart" else folder / named)
    if _is_arena(found):
        raise ConfigError(f"base {named} is itself an arena; give a run's configuration")
    return found


def _of_methods(base: Mapping[str, Any], methods: Sequence[str] | None) -> ArenaConfig:
    """Return the arena of some methods on a run's configuration. Raises: ConfigError."""
    if not methods:
        raise ConfigError("name the methods to compare, e.g. --methods a3smoe,flame; `emberfed methods` lists them")
    if len(set(methods)) < len(methods):
        raise ConfigError(f"methods {', '.join(methods)}: one is named twice; name each once")
    named = base.get("method")
    own = named.get("name") if isinstance(named, Mapping) else None
    return ArenaConfig(methods={name: {} if name == own else {"method": {"name": name}} for name in methods})


def _only(arena: ArenaConfig, methods: Sequence[str]) -> ArenaConfig:
    """Return the arena with some of its methods, in its own order. Raises: ConfigError for an unknown one."""
    for name in methods:
        if name not in arena.methods:
            raise ConfigError(
                f"the arena has no method {name!r}{closest(name, arena.methods)} (there are {one_of(arena.methods)})"
            )
    kept = {name: overrides for name, overrides in arena.methods.items() if name in methods}
    pairs = [pair for pair in arena.on_top if set(pair) <= set(kept)]
    reference = arena.reference if arena.reference in kept else None
    return arena.model_copy(update={"methods": kept, "on_top": pairs, "reference": reference})


def _values(sweep: Sweep | None) -> tuple[float | None, ...]:
    return (None,) if sweep is None else tuple(sweep.values)


def _label(sweep: Sweep | None) -> str:
    return "" if sweep is None else sweep.label or sweep.key


def _swept(label: str, value: float | None) -> str:
    return "" if value is None else f"{label}={value:g}"


def _seeds(chosen: int | Sequence[int], first: int) -> tuple[int, ...]:
    """Return the seeds. Raises: ConfigError."""
    found = tuple(range(first, first + chosen)) if isinstance(chosen, int) else tuple(chosen)
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise ConfigError(f"seeds {chosen!r}: expected a number of seeds from 1, or different seeds from 0")
    return found


def _check_apart(arena: ArenaConfig, fixed: Sequence[str]) -> None:
    """Check that no axis undoes what another sets. Raises: ConfigError naming the key and both places."""
    swept = [] if arena.sweep is None else [arena.sweep.key]
    layers: list[tuple[str, Sequence[str]]] = [("set", fixed)]
    layers += [("columns", [key for point in arena.columns.values() for key in point])]
    layers += [("rows", [key for point in arena.rows.values() for key in point])]
    layers += [("methods", [key for point in arena.methods.values() for key in point]), ("sweep", swept)]
    layers += [("seeds", ["seed"])]
    for place, (later, keys) in enumerate(layers):
        for key in keys:
            for earlier, before in layers[:place]:
                for other in before:
                    if other == key or other.startswith(f"{key}."):
                        raise ConfigError(
                            f"{later} replaces {key!r}, so that {other!r} of {earlier} would have no effect; "
                            f"set it in one place"
                        )


def _cells(arena: ArenaConfig, base: Mapping[str, Any], seeds: Sequence[int]) -> Iterator[Cell]:
    columns, rows = arena.columns or {"": {}}, arena.rows or {"": {}}
    for seed, column, row, value, method in product(seeds, columns, rows, _values(arena.sweep), arena.methods):
        parts = {f"column {column!r}": columns[column], f"row {row!r}": rows[row]}
        parts |= {f"method {method!r}": arena.methods[method]}
        parts |= {} if arena.sweep is None else {"sweep": {arena.sweep.key: value}}
        assignments = [text for where, overrides in parts.items() for text in _assignments(overrides, where)]
        swept = _swept(_label(arena.sweep), value)
        named = [label for label in (column, row, method, swept) if label]
        try:
            checked = config.parse(override(base, [*assignments, f"seed={seed}"]))
        except ConfigError as error:
            raise ConfigError(f"{', '.join(named)}: {error}") from None
        yield Cell(method, column, row, value, swept, checked)


def _assignments(overrides: Mapping[str, Any], where: str) -> list[str]:
    """Return overrides as `--set` takes them: JSON is YAML. Raises: ConfigError."""
    try:
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}; give numbers, words, lists or sections") from None


def _check_alike(cells: Sequence[Cell], key: str, of: Callable[[RunConfig], str], why: str) -> None:
    """Check that all runs can be compared: they have the same value of a key. Raises: ConfigError."""
    first = of(cells[0].config)
    other = next((cell for cell in cells if of(cell.config) != first), None)
    if other is not None:
        raise ConfigError(
            f"{cells[0].title!r} has {key} {first} and {other.title!r} has {of(other.config)}, {why}; "
            f"give each {key.rpartition('.')[2]} an arena of its own"
        )


def _check_names(cells: Sequence[Cell]) -> None:
    """Check that every cell has a folder of its own, on every file system. Raises: ConfigError."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.name.casefold(), cell)
        if other is not cell:
            raise ConfigError(f"{other.title!r} and {cell.title!r} have the same letters; name them more differently")
        if len(cell.name.encode()) > 150:
            raise ConfigError(f"{cell.title[:60]!r}... is too long a name for a folder; shorten the names of the axes")


def _grouped(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return the cells so that those of one model, and of one data set in it, follow each other; else as they were."""
    models = list(dict.fromkeys(model_key(cell.config) for cell in cells))
    data = list(dict.fromkeys(data_key(cell.config) for cell in cells))
    return tuple(
        sorted(cells, key=lambda cell: (models.index(model_key(cell.config)), data.index(data_key(cell.config))))
    )
