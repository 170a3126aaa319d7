"""Methods in which everybody trains the whole of one LoRA, and the server averages it: what differs is who holds what.

Free functions would leave each of them the same ten methods to repeat; this abstract class is those ten.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

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


class AveragedLoraConfig(LoraMethodConfig):
    """Options of methods that average one LoRA.

    Attributes:
        server_optimizer: What the server does with the mean.
    """

    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()


class AveragedLora(Method):
    """LoRA of one rank for everybody, A and B averaged apart (FedIT)."""

    AdapterConfig = lora.LoraConfig

    @abstractmethod
    def rank(self, budgets: Sequence[Budget]) -> tuple[int, str]:
        """Return the rank everybody gets, and which key of the configuration says so. Raises: ConfigError."""

    @abstractmethod
    def check_held(self, model: FoundationModel, budgets: Sequence[Budget]) -> None:
        """Check that clients of these budgets can hold the model as `held` says. Raises: ConfigError."""

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from a LoRA that changes nothing, of the rank everybody gets."""
        federated_lora.check_options(model, self.config)
        self.check_held(model, budgets)
        rank, whose = self.rank(budgets)
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
        """Train the LoRA on the model as the client holds it."""
        tensors, alpha, gate = download.content.tensors, self.adapter.alpha, self.config.gate
        with self.held(model, download, client) as held:
            upload = federated_lora.train(
                self.trainer, held.model, tensors, alpha, gate, "none", download, shard, seeds
            )
        stats = upload.meta["stats"]
        told = {**stats, "disk_bytes": stats["disk_bytes"] + held.disk_bytes}
        return FitResult(Bundle(upload.tensors, {**upload.meta, "stats": told}), memory)

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: AveragedLoraConfig, previous: Mapping[str, Tensor] | None = None
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

    @contextmanager
    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> Iterator[FoundationModel]:
        """Run the LoRA it was sent, with the client's K, on the model as it holds it."""
        tensors, alpha = download.content.tensors, self.adapter.alpha
        with (
            self.held(model, download, client) as held,
            federated_lora.deployed(held.model, tensors, alpha, client.budget.top_k, self.config.gate) as running,
        ):
            yield running

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return a PEFT adapter."""
        return peft_layout.to_files(federated.adapter_of(state.tensors), self.adapter.alpha, model)
