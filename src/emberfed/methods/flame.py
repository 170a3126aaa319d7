"""FLAME (Le et al.: "FLAME: Towards Federated Fine-Tuning Large Language Models Through Adaptive SMoE").

As A3SMoE: every client trains the whole global LoRA with as many active experts as it affords. Besides:

* A rescaler repairs the magnitude that is lost with the experts that are not active: it multiplies the routed experts'
  whole combined output, h = s sum_j R(x, K)_j (W_j x + alpha / r B_j A_j x). `learnable`: one number for each sparse
  layer, trained with the LoRA, kept by the client, averaged among clients of one K only, and used to evaluate that K.
* Experts are averaged with weights proportional to |D_c| (a_{j,c} / n_c)^t, normalised for each (layer, expert).

What the paper leaves open, and what we decided:
* A client goes on with its own rescaler; a new one begins with the mean of its K, or with `rescaler_start`.
* A K that no tier has is evaluated with `rescaler_start`.
* On a gate that renormalises (by option, or the checkpoint's own as in Mixtral and Qwen3) no magnitude is lost, so a
  rescaler has nothing to repair: asking for one is an error, and `auto` means none there, `learnable` elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from emberfed import aggregation, federated, federated_lora
from emberfed.aggregation import ActivationRule, Frequency, Update, Weights
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.errors import ConfigError
from emberfed.federated_lora import GateOption
from emberfed.method import Method
from emberfed.models import lora, peft_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.gating import Rescale
from emberfed.records import Bundle, FitResult, Json, Payload, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig

RESCALER = "rescaler"
"""Name of a client's rescaler, (L,) float32, in payloads and in its memory."""


class FlameConfig(Section):
    """Options of FLAME.

    Attributes:
        rescale: `learnable`; `static`: native K / K; `mass`: the router's mass of the native K best experts over that
            of the K best, per token; `none`; `auto`: learnable, or none where the gate renormalises.
        rescaler_start: What a learnable rescaler begins with: `one`, or `static`.
        frequency: What counts as use of an expert: `per_token` as published, `per_activation` or
            `per_activation_over_k`.
        temperature: The exponent t; 0 is data-size averaging.
        gate: `native` or `renormalised` (weights of the K active experts sum to 1).
        server_optimizer: What the server does with the mean.
    """

    rescale: Literal["auto", "none", "static", "mass", "learnable"] = "auto"
    rescaler_start: Literal["one", "static"] = "one"
    frequency: Frequency = "per_token"
    temperature: float = Field(2.0, ge=0)
    gate: GateOption = "native"
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()

    @model_validator(mode="after")
    def _something_to_repair(self) -> Self:
        if self.gate == "renormalised" and self.rescale not in ("auto", "none"):
            raise ValueError(
                f"rescale {self.rescale!r} has nothing to repair with gate 'renormalised', whose weights have the "
                f"same sum at every top_k; set rescale: none, or gate: native"
            )
        if self.rescaler_start == "static" and self.rescale not in ("auto", "learnable"):
            raise ValueError(f"rescaler_start has no effect with rescale {self.rescale!r}; leave it out")
        return self


@final
class Flame(Method):
    """Per-client top-K with a rescaler and activation-aware aggregation."""

    title = "FLAME"
    paper = "Le et al.: FLAME: Towards Federated Fine-Tuning Large Language Models Through Adaptive SMoE"
    Config = FlameConfig
    AdapterConfig = lora.LoraConfig

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from a LoRA that changes nothing, and a rescaler for each K."""
        federated_lora.check_experts(model, self.title)
        rescale = self._resolved(model)
        tensors = federated_lora.initial(model, self.adapter, self.adapter.rank, "adapter.rank", seeds)
        meta = {**federated_lora.layout(model), "rescale": rescale}
        learned = {_of_k(budget.top_k): self._start(meta, budget.top_k) for budget in budgets}
        return Bundle({**tensors, **(learned if rescale == "learnable" else {})}, meta)

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the whole global LoRA, the client's K, and the rescaler of that K."""
        top_k = client.budget.top_k
        adapter = federated.adapter_of(state.tensors)
        learned = state.tensors.get(_of_k(top_k))
        tensors = adapter if learned is None else {**adapter, RESCALER: learned}
        return Payload(round, client.id, Bundle(tensors, {"top_k": top_k, "rescale": state.meta["rescale"]}))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """Every tensor of the LoRA as sent, the rescaler if there is one, and the activation counts."""
        return federated.specs(download.content.tensors, state.meta)

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train LoRA and rescaler with K active experts; go on from one's own rescaler."""
        layers = [block.layer for block in model.blocks]
        tensors = self._attachable(model, download, memory)
        upload = federated_lora.train(
            self.trainer,
            model,
            tensors,
            self.adapter.alpha,
            self.config.gate,
            _fixed(download.content.meta["rescale"]),
            download,
            shard,
            seeds,
        )
        if RESCALER not in download.content.tensors:
            return FitResult(upload, memory)
        rescaler_L = torch.cat([upload.tensors[name] for name in _names(layers)])
        trained = {name: tensor for name, tensor in upload.tensors.items() if name not in _names(layers)}
        return FitResult(Bundle({**trained, RESCALER: rescaler_L}, upload.meta), Bundle({RESCALER: rescaler_L}))

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: FlameConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Average experts by data size and use, everything else by data size."""
        rule = ActivationRule(config.frequency, config.temperature)
        weights = Weights(updates, rule, aggregation.unused(previous))
        return aggregation.average(updates, weights, previous)

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Combine, let the server's optimiser step; average rescalers among clients of one K."""
        updates = federated.updates_of(uploads, state.meta)
        combined = self.combine(updates, self.config, state.tensors)
        tensors = federated.stepped(self.config.server_optimizer, state, combined, updates)
        for name in (name for name in state.tensors if name.startswith(f"{RESCALER}.")):
            peers = [upload.content for upload in uploads if _of_k(upload.content.meta["top_k"]) == name]
            tensors[name] = state.tensors[name]
            if peers:
                shares_C = aggregation.data_weights(torch.tensor([peer.meta["examples"] for peer in peers]))
                tensors[name] = aggregation.mean((peer.tensors[RESCALER] for peer in peers), shares_C)
        return Bundle(tensors, state.meta)

    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> AbstractContextManager[FoundationModel]:
        """Run the global LoRA with the budget's K and the rescaler of that K."""
        tensors, rescale = federated.adapter_of(state.tensors), state.meta["rescale"]
        if rescale == "learnable":
            learned = state.tensors.get(_of_k(budget.top_k))
            rescaler_L = self._start(state.meta, budget.top_k) if learned is None else learned
            tensors |= _by_layer(rescaler_L, state.meta["sparse_layers"])
        alpha, gate = self.adapter.alpha, self.config.gate
        return federated_lora.deployed(model, tensors, alpha, budget.top_k, gate, _fixed(rescale))

    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Run the LoRA it was sent with the client's K and its own rescaler."""
        tensors, rescale = self._attachable(model, download, memory), download.content.meta["rescale"]
        alpha, gate = self.adapter.alpha, self.config.gate
        return federated_lora.deployed(model, tensors, alpha, client.budget.top_k, gate, _fixed(rescale))

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return a PEFT adapter, and the learned rescalers, for which PEFT has no place, in a file beside it."""
        files = peft_layout.to_files(federated.adapter_of(state.tensors), self.adapter.alpha, model)
        learned = {name: tensor for name, tensor in state.tensors.items() if name.startswith(f"{RESCALER}.")}
        layers = {"sparse_layers": state.meta["sparse_layers"]}
        return {**files, **({"rescalers.safetensors": Bundle(learned, layers).to_bytes()} if learned else {})}

    def _attachable(self, model: FoundationModel, download: Payload, memory: Bundle) -> dict[str, Tensor]:
        """Return the LoRA that was sent, with the client's own rescaler if it has one yet, else the one sent."""
        sent = download.content.tensors
        tensors = federated.adapter_of(sent)
        if RESCALER not in sent:
            return tensors
        layers = [block.layer for block in model.blocks]
        return {**tensors, **_by_layer(memory.tensors.get(RESCALER, sent[RESCALER]), layers)}

    def _resolved(self, model: FoundationModel) -> str:
        """Return what `rescale` means on this model. Raises: ConfigError if its gate leaves nothing to repair."""
        renormalises = "renormalised" in (self.config.gate, model.native_gate)
        rescale: str = self.config.rescale
        if rescale == "auto":
            return "none" if renormalises else "learnable"
        if renormalises and rescale != "none":
            raise ConfigError(
                f"method.rescale {rescale} has nothing to repair on this {model.family.model_type} model, "
                f"whose router's weights have the same sum at every top_k; set method.rescale=none"
            )
        return rescale

    def _start(self, meta: Mapping[str, Json], top_k: int) -> Tensor:
        start = 1.0 if self.config.rescaler_start == "one" else meta["native_top_k"] / top_k
        return torch.full((len(meta["sparse_layers"]),), start)


def _of_k(top_k: int) -> str:
    return f"{RESCALER}.top_k_{top_k}"


def _fixed(rescale: str) -> Rescale:
    """Return what the routing does by itself; a learnable rescaler is a part of the adapter."""
    return "static" if rescale == "static" else "mass" if rescale == "mass" else "none"


def _names(layers: Sequence[int]) -> list[str]:
    return [f"layers.{layer}.router.rescaler" for layer in layers]


def _by_layer(rescaler_L: Tensor, layers: Sequence[int]) -> dict[str, Tensor]:
    return dict(zip(_names(layers), rescaler_L[:, None].unbind(), strict=True))
