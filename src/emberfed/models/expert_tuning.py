"""Some experts of a model as trainable parameters: LoRA on their matrices, or the matrices themselves, in full.

A client tunes few experts (FLUX), so stacks hold those alone: see `tuning_layout` for names and shapes. Inside
`compact.compacted` a layer's tuned experts are its first slots, and so the stacks' rows are theirs; a whole model can
be tuned so too, if a layer's tuned experts are its first ones, or all of them.

Shapes: L layers with experts, E experts, n of them tuned, R rank, D hidden, F expert hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, final

import psutil
import torch
from torch import nn

from emberfed.errors import ConfigError, ModelError
from emberfed.models.compact import LayerPlan
from emberfed.models.counting import ActivationCounter
from emberfed.models.expert_layer import matrix_of
from emberfed.models.expert_overlay import overlaid
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.foundation_model import FoundationModel, SparseBlock
from emberfed.models.groups import ExpertViews, TrainableGroups
from emberfed.models.lora_layout import layer_of
from emberfed.models.routed_lora import MATRICES, ExpertFull, ExpertLora
from emberfed.models.trainable import Trainable
from emberfed.models.tuning_layout import WEIGHT, Rows, Tune, check, is_full, sizes

_FLOAT32_BYTES = 4


def initial(
    model: FoundationModel, rows: Rows, tune: Tune, rank: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return what to begin with for these experts, float32 on the CPU, by sorted name. It changes nothing yet.

    Args:
        model: The model, with all its experts in place.
        rows: Which experts.
        tune: `lora`: A is uniform in ±1/sqrt(in), drawn in the order of the names, and B zero. `full`: copies of the
            experts' matrices, restored where the base is quantised or off-loaded.
        rank: R of LoRA.
        generator: For A.

    Raises: ModelError if the model lacks an expert of `rows`; ConfigError if it takes more than this machine's memory.
    """
    weights = dict(sorted(sizes(model, rows).items()))
    _check_memory(weights, tune, rank)
    if tune == "full":
        blocks = {block.layer: block for block in model.blocks}
        return {f"{path}{WEIGHT}": _values(blocks[layer_of(path)], path, rows[layer_of(path)]) for path in weights}
    tensors: dict[str, torch.Tensor] = {}
    for path, (count, out_features, in_features) in weights.items():
        bound = 1 / math.sqrt(in_features)
        tensors[f"{path}.lora_A"] = torch.empty(count, rank, in_features).uniform_(-bound, bound, generator=generator)
        tensors[f"{path}.lora_B"] = torch.zeros(count, out_features, rank)
    return tensors


@final
class TunedExperts(Trainable):
    """Stacks of tuned experts attached to a model.

    Attributes:
        parameters: What the model computes with: float32, by sorted canonical name.
        rows: Which experts they are, by decoder layer.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rows: Rows, model: FoundationModel) -> None:
        """Hold the parameters, whose they are, and the model they are attached to."""
        self.parameters = dict(sorted(parameters.items()))
        self.rows = dict(rows)
        self._model = model

    def trainable_groups(self) -> TrainableGroups:
        """Return the parameters as an optimiser should see them: one view per tuned expert."""
        row_of = {block.layer: (row, block.num_experts) for row, block in enumerate(self._model.blocks)}

        def views(name: str, stacked: nn.Parameter) -> ExpertViews:
            row, num_experts = row_of[layer_of(name)]
            return ExpertViews.of_some(name, stacked, row, self.rows[layer_of(name)], num_experts)

        return TrainableGroups({}, tuple(views(name, stacked) for name, stacked in self.parameters.items()))

    def counting(self) -> AbstractContextManager[ActivationCounter]:
        """Count the routers' choice by the experts' own ids, (L, E), see `FoundationModel.count_activations`."""
        return self._model.count_activations()

    def auxiliary_loss(self) -> torch.Tensor | None:
        """Return None: experts have no loss of their own."""
        return None


@contextmanager
def attached(
    model: FoundationModel, tensors: Mapping[str, torch.Tensor], rows: Rows, alpha: float
) -> Iterator[TunedExperts]:
    """Run the model with tuned experts inside the context; on exit it is exactly as found, also after exceptions.

    Args:
        model: The model, compact (with the plan's tuned experts being those of `rows`) or whole (`rows` being the first
            experts of each layer, as all of them are). What is tuned in full is not read from it.
        tensors: The stacks; copied, never aliased.
        rows: Which experts they hold.
        alpha: The scale of LoRA is alpha / R.

    Raises: ModelError if the stacks do not fit (see `tuning_layout.check`), or are not of the first experts.
    """
    check(model, tensors, rows)
    for block in model.blocks:
        _check_slots(block, rows.get(block.layer, ()))
    parameters = {name: nn.Parameter(_float32_copy(tensor, model.device)) for name, tensor in tensors.items()}
    with ExitStack() as stack:
        for block in model.blocks:
            for name, module in _modules(block, parameters, alpha).items():
                block.experts.add_module(name, module)
                stack.callback(delattr, block.experts, name)
        yield TunedExperts(parameters, rows, model)


@contextmanager
def replaced(model: FoundationModel, tensors: Mapping[str, torch.Tensor], rows: Rows) -> Iterator[None]:
    """Run a whole model with some experts' matrices replaced, without gradients; on exit it has its bits again.

    A base in 16 or 32 bits is written to, each number rounded once, and put back from copies of just those experts. On
    a quantised or off-loaded base the replaced experts are held in float32 beside it.

    Args:
        model: The model, with all its experts in place.
        tensors: Stacks of matrices trained in full.
        rows: Which experts they hold.

    Raises: ModelError if the stacks do not fit, hold LoRA, or the model is compact.
    """
    check(model, tensors, rows)
    for name in tensors:
        if not is_full(name):
            raise ModelError(f"{name!r} is LoRA, which replaces no weights; attach it instead")
    for block in model.blocks:
        if _plan(block) is not None:
            raise ModelError(f"layer {block.layer} is compact, so its experts cannot be replaced by their ids")
    with ExitStack() as stack:
        for block in model.blocks:
            experts: Any = block.experts
            matrices = _by_expert(block, tensors, rows)
            in_place = isinstance(experts.gate_up_proj, torch.Tensor)
            stack.enter_context(_written(experts, matrices) if in_place else overlaid(experts, matrices))
        yield


@contextmanager
def _written(experts: Any, matrices: Mapping[int, Mapping[str, torch.Tensor]]) -> Iterator[None]:
    stored = [
        (_stored(experts, expert, matrix), value) for expert, own in matrices.items() for matrix, value in own.items()
    ]
    before = [place_IO.clone() for place_IO, _ in stored]
    try:
        for place_IO, value_OI in stored:
            place_IO.copy_(value_OI.t())
        yield
    finally:
        for (place_IO, _), value_IO in zip(stored, before, strict=True):
            place_IO.copy_(value_IO)


def _stored(experts: Any, expert: int, matrix: str) -> torch.Tensor:
    """Return a view (in, out) of one matrix where the base holds it."""
    weights = ExpertWeights(experts, experts.gate_up_proj.dtype)  # its own type, so that it hands out views
    return matrix_of(weights, expert, matrix)


def _values(block: SparseBlock, path: str, experts: tuple[int, ...]) -> torch.Tensor:
    """Return the present values of one matrix of some experts, float32 on the CPU, (n, out, in)."""
    module: Any = block.experts
    weights, matrix = ExpertWeights(module, torch.float32), path.rpartition(".")[2]
    return torch.stack([matrix_of(weights, expert, matrix).t().cpu() for expert in experts])


def _by_expert(
    block: SparseBlock, tensors: Mapping[str, torch.Tensor], rows: Rows
) -> dict[int, dict[str, torch.Tensor]]:
    """Return the matrices (out, in) of the block's replaced experts, by expert and matrix."""
    names = {matrix: f"layers.{block.layer}.experts.{matrix}{WEIGHT}" for matrix in MATRICES}
    return {
        expert: {matrix: tensors[name][place].detach() for matrix, name in names.items() if name in tensors}
        for place, expert in enumerate(rows.get(block.layer, ()))
    }


def _modules(block: SparseBlock, parameters: Mapping[str, nn.Parameter], alpha: float) -> dict[str, nn.Module]:
    """Return what to attach to a block's experts, by the name the routed layer looks for."""
    paths = {matrix: f"layers.{block.layer}.experts.{matrix}" for matrix in MATRICES}
    factors = {
        matrix: (parameters[f"{path}.lora_A"], parameters[f"{path}.lora_B"])
        for matrix, path in paths.items()
        if f"{path}.lora_A" in parameters
    }
    full = {matrix: parameters[f"{path}{WEIGHT}"] for matrix, path in paths.items() if f"{path}{WEIGHT}" in parameters}
    lora: dict[str, nn.Module] = {"emberfed_lora": ExpertLora(factors, alpha)} if factors else {}
    return lora | ({"emberfed_full": ExpertFull(full)} if full else {})


def _plan(block: SparseBlock) -> LayerPlan | None:
    """Return what a compact layer holds; None if it is whole."""
    plan: LayerPlan | None = getattr(block.experts, "emberfed_compact", None)
    return plan


def _check_slots(block: SparseBlock, experts: tuple[int, ...]) -> None:
    plan = _plan(block)
    first = tuple(range(len(experts))) if plan is None else plan.tuned
    if experts and experts != first:
        state = "whole" if plan is None else "compact"
        raise ModelError(
            f"experts {experts} of layer {block.layer} cannot be tuned: the layer is {state}, and its first slots hold "
            f"{first}; make it compact with a plan that tunes those experts"
        )


def _check_memory(weights: Mapping[str, tuple[int, ...]], tune: Tune, rank: int) -> None:
    numbers = sum(
        count * (out_features * in_features if tune == "full" else rank * (out_features + in_features))
        for count, out_features, in_features in weights.values()
    )
    needed_bytes, memory_bytes = _FLOAT32_BYTES * numbers, psutil.virtual_memory().total
    if needed_bytes > memory_bytes:
        raise ConfigError(
            f"training these experts ({tune}) takes tensors of {needed_bytes / 1e9:,.0f} GB, but this machine has "
            f"{memory_bytes / 1e9:,.0f} GB of memory; "
            + ("lower adapter.rank" if tune == "lora" else "set adapter.tune=lora")
        )


def _float32_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.detach().to(device, torch.float32, copy=True).contiguous()
