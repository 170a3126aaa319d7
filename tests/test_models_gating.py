"""Router weights at another K against the definition, token by token: the gate's mass, and SparseMixer's picks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import tiny_family_lm, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.phimoe import modeling_phimoe

from emberfed.models.families.phimoe import sparsemixer
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.gating import mass_of, with_mass


def test_by_hand() -> None:
    weights = torch.tensor([[1 / 2, 1 / 4], [1 / 8, 1 / 8]])
    assert mass_of(weights).tolist() == [[3 / 4], [1 / 4]]
    torch.testing.assert_close(with_mass(weights, 1.0), torch.tensor([[2 / 3, 1 / 3], [1 / 2, 1 / 2]]))
    torch.testing.assert_close(with_mass(weights, 2.5).sum(-1), torch.tensor([2.5, 2.5]))
    own = torch.tensor([[3.0], [1.0]])
    torch.testing.assert_close(with_mass(weights, own), torch.tensor([[2.0, 1.0], [1 / 2, 1 / 2]]))


@given(st.lists(st.floats(-30, 30), min_size=8, max_size=8), st.integers(1, 8))
def test_mass_one_of_a_softmax_router_is_the_softmax_over_the_kept_logits(row: list[float], top_k: int) -> None:
    kept = sorted(row, reverse=True)[:top_k]
    odds = [math.exp(value - kept[0]) for value in kept]
    expected = [odd / sum(odds) for odd in odds]
    probabilities = torch.softmax(torch.tensor([row]), dim=-1).topk(top_k).values
    assert with_mass(probabilities, 1.0)[0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.floats(0.1, 10),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_mass_is_what_was_asked_or_nothing(row: list[float], mass: float, dtype: torch.dtype) -> None:
    weights = torch.tensor([row], dtype=dtype)
    found = with_mass(weights, mass)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    if mass_of(weights).item() > 1e-30:
        assert found.sum().item() == pytest.approx(mass, rel=1e-5)
    if not weights.any():
        assert not found.any()


def test_gradients_are_those_of_the_softmax_over_the_kept_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 8, generator=generator, requires_grad=True)
    direction = torch.randn(5, 3, generator=generator)
    probabilities, index = torch.softmax(logits, dim=-1).topk(3)
    (found,) = torch.autograd.grad((with_mass(probabilities, 1.0) * direction).sum(), logits)
    (expected,) = torch.autograd.grad((torch.softmax(logits.gather(-1, index), dim=-1) * direction).sum(), logits)
    torch.testing.assert_close(found, expected)


def mixed(row: list[float], top_k: int, jitter: float) -> list[tuple[int, float]]:
    """SparseMixer's picks for one token, in plain Python: (expert, weight)."""
    left, picks = dict(enumerate(row)), []
    for _ in range(top_k):
        best = max(left.values())
        pick = min(expert for expert in left if left[expert] == best)
        near = [value for value in left.values() if (best - value) / (max(abs(value), best) or 1) <= 2 * jitter]
        picks.append((pick, 1 / sum(math.exp(value - best) for value in near)))
        del left[pick]
    return picks


@given(
    st.lists(st.lists(st.integers(-60, 60), min_size=6, max_size=6, unique=True), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from([0.01, 0.1, 0.3]),
)
@settings(max_examples=60)
def test_sparsemixer_is_the_definition_and_transformers_own_at_two(
    rows: list[list[int]], top_k: int, jitter: float
) -> None:
    scores = torch.tensor(rows, dtype=torch.float32) / 17
    router: Any = SimpleNamespace(router_jitter_noise=jitter)
    weights, index = sparsemixer(scores, top_k, router)
    for token, row in enumerate(scores.tolist()):
        expected = mixed(row, top_k, jitter)
        assert index[token].tolist() == [expert for expert, _ in expected]
        assert weights[token].tolist() == pytest.approx([weight for _, weight in expected], rel=1e-5)
    own_weights, own_index = modeling_phimoe.sparsemixer(scores, jitter_eps=jitter, training=False, top_k=2)
    two_weights, two_index = sparsemixer(scores, 2, router)
    assert torch.equal(own_weights, two_weights)
    assert torch.equal(own_index, two_index)


@pytest.mark.parametrize("top_k", [1, 3])
def test_phimoe_at_another_k_computes_the_mixers_picks(top_k: int) -> None:
    model = FoundationModel(tiny_family_lm("phimoe"))
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = model.blocks[0].experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.no_grad(), model.active_experts(top_k):
        model.lm(input_ids=token_ids(2, 6))
    hook.remove()
    hidden, index, weights = seen[0]
    router = model.blocks[0].router
    scores = (hidden @ router.get_parameter("weight").t()).tolist()
    for token, row in enumerate(scores):
        expected = mixed(row, top_k, router.router_jitter_noise)  # type: ignore[arg-type]
        assert index[token].tolist() == [expert for expert, _ in expected]
        assert weights[token].tolist() == pytest.approx([weight for _, weight in expected], rel=1e-4)


def test_even_a_tiny_mass_is_brought_to_the_wanted_one() -> None:
    found = with_mass(torch.tensor([[3e-20, 1e-20]]), 2.0)
    assert found[0].tolist() == pytest.approx([1.5, 0.5])
