"""A dense adapter, averaged: one two-layer MLP beside the FFN of each layer that every token passes.

The baseline that tells what routing is worth: a sparse adapter of M experts of size H has as many parameters as a dense
one of size M H, but for the gate. Adapters: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; those
beside the FFN: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

from pydantic import Field
from torch import Tensor

from emberfed import aggregation, federated, federated_adapter
from emberfed.aggregation import Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.method import Method
from emberfed.models import sparse_adapter, sparse_adapter_files
from emberfed.models.adapter_layer import Activation
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.sparse_adapter import SparseAdapterConfig
from emberfed.records import Bundle, FitResult, Payload, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig


class DenseAdapterConfig(Section):
    """The adapter's size, and where it stands.

    Attributes:
        size: Its hidden size.
        activation: What is between its two matrices.
        layers: The layers it stands in, from 0; null is all.
        head: Train the classifier's head too, in full; null does where the model has one.
    """

    size: int = Field(default=128, ge=1, le=65536)
    activation: Activation = "gelu"
    layers: tuple[int, ...] | None = None
    head: bool | None = None

    def as_sparse(self) -> SparseAdapterConfig:
        """Return the mixture of one expert, which needs no gate, that it is."""
        values = self.model_dump(exclude={"size"})
        return SparseAdapterConfig(num_experts=1, expert_size=self.size, **values)


class DenseAdapterMethodConfig(Section):
    """Options of the dense adapter.

    Attributes:
        server_optimizer: What the server does with the mean.
    """

    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()


@final
class DenseAdapter(Method):
    """An adapter without routing, averaged by data size."""

    title = "Dense adapter"
    paper = "He et al.: Towards a Unified View of Parameter-Efficient Transfer Learning"
    Config = DenseAdapterMethodConfig
    AdapterConfig = DenseAdapterConfig

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from an adapter that changes nothing."""
        tensors = sparse_adapter.initial(model, self.adapter.as_sparse(), seeds.torch("adapter"))
        return Bundle(tensors, {"sparse_layers": [], "num_experts": 0})

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the whole adapter, whose one expert is always active."""
        meta = {"top_k": client.budget.top_k, "adapter_top_k": 1}
        return Payload(round, client.id, Bundle(federated.adapter_of(state.tensors), meta))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the adapter."""
        return federated.specs(download.content.tensors, state.meta)

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train the adapter."""
        tensors, activation = download.content.tensors, self.adapter.activation
        upload = federated_adapter.train(self.trainer, model, tensors, activation, download, shard, seeds)
        return FitResult(upload, memory)

    @classmethod
    def combine(
        cls,
        updates: Sequence[Update],
        config: DenseAdapterMethodConfig,
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
        """Run the global adapter."""
        tensors, activation = federated.adapter_of(state.tensors), self.adapter.activation
        return federated_adapter.deployed(model, tensors, activation, budget.top_k, 1)

    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Run the adapter it was sent."""
        tensors, activation = download.content.tensors, self.adapter.activation
        return federated_adapter.deployed(model, tensors, activation, client.budget.top_k, 1)

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return the adapter's folder, which `emberfed.load_adapter` reads."""
        return sparse_adapter_files.to_files(federated.adapter_of(state.tensors), model, self.adapter.activation, 1)
