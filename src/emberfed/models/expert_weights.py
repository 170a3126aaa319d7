"""The frozen matrices of one layer's experts, whatever way a model family stores them.

transformers says how on the experts module: transposed or not, gate and up one after the other or alternating, with or
without biases, with a gate function of the family's own. Everything here hands out matrices as (in, out).

Shapes: N rows, D hidden, F expert hidden, E experts.
"""

from __future__ import annotations

from typing import Any, Protocol, final

import torch
from torch import nn

from emberfed.errors import ModelError
from emberfed.models.quantised import QuantisedWeight

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class ExpertsModule(Protocol):
    """What transformers' experts modules have in common."""

    num_experts: int
    gate_up_proj: nn.Parameter | QuantisedWeight
    down_proj: nn.Parameter | QuantisedWeight
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

    def _matrix(self, name: str, expert: int) -> torch.Tensor:
        stored = getattr(self._experts, name)
        if isinstance(stored, QuantisedWeight):
            matrix = stored.expert(expert, self._dtype)
        else:
            matrix = stored.detach()[expert].to(self._dtype)
        return matrix if self._experts.is_transposed else matrix.t()

    def _bias(self, name: str, expert: int) -> torch.Tensor | None:
        biases = self._biases(name)
        return None if biases is None else biases[expert]

    def _stack(self, name: str) -> torch.Tensor:
        stored = getattr(self._experts, name)
        whole = stored.dequantised(self._dtype) if isinstance(stored, QuantisedWeight) else stored.detach()
        stack: torch.Tensor = whole.to(self._dtype)
        return stack if self._experts.is_transposed else stack.transpose(1, 2)

    def _biases(self, name: str) -> torch.Tensor | None:
        if not self._experts.has_bias:
            return None
        biases: torch.Tensor = getattr(self._experts, name).detach().to(self._dtype)
        return biases
