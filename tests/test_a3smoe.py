"""A3SMoE passes its options on: aggregation against the paper's sums, fit against the trainer it wraps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federations import config
from test_aggregation import slow_weights

from emberfed import assembly
from emberfed.aggregation import FREQUENCIES, Frequency
from emberfed.config import parse
from emberfed.method import load_method
from emberfed.models import lora
from emberfed.records import ACTIVATION_COUNTS, Bundle, Payload
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig

EXAMPLES, TOKENS, TOP_K = [30, 10, 5], [100, 70, 20], [1, 2, 4]
LAYERS, EXPERTS = (1, 3), 3  # a model whose layers 0 and 2 are dense
NAMES: dict[str, tuple[int, ...]] = {f"layers.{layer}.experts.up_proj.lora_B": (EXPERTS, 2, 2) for layer in LAYERS}
NAMES["layers.0.self_attn.q_proj.lora_A"] = (2, 4)


def made() -> tuple[Bundle, list[Payload], torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    counts = torch.randint(0, 40, (3, len(LAYERS), EXPERTS), generator=draw)
    counts[:, 1, 2] = 0  # nobody used it
    state = Bundle(
        {name: torch.randn(shape, generator=draw) for name, shape in NAMES.items()},
        {"sparse_layers": list(LAYERS), "num_experts": EXPERTS},
    )
    uploads = [
        Payload(
            1,
            f"c{client}",
            Bundle(
                {
                    **{name: torch.randn(shape, generator=draw) for name, shape in NAMES.items()},
                    ACTIVATION_COUNTS: counts[client],
                },
                {"examples": EXAMPLES[client], "tokens": TOKENS[client], "top_k": TOP_K[client]},
            ),
        )
        for client in range(3)
    ]
    return state, uploads, counts


@pytest.mark.parametrize("rule", FREQUENCIES)
@pytest.mark.parametrize("temperature", [0.0, 2.0, 4.0])
def test_aggregation_is_equations_7_and_8(rule: Frequency, temperature: float) -> None:
    state, uploads, counts = made()
    kind = load_method("a3smoe")
    options = kind.Config.model_validate({"frequency": rule, "temperature": temperature})
    after = kind(options, kind.AdapterConfig(), Trainer(TrainingConfig())).aggregate(state, uploads)
    weights = slow_weights(EXAMPLES, counts, TOKENS, TOP_K, rule, temperature)
    for name in NAMES:
        received = [upload.content.tensors[name].double() for upload in uploads]
        if not lora.is_expert(name):
            expected = sum(n / sum(EXAMPLES) * tensor for n, tensor in zip(EXAMPLES, received, strict=True))
            assert isinstance(expected, torch.Tensor)
            torch.testing.assert_close(after.tensors[name].double(), expected, rtol=1e-5, atol=1e-6)
            continue
        row = LAYERS.index(lora.layer_of(name))
        for expert in range(EXPERTS):
            if not bool(counts[:, row, expert].any()):
                assert torch.equal(after.tensors[name][expert], state.tensors[name][expert])
                continue
            expected = sum(weights[c][row][expert] * received[c][expert] for c in range(3))
            assert isinstance(expected, torch.Tensor)
            torch.testing.assert_close(after.tensors[name][expert].double(), expected, rtol=1e-5, atol=1e-6)


def test_fit_is_the_trainer_at_the_clients_k_gate_and_alpha(tiny_model_folder: Path, tiny_data: Path) -> None:
    values = config(
        tiny_model_folder, tiny_data, method={"name": "a3smoe", "gate": "renormalised"}, adapter={"rank": 2, "alpha": 7}
    )
    checked = parse(values)
    material = assembly.gather(checked)
    trainer = Trainer(checked.training)
    method = checked.method_type(checked.method, checked.adapter, trainer)
    state = method.init(material.model, material.budgets, Seeds(1))
    for client in material.clients:
        seeds, shard = Seeds(1).at(round=2, client=client.id), material.shards[client.id]
        download = method.dispatch(state, client, 2)
        upload = method.fit(material.model, download, client, shard, Bundle(), seeds).upload
        with (
            material.model.active_experts(client.budget.top_k, "renormalised"),
            lora.attached(material.model, state.tensors, 7.0) as adapter,
        ):
            stats = trainer.train(material.model, adapter, shard, client.id, 2, seeds)
            expected = adapter.tensors()
        for name, tensor in expected.items():
            assert torch.equal(upload.tensors[name], tensor), name
        assert upload.meta["tokens"] == stats.tokens
        assert upload.meta["top_k"] == client.budget.top_k
