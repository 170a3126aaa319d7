"""One picture of a run for a README: its headline metric before and after at each tier, and the way there, on white."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from emberfed import storage
from emberfed.errors import RunFolderError, StorageError
from emberfed.metrics import Metric
from emberfed.report import numbers
from emberfed.report.plotting import MARKERS, Axes, shorten, spread_apart
from emberfed.report.reading import Evaluation, read_run
from emberfed.report.views import TierView, evaluated_tiers, evaluations_at

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3478a", "#c48a00", "#3fa7dc", "#7a7f87", "#6b4fbb")
_INK, _FAINT, _RULE, _BEFORE = "#1c2128", "#59636e", "#e1e5ea", "#c3c9d1"
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _FAINT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": _RULE,
    "svg.fonttype": "path",
    "svg.hashsalt": "emberfed",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.color": _RULE,
    "ytick.labelcolor": _FAINT,
}
_METADATA = {".png": {"Software": None}, ".svg": dict.fromkeys(("Date", "Creator", "Format", "Type"))}

Lines = dict[TierView, list[Evaluation]]


def write_picture(run: Path, output: Path) -> Path:
    """Draw `run` into the file `output`, PNG (2000 by 800 pixels) or SVG by its suffix, and return `output`.

    Raises:
        RunFolderError: `run` is not a run folder, or has no evaluation yet.
        StorageError: The file cannot be written, or its suffix is neither `.png` nor `.svg`.
    """
    kind = output.suffix.lower()
    if kind not in _METADATA:
        raise StorageError(
            f"{output}: a picture is written as .png or .svg, not as {kind or 'a file without suffix'!r}"
        )
    folder = read_run(run)
    lines = {tier: evaluations_at(folder, tier) for tier in evaluated_tiers(folder)}
    if not lines:
        raise RunFolderError(f"{run} has no evaluation to draw yet; resume the run, or evaluate it first")
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A tier's name may need a font that is not here; the picture then shows a box in its place.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
        figure = Figure(figsize=(10, 4), dpi=200, facecolor="white", layout=layout)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1), sharey=True)
        _draw_bars(left, lines, folder.headline)
        _draw_curves(right, lines, folder.headline)
        figure.savefig(buffer, format=kind[1:], metadata=_METADATA[kind])
    storage.write(output, buffer.getvalue())
    return output


def _draw_bars(axes: Axes, lines: Lines, metric: Metric) -> None:
    width = 0.38
    for place, (tier, points) in enumerate(lines.items()):
        ends = [(-width / 2 - 0.01, points[0], _BEFORE), (width / 2 + 0.01, points[-1], _colour(tier))]
        for offset, point, colour in ends if len(points) > 1 else [(0.0, points[0], _BEFORE)]:
            value = point.of(metric)
            height = 0.0 if math.isnan(value) else value
            axes.bar(place + offset, height, width, color=colour)
            text = numbers.score(value).removeprefix("0")
            axes.annotate(text, (place + offset, height), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    names = [f"{shorten(tier.name, 12)}\n{tier.budget}".strip() if tier.name else tier.budget for tier in lines]
    axes.set_xticks(range(len(lines)), names)
    axes.tick_params(length=0)
    axes.grid(visible=True, axis="y")
    axes.set_ylabel(metric.heading)
    axes.margins(y=0.14)
    # Scores near nought must look like it.
    axes.set_ylim(0, max(axes.get_ylim()[1], 0.1))
    axes.set_title(f"{_when(lines)}, by tier", pad=12)


def _when(lines: Lines) -> str:
    rounds = sorted({point.round for points in lines.values() for point in (points[0], points[-1])})
    first = "before training" if rounds[0] == 0 else f"after round {rounds[0]}"
    if len(rounds) == 1:
        return first.capitalize()
    return f"{first.capitalize()} (grey) and after round {rounds[-1]}"


def _draw_curves(axes: Axes, lines: Lines, metric: Metric) -> None:
    for tier, points in lines.items():
        x, y = [point.round for point in points], [point.of(metric) for point in points]
        colour, marker = _colour(tier), MARKERS[tier.series.shape]
        axes.plot(x, y, color=colour, marker=marker, linewidth=2.2, markersize=6, clip_on=False)
    last = max(point.round for points in lines.values() for point in points)
    heights = spread_apart([points[-1].of(metric) for points in lines.values()], gap=0.055 * axes.get_ylim()[1])
    for (tier, points), height in zip(lines.items(), heights, strict=True):
        if not math.isnan(height):
            across = points[-1].round if len(points) > 1 else last
            axes.annotate(
                shorten(tier.short, 12),
                (across, height),
                (10, 0),
                textcoords="offset points",
                va="center",
                color=_colour(tier),
            )
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.tick_params(length=0)
    axes.grid(visible=True, axis="y")
    axes.set_xlabel("round")
    axes.set_title("Round by round", pad=12)


def _colour(tier: TierView) -> str:
    return _COLOURS[tier.number % len(_COLOURS)]
