"""Aggregation as pure functions on tensors. Inputs are never changed; sums run in client order, in fp32.

Shape suffixes: C clients, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

Frequency = Literal["per_token", "per_activation", "per_activation_over_k"]
"""How often an expert was used by a client; see `activation_frequency`."""

FREQUENCIES: tuple[Frequency, ...] = get_args(Frequency)


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


def mean(tensors: Iterable[Tensor], weights_C: Tensor) -> Tensor:
    """Return sum_c w_c x_c, accumulated in fp32 in the given order, in the dtype of the first tensor.

    `tensors` may be a generator: one client's tensor is in memory at a time.
    """
    total: Tensor | None = None
    dtype = torch.float32
    for tensor, weight in zip(tensors, weights_C.tolist(), strict=True):
        if total is None:
            total, dtype = torch.zeros_like(tensor, dtype=torch.float32), tensor.dtype
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
    used_E = (weights_CE > 0).any(dim=0).view(wide)
    return torch.where(used_E, total.to(previous.dtype), previous)
