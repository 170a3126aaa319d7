"""HetLoRA (Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-device Foundation Models", EMNLP 2024).

A client trains the first r_c components of the global LoRA. The server fills uploads up with zeros to the global rank
and averages A and B, weighted by the norms of the clients' products B A (sparsity-weighted aggregation). Clients are
held to use fewer components: the loss has lambda ||B[:, k:]|| ||A[k:, :]|| for the tail beyond k = floor(gamma r);
where training made that product smaller, the client goes on with rank k (rank self-pruning).

What the paper leaves open, and what we decided:
* alpha / r differs between ranks. A cut keeps the share its components had in the weights, and an upload is scaled back
  before it is averaged; norms are those of 1 / r B A.
* Weights are formed for each adapted matrix, and for each expert, rather than for a client as a whole. Where all norms
  are zero, data-size shares serve.
* A client has one rank; the tail products of all its matrices are added up to decide. No rank falls below the lowest
  tier's.
* A component, or an expert, that no client trained keeps its bits; zeros in A and B would never move again.
* The global model is evaluated with all its components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from emberfed import aggregation, factors, federated, federated_lora
from emberfed.aggregation import Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.errors import AggregationError
from emberfed.federated_lora import LoraMethodConfig
from emberfed.method import Method
from emberfed.models import lora, peft_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.penalties import TailPenalty, tail_product
from emberfed.records import Bundle, FitResult, Payload, Rank, TensorSpec
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig


class HetLoraConfig(LoraMethodConfig):
    """Options of HetLoRA; ranks are the tiers'.

    Attributes:
        weighting: `norm` of the clients' products B A, as published; `data` or `activation` as in the other methods.
        pruning: Gamma: the share of its rank a client is held to; 1 prunes nothing.
        regularisation: Lambda: weight of the tail's product in the loss.
        server_optimizer: What the server does with the mean.
    """

    weighting: Literal["norm", "data", "activation"] = "norm"  # type: ignore[assignment]
    pruning: float = Field(0.99, gt=0, le=1)
    regularisation: float = Field(1e-3, ge=0)
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()


@final
class HetLora(Method):
    """LoRA of each client's own rank, cut and padded, weighted by norm, pruned by the clients themselves."""

    title = "HetLoRA"
    paper = "Cho et al.: Heterogeneous LoRA for Federated Fine-tuning of On-device Foundation Models, EMNLP 2024"
    Config = HetLoraConfig
    AdapterConfig = lora.LoraConfig

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from a LoRA of the largest rank that changes nothing."""
        federated_lora.check_options(model, self.config)
        ranks = federated_lora.tier_ranks(budgets, "hetlora")
        whose = "clients.tiers: the largest rank"
        tensors = federated_lora.initial(model, self.adapter, max(ranks), whose, seeds)
        return Bundle(tensors, {**federated_lora.layout(model), "lowest_rank": min(ranks), "ranks": {}})

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the first components, as many as the client's present rank."""
        rank = state.meta["ranks"].get(client.id, client.budget.rank)
        tensors = aggregation.redistribute(federated.adapter_of(state.tensors), rank)
        meta = {"top_k": self.config.top_k(client, state), "kept": self._kept(rank, state.meta["lowest_rank"])}
        return Payload(round, client.id, Bundle(tensors, meta))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the LoRA, of the rank sent or pruned, and the activation counts."""
        wanted = federated.specs(download.content.tensors, state.meta)
        kept = download.content.meta["kept"]
        return {name: _prunable(name, spec, kept) for name, spec in wanted.items()}

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train with the tail's product in the loss; drop the tail if that product shrank."""
        tensors, alpha, kept = download.content.tensors, self.adapter.alpha, download.content.meta["kept"]
        penalty = TailPenalty(kept, self.config.regularisation)
        upload = federated_lora.train(
            self.trainer, model, tensors, alpha, self.config.gate, "none", download, shard, seeds, penalty
        )
        trained = federated.adapter_of(upload.tensors)
        if tail_product(trained, kept) < tail_product(tensors, kept):
            upload = Bundle({**upload.tensors, **aggregation.redistribute(trained, kept)}, upload.meta)
        return FitResult(upload, memory)

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: HetLoraConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Pad to the global rank, weigh by norm, average A and B."""
        weights = Weights(updates, config.activation_rule, aggregation.unused(previous))
        a_names, others = aggregation.lora_paths(updates)
        tensors = {name: aggregation.average_one(updates, name, weights, previous) for name in others}
        for a_name in a_names:
            shares = weights.of(a_name)
            if config.weighting == "norm":
                shares = _norm_shares(updates, a_name, shares)
            before = aggregation.previous_pair(updates, a_name, previous)
            for update, pair in zip(updates, aggregation.received_pairs(updates, a_name), strict=True):
                if pair.rank > before.rank:
                    raise AggregationError(
                        f"{update.client}: {a_name!r} has rank {pair.rank}, above the global rank {before.rank}"
                    )
            pairs = aggregation.received_pairs(updates, a_name)
            tensors |= aggregation.named(a_name, factors.padded_mean(pairs, shares, before))
        return dict(sorted(tensors.items()))

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Combine, let the server's optimiser step, remember the clients' ranks."""
        updates = federated.updates_of(uploads, state.meta)
        combined = self.combine(updates, self.config, state.tensors)
        tensors = federated.stepped(self.config.server_optimizer, state, combined, updates)
        a_name = next(name for name in combined if name.endswith(".lora_A"))
        ranks = {update.client: update.tensors[a_name].shape[-2] for update in updates}
        return Bundle(tensors, {**state.meta, "ranks": {**state.meta["ranks"], **ranks}})

    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> AbstractContextManager[FoundationModel]:
        """Run the global LoRA with the budget's K."""
        tensors = federated.adapter_of(state.tensors)
        return federated_lora.deployed(model, tensors, self.adapter.alpha, budget.top_k, self.config.gate)

    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Run the components it was sent, with the client's K."""
        tensors, alpha = download.content.tensors, self.adapter.alpha
        return federated_lora.deployed(model, tensors, alpha, client.budget.top_k, self.config.gate)

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return a PEFT adapter."""
        return peft_layout.to_files(federated.adapter_of(state.tensors), self.adapter.alpha, model)

    def _kept(self, rank: int, lowest: int) -> int:
        """Return the rank that pruning would leave: max(r_min, floor(gamma r))."""
        pruning: float = self.config.pruning
        return max(min(lowest, rank), math.floor(pruning * rank + 1e-9))


def _norm_shares(updates: Sequence[Update], a_name: str, data_shares: Tensor) -> Tensor:
    """Return ||B_c A_c||_F / sum, (C,) or (C, E): 0 for experts nobody used, data-size shares where all norms are 0."""
    norms = torch.stack([factors.update_norm(pair) for pair in aggregation.received_pairs(updates, a_name)])
    # Experts whose use is not known have one share per client, for all of them.
    data_shares = data_shares.reshape(*data_shares.shape, *[1] * (norms.dim() - data_shares.dim()))
    norms = norms * (data_shares.sum(dim=0) > 0)
    total = norms.sum(dim=0)
    return torch.where(total > 0, norms / torch.where(total > 0, total, 1.0), data_shares)


def _prunable(name: str, spec: TensorSpec, kept: int) -> TensorSpec:
    """Let a factor's rank be anything from the pruned one to the one that was sent."""
    place = {"lora_A": -2, "lora_B": -1}.get(name.rpartition(".")[2])
    if place is None:
        return spec
    sent = spec.shape[place]
    assert isinstance(sent, int), "specs of a download are exact"
    shape = list(spec.shape)
    shape[place] = Rank(kept, sent)
    return TensorSpec(tuple(shape), spec.dtype)
