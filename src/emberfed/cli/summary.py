"""What a run came to, from its folder: quality by tier before and after, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from emberfed.report.reading import read_run
from emberfed.report.views import evaluated_tiers, evaluations_at, largest, total


@final
@dataclass(frozen=True, slots=True)
class TierSummary:
    """One tier's quality at the first and the last evaluation."""

    tier: str
    top_k: int
    rouge_l_before: float
    rouge_l_after: float
    loss_before: float
    loss_after: float


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """What the table at the end of a run shows.

    Attributes:
        run: The run's folder.
        report: Its report page.
        rounds: Rounds done.
        tiers: Quality by tier, from the smallest K.
        seconds: Time of all rounds and of the evaluation before them.
        overhead_seconds: The part outside local training and evaluation.
        bytes_down, bytes_up: What clients received and sent.
        flops: Of local training.
        peak_memory_bytes: The highest of any client or evaluation.
        problems: Clients' failures and refusals, one line each.
    """

    run: Path
    report: Path
    rounds: int
    tiers: tuple[TierSummary, ...]
    seconds: float
    overhead_seconds: float
    bytes_down: float
    bytes_up: float
    flops: float
    peak_memory_bytes: float
    problems: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {**asdict(self), "run": str(self.run), "report": str(self.report)}


def summarise(path: Path) -> Summary:
    """Read a run folder. Raises: RunFolderError."""
    run = read_run(path)
    tiers = []
    for tier in evaluated_tiers(run):
        lines = evaluations_at(run, tier)
        first, last = lines[0], lines[-1]
        name = tier.name or f"K={tier.top_k}"
        tiers.append(TierSummary(name, tier.top_k, first.rouge_l, last.rouge_l, first.loss, last.loss))
    before = [line.seconds for line in run.evaluations if line.round == 0]
    problems = [
        f"round {line.round}: client {client} {what}: {why}"
        for line in run.rounds
        for what, why_by_client in (("failed", line.failed), ("refused", line.refused))
        for client, why in sorted(why_by_client.items())
    ]
    return Summary(
        run=path,
        report=path / "report.html",
        rounds=max((line.round for line in run.rounds), default=0),
        tiers=tuple(tiers),
        seconds=total([*before, *(line.seconds for line in run.rounds)]),
        overhead_seconds=total(line.overhead_seconds for line in run.rounds),
        bytes_down=total(line.bytes_down for line in run.rounds),
        bytes_up=total(line.bytes_up for line in run.rounds),
        flops=total(line.flops for line in run.rounds),
        peak_memory_bytes=largest(line.peak_memory_bytes for line in run.rounds),
        problems=tuple(problems),
    )
