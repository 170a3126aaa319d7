"""The adapter as trainable parameters of a model: LoRA on attention, experts and MLPs, trained routers and heads.

What its tensors are called, and their shapes: `lora_layout`. The adapted weight is W + alpha / R * B A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, final

import peft
import psutil
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from pydantic import Field, model_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from emberfed.errors import ConfigError
from emberfed.models import lora_layout, peft_layout
from emberfed.models.counting import ActivationCounter
from emberfed.models.foundation_model import FoundationModel, SparseBlock
from emberfed.models.groups import ExpertViews, TrainableGroups
from emberfed.models.head import attached_head, initial_head, is_head, trained_in_full
from emberfed.models.lora_layout import check, is_expert, layer_of, router_weight
from emberfed.models.routed_lora import MATRICES, ExpertLora
from emberfed.models.trainable import Trainable
from emberfed.sections import Section

_NOTHING = "attention, experts, shared_experts and dense_mlp are all false, so there is nothing to adapt"

__all__ = ["Adapter", "LoraConfig", "attached", "check", "initial", "is_expert", "layer_of"]


class LoraConfig(Section):
    """The adapter's size and what it covers.

    Attributes:
        rank: R of every LoRA, up to 65536.
        alpha: The scale is alpha / rank; 1e-6 to 1e6.
        attention: Adapt the linear layers of every attention (q, k, v and o in most families).
        experts: Adapt the three matrices of every routed expert; null does where the model has any.
        shared_experts: Adapt the three matrices of the shared experts, which every token passes.
        dense_mlp: Adapt the matrices of the MLP in every layer without experts; null does in a dense model, which
            has no other layers.
        router: Train the routers' weights too, in full. They are frozen by default.
        head: Train the head that makes logits of classes, in full; null does in a classifier.
        start_from: Folder of a PEFT adapter of the same rank and alpha to begin with; null is a fresh one. It must
            cover what the keys above say, each at least in part.
    """

    rank: int = Field(default=8, ge=1, le=65536)
    alpha: float = Field(default=16.0, ge=1e-6, le=1e6)
    attention: bool = True
    experts: bool | None = None
    shared_experts: bool = False
    dense_mlp: bool | None = None
    router: bool = False
    head: bool | None = None
    start_from: str | None = None

    @model_validator(mode="after")
    def _covers_something(self) -> Self:
        if not (self.attention or self.shared_experts) and self.experts is False and self.dense_mlp is False:
            raise ValueError(f"{_NOTHING}; set one to true")
        return self

    def resolved(self, model: FoundationModel) -> LoraConfig:
        """Return the config with what null means for this model.

        Raises: ConfigError if the model lacks what the config adapts or trains, or there is nothing to adapt.
        """
        routed, dense = not model.is_dense, bool(model.shape.dense_layers)
        for key, there, what in (
            ("experts", routed, "routed experts"),
            ("shared_experts", bool(model.shared_linears()), "shared experts"),
            ("dense_mlp", dense, "layers without experts"),
            ("router", routed, "routers"),
            ("head", model.head is not None, "head for classes"),
        ):
            if getattr(self, key) and not there:
                raise ConfigError(
                    f"adapter.{key} is true, but this {model.family.model_type} model has no {what}; "
                    f"set adapter.{key}=false"
                )
        experts = routed if self.experts is None else self.experts
        dense_mlp = model.is_dense if self.dense_mlp is None else self.dense_mlp
        if not (self.attention or self.shared_experts or experts or dense_mlp):
            raise ConfigError(
                f"{_NOTHING} in this {model.family.model_type} model; set adapter.attention=true or another of them"
            )
        head = model.head is not None if self.head is None else self.head
        return self.model_copy(update={"experts": experts, "dense_mlp": dense_mlp, "head": head})


def initial(model: FoundationModel, config: LoraConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the adapter to begin with, float32 on the CPU, by sorted name.

    A fresh one does not change what the model computes: A is uniform in ±1/sqrt(in), drawn in the order of the names
    (PEFT's default, Kaiming with a = sqrt(5)); B is zero; routers and the head are copies of the base's.

    Raises: ConfigError if the model lacks what the config adapts, a fresh adapter is larger than this machine's memory,
    or the adapter of `start_from` is of another rank, alpha or coverage; ModelError if it cannot be read or is of
    another model.
    """
    sizes = covered(model, config)
    if config.start_from is not None:
        return _started(model, config, config.start_from)
    _check_memory(sizes, config.rank)
    tensors: dict[str, torch.Tensor] = {}
    for name, (*stack, out_features, in_features) in sorted(sizes.items()):
        bound = 1 / math.sqrt(in_features)
        tensors[f"{name}.lora_A"] = torch.empty(*stack, config.rank, in_features).uniform_(
            -bound, bound, generator=generator
        )
        tensors[f"{name}.lora_B"] = torch.zeros(*stack, out_features, config.rank)
    if config.router:
        for block in model.blocks:
            tensors[f"layers.{block.layer}.router.weight"] = _float32_copy(router_weight(block.router), "cpu")
    if config.resolved(model).head:
        tensors |= initial_head(model)
    return dict(sorted(tensors.items()))


def covered(model: FoundationModel, config: LoraConfig) -> lora_layout.Sizes:
    """Return the shapes of the weights that take LoRA, by canonical path.

    Raises: ConfigError as `LoraConfig.resolved`.
    """
    config = config.resolved(model)
    return {
        **(lora_layout.linear_sizes(lora_layout.attention_linears(model)) if config.attention else {}),
        **(lora_layout.expert_sizes(model) if config.experts else {}),
        **(lora_layout.linear_sizes(lora_layout.shared_linears(model)) if config.shared_experts else {}),
        **(lora_layout.linear_sizes(lora_layout.mlp_linears(model)) if config.dense_mlp else {}),
    }


def _check_memory(sizes: lora_layout.Sizes, rank: int) -> None:
    """Check that a fresh adapter can be held at all. Raises: ConfigError."""
    numbers = sum(math.prod(stack) * (outputs + inputs) * rank for *stack, outputs, inputs in sizes.values())
    needed_bytes, memory_bytes = 4 * numbers, psutil.virtual_memory().total
    if needed_bytes > memory_bytes:
        raise ConfigError(
            f"adapter.rank {rank} makes an adapter of {needed_bytes / 1e9:,.0f} GB, but this machine has "
            f"{memory_bytes / 1e9:,.0f} GB of memory; lower adapter.rank"
        )


def _started(model: FoundationModel, config: LoraConfig, folder: str) -> dict[str, torch.Tensor]:
    """Return the adapter in a folder. Raises: ConfigError if it is not what the config says; ModelError."""
    tensors, alpha = peft_layout.from_peft(Path(folder), model)
    where = f"adapter.start_from {folder}"
    kinds = {"head" if is_head(name) else name.split(".")[2] for name in tensors}
    resolved = config.resolved(model)
    for kind, key in (
        ("self_attn", "attention"),
        ("experts", "experts"),
        ("shared_experts", "shared_experts"),
        ("mlp", "dense_mlp"),
        ("router", "router"),
        ("head", "head"),
    ):
        wanted = bool(getattr(resolved, key))
        if (kind in kinds) != wanted:
            meant = str(wanted).lower() if getattr(config, key) is not None else f"null, which is {wanted} here".lower()
            raise ConfigError(
                f"{where} adapts {'no' if wanted else 'the'} {key}, but adapter.{key} is {meant}; "
                f"set adapter.{key}={str(not wanted).lower()}, or give another adapter"
            )
    for name, tensor in tensors.items():
        if name.endswith(".lora_A") and tensor.shape[-2] != config.rank:
            raise ConfigError(
                f"{where}: {name!r} has rank {tensor.shape[-2]}, but adapter.rank is {config.rank}; make them agree"
            )
    if not math.isclose(alpha, config.alpha):
        raise ConfigError(f"{where} has alpha {alpha:g}, but adapter.alpha is {config.alpha:g}; make them agree")
    return tensors


@final
class Adapter(Trainable):
    """An adapter attached to a model."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], model: FoundationModel) -> None:
        """Hold the parameters, and the model they are attached to."""
        self.parameters = dict(sorted(parameters.items()))
        self._model = model

    def trainable_groups(self) -> TrainableGroups:
        """Return the parameters as an optimiser should see them: expert tensors split into one view per expert."""
        rows = {block.layer: row for row, block in enumerate(self._model.blocks)}
        return TrainableGroups(
            dense={name: value for name, value in self.parameters.items() if not is_expert(name)},
            experts=tuple(
                ExpertViews.of(name, value, rows[layer_of(name)])
                for name, value in self.parameters.items()
                if is_expert(name)
            ),
        )

    def counting(self) -> AbstractContextManager[ActivationCounter]:
        """Count the use of the model's own experts, see `FoundationModel.count_activations`."""
        return self._model.count_activations()

    def auxiliary_loss(self) -> torch.Tensor | None:
        """Return None: LoRA has no loss of its own."""
        return None


@contextmanager
def attached(model: FoundationModel, tensors: Mapping[str, torch.Tensor], alpha: float) -> Iterator[Adapter]:
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
        stack.enter_context(attached_head(model, parameters))
        for path, (module, attribute) in lora_layout.linears(model).items():
            if f"{path}.lora_A" in parameters:
                stack.enter_context(_adapted_linear(module, attribute, *_pair(parameters, path), alpha))
        for block in model.blocks:
            factors = _expert_factors(block, parameters)
            if factors:
                stack.enter_context(_adapted_experts(block, factors, alpha))
            if f"layers.{block.layer}.router.weight" in parameters:
                weight = parameters[f"layers.{block.layer}.router.weight"]
                stack.enter_context(trained_in_full(block.router, {"weight": weight}))
            if f"layers.{block.layer}.router.rescaler" in parameters:
                stack.enter_context(_rescaled(block.router, parameters[f"layers.{block.layer}.router.rescaler"]))
        yield Adapter(parameters, model)


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
        transposed = isinstance(base, Conv1D)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, fan_in_fan_out=transposed)
        adapted = PeftLinear(base, "default", config, r=rank, lora_alpha=alpha)
    adapted.lora_A["default"].weight = a
    adapted.lora_B["default"].weight = b
    setattr(module, attribute, adapted)
    try:
        yield
    finally:
        setattr(module, attribute, base)


def _expert_factors(
    block: SparseBlock, parameters: Mapping[str, nn.Parameter]
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return A and B of the block's matrices that have LoRA."""
    paths = {matrix: f"layers.{block.layer}.experts.{matrix}" for matrix in MATRICES}
    return {matrix: _pair(parameters, path) for matrix, path in paths.items() if f"{path}.lora_A" in parameters}


@contextmanager
def _adapted_experts(
    block: SparseBlock, factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]], alpha: float
) -> Iterator[None]:
    block.experts.add_module("emberfed_lora", ExpertLora(factors, alpha))
    try:
        yield
    finally:
        del block.experts.emberfed_lora


@contextmanager
def _rescaled(router: nn.Module, rescaler: nn.Parameter) -> Iterator[None]:
    """Multiply the router's weights, and with them the experts' combined output, which is linear in them."""

    def scale(_: nn.Module, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_TE, weights_TK, *rest = output
        return logits_TE, (weights_TK * rescaler).to(weights_TK.dtype), *rest

    hook = router.register_forward_hook(scale)
    try:
        yield
    finally:
        hook.remove()


def _float32_copy(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.detach().to(device, torch.float32, copy=True).contiguous()
