"""The page's tables. Every number in them is one the run folder holds, or a plain sum or ratio of such."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emberfed import metrics
from emberfed.metrics import Metric
from emberfed.report import numbers
from emberfed.report.markup import Html, table
from emberfed.report.reading import ClientRound, Evaluation, RunFolder
from emberfed.report.views import (
    TierView,
    clients_at,
    coefficient_of_variation,
    evaluated_tiers,
    evaluations_at,
    headlines_of,
    largest,
    mean,
    natural_order,
    personal_by_client,
    ratio,
    run_labels,
    shared_tiers,
    smallest,
    summed_counts,
    tier_of,
    tiers_of,
    total,
)

_MOST_ROUNDS = 12


def quality(run: RunFolder) -> Html:
    """Every metric by tier after every round, and its change from the first evaluation to the last."""
    tiers = evaluated_tiers(run)
    rounds = sorted({line.round for tier in tiers for line in evaluations_at(run, tier)})
    shown, note = _some(rounds)
    headers = ["Metric", "Tier", *(_after(number) for number in shown), "Change", "Examples"]
    rows = [
        [metric.heading, tier.label, *_over_rounds(evaluations_at(run, tier), shown, metric)]
        for metric in metrics.recorded_with(run.headline)
        for tier in tiers
    ]
    return table(f"Quality of the global model by tier and round{note}", headers, rows, words=2)


def time_to_accuracy(run: RunFolder) -> Html:
    """When each tier first reached each target, on the clients' clock."""
    tiers, targets = evaluated_tiers(run), run.clock_metric.easiest_first(run.targets)
    rows = [[numbers.score(target), *(_reached(run, tier, target) for tier in tiers)] for target in targets]
    caption = f"Seconds on the clients’ clock until {run.clock_metric.title} first reached a target"
    return table(caption, ["Target", *(tier.label for tier in tiers)], rows)


def _reached(run: RunFolder, tier: TierView, target: float) -> str:
    for line in evaluations_at(run, tier):
        if run.clock_metric.reached(line.of(run.clock_metric), target):
            return f"{numbers.clock(line.clock_seconds)} (round {line.round})"
    return "not reached"


def _over_rounds(lines: Sequence[Evaluation], rounds: Sequence[int], metric: Metric) -> Iterator[str]:
    values = {line.round: line.of(metric) for line in lines}
    yield from (numbers.score(values.get(number, math.nan)) for number in rounds)
    yield numbers.change(lines[0].of(metric), lines[-1].of(metric)) if len(lines) > 1 else numbers.MISSING
    yield numbers.count(lines[-1].examples)


def _some(rounds: Sequence[int]) -> tuple[Sequence[int], str]:
    """Return the rounds a table has room for, always with the first and the last, and a note if some are left out."""
    step = -(-len(rounds) // _MOST_ROUNDS)
    if step <= 1:
        return rounds, ""
    return sorted({*rounds[::step], rounds[-1]}), f" (one evaluation in {step}, and the last)"


def _after(number: int) -> str:
    return "Before training" if number == 0 else f"Round {number}"


def categories(run: RunFolder) -> Html:
    """The headline metric by category, first to last evaluation, a column per tier."""
    ends = {tier: _first_and_last(run, tier) for tier in evaluated_tiers(run)}
    ends = {tier: pair for tier, pair in ends.items() if pair}
    names = sorted({name for pair in ends.values() for line in pair for name in line.categories}, key=natural_order)
    headers = [run.headline.by.capitalize(), "Examples", *(tier.label for tier in ends)]
    rows = []
    for name in names:
        known = [line.categories[name].examples for pair in ends.values() for line in pair if name in line.categories]
        rows.append([name, numbers.count(known[-1]), *(_from_to(run.headline, name, *pair) for pair in ends.values())])
    return table(f"{run.headline.heading} by {run.headline.by}, from the first evaluation to the last", headers, rows)


def _first_and_last(run: RunFolder, tier: TierView) -> tuple[Evaluation, ...]:
    lines = [line for line in evaluations_at(run, tier) if line.categories]
    return (lines[0], lines[-1]) if lines else ()


def _from_to(metric: Metric, name: str, first: Evaluation, last: Evaluation) -> str:
    before, after = (
        numbers.score(line.categories[name].of(metric)) if name in line.categories else numbers.MISSING
        for line in (first, last)
    )
    return f"{before} → {after}"


def personal(run: RunFolder) -> Html:
    """The clients' own models after every round they were evaluated after."""
    title = run.headline.title
    headers = ["", "Clients", f"Mean {title}", "Worst tenth", "Standard deviation", "Mean loss"]
    rows = [
        [
            _after(line.round),
            numbers.count(line.clients),
            *map(numbers.score, (line.mean, line.worst_decile, line.spread, line.loss_mean)),
        ]
        for line in run.personal_summaries
    ]
    return table("Clients’ own models, over clients", headers, rows)


def personal_by_tier(run: RunFolder) -> Html:
    """The clients' own models by tier, first evaluation to last."""
    metric = run.headline
    by_tier: dict[TierView, list[tuple[float, float]]] = {tier: [] for tier in tiers_of(run)}
    for first, last in personal_by_client(run).values():
        by_tier.setdefault(tier_of(run, last), []).append((first.of(metric), last.of(metric)))
    rows = [
        [
            tier.label,
            numbers.count(len(values)),
            *(f"{numbers.score(pick(before))} → {numbers.score(pick(after))}" for pick in (mean, smallest, largest)),
        ]
        for tier, values in by_tier.items()
        if values
        for before, after in [zip(*values, strict=True)]
    ]
    headers = ["Tier", "Clients", f"Mean {metric.title}", "Worst client", "Best client"]
    return table("Clients’ own models by tier, from the first evaluation to the last", headers, rows)


def personal_by_client_table(run: RunFolder) -> Html:
    """Every client's own model, first evaluation to last."""
    shown = (run.headline, metrics.loss_beside(run.headline))
    rows = [
        [
            client,
            tier_of(run, last).label,
            numbers.count(last.examples),
            *(f"{numbers.score(first.of(metric))} → {numbers.score(last.of(metric))}" for metric in shown),
        ]
        for client, (first, last) in personal_by_client(run).items()
    ]
    headers = ["Client", "Tier", "Examples", *(metric.heading for metric in shown)]
    return table("Clients’ own models, from the first evaluation to the last", headers, rows, words=2)


def routing(run: RunFolder) -> Html:
    """How evenly the experts were used in every round, all clients together."""
    headers = ["Round", "Experts", "Never used", "Coefficient of variation, mean of layers", "Most uneven layer"]
    found = {line.round for line in run.clients if line.activation_counts}
    shown, note = _some(sorted(found))
    rows = []
    for number in shown:
        layers = [layer for layer in summed_counts(run, number) if layer]
        uneven = [coefficient_of_variation(layer) for layer in layers]
        experts = [count for layer in layers for count in layer]
        never = sum(count == 0 for count in experts)
        figures = (numbers.count(len(experts)), numbers.count(never), mean(uneven), largest(uneven))
        rows.append([f"{number}", *figures[:2], *map(numbers.score, figures[2:])])
    return table(f"Use of experts by round, all clients together{note}", headers, rows)


def rounds(run: RunFolder) -> Html:
    """What every round cost, and a last row with the whole run."""
    headers = ["Round", "Time", "Training", "Evaluation", "Everything else", "Computation", "Received by clients"]
    headers += ["Sent by clients", "Peak memory", "Replied", "Failed", "Refused", "Experts trained", "Training loss"]
    rows = [
        [
            f"{line.round}",
            *map(numbers.seconds, (line.seconds, line.training_seconds, line.evaluation_seconds)),
            _overhead(line.overhead_seconds, line.seconds),
            numbers.flops(line.flops),
            *map(numbers.byte_size, (line.bytes_down, line.bytes_up, line.peak_memory_bytes)),
            numbers.count(None if line.replied is None else len(line.replied)),
            *map(numbers.count, (len(line.failed), len(line.refused))),
            numbers.share(line.share_of_experts_trained),
            numbers.score(line.train_loss),
        ]
        for line in run.rounds
    ]
    rows.append(_whole_run(run))
    return table("Costs by round", headers, rows)


def _whole_run(run: RunFolder) -> list[str]:
    lines = run.rounds
    seconds = total(line.seconds for line in lines)
    return [
        "Whole run",
        *map(numbers.seconds, (seconds, total(line.training_seconds for line in lines))),
        numbers.seconds(total(line.evaluation_seconds for line in lines)),
        _overhead(total(line.overhead_seconds for line in lines), seconds),
        numbers.flops(total(line.flops for line in lines)),
        numbers.byte_size(total(line.bytes_down for line in lines)),
        numbers.byte_size(total(line.bytes_up for line in lines)),
        numbers.byte_size(largest(line.peak_memory_bytes for line in lines)),
        numbers.count(sum(len(line.replied or ()) for line in lines)),
        numbers.count(sum(len(line.failed) for line in lines)),
        numbers.count(sum(len(line.refused) for line in lines)),
        "",
        "",
    ]


def _overhead(seconds: float, whole: float) -> str:
    return f"{numbers.seconds(seconds)} ({numbers.share(ratio(seconds, whole))})"


def tier_costs(run: RunFolder) -> Html:
    """What one client of each tier costs in one round, on average."""
    counted = _counted(run)
    headers = ["Tier", "Clients", "Replies", "Examples", f"{counted.title()}s", "Time", "Computation"]
    headers += [f"Computation per {counted}"]
    headers += ["Received", "Sent", "Peak memory (largest)", "Experts touched", "Loss, first step to last"]
    rows = [_tier_row(tier, lines) for tier in tiers_of(run) if (lines := clients_at(run, tier))]
    return table("Costs of one client in one round, mean by tier", headers, rows)


def _counted(run: RunFolder) -> str:
    """Return what clients' work is counted in; an image has positions, which nobody calls tokens."""
    return "token" if run.headline == metrics.GENERATION else "position"


def _tier_row(tier: TierView, lines: Sequence[ClientRound]) -> list[str]:
    first, last = mean(line.loss_first for line in lines), mean(line.loss_last for line in lines)
    return [
        tier.label,
        numbers.count(len({line.client for line in lines})),
        numbers.count(len(lines)),
        numbers.count(mean(line.examples for line in lines if line.examples is not None)),
        numbers.count(mean(line.tokens for line in lines)),
        numbers.seconds(mean(line.seconds for line in lines)),
        numbers.flops(mean(line.flops for line in lines)),
        numbers.flops(ratio(total(line.flops for line in lines), total(line.tokens for line in lines))),
        numbers.byte_size(mean(line.bytes_down for line in lines)),
        numbers.byte_size(mean(line.bytes_up for line in lines)),
        numbers.byte_size(largest(line.peak_memory_bytes for line in lines)),
        numbers.share(mean(line.share_of_experts_touched for line in lines)),
        f"{numbers.score(first)} → {numbers.score(last)}",
    ]


def clients(run: RunFolder, number: int) -> Html:
    """Every client's work in one round."""
    counted = _counted(run)
    headers = ["Client", "Tier", "Examples", "Steps", f"{counted.title()}s"]
    headers += ["Target tokens" if counted == "token" else "Targets", "Loss, first step to last", "Mean loss"]
    headers += ["Time", "Computation", "Received", "Sent", "Peak memory", "Experts touched"]
    rows = [
        [
            line.client,
            tier.label,
            *map(numbers.count, (line.examples, line.steps, line.tokens, line.target_tokens)),
            f"{numbers.score(line.loss_first)} → {numbers.score(line.loss_last)}",
            numbers.score(line.loss_mean),
            numbers.seconds(line.seconds),
            numbers.flops(line.flops),
            *map(numbers.byte_size, (line.bytes_down, line.bytes_up, line.peak_memory_bytes)),
            numbers.share(line.share_of_experts_touched),
        ]
        for tier in tiers_of(run)
        for line in clients_at(run, tier)
        if line.round == number
    ]
    return table(f"Clients in round {number}", headers, rows, words=2)


def partition(run: RunFolder) -> Html:
    """Every client's examples, target tokens and labels."""
    shards = run.partition.clients
    labels = sorted({label for shard in shards.values() for label in shard.labels}, key=natural_order)
    told = any(not math.isnan(shard.target_tokens) for shard in shards.values())
    rows = [
        [
            name,
            numbers.count(shards[name].examples),
            *([numbers.count(shards[name].target_tokens)] if told else []),
            *(numbers.count(shards[name].labels.get(label, 0)) for label in labels),
        ]
        for name in sorted(shards, key=natural_order)
    ]
    return table(
        "Examples of each client by label", ["Client", "Examples", *(["Target tokens"] if told else []), *labels], rows
    )


def losses_of_clients(run: RunFolder) -> Html:
    """Who failed or was refused, in which round and why."""
    rows = [
        [f"{line.round}", what, client, reason]
        for line in run.rounds
        for what, reasons in (("failed", line.failed), ("refused", line.refused))
        for client, reason in sorted(reasons.items(), key=lambda item: natural_order(item[0]))
    ]
    return table("Clients whose work was not used", ["Round", "What", "Client", "Why"], rows, words=4)


def events(run: RunFolder, most: int) -> Html:
    """The last `most` events of the run's own log."""
    rows = [[line.time or numbers.MISSING, line.level, line.message] for line in run.events[-most:]]
    return table("Events", ["Time", "Level", "Message"], rows, words=3)


def comparison(runs: Sequence[RunFolder]) -> Html:
    """One row per run: what ran, where quality ended at each tier, and what it cost."""
    headlines = headlines_of(runs)
    tiers = {
        (metric, *key): label
        for metric in headlines
        for key, label in shared_tiers([run for run in runs if run.headline == metric]).items()
    }
    scores = [f"{metric.heading}, {label}" for (metric, _, _), label in tiers.items()]
    headers = ["Run", "Method", "Seed", "Rounds", *scores]
    headers += ["Computation", "Received by clients", "Sent by clients", "Time"]
    rows = [
        [
            label,
            run.info.method.title or run.info.method.name,
            numbers.MISSING if run.info.seed is None else f"{run.info.seed}",
            numbers.count(len(run.rounds)),
            *(_last_quality(run, metric, name, top_k) for metric, name, top_k in tiers),
            numbers.flops(total(line.flops for line in run.rounds)),
            numbers.byte_size(total(line.bytes_down for line in run.rounds)),
            numbers.byte_size(total(line.bytes_up for line in run.rounds)),
            numbers.seconds(total(line.seconds for line in run.rounds)),
        ]
        for label, run in zip(run_labels(runs), runs, strict=True)
    ]
    told = " or ".join(metric.title for metric in headlines)
    return table(f"Runs side by side: last {told} and its change", headers, rows, words=2)


def _last_quality(run: RunFolder, metric: Metric, name: str | None, top_k: int) -> str:
    for tier in evaluated_tiers(run):
        if run.headline == metric and (tier.name, tier.top_k) == (name, top_k):
            lines = evaluations_at(run, tier)
            before, after = lines[0].of(metric), lines[-1].of(metric)
            return (
                f"{numbers.score(after)} ({numbers.change(before, after)})" if len(lines) > 1 else numbers.score(after)
            )
    return numbers.MISSING


def settings(caption: str, values: Mapping[str, Any]) -> Html:
    """Nested settings as rows of dotted keys."""
    return table(caption, ["Key", "Value"], [[key, value] for key, value in _flat("", values)], words=2)


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(f"{prefix}{key}.", value)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((f"{prefix}{key}", text))
    return rows
