"""Local training: our own loop, so that work can be counted, budgeted and repeated exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import Optimizer

from emberfed import costs, events, traffic
from emberfed.data.shard import Batch, Shard
from emberfed.errors import ClientError, ConfigError
from emberfed.models.compact import Compact
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.groups import TrainableGroups, clip_gradients
from emberfed.models.offloaded import disk_bytes_read
from emberfed.models.trainable import Trainable
from emberfed.penalties import Penalty, ProximalPenalty
from emberfed.records import Json
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.tasks import load_task


class TrainingConfig(Section):
    """How many rounds, and how a client trains in each.

    Attributes:
        rounds: Rounds of the whole run.
        local_epochs: Passes over the client's shard per round.
        max_steps: Optimiser steps per client and round at most; null: no limit.
        batch_size: Examples per optimiser step.
        micro_batch_size: Examples per forward pass; gradients are accumulated over a batch. null: the whole batch.
        learning_rate: Peak learning rate of a round.
        round_decay: The learning rate of round t is multiplied by round_decay^(t-1). (A schedule over all rounds would
            make `run` 2 rounds + `resume` 2 differ from `run` 4.)
        optimizer: `adam` or `adamw`; fresh in every round.
        betas, epsilon, weight_decay: Its constants. Weight decay needs `adamw`.
        schedule: Learning rate within a client's round, after warm-up.
        warmup_steps: Steps of linear warm-up at the start of each client's round.
        max_grad_norm: Gradients, with those of penalties, are clipped to this norm over the whole adapter; null: not
            clipped.
        proximal_mu: Weight mu of FedProx: mu/2 times the squared distance from the adapter the client was sent is added
            to the loss (not to the reported one); 0: off. Costs one more copy of the adapter.
        router_aux_loss_coef: Weight of the model's own load-balancing loss, averaged over micro batches. Also adapters
            below a frozen router feel it, through the hidden states.
        precision: `auto` is bf16 autocast on CUDA devices that have it and the model's own dtype elsewhere.
        gradient_checkpointing: Recompute layers backward: less memory, about a third more time.
    """

    rounds: int = Field(2, ge=1)
    local_epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(1.5e-4, gt=0)
    round_decay: float = Field(1.0, gt=0, le=1)
    optimizer: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    proximal_mu: float = Field(0.0, ge=0)
    router_aux_loss_coef: float = Field(0.0, ge=0)
    precision: Literal["auto", "model", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must both lie in [0, 1)")
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("weight_decay needs optimizer: adamw (plain adam would fold it into the gradient)")
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is larger than batch_size {self.batch_size}")
        return self


@final
@dataclass(frozen=True, slots=True, eq=False)
class FitStats:
    """What one client's training did.

    Attributes:
        steps: Optimiser steps.
        tokens: Positions trained on, padding excluded (n_c of the papers): tokens of text, patches of images.
        target_tokens: Targets, which carried loss: tokens of responses, or examples with a class.
        losses: Mean loss of each step, in nats per target.
        counts_LE: int64 (layers, experts), (token, slot) assignments without padding.
        flops: Forward and backward matrix products, without what gradient checkpointing computes again.
        memory_traffic_bytes: Weights read, and what the optimiser reads and writes: see `traffic`.
        disk_bytes: Weights read from disk, of a model whose experts are there.
    """

    steps: int
    tokens: int
    target_tokens: int
    losses: tuple[float, ...]
    counts_LE: Tensor
    flops: int
    memory_traffic_bytes: int
    disk_bytes: int

    def json(self) -> dict[str, Json]:
        """Return what `clients.jsonl` keeps; loss curves are thinned to at most 50 points."""
        stride = math.ceil(len(self.losses) / 50)
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "loss_first": self.losses[0],
            "loss_last": self.losses[-1],
            "loss_mean": math.fsum(self.losses) / len(self.losses),
            "losses": [[step + 1, loss] for step, loss in enumerate(self.losses) if step % stride == 0],
            "flops": self.flops,
            "memory_traffic_bytes": self.memory_traffic_bytes,
            "disk_bytes": self.disk_bytes,
            "share_of_experts_touched": float((self.counts_LE > 0).double().mean()) if self.counts_LE.numel() else None,
        }


def learning_rate(config: TrainingConfig, round: int, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (from 0) of `steps` in round `round` (from 1)."""
    peak = config.learning_rate * config.round_decay ** (round - 1)
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return peak * (1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def step_count(config: TrainingConfig, examples: int) -> int:
    """Return the optimiser steps of one client's round with that many examples."""
    steps = config.local_epochs * math.ceil(examples / config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)


@final
class Trainer:
    """The local training loop with its options; methods hold one and call `train`."""

    def __init__(self, config: TrainingConfig, listen: events.Listener = events.ignore) -> None:
        """Take the options and who hears of steps."""
        self.config = config
        self._listen = listen

    def train(
        self,
        model: FoundationModel,
        adapter: Trainable,
        shard: Shard,
        client: str,
        round: int,
        seeds: Seeds,
        penalty: Penalty | None = None,
        compact: Compact | None = None,
    ) -> FitStats:
        """Train the adapter, attached to `model`, on the shard.

        The order of examples is drawn from `seeds` (purposes `order 0`, `order 1`, ... by local epoch). Experts that
        no token reached in a step keep their bits: no gradient, momentum, weight decay or penalty.

        Args:
            model: The model, with its K set.
            adapter: What is trained; its present values are the anchor of `proximal_mu`.
            shard: The client's examples.
            client: Its id, for events.
            round: The round, from 1, for the learning rate.
            seeds: The place whose draws these are.
            penalty: The method's own, added to the loss of every step beside that of `proximal_mu`.
            compact: The model's state if it holds fewer experts than it has: what they computed is counted there.

        Returns:
            What was done. Losses are those of the targets alone, without penalties and auxiliary losses.

        Raises:
            ClientError: if a loss or gradient is not finite; it names the step.
            ConfigError: if the options ask for what this model or device does not have.
        """
        config = self.config
        check_possible(model, config)
        task = load_task(model.task)
        steps = step_count(config, len(shard.examples))
        groups = adapter.trainable_groups()
        optimizer = self._optimizer(groups)
        penalties = [] if penalty is None else [penalty]
        if config.proximal_mu > 0:
            penalties.append(ProximalPenalty.around(adapter.parameters, config.proximal_mu))
        losses: list[float] = []
        tokens = target_tokens = moved_bytes = 0
        work: costs.Work | None = None
        read_before = disk_bytes_read(model.lm)
        with _checkpointing(model, config), adapter.counting() as counter, traffic.counting_reads(model) as reads:
            for step, batch in zip(range(steps), self._batches(shard, seeds), strict=False):
                targets = sum(micro.targets for micro in batch)
                step_loss = 0.0
                at = f"step {step + 1} of {steps}"
                for micro in batch:
                    micro = micro.to(model.device)
                    with _autocast(model, config):
                        done = task.forward(model, micro, config.router_aux_loss_coef)
                        auxiliary = _sum(done.auxiliary, adapter.auxiliary_loss())
                    step_loss += _finite(done.loss, "loss", at)
                    (done.loss / targets + auxiliary / len(batch)).backward()  # type: ignore[no-untyped-call]
                    tokens += done.tokens
                    work = done.work if work is None else work + done.work
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, round, step, steps)
                elements = self._step(groups, optimizer, counter.take() > 0, penalties, at)
                moved_bytes += traffic.trained_bytes(elements, len(batch))
                target_tokens += targets
                losses.append(step_loss / targets)
                self._listen(events.Step(client, step + 1, steps, losses[-1]))
            counts_LE = counter.counts.clone()
            moved_bytes += reads.frozen_bytes(adapter.parameters, config.gradient_checkpointing)
        assert work is not None, "a shard has at least one example"
        work = replace(
            work,
            adapter_rows=work.routed_tokens * adapter.top_k,
            expert_work=None if compact is None else compact.take(),
        )
        flops = costs.training_flops(model.shape, work, adapter.parameters)
        return FitStats(
            steps=steps,
            tokens=tokens,
            target_tokens=target_tokens,
            losses=tuple(losses),
            counts_LE=counts_LE,
            flops=flops,
            memory_traffic_bytes=moved_bytes,
            disk_bytes=disk_bytes_read(model.lm) - read_before,
        )

    def _batches(self, shard: Shard, seeds: Seeds) -> Iterator[list[Batch]]:
        """Yield the micro batches of each optimiser step."""
        size = self.config.batch_size
        micro = self.config.micro_batch_size or size
        for epoch in range(self.config.local_epochs):
            for examples in shard.batches(size, seeds.torch(f"order {epoch}")):
                parts = [examples[start : start + micro] for start in range(0, len(examples), micro)]
                yield [shard.collate(part) for part in parts]

    def _optimizer(self, groups: TrainableGroups) -> Optimizer:
        config = self.config
        parameters = groups.parameters()
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
        if config.optimizer == "adamw":
            return torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True, **options)
        return torch.optim.Adam(parameters, fused=True, **options)

    def _step(
        self,
        groups: TrainableGroups,
        optimizer: Optimizer,
        touched_LE: Tensor,
        penalties: Sequence[Penalty],
        at: str,
    ) -> int:
        """Take a step; return how many elements have a gradient."""
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        gradients = groups.take_gradients(touched_LE)
        for penalty in penalties:
            penalty.add_gradients(gradients)
        norm = clip_gradients(gradients, limit)
        _finite(norm, "gradient norm", at)
        optimizer.step()
        groups.zero_grad()
        return sum(gradient.values.numel() for gradient in gradients)


def check_possible(model: FoundationModel, config: TrainingConfig) -> None:
    """Check that the model and its device have what the options ask for. Raises: ConfigError."""
    if config.router_aux_loss_coef > 0 and not model.has_auxiliary_loss:
        raise ConfigError(
            f"training.router_aux_loss_coef is {config.router_aux_loss_coef}, but {model.family.model_type} models "
            f"have no auxiliary loss; set it to 0"
        )
    if config.precision == "bfloat16" and model.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("training.precision is bfloat16, which this CUDA device does not have; set it to model")


def _sum(models: Tensor, adapters: Tensor | None) -> Tensor:
    return models if adapters is None else models + adapters


def _finite(value: Tensor, what: str, at: str) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise ClientError(f"{what} became {number} at {at}; lower training.learning_rate or set max_grad_norm")
    return number


def _autocast(model: FoundationModel, config: TrainingConfig) -> AbstractContextManager[Any]:
    has_bf16 = model.device.type == "cuda" and torch.cuda.is_bf16_supported()
    if config.precision == "bfloat16" or (config.precision == "auto" and has_bf16):
        return torch.autocast(model.device.type, torch.bfloat16)
    return nullcontext()


def _checkpointing(model: FoundationModel, config: TrainingConfig) -> AbstractContextManager[Any]:
    # The model stays in eval mode: dropout would draw from the global random stream.
    return model.gradient_checkpointing() if config.gradient_checkpointing else nullcontext()
