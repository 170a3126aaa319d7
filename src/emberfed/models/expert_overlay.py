"""Some experts of a layer with other frozen matrices, while the layer's own stacks stay as they are.

The numbers are beside the stacks, in float32, whatever those are: a parameter in 16 bits, quantised, in a file. So a
small change is not lost in rounding, and nothing has to be put back.

Shapes: D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn

from emberfed.models.expert_layer import down_with, gate_up_with
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.low_rank import INPUT_SIDE, OUTPUT_SIDE
from emberfed.models.stacked import EXPERT_WEIGHTS, StackedWeight


@contextmanager
def overlaid(experts: nn.Module, matrices: Mapping[int, Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """Let experts of one layer compute with other matrices inside the context, without gradients of them.

    Args:
        experts: The experts module.
        matrices: By expert (in a compact model: by slot) and then by gate_proj, up_proj (F, D) and down_proj (D, F):
            what takes the place of its own. Copied.
    """
    module: Any = experts
    own = vars(module)
    before = {name: own[name] for name in EXPERT_WEIGHTS if name in own}
    weights = ExpertWeights(module, float32_or_wider(module))
    stacks = {
        name: _Overlay(getattr(module, name), _stored(module, weights, name, matrices)) for name in EXPERT_WEIGHTS
    }
    own.update(stacks)  # hides the registered ones, which stay where they are
    try:
        yield
    finally:
        for name in EXPERT_WEIGHTS:
            del own[name]
        own.update(before)


def float32_or_wider(experts: Any) -> torch.dtype:
    """Return the type in which changes to a layer's experts are made: float64 where the base is."""
    held = experts.gate_up_proj.dtype
    return torch.float32 if held is None else torch.promote_types(held, torch.float32)


def _stored(
    experts: Any, weights: ExpertWeights, name: str, matrices: Mapping[int, Mapping[str, torch.Tensor]]
) -> dict[int, torch.Tensor]:
    """Return the changed matrices of one stack, as the family stores them."""
    parts, made = (INPUT_SIDE, gate_up_with) if name == "gate_up_proj" else ((OUTPUT_SIDE,), down_with)
    changed = {
        expert: made(weights, expert, given).clone()
        for expert, given in matrices.items()
        if not set(parts).isdisjoint(given)
    }
    return changed if experts.is_transposed else {expert: matrix.t() for expert, matrix in changed.items()}


@final
class _Overlay(StackedWeight):
    """A stack of which some experts are others."""

    def __init__(self, base: nn.Parameter | StackedWeight, changed: Mapping[int, torch.Tensor]) -> None:
        """Hold the changed experts, (rows, columns) each."""
        super().__init__()
        self._base: Any = base.detach() if isinstance(base, torch.Tensor) else base
        self._changed = dict(changed)

    @property
    def shape(self) -> torch.Size:
        """(E, rows, columns)."""
        shape: torch.Size = self._base.shape
        return shape

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the stack."""
        dtype: torch.dtype | None = self._base.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """That of the stack."""
        device: torch.device = self._base.device
        return device

    @property
    def nbytes(self) -> int:
        """Bytes of the stack and of the changed experts."""
        return int(self._base.nbytes) + sum(matrix.nbytes for matrix in self._changed.values())

    @property
    def kept_as(self) -> str:
        """What the stack is kept as, and how many experts are others."""
        own = str(self.dtype).removeprefix("torch.") if isinstance(self._base, torch.Tensor) else self._base.kept_as
        return f"{own}, {len(self._changed)} experts changed"

    def expert(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's matrix, (rows, columns)."""
        changed = self._changed.get(index)
        if changed is not None:
            return changed.to(dtype)
        if isinstance(self._base, torch.Tensor):
            return self._base[index].to(dtype)
        matrix: torch.Tensor = self._base.expert(index, dtype)
        return matrix
