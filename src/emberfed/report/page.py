"""Puts the page together: a summary made from the numbers, then quality, training, experts, data, costs and set-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

from emberfed.report import figures, numbers, tables
from emberfed.report.markup import Html, join, tag
from emberfed.report.reading import RunFolder
from emberfed.report.views import (
    TierView,
    evaluated_tiers,
    evaluations_at,
    last_round_with_counts,
    ratio,
    run_labels,
    tiers_of,
    total,
)

_MOST_EVENTS = 200


def page(runs: Sequence[RunFolder]) -> str:
    """Return the whole HTML document for one or several runs."""
    labels = run_labels(runs)
    if len(runs) == 1:
        title, body = labels[0], _run(runs[0], "run", "h2")
    else:
        title, body = f"Comparison of {len(runs)} runs", _several(runs, labels)
    return document(title, "emberfed report", body)


def document(title: str, eyebrow: str, body: Html) -> str:
    """Return a whole HTML document in the report's style; `eyebrow` says above the title what it is."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        tag("title", f"{title} · emberfed"),
        tag("style", Html(resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8"))),
    )
    heading = tag("header", tag("p", eyebrow, class_="eyebrow"), tag("h1", title))
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", heading, body)), lang="en") + "\n"


def _several(runs: Sequence[RunFolder], labels: Sequence[str]) -> Html:
    links = [tag("li", tag("a", label, href=f"#run-{number}")) for number, label in enumerate(labels, start=1)]
    drawn = (
        figures.comparison(runs, "comparison")
        if any(run.evaluations for run in runs)
        else _missing("None of these runs has an evaluation yet.")
    )
    blocks = [
        tag("section", tag("h2", label), _run(run, f"run-{number}", "h3"), class_="run", id=f"run-{number}")
        for number, (run, label) in enumerate(zip(runs, labels, strict=True), start=1)
    ]
    return join([tables.comparison(runs), drawn, tag("nav", tag("ul", *links), aria_label="Runs"), *blocks])


def _run(run: RunFolder, identifier: str, heading: str) -> Html:
    parts = {
        "Quality": _quality(run, identifier),
        **({"Time on the clients’ clock": _clock(run, identifier)} if run.has_clock else {}),
        **({"Clients’ own models": _personal(run, identifier)} if run.personal or run.personal_summaries else {}),
        "Local training": _training(run, identifier),
        **_experts(run, identifier),
        "Data": _data(run, identifier),
        "Costs": _costs(run, identifier),
        "Failures and events": _failures(run),
        "Set-up": _setup(run),
    }
    sections = [tag("section", tag(heading, title), content) for title, content in parts.items()]
    return join([_byline(run), tag("p", summary(run), class_="summary"), _notices(run), *sections])


def _byline(run: RunFolder) -> Html:
    info = run.info
    title = info.method.title or info.method.name
    paper = info.method.paper
    linked = tag("a", title, href=paper) if paper.startswith(("https://", "http://")) else title
    facts = [
        linked,
        *([paper] if paper and linked is title else []),
        *([f"seed {info.seed}"] if info.seed is not None else []),
        *([info.created] if info.created else []),
        *([f"emberfed {info.emberfed_version}"] if info.emberfed_version else []),
    ]
    return tag("p", join(facts, " · "), class_="byline")


def _notices(run: RunFolder) -> Html:
    if not run.notices:
        return Html()
    items = tag("ul", *(tag("li", notice) for notice in run.notices))
    return tag("aside", tag("p", "This run folder is incomplete or damaged:"), items, class_="notices", role="note")


def _missing(text: str) -> Html:
    return tag("p", text, class_="missing")


def summary(run: RunFolder) -> str:
    """Return the run in a few sentences, all from its numbers: also where quality fell."""
    sentences = [_what_ran(run), _progress(run), *(_quality_in_words(run, tier) for tier in evaluated_tiers(run))]
    if not run.evaluations:
        sentences.append("No evaluation has been recorded yet.")
    if run.personal_summaries:
        sentences.append(_personal_in_words(run))
    if run.rounds:
        sentences.append(_costs_in_words(run))
    return " ".join(sentence for sentence in sentences if sentence)


def _what_ran(run: RunFolder) -> str:
    model = run.info.model
    clients = set(run.partition.clients) or {line.client for line in run.clients}
    shape = [
        f"{numbers.parameters(model.parameters)} parameters",
        *(
            [f"{numbers.count(model.layers)} dense layers"]
            if model.num_experts == 1
            else [
                f"{numbers.count(model.layers)} layers of {numbers.count(model.num_experts)} experts",
                f"{numbers.count(model.native_top_k)} active natively",
            ]
        ),
    ]
    known = [text for text in shape if numbers.MISSING not in text]
    described = f"{model.path} ({', '.join(known)})" if known else model.path
    if not model.path:
        return ""
    among = f" on {_plural(len(clients), 'client')} in {_plural(len(tiers_of(run)), 'tier')}" if clients else ""
    return f"{run.info.method.title or run.info.method.name} fine-tunes the model {described}{among}."


def _progress(run: RunFolder) -> str:
    done = len(run.rounds)
    if run.planned_rounds is None:
        return f"{_plural(done, 'round')} done."
    if done >= run.planned_rounds:
        return f"All {_plural(run.planned_rounds, 'round')} done."
    return f"{done} of {_plural(run.planned_rounds, 'round')} done: the run is in progress or was stopped."


def _quality_in_words(run: RunFolder, tier: TierView) -> str:
    lines, metric = evaluations_at(run, tier), run.headline
    first, last = lines[0], lines[-1]
    named = f" ({tier.name})" if tier.name and tier.budget else ""
    where = f"At {tier.short}{named} {metric.title}"
    if len(lines) == 1:
        when = "before training" if first.round == 0 else f"after round {first.round}"
        return f"{where} is {numbers.score(first.of(metric))} {when}."
    before, after = numbers.score(first.of(metric)), numbers.score(last.of(metric))
    span = f"in {_plural(last.round - first.round, 'round')}"
    if before == after:
        return f"{where} stayed at {after} {span}."
    if numbers.MISSING in (before, after):
        return f"{where} went from {before} to {after} {span}."
    verb = "rose" if last.of(metric) > first.of(metric) else "fell"
    return f"{where} {verb} from {before} to {after} {span}."


def _personal_in_words(run: RunFolder) -> str:
    last = run.personal_summaries[-1]
    when = "before training" if last.round == 0 else f"after round {last.round}"
    return (
        f"On their own held-out examples, the {_plural(last.clients, 'client')}’ own models have a mean "
        f"{run.headline.title} of {numbers.score(last.mean)} {when}, the worst tenth of them "
        f"{numbers.score(last.worst_decile)}."
    )


def _costs_in_words(run: RunFolder) -> str:
    seconds = total(line.seconds for line in run.rounds)
    overhead = total(line.overhead_seconds for line in run.rounds)
    parts = {
        numbers.seconds(seconds): "",
        numbers.flops(total(line.flops for line in run.rounds)): " of computation",
        numbers.byte_size(total(line.bytes_up for line in run.rounds)): " sent by clients",
    }
    costs = [f"{value}{what}" for value, what in parts.items() if value != numbers.MISSING]
    left = numbers.share(ratio(overhead, seconds))
    spent = f"; {left} of the time went neither into training nor into evaluation" if left != numbers.MISSING else ""
    return f"It took {_listed(costs)}{spent}." if costs else ""


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([*([", ".join(parts[:-1])] if parts[:-1] else []), *parts[-1:]])


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _quality(run: RunFolder, identifier: str) -> Html:
    if not run.evaluations:
        return _missing("No evaluation has been recorded yet.")
    parts = [figures.quality(run, f"{identifier}-quality"), tables.quality(run)]
    if any(line.categories for line in run.evaluations):
        parts += [figures.categories(run, f"{identifier}-categories"), tables.categories(run)]
    else:
        parts.append(_missing(f"The evaluations are not broken down by {run.headline.by}."))
    return join(parts)


def _clock(run: RunFolder, identifier: str) -> Html:
    about = (
        "Counted work and bytes, in seconds of the tiers’ devices: download, computation, memory, "
        "disk and upload. A round lasts as long as its slowest client; evaluation takes no time."
    )
    listed = [tables.time_to_accuracy(run)] if run.targets else []
    return join([tag("p", about), figures.over_clock(run, f"{identifier}-clock"), *listed])


def _personal(run: RunFolder, identifier: str) -> Html:
    parts = []
    if run.personal_summaries:
        parts += [figures.personal_over_rounds(run, f"{identifier}-personal"), tables.personal(run)]
    if run.personal:
        parts += [
            figures.personal_by_client_figure(run, f"{identifier}-personal-clients"),
            tables.personal_by_tier(run),
            details("Every client’s own model", tables.personal_by_client_table(run)),
        ]
    return join(parts)


def _training(run: RunFolder, identifier: str) -> Html:
    if not run.clients:
        return _missing("No client has reported local training yet.")
    curves = (
        figures.training_losses(run, f"{identifier}-losses")
        if any(line.losses for line in run.clients)
        else _missing("The clients recorded no training loss by step.")
    )
    last = max(line.round for line in run.clients)
    return join([curves, details(f"Every client in round {last}", tables.clients(run, last))])


def _experts(run: RunFolder, identifier: str) -> Mapping[str, Html]:
    """Return the section by its heading; none where clients trained and there were no experts to count."""
    last = last_round_with_counts(run)
    heading = "Experts of the adapter" if run.info.experts == "adapter" else "Experts"
    if last is not None:
        return {heading: join([figures.activations(run, f"{identifier}-experts", last), tables.routing(run)])}
    return {} if run.clients else {heading: _missing("No client has counted expert activations yet.")}


def _data(run: RunFolder, identifier: str) -> Html:
    parts: list[Html] = []
    shards = run.partition
    if shards.clients:
        parts.append(figures.partition(run, f"{identifier}-partition"))
        settings = {"kind": shards.kind, **shards.parameters}
        parts.append(details("Every client’s data", tables.settings("Partition", settings), tables.partition(run)))
    else:
        parts.append(_missing("How the data was divided is not recorded."))
    if run.info.data:
        parts.append(details("Counts of the data set", tables.settings("Data", run.info.data)))
    return join(parts)


def _costs(run: RunFolder, identifier: str) -> Html:
    if not run.rounds:
        return _missing("No round has ended yet.")
    parts = [*figures.costs(run, f"{identifier}-costs"), tables.rounds(run)]
    if run.clients:
        parts.append(tables.tier_costs(run))
    return join(parts)


def _failures(run: RunFolder) -> Html:
    parts = []
    if any(line.failed or line.refused for line in run.rounds):
        parts.append(tables.losses_of_clients(run))
    else:
        parts.append(tag("p", "No client failed and no upload was refused."))
    if run.events:
        left_out = max(0, len(run.events) - _MOST_EVENTS)
        note = f" (the last {_MOST_EVENTS}; {left_out} earlier ones are in events.jsonl)" if left_out else ""
        parts.append(details(f"{_plural(len(run.events), 'event')}{note}", tables.events(run, _MOST_EVENTS)))
    else:
        parts.append(tag("p", "No events were recorded."))
    return join(parts)


def _setup(run: RunFolder) -> Html:
    info = run.info
    parts = [details("Configuration", tag("pre", tag("code", run.config), tabindex="0"))] if run.config else []
    for title, values in (
        ("Versions", {"git commit": info.git, **info.versions}),
        ("Hardware", info.hardware),
        ("Model", info.model.model_dump()),
    ):
        known = {key: value for key, value in values.items() if value not in (None, "") and value == value}
        if known:
            parts.append(details(title, tables.settings(title, known)))
    return join(parts) if parts else _missing("Neither configuration nor versions are recorded.")


def details(title: str, *content: Html) -> Html:
    """Return a part of a page that opens at a click."""
    return tag("details", tag("summary", title), *content)
