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
    """One stacked tensor and its experts: all of its layer, or some.

    Attributes:
        name: Canonical name of the stacked tensor.
        row: Its layer's row in activation counts.
        stacked: The parameter the model uses, (n, ...).
        views: One parameter per expert of the stack, each a view of `stacked`.
        experts: Which experts of the layer those are, ascending: their columns in activation counts.
        num_experts: E, the experts of the layer.
    """

    name: str
    row: int
    stacked: nn.Parameter
    views: tuple[nn.Parameter, ...]
    experts: tuple[int, ...]
    num_experts: int

    @staticmethod
    def of(name: str, stacked: nn.Parameter, row: int) -> ExpertViews:
        """Split a parameter that stacks all experts of its layer."""
        return ExpertViews.of_some(name, stacked, row, range(len(stacked)), len(stacked))

    @staticmethod
    def of_some(name: str, stacked: nn.Parameter, row: int, experts: Sequence[int], num_experts: int) -> ExpertViews:
        """Split a parameter that stacks these experts of the `num_experts` of its layer."""
        views = tuple(nn.Parameter(view) for view in stacked.detach().unbind())
        return ExpertViews(name, row, stacked, views, tuple(experts), num_experts)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """The gradient of one tensor of the adapter in this step; for a stacked one, of the experts that have any.

    Attributes:
        name: Canonical name.
        parameter: The parameter's present values, (n, ...) if stacked; not to be changed.
        experts_U: The U experts that have a gradient, int64, ascending, by their place in the stack; None if the
            tensor is not stacked.
        values: The gradient, of the parameter's shape, or (U, ...) if stacked. It is the optimiser's own memory:
            what is added or scaled in place is what the optimiser will follow.
    """

    name: str
    parameter: torch.Tensor
    experts_U: torch.Tensor | None
    values: torch.Tensor

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of a tensor like `parameter` that have a gradient, (U, ...); all of it if not stacked."""
        return tensor if self.experts_U is None else tensor.index_select(0, self.experts_U)


@final
@dataclass(frozen=True, slots=True, eq=False)
class TrainableGroups:
    """What to give an optimiser.

    A step is: backward, `take_gradients`, penalties, `clip_gradients`, `optimizer.step()`, `zero_grad`.

    Attributes:
        dense: Parameters every token uses, by canonical name.
        experts: The stacked expert tensors, split.
    """

    dense: Mapping[str, nn.Parameter]
    experts: tuple[ExpertViews, ...]

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters for the optimiser: the dense ones, then every expert of every stacked tensor."""
        return [*self.dense.values(), *(view for group in self.experts for view in group.views)]

    def take_gradients(self, touched_LE: torch.Tensor) -> list[Gradient]:
        """Give each expert its slice of the stacked gradient, and none where it saw no real token since the last step.

        Args:
            touched_LE: Boolean (layers, experts): the expert got at least one real token since the last step. Where a
                mask does not say what is padding, an expert may have a gradient of zeros from it alone, which an
                optimiser with momentum would follow.

        Returns:
            What the optimiser will see, and nothing else: the dense parameters' gradients, then the stacked tensors'.

        Raises: ValueError if `touched_LE` is not boolean of that shape.
        """
        rows = touched_LE.tolist() if touched_LE.dtype == torch.bool and touched_LE.dim() == 2 else []
        gradients = [
            Gradient(name, parameter.detach(), None, parameter.grad)
            for name, parameter in self.dense.items()
            if parameter.grad is not None
        ]
        for group in self.experts:
            if not (group.row < len(rows) and len(rows[group.row]) == group.num_experts):
                raise ValueError(f"touched must be bool (layers, experts), found {touched_LE.dtype} {touched_LE.shape}")
            if group.stacked.grad is None:
                continue
            touched = [rows[group.row][expert] for expert in group.experts]
            experts_U, values = _touched(*_rows(group.stacked.grad), touched)
            for expert, slice_ in zip(experts_U.tolist(), values.unbind(), strict=True):
                group.views[expert].grad = slice_
            gradients.append(Gradient(group.name, group.stacked.detach(), experts_U, values))
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


def _touched(used_U: torch.Tensor, values: torch.Tensor, touched: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts that got a real token, and their rows; copied only if some expert did not."""
    kept = [row for row, expert in enumerate(used_U.tolist()) if touched[expert]]
    if len(kept) == len(values):
        return used_U, values
    index = torch.tensor(kept, dtype=torch.int64, device=values.device)
    return used_U[index], values[index]


def clip_gradients(gradients: Sequence[Gradient], max_norm: float) -> torch.Tensor:
    """Scale gradients in place so that their norm taken together is at most `max_norm`; return what it was.

    As torch's `clip_grad_norm_`, but a stacked tensor is scaled at once, not expert by expert.
    """
    values = [gradient.values for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(values)
    if norm > max_norm:
        torch._foreach_mul_(values, max_norm / (norm + 1e-6))
    return norm
