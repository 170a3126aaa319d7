"""One layer of the sparse adapter as the two ways to compute it see it: what goes in, what is kept, what comes back.

Shapes: T tokens, K active experts, S routed pairs, M experts, D hidden, H hidden size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, final

import torch
from torch.nn import functional as F

from emberfed.models.dispatch import Dispatch
from emberfed.models.low_rank import Factors

Activation = Literal["gelu", "relu", "silu"]


@final
@dataclass(frozen=True, slots=True)
class ActivationFunction:
    """An activation and its derivative, written out: for few rows autograd costs more than the maths.

    Attributes:
        forward: From x to the activation.
        backward: From the activation's gradient and x to the gradient of x.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


ACTIVATIONS: Mapping[Activation, ActivationFunction] = {
    "gelu": ActivationFunction(F.gelu, torch.ops.aten.gelu_backward),
    "relu": ActivationFunction(F.relu, lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0)),
    "silu": ActivationFunction(F.silu, torch.ops.aten.silu_backward),
}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """One layer's experts, and what goes to them.

    Attributes:
        factors: W_down as A (M, H, D) and W_up as B (M, D, H), of scale 1.
        activation: Between the two.
        dispatch: Which rows go where.
    """

    factors: Factors
    activation: ActivationFunction
    dispatch: Dispatch


@final
@dataclass(frozen=True, slots=True, eq=False)
class ExpertGradients:
    """What backward returns.

    Attributes:
        x_TD: Of the hidden states, float32 or wider; None if not asked for.
        gates_TK: Of the gate's weights.
        down_MHD: Of W_down, sparse over experts; None if it is not trained.
        up_MDH: Of W_up, likewise.
    """

    x_TD: torch.Tensor | None
    gates_TK: torch.Tensor
    down_MHD: torch.Tensor | None
    up_MDH: torch.Tensor | None


class AdapterWay(Protocol):
    """A way to compute the experts of a layer: a module with these two functions."""

    def forward(
        self, experts: Experts, x_TD: torch.Tensor, gates_TK: torch.Tensor, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum over each token's experts, weighted by `gates_TK`, (T, D) in float32 or wider.

        Also what backward is given: W_down x of each routed pair, (S, H), in the type of `x_TD`.
        """
        ...

    def backward(
        self,
        experts: Experts,
        x_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        pre_SH: torch.Tensor,
        dout_TD: torch.Tensor,
        wants_input: bool,
        /,
    ) -> ExpertGradients:
        """Return the gradients; those of the hidden states only if `wants_input`."""
        ...
