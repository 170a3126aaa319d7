"""Penalties on the adapter in local training, as gradients added to the loss's own.

Their gradients are written out, not left to autograd: only what has a gradient in a step gets one from a penalty too.
An expert that no token reached keeps its bits, and costs nothing.

Shapes: E experts of a stacked tensor, U of them with a gradient, R rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from emberfed.models.groups import Gradient


class Penalty(ABC):
    """A term of the loss that depends on the adapter alone."""

    @abstractmethod
    def add_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Add the penalty's gradient, at the parameters' present values, to `values` of each gradient in place."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ProximalPenalty(Penalty):
    """mu/2 ||w - anchor||^2 (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", FedProx, eq. 2).

    Attributes:
        anchor: By name, tensors of the parameters' shapes.
        mu: Its weight, at least 0.
    """

    anchor: Mapping[str, Tensor]
    mu: float

    def __post_init__(self) -> None:
        """Check the weight. Raises: ValueError."""
        _check_weight("mu", self.mu)

    @classmethod
    def around(cls, parameters: Mapping[str, Tensor], mu: float) -> Self:
        """Return the penalty on leaving the parameters' present values, which are copied."""
        return cls({name: parameter.detach().clone() for name, parameter in parameters.items()}, mu)

    def add_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Add mu (w - anchor)."""
        for gradient in gradients:
            away = gradient.rows_of(gradient.parameter) - gradient.rows_of(self.anchor[gradient.name])
            gradient.values.add_(away, alpha=self.mu)


@final
@dataclass(frozen=True, slots=True, eq=False)
class TailPenalty(Penalty):
    """HetLoRA's regulariser (Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
    Models", rank self-pruning): weight times the sum over pairs, and over the experts of a stacked pair, of
    ||B[:, k:]||_F ||A[k:, :]||_F, with k the kept rank.

    A norm of zero, where this has no gradient, counts as one that is zero.

    Attributes:
        kept_rank: k, at least 0; from the rank of a pair on, there is no tail.
        weight: lambda, at least 0.
    """

    kept_rank: int
    weight: float

    def __post_init__(self) -> None:
        """Check rank and weight. Raises: ValueError."""
        _check_kept(self.kept_rank)
        _check_weight("weight", self.weight)

    def add_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Add weight ||B'|| A' / ||A'|| to the tail A' of A, and likewise for B.

        Raises: ValueError if only one factor of a pair has a gradient.
        """
        by_name = {gradient.name: gradient for gradient in gradients}
        for name_a, name_b in _pairs(by_name):
            a, b = by_name[name_a], by_name[name_b]
            tail_a = a.rows_of(_tail_of_a(a.parameter, self.kept_rank))
            tail_b = b.rows_of(_tail_of_b(b.parameter, self.kept_rank))
            norm_a, norm_b = _norms(tail_a), _norms(tail_b)
            _tail_of_a(a.values, self.kept_rank).addcmul_(tail_a, _ratio(norm_b, norm_a), value=self.weight)
            _tail_of_b(b.values, self.kept_rank).addcmul_(tail_b, _ratio(norm_a, norm_b), value=self.weight)


def tail_product(tensors: Mapping[str, Tensor], kept_rank: int) -> float:
    """Return the sum that `TailPenalty` weighs, over all pairs and experts, in float64. HetLoRA prunes where it shrank.

    Args:
        tensors: An adapter; what is no LoRA factor does not count.
        kept_rank: k, at least 0.

    Raises: ValueError if a factor stands alone, or the rank is negative.
    """
    _check_kept(kept_rank)
    products = []
    for name_a, name_b in _pairs(tensors):
        norm_a = _norms(_tail_of_a(tensors[name_a], kept_rank).double())
        norm_b = _norms(_tail_of_b(tensors[name_b], kept_rank).double())
        products.append(float((norm_a * norm_b).sum()))
    return math.fsum(products)


def _tail_of_a(a: Tensor, kept_rank: int) -> Tensor:
    return a[..., kept_rank:, :]


def _tail_of_b(b: Tensor, kept_rank: int) -> Tensor:
    return b[..., kept_rank:]


def _norms(matrices: Tensor) -> Tensor:
    """Frobenius norms, (..., 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    return norms


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the names of A and B of each LoRA, sorted. Raises: ValueError if one stands alone."""
    found = set(names)
    paths = {path for path, _, factor in (name.rpartition(".") for name in found) if factor in ("lora_A", "lora_B")}
    pairs = [(f"{path}.lora_A", f"{path}.lora_B") for path in sorted(paths)]
    for name in (name for pair in pairs for name in pair):
        if name not in found:
            raise ValueError(f"{name!r} is missing; lora_A and lora_B of a pair belong together")
    return pairs


def _check_kept(kept_rank: int) -> None:
    if kept_rank < 0:
        raise ValueError(f"the kept rank must be at least 0, found {kept_rank}")


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, found {weight}")
