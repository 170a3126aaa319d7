"""FFT-MoE over rounds: what is averaged, what stays with the client, what is told of the load, what is refused.

Shapes: C clients, L layers, M experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import Vision, bits
from hypothesis import given
from hypothesis import strategies as st
from test_lora_methods import World

import emberfed
from emberfed.aggregation import Update
from emberfed.errors import ConfigError
from emberfed.methods.fft_moe import LOAD, FftMoe, FftMoeConfig
from emberfed.models.sparse_adapter import is_expert
from emberfed.records import ACTIVATION_COUNTS, Payload

GATE = "layers.0.adapter.router.weight"
EVERYBODY = ("c0", "c1", "c2", "c3")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    return Vision.made(tmp_path_factory.mktemp("vision"))


def world(vision: Vision, **sections: Any) -> World:
    method = {"name": "fft_moe", **sections.pop("method", {})}
    data = {"task": "image_classification"}
    return World(vision.model, vision.data, method=method, data=data, **sections)


def weighted(uploads: Sequence[Payload], name: str, weights: Sequence[float]) -> torch.Tensor:
    """The mean of a tensor, formed in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for upload, weight in zip(uploads, weights, strict=True):
        total = total + upload.content.tensors[name].double() * weight / sum(weights)
    return total


def counts(uploads: Sequence[Payload]) -> torch.Tensor:
    """(C, L, M)."""
    return torch.stack([upload.content.tensors[ACTIVATION_COUNTS] for upload in uploads])


def test_everything_is_averaged_by_data_size_whatever_k(vision: Vision) -> None:
    found = world(vision)
    before = found.state.tensors
    uploads = found.play(1, *EVERYBODY)
    assert {upload.content.meta["adapter_top_k"] for upload in uploads} == {1, 2, 4}
    sizes = [upload.content.meta["examples"] for upload in uploads]
    assert len(set(sizes)) > 1
    used_LM = counts(uploads).sum(0) > 0
    for name in uploads[0].content.tensors:
        if name == ACTIVATION_COUNTS:
            continue
        mean, now = weighted(uploads, name, sizes), found.state.tensors[name]
        if is_expert(name):
            for expert, used in enumerate(used_LM[int(name.split(".")[1])]):
                if used:
                    torch.testing.assert_close(now[expert].double(), mean[expert], rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(now[expert], before[name][expert])
        else:
            torch.testing.assert_close(now.double(), mean, rtol=1e-5, atol=1e-6)


def test_activation_aware_weights_are_a3smoes(vision: Vision) -> None:
    """w ~ p (a / (k sum a))^gamma for each layer and expert; gates and head by data size."""
    found = world(vision, method={"weighting": "activation", "temperature": 3.0})
    uploads = found.play(1, *EVERYBODY)
    sizes = [upload.content.meta["examples"] for upload in uploads]
    top_ks = [upload.content.meta["adapter_top_k"] for upload in uploads]
    checked = 0
    for name, now in found.state.tensors.items():
        if not is_expert(name):
            continue
        layer = int(name.split(".")[1])
        for expert in range(4):
            shares = [
                size * (float(count[layer, expert]) / (k * float(count[layer].sum()))) ** 3
                for size, k, count in zip(sizes, top_ks, counts(uploads), strict=True)
            ]
            if sum(shares):
                torch.testing.assert_close(
                    now[expert].double(), weighted(uploads, name, shares)[expert], rtol=1e-4, atol=1e-5
                )
                checked += 1
    assert checked >= 8
    torch.testing.assert_close(found.state.tensors[GATE].double(), weighted(uploads, GATE, sizes), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["local", "fedavg"])
def test_whose_gate_a_client_goes_on_with(vision: Vision, kind: str) -> None:
    """A learning rate that falls to nothing shows where the second round began: a late client's at the mean."""
    training = {"learning_rate": 0.05, "round_decay": 1e-6}
    found = world(vision, method={"gate_aggregation": kind}, training=training)
    first = {upload.client: upload.content.tensors[GATE] for upload in found.play(1, "c0", "c1", "c2")}
    mean = found.state.tensors[GATE]
    assert all(float((gate - mean).abs().max()) > 1e-3 for gate in first.values())
    second = {upload.client: upload.content.tensors[GATE] for upload in found.play(2, *EVERYBODY)}
    for client, gate in second.items():
        began = mean if kind == "fedavg" or client == "c3" else first[client]
        assert float((gate - began).abs().max()) < 1e-5, client
        assert torch.equal(found.memories[client].tensors[GATE], gate)


def test_the_load_is_everybodys_use_and_goes_to_everybody(vision: Vision) -> None:
    found = world(vision)
    assert not found.state.tensors[LOAD].any()
    uploads = found.play(1, "c0", "c1", "c3")
    used_LM = counts(uploads).sum(0).double()
    load_LM = found.state.tensors[LOAD]
    torch.testing.assert_close(load_LM, (used_LM / used_LM.sum(1, keepdim=True)).float())
    torch.testing.assert_close(load_LM.sum(1), torch.ones(2))
    for client in found.clients.values():
        sent = found.method.dispatch(found.state, client, 2).content
        assert torch.equal(sent.tensors[LOAD], load_LM)
        assert sent.meta["adapter_top_k"] == client.budget.adapter_top_k


def at_k_1(found: World) -> str:
    return next(id_ for id_, client in found.clients.items() if client.budget.adapter_top_k == 1)


def gate_of_one_round(vision: Vision, **method: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate before and after the first round of a client whose k is 1."""
    found = world(vision, method=method)
    return found.state.tensors[GATE], found.fit(1, at_k_1(found)).content.tensors[GATE]


@pytest.mark.parametrize(
    "method", [{"balance": "switch"}, {"balance": "heterogeneity"}, {"balance": "none", "router_z_coef": 0.1}]
)
def test_at_k_1_a_gate_learns_from_auxiliary_losses_alone(vision: Vision, method: dict[str, Any]) -> None:
    """Its one weight is always 1, which has no slope."""
    before, after = gate_of_one_round(vision, balance="none")
    assert torch.equal(before, after)
    before, after = gate_of_one_round(vision, **method)
    assert not torch.equal(before, after)


def test_before_any_load_is_known_the_loss_is_switchs(vision: Vision) -> None:
    """omega is 1 and lambda is lambda_0 in the first round; in the second both tell clients apart."""
    one, other = world(vision, method={"balance": "heterogeneity"}), world(vision, method={"balance": "switch"})
    for round, same in ((1, True), (2, False)):
        for mine, theirs in zip(one.play(round, *EVERYBODY), other.play(round, *EVERYBODY), strict=True):
            equal = [torch.equal(tensor, theirs.content.tensors[name]) for name, tensor in mine.content.tensors.items()]
            assert all(equal) == same


# The rule of aggregation alone.

UP = "layers.0.adapter.experts.up_proj"


def updates(use: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[Update]:
    """A client for each row of counts; of every one an expert tensor and a gate, random."""
    draw = torch.Generator().manual_seed(len(use))
    return [
        Update(
            client=f"c{number}",
            tensors={UP: torch.randn(3, 2, 2, generator=draw), GATE: torch.randn(3, 2, generator=draw)},
            examples=size,
            tokens=max(1, sum(row)),
            top_k=1 + number % 3,
            activations={"layers.0.adapter.experts.": torch.tensor(row)},
        )
        for number, (row, size) in enumerate(zip(use, sizes, strict=True))
    ]


federations = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=count, max_size=count),
        st.lists(st.integers(1, 50), min_size=count, max_size=count),
    )
)


def mixed(found: list[Update], previous: Mapping[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    return FftMoe.combine(found, FftMoeConfig(**options), previous)


@given(federations)
def test_an_expert_nobody_used_keeps_its_bits_and_others_are_means(case: tuple[list[list[int]], list[int]]) -> None:
    """Temperature 0 is data size; with any temperature a mean lies between the clients' values."""
    use, sizes = case
    found = updates(use, sizes)
    previous = {UP: torch.full((3, 2, 2), 7.25), GATE: torch.zeros(3, 2)}
    plain = mixed(found, previous)
    flat = mixed(found, previous, weighting="activation", temperature=0.0)
    sharp = mixed(found, previous, weighting="activation", temperature=2.0)
    stacked = torch.stack([update.tensors[UP] for update in found])
    for expert in range(3):
        used = sum(row[expert] for row in use) > 0
        for result in (plain, flat, sharp):
            now = result[UP][expert]
            if not used:
                assert torch.equal(now, previous[UP][expert])
            else:
                assert (now >= stacked[:, expert].amin(0) - 1e-5).all()
                assert (now <= stacked[:, expert].amax(0) + 1e-5).all()
        if all(row[expert] for row in use):
            torch.testing.assert_close(plain[UP][expert], flat[UP][expert])
    torch.testing.assert_close(plain[GATE], sharp[GATE])


@given(federations)
def test_one_client_and_clients_that_agree_get_their_update_back(case: tuple[list[list[int]], list[int]]) -> None:
    use, sizes = case
    found = updates([[1 + count for count in row] for row in use], sizes)
    same = [Update(one.client, found[0].tensors, one.examples, one.tokens, one.top_k, one.activations) for one in found]
    previous = {UP: torch.zeros(3, 2, 2), GATE: torch.zeros(3, 2)}
    for options in ({}, {"weighting": "activation"}):
        for name, tensor in mixed(same, previous, **options).items():
            torch.testing.assert_close(tensor, found[0].tensors[name])


# What is refused.


def tiers(**keys: Any) -> list[dict[str, Any]]:
    return [{"name": "small", "share": 0.5, "adapter_top_k": 1}, {"name": "large", "share": 0.5, **keys}]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"clients": {"tiers": tiers(adapter_top_k=5)}},
            "clients.tiers: tier 'large' has adapter_top_k 5, but the adapter has 4 experts (adapter.num_experts); "
            "choose 1 to 4",
        ),
        (
            {"clients": {"tiers": tiers(top_k=1)}},
            "FFT-MoE needs adapter_top_k for every tier, the active experts of its adapter, but 'large' has none",
        ),
        ({"adapter": {"num_experts": 1}}, "adapter.num_experts is 1, which leaves FFT-MoE nothing to route"),
        ({"adapter": {"layers": [0, 2]}}, "adapter.layers names 2, but this vit model has layers 0 to 1"),
        ({"method": {"temperature": 1.0}}, "temperature has no effect with weighting 'data'"),
        ({"method": {"balance": "none", "balance_coef": 0.1}}, "balance_coef has no effect with balance 'none'"),
        ({"method": {"balance": "switched"}}, "'method.balance'"),
        ({"adapter": {"rank": 4}}, "unknown key 'adapter.rank'"),
        ({"clients": {"tiers": tiers(adapter_top_k=0)}}, "adapter_top_k"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_said_in_one_line(vision: Vision, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        world(vision, **sections)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tier_may_leave_the_models_own_k_to_the_checkpoint(
    vision: Vision, tiny_model_folder: Path, tiny_data: Path
) -> None:
    chosen = {"tiers": tiers(adapter_top_k=2)}
    assert {client.budget.top_k for client in world(vision, clients=chosen).clients.values()} == {1}
    sparse = World(tiny_model_folder, tiny_data, method={"name": "fft_moe"}, clients=chosen)
    assert {client.budget.top_k for client in sparse.clients.values()} == {2}


def test_methods_without_an_adapter_do_not_mind_its_k(vision: Vision, tmp_path: Path) -> None:
    runs = []
    for number in range(2):
        values = vision.config(method={"name": "homolora"}, training={"rounds": 1}, evaluation={"every": 0})
        if number:
            values["clients"]["tiers"] = [{**tier, "adapter_top_k": 3} for tier in values["clients"]["tiers"]]
        runs.append(bits(emberfed.run(values, output=tmp_path / str(number)).path))
    assert runs[0] == runs[1]
