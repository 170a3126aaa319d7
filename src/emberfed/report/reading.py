"""Reads a run folder into frozen values. Everything may be missing: a run in progress still has a report.

What is missing, unreadable or damaged becomes a notice, which the page shows; nothing is filled in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, final, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from emberfed import metrics
from emberfed.errors import ConfigError, RunFolderError
from emberfed.metrics import Metric
from emberfed.sections import parse_yaml

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that may not have been recorded: absent or null reads as NaN, and the page shows a dash."""


class _Record(BaseModel):
    """A JSON object of a run folder. Unknown keys are left alone, so that newer runs still have a report."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Scored(_Record):
    """Quality on some examples; which figures there are depends on the task."""

    rouge_l: Number = math.nan
    accuracy: Number = math.nan
    loss: Number = math.nan
    perplexity: Number = math.nan
    examples: int | None = None

    def of(self, metric: Metric) -> float:
        """Return the figure of a metric, NaN if it was not recorded."""
        return float(getattr(self, metric.key))


@final
class CategoryScore(_Scored):
    """Quality on the examples of one category."""


@final
class Evaluation(_Scored):
    """The global model after `round` rounds, evaluated with `top_k` active experts.

    `adapter_top_k`: how many experts of its sparse adapter were active; None without one. `clock_seconds`: since the
    beginning, on the clients' clock.
    """

    round: int
    top_k: int
    adapter_top_k: int | None = None
    tier: str | None = None
    categories: dict[str, CategoryScore] = {}
    seconds: Number = math.nan
    clock_seconds: Number = math.nan


@final
class Personal(_Scored):
    """One client's own model after `round` rounds, on the client's own held-out examples."""

    round: int
    client: str
    top_k: int
    tier: str | None = None


@final
class PersonalSummary(_Record):
    """The clients' own models after `round` rounds: the headline metric's mean, worst tenth and standard deviation."""

    round: int
    clients: int
    mean: Number = math.nan
    worst_decile: Number = math.nan
    spread: Number = math.nan
    loss_mean: Number = math.nan


@final
class Round(_Record):
    """What one round cost, and what became of its clients."""

    round: int
    seconds: Number = math.nan
    training_seconds: Number = math.nan
    evaluation_seconds: Number = math.nan
    overhead_seconds: Number = math.nan
    bytes_down: Number = math.nan
    bytes_up: Number = math.nan
    flops: Number = math.nan
    peak_memory_bytes: Number = math.nan
    replied: tuple[str, ...] | None = None
    failed: dict[str, str] = {}
    refused: dict[str, str] = {}
    share_of_experts_trained: Number = math.nan
    train_loss: Number = math.nan


@final
class ClientRound(_Record):
    """One client's local training in one round. `activation_counts`: (layers, experts), tokens without padding."""

    round: int
    client: str
    top_k: int
    tier: str | None = None
    examples: int | None = None
    bytes_down: Number = math.nan
    bytes_up: Number = math.nan
    seconds: Number = math.nan
    peak_memory_bytes: Number = math.nan
    loss_first: Number = math.nan
    loss_last: Number = math.nan
    loss_mean: Number = math.nan
    losses: tuple[tuple[Number, Number], ...] = ()
    tokens: Number = math.nan
    target_tokens: Number = math.nan
    steps: Number = math.nan
    flops: Number = math.nan
    share_of_experts_touched: Number = math.nan
    activation_counts: Annotated[tuple[tuple[Number, ...], ...], BeforeValidator(lambda value: value or ())] = ()


@final
class Shard(_Record):
    """One client's part of the training data; `labels` counts its examples by label."""

    examples: int | None = None
    labels: dict[str, int] = {}
    target_tokens: Number = math.nan


@final
class Partition(_Record):
    """How the training data was divided among clients."""

    kind: str = "unknown"
    parameters: dict[str, Any] = {}
    clients: dict[str, Shard] = {}


@final
class Event(_Record):
    """One line of the run's own log."""

    message: str
    time: str = ""
    level: str = ""


@final
class Tier(_Record):
    """A budget: clients of this tier activate `top_k` experts per token, `adapter_top_k` of those of an adapter."""

    name: str
    top_k: int
    adapter_top_k: int | None = None
    share: Number = math.nan


@final
class Method(_Record):
    """The method and where it was published (an address or a citation)."""

    name: str = "unknown method"
    title: str = ""
    paper: str = ""


@final
class Model(_Record):
    """The base model's shape."""

    path: str = ""
    family: str = ""
    parameters: Number = math.nan
    num_experts: int | None = None
    native_top_k: int | None = None
    layers: int | None = None


@final
class RunInfo(_Record):
    """`run.json`: what ran, on what.

    `metric` is the headline, `experts` whose experts the clients' activation counts are of.
    """

    name: str = ""
    metric: metrics.Headline = "rouge_l"
    experts: Literal["model", "adapter"] = "model"
    emberfed_version: str = ""
    created: str = ""
    method: Method = Method()
    git: str | None = None
    seed: int | None = None
    versions: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    model: Model = Model()
    data: dict[str, Any] = {}
    tiers: tuple[Tier, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class RunFolder:
    """Everything a report needs of one run.

    Attributes:
        planned_rounds: `training.rounds` of the resolved config, or None if it does not say.
        aim: `clock.metric` of it.
        targets: `clock.targets` of it, ascending.
        notices: What was missing or damaged, one line each.
    """

    path: Path
    info: RunInfo
    config: str
    planned_rounds: int | None
    aim: metrics.Aim
    targets: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    personal: tuple[Personal, ...]
    personal_summaries: tuple[PersonalSummary, ...]
    rounds: tuple[Round, ...]
    clients: tuple[ClientRound, ...]
    partition: Partition
    events: tuple[Event, ...]
    notices: tuple[str, ...]

    @property
    def headline(self) -> Metric:
        """The figure that the run is judged by."""
        return metrics.headline(self.info.metric)

    @property
    def clock_metric(self) -> Metric:
        """The figure that the targets are values of."""
        return metrics.aimed_at(self.headline, self.aim)

    @property
    def has_clock(self) -> bool:
        """Whether it ran on the clients' clock."""
        return any(math.isfinite(line.clock_seconds) for line in self.evaluations)


R = TypeVar("R", bound=_Record)

_FILES = ("config.yaml", "run.json", "metrics.jsonl", "clients.jsonl", "partition.json", "events.jsonl")
_ABSENT_IS_FINE = "events.jsonl"


def read_run(path: Path) -> RunFolder:
    """Read a run folder. Raises: RunFolderError if `path` is no folder, or holds none of a run's files."""
    if not path.is_dir():
        raise RunFolderError(
            f"{path} is not a folder; a report is made from run folders, as `emberfed run` writes them"
        )
    if not any((path / name).is_file() for name in _FILES[:3]):
        raise RunFolderError(f"{path} is not a run folder: expected one of {', '.join(_FILES[:3])} in it")
    reader = _Reader(path)
    lines = reader.lines("metrics.jsonl")
    config = reader.text("config.yaml") or ""
    evaluations = reader.records(Evaluation, _of(lines, "evaluation"))
    personal = reader.records(Personal, _of(lines, "personal"))
    summaries = reader.records(PersonalSummary, _of(lines, "personal_summary"))
    rounds = reader.records(Round, _of(lines, "round"))
    clients = reader.records(ClientRound, reader.lines("clients.jsonl"))
    info = reader.document(RunInfo, "run.json")
    partition = reader.document(Partition, "partition.json")
    events = reader.records(Event, reader.lines("events.jsonl"))
    planned = _planned(config, reader)
    return RunFolder(
        path,
        info,
        config,
        planned.rounds,
        planned.aim,
        planned.targets,
        # A round that was run again after a resume is written again: the later line holds.
        tuple({(line.round, line.tier, line.top_k): line for line in evaluations}.values()),
        tuple({(line.round, line.client): line for line in personal}.values()),
        tuple(sorted({line.round: line for line in summaries}.values(), key=lambda line: line.round)),
        tuple(sorted({line.round: line for line in rounds}.values(), key=lambda line: line.round)),
        tuple({(line.round, line.client): line for line in clients}.values()),
        partition,
        tuple(events),
        tuple(reader.notices),
    )


@final
@dataclass(frozen=True, slots=True)
class _Line:
    where: str
    value: Mapping[str, Any]


def _of(lines: Iterable[_Line], event: str) -> Iterable[_Line]:
    return (line for line in lines if line.value.get("event") == event)


@final
class _Reader:
    """Reads the files of one folder and remembers what it could not read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notices: list[str] = []

    def text(self, name: str) -> str | None:
        try:
            return (self._path / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            if name != _ABSENT_IS_FINE:
                self.notices.append(f"{name} is missing.")
        except OSError as error:
            self.notices.append(f"{name} cannot be read ({error.strerror}).")
        return None

    def lines(self, name: str) -> Sequence[_Line]:
        """Return the JSON objects of a JSON Lines file, without the damaged ones."""
        found = []
        for number, text in enumerate((self.text(name) or "").split("\n"), start=1):
            if text.strip():
                value = _parse_object(text)
                if value is None:
                    self.notices.append(f"{name}, line {number} is damaged (not a JSON object) and was skipped.")
                else:
                    found.append(_Line(f"{name}, line {number}", value))
        return found

    def records(self, kind: type[R], lines: Iterable[_Line]) -> Sequence[R]:
        """Return the lines as records, without those of another shape."""
        found = []
        for line in lines:
            try:
                found.append(kind.model_validate(line.value))
            except ValidationError as error:
                self.notices.append(f"{line.where} was skipped: {_problem(error)}.")
        return found

    def document(self, kind: type[R], name: str) -> R:
        """Return a JSON file as a record, an empty one if it cannot be read."""
        text = self.text(name)
        if text is None:
            return kind()
        value = _parse_object(text)
        if value is None:
            self.notices.append(f"{name} is damaged (not a JSON object) and was left out.")
            return kind()
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            self.notices.append(f"{name} was left out: {_problem(error)}.")
            return kind()


def _parse_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


@final
@dataclass(frozen=True, slots=True)
class _Plan:
    """What the configuration says of rounds and of the clock; None and nothing where it does not."""

    rounds: int | None = None
    aim: metrics.Aim = "headline"
    targets: tuple[float, ...] = ()


def _planned(config: str, reader: _Reader) -> _Plan:
    """Read `training.rounds`, `clock.metric` and `clock.targets`."""
    try:
        sections = parse_yaml(config, "config.yaml") or {}
        training, clock = sections.get("training"), sections.get("clock")
    except (ConfigError, AttributeError):
        reader.notices.append("config.yaml is not a YAML mapping; it is shown as it is.")
        return _Plan()
    rounds = training.get("rounds") if isinstance(training, dict) else None
    timed = clock if isinstance(clock, dict) else {}
    aim, targets = timed.get("metric", "headline"), timed.get("targets")
    if aim not in get_args(metrics.Aim):
        reader.notices.append(f"config.yaml: clock.metric is {aim!r}, which is unknown; its targets are left out.")
        aim, targets = "headline", None
    known = [value for value in targets if type(value) in (int, float)] if isinstance(targets, list) else []
    return _Plan(rounds if isinstance(rounds, int) else None, aim, tuple(sorted(known)))
