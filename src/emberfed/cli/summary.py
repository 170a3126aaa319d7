"""What a run came to, from its folder: quality by tier before and after, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final

from emberfed import deployment
from emberfed.metrics import Metric, loss_beside
from emberfed.report import numbers
from emberfed.report.reading import PersonalSummary, read_run
from emberfed.report.views import evaluated_tiers, evaluations_at, largest, total


@final
@dataclass(frozen=True, slots=True)
class TierSummary:
    """One tier's quality at the first and the last evaluation.

    Attributes:
        tier: Its name.
        top_k: Its number of active experts.
        adapter_top_k: Its number of active experts of a sparse adapter; None without one.
        budget: What tells it from other tiers, in words.
        before, after: Its headline metric and its loss, by key.
    """

    tier: str
    top_k: int
    adapter_top_k: int | None
    budget: str
    before: Mapping[str, float]
    after: Mapping[str, float]

    def json(self) -> dict[str, Any]:
        """Return the tier as plain values."""
        own = {} if self.adapter_top_k is None else {"adapter_top_k": self.adapter_top_k}
        names = {"tier": self.tier, "top_k": self.top_k, **own}
        for key in self.before:
            names |= {f"{key}_before": self.before[key], f"{key}_after": self.after[key]}
        return names


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """What the table at the end of a run shows.

    Attributes:
        run: The run's folder.
        report: Its report page.
        rounds: Rounds done.
        headline: What the run is judged by.
        tiers: Quality by tier, from the smallest K.
        seconds: Time of all rounds and of the evaluation before them.
        overhead_seconds: The part outside local training and evaluation.
        bytes_down, bytes_up: What clients received and sent.
        flops: Of local training.
        peak_memory_bytes: The highest of any client or evaluation.
        personal: The clients' own models at their first and their last evaluation; nothing if there is none.
        problems: Clients' failures and refusals, one line each.
        deployed: Whether its clients had data of their own, so that `emberfed server` alone goes on with it.
    """

    run: Path
    report: Path
    rounds: int
    headline: Metric
    tiers: tuple[TierSummary, ...]
    seconds: float
    overhead_seconds: float
    bytes_down: float
    bytes_up: float
    flops: float
    peak_memory_bytes: float
    personal: tuple[PersonalSummary, ...]
    problems: tuple[str, ...]
    deployed: bool

    def json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "headline"}
        return values | {
            "run": str(self.run),
            "report": str(self.report),
            "metric": self.headline.key,
            "tiers": [tier.json() for tier in self.tiers],
            "personal": [line.model_dump() for line in self.personal],
        }


def summarise(path: Path) -> Summary:
    """Read a run folder. Raises: RunFolderError."""
    run = read_run(path)
    shown = (run.headline, loss_beside(run.headline))
    tiers = []
    for tier in evaluated_tiers(run):
        lines = evaluations_at(run, tier)
        name = tier.name or tier.budget.replace(numbers.SPACE, "")
        ends = [{metric.key: line.of(metric) for metric in shown} for line in (lines[0], lines[-1])]
        tiers.append(TierSummary(name, tier.top_k, tier.adapter_top_k, tier.budget, *ends))
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
        headline=run.headline,
        tiers=tuple(tiers),
        seconds=total([*before, *(line.seconds for line in run.rounds)]),
        overhead_seconds=total(line.overhead_seconds for line in run.rounds),
        bytes_down=total(line.bytes_down for line in run.rounds),
        bytes_up=total(line.bytes_up for line in run.rounds),
        flops=total(line.flops for line in run.rounds),
        peak_memory_bytes=largest(line.peak_memory_bytes for line in run.rounds),
        personal=(*run.personal_summaries[:1], *run.personal_summaries[1:][-1:]),
        problems=tuple(problems),
        deployed=run.partition.kind == deployment.KIND,
    )
