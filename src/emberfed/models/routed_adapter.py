"""One layer of the sparse adapter: a gate, and two-layer experts computed for the tokens it sends them and no others.

y = sum over the k best experts m of g_m(x) W_up_m act(W_down_m x), g the softmax of the k kept logits of W_R x. An
expert is a LoRA with an activation between its factors, so dispatch, factors and gradients are those of the expert
LoRA: time and memory of both passes fall with k, and an expert without tokens has no gradient.

A layer is one autograd node, gate included. The gate is float32 always, so that autocast does not change which experts
are chosen; on CPUs so is all else. On CUDA devices experts are computed in autocast's type inside autocast, else in
that of the hidden states, and in 16 bits by grouped products where the device has them. `torch.compile` leaves the node
out.

Shapes: T tokens, K active experts, S routed pairs, M experts, D hidden, H hidden size of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch.autograd.function import once_differentiable

from emberfed.models import adapter_grouped, adapter_per_expert
from emberfed.models.adapter_layer import ACTIVATIONS, Activation, AdapterWay, Experts
from emberfed.models.dispatch import Dispatch
from emberfed.models.low_rank import Factors
from emberfed.models.routed_lora import has_grouped_products


@final
@dataclass(frozen=True, slots=True, eq=False)
class AdapterLayer:
    """The tensors of one layer, and the activation between them.

    Attributes:
        down_MHD: W_down of every expert.
        up_MDH: W_up of every expert.
        router_MD: W_R; None if there is one expert, to which every token goes with weight 1.
        activation: What is between W_down and W_up.
    """

    down_MHD: torch.Tensor
    up_MDH: torch.Tensor
    router_MD: torch.Tensor | None
    activation: Activation = "gelu"

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return W_down, W_up, and W_R if there is one."""
        both = (self.down_MHD, self.up_MDH)
        return both if self.router_MD is None else (*both, self.router_MD)


class Routed(NamedTuple):
    """What a layer gives.

    Attributes:
        out_TD: The weighted sum over each token's experts, in the type of the hidden states; zero for padding.
        logits_TM: The gate's logits, float32 or wider, through which gradients flow; None if there is no gate.
        index_TK: The experts of each token, the best first. Padding has them too, but is not computed.
    """

    out_TD: torch.Tensor
    logits_TM: torch.Tensor | None
    index_TK: torch.Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def routed_adapter(
    layer: AdapterLayer, x_TD: torch.Tensor, top_k: int, padding_T1: torch.Tensor | None = None
) -> Routed:
    """Return what the layer adds to its host's output; gradients flow to its tensors and to the hidden states.

    Args:
        layer: The layer.
        x_TD: The hidden states, of any floating type.
        top_k: K, from 1 to M. Of equal logits the expert with the lower number is chosen.
        padding_T1: True where a token is padding, which goes to no expert; None if none is.
    """
    dtype = _compute_dtype(x_TD)
    tensors = layer.tensors()
    with torch.autocast(x_TD.device.type, enabled=False):  # the type is chosen already
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TD, *tensors)):
            apply: Any = _AdapterNode.apply
            return Routed(*apply(layer.activation, dtype, top_k, padding_T1, x_TD, *tensors))
        logits_TM, gates_TK, index_TK = _gated(layer, x_TD, top_k)
        experts = _experts(layer, index_TK, padding_T1)
        out_TD, _ = _way(x_TD.device, dtype).forward(experts, x_TD.to(dtype), gates_TK.to(dtype))
        return Routed(out_TD.to(x_TD.dtype), logits_TM, index_TK)


def _compute_dtype(x_TD: torch.Tensor) -> torch.dtype:
    device = x_TD.device.type
    if device == "cpu":
        return torch.promote_types(x_TD.dtype, torch.float32)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype


def _way(device: torch.device, dtype: torch.dtype) -> AdapterWay:
    return adapter_grouped if has_grouped_products(device, dtype) else adapter_per_expert


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gated(
    layer: AdapterLayer, x_TD: torch.Tensor, top_k: int
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return logits (T, M), weights (T, K) and experts (T, K)."""
    x_TD = _wide(x_TD)
    if layer.router_MD is None:
        return None, x_TD.new_ones(len(x_TD), 1), torch.zeros(len(x_TD), 1, dtype=torch.int64, device=x_TD.device)
    logits_TM = x_TD @ layer.router_MD.to(x_TD.dtype).t()
    sorted_TM, order_TM = logits_TM.sort(dim=-1, descending=True, stable=True)
    return logits_TM, sorted_TM[:, :top_k].softmax(-1), order_TM[:, :top_k].contiguous()


def _experts(layer: AdapterLayer, index_TK: torch.Tensor, padding_T1: torch.Tensor | None) -> Experts:
    num_experts = len(layer.down_MHD)
    sent_TK = index_TK if padding_T1 is None else index_TK.masked_fill(padding_T1, num_experts)
    return Experts(_factors(layer), ACTIVATIONS[layer.activation], Dispatch.of(sent_TK, num_experts))


def _factors(layer: AdapterLayer) -> Factors:
    return Factors(layer.down_MHD, layer.up_MDH, 1.0)


@final
class _AdapterNode(torch.autograd.Function):
    """A layer as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        dtype: torch.dtype,
        top_k: int,
        padding_T1: torch.Tensor | None,
        x_TD: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Compute and keep; `tensors` are those of the layer."""
        layer = _layer(activation, tensors)
        logits_TM, gates_TK, index_TK = _gated(layer, x_TD, top_k)
        experts = _experts(layer, index_TK, padding_T1)
        kept_TD = x_TD.to(dtype)
        out_TD, pre_SH = _way(x_TD.device, dtype).forward(experts, kept_TD, gates_TK.to(dtype))
        sorting = (experts.dispatch.pair_S, experts.dispatch.token_S, experts.dispatch.loads_E)
        ctx.save_for_backward(kept_TD, gates_TK, index_TK, pre_SH, *sorting, *tensors)
        ctx.activation, ctx.x_dtype = activation, x_TD.dtype
        ctx.mark_non_differentiable(index_TK)
        ctx.set_materialize_grads(False)
        return out_TD.to(x_TD.dtype), logits_TM, index_TK

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout_TD: torch.Tensor | None, dlogits_TM: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return a gradient for each input of `forward`."""
        x_TD, gates_TK, index_TK, pre_SH, pair_S, token_S, loads_M, *tensors = ctx.saved_tensors
        layer = _layer(ctx.activation, tensors)
        wants_input: bool = ctx.needs_input_grad[4]
        dx_TD = dgates_TK = down_MHD = up_MDH = router_MD = None
        with torch.autocast(x_TD.device.type, enabled=False):
            if dout_TD is not None:
                experts = Experts(_factors(layer), ACTIVATIONS[layer.activation], Dispatch(pair_S, token_S, loads_M))
                way, gates, dout_TD = _way(x_TD.device, x_TD.dtype), gates_TK.to(x_TD.dtype), dout_TD.to(x_TD.dtype)
                found = way.backward(experts, x_TD, gates, pre_SH, dout_TD, wants_input)
                dx_TD, dgates_TK, down_MHD, up_MDH = found.x_TD, found.gates_TK, found.down_MHD, found.up_MDH
            if layer.router_MD is not None:
                dlogits_TM = _logits_gradient(dlogits_TM, dgates_TK, gates_TK, index_TK, len(layer.router_MD))
                wide_TD = _wide(x_TD)
                router_MD = (dlogits_TM.t() @ wide_TD).to(layer.router_MD.dtype)
                if wants_input:
                    dx_TD = torch.zeros_like(wide_TD) if dx_TD is None else _wide(dx_TD)
                    dx_TD.addmm_(dlogits_TM, layer.router_MD.to(wide_TD.dtype))
        dx = None if dx_TD is None else dx_TD.to(ctx.x_dtype)
        found_tensors = (down_MHD, up_MDH) if layer.router_MD is None else (down_MHD, up_MDH, router_MD)
        return None, None, None, None, dx, *found_tensors


def _layer(activation: Activation, tensors: Sequence[torch.Tensor]) -> AdapterLayer:
    down_MHD, up_MDH, *router = tensors
    return AdapterLayer(down_MHD, up_MDH, router[0] if router else None, activation)


def _logits_gradient(
    dlogits_TM: torch.Tensor | None,
    dgates_TK: torch.Tensor | None,
    gates_TK: torch.Tensor,
    index_TK: torch.Tensor,
    num_experts: int,
) -> torch.Tensor:
    """Return the gradient of the logits: what reached them directly, and through the softmax of the kept ones."""
    through_TM = gates_TK.new_zeros(len(gates_TK), num_experts)
    if dgates_TK is not None:
        weighted_TK = gates_TK * dgates_TK.to(gates_TK.dtype)
        through_TM.scatter_(1, index_TK, weighted_TK - gates_TK * weighted_TK.sum(-1, keepdim=True))
    return through_TM if dlogits_TM is None else through_TM.add_(dlogits_TM)
