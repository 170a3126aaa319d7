"""The comparison's figures, as in the papers: budgets and methods, sweeps, one method on another, quality and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from matplotlib.ticker import FuncFormatter, MaxNLocator

from emberfed.arena.results import Comparison, Group, PersonalResult, Place, TierResult
from emberfed.arena.statistics import Spread
from emberfed.metrics import Metric
from emberfed.report import numbers
from emberfed.report.figures import DASHED, clock_panel
from emberfed.report.markup import Html
from emberfed.report.plotting import PAPER, RULE, Axes, Panel, Series, area_legend, figure, line_legend, shorten


def group_title(comparison: Comparison, place: Place | Group) -> str:
    """Return what the budgets of a place have in common, in words; empty if there is nothing to tell apart."""
    parts = (place.column, place.row, comparison.grid.swept(place.sweep))
    return ", ".join(part for part in parts if part)


def groups(comparison: Comparison) -> dict[str, list[Place]]:
    """Return the places by `group_title`, budgets from small to large in each."""
    found: dict[str, list[Place]] = {}
    for place in comparison.places():
        found.setdefault(group_title(comparison, place), []).append(place)
    return found


def contestants(comparison: Comparison) -> list[Series]:
    """Return how each contestant is drawn everywhere."""
    return [Series(name, number) for number, name in enumerate(comparison.contestants)]


def budgets(comparison: Comparison, identifier: str) -> Html:
    """Each contestant's quality at each budget, a panel for each group and metric."""
    panels = {
        f"{metric.with_unit}{f', {title}' if title else ''}": _budgets_panel(comparison, places, metric)
        for metric in comparison.metrics
        for title, places in groups(comparison).items()
    }
    spread = " Bars are one standard deviation over seeds." if len(comparison.grid.seeds) > 1 else ""
    caption = f"Quality at each budget after the last round.{spread}"
    return figure(identifier, caption, line_legend(contestants(comparison)), panels)


def _budgets_panel(comparison: Comparison, places: Sequence[Place], metric: Metric) -> Panel:
    series = contestants(comparison)
    spreads = {one: [_spread(comparison, place, one.name, metric) for place in places] for one in series}

    def draw(axes: Axes) -> None:
        for place, one in enumerate(series):
            # Beside each other, or the bars of close results would cover one another.
            shift = (place - (len(series) - 1) / 2) * 0.5 / max(len(series), 4)
            x = [position + shift for position in range(len(places))]
            _draw_line(axes, one, x, spreads[one])
        axes.set_xticks(range(len(places)), [_tick(place) for place in places])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(metric.full_heading)

    told = "; ".join(f"{one.name}: {_told(spreads[one])}" for one in series)
    return Panel(f"{metric.with_unit} at {', '.join(place.tier for place in places)}. {told}.", draw, height=3.1)


def _tick(place: Place) -> str:
    return f"{shorten(place.tier, 12)}\n{place.budget}".strip()


def _spread(comparison: Comparison, place: Place, name: str, metric: Metric) -> Spread | None:
    return comparison.spread(place, name, lambda tier: tier.of(metric))


def _draw_line(axes: Axes, one: Series, x: Sequence[float], spreads: Sequence[Spread | None]) -> None:
    mean = [math.nan if spread is None else spread.mean for spread in spreads]
    deviation = [0.0 if spread is None or math.isnan(spread.sd) else spread.sd for spread in spreads]
    if any(deviation):
        axes.errorbar(x, mean, deviation, fmt="none", ecolor=one.colour, elinewidth=1.1, alpha=0.55)
    axes.plot(x, mean, color=one.colour, marker=one.marker, markeredgewidth=0, linewidth=1.4)


def _told(spreads: Sequence[Spread | None]) -> str:
    return ", ".join(numbers.MISSING if spread is None else numbers.score(spread.mean) for spread in spreads)


def sweep(comparison: Comparison, identifier: str) -> Html:
    """Quality against the swept value, a line for each budget; a panel for each method, data and metric."""
    curves = _curves(comparison)
    tiers = list(dict.fromkeys(tier for curve in curves.values() for tier in curve))
    series = {tier: Series(tier, number) for number, tier in enumerate(tiers)}
    panels = {
        f"{metric.with_unit}{f', {title}' if title else ''}": _sweep_panel(comparison, curve, series, metric)
        for metric in comparison.metrics
        for title, curve in curves.items()
    }
    caption = f"Quality at each budget against {comparison.grid.sweep_label}, after the last round."
    return figure(identifier, caption, line_legend(series.values()), panels)


Curve = Mapping[str, Mapping[float, Sequence[TierResult]]]
"""Results over seeds, by tier and by the swept value."""


def _curves(comparison: Comparison) -> dict[str, Curve]:
    """Return a curve for each method, column and row, titled by what there is more than one of."""
    labels = {(place.row, place.tier, place.top_k): place.label for place in comparison.places()}
    found: dict[str, dict[str, dict[float, list[TierResult]]]] = {}
    for one in comparison.cells:
        cell = one.cell
        method = cell.method if len(comparison.grid.methods) > 1 else ""
        title = ", ".join(part for part in (method, cell.column, cell.row) if part)
        for tier in one.tiers:
            values = found.setdefault(title, {}).setdefault(labels[cell.row, tier.tier, tier.top_k], {})
            assert cell.sweep is not None, "there is a sweep"
            values.setdefault(cell.sweep, []).append(tier)
    return {title: dict(curve) for title, curve in found.items()}


def _sweep_panel(comparison: Comparison, curve: Curve, series: Mapping[str, Series], metric: Metric) -> Panel:
    values = sorted({value for points in curve.values() for value in points})
    spreads = {
        tier: [Spread.of([result.of(metric) for result in points.get(value, ())]) for value in values]
        for tier, points in curve.items()
    }

    def draw(axes: Axes) -> None:
        for tier, points in spreads.items():
            _draw_line(axes, series[tier], values, points)
        axes.set_xlabel(comparison.grid.sweep_label)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_ylabel(metric.full_heading)

    told = "; ".join(f"{tier}: {_told(points)}" for tier, points in spreads.items())
    at = ", ".join(f"{value:g}" for value in values)
    return Panel(f"{metric.with_unit} at {comparison.grid.sweep_label} {at}. {told}.", draw, height=3.1)


def on_top(comparison: Comparison, identifier: str) -> Html:
    """Methods with another on top of them: bars beside each other at each budget, and the gain."""
    without, with_ = Series("without", 6), Series("with", 0)
    panels = {}
    for below, above in comparison.grid.on_top:
        for title, places in groups(comparison).items():
            name = f"{above}{f', {title}' if title else ''}"
            panels[name] = _on_top_panel(comparison, places, (below, above), (without, with_))
    pairs = "; ".join(f"{below} without, {above} with" for below, above in comparison.grid.on_top)
    caption = (
        f"{comparison.headline.heading} of a method without and with another on top of it ({pairs}); above the bars, "
        f"the change."
    )
    return figure(identifier, caption, area_legend((without, with_)), panels)


def _on_top_panel(
    comparison: Comparison, places: Sequence[Place], names: tuple[str, str], series: tuple[Series, Series]
) -> Panel:
    values = [
        [math.nan if spread is None else spread.mean for spread in spreads]
        for spreads in ([_spread(comparison, place, name, comparison.headline) for place in places] for name in names)
    ]

    def draw(axes: Axes) -> None:
        width = 0.36
        for heights, one, shift in zip(values, series, (-width / 2, width / 2), strict=True):
            x = [place + shift for place in range(len(places))]
            axes.bar(x, [0 if math.isnan(height) else height for height in heights], width, color=one.colour)
        for place, (before, after) in enumerate(zip(*values, strict=True)):
            if not math.isnan(before + after):
                at = (place, max(before, after))
                told = numbers.change(before, after)
                axes.annotate(told, at, (0, 3), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks(range(len(places)), [_tick(place) for place in places])
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.12)
        axes.set_ylabel(comparison.headline.heading)

    told = "; ".join(
        f"{place.tier}: {numbers.score(before)} without, {numbers.score(after)} with"
        for place, before, after in zip(places, *values, strict=True)
    )
    return Panel(f"{comparison.headline.heading} of {names[0]} and {names[1]}. {told}.", draw)


@final
@dataclass(frozen=True, slots=True)
class _Cost:
    """What quality is drawn against."""

    title: str
    of: Callable[[TierResult], float]
    told_as: Callable[[float], str]


_COSTS = (
    _Cost("Computation", lambda tier: tier.flops, numbers.flops),
    _Cost("Traffic, both ways", lambda tier: tier.traffic_bytes, numbers.byte_size),
    _Cost("Peak memory", lambda tier: tier.peak_memory_bytes, numbers.byte_size),
)


def costs(comparison: Comparison, identifier: str) -> Html:
    """The headline metric against what a client of the tier spends, a line for each contestant."""
    panels = {
        f"{cost.title}{f', {title}' if title else ''}": _cost_panel(comparison, places, cost)
        for title, places in groups(comparison).items()
        for cost in _COSTS
    }
    caption = (
        f"{comparison.headline.heading} at each budget against what one client of that tier spends in one round of "
        f"training; a line joins a method’s budgets, from the one that spends least (hollow) to the one that spends "
        f"most."
    )
    return figure(identifier, caption, line_legend(contestants(comparison)), panels)


def _cost_panel(comparison: Comparison, places: Sequence[Place], cost: _Cost) -> Panel:
    points = {one: _points(comparison, places, one.name, cost) for one in contestants(comparison)}

    def draw(axes: Axes) -> None:
        for one, found in points.items():
            x, y = [x for x, _ in found], [y for _, y in found]
            axes.plot(x, y, color=one.colour, marker=one.marker, markeredgewidth=0, linewidth=1.2)
            axes.plot(x[:1], y[:1], one.marker, markerfacecolor=PAPER, markeredgecolor=one.colour, markeredgewidth=1.3)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.short(cost.told_as(value))))
        # From nought, or a difference of the size of noise would fill the panel.
        axes.set_xlim(0, 1.1 * max((x for found in points.values() for x, _ in found), default=1.0))
        axes.set_ylabel(comparison.headline.heading)
        axes.spines["left"].set_color(RULE)

    told = "; ".join(
        f"{one.name}: {', '.join(f'{numbers.score(y)} at {cost.told_as(x)}' for x, y in found)}"
        for one, found in points.items()
    )
    return Panel(f"{comparison.headline.heading} against {cost.title.lower()}. {told}.", draw)


def _points(comparison: Comparison, places: Sequence[Place], name: str, cost: _Cost) -> list[tuple[float, float]]:
    """Return (cost, headline) of a contestant at each budget where both are known, the cheapest first."""
    found = []
    for place in places:
        spent, quality = comparison.spread(place, name, cost.of), _spread(comparison, place, name, comparison.headline)
        if spent is not None and quality is not None:
            found.append((spent.mean, quality.mean))
    return sorted(found, key=lambda point: point[0])


def over_clock(comparison: Comparison, identifier: str) -> Html:
    """The clock's metric against seconds on the clients' clock: a line for a contestant, a panel for a budget."""
    metric = comparison.clock_metric
    panels = {}
    for place in comparison.places():
        curves = {one: curve for one in contestants(comparison) if (curve := comparison.curve(place, one.name))}
        title = ", ".join(part for part in (group_title(comparison, place), place.label) if part)
        panels[title] = clock_panel(metric, curves, comparison.targets)
    seeds = ", mean over seeds of each round" if len(comparison.grid.seeds) > 1 else ""
    caption = (
        f"{metric.full_heading} against seconds on the clients’ clock{seeds}{DASHED if comparison.targets else ''}."
    )
    return figure(identifier, caption, line_legend(contestants(comparison)), panels)


def personal(comparison: Comparison, identifier: str) -> Html:
    """Mean and worst tenth of the clients' own models, a column for each contestant, a panel for each data."""
    groups_ = [
        group
        for group in comparison.groups()
        if any(comparison.personal(group, name) for name in comparison.contestants)
    ]
    metric = comparison.headline
    panels = {group_title(comparison, group) or metric.heading: _personal_panel(comparison, group) for group in groups_}
    deviations = " Thin bars are one standard deviation over seeds." if len(comparison.grid.seeds) > 1 else ""
    caption = f"{metric.heading} of the clients’ own models, mean over clients and mean of the worst tenth.{deviations}"
    return figure(identifier, caption, line_legend((_MEAN, _WORST)), panels)


_MEAN, _WORST = Series("mean", 0), Series("worst tenth", 1)


def _personal_panel(comparison: Comparison, group: Group) -> Panel:
    names = comparison.contestants
    found = [list(comparison.personal(group, name).values()) for name in names]
    spreads = {one: [Spread.of(list(map(of, results))) for results in found] for one, of in _PERSONAL.items()}

    def draw(axes: Axes) -> None:
        for one, shift in ((_MEAN, -0.1), (_WORST, 0.1)):
            known = [(place + shift, spread) for place, spread in enumerate(spreads[one]) if spread is not None]
            x, y = [place for place, _ in known], [spread.mean for _, spread in known]
            deviation = [0.0 if math.isnan(spread.sd) else spread.sd for _, spread in known]
            axes.errorbar(x, y, deviation, fmt="none", ecolor=one.colour, elinewidth=1.1, alpha=0.55)
            axes.plot(x, y, one.marker, color=one.colour, markersize=7, markeredgewidth=0)
        axes.set_xticks(range(len(names)), [shorten(name, 14) for name in names])
        if len(names) > 4:
            axes.tick_params(axis="x", labelrotation=30)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(comparison.headline.heading)

    told = "; ".join(
        f"{name}: mean {_told([mean])}, worst tenth {_told([worst])}"
        for name, mean, worst in zip(names, spreads[_MEAN], spreads[_WORST], strict=True)
    )
    return Panel(f"{comparison.headline.heading} of the clients’ own models. {told}.", draw, height=3.1)


_PERSONAL: Mapping[Series, Callable[[PersonalResult], float]] = {
    _MEAN: lambda one: one.mean,
    _WORST: lambda one: one.worst_decile,
}
