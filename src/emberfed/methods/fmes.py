"""FMES, a baseline of FLUX (https://arxiv.org/abs/2508.19078): clients keep the experts they use most, drop the rest.

Before a client's first round the server asks for a survey: how often its data uses each expert of the base. From then
on the client holds the `held_experts` it uses most, as many in each layer (the layers' shares differ by one at most,
earlier ones having more), and trains the `tuned_experts` most used of those. Nothing is merged.

The paper's text was not at hand. What we decide: `dropped: reroute` lets the router choose among the experts that are
left, as in a model pruned of the others; with `skip` a token whose expert is dropped gets nothing from it. The server
averages each expert over the clients that trained it, as FLUX, and the global model is evaluated whole.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, final

import torch
from torch import Tensor

from emberfed import compact_session, federated_experts
from emberfed.aggregation import Update
from emberfed.clients import Budget, Client, largest_remainder
from emberfed.costs import Work
from emberfed.data.shard import Shard
from emberfed.errors import ConfigError
from emberfed.federated_experts import ExpertTuningConfig, ProfileConfig
from emberfed.federated_lora import GateOption
from emberfed.method import Held, Method
from emberfed.models.compact import Cluster, CompactPlan, LayerPlan
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.low_bit_copies import LowBitCopies
from emberfed.records import Bundle, FitResult, Json, Payload, TensorSpec
from emberfed.seeds import Seeds
from emberfed.training import Trainer

USE = "use"
"""Key of how often a client's data uses each expert: int64 (L, E), tokens routed to it."""


class FmesConfig(ProfileConfig):
    """Options of FMES.

    Attributes:
        dropped: What becomes of a token whose expert is dropped: `reroute` to one that is kept, or `skip` it.
        gate: `native` or `renormalised` (weights of the K active experts sum to 1).
    """

    dropped: Literal["reroute", "skip"] = "reroute"
    gate: GateOption = "native"


@final
class Fmes(Method):
    """The most used experts kept, the rest dropped."""

    title = "FMES"
    paper = "Federated Fine-Tuning of Sparsely-Activated Large Language Models on Resource-Constrained Devices (FLUX)"
    Config = FmesConfig
    AdapterConfig = ExpertTuningConfig

    def __init__(self, config: Any, adapter: Any, trainer: Trainer) -> None:
        """Begin without a copy of the model."""
        super().__init__(config, adapter, trainer)
        self._copies = LowBitCopies()

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from the experts of the base; of clients nothing is known yet."""
        federated_experts.check_budgets(model, budgets, self.title, merges=False)
        if self.config.dropped == "reroute" and model.largest_top_k < model.num_experts:
            raise ConfigError(
                f"routers of this {model.family.model_type} model choose groups of experts first, so they cannot "
                f"choose again without those a client drops; set method.dropped=skip"
            )
        for budget in budgets if self.config.dropped == "reroute" else ():
            held = budget.held_experts or 0
            if held < model.num_layers * budget.top_k:
                raise ConfigError(
                    f"clients.tiers: tier {budget.tier!r} holds {held} experts, but routers that choose among those "
                    f"that are kept need top_k {budget.top_k} in each of {model.num_layers} layers; hold "
                    f"{model.num_layers * budget.top_k}, lower top_k, or set method.dropped=skip"
                )
        return federated_experts.initial(model, self.adapter, seeds)

    def unsurveyed(self, state: Bundle, cohort: Sequence[Client]) -> Sequence[Client]:
        """Return clients that are new."""
        return [client for client in cohort if _of(client.id) not in state.tensors]

    def survey_expects(self, state: Bundle) -> Mapping[str, TensorSpec]:
        """How often each expert is used."""
        return {USE: federated_experts.counts_spec(state.meta)}

    def survey(self, model: FoundationModel, client: Client, shard: Shard, memory: Bundle, seeds: Seeds) -> FitResult:
        """Profile the base."""
        bits, size = self.config.profile_bits, self.trainer.config.batch_size
        copy = model if bits is None else self._copies.of(model, bits)
        top_k, alpha = client.budget.top_k, self.adapter.alpha
        gate: GateOption = self.config.gate
        profile = federated_experts.profiled(copy, Bundle(), alpha, top_k, gate, shard, size, attention=False)
        cost = compact_session.profile_work(model, profile, {}, -(-profile.examples // size), copy)
        return FitResult(Bundle({USE: profile.counts_LE}), Bundle(profile.to_tensors(), {"cost": cost}))

    def assign(self, state: Bundle, cohort: Sequence[Client], surveys: Sequence[Payload], round: int) -> Bundle:
        """Take note of the surveys."""
        known = {_of(survey.client): survey.content.tensors[USE] for survey in surveys}
        return Bundle({**state.tensors, **known}, state.meta)

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the tuned experts of all, which ones the client keeps, and which of those it trains."""
        shape = (len(state.meta["sparse_layers"]), state.meta["num_experts"])
        use_LE = state.tensors.get(_of(client.id), torch.zeros(shape, dtype=torch.int64))
        budget = client.budget
        assert budget.held_experts is not None, "checked when the run began"
        assert budget.tuned_experts is not None, "checked when the run began"
        kept = most_used(use_LE, budget.held_experts)
        tuned = most_used_of(use_LE, kept, budget.tuned_experts)
        roles = {"kept": [list(ids) for ids in kept], "exploited": [list(ids) for ids in tuned]}
        told = {"top_k": budget.top_k, **roles, **federated_experts.described(state.meta)}
        return Payload(round, client.id, Bundle(federated_experts.stacks_of(state), told))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """The experts it trains, and the activation counts."""
        return federated_experts.specs(state, download.content.meta["exploited"])

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Train on the experts that are kept."""
        session = compact_session.Session(self.trainer, model, download, self.adapter, seeds)
        everywhere_NLE = torch.ones(len(shard.examples), model.num_layers, model.num_experts, dtype=torch.bool)
        with session.compact(self._plan(download, tuned=True), self.config.gate, self._reroutes) as compact:
            upload, _ = compact.train(shard, everywhere_NLE)
        stats: Mapping[str, Json] = upload.meta["stats"]
        if "cost" in memory.meta:  # of the survey, which came before this first round
            stats = compact_session.with_profile(stats, memory.meta["cost"], at_once=True, in_idle_time=False)
        return FitResult(Bundle(upload.tensors, {**upload.meta, "stats": stats}), Bundle(meta={"surveyed": True}))

    @contextmanager
    def held(self, model: FoundationModel, download: Payload, client: Client) -> Iterator[Held]:
        """The model with the experts that the client keeps."""
        session = compact_session.Session(self.trainer, model, download, self.adapter, Seeds(0))
        with session.held(self._plan(download, tuned=True), self.config.gate, self._reroutes) as compact:
            yield Held(model, compact, session.disk_bytes)

    def flops_beside(
        self, held: Held, download: Payload, client: Client, work: Work, trained: Mapping[str, Tensor]
    ) -> int:
        """The profile that its survey takes."""
        return compact_session.profile_flops(held.model, work, {})

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: FmesConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Each expert's mean over the clients that trained it."""
        return federated_experts.combine(updates, previous)

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Combine; what is known of clients stays."""
        updates, previous = federated_experts.updates_of(state, uploads)
        known = {name: tensor for name, tensor in state.tensors.items() if name.startswith("client.")}
        combined = self.combine(updates, self.config, previous)
        return Bundle({**known, **combined}, {**state.meta, **federated_experts.trained(state.meta, uploads)})

    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> AbstractContextManager[FoundationModel]:
        """Run the whole model, all experts in place, with the budget's K."""
        return federated_experts.deployed(model, state, self.adapter.alpha, budget.top_k, self.config.gate)

    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Run the model with the experts that the client keeps."""
        session = compact_session.Session(self.trainer, model, download, self.adapter, Seeds(0))
        return session.deployed(self._plan(download, tuned=False), self.config.gate, self._reroutes)

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return a PEFT adapter, or the weights of the experts that were tuned in full."""
        return federated_experts.export(state, model, self.adapter.alpha)

    @property
    def _reroutes(self) -> bool:
        dropped: str = self.config.dropped
        return dropped == "reroute"

    def _plan(self, download: Payload, tuned: bool) -> CompactPlan:
        """Return which experts are in the model; with `tuned`, ready to be trained."""
        meta = download.content.meta
        plan = []
        for kept, exploited in zip(meta["kept"], meta["exploited"], strict=True):
            trained = exploited if tuned else []
            frozen = tuple(Cluster((expert,), (1.0,)) for expert in kept if expert not in trained)
            dropped = tuple(expert for expert in range(meta["num_experts"]) if expert not in kept)
            plan.append(LayerPlan(tuple(trained), frozen, dropped))
        return tuple(plan)


def most_used(use_LE: Tensor, number: int) -> list[list[int]]:
    """Return the most used experts, as many in each layer but for a remainder; of equally used ones the first."""
    layers = len(use_LE)
    shares = largest_remainder([1 / layers] * layers, number)
    return [_best(row, range(len(row)), share) for row, share in zip(use_LE.tolist(), shares, strict=True)]


def most_used_of(use_LE: Tensor, kept: Sequence[Sequence[int]], number: int) -> list[list[int]]:
    """Return the most used of some experts, over all layers; of equally used ones the first."""
    places = [(row, expert) for row, ids in enumerate(kept) for expert in ids]
    chosen = sorted(places, key=lambda place: -int(use_LE[place]))[:number]
    return [sorted(expert for row_, expert in chosen if row_ == row) for row in range(len(kept))]


def _best(uses: Sequence[int], experts: Sequence[int], number: int) -> list[int]:
    return sorted(sorted(experts, key=lambda expert: -uses[expert])[:number])


def _of(client: str) -> str:
    """Return the name of what the state knows of a client."""
    return f"client.{client}.{USE}"
