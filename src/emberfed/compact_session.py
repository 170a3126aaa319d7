"""A client's work on a model that holds few experts: explore some, train some, and say what it found and what it cost.

Shapes: L layers with experts ("rows"), E experts, N examples, n experts that a stack holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from emberfed import costs, federated, federated_experts, traffic
from emberfed.costs import Work
from emberfed.data.shard import Batch, Shard
from emberfed.errors import ClientError
from emberfed.expert_roles import Experts
from emberfed.federated_experts import ExpertTuningConfig
from emberfed.federated_lora import GateOption
from emberfed.models import expert_tuning, tuning_layout
from emberfed.models.compact import Compact, CompactPlan, compacted
from emberfed.models.expert_tuning import TunedExperts
from emberfed.models.expert_values import ExpertValues
from emberfed.models.footprint import memory_by_module, total
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.groups import Gradient
from emberfed.models.lora_layout import layer_of
from emberfed.models.offloaded import OffloadedWeight, disk_bytes_read
from emberfed.models.profiling import Profile
from emberfed.models.routed_lora import MATRICES
from emberfed.models.spsa import ExploredExpert, ExploredLora, ExploredMatrices
from emberfed.models.tuning_layout import Rows
from emberfed.penalties import Penalty
from emberfed.records import Bundle, Json, Payload
from emberfed.seeds import Seeds
from emberfed.tasks import load_task
from emberfed.training import Trainer

UNKNOWN = -1.0
"""Stands for a gradient that was not measured."""


@final
@dataclass(frozen=True, slots=True)
class Exploration:
    """How gradients of experts that are not trained are estimated.

    Attributes:
        batches: Batches for each expert, each with an example that reaches it.
        draws: Directions on each batch.
        step: How far along a direction, mu of SPSA.
    """

    batches: int
    draws: int
    step: float


@final
class Session:
    """One client's round.

    Attributes:
        values: The present values of all experts.
    """

    def __init__(
        self, trainer: Trainer, model: FoundationModel, download: Payload, adapter: ExpertTuningConfig, seeds: Seeds
    ) -> None:
        """Begin with what the client was sent, while all experts of the model are in place.

        Args:
            trainer: The training loop.
            model: The model; nothing attached.
            download: The tuned experts of all clients; its meta says which of them are this client's: `exploited`.
            adapter: How experts are tuned.
            seeds: The client's, of this round.
        """
        content = download.content
        self._on_disk = [module for module in model.lm.modules() if isinstance(module, OffloadedWeight)]
        self._read_before = disk_bytes_read(model.lm)
        self._trainer = trainer
        self._model = model
        self._download = download
        self._adapter = adapter
        self._seeds = seeds
        self._stacks = federated_experts.stacks_of(content)
        self._held = federated_experts.held_rows(content.meta)
        self._rows: Rows = federated_experts.rows(content.meta["exploited"], content.meta["sparse_layers"])
        self.values = ExpertValues(model, self._stacks, self._held, adapter.alpha)

    @contextmanager
    def compact(self, plan: CompactPlan, gate: GateOption, reroute: bool = False) -> Iterator[CompactClient]:
        """Hold what the plan says inside the context, with the exploited experts ready to be trained."""
        start = self._start()
        with (
            self.held(plan, gate, reroute) as compact,
            expert_tuning.attached(self._model, start, self._rows, self._adapter.alpha) as tuned,
        ):
            given, read = _Given(self._stacks, self._held, self._adapter), self.disk_bytes
            merging = merging_flops(self._model, plan)
            yield CompactClient(
                self._trainer, self._model, self._download, compact, tuned, given, self._seeds, merging, read
            )

    @contextmanager
    def held(self, plan: CompactPlan, gate: GateOption, reroute: bool = False) -> Iterator[Compact]:
        """Hold what the plan says inside the context, with nothing attached."""
        top_k = self._download.content.meta["top_k"]
        with (
            self._model.active_experts(top_k, gate),
            compacted(self._model, plan, self.values, reroute) as compact,
        ):
            yield compact

    @contextmanager
    def deployed(self, plan: CompactPlan, gate: GateOption, reroute: bool = False) -> Iterator[FoundationModel]:
        """Run the model with what a plan holds that tunes nothing inside the context."""
        with self.held(plan, gate, reroute):
            yield self._model

    @property
    def disk_bytes(self) -> int:
        """Bytes of experts read from disk since the session began."""
        return sum(weight.bytes_read for weight in self._on_disk) - self._read_before

    def _start(self) -> dict[str, Tensor]:
        """Return the stacks that training begins with."""
        if self._adapter.tune == "lora":
            return tuning_layout.take_rows(self._stacks, self._held, self._rows)
        fresh = expert_tuning.initial(self._model, self._rows, "full", self._adapter.rank, torch.Generator())
        known = {layer: _both(ids, self._held.get(layer, ())) for layer, ids in self._rows.items()}
        known = {layer: ids for layer, ids in known.items() if ids}
        return tuning_layout.put_rows(
            fresh, self._rows, tuning_layout.take_rows(self._stacks, self._held, known), known
        )


def _both(some: Sequence[int], others: Sequence[int]) -> tuple[int, ...]:
    return tuple(expert for expert in some if expert in others)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """The stacks that a client was sent."""

    stacks: Mapping[str, Tensor]
    held: Rows
    adapter: ExpertTuningConfig


@final
class CompactClient:
    """A client while its model is compact."""

    def __init__(
        self,
        trainer: Trainer,
        model: FoundationModel,
        download: Payload,
        compact: Compact,
        tuned: TunedExperts,
        given: _Given,
        seeds: Seeds,
        merging: int,
        read_bytes: int,
    ) -> None:
        """Made by `Session.compact`."""
        self._trainer = trainer
        self._model = model
        self._download = download
        self._compact = compact
        self._tuned = tuned
        self._given = given
        self._seeds = seeds
        self._flops = merging
        self._traffic_bytes = 0
        self._read_bytes = read_bytes

    @torch.no_grad()
    def explore(self, experts: Experts, shard: Shard, reached_NLE: Tensor, how: Exploration) -> Tensor:
        """Return root mean squares of the gradients of some experts, which the plan holds unmerged but does not tune.

        They are of batches as training draws them, of all examples, so that they compare with those of `train`: of the
        first batches that hold an example that reaches the expert.

        Args:
            experts: Which, by row.
            shard: The client's examples.
            reached_NLE: Which of them reach an expert; without any an expert's gradient stays unknown.
            how: The estimate.

        Returns:
            float32 (L, E), `UNKNOWN` for all other experts.

        Raises: ClientError if `reached_NLE` is of other examples.
        """
        self._check_same_examples(shard, reached_NLE)
        found_LE = torch.full(reached_NLE.shape[1:], UNKNOWN)
        with traffic.counting_reads(self._model) as reads:
            for row, ids in enumerate(experts):
                for expert in ids:
                    if bool(reached_NLE[:, row, expert].any()):
                        found_LE[row, expert] = self._gradient_rms(row, expert, shard, reached_NLE[:, row, expert], how)
            self._traffic_bytes += reads.frozen_bytes({}, recomputed=False)
        return found_LE

    def train(self, shard: Shard, reached_NLE: Tensor) -> tuple[Bundle, Tensor]:
        """Train the tuned experts on the examples that reach any of them, or on all if none does.

        Returns:
            The content of an upload, and root mean squares of the gradients of steps, float32 (L, E), `UNKNOWN` for
            experts that had none.

        Raises: ClientError if `reached_NLE` is of other examples, or the loss is not finite.
        """
        meta = self._download.content.meta
        self._check_same_examples(shard, reached_NLE)
        if not self._tuned.parameters:
            raise ClientError(f"{self._download.client} has no expert to train: it told that its data reach none")
        reached_N = torch.zeros(len(reached_NLE), dtype=torch.bool)
        for row, ids in enumerate(meta["exploited"]):
            reached_N |= reached_NLE[:, row, list(ids)].any(dim=1)
        rows = reached_N.nonzero()[:, 0].tolist()
        seen = shard.only(rows) if rows else shard
        norms = _GradientNorms(self._tuned.rows, {block.layer: r for r, block in enumerate(self._model.blocks)})
        client, round = self._download.client, self._download.round
        stats = self._trainer.train(self._model, self._tuned, seen, client, round, self._seeds, norms, self._compact)
        stats = replace(
            stats,
            flops=stats.flops + self._flops,
            memory_traffic_bytes=stats.memory_traffic_bytes + self._traffic_bytes,
            disk_bytes=stats.disk_bytes + self._read_bytes,
        )
        given = {"top_k": meta["top_k"], "exploited": meta["exploited"]}
        return federated.upload(self._tuned.tensors(), stats, seen, given), norms.root_mean_squares(
            reached_NLE.shape[1:]
        )

    def _gradient_rms(self, row: int, expert: int, shard: Shard, reached_N: Tensor, how: Exploration) -> float:
        size, order = self._trainer.config.batch_size, self._seeds.torch(f"exploration of expert {expert} of row {row}")
        order_N = torch.randperm(len(reached_N), generator=order)
        batches = [order_N[start : start + size] for start in range(0, len(order_N), size)]
        chosen = [batch_n for batch_n in batches if bool(reached_N[batch_n].any())][: how.batches]
        explored = self._explored(row, expert)
        squares = [self._squared_norm(explored, shard, batch_n.tolist(), how, order) for batch_n in chosen]
        return math.sqrt(math.fsum(squares) / len(squares))

    def _check_same_examples(self, shard: Shard, reached_NLE: Tensor) -> None:
        if len(reached_NLE) != len(shard.examples):
            raise ClientError(
                f"{self._download.client}: its profile is of {len(reached_NLE)} examples, and it has "
                f"{len(shard.examples)}; remove the client's memory, and it begins anew"
            )

    def _explored(self, row: int, expert: int) -> ExploredExpert:
        block = self._model.blocks[row]
        slot = int(self._compact.plan[row].slot_of(block.num_experts)[expert])
        given = self._given
        if given.adapter.tune == "full":
            return ExploredMatrices(block.experts, slot)
        place = given.held[block.layer].index(expert)
        paths = {matrix: f"layers.{block.layer}.experts.{matrix}" for matrix in MATRICES}
        factors = {
            matrix: (given.stacks[f"{path}.lora_A"][place], given.stacks[f"{path}.lora_B"][place])
            for matrix, path in paths.items()
        }
        return ExploredLora(block.experts, slot, factors, given.adapter.alpha)

    def _squared_norm(
        self, explored: ExploredExpert, shard: Shard, rows: Sequence[int], how: Exploration, order: torch.Generator
    ) -> float:
        task = load_task(self._model.task)
        micro = self._trainer.config.micro_batch_size or len(rows)
        batches: list[Batch] = [
            shard.collate([shard.examples[row] for row in rows[start : start + micro]]).to(self._model.device)
            for start in range(0, len(rows), micro)
        ]
        targets = sum(batch.targets for batch in batches)

        def loss() -> float:
            sums = []
            for batch in batches:
                done = task.forward(self._model, batch)
                work = replace(done.work, expert_work=self._compact.take())
                self._flops += costs.forward_flops(self._model.shape, work, self._tuned.parameters)
                sums.append(float(done.loss))
            return math.fsum(sums) / targets

        return explored.squared_gradient_norm(loss, how.step, how.draws, order)


def merging_flops(model: FoundationModel, plan: CompactPlan) -> int:
    """Return the FLOPs of adding up the experts that are in clusters of several."""
    added = sum(len(cluster.members) for layer in plan for cluster in layer.clusters if len(cluster.members) > 1)
    return 2 * added * model.shape.hidden * model.shape.expert_intermediate * len(MATRICES)


def comparing_flops(model: FoundationModel) -> int:
    """Return the FLOPs of the inner products of all pairs of experts of a layer, for all layers with experts."""
    pairs, parameters = model.num_experts**2, model.shape.hidden * model.shape.expert_intermediate * len(MATRICES)
    return 2 * model.num_layers * pairs * parameters


def profile_flops(model: FoundationModel, work: Work, stacks: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of forward passes on the whole model, without its head.

    Args:
        model: The model.
        work: Of the passes; what was counted of experts and of the head is passed over.
        stacks: The tuned experts that are in place.
    """
    loras = {name: stack for name, stack in stacks.items() if not tuning_layout.is_full(name)}
    return costs.forward_flops(model.shape, replace(work, head_tokens=0, expert_work=None), loras)


@final
class _GradientNorms(Penalty):
    """Takes down how large experts' gradients are at each step; adds nothing to them."""

    def __init__(self, rows: Rows, row_of: Mapping[int, int]) -> None:
        self._rows = rows
        self._row_of = row_of
        self._squares = {layer: torch.zeros(len(ids), dtype=torch.float64) for layer, ids in rows.items()}
        self._steps = {layer: torch.zeros(len(ids), dtype=torch.int64) for layer, ids in rows.items()}

    def add_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Add the squared norms of this step."""
        touched = {layer: torch.zeros_like(steps, dtype=torch.bool) for layer, steps in self._steps.items()}
        for gradient in gradients:
            assert gradient.experts_U is not None, "nothing but experts is tuned"
            layer, experts_U = layer_of(gradient.name), gradient.experts_U.cpu()
            squares_U = gradient.values.flatten(1).double().square().sum(dim=1).cpu()
            self._squares[layer].index_add_(0, experts_U, squares_U)
            touched[layer][experts_U] = True
        for layer, mask in touched.items():
            self._steps[layer] += mask

    def root_mean_squares(self, shape: tuple[int, ...]) -> Tensor:
        """Return them over the steps in which an expert had a gradient, float32 (L, E)."""
        found_LE = torch.full(tuple(shape), UNKNOWN)
        for layer, ids in self._rows.items():
            known_n = self._steps[layer] > 0
            rms_n = (self._squares[layer] / self._steps[layer].clamp(min=1)).sqrt().float()
            found_LE[self._row_of[layer], list(ids)] = torch.where(known_n, rms_n, UNKNOWN)
        return found_LE


def profile_work(
    model: FoundationModel, profile: Profile, stacks: Mapping[str, Tensor], passes: int, copy: FoundationModel
) -> dict[str, Json]:
    """Return the counted work of making a profile: FLOPs, and the bytes of weights that its passes read.

    Args:
        model: The model.
        profile: What came of it.
        stacks: The tuned experts that were in place.
        passes: Forward passes.
        copy: The copy it was made with, or the model itself.
    """
    work = Work(
        tokens=profile.positions,
        routed_tokens=profile.tokens,
        attended_pairs=profile.attended_pairs,
        top_k=profile.top_k,
        head_tokens=0,
    )
    return {
        "flops": profile_flops(model, work, stacks),
        "memory_traffic_bytes": passes * total(memory_by_module(copy.lm)).stored_bytes,
    }


def with_profile(
    stats: Mapping[str, Json], cost: Mapping[str, Json], at_once: bool, in_idle_time: bool
) -> dict[str, Json]:
    """Return what a client tells of its work with that of its profiles.

    Args:
        stats: Of training.
        cost: Of one profile.
        at_once: Whether one was made before training.
        in_idle_time: Whether another one is made after the upload.
    """
    told = dict(stats)
    for key, value in cost.items():
        if at_once:
            told[key] = told.get(key, 0) + value
        if in_idle_time:
            told[f"idle_{key}"] = value
    return told
