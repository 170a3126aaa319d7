"""Routed expert LoRA: each expert's low-rank part is computed for the tokens routed to it, and for no others.

Registered with transformers as the experts implementation `emberfed_routed`, so that time and memory of forward and
backward passes fall with the number of active experts. PEFT's own LoRA on fused experts builds base + BA for all of
them on every forward pass, keeps it, and forms dense gradients.

The first n experts of a layer may have LoRA, or matrices trained in full, and the others be the frozen base: those cost
nothing for it. In a compact model they are what a client tunes.

Two ways compute it, and one rule chooses: experts are taken in grouped products (`grouped`) on CUDA devices that have
them, if the base is held in 16 bits and all experts have LoRA, or none; everything else goes expert by expert
(`per_expert`). On CPUs the computation is
in float32 whatever the base is held in, since most CPUs are far slower in 16 bits; on CUDA it is in autocast's type
inside autocast, else in the base's. Factors and their gradients are float32 always.

A layer is one autograd node. Gradients of stacked tensors are sparse over experts: those without tokens have none.
`torch.compile` leaves the experts out, since how many rows each gets is data: `fullgraph=True` is impossible.

Shapes: T tokens, K active experts, D hidden, F expert hidden, E experts, n of them trained, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from emberfed.models import grouped, per_expert
from emberfed.models.dispatch import Dispatch
from emberfed.models.expert_layer import Kept, Layer, Nothing, Way
from emberfed.models.expert_weights import ExpertsModule, ExpertWeights
from emberfed.models.low_rank import paired

IMPLEMENTATION = "emberfed_routed"
MATRICES = ("gate_proj", "up_proj", "down_proj")
_GROUPED_CAPABILITY = (8, 0)
_HALF = (torch.bfloat16, torch.float16)


@final
class ExpertLora(nn.Module):
    """LoRA on matrices of the first n experts of one layer, stacked; n may be all of them.

    Attributes:
        factors: `<matrix>_A` (n, R, in) and `<matrix>_B` (n, out, R) for some or all of gate_proj, up_proj and
            down_proj. They stay float32 whatever the base is.
        scales: alpha / R of each matrix, in the order of `MATRICES`.
    """

    def __init__(self, factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]], alpha: float) -> None:
        """Hold (A, B) by matrix; the scale is `alpha` / R, R read from the shapes."""
        super().__init__()
        self.scales: dict[str, float] = {}
        self.factors = nn.ParameterDict()
        for matrix in MATRICES:
            if matrix in factors:
                self.factors[f"{matrix}_A"], self.factors[f"{matrix}_B"] = factors[matrix]
                self.scales[matrix] = alpha / factors[matrix][0].shape[1]


@final
class ExpertFull(nn.Module):
    """Whole matrices of the first n experts of one layer, in the place of the base's.

    Attributes:
        stacks: (n, F, D) or, of down_proj, (n, D, F), by matrix, for some or all of them. They stay float32 whatever
            the base is.
    """

    def __init__(self, stacks: Mapping[str, nn.Parameter]) -> None:
        """Hold the stacks by matrix."""
        super().__init__()
        self.stacks = nn.ParameterDict({matrix: stacks[matrix] for matrix in MATRICES if matrix in stacks})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def routed_experts(
    self: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum over each token's experts, with what is attached to them.

    Args:
        self: The experts module; its submodule `emberfed_lora`, if there is one, is an `ExpertLora`, and
            `emberfed_full` an `ExpertFull`.
        hidden_states: (T, D).
        top_k_index: (T, K), which experts; E stands for none.
        top_k_weights: (T, K), their weights.

    Returns:
        (T, D), in the type of `hidden_states`. The sums have one fixed order, so the same input gives the same bits.
    """
    dtype = compute_dtype(self, hidden_states)
    attached, stacks = _attached(self)
    whole = not attached.matrices and all(len(stack) == self.num_experts for stack in stacks)
    way = _way(self, hidden_states.device, dtype, whole)
    weights, dispatch = ExpertWeights(self, dtype), Dispatch.of(top_k_index, self.num_experts)
    hidden_TD, gates_TK = hidden_states.to(dtype), top_k_weights.to(dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):  # the type is chosen already
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_TD, gates_TK, *stacks)):
            apply: Any = _RoutedExperts.apply
            out_TD: torch.Tensor = apply(way, weights, dispatch, attached, hidden_TD, gates_TK, *stacks)
        else:
            out_TD = way.forward(attached.layer(weights, dispatch, stacks), hidden_TD, gates_TK, Nothing())
    return out_TD.to(hidden_states.dtype)


def compute_dtype(experts: ExpertsModule, hidden_states: torch.Tensor) -> torch.dtype:
    """Return the type experts are computed in; see the module's docstring for the rule."""
    base = experts.gate_up_proj
    held = hidden_states.dtype if base.dtype is None else base.dtype
    device = hidden_states.device.type
    if device == "cpu":
        return torch.promote_types(held, torch.float32)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else held


def has_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has grouped matrix products for this device and type that are worth using."""
    on_cuda = device.type == "cuda" and dtype in _HALF
    return on_cuda and torch.cuda.get_device_capability(device) >= _GROUPED_CAPABILITY


def _way(experts: ExpertsModule, device: torch.device, dtype: torch.dtype, whole: bool) -> Way:
    """Return the module whose `forward` and `backward` to use.

    Args:
        experts: The experts module.
        device: Where it is computed.
        dtype: The type it is computed in.
        whole: Whether what is attached to it is LoRA on all of its experts, or nothing.
    """
    in_groups = whole and isinstance(experts.gate_up_proj, torch.Tensor) and has_grouped_products(device, dtype)
    return grouped if in_groups else per_expert


@final
@dataclass(frozen=True, slots=True)
class _Attached:
    """What the tensors are that are attached to a layer.

    Attributes:
        scales: Those of the matrices with LoRA; A and B of each come first, in this order.
        matrices: Those trained in full; they follow.
    """

    scales: Mapping[str, float]
    matrices: tuple[str, ...]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """What each tensor is."""
        factors = [(matrix, side) for matrix in self.scales for side in "AB"]
        return [*factors, *((matrix, "weight") for matrix in self.matrices)]

    def layer(self, weights: ExpertWeights, dispatch: Dispatch, stacks: Sequence[torch.Tensor]) -> Layer:
        """Return the layer."""
        factors, full = stacks[: 2 * len(self.scales)], stacks[2 * len(self.scales) :]
        return Layer(weights, paired(self.scales, factors), dispatch, dict(zip(self.matrices, full, strict=True)))


def _attached(experts: ExpertsModule) -> tuple[_Attached, tuple[torch.Tensor, ...]]:
    """Return what is attached to an experts module, and the tensors themselves."""
    lora: ExpertLora | None = getattr(experts, "emberfed_lora", None)
    full: ExpertFull | None = getattr(experts, "emberfed_full", None)
    scales = {} if lora is None else lora.scales
    factors = () if lora is None else tuple(lora.factors[f"{matrix}_{side}"] for matrix in scales for side in "AB")
    stacks = {} if full is None else dict(full.stacks.items())
    return _Attached(scales, tuple(stacks)), (*factors, *stacks.values())


@final
class _RoutedExperts(torch.autograd.Function):
    """A layer as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        way: Way,
        weights: ExpertWeights,
        dispatch: Dispatch,
        attached: _Attached,
        hidden_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        *stacks: torch.Tensor,
    ) -> torch.Tensor:
        """Compute and keep; `attached` says what `stacks` are."""
        layer = attached.layer(weights, dispatch, stacks)
        kept = Kept.room(layer, hidden_TD)
        out_TD = way.forward(layer, hidden_TD, gates_TK, kept)
        ctx.way, ctx.weights, ctx.attached = way, weights, attached
        sorting = (dispatch.pair_S, dispatch.token_S, dispatch.loads_E)
        ctx.save_for_backward(hidden_TD, gates_TK, *sorting, kept.pre_S2F, *kept.low.values(), *stacks)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return a gradient for each input of `forward`."""
        hidden_TD, gates_TK, pair_S, token_S, loads_E, pre_S2F, *rest = ctx.saved_tensors
        attached: _Attached = ctx.attached
        low, stacks = rest[: len(attached.scales)], rest[len(attached.scales) :]
        layer = attached.layer(ctx.weights, Dispatch(pair_S, token_S, loads_E), stacks)
        kept = Kept(pre_S2F, dict(zip(attached.scales, low, strict=True)))
        wants_input: bool = ctx.needs_input_grad[4]
        with torch.autocast(dout_TD.device.type, enabled=False):
            way: Way = ctx.way
            found = way.backward(layer, hidden_TD, gates_TK, kept, dout_TD, wants_input)
        gradients = (found.factors.get(key) for key in attached.keys)
        return None, None, None, None, found.hidden_TD, found.gates_TK, *gradients


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
