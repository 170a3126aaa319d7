"""Matplotlib figures as inline SVG that takes its colours from the page, so that one drawing serves light and dark.

Figures are drawn in stand-in colours; `inline_svg` replaces each by a CSS colour (`currentColor`, `var(--series-1)`).
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import matplotlib
from matplotlib.figure import Figure

from emberfed.report.markup import Html, escape, printable, tag

Axes = Any
"""`matplotlib.axes.Axes`; matplotlib is not type-checked here."""

INK = "#010203"
"""Stands for the text colour."""
RULE = "#010204"
"""Stands for the colour of grid lines and axes."""
PAPER = "#010205"
"""Stands for the page's background."""
SERIES = tuple(f"#0102{number:02x}" for number in range(0x11, 0x19))
"""Stand for the page's eight series colours; told apart also by `MARKERS`."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
SYMBOLS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "⬟")
"""The markers as text, for legends."""

_CSS_COLOURS = {INK: "currentColor", RULE: "var(--rule)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)
}
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "patch.linewidth": 0,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.color": RULE,
    "ytick.labelcolor": INK,
}


@final
@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing: `draw` fills the axes; `label` says in words what it shows; sizes are in inches."""

    label: str
    draw: Callable[[Axes], None]
    width: float = 4.2
    height: float = 2.9


@final
@dataclass(frozen=True, slots=True)
class Series:
    """How one of several things (tiers, runs, labels) is drawn everywhere on the page."""

    name: str
    number: int

    @property
    def colour(self) -> str:
        """Stand-in colour."""
        return SERIES[self.number % len(SERIES)]

    @property
    def marker(self) -> str:
        """Matplotlib marker."""
        return MARKERS[self.shape]

    @property
    def shape(self) -> int:
        """Index into `MARKERS`; moves on by one each time the colours start again."""
        return (self.number + self.number // len(SERIES)) % len(MARKERS)


def shorten(text: str, length: int = 18) -> str:
    """Return `text` in at most `length` characters, as figures need it."""
    clean = printable(" ".join(text.split()))
    return clean if len(clean) <= length else f"{clean[: length - 1]}…"


def spread_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return label heights moved up just enough to stand `gap` apart, in the order given."""
    placed: dict[int, float] = {}
    below = -math.inf
    for place in sorted(range(len(heights)), key=lambda place: (math.isnan(heights[place]), heights[place])):
        placed[place] = max(heights[place], below + gap) if not math.isnan(heights[place]) else math.nan
        below = placed[place]
    return [placed[place] for place in range(len(heights))]


def line_legend(series: Iterable[Series]) -> tuple[Html, ...]:
    """Return legend items for lines: colour and marker."""
    return tuple(_legend_item(SYMBOLS[one.shape], one) for one in series)


def area_legend(series: Iterable[Series]) -> tuple[Html, ...]:
    """Return legend items for bars: colour alone."""
    return tuple(_legend_item(SYMBOLS[1], one) for one in series)


def _legend_item(symbol: str, series: Series) -> Html:
    colour = tag("span", symbol, style=f"color:{_CSS_COLOURS[series.colour]}", aria_hidden="true")
    return tag("li", colour, " ", series.name)


def figure(identifier: str, caption: str, legend: Iterable[Html], panels: Mapping[str, Panel]) -> Html:
    """Return a `<figure>` of small multiples. `identifier` is unique on the page; panels are titled by their keys."""
    drawings = [
        tag("div", tag("p", title, class_="panel-title"), inline_svg(panel, f"{identifier}-{number}"), class_="panel")
        for number, (title, panel) in enumerate(panels.items())
    ]
    items = list(legend)
    key = [tag("ul", *items, class_="legend")] if items else []
    # Two or four side by side leave no gap, where three to a row would.
    layout = "panels pairs" if len(drawings) in (1, 2, 4) else "panels"
    return tag("figure", tag("figcaption", caption), *key, tag("div", *drawings, class_=layout), id=identifier)


def inline_svg(panel: Panel, identifier: str) -> Html:
    """Draw a panel. The same panel and identifier always give the same text.

    The text measures in matplotlib's own font but is set in the page's, so characters only the browser has are fine.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "emberfed"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawing = Figure(figsize=(panel.width, panel.height), facecolor="none")
        panel.draw(drawing.add_subplot(facecolor="none"))
        drawing.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(buffer.getvalue(), panel.label, identifier)


_TAG = re.compile(r"<[^>]*>")
_REFERENCE = re.compile(r'(?:xlink:href="#|url\(#)([^")]+)')
_STYLE_ELEMENT = re.compile(r"<style.*?</style>", re.DOTALL)


def _for_page(document: str, label: str, identifier: str) -> Html:
    """Return matplotlib's SVG document as an element of a page: own ids, the page's colours and font, no fat."""
    opening, inner = _STYLE_ELEMENT.sub("", document[document.index("<svg") :]).split(">", 1)
    referenced = frozenset(_REFERENCE.findall(inner))
    inner = _TAG.sub(lambda match: _retouch(match.group(), referenced, identifier), inner)
    inner = re.sub(r"\s*\n\s*", "\n", inner.replace("<defs>\n</defs>", "")).strip()
    view_box = opening.split('viewBox="')[1].split('"')[0]
    return Html(f'<svg role="img" aria-label="{escape(label)}" viewBox="{view_box}">{inner}')


def _retouch(element: str, referenced: frozenset[str], identifier: str) -> str:
    """Return one start tag made fit for the page. Only tags are touched, never the text between them."""
    # Ids must be the page's own: several drawings on one page would otherwise share them.
    element = re.sub(r' id="([^"]+)"', lambda match: match.group() if match[1] in referenced else "", element)
    element = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{identifier}-", element)
    element = re.sub(r"font-family: [^;\"]+;? ?", "", re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", element))
    element = re.sub(r' transform="rotate\(-0 [^"]*"', "", element)
    element = re.sub(r"(\d\.\d\d)\d+", r"\1", element) if element.startswith(("<path", "<use", "<text")) else element
    return re.sub(r"#0102[0-9a-f]{2}", lambda match: _CSS_COLOURS.get(match.group(), match.group()), element)
