"""`emberfed plan`: what a configuration would cost each tier, counted before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, final

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from emberfed import assembly, clock, federated
from emberfed.assembly import Material
from emberfed.cli.tables import plain_table
from emberfed.clients import Budget, Client
from emberfed.clock import Effort
from emberfed.config import RunConfig
from emberfed.costs import Work, backward_flops, forward_flops, recomputed_flops, training_flops
from emberfed.data.shard import Batch
from emberfed.memory import Step, TrainingMemory, training_memory
from emberfed.method import Method
from emberfed.records import Bundle, Rank, TensorSpec
from emberfed.report import numbers
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig, step_count


@final
@dataclass(frozen=True, slots=True)
class TierPlan:
    """What one tier's clients would need.

    Attributes:
        tier: Its name.
        top_k: Active experts per token in training; a method may have its own for all tiers.
        clients: How many clients are on it.
        step: Its largest step of round 1.
        forward_flops, backward_flops: Of that step.
        recomputed_flops: What gradient checkpointing adds to it; 0 without.
        round_flops: Forward and backward in round 1, mean of its clients.
        memory: During that step.
        download_bytes, upload_bytes: Of one client and round; the upload without its header.
        clock_seconds: Of one client and round on the tier's device, without memory traffic; None without a device.
    """

    tier: str
    top_k: int
    clients: int
    step: Step
    forward_flops: int
    backward_flops: int
    recomputed_flops: int
    round_flops: int
    memory: TrainingMemory
    download_bytes: int
    upload_bytes: int
    clock_seconds: float | None

    def json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {**asdict(self), "memory": self.memory.json()}


def plan(config: RunConfig) -> tuple[TierPlan, ...]:
    """Load model and data as a run would, and count. Raises: ConfigError, DataError, ModelError."""
    material = assembly.gather(config)
    method = config.method_type(config.method, config.adapter, Trainer(config.training))
    state = method.init(material.model, material.budgets, Seeds(config.seed).at(purpose="init"))
    return tuple(_tier(config, material, method, state, budget) for budget in material.budgets)


def _tier(config: RunConfig, material: Material, method: Method, state: Bundle, budget: Budget) -> TierPlan:
    model, shape = material.model, material.model.shape
    clients = [client for client in material.clients if client.budget.tier == budget.tier]
    download = method.dispatch(state, clients[0], 1)
    wanted, top_k = method.expects(state, download), download.content.meta["top_k"]
    adapter = {
        name: _largest_tensor(spec) for name, spec in wanted.items() if name.startswith(federated.ADAPTER_PREFIXES)
    }
    active = download.content.meta.get("adapter_top_k", 0)
    with model.active_experts(top_k):
        steps = [
            [_with_adapter(config.task.work(model, batch), active) for batch in step]
            for client in clients
            for step in _steps(config, material, client)
        ]
        largest = _largest(steps, config.training, active)
        memory = training_memory(model, adapter, largest)
    works = [work for step in steps for work in step]
    full = Work.of_batch(largest.sequences, largest.length, top_k, largest.sequences * largest.head_positions)
    one, times = _with_adapter(full, active), largest.micro_batches
    flops = training_flops(shape, sum(works[1:], works[0]), adapter) // len(clients)
    bytes_down, bytes_up = len(download.to_bytes()), sum(_largest_tensor(spec).nbytes for spec in wanted.values())
    return TierPlan(
        tier=budget.tier,
        top_k=top_k,
        clients=len(clients),
        step=largest,
        forward_flops=times * forward_flops(shape, one, adapter),
        backward_flops=times * backward_flops(shape, one, adapter),
        recomputed_flops=times * recomputed_flops(shape, one, adapter) if largest.checkpointing else 0,
        round_flops=flops,
        memory=memory,
        download_bytes=bytes_down,
        upload_bytes=bytes_up,
        clock_seconds=None
        if budget.device is None
        else clock.client_seconds(budget.device, Effort(flops=flops), bytes_down, bytes_up),
    )


def _steps(config: RunConfig, material: Material, client: Client) -> Iterator[list[Batch]]:
    """Yield the micro batches of each of a client's steps in round 1, as `Trainer.train` forms them."""
    training, shard = config.training, material.shards[client.id]
    micro = training.micro_batch_size or training.batch_size
    seeds = Seeds(config.seed).at(round=1, client=client.id)
    groups = (
        examples
        for epoch in range(training.local_epochs)
        for examples in shard.batches(training.batch_size, seeds.torch(f"order {epoch}"))
    )
    for examples in islice(groups, step_count(training, len(shard.examples))):
        yield [shard.collate(examples[start : start + micro]) for start in range(0, len(examples), micro)]


def _with_adapter(work: Work, top_k: int) -> Work:
    """Add what a sparse adapter gets at its own K; 0: there is none."""
    return replace(work, adapter_rows=work.routed_tokens * top_k)


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


def tables(plans: Sequence[TierPlan]) -> list[RenderableType]:
    """Return what there is to see: the largest step, memory during it, a round, and what the words mean."""
    timed = [Text(_ON_CLOCK)] if plans[0].clock_seconds is not None else []
    return [_step_table(plans), _memory_table(plans), _round_table(plans), Text(_LEGEND), *timed]


_LEGEND = """\
Step: the largest of round 1. Again: what gradient checkpointing computes twice. FLOP of a round: mean of the clients.
Peak: the most there is at one moment, logits and temporary tensors too; activations go as gradients come. The process
needs some hundred megabytes more, for Python, the libraries and the kernels they keep."""
_ON_CLOCK = "On its device: network and computation on the clients' clock; memory traffic comes on top."


def _step_table(plans: Sequence[TierPlan]) -> Table:
    beside = any(plan.step.adapter_top_k for plan in plans)
    table = _table("Largest step", "k" if beside else "K", "Sequences", "Length", "Forward", "Backward", "Again")
    for plan in plans:
        step = plan.step
        sequences = str(step.sequences) if step.micro_batches == 1 else f"{step.micro_batches} × {step.sequences}"
        flops = (plan.forward_flops, plan.backward_flops, plan.recomputed_flops)
        active = step.adapter_top_k or plan.top_k
        table.add_row(plan.tier, str(active), sequences, str(step.length), *map(numbers.flops, flops))
    return table


def _memory_table(plans: Sequence[TierPlan]) -> Table:
    table = _table("Memory during it", "Model", "Adapter", "Optimizer", "Gradients", "Activations", "Peak")
    for plan in plans:
        memory = plan.memory
        parts = (memory.weight_bytes, memory.adapter_bytes, memory.optimizer_bytes, memory.gradient_bytes)
        sizes = (*parts, memory.activation_bytes, memory.total_bytes)
        table.add_row(plan.tier, *map(numbers.byte_size, sizes))
    return table


def _round_table(plans: Sequence[TierPlan]) -> Table:
    seconds = [plan.clock_seconds for plan in plans if plan.clock_seconds is not None]
    table = _table("A client's round", "Clients", "FLOP", "Down", "Up", *(["On its device"] if seconds else []))
    for plan in plans:
        traffic = map(numbers.byte_size, (plan.download_bytes, plan.upload_bytes))
        timed = [] if plan.clock_seconds is None else [numbers.clock(plan.clock_seconds)]
        table.add_row(plan.tier, str(plan.clients), numbers.flops(plan.round_flops), *traffic, *timed)
    return table


def _table(title: str, *columns: str) -> Table:
    table = plain_table(title)
    table.add_column("Tier", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
