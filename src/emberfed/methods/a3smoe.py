"""A3SMoE (Tran, Le, Pham: "Revisiting Sparse Mixture of Experts for Resource-adaptive Federated Fine-tuning").

Every client holds the whole global LoRA and trains it with as many active experts as its tier affords (eq. 1, 4).
The server averages experts by how much each client used them (eq. 7) and everything else by data size (eq. 8).

Where we deviate, and why:
* Eq. 7 as printed is not normalised, its weights would shrink the experts to nothing; we normalise them per
  (layer, expert). An expert nobody used keeps its bits.
* The frequency is an option, since the readings found in the literature are opposite policies.
* `gate: native` keeps the checkpoint's own convention by default; `renormalised` is the paper's softmax over the K
  kept logits, which changes an OLMoE model even at its native K.
* The paper does not name LoRA targets: q, k, v, o and all expert matrices by default (`adapter` section).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

from pydantic import Field
from torch import Tensor

from emberfed import aggregation, federated, federated_lora
from emberfed.aggregation import ActivationRule, Frequency, Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.federated_lora import GateOption
from emberfed.method import Method
from emberfed.models import lora, peft_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Bundle, FitResult, Payload, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig


class A3SMoEConfig(Section):
    """Options of A3SMoE.

    Attributes:
        frequency: What counts as use of an expert: `per_activation_over_k` (eq. 7 as printed; favours clients with
            small K), `per_activation` (favours nobody by K), `per_token` (favours clients with large K).
        temperature: The exponent gamma; 0 is data-size averaging.
        gate: `native` or `renormalised` (weights of the K active experts sum to 1).
        server_optimizer: What the server does with the mean.
    """

    frequency: Frequency = "per_activation_over_k"
    temperature: float = Field(2.0, ge=0)
    gate: GateOption = "native"
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()


@final
class A3SMoE(Method):
    """Per-client top-K with activation-aware aggregation."""

    title = "A³SMoE"
    paper = (
        "Tran, Le, Pham: Revisiting Sparse Mixture of Experts for Resource-adaptive Federated Fine-tuning "
        "Foundation Models"
    )
    Config = A3SMoEConfig
    AdapterConfig = lora.LoraConfig

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from a LoRA that changes nothing: A random, B zero."""
        federated_lora.check_experts(model, self.title)
        tensors = federated_lora.initial(model, self.adapter, self.adapter.rank, "adapter.rank", seeds)
        return Bundle(tensors, federated_lora.layout(model))

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the whole global LoRA, and the client's K."""
        adapter = federated.adapter_of(state.tensors)
        return Payload(round, client.id, Bundle(adapter, {"top_k": client.budget.top_k}))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the LoRA as sent, and the activation counts."""
        return federated.specs(download.content.tensors, state.meta)

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train the LoRA with K active experts; report it with the counts."""
        tensors, alpha = download.content.tensors, self.adapter.alpha
        upload = federated_lora.train(
            self.trainer, model, tensors, alpha, self.config.gate, "none", download, shard, seeds
        )
        return FitResult(upload, memory)

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: A3SMoEConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Eq. 7 (normalised) for experts, eq. 8 for the rest."""
        rule = ActivationRule(config.frequency, config.temperature)
        return aggregation.average(updates, Weights(updates, rule, aggregation.unused(previous)), previous)

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
        """Return a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""
        return peft_layout.to_files(federated.adapter_of(state.tensors), self.adapter.alpha, model)
