"""One layer of experts as the two ways to compute it see it: what goes in, what is kept, what comes back.

LoRA and matrices trained in full may be those of the first n experts only; experts from n on are the frozen base.

Shapes: N rows of one expert, T tokens, K active experts, S routed pairs, D hidden, F expert hidden, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, final

import torch

from emberfed.models.dispatch import Dispatch
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.low_rank import INPUT_SIDE, OUTPUT_SIDE, Factors, stacks_of


@final
@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer's experts, and what goes to them.

    Attributes:
        weights: The frozen base.
        lora: By matrix, of the first n experts; matrices without LoRA are absent.
        dispatch: Which rows go where.
        full: By matrix, (n, out, in): what the first n experts have in the place of the base's; absent where it is the
            base's.
    """

    weights: ExpertWeights
    lora: Mapping[str, Factors]
    dispatch: Dispatch
    full: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def lora_of(self, expert: int) -> Mapping[str, Factors]:
        """Return the LoRA of the matrices of this expert that have any."""
        return {matrix: factors for matrix, factors in self.lora.items() if expert < len(factors.a_ERI)}

    def full_of(self, expert: int) -> Mapping[str, torch.Tensor]:
        """Return this expert's own matrices (out, in)."""
        return {matrix: stack[expert] for matrix, stack in self.full.items() if expert < len(stack)}

    def gate_up(self, expert: int) -> torch.Tensor:
        """Return (D, 2F), without LoRA."""
        return gate_up_with(self.weights, expert, self.full_of(expert))

    def down(self, expert: int) -> torch.Tensor:
        """Return (F, D), without LoRA."""
        return down_with(self.weights, expert, self.full_of(expert))

    def stacks(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return all that can be trained by (matrix, "A" | "B" | "weight")."""
        return {**stacks_of(self.lora), **{(matrix, "weight"): stack for matrix, stack in self.full.items()}}


def gate_up_with(weights: ExpertWeights, expert: int, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return an expert's gate and up, (D, 2F), in the type of the computation.

    Args:
        weights: The base; not read for what `own` has.
        expert: Which.
        own: gate_proj (F, D), up_proj (F, D): what takes the place of the base's.
    """
    changed = [matrix for matrix in INPUT_SIDE if matrix in own]
    if not changed:
        return weights.gate_up(expert)
    if len(changed) == len(INPUT_SIDE):
        gate_up_D2F = own[changed[0]].new_empty(weights.gate_up_size, own[changed[0]].shape[1], dtype=weights.dtype).t()
    else:
        gate_up_D2F = weights.gate_up(expert).clone()
    for matrix in changed:
        weights.half(matrix, gate_up_D2F).copy_(own[matrix].detach().t())
    return gate_up_D2F


def down_with(weights: ExpertWeights, expert: int, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return an expert's down, (F, D), as `gate_up_with`."""
    return own[OUTPUT_SIDE].detach().to(weights.dtype).t() if OUTPUT_SIDE in own else weights.down(expert)


def matrix_of(weights: ExpertWeights, expert: int, matrix: str) -> torch.Tensor:
    """Return one of the base's three matrices, (in, out): a view where it is stored in the type of the computation."""
    return weights.down(expert) if matrix == OUTPUT_SIDE else weights.half(matrix, weights.gate_up(expert))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What forward keeps for backward, one row per routed pair.

    Attributes:
        pre_S2F: Gate and up with their LoRA, before the activation.
        low: scale * x A', (S of the experts with LoRA, which are the first rows, R), of each matrix with LoRA.
    """

    pre_S2F: torch.Tensor
    low: Mapping[str, torch.Tensor]

    @staticmethod
    def room(layer: Layer, like: torch.Tensor) -> Kept:
        """Return it unfilled, in the type and on the device of `like`."""
        low = {
            matrix: like.new_empty(_pairs_of_first(len(factors.a_ERI), layer.dispatch), factors.a_ERI.shape[1])
            for matrix, factors in layer.lora.items()
        }
        return Kept(like.new_empty(len(layer.dispatch.pair_S), layer.weights.gate_up_size), low)

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
        factors: Of stacks by (matrix, "A" | "B" | "weight"), sparse over experts; those not trained are absent.
    """

    hidden_TD: torch.Tensor | None
    gates_TK: torch.Tensor
    factors: Mapping[tuple[str, str], torch.Tensor]


def _pairs_of_first(experts: int, dispatch: Dispatch) -> int:
    """Return how many routed pairs the first experts got."""
    if experts == len(dispatch.loads_E):
        return len(dispatch.pair_S)
    return int(dispatch.loads_E[:experts].sum())


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
