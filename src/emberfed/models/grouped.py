"""Experts with LoRA, all experts of a layer in one grouped matrix product each: the path for CUDA devices.

The same computation as `per_expert`, with the same gradients and the same things kept; read that first. Grouped
products want rows of 16 bytes, so ranks are filled up with zeros to a multiple of 8.

Shapes: T tokens, K active experts, S routed pairs, D hidden, F expert hidden, R rank, E experts, U experts with rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch.nn import functional as F

from emberfed.models.dispatch import Dispatch
from emberfed.models.expert_layer import Gradients, Kept, Layer, Nothing
from emberfed.models.low_rank import INPUT_SIDE, OUTPUT_SIDE, Factors, sparse_over_experts

_ALL = slice(None)
_RANK_MULTIPLE = 8


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Padded:
    """Factors in the type of the computation, their rank filled up with zeros; `scale` is folded into A."""

    a_ERI: torch.Tensor
    b_EOR: torch.Tensor

    @staticmethod
    def of(factors: Factors, dtype: torch.dtype) -> _Padded:
        missing = -factors.a_ERI.shape[1] % _RANK_MULTIPLE
        a_ERI = F.pad((factors.a_ERI.detach() * factors.scale).to(dtype), (0, 0, 0, missing))
        return _Padded(a_ERI, F.pad(factors.b_EOR.detach().to(dtype), (0, missing)))


def forward(layer: Layer, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, keep: Kept | Nothing) -> torch.Tensor:
    """Return the sum over each token's experts, weighted by `gates_TK`, (T, D); sums go slot by slot, in float32."""
    weights, dispatch, offsets_E = layer.weights, layer.dispatch, _offsets(layer.dispatch)
    lora = {matrix: _Padded.of(factors, hidden_TD.dtype) for matrix, factors in layer.lora.items()}
    x_SD = hidden_TD[dispatch.token_S]
    pre_S2F = _with_bias(_product(x_SD, weights.gate_up_stack(), offsets_E), weights.gate_up_biases(), dispatch)
    low = {m: _product(x_SD, lora[m].a_ERI.transpose(1, 2), offsets_E) for m in INPUT_SIDE if m in lora}
    for matrix, low_SR in low.items():
        weights.half(matrix, pre_S2F).add_(_product(low_SR, lora[matrix].b_EOR.transpose(1, 2), offsets_E))
    inner_SF = weights.gate(pre_S2F)
    y_SD = _with_bias(_product(inner_SF, weights.down_stack(), offsets_E), weights.down_biases(), dispatch)
    if OUTPUT_SIDE in lora:
        low[OUTPUT_SIDE] = _product(inner_SF, lora[OUTPUT_SIDE].a_ERI.transpose(1, 2), offsets_E)
        y_SD.add_(_product(low[OUTPUT_SIDE], lora[OUTPUT_SIDE].b_EOR.transpose(1, 2), offsets_E))
    keep.put(_ALL, pre_S2F, {matrix: low_SR[:, : layer.lora[matrix].a_ERI.shape[1]] for matrix, low_SR in low.items()})
    return _to_tokens(y_SD * gates_TK.reshape(-1)[dispatch.pair_S].unsqueeze(1), dispatch, gates_TK)


def backward(
    layer: Layer, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, kept: Kept, dout_TD: torch.Tensor, wants_input: bool
) -> Gradients:
    """Return the gradients; those of the hidden states only if `wants_input`."""
    weights, dispatch, offsets_E = layer.weights, layer.dispatch, _offsets(layer.dispatch)
    lora = {matrix: _Padded.of(factors, hidden_TD.dtype) for matrix, factors in layer.lora.items()}
    used_U = dispatch.loads_E.nonzero()[:, 0]
    gates_P = gates_TK.reshape(-1)
    gate_S1 = gates_P[dispatch.pair_S].unsqueeze(1)
    factors: dict[tuple[str, str], torch.Tensor] = {}

    def put(matrix: str, side: str, left_SX: torch.Tensor, right_SY: torch.Tensor) -> None:
        own = layer.lora[matrix]
        factor = own.a_ERI if side == "A" else own.b_EOR
        if factor.requires_grad:
            # Experts without rows hold whatever was in memory; only the used ones are read.
            values = _product(_filled(left_SX).t(), _filled(right_SY), offsets_E)[used_U]
            values = values[:, : factor.shape[1], : factor.shape[2]].to(factor.dtype)
            scaled = values * own.scale if side == "A" else values
            factors[matrix, side] = sparse_over_experts(scaled.contiguous(), used_U, len(offsets_E))

    dout_SD = dout_TD[dispatch.token_S]
    value_SF, to_pre = weights.gate_with_gradient(kept.pre_S2F)
    dinner_SF = _product(dout_SD, weights.down_stack().transpose(1, 2), offsets_E)
    if OUTPUT_SIDE in lora:
        dlow_SR = _product(dout_SD, lora[OUTPUT_SIDE].b_EOR, offsets_E)
        dinner_SF.add_(_product(dlow_SR, lora[OUTPUT_SIDE].a_ERI, offsets_E))
        put(OUTPUT_SIDE, "A", dlow_SR * gate_S1, value_SF)
        put(OUTPUT_SIDE, "B", dout_SD, kept.low[OUTPUT_SIDE] * gate_S1)
    dgates_S = torch.linalg.vecdot(dinner_SF.float(), value_SF.float())
    biases_ED = weights.down_biases()
    if biases_ED is not None:
        dgates_S += torch.linalg.vecdot(dout_SD.float(), _rows(biases_ED, dispatch).float())
    dgates_P = torch.zeros_like(gates_P).index_copy_(0, dispatch.pair_S, dgates_S.to(gates_P.dtype))

    dpre_S2F = to_pre(dinner_SF.mul_(gate_S1))
    dx_SD = _product(dpre_S2F, weights.gate_up_stack().transpose(1, 2), offsets_E) if wants_input else None
    x_SD = hidden_TD[dispatch.token_S]
    for matrix in INPUT_SIDE:
        if matrix in lora:
            dhalf_SF = weights.half(matrix, dpre_S2F).contiguous()
            dlow_SR = _product(dhalf_SF, lora[matrix].b_EOR, offsets_E)
            put(matrix, "A", dlow_SR, x_SD)
            put(matrix, "B", dhalf_SF, kept.low[matrix])
            if dx_SD is not None:
                dx_SD.add_(_product(dlow_SR, lora[matrix].a_ERI, offsets_E))
    dhidden_TD = None if dx_SD is None else _to_tokens(dx_SD, dispatch, gates_TK)
    return Gradients(dhidden_TD, dgates_P.view_as(gates_TK), factors)


def _offsets(dispatch: Dispatch) -> torch.Tensor:
    return dispatch.loads_E.cumsum(0).to(torch.int32)


def _product(left: torch.Tensor, right: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = F.grouped_mm(left, right, offs=offsets_E)
    return product


def _filled(x_SX: torch.Tensor) -> torch.Tensor:
    """Fill the columns up with zeros to a multiple of 8."""
    return F.pad(x_SX, (0, -x_SX.shape[1] % _RANK_MULTIPLE)).contiguous()


def _rows(biases_EO: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """Return each routed pair's row."""
    return biases_EO.repeat_interleave(dispatch.loads_E, dim=0)


def _with_bias(y_SO: torch.Tensor, biases_EO: torch.Tensor | None, dispatch: Dispatch) -> torch.Tensor:
    return y_SO if biases_EO is None else y_SO + _rows(biases_EO, dispatch)


def _to_tokens(y_SD: torch.Tensor, dispatch: Dispatch, gates_TK: torch.Tensor) -> torch.Tensor:
    """Sum the rows of each token."""
    by_pair_PD = y_SD.new_zeros(gates_TK.numel(), y_SD.shape[1]).index_copy_(0, dispatch.pair_S, y_SD)
    return by_pair_PD.view(*gates_TK.shape, -1).sum(1, dtype=torch.float32).to(y_SD.dtype)
