"""One layer of experts as the two ways to compute it see it: what goes in, what is kept, what comes back.

Shapes: N rows of one expert, T tokens, K active experts, S routed pairs, D hidden, F expert hidden, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch

from emberfed.models.dispatch import Dispatch
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.low_rank import Factors


@final
@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer's experts, and what goes to them.

    Attributes:
        weights: The frozen base.
        lora: By matrix; those without LoRA are absent.
        dispatch: Which rows go where.
    """

    weights: ExpertWeights
    lora: Mapping[str, Factors]
    dispatch: Dispatch


@final
@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What forward keeps for backward, one row per routed pair.

    Attributes:
        pre_S2F: Gate and up with their LoRA, before the activation.
        low: scale * x A', (S, R), of each matrix with LoRA.
    """

    pre_S2F: torch.Tensor
    low: Mapping[str, torch.Tensor]

    @staticmethod
    def room(layer: Layer, like: torch.Tensor) -> Kept:
        """Return it unfilled, in the type and on the device of `like`."""
        rows = len(layer.dispatch.pair_S)
        low = {matrix: like.new_empty(rows, factors.a_ERI.shape[1]) for matrix, factors in layer.lora.items()}
        return Kept(like.new_empty(rows, layer.weights.gate_up_size), low)

    def put(self, rows: slice, pre_N2F: torch.Tensor, low: Mapping[str, torch.Tensor]) -> None:
        """Fill the rows of one expert."""
        self.pre_S2F[rows] = pre_N2F
        for matrix, low_NR in low.items():
            self.low[matrix][rows] = low_NR


@final
class Nothing:
    """Stands in for `Kept` where no backward pass follows."""

    def put(self, rows: slice, pre_N2F: torch.Tensor, low: Mapping[str, torch.Tensor]) -> None:
        """Keep nothing."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """What backward returns.

    Attributes:
        hidden_TD: Of the hidden states, or None if not asked for.
        gates_TK: Of the router's weights.
        factors: Of A and B by (matrix, "A" | "B"), sparse over experts; those not trained are absent.
    """

    hidden_TD: torch.Tensor | None
    gates_TK: torch.Tensor
    factors: Mapping[tuple[str, str], torch.Tensor]


class Way(Protocol):
    """A way to compute a layer: a module with these two functions."""

    def forward(
        self, layer: Layer, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, keep: Kept | Nothing, /
    ) -> torch.Tensor:
        """Return the sum over each token's experts, weighted by `gates_TK`: (T, D)."""
        ...

    def backward(
        self,
        layer: Layer,
        hidden_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        kept: Kept,
        dout_TD: torch.Tensor,
        wants_input: bool,
        /,
    ) -> Gradients:
        """Return the gradients; those of the hidden states only if `wants_input`."""
        ...
