"""Products of all experts of a layer in one call, and what they want of their operands.

Rows are sorted by expert, as in `Dispatch`; torch's grouped products want rows of 16 bytes, so ranks are filled up with
zeros to a multiple of 8.

Shapes: T tokens, K active experts, S routed pairs, R rank, E experts, U experts with rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch.nn import functional as F

from emberfed.models.dispatch import Dispatch
from emberfed.models.low_rank import Factors, sparse_over_experts

_MULTIPLE = 8


@final
@dataclass(frozen=True, slots=True, eq=False)
class PaddedFactors:
    """Factors in the type of the computation, their rank filled up with zeros; `scale` is folded into A."""

    a_ERI: torch.Tensor
    b_EOR: torch.Tensor

    @staticmethod
    def of(factors: Factors, dtype: torch.dtype) -> PaddedFactors:
        """Copy the factors."""
        missing = -factors.a_ERI.shape[1] % _MULTIPLE
        a_ERI = F.pad((factors.a_ERI.detach() * factors.scale).to(dtype), (0, 0, 0, missing))
        return PaddedFactors(a_ERI, F.pad(factors.b_EOR.detach().to(dtype), (0, missing)))


def offsets(dispatch: Dispatch) -> torch.Tensor:
    """Return where each expert's rows end, int32 (E,)."""
    return dispatch.loads_E.cumsum(0).to(torch.int32)


def product(left: torch.Tensor, right: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Return rows (S, in) times each expert's own matrix (E, in, out), or (X, S) times (S, Y) as (E, X, Y)."""
    result: torch.Tensor = F.grouped_mm(left, right, offs=offsets_E)
    return result


def factor_gradient(
    factor: torch.Tensor, left_SX: torch.Tensor, right_SY: torch.Tensor, dispatch: Dispatch, scale: float
) -> torch.Tensor:
    """Return scale * left' right of each expert with rows as the gradient of a stacked factor, sparse over experts."""
    used_U = dispatch.loads_E.nonzero()[:, 0]
    # Experts without rows hold whatever was in memory; only the used ones are read.
    values = product(_filled(left_SX).t(), _filled(right_SY), offsets(dispatch))[used_U]
    values = values[:, : factor.shape[1], : factor.shape[2]].to(factor.dtype)
    scaled = values if scale == 1 else values * scale
    return sparse_over_experts(scaled.contiguous(), used_U, len(factor))


def to_tokens(y_SD: torch.Tensor, dispatch: Dispatch, gates_TK: torch.Tensor) -> torch.Tensor:
    """Sum the rows of each token, slot by slot in float32: (T, D), in the type of the rows."""
    by_pair_PD = y_SD.new_zeros(gates_TK.numel(), y_SD.shape[1]).index_copy_(0, dispatch.pair_S, y_SD)
    return by_pair_PD.view(*gates_TK.shape, -1).sum(1, dtype=torch.float32).to(y_SD.dtype)


def _filled(x_SX: torch.Tensor) -> torch.Tensor:
    """Fill the columns up with zeros to a multiple of 8."""
    return F.pad(x_SX, (0, -x_SX.shape[1] % _MULTIPLE)).contiguous()
