"""Neurons divided into experts: nothing lost, and clusters that are balanced and tight."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emberfed.errors import ConfigError
from emberfed.models import ffn_split


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(rows_FD: torch.Tensor, groups_EC: torch.Tensor) -> float:
    """The sum of squared distances to the mean of the own group, by definition."""
    return sum(
        float((rows_FD[neuron] - rows_FD[group].mean(dim=0)).square().sum()) for group in groups_EC for neuron in group
    )


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 99), st.sampled_from(["random", "clustered"]))
def test_every_neuron_is_in_exactly_one_expert(experts: int, size: int, seed: int, method: str) -> None:
    if method == "random":
        groups = ffn_split.random_groups(experts * size, experts, generator(seed))
    else:
        rows = torch.randn(experts * size, 3, generator=generator(seed)).round()  # rounded: with equal rows among them
        groups = ffn_split.clustered_groups(rows, experts, generator(seed))
    assert groups.shape == (experts, size)
    assert sorted(groups.flatten().tolist()) == list(range(experts * size))
    assert all(group == sorted(group) for group in groups.tolist())


@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 99))
def test_the_outputs_of_split_experts_add_up_to_the_dense_output(experts: int, size: int, seed: int) -> None:
    draw = generator(seed)
    gate, up = torch.randn(2, experts * size, 5, generator=draw)
    down, x = torch.randn(5, experts * size, generator=draw), torch.randn(7, 5, generator=draw)
    gate_up, downs = ffn_split.split_ffn(gate, up, down, ffn_split.random_groups(experts * size, experts, draw))
    assert gate_up.shape == (experts, 2 * size, 5)
    assert downs.shape == (experts, 5, size)
    total = torch.zeros(7, 5)
    for expert in range(experts):
        gates, ups = (x @ gate_up[expert].T).chunk(2, dim=1)
        total += (torch.nn.functional.silu(gates) * ups) @ downs[expert].T
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_copies_are_the_whole_ffn() -> None:
    (gate, up), down = torch.randn(2, 4, 3, generator=generator(0)), torch.randn(3, 4, generator=generator(1))
    gate_up, downs = ffn_split.copy_ffn(gate, up, down, 3)
    assert gate_up.shape == (3, 8, 3)
    assert downs.shape == (3, 3, 4)
    for expert in range(3):
        assert torch.equal(gate_up[expert], torch.cat([gate, up]))
        assert torch.equal(downs[expert], down)


@pytest.mark.parametrize("experts", [0, 1, 7, 65])
def test_a_division_that_does_not_come_out_says_what_does(experts: int) -> None:
    with pytest.raises(ConfigError, match=rf"64 neurons .* into {experts} .*may be 2, 4, 8, 16, 32, 64$"):
        ffn_split.neurons_per_expert(64, experts)


# --- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 5, 16, 64])
@pytest.mark.parametrize("seed", range(5))
def test_well_separated_centres_are_found_exactly(experts: int, seed: int) -> None:
    draw = generator(seed)
    centres = torch.randn(experts, 24, generator=draw)
    belongs = torch.randperm(experts * 16, generator=draw) % experts
    rows = centres[belongs] + torch.randn(experts * 16, 24, generator=draw) * 0.3
    groups = ffn_split.clustered_groups(rows, experts, draw)
    assert all(len(set(belongs[group].tolist())) == 1 for group in groups)


@given(st.integers(0, 99))
def test_clusters_are_tighter_than_random_groups(seed: int) -> None:
    draw = generator(seed)
    centres = torch.randn(4, 6, generator=draw)
    rows = centres[torch.randint(4, (32,), generator=draw)] + torch.randn(32, 6, generator=draw) * 0.5  # not balanced
    clustered = ffn_split.clustered_groups(rows, 4, draw)
    assert spread(rows, clustered) < spread(rows, ffn_split.random_groups(32, 4, draw))


@given(st.integers(0, 99), st.integers(2, 4), st.integers(2, 5))
def test_no_exchange_of_two_neurons_brings_them_nearer_to_the_means(seed: int, experts: int, size: int) -> None:
    rows = torch.randn(experts * size, 4, generator=generator(seed))
    groups = ffn_split.clustered_groups(rows, experts, generator(seed))
    means = ffn_split.group_means(rows, groups)
    for one, other in permutations(range(experts), 2):
        for a in groups[one]:
            for b in groups[other]:
                now = (rows[a] - means[one]).square().sum() + (rows[b] - means[other]).square().sum()
                then = (rows[a] - means[other]).square().sum() + (rows[b] - means[one]).square().sum()
                assert now <= then + 1e-4


def test_clusters_of_equal_rows() -> None:
    groups = ffn_split.clustered_groups(torch.ones(12, 3), 4, generator(0))
    assert sorted(groups.flatten().tolist()) == list(range(12))


def test_clusters_of_half_precision_rows() -> None:
    rows = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.1], [0.1, 5.0]], dtype=torch.bfloat16)
    groups = ffn_split.clustered_groups(rows, 2, generator(0))
    assert sorted(groups.tolist()) == [[0, 2], [1, 3]]


def test_the_clusters_router_sends_a_gate_row_to_its_own_cluster() -> None:
    rows = torch.tensor([[9.0, 0.0, 0.0], [7.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 4.0, 0.0]])
    centroids = ffn_split.group_means(rows, torch.tensor([[0, 1], [2, 3]]))
    assert centroids.tolist() == [[8.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
    router = ffn_split.centroid_router(centroids, 0.5)
    torch.testing.assert_close(router, torch.eye(3)[:2] * 0.5 * 3**0.5)
    assert (rows @ router.T).argmax(dim=1).tolist() == [0, 0, 1, 1]
