"""LoRA on gate and up as one on the fused parameter, and apart again: against dense products, and as inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emberfed.models import fused_lora
from emberfed.models.fused_lora import GATE, UP, StackedLora

Parts = dict[str, StackedLora]
sizes = st.integers(1, 5)


def lora(experts: int, inner: int, rank: int, hidden: int, alpha: float, seed: int) -> StackedLora:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(experts, rank, hidden, generator=generator)
    return StackedLora(a, torch.randn(experts, inner, rank, generator=generator), alpha)


def delta(part: StackedLora) -> torch.Tensor:
    """What LoRA adds to the weights, (E, out, in), in float64."""
    return part.alpha / part.rank * part.b.double() @ part.a.double()


def fused_delta(parts: Parts) -> torch.Tensor:
    """The same for gate_up_proj, from the parts."""
    (any_part,) = list(parts.values())[:1]
    nothing = torch.zeros_like(delta(any_part))
    return torch.cat([delta(parts[matrix]) if matrix in parts else nothing for matrix in (GATE, UP)], 1)


@st.composite
def some_parts(draw: st.DrawFn) -> Parts:
    experts, inner, hidden, seed = draw(sizes), draw(sizes), draw(sizes), draw(st.integers(0, 9))
    chosen = draw(st.sampled_from([(GATE,), (UP,), (GATE, UP)]))
    alpha = draw(st.sampled_from([1.0, 7.0, 16.0]))
    return {
        matrix: lora(experts, inner, draw(sizes), hidden, alpha, 2 * seed + index)
        for index, matrix in enumerate(chosen)
    }


@given(some_parts())
def test_fused_adds_what_the_parts_add(parts: Parts) -> None:
    torch.testing.assert_close(delta(fused_lora.fuse(parts)), fused_delta(parts), rtol=1e-5, atol=1e-5)


@given(some_parts())
def test_unfuse_is_the_inverse(parts: Parts) -> None:
    found = fused_lora.unfuse(fused_lora.fuse(parts))
    assert list(found) == list(parts)
    for matrix, part in parts.items():
        assert torch.equal(found[matrix].a, part.a)
        assert found[matrix].b.shape == part.b.shape
        torch.testing.assert_close(delta(found[matrix]), delta(part), rtol=1e-5, atol=1e-5)
    if len({part.rank for part in parts.values()}) == 1:
        for matrix, part in parts.items():
            assert torch.equal(found[matrix].b, part.b)
            assert found[matrix].alpha == part.alpha


@given(sizes, sizes, sizes, sizes, st.integers(0, 9))
def test_one_that_mixes_is_both_with_the_whole_a(experts: int, inner: int, rank: int, hidden: int, seed: int) -> None:
    mixed = lora(experts, 2 * inner, rank, hidden, 3.0, seed)
    parts = fused_lora.unfuse(mixed)
    assert {matrix: part.rank for matrix, part in parts.items()} == {GATE: rank, UP: rank}
    torch.testing.assert_close(fused_delta(parts), delta(mixed))


@given(some_parts())
def test_alternating_and_flattening_have_inverses(parts: Parts) -> None:
    fused = fused_lora.fuse(parts)
    turned = fused_lora.alternating(fused.b)
    inner = fused.b.shape[1] // 2
    for row in range(inner):
        assert torch.equal(turned[:, 2 * row], fused.b[:, row])
        assert torch.equal(turned[:, 2 * row + 1], fused.b[:, inner + row])
    assert torch.equal(fused_lora.one_after_the_other(turned), fused.b)
    again = fused_lora.unflatten(*fused_lora.flatten(fused), fused.rank, fused.alpha)
    assert torch.equal(again.a, fused.a)
    assert torch.equal(again.b, fused.b)


def test_flat_layout_by_hand() -> None:
    part = lora(3, 4, 2, 5, 1.0, 0)
    a, b = fused_lora.flatten(part)
    for expert in range(3):
        for rank in range(2):
            assert torch.equal(a[expert * 2 + rank], part.a[expert, rank])
            assert torch.equal(b[:, rank * 3 + expert], part.b[expert, :, rank])


@pytest.mark.parametrize(
    ("gate", "up", "columns"),
    [
        ([1, 1, 0, 0], [0, 0, 1, 1], 2),
        ([1, 0, 0, 0], [0, 1, 1, 1], 1),
        ([0, 0, 0, 0], [0, 0, 0, 0], 2),
        ([1, 0, 0, 0], [0, 0, 0, 1], 2),
        ([1, 1, 1, 0], [0, 0, 0, 0], 4),
        ([0, 0, 0, 0], [1, 1, 1, 1], 0),
        ([1, 1, 1, 0], [0, 0, 1, 1], None),
        ([0, 0, 1, 1], [1, 1, 0, 0], None),
        ([0, 0, 0], [0, 0, 0], None),
        ([1, 1, 0], [0, 0, 1], 2),
    ],
)
def test_columns_of_gate(gate: list[int], up: list[int], columns: int | None) -> None:
    b_gate, b_up = (torch.tensor(row).float().expand(2, 3, -1).clone() for row in (gate, up))
    b_gate[0], b_up[1, 1:] = 0, 0  # one expert, or one row, is enough for a column to be used
    assert fused_lora.columns_of_gate(b_gate, b_up) == columns
