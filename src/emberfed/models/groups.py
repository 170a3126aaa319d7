"""Parameters as an optimiser should see them, so that an expert without tokens is not moved.

Weight decay and momentum move a parameter whose gradient is zero. An optimiser skips a parameter whose gradient is
None, but a tensor stacked over experts has one gradient for all. So each expert is a parameter of its own here: a view
that shares the stacked tensor's storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import nn


@final
@dataclass(frozen=True, slots=True, eq=False)
class ExpertViews:
    """One stacked tensor and its experts.

    Attributes:
        name: Canonical name of the stacked tensor.
        row: Its layer's row in activation counts.
        stacked: The parameter the model uses, (E, ...).
        views: One parameter per expert, each a view of `stacked`.
    """

    name: str
    row: int
    stacked: nn.Parameter
    views: tuple[nn.Parameter, ...]

    @staticmethod
    def of(name: str, stacked: nn.Parameter, row: int) -> ExpertViews:
        """Split a stacked parameter."""
        return ExpertViews(name, row, stacked, tuple(nn.Parameter(view) for view in stacked.detach().unbind()))


@final
@dataclass(frozen=True, slots=True, eq=False)
class TrainableGroups:
    """What to give an optimiser. A step is: backward, clip, `scatter_gradients`, `optimizer.step()`, `zero_grad`.

    Attributes:
        dense: Parameters every token uses, by canonical name.
        experts: The stacked expert tensors, split.
    """

    dense: Mapping[str, nn.Parameter]
    experts: tuple[ExpertViews, ...]

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters for the optimiser: the dense ones, then every expert of every stacked tensor."""
        return [*self.dense.values(), *(view for group in self.experts for view in group.views)]

    def scatter_gradients(self, touched_LE: torch.Tensor) -> None:
        """Give each expert its slice of the stacked gradient, or None where it saw no token since the last step.

        Args:
            touched_LE: Boolean (layers, experts): the expert got at least one real token since the last step.

        Raises: ValueError if it is not boolean of that shape.
        """
        rows = touched_LE.tolist() if touched_LE.dtype == torch.bool and touched_LE.dim() == 2 else []
        for group in self.experts:
            if not (group.row < len(rows) and len(rows[group.row]) == len(group.views)):
                raise ValueError(f"touched must be bool (layers, experts), found {touched_LE.dtype} {touched_LE.shape}")
            gradient = group.stacked.grad
            for expert, view in enumerate(group.views):
                view.grad = gradient[expert] if gradient is not None and rows[group.row][expert] else None

    def zero_grad(self) -> None:
        """Forget all gradients; an optimiser's own `zero_grad` does not know the stacked ones."""
        for parameter in (*self.parameters(), *(group.stacked for group in self.experts)):
            parameter.grad = None
