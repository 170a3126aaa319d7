"""FFT-MoE (Hu et al. 2025, "FFT-MoE: Efficient Federated Fine-Tuning for Foundation Models via Large-scale Sparse MoE
under Heterogeneous Edge", https://arxiv.org/abs/2508.18663): a sparse mixture of adapters instead of LoRA.

Beside the FFN of every layer of any model stand M two-layer experts and a gate,

    y = FFN(x) + sum over the k_c best experts m of g_m(x) W_up_m act(W_down_m x),   g = softmax of the k_c kept logits

with k_c by the client's budget. All clients share the adapter's shape, so its experts are averaged by data size
whatever k_c is; an expert nobody used keeps its bits. Each client trains a gate. What the paper's public abstract
leaves open, and we decide:

* `gate_aggregation: local` (the abstract's "personalised subset"): a client goes on with its own gate, kept in its
  memory. The server still averages the gates it is sent: the mean is the global model's, and that of clients that join
  late. `fedavg`: everybody goes on with the mean.
* `balance: heterogeneity` is a stand-in in the spirit of FFT-MoE's heterogeneity-aware auxiliary loss, whose formula is
  not public: a Switch loss that pushes clients away from experts the federation used much in its last round, the more
  the further the client's own routing is from everybody's (`models.balance`). `switch` is the plain one.
* W_up starts at zero, so that the model begins as it was.

Shapes: L layers with an adapter, M experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from emberfed import aggregation, federated, federated_adapter
from emberfed.aggregation import ActivationRule, Frequency, Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.errors import ClientError, ConfigError
from emberfed.method import Method
from emberfed.models import balance, sparse_adapter, sparse_adapter_files
from emberfed.models.balance import Regulariser
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import ACTIVATION_COUNTS, Bundle, FitResult, Payload, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig

LOAD = "expert_load"
"""Key of the global load: float32 (L, M), each expert's share of its layer's assignments in the last round."""


class FftMoeConfig(Section):
    """Options of FFT-MoE.

    Attributes:
        gate_aggregation: `local`: a client keeps its own gate from round to round; `fedavg`: it goes on with the mean.
        weighting: A client's share in the mean of an expert: `data` by its examples; `activation` by its use of the
            expert too, as A3SMoE (then `frequency` and `temperature` count, as there).
        frequency: What counts as use of an expert: `per_activation_over_k`, `per_activation` or `per_token`.
        temperature: Exponent of the frequency.
        balance: Auxiliary loss of the gate: `none`, `switch`, or `heterogeneity`, a stand-in in the spirit of FFT-MoE.
        balance_coef: Its weight; a heterogeneous client's is larger, see `balance`.
        router_z_coef: Weight of the router z-loss, the mean squared log-sum-exp of the gate's logits; 0: off.
        server_optimizer: What the server does with the mean.
    """

    gate_aggregation: Literal["local", "fedavg"] = "local"
    weighting: Literal["data", "activation"] = "data"
    frequency: Frequency = "per_activation_over_k"
    temperature: float = Field(2.0, ge=0)
    balance: Literal["none", "switch", "heterogeneity"] = "heterogeneity"
    balance_coef: float = Field(0.01, ge=0)
    router_z_coef: float = Field(0.0, ge=0)
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        fields = type(self).model_fields
        for key in ("frequency", "temperature"):
            if self.weighting != "activation" and getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} has no effect with weighting {self.weighting!r}; set weighting: activation")
        if self.balance == "none" and self.balance_coef != fields["balance_coef"].default:
            raise ValueError("balance_coef has no effect with balance 'none'; leave it out")
        return self

    @property
    def activation_rule(self) -> ActivationRule | None:
        """How the use of experts weighs; None where it does not."""
        return ActivationRule(self.frequency, self.temperature) if self.weighting == "activation" else None


@final
class FftMoe(Method):
    """Sparse mixture-of-experts adapters with a gate of each client's own."""

    title = "FFT-MoE"
    paper = "Hu et al.: FFT-MoE: Efficient Federated Fine-Tuning for Foundation Models via Large-scale Sparse MoE"
    Config = FftMoeConfig
    AdapterConfig = sparse_adapter.SparseAdapterConfig
    experts = "adapter"

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from an adapter that changes nothing; no load is known yet."""
        if self.adapter.num_experts == 1:
            raise ConfigError(
                f"adapter.num_experts is 1, which leaves {self.title} nothing to route; choose 2 or more, or method "
                f"dense_adapter"
            )
        federated_adapter.check_budgets(budgets, self.adapter.num_experts, self.title)
        tensors = sparse_adapter.initial(model, self.adapter, seeds.torch("adapter"))
        meta = {**federated_adapter.layout(tensors), "adapter_top_k": federated_adapter.largest(budgets)}
        return Bundle({**tensors, LOAD: torch.zeros(len(meta["sparse_layers"]), meta["num_experts"])}, meta)

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the whole adapter with the mean gate, the client's k, and the global load of the last round."""
        tensors = {**federated.adapter_of(state.tensors), LOAD: state.tensors[LOAD]}
        meta = {"top_k": client.budget.top_k, "adapter_top_k": client.budget.adapter_top_k}
        return Payload(round, client.id, Bundle(tensors, meta))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the adapter, gate included, and the activation counts of its experts."""
        return federated.specs(federated.adapter_of(download.content.tensors), state.meta)

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train experts and gate with k active experts; remember the gate, and how it used the experts."""
        tensors, activation = self._own(download, memory), self.adapter.activation
        regulariser = self._regulariser(download.content.tensors[LOAD], memory.tensors.get(ACTIVATION_COUNTS))
        upload = federated_adapter.train(self.trainer, model, tensors, activation, download, shard, seeds, regulariser)
        kept = {**_gates(upload.tensors), ACTIVATION_COUNTS: upload.tensors[ACTIVATION_COUNTS]}
        return FitResult(upload, Bundle(kept))

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: FftMoeConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Average experts by data size, and by use if that is asked; gates and heads by data size."""
        weights = Weights(updates, config.activation_rule, aggregation.unused(previous))
        return aggregation.average(updates, weights, previous)

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Combine, let the server's optimiser step, and sum the clients' use of experts to the global load."""
        updates = federated.updates_of(uploads, state.meta)
        combined = self.combine(updates, self.config, federated.adapter_of(state.tensors))
        tensors = federated.stepped(self.config.server_optimizer, state, combined, updates)
        used_LM = sum((upload.content.tensors[ACTIVATION_COUNTS].double() for upload in uploads), torch.tensor(0.0))
        load_LM = (used_LM / used_LM.sum(dim=1, keepdim=True)).float()
        return Bundle({**tensors, LOAD: load_LM}, state.meta)

    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> AbstractContextManager[FoundationModel]:
        """Run the global adapter, with the mean gate and the budget's k."""
        federated_adapter.check_budgets([budget], self.adapter.num_experts, self.title)
        return self._deployed(model, federated.adapter_of(state.tensors), budget)

    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Run the shared experts with the client's own gate, or the mean one if it has none or none is kept."""
        return self._deployed(model, self._own(download, memory), client.budget)

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return the adapter's folder, which `emberfed.load_adapter` reads, with the mean gate."""
        tensors, activation = federated.adapter_of(state.tensors), self.adapter.activation
        return sparse_adapter_files.to_files(tensors, model, activation, state.meta["adapter_top_k"])

    def _own(self, download: Payload, memory: Bundle) -> dict[str, Tensor]:
        """Return the adapter as the client runs it: what it was sent, with its own gate if it keeps one.

        Raises: ClientError if the memory is not of this adapter.
        """
        sent = federated.adapter_of(download.content.tensors)
        if memory.tensors:
            _check_memory(memory, {**_gates(sent), ACTIVATION_COUNTS: download.content.tensors[LOAD]}, download.client)
        return sent if self.config.gate_aggregation == "fedavg" else {**sent, **_gates(memory.tensors)}

    def _deployed(
        self, model: FoundationModel, tensors: Mapping[str, Tensor], budget: Budget
    ) -> AbstractContextManager[FoundationModel]:
        assert budget.adapter_top_k is not None, "checked when the run began"
        activation = self.adapter.activation
        return federated_adapter.deployed(model, tensors, activation, budget.top_k, budget.adapter_top_k)

    def _regulariser(self, load_LM: Tensor, counts_LM: Tensor | None) -> Regulariser:
        """Return the auxiliary loss of a client: `counts_LM` is how it used the experts when it last trained."""
        kind, coefficient, z_coefficient = self.config.balance, self.config.balance_coef, self.config.router_z_coef
        if kind == "none":
            return Regulariser(z_coefficient=z_coefficient)
        if kind == "switch":
            return Regulariser(kind, coefficient, z_coefficient=z_coefficient)
        if counts_LM is not None:
            coefficient = balance.client_coefficient(coefficient, counts_LM, load_LM)
        return Regulariser(kind, coefficient, balance.omega(load_LM), z_coefficient)


def _gates(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of an adapter's tensors that are gates."""
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".adapter.router.weight")}


def _check_memory(memory: Bundle, expected: Mapping[str, Tensor], client: str) -> None:
    """Check that a memory holds gates and counts of the shapes expected, and no more. Raises: ClientError."""
    kept = memory.tensors
    for name in sorted({*kept, *expected}):
        if name not in kept or name not in expected:
            problem = "is missing" if name in expected else "is foreign"
        elif kept[name].shape != expected[name].shape:
            problem = f"has shape {tuple(kept[name].shape)}, expected {tuple(expected[name].shape)}"
        elif not bool(torch.isfinite(kept[name]).all()):
            problem = "is not finite"
        else:
            continue
        raise ClientError(
            f"what {client} keeps of its gate is damaged: {name!r} {problem}; put its memory back, or remove it, and "
            f"the client begins anew"
        )
