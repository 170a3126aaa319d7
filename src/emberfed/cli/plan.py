"""`emberfed plan`: what a configuration would cost each tier, counted before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import comb
from typing import Any, final

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from emberfed import assembly, clock, federated
from emberfed.cli.tables import plain_table
from emberfed.clients import Budget, Client
from emberfed.clock import Effort
from emberfed.config import RunConfig
from emberfed.costs import Work, backward_flops, forward_flops, recomputed_flops, training_flops
from emberfed.data.shard import Batch
from emberfed.material import ClientsHere
from emberfed.memory import Step, TrainingMemory, training_memory, tuning_memory
from emberfed.method import Held, Method
from emberfed.models.compact import Compact, ExpertWork, LayerPlan
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.offloaded import OffloadedWeight
from emberfed.records import Bundle, Rank, TensorSpec
from emberfed.report import numbers
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig, step_count


@final
@dataclass(frozen=True, slots=True)
class TierPlan:
    """What one tier's clients would need.

    Where that depends on how their data use the experts, they use all alike.

    Attributes:
        tier: Its name.
        top_k: Active experts per token in training; a method may have its own for all tiers.
        tuned_experts, held_experts: Of the tier, over all layers; None where the method has no use for them.
        clients: How many clients are on it.
        step: Its largest step of round 1.
        forward_flops, backward_flops: Of that step.
        recomputed_flops: What gradient checkpointing adds to it; 0 without.
        round_flops: Of round 1, mean of its clients: training, and what the method does beside it.
        memory: During that step, with what is trained in the first round or in the last, whichever takes more.
        download_bytes, upload_bytes: Of one client and round; the upload without its header.
        disk_bytes: Of experts read in round 1, mean of its clients.
        device_memory_bytes: Of the tier's device; None without one.
        clock_seconds: Of one client and round on the tier's device, without memory traffic; None without a device.
    """

    tier: str
    top_k: int
    tuned_experts: int | None
    held_experts: int | None
    clients: int
    step: Step
    forward_flops: int
    backward_flops: int
    recomputed_flops: int
    round_flops: int
    memory: TrainingMemory
    download_bytes: int
    upload_bytes: int
    disk_bytes: int
    device_memory_bytes: int | None
    clock_seconds: float | None

    def json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {**asdict(self), "memory": self.memory.json()}


def plan(config: RunConfig) -> tuple[TierPlan, ...]:
    """Load model and data as a run would, and count. Raises: ConfigError, DataError, ModelError."""
    material = assembly.gather(config)
    return counted(config, material.here, material.budgets)


def counted(config: RunConfig, here: ClientsHere, budgets: Sequence[Budget]) -> tuple[TierPlan, ...]:
    """Count for clients that are loaded, of which each tier has at least one. Raises: ConfigError, ModelError."""
    method = config.method_type(config.method, config.adapter, Trainer(config.training))
    state = method.init(here.model, budgets, Seeds(config.seed).at(purpose="init"))
    return tuple(_tier(config, here, method, state, budget) for budget in budgets)


def _tier(config: RunConfig, here: ClientsHere, method: Method, state: Bundle, budget: Budget) -> TierPlan:
    shape = here.model.shape
    clients = [client for client in here.clients if client.budget.tier == budget.tier]
    download = method.dispatch(state, clients[0], 1)
    wanted, top_k = method.expects(state, download), download.content.meta["top_k"]
    adapter = _trained(wanted)
    active = download.content.meta.get("adapter_top_k", 0)
    with method.held(here.model, download, clients[0]) as held:
        steps = [
            [_whole(config.task.work(held.model, batch), active, held.compact) for batch in step]
            for client in clients
            for step in _steps(config, here, client)
        ]
        largest = _largest(steps, config.training, active)
        memory = _memory(held, adapter, largest)
        is_compact, holds_some = held.compact is not None, held.compact is not None or held.disk_bytes > 0
        works = [work for step in steps for work in step]
        full = Work.of_batch(largest.sequences, largest.length, top_k, largest.sequences * largest.head_positions)
        one, times = _whole(full, active, held.compact), largest.micro_batches
        beside = 0
        for client in clients:
            passes = [_whole(work, active, held.compact) for work in _passes(config, here, held.model, client)]
            beside += method.flops_beside(held, download, client, sum(passes[1:], passes[0]), adapter)
        flops = (training_flops(shape, sum(works[1:], works[0]), adapter) + beside) // len(clients)
        read = held.disk_bytes + sum(_read_bytes(held.model, work, config.training) for work in works) // len(clients)
    bytes_down, bytes_up = len(download.to_bytes()), sum(_largest_tensor(spec).nbytes for spec in wanted.values())
    last = method.dispatch(state, clients[0], config.training.rounds)
    if (wanted_last := method.expects(state, last)) != wanted:
        with method.held(here.model, last, clients[0]) as held:
            later = _memory(held, _trained(wanted_last), largest)
        memory = max(memory, later, key=lambda found: found.total_bytes)
    effort, device = Effort(flops=flops, disk_bytes=read), budget.device
    return TierPlan(
        tier=budget.tier,
        top_k=top_k,
        tuned_experts=budget.tuned_experts if is_compact else None,
        held_experts=budget.held_experts if holds_some else None,
        clients=len(clients),
        step=largest,
        forward_flops=times * forward_flops(shape, one, adapter),
        backward_flops=times * backward_flops(shape, one, adapter),
        recomputed_flops=times * recomputed_flops(shape, one, adapter) if largest.checkpointing else 0,
        round_flops=flops,
        memory=memory,
        download_bytes=bytes_down,
        upload_bytes=bytes_up,
        disk_bytes=read,
        device_memory_bytes=None if device is None else device.memory_bytes,
        clock_seconds=None if device is None else clock.client_seconds(device, effort, bytes_down, bytes_up),
    )


def _trained(wanted: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Return tensors as large as those that an upload brings of what is trained."""
    return federated.adapter_of({name: _largest_tensor(spec) for name, spec in wanted.items()})


def _memory(held: Held, adapter: Mapping[str, torch.Tensor], step: Step) -> TrainingMemory:
    if held.compact is None:
        return training_memory(held.model, adapter, step)
    pairs = zip(held.model.blocks, held.compact.plan, strict=True)
    rows = {block.layer: layer.tuned for block, layer in pairs if layer.tuned}
    return tuning_memory(held.model, held.compact, adapter, rows, step)


def _steps(config: RunConfig, here: ClientsHere, client: Client) -> Iterator[list[Batch]]:
    """Yield the micro batches of each of a client's steps in round 1, as `Trainer.train` forms them."""
    training, shard = config.training, here.shards[client.id]
    micro = training.micro_batch_size or training.batch_size
    seeds = Seeds(config.seed).at(round=1, client=client.id)
    groups = (
        examples
        for epoch in range(training.local_epochs)
        for examples in shard.batches(training.batch_size, seeds.torch(f"order {epoch}"))
    )
    for examples in islice(groups, step_count(training, len(shard.examples))):
        yield [shard.collate(examples[start : start + micro]) for start in range(0, len(examples), micro)]


def _passes(config: RunConfig, here: ClientsHere, model: FoundationModel, client: Client) -> Iterator[Work]:
    """Yield the work of one pass over a client's examples, in their order."""
    shard, size = here.shards[client.id], config.training.batch_size
    for start in range(0, len(shard.examples), size):
        yield config.task.work(model, shard.collate(shard.examples[start : start + size]))


def _whole(work: Work, adapter_top_k: int, compact: Compact | None) -> Work:
    """Add what a sparse adapter gets at its own K (0: there is none), and what experts of a compact model compute."""
    rows = work.routed_tokens * adapter_top_k
    if compact is None:
        return replace(work, adapter_rows=rows)
    layers = zip(compact.plan, compact.take(), strict=True)
    of_experts = tuple(_expert_work(work, layer, counted.choices) for layer, counted in layers)
    return replace(work, adapter_rows=rows, expert_work=of_experts)


def _expert_work(work: Work, layer: LayerPlan, choices: int) -> ExpertWork:
    """Return what a layer of a compact model computes on average, if its router chooses K of `choices` at random."""
    tuned = len(layer.tuned) * reached(1, choices, work.top_k)
    merged = sum(reached(len(cluster.members), choices, work.top_k) for cluster in layer.clusters)
    return ExpertWork(round(work.routed_tokens * (tuned + merged)), round(work.routed_tokens * tuned), choices)


def reached(members: int, choices: int, top_k: int) -> float:
    """Return how likely it is that any of `members` is among the `top_k` drawn of `choices`, all different."""
    return 1 - comb(choices - members, top_k) / comb(choices, top_k)


def _read_bytes(model: FoundationModel, work: Work, training: TrainingConfig) -> int:
    """Return what a pass over a batch reads of experts on disk, forward and backward, as many as tokens reach.

    Backward of the lowest layer that is trained may read less.
    """
    share = 1 - (1 - work.top_k / model.num_experts) ** work.routed_tokens
    on_disk = [module for module in model.lm.modules() if isinstance(module, OffloadedWeight)]
    unread = sum(weight.disk_bytes - weight.nbytes for weight in on_disk)
    return round((3 if training.gradient_checkpointing else 2) * share * unread)


def _largest(steps: Sequence[Sequence[Work]], training: TrainingConfig, adapter_top_k: int) -> Step:
    """Return a step that is in every respect as large as any of these."""
    works = [work for step in steps for work in step]
    return Step(
        sequences=max(map(_sequences, works)),
        length=max(work.tokens // _sequences(work) for work in works),
        head_positions=max(work.head_tokens // _sequences(work) for work in works),
        micro_batches=max(map(len, steps)),
        checkpointing=training.gradient_checkpointing,
        anchored=training.proximal_mu > 0,
        adapter_top_k=adapter_top_k,
    )


def _sequences(work: Work) -> int:
    """Return the number of sequences of a pass: B L tokens squared are B times the B L^2 attended pairs."""
    return work.tokens**2 // work.attended_pairs


def _largest_tensor(spec: TensorSpec) -> torch.Tensor:
    """Return a tensor of zeros as large as the spec allows."""
    shape = [size.high if isinstance(size, Rank) else size for size in spec.shape]
    return torch.zeros(shape, dtype=spec.dtype)


def warnings(plans: Sequence[TierPlan]) -> list[str]:
    """Return a line for each tier whose clients need more memory than their device has."""
    return [
        f"tier {plan.tier!r} needs {numbers.byte_size(plan.memory.total_bytes)} at its peak, but its device has "
        f"{numbers.byte_size(plan.device_memory_bytes)}; lower {_smaller(plan)}"
        for plan in plans
        if plan.device_memory_bytes is not None and plan.memory.total_bytes > plan.device_memory_bytes
    ]


def _smaller(plan: TierPlan) -> str:
    batch = "training.micro_batch_size (or batch_size)"
    return batch if plan.held_experts is None else f"its held_experts, or {batch}"


def tables(plans: Sequence[TierPlan]) -> list[RenderableType]:
    """Return what there is to see: the largest step, memory during it, a round, what the words mean, and warnings."""
    again = [_AGAIN] if any(plan.recomputed_flops for plan in plans) else []
    few = [_FEW] if any(plan.held_experts is not None for plan in plans) else []
    timed = [_ON_CLOCK] if plans[0].clock_seconds is not None else []
    shown = Text("\n".join([_LEGEND, *again, *few, *timed]))
    warned = [Text(f"warning: {line}", style="yellow") for line in warnings(plans)]
    return [_step_table(plans), _memory_table(plans), _round_table(plans), shown, *warned]


_LEGEND = """\
Step: the largest of round 1. FLOP of a round: mean of the clients.
Peak: the most there is at one moment, logits and temporary tensors too; activations go as gradients come. The process
needs some hundred megabytes more, for Python, the libraries and the kernels they keep."""
_AGAIN = "Again: what gradient checkpointing computes twice."
_FEW = "Tuned, Held: experts, over all layers. Figures are as if clients' data used all experts alike."
_ON_CLOCK = "On its device: network, disk and computation on the clients' clock; memory traffic comes on top."


def _step_table(plans: Sequence[TierPlan]) -> Table:
    beside = any(plan.step.adapter_top_k for plan in plans)
    few = any(plan.held_experts is not None for plan in plans)
    again = any(plan.recomputed_flops for plan in plans)
    experts, more = ("Tuned", "Held") if few else (), ("Again",) if again else ()
    columns = ("k" if beside else "K", *experts, "Sequences", "Length", "Forward", "Backward", *more)
    table = _table("Largest step", *columns)
    for plan in plans:
        step = plan.step
        sequences = str(step.sequences) if step.micro_batches == 1 else f"{step.micro_batches} × {step.sequences}"
        flops = (plan.forward_flops, plan.backward_flops, *([plan.recomputed_flops] if again else []))
        active = step.adapter_top_k or plan.top_k
        room = [_number(plan.tuned_experts), _number(plan.held_experts)] if few else []
        table.add_row(plan.tier, str(active), *room, sequences, str(step.length), *map(numbers.flops, flops))
    return table


def _number(value: int | None) -> str:
    return numbers.MISSING if value is None else str(value)


def _memory_table(plans: Sequence[TierPlan]) -> Table:
    table = _table("Memory during it", "Model", "Adapter", "Optimizer", "Gradients", "Activations", "Peak")
    for plan in plans:
        memory = plan.memory
        parts = (memory.weight_bytes, memory.adapter_bytes, memory.optimizer_bytes, memory.gradient_bytes)
        sizes = (*parts, memory.activation_bytes, memory.total_bytes)
        table.add_row(plan.tier, *map(numbers.byte_size, sizes))
    return table


def _round_table(plans: Sequence[TierPlan]) -> Table:
    timed = any(plan.clock_seconds is not None for plan in plans)
    from_disk = any(plan.disk_bytes for plan in plans)
    more = (*(["From disk"] if from_disk else []), *(["On its device"] if timed else []))
    table = _table("A client's round", "Clients", "FLOP", "Down", "Up", *more)
    for plan in plans:
        traffic = (plan.download_bytes, plan.upload_bytes, *([plan.disk_bytes] if from_disk else []))
        seconds = [] if plan.clock_seconds is None else [numbers.clock(plan.clock_seconds)]
        sizes = map(numbers.byte_size, traffic)
        table.add_row(plan.tier, str(plan.clients), numbers.flops(plan.round_flops), *sizes, *seconds)
    return table


def _table(title: str, *columns: str) -> Table:
    table = plain_table(title)
    table.add_column("Tier", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
