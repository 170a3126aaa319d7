"""What an expert's matrices are now: the base's, with what was trained in the expert so far.

Shapes: D hidden, F expert hidden, R rank, n experts that a stack holds in its layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from emberfed.errors import ModelError
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.foundation_model import FoundationModel, SparseBlock
from emberfed.models.lora_layout import is_expert
from emberfed.models.routed_lora import MATRICES
from emberfed.models.tuning_layout import Rows, check

_INPUT_SIDE = MATRICES[:2]


@final
@dataclass(frozen=True, slots=True, eq=False)
class ExpertMatrices:
    """One expert's matrices, float32, as (in, out).

    Attributes:
        gate_up_D2F: Gate and up in the order of the family: one after the other, or column by column in turn.
        down_FD: What makes the output.
        gate_up_bias: (2F), or None where the family has no biases.
        down_bias: (D), or None where the family has no biases.
    """

    gate_up_D2F: torch.Tensor
    down_FD: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


@final
class ExpertValues:
    """The present value of each expert of a model: its base, and what an adapter of some experts says.

    It reads the model as it stands when asked, so ask where all experts are in place: outside `compact.compacted`.
    """

    def __init__(
        self,
        model: FoundationModel,
        tensors: Mapping[str, torch.Tensor],
        rows: Rows,
        alpha: float,
    ) -> None:
        """Put an adapter of experts on top of a model, without changing either.

        Args:
            model: The base; its experts may be parameters, quantised or off-loaded.
            tensors: Stacks `layers.{l}.experts.{matrix}.lora_A` (n, R, in), `.lora_B` (n, out, R), and `.weight`
                (n, out, in) of matrices trained in full. What is not of routed experts is passed over.
            rows: Which experts the n of each layer's stacks are.
            alpha: The scale of a LoRA is alpha / R.

        Raises: ModelError if the stacks do not fit the model, or are not of the experts of `rows`.
        """
        self._blocks = model.blocks
        self._alpha = alpha
        self._places = {layer: {expert: n for n, expert in enumerate(experts)} for layer, experts in rows.items()}
        self._trained = {name: tensor.detach() for name, tensor in tensors.items() if is_expert(name)}
        check(model, self._trained, rows)

    def base(self, row: int, expert: int) -> ExpertMatrices:
        """Return what an expert's LoRA is added to: its base, or what was trained in full instead.

        Args:
            row: The layer's row in `FoundationModel.blocks`.
            expert: The expert's id, from 0.

        Returns:
            Matrices that may be views of the model's: not to be changed.

        Raises: ModelError if the layer does not hold all its experts now.
        """
        return self._matrices(self._blocks[row], expert, with_lora=False)

    def matrices(self, row: int, expert: int) -> ExpertMatrices:
        """Return an expert's present value: `base`, and alpha / R * B A added to it where it has a LoRA.

        Args and returns as `base`, and it raises as that does.
        """
        return self._matrices(self._blocks[row], expert, with_lora=True)

    def trained_in_full(self, row: int, expert: int) -> bool:
        """Return whether `base` is another than the model's own."""
        return any(f"{name}.weight" in self._trained for name in self._names(self._blocks[row], expert))

    def trained(self, row: int, expert: int) -> bool:
        """Return whether `matrices` are others than the model's own, or may be."""
        kinds = ("lora_A", "weight")
        names = self._names(self._blocks[row], expert)
        return any(f"{name}.{kind}" in self._trained for name in names for kind in kinds)

    def _names(self, block: SparseBlock, expert: int) -> tuple[str, ...]:
        """Return the paths of an expert's matrices; none if no stack holds the expert."""
        if expert not in self._places.get(block.layer, {}):
            return ()
        return tuple(f"layers.{block.layer}.experts.{matrix}" for matrix in MATRICES)

    def _matrices(self, block: SparseBlock, expert: int, with_lora: bool) -> ExpertMatrices:
        experts: Any = block.experts
        if experts.num_experts != block.num_experts:
            raise ModelError(
                f"layer {block.layer} holds {experts.num_experts} experts now instead of its {block.num_experts}; read "
                f"the values of experts before the model is made compact"
            )
        weights = ExpertWeights(experts, torch.float32)
        gate_up_D2F, down_FD = weights.gate_up(expert), weights.down(expert)
        names = self._names(block, expert)
        if any(f"{name}.{kind}" in self._trained for name in names for kind in ("lora_A", "weight")):
            gate_up_D2F, down_FD = gate_up_D2F.clone(), down_FD.clone()
        for name, matrix in zip(names, MATRICES, strict=False):
            value_IO = weights.half(matrix, gate_up_D2F) if matrix in _INPUT_SIDE else down_FD
            self._put(value_IO, name, self._places[block.layer][expert], with_lora)
        return ExpertMatrices(gate_up_D2F, down_FD, weights.gate_up_bias(expert), weights.down_bias(expert))

    def _put(self, value_IO: torch.Tensor, name: str, place: int, with_lora: bool) -> None:
        """Write the trained value of one matrix over the base's, and its LoRA onto it."""
        full = self._trained.get(f"{name}.weight")
        if full is not None:
            value_IO.copy_(full[place].t())
        if with_lora and f"{name}.lora_A" in self._trained:
            a_RI, b_OR = (self._trained[f"{name}.lora_{side}"][place].to(value_IO) for side in "AB")
            value_IO.add_(a_RI.t() @ b_OR.t(), alpha=self._alpha / len(a_RI))
