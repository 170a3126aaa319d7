"""The adapter's tensors: what they are called, what shapes they have in a model, and whether they fit it.

Names do not depend on transformers or PEFT:

    layers.{l}.self_attn.{linear}.lora_A                 (R, in)       .lora_B   (out, R)
    layers.{l}.experts.{gate,up,down}_proj.lora_A        (E, R, in)    .lora_B   (E, out, R)
    layers.{l}.shared_experts.{gate,up,down}_proj.lora_A (R, in)       .lora_B   (out, R)
    layers.{l}.mlp.{linear}.lora_A                       (R, in)       .lora_B   (out, R)    layers without experts
    layers.{l}.router.weight                             (E, D)        trained in full
    layers.{l}.router.rescaler                           (1,)          factor of the routed experts' combined output
    head.{parameter}                                                   trained in full, see `head`

{linear} is the family's own name of it, a dotted path from the attention or the MLP: q_proj, fc1, output.dense.

An adapter holds any of them, lora_A and lora_B always together, and the head whole. The adapted weight is
W + alpha / R * B A; R is read from the shapes and may differ from tensor to tensor, also between gate_proj and up_proj.
Shapes are these for every family, also where transformers stores weights transposed, or gate and up alternating.

Shapes: E experts, R rank, D hidden, F expert hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from emberfed.errors import ModelError, closest
from emberfed.models.foundation_model import FoundationModel, Slot, linear_size
from emberfed.models.head import head_parameters

_EXPERT = re.compile(r"layers\.\d+\.experts\.")
_LAYER = re.compile(r"layers\.(\d+)\.")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Sizes = Mapping[str, tuple[int, ...]]
"""Shape of the adapted weight, (out, in) or (E, out, in), by canonical path: the name of its LoRA without `.lora_A`."""


def is_expert(name: str) -> bool:
    """Return whether a canonical name is of a tensor stacked over experts."""
    return _EXPERT.match(name) is not None


def layer_of(name: str) -> int:
    """Return the decoder layer of a canonical name. Raises: ModelError if it is not one."""
    match = _LAYER.match(name)
    if match is None:
        raise ModelError(f"{name!r} is not the name of a layer's adapter tensor; they begin with 'layers.<number>.'")
    return int(match[1])


def attention_linears(model: FoundationModel) -> Mapping[str, Slot]:
    """Return where the attention's linear layers that take LoRA are, by canonical path."""
    return {f"layers.{layer}.self_attn.{name}": slot for (layer, name), slot in model.attention_linears().items()}


def shared_linears(model: FoundationModel) -> Mapping[str, Slot]:
    """Return where the linear layers of shared experts are, by canonical path; empty for a family that has none."""
    return {f"layers.{layer}.shared_experts.{name}": slot for (layer, name), slot in model.shared_linears().items()}


def mlp_linears(model: FoundationModel) -> Mapping[str, Slot]:
    """Return where the linear layers of MLPs in layers without experts are, by canonical path."""
    return {f"layers.{layer}.mlp.{name}": slot for (layer, name), slot in model.mlp_linears().items()}


def linears(model: FoundationModel) -> Mapping[str, Slot]:
    """Return where all linear layers are that take LoRA, by canonical path."""
    return {**attention_linears(model), **shared_linears(model), **mlp_linears(model)}


def linear_sizes(linears: Mapping[str, Slot]) -> Sizes:
    """Return the weights' shapes of linear layers."""
    return {path: linear_size(getattr(*slot)) for path, slot in linears.items()}


def expert_sizes(model: FoundationModel) -> Sizes:
    """Return the stacked weights of routed experts."""
    experts, inner, hidden = model.shape.num_experts, model.shape.expert_intermediate, model.shape.hidden
    shapes = {
        "gate_proj": (experts, inner, hidden),
        "up_proj": (experts, inner, hidden),
        "down_proj": (experts, hidden, inner),
    }
    return {
        f"layers.{block.layer}.experts.{matrix}": shape for block in model.blocks for matrix, shape in shapes.items()
    }


def router_sizes(model: FoundationModel) -> Sizes:
    """Return the routers' weights."""
    return {f"layers.{block.layer}.router.weight": tuple(router_weight(block.router).shape) for block in model.blocks}


def rescaler_sizes(model: FoundationModel) -> Sizes:
    """Return the rescalers, one number for each layer with experts."""
    return {f"layers.{block.layer}.router.rescaler": (1,) for block in model.blocks}


def head_sizes(model: FoundationModel) -> Sizes:
    """Return the parameters of the head; empty where the model generates."""
    return {name: tuple(parameter.shape) for name, parameter in head_parameters(model).items()}


def router_weight(router: nn.Module) -> nn.Parameter:
    """Return a router's weight, (E, D)."""
    weight = router.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def check(model: FoundationModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that an adapter fits the model: whole pairs, a whole head or none, nothing foreign, right shapes.

    Raises: ModelError naming the first tensor that is wrong, what it is and what was expected.
    """
    expected = {
        **pair_sizes({**linear_sizes(linears(model)), **expert_sizes(model)}),
        **router_sizes(model),
        **rescaler_sizes(model),
        **head_sizes(model),
    }
    _check_names(tensors, expected)
    of_head = [name for name in head_sizes(model) if name in tensors]
    for name in head_sizes(model) if of_head else ():
        if name not in tensors:
            raise ModelError(
                f"the adapter has {of_head[0]!r} but lacks {name!r}; the parameters of a head belong together"
            )
    _check_shapes(tensors, expected)


def check_sizes(tensors: Mapping[str, torch.Tensor], expected: Sizes) -> None:
    """Check that tensors are of these names and shapes, where 0 stands for a rank, and LoRA's are whole pairs.

    Raises: ModelError as `check`.
    """
    _check_names(tensors, expected)
    _check_shapes(tensors, expected)


def _check_names(tensors: Mapping[str, torch.Tensor], expected: Sizes) -> None:
    for name in tensors:
        if name not in expected:
            raise ModelError(f"adapter tensor {name!r} has no place in this model{closest(name, expected)}")
        partner = _partner(name)
        if partner not in tensors:
            raise ModelError(f"the adapter has {name!r} but lacks {partner!r}; lora_A and lora_B belong together")


def _check_shapes(tensors: Mapping[str, torch.Tensor], expected: Sizes) -> None:
    for name, tensor in tensors.items():
        _check_shape(name, tensor, expected[name], tensors)


def pair_sizes(sizes: Sizes) -> Sizes:
    """Return the shapes of lora_A and lora_B of weights; 0 stands for the rank."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (*stack, out_features, in_features) in sizes.items():
        shapes[f"{name}.lora_A"] = (*stack, 0, in_features)
        shapes[f"{name}.lora_B"] = (*stack, out_features, 0)
    return shapes


def _partner(name: str) -> str:
    """Name of the other factor of a LoRA; what is trained in full stands alone."""
    path, _, factor = name.rpartition(".")
    return f"{path}.{({'lora_A': 'lora_B', 'lora_B': 'lora_A'}).get(factor, factor)}"


def _check_shape(
    name: str, tensor: torch.Tensor, expected: tuple[int, ...], tensors: Mapping[str, torch.Tensor]
) -> None:
    if tensor.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ModelError(f"adapter tensor {name!r} is {tensor.dtype}; expected one of {allowed}")
    found = tuple(tensor.shape)
    rank = _rank(name, tensors)
    wanted = tuple(size or rank for size in expected)
    if found != wanted or 0 in found:
        rank_too = f", of rank {rank} >= 1" if 0 in expected else ""
        raise ModelError(
            f"adapter tensor {name!r} has shape {found}; expected {wanted}{rank_too}, "
            f"in a model with {_facts(expected)}"
        )


def _rank(name: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """Rank of the pair a tensor is of: the rows of its lora_A."""
    if not name.endswith((".lora_A", ".lora_B")):
        return 0
    a = tensors[f"{name.rpartition('.')[0]}.lora_A"]
    return a.shape[-2] if a.dim() >= 2 else 0


def _facts(expected: tuple[int, ...]) -> str:
    return " x ".join("rank" if size == 0 else str(size) for size in expected)
