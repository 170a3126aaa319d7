"""Experts with LoRA, all experts of a layer in one grouped matrix product each: the path for CUDA devices.

The same computation as `per_expert`, with the same gradients and the same things kept; read that first.

Shapes: T tokens, K active experts, S routed pairs, D hidden, F expert hidden, R rank, E experts.
"""

from __future__ import annotations

import torch

from emberfed.models.dispatch import Dispatch
from emberfed.models.expert_layer import Gradients, Kept, Layer, Nothing
from emberfed.models.grouped_products import PaddedFactors, factor_gradient, offsets, product, to_tokens
from emberfed.models.low_rank import INPUT_SIDE, OUTPUT_SIDE

_ALL = slice(None)


def forward(layer: Layer, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, keep: Kept | Nothing) -> torch.Tensor:
    """Return the sum over each token's experts, weighted by `gates_TK`, (T, D); sums go slot by slot, in float32."""
    weights, dispatch, offsets_E = layer.weights, layer.dispatch, offsets(layer.dispatch)
    lora = {matrix: PaddedFactors.of(factors, hidden_TD.dtype) for matrix, factors in layer.lora.items()}
    x_SD = hidden_TD[dispatch.token_S]
    pre_S2F = _with_bias(product(x_SD, weights.gate_up_stack(), offsets_E), weights.gate_up_biases(), dispatch)
    low = {m: product(x_SD, lora[m].a_ERI.transpose(1, 2), offsets_E) for m in INPUT_SIDE if m in lora}
    for matrix, low_SR in low.items():
        weights.half(matrix, pre_S2F).add_(product(low_SR, lora[matrix].b_EOR.transpose(1, 2), offsets_E))
    inner_SF = weights.gate(pre_S2F)
    y_SD = _with_bias(product(inner_SF, weights.down_stack(), offsets_E), weights.down_biases(), dispatch)
    if OUTPUT_SIDE in lora:
        low[OUTPUT_SIDE] = product(inner_SF, lora[OUTPUT_SIDE].a_ERI.transpose(1, 2), offsets_E)
        y_SD.add_(product(low[OUTPUT_SIDE], lora[OUTPUT_SIDE].b_EOR.transpose(1, 2), offsets_E))
    keep.put(_ALL, pre_S2F, {matrix: low_SR[:, : layer.lora[matrix].a_ERI.shape[1]] for matrix, low_SR in low.items()})
    return to_tokens(y_SD * gates_TK.reshape(-1)[dispatch.pair_S].unsqueeze(1), dispatch, gates_TK)


def backward(
    layer: Layer, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, kept: Kept, dout_TD: torch.Tensor, wants_input: bool
) -> Gradients:
    """Return the gradients; those of the hidden states only if `wants_input`."""
    weights, dispatch, offsets_E = layer.weights, layer.dispatch, offsets(layer.dispatch)
    lora = {matrix: PaddedFactors.of(factors, hidden_TD.dtype) for matrix, factors in layer.lora.items()}
    gates_P = gates_TK.reshape(-1)
    gate_S1 = gates_P[dispatch.pair_S].unsqueeze(1)
    factors: dict[tuple[str, str], torch.Tensor] = {}

    def put(matrix: str, side: str, left_SX: torch.Tensor, right_SY: torch.Tensor) -> None:
        own = layer.lora[matrix]
        factor = own.a_ERI if side == "A" else own.b_EOR
        if factor.requires_grad:
            scale = own.scale if side == "A" else 1.0
            factors[matrix, side] = factor_gradient(factor, left_SX, right_SY, dispatch, scale)

    dout_SD = dout_TD[dispatch.token_S]
    value_SF, to_pre = weights.gate_with_gradient(kept.pre_S2F)
    dinner_SF = product(dout_SD, weights.down_stack().transpose(1, 2), offsets_E)
    if OUTPUT_SIDE in lora:
        dlow_SR = product(dout_SD, lora[OUTPUT_SIDE].b_EOR, offsets_E)
        dinner_SF.add_(product(dlow_SR, lora[OUTPUT_SIDE].a_ERI, offsets_E))
        put(OUTPUT_SIDE, "A", dlow_SR * gate_S1, value_SF)
        put(OUTPUT_SIDE, "B", dout_SD, kept.low[OUTPUT_SIDE] * gate_S1)
    dgates_S = torch.linalg.vecdot(dinner_SF.float(), value_SF.float())
    biases_ED = weights.down_biases()
    if biases_ED is not None:
        dgates_S += torch.linalg.vecdot(dout_SD.float(), _rows(biases_ED, dispatch).float())
    dgates_P = torch.zeros_like(gates_P).index_copy_(0, dispatch.pair_S, dgates_S.to(gates_P.dtype))

    dpre_S2F = to_pre(dinner_SF.mul_(gate_S1))
    dx_SD = product(dpre_S2F, weights.gate_up_stack().transpose(1, 2), offsets_E) if wants_input else None
    x_SD = hidden_TD[dispatch.token_S]
    for matrix in INPUT_SIDE:
        if matrix in lora:
            dhalf_SF = weights.half(matrix, dpre_S2F).contiguous()
            dlow_SR = product(dhalf_SF, lora[matrix].b_EOR, offsets_E)
            put(matrix, "A", dlow_SR, x_SD)
            put(matrix, "B", dhalf_SF, kept.low[matrix])
            if dx_SD is not None:
                dx_SD.add_(product(dlow_SR, lora[matrix].a_ERI, offsets_E))
    dhidden_TD = None if dx_SD is None else to_tokens(dx_SD, dispatch, gates_TK)
    return Gradients(dhidden_TD, dgates_P.view_as(gates_TK), factors)


def _rows(biases_EO: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """Return each routed pair's row."""
    return biases_EO.repeat_interleave(dispatch.loads_E, dim=0)


def _with_bias(y_SO: torch.Tensor, biases_EO: torch.Tensor | None, dispatch: Dispatch) -> torch.Tensor:
    return y_SO if biases_EO is None else y_SO + _rows(biases_EO, dispatch)
