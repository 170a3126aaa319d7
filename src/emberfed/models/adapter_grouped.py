"""The sparse adapter's experts, all of a layer in one grouped matrix product each: the path for CUDA devices.

The same computation as `adapter_per_expert`, with the same gradients; read that first. W_down x is kept with the zeros
that fill H up: every activation takes zero to zero.

Shapes: T tokens, K active experts, S routed pairs, D hidden, H hidden size of an expert.
"""

from __future__ import annotations

import torch

from emberfed.models.adapter_layer import ExpertGradients, Experts
from emberfed.models.grouped_products import PaddedFactors, factor_gradient, offsets, product, to_tokens


def forward(experts: Experts, x_TD: torch.Tensor, gates_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sum (T, D), summed slot by slot, and W_down x, (S, H)."""
    dispatch, offsets_M = experts.dispatch, offsets(experts.dispatch)
    padded = PaddedFactors.of(experts.factors, x_TD.dtype)
    pre_SH = product(x_TD[dispatch.token_S], padded.a_ERI.transpose(1, 2), offsets_M)
    inner_SH = experts.activation.forward(pre_SH).mul_(gates_TK.reshape(-1)[dispatch.pair_S].unsqueeze(1))
    return to_tokens(product(inner_SH, padded.b_EOR.transpose(1, 2), offsets_M), dispatch, gates_TK), pre_SH


def backward(
    experts: Experts,
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    pre_SH: torch.Tensor,
    dout_TD: torch.Tensor,
    wants_input: bool,
) -> ExpertGradients:
    """Return the gradients; those of the hidden states only if `wants_input`."""
    factors, dispatch, offsets_M = experts.factors, experts.dispatch, offsets(experts.dispatch)
    padded = PaddedFactors.of(factors, x_TD.dtype)
    gates_P = gates_TK.reshape(-1)
    gate_S1 = gates_P[dispatch.pair_S].unsqueeze(1)
    dout_SD, inner_SH = dout_TD[dispatch.token_S], experts.activation.forward(pre_SH)
    dinner_SH = product(dout_SD, padded.b_EOR, offsets_M)
    dgates_S = torch.linalg.vecdot(dinner_SH.float(), inner_SH.float())
    dgates_P = torch.zeros_like(gates_P).index_copy_(0, dispatch.pair_S, dgates_S.to(gates_P.dtype))
    dpre_SH = experts.activation.backward(dinner_SH.mul_(gate_S1), pre_SH)
    down_MHD = up_MDH = None
    if factors.a_ERI.requires_grad:
        down_MHD = factor_gradient(factors.a_ERI, dpre_SH, x_TD[dispatch.token_S], dispatch, 1.0)
    if factors.b_EOR.requires_grad:
        up_MDH = factor_gradient(factors.b_EOR, dout_SD, inner_SH.mul_(gate_S1), dispatch, 1.0)
    dx_TD = to_tokens(product(dpre_SH, padded.a_ERI, offsets_M), dispatch, gates_TK) if wants_input else None
    return ExpertGradients(dx_TD, dgates_P.view_as(gates_TK), down_MHD, up_MDH)
