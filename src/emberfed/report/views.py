"""What the page says about a run, worked out from its files: tiers in order, scores over rounds, costs by tier."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

from emberfed.report import numbers
from emberfed.report.plotting import Series
from emberfed.report.reading import ClientRound, Evaluation, RunFolder


@final
@dataclass(frozen=True, slots=True)
class TierView:
    """One tier as the page shows it: its place in order of budget gives its colour."""

    name: str | None
    top_k: int
    number: int

    @property
    def label(self) -> str:
        """The tier's name and its number of active experts."""
        return f"{self.name} ({self.budget})" if self.name else self.budget

    @property
    def budget(self) -> str:
        """The number of active experts, as `K = 1` on one line."""
        return f"K{numbers.SPACE}={numbers.SPACE}{self.top_k}"

    @property
    def series(self) -> Series:
        """How the tier is drawn."""
        return Series(self.label, self.number)


def tiers_of(run: RunFolder) -> tuple[TierView, ...]:
    """Return every tier the run names, evaluated or trained at, by `top_k`, then in the order of `run.json`."""
    listed = [(tier.name, tier.top_k) for tier in run.info.tiers]
    evaluated = [(line.tier, line.top_k) for line in run.evaluations]
    named = {name for name, _ in (*listed, *evaluated)}
    trained = [(line.tier, line.top_k) for line in run.clients if line.tier is None or line.tier not in named]
    met = dict.fromkeys([*listed, *evaluated, *trained])
    ordered = sorted(met, key=lambda key: key[1])
    return tuple(TierView(name, top_k, number) for number, (name, top_k) in enumerate(ordered))


def evaluations_at(run: RunFolder, tier: TierView) -> list[Evaluation]:
    """Return the tier's evaluations in the order of rounds."""
    lines = [line for line in run.evaluations if (line.tier, line.top_k) == (tier.name, tier.top_k)]
    return sorted(lines, key=lambda line: line.round)


def evaluated_tiers(run: RunFolder) -> tuple[TierView, ...]:
    """Return the tiers with at least one evaluation."""
    return tuple(tier for tier in tiers_of(run) if evaluations_at(run, tier))


def clients_at(run: RunFolder, tier: TierView) -> list[ClientRound]:
    """Return what the tier's clients did, by round and then by client.

    A client is of the tier it names, whatever number of experts its method trained it with.
    """
    lines = [line for line in run.clients if line.tier == tier.name and (tier.name or line.top_k == tier.top_k)]
    return sorted(lines, key=lambda line: (line.round, natural_order(line.client)))


def last_round_with_counts(run: RunFolder) -> int | None:
    """Return the last round that any client counted activations in."""
    return max((line.round for line in run.clients if line.activation_counts), default=None)


def natural_order(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key by which `c2` comes before `c10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return tuple((0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts)


def run_labels(runs: Sequence[RunFolder]) -> tuple[str, ...]:
    """Return one distinct label per run: its name, with its folder, then its place, where names repeat."""
    names = [run.info.name or run.path.resolve().name for run in runs]
    folders = [f"{name} ({run.path.resolve().name})" for name, run in zip(names, runs, strict=True)]
    labels = [folder if Counter(names)[name] > 1 else name for name, folder in zip(names, folders, strict=True)]
    return tuple(
        f"{label} · {place}" if Counter(labels)[label] > 1 else label for place, label in enumerate(labels, start=1)
    )


def recorded(values: Iterable[float]) -> list[float]:
    """Return the values that were recorded (are not NaN)."""
    return [value for value in values if not math.isnan(value)]


def total(values: Iterable[float]) -> float:
    """Return the sum of the recorded values, NaN if there is none."""
    known = recorded(values)
    return math.fsum(known) if known else math.nan


def mean(values: Iterable[float]) -> float:
    """Return the mean of the recorded values, NaN if there is none."""
    known = recorded(values)
    return math.fsum(known) / len(known) if known else math.nan


def largest(values: Iterable[float]) -> float:
    """Return the largest recorded value, NaN if there is none."""
    return max(recorded(values), default=math.nan)


def ratio(part: float, whole: float) -> float:
    """Return `part / whole`, NaN where there is no whole."""
    return part / whole if whole else math.nan
