"""Stacks of some of a layer's experts: what their tensors are called, what shapes they have, and taking them apart.

    layers.{l}.experts.{gate,up,down}_proj.lora_A    (n, R, in)     .lora_B   (n, out, R)     LoRA
    layers.{l}.experts.{gate,up,down}_proj.weight    (n, out, in)                             trained in full

A stack holds n of its layer's E experts, in ascending order of their ids; `Rows` says which. With all of them, the LoRA
is that of `lora_layout`. A layer has the one or the other. Shapes are these for every family, also where transformers
stores weights transposed, or gate and up alternating.

Shapes: E experts, n of them in a stack, R rank, D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from emberfed.errors import ModelError
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora_layout import Sizes, check_sizes, expert_sizes, is_expert, layer_of, pair_sizes

Rows = Mapping[int, tuple[int, ...]]
"""The experts whose tensors the stacks of a decoder layer hold, by their ids, ascending; a layer may have none."""

Tune = Literal["lora", "full"]
"""How an expert is trained: LoRA on its matrices, or the matrices themselves."""

WEIGHT = ".weight"


def all_rows(model: FoundationModel) -> dict[int, tuple[int, ...]]:
    """Return every expert of every layer that has any."""
    return {block.layer: tuple(range(block.num_experts)) for block in model.blocks}


def is_full(name: str) -> bool:
    """Return whether a canonical name is of experts' matrices trained in full."""
    return is_expert(name) and name.endswith(WEIGHT)


def sizes(model: FoundationModel, rows: Rows) -> Sizes:
    """Return the weights (n, out, in) of the experts of `rows`, by canonical path, layers without any left out.

    Raises: ModelError as `check`.
    """
    _check_rows(model, rows)
    return {
        path: (len(rows[layer_of(path)]), *matrix)
        for path, (_, *matrix) in expert_sizes(model).items()
        if rows.get(layer_of(path))
    }


def check(model: FoundationModel, tensors: Mapping[str, torch.Tensor], rows: Rows) -> None:
    """Check that stacks fit the model and hold the experts of `rows`, and that each layer has one kind of them.

    A layer may lack some of the three matrices, but not all.

    Raises: ModelError naming the first layer or tensor that is wrong, what it is and what was expected.
    """
    weights = sizes(model, rows)
    kinds: dict[int, str] = {}
    for name in tensors:
        if not is_expert(name):
            raise ModelError(f"{name!r} is not a tensor of routed experts, and only those are tuned expert by expert")
        layer = layer_of(name)
        if not rows.get(layer):
            raise ModelError(f"there is {name!r}, but no expert of layer {layer} is said to be tuned")
        kind = "full" if is_full(name) else "lora"
        if kinds.setdefault(layer, kind) != kind:
            raise ModelError(
                f"layer {layer} has LoRA and whole weights of its experts, among them {name!r}; train the experts of a "
                f"layer in one way"
            )
    for layer, experts in rows.items():
        if experts and layer not in kinds:
            raise ModelError(f"experts {_listed(experts)} of layer {layer} are to be tuned, but have no tensors")
    check_sizes(tensors, {**pair_sizes(weights), **{f"{path}{WEIGHT}": shape for path, shape in weights.items()}})


def take_rows(tensors: Mapping[str, torch.Tensor], held: Rows, wanted: Rows) -> dict[str, torch.Tensor]:
    """Return copies of some experts' rows; layers of which none is wanted are left out.

    Args:
        tensors: Stacks of the experts `held`.
        held: What they hold.
        wanted: What to take, each expert held.

    Raises: ModelError if an expert is wanted that the stacks do not hold.
    """
    _check_held(held, wanted)
    return {
        name: tensor.index_select(0, _places(held, wanted, layer_of(name), tensor.device))
        for name, tensor in tensors.items()
        if wanted.get(layer_of(name))
    }


def put_rows(
    tensors: Mapping[str, torch.Tensor], held: Rows, values: Mapping[str, torch.Tensor], given: Rows
) -> dict[str, torch.Tensor]:
    """Return the stacks with some experts' rows replaced; stacks without a new row are passed on as they are.

    Args:
        tensors: Stacks of the experts `held`; not changed.
        held: What they hold.
        values: Stacks of the experts `given`, by names that `tensors` has.
        given: What those hold, each expert held.

    Raises: ModelError if `values` holds an expert or a name that `tensors` does not.
    """
    _check_held(held, given)
    foreign = sorted(set(values) - set(tensors))
    if foreign:
        raise ModelError(f"{foreign[0]!r} is not among the stacks its rows are to be put into")
    return {
        name: tensor.index_copy(0, _places(held, given, layer_of(name), tensor.device), values[name].to(tensor))
        if name in values
        else tensor
        for name, tensor in tensors.items()
    }


def _check_rows(model: FoundationModel, rows: Rows) -> None:
    known = {block.layer: block.num_experts for block in model.blocks}
    for layer, experts in rows.items():
        if layer not in known:
            there = _listed(tuple(known)) if known else "none"
            raise ModelError(f"layer {layer} has no experts to tune; layers with experts: {there}")
        if list(experts) != sorted(set(experts)) or not all(0 <= expert < known[layer] for expert in experts):
            raise ModelError(
                f"experts {_listed(experts)} of layer {layer} cannot be tuned; name each once, in ascending order, "
                f"from 0 to {known[layer] - 1}"
            )


def _check_held(held: Rows, wanted: Rows) -> None:
    for layer, experts in wanted.items():
        missing = [expert for expert in experts if expert not in held.get(layer, ())]
        if missing:
            raise ModelError(
                f"expert {missing[0]} of layer {layer} is not in the stacks, which hold {_listed(held.get(layer, ()))}"
            )


def _places(held: Rows, wanted: Rows, layer: int, device: torch.device) -> torch.Tensor:
    """Return where the wanted experts are in a layer's stacks, int64."""
    place = {expert: index for index, expert in enumerate(held[layer])}
    return torch.tensor([place[expert] for expert in wanted[layer]], dtype=torch.int64, device=device)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) if numbers else "none"
