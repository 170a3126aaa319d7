"""Results as tables for a terminal; every function is pure and returns something rich can print."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from emberfed import metrics
from emberfed.cli.options import Option
from emberfed.cli.stopping import resume_command
from emberfed.metrics import Metric
from emberfed.report import numbers

if TYPE_CHECKING:
    from emberfed.cli.doctor import Check
    from emberfed.cli.summary import Summary
    from emberfed.devices import Device
    from emberfed.models.footprint import ModuleMemory

_COLOURS = {"ok": "green", "warning": "yellow", "broken": "bold red"}


def quality(summary: Summary) -> Table:
    """Quality by tier before and after."""
    rounds = f"{summary.rounds} round" if summary.rounds == 1 else f"{summary.rounds} rounds"
    table = plain_table(f"Held-out quality before → after {rounds}")
    table.add_column("Tier", overflow="fold")
    active = {tier.budget[:1] for tier in summary.tiers} - {""}
    for name in (*active, *(head for metric in _shown(summary) for head in (metric.heading, "Change"))):
        table.add_column(name, justify="right", no_wrap=True)
    for tier in summary.tiers:
        own = tier.top_k if tier.adapter_top_k is None else tier.adapter_top_k
        cells: list[str | Text] = [str(own)] if active else []
        for metric in _shown(summary):
            before, after = tier.before[metric.key], tier.after[metric.key]
            cells += [f"{numbers.score(before)} → {numbers.score(after)}", _change(before, after, metric)]
        table.add_row(tier.tier, *cells)
    return table


def _shown(summary: Summary) -> tuple[Metric, Metric]:
    return summary.headline, metrics.loss_beside(summary.headline)


def personal(summary: Summary) -> tuple[Text, ...]:
    """A line on the clients' own models; nothing without any."""
    if not summary.personal:
        return ()
    first, last = summary.personal[0], summary.personal[-1]
    told = {
        f"mean {summary.headline.title}": (first.mean, last.mean),
        "worst tenth": (first.worst_decile, last.worst_decile),
        "standard deviation": (first.spread, last.spread),
    }
    listed = ", ".join(f"{what} {numbers.score(one)} → {numbers.score(two)}" for what, (one, two) in told.items())
    return (Text("clients’ own models  ", style="bold") + Text(f"{listed} over {last.clients} clients\n"),)


def _change(before: float, after: float, metric: Metric) -> Text:
    gain = round(after - before, 3) * metric.sign
    return Text(numbers.change(before, after), style="green" if gain > 0 else "red" if gain < 0 else "")


def costs(summary: Summary) -> Table:
    """What the run cost, where its report is."""
    share = numbers.share(summary.overhead_seconds / summary.seconds) if summary.seconds else numbers.MISSING
    entries = {
        "time": f"{numbers.seconds(summary.seconds)}, {share} of it outside training and evaluation",
        "traffic": f"{numbers.byte_size(summary.bytes_down)} to clients, {numbers.byte_size(summary.bytes_up)} back",
        "training": numbers.flops(summary.flops),
        "peak memory": numbers.byte_size(summary.peak_memory_bytes),
    }
    return pairs(entries)


def problems(summary: Summary) -> Text:
    """Clients that failed or were refused, one line each; empty if there were none."""
    return Text("\n".join(summary.problems), style="yellow")


def next_steps(summary: Summary) -> Text:
    """The report's place and the next commands, ready to copy."""
    run = shlex.quote(str(summary.run))
    evaluate = f"emberfed evaluate {run}{_every_k(summary)}"
    resume = f"{resume_command(summary.run)} --rounds {summary.rounds + 2}"
    first, *others = [evaluate] if summary.deployed else [resume, evaluate]
    return Text("\n").join(
        [
            Text("\nreport       ", style="bold") + Text(str(summary.report)),
            Text("next         ", style="bold") + Text(first),
            *(Text(f"             {other}") for other in others),
        ]
    )


def _every_k(summary: Summary) -> str:
    """Return the option that asks for every number of active experts there is; nothing if there is one only."""
    own = sorted({tier.adapter_top_k for tier in summary.tiers if tier.adapter_top_k is not None})
    option, found = ("--adapter-top-k", own) if own else ("--top-k", sorted({tier.top_k for tier in summary.tiers}))
    told = any(tier.budget for tier in summary.tiers)
    return f" {option} {','.join(map(str, found))}" if told else ""


def evaluations(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Evaluations at several K."""
    shown = metrics.recorded_with(metrics.headline_in(lines[0]))
    active = _active(lines)
    table = plain_table(f"Held-out quality after round {lines[0]['round']}, {lines[0]['examples']} examples")
    table.add_column("Tier", overflow="fold")
    for name in (*active, *(metric.heading for metric in shown), "Time"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            line["tier"],
            *(str(line[key]) for key in active.values()),
            *(_score(line[metric.key], metric) for metric in shown),
            numbers.seconds(line["seconds"]),
        )
    return table


def _active(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, str]:
    """Return the key of the numbers of active experts that tell evaluations apart, by its heading."""
    known = {"K": "top_k", "k": "adapter_top_k"}
    present = {heading: key for heading, key in known.items() if all(key in line for line in lines)}
    differing = {heading: key for heading, key in present.items() if len({line[key] for line in lines}) > 1}
    return differing or ({"k": "adapter_top_k"} if "k" in present else {"K": "top_k"})


def _score(value: float | None, metric: Metric) -> str:
    if value is None:
        return numbers.MISSING
    return f"{value:.2f}" if metric.key == "perplexity" else numbers.score(value)


def categories(lines: Sequence[Mapping[str, Any]]) -> Table:
    """The headline metric by category, a column per evaluation."""
    metric = metrics.headline_in(lines[0])
    table = plain_table(f"{metric.heading} by {metric.by}")
    (heading, key), *_ = _active(lines).items()
    table.add_column(metric.by.capitalize())
    table.add_column("Examples", justify="right")
    for line in lines:
        table.add_column(f"{heading} = {line[key]}", justify="right", no_wrap=True)
    for name in sorted(lines[0]["categories"]):
        scores = [line["categories"][name] for line in lines]
        table.add_row(name, str(scores[0]["examples"]), *(_score(score[metric.key], metric) for score in scores))
    return table


def methods(found: Mapping[str, tuple[str, str]]) -> Group:
    """All methods: title and what each is, by name."""
    table = plain_table("Methods")
    table.add_column("method.name", no_wrap=True, style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("About")
    for name, (title, about) in found.items():
        table.add_row(name, title, about)
    return Group(table, Text("emberfed methods NAME lists a method's options and its paper.", style="dim"))


def method(name: str, title: str, paper: str, options: Sequence[Option], adapter: Sequence[Option]) -> Group:
    """One method with its options."""
    head = Text(f"{name}", style="bold") + Text(f"  {title}, {paper}")
    parts = [_options("method", options), _options("adapter", adapter)]
    return Group(head, *(table for table in parts if table.row_count), "")


def _options(section: str, options: Iterable[Option]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    table.add_column(no_wrap=True, min_width=24)
    table.add_column()
    for option in options:
        default = "required" if option.required else f"default {default_text(option.default)}"
        about = Text(f"{option.kind}; {default}\n", style="dim") + Text(option.help)
        table.add_row(Text(f"{section}.{option.name}", style="cyan"), about)
    return table


def default_text(value: Any) -> str:
    """Return a default as it would stand in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def families(docs: Mapping[str, str]) -> Table:
    """Model types that have a record."""
    table = plain_table("Families of models")
    table.add_column("model_type", no_wrap=True, style="bold")
    table.add_column("About")
    for model_type, doc in docs.items():
        table.add_row(model_type, doc)
    return table


def checks(found: Sequence[Check]) -> Table:
    """What `doctor` found."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for check in found:
        table.add_row(Text(check.state, style=_COLOURS[check.state]), check.name, check.detail)
    return table


def memory(rows: Sequence[ModuleMemory]) -> tuple[Table, ...]:
    """What a model's weights occupy, in all last; no table for a model that cannot be loaded."""
    if not rows:
        return ()
    table = plain_table("Memory of the model's weights, as they are stored")
    table.add_column("Module")
    table.add_column("Format", overflow="fold")
    for name in ("Weights", "Bits each", "Stored", "In 16 bit"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.module,
            ", ".join(row.formats),
            numbers.parameters(row.weights),
            f"{row.bits_per_weight:.1f}",
            numbers.byte_size(row.stored_bytes),
            numbers.byte_size(row.sixteen_bit_bytes),
        )
    return (table,)


def device(found: Device) -> Group:
    """How fast a machine is, as a tier's `device` in a configuration."""
    shown = yaml.safe_dump({"device": found.model_dump(mode="json")}, sort_keys=False, allow_unicode=True)
    return Group(Text("This machine as the device of a tier (clients.tiers)", style="bold"), Text(shown))


def pairs(entries: Mapping[str, str]) -> Table:
    """Names and values."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold", min_width=11)
    table.add_column()
    for name, value in entries.items():
        table.add_row(name, value)
    return table


def plain_table(title: str) -> Table:
    """Return an empty table in the one style of all commands."""
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
