"""What the runs of a grid came to, read from their folders alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, final

import emberfed
from emberfed.arena.grid import Cell, Grid
from emberfed.arena.statistics import PairedTest, Spread, paired
from emberfed.errors import RunFolderError
from emberfed.metrics import Metric, aimed_at, loss_beside
from emberfed.records import Json
from emberfed.report.figures import Curve, clock_curve
from emberfed.report.reading import RunFolder as ReadRun
from emberfed.report.reading import read_run
from emberfed.report.views import (
    TierView,
    active,
    alike,
    clients_at,
    evaluated_tiers,
    evaluations_at,
    largest,
    mean,
    total,
)

State = Literal["done", "failed", "unfinished", "missing"]
"""`failed`: it could not be run when last tried. `unfinished`: it has begun. `missing`: it has not."""


@final
@dataclass(frozen=True, slots=True)
class TierResult:
    """One tier of one run, after the last round; NaN where nothing was recorded.

    Attributes:
        tier: Its name.
        top_k: Its number of active experts.
        quality: Of the global model at the tier's budget, by key of the metric.
        before: The same before training.
        examples: Held-out examples.
        flops: Of one of its clients in one round, on average.
        bytes_down, bytes_up: What one of its clients receives and sends in one round, on average.
        seconds: What one of its clients takes for one round, on average.
        peak_memory_bytes: The most that any of its clients took.
        adapter_top_k: Its number of active experts of a sparse adapter; None without one.
        curve: Seconds on the clients' clock and the clock's metric at each evaluation; empty without a clock.
    """

    tier: str
    top_k: int
    quality: Mapping[str, float]
    before: Mapping[str, float]
    examples: int
    flops: float
    bytes_down: float
    bytes_up: float
    seconds: float
    peak_memory_bytes: float
    adapter_top_k: int | None = None
    curve: Curve = ()

    def seconds_to(self, metric: Metric, target: float) -> float:
        """Return when the metric of its curve first reached a target; infinite if it did not."""
        return next((seconds for seconds, value in self.curve if metric.reached(value, target)), math.inf)

    def of(self, metric: Metric) -> float:
        """Return its quality by a metric, NaN if that was not recorded."""
        return self.quality.get(metric.key, math.nan)

    @property
    def traffic_bytes(self) -> float:
        """What one of its clients receives and sends in one round, on average."""
        return self.bytes_down + self.bytes_up

    @property
    def figures(self) -> dict[str, float]:
        """All that has a mean over seeds, by name."""
        before = {f"{key}_before": value for key, value in self.before.items()}
        return {**self.quality, **before, **{name: getattr(self, name) for name in _COSTS}}

    def json(self) -> dict[str, Json]:
        """Return the tier as plain values."""
        names = {"tier": self.tier, "top_k": self.top_k, **_adapter_json(self.adapter_top_k)}
        figures = {name: _finite(value) for name, value in self.figures.items()}
        curve = {"clock": [list(point) for point in self.curve]} if self.curve else {}
        return {**names, "examples": self.examples, **figures, **curve}


_COSTS = ("flops", "bytes_down", "bytes_up", "seconds", "peak_memory_bytes")


@final
@dataclass(frozen=True, slots=True)
class PersonalResult:
    """The clients' own models of one run after the last round, each on its own held-out examples.

    Attributes:
        clients: How many.
        mean, worst_decile, spread: Of the headline metric over clients: mean, mean of the worst tenth, standard
            deviation.
        loss_mean: Mean loss over clients.
    """

    clients: int
    mean: float
    worst_decile: float
    spread: float
    loss_mean: float

    def json(self) -> dict[str, Json]:
        """Return the figures as plain values."""
        return {name: _finite(value) for name, value in asdict(self).items()}


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
        headline: The metric it is judged by; None before it has begun.
        personal: The clients' own models, of a run that is done and has evaluated them.
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
    headline: Metric | None = None
    personal: PersonalResult | None = None

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
            "tiers": [tier.json() for tier in self.tiers],
            **({} if self.personal is None else {"personal": self.personal.json()}),
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
        budget: What tells it from other tiers, in words: `K = 1`, `k = 1` of a sparse adapter, or nothing.
    """

    column: str
    row: str
    sweep: float | None
    tier: str
    top_k: int
    budget: str = field(compare=False)

    @property
    def label(self) -> str:
        """The tier in words."""
        return f"{self.tier} ({self.budget})" if self.budget else self.tier

    def json(self) -> dict[str, Json]:
        """Return the place as plain values."""
        return {name: getattr(self, name) for name in ("column", "row", "sweep", "tier", "top_k")}


@final
@dataclass(frozen=True, slots=True)
class Group:
    """What the tiers of a run have in common.

    Attributes:
        column, row: Names along these axes.
        sweep: The swept key's value; None where nothing is swept, or where its values compete.
    """

    column: str
    row: str
    sweep: float | None


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
    """All results of a grid.

    Attributes:
        grid: The grid.
        cells: Its runs.
        others: Names of runs in the same folder that are not of the grid.
    """

    grid: Grid
    cells: tuple[CellResult, ...]
    others: tuple[str, ...] = ()

    @property
    def headline(self) -> Metric:
        """What the runs are judged by; of runs that have begun."""
        return next(one.headline for one in self.cells if one.headline is not None)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The headline and its loss; nothing before any run has begun."""
        begun = any(one.headline is not None for one in self.cells)
        return (self.headline, loss_beside(self.headline)) if begun else ()

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
            Place(column, row, value, tier, top_k, told)
            for value in values
            for column in self.grid.columns
            for row in self.grid.rows
            for (tier, top_k), told in tiers[row].items()
        )

    def _tiers(self, row: str) -> dict[tuple[str, int], str]:
        """Return what tells each tier of a row from the others, by its name and K, budgets from small to large."""
        met: dict[tuple[str, int], set[int]] = {}
        for tier in (tier for one in self.cells if one.cell.row == row for tier in one.tiers):
            own = () if tier.adapter_top_k is None else (tier.adapter_top_k,)
            met.setdefault((tier.tier, tier.top_k), set()).update(own)
        same = alike({(tier, top_k): max(found, default=None) for (tier, top_k), found in met.items()})
        ordered = sorted(met, key=lambda key: max(met[key], default=key[1]))
        return {key: "" if same or len(met[key]) > 1 else active(key[1], *(met[key] or [None])) for key in ordered}

    def at(self, place: Place, contestant: str) -> dict[int, TierResult]:
        """Return a contestant's results at a place, by seed."""
        return {
            one.cell.seed: tier
            for one in self.cells
            for tier in one.tiers
            if (one.cell.column, one.cell.row, tier.tier, tier.top_k)
            == (place.column, place.row, place.tier, place.top_k)
            and (place.sweep is None or one.cell.sweep == place.sweep)
            and self._contestant(one.cell) == contestant
        }

    def spread(self, place: Place, contestant: str, figure: Callable[[TierResult], float]) -> Spread | None:
        """Return mean and spread over seeds of a figure; None without results."""
        return Spread.of([figure(tier) for tier in self.at(place, contestant).values()])

    def contest(self, place: Place, metric: Metric) -> Contest:
        """Return who won at a place, and with whom it is tied."""
        values = {
            name: {seed: tier.of(metric) for seed, tier in self.at(place, name).items()} for name in self.contestants
        }
        spreads = {name: spread for name in values if (spread := Spread.of(list(values[name].values()))) is not None}
        if len(spreads) < 2:
            return Contest(place, metric, spreads, None, ())
        best = max(spreads, key=lambda name: metric.sign * spreads[name].mean)
        tests = (paired(best, values[best], name, values[name]) for name in spreads if name != best)
        return Contest(place, metric, spreads, best, tuple(test for test in tests if test is not None))

    def contests(self) -> Iterator[Contest]:
        """Return every contest, metric by metric."""
        return (self.contest(place, metric) for metric in self.metrics for place in self.places())

    def groups(self) -> tuple[Group, ...]:
        """Return column, row and value of the sweep of the places, each once."""
        return tuple(dict.fromkeys(Group(place.column, place.row, place.sweep) for place in self.places()))

    def personal(self, group: Group, contestant: str) -> dict[int, PersonalResult]:
        """Return what a contestant's clients' own models came to, by seed."""
        return {
            one.cell.seed: one.personal
            for one in self.cells
            if one.personal is not None
            and (one.cell.column, one.cell.row) == (group.column, group.row)
            and (group.sweep is None or one.cell.sweep == group.sweep)
            and self._contestant(one.cell) == contestant
        }

    @property
    def has_clock(self) -> bool:
        """Whether any run was on the clients' clock."""
        return any(tier.curve for one in self.cells for tier in one.tiers)

    @property
    def clock_metric(self) -> Metric:
        """What the targets are values of, and what is drawn over time; `grid.load` saw to it that it is one."""
        return aimed_at(self.headline, self.cells[0].cell.config.clock.metric)

    @property
    def targets(self) -> tuple[float, ...]:
        """The values of the clock's metric whose first time is of interest, the easiest first."""
        found = {target for one in self.cells for target in one.cell.config.clock.targets}
        return tuple(self.clock_metric.easiest_first(found))

    def curve(self, place: Place, contestant: str) -> Curve:
        """Return seconds on the clients' clock and the clock's metric, mean over seeds of each evaluation."""
        runs = [tier.curve for tier in self.at(place, contestant).values() if tier.curve]
        return tuple(
            (fmean(seconds for seconds, _ in points), fmean(value for _, value in points))
            for points in zip(*runs, strict=False)
        )

    def times_to(self, place: Place, contestant: str, target: float) -> tuple[float, ...]:
        """Return the seconds until a target was first reached, by seed; infinite where it was not."""
        tiers = self.at(place, contestant).values()
        return tuple(tier.seconds_to(self.clock_metric, target) for tier in tiers if tier.curve)

    def speed_up(self, place: Place, contestant: str, target: float) -> float:
        """Return how much sooner a contestant reached a target than the reference, in means over seeds.

        NaN if either did not reach it with every seed.
        """
        own, other = (self.times_to(place, name, target) for name in (contestant, self.reference))
        if not (own and other and max(own) < math.inf and max(other) < math.inf and fmean(own) > 0):
            return math.nan
        return fmean(other) / fmean(own)

    @property
    def reference(self) -> str:
        """The contestant that speed-ups are against."""
        named = self.grid.reference
        return named if named in self.contestants else self.contestants[0]

    @property
    def has_personal(self) -> bool:
        """Whether any run evaluated the clients' own models."""
        return any(one.personal is not None for one in self.cells)

    def _contestant(self, cell: Cell) -> str:
        return cell.swept if self.values_compete else cell.method

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
                    **place.json(),
                    "contestant": name,
                    **_spreads_json([tier.figures for tier in found.values()]),
                }
                for place in self.places()
                for name in self.contestants
                if (found := self.at(place, name))
            ],
            **({"personal": list(self._personal_json())} if self.has_personal else {}),
            **({"clock_metric": self.clock_metric.key} if self.has_clock else {}),
            **({"time_to_accuracy": list(self._times_json())} if self.has_clock else {}),
            "contests": [
                {
                    **contest.place.json(),
                    "metric": contest.metric.key,
                    "best": contest.best,
                    "ties": sorted(contest.ties),
                    "tests": [test.json() for test in contest.tests],
                }
                for contest in self.contests()
            ],
        }

    def _times_json(self) -> Iterator[dict[str, Json]]:
        for place in self.places():
            for name in self.contestants:
                for target in self.targets:
                    yield {
                        **place.json(),
                        "contestant": name,
                        "metric": self.clock_metric.key,
                        "target": target,
                        "clock_seconds": [_finite(seconds) for seconds in self.times_to(place, name, target)],
                        "reference": self.reference,
                        "speed_up": _finite(self.speed_up(place, name, target)),
                    }

    def _personal_json(self) -> Iterator[dict[str, Json]]:
        for group in self.groups():
            for name in self.contestants:
                found = [asdict(result) for result in self.personal(group, name).values()]
                if found:
                    yield {**asdict(group), "contestant": name, **_spreads_json(found)}


def _spreads_json(results: Sequence[Mapping[str, float]]) -> dict[str, Json]:
    """Return mean and spread over results of every figure, by name; null for one that was never recorded."""
    spreads = {name: Spread.of([result.get(name, math.nan) for result in results]) for name in results[0]}
    return {name: None if spread is None else spread.json() for name, spread in spreads.items()}


def _adapter_json(adapter_top_k: int | None) -> dict[str, Json]:
    return {} if adapter_top_k is None else {"adapter_top_k": adapter_top_k}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collect(grid: Grid, folder: Path, problems: Mapping[str, str]) -> Comparison:
    """Read the grid's runs below `folder`.

    Args:
        grid: The grid.
        folder: The comparison's folder; runs are in its `runs`.
        problems: By cell name, why it failed when last tried.

    Raises:
        RunFolderError: Some runs are judged by one metric and some by another.
    """
    cells = tuple(_read(cell, folder / "runs" / cell.name, problems) for cell in grid.cells)
    judged = {one.headline: one.cell for one in reversed(cells) if one.headline is not None}
    if len(judged) > 1:
        told = ", ".join(f"{metric.title} in {cell.title!r}" for metric, cell in reversed(judged.items()))
        raise RunFolderError(
            f"{folder}: runs are judged by different metrics ({told}), which cannot be compared; make an arena for each"
        )
    names = {cell.name for cell in grid.cells}
    others = sorted(path.parent.name for path in folder.glob("runs/*/config.yaml") if path.parent.name not in names)
    return Comparison(grid, cells, tuple(others))


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
        tiers=tuple(_tier(run, tier) for tier in evaluated_tiers(run)) if done else (),
        headline=run.headline,
        personal=_personal(run) if done else None,
    )


def _personal(run: ReadRun) -> PersonalResult | None:
    if not run.personal_summaries:
        return None
    last = run.personal_summaries[-1]
    return PersonalResult(last.clients, last.mean, last.worst_decile, last.spread, last.loss_mean)


def _tier(run: ReadRun, tier: TierView) -> TierResult:
    lines, clients = evaluations_at(run, tier), clients_at(run, tier)
    first, last = lines[0], lines[-1]
    shown = (run.headline, loss_beside(run.headline))
    return TierResult(
        tier=tier.name or tier.budget,
        top_k=tier.top_k,
        quality={metric.key: last.of(metric) for metric in shown},
        before={metric.key: first.of(metric) for metric in shown},
        examples=last.examples or 0,
        flops=mean(line.flops for line in clients),
        bytes_down=mean(line.bytes_down for line in clients),
        bytes_up=mean(line.bytes_up for line in clients),
        seconds=mean(line.seconds for line in clients),
        peak_memory_bytes=largest(line.peak_memory_bytes for line in clients),
        adapter_top_k=tier.adapter_top_k,
        curve=clock_curve(lines, run.clock_metric),
    )
