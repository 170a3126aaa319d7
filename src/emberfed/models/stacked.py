"""Where a model keeps the weights of its experts: in stacked parameters, or in what stands in their place.

transformers holds a layer's experts in two parameters of three dimensions. A `StackedWeight` takes the place of one of
them and hands out one expert at a time, from numbers kept in another way: in fewer bits (`quantised`), or in a file
(`offloaded`).

Shapes: E experts, each (rows, columns) as transformers stores them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn

from emberfed.errors import ModelError

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Names of the stacked parameters of transformers' experts modules."""


class StackedWeight(nn.Module, ABC):
    """A stack of frozen expert matrices that stands where the stacked parameter stood; nothing can train it."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(E, rows, columns), as of the parameter it stands for."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype | None:
        """The type its numbers are kept in; None if they are codes, restored in whatever type is asked for."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where experts are handed out."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes it takes of the device's memory."""

    @property
    @abstractmethod
    def kept_as(self) -> str:
        """What its numbers are kept as, in words: `4 bit`, `float32 on disk`."""

    @abstractmethod
    def expert(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's matrix, (rows, columns): a fresh tensor."""

    @final
    def numel(self) -> int:
        """Return the number of weights."""
        return self.shape.numel()

    @final
    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all experts as plain numbers, (E, rows, columns); beside the result it needs room for one expert."""
        whole = torch.empty(self.shape, dtype=dtype, device=self.device)
        for index in range(len(whole)):
            whole[index] = self.expert(index, dtype)
        return whole


def stacked_weights(lm: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return (name, experts module, attribute) of every stacked expert weight, replaced or not, in the model's order.

    Raises: ModelError if there is none.
    """
    found = [
        (f"{path}.{attribute}", module, attribute)
        for path, module in lm.named_modules()
        for attribute in EXPERT_WEIGHTS
        if getattr(getattr(module, attribute, None), "ndim", 0) == 3
        or isinstance(getattr(module, attribute, None), StackedWeight)
    ]
    if not found:
        raise ModelError("the model has no stacked expert weights that could be kept in fewer bits, or on disk")
    return found


def replace(module: nn.Module, attribute: str, weight: StackedWeight) -> None:
    """Put a weight in the place of the parameter with that name, or of what stands there."""
    delattr(module, attribute)
    setattr(module, attribute, weight)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Check the values of a weight. Raises: ModelError if one is infinite or no number."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ModelError(
            f"{name} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}; the checkpoint is "
            f"damaged, or its numbers are too large for this model.dtype"
        )
