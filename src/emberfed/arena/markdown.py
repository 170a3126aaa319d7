"""The comparison as Markdown, in the papers' layout: rows are clients and budgets, columns are data and methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from emberfed.arena.results import LOSS, ROUGE_L, Comparison, Contest, Metric, Place, TierResult
from emberfed.arena.statistics import LEVEL, Spread, least_difference
from emberfed.report import numbers

TIE = "≈"
"""Marks what the test does not separate from the best."""


def markdown(comparison: Comparison) -> str:
    """Return the document."""
    done = sum(one.state == "done" for one in comparison.cells)
    parts = [f"# {comparison.grid.title}", f"{done} of {len(comparison.cells)} runs are done.{_seeds(comparison)}"]
    for metric in (ROUGE_L, LOSS):
        for value in dict.fromkeys(place.sweep for place in comparison.places()):
            at = "" if value is None else f", {comparison.grid.swept(value)}"
            parts += [f"## {metric.title}{at} ({metric.direction})", _table(comparison, metric, value)]
    parts += [*footnotes(comparison), "## Costs", costs_note(), _costs(comparison)]
    undone = without_result(comparison)
    if undone:
        parts += ["## Runs without a result", "\n".join(f"* {said}" for said in undone)]
    return "\n\n".join(parts) + "\n"


def _seeds(comparison: Comparison) -> str:
    seeds = comparison.grid.seeds
    return f" Seeds: {', '.join(map(str, seeds))}." if len(seeds) > 1 else f" Seed: {seeds[0]}."


def without_result(comparison: Comparison) -> list[str]:
    """Return what became of runs that are not done, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for one in comparison.cells:
        if one.state != "done":
            reasons.setdefault(one.state if one.problem is None else f"failed: {one.problem}", []).append(
                one.cell.title
            )
    return [f"{reason} ({'; '.join(titles)})" for reason, titles in reasons.items()]


def cell_text(contest: Contest, contestant: str, seeds: int, digits: int = 4) -> tuple[str, str]:
    """Return a contestant's cell and its standing: `best`, `tie` or nothing.

    Args:
        contest: Where it competes.
        contestant: Its name.
        seeds: Of the grid; a cell with fewer results says so.
        digits: After the point.
    """
    spread = contest.spreads.get(contestant)
    if spread is None:
        return numbers.MISSING, ""
    standing = "best" if contestant == contest.best else "tie" if contestant in contest.ties else ""
    fewer = f" (n{numbers.SPACE}={numbers.SPACE}{spread.n})" if spread.n < seeds else ""
    deviation = "" if spread.n < 2 else f"{numbers.SPACE}±{numbers.SPACE}{spread.sd:.{digits}f}"
    return f"{spread.mean:.{digits}f}{deviation}{fewer}", standing


def heads(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the table's columns: column of the grid, contestant."""
    return [(column, name) for column in comparison.grid.columns for name in comparison.contestants]


def rows(comparison: Comparison, value: float | None) -> list[tuple[str, str, int]]:
    """Return the table's rows at a value of the sweep: row of the grid, tier, K."""
    met = [(place.row, place.tier, place.top_k) for place in comparison.places() if place.sweep == value]
    return list(dict.fromkeys(met))


def _table(comparison: Comparison, metric: Metric, value: float | None) -> str:
    columns = heads(comparison)
    lines = [[" · ".join(part for part in (column, name) if part) for column, name in columns]]
    labels = []
    for row, tier, top_k in rows(comparison, value):
        contests = {
            column: comparison.contest(Place(column, row, value, tier, top_k), metric)
            for column in comparison.grid.columns
        }
        labels.append(" · ".join(part for part in (row, budget(tier, top_k)) if part))
        lines.append([_marked(contests[column], name, comparison) for column, name in columns])
    return _pipes(["budget", *lines[0]], [[label, *line] for label, line in zip(labels, lines[1:], strict=True)])


def budget(tier: str, top_k: int) -> str:
    """Return a tier in words."""
    return f"{tier} (K{numbers.SPACE}={numbers.SPACE}{top_k})"


def _marked(contest: Contest, name: str, comparison: Comparison) -> str:
    text, standing = cell_text(contest, name, len(comparison.grid.seeds))
    return {"best": f"**{text}**", "tie": f"{text} {TIE}", "": text}[standing]


def footnotes(comparison: Comparison) -> list[str]:
    """Return what has to be known to read the tables, a paragraph each."""
    return [*_before(comparison), *_what_marks_mean(comparison)]


def _before(comparison: Comparison) -> list[str]:
    """Say what quality was before any training, on average over the runs."""
    found: dict[tuple[int, str], list[TierResult]] = {}
    for one in comparison.cells:
        for tier in one.tiers:
            found.setdefault((tier.top_k, tier.tier), []).append(tier)
    told = [
        f"{budget(name, top_k)} {numbers.score(fmean(tier.rouge_l_before for tier in tiers))} and "
        f"{numbers.score(fmean(tier.loss_before for tier in tiers))}"
        for (top_k, name), tiers in sorted(found.items())
    ]
    return [f"Before training, ROUGE-L and loss, mean over the runs: {'; '.join(told)}."] if told else []


def _what_marks_mean(comparison: Comparison) -> list[str]:
    n = comparison.most_seeds
    what = "Mean over seeds ± standard deviation (of the sample). " if len(comparison.grid.seeds) > 1 else ""
    if len(comparison.contestants) < 2:
        return [what.strip()] if what else []
    bold = f"{what}Bold: the best mean of its row and column group."
    if n < 2:
        return [f"{bold} No test was made: it takes at least two seeds, and one run says nothing about chance."]
    least = least_difference(n)
    return [
        f"{bold} {TIE}: not separated from the best by a two-sided paired t-test over seeds (p ≥ {LEVEL:g}, not "
        f"corrected for the number of comparisons).",
        f"With {n} seeds the test is weak: it separates two methods only where the mean of their differences is "
        f"more than {least:.1f} times the standard deviation of these. {TIE} does not mean equal, and of twenty "
        f"comparisons without any difference about one looks separated.",
    ]


def costs_note() -> str:
    """Return what the costs are costs of."""
    return (
        "What one client takes for one round of training, on average over its tier's clients, rounds and seeds; peak "
        "memory is the largest of the tier, of the whole process. K is what a tier is evaluated with: methods whose "
        "`active_experts` is `native` (the default of the LoRA baselines) train every tier at the checkpoint's own K. "
        "FLoRA receives a stack that grows from round to round, and only from the second on."
    )


COSTS = ("Computation", "Received", "Sent", "Peak memory", "Time")


def costs(comparison: Comparison) -> Iterator[tuple[list[str], list[str]]]:
    """Return the rows of the table of costs: what they are of, and the figures."""
    for place in comparison.places():
        for name in comparison.contestants:
            found = list(comparison.at(place, name).values())
            if not found:
                continue
            swept = comparison.grid.swept(place.sweep)
            told = [part for part in (place.column, place.row, swept, budget(place.tier, place.top_k), name) if part]
            yield (
                told,
                [
                    numbers.flops(_mean([tier.flops for tier in found])),
                    numbers.byte_size(_mean([tier.bytes_down for tier in found])),
                    numbers.byte_size(_mean([tier.bytes_up for tier in found])),
                    numbers.byte_size(_mean([tier.peak_memory_bytes for tier in found])),
                    numbers.seconds(_mean([tier.seconds for tier in found])),
                ],
            )


def _mean(values: Sequence[float]) -> float:
    spread = Spread.of(values)
    return float("nan") if spread is None else spread.mean


def _costs(comparison: Comparison) -> str:
    return _pipes(["of", *COSTS], [[" · ".join(told), *figures] for told, figures in costs(comparison)])


def _pipes(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column reads from the left."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
