"""The page's figures. Each is a set of small multiples, drawn small enough to be read on a phone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from emberfed import metrics
from emberfed.metrics import Metric
from emberfed.report import numbers
from emberfed.report.markup import Html, tag
from emberfed.report.plotting import (
    INK,
    PAPER,
    RULE,
    SERIES,
    Axes,
    Panel,
    Series,
    area_legend,
    figure,
    inline_svg,
    line_legend,
    shorten,
    spread_apart,
)
from emberfed.report.reading import ClientRound, Evaluation, PersonalSummary, RunFolder
from emberfed.report.views import (
    TierView,
    clients_at,
    evaluated_tiers,
    evaluations_at,
    headlines_of,
    in_words,
    largest,
    natural_order,
    personal_by_client,
    run_labels,
    shared_tiers,
    tier_of,
    tiers_of,
    total,
    what_tells_apart,
)

_MOST_ROWS_NAMED = 60
"""With more rows than this, names would overlap; the tiers' coloured strip still says which is which."""
_MOST_CATEGORIES = 40
_MOST_CURVES = 24
_LEAST_SPAN = 0.08
_CRUSHED = 4
"""From this factor between the times at which series end, time is drawn logarithmically."""
_MOST_TICKS = 5


def quality(run: RunFolder, identifier: str) -> Html:
    """The headline metric and the loss by tier over rounds."""
    tiers = evaluated_tiers(run)
    by_tier = {tier.series: evaluations_at(run, tier) for tier in tiers}
    panels = {
        f"{metric.full_heading}{f', {metric.unit}' if metric.unit else ''} ({metric.direction})": _rounds_panel(
            metric.heading, by_tier, _scores(metric)
        )
        for metric in (run.headline, metrics.loss_beside(run.headline))
    }
    caption = f"Quality of the global model at each tier’s {what_tells_apart(tiers)}, by round."
    return figure(identifier, caption, line_legend(by_tier), panels)


def over_clock(run: RunFolder, identifier: str) -> Html:
    """The clock's metric by tier against seconds on the clients' clock, with the targets."""
    metric = run.clock_metric
    curves = {tier.series: clock_curve(evaluations_at(run, tier), metric) for tier in evaluated_tiers(run)}
    dashed = DASHED if run.targets else ""
    caption = f"{metric.heading} of the global model against seconds on the clients’ clock, by tier{dashed}."
    panel = clock_panel(metric, curves, run.targets)
    return figure(identifier, caption, line_legend(curves), {"Quality over time": panel})


DASHED = "; dashed: the targets"
"""Ends the caption of a figure of clock panels with targets."""

Curve = Sequence[tuple[float, float]]
"""Seconds on the clients' clock and a metric then."""


def clock_curve(lines: Iterable[Evaluation], metric: Metric) -> Curve:
    """Return the points of evaluations that have both."""
    points = ((line.clock_seconds, line.of(metric)) for line in lines)
    return tuple((seconds, value) for seconds, value in points if math.isfinite(seconds) and math.isfinite(value))


def clock_panel(metric: Metric, curves: Mapping[Series, Curve], targets: Sequence[float]) -> Panel:
    """A line for each series, and a dashed one across for each target.

    The axis of time is logarithmic where some series is so much faster than another that it would be crushed.
    """

    def draw(axes: Axes) -> None:
        for target in targets:
            axes.axhline(target, color=INK, linewidth=0.9, alpha=0.55, linestyle=(0, (4, 3)))
        for series, points in curves.items():
            x, y = [seconds for seconds, _ in points], [value for _, value in points]
            # What was evaluated before training stands on the edge, and is not cut in half.
            axes.plot(x, y, color=series.colour, marker=series.marker, markeredgewidth=0, linewidth=1.4, clip_on=False)
        _scale_seconds(axes, curves.values())
        axes.set_ylabel(f"{metric.heading}{f', {metric.unit}' if metric.unit else ''}")
        _name_targets(axes, targets)

    told = "; ".join(
        f"{one.name}: {', '.join(f'{numbers.score(value)} at {numbers.clock(seconds)}' for seconds, value in points)}"
        for one, points in curves.items()
    )
    return Panel(f"{metric.heading} against seconds on the clients' clock. {told}.", draw, height=3.1)


def _scale_seconds(axes: Axes, curves: Iterable[Curve]) -> None:
    """Let the axis of time begin at 0, linear, or logarithmic from the first evaluation after it."""
    ends = [points[-1][0] for points in curves if points and points[-1][0] > 0]
    seconds = [at for points in curves for at, _ in points if at > 0]
    axes.set_xlabel("seconds on the clients’ clock")
    if ends and max(ends) > _CRUSHED * min(ends):
        least = min(seconds)
        # All series share the evaluation at 0: linear up to the first one after it, which keeps it in view.
        axes.set_xscale("symlog", linthresh=least, linscale=0.4)
        axes.set_xlabel("seconds on the clients’ clock, logarithmic")
        axes.set_xticks([0, *_log_ticks(least, max(seconds))])
        axes.set_xlim(0, 1.25 * max(seconds))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _log_ticks(least: float, most: float) -> list[float]:
    """Return 1, 3, 10, 30, ... as far as they lie between the two; every second, third, ... if they are many."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks = [tick for power in powers for tick in (10.0**power, 3 * 10.0**power) if least <= tick <= most]
    return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)]


def _name_targets(axes: Axes, targets: Sequence[float]) -> None:
    """Write each target at the right end of its line, apart from the others."""
    low, high = axes.get_ylim()
    for target, height in zip(targets, spread_apart(targets, gap=0.05 * (high - low)), strict=True):
        end, across = (1, height), axes.get_yaxis_transform()
        axes.annotate(
            numbers.score(target), end, (4, 0), xycoords=across, textcoords="offset points", va="center", fontsize=8
        )


def _scores(metric: Metric) -> Callable[[Evaluation], float]:
    return lambda line: line.of(metric)


def comparison(runs: Sequence[RunFolder], identifier: str) -> Html:
    """The headline metric of several runs over rounds, a panel for each metric and tier."""
    series = [Series(label, number) for number, label in enumerate(run_labels(runs))]
    headlines = headlines_of(runs)
    panels = {}
    for metric in headlines:
        measured = [(one, run) for one, run in zip(series, runs, strict=True) if run.headline == metric]
        for key, label in shared_tiers([run for _, run in measured]).items():
            lines = {
                one: evaluations_at(run, tier)
                for one, run in measured
                for tier in evaluated_tiers(run)
                if (tier.name, tier.top_k) == key
            }
            title = label if len(headlines) == 1 else f"{metric.heading}, {label}"
            panels[title] = _rounds_panel(metric.heading, lines, _scores(metric))
    tiers = [tier for run in runs for tier in evaluated_tiers(run)]
    caption = f"{in_words(headlines)} of every run at each tier’s {what_tells_apart(tiers)}, by round."
    return figure(identifier, caption, line_legend(series), panels)


def _rounds_panel(
    quantity: str, lines: Mapping[Series, Sequence[Evaluation]], value: Callable[[Evaluation], float]
) -> Panel:
    def draw(axes: Axes) -> None:
        for series, points in lines.items():
            x, y = [point.round for point in points], [value(point) for point in points]
            axes.plot(x, y, color=series.colour, marker=series.marker, markeredgewidth=0)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.margins(y=0.12)
        low, high = axes.get_ylim()
        # A difference of the size of noise must not fill the panel.
        missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
        axes.set_ylim(low - missing, high + missing)

    told = (
        f"{one.name}: {', '.join(numbers.score(value(point)) for point in points)}" for one, points in lines.items()
    )
    return Panel(f"Line chart of {quantity} by round. {'; '.join(told)}.", draw)


def training_losses(run: RunFolder, identifier: str) -> Html:
    """Every client's training loss, round after round, a panel per tier on common axes."""
    by_tier = {tier: [line for line in clients_at(run, tier) if line.losses] for tier in tiers_of(run)}
    everything = [
        loss for lines in by_tier.values() for line in lines for _, loss in line.losses if math.isfinite(loss)
    ]
    low, high = min(everything, default=0.0), max(everything, default=1.0)
    margin = 0.05 * (high - low) or 0.1
    last = max((line.round for lines in by_tier.values() for line in lines), default=1)
    panels = {
        tier.label: _losses_panel(
            tier, lines, (low - margin, high + margin), last, metrics.loss_beside(run.headline).unit
        )
        for tier, lines in by_tier.items()
        if lines
    }
    caption = "Training loss of each client (thin) and its mean over clients and steps of a round (thick)."
    if any(len({line.client for line in lines}) > _MOST_CURVES for lines in by_tier.values()):
        caption += f" Curves are drawn for {_MOST_CURVES} clients of a tier; the mean is over all."
    return figure(identifier, caption, (), panels)


def _losses_panel(
    tier: TierView, lines: Sequence[ClientRound], limits: tuple[float, float], last: int, unit: str
) -> Panel:
    rounds = sorted({line.round for line in lines})
    means = [_mean_loss([line for line in lines if line.round == number]) for number in rounds]

    def draw(axes: Axes) -> None:
        clients = sorted({line.client for line in lines}, key=natural_order)[:_MOST_CURVES]
        for line in (line for line in lines if line.client in clients):
            steps = max(line.steps if math.isfinite(line.steps) else 0, *(step for step, _ in line.losses), 1)
            x = [line.round - 1 + step / steps for step, _ in line.losses]
            y = [loss for _, loss in line.losses]
            mark = "." if len(x) == 1 else ""
            axes.plot(
                x, y, color=tier.series.colour, linewidth=0.9, marker=mark, alpha=0.75 if len(clients) <= 6 else 0.4
            )
        for number, mean in zip(rounds, means, strict=True):
            axes.plot([number - 1, number], [mean, mean], color=INK, linewidth=2.2, solid_capstyle="butt")
        axes.set_xlim(0, last)
        axes.set_ylim(*limits)
        axes.set_xlabel("rounds of training")
        axes.set_ylabel(f"loss, {unit}")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))

    told = ", ".join(f"round {number}: {numbers.score(mean)}" for number, mean in zip(rounds, means, strict=True))
    return Panel(f"Training loss of the clients of {tier.label}; mean by round: {told}.", draw)


def _mean_loss(lines: Sequence[ClientRound]) -> float:
    losses = [loss for line in lines for _, loss in line.losses if not math.isnan(loss)]
    return math.fsum(losses) / len(losses) if losses else math.nan


def activations(run: RunFolder, identifier: str, round_: int) -> Html:
    """Share of each client's activations that goes to each expert: one heat map per layer, clients by tier."""
    tiers = tiers_of(run)
    rows = [
        (tier, line)
        for tier in tiers
        for line in clients_at(run, tier)
        if line.round == round_ and line.activation_counts
    ]
    layers = max(len(line.activation_counts) for _, line in rows)
    shares = [_shares_by_client([line for _, line in rows], layer) for layer in range(layers)]
    peak = max((float(np.nanmax(layer)) for layer in shares if not np.isnan(layer).all()), default=1.0) or 1.0
    marked = [tier for tier, _ in rows]
    names = [line.client for _, line in rows]
    panels = {f"Layer {layer}": _heat_map(shares[layer], marked, names, peak, layer) for layer in range(layers)}
    experts = max(layer.shape[1] for layer in shares)
    caption = (
        f"Share of a client’s activations per expert{_whose(run)} in round {round_}, after Figure 2 of the A³SMoE "
        f"paper. Rows are clients, from the smallest budget to the largest. Equal use of {experts} experts would be "
        f"{numbers.share(1 / experts)} each. Colour grows with the square root of the share."
    )
    scale = inline_svg(_colour_scale(peak, 1 / experts), f"{identifier}-scale")
    present = area_legend(tier.series for tier in tiers if tier in marked)
    return figure(identifier, caption, [*present, tag("li", scale, class_="scale")], panels)


def _whose(run: RunFolder) -> str:
    return " of the adapter" if run.info.experts == "adapter" else ""


def _shares_by_client(lines: Sequence[ClientRound], layer: int) -> np.ndarray:
    """Return (clients, experts) shares of one layer; NaN where a client has no count."""
    counts = [line.activation_counts[layer] if layer < len(line.activation_counts) else () for line in lines]
    shares = np.full((len(lines), max([len(row) for row in counts] + [1])), np.nan)
    for place, row in enumerate(counts):
        if row and (whole := total(row)) > 0:
            shares[place, : len(row)] = np.asarray(row) / whole
    return shares


def _heat_map(shares: np.ndarray, tiers: Sequence[TierView], names: Sequence[str], peak: float, layer: int) -> Panel:
    clients, experts = shares.shape

    def draw(axes: Axes) -> None:
        # The square root keeps rarely used experts apart although one may take half of a client's tokens.
        axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=math.sqrt(peak), aspect="auto", interpolation="none")
        axes.grid(visible=False)
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        for place, tier in enumerate(tiers):
            corner, across = (-0.035, place - 0.5), axes.get_yaxis_transform()
            strip = Rectangle(corner, 0.022, 1, transform=across, clip_on=False, color=tier.series.colour, linewidth=0)
            axes.add_patch(strip)
            if place and tier != tiers[place - 1]:
                axes.axhline(place - 0.5, color=PAPER, linewidth=1.6)
        _name_rows(axes, names)
        axes.tick_params(axis="y", length=0, pad=13)

    busiest = _busiest(shares)
    label = f"Heat map of layer {layer}: {clients} clients by {experts} experts.{busiest}"
    return Panel(label, draw, height=_rows_height(clients))


def _busiest(shares: np.ndarray) -> str:
    if np.isnan(shares).all():
        return ""
    means = np.nansum(shares, axis=0) / max(1, int((~np.isnan(shares).all(axis=1)).sum()))
    expert = int(means.argmax())
    return f" Most used is expert {expert}, with {numbers.share(float(means[expert]))} of the activations on average."


def _colour_scale(peak: float, equal: float) -> Panel:
    def draw(axes: Axes) -> None:
        axes.imshow(np.linspace(0, 1, 128)[None, :], cmap="Blues", aspect="auto", extent=(0, 1, 0, 1))
        axes.grid(visible=False)
        axes.set_yticks([])
        marks = sorted({0.0, peak / 4, peak})
        axes.set_xticks([math.sqrt(mark / peak) for mark in marks], [numbers.share(mark) for mark in marks])
        if equal < peak:
            axes.axvline(math.sqrt(equal / peak), color=INK, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate("equal use", (math.sqrt(equal / peak), 1), (0, 4), textcoords="offset points", ha="center")
        for side in axes.spines.values():
            side.set_visible(False)

    return Panel(f"Colour scale from 0 to {numbers.share(peak)}.", draw, height=0.72)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    if len(names) > _MOST_ROWS_NAMED:
        axes.set_yticks([])
        return
    size = 8 if len(names) <= 24 else 6.5
    axes.set_yticks(range(len(names)), [shorten(name) for name in names], fontsize=size)


def _rows_height(rows: int) -> float:
    return min(0.75 + rows * (0.2 if rows <= 24 else 0.13), 8.5)


def categories(run: RunFolder, identifier: str) -> Html:
    """The headline metric by category before and after, a panel per tier."""
    metric = run.headline
    ends = {
        tier: (lines[0], lines[-1])
        for tier in evaluated_tiers(run)
        if (lines := [line for line in evaluations_at(run, tier) if line.categories])
    }
    best = largest(score.of(metric) for pair in ends.values() for line in pair for score in line.categories.values())
    limit = _limit(best)
    panels = {tier.label: _categories_panel(metric, tier, *pair, limit) for tier, pair in ends.items()}
    caption = f"{metric.heading} by {metric.by}: the first evaluation (hollow) and the last (filled)."
    return figure(identifier, caption, (), panels)


def _limit(best: float) -> float:
    return 1.06 * best if math.isfinite(best) and best > 0 else 1.0


def _categories_panel(metric: Metric, tier: TierView, first: Evaluation, last: Evaluation, limit: float) -> Panel:
    names = sorted(last.categories, key=lambda name: -(last.categories[name].examples or 0))[:_MOST_CATEGORIES]
    names.sort(key=natural_order)
    after = [last.categories[name].of(metric) for name in names]
    before = [first.categories[name].of(metric) if name in first.categories else math.nan for name in names]

    def draw(axes: Axes) -> None:
        _draw_changes(axes, names, {tier.series: range(len(names))}, before, after)
        axes.set_xlabel(metric.heading)
        axes.set_xlim(-0.03 * limit, limit)

    told = _told_changes(names, before, after)
    left_out = len(last.categories) - len(names)
    note = f" {left_out} more are in the table." if left_out else ""
    label = (
        f"{metric.heading} by {metric.by} for {tier.label}, round {first.round} to round {last.round}: {told}.{note}"
    )
    return Panel(label, draw, height=_rows_height(len(names)) + 0.1)


def _draw_changes(
    axes: Axes,
    names: Sequence[str],
    rows: Mapping[Series, Sequence[int]],
    before: Sequence[float],
    after: Sequence[float],
) -> None:
    """Draw a row for each name, from before (hollow) to after (filled), in the colour of the series it is of."""
    for series, places in rows.items():
        first, last = [before[place] for place in places], [after[place] for place in places]
        colour = series.colour
        axes.hlines(places, first, last, color=colour, linewidth=2, alpha=0.55)
        axes.plot(first, places, "o", markerfacecolor=PAPER, markeredgecolor=colour, markeredgewidth=1.4)
        axes.plot(last, places, "o", color=colour, markersize=6)
    _name_rows(axes, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _told_changes(names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> str:
    return "; ".join(
        f"{name} {numbers.score(one)} to {numbers.score(two)}"
        for name, one, two in zip(names, before, after, strict=True)
    )


def personal_over_rounds(run: RunFolder, identifier: str) -> Html:
    """Mean and worst tenth of the clients' own models over rounds."""
    heading = run.headline.heading
    drawn = {f"{heading} ({run.headline.direction})": _personal_panel(heading, run.personal_summaries)}
    caption = (
        f"{heading} of each client’s own model on its own held-out examples, by round: over clients, the mean with one "
        f"standard deviation to either side, and the mean of the worst tenth."
    )
    return figure(identifier, caption, line_legend((_MEAN, _WORST)), drawn)


_MEAN, _WORST = Series("mean", 0), Series("worst tenth", 1)


def _personal_panel(quantity: str, lines: Sequence[PersonalSummary]) -> Panel:
    x = [line.round for line in lines]

    def draw(axes: Axes) -> None:
        low, high = [line.mean - line.spread for line in lines], [line.mean + line.spread for line in lines]
        axes.fill_between(x, low, high, color=_MEAN.colour, alpha=0.16)
        for series, values in (
            (_MEAN, [line.mean for line in lines]),
            (_WORST, [line.worst_decile for line in lines]),
        ):
            axes.plot(x, values, color=series.colour, marker=series.marker, markeredgewidth=0)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.margins(y=0.12)

    told = "; ".join(
        f"round {line.round}: {numbers.score(line.mean)} ± {numbers.score(line.spread)}, "
        f"worst tenth {numbers.score(line.worst_decile)}"
        for line in lines
    )
    return Panel(f"Line chart of {quantity} of the clients’ own models by round. {told}.", draw)


def personal_by_client_figure(run: RunFolder, identifier: str) -> Html:
    """Every client's own model at its first evaluation and its last, the best first, coloured by tier."""
    metric, found = run.headline, personal_by_client(run)
    names = sorted(found, key=lambda name: _worst_last(found[name][1].of(metric)))
    before = [found[name][0].of(metric) for name in names]
    after = [found[name][1].of(metric) for name in names]
    rows: dict[Series, list[int]] = {tier.series: [] for tier in tiers_of(run)}
    for place, name in enumerate(names):
        rows.setdefault(tier_of(run, found[name][1]).series, []).append(place)
    rows = {series: places for series, places in rows.items() if places}

    def draw(axes: Axes) -> None:
        _draw_changes(axes, names, rows, before, after)
        axes.set_xlabel(metric.heading)
        # From nought: the share of examples that a client's model gets right is what is compared.
        limit = _limit(largest([*before, *after]))
        axes.set_xlim(-0.03 * limit, limit)

    rounds = sorted({line.round for pair in found.values() for line in pair})
    label = (
        f"{metric.heading} of each client’s own model, round {rounds[0]} to round {rounds[-1]}, the best first: "
        f"{_told_changes(names, before, after)}."
    )
    caption = f"{metric.heading} of each client’s own model: the first evaluation (hollow) and the last (filled)."
    panel = Panel(label, draw, height=_rows_height(len(names)) + 0.1)
    return figure(identifier, caption, area_legend(rows), {"Clients, the best first": panel})


def _worst_last(value: float) -> float:
    return math.inf if math.isnan(value) else -value


def partition(run: RunFolder, identifier: str) -> Html:
    """How the training examples are divided: labels by client, and target tokens by client."""
    shards = run.partition.clients
    names = sorted(shards, key=natural_order)
    counts = Counter[str]()
    for shard in shards.values():
        counts.update(shard.labels)
    named = len(counts) if len(counts) <= len(SERIES) else len(SERIES) - 1
    common = sorted(label for label, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:named])
    bars = {label: [shards[name].labels.get(label, 0) for name in names] for label in common}
    if len(counts) > len(common):
        bars[f"{len(counts) - len(common)} other labels"] = [
            sum(number for label, number in shards[name].labels.items() if label not in common) for name in names
        ]
    if not counts:
        bars = {"examples": [shards[name].examples or 0 for name in names]}
    stacks = {Series(label, number): values for number, (label, values) in enumerate(bars.items())}
    panels = {"Examples by label": _stacked_rows("examples", names, stacks)}
    tokens = [shards[name].target_tokens for name in names]
    if not all(math.isnan(value) for value in tokens):
        one = Series("target tokens", 0)
        panels["Target tokens (loss is taken on these)"] = _stacked_rows("target tokens", names, {one: tokens})
    return figure(identifier, "Training data of each client.", area_legend(stacks), panels)


def _stacked_rows(quantity: str, names: Sequence[str], stacks: Mapping[Series, Sequence[float]]) -> Panel:
    whole = [total(values[place] for values in stacks.values()) for place in range(len(names))]

    def draw(axes: Axes) -> None:
        start = np.zeros(len(names))
        for series, values in stacks.items():
            width = np.nan_to_num(np.asarray(values, dtype=float))
            axes.barh(range(len(names)), width, left=start, color=series.colour, edgecolor=PAPER, linewidth=0.5)
            start = start + width
        axes.set_xlabel(quantity)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.count(value)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _name_rows(axes, names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)

    told = ", ".join(f"{name} {numbers.count(value)}" for name, value in zip(names, whole, strict=True))
    return Panel(f"Bars of {quantity} by client: {told}.", draw, height=_rows_height(len(names)) + 0.1)


def costs(run: RunFolder, identifier: str) -> tuple[Html, ...]:
    """Seconds, traffic and FLOPs of each round, as two figures: by part, and by tier."""
    numbers_of_rounds = [line.round for line in run.rounds]
    seconds = {
        Series("local training", 0): [line.training_seconds for line in run.rounds],
        Series("evaluation", 1): [line.evaluation_seconds for line in run.rounds],
        Series("everything else", 2): [line.overhead_seconds for line in run.rounds],
    }
    time = {"Seconds": _stacked_columns("seconds", numbers_of_rounds, seconds, numbers.seconds)}
    parts = [figure(f"{identifier}-time", "Where the time of a round goes.", area_legend(seconds), time)]
    tiers = tiers_of(run)
    rounds = sorted({line.round for line in run.clients})
    if rounds:
        panels = {
            "Computation": _by_tier(run, rounds, "flops", numbers.flops, lambda line: line.flops),
            "Sent by clients": _by_tier(run, rounds, "bytes sent", numbers.byte_size, lambda line: line.bytes_up),
            "Received by clients": _by_tier(
                run, rounds, "bytes received", numbers.byte_size, lambda line: line.bytes_down
            ),
        }
        parts.append(
            figure(f"{identifier}-tiers", "What a round costs, by tier.", area_legend(t.series for t in tiers), panels)
        )
    return tuple(parts)


def _by_tier(
    run: RunFolder,
    rounds: Sequence[int],
    quantity: str,
    told_as: Callable[[float], str],
    cost: Callable[[ClientRound], float],
) -> Panel:
    stacks = {
        tier.series: [_sum_of_round(clients_at(run, tier), number, cost) for number in rounds] for tier in tiers_of(run)
    }
    return _stacked_columns(quantity, rounds, stacks, told_as)


def _sum_of_round(lines: Iterable[ClientRound], number: int, cost: Callable[[ClientRound], float]) -> float:
    return total(cost(line) for line in lines if line.round == number)


def _stacked_columns(
    quantity: str, rounds: Sequence[int], stacks: Mapping[Series, Sequence[float]], told_as: Callable[[float], str]
) -> Panel:
    whole = [total(values[place] for values in stacks.values()) for place in range(len(rounds))]

    def draw(axes: Axes) -> None:
        start = np.zeros(len(rounds))
        for series, values in stacks.items():
            height = np.nan_to_num(np.asarray(values, dtype=float))
            axes.bar(rounds, height, 0.62, bottom=start, color=series.colour, edgecolor=PAPER, linewidth=0.5)
            start = start + height
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.short(told_as(value))))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=False, axis="x")
        axes.spines["left"].set_color(RULE)

    told = ", ".join(f"round {number} {told_as(value)}" for number, value in zip(rounds, whole, strict=True))
    return Panel(f"Bars of {quantity} by round: {told}.", draw, height=2.5)
