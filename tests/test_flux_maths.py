"""FLUX against the formulas it is said to follow, written once more as loops over tokens, in float64, by hand."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_lm, token_ids
from compact_worlds import MATRICES, CompactWorld, loud, one_tier, places
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emberfed import costs
from emberfed.models.compact import ExpertWork
from emberfed.models.expert_merging import layer_budgets
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Bundle

FULL = {"tune": "full", "rank": 8, "alpha": 16.0}
AS_IT_IS = {"profile": "fresh", "profile_bits": None}

# ------------------------------------------------------------------------------------------ budgets of layers


@given(st.data())
def test_where_no_bound_is_met_budgets_are_the_printed_formula(data: st.DataObject) -> None:
    """floor(B b_l / sum b) with b_l = (L - l + 1) / v_l in fractions; what is left goes to the largest remainders."""
    layers, experts = data.draw(st.integers(1, 4)), 8
    counts = [data.draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts)) for _ in range(layers)]
    counts = [[*row[:-2], 0, 30] for row in counts]  # used so unevenly that the variance has no floor
    total = data.draw(st.integers(layers, layers * experts))
    weights = []
    for number, row in enumerate(counts, start=1):
        mean = Fraction(sum(row), experts)
        variance = sum((count - mean) ** 2 for count in row) / experts
        weights.append((layers - number + 1) / variance)
    shares = [total * weight / sum(weights) for weight in weights]
    found = layer_budgets(total, torch.tensor(counts) / 64, [experts] * layers)
    assert sum(found) == total
    if all(1 <= share <= experts for share in shares):
        expected = [floor(share) for share in shares]
        by_remainder = sorted(range(layers), key=lambda place: expected[place] - shares[place])
        for place in by_remainder[: total - sum(expected)]:
            expected[place] += 1
        assert list(found) == expected


# ------------------------------------------------------------------------------------------ what a client holds


def routed_by_hand(lm: Any, shard: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """For each layer: tokens of each expert, attention that they receive in all, and examples (N, E) that reach it.

    One example at a time, so that there is no padding; attention from transformers' eager implementation.
    """
    lm.config._attn_implementation = "eager"
    counts, received = ([torch.zeros(8, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    members: list[list[list[bool]]] = [[], []]
    for example in shard.examples:
        chosen: list[Tensor] = []
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda _, __, out, chosen=chosen: chosen.append(out[2]))
            for layer in lm.model.layers
        ]
        with torch.no_grad():
            answer = lm(input_ids=shard.collate([example]).input_ids, output_attentions=True)
        for hook in hooks:
            hook.remove()
        for row in range(2):
            weights_HQS = answer.attentions[row][0].double()
            heads, length, _ = weights_HQS.shape
            here = [False] * 8
            for token in range(length):
                given_ = float(weights_HQS[:, :, token].sum()) / (heads * length)
                for expert in chosen[row][token].tolist():
                    counts[row][expert] += 1
                    received[row][expert] += given_
                    here[expert] = True
            members[row].append(here)
    return counts, received, [torch.tensor(of_row) for of_row in members]


def values_by_hand(lm: Any, state: Bundle, row: int, expert: int) -> list[Tensor]:
    """Gate, up and down of an expert, float64 (out, in): the base, and 4 / 2 B A."""
    experts = lm.model.layers[row].mlp.experts
    base = [*experts.gate_up_proj[expert].detach().double().chunk(2), experts.down_proj[expert].detach().double()]
    found = []
    for matrix, weight in zip(MATRICES, base, strict=True):
        a, b = (state.tensors[f"layers.{row}.experts.{matrix}.lora_{side}"][expert].double() for side in "AB")
        found.append(weight + 2 * b @ a)
    return found


def held_by_hand(state: Bundle, tuned: set[tuple[int, int]], alphas: list[Tensor], top_k: int) -> Any:
    """Transformers' own model, in which all experts of a layer but the tuned ones are sum alpha W / sum alpha."""
    base, lm = tiny_lm(), tiny_lm()
    for row in range(2):
        lm.model.layers[row].mlp.gate.top_k = top_k
        experts: Any = lm.model.layers[row].mlp.experts
        values = [values_by_hand(base, state, row, expert) for expert in range(8)]
        merged = [expert for expert in range(8) if (row, expert) not in tuned]
        weights = torch.tensor([float(alphas[row][expert]) for expert in merged], dtype=torch.float64)
        stacked = [torch.stack([values[expert][part] for expert in merged]) for part in range(3)]
        means = [torch.einsum("e,eoi->oi", weights / weights.sum(), stack) for stack in stacked]
        with torch.no_grad():
            for expert in range(8):
                gate, up, down = means if expert in merged else values[expert]
                experts.gate_up_proj[expert] = torch.cat([gate, up]).float()
                experts.down_proj[expert] = down.float()
    return lm


def profiled(model: Path, data: Path, rule: str) -> CompactWorld:
    """One merged expert per layer, K = 4 of 8, so that several of a token's experts are often in it; loud LoRA."""
    world = CompactWorld(
        model,
        data,
        method={"name": "flux", **AS_IT_IS, "layer_budget": "one", "merge_weights": rule},
        clients=one_tier(tuned_experts=3, held_experts=7, top_k=4),
        training={"max_steps": 1},
    )
    world.assign(1)
    world.fit("c0", 1)
    layers = {name: tensor for name, tensor in world.state.tensors.items() if name.startswith("layers.")}
    world.state = Bundle({**world.state.tensors, **loud(layers)}, world.state.meta)
    return world


def test_a_survey_tells_how_many_examples_reach_each_expert(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "flux", **AS_IT_IS},
        clients=one_tier(tuned_experts=2, held_experts=6),
    )
    _, _, reached = routed_by_hand(tiny_lm(), world.shard("c0"))
    found_LE = world.survey(world.clients["c0"], 1).content.tensors["reach"]
    assert found_LE.tolist() == [of_row.sum(0).tolist() for of_row in reached]
    assert not all(of_row.all() for of_row in reached)


@pytest.mark.parametrize("rule", ["attention_frequency", "frequency"])
def test_a_clients_own_model_is_merged_by_frequency_times_attention(
    rule: str, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Of the present values, LoRA folded in; gate weights of experts in one slot add up."""
    world, base = profiled(tiny_model_folder, tiny_data, rule), tiny_lm()
    for layer in base.model.layers:
        layer.mlp.gate.top_k = 4
    counts, received, _ = routed_by_hand(base, world.shard("c0"))
    # f a = (n / T) (sum of what is received / n)
    alphas = received if rule == "attention_frequency" else counts
    meta = world.download("c0", 1).content.meta
    tuned = places(meta["exploited"]) | places(meta["explored"])
    assert len(tuned) == 3
    ids = token_ids(2, 9)
    with torch.inference_mode():
        expected = held_by_hand(world.state, tuned, alphas, 4)(input_ids=ids).logits
    found = world.personal("c0", 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        other = held_by_hand(world.state, tuned, [torch.ones(8)] * 2, 4)(input_ids=ids).logits
    assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("held", [5, 9, 16])
def test_a_client_fills_the_room_it_has(held: int, tiny_model_folder: Path, tiny_data: Path) -> None:
    """Tuned and merged experts of all layers are as many as it can hold."""
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "flux", **AS_IT_IS},
        clients=one_tier(tuned_experts=3, held_experts=held),
    )
    world.assign(1)
    download, client = world.download("c0", 1), world.clients["c0"]
    with world.method.personal(world.model, download, client, world.memories["c0"]) as model:
        assert slots(model) == held
    with world.method.held(world.model, download, client) as found:
        assert slots(found.model) == held


def slots(model: FoundationModel) -> int:
    experts: list[Any] = [block.experts for block in model.blocks]
    return sum(module.num_experts for module in experts)


# ------------------------------------------------------------------------------------------ a client's work


def test_training_in_full_goes_on_from_what_was_trained(tiny_model_folder: Path, tiny_data: Path) -> None:
    """A rate of 1e-30 moves nothing: the upload of round 2 has the server's bits, which are not the base's."""
    sections: dict[str, Any] = {
        "method": {"name": "flux", "epsilon_first": 1.0},
        "adapter": FULL,
        "clients": one_tier(tuned_experts=4, held_experts=16),
    }
    first, second = (
        CompactWorld(tiny_model_folder, tiny_data, **sections, training={"max_steps": 1, "learning_rate": rate})
        for rate in (0.1, 1e-30)
    )
    first.play(1, "c0")
    second.state = Bundle(first.state.tensors, {**first.state.meta, "roles": {}})
    second.memories = first.memories
    trained = first.state.meta["trained"]
    told = {"exploited": trained, "explored": [[], []]}
    second.state = Bundle(second.state.tensors, {**second.state.meta, "roles": {"c0": told}})
    found = second.fit("c0", 2).content.tensors
    for row in range(2):
        for matrix, base in zip(MATRICES, base_weights(row), strict=True):
            name = f"layers.{row}.experts.{matrix}.weight"
            if trained[row]:
                assert torch.equal(found[name], first.state.tensors[name])
                assert not torch.allclose(found[name], base[trained[row]], rtol=1e-3, atol=1e-3)


def base_weights(row: int) -> list[Tensor]:
    experts: Any = tiny_lm().model.layers[row].mlp.experts
    return [*experts.gate_up_proj.detach().chunk(2, dim=1), experts.down_proj.detach()]


def test_exploring_in_micro_batches_finds_the_same(tiny_model_folder: Path, tiny_data: Path) -> None:
    found = []
    for micro in (None, 2):
        world = CompactWorld(
            tiny_model_folder,
            tiny_data,
            method={"name": "flux", **AS_IT_IS, "epsilon_first": 0.3, "exploration_step": 0.05},
            adapter=FULL,
            clients=one_tier(tuned_experts=6, held_experts=12),
            training={"batch_size": 6, "micro_batch_size": micro, "max_steps": 1},
        )
        world.assign(1)
        explored = places(world.download("c0", 1).content.meta["explored"])
        figures_LE = world.fit("c0", 1).content.tensors["gradient_rms"]
        found.append(torch.stack([figures_LE[place] for place in sorted(explored)]))
    assert len(found[0]) == 4
    assert bool((found[0] > 0).all())
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-5)


def test_each_direction_of_exploring_costs_two_forward_passes(tiny_model_folder: Path, tiny_data: Path) -> None:
    """Of all examples in one batch, with room for all experts in full: K rows a token in each layer, and no LoRA.

    A pass over T positions of n examples of length S multiplies by four attention matrices and the router in each of
    two layers, by three of an expert for each real token's two, makes scores and mixes values for S^2 pairs of each
    of four heads of size 8, and logits of all examples where any has a target.
    """
    flops = []
    for draws in (1, 2):
        world = CompactWorld(
            tiny_model_folder,
            tiny_data,
            method={"name": "flux", **AS_IT_IS, "epsilon_first": 0.3, "exploration_draws": draws},
            adapter=FULL,
            clients=one_tier(tuned_experts=6, held_experts=16),
            training={"batch_size": 64, "max_steps": 1},
        )
        world.assign(1)
        upload = world.fit("c0", 1)
        flops.append(upload.content.meta["stats"]["flops"])
    shard = world.shard("c0")
    explored = places(world.download("c0", 1).content.meta["explored"])
    assert len(explored) == 4
    batch: Any = shard.collate(shard.examples)
    number, length = batch.input_ids.shape
    rows = 2 * int(batch.attention_mask.sum())
    layer = 4 * number * length * 32 * 32 + 2 * 4 * number * length**2 * 8 + number * length * 32 * 8
    forward = 2 * 2 * (layer + rows * 3 * 32 * 16) + head_flops(batch)
    assert flops[1] - flops[0] == 2 * 4 * forward


def head_flops(batch: Any) -> int:
    """2 * 32 * 64 for each position of all examples where the next token of any is a target."""
    return 2 * 32 * 64 * len(batch.labels) * int((batch.labels[:, 1:] != -100).any(0).sum())


def test_merging_costs_a_multiply_and_an_add_for_each_number(tiny_model_folder: Path, tiny_data: Path) -> None:
    """Where K is 1 no token has two experts in one slot, so that all else is the same work with and without merging.

    One expert of the first layer is tuned: merging leaves its tokens as they are. 7 and 8 others of 3 * 32 * 16 each.
    """
    flops = []
    for rule, held in (("adaptive", 16), ("one", 3)):
        world = CompactWorld(
            tiny_model_folder,
            tiny_data,
            method={"name": "flux", "layer_budget": rule, "epsilon_first": 1.0},
            clients=one_tier(tuned_experts=1, held_experts=held, top_k=1),
            training={"max_steps": 1, "batch_size": 64},
        )
        world.assign(1)
        best = int(world.memories["c0"].tensors["reached"].sum(0)[0].argmax())
        told = {"exploited": [[best], []], "explored": [[], []]}
        world.state = Bundle(world.state.tensors, {**world.state.meta, "roles": {"c0": told}})
        flops.append(world.fit("c0", 1).content.meta["stats"]["flops"])
    assert flops[1] - flops[0] == 2 * (7 + 8) * 3 * 32 * 16


def test_work_of_few_tuned_experts_by_hand() -> None:
    """OLMoE of 2 layers, D 32, F 16, 4 heads of 8, 64 tokens; 18 positions in 2 sequences; layer 0 tunes two experts.

    30 and 25 rows are computed, 11 of the first are tuned experts'. Forward, each 2 FLOPs per multiply-add: attention,
    scores and mix, router, three matrices a row, head. Backward, layer 0: the frozen down matrix once (its input leads
    to gate and up); A of gate and up once (nothing below is trained), B and down's factors twice. Layer 1: everything
    frozen once, scores and mix twice; the head once.
    """
    shape = FoundationModel(tiny_lm()).shape
    tokens, pairs, rank = 18, 2 * 81, 2
    sides = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    factors = {}
    for matrix, (outputs, inputs) in sides.items():
        factors[f"layers.0.experts.{matrix}.lora_A"] = torch.zeros(2, rank, inputs)
        factors[f"layers.0.experts.{matrix}.lora_B"] = torch.zeros(2, outputs, rank)
    full = {f"layers.0.experts.{matrix}.weight": torch.zeros(2, *size) for matrix, size in sides.items()}
    counted = (ExpertWork(30, 11, 8), ExpertWork(25, 0, 8))
    work = costs.Work(
        tokens=tokens, routed_tokens=tokens, attended_pairs=pairs, top_k=2, head_tokens=tokens, expert_work=counted
    )
    linears, mixing, router = 4 * 2 * tokens * 32 * 32, 2 * 2 * pairs * 32, 2 * tokens * 32 * 8
    matrix_of_row, head = 2 * 32 * 16, 2 * tokens * 32 * 64
    forward = 2 * (linears + mixing + router) + (30 + 25) * 3 * matrix_of_row + head
    above = linears + 2 * mixing + router + 25 * 3 * matrix_of_row + head
    low, high = 2 * 11 * rank * 32, 2 * 11 * rank * 16  # a product with the side of size D, and of size F
    assert costs.forward_flops(shape, work, factors) == forward + 3 * (low + high)
    backward = 30 * matrix_of_row + 2 * (low + 2 * high) + 2 * (high + low) + above
    assert costs.backward_flops(shape, work, factors) == backward
    assert costs.forward_flops(shape, work, full) == forward
    assert costs.backward_flops(shape, work, full) == 30 * matrix_of_row + 3 * 11 * matrix_of_row + above
