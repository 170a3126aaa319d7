"""FLUX (https://arxiv.org/abs/2508.19078): clients whose memory holds few experts tune some and merge the rest.

In each round a client

    1. knows how its data uses the experts from a profile, made with its experts in 4 bits (`models.profiling`),
    2. is told by the server which experts to exploit (train) and which to explore, within its budget,
    3. merges all others, layer by layer, into as many as its memory has room for (`models.expert_merging`),
    4. estimates the gradients of the explored ones by forward passes alone (`models.spsa`), trains the exploited ones,
    5. uploads the exploited ones, and how large their and the explored ones' gradients were.

The server averages each expert over the clients that trained it, by data size; the others keep their bits. What it
knows of a client: how many of its examples reach each expert, and root mean squares of gradients. Their product is the
utility u_e = |D^e| sqrt(mean ||g||^2) by which roles are given: a share epsilon of the slots to the highest, the rest
at random (`expert_roles`).

Of the paper only the abstract was at hand, and notes of others. What we decide:

* Before a client's first round the server asks for a survey: roles by utility need to know what its data reach.
* D^e are the examples with a token that is routed to e, so training on D^e follows from routing: an expert has no
  gradient from other examples. Examples that reach no exploited expert are left out of the round.
* Gradients are those of optimiser steps, and of batches as large where experts are explored, since the two must be
  comparable; with batches of one example they are those of the formula.
* `profile: stale`: the profile is of the model of the client's last round, made after its upload while the server
  aggregates, and kept in its memory. `fresh`: of the model it is sent, before it trains.
* epsilon grows linearly over a number of rounds of its own, not over those of the run, so that a run can be extended.
* Which experts are alike is decided by the base's parameters, once: what is trained since changes them little, and
  comparing all of them takes reading all of them. A merged expert itself is the mean of its members' present weights,
  LoRA folded in, weighted by frequency times attention.
* The global model is evaluated whole.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from emberfed import compact_session, costs, expert_roles, federated_experts
from emberfed.aggregation import Update
from emberfed.clients import Budget, Client
from emberfed.compact_session import UNKNOWN, Exploration
from emberfed.costs import Work
from emberfed.data.shard import Shard
from emberfed.errors import ClientError
from emberfed.expert_roles import Roles
from emberfed.federated_experts import ExpertTuningConfig, ProfileConfig
from emberfed.federated_lora import GateOption
from emberfed.method import Held, Method
from emberfed.models import expert_merging, profiling
from emberfed.models.compact import CompactPlan
from emberfed.models.expert_merging import BudgetRule, WeightRule
from emberfed.models.expert_values import ExpertValues
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.low_bit_copies import LowBitCopies
from emberfed.models.offloaded import disk_bytes_read
from emberfed.models.profiling import Profile
from emberfed.records import Bundle, FitResult, Json, Payload, TensorSpec
from emberfed.seeds import Seeds
from emberfed.training import Trainer

REACH = "reach"
"""Key of |D^e|: int64 (L, E), how many of a client's examples send a token to each expert."""

PRODUCTS = "expert_products"
"""Key of what a client compares experts by: float64 (L, E, E), inner products of the base's parameters."""

GRADIENTS = "gradient_rms"
"""Key of root mean squares of gradients' norms: float32 (L, E), `UNKNOWN` where none was measured."""


class FluxConfig(ProfileConfig):
    """Options of FLUX.

    Attributes:
        epsilon_first: Share of the tuned experts that go by utility in round 1; the others explore.
        epsilon_last: The same from round `epsilon_rounds` on.
        epsilon_rounds: Rounds over which the share grows, linearly.
        coverage: Clients of a round that should train each expert, as far as their budgets go; 0: no matter.
        exploration_batches: Batches on which an explored expert's gradient is estimated.
        exploration_draws: Directions that are tried on each batch; each takes two forward passes.
        exploration_step: How far along a direction, mu of SPSA.
        profile: When a client makes its profile: `stale`: in idle time, of the model of its last round; `fresh`: of the
            model it is sent, before it trains.
        merging: Who is merged into what: `clusters`: FLUX's, a budget for each layer and k-means within it;
            `least_error` (ours): experts are joined where it changes the weighted parameters least, over all layers.
        layer_budget: How many merged experts a layer gets: `adaptive` (early layers, and those whose experts are used
            evenly, get more), `uniform`, or `one`.
        merge_weights: What a member weighs in a merged expert: `attention_frequency`, `frequency` or `uniform`.
        dimensions: Principal components by which experts are clustered.
        gate: `native` or `renormalised` (weights of the K active experts sum to 1).
    """

    epsilon_first: float = Field(0.3, gt=0, le=1)
    epsilon_last: float = Field(0.9, gt=0, le=1)
    epsilon_rounds: int = Field(10, ge=1, le=1_000_000)
    coverage: int = Field(0, ge=0, le=1_000_000)
    exploration_batches: int = Field(1, ge=1)
    exploration_draws: int = Field(1, ge=1)
    exploration_step: float = Field(3e-3, gt=0, le=1)
    profile: Literal["stale", "fresh"] = "stale"
    merging: Literal["clusters", "least_error"] = "clusters"
    layer_budget: BudgetRule = "adaptive"
    merge_weights: WeightRule = "attention_frequency"
    dimensions: int = Field(8, ge=1, le=65536)
    gate: GateOption = "native"

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        for key in ("layer_budget", "dimensions"):
            if self.merging == "least_error" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect with merging 'least_error'; leave it out")
        return self

    @model_validator(mode="after")
    def _another_model_beside(self) -> Self:
        if self.profile == "stale" and self.profile_bits is None:
            raise ValueError(
                "profile_bits null profiles with the model itself, which is in use while clients are idle; set "
                "profile: fresh, or profile_bits: 4 or 8"
            )
        return self


@final
class Flux(Method):
    """Experts tuned by utility, explored at random, merged otherwise."""

    title = "FLUX"
    paper = "Federated Fine-Tuning of Sparsely-Activated Large Language Models on Resource-Constrained Devices"
    Config = FluxConfig
    AdapterConfig = ExpertTuningConfig
    idles = True

    def __init__(self, config: Any, adapter: Any, trainer: Trainer) -> None:
        """Begin without a copy of the model."""
        super().__init__(config, adapter, trainer)
        self._copies = LowBitCopies()

    def init(self, model: FoundationModel, budgets: Sequence[Budget], seeds: Seeds) -> Bundle:
        """Start from the experts of the base; of clients nothing is known yet."""
        federated_experts.check_budgets(model, budgets, self.title, merges=True)
        if self.config.merge_weights == "attention_frequency":
            # Of one token: it raises where the model tells nothing of attention, before any client is asked.
            token = torch.zeros(1, 1, dtype=torch.int64)
            profiling.profile(model, [(token, torch.ones_like(token))])
        state = federated_experts.initial(model, self.adapter, seeds)
        return Bundle(state.tensors, {**state.meta, "roles_seed": seeds.integer("roles"), "roles": {}})

    def unsurveyed(self, state: Bundle, cohort: Sequence[Client]) -> Sequence[Client]:
        """Return clients that are new."""
        return [client for client in cohort if _of(client.id, REACH) not in state.tensors]

    def survey_expects(self, state: Bundle) -> Mapping[str, TensorSpec]:
        """How many examples reach each expert."""
        return {REACH: federated_experts.counts_spec(state.meta)}

    def survey(self, model: FoundationModel, client: Client, shard: Shard, memory: Bundle, seeds: Seeds) -> FitResult:
        """Profile the base, which is the profile of the first round too, and compare its experts."""
        profile = self._settled(memory) or self._profile(model, Bundle(), client, shard)
        read_before = disk_bytes_read(model.lm)
        products_LEE = self._products(model, client)
        read_bytes = disk_bytes_read(model.lm) - read_before  # before a copy may be made, which no client pays for
        cost = self._cost(model, profile, Bundle())
        cost["flops"] += compact_session.comparing_flops(model)
        cost["disk_bytes"] = read_bytes
        kept = {**profile.to_tensors(), PRODUCTS: products_LEE}
        return FitResult(Bundle({REACH: profile.examples_LE}), Bundle(kept, {"cost": cost}))

    def assign(self, state: Bundle, cohort: Sequence[Client], surveys: Sequence[Payload], round: int) -> Bundle:
        """Take note of the surveys, then give the cohort its roles."""
        known = dict(state.tensors)
        for survey in surveys:
            reach_LE = survey.content.tensors[REACH]
            known[_of(survey.client, REACH)] = reach_LE
            known[_of(survey.client, GRADIENTS)] = torch.full(reach_LE.shape, UNKNOWN)
        state = Bundle(known, state.meta)
        ready = [client for client in cohort if _of(client.id, REACH) in known]
        if not ready:
            return state
        roles = self._roles(state, ready, round, self.config.coverage)
        return Bundle(known, {**state.meta, "roles": {id_: _listed(theirs) for id_, theirs in roles.items()}})

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        """Send the tuned experts of all, and the client's roles."""
        roles = state.meta["roles"].get(client.id) or _listed(self._alone(state, client, round))
        merging = Seeds(state.meta["roles_seed"]).at(round=round, client=client.id).integer("merging")
        described = federated_experts.described(state.meta)
        told = {"top_k": client.budget.top_k, "merging_seed": merging, **roles, **described}
        return Payload(round, client.id, Bundle(federated_experts.stacks_of(state), told))

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        """The experts it exploits, the activation counts, and what it found out about its experts."""
        counts = federated_experts.counts_spec(state.meta)
        tuned = federated_experts.specs(state, download.content.meta["exploited"])
        return {**tuned, REACH: counts, GRADIENTS: TensorSpec(counts.shape, torch.float32)}

    def fit(
        self, model: FoundationModel, download: Payload, client: Client, shard: Shard, memory: Bundle, seeds: Seeds
    ) -> FitResult:
        """Merge, explore, train; remember the model for the profile, or this one if the next will be made afresh."""
        content, fresh = download.content, self.config.profile == "fresh"
        profile = None if fresh else self._settled(memory)
        made_now = profile is None
        if profile is None:
            profile = self._profile(model, content if fresh else Bundle(), client, shard)
        roles = _roles(content.meta)
        session = compact_session.Session(self.trainer, model, download, self.adapter, seeds)
        products_LEE = memory.tensors[PRODUCTS] if PRODUCTS in memory.tensors else self._products(model, client)
        plan = self._plan(profile, products_LEE, roles, download, client)
        with session.compact(plan, self.config.gate) as compact:
            explored_LE = compact.explore(roles.explored, shard, profile.reached_NLE, self._exploration)
            upload, trained_LE = compact.train(shard, profile.reached_NLE)
        found = {REACH: profile.examples_LE, GRADIENTS: torch.where(trained_LE >= 0, trained_LE, explored_LE)}
        stats = upload.meta["stats"]
        if "cost" in memory.meta:  # of the survey, which came before this first round
            stats = compact_session.with_profile(stats, memory.meta["cost"], at_once=True, in_idle_time=False)
        cost = self._cost(model, profile, content)
        stats = compact_session.with_profile(stats, cost, at_once=made_now, in_idle_time=not fresh)
        stacks = federated_experts.stacks_of(content)
        kept, told = (profile.to_tensors(), {}) if fresh else (stacks, dict(content.meta))
        answer = Bundle({**upload.tensors, **found}, {**upload.meta, "stats": stats})
        return FitResult(answer, Bundle({**kept, PRODUCTS: products_LEE}, told))

    def idle(self, model: FoundationModel, client: Client, shard: Shard, memory: Bundle) -> Bundle:
        """Profile the model of the last round, as the client remembers it."""
        if self._settled(memory) is not None:
            return memory
        if "tune" not in memory.meta or PRODUCTS not in memory.tensors:
            raise ClientError(
                f"what {client.id} keeps of its last round is damaged; put its memory back, or remove it, and it "
                f"begins anew"
            )
        profile = self._profile(model, memory, client, shard)
        return Bundle({**profile.to_tensors(), PRODUCTS: memory.tensors[PRODUCTS]})

    @contextmanager
    def held(self, model: FoundationModel, download: Payload, client: Client) -> Iterator[Held]:
        """The compact model, as of a client that has no profile yet."""
        session = compact_session.Session(self.trainer, model, download, self.adapter, Seeds(0))
        roles = _roles(download.content.meta)
        plan = self._plan(None, self._products(model, client), roles, download, client)
        with session.held(plan, self.config.gate) as compact:
            yield Held(model, compact, session.disk_bytes)

    def flops_beside(
        self, held: Held, download: Payload, client: Client, work: Work, trained: Mapping[str, Tensor]
    ) -> int:
        """Profiles, merging, and two forward passes for each direction in which an explored expert is tried."""
        assert held.compact is not None
        config: FluxConfig = self.config
        model = held.model
        stacks = federated_experts.stacks_of(download.content)
        profiles = 2 if config.profile == "fresh" else 1  # that of the survey, and that of what it was sent
        explored = sum(map(len, _roles(download.content.meta).explored))
        share = min(1.0, config.exploration_batches * self.trainer.config.batch_size / client.examples)
        passes = 2 * config.exploration_draws * explored * share
        return (
            profiles * compact_session.profile_flops(model, work, stacks)
            + compact_session.comparing_flops(model)
            + compact_session.merging_flops(model, held.compact.plan)
            + round(passes * costs.forward_flops(model.shape, work, trained))
        )

    @classmethod
    def combine(
        cls, updates: Sequence[Update], config: FluxConfig, previous: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Each expert's mean over the clients that trained it."""
        return federated_experts.combine(updates, previous)

    def aggregate(self, state: Bundle, uploads: Sequence[Payload]) -> Bundle:
        """Combine, and take note of what clients found out about their experts."""
        updates, previous = federated_experts.updates_of(state, uploads)
        known = {name: tensor for name, tensor in state.tensors.items() if name.startswith("client.")}
        for upload in uploads:
            known[_of(upload.client, REACH)] = upload.content.tensors[REACH]
            before_LE = known.get(_of(upload.client, GRADIENTS))
            found_LE = upload.content.tensors[GRADIENTS]
            if before_LE is not None:
                found_LE = torch.where(found_LE >= 0, found_LE, before_LE)
            known[_of(upload.client, GRADIENTS)] = found_LE
        combined = self.combine(updates, self.config, previous)
        return Bundle({**known, **combined}, {**state.meta, **federated_experts.trained(state.meta, uploads)})

    def deploy(self, state: Bundle, model: FoundationModel, budget: Budget) -> AbstractContextManager[FoundationModel]:
        """Run the whole model, all experts in place, with the budget's K."""
        return federated_experts.deployed(model, state, self.adapter.alpha, budget.top_k, self.config.gate)

    def personal(
        self, model: FoundationModel, download: Payload, client: Client, memory: Bundle
    ) -> AbstractContextManager[FoundationModel]:
        """Run the compact model that the client would train next: tuned experts as they are, the others merged.

        With a client that never trained, which has no profile, all experts of a layer count as used alike.
        """
        profile = self._settled(memory)
        session = compact_session.Session(self.trainer, model, download, self.adapter, Seeds(0))
        as_they_are = Roles(tuple(() for _ in model.blocks), _roles(download.content.meta).tuned)
        products_LEE = memory.tensors[PRODUCTS] if PRODUCTS in memory.tensors else self._products(model, client)
        plan = self._plan(profile, products_LEE, as_they_are, download, client)
        return session.deployed(plan, self.config.gate)

    def export(self, state: Bundle, model: FoundationModel) -> Mapping[str, bytes]:
        """Return a PEFT adapter, or the weights of the experts that were tuned in full."""
        return federated_experts.export(state, model, self.adapter.alpha)

    @property
    def _exploration(self) -> Exploration:
        config: FluxConfig = self.config
        return Exploration(config.exploration_batches, config.exploration_draws, config.exploration_step)

    def _settled(self, memory: Bundle) -> Profile | None:
        """Return the profile a client remembers; None if it is still to be made."""
        return Profile.from_tensors(memory.tensors) if "reached" in memory.tensors else None

    def _profiler(self, model: FoundationModel) -> FoundationModel:
        bits = self.config.profile_bits
        return model if bits is None else self._copies.of(model, bits)

    def _profile(self, model: FoundationModel, content: Bundle, client: Client, shard: Shard) -> Profile:
        """Return how the client's data uses the experts of a model it was sent; of the base if `content` is empty."""
        copy, size = self._profiler(model), self.trainer.config.batch_size
        attention = self.config.merge_weights == "attention_frequency"
        top_k, alpha = client.budget.top_k, self.adapter.alpha
        return federated_experts.profiled(copy, content, alpha, top_k, self.config.gate, shard, size, attention)

    def _cost(self, model: FoundationModel, profile: Profile, content: Bundle) -> dict[str, Json]:
        """Return the counted work of a profile."""
        passes = math.ceil(profile.examples / self.trainer.config.batch_size)
        stacks = federated_experts.stacks_of(content)
        return compact_session.profile_work(model, profile, stacks, passes, self._profiler(model))

    def _alone(self, state: Bundle, client: Client, round: int) -> Roles:
        """Return the roles of a client that was given none together with others."""
        return self._roles(state, [client], round, coverage=0)[client.id]

    def _roles(self, state: Bundle, cohort: Sequence[Client], round: int, coverage: int) -> Mapping[str, Roles]:
        """Return who tunes what. Of a client that nothing is known of, any expert may be of use."""
        config, seeds = self.config, Seeds(state.meta["roles_seed"]).at(round=round)
        shape = (len(state.meta["sparse_layers"]), state.meta["num_experts"])
        utilities, tunable, budgets = {}, {}, {}
        for client in cohort:
            reach_LE = state.tensors.get(_of(client.id, REACH), torch.ones(shape, dtype=torch.int64))
            rms_LE = state.tensors.get(_of(client.id, GRADIENTS), torch.full(shape, UNKNOWN))
            utilities[client.id] = expert_roles.utility(reach_LE, rms_LE, rms_LE >= 0)
            tunable[client.id] = reach_LE > 0
            assert client.budget.tuned_experts is not None, "checked when the run began"
            budgets[client.id] = client.budget.tuned_experts
        share = expert_roles.exploitation_share(round, config.epsilon_first, config.epsilon_last, config.epsilon_rounds)
        draws = {client.id: seeds.at(client=client.id).numpy("exploration") for client in cohort}
        return expert_roles.assign(utilities, budgets, share, coverage, draws, tunable).roles

    def _products(self, model: FoundationModel, client: Client) -> Tensor:
        """Return inner products of the base's experts, taken with as many in memory as the client can hold."""
        values, held = ExpertValues(model, {}, {}, self.adapter.alpha), max(2, _held(client))
        rows = range(model.num_layers)
        return torch.stack(
            [expert_merging.gram(partial(values.matrices, row), model.num_experts, held) for row in rows]
        )

    def _plan(
        self, profile: Profile | None, products_LEE: Tensor, roles: Roles, download: Payload, client: Client
    ) -> CompactPlan:
        """Return what becomes of each expert: exploited ones are tuned, explored ones held as they are, others merged.

        Without a profile all experts of a layer count as used alike.
        """
        config, (layers, experts, _) = self.config, products_LEE.shape
        merged = min(_held(client), layers * experts) - sum(map(len, roles.tuned))
        frequency_LE = torch.ones(layers, experts) if profile is None else profile.frequency_LE
        attention_LE = None if profile is None else profile.attention_LE
        weights: WeightRule = "uniform" if profile is None else config.merge_weights
        given = (roles.exploited, roles.explored, merged, frequency_LE, attention_LE)
        if config.merging == "least_error":
            return expert_merging.least_error_plan(*given, products_LEE, weights)
        features = [expert_merging.principal_features(products_EE, config.dimensions) for products_EE in products_LEE]
        draw = torch.Generator().manual_seed(download.content.meta["merging_seed"])
        return expert_merging.plan(*given, torch.stack(features), draw, config.layer_budget, weights)


def _of(client: str, key: str) -> str:
    """Return the name of what the state knows of a client."""
    return f"client.{client}.{key}"


def _held(client: Client) -> int:
    assert client.budget.held_experts is not None, "checked when the run began"
    return client.budget.held_experts


def _listed(roles: Roles) -> dict[str, Json]:
    """Return roles as a payload's meta has them."""
    return {"exploited": [list(ids) for ids in roles.exploited], "explored": [list(ids) for ids in roles.explored]}


def _roles(meta: Mapping[str, Json]) -> Roles:
    """Inverse of `_listed`."""
    exploited, explored = (tuple(tuple(ids) for ids in meta[key]) for key in ("exploited", "explored"))
    return Roles(exploited, explored)
