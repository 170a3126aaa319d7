"""FLoRA (Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024).

Clients train a fresh LoRA of their own rank; the server stacks all of them, which is the exact mean of their products
(sum p_c alpha / r_c B_c A_c); everybody merges the stack into its base, and begins the next round with a fresh LoRA.

The state is the stack of all rounds so far. A client keeps what it has merged, so it is sent only what it lacks: the
last round's stack as a rule, everything if it is new, what it missed if it comes back. Merging happens around training
and deploying, in the base's own numbers, and is taken back bit for bit.

What the paper leaves open, and what we decided:
* A fresh LoRA is drawn by the client, at its own address among the seeds; it need not be sent.
* The state's factors carry no alpha / R (`factors.stacked`), since R grows. `adapter.start_from` is the first stack.
* An expert that no client used gets nothing from a round.
* A trained router (`adapter.router`) is averaged by data size, as a fresh one cannot be drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import final

import torch
from torch import Tensor

from emberfed import aggregation, factors, federated, federated_lora
from emberfed.aggregation import Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.errors import ClientError, ConfigError, ModelError
from emberfed.federated_lora import LoraMethodConfig
from emberfed.method import Method
from emberfed.models import lora, merging, peft_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Bundle, FitResult, Payload, TensorSpec
from emberfed.seeds import Seeds


class FloraConfig(LoraMethodConfig):
    """Options of FLoRA; clients' ranks are the tiers'."""


@final
class Flora(Method):
    """Everybody's LoRA stacked and merged into the base, every round anew."""

    title = "FLoRA"
    paper = (
        "Wang et al.: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, "
        "NeurIPS 2024"
    )
    Config = FloraConfig
    AdapterConfig = lora.LoraConfig

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from a stack that changes nothing, of rank 1, or from `adapter.start_from`."""
        federated_lora.check_options(model, self.config)
        ranks = federated_lora.tier_ranks(budgets, "flora")
        federated_lora.check_rank(model, self.adapter, max(ranks), "clients.tiers: the largest rank")
        try:
            merging.check_mergeable(model)
        except ModelError as error:
            raise ConfigError(f"flora merges into the base's weights every round: {error}") from None
        rank = 1 if self.adapter.start_from is None else self.adapter.rank
        tensors = federated_lora.initial(model, self.adapter, rank, "adapter.rank", seeds)
        unscaled = {name: tensor / rank if name.endswith(".lora_A") else tensor for name, tensor in tensors.items()}
        return Bundle(unscaled, {**federated_lora.layout(model), "rank": rank, "merged": {}})

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the columns of the stack that the client has not merged yet."""
        merged = state.meta["merged"].get(client.id, 0)
        tensors = {name: _columns(name, tensor, merged, None) for name, tensor in state.tensors.items()}
        meta = {"top_k": self.config.top_k(client, state), "rank": client.budget.rank, "merged": merged}
        return Payload(round, client.id, Bundle(tensors, meta))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """A LoRA of the client's own rank, and the activation counts."""
        rank = download.content.meta["rank"]
        fresh = {name: _columns(name, tensor, 0, 1) for name, tensor in state.tensors.items()}
        wanted = federated.specs(fresh, state.meta)
        return {name: _of_rank(name, spec, rank) for name, spec in wanted.items()}

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Merge what is new, train a fresh LoRA on it, and keep the stack.

        Raises: ClientError if the client no longer has what the server knows it to have merged.
        """
        stack = _caught_up(download, memory)
        fresh_config = self.adapter.model_copy(
            update={"rank": download.content.meta["rank"], "start_from": None, "router": False, "head": False}
        )
        fresh = lora.initial(model, fresh_config, seeds.torch("adapter"))
        routers = {name: tensor for name, tensor in stack.items() if not name.endswith((".lora_A", ".lora_B"))}
        with _merged(model, stack, self.adapter.alpha):
            upload = federated_lora.train(
                self.trainer,
                model,
                {**fresh, **routers},
                self.adapter.alpha,
                self.config.gate,
                "none",
                download,
                shard,
                seeds,
            )
        return FitResult(upload, Bundle(stack))

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: FloraConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the stack, of rank sum r_c; attached with alpha / rank it is the mean of the products."""
        stack = _stack(updates, config, previous)
        for a_name in aggregation.lora_paths(updates)[0]:
            stack[a_name].mul_(stack[a_name].shape[-2])  # a tensor of its own, made just now
        return stack

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Append the round's stack, and remember who has merged what was there before."""
        updates = federated.updates_of(uploads, state.meta)
        stack = _stack(updates, self.config, state.tensors)
        tensors = {name: _appended(name, tensor, stack[name]) for name, tensor in state.tensors.items()}
        merged = {**state.meta["merged"], **{update.client: state.meta["rank"] for update in updates}}
        return Bundle(tensors, {**state.meta, "rank": _rank(tensors), "merged": merged})

    @contextmanager
    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> Iterator[FoundationModel]:
        """Run the base with the whole stack merged, with the budget's K."""
        with _merged(model, state.tensors, self.adapter.alpha), model.active_experts(budget.top_k, self.config.gate):
            yield model

    @contextmanager
    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> Iterator[FoundationModel]:
        """Run the base with all that the client has merged and was sent, with its K."""
        stack, top_k = _caught_up(download, memory), client.budget.top_k
        with _merged(model, stack, self.adapter.alpha), model.active_experts(top_k, self.config.gate):
            yield model

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return the whole stack as a PEFT adapter."""
        return peft_layout.to_files(state.tensors, self.adapter.alpha * _rank(state.tensors), model)


def _stack(updates: Sequence[Update], config: FloraConfig, previous: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return one round's stack, without alpha / R."""
    weights = Weights(updates, config.activation_rule)  # an expert nobody used adds nothing to the base
    a_names, others = aggregation.lora_paths(updates)
    tensors = {name: aggregation.average_one(updates, name, weights, previous) for name in others}
    for a_name in a_names:
        pairs = list(aggregation.received_pairs(updates, a_name))
        tensors |= aggregation.named(a_name, factors.stacked(pairs, weights.of(a_name)))
    return dict(sorted(tensors.items()))


def _merged(model: FoundationModel, stack: Mapping[str, Tensor], alpha: float) -> AbstractContextManager[None]:
    # The stack carries no 1 / R, so alpha grows with R.
    return merging.merged(model, stack, alpha * _rank(stack))


def _rank(stack: Mapping[str, Tensor]) -> int:
    return next(tensor.shape[-2] for name, tensor in sorted(stack.items()) if name.endswith(".lora_A"))


def _columns(name: str, tensor: Tensor, start: int, stop: int | None) -> Tensor:
    """Return components `start` to `stop` of a factor; another tensor as it is."""
    if name.endswith(".lora_A"):
        return tensor[..., start:stop, :]
    return tensor[..., start:stop] if name.endswith(".lora_B") else tensor


def _appended(name: str, before: Tensor, new: Tensor) -> Tensor:
    """Return a factor with more components; another tensor is replaced."""
    if name.endswith(".lora_A"):
        return torch.cat([before, new], dim=-2)
    return torch.cat([before, new], dim=-1) if name.endswith(".lora_B") else new


def _caught_up(download: Payload, memory: Bundle) -> dict[str, Tensor]:
    """Return the whole stack: what the client has merged, and what it was sent. Raises: ClientError."""
    merged = download.content.meta["merged"]
    if merged == 0:
        return dict(download.content.tensors)
    held = _rank(memory.tensors) if memory.tensors else 0
    if held < merged:
        raise ClientError(
            f"the stack this client has merged is gone from its memory ({held} of {merged} components are there); "
            f"restore the client's memory folder, or enrol it under a new id"
        )
    return {
        name: _appended(name, _columns(name, memory.tensors[name], 0, merged), tensor)
        for name, tensor in download.content.tensors.items()
    }


def _of_rank(name: str, spec: TensorSpec, rank: int) -> TensorSpec:
    place = {"lora_A": -2, "lora_B": -1}.get(name.rpartition(".")[2])
    shape = list(spec.shape)
    if place is not None:
        shape[place] = rank
    return TensorSpec(tuple(shape), spec.dtype)
