"""FedIT / Homo-LoRA (Zhang et al., "Towards Building the Federated GPT", 2023): LoRA of one rank, averaged.

Every client trains the whole LoRA; the server averages A and B apart, each by the clients' numbers of examples. The
mean of the products B A is not the product of the means: FlexLoRA and FLoRA mend that.

`rank: lowest` gives everybody the lowest rank of any tier (the Homo-LoRA of comparisons, which all clients can afford);
`rank: adapter` gives everybody `adapter.rank` (FedIT as published).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, final

from torch import Tensor

from emberfed import aggregation, federated, federated_lora
from emberfed.aggregation import Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.federated_lora import LoraMethodConfig
from emberfed.method import Method
from emberfed.models import lora, peft_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Bundle, FitResult, Payload, TensorSpec
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig


class HomoLoraConfig(LoraMethodConfig):
    """Options of Homo-LoRA.

    Attributes:
        rank: `lowest` of the tiers' ranks for everybody, or `adapter`: adapter.rank.
        server_optimizer: What the server does with the mean.
    """

    rank: Literal["lowest", "adapter"] = "lowest"
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()


@final
class HomoLora(Method):
    """LoRA of one rank for everybody, averaged by data size."""

    title = "Homo-LoRA"
    paper = "Zhang et al.: Towards Building the Federated GPT: Federated Instruction Tuning (FedIT)"
    Config = HomoLoraConfig
    AdapterConfig = lora.LoraConfig

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from a LoRA that changes nothing, of the rank everybody gets."""
        federated_lora.check_options(model, self.config)
        rank, whose = self.adapter.rank, "adapter.rank"
        if self.config.rank == "lowest":
            who = "homolora with rank lowest (rank: adapter would take adapter.rank)"
            rank, whose = min(federated_lora.tier_ranks(budgets, who)), "clients.tiers: the lowest rank"
        tensors = federated_lora.initial(model, self.adapter, rank, whose, seeds)
        return Bundle(tensors, federated_lora.layout(model))

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the whole global LoRA."""
        meta = {"top_k": self.config.top_k(client, state)}
        return Payload(round, client.id, Bundle(federated.adapter_of(state.tensors), meta))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the LoRA as sent, and the activation counts."""
        return federated.specs(download.content.tensors, state.meta)

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train the LoRA."""
        tensors, alpha = download.content.tensors, self.adapter.alpha
        upload = federated_lora.train(
            self.trainer, model, tensors, alpha, self.config.gate, "none", download, shard, seeds
        )
        return FitResult(upload, memory)

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: HomoLoraConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """A = sum p_c A_c, B = sum p_c B_c. Ranks must be equal: the mean of unequal ones is refused."""
        weights = Weights(updates, config.activation_rule, aggregation.unused(previous))
        return aggregation.average(updates, weights, previous)

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Combine, then let the server's optimiser step."""
        updates = federated.updates_of(uploads, state.meta)
        combined = self.combine(updates, self.config, state.tensors)
        return Bundle(federated.stepped(self.config.server_optimizer, state, combined, updates), state.meta)

    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> AbstractContextManager[FoundationModel]:
        """Run the global LoRA with the budget's K."""
        tensors = federated.adapter_of(state.tensors)
        return federated_lora.deployed(model, tensors, self.adapter.alpha, budget.top_k, self.config.gate)

    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Run the LoRA it was sent, with the client's K."""
        tensors, alpha = download.content.tensors, self.adapter.alpha
        return federated_lora.deployed(model, tensors, alpha, client.budget.top_k, self.config.gate)

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return a PEFT adapter."""
        return peft_layout.to_files(federated.adapter_of(state.tensors), self.adapter.alpha, model)
