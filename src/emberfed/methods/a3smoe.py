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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, final

import torch
from pydantic import Field

from emberfed import aggregation
from emberfed.aggregation import Frequency
from emberfed.clients import Budget, Client
from emberfed.data.tokenise import Shard
from emberfed.method import Method
from emberfed.models import lora, peft_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import ACTIVATION_COUNTS, Bundle, FitResult, Payload, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds


class A3SMoEConfig(Section):
    """Options of A3SMoE.

    Attributes:
        frequency: What counts as use of an expert: `per_activation_over_k` (eq. 7 as printed; favours clients with
            small K), `per_activation` (favours nobody by K), `per_token` (favours clients with large K).
        temperature: The exponent gamma; 0 is data-size averaging.
        gate: `native` or `renormalised` (weights of the K active experts sum to 1).
    """

    frequency: Frequency = "per_activation_over_k"
    temperature: float = Field(2.0, ge=0)
    gate: Literal["native", "renormalised"] = "native"


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
        # A model may have dense layers between sparse ones: rows of the counts are the sparse ones only.
        layout = {"sparse_layers": [block.layer for block in model.blocks], "num_experts": model.num_experts}
        return Bundle(lora.initial(model, self.adapter, seeds.torch("adapter")), layout)

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the whole global LoRA, and the client's K."""
        return Payload(round, client.id, Bundle(state.tensors, {"top_k": client.budget.top_k}))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the LoRA as sent, and the activation counts."""
        specs = {name: TensorSpec.of(tensor) for name, tensor in state.tensors.items()}
        counts_shape = (len(state.meta["sparse_layers"]), state.meta["num_experts"])
        return {**specs, ACTIVATION_COUNTS: TensorSpec(counts_shape, torch.int64)}

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train the LoRA with K active experts; report it with the counts."""
        top_k = download.content.meta["top_k"]
        with (
            model.active_experts(top_k, self.config.gate),
            lora.attached(model, download.content.tensors, self.adapter.alpha) as adapter,
        ):
            stats = self.trainer.train(model, adapter, shard, client.id, download.round, seeds)
            tensors = {**adapter.tensors(), ACTIVATION_COUNTS: stats.counts_LE}
        meta = {"examples": len(shard.examples), "tokens": stats.tokens, "top_k": top_k, "stats": stats.json()}
        return FitResult(Bundle(tensors, meta), memory)

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Eq. 7 (normalised) for experts, eq. 8 for the rest."""
        contents = [upload.content for upload in uploads]

        def column(key: str) -> torch.Tensor:
            return torch.tensor([content.meta[key] for content in contents], dtype=torch.float64)

        shares_C = aggregation.data_weights(column("examples"))
        counts_CLE = torch.stack([content.tensors[ACTIVATION_COUNTS] for content in contents])
        frequency_CLE = aggregation.activation_frequency(
            counts_CLE, column("tokens"), column("top_k"), self.config.frequency
        )
        weights_CLE = aggregation.expert_weights(shares_C, frequency_CLE, self.config.temperature)
        row_of = {layer: row for row, layer in enumerate(state.meta["sparse_layers"])}
        tensors = {}
        for name, previous in state.tensors.items():
            received = (content.tensors[name] for content in contents)
            if lora.is_expert(name):
                weights_CE = weights_CLE[:, row_of[lora.layer_of(name)]]
                tensors[name] = aggregation.mean_per_expert(previous, received, weights_CE)
            else:
                tensors[name] = aggregation.mean(received, shares_C)
        return Bundle(tensors, state.meta)

    @contextmanager
    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> Iterator[FoundationModel]:
        """Run the global LoRA with the budget's K."""
        with (
            model.active_experts(budget.top_k, self.config.gate),
            lora.attached(model, state.tensors, self.adapter.alpha),
        ):
            yield model

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""
        return peft_layout.to_files(state.tensors, self.adapter.alpha, model)
