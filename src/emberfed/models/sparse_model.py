"""`SparseModel`: a transformers causal language model with experts, and how many of them are active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, Literal, final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from emberfed.errors import ConfigError, ModelError
from emberfed.models.counting import ActivationCounter, counting
from emberfed.models.families import Family, family_of
from emberfed.models.gating import Gate, Rescale, gate_weights
from emberfed.models.routed_lora import IMPLEMENTATION


@final
@dataclass(frozen=True, slots=True, eq=False)
class SparseBlock:
    """One mixture-of-experts block.

    Attributes:
        layer: Index of its decoder layer.
        router: Module that returns (logits, weights, index).
        experts: Module with the stacked expert weights.
        num_experts: E.
        native_top_k: K of the checkpoint.
        native_gate: What the checkpoint does with the weights of the kept experts.
    """

    layer: int
    router: nn.Module
    experts: nn.Module
    num_experts: int
    native_top_k: int
    native_gate: Gate


@final
@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes a cost model needs.

    Attributes:
        hidden: D.
        expert_intermediate: F, the hidden size of one expert.
        num_layers: Decoder layers.
        num_experts: E per block.
        native_top_k: K of the checkpoint.
        attention: (out, in) of each attention linear.
        heads: Query heads.
        head_dim: Size of one head.
        vocabulary: Rows of the embedding.
        parameters: All parameters, tied ones once.
    """

    hidden: int
    expert_intermediate: int
    num_layers: int
    num_experts: int
    native_top_k: int
    attention: Mapping[str, tuple[int, int]]
    heads: int
    head_dim: int
    vocabulary: int
    parameters: int


@final
@dataclass(frozen=True, slots=True)
class _Routing:
    top_k: int
    gate: Gate
    rescale: Rescale


@final
class SparseModel:
    """A frozen causal language model with sparse mixtures of experts.

    Attributes:
        lm: The transformers model, in eval mode, without gradients; call it, or `lm.generate`, as usual.
        family: The record that says where its parts are.
        blocks: Its mixtures of experts, from the first layer to the last.
    """

    def __init__(self, lm: Any) -> None:
        """Take over a transformers model: freeze it and let it compute experts our way.

        Raises: ModelError if it is dense, of no known family, or without a block where the family has them.
        """
        self.family: Family = family_of(lm.config)
        self.lm = lm.eval().requires_grad_(False)
        self.lm.set_experts_implementation(IMPLEMENTATION)
        self.blocks = _blocks(lm, self.family)
        first = self.blocks[0]
        self._native = _Routing(first.native_top_k, first.native_gate, "none")
        self._routing = self._native
        self._gate_hooks: list[Any] = []

    @property
    def num_layers(self) -> int:
        """Layers with experts, L."""
        return len(self.blocks)

    @property
    def num_experts(self) -> int:
        """Experts per block, E."""
        return self.blocks[0].num_experts

    @property
    def native_top_k(self) -> int:
        """Active experts per token of the checkpoint."""
        return self._native.top_k

    @property
    def top_k(self) -> int:
        """Active experts per token now."""
        return self._routing.top_k

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.lm.device
        return device

    @cached_property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        config = self.lm.config
        linears = {
            name: getattr(attrgetter(self.family.attention)(self._layers[0]), name)
            for name in self.family.attention_linears
        }
        return ModelShape(
            hidden=config.hidden_size,
            expert_intermediate=getattr(config, self.family.expert_intermediate),
            num_layers=len(self._layers),
            num_experts=self.num_experts,
            native_top_k=self.native_top_k,
            attention={name: (linear.out_features, linear.in_features) for name, linear in linears.items()},
            heads=config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocabulary=self.lm.get_input_embeddings().num_embeddings,
            parameters=sum(parameter.numel() for parameter in self.lm.parameters()),
        )

    def attention_linears(self) -> Mapping[tuple[int, str], tuple[nn.Module, str]]:
        """Return, for each (layer, linear's name), the attention module and the attribute that holds the linear."""
        return {
            (layer, name): (attrgetter(self.family.attention)(module), name)
            for layer, module in enumerate(self._layers)
            for name in self.family.attention_linears
        }

    @contextmanager
    def active_experts(
        self, top_k: int, gate: Literal["native", "renormalised"] = "native", rescale: Rescale = "none"
    ) -> Iterator[None]:
        """Route every token to `top_k` experts inside the context; restores what was before, also after exceptions.

        Args:
            top_k: K, from 1 to the number of experts.
            gate: `native` is the checkpoint's own convention (at the native K the logits keep every bit);
                `renormalised` makes the weights of the K kept experts sum to 1.
            rescale: On a gate that does not renormalise: `static` multiplies the experts' output by native K / K,
                `mass` by the probability of the native K best experts over that of the K best, per token.

        Raises: ConfigError if `top_k` is out of range, or `rescale` is asked of a gate that renormalises.
        """
        if not 1 <= top_k <= self.num_experts:
            raise ConfigError(
                f"top_k {top_k} is impossible: the model has {self.num_experts} experts per layer; "
                f"choose 1 to {self.num_experts}"
            )
        resolved = self._native.gate if gate == "native" else "renormalised"
        if resolved == "renormalised" and rescale != "none":
            raise ConfigError(
                f"rescale {rescale!r} does not go with a gate that renormalises (gate {gate!r} here): "
                f"its weights sum to 1 at every top_k; use rescale 'none'"
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
            for layer in self._layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
                stack.callback(delattr, layer, "forward")  # uncovers the class's own
            yield

    def _apply(self, routing: _Routing) -> None:
        for block in self.blocks:
            setattr(block.router, self.family.router_top_k, routing.top_k)
        # The auxiliary loss reads K from the model; other parts of transformers read it from the config.
        setattr(self.lm, self.family.top_k, routing.top_k)
        setattr(self.lm.config, self.family.top_k, routing.top_k)
        while self._gate_hooks:
            self._gate_hooks.pop().remove()
        rescaled = routing.rescale != "none" and routing.top_k != self.native_top_k
        if rescaled or routing.gate != self._native.gate:
            self._gate_hooks = [block.router.register_forward_hook(self._gate) for block in self.blocks]
        self._routing = routing

    def _gate(self, _: nn.Module, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_TE, weights_TK = output[:2]
        now = self._routing
        new_TK, index_TK = gate_weights(logits_TE, now.top_k, now.gate, now.rescale, self.native_top_k)
        return logits_TE, new_TK.to(weights_TK.dtype), index_TK

    @property
    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = attrgetter(self.family.layers)(self.lm)
        return layers


def _blocks(lm: Any, family: Family) -> tuple[SparseBlock, ...]:
    config = lm.config
    answer = family.renormalises
    renormalises = answer if isinstance(answer, bool) else bool(getattr(config, answer))
    blocks = tuple(
        SparseBlock(
            layer=layer,
            router=attrgetter(family.router)(block),
            experts=attrgetter(family.experts)(block),
            num_experts=getattr(config, family.num_experts),
            native_top_k=getattr(config, family.top_k),
            native_gate="renormalised" if renormalises else "plain",
        )
        for layer, module in enumerate(attrgetter(family.layers)(lm))
        if hasattr(block := attrgetter(family.block)(module), family.router)
    )
    if not blocks:
        raise ModelError(f"no layer of this {config.model_type} model has experts; choose a sparse model")
    return blocks
