"""LoRA of stacked experts as the expert paths see it: factors of one matrix, and gradients of used experts only.

A stack may hold fewer experts than the layer has: the first ones.

Shapes: N rows of one expert, E experts of the stack, U of them that got rows, R rank.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

INPUT_SIDE = ("gate_proj", "up_proj")
OUTPUT_SIDE = "down_proj"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """LoRA of one matrix of every expert of a stack.

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


def stacks_of(lora: Mapping[str, Factors]) -> dict[tuple[str, str], torch.Tensor]:
    """Return the stacked factors by (matrix, "A" | "B")."""
    both = {matrix: (("A", factors.a_ERI), ("B", factors.b_EOR)) for matrix, factors in lora.items()}
    return {(matrix, side): stack for matrix, sides in both.items() for side, stack in sides}


def sparse_over_experts(values: torch.Tensor, used_U: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return a gradient (E, ...) that holds only the rows (U, ...) of the experts `used_U`, int64 and ascending."""
    shape = (num_experts, *values.shape[1:])
    return torch.sparse_coo_tensor(used_U.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False)


@final
class StackGradients:
    """Gradients of stacked tensors, with rows for the experts that got tokens and no others."""

    def __init__(
        self, stacks: Mapping[tuple[str, str], torch.Tensor], used: Sequence[int], device: torch.device
    ) -> None:
        """Make room for the stacks that are trained.

        Args:
            stacks: By matrix and what it is: "A", "B" or "weight".
            used: The experts that got rows, ascending; those behind the end of a stack have no gradient in it.
            device: Where the stacks are.
        """
        self._used_U = torch.tensor(used, dtype=torch.int64, device=device)
        self._sizes = {key: len(stack) for key, stack in stacks.items() if stack.requires_grad}
        self._values = {
            key: stacks[key].new_empty(bisect_left(used, size), *stacks[key].shape[1:])
            for key, size in self._sizes.items()
        }

    def put(self, matrix: str, kind: str, row: int, left_NX: torch.Tensor, right_NY: torch.Tensor) -> None:
        """Write left' right as the gradient of one tensor of the expert that is in place `row` of those used."""
        values = self._values.get((matrix, kind))
        if values is None:
            return
        if values.dtype == left_NX.dtype:
            torch.mm(left_NX.t(), right_NY, out=values[row])
        else:
            values[row] = left_NX.t() @ right_NY

    def stacked(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return the gradients, sparse over experts."""
        return {
            key: sparse_over_experts(values, self._used_U[: len(values)], self._sizes[key])
            for key, values in self._values.items()
        }
