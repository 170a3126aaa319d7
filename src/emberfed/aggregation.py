"""Aggregation as pure functions on named tensors. Inputs are never changed; sums run in the order given, in fp32.

Tensors of clients are asked for one at a time where the sum allows it, so they may be read from disk and the server's
memory does not grow with the number of clients.

Shape suffixes: C clients, L layers, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from emberfed.errors import AggregationError
from emberfed.factors import Pair, cut

Frequency = Literal["per_token", "per_activation", "per_activation_over_k"]
"""How often an expert was used by a client; see `activation_frequency`."""

FREQUENCIES: tuple[Frequency, ...] = get_args(Frequency)

LARGEST_VALUE = 1e15
"""Of a tensor that is to be aggregated: products of larger ones would overflow in float32."""

Unused = Literal["keep", "average"]
"""What becomes of an expert that no client used."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one client brings to an aggregation.

    Attributes:
        client: Its name, for messages.
        tensors: By name. `<path>.lora_A` (..., R, in) and `<path>.lora_B` (..., out, R) are a LoRA pair, which adapts a
            weight by alpha / R * B A with one alpha for all clients; so are names as PEFT writes them (`lora_factor`).
            Anything else is a tensor on its own.
        examples: Training examples, n_c.
        tokens: Tokens it trained on, for activation-aware weights.
        top_k: Experts it activated per token, for activation-aware weights.
        activations: (E,) (token, slot) assignments to each expert, by the part of the path that the names of the
            tensors stacked over those experts, (E, ...), begin with.
    """

    client: str
    tensors: Mapping[str, Tensor]
    examples: int
    tokens: int | None = None
    top_k: int | None = None
    activations: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))


@final
@dataclass(frozen=True, slots=True)
class ActivationRule:
    """How much an expert's use weighs: the reading of frequency, and its exponent."""

    frequency: Frequency
    temperature: float


def data_weights(examples_C: Tensor) -> Tensor:
    """Return p_c = n_c / sum n, float64 (C,): weights of data-size averaging (FedAvg).

    Raises: ValueError if a size is not positive.
    """
    examples_C = examples_C.to(torch.float64)
    if not bool((examples_C > 0).all()):
        raise ValueError(f"example counts must be positive, found {examples_C.tolist()}")
    return examples_C / examples_C.sum()


def activation_frequency(counts_CLE: Tensor, tokens_C: Tensor, top_k_C: Tensor, rule: Frequency) -> Tensor:
    """Return f_{i,c}, float64 (C, L, E): how much of its work client c gave to expert i of each layer.

    Args:
        counts_CLE: (token, slot) assignments, padding excluded.
        tokens_C: Tokens each client trained on, n_c.
        top_k_C: Experts each client activated per token, K_c.
        rule: `per_token` a / n_c (FLAME), `per_activation` a / sum_j a_j,
            `per_activation_over_k` a / (K_c sum_j a_j) (A3SMoE eq. 7 as printed).

    A client without a single activation in a layer has frequency 0 there.
    """
    counts_CLE = counts_CLE.to(torch.float64)
    total_CL1 = counts_CLE.sum(dim=-1, keepdim=True).clamp(min=1.0)
    if rule == "per_token":
        return counts_CLE / tokens_C.to(torch.float64).clamp(min=1.0)[:, None, None]
    if rule == "per_activation":
        return counts_CLE / total_CL1
    return counts_CLE / total_CL1 / top_k_C.to(torch.float64)[:, None, None]


def expert_weights(shares_C: Tensor, frequency_CLE: Tensor, temperature: float) -> Tensor:
    """Return w_{c,l,i} proportional to p_c f_{i,c}^temperature, summing to 1 over clients, float64 (C, L, E).

    A3SMoE eq. 7, normalised per (layer, expert). Temperature 0 is data-size averaging. Where no client used an
    expert, all its weights are 0: the caller keeps the previous value (`mean_per_expert` does).
    """
    # Dividing by the largest frequency first keeps small numbers to a high power away from underflow.
    peak_1LE = frequency_CLE.amax(dim=0, keepdim=True)
    relative_CLE = frequency_CLE / torch.where(peak_1LE > 0, peak_1LE, torch.ones_like(peak_1LE))
    raw_CLE = shares_C.to(torch.float64)[:, None, None] * relative_CLE**temperature * (peak_1LE > 0)
    total_1LE = raw_CLE.sum(dim=0, keepdim=True)
    return raw_CLE / torch.where(total_1LE > 0, total_1LE, torch.ones_like(total_1LE))


@final
class Weights:
    """The share of each client in each tensor, by the tensor's name. Shares of a tensor sum to 1 over clients.

    Attributes:
        shares_C: Shares of data-size averaging, float64.
    """

    def __init__(self, updates: Sequence[Update], rule: ActivationRule | None = None, unused: Unused = "keep") -> None:
        """Weigh clients by data size; experts, where `rule` says how, by their use too (A3SMoE eq. 7, FLAME).

        Args:
            updates: At least one.
            rule: How the use of an expert weighs; None: not at all.
            unused: An expert that nobody used has weight 0 under `keep`, whatever the rule, so that it can keep what it
                was; its data-size shares under `average`, for callers who do not know what it was.

        Raises: AggregationError if there is no update, a size is not positive, or a rule lacks what it weighs by.
        """
        if not updates:
            raise AggregationError("there are no updates to put together; give at least one")
        for update in updates:
            if update.examples < 1:
                raise AggregationError(f"{update.client}: examples must be at least 1, found {update.examples}")
        self.shares_C = data_weights(torch.tensor([update.examples for update in updates], dtype=torch.float64))
        self._experts_CE = _expert_shares(updates, self.shares_C, rule)
        if unused == "average":
            self._experts_CE = {
                prefix: torch.where(shares_CE.sum(dim=0) > 0, shares_CE, self.shares_C[:, None])
                for prefix, shares_CE in self._experts_CE.items()
            }

    def of(self, name: str) -> Tensor:
        """Return the shares in a tensor, float64: (C,), or (C, E) if it is stacked over experts whose use is known."""
        prefix = _prefix(self._experts_CE, name)
        return self.shares_C if prefix is None else self._experts_CE[prefix]

    def used(self, name: str) -> Tensor | None:
        """Return which experts of a tensor have a weight, bool (E,); None if it has none, or their use is not known."""
        prefix = _prefix(self._experts_CE, name)
        return None if prefix is None else self._experts_CE[prefix].sum(dim=0) > 0


def _prefix(prefixes: Iterable[str], name: str) -> str | None:
    """Return what a name begins with, whole parts of its path only: `layers.1` is not what `layers.10` begins with."""
    return next((prefix for prefix in prefixes if name.startswith(f"{prefix.removesuffix('.')}.")), None)


def _expert_shares(updates: Sequence[Update], shares_C: Tensor, rule: ActivationRule | None) -> dict[str, Tensor]:
    """Return the shares in stacked tensors, (C, E), by prefix of their names. Raises: AggregationError."""
    prefixes = sorted(updates[0].activations)
    for update in updates:
        if sorted(update.activations) != prefixes:
            raise AggregationError(
                f"{update.client} counted activations of {sorted(update.activations)}, {updates[0].client} of "
                f"{prefixes}; all clients must have the same layers with experts"
            )
        if rule is not None and (not prefixes or update.tokens is None or update.top_k is None):
            raise AggregationError(
                f"{update.client}: activation-aware weights need activations, tokens and top_k; give them, or weigh by "
                f"data"
            )
        if (update.tokens or 0) < 0 or (update.top_k is not None and update.top_k < 1):
            raise AggregationError(
                f"{update.client}: tokens must be at least 0 and top_k at least 1, found {update.tokens} and "
                f"{update.top_k}"
            )
        for prefix, counts_E in update.activations.items():
            if not bool((torch.isfinite(counts_E) & (counts_E >= 0)).all()):
                raise AggregationError(
                    f"{update.client}: activations of {prefix!r} must be counts, found {counts_E.tolist()}"
                )
    shares = {}
    for prefix in prefixes:
        sizes = {tuple(update.activations[prefix].shape) for update in updates}
        if len(sizes) > 1 or len(next(iter(sizes))) != 1:
            raise AggregationError(f"activations of {prefix!r} must be one (experts,) for all, found {sorted(sizes)}")
        counts_C1E = torch.stack([update.activations[prefix] for update in updates])[:, None]
        frequency_C1E = (counts_C1E.sum(dim=0, keepdim=True) > 0).expand(counts_C1E.shape).to(torch.float64)
        if rule is not None:
            tokens_C = torch.tensor([update.tokens for update in updates])
            top_k_C = torch.tensor([update.top_k for update in updates])
            frequency_C1E = activation_frequency(counts_C1E, tokens_C, top_k_C, rule.frequency)
        shares[prefix] = expert_weights(shares_C, frequency_C1E, 0.0 if rule is None else rule.temperature)[:, 0]
    return shares


def unused(previous: Mapping[str, Tensor] | None) -> Unused:
    """Return what can become of an expert nobody used, when this is known of what it was."""
    return "average" if previous is None else "keep"


def average(updates: Sequence[Update], weights: Weights, previous: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the weighted mean of every tensor, by sorted name. A and B of a LoRA are averaged separately.

    Args:
        updates: All with the same names and shapes.
        weights: Of these updates.
        previous: What the clients began with: an expert with weight 0 keeps its bits.

    Raises: AggregationError if names or shapes differ.
    """
    return {name: average_one(updates, name, weights, previous) for name in common_names(updates)}


def average_one(
    updates: Sequence[Update], name: str, weights: Weights, previous: Mapping[str, Tensor] | None
) -> Tensor:
    """Return the weighted mean of one tensor, as `average`."""
    shares = weights.of(name)
    if shares.dim() == 1:
        return mean(received(updates, name), shares)
    before = updates[0].tensors[name] if previous is None else _before(previous, name)
    if before.shape != (shape := updates[0].tensors[name].shape):
        raise AggregationError(
            f"{updates[0].client}: {name!r} has shape {tuple(shape)}, but {tuple(before.shape)} in previous"
        )
    return mean_per_expert(before, received(updates, name), shares)


def common_names(updates: Sequence[Update]) -> list[str]:
    """Return the names of the updates' tensors, sorted. Raises: AggregationError if they differ between clients."""
    first = updates[0]
    for update in updates[1:]:
        odd = sorted(set(update.tensors) ^ set(first.tensors))
        if odd:
            having, lacking = (update, first) if odd[0] in update.tensors else (first, update)
            raise AggregationError(
                f"{having.client} sent {odd[0]!r}, which {lacking.client} did not; all clients must train the same "
                f"adapter"
            )
    return sorted(first.tensors)


def received(updates: Sequence[Update], name: str) -> Iterator[Tensor]:
    """Yield one tensor of each client, in order. Raises: AggregationError at the first whose shape does not fit."""
    expected: torch.Size | None = None
    for update in updates:
        tensor = update.tensors[name]
        expected = tensor.shape if expected is None else expected
        if tensor.shape != expected:
            raise AggregationError(
                f"{update.client}: {name!r} has shape {tuple(tensor.shape)}, {updates[0].client} sent "
                f"{tuple(expected)}; this can only be averaged in equal shapes (use a method that mixes ranks)"
            )
        _check_experts(update, name, tensor.shape[:1])
        yield tensor


class LoraFactor(NamedTuple):
    """Which factor of a LoRA a tensor is, `A` or `B`, and the name of the other one."""

    letter: Literal["A", "B"]
    partner: str


def lora_factor(name: str) -> LoraFactor | None:
    """Return what factor a tensor of that name is; None if it is none.

    The part `lora_A` or `lora_B` says so (PEFT's embeddings: `lora_embedding_A`), never a shape. What follows is kept:
    PEFT's `.weight`, or `.<adapter>.weight`. A bias is no factor.
    """
    found = re.fullmatch(r"((?:.+\.)?lora_(?:embedding_)?)([AB])((?:\.[^.]+)*?)(?<!\.bias)", name)
    if found is None:
        return None
    before, letter, after = found.groups()
    return LoraFactor("A", f"{before}B{after}") if letter == "A" else LoraFactor("B", f"{before}A{after}")


def _b_of(a_name: str) -> str:
    factor = lora_factor(a_name)
    assert factor is not None, "pairs go by the names of their A"
    return factor.partner


def lora_paths(updates: Sequence[Update]) -> tuple[list[str], list[str]]:
    """Return the names of the LoRA pairs' A, by which pairs go, and of all tensors that are no factors; both sorted.

    Raises: AggregationError if names differ between clients, or a factor is alone.
    """
    return _lora_paths(common_names(updates))


def _lora_paths(names: Sequence[str]) -> tuple[list[str], list[str]]:
    factors = {name: factor for name in names if (factor := lora_factor(name)) is not None}
    for name, factor in factors.items():
        if factor.partner not in factors:
            raise AggregationError(f"{name!r} is there without {factor.partner!r}; the factors of a LoRA go together")
    return [name for name, factor in factors.items() if factor.letter == "A"], [n for n in names if n not in factors]


def received_pairs(updates: Sequence[Update], a_name: str) -> Iterator[Pair]:
    """Yield one LoRA pair of each client, in order; ranks may differ between clients, other sizes may not.

    Raises: AggregationError at the first that does not fit.
    """
    first: Pair | None = None
    for update in updates:
        pair = Pair(update.tensors[a_name], update.tensors[_b_of(a_name)])
        if not _is_pair(pair):
            raise AggregationError(
                f"{update.client}: {a_name!r} has shape {tuple(pair.a.shape)} and its lora_B {tuple(pair.b.shape)}; "
                f"expected (..., R, in) and (..., out, R)"
            )
        first = pair if first is None else first
        _check_same_weight(f"{update.client}: {a_name!r}", pair, f"{updates[0].client}'s", first)
        _check_experts(update, a_name, pair.a.shape[:-2])
        yield pair


def previous_pair(
    updates: Sequence[Update], a_name: str, previous: Mapping[str, Tensor] | None, rank: int | None = None
) -> Pair:
    """Return a LoRA pair as it was; zeros of the largest rank of any client, or of `rank`, if that is not known.

    Raises: AggregationError if it is known, but of another weight or rank.
    """
    if previous is None:
        largest = max(pair.rank for pair in received_pairs(updates, a_name)) if rank is None else rank
        a, b = next(received_pairs(updates, a_name))
        return Pair(a.new_zeros(*a.shape[:-2], largest, a.shape[-1]), b.new_zeros(*b.shape[:-1], largest))
    before = Pair(_before(previous, a_name), _before(previous, _b_of(a_name)))
    if not _is_pair(before) or rank not in (None, before.rank):
        raise AggregationError(
            f"previous {a_name!r} has shape {tuple(before.a.shape)} and its lora_B {tuple(before.b.shape)}; "
            f"expected (..., R, in) and (..., out, R){'' if rank is None else f' of rank {rank}'}"
        )
    _check_same_weight(
        f"{updates[0].client}: {a_name!r}", next(received_pairs(updates, a_name)), "that of previous", before
    )
    return before


def named(a_name: str, pair: Pair) -> dict[str, Tensor]:
    """Return a LoRA pair's tensors by name."""
    return {a_name: pair.a, _b_of(a_name): pair.b}


def _before(previous: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in previous:
        raise AggregationError(f"previous lacks {name!r}, which the clients sent; give all they began with, or nothing")
    return previous[name]


def _is_pair(pair: Pair) -> bool:
    """Tell whether two factors have one rank and one stack of experts."""
    return (
        min(pair.a.dim(), pair.b.dim()) >= 2
        and pair.rank == pair.b.shape[-1]
        and pair.a.shape[:-2] == pair.b.shape[:-2]
    )


def _check_same_weight(where: str, pair: Pair, whose: str, other: Pair) -> None:
    """Check that two pairs adapt weights of one shape. Raises: AggregationError."""
    if (pair.b.shape[:-1], pair.a.shape[-1]) != (other.b.shape[:-1], other.a.shape[-1]):
        raise AggregationError(
            f"{where} has shape {tuple(pair.a.shape)} and its lora_B {tuple(pair.b.shape)}, which is of another weight "
            f"than {whose} {tuple(other.a.shape)} and {tuple(other.b.shape)}; only ranks may differ"
        )


def _check_experts(update: Update, name: str, stacked: torch.Size) -> None:
    """Check that a tensor is stacked over as many experts as were counted. Raises: AggregationError."""
    prefix = _prefix(update.activations, name)
    if prefix is not None and update.activations[prefix].shape != stacked:
        raise AggregationError(
            f"{update.client}: {name!r} is stacked over {tuple(stacked)}, but activations of {prefix!r} were counted "
            f"for {tuple(update.activations[prefix].shape)}; they are for tensors (experts, ...)"
        )


def redistribute(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return a global adapter cut to a client's rank: the first components of each LoRA, at their share in the weights.

    For HetLoRA and FlexLoRA. Other tensors are as they were.

    Raises: AggregationError if the rank is below 1, or above a LoRA's, or a factor is alone.
    """
    a_names, others = _lora_paths(sorted(tensors))
    result = {name: tensors[name] for name in others}
    for a_name in a_names:
        pair = Pair(tensors[a_name], tensors[_b_of(a_name)])
        if not 1 <= rank <= pair.rank:
            raise AggregationError(
                f"rank {rank} cannot be cut from {a_name!r} of rank {pair.rank}; choose 1 to {pair.rank}"
            )
        result |= named(a_name, cut(pair, rank))
    return dict(sorted(result.items()))


def mean(tensors: Iterable[Tensor], weights_C: Tensor) -> Tensor:
    """Return sum_c w_c x_c, accumulated in fp32 in the given order, in the dtype of the first tensor.

    `tensors` may be a generator: one client's tensor is in memory at a time.
    """
    total: Tensor | None = None
    dtype = torch.float32
    for tensor, weight in zip(tensors, weights_C.tolist(), strict=True):
        if total is None:
            total, dtype = tensor.to(torch.float32) * weight, tensor.dtype
        else:
            total.add_(tensor.to(torch.float32), alpha=weight)
    if total is None:
        raise ValueError("nothing to average: no tensors were given")
    return total.to(dtype)


def mean_per_expert(previous: Tensor, tensors: Iterable[Tensor], weights_CE: Tensor) -> Tensor:
    """Return, for a stacked tensor (E, ...), each expert's own weighted mean over clients.

    An expert whose weights are all 0 (nobody used it) keeps the bits of `previous`.
    """
    total = torch.zeros_like(previous, dtype=torch.float32)
    weights_CE = weights_CE.to(torch.float32)
    wide = (-1, *[1] * (previous.dim() - 1))
    for tensor, weights_E in zip(tensors, weights_CE.unbind(), strict=True):
        total.addcmul_(tensor.to(torch.float32), weights_E.view(wide).to(total.device))
    total, unused_E = total.to(previous.dtype), ~(weights_CE > 0).any(dim=0)
    total[unused_E] = previous[unused_E]
    return total


def mean_of_holders(
    previous: Tensor, held: Sequence[Sequence[int]], weights_C: Tensor, tensors: Iterable[Tensor]
) -> Tensor:
    """Return, for a stacked tensor (E, ...), each expert's own weighted mean over the clients that hold it.

    For clients that send some of the experts each (FLUX). A weight counts relative to those of the expert's other
    holders, so an expert of one client is exactly that client's. An expert that nobody holds keeps the bits of
    `previous`. Sums run in the order given, in fp32.

    Args:
        previous: What the experts were.
        held: Of each client, the ids of its n experts, ascending.
        weights_C: Of each client, above 0: its examples, for averaging by data size.
        tensors: Of each client, (n, ...); may be a generator: one client's tensor is in memory at a time.

    Raises: AggregationError if ids are not ascending ids of experts, a weight is not positive, or a shape does not fit.
    """
    experts = len(previous)
    weights_CE = torch.zeros(len(held), experts, dtype=torch.float64)
    for client, (ids, weight) in enumerate(zip(held, weights_C.tolist(), strict=True)):
        if list(ids) != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < experts):
            raise AggregationError(
                f"update {client} is of experts {list(ids)}; ids must ascend within 0..{experts - 1}"
            )
        if not 0 < weight < math.inf:
            raise AggregationError(f"update {client} has weight {weight:g}; a weight must be positive and finite")
        weights_CE[client, list(ids)] = weight
    total_E = weights_CE.sum(dim=0)
    shares_CE = (weights_CE / total_E.where(total_E > 0, 1)).to(torch.float32)
    sums = torch.zeros_like(previous, dtype=torch.float32)
    for client, (ids, shares_E, tensor) in enumerate(zip(held, shares_CE.unbind(), tensors, strict=True)):
        if tensor.shape != (expected := (len(ids), *previous.shape[1:])):
            raise AggregationError(f"update {client} has shape {tuple(tensor.shape)}; expected {tuple(expected)}")
        index_n = torch.tensor(ids, dtype=torch.int64, device=sums.device)
        wide_n = shares_E.to(sums.device)[index_n].view(-1, *[1] * (previous.dim() - 1))
        sums[index_n] = sums[index_n].addcmul(tensor.to(torch.float32), wide_n)
    result, nobody_E = sums.to(previous.dtype), (total_E == 0).to(sums.device)
    result[nobody_E] = previous[nobody_E]
    return result
