"""The local training loop against slow references: plain torch loops, hand-made schedules, whole batches."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import VOCABULARY, tiny_model
from pydantic import ValidationError
from torch.nn import functional as F

from emberfed import events
from emberfed.costs import Work, training_flops
from emberfed.data.tokenise import Example, ResponseShard, ShardReport, collate
from emberfed.errors import ClientError
from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel
from emberfed.penalties import Penalty, TailPenalty
from emberfed.seeds import Seeds
from emberfed.tasks import load_task
from emberfed.training import Trainer, TrainingConfig, learning_rate, step_count

SEEDS = Seeds(11)
ROUND = 2


def shard(examples: int = 10, seed: int = 0) -> ResponseShard:
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(examples):
        length = int(draw.integers(4, 12))
        ids = draw.integers(2, VOCABULARY, size=length).astype(np.int32)
        made.append(Example(ids, int(draw.integers(1, length)), "w3", ""))
    report = ShardReport(examples, sum(example.target_tokens for example in made), 0, 0, 0)
    return ResponseShard(tuple(made), report, pad_token_id=0)


@pytest.fixture(scope="module")
def model() -> FoundationModel:
    return tiny_model()


@pytest.fixture(scope="module")
def start(model: FoundationModel) -> dict[str, torch.Tensor]:
    return lora.initial(model, lora.LoraConfig(rank=2, alpha=4), SEEDS.torch("adapter"))


def trained(
    model: FoundationModel,
    start: dict[str, torch.Tensor],
    top_k: int = 2,
    data: ResponseShard | None = None,
    penalty: Penalty | None = None,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], list[events.Event]]:
    heard: list[events.Event] = []
    trainer = Trainer(TrainingConfig.model_validate({"batch_size": 4, "learning_rate": 0.01, **options}), heard.append)
    with model.active_experts(top_k), lora.attached(model, start, 4.0) as adapter:
        trainer.train(model, adapter, data or shard(), "c0", ROUND, SEEDS, penalty)
        return adapter.tensors(), heard


def no_term(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([0.0 * parameter.sum() for parameter in parameters.values()]).sum()


def slow_training(
    model: FoundationModel,
    start: dict[str, torch.Tensor],
    top_k: int,
    config: TrainingConfig,
    term: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] = no_term,
) -> dict[str, torch.Tensor]:
    """One example at a time, one torch Adam per expert, full logits, written as plainly as possible.

    `term` is added to the loss, but where it would move an expert that no token reached.
    """
    data = shard()
    with model.active_experts(top_k), lora.attached(model, start, 4.0) as adapter:
        parameters = adapter.parameters
        optimizers: dict[tuple[str, int], tuple[torch.nn.Parameter, torch.optim.Adam]] = {}
        steps = step_count(config, len(data.examples))
        batches = [
            batch
            for epoch in range(config.local_epochs)
            for batch in data.batches(config.batch_size, SEEDS.torch(f"order {epoch}"))
        ]
        for step, examples in enumerate(batches[:steps]):
            targets = sum(example.target_tokens for example in examples)
            with model.count_activations() as counter:
                for example in examples:
                    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
                    logits = model.lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
                    for position in range(example.prompt_length, len(example.input_ids)):
                        loss = F.cross_entropy(logits[position - 1], ids[0, position]) / targets
                        loss.backward(retain_graph=True)
            touched = counter.counts > 0
            gradients = {}
            extra = torch.autograd.grad(term(parameters), list(parameters.values()))
            for (name, parameter), slope in zip(parameters.items(), extra, strict=True):
                assert parameter.grad is not None
                mask = touched[lora.layer_of(name)][:, None, None] if lora.is_expert(name) else torch.tensor(True)
                gradients[name] = parameter.grad.to_dense() + slope * mask
            norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
            scale = min(1.0, (config.max_grad_norm or math.inf) / (norm + 1e-6))
            for name, parameter in parameters.items():
                for row in range(parameter.shape[0]) if lora.is_expert(name) else [-1]:
                    if row >= 0 and not touched[lora.layer_of(name), row]:
                        continue
                    value = parameter.data[row] if row >= 0 else parameter.data
                    gradient = gradients[name][row] if row >= 0 else gradients[name]
                    if (name, row) not in optimizers:
                        own = torch.nn.Parameter(value.clone())
                        optimizers[name, row] = (
                            own,
                            torch.optim.Adam([own], betas=config.betas, eps=config.epsilon, foreach=False),
                        )
                    own, optimizer = optimizers[name, row]
                    own.grad = gradient * scale
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(config, ROUND, step, steps)
                    optimizer.step()
                    value.copy_(own.data)
                parameter.grad = None
        return adapter.tensors()


@pytest.mark.parametrize("top_k", [1, 3])
def test_training_is_the_slow_loop(model: FoundationModel, start: dict[str, torch.Tensor], top_k: int) -> None:
    options: dict[str, Any] = {"local_epochs": 2, "max_grad_norm": 0.05, "schedule": "cosine", "warmup_steps": 1}
    options |= {"round_decay": 0.5, "betas": (0.5, 0.9), "epsilon": 1e-3}
    fast, _ = trained(model, start, top_k, **options)
    config = TrainingConfig.model_validate({"batch_size": 4, "learning_rate": 0.01, **options})
    slow = slow_training(model, start, top_k, config)
    for name in fast:
        # Adam divides by the root of tiny second moments, which magnifies the last bits of a gradient.
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-3, atol=2e-4)
        assert not torch.equal(fast[name], start[name]), name


def test_penalties_are_terms_of_the_slow_loop_s_loss(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    """Both at once, clipped with the rest; the anchor is where the client began."""
    options: dict[str, Any] = {"local_epochs": 2, "max_grad_norm": 0.05, "betas": (0.5, 0.9), "epsilon": 1e-3}

    def term(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        total = sum(
            ((0.8 / 2) * (parameters[name] - start[name]).square().sum() for name in parameters), torch.zeros(())
        )
        for name in parameters:
            if name.endswith("lora_A"):
                a, b = parameters[name][..., 1:, :], parameters[name.replace("lora_A", "lora_B")][..., 1:]
                norms = a.square().sum(dim=(-2, -1)).add(1e-30).sqrt() * b.square().sum(dim=(-2, -1)).add(1e-30).sqrt()
                total = total + 0.3 * norms.sum()
        return total

    fast, _ = trained(model, start, 2, penalty=TailPenalty(1, 0.3), proximal_mu=0.8, **options)
    config = TrainingConfig.model_validate({"batch_size": 4, "learning_rate": 0.01, **options})
    slow = slow_training(model, start, 2, config, term)
    plain, _ = trained(model, start, 2, **options)
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-3, atol=2e-4)
    away = [float((fast[name] - plain[name]).abs().max()) for name in fast]
    assert max(away) > 2e-3, "ten times the tolerance: the terms matter here"


def test_a_large_mu_holds_the_adapter_near_its_start(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    def distance(mu: float) -> float:
        after, _ = trained(model, start, local_epochs=5, proximal_mu=mu, max_grad_norm=None)
        return math.sqrt(sum(float((after[name] - start[name]).square().sum()) for name in after))

    free, held, tight = distance(0.0), distance(1.0), distance(100.0)
    assert tight < held < free
    assert tight < free / 2


def test_a_penalty_of_weight_zero_changes_no_bit(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    plain, _ = trained(model, start, local_epochs=2)
    weightless, _ = trained(model, start, local_epochs=2, penalty=TailPenalty(1, 0.0), proximal_mu=0.0)
    assert all(torch.equal(weightless[name], plain[name]) for name in plain)


def test_reported_losses_are_without_penalties(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    """At a rate too small to move anything, so that all else is the same."""
    _, plain = trained(model, start, learning_rate=1e-12)
    _, penalised = trained(model, start, learning_rate=1e-12, penalty=TailPenalty(0, 1e6), proximal_mu=1e6)
    assert penalised == plain


def held_bytes() -> int:
    """Bytes of all tensors that Python holds now, shared memory once."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in found if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.slow
def test_only_a_mu_above_zero_costs_memory_and_it_is_one_adapter(
    model: FoundationModel, start: dict[str, torch.Tensor]
) -> None:
    def held(mu: float) -> tuple[int, int]:
        peaks: list[int] = []
        config = TrainingConfig(batch_size=4, proximal_mu=mu)
        with model.active_experts(2), lora.attached(model, start, 4.0) as adapter:
            stats = Trainer(config, lambda _: peaks.append(held_bytes())).train(
                model, adapter, shard(), "c0", ROUND, SEEDS
            )
        return peaks[-1], stats.flops

    held(0.0)  # whatever is kept from a first time
    (off, work), (on, more_work) = held(0.0), held(0.5)
    assert on - off == sum(tensor.nbytes for tensor in start.values())
    assert more_work == work


def test_response_loss_is_the_mean_over_targets_only(model: FoundationModel) -> None:
    batch = collate(shard().examples, 0)
    with torch.no_grad():
        done = load_task("generation").forward(model, batch)
        logits = model.lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(done.loss, expected, rtol=1e-5, atol=1e-5)
    assert float(done.auxiliary) == 0.0
    assert done.work.head_tokens == len(batch.labels) * int((batch.labels[:, 1:] != -100).any(dim=0).sum())


def test_the_models_balance_loss_is_added_at_the_present_k(model: FoundationModel) -> None:
    batch = collate(shard().examples, 0)
    with torch.no_grad(), model.active_experts(3):
        auxiliary = load_task("generation").forward(model, batch, router_aux_loss_coef=0.5).auxiliary
        output = model.lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True)
    torch.testing.assert_close(auxiliary, 0.5 * output.aux_loss)
    assert float(auxiliary) > 1.4, "0.5 x K x (about 1)"


@pytest.mark.parametrize("option", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"gradient_checkpointing": True}])
def test_what_saves_memory_does_not_change_the_result(
    model: FoundationModel, start: dict[str, torch.Tensor], option: dict[str, Any]
) -> None:
    plain, plain_events = trained(model, start)
    saved, saved_events = trained(model, start, **option)
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name], rtol=1e-3, atol=2e-4)
    losses = [event.loss for event in plain_events if isinstance(event, events.Step)]
    assert losses == pytest.approx([event.loss for event in saved_events if isinstance(event, events.Step)], rel=1e-4)


@pytest.mark.parametrize("mu", [0.0, 3.0])
def test_weight_decay_momentum_and_penalties_leave_untouched_experts_alone(
    model: FoundationModel, start: dict[str, torch.Tensor], mu: float
) -> None:
    trainer = Trainer(
        TrainingConfig(optimizer="adamw", weight_decay=0.5, batch_size=2, learning_rate=0.01, proximal_mu=mu)
    )
    start = {name: tensor + 0.1 for name, tensor in start.items()}  # so that every tail has a slope
    with model.active_experts(1), lora.attached(model, start, 4.0) as adapter:
        stats = trainer.train(model, adapter, shard(3), "c0", 1, SEEDS, TailPenalty(1, mu))
        after = adapter.tensors()
    untouched = (stats.counts_LE == 0).nonzero().tolist()
    assert untouched
    for layer, expert in untouched:
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            for part in ("lora_A", "lora_B"):
                name = f"layers.{layer}.experts.{matrix}.{part}"
                assert torch.equal(after[name][expert], start[name][expert])


def test_stats_are_counted(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    data = shard()
    trainer = Trainer(TrainingConfig(local_epochs=2, batch_size=4, learning_rate=0.01))
    with model.active_experts(3), lora.attached(model, start, 4.0) as adapter:
        stats = trainer.train(model, adapter, data, "c0", 1, SEEDS)
    assert stats.steps == len(stats.losses) == 6
    assert stats.tokens == 2 * sum(len(example.input_ids) for example in data.examples)
    assert stats.target_tokens == 2 * data.report.target_tokens
    batches = [collate(batch, 0) for epoch in (0, 1) for batch in data.batches(4, SEEDS.torch(f"order {epoch}"))]
    work = Work(
        tokens=sum(batch.input_ids.numel() for batch in batches),
        routed_tokens=stats.tokens,
        attended_pairs=sum(batch.input_ids.numel() * batch.input_ids.shape[1] for batch in batches),
        top_k=3,
        head_tokens=sum(len(b.labels) * int((b.labels[:, 1:] != -100).any(dim=0).sum()) for b in batches),
    )
    assert work.tokens > stats.tokens, "padding is computed too"
    assert stats.flops == training_flops(model.shape, work, start)
    assert stats.counts_LE.sum(dim=1).tolist() == [3 * stats.tokens] * 2
    row = stats.json()
    assert (row["loss_first"], row["loss_last"]) == (stats.losses[0], stats.losses[-1])
    assert row["share_of_experts_touched"] == float((stats.counts_LE > 0).double().mean())
    assert row["losses"] == [[number + 1, loss] for number, loss in enumerate(stats.losses)]


def test_the_balance_loss_reaches_the_adapter(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    plain, _ = trained(model, start, local_epochs=2)
    balanced, _ = trained(model, start, local_epochs=2, router_aux_loss_coef=10.0)
    assert any(not torch.equal(plain[name], balanced[name]) for name in plain)


def test_steps_are_told_and_capped(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    _, heard = trained(model, start, max_steps=2, local_epochs=3)
    steps = [event for event in heard if isinstance(event, events.Step)]
    assert [(event.client, event.step, event.steps) for event in steps] == [("c0", 1, 2), ("c0", 2, 2)]


def test_the_order_of_examples_is_drawn_anew_in_every_epoch() -> None:
    data = shard()
    orders = [
        [example.input_ids.tolist() for batch in data.batches(3, SEEDS.torch(f"order {epoch}")) for example in batch]
        for epoch in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(example.input_ids.tolist() for example in data.examples)


def test_a_loss_that_is_not_finite_stops_the_client(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    broken = {**start, "layers.0.self_attn.q_proj.lora_B": start["layers.0.self_attn.q_proj.lora_B"] + torch.nan}
    with pytest.raises(ClientError, match=r"loss became nan at step 1 of 3; lower training.learning_rate"):
        trained(model, broken)


def test_an_exploding_learning_rate_is_noticed(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ClientError, match=r"became (nan|inf) at step \d+"):
        trained(model, start, learning_rate=1e30, max_grad_norm=None, local_epochs=5)


def test_schedules() -> None:
    def rates(round: int = 1, **options: Any) -> list[float]:
        config = TrainingConfig.model_validate({"learning_rate": 1.0, **options})
        return [learning_rate(config, round, step, 5) for step in range(5)]

    assert rates() == [1.0] * 5
    assert rates(schedule="linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert rates(schedule="cosine")[0] == 1.0
    assert rates(schedule="cosine")[4] == pytest.approx((1 + math.cos(math.pi * 4 / 5)) / 2)
    assert rates(warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates(round=3, round_decay=0.5) == [0.25] * 5


def test_step_counts() -> None:
    assert step_count(TrainingConfig(batch_size=4), 10) == 3
    assert step_count(TrainingConfig(batch_size=4, local_epochs=2), 10) == 6
    assert step_count(TrainingConfig(batch_size=4, local_epochs=2, max_steps=5), 10) == 5
    assert step_count(TrainingConfig(batch_size=16), 1) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": 0.1}, "needs optimizer: adamw"),
        ({"batch_size": 4, "micro_batch_size": 8}, "larger than batch_size"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"proximal_mu": -0.1}, "greater than or equal to 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainingConfig.model_validate(options)


def test_bf16_autocast_trains_close_to_fp32(model: FoundationModel, start: dict[str, torch.Tensor]) -> None:
    plain, _ = trained(model, start, max_steps=1)
    mixed, heard = trained(model, start, max_steps=1, precision="bfloat16")
    assert all(tensor.dtype == torch.float32 for tensor in mixed.values())
    [step] = [event for event in heard if isinstance(event, events.Step)]
    assert math.isfinite(step.loss)
    moved = [name for name in plain if name.endswith("lora_B")]
    agreement = [float(F.cosine_similarity(plain[name].flatten(), mixed[name].flatten(), dim=0)) for name in moved]
    assert min(agreement) > 0.6


def test_the_balance_loss_is_averaged_over_micro_batches() -> None:
    """Four times the same example: in one batch, or one by one, must be the same step."""
    model = tiny_model()
    start = lora.initial(model, lora.LoraConfig(rank=2, alpha=4), SEEDS.torch("adapter"))
    one = shard(1)
    options: dict[str, Any] = {
        "data": replace(one, examples=one.examples * 4),
        "router_aux_loss_coef": 5.0,
        "max_grad_norm": None,
        "epsilon": 1e-3,
    }
    whole, _ = trained(model, start, **options)
    parts, _ = trained(model, start, micro_batch_size=1, **options)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=2e-4)


def test_the_golden_trajectory() -> None:
    """Losses of a fixed training, compared exactly to four digits.

    Generated by this very test: ten examples of `shard`, batch 4, learning rate 0.01, two epochs, K = 2.
    """
    model = tiny_model()
    start = lora.initial(model, lora.LoraConfig(rank=2, alpha=4), SEEDS.torch("adapter"))
    _, heard = trained(model, start, local_epochs=2)
    losses = [round(event.loss, 4) for event in heard if isinstance(event, events.Step)]
    assert losses == GOLDEN


GOLDEN = [4.617, 4.7023, 5.5918, 4.7396, 4.5378, 3.8024]
