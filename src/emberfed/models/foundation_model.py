"""`FoundationModel`: a transformers model, where its parts are, and how many experts are active, if it has any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, Literal, final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from emberfed.errors import ConfigError, ModelError
from emberfed.models.counting import ActivationCounter, counting
from emberfed.models.expert_weights import check_supported
from emberfed.models.families import (
    GATED_LINEARS,
    Family,
    ImageInput,
    Mixture,
    Task,
    family_of,
    joined,
    misfit,
    part,
)
from emberfed.models.gating import Gate, Rescale, mass_of, with_mass
from emberfed.models.hosts import Host, hosts_of
from emberfed.models.matmul import hasten
from emberfed.models.padding import PaddingFilter
from emberfed.models.routed_lora import IMPLEMENTATION
from emberfed.models.stacked import StackedWeight

Slot = tuple[nn.Module, str]
"""A module, and its attribute that holds a linear layer."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class SparseBlock:
    """One mixture-of-experts block.

    Attributes:
        layer: Index of its decoder layer.
        module: The block itself.
        router: Module that returns (logits, weights, index).
        experts: Module with the stacked expert weights.
        shared_experts: MLP that every token goes through besides its experts, if the block has one.
        num_experts: E.
        native_top_k: K of the checkpoint.
        native_gate: What the checkpoint does with the weights of the kept experts.
    """

    layer: int
    module: nn.Module
    router: nn.Module
    experts: nn.Module
    shared_experts: nn.Module | None
    num_experts: int
    native_top_k: int
    native_gate: Gate


@final
@dataclass(frozen=True, slots=True)
class ImageShape:
    """How large images are, and what becomes of one.

    Attributes:
        channels: Channels of a pixel.
        height: Rows of pixels.
        width: Columns of pixels.
        patches: Patches it is cut into.
        positions: Positions of it that go through the layers: its patches, and the class token or more.
        patch_values: Numbers of one patch.
    """

    channels: int
    height: int
    width: int
    patches: int
    positions: int
    patch_values: int


@final
@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes a cost model needs.

    Attributes:
        hidden: D.
        expert_intermediate: F, the hidden size of one expert; 0 in a dense model.
        shared_intermediate: Hidden size of the MLP that every token goes through besides its experts; 0 if none.
        dense_intermediate: Hidden size of the MLP of layers without experts; 0 if every layer has experts.
        num_layers: Layers.
        sparse_layers: Indices of those with experts.
        dense_layers: Indices of those without.
        num_experts: E per block; 1 in a dense model.
        native_top_k: K of the checkpoint; 1 in a dense model.
        attention: (out, in) of each attention linear of layer 0.
        query: Those of them that make the queries, one after the other.
        key: Those that make the keys.
        value: Those that make the values; where all three are the same, one layer makes all of them.
        output: The one that mixes what the heads give.
        mlp: Linears of an MLP; the last one is applied to the product of what the others give.
        heads: Query heads.
        qk_head_dim: Size of one head's query and key.
        v_head_dim: Size of one head's value.
        parallel_residual: Whether attention and MLP of a layer read the same input.
        vocabulary: Rows of the output: the embedding's, or classes.
        head: (out, in) of each linear layer of the head that makes logits of classes, in their order, by the name of
            its weight in an adapter; empty where the model generates.
        pooler: (out, in) of the frozen linear layer in front of that head; None without one.
        image: How large its images are; None where its input is text.
        parameters: All parameters, tied ones once, those kept in fewer bits included.
    """

    hidden: int
    expert_intermediate: int
    shared_intermediate: int
    dense_intermediate: int
    num_layers: int
    sparse_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    num_experts: int
    native_top_k: int
    attention: Mapping[str, tuple[int, int]]
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    output: str
    mlp: tuple[str, ...]
    heads: int
    qk_head_dim: int
    v_head_dim: int
    parallel_residual: bool
    vocabulary: int
    head: Mapping[str, tuple[int, int]]
    pooler: tuple[int, int] | None
    image: ImageShape | None
    parameters: int

    @property
    def head_dim(self) -> int:
        """Size of one head, for models whose queries, keys and values agree on it."""
        return self.qk_head_dim


@final
@dataclass(frozen=True, slots=True)
class _Routing:
    top_k: int
    gate: Gate
    rescale: Rescale


@final
class FoundationModel:
    """A frozen transformers model with sparse mixtures of experts, or a dense one.

    A dense model has no mixtures, and counts as one expert that is always active: E and K are 1.

    Attributes:
        lm: The transformers model, in eval mode, without gradients; call it, or `lm.generate`, as usual. A classifier
            is called with `pixel_values`, or with `input_ids` and `attention_mask`.
        family: The record that says where its parts are.
        blocks: Its mixtures of experts, from the first layer to the last; empty if it is dense.
        padding: Which positions of the present forward pass are padding.
    """

    def __init__(self, lm: Any) -> None:
        """Take over a transformers model: freeze it and let it compute experts our way.

        Raises: ModelError if it is of no known family, or not built as its family's record says.
        """
        self.family: Family = family_of(lm.config)
        self.lm = lm.eval().requires_grad_(False)
        self._hosts = hosts_of(lm, self.family)
        self.blocks = _blocks(lm, self.family)
        if self.family.head is not None and part(lm, self.family.head) is None:
            raise misfit(self.family, f"the model has no {self.family.head}")
        if self.blocks:
            self.lm.set_experts_implementation(IMPLEMENTATION)
        hasten(lm)
        self.padding = PaddingFilter(lm.base_model, (block.experts for block in self.blocks))
        self._native = _native(self.blocks)
        self._routing = self._native
        self._gate_hooks: list[Any] = []

    @property
    def task(self) -> Task:
        """What the model is for."""
        return self.family.task

    @property
    def head(self) -> nn.Module | None:
        """What makes logits of classes; None where the model generates."""
        return None if self.family.head is None else part(self.lm, self.family.head)

    @property
    def num_classes(self) -> int:
        """Classes it tells apart; 0 where it generates."""
        return 0 if self.family.head is None else self.lm.config.num_labels

    @property
    def positions(self) -> int | None:
        """Tokens that a text may have at most; None where positions are not embedded, and any number goes."""
        if self.family.positions is None:
            return None
        table = part(self.lm, self.family.positions)
        # RoBERTa counts from behind the row of padding.
        return int(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))

    def hosts(self) -> Mapping[int, Host]:
        """Return where an adapter can stand beside the FFN, by the index of the layer."""
        return self._hosts

    @property
    def is_dense(self) -> bool:
        """Whether it has no experts."""
        return not self.blocks

    @property
    def num_layers(self) -> int:
        """Layers with experts, L; 0 if the model is dense."""
        return len(self.blocks)

    @property
    def num_experts(self) -> int:
        """Experts per block, E; 1 if the model is dense."""
        return 1 if self.is_dense else self.blocks[0].num_experts

    @property
    def native_top_k(self) -> int:
        """Active experts per token of the checkpoint."""
        return self._native.top_k

    @property
    def native_gate(self) -> Gate:
        """What the checkpoint does with the weights of the kept experts; a dense model's one weight is always 1."""
        return self._native.gate

    @property
    def largest_top_k(self) -> int:
        """The most experts that can be active per token: E, or fewer where the router chooses among groups first."""
        mixture = self.family.mixture
        return 1 if mixture is None else _largest_top_k(self.lm.config, mixture)

    @property
    def top_k(self) -> int:
        """Active experts per token now."""
        return self._routing.top_k

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether `lm(..., output_router_logits=True).aux_loss` is a load-balancing loss."""
        return self.family.mixture is not None and self.family.mixture.auxiliary_loss

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.lm.device
        return device

    @cached_property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        config, family, mixture = part(self.lm.config, self.family.sizes), self.family, self.family.mixture
        attention = {name: linear_size(getattr(*place)) for (_, name), place in self._attention_linears(0).items()}
        query, key, value = (
            tuple(name for name in chain if name in attention)
            for chain in (family.attention_linears.query, family.attention_linears.key, family.attention_linears.value)
        )
        output, heads = family.attention_linears.output, config.num_attention_heads
        v_head_dim = attention[output][1] // heads
        sparse = tuple(block.layer for block in self.blocks)
        dense = tuple(layer for layer in range(len(self.layers)) if layer not in sparse)
        shared = None if self.is_dense else self.blocks[0].shared_experts
        dense_mlp = [linear_size(getattr(*place)) for place in self._mlp(dense[0]).values()] if dense else []
        pooler = None if family.pooler is None else part(self.lm, family.pooler)
        return ModelShape(
            hidden=config.hidden_size,
            expert_intermediate=0 if mixture is None else getattr(config, mixture.intermediate),
            shared_intermediate=0 if shared is None else linear_size(shared.gate_proj)[0],
            dense_intermediate=dense_mlp[0][0] if dense_mlp else 0,
            num_layers=len(self.layers),
            sparse_layers=sparse,
            dense_layers=dense,
            num_experts=self.num_experts,
            native_top_k=self.native_top_k,
            attention=attention,
            query=query,
            key=key,
            value=value,
            output=output,
            mlp=family.mlp_linears,
            heads=heads,
            qk_head_dim=v_head_dim if query == value else attention[query[-1]][0] // heads,
            v_head_dim=v_head_dim,
            parallel_residual=family.parallel_residual is not None and getattr(config, family.parallel_residual),
            vocabulary=self.num_classes or self.lm.get_input_embeddings().num_embeddings,
            head=_head_sizes(self.head),
            pooler=None if pooler is None else linear_size(pooler),
            image=None if family.image is None else _image_shape(self.lm, config, family.image),
            parameters=_parameters(self.lm),
        )

    def attention_linears(self) -> Mapping[tuple[int, str], Slot]:
        """Return where the attention's linears are, by layer and dotted path from the attention."""
        return {
            key: place for layer in range(len(self.layers)) for key, place in self._attention_linears(layer).items()
        }

    def shared_linears(self) -> Mapping[tuple[int, str], Slot]:
        """Return the linears of shared experts as `attention_linears` does; empty if the model has no such experts.

        Names are gate_proj, up_proj and down_proj, whatever the family calls the module around them.
        """
        return {
            (block.layer, name): (block.shared_experts, name)
            for block in self.blocks
            if block.shared_experts is not None
            for name in GATED_LINEARS
        }

    def mlp_linears(self) -> Mapping[tuple[int, str], Slot]:
        """Return the linears of the MLPs of layers without experts as `attention_linears` does; those of a dense model.

        Empty if every layer has experts.
        """
        return {key: place for layer in self.shape.dense_layers for key, place in self._mlp(layer).items()}

    @contextmanager
    def active_experts(
        self, top_k: int, gate: Literal["native", "renormalised"] = "native", rescale: Rescale = "none"
    ) -> Iterator[None]:
        """Route every token to `top_k` experts inside the context; restores what was before, also after exceptions.

        Args:
            top_k: K, from 1 to `largest_top_k`.
            gate: `native` is the checkpoint's own convention (at the native K the logits keep every bit);
                `renormalised` divides the router's weights of the K kept experts by their sum, in float32. They then
                sum to 1, or to the factor by which the family's router scales its weights (`Mixture.scaling`).
                A dense model computes the same with both.
            rescale: On a gate that does not renormalise: `static` multiplies the weights by native K / K, `mass` by
                the sum of the weights of the native K best experts over that of the K best, per token.

        Raises: ConfigError if `top_k` is out of range, or `rescale` is asked of a gate that renormalises or a dense
        model.
        """
        self._check_top_k(top_k)
        if self.is_dense and rescale != "none":
            raise ConfigError(
                f"rescale {rescale!r} is impossible: {self.family.model_type} models are dense and have no weights of "
                f"experts; use rescale 'none'"
            )
        resolved = self._native.gate if gate == "native" else "renormalised"
        if resolved == "renormalised" and rescale != "none":
            raise ConfigError(
                f"rescale {rescale!r} does not go with a gate that renormalises (gate {gate!r} here): "
                f"its weights have the same sum at every top_k; use rescale 'none'"
            )
        before = self._routing
        self._apply(_Routing(top_k, resolved, rescale))
        try:
            yield
        finally:
            self._apply(before)

    @contextmanager
    def count_activations(self) -> Iterator[ActivationCounter]:
        """Count the experts real tokens are sent to inside the context.

        Padding is read from the `attention_mask` of each forward pass (left or right, with or without a cache); a layer
        counts once per pass, so gradient checkpointing does not count twice. Rows are `blocks`, in their order.
        """
        counter = ActivationCounter(self.num_layers, self.num_experts, self.device)
        with counting(self.lm.base_model, [block.router for block in self.blocks], counter):
            yield counter

    @contextmanager
    def gradient_checkpointing(self) -> Iterator[None]:
        """Keep only the layers' inputs for backward passes inside the context, which then run the layers again.

        Unlike transformers' own switch it needs no train mode (so no dropout, which would draw from the global random
        stream) and leaves nothing behind. Call the model with `use_cache=False`.
        """
        with ExitStack() as stack:
            for layer in self.layers:
                layer.forward = partial(self._checkpointed, layer.forward)
                stack.callback(delattr, layer, "forward")  # uncovers the class's own
            yield

    def _checkpointed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = self.padding.as_now(forward)
        return checkpoint(bound, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _check_top_k(self, top_k: int) -> None:
        if 1 <= top_k <= self.largest_top_k:
            return
        mixture = self.family.mixture
        if mixture is None:
            raise ConfigError(
                f"top_k {top_k} is impossible: {self.family.model_type} models are dense, which counts as one expert "
                f"that is always active; choose 1"
            )
        limit = mixture.groups(self.lm.config)
        why = (
            f"the model has {self.num_experts} experts per layer"
            if limit is None or top_k > self.num_experts or top_k < 1
            else f"the router keeps {limit.kept} of {limit.groups} groups of {limit.group_size} experts for a token, "
            f"then chooses among those"
        )
        raise ConfigError(f"top_k {top_k} is impossible: {why}; choose 1 to {self.largest_top_k}")

    def _apply(self, routing: _Routing) -> None:
        if self.family.mixture is not None:
            self._route(self.family.mixture, routing)
        self._routing = routing

    def _route(self, mixture: Mixture, routing: _Routing) -> None:
        for block in self.blocks:
            for holder in (block.router, block.module):
                if hasattr(holder, mixture.router_top_k):
                    setattr(holder, mixture.router_top_k, routing.top_k)
        # The auxiliary loss reads K from the causal model; other parts of transformers read it from the config.
        if hasattr(self.lm, mixture.top_k):
            setattr(self.lm, mixture.top_k, routing.top_k)
        setattr(self.lm.config, mixture.top_k, routing.top_k)
        while self._gate_hooks:
            self._gate_hooks.pop().remove()
        other_k = routing.top_k != self.native_top_k
        routed_here = mixture.fixed is not None and other_k
        if routed_here or routing.gate != self._native.gate or (routing.rescale != "none" and other_k):
            gate = partial(self._gate, mixture)
            # Before all other hooks, so that whoever counts experts sees those that are used.
            self._gate_hooks = [block.router.register_forward_hook(gate, prepend=True) for block in self.blocks]

    def _gate(
        self, mixture: Mixture, router: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        logits_TE, weights_TK, index_TK = output[:3]
        if mixture.fixed is not None and self.top_k != mixture.fixed.top_k:
            weights_TK, index_TK = mixture.fixed.route(logits_TE, self.top_k, router)
        return logits_TE, self._repaired(weights_TK, mixture, router, inputs).to(weights_TK.dtype), index_TK

    def _repaired(self, weights_TK: torch.Tensor, mixture: Mixture, router: nn.Module, inputs: Any) -> torch.Tensor:
        if self._routing.gate != self._native.gate:
            scaling = mixture.scaling
            return with_mass(weights_TK, 1.0 if scaling is None else getattr(self.lm.config, scaling))
        if self._routing.rescale == "static":
            return weights_TK.float() * (self.native_top_k / self.top_k)
        if self._routing.rescale == "mass":
            return with_mass(weights_TK, mass_of(self._native_weights(mixture, router, inputs)))
        return weights_TK

    def _native_weights(self, mixture: Mixture, router: nn.Module, inputs: Any) -> torch.Tensor:
        """Ask the router again, past all hooks, what it would give at the native K: (T, native K)."""
        setattr(router, mixture.router_top_k, self.native_top_k)
        try:
            weights: torch.Tensor = router.forward(*inputs)[1]
        finally:
            setattr(router, mixture.router_top_k, self.top_k)
        return weights

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, from the first to the last."""
        layers: nn.ModuleList = part(self.lm, self.family.layers)
        return layers

    def _attention_linears(self, layer: int) -> Mapping[tuple[int, str], Slot]:
        attention, names = part(self.layers[layer], self.family.attention), self.family.attention_linears.all
        found = {(layer, name): place for name in names if (place := _slot(attention, name)) is not None}
        if not found:
            where = joined(self.family.layers, str(layer), self.family.attention)
            raise misfit(self.family, f"{where} has none of the linear layers {', '.join(names)}")
        return found

    def _mlp(self, layer: int) -> Mapping[tuple[int, str], Slot]:
        """Return the linears of the MLP of a layer without experts."""
        mlp = part(self.layers[layer], self.family.block)
        found = {}
        for name in self.family.mlp_linears:
            place = _slot(mlp, name)
            if place is None:
                where = joined(self.family.layers, str(layer), self.family.block)
                raise misfit(self.family, f"{where} has no linear layer {name}")
            found[layer, name] = place
        return found


def _slot(module: Any, path: str) -> Slot | None:
    """Return the module at the end of a path and the attribute that holds it; None if there is nothing."""
    holder, _, name = path.rpartition(".")
    owner = part(module, holder)
    return None if getattr(owner, name, None) is None else (owner, name)


def _head_sizes(head: nn.Module | None) -> Mapping[str, tuple[int, int]]:
    if head is None:
        return {}
    linears = [(name, module) for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    return {joined("head", name, "weight"): linear_size(linear) for name, linear in linears}


def _image_shape(lm: Any, config: Any, image: ImageInput) -> ImageShape:
    patches: Any = part(lm, image.projection)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    number = (height // patches.kernel_size[0]) * (width // patches.kernel_size[1])
    return ImageShape(
        channels=patches.in_channels,
        height=height,
        width=width,
        patches=number,
        positions=number + image.special_positions,
        patch_values=patches.in_channels * prod(patches.kernel_size),
    )


def _native(blocks: tuple[SparseBlock, ...]) -> _Routing:
    """Return how the checkpoint routes; a dense model as if to one expert, whose weight is 1."""
    if not blocks:
        return _Routing(1, "renormalised", "none")
    return _Routing(blocks[0].native_top_k, blocks[0].native_gate, "none")


def _blocks(lm: Any, family: Family) -> tuple[SparseBlock, ...]:
    found = [_block(lm.config, family, number, layer) for number, layer in enumerate(part(lm, family.layers))]
    blocks = tuple(block for block in found if block is not None)
    mixture = family.mixture
    if mixture is not None and not blocks:
        raise ModelError(
            f"no layer of this {family.model_type} model has experts (looked in {family.layers} for "
            f"{family.block}.{mixture.experts} and {family.block}.{mixture.router}); choose one with experts, or of a "
            f"dense family"
        )
    return blocks


def _block(config: Any, family: Family, number: int, layer: nn.Module) -> SparseBlock | None:
    """Return the layer's mixture of experts, None for a dense layer."""
    where, mixture = f"{family.layers}.{number}.{family.block}", family.mixture
    module = part(layer, family.block)
    if mixture is None:
        return None
    router, experts = part(module, mixture.router), part(module, mixture.experts)
    if router is None and experts is None:
        return None
    if router is None or not hasattr(router, mixture.router_top_k):
        raise misfit(
            family, f"{where} has experts, but no router with {mixture.router_top_k!r} at {where}.{mixture.router}"
        )
    if experts is None:
        raise misfit(family, f"{where} has a router, but no experts at {where}.{mixture.experts}")
    check_supported(experts, f"{where}.{mixture.experts}")
    return SparseBlock(
        layer=number,
        module=module,
        router=router,
        experts=experts,
        shared_experts=None if mixture.shared_experts is None else part(module, mixture.shared_experts),
        num_experts=getattr(config, mixture.num_experts),
        native_top_k=_native_top_k(config, family.model_type, mixture),
        native_gate="renormalised" if _renormalises(config, mixture) else "plain",
    )


def _native_top_k(config: Any, model_type: str, mixture: Mixture) -> int:
    native: int | None = getattr(config, mixture.top_k)
    if mixture.fixed is not None and native != mixture.fixed.top_k:
        raise ModelError(
            f"{mixture.top_k} is {native} in this {model_type} model's config, but routers of this family pick "
            f"{mixture.fixed.top_k} experts whatever it says; set it to {mixture.fixed.top_k}, and choose another "
            f"number with top_k"
        )
    if native is None or not 1 <= native <= _largest_top_k(config, mixture):
        raise ModelError(
            f"{mixture.top_k} is {native} in this {model_type} model's config, but its routers can pick 1 to "
            f"{_largest_top_k(config, mixture)} experts; the config is damaged"
        )
    return native


def _largest_top_k(config: Any, mixture: Mixture) -> int:
    limit = mixture.groups(config)
    return int(getattr(config, mixture.num_experts)) if limit is None else limit.largest_top_k


def _renormalises(config: Any, mixture: Mixture) -> bool:
    answer = mixture.renormalises
    return answer if isinstance(answer, bool) else bool(getattr(config, answer))


def linear_size(linear: Any) -> tuple[int, int]:
    """Return (out, in) of a linear layer, also of GPT-2's kind, whose weight is stored transposed."""
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def _parameters(lm: nn.Module) -> int:
    replaced = sum(module.numel() for module in lm.modules() if isinstance(module, StackedWeight))
    return sum(parameter.numel() for parameter in lm.parameters()) + replaced
