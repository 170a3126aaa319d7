"""The dense adapter and the linear probe against what they are said to be, made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from federations import Vision
from test_lora_methods import World
from torch import nn
from torch.nn import functional as F

from emberfed.errors import ConfigError
from emberfed.models.sparse_adapter import SparseAdapterConfig, parameter_count
from emberfed.records import ACTIVATION_COUNTS, Payload
from emberfed.seeds import Seeds

EVERYBODY = ("c0", "c1", "c2", "c3")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    return Vision.made(tmp_path_factory.mktemp("vision"))


def world(vision: Vision, name: str, **sections: Any) -> World:
    method = {"name": name, **sections.pop("method", {})}
    return World(vision.model, vision.data, method=method, data={"task": "image_classification"}, **sections)


def pixels(model: Any) -> torch.Tensor:
    """Logits of three images."""
    given = torch.linspace(-2, 2, 576).view(3, 3, 8, 8)
    with torch.inference_mode():
        logits: torch.Tensor = model.lm(pixel_values=given).logits
    return logits.clone()


def by_data(uploads: list[Payload], name: str) -> torch.Tensor:
    sizes = [upload.content.meta["examples"] for upload in uploads]
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    stacked = torch.stack([upload.content.tensors[name].double() for upload in uploads])
    mean: torch.Tensor = (shares.view(-1, *[1] * (stacked.dim() - 1)) * stacked).sum(dim=0)
    return mean.float()


# The dense adapter.


@contextmanager
def by_hand(lm: Any, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let a ViT compute FFN(x) + W_up gelu(W_down x), and use a head."""
    before = lm.classifier
    lm.classifier = nn.Linear(32, 5)
    lm.classifier.load_state_dict({name: tensors[f"head.{name}"] for name in ("weight", "bias")})
    hooks = []
    for layer in range(2):
        down, up = (tensors[f"layers.{layer}.adapter.experts.{part}_proj"][0] for part in ("down", "up"))
        hooks.append(
            lm.vit.layers[layer].mlp.register_forward_hook(
                lambda _, args, out, down=down, up=up: out + F.gelu(args[0] @ down.T) @ up.T
            )
        )
    yield
    lm.classifier = before
    for hook in hooks:
        hook.remove()


def test_every_token_passes_the_mean_of_the_clients_adapters(vision: Vision) -> None:
    found = world(vision, "dense_adapter", training={"learning_rate": 0.05})
    before = pixels(found.model)
    uploads = found.play(1, *EVERYBODY)
    tensors = {name: by_data(uploads, name) for name in found.state.tensors}
    assert sorted(tensors) == sorted(
        ["head.bias", "head.weight"]
        + [f"layers.{layer}.adapter.experts.{part}_proj" for layer in range(2) for part in ("down", "up")]
    )
    with found.method.deploy(found.state, found.model, found.material.budgets[0]):
        deployed = pixels(found.model)
    with by_hand(found.model.lm, tensors):
        expected = pixels(found.model)
    torch.testing.assert_close(deployed, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(deployed, before, atol=1e-2)


def test_its_tokens_are_counted_and_its_one_expert_is_not(vision: Vision) -> None:
    """An image is 4 patches and the class token."""
    [upload] = world(vision, "dense_adapter").play(1, "c1")
    meta = upload.content.meta
    assert meta["tokens"] == 5 * meta["examples"]
    assert ACTIVATION_COUNTS not in upload.content.tensors


def test_it_needs_no_budget_of_its_own(vision: Vision) -> None:
    """All clients train the same adapter, whatever k their tier has."""
    tiers = [{"name": "all", "share": 1.0, "top_k": 1}]
    found = world(vision, "dense_adapter", clients={"tiers": tiers})
    assert {client.budget.adapter_top_k for client in found.clients.values()} == {None}
    assert {upload.content.meta["adapter_top_k"] for upload in found.play(1, *EVERYBODY)} == {1}


def test_it_is_as_large_as_a_mixture_of_the_same_total_size_but_for_the_gate(vision: Vision) -> None:
    """M = 4 experts of H = 3 in two layers of D = 32: the gates are 2 * 4 * 32 numbers."""
    found = world(vision, "dense_adapter", adapter={"size": 12})
    own = sum(tensor.numel() for tensor in found.state.tensors.values())
    assert parameter_count(SparseAdapterConfig(num_experts=4, expert_size=3), found.model) == own + 256
    with pytest.raises(ConfigError, match=r"unknown key 'adapter.num_experts'"):
        world(vision, "dense_adapter", adapter={"num_experts": 4})


# The linear probe.


def test_it_is_logistic_regression_on_the_frozen_features(vision: Vision) -> None:
    """The class token of the frozen model, a linear layer, Adam on the same batches with the same clipping."""
    found = world(vision, "linear_probe", training={"learning_rate": 0.05, "local_epochs": 2})
    client = found.clients["c2"]
    shard: Any = found.material.shards["c2"]
    head = nn.Linear(32, 5)
    head.load_state_dict({name: found.state.tensors[f"head.{name}"] for name in ("weight", "bias")})
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    seeds = Seeds(0).at(round=1, client="c2")
    for epoch in range(2):
        for examples in shard.batches(4, seeds.torch(f"order {epoch}")):
            batch = shard.collate(examples)
            with torch.no_grad():
                features = found.model.lm.vit(**batch.inputs()).last_hidden_state[:, 0]
            optimizer.zero_grad()
            F.cross_entropy(head(features), batch.labels).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
    [upload] = found.play(1, client.id)
    assert sorted(upload.content.tensors) == ["head.bias", "head.weight"]
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(upload.content.tensors[f"head.{name}"], parameter.detach(), rtol=1e-3, atol=1e-4)


def test_heads_are_averaged_by_data_size_by_every_method(vision: Vision) -> None:
    for method in ("linear_probe", "dense_adapter", "fft_moe", "homolora", "hetlora", "flexlora", "flora"):
        found = world(vision, method)
        for round in (1, 2):
            uploads = found.play(round, *EVERYBODY[round - 1 :])
            for name in ("head.weight", "head.bias"):
                torch.testing.assert_close(
                    found.state.tensors[name], by_data(uploads, name), rtol=1e-5, atol=1e-6, msg=f"{method} {name}"
                )


@pytest.mark.parametrize("method", ["linear_probe", "dense_adapter", "fft_moe"])
def test_the_servers_momentum_by_hand(vision: Vision, method: str) -> None:
    """x1 is the mean of round 1; x2 = x1 + (mean - x1) + 0.9 (x1 - x0). Its memory is sent to nobody."""
    found = world(vision, method, method={"server_optimizer": {"name": "fedavgm"}})
    names = [name for name in found.state.tensors if name.startswith("head.") or name.endswith("router.weight")]
    start = found.state.tensors
    first = found.play(1, *EVERYBODY)
    middle = found.state.tensors
    second = found.play(2, *EVERYBODY)
    for name in names:
        torch.testing.assert_close(middle[name], by_data(first, name), rtol=1e-5, atol=1e-6)
        expected = by_data(second, name) + 0.9 * (middle[name] - start[name])
        torch.testing.assert_close(found.state.tensors[name], expected, rtol=1e-5, atol=1e-6)
    assert any(name.startswith("optimizer.") for name in found.state.tensors)
    sent = found.method.dispatch(found.state, found.clients["c0"], 3).content.tensors
    assert not any(name.startswith("optimizer.") for name in sent)
