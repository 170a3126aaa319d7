"""`emberfed.aggregate` as users of other frameworks meet it: foreign names, every method, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lora_methods import World
from torch import Tensor

import emberfed
from emberfed import federated, federated_experts
from emberfed.aggregation import Update, lora_factor
from emberfed.errors import AggregationError, ConfigError
from emberfed.federated_experts import ExpertTuningConfig
from emberfed.method import method_names

LAYER = "base_model.model.model.layers.0"
QUERY, UP, NORM = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.experts.up_proj", f"{LAYER}.input_layernorm.weight"
EXPERTS = f"{LAYER}.mlp.experts"
SIZE, OUT, COUNT, UNUSED = 6, 5, 3, 1
EVERY_METHOD = pytest.mark.parametrize("method", method_names())
AVERAGING = ("a3smoe", "dense_adapter", "fft_moe", "flame", "flux", "fmd", "fmes", "fmq", "homolora", "linear_probe")
GENERATES = pytest.mark.parametrize("method", [name for name in method_names() if name != "linear_probe"])


def tensors(seed: int, rank: int = 2, ending: str = "") -> dict[str, Tensor]:
    """A LoRA on attention, one on three stacked experts, and a norm."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        f"{QUERY}.lora_A{ending}": (rank, SIZE),
        f"{QUERY}.lora_B{ending}": (OUT, rank),
        f"{UP}.lora_A{ending}": (COUNT, rank, SIZE),
        f"{UP}.lora_B{ending}": (COUNT, OUT, rank),
        NORM: (SIZE,),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def federation(ending: str = "", ranks: tuple[int, ...] = (2, 2, 2)) -> list[Update]:
    """Three clients with 10, 30 and 60 examples; nobody uses expert 1."""
    used = [[6, 0, 2], [3, 0, 13], [8, 0, 8]]
    return [
        Update(
            client=f"client-{number}",
            tensors=tensors(number, rank, ending),
            examples=examples,
            tokens=8,
            top_k=1 + (number > 0),
            activations={EXPERTS: torch.tensor(counts)},
        )
        for number, (examples, rank, counts) in enumerate(zip((10, 30, 60), ranks, used, strict=True))
    ]


def ranks_for(method: str) -> tuple[int, int, int]:
    return (2, 2, 2) if method in AVERAGING else (1, 2, 4)


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def products(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """1 / R * B A of each pair, float64; other tensors as they are."""
    result = {}
    for name, tensor in found.items():
        factor = lora_factor(name)
        if factor is None:
            result[name] = tensor.double()
        elif factor.letter == "A":
            result[name] = found[factor.partner].double() @ tensor.double() / tensor.shape[-2]
    return result


# What every method does --------------------------------------------------------------------------------------------


@EVERY_METHOD
def test_the_order_of_updates_makes_no_difference_and_inputs_stay(method: str) -> None:
    updates, previous = federation(ranks=ranks_for(method)), tensors(9, 2 if method in AVERAGING else 4)
    held = [tensor for update in updates for tensor in update.tensors.values()] + list(previous.values())
    copies = [tensor.clone() for tensor in held]
    first = emberfed.aggregate(updates, method=method, previous=previous)
    second = emberfed.aggregate([updates[2], updates[0], updates[1]], method=method, previous=previous)
    assert same_bits(first, second)
    assert list(first) == sorted(previous)
    for tensor in first.values():
        tensor.zero_()
    assert all(torch.equal(one, other) for one, other in zip(held, copies, strict=True))


@GENERATES
def test_it_is_what_the_method_does_in_a_run(method: str, tiny_model_folder: Path, tiny_data: Path) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": method})
    state = world.state
    uploads = world.play(1, *world.clients)
    updates, previous = federated.updates_of(uploads, state.meta), federated.adapter_of(state.tensors)
    if isinstance(world.method.adapter, ExpertTuningConfig):
        updates, previous = federated_experts.updates_of(state, uploads)
    found = emberfed.aggregate(updates, method=method, previous=previous)
    expected = federated.adapter_of(world.state.tensors)
    if method != "flora":
        assert same_bits(found, dict(sorted(expected.items())))
        return
    # FLoRA's state is the stack of all rounds, without 1 / R; before the first round its one component is zero.
    for name, tensor in products(found).items():
        a, b = expected[name], expected[name.removesuffix("A") + "B"]
        torch.testing.assert_close(tensor, b.double() @ a.double(), rtol=1e-5, atol=1e-8)


@EVERY_METHOD
def test_clients_that_agree_are_believed(method: str) -> None:
    """So weights sum to 1 in every tensor; the experts' too, used or not."""
    agreed = tensors(4)
    updates = [replace(update, tensors=agreed) for update in federation()]
    found, expected = products(emberfed.aggregate(updates, method=method)), products(agreed)
    if method == "flora":  # an expert nobody used gets nothing from a round
        expected[f"{UP}.lora_A"][UNUSED] = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@EVERY_METHOD
def test_an_unused_expert_keeps_its_bits(method: str) -> None:
    previous = tensors(9, 2 if method in AVERAGING else 4)
    found = emberfed.aggregate(federation(ranks=ranks_for(method)), method=method, previous=previous)
    for name in (f"{UP}.lora_A", f"{UP}.lora_B"):
        if method != "flora":
            assert torch.equal(found[name][UNUSED], previous[name][UNUSED])
            assert not torch.equal(found[name][0], previous[name][0])
    if method == "flora":
        assert not bool(products(found)[f"{UP}.lora_A"][UNUSED].any())


@pytest.mark.parametrize("method", ["a3smoe", "flame"])
@pytest.mark.parametrize("previous", [None, tensors(9)], ids=["unknown", "known"])
def test_temperature_zero_is_fedavg(method: str, previous: dict[str, Tensor] | None) -> None:
    """By data size: 0.1, 0.3 and 0.6."""
    updates = federation()
    found = emberfed.aggregate(updates, method=method, previous=previous, temperature=0.0)
    fedavg = emberfed.aggregate(updates, method="homolora", previous=previous)
    for name, tensor in found.items():
        expected = sum(w * update.tensors[name] for w, update in zip((0.1, 0.3, 0.6), updates, strict=True))
        assert isinstance(expected, Tensor)
        if previous is not None and name.startswith(EXPERTS):
            expected[UNUSED] = previous[name][UNUSED]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tensor, fedavg[name], rtol=1e-5, atol=1e-6)


@given(st.permutations([0, 1, 2]), st.sampled_from(["per_token", "per_activation", "per_activation_over_k"]))
def test_weights_by_use_are_the_formulas(order: list[int], frequency: str) -> None:
    """Expert 0 of the three clients: p f^2, with f = a / n, a / sum a, or that over K; a = 6, 3, 8 of 8, 16, 16."""
    updates = [federation()[number] for number in order]
    found = emberfed.aggregate(updates, method="a3smoe", temperature=2.0, frequency=frequency)
    f = {"per_token": (6 / 8, 3 / 8, 8 / 8), "per_activation": (6 / 8, 3 / 16, 8 / 16)}
    f["per_activation_over_k"] = (6 / 8, 3 / 32, 8 / 32)
    raw = [p * x**2 for p, x in zip((0.1, 0.3, 0.6), f[frequency], strict=True)]
    name = f"{UP}.lora_B"
    expected = sum(w / sum(raw) * tensors(number)[name][0] for number, w in enumerate(raw))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found[name][0], expected, rtol=1e-5, atol=1e-6)


def test_the_bare_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "aggregate.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    namespace: dict[str, Any] = {}
    exec(example[1], namespace)  # its own assertions are what it shows
    assert len(namespace["whole"]) == len(namespace["for_ann"]) == 4


# Names -------------------------------------------------------------------------------------------------------------


@EVERY_METHOD
@pytest.mark.parametrize("ending", [".weight", ".default.weight"])
def test_names_as_peft_writes_them_are_pairs_too(method: str, ending: str) -> None:
    """Were they single tensors, HetLoRA would average them without norms, and FlexLoRA not their products."""
    ranks = ranks_for(method)
    plain = emberfed.aggregate(federation(ranks=ranks), method=method)
    found = emberfed.aggregate(federation(ending, ranks), method=method)
    renamed = {name + ending if lora_factor(name) else name: tensor for name, tensor in plain.items()}
    assert same_bits(found, dict(sorted(renamed.items())))


def test_two_adapters_of_one_module_are_two_pairs() -> None:
    def both(seed: int) -> dict[str, Tensor]:
        return {
            name: tensor
            for number, adapter in enumerate((".default.weight", ".other.weight"))
            for name, tensor in tensors(seed + 10 * number, 2 + number, adapter).items()
        }

    updates = [replace(update, tensors=both(number)) for number, update in enumerate(federation())]
    found = emberfed.aggregate(updates, method="flexlora")
    for number, adapter in enumerate((".default.weight", ".other.weight")):
        alone = [
            replace(update, tensors=tensors(client + 10 * number, 2 + number, adapter))
            for client, update in enumerate(federation())
        ]
        expected = emberfed.aggregate(alone, method="flexlora")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if adapter in name)


def test_ranks_may_differ_between_modules() -> None:
    """As with PEFT's rank_pattern: attention of rank 2, experts of rank 3."""
    updates = []
    for number, update in enumerate(federation()):
        experts = {name: tensor for name, tensor in tensors(number, 3).items() if name.startswith(EXPERTS)}
        updates.append(replace(update, tensors={**update.tensors, **experts}))
    for method in ("flexlora", "flora"):
        options: dict[str, Any] = {"rank": 6} if method == "flexlora" else {}
        found = products(emberfed.aggregate(updates, method=method, **options))
        for name in (f"{QUERY}.lora_A", f"{UP}.lora_A"):
            expected = sum(w * products(u.tensors)[name] for w, u in zip((0.1, 0.3, 0.6), updates, strict=True))
            assert isinstance(expected, Tensor)
            kept = [expert for expert in range(COUNT) if expert != UNUSED] if name.startswith(EXPERTS) else slice(None)
            torch.testing.assert_close(found[name][kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_a_layers_experts_are_not_those_of_layer_10() -> None:
    """`layers.1` begins `layers.10` only as text: layer 10 has no counts here, and is averaged by examples."""

    def update(client: str, examples: int, count: int) -> Update:
        named = {f"layers.{layer}.up": torch.full((2, 1), float(examples)) for layer in (1, 10)}
        counts = torch.tensor([count, 8 - count])
        return Update(client, named, examples, tokens=8, top_k=1, activations={"layers.1": counts})

    found = emberfed.aggregate([update("a", 1, 8), update("b", 3, 0)], method="a3smoe")
    assert found["layers.1.up"].tolist() == [[1.0], [3.0]]
    assert found["layers.10.up"].tolist() == [[2.5], [2.5]]


def test_redistribute_cuts_pairs_of_any_name_and_leaves_the_rest() -> None:
    whole = emberfed.aggregate(federation(".default.weight", (1, 2, 4)), method="flexlora")
    sent = emberfed.redistribute(whole, 3)
    assert list(sent) == list(whole)
    assert torch.equal(sent[NORM], whole[NORM])
    for path in (QUERY, UP):
        a, b = (sent[f"{path}.lora_{letter}.default.weight"] for letter in "AB")
        whole_a, whole_b = (whole[f"{path}.lora_{letter}.default.weight"] for letter in "AB")
        assert torch.equal(a, whole_a[..., :3, :])
        torch.testing.assert_close(b / 3, whole_b[..., :3] / 4)


# What is refused ---------------------------------------------------------------------------------------------------


def changed(number: int, **tensors_: Any) -> list[Update]:
    """The federation, one client's tensors changed by the last part of their names; None takes one away."""
    updates = federation()
    held: dict[str, Any] = dict(updates[number].tensors)
    for key, tensor in tensors_.items():
        name = next(name for name in held if name.endswith(key) and not name.startswith(EXPERTS))
        held.pop(name) if tensor is None else held.update({name: tensor})
    updates[number] = replace(updates[number], tensors=held)
    return updates


def without(key: str) -> list[Update]:
    return [
        replace(update, tensors={name: tensor for name, tensor in update.tensors.items() if not name.endswith(key)})
        for update in federation()
    ]


def told(number: int, **fields: Any) -> list[Update]:
    updates = federation()
    updates[number] = replace(updates[number], **fields)
    return updates


def everybody(**fields: Any) -> list[Update]:
    return [replace(update, **fields) for update in federation()]


NAN = torch.full((SIZE,), torch.nan)
OTHER_PREVIOUS = {**tensors(9), f"{QUERY}.lora_A": torch.ones(2, SIZE + 1)}
OTHER_EXPERTS = {**tensors(9), f"{UP}.lora_A": torch.ones(COUNT, 2, SIZE + 1)}
PART_OF_PREVIOUS = {name: tensor for name, tensor in tensors(9).items() if name == NORM}


@pytest.mark.parametrize(
    ("method", "updates", "options", "words"),
    [
        ("homolora", [], {}, r"there are no updates to put together; give at least one"),
        ("homolora", [*federation(), federation()[1]], {}, r"client 'client-1' has two updates"),
        ("homolora", changed(1, weight=NAN), {}, r"client-1: '.*input_layernorm.weight' holds .* not finite"),
        ("flora", changed(0, weight=NAN / 0), {}, r"client-0: '.*input_layernorm.weight' holds .* not finite"),
        ("flexlora", changed(2, weight=np.ones(SIZE)), {}, r"client-2: '.*weight' is float64, .* torch.as_tensor"),
        ("flexlora", changed(2, weight=torch.ones(SIZE).int()), {}, r"client-2: '.*weight' is torch.int32, expected"),
        ("flexlora", changed(2, weight=[1.0]), {}, r"client-2: '.*weight' is list, expected a torch tensor"),
        ("hetlora", changed(2, weight=None), {}, r"client-0 sent '.*weight', which client-2 did not"),
        ("homolora", changed(2, weight=torch.ones(9)), {}, r"client-2: '.*weight' has shape \(9,\), client-0 sent \(6"),
        ("hetlora", without("q_proj.lora_A"), {}, r"q_proj.lora_B' is there without '.*q_proj.lora_A'; the factors"),
        ("flora", without("q_proj.lora_B"), {}, r"q_proj.lora_A' is there without '.*q_proj.lora_B'; the factors"),
        ("flexlora", changed(1, lora_A=torch.ones(2, 7)), {}, r"client-1: '.*q_proj.lora_A' .* another weight than cl"),
        ("flora", changed(1, lora_B=torch.ones(9, 2)), {}, r"client-1: '.*q_proj.lora_A' .* only ranks may differ"),
        ("hetlora", changed(1, lora_B=torch.ones(5, 3)), {}, r"client-1: '.*lora_A' has shape \(2, 6\) and its lora_B"),
        ("flora", changed(1, lora_A=torch.ones(6)), {}, r"client-1: '.*lora_A' has shape \(6,\) and its lora_B \(5, 2"),
        ("flora", changed(0, lora_A=torch.ones(2, 2, 6)), {}, r"client-0: '.*lora_A' .* expected \(..., R, in\)"),
        ("homolora", told(1, examples=0), {}, r"client-1: examples must be at least 1, found 0"),
        ("nonesuch", federation(), {}, r"nonesuch"),
        ("flexlora", federation(), {"temprature": 1}, r"options.temprature"),
        ("flexlora", federation(), {"rank": 0}, r"options.rank"),
        ("homolora", federation(), {"server_optimizer": {"name": "fedadam"}}, r"server_optimizer has a memory"),
        ("a3smoe", everybody(activations={}), {}, r"client-0: activation-aware weights need activations, tokens"),
        ("flame", told(1, tokens=None), {}, r"client-1: activation-aware weights need activations, tokens and top_k"),
        ("flexlora", told(2, top_k=None), {"weighting": "activation"}, r"client-2: activation-aware weights need"),
        ("a3smoe", told(2, top_k=0), {}, r"client-2: tokens must be at least 0 and top_k at least 1, found 8 and 0"),
        ("a3smoe", told(2, tokens=-8), {}, r"client-2: tokens must be at least 0 and top_k at least 1, found -8"),
        ("a3smoe", told(1, activations={UP: torch.ones(3)}), {}, r"client-1 counted activations of \['.*'\], client-0"),
        ("a3smoe", told(1, activations={EXPERTS: torch.ones(4)}), {}, r"must be one \(experts,\) for all"),
        ("a3smoe", everybody(activations={EXPERTS: torch.ones(1, 3)}), {}, r"must be one \(experts,\) for all"),
        ("a3smoe", told(1, activations={EXPERTS: NAN[:3]}), {}, r"client-1: activations of '.*' must be counts"),
        ("a3smoe", told(1, activations={EXPERTS: -torch.ones(3)}), {}, r"client-1: activations of '.*' must be counts"),
        (
            "a3smoe",
            everybody(activations={EXPERTS: torch.ones(1)}),
            {},
            r"client-0: .* over \(3,\), but activations of",
        ),
        ("flora", everybody(activations={EXPERTS: torch.ones(4)}), {}, r"client-0: .* over \(3,\), but activations of"),
        ("a3smoe", federation(), {"previous": PART_OF_PREVIOUS}, r"previous lacks '.*up_proj.lora_A', which the clie"),
        ("hetlora", federation(), {"previous": PART_OF_PREVIOUS}, r"previous lacks '.*lora_A', which the clients sent"),
        ("a3smoe", federation(), {"previous": OTHER_EXPERTS}, r"\(3, 2, 6\), but \(3, 2, 7\) in previous"),
        ("flexlora", federation(), {"previous": OTHER_PREVIOUS}, r"client-0: .* another weight than that of previous"),
        ("hetlora", federation(ranks=(2, 3, 2)), {"previous": tensors(9)}, r"client-1: .* rank 3, above the global ra"),
        ("flexlora", federation(), {"previous": tensors(9), "rank": 3}, r"previous '.*lora_A' .*expected .* of rank 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_said_in_one_line(
    method: str, updates: list[Update], options: dict[str, Any], words: str
) -> None:
    with pytest.raises((AggregationError, ConfigError), match=words) as raised:
        emberfed.aggregate(updates, method=method, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("held", "rank", "words"),
    [
        (tensors(0), 0, r"rank 0 cannot be cut from '.*lora_A' of rank 2; choose 1 to 2"),
        (tensors(0), 3, r"rank 3 cannot be cut from '.*lora_A' of rank 2; choose 1 to 2"),
        ({f"{QUERY}.lora_B": torch.ones(5, 2)}, 1, r"'.*lora_B' is there without '.*lora_A'"),
    ],
)
def test_what_cannot_be_redistributed(held: dict[str, Tensor], rank: int, words: str) -> None:
    with pytest.raises(AggregationError, match=words):
        emberfed.redistribute(held, rank)


@pytest.mark.parametrize("clients", [2, 3])
def test_hetlora_weighs_stacked_experts_by_norm_without_counts(clients: int) -> None:
    """Two or three clients and three experts: a share belongs to a client and an expert, not to whichever axis fits.

    A = 1 and B = scale, so the norm of an expert's product is its scale; expert 1 of client 0 has none.
    """
    scales = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 2.0], [4.0, 1.0, 4.0]])[:clients]
    updates = [
        Update(f"c{row}", {"x.lora_A": torch.ones(3, 1, 1), "x.lora_B": scale.view(3, 1, 1)}, 1)
        for row, scale in enumerate(scales)
    ]
    found = emberfed.aggregate(updates, method="hetlora")["x.lora_B"].flatten()
    expected = (scales * scales).sum(dim=0) / scales.sum(dim=0)
    torch.testing.assert_close(found, expected)


def test_activations_under_another_name_are_refused() -> None:
    tensors = {"x.lora_A": torch.ones(3, 1, 2), "x.lora_B": torch.ones(3, 2, 1)}
    update = Update("c0", tensors, 1, 5, 1, {"y": torch.ones(3)})
    with pytest.raises(AggregationError, match=r"c0: activations of 'y' were given.*and none of 'x.lora_A'"):
        emberfed.aggregate([update], method="a3smoe")


def test_the_result_carries_no_graph() -> None:
    tensors = {"x.lora_A": torch.ones(1, 2, requires_grad=True), "x.lora_B": torch.ones(2, 1, requires_grad=True)}
    found = emberfed.aggregate([Update("c0", tensors, 1), Update("c1", tensors, 1)], method="flexlora")
    assert not any(tensor.requires_grad for tensor in found.values())


def test_numbers_whose_products_overflow_are_refused() -> None:
    tensors = {"x.lora_A": torch.full((1, 2), 3e38), "x.lora_B": torch.ones(2, 1)}
    with pytest.raises(AggregationError, match=r"c0: 'x.lora_A' holds numbers above 1e\+15, too large"):
        emberfed.aggregate([Update("c0", tensors, 1)], method="flexlora")
