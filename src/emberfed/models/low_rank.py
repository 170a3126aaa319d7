"""LoRA of stacked experts as the expert paths see it: factors of one matrix, and gradients of used experts only.

Shapes: N rows of one expert, E experts, U experts that got rows, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

INPUT_SIDE = ("gate_proj", "up_proj")
OUTPUT_SIDE = "down_proj"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """LoRA of one matrix of every expert.

    Attributes:
        a_ERI: (E, R, in).
        b_EOR: (E, out, R).
        scale: alpha / R.
    """

    a_ERI: torch.Tensor
    b_EOR: torch.Tensor
    scale: float

    def low(self, x_NI: torch.Tensor, expert: int) -> torch.Tensor:
        """Return scale * x A', (N, R)."""
        return (x_NI @ self.a_ERI[expert].to(x_NI.dtype).t()).mul_(self.scale)

    def high(self, low_NR: torch.Tensor, expert: int) -> torch.Tensor:
        """Return low B', (N, out)."""
        return low_NR @ self.b_EOR[expert].to(low_NR.dtype).t()

    def add_high(self, y_NO: torch.Tensor, low_NR: torch.Tensor, expert: int) -> None:
        """Add low B' to `y_NO` in place."""
        y_NO.addmm_(low_NR, self.b_EOR[expert].to(y_NO.dtype).t())

    def low_gradient(self, dy_NO: torch.Tensor, expert: int) -> torch.Tensor:
        """Return the gradient of x A', (N, R)."""
        return (dy_NO @ self.b_EOR[expert].to(dy_NO.dtype)).mul_(self.scale)

    def input_gradient(self, dlow_NR: torch.Tensor, expert: int) -> torch.Tensor:
        """Return the gradient of x that comes through x A', (N, in)."""
        return dlow_NR @ self.a_ERI[expert].to(dlow_NR.dtype)

    def add_input_gradient(self, dx_NI: torch.Tensor, dlow_NR: torch.Tensor, expert: int) -> None:
        """Add the gradient of x that comes through x A' to `dx_NI` in place."""
        dx_NI.addmm_(dlow_NR, self.a_ERI[expert].to(dx_NI.dtype))


def paired(scales: Mapping[str, float], factors: Sequence[torch.Tensor]) -> dict[str, Factors]:
    """Return the factors by matrix from A, B, A, B, ... in the order of `scales`."""
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return {matrix: Factors(a, b, scale) for (matrix, scale), (a, b) in zip(scales.items(), pairs, strict=True)}


def sparse_over_experts(values: torch.Tensor, used_U: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return a gradient (E, ...) that holds only the rows (U, ...) of the experts `used_U`, int64 and ascending."""
    shape = (num_experts, *values.shape[1:])
    return torch.sparse_coo_tensor(used_U.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False)


@final
class FactorGradients:
    """Gradients of the factors, with rows for the experts that got tokens and no others."""

    def __init__(self, lora: Mapping[str, Factors], used: Iterable[int], device: torch.device) -> None:
        """Make room for the factors that are trained."""
        self._used_U = torch.tensor(list(used), dtype=torch.int64, device=device)
        self._values = {
            (matrix, side): factor.new_empty(len(self._used_U), *factor.shape[1:])
            for matrix, factors in lora.items()
            for side, factor in (("A", factors.a_ERI), ("B", factors.b_EOR))
            if factor.requires_grad
        }

    def put(self, matrix: str, side: str, row: int, left_NX: torch.Tensor, right_NY: torch.Tensor) -> None:
        """Write left' right as the gradient of one factor of the expert in that row."""
        values = self._values.get((matrix, side))
        if values is None:
            return
        if values.dtype == left_NX.dtype:
            torch.mm(left_NX.t(), right_NY, out=values[row])
        else:
            values[row] = left_NX.t() @ right_NY

    def stacked(self, num_experts: int) -> dict[tuple[str, str], torch.Tensor]:
        """Return the gradients of the stacked factors, sparse over experts."""
        return {key: sparse_over_experts(values, self._used_U, num_experts) for key, values in self._values.items()}
