"""FlexLoRA (Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024).

The server averages the clients' products exactly, Delta W = sum p_c alpha / r_c B_c A_c, and gives each client the best
approximation of its rank: the first r_c components of the SVD. Delta W is never formed: the QR of the stacked factors
and the SVD of their small core give the same (`factors.principal`).

What the paper leaves open, and what we decided:
* The global LoRA keeps as many components as the largest tier's rank, or `rank`; it is evaluated with all of them.
* Singular values go into B, with the scale alpha / r taken out again, so that a cut keeps the share of its components.
* An expert that no client used keeps its bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

from pydantic import Field
from torch import Tensor

from emberfed import aggregation, factors, federated, federated_lora
from emberfed.aggregation import Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.errors import ConfigError
from emberfed.federated_lora import LoraMethodConfig
from emberfed.method import Method
from emberfed.models import lora, peft_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Bundle, FitResult, Payload, TensorSpec
from emberfed.seeds import Seeds


class FlexLoraConfig(LoraMethodConfig):
    """Options of FlexLoRA; clients' ranks are the tiers'.

    Attributes:
        rank: Components the server keeps; null: the largest tier's rank.
    """

    rank: int | None = Field(None, ge=1)


@final
class FlexLora(Method):
    """The exact mean of the products, given out again by SVD."""

    title = "FlexLoRA"
    paper = (
        "Bai et al.: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, "
        "NeurIPS 2024"
    )
    Config = FlexLoraConfig
    AdapterConfig = lora.LoraConfig

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from a LoRA of the global rank that changes nothing."""
        federated_lora.check_options(model, self.config)
        largest = max(federated_lora.tier_ranks(budgets, "flexlora"))
        rank, whose = largest, "clients.tiers: the largest rank"
        if self.config.rank is not None:
            rank, whose = self.config.rank, "method.rank"
        if rank < largest:
            raise ConfigError(
                f"method.rank {rank} is below the largest tier's rank {largest}; raise it, or leave it out"
            )
        tensors = federated_lora.initial(model, self.adapter, rank, whose, seeds)
        return Bundle(tensors, federated_lora.layout(model))

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the best approximation of the client's rank."""
        assert client.budget.rank is not None, "init refuses tiers without ranks"
        tensors = aggregation.redistribute(federated.adapter_of(state.tensors), client.budget.rank)
        return Payload(round, client.id, Bundle(tensors, {"top_k": self.config.top_k(client, state)}))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the LoRA as sent, and the activation counts."""
        return federated.specs(download.content.tensors, state.meta)

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train the LoRA at its rank."""
        tensors, alpha = download.content.tensors, self.adapter.alpha
        upload = federated_lora.train(
            self.trainer, model, tensors, alpha, self.config.gate, "none", download, shard, seeds
        )
        return FitResult(upload, memory)

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: FlexLoraConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the best LoRA of the global rank for the mean of the products."""
        weights = Weights(updates, config.activation_rule, aggregation.unused(previous))
        a_names, others = aggregation.lora_paths(updates)
        tensors = {name: aggregation.average_one(updates, name, weights, previous) for name in others}
        for a_name in a_names:
            pairs = list(aggregation.received_pairs(updates, a_name))
            before = aggregation.previous_pair(updates, a_name, previous, config.rank)
            tensors |= aggregation.named(a_name, factors.principal(pairs, weights.of(a_name), before))
        return dict(sorted(tensors.items()))

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Combine."""
        updates = federated.updates_of(uploads, state.meta)
        return Bundle(self.combine(updates, self.config, state.tensors), state.meta)

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
