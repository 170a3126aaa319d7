"""Which rows go to which expert: tokens sorted by expert once, for everything that computes expert by expert.

Shapes: T tokens, K active experts, S routed (token, slot) pairs, at most T * K; E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch


@final
@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """Routed pairs in the order of their experts; pairs of one expert are in the order of their tokens.

    Attributes:
        pair_S: int64, index of each pair in the flattened (T, K).
        token_S: int64, index of its token.
        loads_E: int64, pairs per expert.
    """

    pair_S: torch.Tensor
    token_S: torch.Tensor
    loads_E: torch.Tensor

    @staticmethod
    def of(index_TK: torch.Tensor, num_experts: int) -> Dispatch:
        """Sort the router's choice. A pair whose index is `num_experts` (padding) goes to no expert."""
        expert_P = index_TK.reshape(-1)
        order_P = torch.argsort(expert_P, stable=True)
        loads_E = torch.bincount(expert_P, minlength=num_experts + 1)[:num_experts]
        pair_S = order_P[: int(loads_E.sum())]
        return Dispatch(pair_S, pair_S // index_TK.shape[1], loads_E)

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has rows, and which rows, in order."""
        start = 0
        for expert, load in enumerate(self.loads_E.tolist()):
            if load:
                yield expert, slice(start, start + load)
                start += load
