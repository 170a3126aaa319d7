"""What a training loop needs of anything attached to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import nn

from emberfed.models.counting import ActivationCounter
from emberfed.models.groups import TrainableGroups


class Trainable(ABC):
    """An adapter attached to a model, as training sees it.

    Attributes:
        parameters: What the model computes with: float32, by sorted canonical name.
        top_k: Experts of its own that are active per token; 0 if it has none.
    """

    parameters: dict[str, nn.Parameter]
    top_k: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of the parameters' present values, on the CPU."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, parameter in self.parameters.items()
        }

    @abstractmethod
    def trainable_groups(self) -> TrainableGroups:
        """Return the parameters as an optimiser should see them: expert tensors split into one view per expert."""

    @abstractmethod
    def counting(self) -> AbstractContextManager[ActivationCounter]:
        """Count, inside the context, the real tokens each expert gets: of the experts that are trained.

        `take() > 0` of the counter is what `TrainableGroups.take_gradients` asks for.
        """

    @abstractmethod
    def auxiliary_loss(self) -> torch.Tensor | None:
        """Return what the last forward pass adds to the loss for the gates' sake, weighted; None if there is no such.

        It belongs in the same backward pass as the loss.
        """
