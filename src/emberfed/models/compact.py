"""A model that holds fewer experts than it has: some as they are, the others merged into clusters, or none of them.

A layer of E experts becomes one of `slots`: first the experts that are tuned, then one for each cluster, which holds
the weighted sum of its members' matrices (FLUX, methods' section on merging) and is frozen. Routers go on choosing
among all E; between them and the experts their choice is taken to slots. Where several of a token's experts are in one
slot, their weights add up and the slot is computed once, which is what the same sum over equal experts would give.
An expert that is in no slot gives nothing, or the router chooses without it (`reroute`), as in a model pruned of it.

Slots have the layout and number format of the layer's own weights, so that all that computes experts computes them:

* A merged expert is summed in float32 and rounded once.
* On a quantised base it is quantised again, to the base's bits: a merged expert in 16 bits would take the room of two
  or four original ones. Experts that are held as they are keep their codes.
* On an off-loaded base slots are in memory: that they fit is what they are for.

On a base in memory the original experts stay in memory too, since they come back on exit.

Shapes: T tokens, K active experts, E experts, P = T * K pairs, D hidden, F expert hidden.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.func import functional_call

from emberfed.errors import ConfigError, ModelError
from emberfed.models.expert_values import ExpertMatrices, ExpertValues
from emberfed.models.families import Mixture, no_groups
from emberfed.models.foundation_model import FoundationModel, SparseBlock
from emberfed.models.quantised import QuantisedWeight
from emberfed.models.stacked import EXPERT_WEIGHTS

_ATTACHED = ("emberfed_lora", "emberfed_full")
_SUM_TOLERANCE = 1e-6


@final
@dataclass(frozen=True, slots=True)
class Cluster:
    """Experts of one layer that are held as one, which is frozen. One member alone is held as it is.

    Attributes:
        members: Ids of experts, ascending.
        weights: What each member's matrices are multiplied with; at least 0, together 1. A member of weight 0 adds
            nothing to the cluster, but its tokens go there.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises: ModelError if this is no weighted mean of experts in ascending order."""
        if not self.members or list(self.members) != sorted(set(self.members)):
            raise ModelError(f"a cluster's members are {self.members}; give one or more experts, in ascending order")
        whole = len(self.weights) == len(self.members) and min(self.weights) >= 0
        if not whole or not math.isclose(math.fsum(self.weights), 1, abs_tol=_SUM_TOLERANCE):
            raise ModelError(
                f"a cluster of experts {self.members} has weights {self.weights}; give each member one of at least 0, "
                f"with a sum of 1"
            )


@final
@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What becomes of each expert of one layer. Slots are the tuned experts in their order, then the clusters.

    Attributes:
        tuned: Ids of experts that are held as they are, to be trained; ascending.
        clusters: The merged experts.
        dropped: Ids of experts that are in no slot; ascending.
    """

    tuned: tuple[int, ...]
    clusters: tuple[Cluster, ...]
    dropped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises: ModelError if an expert is nowhere, or at two places, or there is no slot at all."""
        named = [*self.tuned, *(member for cluster in self.clusters for member in cluster.members), *self.dropped]
        for what, experts in (("tuned", self.tuned), ("dropped", self.dropped)):
            if list(experts) != sorted(experts):
                raise ModelError(f"a layer's {what} experts are {experts}; give them in ascending order")
        if sorted(named) != list(range(len(named))):
            wrong = min(expert for expert in range(len(named)) if named.count(expert) != 1)
            raise ModelError(
                f"a layer's plan names expert {wrong} {named.count(wrong)} times among {len(named)}; each expert must "
                f"be tuned, in one cluster, or dropped"
            )
        if not self.slots:
            raise ModelError(f"a layer's plan drops all of its {len(named)} experts; hold one at least")

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.tuned) + sum(len(cluster.members) for cluster in self.clusters) + len(self.dropped)

    @property
    def slots(self) -> int:
        """Experts that are held."""
        return len(self.tuned) + len(self.clusters)

    def slot_of(self, num_experts: int) -> torch.Tensor:
        """Return each expert's slot, int64 (E,); `slots` of a dropped one, which means none.

        Raises: ModelError if the plan is not for a layer of `num_experts`.
        """
        if num_experts != self.num_experts:
            raise ModelError(f"a layer's plan is for {self.num_experts} experts, but the layer has {num_experts}")
        slot_of_E = torch.full((num_experts,), self.slots, dtype=torch.int64)
        for slot, members in enumerate([*([expert] for expert in self.tuned), *(c.members for c in self.clusters)]):
            slot_of_E[list(members)] = slot
        return slot_of_E


CompactPlan = tuple[LayerPlan, ...]
"""One for each layer with experts, in their order."""


@final
@dataclass(frozen=True, slots=True)
class ExpertWork:
    """Work of one layer's routed experts, counted where it was done.

    Attributes:
        rows: Pairs of a token and an expert that were computed; padding and recomputation not included.
        tuned_rows: Those of them whose expert is tuned.
        choices: Experts that the router computed a score of for each token.
    """

    rows: int
    tuned_rows: int
    choices: int

    def __add__(self, other: ExpertWork) -> ExpertWork:
        """Add further work of the same layer. Raises: ValueError if its router chose among others."""
        if self.choices != other.choices:
            raise ValueError(f"work of a router of {self.choices} experts and of {other.choices} cannot be added")
        return ExpertWork(self.rows + other.rows, self.tuned_rows + other.tuned_rows, self.choices)


@final
class Compact:
    """A model while it holds fewer experts.

    Attributes:
        plan: What became of each expert.
    """

    def __init__(self, plan: CompactPlan, layers: Sequence[_Layer]) -> None:
        """Hold what `compacted` made."""
        self.plan = plan
        self._layers = layers

    def take(self) -> tuple[ExpertWork, ...]:
        """Return what each layer with experts computed since the last `take`."""
        return tuple(layer.take() for layer in self._layers)

    @contextmanager
    def sending(self, pairs: int) -> Iterator[None]:
        """Send every real token to the first `pairs` slots inside the context, whatever its router chose.

        They are fewer where a layer has fewer, or fewer experts are active. How many pairs are computed depends on the
        tokens otherwise; this is for counting memory before they are known, and not counted as work.
        """
        for layer in self._layers:
            layer.sent = pairs
        try:
            yield
        finally:
            for layer in self._layers:
                layer.sent = None


@contextmanager
def compacted(
    model: FoundationModel, plan: CompactPlan, values: ExpertValues, reroute: bool = False
) -> Iterator[Compact]:
    """Let the model hold only the plan's slots inside the context; on exit it is as found, also after exceptions.

    Tuned experts' slots hold what a LoRA on them would be added to, and clusters the present values of their members.
    Layers are made one after the other: beside the slots there are two experts in float32 at most. Inside, a layer's
    experts module has its `LayerPlan` as `emberfed_compact`.

    Args:
        model: The model; K and the gate may be set before or inside.
        plan: What becomes of each expert, for each layer with experts.
        values: The values of the model's experts.
        reroute: Let routers choose among the experts that are not dropped, as those of a model pruned of them would:
            with the family's own rule, on the scores of those alone. Without it dropped experts give nothing, and
            keep their share of a token's weights.

    Raises: ModelError if the plan does not fit the model, or the model is compact already; ConfigError if routers
    cannot choose among fewer experts, or fewer than K are left to choose from.
    """
    _check(model, plan)
    _ = model.shape  # computed once: let it be of the whole model, not of what is left inside
    layers = [_Layer(block, of_layer, model.device) for block, of_layer in zip(model.blocks, plan, strict=True)]
    with ExitStack() as stack:
        for row, layer in enumerate(layers):
            stack.enter_context(_fewer_experts(layer, row, values))
            stack.enter_context(layer.following())
        stack.callback(model.lm.base_model.register_forward_pre_hook(partial(_begin, layers)).remove)
        for layer in layers:
            if reroute and layer.plan.dropped:
                stack.enter_context(_rerouted(model, layer))
        yield Compact(plan, layers)


def _check(model: FoundationModel, plan: CompactPlan) -> None:
    if len(plan) != len(model.blocks):
        raise ModelError(f"the plan is for {len(plan)} layers with experts, but the model has {len(model.blocks)}")
    for block, layer in zip(model.blocks, plan, strict=True):
        if layer.num_experts != block.num_experts:
            raise ModelError(
                f"the plan of layer {block.layer} is for {layer.num_experts} experts, but the layer has "
                f"{block.num_experts}"
            )
        if hasattr(block.experts, "emberfed_compact"):
            raise ModelError(f"layer {block.layer} is compact already; leave the first `compacted` before the next")
        for name in _ATTACHED:
            if hasattr(block.experts, name):
                raise ModelError(
                    f"the experts of layer {block.layer} are being trained; make the model compact first, and attach "
                    f"what is trained inside"
                )


@final
class _Layer:
    """One layer while it is compact: takes its router's choice to slots, and counts what is computed."""

    def __init__(self, block: SparseBlock, plan: LayerPlan, device: torch.device) -> None:
        self.block = block
        self.plan = plan
        self.choices = block.num_experts
        self.sent: int | None = None
        # One more than there are experts: who is sent to none stays so.
        none = torch.tensor([plan.slots])
        self._slot_of_E1 = torch.cat([plan.slot_of(block.num_experts), none]).to(device)
        self._rows_2 = torch.zeros(2, dtype=torch.int64, device=device)
        self._is_counted = False

    @contextmanager
    def following(self) -> Iterator[None]:
        """Stand between router and experts; padding is taken out between the two hooks, by a hook of the model's."""
        experts: Any = self.block.experts
        with ExitStack() as stack:
            stack.callback(experts.register_forward_pre_hook(self._to_slots, prepend=True).remove)
            stack.callback(experts.register_forward_pre_hook(self._count).remove)
            yield

    def begin(self) -> None:
        """Begin a forward pass of the model."""
        self._is_counted = False

    def take(self) -> ExpertWork:
        """Return what was computed since the last time."""
        rows, tuned_rows = self._rows_2.tolist()
        self._rows_2.zero_()
        return ExpertWork(rows, tuned_rows, self.choices)

    def _to_slots(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_TD, index_TK, weights_TK, *rest = args
        if self.sent is not None:
            return hidden_TD, self._sent(index_TK, self.sent), weights_TK, *rest
        return hidden_TD, *to_slots(self._slot_of_E1[index_TK], weights_TK, self.plan.slots), *rest

    def _sent(self, index_TK: torch.Tensor, pairs: int) -> torch.Tensor:
        slot_K = torch.arange(index_TK.shape[1], device=index_TK.device)
        return slot_K.masked_fill(slot_K >= min(pairs, self.plan.slots), self.plan.slots).expand_as(index_TK)

    def _count(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self._is_counted or self.sent is not None:  # gradient checkpointing runs layers again in backward
            return
        self._is_counted = True
        slot_TK = args[1]
        self._rows_2 += torch.stack([(slot_TK < limit).sum() for limit in (self.plan.slots, len(self.plan.tuned))])


def _begin(layers: Sequence[_Layer], *_: Any) -> None:
    for layer in layers:
        layer.begin()


def to_slots(slot_TK: torch.Tensor, weights_TK: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Let each token go to a slot once: the first of its pairs there gets the weights of all.

    Args:
        slot_TK: int64 (T, K), where each pair goes; `slots` is none.
        weights_TK: (T, K), its weight.
        slots: Slots there are.

    Returns:
        The same two, where pairs that have gone into an earlier one, or that went to none, have slot `slots` and weight
        0. Weights are added in float32; a token whose slots all differ keeps the bits of its weights.
    """
    same_TKK = slot_TK.unsqueeze(2) == slot_TK.unsqueeze(1)
    earlier_TK = same_TKK.tril(-1).any(2)
    gone_TK = earlier_TK | (slot_TK == slots)
    added_TK = (same_TKK * weights_TK.float().unsqueeze(1)).sum(2).to(weights_TK.dtype)
    return slot_TK.masked_fill(gone_TK, slots), added_TK.masked_fill(gone_TK, 0)


@contextmanager
def _fewer_experts(layer: _Layer, row: int, values: ExpertValues) -> Iterator[None]:
    experts: Any = layer.block.experts
    stacks = _compact_stacks(layer, row, values)
    # Kept as they are, so that also the order of names is as before.
    held = (experts._parameters, experts._modules)
    before = [dict(names) for names in held]
    try:
        for name, stack in stacks.items():
            delattr(experts, name)
            setattr(experts, name, stack)
        experts.num_experts = layer.plan.slots
        experts.emberfed_compact = layer.plan
        yield
    finally:
        for names, earlier in zip(held, before, strict=True):
            names.clear()
            names.update(earlier)
        experts.num_experts = layer.block.num_experts
        experts.__dict__.pop("emberfed_compact", None)


def _compact_stacks(layer: _Layer, row: int, values: ExpertValues) -> Mapping[str, nn.Parameter | QuantisedWeight]:
    """Return what stands in the place of each stacked tensor of the layer."""
    experts: Any = layer.block.experts
    stacks = {name: _stack_like(getattr(experts, name), layer.plan.slots) for name in EXPERT_WEIGHTS}
    for name in EXPERT_WEIGHTS if experts.has_bias else ():
        stacks[f"{name}_bias"] = _stack_like(getattr(experts, f"{name}_bias"), layer.plan.slots)
    for slot, expert in enumerate(layer.plan.tuned):
        if values.trained_in_full(row, expert):
            _put(stacks, slot, values.base(row, expert), experts.is_transposed)
        else:
            _keep(stacks, slot, expert)
    for slot, cluster in enumerate(layer.plan.clusters, start=len(layer.plan.tuned)):
        if len(cluster.members) == 1 and not values.trained(row, cluster.members[0]):
            _keep(stacks, slot, cluster.members[0])
        else:
            _put(stacks, slot, merged(values, row, cluster), experts.is_transposed)
    return {name: stack.made() for name, stack in stacks.items()}


def merged(values: ExpertValues, row: int, cluster: Cluster) -> ExpertMatrices:
    """Return the weighted sum of a cluster's members, in their order; members of weight 0 are not read."""
    total: dict[str, torch.Tensor] = {}
    for expert, weight in zip(cluster.members, cluster.weights, strict=True):
        for name, tensor in _tensors(values.matrices(row, expert)).items() if weight else ():
            total[name] = total[name].add_(tensor, alpha=weight) if name in total else tensor * weight
    return ExpertMatrices(total["gate_up"], total["down"], total.get("gate_up_bias"), total.get("down_bias"))


def _tensors(matrices: ExpertMatrices) -> dict[str, torch.Tensor]:
    biases = {"gate_up_bias": matrices.gate_up_bias, "down_bias": matrices.down_bias}
    given = {name: bias for name, bias in biases.items() if bias is not None}
    return {"gate_up": matrices.gate_up_D2F, "down": matrices.down_FD, **given}


def _keep(stacks: Mapping[str, _Stack], slot: int, expert: int) -> None:
    for stack in stacks.values():
        stack.keep(slot, expert)


def _put(stacks: Mapping[str, _Stack], slot: int, matrices: ExpertMatrices, is_transposed: bool) -> None:
    for name, matrix_IO in (("gate_up_proj", matrices.gate_up_D2F), ("down_proj", matrices.down_FD)):
        stacks[name].put(slot, matrix_IO if is_transposed else matrix_IO.t())
    for name, bias in (("gate_up_proj_bias", matrices.gate_up_bias), ("down_proj_bias", matrices.down_bias)):
        if bias is not None:
            stacks[name].put(slot, bias)


class _Stack(ABC):
    """A stack of slots in the making, like a layer's own stack of experts."""

    @abstractmethod
    def keep(self, slot: int, expert: int) -> None:
        """Fill a slot with an expert of the layer's own, bit for bit."""

    @abstractmethod
    def put(self, slot: int, values: torch.Tensor) -> None:
        """Fill a slot with what is in float32, laid out as the layer stores it."""

    @abstractmethod
    def made(self) -> nn.Parameter | QuantisedWeight:
        """Return the stack."""


@final
class _PlainStack(_Stack):
    """Of a tensor, or of an off-loaded one: in memory, in its number format."""

    def __init__(self, stored: Any, slots: int) -> None:
        self._stored = stored
        self._stack = torch.empty(slots, *stored.shape[1:], dtype=stored.dtype, device=stored.device)

    def keep(self, slot: int, expert: int) -> None:
        is_tensor = isinstance(self._stored, torch.Tensor)
        stored = self._stored.detach()[expert] if is_tensor else self._stored.expert(expert, self._stack.dtype)
        self._stack[slot] = stored

    def put(self, slot: int, values: torch.Tensor) -> None:
        self._stack[slot] = values

    def made(self) -> nn.Parameter:
        return nn.Parameter(self._stack, requires_grad=False)


@final
class _QuantisedStack(_Stack):
    """Of a quantised weight, in as many bits."""

    def __init__(self, stored: QuantisedWeight, slots: int) -> None:
        self._stored = stored
        codes, scale, minimum = (
            part.new_empty(slots, *part.shape[1:]) for part in (stored.codes, stored.scale, stored.minimum)
        )
        self._stack = QuantisedWeight(codes, scale, minimum, stored.bits)

    def keep(self, slot: int, expert: int) -> None:
        self._copy(slot, self._stored, expert)

    def put(self, slot: int, values: torch.Tensor) -> None:
        stored = self._stored
        made = QuantisedWeight.quantise(values.unsqueeze(0), stored.bits, stored.group_size, "a merged expert")
        self._copy(slot, made, 0)

    def made(self) -> QuantisedWeight:
        return self._stack

    def _copy(self, slot: int, stored: QuantisedWeight, expert: int) -> None:
        for name in ("codes", "scale", "minimum"):
            getattr(self._stack, name)[slot] = getattr(stored, name)[expert]


def _stack_like(stored: Any, slots: int) -> _Stack:
    return _QuantisedStack(stored, slots) if isinstance(stored, QuantisedWeight) else _PlainStack(stored, slots)


@contextmanager
def _rerouted(model: FoundationModel, layer: _Layer) -> Iterator[None]:
    mixture = model.family.mixture
    assert mixture is not None
    kept = [expert for expert in range(layer.block.num_experts) if expert not in layer.plan.dropped]
    if model.largest_top_k < model.num_experts:
        raise ConfigError(
            f"routers of this {model.family.model_type} model choose groups of experts first, so they cannot choose "
            f"without the dropped ones; use reroute=False, or drop none"
        )
    pruned = _PrunedRouter(layer.block, mixture, kept)
    pruned.check_top_k()
    router: Any = layer.block.router
    layer.choices = len(kept)
    router.forward = pruned
    try:
        yield
    finally:
        del router.forward  # uncovers the class's own


@final
class _PrunedRouter:
    """A router's forward pass with only the parameters of some experts, and their ids in what it returns."""

    def __init__(self, block: SparseBlock, mixture: Mixture, kept: Sequence[int]) -> None:
        self._block = block
        self._mixture = mixture
        self._kept_N = torch.tensor(kept, device=next(block.router.parameters()).device)
        self._forward = _ForwardAlone(block.router)

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (T, E), -inf of those left out, and weights and ids (T, K) of those chosen."""
        self.check_top_k()
        router: Any = self._block.router
        named = (*router.named_parameters(), *router.named_buffers())
        cut = {f"router.{name}": self._cut(tensor) for name, tensor in named}
        router.num_experts = len(self._kept_N)
        try:
            logits_TN, weights_TK, index_TK = functional_call(self._forward, cut, (hidden,))
        finally:
            router.num_experts = self._block.num_experts
        none_TE = logits_TN.new_full((len(logits_TN), self._block.num_experts), float("-inf"))
        return none_TE.index_copy(1, self._kept_N, logits_TN), weights_TK, self._kept_N[index_TK]

    def check_top_k(self) -> None:
        """Raises: ConfigError if fewer than K experts are left."""
        top_k: int = getattr(self._block.router, self._mixture.router_top_k)
        # Routers that could limit groups rank those by their two best experts, also where there is one group only.
        least = max(top_k, 1 if self._mixture.groups is no_groups else 2)
        if len(self._kept_N) < least:
            raise ConfigError(
                f"layer {self._block.layer} keeps {len(self._kept_N)} experts, but its router chooses among {least} "
                f"at least (top_k {top_k}); keep more, or lower top_k"
            )

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the kept experts' part; theirs is the first dimension of the size E."""
        if self._block.num_experts not in tensor.shape:
            return tensor
        return tensor.index_select(tensor.shape.index(self._block.num_experts), self._kept_N)


@final
class _ForwardAlone(nn.Module):
    """Calls a router's own forward, past its hooks."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: torch.Tensor) -> Any:
        return type(self.router).forward(self.router, hidden)
