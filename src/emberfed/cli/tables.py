"""Results as tables for a terminal; every function is pure and returns something rich can print."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from emberfed.cli.options import Option
from emberfed.cli.stopping import resume_command
from emberfed.report import numbers

if TYPE_CHECKING:
    from emberfed.cli.doctor import Check
    from emberfed.cli.summary import Summary
    from emberfed.models.footprint import ModuleMemory

_COLOURS = {"ok": "green", "warning": "yellow", "broken": "bold red"}


def quality(summary: Summary) -> Table:
    """Quality by tier before and after."""
    rounds = f"{summary.rounds} round" if summary.rounds == 1 else f"{summary.rounds} rounds"
    table = plain_table(f"Held-out quality before → after {rounds}")
    table.add_column("Tier", overflow="fold")
    for name in ("K", "ROUGE-L", "Change", "Loss", "Change"):
        table.add_column(name, justify="right", no_wrap=True)
    for tier in summary.tiers:
        table.add_row(
            tier.tier,
            str(tier.top_k),
            f"{numbers.score(tier.rouge_l_before)} → {numbers.score(tier.rouge_l_after)}",
            _change(tier.rouge_l_before, tier.rouge_l_after, better=1),
            f"{numbers.score(tier.loss_before)} → {numbers.score(tier.loss_after)}",
            _change(tier.loss_before, tier.loss_after, better=-1),
        )
    return table


def _change(before: float, after: float, better: int) -> Text:
    gain = round(after - before, 3) * better
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
    return Text("\n").join(
        [
            Text("\nreport       ", style="bold") + Text(str(summary.report)),
            Text("next         ", style="bold") + Text(f"{resume_command(summary.run)} --rounds {summary.rounds + 2}"),
            Text(f"             emberfed evaluate {run} --top-k {_every_k(summary)}"),
        ]
    )


def _every_k(summary: Summary) -> str:
    return ",".join(str(top_k) for top_k in sorted({tier.top_k for tier in summary.tiers})) or "1"


def evaluations(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Evaluations at several K, and ROUGE-L by category where there is more than one."""
    table = plain_table(f"Held-out quality after round {lines[0]['round']}, {lines[0]['examples']} examples")
    table.add_column("Tier", overflow="fold")
    names = ("K", "ROUGE-L", "Loss", "Perplexity", "Time")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            line["tier"],
            str(line["top_k"]),
            numbers.score(line["rouge_l"]),
            numbers.score(line["loss"]),
            f"{line['perplexity']:.2f}",
            numbers.seconds(line["seconds"]),
        )
    return table


def categories(lines: Sequence[Mapping[str, Any]]) -> Table:
    """ROUGE-L by category, a column per evaluation."""
    table = plain_table("ROUGE-L by category")
    table.add_column("Category")
    table.add_column("Examples", justify="right")
    for line in lines:
        table.add_column(f"K = {line['top_k']}", justify="right", no_wrap=True)
    for name in sorted(lines[0]["categories"]):
        scores = [line["categories"][name] for line in lines]
        table.add_row(name, str(scores[0]["examples"]), *(numbers.score(score["rouge_l"]) for score in scores))
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
