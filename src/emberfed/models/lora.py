"""The adapter: LoRA on attention and on every expert, as named tensors and as trainable parameters of the model.

Names do not depend on transformers or PEFT:

    layers.{l}.self_attn.{q,k,v,o}_proj.lora_A    (R, in)       .lora_B   (out, R)
    layers.{l}.experts.{gate,up,down}_proj.lora_A (E, R, in)    .lora_B   (E, out, R)
    layers.{l}.router.weight                      (E, D)        trained in full

The adapted weight is W + alpha / R * B A. R is read from the shapes and may differ from tensor to tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self, final

import peft
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from pydantic import Field, model_validator
from torch import nn

from emberfed.errors import ModelError, closest
from emberfed.models.groups import ExpertViews, TrainableGroups
from emberfed.models.routed_lora import MATRICES, ExpertLora
from emberfed.models.sparse_model import SparseBlock, SparseModel
from emberfed.sections import Section

_EXPERT = re.compile(r"layers\.\d+\.experts\.")
_LAYER = re.compile(r"layers\.(\d+)\.")
Sizes = Mapping[str, tuple[int, ...]]
"""Shape of the adapted weight, (out, in) or (E, out, in), by the name of its LoRA without `.lora_A`."""


class LoraConfig(Section):
    """The adapter's size and what it covers.

    Attributes:
        rank: R of every LoRA.
        alpha: The scale is alpha / rank.
        attention: Adapt q, k, v and o of every layer.
        experts: Adapt the three matrices of every routed expert.
        router: Train the routers' weights too, in full. They are frozen by default.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    attention: bool = True
    experts: bool = True
    router: bool = False

    @model_validator(mode="after")
    def _covers_something(self) -> Self:
        if not (self.attention or self.experts):
            raise ValueError("attention and experts are both false, so there is nothing to adapt; set one to true")
        return self


def is_expert(name: str) -> bool:
    """Return whether a canonical name is of a tensor stacked over experts."""
    return _EXPERT.match(name) is not None


def layer_of(name: str) -> int:
    """Return the decoder layer of a canonical name. Raises: ModelError if it is not one."""
    match = _LAYER.match(name)
    if match is None:
        raise ModelError(f"{name!r} is not an adapter tensor's name; they begin with 'layers.<number>.'")
    return int(match[1])


def attention_sizes(model: SparseModel) -> Sizes:
    """Return the attention weights that take LoRA."""
    linears = {key: getattr(module, name) for key, (module, name) in model.attention_linears().items()}
    return {
        f"layers.{layer}.self_attn.{name}": (linear.out_features, linear.in_features)
        for (layer, name), linear in linears.items()
    }


def expert_sizes(model: SparseModel) -> Sizes:
    """Return the stacked expert weights that take LoRA."""
    experts, inner, hidden = model.shape.num_experts, model.shape.expert_intermediate, model.shape.hidden
    shapes = {
        "gate_proj": (experts, inner, hidden),
        "up_proj": (experts, inner, hidden),
        "down_proj": (experts, hidden, inner),
    }
    return {
        f"layers.{block.layer}.experts.{matrix}": shape for block in model.blocks for matrix, shape in shapes.items()
    }


def router_sizes(model: SparseModel) -> Sizes:
    """Return the routers' weights."""
    return {f"layers.{block.layer}.router.weight": tuple(_weight(block.router).shape) for block in model.blocks}


def initial(model: SparseModel, config: LoraConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return a fresh adapter, float32 on the CPU, by sorted name; it does not change what the model computes.

    A is uniform in ±1/sqrt(in), drawn in the order of the names (PEFT's default, Kaiming with a = sqrt(5)); B is zero;
    routers are copies of the base's.
    """
    lora: dict[str, tuple[int, ...]] = {}
    if config.attention:
        lora |= attention_sizes(model)
    if config.experts:
        lora |= expert_sizes(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, (*stack, out_features, in_features) in sorted(lora.items()):
        bound = 1 / math.sqrt(in_features)
        tensors[f"{name}.lora_A"] = torch.empty(*stack, config.rank, in_features).uniform_(
            -bound, bound, generator=generator
        )
        tensors[f"{name}.lora_B"] = torch.zeros(*stack, out_features, config.rank)
    if config.router:
        for block in model.blocks:
            tensors[f"layers.{block.layer}.router.weight"] = _float32_copy(_weight(block.router), "cpu")
    return dict(sorted(tensors.items()))


def check(model: SparseModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that an adapter fits the model: whole (each kind it has, in every layer), nothing foreign, right shapes.

    Raises: ModelError naming the first tensor that is wrong, what it is and what was expected.
    """
    kinds = (_pairs(attention_sizes(model)), _pairs(expert_sizes(model)), router_sizes(model))
    expected = {name: shape for kind in kinds for name, shape in kind.items()}
    for name in tensors:
        if name not in expected:
            raise ModelError(f"adapter tensor {name!r} has no place in this model{closest(name, expected)}")
    for kind in kinds:
        missing = sorted(set(kind) - set(tensors))
        if missing and len(missing) < len(kind):
            raise ModelError(f"the adapter lacks {missing[0]!r} and {len(missing) - 1} more; give a whole adapter")
    for name, tensor in tensors.items():
        _check_shape(name, tensor, expected[name], tensors)


def _pairs(sizes: Sizes) -> Sizes:
    """Shapes of lora_A and lora_B; 0 stands for the rank."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (*stack, out_features, in_features) in sizes.items():
        shapes[f"{name}.lora_A"] = (*stack, 0, in_features)
        shapes[f"{name}.lora_B"] = (*stack, out_features, 0)
    return shapes


def _check_shape(
    name: str, tensor: torch.Tensor, expected: tuple[int, ...], tensors: Mapping[str, torch.Tensor]
) -> None:
    if not tensor.is_floating_point():
        raise ModelError(f"adapter tensor {name!r} is {tensor.dtype}; expected a floating-point type")
    found = tuple(tensor.shape)
    rank = _rank(name, tensors)
    wanted = tuple(size or rank for size in expected)
    if found != wanted or 0 in found:
        raise ModelError(
            f"adapter tensor {name!r} has shape {found}; expected {wanted}, "
            f"of rank {rank} >= 1, in a model with {_facts(expected)}"
        )


def _rank(name: str, tensors: Mapping[str, torch.Tensor]) -> int:
    """Rank of the pair a tensor is of: the rows of its lora_A."""
    if name.endswith(".weight"):
        return 0
    a = tensors[f"{name.rpartition('.')[0]}.lora_A"]
    return a.shape[-2] if a.dim() >= 2 else 0


def _facts(expected: tuple[int, ...]) -> str:
    return " x ".join("rank" if size == 0 else str(size) for size in expected)


@final
class Adapter:
    """An adapter attached to a model.

    Attributes:
        parameters: What the model computes with: float32, by sorted canonical name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rows: Mapping[int, int]) -> None:
        """Hold the parameters; `rows` is the row of each decoder layer in activation counts."""
        self.parameters = dict(sorted(parameters.items()))
        self._rows = dict(rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of the parameters' present values, on the CPU."""
        return {name: _float32_copy(parameter, "cpu") for name, parameter in self.parameters.items()}

    def trainable_groups(self) -> TrainableGroups:
        """Return the parameters as an optimiser should see them: expert tensors split into one view per expert."""
        return TrainableGroups(
            dense={name: value for name, value in self.parameters.items() if not is_expert(name)},
            experts=tuple(
                ExpertViews.of(name, value, self._rows[layer_of(name)])
                for name, value in self.parameters.items()
                if is_expert(name)
            ),
        )


@contextmanager
def attached(model: SparseModel, tensors: Mapping[str, torch.Tensor], alpha: float) -> Iterator[Adapter]:
    """Run the model with an adapter inside the context; on exit the model is exactly as found, also after exceptions.

    Args:
        model: The model; its own weights stay frozen and untouched.
        tensors: The adapter; copied, never aliased. An empty one attaches nothing.
        alpha: The scale is alpha / R.

    Raises: ModelError if the adapter does not fit (see `check`).
    """
    check(model, tensors)
    parameters = {name: nn.Parameter(_float32_copy(tensor, model.device)) for name, tensor in tensors.items()}
    with ExitStack() as stack:
        for (layer, name), (module, attribute) in model.attention_linears().items():
            path = f"layers.{layer}.self_attn.{name}"
            if f"{path}.lora_A" in parameters:
                stack.enter_context(_adapted_linear(module, attribute, *_pair(parameters, path), alpha))
        for block in model.blocks:
            if f"layers.{block.layer}.experts.gate_proj.lora_A" in parameters:
                stack.enter_context(_adapted_experts(block, parameters, alpha))
            if f"layers.{block.layer}.router.weight" in parameters:
                stack.enter_context(_trained_router(block.router, parameters[f"layers.{block.layer}.router.weight"]))
        yield Adapter(parameters, {block.layer: row for row, block in enumerate(model.blocks)})


def _pair(parameters: Mapping[str, nn.Parameter], path: str) -> tuple[nn.Parameter, nn.Parameter]:
    return parameters[f"{path}.lora_A"], parameters[f"{path}.lora_B"]


@contextmanager
def _adapted_linear(
    module: nn.Module, attribute: str, a: nn.Parameter, b: nn.Parameter, alpha: float
) -> Iterator[None]:
    base = getattr(module, attribute)
    rank = a.shape[0]
    # PEFT draws initial weights from the global random stream; on the meta device it draws nothing, and ours follow.
    with torch.device("meta"):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False)
        adapted = PeftLinear(base, "default", config, r=rank, lora_alpha=alpha)
    adapted.lora_A["default"].weight = a
    adapted.lora_B["default"].weight = b
    setattr(module, attribute, adapted)
    try:
        yield
    finally:
        setattr(module, attribute, base)


@contextmanager
def _adapted_experts(block: SparseBlock, parameters: Mapping[str, nn.Parameter], alpha: float) -> Iterator[None]:
    factors = {matrix: _pair(parameters, f"layers.{block.layer}.experts.{matrix}") for matrix in MATRICES}
    block.experts.add_module("emberfed_lora", ExpertLora(factors, alpha))
    try:
        yield
    finally:
        del block.experts.emberfed_lora


@contextmanager
def _trained_router(router: nn.Module, weight: nn.Parameter) -> Iterator[None]:
    base = _weight(router)
    slots = router._parameters  # the one way to put a computed tensor where a parameter is

    def use_trained(_: nn.Module, __: Any) -> None:
        slots["weight"] = weight.to(base.dtype)  # type: ignore[assignment]

    hook = router.register_forward_pre_hook(use_trained)
    try:
        yield
    finally:
        hook.remove()
        slots["weight"] = base


def _weight(router: nn.Module) -> nn.Parameter:
    weight = router.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _float32_copy(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.detach().to(device, torch.float32, copy=True).contiguous()
