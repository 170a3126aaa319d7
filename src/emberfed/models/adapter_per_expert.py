"""The sparse adapter's experts, one after the other: the path for CPUs.

Shapes: N rows of one expert, T tokens, K active experts, P = T * K pairs, S of them routed to some expert, D hidden, H
hidden size of an expert.
"""

from __future__ import annotations

import torch

from emberfed.models.adapter_layer import ExpertGradients, Experts
from emberfed.models.low_rank import StackGradients, stacks_of

_KEY = "adapter"


def forward(experts: Experts, x_TD: torch.Tensor, gates_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sum (T, D), summed by expert, ascending, and W_down x, (S, H)."""
    factors, dispatch = experts.factors, experts.dispatch
    out_TD = _zeros_like(x_TD)
    pre_SH = x_TD.new_empty(len(dispatch.pair_S), factors.a_ERI.shape[1])
    gates_P = gates_TK.reshape(-1)
    for expert, rows in dispatch.groups():
        token_N = dispatch.token_S[rows]
        pre_SH[rows] = factors.low(x_TD[token_N], expert)
        inner_NH = experts.activation.forward(pre_SH[rows]).mul_(gates_P[dispatch.pair_S[rows]].unsqueeze(1))
        out_TD.index_add_(0, token_N, factors.high(inner_NH, expert).to(out_TD.dtype))
    return out_TD, pre_SH


def backward(
    experts: Experts,
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    pre_SH: torch.Tensor,
    dout_TD: torch.Tensor,
    wants_input: bool,
) -> ExpertGradients:
    """Return the gradients; those of the hidden states only if `wants_input`.

    With y = W_up inner, a gate's gradient <dout, y> is <W_up' dout, inner>: y is neither kept nor computed again.
    """
    factors, dispatch = experts.factors, experts.dispatch
    groups = list(dispatch.groups())
    gradients = StackGradients(stacks_of({_KEY: factors}), [expert for expert, _ in groups], x_TD.device)
    dx_TD = _zeros_like(x_TD) if wants_input else None
    gates_P = gates_TK.reshape(-1)
    dgates_P = torch.zeros_like(gates_P)
    for row, (expert, rows) in enumerate(groups):
        token_N, pair_N = dispatch.token_S[rows], dispatch.pair_S[rows]
        dout_ND, pre_NH, gate_N1 = dout_TD[token_N], pre_SH[rows], gates_P[pair_N].unsqueeze(1)
        inner_NH = experts.activation.forward(pre_NH)
        dinner_NH = factors.low_gradient(dout_ND, expert)
        dgates_P[pair_N] = torch.linalg.vecdot(dinner_NH, inner_NH)
        gradients.put(_KEY, "B", row, dout_ND, inner_NH.mul_(gate_N1))
        dpre_NH = experts.activation.backward(dinner_NH.mul_(gate_N1), pre_NH)
        gradients.put(_KEY, "A", row, dpre_NH, x_TD[token_N])
        if dx_TD is not None:
            dx_TD.index_add_(0, token_N, factors.input_gradient(dpre_NH, expert).to(dx_TD.dtype))
    found = gradients.stacked()
    return ExpertGradients(dx_TD, dgates_P.view_as(gates_TK), found.get((_KEY, "A")), found.get((_KEY, "B")))


def _zeros_like(x_TD: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
