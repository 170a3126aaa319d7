"""The size of an expert's gradient from forward passes alone, by simultaneous perturbation (SPSA).

A client estimates so what experts are worth that it does not train (FLUX's exploration): with z standard normal,

    d = (L(w + mu z) - L(w - mu z)) / (2 mu),    d -> <grad L, z> as mu -> 0,    E[<grad L, z>^2] = ||grad L||^2

since E[z z'] is the identity (Spall 1992, "Multivariate stochastic approximation using a simultaneous perturbation
gradient approximation", eq. 2.2, there with other z). <grad L, z> is normal, so the mean of d^2 over N draws has a
relative standard deviation of sqrt(2 / N): one draw tells the order of magnitude. On a quadratic L the differences are
exact for every mu; else they are off by order mu^2.

Shapes: F expert hidden, D hidden, R rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import nn

from emberfed.errors import ModelError
from emberfed.models.expert_layer import matrix_of
from emberfed.models.expert_overlay import float32_or_wider, overlaid
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.low_rank import OUTPUT_SIDE
from emberfed.models.routed_lora import MATRICES

Direction = Mapping[str, torch.Tensor]
"""One tensor for each parameter, of its shape."""


def squared_gradient_norm(
    loss_along: Callable[[Direction, float], float],
    shapes: Mapping[str, tuple[int, ...]],
    mu: float,
    draws: int,
    generator: torch.Generator,
) -> float:
    """Return an estimate of ||grad L||^2 over some parameters: the mean of d^2 over `draws`.

    Args:
        loss_along: L at the parameters plus a step along a direction.
        shapes: The parameters' shapes; z is drawn in the order of their sorted names, float32 on the CPU.
        mu: The step, above 0.
        draws: Directions, at least 1; each costs two losses.
        generator: For z.

    Raises: ValueError if `mu` or `draws` is out of range.
    """
    if not 0 < mu < math.inf or draws < 1:
        raise ValueError(f"mu must be above 0 and draws at least 1, found {mu} and {draws}")
    squares = []
    for _ in range(draws):
        direction = {name: torch.randn(shapes[name], generator=generator) for name in sorted(shapes)}
        slope = (loss_along(direction, mu) - loss_along(direction, -mu)) / (2 * mu)
        squares.append(slope**2)
    return math.fsum(squares) / draws


class ExploredExpert(ABC):
    """A frozen expert of a layer, whole or compact, and parameters of it that could be trained.

    The slot holds the expert's present value. Nothing is written to the model's own numbers: moved matrices are beside
    them, in float32, so that also a base in 16 bits, quantised or off-loaded can be explored.
    """

    def __init__(self, experts: nn.Module, slot: int) -> None:
        """Explore the expert in a slot of an experts module; in a whole model the slot is the expert's id.

        Raises: ModelError if there is no such slot, or the expert in it is trained in full.
        """
        module: Any = experts
        full = getattr(module, "emberfed_full", None)
        trained = 0 if full is None else max(map(len, full.stacks.values()))
        if not trained <= slot < module.num_experts:
            raise ModelError(
                f"the expert in slot {slot} cannot be explored: the layer has {module.num_experts} slots, and those "
                f"before {trained} are trained in full; choose {trained} to {module.num_experts - 1}"
            )
        self._experts = module
        self._slot = slot

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters."""

    @abstractmethod
    def change(self, direction: Direction, step: float) -> dict[str, torch.Tensor]:
        """Return what the parameters plus step * direction add to the expert's matrices, (out, in) by matrix."""

    @final
    @contextmanager
    def moved(self, direction: Direction, step: float) -> Iterator[None]:
        """Let the layer compute with the parameters plus step * direction inside the context, without gradients."""
        dtype = float32_or_wider(self._experts)
        weights = ExpertWeights(self._experts, dtype)
        changes = self.change(direction, step)
        values = {
            matrix: matrix_of(weights, self._slot, matrix).t() + change.to(dtype) for matrix, change in changes.items()
        }
        with overlaid(self._experts, {self._slot: values}):
            yield

    @final
    @torch.no_grad()
    def squared_gradient_norm(
        self, loss: Callable[[], float], mu: float, draws: int, generator: torch.Generator
    ) -> float:
        """Return an estimate of the squared norm of the loss's gradient over the parameters.

        Args:
            loss: Runs the model and returns the loss, the same at every call but for the parameters.
            mu: The step.
            draws: Directions; each costs two losses.
            generator: For them.

        Raises: ValueError if `mu` or `draws` is out of range.
        """

        def loss_along(direction: Direction, step: float) -> float:
            with self.moved(direction, step):
                return loss()

        return squared_gradient_norm(loss_along, self.shapes, mu, draws, generator)


@final
class ExploredMatrices(ExploredExpert):
    """Its three matrices, as if trained in full: (F, D), (F, D) and (D, F), by matrix."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the matrices."""
        weights = ExpertWeights(self._experts, torch.float32)
        inner = weights.gate_up_size // 2
        hidden = self._experts.gate_up_proj.shape[1 if self._experts.is_transposed else 2]
        return {matrix: (hidden, inner) if matrix == OUTPUT_SIDE else (inner, hidden) for matrix in MATRICES}

    def change(self, direction: Direction, step: float) -> dict[str, torch.Tensor]:
        """Return step * direction."""
        return {matrix: step * z_OI.to(self._experts.gate_up_proj.device) for matrix, z_OI in direction.items()}


@final
class ExploredLora(ExploredExpert):
    """Its LoRA: `<matrix>.lora_A` (R, in) and `<matrix>.lora_B` (out, R). Norms are those of gradients of A and B."""

    def __init__(
        self, experts: nn.Module, slot: int, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float
    ) -> None:
        """Explore A and B, by matrix, that are in the slot's value already; the scale is `alpha` / R.

        Raises: ModelError as `ExploredExpert`.
        """
        super().__init__(experts, slot)
        self._factors = {matrix: (a.detach(), b.detach()) for matrix, (a, b) in factors.items()}
        self._alpha = alpha

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the factors."""
        return {
            f"{matrix}.lora_{side}": tuple(factor.shape)
            for matrix, pair in self._factors.items()
            for side, factor in zip("AB", pair, strict=True)
        }

    def change(self, direction: Direction, step: float) -> dict[str, torch.Tensor]:
        """Return alpha / R ((B + step z_B)(A + step z_A) - B A), written so that nothing large cancels."""
        changes = {}
        for matrix, (a, b) in self._factors.items():
            z_a, z_b = (step * direction[f"{matrix}.lora_{side}"].to(a) for side in "AB")
            changes[matrix] = self._alpha / len(a) * (z_b @ (a + z_a) + b @ z_a)
        return changes
