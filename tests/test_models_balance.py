"""Auxiliary losses and load statistics: against loops, by hand, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emberfed.errors import ConfigError
from emberfed.models.balance import (
    FLOOR,
    GateRecord,
    LoadStatistics,
    Regulariser,
    client_coefficient,
    divergence,
    load_shares,
    omega,
    switch_loss,
    z_loss,
)

LOADS = st.lists(st.integers(0, 50), min_size=2, max_size=6)


def gate(tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits and their K best."""
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits, logits.topk(top_k).indices


def slow_switch_loss(
    logits: torch.Tensor, index: torch.Tensor, real: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The definition, token by token."""
    experts, top_k = logits.shape[1], index.shape[1]
    chosen = [0] * experts
    probability = torch.zeros(experts, dtype=logits.dtype)
    tokens = int(real.sum())
    for token in range(len(logits)):
        if real[token]:
            probability = probability + torch.exp(logits[token]) / torch.exp(logits[token]).sum() / tokens
            for expert in index[token].tolist():
                chosen[expert] += 1
    terms = [chosen[m] / (top_k * tokens) * probability[m] * weights[m] for m in range(experts)]
    return experts * torch.stack(terms).sum()


@given(
    tokens=st.integers(2, 9), experts=st.integers(2, 6), data=st.data(), seed=st.integers(0, 1000), padded=st.booleans()
)
def test_the_switch_loss_and_its_gradient_are_the_definition(
    tokens: int, experts: int, data: st.DataObject, seed: int, padded: bool
) -> None:
    logits, index = gate(tokens, experts, data.draw(st.integers(1, experts)), seed)
    logits.requires_grad_()
    real = torch.ones(tokens, dtype=torch.bool)
    real[0] = not padded
    weights = torch.rand(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = switch_loss(logits, index, real if padded else None, weights)
    expected = slow_switch_loss(logits, index, real, weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(found, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    if padded:
        assert not gradient[0].any()


@given(experts=st.integers(1, 6), data=st.data(), seed=st.integers(0, 1000))
def test_at_uniform_load_it_is_1_for_every_k_whatever_the_probabilities(
    experts: int, data: st.DataObject, seed: int
) -> None:
    """Every token rotates the choice by one, so that each expert gets K of M tokens."""
    top_k = data.draw(st.integers(1, experts))
    logits = 3 * torch.randn(experts, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    index = torch.stack([(torch.arange(top_k) + token) % experts for token in range(experts)])
    assert switch_loss(logits, index).item() == pytest.approx(1, rel=1e-6)


@given(tokens=st.integers(1, 12), experts=st.integers(1, 6), data=st.data(), seed=st.integers(0, 1000))
def test_it_is_at_least_1_where_load_and_probability_go_together(
    tokens: int, experts: int, data: st.DataObject, seed: int
) -> None:
    """Chebyshev's inequality: sums of products of two equally ordered sequences are at least M times their means'."""
    top_k = data.draw(st.integers(1, experts))
    logits, index = gate(1, experts, top_k, seed)
    assert switch_loss(logits.repeat(tokens, 1), index.repeat(tokens, 1)).item() >= 1 - 1e-6


def test_an_unsure_gate_can_bring_it_below_1() -> None:
    """Two tokens choose expert 0 narrowly, one chooses expert 1 and nearly as much 2; so it is not a lower bound.

    F = (2/3, 1/3, 0); P = (0.4 + 0.4 + 0, 0.3 + 0.3 + 0.5, 0.3 + 0.3 + 0.5) / 3;
    3 * (2/3 * 0.8/3 + 1/3 * 1.1/3) = 0.9.
    """
    logits = torch.tensor([[0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [1e-12, 0.5, 0.5]], dtype=torch.float64).log()
    assert switch_loss(logits, torch.tensor([[0], [0], [1]])).item() == pytest.approx(0.9, rel=1e-6)


def test_without_real_tokens_losses_are_zero() -> None:
    logits, index = gate(3, 4, 2)
    none = torch.zeros(3, dtype=torch.bool)
    assert switch_loss(logits, index, none).item() == 0
    assert z_loss(logits, none).item() == 0
    assert load_shares(index, 4, none).tolist() == [0, 0, 0, 0]


def test_the_z_loss_is_the_mean_square_of_the_log_partition_function() -> None:
    """ln(1 + 3) = ln 4 and ln(2 + 6) = ln 8, so the mean of squares is (4 + 9) / 2 * (ln 2)^2; the third is padding."""
    logits = torch.tensor([[1.0, 3.0], [2.0, 6.0], [5.0, 5.0]]).log()
    found = z_loss(logits, torch.tensor([True, True, False]))
    assert found.item() == pytest.approx(6.5 * math.log(2) ** 2, rel=1e-6)


@given(load=LOADS)
def test_omega_is_proportional_to_the_load_with_mean_1(load: list[int]) -> None:
    weights = omega(torch.tensor(load))
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)
    expected = [len(load) * part / sum(load) for part in load] if any(load) else [1.0] * len(load)
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_omega_is_by_layer() -> None:
    assert omega(torch.tensor([[2, 0], [0, 0]])).tolist() == [[2, 0], [1, 1]]


def test_weights_push_away_from_experts_that_all_clients_use() -> None:
    """At equal logits the gradient of the loss is larger, the more the federation used an expert a client uses too."""
    logits = torch.zeros(4, 4, requires_grad=True)
    index = torch.tensor([[0], [1], [2], [3]])
    (gradient,) = torch.autograd.grad(switch_loss(logits, index, None, omega(torch.tensor([8, 4, 2, 2]))), logits)
    by_expert = gradient.sum(0)
    assert by_expert[0] > by_expert[1] > by_expert[2]
    assert by_expert[2].item() == pytest.approx(by_expert[3].item())


@given(pairs=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=6))
def test_divergence_is_not_negative_and_bounded(pairs: list[tuple[int, int]]) -> None:
    client, whole = (torch.tensor(load) for load in zip(*pairs, strict=True))
    found = divergence(client, whole)
    assert -1e-12 <= found <= math.log(1 + 1 / FLOOR)
    assert divergence(client, 3 * client) == pytest.approx(0, abs=1e-12)


def test_divergence_is_in_nats_and_the_mean_over_layers() -> None:
    """Shares (1, 0) against (1/2, 1/2), with floor f: p = (1 + f, f) / (1 + 2f), q = 1/2 each; near ln 2 for small f.

    The second layer is equal, the third unknown to the client: both count 0, so a third remains.
    """
    p = (1 + FLOOR) / (1 + 2 * FLOOR)
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert expected == pytest.approx(math.log(2), abs=0.01)
    client, whole = torch.tensor([[4, 0], [1, 1], [0, 0]]), torch.tensor([[6, 6], [5, 5], [1, 9]])
    assert divergence(client, whole) == pytest.approx(expected / 3)
    assert client_coefficient(0.02, client, whole) == pytest.approx(0.02 * (1 + expected / 3))
    with pytest.raises(ValueError, match="one shape"):
        divergence(client, whole[:2])


def test_load_statistics_by_hand() -> None:
    """Loads 4, 0: mean 2, deviation 2, variation 1, one dead. Loads 3, 3: variation 0. The mean is 0.5."""
    assert LoadStatistics.of(torch.tensor([[4, 0], [3, 3]])) == LoadStatistics(0.5, 1)
    one = LoadStatistics.of(torch.tensor([[9, 0, 0, 0, 0]]))
    assert one.coefficient_of_variation == pytest.approx(2), "sqrt(M - 1)"
    assert one.dead_experts == 4
    with pytest.raises(ValueError, match="some load"):
        LoadStatistics.of(torch.tensor([[1, 1], [0, 0]]))


def test_a_regulariser_weighs_and_averages_over_layers() -> None:
    records = [GateRecord(*gate(5, 3, 2, seed), None) for seed in (1, 2)]
    weights = torch.tensor([[1.5, 1.0, 0.5], [0.0, 1.0, 2.0]])
    both = Regulariser("heterogeneity", 0.3, weights, 0.1)
    expected = sum(
        0.3 * switch_loss(record.logits_TM, record.index_TK, None, weights[row]) + 0.1 * z_loss(record.logits_TM)
        for row, record in enumerate(records)
    )
    torch.testing.assert_close(both.loss(records), torch.as_tensor(expected) / 2)
    plain = Regulariser("switch", 0.3).loss(records)
    ones = Regulariser("heterogeneity", 0.3, torch.ones(2, 3)).loss(records)
    torch.testing.assert_close(plain, ones)
    only_z = Regulariser(z_coefficient=0.1)
    assert only_z.is_active
    torch.testing.assert_close(
        only_z.loss(records), 0.05 * (z_loss(records[0].logits_TM) + z_loss(records[1].logits_TM))
    )
    assert not Regulariser().is_active
    assert not Regulariser("switch").is_active


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "switch", "coefficient": -1.0}, "must not be negative"),
        ({"z_coefficient": -1.0}, "must not be negative"),
        ({"coefficient": 0.1}, "auxiliary loss is none"),
        ({"kind": "heterogeneity", "coefficient": 0.1}, "'heterogeneity'"),
        ({"kind": "switch", "coefficient": 0.1, "omega_LM": torch.ones(1, 2)}, "no other"),
    ],
)
def test_regularisers_that_contradict_themselves_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Regulariser(**options)  # type: ignore[arg-type]
