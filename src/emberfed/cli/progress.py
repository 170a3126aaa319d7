"""Progress of a run, from its events: bars on a terminal, plain lines elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self, final

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from emberfed import events
from emberfed.metrics import Metric
from emberfed.report import numbers

if TYPE_CHECKING:
    from emberfed.config import RunConfig


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """The work of a run in units: training one client, or evaluating one tier.

    Attributes:
        rounds: Rounds of training; 0 where there is only an evaluation.
        clients: Clients that train in one round.
        tiers: Tiers of one evaluation.
        every: Rounds between evaluations, as in `evaluation.every`.
        headline: What a model is judged by.
    """

    rounds: int
    clients: int
    tiers: int
    every: int
    headline: Metric

    @staticmethod
    def of(config: RunConfig, rounds: int | None = None) -> Plan:
        """Return the plan of a configuration, with another number of rounds if one is given."""
        clients = config.clients
        tiers = sum(config.evaluation.includes(tier.name) for tier in clients.tiers)
        return Plan(rounds or config.training.rounds, clients.asked, tiers, config.evaluation.every, config.task.metric)

    def evaluated(self, round: int) -> bool:
        """Return whether the model is evaluated after `round`."""
        return round in (0, self.rounds) or (self.every > 0 and round % self.every == 0)

    def units(self, rounds: range) -> int:
        """Return the work of some rounds; round 0 is the evaluation before training."""
        return sum(
            self.clients * (round > 0) + self.tiers * self.evaluated(round) for round in rounds if round <= self.rounds
        )

    @property
    def total(self) -> int:
        """All the work."""
        return self.units(range(self.rounds + 1))


@final
@dataclass(frozen=True, slots=True)
class Position:
    """How far a run is, and how long units of work have taken so far.

    Attributes:
        plan: All the work.
        now: When the last event was heard, in seconds.
        round: The running round.
        waiting: Clients that had to train when the round began.
        trained: Clients done in this round, with the part of the running one.
        evaluated: Tiers done in this round, with the part of the running one.
        activity: What is going on, in words.
        part: How much of that is done, from 0 to 1.
        note: More about it.
        clients_done, clients_seconds: Units of training in this process, and what they took.
        tiers_done, tiers_seconds: Units of evaluation in this process, and what they took.
    """

    plan: Plan
    now: float
    round: int = 0
    waiting: int = 0
    trained: float = 0.0
    evaluated: float = 0.0
    activity: str = "starting"
    part: float = 0.0
    note: str = ""
    clients_done: float = 0.0
    clients_seconds: float = 0.0
    tiers_done: float = 0.0
    tiers_seconds: float = 0.0

    def after(self, event: events.Event, now: float) -> Position:
        """Return the position after an event heard at `now`."""
        if isinstance(event, events.RoundStarted):
            return replace(self, now=now, round=event.round, waiting=event.clients, trained=0.0, evaluated=0.0)
        if isinstance(event, events.Step):
            whole = int(self.trained)
            activity = f"client {event.client} ({whole + 1}/{self.waiting})"
            note = f"step {event.step}/{event.steps}  loss {event.loss:.2f}"
            # The last step is not the end of a client: its upload still has to be checked and kept.
            part = min(event.step / event.steps, 0.99)
            return self._train(whole + part, now, activity, part, note)
        if isinstance(event, events.ClientDone):
            return self._train(int(self.trained) + 1.0, now, self.activity, 1.0, self.note)
        if isinstance(event, events.EvaluationProgress):
            part = event.done / max(event.total, 1)
            note = f"{event.done}/{event.total} answers"
            return self._evaluate(int(self.evaluated) + part, now, f"evaluating {event.tier}", part, note)
        return replace(self, now=now)

    def _train(self, trained: float, now: float, activity: str, part: float, note: str) -> Position:
        return replace(
            self,
            now=now,
            trained=trained,
            activity=activity,
            part=part,
            note=note,
            clients_done=self.clients_done + trained - self.trained,
            clients_seconds=self.clients_seconds + now - self.now,
        )

    def _evaluate(self, evaluated: float, now: float, activity: str, part: float, note: str) -> Position:
        return replace(
            self,
            now=now,
            evaluated=evaluated,
            activity=activity,
            part=part,
            note=note,
            tiers_done=self.tiers_done + evaluated - self.evaluated,
            tiers_seconds=self.tiers_seconds + now - self.now,
        )

    @property
    def done(self) -> float:
        """Units of work done, also those of earlier processes."""
        before = self.plan.units(range(self.round))
        kept = self.plan.clients - self.waiting if self.round else 0
        return min(before + kept + self.trained + self.evaluated, self.plan.total)

    @property
    def seconds_left(self) -> float | None:
        """Time that the rest will take at the pace so far; None as long as there is no pace."""
        later = range(self.round + 1, self.plan.rounds + 1)
        clients = max(self.waiting - self.trained, 0) + self.plan.clients * len(later)
        tiers = sum(self.plan.tiers for round in (self.round, *later) if self.plan.evaluated(round)) - self.evaluated
        parts = (
            _at_pace(clients, self.clients_done, self.clients_seconds),
            _at_pace(tiers, self.tiers_done, self.tiers_seconds),
        )
        return None if None in parts else sum(part for part in parts if part is not None)


def _at_pace(units: float, done: float, seconds: float) -> float | None:
    if units <= 0:
        return 0.0
    return units * seconds / done if done > 0 else None


class Display(ABC):
    """Shows events; a context manager around the run."""

    def __init__(self, plan: Plan) -> None:
        """Show the progress of `plan`."""
        self.position = Position(plan, time.monotonic())
        self._lost = False

    def __call__(self, event: events.Event) -> None:
        """Show an event. A terminal or pipe that went away is no reason to stop a run: it goes on unseen."""
        self.position = self.position.after(event, time.monotonic())
        if self._lost:
            return
        try:
            self.show(event)
        except OSError:
            self._lost = True

    @abstractmethod
    def show(self, event: events.Event) -> None:
        """Show an event, after which the run is at `self.position`."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(  # noqa: B027 - plain lines need no end
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, whatever happened."""


@final
class Lines(Display):
    """One plain line per client and round, without control characters."""

    def __init__(self, plan: Plan) -> None:
        """Print the progress of `plan`."""
        super().__init__(plan)
        self._last_steps: dict[str, events.Step] = {}

    def show(self, event: events.Event) -> None:
        """Print a line if the event deserves one."""
        if isinstance(event, events.Step):
            self._last_steps[event.client] = event
            return
        line = self._line(event)
        if line:
            print(line.replace("\xa0", " "), file=sys.stderr, flush=True)  # logs are searched: only plain spaces

    def _line(self, event: events.Event) -> str | None:
        if isinstance(event, events.RoundStarted) and event.round == 0:
            return "before training: evaluating"
        if isinstance(event, events.RoundStarted):
            return f"round {event.round} of {event.rounds}: {_number(event.clients, 'client')} to train"
        if isinstance(event, events.ClientDone):
            place = f"round {event.round}: client {event.client}"
            if event.problem is not None:
                return f"{place} {event.problem}"
            step = self._last_steps.get(event.client)
            training = f", {_number(step.steps, 'step')}, loss {step.loss:.2f}" if step else ""
            return f"{place} done ({int(self.position.trained)} of {self.position.waiting}){training}"
        if isinstance(event, events.EvaluationProgress) and not self.position.plan.rounds and event.done == event.total:
            return f"{event.tier} evaluated"
        if isinstance(event, events.RoundDone):
            scores = ", ".join(f"{tier} {numbers.score(value)}" for tier, value in event.quality.items())
            name = f"round {event.round} of {self.position.plan.rounds}" if event.round else "before training"
            told = f", {self.position.plan.headline.title} {scores}" if scores else ""
            return f"{name}: done in {numbers.seconds(event.seconds)}{told}"
        if isinstance(event, events.Notice):
            return _told(event)
        return None


@final
class _Rows(Progress):
    """Rows that end before the edge of the terminal: its echo of `^C` must not wrap, or a row would stay behind."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the rows."""
        yield _Narrower(self.make_tasks_table(self.tasks))


@final
@dataclass(frozen=True, slots=True)
class _Narrower:
    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.table, options.update_width(max(options.max_width - 3, 1)))


@final
class Bars(Display):
    """Two bars, the run's and that of what is going on; finished rounds and problems stay above them."""

    def __init__(self, plan: Plan, console: Console) -> None:
        """Draw on a terminal's console."""
        super().__init__(plan)
        # A thread of its own redraws four times a second: training never waits for the terminal.
        self._progress = _Rows(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}", markup=False, justify="right"),
            console=console,
            refresh_per_second=4,
            transient=True,
            expand=True,
        )
        self._run: TaskID = self._progress.add_task("loading model and data", total=None, note="")
        self._activity: TaskID = self._progress.add_task("", total=1.0, note="", visible=False)
        self._open = ExitStack()
        self._headed = False

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._open.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away."""
        self._open.close()

    def show(self, event: events.Event) -> None:
        """Move the bars; print what should stay."""
        here = self.position
        left = here.seconds_left
        self._progress.update(
            self._run,
            description=_stage(here),
            completed=here.done,
            total=here.plan.total,
            note="" if left is None else f"{numbers.seconds(round(left)) if left >= 10 else 'a few seconds'} left",
        )
        self._progress.update(
            self._activity, description=here.activity, completed=here.part, note=here.note, visible=bool(here.note)
        )
        lasting = _lasting(event)
        if lasting is None:
            return
        if isinstance(event, events.RoundDone) and not self._headed:
            self._progress.console.print(Text(f"{'':9}{'time':>12}  {here.plan.headline.title} by tier", style="dim"))
            self._headed = True
        self._progress.console.print(lasting)


def display(plan: Plan) -> AbstractContextManager[Display]:
    """Return bars if standard error is a terminal that can draw them, else plain lines."""
    if sys.stderr.isatty():
        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        if console.is_terminal and not console.is_dumb_terminal:
            return Bars(plan, console)
    return Lines(plan)


def _stage(position: Position) -> str:
    if position.plan.rounds == 0:
        return "all tiers"
    return f"round {position.round} of {position.plan.rounds}" if position.round else "before training"


def _lasting(event: events.Event) -> Text | None:
    if isinstance(event, events.RoundDone):
        name = f"round {event.round}" if event.round else "before"
        scores = "  ".join(f"{tier} {numbers.score(value)}" for tier, value in event.quality.items())
        taken = numbers.seconds(event.seconds)
        return Text(f"{name:<9}", style="bold") + Text(f"{taken:>12}  ", style="dim") + Text(scores or "not evaluated")
    if isinstance(event, events.ClientDone) and event.problem is not None:
        return Text(f"round {event.round}: client {event.client} {event.problem}", style="yellow")
    if isinstance(event, events.Notice):
        return Text(_told(event), style="yellow" if event.level == "warning" else "")
    return None


def _told(notice: events.Notice) -> str:
    return notice.message if notice.level == "info" else f"{notice.level}: {notice.message}"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
