"""What no other file would notice: weights by use in every rule, and what a client begins with, round after round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_methods import World, effect
from torch import Tensor

import emberfed
from emberfed import federated, federated_lora
from emberfed.aggregation import Update
from emberfed.clients import Budget
from emberfed.penalties import TailPenalty, tail_product
from emberfed.records import ACTIVATION_COUNTS, Bundle, Payload
from emberfed.seeds import Seeds
from emberfed.server_optimizer import ServerOptimizerConfig
from emberfed.tasks import load_task

PATH = "layers.1.experts.up_proj"
ALPHA = 4.0
WHOLE_SHARD = {"batch_size": 64, "learning_rate": 1e-2}
"""One step, on all examples: their order makes no difference to the first loss."""


# Weights by use ----------------------------------------------------------------------------------------------------

EXAMPLES, TOKENS, TOP_K = (10, 30, 60), (8, 16, 16), (1, 2, 4)
COUNTS = ((6, 2, 0), (3, 0, 0), (8, 24, 0))
"""(client, expert): everybody used expert 0, client 2 did not use expert 1, nobody used expert 2."""


def shares(frequency: str, temperature: float) -> Tensor:
    """p f^t over its sum, (clients, experts), one number at a time; an expert nobody used has none."""
    result = torch.zeros(3, 3, dtype=torch.float64)
    for expert in (0, 1):
        raw = []
        for client, counts in enumerate(COUNTS):
            f = {
                "per_token": counts[expert] / TOKENS[client],
                "per_activation": counts[expert] / sum(counts),
                "per_activation_over_k": counts[expert] / sum(counts) / TOP_K[client],
            }[frequency]
            raw.append(EXAMPLES[client] * f**temperature)
        result[:, expert] = torch.tensor([x / sum(raw) for x in raw], dtype=torch.float64)
    return result


def pair(rank: int, seed: int) -> dict[str, Tensor]:
    """LoRA of that rank on 3 experts of 5 x 4."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PATH}.lora_A": torch.randn(3, rank, 4, generator=generator),
        f"{PATH}.lora_B": torch.randn(3, 5, rank, generator=generator),
    }


def federation(*ranks: int) -> list[Update]:
    facts = zip(ranks, EXAMPLES, TOKENS, TOP_K, COUNTS, strict=True)
    return [
        Update(f"c{seed}", pair(rank, seed), n, tokens, k, {"layers.1.experts": torch.tensor(counts)})
        for seed, (rank, n, tokens, k, counts) in enumerate(facts)
    ]


BY_USE: list[tuple[str, dict[str, Any], str, float]] = [
    ("flame", {}, "per_token", 2.0),
    ("a3smoe", {"temperature": 3.0}, "per_activation_over_k", 3.0),
    *(
        (name, {"weighting": "activation", "frequency": "per_token", "temperature": 3.0}, "per_token", 3.0)
        for name in ("homolora", "hetlora", "flexlora", "flora")
    ),
]


@pytest.mark.parametrize(("method", "options", "frequency", "temperature"), BY_USE, ids=[case[0] for case in BY_USE])
def test_every_rule_weighs_experts_by_their_use(
    method: str, options: dict[str, Any], frequency: str, temperature: float
) -> None:
    """The mean of the products where the method promises it (at a rank that drops nothing), else of A and of B."""
    exact = method in ("flexlora", "flora")
    updates = federation(*((1, 2, 3) if exact else (2, 2, 2)))
    previous = pair(6 if exact else 2, 9)
    found = emberfed.aggregate(updates, method=method, previous=previous, **options)
    weights = shares(frequency, temperature)[:, :, None, None]
    if exact:
        products = [effect(update.tensors, 1.0)[PATH] for update in updates]
        expected = sum(w * product for w, product in zip(weights, products, strict=True))
        assert isinstance(expected, Tensor)
        if method == "flexlora":
            expected[2] = effect(previous, 1.0)[PATH][2]
        torch.testing.assert_close(effect(found, 1.0)[PATH], expected, rtol=1e-5, atol=1e-5)
        return
    for name, before in previous.items():
        mean = sum(w * update.tensors[name].double() for w, update in zip(weights, updates, strict=True))
        assert isinstance(mean, Tensor)
        mean[2] = before[2]
        torch.testing.assert_close(found[name].double(), mean, rtol=1e-5, atol=1e-6)


def upload(client: str, counts: Tensor, meta: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Payload:
    return Payload(1, client, Bundle({**tensors, ACTIVATION_COUNTS: counts}, dict(meta)))


def test_an_update_is_what_the_upload_says() -> None:
    """Layers 1 and 3 have experts; counts have a row for each. Tokens, examples and K are three different numbers."""
    counts = torch.tensor([[1, 2], [3, 4]])
    meta = {"examples": 5, "tokens": 70, "top_k": 3}
    state = {"sparse_layers": [1, 3], "num_experts": 2}
    [update] = federated.updates_of([upload("c0", counts, meta, pair(1, 0))], state)
    assert (update.client, update.examples, update.tokens, update.top_k) == ("c0", 5, 70, 3)
    assert sorted(update.tensors) == sorted(pair(1, 0))
    rows = {prefix.removesuffix("."): row.tolist() for prefix, row in update.activations.items()}
    assert rows == {"layers.1.experts": [1, 2], "layers.3.experts": [3, 4]}


def test_momentum_does_not_move_an_expert_that_nobody_used() -> None:
    """Round 1 moves experts 0 and 1 by +1; in round 2 only expert 0 is used, and moves by 0.9 * 1 + 1."""
    config = ServerOptimizerConfig(name="fedavgm")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in pair(1, 0).items()}
    tensors: dict[str, Tensor] = zeros
    expected = torch.tensor([0.0, 0.0, 0.0])
    for counts, step in (([4, 4, 0], [1.0, 1.0, 0.0]), ([4, 0, 0], [1.9, 0.0, 0.0])):
        mean = {name: tensors[name] + 1 for name in zeros}
        update = Update("c0", mean, 1, 4, 1, {"layers.1.experts": torch.tensor(counts)})
        tensors = federated.stepped(config, Bundle(tensors, {}), mean, [update])
        expected = expected + torch.tensor(step)
        for name in zeros:
            torch.testing.assert_close(tensors[name], expected[:, None, None].expand_as(tensors[name]))
        assert all(name in zeros or name.startswith("optimizer.first.layers.") for name in tensors)


# What a client begins with -----------------------------------------------------------------------------------------


def loss(world: World, id_: str, top_k: int) -> float:
    """Mean response loss of the global model, as deployed at that K, on the whole shard of a client."""
    shard = world.material.shards[id_]
    batch = shard.collate(shard.examples)
    with world.method.deploy(world.state, world.model, Budget("any", top_k)), torch.inference_mode():
        total = load_task("generation").forward(world.model, batch).loss
    return float(total) / batch.targets


@pytest.mark.parametrize("method", ["a3smoe", "flame", "flexlora", "flora", "hetlora", "homolora"])
def test_a_client_of_the_largest_rank_begins_with_what_is_deployed(
    method: str, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Also with trained routers, late, coming back, and after an answer of its own that was lost on the way."""
    options = {"pruning": 1.0} if method == "hetlora" else {}
    world = World(
        tiny_model_folder, tiny_data,
        method={"name": method, **options}, adapter={"router": True}, training=WHOLE_SHARD,
    )  # fmt: skip
    large = next(id_ for id_, client in world.clients.items() if client.budget.rank == 4)
    others = [id_ for id_ in world.clients if id_ != large]
    seen = []

    def check(answer: Payload, before: float) -> None:
        assert answer.content.meta["stats"]["loss_first"] == pytest.approx(before, rel=1e-5)
        seen.append(before)

    for round, cohort in ((1, (large,)), (2, others[:2]), (3, (large, others[2])), (4, (large,))):
        if large in cohort:
            top_k = world.method.dispatch(world.state, world.clients[large], round).content.meta["top_k"]
            before = loss(world, large, top_k)
            check(world.fit(round, large), before)
            if method == "flame":  # it goes on with its own rescaler, and what was lost would be a step ahead
                world.memories.pop(large)
            uploads = world.play(round, *cohort)
            check(next(answer for answer in uploads if answer.client == large), before)
        else:
            world.play(round, *cohort)
    assert len({f"{value:.4f}" for value in seen}) == 3, "nothing was learned, so nothing was tested"


def test_floras_fresh_adapters_are_drawn_anew_for_every_client_and_round(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    """At a learning rate of 1e-9 an upload's A is what was drawn, up to that much, and B nearly zero."""
    world = World(tiny_model_folder, tiny_data, method={"name": "flora"}, training={"learning_rate": 1e-9})
    name = "layers.1.self_attn.v_proj.lora_A"
    drawn = []
    for round in (1, 2):
        for answer in world.play(round, *world.clients):
            assert all(float(t.abs().max()) < 1e-6 for n, t in answer.content.tensors.items() if n.endswith("lora_B"))
            drawn.append(answer.content.tensors[name][:2])
            assert float(drawn[-1].abs().max()) <= 1 / 32**0.5 + 1e-6
    distances = [float((one - other).abs().max()) for i, one in enumerate(drawn) for other in drawn[:i]]
    assert len(distances) == 8 * 7 // 2
    assert min(distances) > 1e-2


# HetLoRA -----------------------------------------------------------------------------------------------------------


def hetlora(model: Path, data: Path, **options: Any) -> World:
    """Its B are no zeros, so that tails have a product from the first round on."""
    world = World(model, data, method={"name": "hetlora", **options}, training={"learning_rate": 1e-3})
    generator = torch.Generator().manual_seed(0)
    for name, tensor in world.state.tensors.items():
        if name.endswith(".lora_B"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return world


def test_hetlora_holds_clients_to_the_share_gamma_but_not_below_the_lowest_tier(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Ranks 2, 3 and 4, lowest 2: gamma 0.8 keeps floor(1.6), floor(2.4), floor(3.2); gamma 0.3 none above 1."""
    for gamma, expected in ((0.8, {2: 2, 3: 2, 4: 3}), (0.3, {2: 2, 3: 2, 4: 2}), (1.0, {2: 2, 3: 3, 4: 4})):
        world = World(tiny_model_folder, tiny_data, method={"name": "hetlora", "pruning": gamma})
        sent = [world.method.dispatch(world.state, client, 1) for client in world.clients.values()]
        ranks = [client.budget.rank for client in world.clients.values()]
        assert {rank: d.content.meta["kept"] for rank, d in zip(ranks, sent, strict=True)} == expected


def test_what_hetlora_prunes_leaves_the_other_components_their_share(tiny_model_folder: Path, tiny_data: Path) -> None:
    """alpha / r is twice as large at rank 2 as at 4: the kept components must add to the weights what they did."""
    world = hetlora(tiny_model_folder, tiny_data, pruning=0.5, regularisation=1e3)
    client = next(client for client in world.clients.values() if client.budget.rank == 4)
    download, shard = world.method.dispatch(world.state, client, 1), world.material.shards[client.id]
    whole = federated_lora.train(
        world.method.trainer, world.model, download.content.tensors, ALPHA, "native", "none", download, shard,
        Seeds(0).at(round=1, client=client.id), TailPenalty(2, 1e3),
    ).tensors  # fmt: skip
    pruned = world.fit(1, client.id).content.tensors
    paths = [name.removesuffix(".lora_A") for name in pruned if name.endswith(".lora_A")]
    assert {pruned[f"{path}.lora_A"].shape[-2] for path in paths} == {2}
    for path, found in effect(pruned, ALPHA).items():
        a, b = (whole[f"{path}.lora_{factor}"].double() for factor in "AB")
        torch.testing.assert_close(found, ALPHA / 4 * b[..., :2] @ a[..., :2, :], rtol=1e-5, atol=1e-8)


def test_hetloras_regulariser_makes_the_tail_smaller(tiny_model_folder: Path, tiny_data: Path) -> None:
    tails = []
    for strength in (0.0, 1e3):
        world = hetlora(tiny_model_folder, tiny_data, pruning=0.5, regularisation=strength)
        client = next(client for client in world.clients.values() if client.budget.rank == 4)
        kept = world.method.dispatch(world.state, client, 1).content.meta["kept"]
        answer = federated.adapter_of(world.fit(1, client.id).content.tensors)
        tails.append(tail_product(answer, kept))  # 0 if it was pruned
    assert tails[1] < 0.9 * tails[0]


def test_hetlora_remembers_the_ranks_of_clients_that_sit_a_round_out(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = hetlora(tiny_model_folder, tiny_data, pruning=0.5, regularisation=1e3)
    large = next(id_ for id_, client in world.clients.items() if client.budget.rank == 4)
    other = next(id_ for id_ in world.clients if id_ != large)
    world.play(1, large)
    world.play(2, other)
    again = world.method.dispatch(world.state, world.clients[large], 3).content.tensors
    assert {tensor.shape[-2] for name, tensor in again.items() if name.endswith(".lora_A")} == {2}
