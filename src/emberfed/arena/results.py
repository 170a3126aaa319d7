"""What the runs of a grid came to, read from their folders alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, final

import emberfed
from emberfed.arena.grid import Cell, Grid
from emberfed.arena.statistics import PairedTest, Spread, paired
from emberfed.records import Json
from emberfed.report.reading import RunFolder as ReadRun
from emberfed.report.reading import read_run
from emberfed.report.views import TierView, clients_at, evaluated_tiers, evaluations_at, largest, mean, total

State = Literal["done", "failed", "unfinished", "missing"]
"""`failed`: it could not be run when last tried. `unfinished`: it has begun. `missing`: it has not."""


@final
@dataclass(frozen=True, slots=True)
class TierResult:
    """One tier of one run, after the last round; NaN where nothing was recorded.

    Attributes:
        tier: Its name.
        top_k: Its number of active experts.
        rouge_l, loss: Quality of the global model at the tier's budget.
        rouge_l_before, loss_before: The same before training.
        examples: Held-out examples.
        flops: Of one of its clients in one round, on average.
        bytes_down, bytes_up: What one of its clients receives and sends in one round, on average.
        seconds: What one of its clients takes for one round, on average.
        peak_memory_bytes: The most that any of its clients took.
    """

    tier: str
    top_k: int
    rouge_l: float
    loss: float
    rouge_l_before: float
    loss_before: float
    examples: int
    flops: float
    bytes_down: float
    bytes_up: float
    seconds: float
    peak_memory_bytes: float

    @property
    def traffic_bytes(self) -> float:
        """What one of its clients receives and sends in one round, on average."""
        return self.bytes_down + self.bytes_up


@final
@dataclass(frozen=True, slots=True)
class CellResult:
    """One run of the grid: what became of it and what it cost in all.

    Attributes:
        cell: Which one.
        state: What became of it.
        problem: Why it failed; None if it did not.
        rounds: Rounds done.
        flops, bytes_down, bytes_up: Of all clients in all rounds.
        peak_memory_bytes: The highest of any client or evaluation.
        seconds: Of all rounds, and of the evaluation before them.
        tiers: Quality and costs by tier, of a run that is done.
    """

    cell: Cell
    state: State
    problem: str | None
    rounds: int
    flops: float
    bytes_down: float
    bytes_up: float
    peak_memory_bytes: float
    seconds: float
    tiers: tuple[TierResult, ...]

    def json(self) -> dict[str, Json]:
        """Return the run as plain values."""
        cell = self.cell
        costs = ("rounds", "flops", "bytes_down", "bytes_up", "peak_memory_bytes", "seconds")
        return {
            "run": f"runs/{cell.name}",
            "method": cell.method,
            "column": cell.column,
            "row": cell.row,
            "sweep": cell.sweep,
            "seed": cell.seed,
            "state": self.state,
            "problem": self.problem,
            **{name: _finite(getattr(self, name)) for name in costs},
            "tiers": [{name: _finite(value) for name, value in asdict(tier).items()} for tier in self.tiers],
        }


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where methods compete: one column, row, value of the sweep, and tier.

    Attributes:
        column, row: Names along these axes.
        sweep: The swept key's value; None where nothing is swept.
        tier: The tier's name.
        top_k: Its number of active experts.
    """

    column: str
    row: str
    sweep: float | None
    tier: str
    top_k: int


@final
@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of quality.

    Attributes:
        name: The attribute of `TierResult`.
        title: Its name for people.
        sign: 1 if higher is better, -1 if lower is.
    """

    name: str
    title: str
    sign: int

    @property
    def direction(self) -> str:
        """Whether higher or lower is better."""
        return "higher is better" if self.sign > 0 else "lower is better"


ROUGE_L = Metric("rouge_l", "ROUGE-L", 1)
LOSS = Metric("loss", "Response loss in nats per token", -1)
METRICS = (ROUGE_L, LOSS)
_TIER_FIGURES = tuple(field.name for field in fields(TierResult) if field.name not in ("tier", "top_k", "examples"))


@final
@dataclass(frozen=True, slots=True)
class Contest:
    """Several contestants at one place, by one metric.

    Attributes:
        place: Where; `sweep` is None if the sweep's values are the contestants.
        metric: By what.
        spreads: Mean and spread over seeds by contestant, of those with results.
        best: The contestant with the best mean; None if there are fewer than two.
        tests: The best against each other one, where seeds allow it.
    """

    place: Place
    metric: Metric
    spreads: Mapping[str, Spread]
    best: str | None
    tests: tuple[PairedTest, ...]

    @property
    def ties(self) -> frozenset[str]:
        """Contestants that the test does not separate from the best."""
        return frozenset(test.other for test in self.tests if test.tie)


@final
@dataclass(frozen=True, slots=True)
class Comparison:
    """All results of a grid."""

    grid: Grid
    cells: tuple[CellResult, ...]

    @property
    def values_compete(self) -> bool:
        """Whether the values of the sweep are what is compared, as there is one method only."""
        return len(self.grid.methods) == 1 and len(self.grid.values) > 1

    @property
    def contestants(self) -> tuple[str, ...]:
        """What is compared: the methods, or the sweep's values where there is one method only."""
        return tuple(map(self.grid.swept, self.grid.values)) if self.values_compete else self.grid.methods

    def places(self) -> tuple[Place, ...]:
        """Return the places that have a result, row by row, budgets from small to large."""
        tiers = {row: self._tiers(row) for row in self.grid.rows}
        values = (None,) if self.values_compete else self.grid.values
        return tuple(
            Place(column, row, value, tier, top_k)
            for value in values
            for column in self.grid.columns
            for row in self.grid.rows
            for tier, top_k in tiers[row]
        )

    def _tiers(self, row: str) -> list[tuple[str, int]]:
        met = dict.fromkeys((tier.tier, tier.top_k) for one in self.cells if one.cell.row == row for tier in one.tiers)
        return sorted(met, key=lambda pair: pair[1])

    def at(self, place: Place, contestant: str) -> dict[int, TierResult]:
        """Return a contestant's results at a place, by seed."""
        return {
            one.cell.seed: tier
            for one in self.cells
            for tier in one.tiers
            if (one.cell.column, one.cell.row, tier.tier, tier.top_k)
            == (place.column, place.row, place.tier, place.top_k)
            and (place.sweep is None or one.cell.sweep == place.sweep)
            and (one.cell.swept if self.values_compete else one.cell.method) == contestant
        }

    def spread(self, place: Place, contestant: str, figure: Callable[[TierResult], float]) -> Spread | None:
        """Return mean and spread over seeds of a figure; None without results."""
        return Spread.of([figure(tier) for tier in self.at(place, contestant).values()])

    def contest(self, place: Place, metric: Metric) -> Contest:
        """Return who won at a place, and with whom it is tied."""
        values = {
            name: {seed: getattr(tier, metric.name) for seed, tier in self.at(place, name).items()}
            for name in self.contestants
        }
        spreads = {name: spread for name in values if (spread := Spread.of(list(values[name].values()))) is not None}
        if len(spreads) < 2:
            return Contest(place, metric, spreads, None, ())
        best = max(spreads, key=lambda name: metric.sign * spreads[name].mean)
        tests = (paired(best, values[best], name, values[name]) for name in spreads if name != best)
        return Contest(place, metric, spreads, best, tuple(test for test in tests if test is not None))

    def contests(self) -> Iterator[Contest]:
        """Return every contest, metric by metric."""
        return (self.contest(place, metric) for metric in METRICS for place in self.places())

    @property
    def failures(self) -> tuple[CellResult, ...]:
        """Runs that could not be run."""
        return tuple(one for one in self.cells if one.state == "failed")

    @property
    def most_seeds(self) -> int:
        """The largest number of seeds that any test is made of; 0 without tests."""
        return max((test.n for contest in self.contests() for test in contest.tests), default=0)

    def json(self) -> dict[str, Any]:
        """Return everything as plain values: the grid, every run, means over seeds, tests."""
        grid = self.grid
        return {
            "title": grid.title,
            "emberfed_version": emberfed.__version__,
            "methods": list(grid.methods),
            "columns": list(grid.columns),
            "rows": list(grid.rows),
            "sweep": {"label": grid.sweep_label, "values": list(grid.values)} if grid.sweep_label else None,
            "seeds": list(grid.seeds),
            "runs": [one.json() for one in self.cells],
            "means": [
                {
                    **asdict(place),
                    "contestant": name,
                    **{figure: _spread_json(self, place, name, figure) for figure in _TIER_FIGURES},
                }
                for place in self.places()
                for name in self.contestants
                if self.at(place, name)
            ],
            "contests": [
                {
                    **asdict(contest.place),
                    "metric": contest.metric.name,
                    "best": contest.best,
                    "ties": sorted(contest.ties),
                    "tests": [test.json() for test in contest.tests],
                }
                for contest in self.contests()
            ],
        }


def _spread_json(comparison: Comparison, place: Place, name: str, figure: str) -> dict[str, Json] | None:
    spread = comparison.spread(place, name, lambda tier: float(getattr(tier, figure)))
    return None if spread is None else spread.json()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collect(grid: Grid, folder: Path, problems: Mapping[str, str]) -> Comparison:
    """Read the grid's runs below `folder`.

    Args:
        grid: The grid.
        folder: The comparison's folder; runs are in its `runs`.
        problems: By cell name, why it failed when last tried.
    """
    return Comparison(grid, tuple(_read(cell, folder / "runs" / cell.name, problems) for cell in grid.cells))


def is_done(cell: Cell, run: Path) -> bool:
    """Return whether a run has all its rounds."""
    return (run / "rounds" / f"{cell.config.training.rounds:04d}" / "state.json").is_file() and (
        run / "final"
    ).is_symlink()


def _read(cell: Cell, path: Path, problems: Mapping[str, str]) -> CellResult:
    begun = (path / "config.yaml").is_file()
    done = cell.name not in problems and begun and is_done(cell, path)
    state: State = "done" if done else "failed" if cell.name in problems else "unfinished" if begun else "missing"
    problem = problems.get(cell.name)
    if not begun:
        nothing = math.nan
        return CellResult(cell, state, problem, 0, nothing, nothing, nothing, nothing, nothing, ())
    run = read_run(path)
    before = [line.seconds for line in run.evaluations if line.round == 0]
    return CellResult(
        cell=cell,
        state=state,
        problem=problem,
        rounds=len(run.rounds),
        flops=total(line.flops for line in run.rounds),
        bytes_down=total(line.bytes_down for line in run.rounds),
        bytes_up=total(line.bytes_up for line in run.rounds),
        peak_memory_bytes=largest(line.peak_memory_bytes for line in run.rounds),
        seconds=total([*before, *(line.seconds for line in run.rounds)]),
        tiers=_tiers(run) if done else (),
    )


def _tiers(run: ReadRun) -> tuple[TierResult, ...]:
    return tuple(_tier(run, tier) for tier in evaluated_tiers(run))


def _tier(run: ReadRun, tier: TierView) -> TierResult:
    lines, clients = evaluations_at(run, tier), clients_at(run, tier)
    first, last = lines[0], lines[-1]
    return TierResult(
        tier=tier.name or tier.budget,
        top_k=tier.top_k,
        rouge_l=last.rouge_l,
        loss=last.loss,
        rouge_l_before=first.rouge_l,
        loss_before=first.loss,
        examples=last.examples or 0,
        flops=mean(line.flops for line in clients),
        bytes_down=mean(line.bytes_down for line in clients),
        bytes_up=mean(line.bytes_up for line in clients),
        seconds=mean(line.seconds for line in clients),
        peak_memory_bytes=largest(line.peak_memory_bytes for line in clients),
    )
