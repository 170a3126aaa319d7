"""The estimate of a gradient's size from forward passes: unbiased where that can be computed, and on real models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from builders import tiny_family_lm, tiny_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfed.errors import ModelError
from emberfed.models import expert_tuning
from emberfed.models.compact import Cluster, LayerPlan, compacted
from emberfed.models.expert_values import ExpertValues
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.offloaded import offload_experts
from emberfed.models.quantised import quantise_experts
from emberfed.models.spsa import Direction, ExploredLora, ExploredMatrices, squared_gradient_norm
from emberfed.models.tuning_layout import Tune, all_rows, take_rows

MATRICES = ("gate_proj", "up_proj", "down_proj")
ALPHA, RANK = 5.0, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(numbers=st.lists(st.floats(-3, 3), min_size=2, max_size=6), mu=st.sampled_from([1e-3, 0.1, 2.0]))
@settings(max_examples=20, deadline=None)
def test_of_a_linear_loss_each_draw_is_the_square_of_the_gradient_s_product_with_z(
    numbers: list[float], mu: float
) -> None:
    """L(w) = <g, w>: d = <g, z> exactly, for every mu; z are the generator's normal numbers, in order of the names."""
    g = {"a": torch.tensor(numbers[:1]).double(), "b": torch.tensor(numbers[1:]).double()}

    def loss_along(direction: Direction, step: float) -> float:
        return sum(float((g[name] * (1 + step * direction[name].double())).sum()) for name in g)

    shapes = {"b": (len(numbers) - 1,), "a": (1,)}
    found = squared_gradient_norm(loss_along, shapes, mu, 4, generator(5))
    z = generator(5)
    squares = []
    for _ in range(4):
        draw = {"a": torch.randn(1, generator=z), "b": torch.randn(len(numbers) - 1, generator=z)}
        squares.append(sum(float((g[name] * draw[name]).sum()) for name in g) ** 2)
    assert found == pytest.approx(math.fsum(squares) / 4, rel=1e-9, abs=1e-12)


def test_of_a_quadratic_loss_it_is_unbiased_whatever_the_step() -> None:
    """L(w) = w' H w / 2 with H = [[2, 1], [1, 3]] at w = (1, -1): the gradient is (1, -2), its squared norm 5.

    Central differences of a quadratic are exact, so d = <(1, -2), z>, d^2 / 5 is chi-squared with one degree of
    freedom, and the mean of 20,000 draws has a standard deviation of 5 sqrt(2 / 20000) = 0.05: within 0.2 but for 1 in
    15,000.
    """
    hessian, w = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([1.0, -1.0]).double()

    def loss_along(direction: Direction, step: float) -> float:
        at = w + step * direction["w"].double()
        return float(at @ hessian @ at) / 2

    for mu in (1e-3, 1.0):
        assert squared_gradient_norm(loss_along, {"w": (2,)}, mu, 20_000, generator(1)) == pytest.approx(5, abs=0.2)


@pytest.mark.parametrize(("mu", "draws"), [(0.0, 1), (-1.0, 1), (math.inf, 1), (1e-3, 0)])
def test_steps_and_draws_out_of_range_are_refused(mu: float, draws: int) -> None:
    with pytest.raises(ValueError, match="mu must be above 0 and draws at least 1"):
        squared_gradient_norm(lambda direction, step: 0.0, {"w": (1,)}, mu, draws, generator())


def loud_stacks(model: FoundationModel, tune: Tune) -> dict[str, torch.Tensor]:
    """Stacks of all experts that differ from the base's."""
    start = expert_tuning.initial(model, all_rows(model), tune, RANK, generator(3))
    return {name: value + 0.2 * torch.randn(value.shape, generator=generator(4)) for name, value in start.items()}


def loss_of(model: FoundationModel) -> Callable[[], float]:
    ids = token_ids(2, 9)
    return lambda: float(model.lm(input_ids=ids, labels=ids, use_cache=False).loss)


def layer_loss(model: FoundationModel) -> Callable[[], torch.Tensor]:
    """A loss of the last layer's experts in float64 throughout: transformers' norms and losses are float32."""
    draw, tokens = generator(6), 20
    hidden = torch.randn(tokens, 32, generator=draw, dtype=torch.float64)
    index = torch.stack([torch.randperm(8, generator=draw)[:2] for _ in range(tokens)])
    gates = torch.rand(tokens, 2, generator=draw, dtype=torch.float64)
    experts: Any = model.blocks[1].experts

    def loss() -> torch.Tensor:
        squares: torch.Tensor = experts(hidden, index, gates).square().sum()
        return squares

    return loss


def gradients(model: FoundationModel, tune: Tune, stacks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Back-propagated gradients of all experts' stacks of the last layer."""
    with expert_tuning.attached(model, stacks, all_rows(model), ALPHA) as tuned:
        layer_loss(model)().backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.to_dense() for name, p in tuned.parameters.items() if p.grad is not None}


def slopes(loss: Callable[[], float], explored: Any, mu: float, draws: int) -> list[float]:
    """d^2 of each of some draws: a fresh generator and one draw each."""
    return [explored.squared_gradient_norm(loss, mu, 1, generator(seed)) for seed in range(draws)]


@pytest.mark.parametrize("variant", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_differences_are_the_back_propagated_gradient_s_products_with_z(tune: Tune, variant: str) -> None:
    """In a compact model, of an expert that is held frozen: draw by draw, to the error of the differences.

    The layer is float64, so that differences of losses are exact to far more digits than are compared.
    """
    model = FoundationModel(tiny_family_lm(variant).double())
    every = all_rows(model)
    stacks = loud_stacks(model, tune)
    layer, expert = model.blocks[1].layer, 5
    values = ExpertValues(model, stacks, every, ALPHA)
    of_expert = {
        name: value[0] for name, value in take_rows(gradients(model, tune, stacks), every, {layer: (expert,)}).items()
    }
    assert all(bool(gradient.any()) for gradient in of_expert.values()), "the expert has tokens"
    tuned = (0, 6)
    others = [index for index in range(8) if index not in tuned]
    layer_plan = LayerPlan(tuned, tuple(Cluster((index,), (1.0,)) for index in others))
    rows = {block.layer: tuned for block in model.blocks}
    slot = int(layer_plan.slot_of(8)[expert])
    with (
        compacted(model, (layer_plan,) * len(model.blocks), values),
        expert_tuning.attached(model, take_rows(stacks, every, rows), rows, ALPHA),
    ):
        experts = model.blocks[1].experts
        explored: ExploredLora | ExploredMatrices
        if tune == "full":
            explored = ExploredMatrices(experts, slot)
        else:
            path = f"layers.{layer}.experts"
            places = {m: tuple(stacks[f"{path}.{m}.lora_{side}"][expert] for side in "AB") for m in MATRICES}
            explored = ExploredLora(experts, slot, {m: (a, b) for m, (a, b) in places.items()}, ALPHA)
        loss = layer_loss(model)
        found = slopes(lambda: float(loss()), explored, 1e-5, 4)
    prefix = f"layers.{layer}.experts."
    named = {name.removeprefix(prefix).removesuffix(".weight"): gradient for name, gradient in of_expert.items()}
    assert {name: tuple(gradient.shape) for name, gradient in named.items()} == dict(explored.shapes)
    for seed, square in enumerate(found):
        z = generator(seed)
        draw = {name: torch.randn(explored.shapes[name], generator=z) for name in sorted(explored.shapes)}
        expected = sum(float((named[name].double() * draw[name].double()).sum()) for name in named) ** 2
        assert square == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kept", ["memory", "bfloat16", "quantised", "offloaded"])
def test_the_model_keeps_its_bits_and_small_steps_are_seen_on_every_base(kept: str) -> None:
    """A step of 1e-4 vanishes in bfloat16's 8 bits and has no code in 4; beside the base it does not."""
    model = FoundationModel(tiny_family_lm("olmoe").bfloat16()) if kept == "bfloat16" else tiny_model()
    if kept == "quantised":
        quantise_experts(model.lm, 4)
    if kept == "offloaded":
        offload_experts(model.lm)
    experts: Any = model.blocks[0].experts
    ids = token_ids(2, 9)
    hidden = torch.randn(6, 32, generator=generator(2)).to(model.lm.dtype)
    index, gates = torch.full((6, 1), 3), torch.ones(6, 1, dtype=hidden.dtype)
    before = {name: value.clone() for name, value in model.lm.state_dict().items()}
    with torch.no_grad():
        plain = model.lm(input_ids=ids).logits
        explored = ExploredMatrices(experts, 3)
        direction = {name: torch.randn(shape, generator=generator(1)) for name, shape in explored.shapes.items()}
        base = experts(hidden.float(), index, gates.float())
        with explored.moved(direction, 1e-4):
            near = experts(hidden.float(), index, gates.float())
        with explored.moved(direction, 2e-4):
            far = experts(hidden.float(), index, gates.float())
        other = torch.full((6, 1), 2)
        untouched = experts(hidden, other, gates)
        with explored.moved(direction, 1.0):
            assert torch.equal(experts(hidden, other, gates), untouched), "other experts are as before"
        assert torch.equal(model.lm(input_ids=ids).logits, plain)
    moved = far - base
    assert moved.norm() > 0
    torch.testing.assert_close(near - base, moved / 2, rtol=0.01, atol=0.01 * float(moved.abs().max()))
    after = model.lm.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not {"gate_up_proj", "down_proj"} & vars(experts).keys()


def test_no_step_is_no_change_and_an_exception_leaves_nothing() -> None:
    model = tiny_model()
    loss = loss_of(model)
    explored = ExploredMatrices(model.blocks[0].experts, 2)
    with torch.no_grad():
        plain = loss()
        with explored.moved({name: torch.zeros(shape) for name, shape in explored.shapes.items()}, 1.0):
            assert loss() == plain

        def fail() -> float:
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            explored.squared_gradient_norm(fail, 1e-3, 1, generator())
        assert loss() == plain


def test_an_expert_without_tokens_has_no_slope() -> None:
    """One token goes to two experts of eight; the others' slope is exactly zero."""
    model = tiny_model()
    ids = token_ids(1, 2)
    with model.count_activations() as counter:
        model.lm(input_ids=ids)
    (idle,) = (counter.counts[0] == 0).nonzero()[:1, 0].tolist()
    explored = ExploredMatrices(model.blocks[0].experts, idle)
    ids_loss = lambda: float(model.lm(input_ids=ids, labels=ids).loss)  # noqa: E731
    assert explored.squared_gradient_norm(ids_loss, 1e-2, 3, generator()) == 0


def test_experts_that_are_trained_or_do_not_exist_cannot_be_explored() -> None:
    model = tiny_model()
    with pytest.raises(ModelError, match=r"slot 8 cannot be explored: the layer has 8 slots"):
        ExploredMatrices(model.blocks[0].experts, 8)
    rows = {0: (0, 1)}
    stacks = expert_tuning.initial(model, rows, "full", RANK, generator())
    with expert_tuning.attached(model, stacks, rows, ALPHA):
        with pytest.raises(ModelError, match=r"before 2 are trained in full; choose 2 to 7"):
            ExploredMatrices(model.blocks[0].experts, 1)
        assert ExploredMatrices(model.blocks[0].experts, 2).shapes["down_proj"] == (32, 16)
