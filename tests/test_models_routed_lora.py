"""Routed expert LoRA against a dense loop over tokens and slots: values and every gradient, both ways, every layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from builders import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GptOssConfig, OlmoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from emberfed.errors import ModelError
from emberfed.models import grouped, per_expert
from emberfed.models.dispatch import Dispatch
from emberfed.models.expert_layer import Gradients, Kept, Layer, Nothing, Way
from emberfed.models.expert_weights import ExpertWeights, check_supported
from emberfed.models.low_rank import paired
from emberfed.models.quantised import QuantisedWeight
from emberfed.models.routed_lora import MATRICES, ExpertLora, compute_dtype, routed_experts

TOKENS, HIDDEN, INNER, EXPERTS, ALPHA = 12, 32, 16, 8, 6.0
RANKS = {"gate_proj": 2, "up_proj": 3, "down_proj": 4}
SIZES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
WAYS: Mapping[str, Way] = {"per_expert": per_expert, "grouped": grouped}


def olmoe_experts() -> Any:
    """Gate above up, (E, out, in), no biases, silu(gate) * up."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts": EXPERTS}
    return OlmoeExperts(OlmoeConfig(**sizes, experts_implementation="emberfed_routed"))


def gpt_oss_experts() -> Any:
    """Gate and up alternating, (E, in, out), biases, clamped activation."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS, "swiglu_limit": 0.5}
    return GptOssExperts(GptOssConfig(**sizes, experts_implementation="emberfed_routed"))


LAYOUTS: Mapping[str, Callable[[], Any]] = {"olmoe": olmoe_experts, "gpt_oss": gpt_oss_experts}


def experts_of(layout: str) -> Any:
    """A real, frozen experts module with random weights."""
    experts = LAYOUTS[layout]()
    generator = torch.Generator().manual_seed(5)
    for parameter in experts.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return experts.requires_grad_(False)


def lora_of(matrices: tuple[str, ...] = MATRICES) -> ExpertLora:
    """Random LoRA, of another rank for each matrix."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for matrix in matrices:
        rows, columns = SIZES[matrix]
        a = 0.2 * torch.randn(EXPERTS, RANKS[matrix], columns, generator=generator)
        b = 0.2 * torch.randn(EXPERTS, rows, RANKS[matrix], generator=generator)
        factors[matrix] = (nn.Parameter(a), nn.Parameter(b))
    return ExpertLora(factors, ALPHA)


def with_lora(layout: str, matrices: tuple[str, ...] = MATRICES) -> tuple[Any, ExpertLora]:
    experts, lora = experts_of(layout), lora_of(matrices)
    experts.add_module("emberfed_lora", lora)
    return experts, lora


def routing(top_k: int, kind: str, tokens: int = TOKENS) -> torch.Tensor:
    """Distinct experts for each token: spread over all, or the same for all tokens so that others stay empty."""
    generator = torch.Generator().manual_seed(top_k)
    if kind == "few":
        return torch.arange(top_k).repeat(tokens, 1)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])


def inputs(tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = (0.3 * torch.randn(tokens, HIDDEN, generator=generator)).requires_grad_()
    return x, torch.rand(tokens, top_k, generator=generator).requires_grad_()


def oracle(
    experts: Any, lora: ExpertLora | None, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """The definition: for each token and slot, the expert's dense adapted matrices, written out for each layout."""

    def adapted(base: torch.Tensor, matrix: str, expert: int) -> torch.Tensor:
        if lora is None or matrix not in lora.scales:
            return base
        a, b = lora.factors[f"{matrix}_A"][expert], lora.factors[f"{matrix}_B"][expert]
        both: torch.Tensor = base + ALPHA / RANKS[matrix] * b @ a
        return both

    def expert_output(expert: int, token: torch.Tensor) -> torch.Tensor:
        if isinstance(experts, GptOssExperts):
            base, bias = experts.gate_up_proj[expert], experts.gate_up_proj_bias[expert]
            gate = adapted(base[:, 0::2].T, "gate_proj", expert) @ token + bias[0::2]
            up = adapted(base[:, 1::2].T, "up_proj", expert) @ token + bias[1::2]
            gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
            inner = gate * torch.sigmoid(experts.alpha * gate) * (up + 1)
            down = adapted(experts.down_proj[expert].T, "down_proj", expert) @ inner
            biased: torch.Tensor = down + experts.down_proj_bias[expert]
            return biased
        base = experts.gate_up_proj[expert]
        gate = adapted(base[:INNER], "gate_proj", expert) @ token
        up = adapted(base[INNER:], "up_proj", expert) @ token
        inner = torch.nn.functional.silu(gate) * up
        output: torch.Tensor = adapted(experts.down_proj[expert], "down_proj", expert) @ inner
        return output

    rows = []
    for token in range(len(x)):
        row = torch.zeros(HIDDEN)
        for slot, expert in enumerate(index[token].tolist()):
            if expert < EXPERTS:
                row = row + gates[token, slot] * expert_output(expert, x[token])
        rows.append(row)
    return torch.stack(rows)


def dense(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_dense() if gradient.is_sparse else gradient


def check_against_oracle(experts: Any, lora: ExpertLora | None, index: torch.Tensor) -> None:
    x, gates = inputs(*index.shape)
    trained = [x, gates, *(lora.parameters() if lora is not None else ())]
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    found = experts(x, index, gates)
    expected = oracle(experts, lora, x, index, gates)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((found * target).sum(), trained)
    wanted = torch.autograd.grad((expected * target).sum(), trained, allow_unused=True)
    for gradient, want, tensor in zip(gradients, wanted, trained, strict=True):
        torch.testing.assert_close(dense(gradient, tensor), dense(want, tensor), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", ["spread", "few"])
@pytest.mark.parametrize("top_k", [1, 2, 5, EXPERTS])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_values_and_gradients_are_the_definition(tokens: int, top_k: int, kind: str, layout: str) -> None:
    check_against_oracle(*with_lora(layout), routing(top_k, kind, tokens))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("matrices", [("gate_proj",), ("down_proj",), ("up_proj", "down_proj"), ()])
def test_lora_may_cover_some_matrices_only(matrices: tuple[str, ...], layout: str) -> None:
    check_against_oracle(*with_lora(layout, matrices), routing(2, "spread"))


def way_results(way: Way, layout: str, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Output without and with things kept, and all gradients."""
    experts, lora = with_lora(layout)
    x, gates = inputs(*index.shape)
    factors = [lora.factors[f"{matrix}_{side}"] for matrix in MATRICES for side in "AB"]
    dispatch = Dispatch.of(index, EXPERTS)
    layer = Layer(ExpertWeights(experts, torch.float32), paired(lora.scales, factors), dispatch)
    kept = Kept.room(layer, x)
    with torch.no_grad():
        plain = way.forward(layer, x, gates, Nothing())
        found = way.forward(layer, x, gates, kept)
        target = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        return plain, found, way.backward(layer, x, gates, kept, target, True)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("way", sorted(WAYS))
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_both_ways_are_the_definition_for_any_routing(way: str, layout: str, data: st.DataObject) -> None:
    """Any number of tokens, any experts, repeated ones and padding (index E) among them."""
    tokens, top_k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    flat = data.draw(st.lists(st.integers(0, EXPERTS), min_size=tokens * top_k, max_size=tokens * top_k))
    index = torch.tensor(flat).view(tokens, top_k)
    plain, found, gradients = way_results(WAYS[way], layout, index)

    experts, lora = with_lora(layout)
    x, gates = inputs(tokens, top_k)
    expected = oracle(experts, lora, x, index, gates)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(plain, found)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    trained = [x, gates, *(lora.factors[f"{matrix}_{side}"] for matrix in MATRICES for side in "AB")]
    loss = (expected * target).sum() + 0 * x.sum()
    wanted = torch.autograd.grad(loss, trained, allow_unused=True)
    of_factors = [gradients.factors[matrix, side] for matrix in MATRICES for side in "AB"]
    for gradient, want, tensor in zip(
        [gradients.hidden_TD, gradients.gates_TK, *of_factors], wanted, trained, strict=True
    ):
        torch.testing.assert_close(dense(gradient, tensor), dense(want, tensor), rtol=1e-5, atol=1e-5)


def kept_and_gradients(
    way: Way, experts: Any, lora: ExpertLora, index: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, wants: bool
) -> tuple[torch.Tensor, Gradients]:
    """Output, and gradients of its sum."""
    factors = [lora.factors[f"{matrix}_{side}"] for matrix in MATRICES for side in "AB"]
    layer = Layer(ExpertWeights(experts, x.dtype), paired(lora.scales, factors), Dispatch.of(index, EXPERTS))
    kept = Kept.room(layer, x)
    with torch.no_grad():
        found = way.forward(layer, x, gates, kept)
        return found, way.backward(layer, x, gates, kept, torch.ones_like(x), wants)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_in_bfloat16_it_is_close(way: str) -> None:
    """All in bfloat16, as on CUDA devices: errors of 1 % of each tensor's norm at most, and no bias along it."""
    experts, lora = experts_of("olmoe"), lora_of()
    half = experts_of("olmoe").bfloat16()
    for name, parameter in experts.named_parameters():
        parameter.data = half.get_parameter(name).float()
    for parameter in lora.parameters():
        parameter.data = parameter.data.bfloat16().float()
    index = routing(EXPERTS, "spread", 40)
    x, gates = (tensor.detach().bfloat16().float().requires_grad_() for tensor in inputs(*index.shape))
    found, gradients = kept_and_gradients(WAYS[way], half, lora, index, x.bfloat16(), gates.bfloat16(), True)

    expected = oracle(experts, lora, x, index, gates)
    keys = [(matrix, side) for matrix in MATRICES for side in "AB"]
    wanted = torch.autograd.grad(expected.sum(), [x, gates, *(lora.factors[f"{m}_{side}"] for m, side in keys)])
    ours = [found, gradients.hidden_TD, gradients.gates_TK, *(gradients.factors[key] for key in keys)]
    for tensor, want in zip(ours, [expected.detach(), *wanted], strict=True):
        close = dense(tensor, want).float()
        assert (close - want).norm() < 0.01 * want.norm()
        assert ((close * want).sum() / want.square().sum()).item() == pytest.approx(1, abs=0.004)
    assert {gradient.dtype for gradient in gradients.factors.values()} == {torch.float32}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_only_used_experts_and_only_what_is_wanted_get_gradients(way: str) -> None:
    experts, lora = with_lora("olmoe")
    lora.factors["up_proj_A"].requires_grad_(False)
    index = routing(2, "few")
    _, found = kept_and_gradients(WAYS[way], experts, lora, index, *inputs(*index.shape), False)
    assert found.hidden_TD is None
    assert set(found.factors) == {(matrix, side) for matrix in MATRICES for side in "AB"} - {("up_proj", "A")}
    assert all(gradient._indices().tolist() == [[0, 1]] for gradient in found.factors.values())


@pytest.mark.parametrize("only", ["hidden", "gates"])
@pytest.mark.parametrize("adapted", [True, False])
def test_hidden_states_or_gates_alone_may_need_a_gradient(only: str, adapted: bool) -> None:
    experts = experts_of("gpt_oss")
    lora = lora_of().requires_grad_(False) if adapted else None
    experts.add_module("emberfed_lora", lora)
    index = routing(3, "spread")
    x, gates = inputs(*index.shape)
    x, gates = (x, gates.detach()) if only == "hidden" else (x.detach(), gates)
    wanted = x if only == "hidden" else gates
    (found,) = torch.autograd.grad(experts(x, index, gates).square().sum(), wanted)
    (expected,) = torch.autograd.grad(oracle(experts, lora, x, index, gates).square().sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_on_a_cpu_a_bfloat16_base_is_computed_in_float32() -> None:
    """Only the rounding of the base, of the inputs and of the result is seen: products are float32."""
    experts, lora = with_lora("olmoe")
    experts.gate_up_proj.data = experts.gate_up_proj.data.bfloat16()
    experts.down_proj.data = experts.down_proj.data.bfloat16()
    index = routing(2, "spread")
    x, gates = inputs(TOKENS, 2)
    half, half_gates = x.detach().bfloat16(), gates.detach().bfloat16()
    found = routed_experts(experts, half, index, half_gates)
    rounded = experts_of("olmoe")
    for name in ("gate_up_proj", "down_proj"):
        rounded.get_parameter(name).data = experts.get_parameter(name).data.float()
    expected = oracle(rounded, lora, half.float(), index, half_gates.float())
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-6)
    found.float().square().sum().backward()
    assert {factor.grad.dtype for factor in lora.factors.values() if factor.grad is not None} == {torch.float32}
    assert compute_dtype(experts, half) == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_the_base_its_codes_stand_for(bits: Any) -> None:
    experts, lora = with_lora("olmoe")
    restored = experts_of("olmoe")
    for name in ("gate_up_proj", "down_proj"):
        packed = QuantisedWeight.quantise(experts.get_parameter(name), bits)
        restored.get_parameter(name).data = packed.dequantised(torch.float32)
        del experts._parameters[name]
        experts.add_module(name, packed)
    restored.add_module("emberfed_lora", lora)
    index = routing(3, "spread")
    x, gates = inputs(TOKENS, 3)
    results = []
    for module in (experts, restored):
        out = module(x, index, gates)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, gates, *lora.parameters()])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(dense(one, x), dense(other, x))


def test_autocast_does_not_reach_into_the_experts_on_a_cpu() -> None:
    experts, lora = with_lora("olmoe")
    index = routing(3, "spread")
    x, gates = inputs(TOKENS, 3)
    plain = experts(x, index, gates)
    with torch.autocast("cpu", torch.bfloat16):
        cast = experts(x, index, gates)
        inside = torch.autograd.grad(cast.sum(), list(lora.parameters()))
    assert torch.equal(cast, plain)
    outside = torch.autograd.grad(plain.sum(), list(lora.parameters()))
    assert all(torch.equal(dense(a, a), dense(b, b)) for a, b in zip(inside, outside, strict=True))


def test_without_lora_it_is_the_base_and_the_base_gets_no_gradient() -> None:
    experts = experts_of("olmoe")
    check_against_oracle(experts, None, routing(3, "spread"))
    x, gates = inputs(TOKENS, 3)
    experts(x, routing(3, "spread"), gates).sum().backward()
    assert [parameter.grad for parameter in experts.parameters()] == [None, None]


def test_only_what_is_asked_for_is_differentiated() -> None:
    experts, lora = with_lora("olmoe")
    for name, factor in lora.factors.items():
        factor.requires_grad_(name.startswith("down_proj"))
    x, gates = inputs(TOKENS, 2)
    experts(x.detach(), routing(2, "spread"), gates.detach()).sum().backward()
    assert {name for name, factor in lora.factors.items() if factor.grad is not None} == {"down_proj_A", "down_proj_B"}


def test_agrees_with_transformers_own_experts() -> None:
    model = tiny_model()
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        ours = model.lm(input_ids=ids).logits
        model.lm.set_experts_implementation("eager")
        theirs = model.lm(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_experts_without_tokens_have_no_gradient_at_all(micro_batches: int) -> None:
    experts, lora = with_lora("olmoe")
    x, gates = inputs(TOKENS, 2)
    for _ in range(micro_batches):
        experts(x, routing(2, "few"), gates).square().sum().backward()
    for name, factor in lora.factors.items():
        assert factor.grad is not None
        assert factor.grad.is_sparse
        gradient = factor.grad.coalesce()
        assert gradient.indices().tolist() == [[0, 1]], name
        assert gradient.values().flatten(1).any(1).all(), name


def test_gradients_of_micro_batches_add_up() -> None:
    experts, lora = with_lora("olmoe")
    index = routing(2, "spread")
    x, gates = inputs(TOKENS, 2)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    (experts(x, index, gates) * target).sum().backward()
    whole = {name: dense(factor.grad, factor) for name, factor in lora.factors.items()}
    for factor in lora.factors.values():
        factor.grad = None
    for rows in (slice(0, 5), slice(5, None)):
        (experts(x[rows], index[rows], gates[rows]) * target[rows]).sum().backward()
    for name, factor in lora.factors.items():
        torch.testing.assert_close(dense(factor.grad, factor), whole[name], rtol=1e-5, atol=1e-6)


def test_same_input_same_bits() -> None:
    experts, lora = with_lora("olmoe")
    index = routing(5, "spread")
    x, gates = inputs(TOKENS, 5)
    runs = []
    for _ in range(3):
        output = experts(x, index, gates)
        runs.append([output, *torch.autograd.grad(output.square().sum(), [x, *lora.parameters()])])
    for again in runs[1:]:
        assert all(torch.equal(dense(a, x), dense(b, x)) for a, b in zip(runs[0], again, strict=True))


# torch's compiler looks at gradients of tensors that have none, and is warned by torch.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_gives_the_same_logits_and_gradients() -> None:
    """The experts are left out of the graph; what is around them is compiled."""
    model = tiny_model()
    lora = lora_of()
    model.blocks[0].experts.add_module("emberfed_lora", lora)
    ids = torch.arange(2, 42).reshape(2, 20)
    found = []
    for lm in (model.lm, torch.compile(model.lm, backend="aot_eager")):
        logits = lm(input_ids=ids, use_cache=False).logits
        found.append([logits, *torch.autograd.grad(logits.square().mean(), list(lora.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(dense(other, one), dense(one, one), rtol=1e-5, atol=1e-6)


def test_experts_of_another_build_are_refused() -> None:
    with pytest.raises(ModelError, match=r"layer 3's experts is a Linear without has_gate, has_bias"):
        check_supported(nn.Linear(2, 2), "layer 3's experts")
    experts = experts_of("olmoe")
    experts.has_gate = False
    with pytest.raises(ModelError, match="experts without a gate"):
        check_supported(experts, "layer 3's experts")
