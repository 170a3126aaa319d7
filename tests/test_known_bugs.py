"""Bugs of public code of these methods: each test computes by hand what is right, and shows what the bug gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_methods import World
from torch import Tensor

import emberfed
from emberfed import federated_lora
from emberfed.aggregation import Update
from emberfed.clients import Client
from emberfed.errors import AggregationError
from emberfed.penalties import TailPenalty
from emberfed.seeds import Seeds

PATH = "model.layers.0.self_attn.q_proj"
Factors = tuple[Tensor, Tensor]


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values))


def aggregated(*clients: Factors, examples: tuple[int, ...], **options: Any) -> Factors:
    """What `emberfed.aggregate` makes of one LoRA (A, B) of each client."""
    updates = [
        Update(f"c{number}", {f"{PATH}.lora_A": a, f"{PATH}.lora_B": b}, n)
        for number, ((a, b), n) in enumerate(zip(clients, examples, strict=True))
    ]
    tensors = emberfed.aggregate(updates, **options)
    return tensors[f"{PATH}.lora_A"], tensors[f"{PATH}.lora_B"]


def effect(factors: Factors) -> Tensor:
    """1 / R * B A: what a LoRA adds to a weight, in units of alpha."""
    a, b = factors
    return b @ a / a.shape[0]


def test_fedit_averages_all_clients_not_the_first_alone() -> None:
    """FedIT as a branch of FLoRA's code: the loop over clients keeps what the first one set.

    A is 1 and 5, B is 2 and 6, from 1 and 3 examples: A = 1/4 * 1 + 3/4 * 5 = 4, B = 1/4 * 2 + 3/4 * 6 = 5.
    The bug gives 1/4 * 1 and 1/4 * 2.
    """
    clients = [(matrix([1.0]), matrix([2.0])), (matrix([5.0]), matrix([6.0]))]

    def buggy(number: int) -> float:
        mean: dict[str, float] = {}
        for client, share in zip(clients, (0.25, 0.75), strict=True):
            if "weight" not in mean:  # a sum that is started, and never added to
                mean["weight"] = share * float(client[number])
        return mean["weight"]

    a, b = aggregated(*clients, examples=(1, 3), method="homolora")
    assert (float(a), float(b)) == (4.0, 5.0)
    assert (buggy(0), buggy(1)) == (0.25, 0.5)


def test_flexlora_keeps_its_singular_values() -> None:
    """A re-implementation of FlexLoRA returns U and Vᵀ, or gives only one of them the root of S.

    One client of rank 2: A = 1, B = diag(6, 2), so Delta W = 1/2 * B A = diag(3, 1), whose singular values are 3 and 1.
    Without S the product is diag(1, 1); with its root in one factor alone diag(sqrt(3), 1).
    """
    client = (torch.eye(2), diagonal(6.0, 2.0))
    expected = diagonal(3.0, 1.0)

    def buggy(power: float) -> Tensor:
        u, s, vh = torch.linalg.svd(effect(client))
        product: Tensor = u * s**power @ vh
        return product

    found = aggregated(client, examples=(1,), method="flexlora")
    torch.testing.assert_close(effect(found), expected)
    torch.testing.assert_close(buggy(1.0), expected)
    for power, wrong in ((0.0, torch.eye(2)), (0.5, diagonal(3.0**0.5, 1.0))):
        torch.testing.assert_close(buggy(power), wrong)
        assert not torch.allclose(wrong, expected)


TWO_RANKS = [(matrix([1.0, 0.0]), matrix([1.0], [0.0])), (torch.eye(2), torch.eye(2))]
"""B A is diag(1, 0) of rank 1, whose alpha / r is alpha, and diag(1, 1) of rank 2, with alpha / 2."""


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_products_are_averaged_with_each_ranks_alpha_over_r(method: str) -> None:
    """Three code bases average B A of different ranks and apply one alpha / r afterwards.

    Equal shares: 1/2 * diag(1, 0) + 1/2 * 1/2 * diag(1, 1) = diag(3/4, 1/4), times alpha.
    The bug gives 1/2 * (1/2 * diag(1, 0) + 1/2 * diag(1, 1)) = diag(1/2, 1/4) with the largest rank's scale.
    """
    expected = diagonal(0.75, 0.25)

    def buggy() -> Tensor:
        return sum((0.5 * (b @ a) for a, b in TWO_RANKS), torch.zeros(2, 2)) / 2

    found = aggregated(*TWO_RANKS, examples=(5, 5), method=method)
    torch.testing.assert_close(effect(found), expected)
    torch.testing.assert_close(buggy(), diagonal(0.5, 0.25))


def test_padded_factors_are_averaged_with_each_ranks_alpha_over_r() -> None:
    """HetLoRA pads rank 1 to rank 2, where alpha / r is half: B of the first client counts twice to stay what it was.

    A = [1/2 * (1, 0) + 1/2 * (1, 0); 1/2 * (0, 1)], B's columns are 1/2 * 2 * (1, 0) + 1/2 * (1, 0) and 1/2 * (0, 1):
    1/2 * B A = diag(3/4, 1/8). Padding with zeros alone, the bug, gives diag(1/2, 1/8).
    """

    def buggy() -> Tensor:
        a, b = torch.zeros(2, 2), torch.zeros(2, 2)
        for one_a, one_b in TWO_RANKS:
            a[: one_a.shape[0]] += 0.5 * one_a
            b[:, : one_a.shape[0]] += 0.5 * one_b
        return b @ a / 2

    found = aggregated(*TWO_RANKS, examples=(5, 5), method="hetlora", weighting="data")
    assert torch.equal(found[0], diagonal(1.0, 0.5))
    assert torch.equal(found[1], diagonal(1.5, 0.5))
    assert torch.equal(effect(found), diagonal(0.75, 0.125))
    assert torch.equal(buggy(), diagonal(0.5, 0.125))


def test_flora_tells_factors_by_name_where_the_hidden_size_is_the_rank() -> None:
    """FLoRA's code stacks a factor along the dimension that equals the rank, the first one if both do.

    Two clients of rank 2 in a weight of 2 x 2, equal shares. With A = [[1, 2], [0, 1]], B = [[1, 0], [3, 1]]:
    B A = [[1, 2], [3, 7]]; the second client has 1 and 1: B A = diag(1, 1).
    Delta W = 1/2 * 1/2 * ([[1, 2], [3, 7]] + diag(1, 1)) = [[1/2, 1/2], [3/4, 2]].
    The bug stacks B on B as if it were A: 4 x 2 where 2 x 4 is right, and A's transpose does not help.
    """
    clients = [(matrix([1.0, 2.0], [0.0, 1.0]), matrix([1.0, 0.0], [3.0, 1.0])), (torch.eye(2), torch.eye(2))]
    expected = matrix([0.5, 0.5], [0.75, 2.0])

    def buggy(tensors: list[Tensor], rank: int) -> Tensor:
        along = next(place for place, size in enumerate(tensors[0].shape) if size == rank)
        return torch.cat(tensors, dim=along)

    a, b = aggregated(*clients, examples=(1, 1), method="flora")
    assert torch.equal(effect((a, b)), expected)
    assert (a.shape, b.shape) == ((4, 2), (2, 4))
    wrong = buggy([client[1] for client in clients], 2)
    assert wrong.shape == (4, 2)
    assert not torch.allclose(wrong.T @ buggy([client[0] for client in clients], 2) / 4, expected)


def test_flexlora_tells_factors_by_name_where_the_hidden_size_is_the_rank() -> None:
    """Of two square factors, the one found first is taken for A: by sorted shape, order of arrival, anything but name.

    B A = [[1, 2], [3, 7]], halved for the rank; A B would be [[7, 2], [3, 1]], halved.
    """
    a, b = matrix([1.0, 2.0], [0.0, 1.0]), matrix([1.0, 0.0], [3.0, 1.0])

    def buggy(tensors: dict[str, Tensor], rank: int) -> Tensor:
        first = next(tensor for tensor in tensors.values() if tensor.shape[0] == rank)
        second = next(tensor for tensor in tensors.values() if tensor is not first)
        return second @ first / rank

    for method in ("flexlora", "flora", "hetlora", "homolora"):
        update = Update("c0", {f"{PATH}.lora_B": b, f"{PATH}.lora_A": a}, 1)
        found = emberfed.aggregate([update], method=method)
        product = effect((found[f"{PATH}.lora_A"], found[f"{PATH}.lora_B"]))
        torch.testing.assert_close(product, matrix([0.5, 1.0], [1.5, 3.5]))
    assert torch.equal(buggy({"lora_B": b, "lora_A": a}, 2), matrix([3.5, 1.0], [1.5, 0.5]))


def test_hetlora_weighs_by_the_norms_of_the_products() -> None:
    """A public HetLoRA averages plainly, another by data size.

    A is 1 and 1, B is 3 and 1: norms 3 and 1, weights 3/4 and 1/4, so A = 1 and B = 3/4 * 3 + 1/4 * 1 = 5/2.
    Plainly B = 2; by 1 and 3 examples B = 1/4 * 3 + 3/4 * 1 = 3/2.
    """
    clients = [(matrix([1.0]), matrix([3.0])), (matrix([1.0]), matrix([1.0]))]

    def buggy(shares: tuple[float, float]) -> float:
        return sum(share * float(b) for share, (_, b) in zip(shares, clients, strict=True))

    a, b = aggregated(*clients, examples=(1, 3), method="hetlora")
    assert (float(a), float(b)) == (1.0, 2.5)
    assert (buggy((0.5, 0.5)), buggy((0.25, 0.75))) == (2.0, 1.5)


def test_hetlora_weighs_ranks_by_what_they_add_to_the_weight() -> None:
    """Norms of B A without 1 / r would favour large ranks.

    Rank 1: B A = diag(1, 0), norm 1. Rank 2: 1/2 * diag(1, 1), norm 1 / sqrt(2); the bug has sqrt(2).
    The first weighs w = 1 / (1 + 1/sqrt(2)) = 0.5858, in the bug 1 / (1 + sqrt(2)) = 0.4142.
    B[0, 0] = 2 w + (1 - w) = 1 + w, since B of rank 1 counts twice when padded to rank 2; A[1, 1] = 1 - w.
    """
    root = 2.0**0.5
    a, b = aggregated(*TWO_RANKS, examples=(5, 5), method="hetlora")
    right, wrong = 1 / (1 + 1 / root), 1 / (1 + root)
    assert float(b[0, 0]) == pytest.approx(1 + right, rel=1e-6)
    assert float(a[1, 1]) == pytest.approx(1 - right, rel=1e-6)
    assert abs(right - wrong) > 0.1


def test_hetlora_prunes_what_training_made_smaller(tiny_model_folder: Path, tiny_data: Path) -> None:
    """A public HetLoRA keeps every client's rank for ever.

    gamma = 1/2 and rank 4: a client is held to floor(1/2 * 4) = 2 components (the lowest tier's rank is 2 as well). The
    penalty of 1000 on the other two outweighs the loss, so their product shrinks and the client answers with rank 2.
    Without pruning, the same training answers with rank 4.
    """
    method = {"name": "hetlora", "pruning": 0.5, "regularisation": 1e3}
    world = World(tiny_model_folder, tiny_data, method=method, training={"learning_rate": 1e-3})
    generator = torch.Generator().manual_seed(0)
    for name, tensor in world.state.tensors.items():
        if name.endswith(".lora_B"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    client = next(client for client in world.clients.values() if client.budget.rank == 4)

    def rank_of(tensors: dict[str, Tensor]) -> set[int]:
        return {tensor.shape[-2] for name, tensor in tensors.items() if name.endswith(".lora_A")}

    def buggy(client: Client) -> dict[str, Tensor]:
        download = world.method.dispatch(world.state, client, 1)
        shard, seeds = world.material.shards[client.id], Seeds(0).at(round=1, client=client.id)
        upload = federated_lora.train(
            world.method.trainer, world.model, download.content.tensors, 4.0, "native", "none", download, shard, seeds,
            TailPenalty(2, 1e3),
        )  # fmt: skip
        return dict(upload.tensors)

    assert rank_of(dict(world.fit(1, client.id).content.tensors)) == {2}
    assert rank_of(buggy(client)) == {4}


def test_rank_1_is_not_broadcast_against_rank_4() -> None:
    """Plain averaging of dictionaries of tensors adds a row of A to each of four rows without a word.

    A of rank 1 is (10, 20), A of rank 4 has the rows (1, 1), (2, 2), (3, 3), (4, 4): the bug gives
    1/2 * (11, 21), 1/2 * (12, 22), 1/2 * (13, 23), 1/2 * (14, 24), of which none means anything.
    """
    one, four = matrix([10.0, 20.0]), matrix(*([float(row)] * 2 for row in range(1, 5)))

    def buggy() -> Tensor:
        return 0.5 * one + 0.5 * four

    assert torch.equal(buggy(), matrix([5.5, 10.5], [6.0, 11.0], [6.5, 11.5], [7.0, 12.0]))
    updates = [
        Update(
            client,
            {f"{PATH}.lora_A": a, f"{PATH}.lora_B": torch.ones(2, a.shape[0])},
            examples=1,
            tokens=8,
            top_k=1,
            activations={"model.layers.0.mlp.experts": torch.tensor([3, 5])},
        )
        for client, a in (("c0", four), ("c1", one))
    ]
    for method in ("homolora", "a3smoe", "flame"):
        with pytest.raises(AggregationError, match=rf"c1: '{PATH}\.lora_A' has shape \(1, 2\), c0 sent \(4, 2\)"):
            emberfed.aggregate(updates, method=method)
