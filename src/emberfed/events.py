"""What happens during a run, as values: whoever shows or logs progress listens to these and to nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class RoundStarted:
    """A round begins with `clients` still to train; round 0 is the evaluation before training."""

    round: int
    rounds: int
    clients: int


@final
@dataclass(frozen=True, slots=True)
class Step:
    """A client made optimiser step `step` of `steps`."""

    client: str
    step: int
    steps: int
    loss: float


@final
@dataclass(frozen=True, slots=True)
class ClientDone:
    """A client's upload was accepted, or not: `problem` says why (None: accepted)."""

    round: int
    client: str
    problem: str | None


@final
@dataclass(frozen=True, slots=True)
class EvaluationProgress:
    """`done` of `total` test examples are scored for `tier`."""

    round: int
    tier: str
    done: int
    total: int


@final
@dataclass(frozen=True, slots=True)
class RoundDone:
    """A round is on disk; `quality` is the headline metric by tier name, empty if this round was not evaluated."""

    round: int
    quality: dict[str, float]
    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should read; also kept in `events.jsonl`."""

    level: str
    message: str


Event = RoundStarted | Step | ClientDone | EvaluationProgress | RoundDone | Notice
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing."""
