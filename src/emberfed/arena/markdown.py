"""The comparison as Markdown, in the papers' layout: rows are clients and budgets, columns are data and methods."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from emberfed.arena.grid import Cell
from emberfed.arena.results import Comparison, Contest, PersonalResult, Place, TierResult
from emberfed.arena.statistics import LEVEL, Spread, least_difference
from emberfed.metrics import Metric
from emberfed.report import numbers

TIE = "≈"
"""Marks what the test does not separate from the best."""


def markdown(comparison: Comparison) -> str:
    """Return the document."""
    done = sum(one.state == "done" for one in comparison.cells)
    parts = [f"# {comparison.grid.title}", f"{done} of {len(comparison.cells)} runs are done.{_seeds(comparison)}"]
    parts += left_out(comparison)
    for metric in comparison.metrics:
        for value in dict.fromkeys(place.sweep for place in comparison.places()):
            at = "" if value is None else f", {comparison.grid.swept(value)}"
            parts += [f"## {metric.with_unit}{at} ({metric.direction})", _table(comparison, metric, value)]
    parts += footnotes(comparison)
    if comparison.has_personal:
        parts += ["## Clients’ own models", personal_note(comparison), _personal(comparison)]
    if comparison.has_clock and comparison.targets:
        head = ["of", *comparison.contestants]
        rows_ = [[" · ".join(told), *cells] for told, cells in times(comparison)]
        parts += [f"## {times_heading(comparison)}", times_note(comparison), _pipes(head, rows_)]
    parts += ["## Costs", costs_note(comparison), _costs(comparison), "## Set-up", *setup(comparison)]
    undone = without_result(comparison)
    if undone:
        parts += ["## Runs without a result", "\n".join(f"* {said}" for said in undone)]
    return "\n\n".join(parts) + "\n"


def _seeds(comparison: Comparison) -> str:
    seeds = comparison.grid.seeds
    return f" Seeds: {', '.join(map(str, seeds))}." if len(seeds) > 1 else f" Seed: {seeds[0]}."


def left_out(comparison: Comparison) -> list[str]:
    """Say which runs lie beside those that were compared; nothing if there are none."""
    if not comparison.others:
        return []
    shown = ", ".join(comparison.others[:_MOST_OTHERS])
    more = ", ..." if len(comparison.others) > _MOST_OTHERS else ""
    return [
        f"Only a part of what lies in `runs` was asked for and is compared here; left out: {shown}{more} "
        f"({len(comparison.others)} in all)."
    ]


_MOST_OTHERS = 6


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


def rows(comparison: Comparison, value: float | None) -> list[Place]:
    """Return the table's rows at a value of the sweep: the places of the first column."""
    first = comparison.grid.columns[0]
    return [place for place in comparison.places() if (place.sweep, place.column) == (value, first)]


def _table(comparison: Comparison, metric: Metric, value: float | None) -> str:
    columns = heads(comparison)
    lines = [[" · ".join(part for part in (column, name) if part) for column, name in columns]]
    labels = []
    for place in rows(comparison, value):
        contests = {
            column: comparison.contest(replace(place, column=column), metric) for column in comparison.grid.columns
        }
        labels.append(" · ".join(part for part in (place.row, place.label) if part))
        lines.append([_marked(contests[column], name, comparison) for column, name in columns])
    return _pipes(["budget", *lines[0]], [[label, *line] for label, line in zip(labels, lines[1:], strict=True)])


def _marked(contest: Contest, name: str, comparison: Comparison) -> str:
    text, standing = cell_text(contest, name, len(comparison.grid.seeds))
    return {"best": f"**{text}**", "tie": f"{text} {TIE}", "": text}[standing]


def footnotes(comparison: Comparison) -> list[str]:
    """Return what has to be known to read the tables, a paragraph each."""
    return [*_before(comparison), *_what_k_means(comparison), *_what_marks_mean(comparison)]


def _what_k_means(comparison: Comparison) -> list[str]:
    """Say what k is where some methods have a sparse adapter."""
    if not any(place.budget.startswith("k") for place in comparison.places()):
        return []
    return ["k is how many experts of a sparse adapter a tier activates; methods without one do not use it."]


def _before(comparison: Comparison) -> list[str]:
    """Say what quality was before any training, on average over the runs."""
    labels = {(place.tier, place.top_k): place.label for place in comparison.places()}
    found: dict[tuple[str, int], list[TierResult]] = {key: [] for key in labels}
    for tier in (tier for one in comparison.cells for tier in one.tiers):
        found[tier.tier, tier.top_k].append(tier)
    keys = [metric.key for metric in comparison.metrics]
    told = [
        f"{labels[key]} {' and '.join(numbers.score(fmean(tier.before[name] for tier in tiers)) for name in keys)}"
        for key, tiers in found.items()
    ]
    measured = " and ".join(metric.title for metric in comparison.metrics)
    return [f"Before training, {measured}, mean over the runs: {'; '.join(told)}."] if told else []


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


def times_heading(comparison: Comparison) -> str:
    """Return what the table of times to the targets is called; accuracy is the papers' word for any headline."""
    metric = comparison.clock_metric
    return "Time to accuracy" if metric == comparison.headline else f"Time to {metric.title}"


def times_note(comparison: Comparison) -> str:
    """Return what the table of times to the targets shows."""
    mean = ", mean over seeds" if len(comparison.grid.seeds) > 1 else ""
    return (
        f"Seconds on the clients’ clock until {comparison.clock_metric.title} first reached the target{mean}, and how "
        f"many times sooner that is than {comparison.reference}. Where not every seed reached it, how many did."
    )


def times(comparison: Comparison) -> Iterator[tuple[list[str], list[str]]]:
    """Return the rows of that table: what they are of, and a cell for each contestant."""
    for place in comparison.places():
        for target in comparison.targets:
            told = [place.column, place.row, comparison.grid.swept(place.sweep), place.label]
            cells = [_time(comparison, place, name, target) for name in comparison.contestants]
            yield [*(part for part in told if part), numbers.score(target)], cells


def _time(comparison: Comparison, place: Place, name: str, target: float) -> str:
    found = comparison.times_to(place, name, target)
    if not found:
        return numbers.MISSING
    reached = [seconds for seconds in found if seconds < math.inf]
    if len(reached) < len(found):
        return f"{len(reached)} of {len(found)} reached it"
    factor = comparison.speed_up(place, name, target)
    against = "" if math.isnan(factor) or name == comparison.reference else f" ({factor:.2f}×)"
    return f"{numbers.clock(fmean(reached))}{against}"


PERSONAL = ("Clients", "Mean", "Worst tenth", "Standard deviation", "Mean loss")


def personal_note(comparison: Comparison) -> str:
    """Return what the table of the clients' own models shows."""
    metric = comparison.headline
    spread = " ± is the standard deviation over seeds." if len(comparison.grid.seeds) > 1 else ""
    return (
        f"{metric.heading} ({metric.direction}) of each client’s own model on its own held-out examples, after the "
        f"last round: over clients, the mean, the mean of the worst tenth, and the standard deviation.{spread}"
    )


def personal(comparison: Comparison) -> Iterator[tuple[list[str], list[str]]]:
    """Return the rows of the table of the clients' own models: what they are of, and the figures."""
    for group in comparison.groups():
        for name in comparison.contestants:
            found = list(comparison.personal(group, name).values())
            if found:
                told = [part for part in (group.column, group.row, comparison.grid.swept(group.sweep), name) if part]
                yield told, _personal_figures(found)


def _personal_figures(found: Sequence[PersonalResult]) -> list[str]:
    figures = (
        [one.mean for one in found],
        [one.worst_decile for one in found],
        [one.spread for one in found],
        [one.loss_mean for one in found],
    )
    return [numbers.count(_mean([one.clients for one in found])), *(_with_deviation(values) for values in figures)]


def _with_deviation(values: Sequence[float]) -> str:
    spread = Spread.of(values)
    if spread is None:
        return numbers.MISSING
    deviation = "" if spread.n < 2 else f"{numbers.SPACE}±{numbers.SPACE}{numbers.score(spread.sd)}"
    return f"{numbers.score(spread.mean)}{deviation}"


def _personal(comparison: Comparison) -> str:
    return _pipes(["of", *PERSONAL], [[" · ".join(told), *figures] for told, figures in personal(comparison)])


def setup(comparison: Comparison) -> list[str]:
    """Return what was run on what: what all runs share, then what each point of an axis changes."""
    cells = comparison.grid.cells
    values = [cell.config.values() for cell in cells]
    shared = {
        "base model": ("model", "path"),
        "data": ("data", "path"),
        "rounds": ("training", "rounds"),
        "clients": ("clients", "count"),
    }
    told = [
        f"{what} {', '.join(dict.fromkeys(f'`{one[section][key]}`' for one in values))}"
        for what, (section, key) in shared.items()
    ]
    lines = [
        f"{told[0][0].upper()}{'; '.join(told)[1:]}. Everything else is in each run’s `config.yaml`, below `runs`."
    ]
    axes: dict[str, tuple[Sequence[str], Callable[[Cell], str]]] = {
        "Methods": (comparison.grid.methods, lambda cell: cell.method),
        "Columns": (comparison.grid.columns, lambda cell: cell.column),
        "Rows": (comparison.grid.rows, lambda cell: cell.row),
    }
    for what, (names, name_of) in axes.items():
        if len(names) > 1:
            beside = {name_of(cell): cell for cell in cells if _differs_only_in(name_of, cell, cells[0])}
            lines.append(f"{what}, by what tells them apart:\n\n{_told_apart(beside)}")
    return lines


def _differs_only_in(name_of: Callable[[Cell], str], one: Cell, two: Cell) -> bool:
    axes = [(cell.method, cell.column, cell.row, cell.swept, cell.seed) for cell in (one, two)]
    changed = [mine for mine, other in zip(*axes, strict=True) if mine != other]
    return len(changed) == int(name_of(one) != name_of(two))


def _told_apart(cells: Mapping[str, Cell]) -> str:
    """Return a line for each cell with the settings that are not the same in all of them."""
    flat = {name: dict(_flat("", cell.config.values())) for name, cell in cells.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    differing = [key for key in keys if len({values.get(key) for values in flat.values()}) > 1]
    return "\n".join(
        f"* {name}: {', '.join(f'`{key}: {values[key]}`' for key in differing if key in values)}"
        for name, values in flat.items()
    )


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)


def costs_note(comparison: Comparison) -> str:
    """Return what the costs are costs of."""
    k = any(place.budget.startswith("K") for place in comparison.places())
    native = (
        " K is what a tier is evaluated with: methods whose `active_experts` is `native` (the default of the LoRA "
        "baselines) train every tier at the checkpoint's own K."
    )
    flora = any(cell.config.method_name == "flora" for cell in comparison.grid.cells)
    stack = " FLoRA receives a stack that grows from round to round, and only from the second on."
    return (
        "What one client takes for one round of training, on average over its tier's clients, rounds and seeds; peak "
        f"memory is the largest of the tier, of the whole process.{native if k else ''}{stack if flora else ''}"
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
            told = [part for part in (place.column, place.row, swept, place.label, name) if part]
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
