"""Experts with LoRA, one expert after the other: the path for CPUs, for bases in fewer than 16 bits, and for layers
of which some experts only are trained.

Backward forms gradients of A and B, of matrices trained in full and of the inputs, never of the frozen base; it is
given the pre-activations of gate and up and the small products x A', and computes every other activation again.

Shapes: N rows of one expert, T tokens, K active experts, P = T * K pairs, S of them routed to some expert, D hidden, F
expert hidden, R rank, E experts, U experts that got rows.
"""

from __future__ import annotations

import torch

from emberfed.models.expert_layer import Gradients, Kept, Layer, Nothing
from emberfed.models.low_rank import INPUT_SIDE, OUTPUT_SIDE, StackGradients
from emberfed.models.matmul import times


def forward(layer: Layer, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, keep: Kept | Nothing) -> torch.Tensor:
    """Return the sum over each token's experts, weighted by `gates_TK`, (T, D); sums go by expert, ascending."""
    out_TD = torch.zeros_like(hidden_TD)
    gates_P = gates_TK.reshape(-1)
    weights, dispatch = layer.weights, layer.dispatch
    for expert, rows in dispatch.groups():
        lora = layer.lora_of(expert)
        token_N = dispatch.token_S[rows]
        x_ND = hidden_TD[token_N]
        pre_N2F = times(x_ND, layer.gate_up(expert), weights.gate_up_bias(expert))
        low = {matrix: lora[matrix].low(x_ND, expert) for matrix in INPUT_SIDE if matrix in lora}
        for matrix, low_NR in low.items():
            lora[matrix].add_high(weights.half(matrix, pre_N2F), low_NR, expert)
        inner_NF = weights.gate(pre_N2F)
        y_ND = times(inner_NF, layer.down(expert), weights.down_bias(expert))
        if OUTPUT_SIDE in lora:
            low[OUTPUT_SIDE] = lora[OUTPUT_SIDE].low(inner_NF, expert)
            lora[OUTPUT_SIDE].add_high(y_ND, low[OUTPUT_SIDE], expert)
        keep.put(rows, pre_N2F, low)
        out_TD.index_add_(0, token_N, y_ND.mul_(gates_P[dispatch.pair_S[rows]].unsqueeze(1)))
    return out_TD


def backward(
    layer: Layer, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, kept: Kept, dout_TD: torch.Tensor, wants_input: bool
) -> Gradients:
    """Return the gradients; those of the hidden states only if `wants_input`.

    With y = inner W, a gate's gradient <dout, y> is <dout W', inner>: y is neither kept nor computed again.
    """
    weights, dispatch = layer.weights, layer.dispatch
    groups = list(dispatch.groups())
    gradients = StackGradients(layer.stacks(), [expert for expert, _ in groups], hidden_TD.device)
    dhidden_TD = torch.zeros_like(hidden_TD) if wants_input else None
    gates_P = gates_TK.reshape(-1)
    dgates_P = torch.zeros_like(gates_P)
    for row, (expert, rows) in enumerate(groups):
        lora, full = layer.lora_of(expert), layer.full_of(expert)
        token_N, pair_N = dispatch.token_S[rows], dispatch.pair_S[rows]
        dout_ND, gate_N1 = dout_TD[token_N], gates_P[pair_N].unsqueeze(1)
        value_NF, to_pre = weights.gate_with_gradient(kept.pre_S2F[rows])

        dinner_NF = times(dout_ND, layer.down(expert).t())
        if OUTPUT_SIDE in full:
            gradients.put(OUTPUT_SIDE, "weight", row, dout_ND * gate_N1, value_NF)
        if OUTPUT_SIDE in lora:
            dlow_NR = lora[OUTPUT_SIDE].low_gradient(dout_ND, expert)
            lora[OUTPUT_SIDE].add_input_gradient(dinner_NF, dlow_NR, expert)
            gradients.put(OUTPUT_SIDE, "A", row, dlow_NR.mul_(gate_N1), value_NF)
            gradients.put(OUTPUT_SIDE, "B", row, dout_ND, kept.low[OUTPUT_SIDE][rows] * gate_N1)
        dgates_N = torch.linalg.vecdot(dinner_NF, value_NF)
        bias_D = weights.down_bias(expert)
        dgates_P[pair_N] = dgates_N if bias_D is None else dgates_N + dout_ND @ bias_D

        dpre_N2F = to_pre(dinner_NF.mul_(gate_N1))
        x_ND = hidden_TD[token_N]
        dlow = _input_side(layer, expert, row, gradients, x_ND, dpre_N2F, kept, rows)
        for matrix in INPUT_SIDE:
            if matrix in full:
                gradients.put(matrix, "weight", row, weights.half(matrix, dpre_N2F), x_ND)
        if dhidden_TD is not None:
            dx_ND = times(dpre_N2F, layer.gate_up(expert).t())
            for matrix, dlow_NR in dlow.items():
                lora[matrix].add_input_gradient(dx_ND, dlow_NR, expert)
            dhidden_TD.index_add_(0, token_N, dx_ND)
    return Gradients(dhidden_TD, dgates_P.view_as(gates_TK), gradients.stacked())


def _input_side(
    layer: Layer,
    expert: int,
    row: int,
    gradients: StackGradients,
    x_ND: torch.Tensor,
    dpre_N2F: torch.Tensor,
    kept: Kept,
    rows: slice,
) -> dict[str, torch.Tensor]:
    """Form the gradients of gate's and up's factors; return those of their low products."""
    dlow, lora = {}, layer.lora_of(expert)
    for matrix in INPUT_SIDE:
        if matrix in lora:
            dhalf_NF = layer.weights.half(matrix, dpre_N2F)
            dlow[matrix] = lora[matrix].low_gradient(dhalf_NF, expert)
            gradients.put(matrix, "A", row, dlow[matrix], x_ND)
            gradients.put(matrix, "B", row, dhalf_NF, kept.low[matrix][rows])
    return dlow
