"""Routed expert LoRA: each expert's low-rank part is computed for the tokens routed to it, and for no others.

Registered with transformers as the experts implementation `emberfed_routed`, so that the time of a forward pass falls
with the number of active experts. PEFT's own LoRA on fused experts builds base + BA for all of them on every forward.

Shapes: T tokens, K active experts, S = T * K routed (token, slot) pairs, D hidden, F expert hidden, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "emberfed_routed"
MATRICES = ("gate_proj", "up_proj", "down_proj")


@final
class ExpertLora(nn.Module):
    """LoRA on the three matrices of every expert of one layer, stacked over experts.

    Attributes:
        factors: `<matrix>_A` (E, R, in) and `<matrix>_B` (E, out, R) for gate_proj, up_proj and down_proj. They stay
            float32 whatever the base is; so does their product, which is cast to the base's type once it is added.
    """

    def __init__(self, factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]], alpha: float) -> None:
        """Hold (A, B) of each matrix; the scale is `alpha` / R, R read from the shapes."""
        super().__init__()
        self.alpha = alpha
        self.factors = nn.ParameterDict()
        for matrix in MATRICES:
            self.factors[f"{matrix}_A"], self.factors[f"{matrix}_B"] = factors[matrix]

    def per_expert(self, matrix: str) -> list[_LowRank]:
        """Return the factors of `matrix`, expert by expert."""
        a_ERI, b_EOR = self.factors[f"{matrix}_A"], self.factors[f"{matrix}_B"]
        scale = self.alpha / a_ERI.shape[1]
        # unbind, since its backward is one stack; the backward of indexing would fill a tensor of E experts for each.
        return [_LowRank(a, b, scale) for a, b in zip(a_ERI.unbind(), b_EOR.unbind(), strict=True)]


@final
@dataclass(frozen=True, slots=True)
class _LowRank:
    """LoRA of one matrix of one expert."""

    a: torch.Tensor  # (R, in)
    b: torch.Tensor  # (out, R)
    scale: float

    def add_to(self, base_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        """Return base + scale * x A' B', in float32, cast to the type of `base`."""
        z_NR = F.linear(x_NI.to(self.a.dtype), self.a)
        sum_NO = torch.addmm(base_NO.to(self.b.dtype), z_NR, self.b.t(), alpha=self.scale)
        return sum_NO.to(base_NO.dtype)


class _Experts(Protocol):
    """What the forward needs of a transformers experts module."""

    num_experts: int
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    def act_fn(self, x: torch.Tensor, /) -> torch.Tensor: ...


class _Reorder(torch.autograd.Function):
    """Rows in another order. The gradient is the inverse order, not the slower sum over repeated indices."""

    @staticmethod
    def forward(ctx: Any, x_SD: torch.Tensor, order_S: torch.Tensor, inverse_S: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse_S)
        return x_SD[order_S]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None


def routed_experts(
    self: _Experts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted sum over each token's experts, with their LoRA where an `ExpertLora` is attached.

    Args:
        self: The experts module; its submodule `emberfed_lora`, if there is one, is the `ExpertLora`.
        hidden_states: (T, D).
        top_k_index: (T, K), which experts.
        top_k_weights: (T, K), their weights.

    Returns:
        (T, D). The sums have one fixed order, so the same input gives the same bits.
    """
    tokens, top_k = top_k_index.shape
    expert_S = top_k_index.reshape(-1)
    order_S = torch.argsort(expert_S, stable=True)
    inverse_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    loads = torch.bincount(expert_S, minlength=self.num_experts).tolist()

    repeated_SD = hidden_states.unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, -1)
    grouped_SD: torch.Tensor = _Reorder.apply(repeated_SD, order_S, inverse_S)  # type: ignore[no-untyped-call]
    outputs_SD = torch.cat(_each_expert(self, grouped_SD, loads))
    slots_SD: torch.Tensor = _Reorder.apply(outputs_SD, inverse_S, order_S)  # type: ignore[no-untyped-call]
    weighted_TKD = slots_SD.view(tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
    return weighted_TKD.sum(1).to(hidden_states.dtype)


def _each_expert(experts: _Experts, grouped_SD: torch.Tensor, loads: list[int]) -> list[torch.Tensor]:
    """Return the outputs of the experts that have rows, in the order of the rows; `loads` are rows per expert."""
    lora: ExpertLora | None = getattr(experts, "emberfed_lora", None)
    adapters = None if lora is None else [lora.per_expert(matrix) for matrix in MATRICES]
    gate_ups, downs = experts.gate_up_proj.unbind(), experts.down_proj.unbind()
    outputs = []
    for expert, x_ND in enumerate(torch.split(grouped_SD, loads)):
        if not loads[expert]:
            continue
        gate_NF, up_NF = F.linear(x_ND, gate_ups[expert]).chunk(2, dim=-1)
        if adapters is None:
            # Contiguous, as with LoRA: activations round strided rows differently, and B = 0 must change no bit.
            outputs.append(F.linear(experts.act_fn(gate_NF.contiguous()) * up_NF, downs[expert]))
            continue
        gate, up, down = (matrix[expert] for matrix in adapters)
        inner_NF = experts.act_fn(gate.add_to(gate_NF, x_ND)) * up.add_to(up_NF, x_ND)
        outputs.append(down.add_to(F.linear(inner_NF, downs[expert]), inner_NF))
    return outputs


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_experts)
