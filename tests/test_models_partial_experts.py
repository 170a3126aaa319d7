"""Layers of which the first n experts are trained, with LoRA or in full, against dense autograd in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GptOssConfig, OlmoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from emberfed.models.dispatch import Dispatch
from emberfed.models.expert_layer import Kept, Layer
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.low_rank import Factors
from emberfed.models.quantised import QuantisedWeight
from emberfed.models.routed_lora import MATRICES, ExpertFull, ExpertLora

HIDDEN, INNER, EXPERTS, RANK, ALPHA = 6, 4, 5, 2, 3.0
SIZES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
LAYOUTS = ("gpt_oss", "olmoe")
Stacks = dict[str, torch.Tensor]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts_of(layout: str) -> Any:
    """A real, frozen experts module in float64: gate above up, or alternating, transposed and with biases."""
    if layout == "olmoe":
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts": EXPERTS}
        experts: Any = OlmoeExperts(OlmoeConfig(**sizes, experts_implementation="emberfed_routed"))
    else:
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
        config = GptOssConfig(**sizes, swiglu_limit=0.5, experts_implementation="emberfed_routed")
        experts = GptOssExperts(config)
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = 0.5 * draw(*parameter.shape, seed=seed)
    return experts.requires_grad_(False)


def canonical(experts: Any) -> Stacks:
    """The base's matrices (E, out, in), written out for each layout."""
    if isinstance(experts, GptOssExperts):
        both = experts.gate_up_proj.transpose(1, 2)
        down = experts.down_proj.transpose(1, 2)
        return {"gate_proj": both[:, 0::2], "up_proj": both[:, 1::2], "down_proj": down}
    both = experts.gate_up_proj
    return {"gate_proj": both[:, :INNER], "up_proj": both[:, INNER:], "down_proj": experts.down_proj}


def oracle(
    experts: Any, matrices: Mapping[str, torch.Tensor], x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """The definition, token by token and slot by slot."""

    def output(expert: int, token: torch.Tensor) -> torch.Tensor:
        gate = matrices["gate_proj"][expert] @ token
        up = matrices["up_proj"][expert] @ token
        if isinstance(experts, GptOssExperts):
            bias = experts.gate_up_proj_bias[expert]
            gate, up = (gate + bias[0::2]).clamp(max=0.5), (up + bias[1::2]).clamp(-0.5, 0.5)
            inner = gate * torch.sigmoid(experts.alpha * gate) * (up + 1)
            biased: torch.Tensor = matrices["down_proj"][expert] @ inner + experts.down_proj_bias[expert]
            return biased
        return matrices["down_proj"][expert] @ (nn.functional.silu(gate) * up)

    rows = []
    for token in range(len(x)):
        row = 0 * x[token]
        for slot, expert in enumerate(index[token].tolist()):
            if expert < EXPERTS:
                row = row + gates[token, slot] * output(expert, x[token])
        rows.append(row)
    return torch.stack(rows)


def lora_factors(n: int, matrices: tuple[str, ...] = MATRICES) -> Stacks:
    found = {}
    for seed, matrix in enumerate(matrices):
        rows, columns = SIZES[matrix]
        found[f"{matrix}_A"] = 0.5 * draw(n, RANK, columns, seed=20 + seed)
        found[f"{matrix}_B"] = 0.5 * draw(n, rows, RANK, seed=30 + seed)
    return found


def full_stacks(n: int, matrices: tuple[str, ...] = MATRICES) -> Stacks:
    return {matrix: 0.5 * draw(n, *SIZES[matrix], seed=40 + seed) for seed, matrix in enumerate(matrices)}


def attach(experts: Any, kind: str, stacks: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """Attach as parameters of float64, and return them."""
    parameters = {name: nn.Parameter(value.clone()) for name, value in stacks.items()}
    if kind == "lora":
        covered = [matrix for matrix in MATRICES if f"{matrix}_A" in parameters]
        pairs = {matrix: (parameters[f"{matrix}_A"], parameters[f"{matrix}_B"]) for matrix in covered}
        experts.add_module("emberfed_lora", ExpertLora(pairs, ALPHA))
    else:
        experts.add_module("emberfed_full", ExpertFull(parameters))
    return parameters


def trained_matrices(base: Mapping[str, torch.Tensor], kind: str, leaves: Mapping[str, torch.Tensor]) -> Stacks:
    """All experts' matrices (E, out, in), through which gradients of the leaves flow."""
    found = dict(base)
    for matrix in MATRICES:
        if kind == "lora" and f"{matrix}_A" in leaves:
            a, b = leaves[f"{matrix}_A"], leaves[f"{matrix}_B"]
            found[matrix] = torch.cat([base[matrix][: len(a)] + ALPHA / RANK * b @ a, base[matrix][len(a) :]])
        if kind == "full" and matrix in leaves:
            found[matrix] = torch.cat([leaves[matrix], base[matrix][len(leaves[matrix]) :]])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["lora", "full"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_are_the_definition(kind: str, layout: str, data: st.DataObject) -> None:
    """Any number of trained experts, any of the matrices, any routing, repeated experts and padding among it."""
    n = data.draw(st.integers(1, EXPERTS))
    matrices = tuple(m for m in MATRICES if data.draw(st.booleans(), label=m)) or ("up_proj",)
    tokens, top_k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    flat = data.draw(st.lists(st.integers(0, EXPERTS), min_size=tokens * top_k, max_size=tokens * top_k))
    index = torch.tensor(flat).view(tokens, top_k)

    experts = experts_of(layout)
    stacks = lora_factors(n, matrices) if kind == "lora" else full_stacks(n, matrices)
    parameters = attach(experts, kind, stacks)
    x, gates = draw(tokens, HIDDEN, seed=1).requires_grad_(), draw(tokens, top_k, seed=2).requires_grad_()
    target = draw(tokens, HIDDEN, seed=3)
    found = experts(x, index, gates)
    with torch.no_grad():
        assert torch.equal(experts(x, index, gates), found)
    gradients = torch.autograd.grad((found * target).sum(), [x, gates, *parameters.values()])

    leaves = {name: value.clone().requires_grad_() for name, value in stacks.items()}
    expected = oracle(experts, trained_matrices(canonical(experts), kind, leaves), x, index, gates)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    inputs = [x, gates, *leaves.values()]
    loss = (expected * target).sum() + sum(0 * tensor.sum() for tensor in inputs)
    wanted = torch.autograd.grad(loss, inputs)
    used = sorted({expert for expert in flat if expert < n})
    for place, (gradient, want) in enumerate(zip(gradients, wanted, strict=True)):
        torch.testing.assert_close(gradient.to_dense(), want, rtol=1e-10, atol=1e-12)
        if place >= 2:
            assert gradient._indices().tolist() == [used], "only trained experts with tokens have a row"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_short_stack_is_a_whole_one_without_effect_behind_its_end(n: int, layout: str) -> None:
    """Bit for bit: B of the others is zero in the whole stack, and they have no rows in the short one."""
    index = torch.tensor([[0, 4], [2, 3], [1, 0], [4, 2]])
    outcomes = []
    for size in (n, EXPERTS):
        stacks = lora_factors(EXPERTS)
        for name in stacks:
            stacks[name][n:] *= name.endswith("_A")
            stacks[name] = stacks[name][:size]
        experts = experts_of(layout)
        parameters = attach(experts, "lora", stacks)
        x, gates = draw(4, HIDDEN, seed=1).requires_grad_(), draw(4, 2, seed=2).requires_grad_()
        out = experts(x, index, gates)
        dx, dgates, *rest = torch.autograd.grad(out.square().sum(), [x, gates, *parameters.values()])
        outcomes.append([out, dx, dgates, *(gradient.to_dense()[:n] for gradient in rest)])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_weights_like_the_base_s_change_nothing(layout: str) -> None:
    index = torch.tensor([[0, 4], [2, 3], [1, 0]])
    x, gates = draw(3, HIDDEN, seed=1), draw(3, 2, seed=2)
    experts = experts_of(layout)
    plain = experts(x, index, gates)
    attach(experts, "full", {matrix: stack[:3].clone() for matrix, stack in canonical(experts).items()})
    torch.testing.assert_close(experts(x, index, gates), plain, rtol=1e-12, atol=1e-14)


def test_only_rows_of_experts_with_lora_are_kept_for_backward() -> None:
    """5 pairs: 2 of expert 0, 1 of expert 1, 2 of expert 4; with LoRA on the first two experts 3 low rows are kept."""
    dispatch = Dispatch.of(torch.tensor([[0], [4], [0], [1], [4], [EXPERTS]]), EXPERTS)
    weights = ExpertWeights(experts_of("olmoe"), torch.float64)
    a, b = draw(2, RANK, HIDDEN, seed=1), draw(2, INNER, RANK, seed=2)
    kept = Kept.room(Layer(weights, {"up_proj": Factors(a, b, 1.0)}, dispatch), draw(6, HIDDEN, seed=3))
    assert kept.low["up_proj"].shape == (3, RANK)
    assert kept.pre_S2F.shape == (5, 2 * INNER)


def test_a_base_in_bfloat16_is_computed_in_float32_and_gradients_stay_float32() -> None:
    """Of the two roundings that happen only that of the output is seen: 2^-8 of it at most."""
    experts = experts_of("olmoe").to(torch.bfloat16)
    stacks = {name: value.float() for name, value in full_stacks(2).items()}
    parameters = attach(experts, "full", stacks)
    index = torch.tensor([[0, 4], [1, 3]])
    x, gates = draw(2, HIDDEN, seed=1).bfloat16(), draw(2, 2, seed=2).bfloat16()
    found = experts(x, index, gates)
    exact = experts_of("olmoe")
    for name, parameter in exact.named_parameters():
        parameter.data = experts.get_parameter(name).double()
    doubles = {name: value.double() for name, value in stacks.items()}
    expected = oracle(exact, trained_matrices(canonical(exact), "full", doubles), x.double(), index, gates.double())
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)
    found.float().sum().backward()
    for parameter in parameters.values():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_a_base_in_four_bits_stands_for_is_trained_the_same(kind: str) -> None:
    index = torch.tensor([[0, 4], [2, 3], [1, 0]])
    outcomes = []
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": EXPERTS}
    for restored in (False, True):
        experts: Any = OlmoeExperts(OlmoeConfig(**sizes, experts_implementation="emberfed_routed"))
        for seed, name in enumerate(("gate_up_proj", "down_proj")):
            shape = experts.get_parameter(name).shape
            packed = QuantisedWeight.quantise(draw(*shape, seed=seed).float(), 4)
            del experts._parameters[name]
            whole = nn.Parameter(packed.dequantised(torch.float32), requires_grad=False)
            setattr(experts, name, whole if restored else packed)
        a, b, weight = (draw(*shape, seed=9).float() for shape in ((2, RANK, 16), (2, 8, RANK), (2, 8, 16)))
        stacks = {"up_proj_A": a, "up_proj_B": b} if kind == "lora" else {"up_proj": weight}
        parameters = attach(experts, kind, stacks)
        x = draw(3, 16, seed=1).float().requires_grad_()
        out = experts(x, index, draw(3, 2, seed=2).float())
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), [x, *parameters.values()])])
    assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(*outcomes, strict=True))
