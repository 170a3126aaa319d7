"""Parameters as an optimiser should see them, so that an expert without tokens is not moved.

Weight decay and momentum move a parameter whose gradient is zero. An optimiser skips a parameter whose gradient is
None, but a tensor stacked over experts has one gradient for all. So each expert is a parameter of its own here: a view
that shares the stacked tensor's storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """What to give an optimiser. A step is: backward, `take_gradients`, clip, `optimizer.step()`, `zero_grad`.

    Attributes:
        dense: Parameters every token uses, by canonical name.
        experts: The stacked expert tensors, split.
    """

    dense: Mapping[str, nn.Parameter]
    experts: tuple[ExpertViews, ...]

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters for the optimiser: the dense ones, then every expert of every stacked tensor."""
        return [*self.dense.values(), *(view for group in self.experts for view in group.views)]

    def take_gradients(self, touched_LE: torch.Tensor) -> list[torch.Tensor]:
        """Give each expert its slice of the stacked gradient, or None where it saw no real token since the last step.

        Args:
            touched_LE: Boolean (layers, experts): the expert got at least one real token since the last step. Where a
                mask does not say what is padding, an expert may have a gradient of zeros from it alone, which an
                optimiser with momentum would follow.

        Returns:
            All gradients: of the dense parameters, and of each stacked tensor (experts with rows, ...). The experts'
            slices share their memory, so that scaling them in place clips.

        Raises: ValueError if `touched_LE` is not boolean of that shape.
        """
        rows = touched_LE.tolist() if touched_LE.dtype == torch.bool and touched_LE.dim() == 2 else []
        gradients = [parameter.grad for parameter in self.dense.values() if parameter.grad is not None]
        for group in self.experts:
            if not (group.row < len(rows) and len(rows[group.row]) == len(group.views)):
                raise ValueError(f"touched must be bool (layers, experts), found {touched_LE.dtype} {touched_LE.shape}")
            if group.stacked.grad is None:
                continue
            used_U, values = _rows(group.stacked.grad)
            for expert, slice_ in zip(used_U.tolist(), values.unbind(), strict=True):
                group.views[expert].grad = slice_ if rows[group.row][expert] else None
            gradients.append(values)
        return gradients

    def zero_grad(self) -> None:
        """Forget all gradients; an optimiser's own `zero_grad` does not know the stacked ones."""
        for parameter in (*self.parameters(), *(group.stacked for group in self.experts)):
            parameter.grad = None


def _rows(sparse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts, ascending, and their rows; summed only if several backward passes were accumulated."""
    used_U = sparse._indices()[0]
    if not bool((used_U.diff() > 0).all()):  # torch forgets that one pass alone needs no summing, and would copy
        sparse = sparse.coalesce()
    return sparse._indices()[0], sparse._values()


def clip_gradients(gradients: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients in place so that their norm taken together is at most `max_norm`; return what it was.

    As torch's `clip_grad_norm_`, but on tensors: slices of stacked gradients are no parameters' own.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm > max_norm:
        torch._foreach_mul_(list(gradients), max_norm / (norm + 1e-6))
    return norm
