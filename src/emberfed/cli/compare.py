"""`compare`: the call of `emberfed.arena`, with progress of many runs, and stopping, around it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from emberfed import events
from emberfed.arena import markdown as words
from emberfed.arena import running
from emberfed.arena.grid import Cell, Grid
from emberfed.arena.results import Comparison, Place
from emberfed.cli.progress import Plan, Position
from emberfed.cli.stopping import Stop
from emberfed.cli.tables import plain_table
from emberfed.errors import ConfigError, Interrupted
from emberfed.metrics import Metric
from emberfed.report import numbers


def seeds(text: str) -> int | list[int]:
    """Parse `3` (a number of seeds) or `0,4,7` (the seeds). Raises: ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {text!r}: expected a number of seeds, e.g. --seeds 3, or seeds, e.g. --seeds 0,1,2")
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def run(grid: Grid, folder: Path, jobs: int) -> Comparison:
    """Run what the grid lacks. Raises: EmberfedError."""
    stop = Stop()
    try:
        with stop.on_signals(), _display() as shown:
            return running.carry_out(grid, folder, jobs, stop.before(shown))
    except KeyboardInterrupt:
        raise Interrupted("stopped; what is finished is kept. Go on with the same command") from None


def document(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Return the comparison as plain values, with the files it is in."""
    return {"folder": str(folder), "page": str(folder / "comparison.html"), **comparison.json()}


def tables(comparison: Comparison, folder: Path) -> list[RenderableType]:
    """Return the tables and what follows them."""
    grid, places = comparison.grid, comparison.places()
    groups = dict.fromkeys((place.sweep, place.column, place.row) for place in places)
    shown: list[RenderableType] = [
        _table(comparison, metric, [place for place in places if (place.sweep, place.column, place.row) == group])
        for metric in comparison.metrics
        for group in groups
    ]
    shown += [Text(note.replace("Bold", _BEST), style="dim") for note in words.footnotes(comparison)]
    shown += [_personal(comparison)] if comparison.has_personal else []
    shown += [Text(said, style="yellow") for said in words.left_out(comparison)]
    shown += [Text(said, style="bold red") for said in words.without_result(comparison)]
    done = f"{sum(one.state == 'done' for one in comparison.cells)} of {len(grid.cells)} runs done"
    return [*shown, Text("\ncomparison   ", style="bold") + Text(f"{folder / 'comparison.html'} ({done})")]


def _table(comparison: Comparison, metric: Metric, places: Sequence[Place]) -> RenderableType:
    """Return the papers' table turned on its side, so that many methods fit: a row per method."""
    first = places[0]
    parts = [metric.with_unit, first.column, first.row, comparison.grid.swept(first.sweep)]
    table = plain_table(f"{', '.join(part for part in parts if part)} ({metric.direction})")
    table.add_column("", overflow="fold")
    for place in places:
        table.add_column(
            f"{place.tier} {place.budget.replace(numbers.SPACE, '')}".strip(), justify="right", no_wrap=True
        )
    contests = [comparison.contest(place, metric) for place in places]
    for name in comparison.contestants:
        marked = []
        for contest in contests:
            text, standing = words.cell_text(contest, name, len(comparison.grid.seeds), digits=3)
            style = "green" if standing == "best" else ""
            mark = {"best": f" {_BEST}", "tie": f" {words.TIE}", "": ""}[standing]
            marked.append(Text(f"{text}{mark}", style=style))
        table.add_row(name, *marked)
    return table


_BEST = "*"
"""Marks the best where there may be no colour."""


def _personal(comparison: Comparison) -> RenderableType:
    table = plain_table(f"Clients’ own models, {comparison.headline.title} ({comparison.headline.direction})")
    table.add_column("", overflow="fold")
    for name in words.PERSONAL:
        table.add_column(name, justify="right")
    for told, figures in words.personal(comparison):
        table.add_row(", ".join(told), *figures)
    return table


class _Shown:
    """How far each running cell is."""

    def __init__(self) -> None:
        self.cells = 0
        self.waiting = 0
        self.done = 0
        self.positions: dict[str, Position] = {}
        self.began = time.monotonic()

    def hear(self, event: running.Event) -> None:
        """Move on."""
        if isinstance(event, running.Planned):
            self.cells, self.waiting = event.cells, len(event.waiting)
        if isinstance(event, running.CellStarted):
            self.positions[event.cell.name] = Position(Plan.of(event.cell.config), time.monotonic())
        if isinstance(event, running.CellProgress):
            self.positions[event.cell.name] = self.positions[event.cell.name].after(event.event, time.monotonic())
        if isinstance(event, running.CellDone):
            self.done += 1
            del self.positions[event.cell.name]

    @property
    def place(self) -> str:
        """Cells that came to an end, of all."""
        return f"{self.cells - self.waiting + self.done} of {self.cells} runs"

    @property
    def seconds_left(self) -> float | None:
        """Time that the rest will take at the pace so far; None as long as there is no pace."""
        ahead = self.done + sum(position.done / position.plan.total for position in self.positions.values())
        return (time.monotonic() - self.began) * (self.waiting - ahead) / ahead if ahead > 0 else None


@final
class Lines(AbstractContextManager["Lines"]):
    """Plain lines: a cell's beginning and end, its rounds, and what went wrong."""

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._shown = _Shown()

    def __call__(self, event: running.Event) -> None:
        """Show an event."""
        self._shown.hear(event)
        line = _line(event, self._shown)
        if line is not None:
            try:
                print(line.replace(numbers.SPACE, " "), file=sys.stderr, flush=True)
            except OSError:  # the reader went away; that is no reason to stop
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to take away."""


def _line(event: running.Event, shown: _Shown) -> str | None:
    if isinstance(event, running.Planned):
        return f"{event.cells} runs, {event.cells - len(event.waiting)} of them done"
    if isinstance(event, running.CellStarted):
        return f"{event.cell.title}: starting"
    if isinstance(event, running.CellProgress):
        said = _said(event.cell, event.event)
        return None if said is None else f"{event.cell.title}: {said}"
    if event.problem is not None:
        return f"{event.cell.title}: failed, {event.problem}"
    left = shown.seconds_left
    rest = f", about {numbers.seconds(left)} left" if left else ""
    return f"{event.cell.title}: done ({shown.place}{rest})"


def _said(cell: Cell, event: events.Event) -> str | None:
    """Return what an event of a run says that is worth a line among many runs."""
    if isinstance(event, events.RoundDone):
        scores = ", ".join(f"{tier} {numbers.score(value)}" for tier, value in event.quality.items())
        name = f"round {event.round} of {cell.config.training.rounds}" if event.round else "before training"
        told = f", {cell.config.task.metric.title} {scores}" if scores else ""
        return f"{name}, {numbers.seconds(event.seconds)}{told}"
    if isinstance(event, events.ClientDone) and event.problem is not None:
        return f"round {event.round}: client {event.client} {event.problem}"
    if isinstance(event, events.Notice):
        return f"{event.level}: {event.message}"
    return None


@final
class Bars(AbstractContextManager["Bars"]):
    """A bar for all runs and one for each that is running; finished runs and problems stay above them."""

    def __init__(self, console: Console) -> None:
        """Draw on a terminal's console."""
        self._shown = _Shown()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}", markup=False, justify="right"),
            console=console,
            refresh_per_second=4,
            transient=True,
            expand=True,
        )
        self._all = self._progress.add_task("checking", total=None, note="")
        self._tasks: dict[str, TaskID] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._open.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away."""
        self._open.close()

    def __call__(self, event: running.Event) -> None:
        """Move the bars; print what should stay."""
        shown = self._shown
        shown.hear(event)
        left = shown.seconds_left
        ahead = shown.done + sum(position.done / position.plan.total for position in shown.positions.values())
        self._progress.update(
            self._all,
            description=shown.place,
            completed=ahead,
            total=shown.waiting,
            note="" if left is None else f"{numbers.seconds(round(left))} left",
        )
        if isinstance(event, running.CellStarted):
            self._tasks[event.cell.name] = self._progress.add_task(event.cell.title, total=1.0, note="loading")
        if isinstance(event, running.CellProgress):
            here = shown.positions[event.cell.name]
            note = f"round {here.round} of {here.plan.rounds}" if here.round else "before training"
            self._progress.update(self._tasks[event.cell.name], completed=here.done / here.plan.total, note=note)
        if isinstance(event, running.CellDone):
            self._progress.remove_task(self._tasks.pop(event.cell.name))
        lasting = _lasting(event, shown)
        if lasting is not None:
            self._progress.console.print(lasting)


def _lasting(event: running.Event, shown: _Shown) -> Text | None:
    if isinstance(event, running.CellDone):
        style = "green" if event.problem is None else "bold red"
        return Text(f"{event.cell.title}: {'done' if event.problem is None else event.problem}", style=style)
    if isinstance(event, running.CellProgress) and not isinstance(event.event, events.RoundDone):
        line = _line(event, shown)
        return None if line is None else Text(line, style="yellow")
    return None


def _display() -> Lines | Bars:
    """Return bars if standard error is a terminal that can draw them, else plain lines."""
    if sys.stderr.isatty():
        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        if console.is_terminal and not console.is_dumb_terminal:
            return Bars(console)
    return Lines()
