"""Router weights against the definition, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emberfed.models.gating import Gate, Rescale, gate_weights

NATIVE = 4


def oracle(logits: list[float], top_k: int, gate: Gate, rescale: Rescale) -> dict[int, float]:
    """The weight of each kept expert of one token, in plain Python."""
    order = sorted(range(len(logits)), key=lambda expert: -logits[expert])
    odds = [math.exp(value - max(logits)) for value in logits]
    kept, native = order[:top_k], order[:NATIVE]
    if gate == "renormalised":
        return {expert: odds[expert] / sum(odds[other] for other in kept) for expert in kept}
    mass = sum(odds[expert] for expert in native) / sum(odds[expert] for expert in kept)
    factor = {"none": 1.0, "static": NATIVE / top_k, "mass": mass}[rescale]
    return {expert: factor * odds[expert] / sum(odds) for expert in kept}


CASES: list[tuple[Gate, Rescale]] = [
    ("plain", "none"),
    ("plain", "static"),
    ("plain", "mass"),
    ("renormalised", "none"),
]


@pytest.mark.parametrize(("gate", "rescale"), CASES)
@pytest.mark.parametrize("top_k", [1, 3, 4, 6])
def test_weights_are_the_definition(gate: Gate, rescale: Rescale, top_k: int) -> None:
    logits = 2 * torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    weights, index = gate_weights(logits, top_k, gate, rescale, NATIVE)
    assert weights.shape == index.shape == (7, top_k)
    for token in range(7):
        expected = oracle(logits[token].tolist(), top_k, gate, rescale)
        found = dict(zip(index[token].tolist(), weights[token].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


def test_by_hand() -> None:
    # Probabilities 1/2, 1/4, 1/8, 1/8.
    logits = torch.tensor([[2.0, 4.0, 1.0, 1.0]]).log()
    assert gate_weights(logits, 2, "plain")[0].tolist() == [pytest.approx([1 / 2, 1 / 4])]
    assert gate_weights(logits, 2, "renormalised")[0].tolist() == [pytest.approx([2 / 3, 1 / 3])]
    assert gate_weights(logits, 1, "plain", "static", 2)[0].tolist() == [pytest.approx([1.0])]
    assert gate_weights(logits, 1, "plain", "mass", 2)[0].tolist() == [pytest.approx([3 / 4])]
    assert gate_weights(logits, 2, "plain")[1].tolist() == [[1, 0]]


@given(
    st.lists(st.floats(-50, 50), min_size=8, max_size=8),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_renormalised_mass_is_one(row: list[float], top_k: int, dtype: torch.dtype) -> None:
    weights, index = gate_weights(torch.tensor([row], dtype=dtype), top_k, "renormalised")
    assert weights.dtype == torch.float32
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert len(set(index[0].tolist())) == top_k


@given(st.lists(st.floats(-5, 5), min_size=8, max_size=8), st.integers(1, NATIVE))
def test_mass_rescaling_gives_back_the_native_mass(row: list[float], top_k: int) -> None:
    logits = torch.tensor([row])
    native = gate_weights(logits, NATIVE, "plain")[0].sum().item()
    assert gate_weights(logits, top_k, "plain", "mass", NATIVE)[0].sum().item() == pytest.approx(native, rel=1e-5)


def test_rescaling_needs_the_native_top_k() -> None:
    with pytest.raises(ValueError, match="native_top_k"):
        gate_weights(torch.zeros(1, 4), 1, "plain", "mass")
