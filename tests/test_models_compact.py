"""A model with fewer experts: against merging written out, against loops over tokens, and as found afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import SPARSE_VARIANTS, tiny_family_lm, tiny_lm, tiny_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfed.errors import ConfigError, ModelError
from emberfed.models import expert_tuning, lora
from emberfed.models.compact import (
    Cluster,
    CompactPlan,
    ExpertWork,
    LayerPlan,
    compacted,
    to_slots,
)
from emberfed.models.expert_values import ExpertValues
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.offloaded import OffloadedWeight, offload_experts
from emberfed.models.quantised import Bits, QuantisedWeight, quantise_experts

NAMES = [name for names in SPARSE_VARIANTS.values() for name in names]
every_family = pytest.mark.parametrize("name", NAMES)
STACKS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def family(name: str) -> FoundationModel:
    return FoundationModel(tiny_family_lm(name))


def base_values(model: FoundationModel) -> ExpertValues:
    return ExpertValues(model, {}, {}, 1.0)


def alone(experts: Iterable[int]) -> tuple[Cluster, ...]:
    return tuple(Cluster((expert,), (1.0,)) for expert in experts)


def everywhere(model: FoundationModel, plan: LayerPlan) -> CompactPlan:
    return (plan,) * len(model.blocks)


def mixed(experts: int, row: int = 0) -> LayerPlan:
    """Two tuned, one held as it is, the rest in two clusters; other experts in another row."""
    order = [(expert + 3 * row) % experts for expert in range(experts)]
    first, second = sorted(order[3:5]), sorted(order[5:])
    weights = tuple(2 * (place + 1) / (len(second) * (len(second) + 1)) for place in range(len(second)))
    clusters = (Cluster(tuple(second), weights), *alone(order[2:3]), Cluster(tuple(first), (0.25, 0.75)))
    return LayerPlan(tuple(sorted(order[:2])), clusters)


def mixed_plan(model: FoundationModel) -> CompactPlan:
    return tuple(mixed(model.num_experts, row) for row in range(len(model.blocks)))


def batch() -> dict[str, Any]:
    """Three texts, two of them with padding, left and right."""
    ids = token_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def logits(model: FoundationModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.lm(**batch()).logits[batch()["attention_mask"] == 1]
    return found


def written_out(model: FoundationModel, plan: CompactPlan) -> None:
    """Give each member of a cluster the cluster's mean, in place: the same function with all experts computed."""
    for block, layer in zip(model.blocks, plan, strict=True):
        for name in STACKS:
            stack = getattr(block.experts, name, None)
            if stack is None:
                continue
            stack = stack.detach()
            before = stack.double()
            for cluster in layer.clusters:
                mean = sum(
                    weight * before[member] for weight, member in zip(cluster.weights, cluster.members, strict=True)
                )
                for member in cluster.members:
                    stack[member] = mean
            for expert in layer.dropped:
                stack[expert] = 0


ALL_CLUSTERS_OF_ONE: Callable[[int], LayerPlan] = lambda experts: LayerPlan((), alone(range(experts)))  # noqa: E731
ALL_TUNED: Callable[[int], LayerPlan] = lambda experts: LayerPlan(tuple(range(experts)), ())  # noqa: E731


@pytest.mark.parametrize("make", [ALL_CLUSTERS_OF_ONE, ALL_TUNED], ids=["clusters of one", "all tuned"])
@every_family
def test_with_all_experts_it_is_the_model_bit_for_bit(name: str, make: Callable[[int], LayerPlan]) -> None:
    """Slots are the experts in their order, so sums go as before."""
    model = family(name)
    before = logits(model)
    with compacted(model, everywhere(model, make(model.num_experts)), base_values(model)) as compact:
        assert torch.equal(logits(model), before)
        assert all(work.rows == 23 * model.top_k for work in compact.take())


@pytest.mark.parametrize("top_k", [1, 3])
@every_family
def test_it_computes_what_equal_members_would(name: str, top_k: int) -> None:
    model, oracle = family(name), family(name)
    plan = mixed_plan(model)
    written_out(oracle, plan)
    with compacted(model, plan, base_values(model)), model.active_experts(top_k), oracle.active_experts(top_k):
        torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "routing",
    [{"gate": "renormalised"}, {"rescale": "static"}, {"rescale": "mass"}],
    ids=["renormalised", "static", "mass"],
)
@pytest.mark.parametrize("inside", [True, False])
def test_gates_and_rescaling_are_the_routers_own_business(routing: dict[str, Any], inside: bool) -> None:
    model, oracle = tiny_model(), tiny_model()
    plan = mixed_plan(model)
    written_out(oracle, plan)
    fewer, active = compacted(model, plan, base_values(model)), model.active_experts(1, **routing)
    first, second = (fewer, active) if inside else (active, fewer)
    with first, second, oracle.active_experts(1, **routing):
        torch.testing.assert_close(logits(model), logits(oracle), rtol=1e-4, atol=1e-5)


def slowly(
    block: Any, plan: LayerPlan, x_TD: torch.Tensor, index_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """Token by token, expert by expert, in float64."""
    experts = block.experts

    def flip(matrix: torch.Tensor) -> torch.Tensor:
        return matrix if experts.is_transposed else matrix.t()

    mean: dict[int, dict[str, Any]] = {}
    for cluster in (*alone(plan.tuned), *plan.clusters):
        for member in cluster.members:
            mean[member] = {
                name: sum(
                    (weight * getattr(experts, name).detach()[other].double())
                    for weight, other in zip(cluster.weights, cluster.members, strict=True)
                )
                for name in STACKS
                if hasattr(experts, name)
            }
    out_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for token, x_D in enumerate(x_TD.double()):
        for expert, gate in zip(index_TK[token].tolist(), gates_TK[token].double(), strict=True):
            if expert in mean:
                own = mean[expert]
                pre = x_D @ flip(own["gate_up_proj"]) + own.get("gate_up_proj_bias", 0)
                inner = experts._apply_gate(pre)
                out_TD[token] += gate * (inner @ flip(own["down_proj"]) + own.get("down_proj_bias", 0))
    return out_TD


@pytest.mark.parametrize("top_k", [1, 2, 5])
@every_family
def test_a_layer_is_what_a_loop_over_tokens_says(name: str, top_k: int) -> None:
    """Experts in any order and number, dropped ones among them."""
    model = family(name)
    experts, block = model.num_experts, model.blocks[0]
    plan = LayerPlan((1, 4), (Cluster((0, 3), (0.3, 0.7)), Cluster((5,), (1.0,))), (2, *range(6, experts)))
    draw = torch.Generator().manual_seed(top_k)
    x_TD = torch.randn(9, 32, generator=draw)
    index_TK = torch.stack([torch.randperm(experts, generator=draw)[:top_k] for _ in x_TD])
    gates_TK = torch.rand(index_TK.shape, generator=draw)
    expected = slowly(block, plan, x_TD, index_TK, gates_TK)
    with compacted(model, everywhere(model, plan), base_values(model)), torch.no_grad():
        found = block.experts(x_TD, index_TK, gates_TK)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_one_cluster_of_all_is_one_dense_mlp() -> None:
    """OLMoE: every token gets the mean expert, times the sum of its weights, in the layer's one product."""
    model = tiny_model()
    block: Any = model.blocks[0]
    weights = tuple((expert + 1) / 36 for expert in range(8))
    mean = {
        name: torch.einsum("e,eoi->oi", torch.tensor(weights), getattr(block.experts, name).detach())
        for name in ("gate_up_proj", "down_proj")
    }
    x_TD, gates_TK = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.2, 0.3]] * 5)
    gate, up = (x_TD @ mean["gate_up_proj"].t()).chunk(2, dim=1)
    expected = 0.5 * (torch.nn.functional.silu(gate) * up) @ mean["down_proj"].t()
    plan = everywhere(model, LayerPlan((), (Cluster(tuple(range(8)), weights),)))
    with compacted(model, plan, base_values(model)) as compact, torch.no_grad():
        found = block.experts(x_TD, torch.tensor([[6, 1]] * 5), gates_TK)
        assert compact.take()[0] == ExpertWork(rows=5, tuned_rows=0, choices=8)
        assert block.experts.gate_up_proj.shape == (1, 32, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_experts_in_one_slot_add_up() -> None:
    """Slots 1, 0, 1, none of four: slot 1 gets 0.1 + 0.3 once, and what went to none has no weight."""
    slots, weights = to_slots(torch.tensor([[1, 0, 1, 2]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]]), 2)
    assert slots.tolist() == [[1, 0, 2, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.2, 0.0, 0.0]]))


@given(data=st.data(), tokens=st.integers(1, 6), top_k=st.integers(1, 5), slots=st.integers(1, 4))
@settings(deadline=None)
def test_going_to_slots_is_what_a_loop_says(data: st.DataObject, tokens: int, top_k: int, slots: int) -> None:
    rows = data.draw(
        st.lists(st.lists(st.integers(0, slots), min_size=top_k, max_size=top_k), min_size=tokens, max_size=tokens)
    )
    weights_TK = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(tokens))
    found, added_TK = to_slots(torch.tensor(rows), weights_TK, slots)
    for token, row in enumerate(rows):
        for place, slot in enumerate(row):
            first = slot < slots and slot not in row[:place]
            assert found[token, place] == (slot if first else slots)
            same = sum(float(weights_TK[token, other]) for other in range(top_k) if row[other] == slot)
            assert float(added_TK[token, place]) == pytest.approx(same if first else 0, rel=1e-6)


@st.composite
def layer_plans(draw: st.DrawFn, experts: int = 8) -> LayerPlan:
    """Every expert drawn to be tuned, dropped, or in one of four clusters."""
    home = draw(st.lists(st.integers(-2, 3), min_size=experts, max_size=experts).filter(lambda h: max(h) >= -1))
    clusters = []
    for number in range(4):
        members = tuple(expert for expert, place in enumerate(home) if place == number)
        if members:
            raw = [draw(st.integers(0, 5)) for _ in members]
            raw = raw if sum(raw) else [1] * len(raw)
            clusters.append(Cluster(members, tuple(value / sum(raw) for value in raw)))
    tuned, dropped = (tuple(e for e, place in enumerate(home) if place == which) for which in (-1, -2))
    return LayerPlan(tuned, tuple(clusters), dropped)


@given(first=layer_plans(), second=layer_plans(), top_k=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_any_plan_computes_what_equal_members_would(first: LayerPlan, second: LayerPlan, top_k: int) -> None:
    model, oracle = tiny_model(), tiny_model()
    plan = (first, second)
    written_out(oracle, plan)
    for layer in plan:
        places = layer.slot_of(8).tolist()
        assert [places[expert] for expert in layer.tuned] == list(range(len(layer.tuned)))
        assert set(places) - {layer.slots} == set(range(layer.slots))
    with model.active_experts(top_k), oracle.active_experts(top_k), oracle.count_activations() as counter:
        expected = logits(oracle)
        with compacted(model, plan, base_values(model)) as compact, model.count_activations() as counted:
            torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(counted.counts[0], counter.counts[0])  # original experts; below they may differ by rounding
    assert all(
        work.tuned_rows <= work.rows <= 23 * min(top_k, layer.slots)
        for work, layer in zip(compact.take(), plan, strict=True)
    )


@given(plan=layer_plans(), top_k=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_work_is_what_a_loop_over_tokens_counts(plan: LayerPlan, top_k: int) -> None:
    model = tiny_model()
    chosen: list[torch.Tensor] = []
    hooks = [block.router.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for block in model.blocks]
    with model.active_experts(top_k), compacted(model, everywhere(model, plan), base_values(model)) as compact:
        logits(model)
        works = compact.take()
        assert compact.take() == (ExpertWork(0, 0, 8),) * 2
    for hook in hooks:
        hook.remove()
    real = batch()["attention_mask"].flatten().tolist()
    places = plan.slot_of(8).tolist()
    for work, index_TK in zip(works, chosen, strict=True):
        used = [
            {places[expert] for expert in row} - {plan.slots}
            for row, there in zip(index_TK.tolist(), real, strict=True)
            if there
        ]
        assert work.rows == sum(map(len, used))
        assert work.tuned_rows == sum(slot < len(plan.tuned) for slots in used for slot in slots)


PRUNABLE = [name for name in NAMES if name not in ("deepseek_v2-grouped", "deepseek_v3", "deepseek_v3-plain")]


def pruned_lm(name: str, plan: CompactPlan) -> FoundationModel:
    """A model built with fewer experts, each layer with the weights of those its plan keeps."""
    whole = family(name)
    mixture = whole.family.mixture
    assert mixture is not None
    kept = [[e for e in range(layer.num_experts) if e not in layer.dropped] for layer in plan]
    pruned = FoundationModel(tiny_family_lm(name, **{mixture.num_experts: len(kept[0])}))
    layers = [f"{whole.family.layers}.{block.layer}." for block in whole.blocks]
    given = whole.lm.state_dict()
    for key, tensor in pruned.lm.state_dict().items():
        source = given[key]
        for axis, (size, wanted) in enumerate(zip(source.shape, tensor.shape, strict=True)):
            if size != wanted:
                row = next(row for row, layer in enumerate(layers) if key.startswith(layer))
                source = source.index_select(axis, torch.tensor(kept[row]))
        tensor.copy_(source)
    return pruned


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", PRUNABLE)
def test_rerouted_it_is_a_model_built_without_the_dropped_experts(name: str, top_k: int) -> None:
    model = family(name)
    experts = model.num_experts
    # Layers keep different experts, but as many, which is what a config can say.
    dropped = [tuple(sorted((expert + row) % experts for expert in (1, 5))) for row in range(len(model.blocks))]
    plan = tuple(LayerPlan(alone_tuned, (), gone) for gone in dropped for alone_tuned in [rest(experts, gone)])
    oracle = pruned_lm(name, plan)
    with compacted(model, plan, base_values(model), reroute=True) as compact:
        with model.active_experts(top_k), model.count_activations() as counter:
            found = logits(model)
        with oracle.active_experts(top_k), oracle.count_activations() as expected:
            torch.testing.assert_close(found, logits(oracle), rtol=1e-4, atol=1e-5)
        assert all(work == ExpertWork(23 * top_k, 23 * top_k, experts - 2) for work in compact.take())
    for row, gone in enumerate(dropped):
        assert counter.counts[row, list(gone)].sum() == 0
        assert torch.equal(counter.counts[row, list(rest(experts, gone))], expected.counts[row])


def rest(experts: int, gone: Sequence[int]) -> tuple[int, ...]:
    return tuple(expert for expert in range(experts) if expert not in gone)


@pytest.mark.parametrize(
    "routing",
    [{"gate": "renormalised"}, {"rescale": "static"}, {"rescale": "mass"}],
    ids=["renormalised", "static", "mass"],
)
def test_rerouted_gates_are_a_pruned_model_s_too(routing: dict[str, Any]) -> None:
    model = family("olmoe")
    plan = everywhere(model, LayerPlan((0, 2, 3), alone((4, 6, 7)), (1, 5)))
    oracle = pruned_lm("olmoe", plan)
    with oracle.active_experts(1, **routing):
        expected = logits(oracle)
    with compacted(model, plan, base_values(model), reroute=True), model.active_experts(1, **routing):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_dropping_without_rerouting_keeps_the_others_weights() -> None:
    """One token at K = 2 with weights 0.5 and 0.25: with its second expert dropped, the first still gets 0.5."""
    model = tiny_model()
    block: Any = model.blocks[0]
    x_TD = torch.ones(1, 32)
    with torch.no_grad():
        expected = block.experts(x_TD, torch.tensor([[3]]), torch.tensor([[0.5]]))
        with compacted(model, everywhere(model, LayerPlan((3,), (), rest(8, (3,)))), base_values(model)):
            found = block.experts(x_TD, torch.tensor([[3, 5]]), torch.tensor([[0.5, 0.25]]))
            nothing = block.experts(x_TD, torch.tensor([[0, 5]]), torch.tensor([[0.5, 0.25]]))
    assert torch.equal(found, expected)
    assert not nothing.any()


@pytest.mark.parametrize("name", ["deepseek_v2-grouped", "deepseek_v3"])
def test_routers_of_groups_cannot_choose_among_fewer(name: str) -> None:
    model = family(name)
    before = logits(model)
    plan = everywhere(model, LayerPlan(tuple(range(7)), (), (7,)))
    refused = pytest.raises(ConfigError, match="choose groups of experts first")
    with refused, compacted(model, plan, base_values(model), reroute=True):
        pass
    with compacted(model, everywhere(model, ALL_TUNED(8)), base_values(model), reroute=True):
        assert torch.equal(logits(model), before)  # nothing is dropped, so there is nothing to reroute


def test_too_few_experts_for_k() -> None:
    model = tiny_model()
    plan = everywhere(model, LayerPlan((2,), (), rest(8, (2,))))
    refused = pytest.raises(ConfigError, match=r"layer 0 keeps 1 experts.*top_k 2.*keep more, or lower top_k")
    with refused, compacted(model, plan, base_values(model), reroute=True):
        pass
    with model.active_experts(1), compacted(model, plan, base_values(model), reroute=True):
        logits(model)
        with model.active_experts(2), pytest.raises(ConfigError, match="keeps 1 experts"):
            logits(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cluster((), ()), "members are"),
        (lambda: Cluster((2, 1), (0.5, 0.5)), "ascending"),
        (lambda: Cluster((1, 1), (0.5, 0.5)), "ascending"),
        (lambda: Cluster((1, 2), (0.5,)), "weights"),
        (lambda: Cluster((1, 2), (0.5, 0.6)), "sum of 1"),
        (lambda: Cluster((1, 2), (-0.5, 1.5)), "at least 0"),
        (lambda: Cluster((1,), (float("nan"),)), "weights"),
        (lambda: LayerPlan((1, 0), ()), "tuned experts are"),
        (lambda: LayerPlan((0,), (), (2, 1)), "dropped experts are"),
        (lambda: LayerPlan((0, 2), ()), "expert 1 0 times"),
        (lambda: LayerPlan((0, 1), alone((1, 2))), "expert 1 2 times"),
        (lambda: LayerPlan((), (), (0, 1)), "drops all of its 2 experts"),
        (lambda: LayerPlan((0, 1), ()).slot_of(3), "for 2 experts, but the layer has 3"),
    ],
)
def test_plans_that_are_none(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()


def test_plans_of_another_model() -> None:
    model = tiny_model()
    values = base_values(model)
    for plan, message in (
        ((ALL_TUNED(8),), "for 1 layers with experts, but the model has 2"),
        ((ALL_TUNED(8), ALL_TUNED(7)), "plan of layer 1 is for 7 experts"),
    ):
        with pytest.raises(ModelError, match=message), compacted(model, plan, values):
            pass
    good = everywhere(model, mixed(8))
    with compacted(model, good, values):
        with pytest.raises(ModelError, match="layer 0 is compact already"), compacted(model, good, values):
            pass
        with pytest.raises(ModelError, match="layer 1 holds 5 experts now instead of its 8"):
            values.base(1, 0)
    tensors = lora.initial(model, lora.LoraConfig(rank=2), torch.Generator().manual_seed(0))
    refused = pytest.raises(ModelError, match="being trained")
    with lora.attached(model, tensors, 16.0), refused, compacted(model, good, values):
        pass


def in_memory(lm: Any) -> None:
    """Leave the experts where they are."""


BASES: dict[str, Callable[[Any], None]] = {
    "parameters": in_memory,
    "8 bits": lambda lm: quantise_experts(lm, 8),
    "4 bits": lambda lm: quantise_experts(lm, 4),
    "disk": offload_experts,
}


def state(model: FoundationModel) -> list[Any]:
    """Everything that could be left behind: names in order, storage, bits, hooks, attributes."""
    found: list[Any] = [(name, tensor.data_ptr(), tensor.clone()) for name, tensor in model.lm.state_dict().items()]
    for path, module in model.lm.named_modules():
        found.append((path, id(module), list(module._forward_hooks), list(module._forward_pre_hooks)))
        if any(module is part for block in model.blocks for part in (block.router, block.experts)):
            found.append(sorted((key, value) for key, value in vars(module).items() if isinstance(value, (int, float))))
            found.append(sorted(vars(module)))
    return found


def same(one: Any, another: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, another)
    if isinstance(one, list | tuple):
        return len(one) == len(another) and all(map(same, one, another))
    return bool(one == another)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v2"])
def test_the_model_is_as_found_afterwards(name: str, base: str) -> None:
    lm = tiny_family_lm(name)
    BASES[base](lm)
    model = FoundationModel(lm)
    before, bits = state(model), logits(model)
    plan = everywhere(model, LayerPlan((0, 3), (Cluster((1, 2), (0.5, 0.5)), *alone((4, 5))), (6, 7)))
    for reroute in (False, True):
        with compacted(model, plan, base_values(model), reroute):
            assert not same(state(model), before)
            logits(model)
        assert same(state(model), before)
        with pytest.raises(ZeroDivisionError), compacted(model, plan, base_values(model), reroute):
            raise ZeroDivisionError
        assert same(state(model), before)
    with pytest.raises(ConfigError), model.active_experts(8), compacted(model, plan, base_values(model), True):
        pass
    assert same(state(model), before)
    assert torch.equal(logits(model), bits)
    assert model.shape.parameters == FoundationModel(tiny_family_lm(name)).shape.parameters


def test_sizes_of_the_model_are_those_of_all_of_it() -> None:
    """Asked for first while it is compact."""
    model = tiny_model()
    with compacted(model, everywhere(model, mixed(8)), base_values(model)):
        assert model.shape == tiny_model().shape


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_stays_quantised(bits: Bits) -> None:
    """Experts as they are keep their codes; a mean is off by half a step of its groups at most."""
    lm = tiny_lm()
    quantise_experts(lm, bits)
    model = FoundationModel(lm)
    block: Any = model.blocks[0]
    whole: QuantisedWeight = block.experts.gate_up_proj
    with compacted(model, everywhere(model, mixed(8)), base_values(model)):
        stack = block.experts.gate_up_proj
        assert isinstance(stack, QuantisedWeight)
        assert stack.nbytes * 8 == whole.nbytes * 5
        for slot, expert in ((0, 0), (1, 1), (3, 2)):
            for name in ("codes", "scale", "minimum"):
                assert torch.equal(getattr(stack, name)[slot], getattr(whole, name)[expert])
        mean = 0.25 * whole.expert(3, torch.float32) + 0.75 * whole.expert(4, torch.float32)
        step = stack.scale[4].float().repeat_interleave(stack.group_size, dim=1)
        assert ((stack.expert(4, torch.float32) - mean).abs() <= 0.51 * step).all()


def test_an_off_loaded_base_gives_the_same_slots_in_memory() -> None:
    model, lm = tiny_model(), tiny_lm()
    offload_experts(lm)
    off = FoundationModel(lm)
    plan = everywhere(model, mixed(8))
    with compacted(model, plan, base_values(model)):
        stacks, expected = list(model.blocks[1].experts.state_dict().items()), logits(model)
    with compacted(off, plan, base_values(off)):
        experts: Any = off.blocks[1].experts
        assert same(list(experts.state_dict().items()), stacks)
        assert torch.equal(logits(off), expected)
        assert not [module for module in off.lm.modules() if isinstance(module, OffloadedWeight)]
    assert isinstance(experts.down_proj, OffloadedWeight)


def test_sixteen_bits_are_rounded_once() -> None:
    model = FoundationModel(tiny_lm().to(torch.bfloat16))
    block: Any = model.blocks[0]
    first, second = (block.experts.down_proj.detach()[expert].double() for expert in (3, 4))
    with compacted(model, everywhere(model, mixed(8)), base_values(model)):
        slot = block.experts.down_proj.detach()[4]
    assert slot.dtype == torch.bfloat16
    assert torch.equal(slot, (0.25 * first + 0.75 * second).to(torch.bfloat16))


@pytest.mark.parametrize("tune", ["lora", "full"])
@every_family
def test_values_are_what_merging_and_replacing_write(name: str, tune: Any) -> None:
    """Experts 1, 2 and 6 or fewer were trained; the others' values are the base's."""
    model, oracle = family(name), family(name)
    rows = {block.layer: (1, 2, 5) for block in model.blocks}
    tensors = random_stacks(model, rows, tune)
    if tune == "full":
        context: AbstractContextManager[object] = expert_tuning.replaced(oracle, tensors, rows)
    else:
        context = nullcontext()
        add_slowly(oracle, tensors, rows, 16.0)
    values, plain, found = ExpertValues(model, tensors, rows, 16.0), base_values(model), base_values(oracle)
    with context:
        for row in range(len(model.blocks)):
            for expert in range(model.num_experts):
                close(values.matrices(row, expert), found.matrices(row, expert))
                expected = found if tune == "full" else plain
                close(values.base(row, expert), expected.base(row, expert))
                assert values.trained(row, expert) == (expert in (1, 2, 5))
                assert values.trained_in_full(row, expert) == (expert in (1, 2, 5) and tune == "full")


def close(one: Any, another: Any) -> None:
    for name in ("gate_up_D2F", "down_FD", "gate_up_bias", "down_bias"):
        first, second = getattr(one, name), getattr(another, name)
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def random_stacks(model: FoundationModel, rows: Any, tune: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    start = expert_tuning.initial(model, rows, tune, 2, draw)
    return {name: torch.randn(tensor.shape, generator=draw) * 0.2 for name, tensor in start.items()}


def add_slowly(model: FoundationModel, tensors: Any, rows: Any, alpha: float) -> None:
    """Add alpha / R B A to each matrix where the family stores it."""
    for block in model.blocks:
        experts: Any = block.experts
        for place, expert in enumerate(rows[block.layer]):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                path = f"layers.{block.layer}.experts.{matrix}"
                delta_OI = alpha / 2 * tensors[f"{path}.lora_B"][place] @ tensors[f"{path}.lora_A"][place]
                stored = (experts.down_proj if matrix == "down_proj" else experts.gate_up_proj).detach()[expert]
                stored = stored.t() if experts.is_transposed else stored
                if matrix != "down_proj":
                    first = matrix == "gate_proj"
                    half = len(stored) // 2
                    stored = (
                        (stored[:half] if first else stored[half:])
                        if experts.is_concatenated
                        else stored[0 if first else 1 :: 2]
                    )
                stored += delta_OI


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_tuned_slots_hold_what_is_added_to_and_clusters_what_it_makes(name: str, tune: Any) -> None:
    """With the tuned experts attached it is the model with all that was trained, merged where the plan says so."""
    model, oracle = family(name), family(name)
    rows = {block.layer: (0, 1, 3, 5) for block in model.blocks}
    tensors = random_stacks(model, rows, tune)
    plan = everywhere(
        model, LayerPlan((1, 5), (Cluster((0, 2), (0.5, 0.5)), *alone((3,)), Cluster((4, 6, 7), (0.2, 0.3, 0.5))))
    )
    if tune == "lora":
        add_slowly(oracle, tensors, rows, 16.0)
        change: AbstractContextManager[object] = nullcontext()
    else:
        change = expert_tuning.replaced(oracle, tensors, rows)
    mine = {block.layer: (1, 5) for block in model.blocks}
    own = {key: tensor[[1, 3]] for key, tensor in tensors.items()}
    with change:
        written = [block.experts.state_dict() for block in oracle.blocks]
        written = [{key: tensor.clone() for key, tensor in stacks.items()} for stacks in written]
        written_out(oracle, plan)
        expected = logits(oracle)
        for block, stacks in zip(oracle.blocks, written, strict=True):
            block.experts.load_state_dict(stacks)
    values = ExpertValues(model, tensors, rows, 16.0)
    with compacted(model, plan, values), expert_tuning.attached(model, own, mine, 16.0):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_training_in_a_compact_model_follows_the_same_gradients() -> None:
    """LoRA of the tuned experts: the rows of a whole stack's gradient, in the model with equal members."""
    model, oracle = tiny_model(), tiny_model()
    plan = everywhere(model, mixed(8))
    rows = {0: (0, 1), 1: (0, 1)}
    tensors = random_stacks(model, rows, "lora")
    written_out(oracle, plan)
    whole = {
        name: torch.zeros(8, *tensor.shape[1:]).index_copy(0, torch.tensor([0, 1]), tensor)
        for name, tensor in tensors.items()
    }
    found, expected = {}, {}
    with (
        compacted(model, plan, base_values(model)) as compact,
        expert_tuning.attached(model, tensors, rows, 16.0) as tuned,
    ):
        model.lm(**batch()).logits[batch()["attention_mask"] == 1].sum().backward()
        found = {
            name: parameter.grad.to_dense()
            for name, parameter in tuned.parameters.items()
            if parameter.grad is not None
        }
        once = compact.take()
        with model.gradient_checkpointing():
            model.lm(**batch()).logits.sum().backward()
        assert compact.take() == once
    with lora.attached(oracle, whole, 16.0) as adapter:
        oracle.lm(**batch()).logits[batch()["attention_mask"] == 1].sum().backward()
        expected = {
            name: parameter.grad.to_dense()[:2]
            for name, parameter in adapter.parameters.items()
            if parameter.grad is not None
        }
    assert found.keys() == tensors.keys()
    for name in tensors:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_sending_every_token_to_the_first_slots() -> None:
    model = tiny_model()
    plan = (mixed(8), LayerPlan((), (Cluster(tuple(range(8)), (0.125,) * 8),)))
    with model.active_experts(4), compacted(model, plan, base_values(model)) as compact:
        sent: list[torch.Tensor] = []
        hooks = [b.experts.register_forward_pre_hook(lambda _, args: sent.append(args[1])) for b in model.blocks]
        for pairs, used in ((1, 1), (3, 3), (4, 4), (7, 4)):
            with compact.sending(pairs):
                logits(model)
            first, second = (torch.bincount(index.flatten(), minlength=6).tolist() for index in sent[-2:])
            assert first[:5] == [23] * used + [0] * (5 - used)
            assert second[0] == 23
        for hook in hooks:
            hook.remove()
        assert all(work.rows == 0 for work in compact.take())
        logits(model)
        assert 0 < compact.take()[0].rows < 92


def test_work_of_other_routers_is_not_added() -> None:
    assert ExpertWork(1, 1, 8) + ExpertWork(2, 0, 8) == ExpertWork(3, 1, 8)
    with pytest.raises(ValueError, match="cannot be added"):
        ExpertWork(1, 1, 8) + replace(ExpertWork(1, 1, 8), choices=7)
