"""The frozen matrices of one layer's experts, whatever way a model family stores them.

transformers says how on the experts module: transposed or not, gate and up one after the other or alternating, with or
without biases, with a gate function of the family's own. Everything here hands out matrices as (in, out).

Shapes: N rows, D hidden, F expert hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, final

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from emberfed.errors import ModelError
from emberfed.models.stacked import StackedWeight

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class ExpertsModule(Protocol):
    """What transformers' experts modules have in common."""

    num_experts: int
    gate_up_proj: nn.Parameter | StackedWeight
    down_proj: nn.Parameter | StackedWeight
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool

    def _apply_gate(self, gate_up: torch.Tensor, /) -> torch.Tensor: ...


def check_supported(experts: nn.Module, where: str) -> None:
    """Check that experts are of a kind this package computes. Raises: ModelError naming `where` and what is missing."""
    missing = [flag for flag in _FLAGS if not hasattr(experts, flag)]
    if missing:
        raise ModelError(
            f"{where} is a {type(experts).__name__} without {', '.join(missing)}: not transformers' experts"
        )
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        raise ModelError(f"{where}: experts without a gate, or with a norm behind each, are not supported")


@final
class ExpertWeights:
    """One layer's frozen experts, read one at a time in the type they are computed in."""

    def __init__(self, experts: ExpertsModule, dtype: torch.dtype) -> None:
        """Read `experts`, handing out matrices as `dtype`: a view where they are stored so, else a fresh copy."""
        self._experts: Any = experts
        self._dtype = dtype
        self.num_experts = experts.num_experts
        plain_gate = type(experts)._apply_gate is _default_apply_gate and experts.is_concatenated
        self._is_silu = plain_gate and isinstance(getattr(experts, "act_fn", None), (nn.SiLU, SiLUActivation))
        self._stacks = {
            name: stored.detach() if experts.is_transposed else stored.detach().transpose(1, 2)
            for name in ("gate_up_proj", "down_proj")
            if isinstance(stored := getattr(experts, name), torch.Tensor)
        }

    @property
    def dtype(self) -> torch.dtype:
        """The type matrices are handed out in."""
        return self._dtype

    @property
    def gate_up_size(self) -> int:
        """2F."""
        rows, columns = self._experts.gate_up_proj.shape[1:]
        return int(columns if self._experts.is_transposed else rows)

    def gate_up(self, expert: int) -> torch.Tensor:
        """Return (D, 2F)."""
        return self._matrix("gate_up_proj", expert)

    def down(self, expert: int) -> torch.Tensor:
        """Return (F, D)."""
        return self._matrix("down_proj", expert)

    def gate_up_bias(self, expert: int) -> torch.Tensor | None:
        """Return (2F), or None where the family has no biases."""
        return self._bias("gate_up_proj_bias", expert)

    def down_bias(self, expert: int) -> torch.Tensor | None:
        """Return (D), or None where the family has no biases."""
        return self._bias("down_proj_bias", expert)

    def gate_up_stack(self) -> torch.Tensor:
        """Return (E, D, 2F)."""
        return self._stack("gate_up_proj")

    def down_stack(self) -> torch.Tensor:
        """Return (E, F, D)."""
        return self._stack("down_proj")

    def gate_up_biases(self) -> torch.Tensor | None:
        """Return (E, 2F), or None where the family has no biases."""
        return self._biases("gate_up_proj_bias")

    def down_biases(self) -> torch.Tensor | None:
        """Return (E, D), or None where the family has no biases."""
        return self._biases("down_proj_bias")

    def half(self, matrix: str, gate_up: torch.Tensor) -> torch.Tensor:
        """Return the view of gate_proj or up_proj in the last dimension, 2F, of a tensor."""
        first = matrix == "gate_proj"
        if not self._experts.is_concatenated:
            return gate_up[..., 0 if first else 1 :: 2]
        middle = gate_up.shape[-1] // 2
        return gate_up[..., :middle] if first else gate_up[..., middle:]

    def gate(self, gate_up_N2F: torch.Tensor) -> torch.Tensor:
        """Return the family's activation of gate and up, (N, F), for example silu(gate) * up."""
        inner: torch.Tensor = self._experts._apply_gate(gate_up_N2F)
        return inner

    def gate_with_gradient(
        self, gate_up_N2F: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Return what `gate` does, and the function that takes its gradient back to gate and up.

        Written out for silu(gate) * up, which nearly all families use: for few rows autograd costs more than the maths.
        """
        if self._is_silu:
            gate_NF, up_NF = self.half("gate_proj", gate_up_N2F), self.half("up_proj", gate_up_N2F)
            active_NF = F.silu(gate_NF)

            def written_out(dinner_NF: torch.Tensor) -> torch.Tensor:
                dgate_NF = torch.ops.aten.silu_backward(dinner_NF * up_NF, gate_NF)
                return torch.cat([dgate_NF, dinner_NF * active_NF], dim=-1)

            return active_NF * up_NF, written_out

        leaf_N2F = gate_up_N2F.detach().requires_grad_()
        with torch.enable_grad():
            inner_NF = self.gate(leaf_N2F)
        return inner_NF.detach(), lambda dinner_NF: torch.autograd.grad(inner_NF, leaf_N2F, dinner_NF)[0]

    def _matrix(self, name: str, expert: int) -> torch.Tensor:
        if name in self._stacks:
            return self._stacks[name][expert].to(self._dtype)
        matrix: torch.Tensor = getattr(self._experts, name).expert(expert, self._dtype)
        return matrix if self._experts.is_transposed else matrix.t()

    def _bias(self, name: str, expert: int) -> torch.Tensor | None:
        biases = self._biases(name)
        return None if biases is None else biases[expert]

    def _stack(self, name: str) -> torch.Tensor:
        if name in self._stacks:
            return self._stacks[name].to(self._dtype)
        whole: torch.Tensor = getattr(self._experts, name).dequantised(self._dtype)
        return whole if self._experts.is_transposed else whole.transpose(1, 2)

    def _biases(self, name: str) -> torch.Tensor | None:
        if not self._experts.has_bias:
            return None
        biases: torch.Tensor = getattr(self._experts, name).detach().to(self._dtype)
        return biases
