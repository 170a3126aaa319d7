"""Penalties' gradients against autograd's of the written-out terms, and against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from emberfed.models.groups import ExpertViews, Gradient, TrainableGroups
from emberfed.models.lora import is_expert
from emberfed.models.low_rank import sparse_over_experts
from emberfed.penalties import Penalty, ProximalPenalty, TailPenalty, tail_product

EXPERTS, RANK, USED = 5, 4, (0, 2, 3)
Term = Callable[[Mapping[str, Tensor]], Tensor]
"""A penalty written out: from the adapter to a number."""


def adapter(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "layers.0.experts.up_proj.lora_A": (EXPERTS, RANK, 6),
        "layers.0.experts.up_proj.lora_B": (EXPERTS, 7, RANK),
        "layers.0.router.rescaler": (1,),
        "layers.0.router.weight": (EXPERTS, 6),
        "layers.0.self_attn.q_proj.lora_A": (RANK, 6),
        "layers.0.self_attn.q_proj.lora_B": (6, RANK),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def gradients_of(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[Gradient]:
    """What training would hand to a penalty: `values` are the loss's gradients, used experts' rows alone count."""
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
    rows = torch.tensor(USED)
    for name, parameter in parameters.items():
        own = values[name].clone()
        parameter.grad = sparse_over_experts(own[rows], rows, EXPERTS) if is_expert(name) else own
    groups = TrainableGroups(
        {name: value for name, value in parameters.items() if not is_expert(name)},
        tuple(ExpertViews.of(name, value, 0) for name, value in parameters.items() if is_expert(name)),
    )
    return groups.take_gradients(torch.ones(1, EXPERTS, dtype=torch.bool))


def check_against_autograd(penalty: Penalty, term: Term, tensors: Mapping[str, Tensor]) -> None:
    loss = adapter(seed=9)
    gradients = gradients_of(tensors, loss)
    penalty.add_gradients(gradients)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    term(leaves).backward()  # type: ignore[no-untyped-call]
    assert {gradient.name for gradient in gradients} == set(tensors)
    for gradient in gradients:
        slope = leaves[gradient.name].grad
        expected = loss[gradient.name] if slope is None else loss[gradient.name] + slope.float()
        if is_expert(gradient.name):
            expected = expected[list(USED)]
        torch.testing.assert_close(gradient.values, expected)
        torch.testing.assert_close(gradient.parameter, tensors[gradient.name], rtol=0, atol=0)


def written_tail(tensors: Mapping[str, Tensor], kept: int) -> Tensor:
    """HetLoRA's sum, one expert after another."""
    experts = (tensors["layers.0.experts.up_proj.lora_A"], tensors["layers.0.experts.up_proj.lora_B"])
    attention = (tensors["layers.0.self_attn.q_proj.lora_A"], tensors["layers.0.self_attn.q_proj.lora_B"])
    total = torch.zeros((), dtype=torch.float64)
    for a, b in [attention, *zip(*experts, strict=True)]:
        total = total + (b[:, kept:] ** 2).sum().sqrt() * (a[kept:, :] ** 2).sum().sqrt()
    return total


def test_the_proximal_gradient_is_autograd_s() -> None:
    anchor = adapter(seed=1)

    def term(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([0.7 / 2 * (tensors[name] - anchor[name]).square().sum() for name in tensors]).sum()

    check_against_autograd(ProximalPenalty(anchor, 0.7), term, adapter(seed=2))


def test_the_proximal_anchor_is_a_copy() -> None:
    tensors = adapter(seed=1)
    penalty = ProximalPenalty.around(tensors, 2.0)
    moved = {name: tensor + 1 for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    gradients = gradients_of(moved, {name: torch.zeros_like(tensor) for name, tensor in moved.items()})
    penalty.add_gradients(gradients)
    for gradient in gradients:
        torch.testing.assert_close(gradient.values, torch.full_like(gradient.values, 2.0))


@pytest.mark.parametrize("kept", range(RANK))
def test_the_tail_s_gradient_is_autograd_s(kept: int) -> None:
    check_against_autograd(
        TailPenalty(kept, 0.3), lambda tensors: 0.3 * written_tail(tensors, kept), adapter(seed=kept)
    )


def test_a_tail_by_hand() -> None:
    """Rank 2, one kept: the tail of A is (3, 4), of norm 5; that of B is (0.6, 0.8), of norm 1.

    The product is 5. With weight 0.1 the gradient is 0.1 x 1 x (3, 4) / 5 = (0.06, 0.08) for the tail of A, and
    0.1 x 5 x (0.6, 0.8) / 1 = (0.3, 0.4) for that of B. The kept parts have none.
    """
    tensors = {
        "layers.0.self_attn.q_proj.lora_A": torch.tensor([[7.0, 8.0], [3.0, 4.0]]),
        "layers.0.self_attn.q_proj.lora_B": torch.tensor([[9.0, 0.6], [5.0, 0.8]]),
    }
    assert tail_product(tensors, 1) == pytest.approx(5.0, rel=1e-6)
    a, b = gradients_of(tensors, {name: torch.zeros(2, 2) for name in tensors})
    TailPenalty(1, 0.1).add_gradients([b, a])
    torch.testing.assert_close(a.values, torch.tensor([[0.0, 0.0], [0.06, 0.08]]))
    torch.testing.assert_close(b.values, torch.tensor([[0.0, 0.3], [0.0, 0.4]]))


def test_a_tail_of_zeros_has_no_gradient() -> None:
    """A fresh LoRA has B = 0. Written out, the gradient of a norm at zero would be 0/0."""
    fresh = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in adapter(seed=1).items()}
    loss = adapter(seed=2)
    gradients = gradients_of(fresh, loss)
    TailPenalty(1, 10.0).add_gradients(gradients)
    for gradient, before in zip(gradients, gradients_of(fresh, loss), strict=True):
        assert torch.equal(gradient.values, before.values)


def test_a_pair_not_above_the_kept_rank_has_no_tail() -> None:
    tensors = adapter(seed=3)
    gradients = gradients_of(tensors, tensors)
    TailPenalty(RANK, 10.0).add_gradients(gradients)
    for gradient, before in zip(gradients, gradients_of(tensors, tensors), strict=True):
        assert torch.equal(gradient.values, before.values)
    assert tail_product(tensors, RANK) == tail_product(tensors, RANK + 3) == 0.0


def test_penalties_add_up() -> None:
    tensors, anchor = adapter(seed=1), adapter(seed=2)
    both = gradients_of(tensors, tensors)
    for penalty in (TailPenalty(1, 0.5), ProximalPenalty(anchor, 0.2)):
        penalty.add_gradients(both)
    alone: list[dict[str, Tensor]] = []
    for penalty in (TailPenalty(1, 0.5), ProximalPenalty(anchor, 0.2)):
        gradients = gradients_of(tensors, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
        penalty.add_gradients(gradients)
        alone.append({gradient.name: gradient.values for gradient in gradients})
    for gradient, before in zip(both, gradients_of(tensors, tensors), strict=True):
        expected = before.values + alone[0][gradient.name] + alone[1][gradient.name]
        torch.testing.assert_close(gradient.values, expected)


@given(st.integers(0, 100), st.integers(0, RANK), st.floats(-4, 4))
def test_the_tail_product_is_the_written_sum_and_scales_with_each_factor(seed: int, kept: int, factor: float) -> None:
    tensors = adapter(seed)
    double = {name: tensor.double() for name, tensor in tensors.items()}
    product = tail_product(tensors, kept)
    assert product == pytest.approx(float(written_tail(double, kept)), rel=1e-12)
    scaled = {name: tensor * factor if "lora_B" in name else tensor for name, tensor in double.items()}
    assert tail_product(scaled, kept) == pytest.approx(abs(factor) * product, rel=1e-9)


def test_what_makes_no_sense_is_refused() -> None:
    tensors = adapter(seed=1)
    with pytest.raises(ValueError, match="kept rank must be at least 0, found -1"):
        TailPenalty(-1, 0.1)
    with pytest.raises(ValueError, match="kept rank must be at least 0, found -1"):
        tail_product(tensors, -1)
    with pytest.raises(ValueError, match="weight must be finite and at least 0, found nan"):
        TailPenalty(1, float("nan"))
    with pytest.raises(ValueError, match="mu must be finite and at least 0, found -1"):
        ProximalPenalty({}, -1.0)
    del tensors["layers.0.experts.up_proj.lora_B"]
    with pytest.raises(ValueError, match=r"'layers.0.experts.up_proj.lora_B' is missing"):
        tail_product(tensors, 1)
