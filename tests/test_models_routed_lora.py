"""Routed expert LoRA against a dense loop over tokens and slots: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from builders import tiny_model
from torch import nn

from emberfed.models.routed_lora import MATRICES, ExpertLora, routed_experts

TOKENS, HIDDEN, EXPERTS, ALPHA = 12, 32, 8, 6.0
RANKS = {"gate_proj": 2, "up_proj": 3, "down_proj": 4}


def routing(top_k: int, kind: str) -> torch.Tensor:
    """Distinct experts for each token: spread over all, or over as few as possible so that others stay empty."""
    generator = torch.Generator().manual_seed(top_k)
    if kind == "few":
        return torch.arange(top_k).repeat(TOKENS, 1)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(TOKENS)])


def experts_with_lora() -> tuple[nn.Module, ExpertLora]:
    """A real experts module with random LoRA attached, of another rank for each matrix."""
    experts = tiny_model().blocks[0].experts
    generator = torch.Generator().manual_seed(3)
    sizes = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    factors = {}
    for matrix in MATRICES:
        rows, columns = sizes[matrix]
        a = 0.2 * torch.randn(EXPERTS, RANKS[matrix], columns, generator=generator)
        b = 0.2 * torch.randn(EXPERTS, rows, RANKS[matrix], generator=generator)
        factors[matrix] = (nn.Parameter(a), nn.Parameter(b))
    lora = ExpertLora(factors, ALPHA)
    experts.add_module("emberfed_lora", lora)
    return experts, lora


def oracle(
    experts: nn.Module, lora: ExpertLora | None, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The definition: for each token and slot, the expert's dense adapted matrices."""

    def weight(base: torch.Tensor, matrix: str, expert: int) -> torch.Tensor:
        if lora is None:
            return base
        a, b = lora.factors[f"{matrix}_A"][expert], lora.factors[f"{matrix}_B"][expert]
        adapted: torch.Tensor = base + ALPHA / RANKS[matrix] * b @ a
        return adapted

    gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    rows = []
    for token in range(len(x)):
        row = torch.zeros(HIDDEN)
        for slot, expert in enumerate(index[token].tolist()):
            gate = weight(gate_up[expert, :16], "gate_proj", expert) @ x[token]
            up = weight(gate_up[expert, 16:], "up_proj", expert) @ x[token]
            inner = torch.nn.functional.silu(gate) * up
            row = row + weights[token, slot] * (weight(down[expert], "down_proj", expert) @ inner)
        rows.append(row)
    return torch.stack(rows)


def inputs(tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = (0.3 * torch.randn(tokens, HIDDEN, generator=generator)).requires_grad_()
    return x, torch.rand(tokens, top_k, generator=generator).requires_grad_()


@pytest.mark.parametrize("kind", ["spread", "few"])
@pytest.mark.parametrize("top_k", [1, 2, 5, EXPERTS])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_values_and_gradients_are_the_definition(tokens: int, top_k: int, kind: str) -> None:
    experts, lora = experts_with_lora()
    index = routing(top_k, kind)[:tokens]
    x, weights = inputs(tokens, top_k)
    trained = [x, weights, *lora.parameters()]
    target = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(4))

    found = experts(x, index, weights)
    expected = oracle(experts, lora, x, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((found * target).sum(), trained)
    wanted = torch.autograd.grad((expected * target).sum(), trained, allow_unused=True)
    for gradient, want, tensor in zip(gradients, wanted, trained, strict=True):
        want = torch.zeros_like(tensor) if want is None else want
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)


def test_without_lora_it_is_the_base_and_the_base_gets_no_gradient() -> None:
    experts = tiny_model().blocks[0].experts
    index = routing(3, "spread")
    x, weights = inputs(TOKENS, 3)
    found = experts(x, index, weights)
    torch.testing.assert_close(found, oracle(experts, None, x, index, weights), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert x.grad is not None
    assert [parameter.grad for parameter in experts.parameters()] == [None, None]


def test_agrees_with_transformers_own_experts() -> None:
    model = tiny_model()
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        ours = model.lm(input_ids=ids).logits
        model.lm.set_experts_implementation("eager")
        theirs = model.lm(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_experts_without_tokens_get_zero_gradient() -> None:
    experts, lora = experts_with_lora()
    index = routing(2, "few")
    x, weights = inputs(TOKENS, 2)
    experts(x, index, weights).square().sum().backward()
    for name, factor in lora.factors.items():
        assert factor.grad is not None
        assert not factor.grad[2:].any(), name
        assert factor.grad[:2].flatten(1).any(1).all(), name


def test_same_input_same_bits() -> None:
    experts, lora = experts_with_lora()
    index = routing(5, "spread")
    x, weights = inputs(TOKENS, 5)
    runs = []
    for _ in range(3):
        output = experts(x, index, weights)
        runs.append([output, *torch.autograd.grad(output.square().sum(), [x, *lora.parameters()])])
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))


def test_bfloat16_base_keeps_float32_lora() -> None:
    experts, lora = experts_with_lora()
    index = routing(2, "spread")
    x, weights = inputs(TOKENS, 2)
    expected = oracle(experts, lora, x, index, weights)
    for name in ("gate_up_proj", "down_proj"):
        parameter = experts.get_parameter(name)
        parameter.data = parameter.data.bfloat16()
    found = routed_experts(experts, x.detach().bfloat16(), index, weights.bfloat16())  # type: ignore[arg-type]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    torch.autograd.backward(found.sum())
    assert {factor.dtype for factor in lora.factors.values()} == {torch.float32}
    assert all(factor.grad is not None and factor.grad.dtype == torch.float32 for factor in lora.factors.values())
