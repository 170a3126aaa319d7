"""Routed expert LoRA: each expert's low-rank part is computed for the tokens routed to it, and for no others.

Registered with transformers as the experts implementation `emberfed_routed`, so that time and memory of forward and
backward passes fall with the number of active experts. PEFT's own LoRA on fused experts builds base + BA for all of
them on every forward pass, keeps it, and forms dense gradients.

Two ways compute it, and one rule chooses: experts are taken in grouped products (`grouped`) on CUDA devices that have
them, if the base is held in 16 bits; everything else goes expert by expert (`per_expert`). On CPUs the computation is
in float32 whatever the base is held in, since most CPUs are far slower in 16 bits; on CUDA it is in autocast's type
inside autocast, else in the base's. Factors and their gradients are float32 always.

A layer is one autograd node. Gradients of stacked factors are sparse over experts: those without tokens have none.
`torch.compile` leaves the experts out, since how many rows each gets is data: `fullgraph=True` is impossible.

Shapes: T tokens, K active experts, D hidden, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from emberfed.models.quantised import QuantisedWeight

IMPLEMENTATION = "emberfed_routed"
MATRICES = ("gate_proj", "up_proj", "down_proj")
_GROUPED_CAPABILITY = (8, 0)
_HALF = (torch.bfloat16, torch.float16)


@final
class ExpertLora(nn.Module):
    """LoRA on matrices of every expert of one layer, stacked over experts.

    Attributes:
        factors: `<matrix>_A` (E, R, in) and `<matrix>_B` (E, out, R) for some or all of gate_proj, up_proj and
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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def routed_experts(
    self: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum over each token's experts, with their LoRA where an `ExpertLora` is attached.

    Args:
        self: The experts module; its submodule `emberfed_lora`, if there is one, is the `ExpertLora`.
        hidden_states: (T, D).
        top_k_index: (T, K), which experts; E stands for none.
        top_k_weights: (T, K), their weights.

    Returns:
        (T, D), in the type of `hidden_states`. The sums have one fixed order, so the same input gives the same bits.
    """
    dtype = compute_dtype(self, hidden_states)
    way = _way(self, hidden_states.device, dtype)
    weights, dispatch = ExpertWeights(self, dtype), Dispatch.of(top_k_index, self.num_experts)
    lora: ExpertLora | None = getattr(self, "emberfed_lora", None)
    scales = {} if lora is None else lora.scales
    factors = () if lora is None else tuple(lora.factors[f"{matrix}_{side}"] for matrix in scales for side in "AB")
    hidden_TD, gates_TK = hidden_states.to(dtype), top_k_weights.to(dtype)
    with torch.autocast(hidden_states.device.type, enabled=False):  # the type is chosen already
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_TD, gates_TK, *factors)):
            apply: Any = _RoutedExperts.apply
            out_TD: torch.Tensor = apply(way, weights, dispatch, scales, hidden_TD, gates_TK, *factors)
        else:
            out_TD = way.forward(Layer(weights, paired(scales, factors), dispatch), hidden_TD, gates_TK, Nothing())
    return out_TD.to(hidden_states.dtype)


def compute_dtype(experts: ExpertsModule, hidden_states: torch.Tensor) -> torch.dtype:
    """Return the type experts are computed in; see the module's docstring for the rule."""
    base = experts.gate_up_proj
    held = hidden_states.dtype if isinstance(base, QuantisedWeight) else base.dtype
    device = hidden_states.device.type
    if device == "cpu":
        return torch.promote_types(held, torch.float32)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else held


def has_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has grouped matrix products for this device and type that are worth using."""
    on_cuda = device.type == "cuda" and dtype in _HALF
    return on_cuda and torch.cuda.get_device_capability(device) >= _GROUPED_CAPABILITY


def _way(experts: ExpertsModule, device: torch.device, dtype: torch.dtype) -> Way:
    """Return the module whose `forward` and `backward` to use."""
    in_groups = not isinstance(experts.gate_up_proj, QuantisedWeight) and has_grouped_products(device, dtype)
    return grouped if in_groups else per_expert


@final
class _RoutedExperts(torch.autograd.Function):
    """A layer as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        way: Way,
        weights: ExpertWeights,
        dispatch: Dispatch,
        scales: Mapping[str, float],
        hidden_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """Compute and keep; `factors` are A and B of each matrix of `scales`, in its order."""
        layer = Layer(weights, paired(scales, factors), dispatch)
        kept = Kept.room(layer, hidden_TD)
        out_TD = way.forward(layer, hidden_TD, gates_TK, kept)
        ctx.way, ctx.weights, ctx.scales = way, weights, scales
        sorting = (dispatch.pair_S, dispatch.token_S, dispatch.loads_E)
        ctx.save_for_backward(hidden_TD, gates_TK, *sorting, kept.pre_S2F, *kept.low.values(), *factors)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return a gradient for each input of `forward`."""
        hidden_TD, gates_TK, pair_S, token_S, loads_E, pre_S2F, *rest = ctx.saved_tensors
        scales: Mapping[str, float] = ctx.scales
        low, factors = rest[: len(scales)], rest[len(scales) :]
        layer = Layer(ctx.weights, paired(scales, factors), Dispatch(pair_S, token_S, loads_E))
        kept = Kept(pre_S2F, dict(zip(scales, low, strict=True)))
        wants_input: bool = ctx.needs_input_grad[4]
        with torch.autocast(dout_TD.device.type, enabled=False):
            way: Way = ctx.way
            found = way.backward(layer, hidden_TD, gates_TK, kept, dout_TD, wants_input)
        stacks = (found.factors.get((matrix, side)) for matrix in scales for side in "AB")
        return None, None, None, None, found.hidden_TD, found.gates_TK, *stacks


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
