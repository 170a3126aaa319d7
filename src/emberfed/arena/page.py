"""The comparison as one self-contained page, with the report's styles and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from emberfed.arena import figures, markdown
from emberfed.arena.results import CellResult, Comparison, Place
from emberfed.metrics import Metric
from emberfed.report import numbers
from emberfed.report.markup import Html, join, table, tag
from emberfed.report.page import details, document


def page(comparison: Comparison) -> str:
    """Return the whole HTML document."""
    parts: dict[str, Html] = {}
    if comparison.places():
        parts["Quality"] = _quality(comparison)
        if comparison.grid.on_top:
            parts["One method on top of another"] = figures.on_top(comparison, "on-top")
        if comparison.has_clock:
            parts["Time on the clients’ clock"] = _clock(comparison)
        if comparison.has_personal:
            parts["Clients’ own models"] = _personal(comparison)
        parts["Quality and cost"] = join([figures.costs(comparison, "costs"), _costs(comparison)])
    parts["Runs"] = _runs(comparison)
    sections = [tag("section", tag("h2", title), content) for title, content in parts.items()]
    lead = tag("p", summary(comparison), class_="summary")
    return document(comparison.grid.title, "emberfed comparison", join([lead, _notices(comparison), *sections]))


def summary(comparison: Comparison) -> str:
    """Return the comparison in a few sentences, all from its numbers."""
    done = sum(one.state == "done" for one in comparison.cells)
    seeds = comparison.grid.seeds
    told = [f"{done} of {len(comparison.cells)} runs are done, over {len(seeds)} seed{'s' * (len(seeds) > 1)}."]
    return " ".join([*told, *(_winners(comparison, metric) for metric in comparison.metrics)]).strip()


def _winners(comparison: Comparison, metric: Metric) -> str:
    """Say how often each contestant is best, and how often a test separates it from all others."""
    contests = [contest for place in comparison.places() if (contest := comparison.contest(place, metric)).best]
    if not contests:
        return ""
    wins = Counter(contest.best for contest in contests if contest.best is not None)
    clear = sum(len(contest.tests) == len(contest.spreads) - 1 and not contest.ties for contest in contests)
    listed = ", ".join(f"{name} at {number}" for name, number in wins.most_common())
    tested = f"; a test separates the best from all others at {clear}" if any(one.tests for one in contests) else ""
    of = "one comparison" if len(contests) == 1 else f"{len(contests)} comparisons"
    return f"{metric.full_heading}, of {of}: best is {listed}{tested}."


def _notices(comparison: Comparison) -> Html:
    parts = [tag("p", note) for note in markdown.left_out(comparison)]
    said = markdown.without_result(comparison)
    if said:
        parts += [tag("p", "Runs without a result:"), tag("ul", *(tag("li", line) for line in said))]
    return tag("aside", *parts, class_="notices", role="note") if parts else Html()


def _quality(comparison: Comparison) -> Html:
    drawn = [] if comparison.values_compete else [figures.budgets(comparison, "budgets")]
    swept = [figures.sweep(comparison, "sweep")] if len(comparison.grid.values) > 1 else []
    tables = [
        _table(comparison, metric, title, places)
        for title, places in figures.groups(comparison).items()
        for metric in comparison.metrics
    ]
    notes = [tag("p", note, class_="byline") for note in markdown.footnotes(comparison)]
    return join([*drawn, *swept, *tables, *notes])


def _table(comparison: Comparison, metric: Metric, title: str, places: Sequence[Place]) -> Html:
    rows = []
    for place in places:
        contest = comparison.contest(place, metric)
        cells = [markdown.cell_text(contest, name, len(comparison.grid.seeds)) for name in comparison.contestants]
        rows.append([place.label, *(_marked(*cell) for cell in cells)])
    caption = f"{metric.with_unit}{f', {title}' if title else ''} ({metric.direction})"
    return table(caption, ["Budget", *comparison.contestants], rows)


def _clock(comparison: Comparison) -> Html:
    drawn = figures.over_clock(comparison, "clock")
    if not comparison.targets:
        return drawn
    rows = [[" · ".join(told), *cells] for told, cells in markdown.times(comparison)]
    listed = table(markdown.times_heading(comparison), ["Of", *comparison.contestants], rows)
    return join([drawn, tag("p", markdown.times_note(comparison), class_="byline"), listed])


def _personal(comparison: Comparison) -> Html:
    rows = [[" · ".join(told), *figures] for told, figures in markdown.personal(comparison)]
    listed = table("Clients’ own models, by data and method", ["Of", *markdown.PERSONAL], rows)
    drawn = figures.personal(comparison, "personal")
    return join([drawn, tag("p", markdown.personal_note(comparison), class_="byline"), listed])


def _marked(text: str, standing: str) -> str:
    return {"best": tag("b", text), "tie": f"{text}{numbers.SPACE}{markdown.TIE}", "": text}[standing]


def _costs(comparison: Comparison) -> Html:
    rows = [[" · ".join(told), *spent] for told, spent in markdown.costs(comparison)]
    costs = table("Costs", ["Of", *markdown.COSTS], rows)
    return details("Costs by budget and method", tag("p", markdown.costs_note(comparison)), costs)


def _runs(comparison: Comparison) -> Html:
    headers = ["Run", "State", "Rounds", "Computation", "Received by clients", "Sent by clients", "Peak memory", "Time"]
    listed = table("Every run", headers, [_run(one) for one in comparison.cells], words=2)
    first = comparison.cells[0]
    shown = tag("pre", tag("code", first.cell.config.yaml()), tabindex="0")
    return join(
        [
            details(f"{len(comparison.cells)} runs", listed),
            details(f"Configuration of the first one ({first.cell.title})", shown),
        ]
    )


def _run(one: CellResult) -> list[str]:
    name: str = one.cell.title
    if one.state == "done":
        name = tag("a", name, href=f"runs/{one.cell.name}/report.html")
    return [
        name,
        one.state,
        f"{one.rounds}",
        numbers.flops(one.flops),
        *map(numbers.byte_size, (one.bytes_down, one.bytes_up, one.peak_memory_bytes)),
        numbers.seconds(one.seconds),
    ]
