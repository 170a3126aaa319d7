"""A linear probe, averaged: only the classifier's head is trained, on the frozen model's features.

The least that federated classification can do (Alain and Bengio 2016, "Understanding intermediate layers using linear
classifier probes"): what a method gains over it, its adapter gained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

from torch import Tensor

from emberfed import aggregation, federated, federated_lora
from emberfed.aggregation import Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.errors import ConfigError
from emberfed.method import Method
from emberfed.models import sparse_adapter_files
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.head import initial_head
from emberfed.records import Bundle, FitResult, Payload, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig

_NO_LORA = 1.0
"""Alpha of an adapter without LoRA, which scales nothing."""


class LinearProbeConfig(Section):
    """Options of the linear probe.

    Attributes:
        server_optimizer: What the server does with the mean.
    """

    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()


class HeadConfig(Section):
    """The linear probe has no adapter, and no options of one."""


@final
class LinearProbe(Method):
    """The head alone, averaged by data size."""

    title = "Linear probe"
    paper = "Alain and Bengio: Understanding intermediate layers using linear classifier probes"
    Config = LinearProbeConfig
    AdapterConfig = HeadConfig

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from the model's own head. Raises: ConfigError if it has none."""
        tensors = initial_head(model)
        if not tensors:
            raise ConfigError(
                f"the linear probe trains a classifier's head, and {model.family.model_type} models have none: they "
                f"generate text; choose another method, or a classification task (data.task)"
            )
        return Bundle(tensors, {"sparse_layers": [], "num_experts": 0})

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the head."""
        return Payload(round, client.id, Bundle(federated.adapter_of(state.tensors), {"top_k": client.budget.top_k}))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the head."""
        return federated.specs(download.content.tensors, state.meta)

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train the head."""
        tensors = download.content.tensors
        upload = federated_lora.train(self.trainer, model, tensors, _NO_LORA, "native", "none", download, shard, seeds)
        return FitResult(upload, memory)

    @classmethod
    def combine(
        cls,
        updates: Sequence[Update],
        config: LinearProbeConfig,
        previous: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Average by data size."""
        return aggregation.average(updates, Weights(updates, unused=aggregation.unused(previous)), previous)

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Combine, then let the server's optimiser step."""
        updates = federated.updates_of(uploads, state.meta)
        combined = self.combine(updates, self.config, state.tensors)
        return Bundle(federated.stepped(self.config.server_optimizer, state, combined, updates), state.meta)

    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> AbstractContextManager[FoundationModel]:
        """Run the model with the global head."""
        return federated_lora.deployed(model, federated.adapter_of(state.tensors), _NO_LORA, budget.top_k, "native")

    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Run the model with the head it was sent."""
        return federated_lora.deployed(model, download.content.tensors, _NO_LORA, client.budget.top_k, "native")

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return the folder of an adapter that is a head alone, which `emberfed.load_adapter` reads."""
        return sparse_adapter_files.to_files(federated.adapter_of(state.tensors), model, "gelu", 1)
