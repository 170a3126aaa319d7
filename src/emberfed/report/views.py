"""What the page says about a run, worked out from its files: tiers in order, scores over rounds, costs by tier."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import final

from emberfed.metrics import Metric
from emberfed.report import numbers
from emberfed.report.plotting import Series
from emberfed.report.reading import ClientRound, Evaluation, Personal, RunFolder


@final
@dataclass(frozen=True, slots=True)
class TierView:
    """One tier as the page shows it: its place in order of budget gives its colour.

    Attributes:
        name: Its name, if it has one.
        top_k: Its number of active experts of the model.
        number: Its place.
        adapter_top_k: Its number of active experts of a sparse adapter; None without one.
        alike: Whether it is one of several tiers with the same number of active experts.
    """

    name: str | None
    top_k: int
    number: int
    adapter_top_k: int | None = None
    alike: bool = False

    @property
    def label(self) -> str:
        """The tier's name and what it activates."""
        return f"{self.name} ({self.budget})" if self.name and self.budget else self.short

    @property
    def short(self) -> str:
        """What it activates, or its name where that tells nothing."""
        return self.budget or self.name or ""

    @property
    def budget(self) -> str:
        """The number of active experts; empty for a named tier if all tiers have the same."""
        return "" if self.name and self.alike else active(self.top_k, self.adapter_top_k)

    @property
    def series(self) -> Series:
        """How the tier is drawn."""
        return Series(self.label, self.number)


def active(top_k: int, adapter_top_k: int | None) -> str:
    """Return a number of active experts on one line: `K = 1` of a model, `k = 1` of a sparse adapter."""
    sign, number = ("K", top_k) if adapter_top_k is None else ("k", adapter_top_k)
    return f"{sign}{numbers.SPACE}={numbers.SPACE}{number}"


def alike(tiers: Mapping[tuple[str | None, int], int | None]) -> bool:
    """Return whether several tiers all activate the same: their `adapter_top_k` by name and `top_k`."""
    return len(tiers) > 1 and len({top_k for _, top_k in tiers}) == 1 and set(tiers.values()) == {None}


def tiers_of(run: RunFolder) -> tuple[TierView, ...]:
    """Return every tier the run names, evaluated or trained at, by active experts, then in the order of `run.json`."""
    listed = [(tier.name, tier.top_k) for tier in run.info.tiers]
    evaluated = [(line.tier, line.top_k) for line in run.evaluations]
    named = {name for name, _ in (*listed, *evaluated)}
    trained = [(line.tier, line.top_k) for line in run.clients if line.tier is None or line.tier not in named]
    met: dict[tuple[str | None, int], int | None] = dict.fromkeys([*listed, *evaluated, *trained])
    # A tier may say what it affords of a sparse adapter that the method does not have.
    if run.info.experts == "adapter":
        met |= {(tier.name, tier.top_k): tier.adapter_top_k for tier in run.info.tiers}
        met |= {(line.tier, line.top_k): line.adapter_top_k for line in run.evaluations}
    same = alike(met)
    views = [TierView(name, top_k, 0, adapter_top_k, same) for (name, top_k), adapter_top_k in met.items()]
    return tuple(replace(view, number=number) for number, view in enumerate(sorted(views, key=_active)))


def _active(tier: TierView) -> int:
    return tier.top_k if tier.adapter_top_k is None else tier.adapter_top_k


def what_tells_apart(tiers: Iterable[TierView]) -> str:
    """Return what tiers are told apart by, in a word."""
    signs = {tier.budget[:1] for tier in tiers}
    return signs.pop() or "budget" if len(signs) == 1 else "budget"


def shared_tiers(runs: Iterable[RunFolder]) -> dict[tuple[str | None, int], str]:
    """Return the label of each tier that any of several runs was evaluated at, by name and `top_k`.

    Where a sparse adapter is only one of the methods compared, its number of active experts tells tiers apart.
    """
    views: dict[tuple[str | None, int], list[TierView]] = {}
    for run in runs:
        for tier in evaluated_tiers(run):
            views.setdefault((tier.name, tier.top_k), []).append(tier)
    labels = {}
    for (name, top_k), found in sorted(views.items(), key=lambda item: max(map(_active, item[1]))):
        told = {tier.label for tier in found if tier.adapter_top_k is not None} or {tier.label for tier in found}
        labels[name, top_k] = told.pop() if len(told) == 1 else name or active(top_k, None)
    return labels


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


def personal_by_client(run: RunFolder) -> dict[str, tuple[Personal, Personal]]:
    """Return each client's first and last personal evaluation, clients in natural order."""
    lines: dict[str, list[Personal]] = {}
    for line in sorted(run.personal, key=lambda line: line.round):
        lines.setdefault(line.client, []).append(line)
    return {client: (lines[client][0], lines[client][-1]) for client in sorted(lines, key=natural_order)}


def tier_of(run: RunFolder, line: ClientRound | Personal) -> TierView:
    """Return the tier that a client's line is of; one that the run does not name counts as a tier of its own."""
    known = [tier for tier in tiers_of(run) if tier.name == line.tier and (tier.name or tier.top_k == line.top_k)]
    return known[0] if known else TierView(line.tier, line.top_k, len(tiers_of(run)))


def summed_counts(run: RunFolder, round_: int) -> tuple[tuple[float, ...], ...]:
    """Return how often each expert was activated in a round by all clients together: (layers, experts)."""
    by_client = [line.activation_counts for line in run.clients if line.round == round_ and line.activation_counts]
    return tuple(
        tuple(total(column) for column in zip_longest(*rows, fillvalue=math.nan))
        for rows in zip_longest(*by_client, fillvalue=())
    )


def coefficient_of_variation(counts: Sequence[float]) -> float:
    """Return the standard deviation of counts over their mean: 0 is equal use; NaN without any."""
    centre = mean(counts)
    deviation = math.sqrt(mean((count - centre) ** 2 for count in counts))
    return ratio(deviation, centre)


def last_round_with_counts(run: RunFolder) -> int | None:
    """Return the last round that any client counted activations in."""
    return max((line.round for line in run.clients if line.activation_counts), default=None)


def headlines_of(runs: Iterable[RunFolder]) -> list[Metric]:
    """Return the metrics that runs are judged by, each once."""
    return list(dict.fromkeys(run.headline for run in runs))


def in_words(headlines: Sequence[Metric]) -> str:
    """Return metrics as the beginning of a sentence: `ROUGE-L or accuracy`."""
    first, *others = headlines
    return " or ".join([first.heading, *(metric.title for metric in others)])


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


def smallest(values: Iterable[float]) -> float:
    """Return the smallest recorded value, NaN if there is none."""
    return min(recorded(values), default=math.nan)


def ratio(part: float, whole: float) -> float:
    """Return `part / whole`, NaN where there is no whole."""
    return part / whole if whole else math.nan
