"""One layer of the sparse adapter against a loop over tokens and experts: values, choices and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from emberfed.models import adapter_grouped, adapter_per_expert
from emberfed.models.adapter_layer import ACTIVATIONS, Activation, AdapterWay, ExpertGradients, Experts
from emberfed.models.dispatch import Dispatch
from emberfed.models.low_rank import Factors
from emberfed.models.routed_adapter import AdapterLayer, Routed, routed_adapter

FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
WAYS: Mapping[str, AdapterWay] = {"per_expert": adapter_per_expert, "grouped": adapter_grouped}


class Case(NamedTuple):
    layer: AdapterLayer
    x_TD: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.x_TD, *self.layer.tensors())


def case(
    tokens: int = 9, experts: int = 5, size: int = 3, hidden: int = 8, seed: int = 0, activation: Activation = "gelu",
    gated: bool = True, dtype: torch.dtype = torch.float64,
) -> Case:  # fmt: skip
    """Random tensors that all want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x_TD, down, up = drawn(tokens, hidden), drawn(experts, size, hidden), drawn(experts, hidden, size)
    return Case(AdapterLayer(down, up, drawn(experts, hidden) if gated else None, activation), x_TD)


def oracle(case: Case, top_k: int, padding: torch.Tensor | None = None) -> Routed:
    """The definition. Of equal logits the lower expert comes first."""
    (down, up, router, activation), x = (case.layer.down_MHD, case.layer.up_MDH, case.layer.router_MD,
                                         case.layer.activation), case.x_TD  # fmt: skip
    logits = None if router is None else torch.stack([router @ token for token in x])
    rows, index = [], []
    for token in range(len(x)):
        scores = [0.0] if logits is None else logits[token].tolist()
        chosen = sorted(range(len(scores)), key=lambda m: (-scores[m], m))[:top_k]
        gates = x.new_ones(1) if logits is None else logits[token][chosen].softmax(0)
        out = torch.zeros_like(x[token])
        if padding is None or not padding[token]:
            for gate, m in zip(gates, chosen, strict=True):
                out = out + gate * (up[m] @ FUNCTIONS[activation](down[m] @ x[token]))
        rows.append(out)
        index.append(chosen)
    return Routed(torch.stack(rows), logits, torch.tensor(index))


def dense(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.to_dense() if gradient.is_sparse else gradient


def check_against_oracle(
    case: Case, top_k: int, padding: torch.Tensor | None = None, through_logits: bool = True
) -> None:
    found, expected = routed_adapter(case.layer, case.x_TD, top_k, padding), oracle(case, top_k, padding)
    torch.testing.assert_close(found.out_TD, expected.out_TD, rtol=1e-9, atol=1e-10)
    assert torch.equal(found.index_TK, expected.index_TK)
    generator = torch.Generator().manual_seed(7)
    target = torch.randn(case.x_TD.shape, generator=generator, dtype=case.x_TD.dtype)

    def loss(routed: Routed) -> torch.Tensor:
        value = (routed.out_TD * target).sum() + 0 * case.x_TD.sum()
        if through_logits and routed.logits_TM is not None:
            value = value + routed.logits_TM.logsumexp(-1).square().sum()
        return value

    gradients = torch.autograd.grad(loss(found), case.tensors(), allow_unused=True)
    wanted = torch.autograd.grad(loss(expected), case.tensors(), allow_unused=True)
    for gradient, want, tensor in zip(gradients, wanted, case.tensors(), strict=True):
        torch.testing.assert_close(dense(gradient, tensor), dense(want, tensor), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("through_logits", [False, True])
def test_values_and_gradients_are_the_definition(top_k: int, activation: Activation, through_logits: bool) -> None:
    check_against_oracle(case(activation=activation), top_k, None, through_logits)


@given(
    tokens=st.integers(1, 9), experts=st.integers(1, 6), size=st.integers(1, 5), hidden=st.integers(1, 9),
    seed=st.integers(0, 1000), data=st.data(),
)  # fmt: skip
@settings(max_examples=60)
def test_any_shape_k_and_padding(
    tokens: int, experts: int, size: int, hidden: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    padding = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    whole = case(tokens, experts, size, hidden, seed)
    check_against_oracle(whole, top_k, torch.tensor(padding).unsqueeze(1))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_go_to_the_lower_expert(top_k: int) -> None:
    """Equal rows of the gate give equal logits for every token; a token of zeros ties all."""
    drawn = case()
    assert drawn.layer.router_MD is not None
    with torch.no_grad():
        drawn.layer.router_MD[3] = drawn.layer.router_MD[1]
        drawn.x_TD[0] = 0
    check_against_oracle(drawn, top_k)
    assert routed_adapter(drawn.layer, drawn.x_TD, top_k).index_TK[0].tolist() == list(range(top_k))


def test_one_expert_without_a_gate_is_a_two_layer_network() -> None:
    drawn = case(experts=1, gated=False)
    check_against_oracle(drawn, 1)
    found = routed_adapter(drawn.layer, drawn.x_TD, 1)
    expected = F.gelu(drawn.x_TD @ drawn.layer.down_MHD[0].T) @ drawn.layer.up_MDH[0].T
    torch.testing.assert_close(found.out_TD, expected)
    assert found.logits_TM is None


def test_experts_without_real_tokens_have_no_gradient_at_all() -> None:
    """All real tokens are alike and choose two experts; padding alone chooses others."""
    drawn = case(tokens=6)
    with torch.no_grad():
        drawn.x_TD[:4] = drawn.x_TD[0]
        drawn.x_TD[4:] = -drawn.x_TD[0]
    padding = torch.tensor([False] * 4 + [True] * 2).unsqueeze(1)
    out, _, index = routed_adapter(drawn.layer, drawn.x_TD, 2, padding)
    used = sorted(index[0].tolist())
    assert set(used).isdisjoint(index[5].tolist()), "the example"
    assert not out[4:].any()
    down, up = torch.autograd.grad(out.sum(), [drawn.layer.down_MHD, drawn.layer.up_MDH])
    for gradient in (down, up):
        assert gradient.is_sparse
        assert gradient._indices().tolist() == [used]


def test_only_padding_gives_zeros() -> None:
    drawn = case(tokens=3)
    out, _, _ = routed_adapter(drawn.layer, drawn.x_TD, 2, torch.ones(3, 1, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))
    x, down = torch.autograd.grad(out.sum(), [drawn.x_TD, drawn.layer.down_MHD])
    assert not x.any()
    assert down._nnz() == 0


def test_a_gate_with_k_of_1_learns_through_its_logits_only() -> None:
    """The softmax of one logit is 1 whatever the logit is."""
    drawn = case()
    out, logits, _ = routed_adapter(drawn.layer, drawn.x_TD, 1)
    assert drawn.layer.router_MD is not None
    assert logits is not None
    (router,) = torch.autograd.grad(out.sum(), drawn.layer.router_MD, retain_graph=True)
    assert not router.any()
    (router,) = torch.autograd.grad(logits.square().sum(), drawn.layer.router_MD)
    assert router.any()


@pytest.mark.parametrize("wanted", range(4))
def test_any_tensor_alone_may_need_a_gradient(wanted: int) -> None:
    drawn = case()
    for number, tensor in enumerate(drawn.tensors()):
        tensor.requires_grad_(number == wanted)
    tensor = drawn.tensors()[wanted]
    (found,) = torch.autograd.grad(routed_adapter(drawn.layer, drawn.x_TD, 3).out_TD.square().sum(), tensor)
    (expected,) = torch.autograd.grad(oracle(drawn, 3).out_TD.square().sum(), tensor)
    torch.testing.assert_close(dense(found, tensor), expected, rtol=1e-8, atol=1e-9)


def test_without_gradients_the_same_bits_come_out() -> None:
    drawn = case(dtype=torch.float32)
    kept = routed_adapter(drawn.layer, drawn.x_TD, 2)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            plain = routed_adapter(drawn.layer, drawn.x_TD, 2)
        assert torch.equal(plain.out_TD, kept.out_TD)
        assert torch.equal(plain.index_TK, kept.index_TK)
        assert not plain.out_TD.requires_grad


def test_autocast_changes_nothing_on_a_cpu() -> None:
    drawn = case(dtype=torch.float32)
    plain = routed_adapter(drawn.layer, drawn.x_TD, 2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = routed_adapter(drawn.layer, drawn.x_TD, 2)
        inside = torch.autograd.grad(cast.out_TD.sum(), drawn.tensors())
    assert torch.equal(cast.out_TD, plain.out_TD)
    outside = torch.autograd.grad(plain.out_TD.sum(), drawn.tensors())
    assert all(torch.equal(dense(a, a), dense(b, b)) for a, b in zip(inside, outside, strict=True))


def test_hidden_states_in_bfloat16_are_computed_in_float32() -> None:
    """Only the rounding of inputs and result is seen; gradients of the adapter's tensors are float32."""
    drawn = case(dtype=torch.float32)
    half = drawn.x_TD.detach().bfloat16().requires_grad_()
    found = routed_adapter(drawn.layer, half, 2)
    expected = oracle(Case(drawn.layer, half.detach().float()), 2)
    assert found.out_TD.dtype == torch.bfloat16
    torch.testing.assert_close(found.out_TD, expected.out_TD.bfloat16(), rtol=2**-7, atol=1e-5)
    x, *others = torch.autograd.grad(found.out_TD.float().sum(), [half, *drawn.layer.tensors()])
    assert x.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in others} == {torch.float32}


def test_rows_that_are_computed_fall_with_k() -> None:
    """What is kept for backward: W_down x of the routed pairs, and nothing of other experts."""
    drawn = case(tokens=40, experts=5, size=16)
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    numbers = []
    for top_k in (1, 2, 4):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            routed_adapter(drawn.layer, drawn.x_TD, top_k)
        numbers.append(sum(kept))
    per_pair = 16 + 4  # W_down x; gate, expert, pair and token
    assert [numbers[1] - numbers[0], numbers[2] - numbers[1]] == [40 * per_pair, 80 * per_pair]


def way_results(
    way: AdapterWay, drawn: Case, index: torch.Tensor, gates: torch.Tensor, wants: bool = True
) -> tuple[torch.Tensor, ExpertGradients]:
    factors = Factors(drawn.layer.down_MHD, drawn.layer.up_MDH, 1.0)
    experts = Experts(factors, ACTIVATIONS[drawn.layer.activation], Dispatch.of(index, len(drawn.layer.down_MHD)))
    with torch.no_grad():
        out, kept = way.forward(experts, drawn.x_TD, gates)
        return out, way.backward(experts, drawn.x_TD, gates, kept, torch.ones_like(drawn.x_TD), wants)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@given(data=st.data())
@settings(max_examples=25)
def test_both_ways_agree_for_any_routing(activation: Activation, data: st.DataObject) -> None:
    """Any experts, repeated ones and padding (index M) among them, and sizes that are no multiples of 8."""
    tokens, top_k, size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    flat = data.draw(st.lists(st.integers(0, 5), min_size=tokens * top_k, max_size=tokens * top_k))
    drawn = case(tokens, 5, size, activation=activation, dtype=torch.float32)
    gates = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(2))
    index = torch.tensor(flat).view(tokens, top_k)
    (one, first), (other, second) = (way_results(way, drawn, index, gates) for way in WAYS.values())
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for name in ("x_TD", "gates_TK", "down_MHD", "up_MDH"):
        left, right = getattr(first, name), getattr(second, name)
        if left.is_sparse:
            assert left._indices().tolist() == right._indices().tolist()
        torch.testing.assert_close(dense(left, left), dense(right, right), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_what_is_not_wanted_is_not_formed(way: str) -> None:
    drawn = case(dtype=torch.float32)
    drawn.layer.up_MDH.requires_grad_(False)
    index = torch.tensor([[0, 4]] * 9)
    _, found = way_results(WAYS[way], drawn, index, torch.ones(9, 2), wants=False)
    assert found.x_TD is None
    assert found.up_MDH is None
    assert found.down_MHD is not None
    assert found.down_MHD._indices().tolist() == [[0, 4]]
