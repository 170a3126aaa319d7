"""Admission: every upload is checked against what was asked before it may touch the state."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

import torch

from emberfed.aggregation import LARGEST_VALUE
from emberfed.clock import WORK
from emberfed.errors import EmberfedError, closest
from emberfed.metrics import Metric, recorded_with
from emberfed.records import ACTIVATION_COUNTS, SCORES, Bundle, Json, Payload, Reply, TensorSpec


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """What the server asked of one client.

    Attributes:
        round: The round.
        client: Its id.
        specs: The tensors the answer must hold.
        top_k: The K it was given.
        adapter_top_k: The k of a sparse adapter it was given; then activation counts are of that.
        exploited: The experts it was told to tune, by layer, where it tunes some only.
    """

    round: int
    client: str
    specs: Mapping[str, TensorSpec]
    top_k: int | None
    adapter_top_k: int | None = None
    exploited: Json = None


def problem_of(reply: Reply, asked: Mapping[str, Asked], answered: set[str]) -> tuple[str, str | None]:
    """Return whom a reply is held against, and what is wrong with it (None: admitted).

    The sender is who the engine says it is; a payload that claims to be somebody else is refused.
    """
    sender = reply.client
    if sender not in asked:
        return sender, f"was not asked in this round{closest(sender, asked)}"
    if sender in answered:
        return sender, "answered twice"
    try:
        payload = Payload.from_bytes(reply.upload)
    except EmberfedError as error:
        return sender, str(error)
    return sender, payload_problem(payload, asked[sender])


def payload_problem(payload: Payload, asked: Asked) -> str | None:
    """Return what is wrong with an upload, or None."""
    if payload.client != asked.client:
        return f"payload says it comes from {payload.client!r}"
    if payload.round != asked.round:
        return f"payload belongs to round {payload.round}, this is round {asked.round}"
    content = payload.content
    return (
        _meta_problem(content.meta, asked) or _tensor_problem(content.tensors, asked.specs) or _counts_problem(content)
    )


_LARGEST_COUNT = 2**53
"""Whole numbers above it are not all exact as float64, in which weights are formed."""

_LARGEST_FIGURE = 1e30
"""Sums of reported figures must stay finite, or a round could not be written down."""


def _short(value: Json) -> str:
    """Return a value as it came, but not pages of it."""
    text = f"a number of {value.bit_length()} bits" if type(value) is int and abs(value) > 2**64 else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _meta_problem(meta: Mapping[str, Json], asked: Asked) -> str | None:
    for key in ("examples", "tokens"):
        value = meta.get(key)
        if type(value) is not int or not 1 <= value <= _LARGEST_COUNT:
            return f"{key!r} must be a whole number from 1 to {_LARGEST_COUNT}, found {_short(value)}"
    for key in ("top_k", "adapter_top_k", "exploited"):
        given = getattr(asked, key)
        if json.dumps(meta.get(key)) != json.dumps(given):  # to Python, 1, 1.0 and true are equal
            return f"{key!r} is {_short(meta.get(key))}, the client was given {_short(given)}"
    stats = meta.get("stats")
    if not isinstance(stats, dict):
        return f"'stats' must be a mapping, found {stats!r}"
    for key in ("loss_mean", "flops"):
        figure: Json = stats.get(key)
        if type(figure) not in (int, float) or not abs(figure) < _LARGEST_FIGURE:
            return f"'stats.{key}' must be a number below {_LARGEST_FIGURE:g}, found {_short(figure)}"
    for key in WORK:
        counted: Json = stats.get(key, 0)
        if type(counted) not in (int, float) or not 0 <= counted < _LARGEST_FIGURE:
            return f"'stats.{key}' must be a number from 0 below {_LARGEST_FIGURE:g}, found {_short(counted)}"
    return None


def _tensor_problem(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> str | None:
    foreign, missing = sorted(set(tensors) - set(specs)), sorted(set(specs) - set(tensors))
    if foreign:
        return f"foreign tensor {foreign[0]!r}" + (f" and {len(foreign) - 1} more" if foreign[1:] else "")
    if missing:
        return f"tensor {missing[0]!r} is missing" + (f" and {len(missing) - 1} more" if missing[1:] else "")
    chosen: set[int] = set()
    for name in sorted(specs):
        tensor = tensors[name]
        wrong = specs[name].problem(tensor)
        if wrong:
            return f"tensor {name!r}: {wrong}"
        chosen |= specs[name].ranks(tensor)
        if len(chosen) > 1:
            return f"tensor {name!r}: ranks differ within the upload, found {sorted(chosen)}"
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            return f"tensor {name!r}: {bad} of {tensor.numel()} values are not finite"
        if tensor.is_floating_point() and bool((tensor.abs() > LARGEST_VALUE).any()):
            return f"tensor {name!r}: values above {LARGEST_VALUE:g}, too large to be aggregated"
        if not tensor.is_floating_point() and bool((tensor < 0).any()):
            return f"tensor {name!r}: negative counts"
    return None


def _counts_problem(content: Bundle) -> str | None:
    """Every token of an honest client goes to exactly K experts of each layer: of the adapter, if the k is its."""
    counts_LE, meta = content.tensors.get(ACTIVATION_COUNTS), content.meta
    key = "top_k" if meta.get("adapter_top_k") is None else "adapter_top_k"
    if counts_LE is None or meta.get(key) is None:
        return None
    expected = meta["tokens"] * meta[key]
    wrong = [total for total in counts_LE.sum(dim=1).tolist() if total != expected]
    if wrong:
        return f"activation counts of a layer sum to {wrong[0]}, tokens x {key} is {expected}"
    most = max(counts_LE.flatten().tolist(), default=0)
    if most > meta["tokens"]:
        return f"activation counts say that an expert was given {most} tokens, of {meta['tokens']} in all"
    return None


def survey_problem(reply: Reply, round: int, specs: Mapping[str, TensorSpec]) -> str | None:
    """Return what is wrong with a survey, or None."""
    try:
        payload = Payload.from_bytes(reply.upload)
    except EmberfedError as error:
        return str(error)
    if (payload.client, payload.round) != (reply.client, round):
        return f"payload says it comes from {payload.client!r} in round {payload.round}"
    return _tensor_problem(payload.content.tensors, specs)


def scores_problem(reply: Reply, round: int, clients: Collection[str], headline: Metric) -> str | None:
    """Return what is wrong with the answer to an assessment, or None: nobody's mean may be spoiled by one client.

    Args:
        reply: What came.
        round: Of the assessment.
        clients: Who was asked.
        headline: The score that must be there, from 0 to 1, with what is recorded beside it and nothing else.
    """
    if reply.client not in clients:
        return f"was not asked{closest(reply.client, clients)}"
    try:
        payload = Payload.from_bytes(reply.upload)
    except EmberfedError as error:
        return str(error)
    if (payload.client, payload.round) != (reply.client, round):
        return f"payload says it comes from {payload.client!r} in round {payload.round}"
    scores = payload.content.meta.get(SCORES)
    if payload.content.tensors or not isinstance(scores, dict):
        return "the answer must hold scores and no tensors"
    beside = [metric.key for metric in recorded_with(headline) if metric != headline]
    foreign = sorted(set(scores) - {headline.key, *beside, "examples"})
    if foreign:
        return f"foreign score {_short(foreign[0])}"
    value: Json = scores.get(headline.key)
    examples: Json = scores.get("examples")
    if type(value) not in (int, float) or not 0 <= value <= 1:
        return f"{headline.key!r} must be a number from 0 to 1, found {_short(value)}"
    for key in beside:
        figure: Json = scores.get(key)
        if figure is not None and (type(figure) not in (int, float) or not 0 <= figure < _LARGEST_FIGURE):
            return f"{key!r} must be null or a number from 0 below {_LARGEST_FIGURE:g}, found {_short(figure)}"
    if type(examples) is not int or not 1 <= examples <= _LARGEST_COUNT:
        return f"'examples' must be a whole number from 1 to {_LARGEST_COUNT}, found {_short(examples)}"
    return None
