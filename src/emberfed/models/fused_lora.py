"""LoRA on gate and up as one LoRA on the fused parameter `gate_up_proj`, and apart again.

Fused, A is [A_gate; A_up] and B is block-diagonal, of a rank that is the sum of theirs. Not every fused LoRA is of that
kind: one trained as a whole mixes gate and up. Of rank R, it is exactly gate (A, B_gate) and up (A, B_up), each of
rank R.

Shapes: E experts, R rank, D hidden, F expert hidden. Rows of a fused B are gate's F, then up's F.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

GATE, UP = "gate_proj", "up_proj"


class StackedLora(NamedTuple):
    """One LoRA on every expert.

    Attributes:
        a: (E, R, in).
        b: (E, out, R).
        alpha: The scale is alpha / R.
    """

    a: torch.Tensor
    b: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[1]


def fuse(parts: Mapping[str, StackedLora]) -> StackedLora:
    """Return the LoRA on gate_up_proj that does what those of gate_proj, up_proj or both do.

    It has gate's scale; where up's is another, the difference goes into B.
    """
    if len(parts) == 1:
        ((matrix, lora),) = parts.items()
        none = torch.zeros_like(lora.b)
        rows = [lora.b, none] if matrix == GATE else [none, lora.b]
        return StackedLora(lora.a, torch.cat(rows, 1), lora.alpha)
    gate, up = parts[GATE], parts[UP]
    pad = torch.nn.functional.pad
    ratio = (up.alpha / up.rank) / (gate.alpha / gate.rank)
    b_up = up.b if ratio == 1 else up.b * ratio
    rank = gate.rank + up.rank
    b = torch.cat([pad(gate.b, (0, up.rank)), pad(b_up, (gate.rank, 0))], 1)
    return StackedLora(torch.cat([gate.a, up.a], 1), b, gate.alpha * (rank / gate.rank))


def unfuse(lora: StackedLora) -> dict[str, StackedLora]:
    """Return the LoRA of gate_proj and up_proj: the inverse of `fuse` where the columns of B can be told apart.

    Else both have the whole A. One that does nothing is left out where the other has all columns.
    """
    b_gate, b_up = lora.b.chunk(2, 1)
    first = columns_of_gate(b_gate, b_up)
    if first is None:
        return {GATE: StackedLora(lora.a, b_gate, lora.alpha), UP: StackedLora(lora.a, b_up, lora.alpha)}
    share = first / lora.rank
    parts = {
        GATE: StackedLora(lora.a[:, :first], b_gate[:, :, :first], lora.alpha * share),
        UP: StackedLora(lora.a[:, first:], b_up[:, :, first:], lora.alpha * (1 - share)),
    }
    return {matrix: part for matrix, part in parts.items() if part.rank}


def columns_of_gate(b_gate: torch.Tensor, b_up: torch.Tensor) -> int | None:
    """Return how many of the first columns of B are gate's, the rest being up's; None if some are of both.

    Columns that are zero throughout may be anybody's: half and half where that is possible.

    Args:
        b_gate: (E, F, R).
        b_up: (E, F, R).
    """
    rank = b_gate.shape[2]
    gate, up = (b.ne(0).flatten(0, 1).any(0).nonzero().flatten().tolist() for b in (b_gate, b_up))
    least, most = max(gate, default=-1) + 1, min(up, default=rank)
    if rank % 2 == 0 and least <= rank // 2 <= most:
        return rank // 2
    if least > most or not (gate or up):
        return None
    return least if up else rank


def alternating(b: torch.Tensor) -> torch.Tensor:
    """Return B (E, 2F, R) with rows of gate and up in turn, as some families store them."""
    return torch.stack(b.chunk(2, 1), 2).flatten(1, 2)


def one_after_the_other(b: torch.Tensor) -> torch.Tensor:
    """Inverse of `alternating`."""
    return torch.cat([b[:, 0::2], b[:, 1::2]], 1)


def flatten(lora: StackedLora) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (E * R, in), expert by expert, and B (out, R * E), experts innermost, as PEFT stores them."""
    return lora.a.flatten(0, 1), lora.b.permute(1, 2, 0).flatten(1)


def unflatten(a: torch.Tensor, b: torch.Tensor, rank: int, alpha: float) -> StackedLora:
    """Inverse of `flatten`."""
    return StackedLora(a.view(-1, rank, a.shape[1]), b.view(b.shape[0], rank, -1).permute(2, 0, 1), alpha)
