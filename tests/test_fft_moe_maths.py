"""FFT-MoE and its baselines against the equations, in float64 and by autograd: nothing of the package's own maths.

The oracle runs transformers' model as it is, and adds to the FFN of each layer, for every token and every expert,
g_m(x) W_up_m act(W_down_m x), where g is the softmax of the k largest logits of W_R x and zero elsewhere.

Shapes: T tokens, M experts, L layers, K active experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_family_lm, token_ids
from torch import Tensor, nn
from torch.nn import functional as F

import emberfed
from emberfed import events, personal
from emberfed.aggregation import Update
from emberfed.clients import Budget, Client
from emberfed.data.images import ImageExample, ImageShard, ImageShardReport, Preprocessing
from emberfed.data.shard import Shard
from emberfed.data.text_classes import TextExample, TextShard, TextShardReport
from emberfed.data.tokenise import IGNORED, Example, ResponseShard, ShardReport
from emberfed.evaluation import EvaluationConfig
from emberfed.evaluation.classes import evaluate
from emberfed.method import Method, load_method
from emberfed.methods.fft_moe import LOAD, FftMoe, FftMoeConfig
from emberfed.metrics import CLASSIFICATION
from emberfed.models import lora, merging
from emberfed.models.balance import Regulariser
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.sparse_adapter import SparseAdapterConfig, attached, initial, is_expert
from emberfed.records import ACTIVATION_COUNTS, SCORES, Bundle, FitResult, Job, Payload, Reply
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig
from emberfed.worker import MemoryFolder, Worker

Tensors = dict[str, Tensor]
LAYERS, EXPERTS, HIDDEN = 2, 4, 32
SMALL = SparseAdapterConfig(num_experts=EXPERTS, expert_size=3)

_MLP = {
    "llama": "model.layers.{}.mlp",
    "olmoe": "model.layers.{}.mlp",
    "gpt2": "transformer.h.{}.mlp",
    "gpt_neox": "gpt_neox.layers.{}.mlp",
    "vit": "vit.layers.{}.mlp",
}
FFN: Mapping[str, tuple[str, str]] = {
    **{name: (path, path) for name, path in _MLP.items()},
    "bert": ("bert.encoder.layer.{}.intermediate", "bert.encoder.layer.{}.output.dense"),
}
"""What reads the FFN's input in a layer, and what gives its output, in transformers' words."""


# The oracle ----------------------------------------------------------------------------------------------------------


class Oracle:
    """A base model in float64 with the adapter's sum beside every FFN."""

    def __init__(self, name: str, **overrides: Any) -> None:
        self.lm: Any = tiny_family_lm(name, **overrides).double()
        if name == "olmoe":
            self.lm.set_experts_implementation("eager")  # transformers' default has no float64
        self.tensors: Mapping[str, Tensor] = {}
        self.top_k = 1
        self.logits: list[Tensor] = []
        self.kept: list[Tensor] = []
        """Of the last pass by layer: (T, M) logits of the gate, and where they are among the k largest."""
        x: list[Tensor] = []
        for layer in range(LAYERS):
            source, target = (self.lm.get_submodule(path.format(layer)) for path in FFN[name])
            source.register_forward_pre_hook(lambda _, args: x.append(args[0]))
            target.register_forward_hook(lambda _, __, out, layer=layer: self._beside(layer, x.pop(), out))
        if hasattr(self.lm, "classifier"):
            self.lm.classifier.register_forward_hook(self._head)

    def __call__(self, tensors: Mapping[str, Tensor], top_k: int, given: Mapping[str, Tensor], **more: Any) -> Tensor:
        self.tensors, self.top_k, self.logits, self.kept = tensors, top_k, [], []
        wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
        self.output: Any = self.lm(**wide, **more)
        found: Tensor = self.output.logits
        return found

    def _beside(self, layer: int, x: Tensor, out: Any) -> Any:
        start = f"layers.{layer}.adapter"
        down, up = (self.tensors[f"{start}.experts.{part}_proj"] for part in ("down", "up"))
        if len(down) == 1:
            return out + F.gelu(x @ down[0].T) @ up[0].T
        logits = x @ self.tensors[f"{start}.router.weight"].T
        kept = logits >= logits.sort(-1, descending=True).values[..., self.top_k - 1, None]
        exponentials = (logits - logits.detach().max()).exp() * kept
        gates = exponentials / exponentials.sum(-1, keepdim=True)
        self.logits.append(logits.reshape(-1, EXPERTS))
        self.kept.append(kept.reshape(-1, EXPERTS))
        added = sum(gates[..., m, None] * (F.gelu(x @ down[m].T) @ up[m].T) for m in range(EXPERTS))
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    def _head(self, _: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        if "head.weight" not in self.tensors:
            return out
        return args[0] @ self.tensors["head.weight"].T + self.tensors["head.bias"]

    def auxiliary(self, real: Tensor, coefficient: float, omega: Sequence[Sequence[float]], z: float) -> Tensor:
        """The mean over layers of lambda M sum F P omega + z mean log^2(sum exp), over real tokens alone."""
        total = torch.zeros((), dtype=torch.float64)
        for layer, (logits, kept) in enumerate(zip(self.logits, self.kept, strict=True)):
            tokens = [t for t in range(len(logits)) if real.reshape(-1)[t]]
            for m in range(EXPERTS):
                f = sum(float(kept[t, m]) for t in tokens) / (self.top_k * len(tokens))
                p = sum(logits[t, m].exp() / logits[t].exp().sum() for t in tokens) / len(tokens)
                total = total + coefficient * EXPERTS * f * p * omega[layer][m] / LAYERS
            total = total + z * sum(logits[t].exp().sum().log() ** 2 for t in tokens) / len(tokens) / LAYERS
        return total


def loud(model: FoundationModel, seed: int = 5, config: SparseAdapterConfig = SMALL) -> Tensors:
    """Every number random and large enough to be seen; no two logits of a gate tie."""
    generator = torch.Generator().manual_seed(seed)
    fresh = initial(model, config, generator)
    return {name: 0.5 * torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.items()}


def leaves(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}


def dense(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.to_dense().double()


def inputs(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Three examples, texts padded on the right to 7 positions; and which positions are real."""
    if name == "vit":
        pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return {"pixel_values": pixels}, torch.ones(3, 5, dtype=torch.bool)
    ids, mask = token_ids(3, 7), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = mask[2, 2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}, mask.bool()


@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
@pytest.mark.parametrize("name", sorted(FFN))
def test_values_and_every_gradient_in_a_real_host(name: str, top_k: int) -> None:
    """Of a loss on real positions, with the auxiliary loss: of every expert, gate and head, padding left out."""
    model, oracle, (given, real) = FoundationModel(tiny_family_lm(name).double()), Oracle(name), inputs(name)
    omega = 2 * torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(2))
    regulariser = Regulariser("heterogeneity", 0.7, omega, 0.3)
    tensors = loud(model)
    expected = leaves(tensors)

    def loss(logits: Tensor) -> Tensor:
        logits = logits[real] if name not in ("vit", "bert") else logits
        draw = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return (logits.log_softmax(-1) * draw).sum()

    wanted = oracle(expected, top_k, given)
    auxiliary = oracle.auxiliary(real, 0.7, omega.double().tolist(), 0.3)
    (loss(wanted) + auxiliary).backward()  # type: ignore[no-untyped-call]
    with attached(model, tensors, top_k, regulariser=regulariser) as adapter, adapter.counting() as counter:
        found = model.lm(**given).logits
        beside = adapter.auxiliary_loss()
        assert beside is not None
        (loss(found) + beside).backward()  # type: ignore[no-untyped-call]
        at = slice(None) if name in ("vit", "bert") else real
        torch.testing.assert_close(found[at], wanted[at], rtol=1e-9, atol=1e-9)
        assert beside.item() == pytest.approx(auxiliary.item(), rel=1e-6)
        for key, parameter in adapter.parameters.items():
            torch.testing.assert_close(dense(parameter.grad), dense(expected[key].grad), rtol=1e-5, atol=1e-6, msg=key)
        counted = [kept[real.reshape(-1)].sum(0).tolist() for kept in oracle.kept]
        assert counter.counts.tolist() == counted


def test_initial_values_are_of_the_size_they_should_be() -> None:
    """W_down fills ±1/sqrt(32) evenly: standard deviation 1/sqrt(3 x 32); gates are normal of the std asked for."""
    model = FoundationModel(tiny_family_lm("vit"))
    for std in (0.02, 0.3):
        config = SparseAdapterConfig(num_experts=64, expert_size=16, router_std=std)
        tensors = initial(model, config, torch.Generator().manual_seed(1))
        for layer in range(LAYERS):
            start = f"layers.{layer}.adapter"
            down, gate = tensors[f"{start}.experts.down_proj"], tensors[f"{start}.router.weight"]
            assert 0.999 * 32**-0.5 < float(down.abs().max()) <= 32**-0.5
            assert float(down.std()) == pytest.approx(96**-0.5, rel=0.02)
            assert float(down.mean()) == pytest.approx(0, abs=0.003)
            assert float(gate.std()) == pytest.approx(std, rel=0.05)
            assert float(gate.mean()) == pytest.approx(0, abs=0.1 * std)
            assert float(gate.abs().max()) > 2.5 * std, "normal, not uniform"
            assert not tensors[f"{start}.experts.up_proj"].any()


# A client's round ----------------------------------------------------------------------------------------------------


def texts() -> TextShard:
    """Seven texts of 2 to 8 tokens."""
    drawn = np.random.default_rng(4)
    lengths = [2, 8, 5, 3, 6, 8, 4]
    examples = tuple(
        TextExample(drawn.integers(2, 60, length).astype(np.int32), number % 5) for number, length in enumerate(lengths)
    )
    return TextShard(examples, TextShardReport(7, sum(lengths), 0), 0)


def responses() -> ResponseShard:
    """Seven prompts of 2 tokens with responses of 1 to 6."""
    drawn = np.random.default_rng(4)
    examples = tuple(
        Example(drawn.integers(2, 60, 2 + length).astype(np.int32), 2, "", "") for length in (1, 6, 3, 2, 5, 6, 4)
    )
    return ResponseShard(examples, ShardReport(7, 41, 27, 0, 0), 0)


def images(count: int, seed: int = 4) -> ImageShard:
    """Noise of 8 x 8 pixels, classes in turn."""
    drawn = np.random.default_rng(seed)
    examples = tuple(
        ImageExample(drawn.integers(0, 256, (3, 8, 8), dtype=np.uint8), (seed + number) % 5) for number in range(count)
    )
    scale = torch.linspace(-1, 1, 256).repeat(3, 1)
    return ImageShard(examples, ImageShardReport(count, 0, 5), Preprocessing(None, scale))


def batch_loss(oracle: Oracle, tensors: Tensors, top_k: int, batch: Any) -> tuple[Tensor, int, Tensor]:
    """Summed cross-entropy, number of targets, and which positions are real."""
    if hasattr(batch, "pixel_values"):
        given, real = {"pixel_values": batch.pixel_values}, torch.ones(len(batch.labels), 5, dtype=torch.bool)
    else:
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        real = batch.attention_mask.bool()
    logits = oracle(tensors, top_k, given)
    if batch.labels.dim() == 2:
        logits, labels = logits[:, :-1][batch.labels[:, 1:] != IGNORED], batch.labels[:, 1:]
        labels = labels[labels != IGNORED]
    else:
        labels = batch.labels
    return -logits.log_softmax(-1)[range(len(labels)), labels].sum(), len(labels), real


def slow_fit(
    oracle: Oracle, start: Mapping[str, Tensor], top_k: int, shard: Shard, seeds: Seeds, config: TrainingConfig,
    coefficient: float, omega: Sequence[Sequence[float]], z: float,
) -> tuple[Tensors, list[list[int]]]:  # fmt: skip
    """Adam in float64, one parameter for each expert; one that no real token chose in a step is left alone."""
    apart: dict[tuple[str, int | None], Tensor] = {}
    for name, tensor in start.items():
        parts = enumerate(tensor.double().unbind()) if is_expert(name) else [(None, tensor.double())]
        apart |= {(name, m): part.clone().requires_grad_() for m, part in parts}

    def whole() -> Tensors:
        return {
            name: torch.stack([apart[name, m] for m in range(EXPERTS)]) if is_expert(name) else apart[name, None]
            for name in start
        }

    optimizer = torch.optim.Adam(apart.values(), lr=config.learning_rate, betas=config.betas, eps=config.epsilon)
    counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    assert config.micro_batch_size is not None
    assert config.max_grad_norm is not None
    for epoch in range(config.local_epochs):
        for examples in shard.batches(config.batch_size, seeds.torch(f"order {epoch}")):
            size = config.micro_batch_size
            micros = [shard.collate(examples[at : at + size]) for at in range(0, len(examples), size)]
            used = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
            total, targets, auxiliary = torch.zeros(()), 0, torch.zeros(())
            for micro in micros:
                loss, number, real = batch_loss(oracle, whole(), top_k, micro)
                total, targets = total + loss, targets + number
                auxiliary = auxiliary + oracle.auxiliary(real, coefficient, omega, z) / len(micros)
                used += torch.stack([kept[real.reshape(-1)].sum(0) for kept in oracle.kept])
            optimizer.zero_grad()
            (total / targets + auxiliary).backward()  # type: ignore[no-untyped-call]
            for (name, m), parameter in apart.items():
                if m is not None and used[int(name.split(".")[1]), m] == 0:
                    parameter.grad = None
            torch.nn.utils.clip_grad_norm_(apart.values(), config.max_grad_norm)
            optimizer.step()
            counts += used
    return {name: tensor.detach() for name, tensor in whole().items()}, counts.tolist()


def floored_kl(client: Sequence[Sequence[float]], whole: Sequence[Sequence[float]]) -> float:
    """KL(client || everybody), the mean over layers, of shares to which 1e-3 was added."""
    result = 0.0
    for mine, all_ in zip(client, whole, strict=True):
        p = [(x / sum(mine) + 1e-3) / (1 + EXPERTS * 1e-3) for x in mine]
        q = [(x / sum(all_) + 1e-3) / (1 + EXPERTS * 1e-3) for x in all_]
        result += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(whole)
    return result


TRAINING = TrainingConfig(
    batch_size=5, micro_batch_size=2, local_epochs=2, learning_rate=0.1, epsilon=1e-2, max_grad_norm=0.8
)
"""Steps of 5 and 2 examples, in forward passes of 2, 2, 1 and 2; an epsilon at which Adam tells sizes of gradients."""
SHARDS: Mapping[str, Shard] = {"bert": texts(), "llama": responses(), "vit": images(7)}
OWN_COUNTS = [[30, 6, 3, 1], [2, 2, 34, 2]]
GLOBAL_LOAD = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.4, 0.0]]


def fft_moe(**options: Any) -> FftMoe:
    return FftMoe(FftMoeConfig(**options), SMALL, Trainer(TRAINING))


@pytest.mark.parametrize(("name", "top_k"), [("bert", 1), ("bert", 2), ("llama", 1), ("llama", 3), ("vit", 2)])
@pytest.mark.parametrize("balance", ["none", "switch", "heterogeneity"])
def test_a_clients_round_is_the_slow_one(name: str, top_k: int, balance: str) -> None:
    """Own gate from memory, lambda (1 + KL) from its last counts, omega from the load, micro batches of unequal size.

    Two epochs, so that a clipped, momentum-driven step follows another; counts come from the same tokens.
    """
    options: dict[str, Any] = {} if balance == "none" else {"balance_coef": 0.5}
    method = fft_moe(balance=balance, router_z_coef=0.2, **options)
    model, oracle, shard = FoundationModel(tiny_family_lm(name)), Oracle(name), SHARDS[name]
    client = Client("c", Budget("any", model.native_top_k, None, top_k), 7)
    load = torch.tensor(GLOBAL_LOAD)
    state = Bundle({**loud(model), LOAD: load}, {"adapter_top_k": 4})
    gates = {name: tensor for name, tensor in loud(model, 8).items() if name.endswith("router.weight")}
    memory = Bundle({**gates, ACTIVATION_COUNTS: torch.tensor(OWN_COUNTS)})
    seeds = Seeds(0).at(round=2, client="c")
    result = method.fit(model, method.dispatch(state, client, 2), client, shard, memory, seeds)

    coefficient, omega = 0.5, [[1.0] * EXPERTS] * LAYERS
    if balance == "none":
        coefficient = 0.0
    if balance == "heterogeneity":
        coefficient = 0.5 * (1 + floored_kl(OWN_COUNTS, GLOBAL_LOAD))
        omega = [[EXPERTS * share for share in layer] for layer in GLOBAL_LOAD]
    start = {**{key: t for key, t in state.tensors.items() if key != LOAD}, **gates}
    expected, counts = slow_fit(oracle, start, top_k, shard, seeds, TRAINING, coefficient, omega, 0.2)
    assert result.upload.tensors[ACTIVATION_COUNTS].tolist() == counts
    for key, tensor in expected.items():
        torch.testing.assert_close(result.upload.tensors[key].double(), tensor, rtol=1e-3, atol=2e-4, msg=key)
        assert is_expert(key) or not torch.allclose(tensor, start[key].double(), atol=1e-2), f"{key} did not move"
    assert sorted(result.memory.tensors) == sorted([*gates, ACTIVATION_COUNTS])
    for key, tensor in result.memory.tensors.items():
        assert torch.equal(tensor, result.upload.tensors[key])
    assert (result.upload.meta["adapter_top_k"], result.upload.meta["examples"]) == (top_k, 7)


def test_the_models_own_balance_loss_and_the_adapters_add_up() -> None:
    """One step of Adam from a fresh state moves a number by lr g / (|g| + epsilon), whatever its betas."""
    config = TrainingConfig(
        batch_size=64, learning_rate=0.1, epsilon=1e-2, max_grad_norm=None, router_aux_loss_coef=0.3
    )
    method = FftMoe(FftMoeConfig(balance="switch", balance_coef=0.5), SMALL, Trainer(config))
    model, oracle, shard = FoundationModel(tiny_family_lm("olmoe")), Oracle("olmoe"), responses()
    client, start = Client("c", Budget("any", 2, None, 2), 7), loud(model)
    state = Bundle({**start, LOAD: torch.zeros(LAYERS, EXPERTS)}, {})
    found = method.fit(model, method.dispatch(state, client, 1), client, shard, Bundle(), Seeds(0)).upload.tensors
    batch, wanted = shard.collate(shard.examples), leaves(start)
    loss, targets, real = batch_loss(oracle, wanted, 2, batch)
    auxiliary = oracle.auxiliary(real, 0.5, [[1.0] * EXPERTS] * LAYERS, 0.0)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    oracle(wanted, 2, given, output_router_logits=True)
    (loss / targets + auxiliary + 0.3 * oracle.output.aux_loss).backward()
    for key, tensor in wanted.items():
        assert tensor.grad is not None
        expected = tensor.detach() - 0.1 * tensor.grad / (tensor.grad.abs() + 1e-2)
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-3, atol=1e-4, msg=key)


def test_flops_of_a_round_grow_with_k_by_those_of_real_tokens() -> None:
    """36 real tokens, two epochs, 3 - 1 experts more for each; a product is 2 x 3 x 32 FLOPs.

    Forward two products in each layer. Backward two for W_up; for W_down one for its own gradient, and in the second
    layer, whose input depends on the first's adapter, one for its input: 5 products and 6.
    """
    model, shard, flops = FoundationModel(tiny_family_lm("bert")), texts(), []
    for top_k in (1, 3):
        client = Client("c", Budget("any", 1, None, top_k), 7)
        state = Bundle({**loud(model), LOAD: torch.zeros(LAYERS, EXPERTS)}, {})
        method = fft_moe()
        answer = method.fit(model, method.dispatch(state, client, 1), client, shard, Bundle(), Seeds(0)).upload
        flops.append(answer.meta["stats"]["flops"])
        assert answer.meta["tokens"] == 72
    assert flops[1] - flops[0] == 36 * 2 * 2 * (5 + 6) * 2 * 3 * 32


# The server ----------------------------------------------------------------------------------------------------------

EXAMPLES, TOP_K, TOKENS = (10, 30, 60), (1, 2, 4), (20, 9, 15)
COUNTS = (
    ((20, 0, 0, 0), (5, 5, 0, 10)),
    ((10, 8, 0, 0), (9, 9, 0, 0)),
    ((16, 20, 0, 24), (15, 15, 15, 15)),
)
"""By client, layer and expert; a layer's sum is tokens x k. Nobody used expert 2 of the first layer."""
ADAPTED = (1, 11)
"""Layers with an adapter: one's name begins like the other's, and neither is its row in the counts."""


def uploads(shapes: Mapping[str, Tensor]) -> list[Payload]:
    """Three clients; the SMoE model's own K, which is none of the adapter's business, is 7 for all."""
    result = []
    for client, (n, k, tokens, counts) in enumerate(zip(EXAMPLES, TOP_K, TOKENS, COUNTS, strict=True)):
        generator = torch.Generator().manual_seed(client)
        tensors = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in sorted(shapes.items())}
        meta = {"examples": n, "tokens": tokens, "top_k": 7, "adapter_top_k": k}
        result.append(Payload(3, f"c{client}", Bundle({**tensors, ACTIVATION_COUNTS: torch.tensor(counts)}, meta)))
    return result


def server() -> Bundle:
    """A state of two layers and a head."""
    generator = torch.Generator().manual_seed(9)
    sizes: dict[str, tuple[int, ...]] = {"head.weight": (5, 6), "head.bias": (5,)}
    for layer in ADAPTED:
        start = f"layers.{layer}.adapter"
        sizes |= {f"{start}.experts.down_proj": (4, 3, 6), f"{start}.experts.up_proj": (4, 6, 3)}
        sizes |= {f"{start}.router.weight": (4, 6)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    meta = {"sparse_layers": list(ADAPTED), "num_experts": 4, "experts": "adapter.experts", "adapter_top_k": 4}
    return Bundle({**tensors, LOAD: torch.zeros(2, 4)}, meta)


@pytest.mark.parametrize("frequency", [None, "per_token", "per_activation", "per_activation_over_k"])
def test_the_servers_mean_and_load(frequency: str | None) -> None:
    """p_c, or p_c f^t over its sum, for experts; p_c for gates and the head; the load is the sum of the counts."""
    options: dict[str, Any] = (
        {} if frequency is None else {"weighting": "activation", "frequency": frequency, "temperature": 3.0}
    )
    method, state = fft_moe(**options), server()
    given = {name: tensor for name, tensor in state.tensors.items() if name != LOAD}
    received = uploads(given)
    after = method.aggregate(state, received).tensors
    assert sorted(after) == sorted(state.tensors)
    for name, before in given.items():
        values = [upload.content.tensors[name].double() for upload in received]
        expected = sum(n / 100 * value for n, value in zip(EXAMPLES, values, strict=True))
        assert isinstance(expected, Tensor)
        if is_expert(name):
            row = ADAPTED.index(int(name.split(".")[1]))
            for m in range(4):
                weights = []
                for c, n in enumerate(EXAMPLES):
                    count, total = COUNTS[c][row][m], sum(COUNTS[c][row])
                    f = {
                        None: 1.0,
                        "per_token": count / TOKENS[c],
                        "per_activation": count / total,
                        "per_activation_over_k": count / total / TOP_K[c],
                    }[frequency]
                    weights.append(n * f**3.0)
                if sum(COUNTS[c][row][m] for c in range(3)) == 0:
                    assert torch.equal(after[name][m], before[m])
                    expected[m] = before[m].double()
                else:
                    mixed = sum(w / sum(weights) * value[m] for w, value in zip(weights, values, strict=True))
                    assert isinstance(mixed, Tensor)
                    expected[m] = mixed
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    summed = [[sum(COUNTS[c][row][m] for c in range(3)) for m in range(4)] for row in range(2)]
    shares = [[count / sum(layer) for count in layer] for layer in summed]
    torch.testing.assert_close(after[LOAD], torch.tensor(shares))


@pytest.mark.parametrize("name", ["fft_moe", "dense_adapter"])
def test_without_what_was_before_an_expert_nobody_used_is_averaged_by_data(name: str) -> None:
    """1 and 2 by 10 and 20 examples: 5/3. Nobody used expert 1; given what it was, it keeps that."""
    path = "layers.0.adapter.experts"
    updates = [
        Update(f"c{c}", {f"{path}.up_proj": torch.full((2, 1, 1), c)}, int(10 * c), 5, 1, {path: torch.tensor([5, 0])})
        for c in (1.0, 2.0)
    ]
    found = emberfed.aggregate(updates, method=name)[f"{path}.up_proj"]
    assert found.flatten().tolist() == pytest.approx([5 / 3, 5 / 3])
    before = {f"{path}.up_proj": torch.full((2, 1, 1), 7.0)}
    found = emberfed.aggregate(updates, method=name, previous=before)[f"{path}.up_proj"]
    assert found.flatten().tolist() == pytest.approx([5 / 3, 7.0])


def test_what_a_client_is_sent_and_goes_on_with() -> None:
    """The mean gate is sent to all; `local` puts the client's own in its place, `fedavg` does not, nor a late client.

    At a step of 1e-9 the upload is what training began with.
    """
    model = FoundationModel(tiny_family_lm("vit"))
    client, shard = Client("c", Budget("any", 1, None, 2), 7), SHARDS["vit"]
    state = Bundle({**loud(model), LOAD: torch.zeros(LAYERS, EXPERTS)}, {})
    own = {name: tensor for name, tensor in loud(model, 8).items() if name.endswith("router.weight")}
    kept = Bundle({**own, ACTIVATION_COUNTS: torch.tensor(OWN_COUNTS)})
    for gate, memory, expected in (
        ("local", kept, {**state.tensors, **own}),
        ("fedavg", kept, state.tensors),
        ("local", Bundle(), state.tensors),
    ):
        still = Trainer(TRAINING.model_copy(update={"learning_rate": 1e-9}))
        method = FftMoe(FftMoeConfig(gate_aggregation=gate), SMALL, still)
        download = method.dispatch(state, client, 1)
        assert all(torch.equal(tensor, state.tensors[name]) for name, tensor in download.content.tensors.items())
        assert sorted(download.content.tensors) == sorted(state.tensors)
        sent = method.fit(model, download, client, shard, memory, Seeds(0)).upload.tensors
        for name in loud(model):
            torch.testing.assert_close(sent[name], expected[name], rtol=0, atol=1e-6, msg=name)


def test_the_personal_and_the_global_model() -> None:
    """Personal: shared experts and head, own gate, own k. Global: the mean gate, the tier's k."""
    model, oracle, (given, _) = FoundationModel(tiny_family_lm("vit")), Oracle("vit"), inputs("vit")
    narrow = {name: tensor.float() for name, tensor in given.items()}
    shared = loud(model)
    state = Bundle({**shared, LOAD: torch.zeros(LAYERS, EXPERTS)}, {})
    own = {name: tensor for name, tensor in loud(model, 8).items() if name.endswith("router.weight")}
    stale = {name: tensor for name, tensor in loud(model, 9).items() if not name.endswith("router.weight")}
    assert stale, "what else a memory may hold"
    client = Client("c", Budget("any", 1, None, 3), 7)
    kept = Bundle({**own, ACTIVATION_COUNTS: torch.tensor(OWN_COUNTS)})
    mixed = {name: own.get(name, tensor).double() for name, tensor in shared.items()}
    plain = {name: tensor.double() for name, tensor in shared.items()}
    for gate, memory, expected in (("local", kept, mixed), ("fedavg", kept, plain), ("local", Bundle(), plain)):
        method = fft_moe(gate_aggregation=gate)
        download = method.dispatch(state, client, 2)
        with torch.no_grad(), method.personal(model, download, client, memory):
            found = model.lm(**narrow).logits.double()
        torch.testing.assert_close(found, oracle(expected, 3, given).detach(), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), fft_moe().deploy(state, model, Budget("other", 1, None, 2)):
        found = model.lm(**narrow).logits.double()
    torch.testing.assert_close(found, oracle(plain, 2, given).detach(), rtol=1e-4, atol=1e-4)


# The head under every method -----------------------------------------------------------------------------------------

ADAPTER: Mapping[str, dict[str, Any]] = {
    "fft_moe": {"num_experts": EXPERTS, "expert_size": 3},
    "dense_adapter": {"size": 12},
    "linear_probe": {},
    **{name: {"rank": 3, "alpha": 6.0} for name in ("flexlora", "flora", "hetlora", "homolora")},
}
RANKS, SIZES = {"a": 2, "b": 3, "c": 4}, {"a": 2, "b": 3, "c": 5}
ONE_STEP = TrainingConfig(batch_size=64, learning_rate=0.05)


class Classifiers:
    """Three clients of a tiny ViT with 2, 3 and 5 images and ranks 2, 3 and 4, and what they keep."""

    def __init__(self, name: str, **options: Any) -> None:
        kind = load_method(name)
        adapter = kind.AdapterConfig(**ADAPTER[name])
        self.name = name
        self.method: Method = kind(kind.Config(**options), adapter, Trainer(ONE_STEP))
        self.model = FoundationModel(tiny_family_lm("vit"))
        self.clients = {id_: Client(id_, Budget(id_, 1, rank, rank - 1), SIZES[id_]) for id_, rank in RANKS.items()}
        self.shards = {id_: images(size, seed) for seed, (id_, size) in enumerate(SIZES.items())}
        budgets = [client.budget for client in self.clients.values()]
        self.state = self.method.init(self.model, budgets, Seeds(0).at(purpose="init"))
        self.memories: dict[str, Bundle] = {}

    def fit(self, round: int, id_: str) -> FitResult:
        download = self.method.dispatch(self.state, self.clients[id_], round)
        memory, seeds = self.memories.get(id_, Bundle()), Seeds(0).at(round=round, client=id_)
        return self.method.fit(self.model, download, self.clients[id_], self.shards[id_], memory, seeds)

    def play(self, round: int, *ids: str) -> list[Payload]:
        answers = {id_: self.fit(round, id_) for id_ in ids}
        self.memories |= {id_: answer.memory for id_, answer in answers.items()}
        sent = [Payload(round, id_, answer.upload) for id_, answer in answers.items()]
        self.state = self.method.aggregate(self.state, sent)
        return sent

    def personal_logits(self, id_: str) -> Tensor:
        memory, client = self.memories.get(id_, Bundle()), self.clients[id_]
        download = self.method.dispatch(self.state, client, 9)
        with torch.no_grad(), self.method.personal(self.model, download, client, memory):
            return self.logits(id_)

    def deployed_logits(self, id_: str) -> Tensor:
        """On that client's images, at its budget."""
        with torch.no_grad(), self.method.deploy(self.state, self.model, self.clients[id_].budget):
            return self.logits(id_)

    def logits(self, id_: str) -> Tensor:
        shard = self.shards[id_]
        found: Tensor = self.model.lm(**shard.collate(shard.examples).inputs()).logits.clone()
        return found


def heads_of(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}


@pytest.mark.parametrize("name", sorted(ADAPTER))
def test_the_head_is_averaged_by_data_alone_and_sent_whole(name: str) -> None:
    """Whatever is done to factors (norms, SVD, cuts, stacks, pruning), over rounds with different clients."""
    options: dict[str, Any] = {"pruning": 0.5, "regularisation": 10.0} if name == "hetlora" else {}
    world = Classifiers(name, **options)
    own = {f"head.{key}": value.detach().clone() for key, value in world.model.lm.classifier.named_parameters()}
    for key, tensor in heads_of(world.state.tensors).items():
        assert torch.equal(tensor, own[key])
    for round, ids in enumerate((("a", "b"), ("c",), ("a", "b", "c")), start=1):
        before = heads_of(world.state.tensors)
        for client in world.clients.values():
            sent = heads_of(world.method.dispatch(world.state, client, round).content.tensors)
            assert sorted(sent) == ["head.bias", "head.weight"]
            assert all(torch.equal(tensor, before[key]) for key, tensor in sent.items())
        received = world.play(round, *ids)
        total = sum(SIZES[id_] for id_ in ids)
        for key, found in heads_of(world.state.tensors).items():
            parts = [SIZES[u.client] / total * u.content.tensors[key].double() for u in received]
            torch.testing.assert_close(found.double(), torch.stack(parts).sum(0), rtol=1e-6, atol=1e-7)
            assert all(not torch.equal(u.content.tensors[key], before[key]) for u in received), "nobody trained it"
    for key, value in world.model.lm.classifier.named_parameters():
        assert torch.equal(value, own[f"head.{key}"]), "the base is as it was found"


@pytest.mark.parametrize("name", sorted(ADAPTER))
def test_a_client_begins_with_the_head_and_model_that_are_deployed(name: str) -> None:
    """`c`, of the largest rank: late in round 2, returning in round 4, after an answer of its own that was lost.

    Its personal model is the deployed one too, but for FFT-MoE's gate, which therefore goes on as the mean here.
    """
    options: dict[str, Any] = {}
    if name == "fft_moe":
        options = {"gate_aggregation": "fedavg"}
    if name == "hetlora":
        options = {"pruning": 1.0}
    world = Classifiers(name, **options)
    shard, seen = world.shards["c"], []
    for round, ids in ((1, ("a", "b")), (2, ("a", "c")), (3, ("a",)), (4, ("c", "b"))):
        logits = world.deployed_logits("c")
        torch.testing.assert_close(world.personal_logits("c"), logits, rtol=1e-4, atol=1e-4)
        if "c" in ids:
            world.memories["c"] = world.fit(round, "c").memory  # the upload was lost, what it keeps was not
            torch.testing.assert_close(world.personal_logits("c"), logits, rtol=1e-4, atol=1e-4)
            before = float(F.cross_entropy(logits, shard.collate(shard.examples).labels))
            answer = next(upload for upload in world.play(round, *ids) if upload.client == "c")
            assert answer.content.meta["stats"]["loss_first"] == pytest.approx(before, rel=1e-4)
            seen.append(before)
        else:
            world.play(round, *ids)
    assert abs(seen[0] - seen[1]) > 1e-3, "nothing was learned, so nothing was tested"


def test_flora_deploys_the_sum_of_all_products_and_the_last_mean_head() -> None:
    """W + sum over rounds and clients of p alpha / r B A, in float64, added to transformers' weights by hand."""
    world, oracle = Classifiers("flora"), tiny_family_lm("vit").double()
    weights = dict(oracle.named_parameters())
    for round, ids in enumerate((("a", "b"), ("b", "c")), start=1):
        received, total = world.play(round, *ids), sum(SIZES[id_] for id_ in ids)
        with torch.no_grad():
            for key in ("weight", "bias"):
                parts = [SIZES[u.client] / total * u.content.tensors[f"head.{key}"].double() for u in received]
                weights[f"classifier.{key}"].copy_(torch.stack(parts).sum(0))
            for upload in received:
                share = SIZES[upload.client] / total * 6.0 / RANKS[upload.client]
                tensors = upload.content.tensors
                for name in (name for name in tensors if name.endswith(".lora_A")):
                    a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
                    assert a.shape[0] == RANKS[upload.client]
                    path = name.removesuffix(".lora_A").replace("self_attn", "attention")
                    weights[f"vit.{path}.weight"].add_(share * b @ a)
    shard = world.shards["a"]
    pixels = shard.collate(shard.examples).inputs()["pixel_values"].double()
    with torch.no_grad():
        expected = oracle(pixel_values=pixels).logits
    for found in (world.deployed_logits("a"), world.personal_logits("a")):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_personal_evaluation_through_the_worker(tmp_path: Path) -> None:
    """Each client scores today's shared experts and head with the gate it had when it last trained, on its own data.

    Round 2 is without `a`, so its gate is that of round 1, while experts and head are those of round 2.
    """
    world, oracle = Classifiers("fft_moe"), Oracle("vit")
    held_out = {id_: images(6, seed) for seed, id_ in enumerate(world.clients, start=20)}
    worker = Worker(
        world.method, world.model, world.clients, world.shards.__getitem__, MemoryFolder(tmp_path), Seeds(0),
        lambda id_, model: evaluate(model, held_out[id_], EvaluationConfig())[0],
    )  # fmt: skip
    gates: dict[str, Tensors] = {}
    for round, ids in ((1, ("a", "b", "c")), (2, ("b", "c"))):
        received = []
        for id_ in ids:
            download = world.method.dispatch(world.state, world.clients[id_], round).to_bytes()
            received.append(Payload.from_bytes(worker.run(Job(round, id_, download)).upload))
            gates[id_] = {n: t for n, t in received[-1].content.tensors.items() if n.endswith("router.weight")}
        world.state = world.method.aggregate(world.state, received)
        told: list[events.Event] = []
        answers = personal.Answers(list(world.clients.values()), CLASSIFICATION, round, told.append)
        for job in answers.jobs(world.method, world.state):
            answers.receive(worker.answer(job))
        *lines, _ = answers.lines()
        assert ([line["client"] for line in lines], told) == (["a", "b", "c"], [])
        for line in lines:
            top_k = world.clients[line["client"]].budget.adapter_top_k
            assert top_k is not None
            own = {**world.state.tensors, **gates[line["client"]]}
            shard = held_out[line["client"]]
            batch = shard.collate(shard.examples)
            with torch.no_grad():
                logits = oracle({name: tensor.double() for name, tensor in own.items()}, top_k, batch.inputs())
            assert line["loss"] == pytest.approx(float(F.cross_entropy(logits, batch.labels)), rel=1e-5)
            assert line["accuracy"] == pytest.approx(float((logits.argmax(-1) == batch.labels).double().mean()))
            assert (line["examples"], line["adapter_top_k"]) == (6, top_k)
    assert max(float((gates["a"][name] - world.state.tensors[name]).abs().max()) for name in gates["a"]) > 1e-3


@pytest.mark.parametrize("name", ["fft_moe", "dense_adapter"])
def test_a_sparse_base_runs_with_the_budgets_own_k_beside_the_adapters(name: str) -> None:
    """An OLMoE of native K = 2 at K = 1 and k = 3: deployed, personal, and at the first step of training."""
    model, oracle = FoundationModel(tiny_family_lm("olmoe")), Oracle("olmoe", num_experts_per_tok=1)
    kind, shard = load_method(name), responses()
    method = kind(kind.Config(), kind.AdapterConfig(**ADAPTER[name]), Trainer(ONE_STEP))
    budget = Budget("small", 1, None, 3)
    client = Client("c", budget, 7)
    fresh = method.init(model, [budget], Seeds(0))
    generator = torch.Generator().manual_seed(5)
    tensors = {key: 0.5 * torch.randn(tensor.shape, generator=generator) for key, tensor in fresh.tensors.items()}
    if name == "fft_moe":
        tensors[LOAD] = fresh.tensors[LOAD]
    state, wide = Bundle(tensors, fresh.meta), {key: tensor.double() for key, tensor in tensors.items()}
    batch = shard.collate(shard.examples)
    with torch.no_grad():
        loss, targets, real = batch_loss(oracle, wide, 3, batch)
        expected = oracle(wide, 3, {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})[real]
    download = method.dispatch(state, client, 1)
    for context in (method.deploy(state, model, budget), method.personal(model, download, client, Bundle())):
        with torch.no_grad(), context:
            found = model.lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[real]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    upload = method.fit(model, download, client, shard, Bundle(), Seeds(0)).upload
    assert upload.meta["stats"]["loss_first"] == pytest.approx(float(loss) / targets, rel=1e-5)


def test_an_exported_adapter_has_the_largest_k_of_the_tiers() -> None:
    """It is what the adapter runs with where nobody says otherwise."""
    world = Classifiers("fft_moe")
    exported = world.method.export(world.state, world.model)
    [config] = [json.loads(data) for file, data in exported.items() if file.endswith(".json")]
    assert (config["top_k"], [client.budget.adapter_top_k for client in world.clients.values()]) == (3, [1, 2, 3])


def test_a_dense_adapter_of_size_m_h_has_the_sparse_ones_parameters_but_for_the_gate() -> None:
    """4 experts of 3 are 12: 2 x 12 x 32 numbers a layer, and 4 x 32 of the gate."""
    sizes = {}
    for name in ("dense_adapter", "fft_moe"):
        tensors = Classifiers(name).state.tensors
        sizes[name] = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("layers."))
    assert sizes == {"dense_adapter": LAYERS * 2 * 12 * 32, "fft_moe": LAYERS * (2 * 12 * 32 + 4 * 32)}


# LoRA on Conv1D and fused matrices -----------------------------------------------------------------------------------

WEIGHTS: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "self_attn.c_attn": "transformer.h.{}.attn.c_attn",
        "self_attn.c_proj": "transformer.h.{}.attn.c_proj",
        "mlp.c_fc": "transformer.h.{}.mlp.c_fc",
        "mlp.c_proj": "transformer.h.{}.mlp.c_proj",
    },
    "gpt_neox": {
        "self_attn.query_key_value": "gpt_neox.layers.{}.attention.query_key_value",
        "self_attn.dense": "gpt_neox.layers.{}.attention.dense",
        "mlp.dense_h_to_4h": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    },
    "bert": {
        "self_attn.self.query": "bert.encoder.layer.{}.attention.self.query",
        "self_attn.self.key": "bert.encoder.layer.{}.attention.self.key",
        "self_attn.self.value": "bert.encoder.layer.{}.attention.self.value",
        "self_attn.output.dense": "bert.encoder.layer.{}.attention.output.dense",
        "mlp.intermediate.dense": "bert.encoder.layer.{}.intermediate.dense",
        "mlp.output.dense": "bert.encoder.layer.{}.output.dense",
    },
}


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_lora_is_alpha_over_r_b_a_on_the_weight_attached_and_merged(name: str) -> None:
    """W + 10 / 3 B A; GPT-2 stores W transposed. Gradients of A and B are those through the dense weight."""
    model, plain, (given, real) = FoundationModel(tiny_family_lm(name)), tiny_family_lm(name).double(), inputs(name)
    config = lora.LoraConfig(rank=3, alpha=10.0)
    generator = torch.Generator().manual_seed(3)
    fresh = lora.initial(model, config, generator)
    tensors = {key: 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in fresh.items()}
    expected = leaves(tensors)
    replaced: Tensors = {}
    for layer in range(LAYERS):
        for ours, theirs in WEIGHTS[name].items():
            a, b = (expected.pop(f"layers.{layer}.{ours}.lora_{factor}") for factor in "AB")
            expected |= {f"{layer} {ours} A": a, f"{layer} {ours} B": b}
            stored = plain.get_submodule(theirs.format(layer)).weight
            added = 10 / 3 * b @ a
            replaced[f"{theirs.format(layer)}.weight"] = stored.detach() + (added.T if name == "gpt2" else added)
    head = {key: tensor for key, tensor in expected.items() if key.startswith("head.")}
    assert len(expected) == len(tensors), "nothing else is adapted"
    replaced |= {key.replace("head.", "classifier."): tensor for key, tensor in head.items()}
    wanted = torch.func.functional_call(plain, replaced, kwargs=dict(given)).logits
    at = real if wanted.dim() == 3 else slice(None)
    wanted[at].square().sum().backward()
    with lora.attached(model, tensors, 10.0) as adapter:
        found = model.lm(**given).logits
        found[at].square().sum().backward()
        torch.testing.assert_close(found[at].double(), wanted[at], rtol=1e-4, atol=1e-4)
        for key, parameter in adapter.parameters.items():
            path, _, factor = key.rpartition(".lora_")
            number, _, ours = path.removeprefix("layers.").partition(".")
            want = expected[key if key.startswith("head.") else f"{number} {ours} {factor}"].grad
            assert want is not None
            scale = float(want.abs().max())
            torch.testing.assert_close(dense(parameter.grad) / scale, want / scale, rtol=1e-4, atol=1e-4, msg=key)
    with torch.no_grad(), merging.merged(model, tensors, 10.0):
        torch.testing.assert_close(model.lm(**given).logits[at].double(), wanted[at], rtol=1e-4, atol=1e-4)


# Scores --------------------------------------------------------------------------------------------------------------


def score(weight: Sequence[float], bias: Sequence[float], labels: Sequence[int]) -> Any:
    """Score a ViT whose head sees nothing but its bias."""
    model = FoundationModel(tiny_family_lm("vit"))
    assert model.head is not None
    with torch.no_grad():
        model.lm.classifier.weight.copy_(torch.tensor(weight)[:, None].expand(5, HIDDEN))
        model.lm.classifier.bias.copy_(torch.tensor(bias))
    shard = images(len(labels))
    labelled = tuple(ImageExample(e.pixels, label) for e, label in zip(shard.examples, labels, strict=True))
    return evaluate(model, ImageShard(labelled, shard.report, shard.preprocessing), EvaluationConfig(batch_size=2))


def test_of_equal_logits_the_first_class_is_chosen() -> None:
    """Classes 1, 2 and 4 tie; of labels 1, 2, 4, 1, 0 two are 1. The loss is that of the tied probabilities."""
    scores, choices = score([0.0] * 5, [0.0, 1.0, 1.0, 0.0, 1.0], [1, 2, 4, 1, 0])
    assert [choice.chosen for choice in choices] == [1] * 5
    assert (scores.overall.accuracy, scores.overall.examples) == (2 / 5, 5)
    total = math.log(3 * math.e + 2)
    assert scores.overall.loss == pytest.approx((4 * (total - 1) + total) / 5, rel=1e-6)
    by_class = {name: (part.accuracy, part.examples) for name, part in scores.categories.items()}
    assert by_class == {"cat": (0.0, 1), "dog": (1.0, 2), "emu": (0.0, 1), "gnu": (0.0, 1)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.4], 0.4),
        ([0.9, 0.1, 0.5], 0.1),
        ([number / 10 for number in range(10)], 0.0),
        ([number / 20 for number in range(20, 0, -1)], (0.05 + 0.1) / 2),
        ([0.2, 0.2, *[0.8] * 28], (0.2 + 0.2 + 0.8) / 3),
        ([0.2, 0.4, *[0.8] * 9], 0.3),
    ],
)
def test_the_worst_tenth(values: list[float], expected: float) -> None:
    """At least one client, and a part of one is a whole one: 2 of 11. Of losses it is the largest."""
    assert personal.worst_decile(values, 1) == pytest.approx(expected)
    assert personal.worst_decile([-value for value in values], -1) == pytest.approx(-expected)


def test_the_summary_is_over_clients_not_examples() -> None:
    """Accuracies 0.25, 0.5 and 1 of 100, 2 and 2 examples: each client counts once. Variance 0.875 / 9."""
    told: list[events.Event] = []
    clients = [Client(id_, Budget("t", 1, None, k), 4) for id_, k in (("a", 1), ("b", 2), ("c", 4))]
    answers = personal.Answers(clients, CLASSIFICATION, 3, told.append)
    for id_, accuracy, loss, examples in (("c", 1.0, None, 2), ("a", 0.25, 2.0, 100), ("b", 0.5, 1.0, 2)):
        meta = {SCORES: {"accuracy": accuracy, "loss": loss, "examples": examples}}
        answers.receive(Reply(4, id_, Payload(4, id_, Bundle(meta=meta)).to_bytes(), {"seconds": 0.5}))
    *lines, summary = answers.lines()
    assert [(line["client"], line["accuracy"], line["adapter_top_k"]) for line in lines] == [
        ("a", 0.25, 1), ("b", 0.5, 2), ("c", 1.0, 4),
    ]  # fmt: skip
    assert summary["mean"] == pytest.approx(1.75 / 3)
    assert summary["worst_decile"] == 0.25
    assert summary["spread"] == pytest.approx(math.sqrt(0.875 / 9))
    assert (summary["loss_mean"], summary["clients"], told) == (1.5, 3, [])
