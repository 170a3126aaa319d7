"""FLUX's baselines: FMES keeps the most used experts, FMD leaves all on disk, FMQ holds all in few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_lm, token_ids
from compact_worlds import CompactWorld, logits, loud, model_bits, one_tier, places
from hypothesis import given
from hypothesis import strategies as st

from emberfed import federated_lora
from emberfed.clients import Client
from emberfed.errors import ConfigError
from emberfed.methods.fmes import most_used, most_used_of
from emberfed.models.low_bits import low_bit_copy
from emberfed.models.offloaded import OffloadedWeight, disk_bytes_read
from emberfed.records import Bundle
from emberfed.seeds import Seeds

# ------------------------------------------------------------------------------------------ which experts are kept


@st.composite
def uses(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """How often experts are used, and how many are held and tuned."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    numbers = draw(st.lists(st.integers(0, 5), min_size=layers * experts, max_size=layers * experts))
    held = draw(st.integers(layers, layers * experts))
    return torch.tensor(numbers).view(layers, experts), held, draw(st.integers(1, held))


@given(uses())
def test_kept_experts_are_the_most_used_of_each_layer_and_tuned_ones_the_most_used_of_those(
    case: tuple[torch.Tensor, int, int],
) -> None:
    """Against what each property says: sizes, order, and that no expert left out is used more than one that is kept."""
    use_LE, held, tuned = case
    kept = most_used(use_LE, held)
    sizes = [len(ids) for ids in kept]
    assert sum(sizes) == held
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    for row, ids in enumerate(kept):
        assert ids == sorted(set(ids))
        for expert in range(use_LE.shape[1]):
            if expert not in ids:
                rank = (-int(use_LE[row, expert]), expert)
                assert all((-int(use_LE[row, other]), other) < rank for other in ids)
    chosen = most_used_of(use_LE, kept, tuned)
    assert sum(map(len, chosen)) == tuned
    assert places(chosen) <= places(kept)
    left = places(kept) - places(chosen)
    for best in places(chosen):
        assert all((-int(use_LE[best]), *best) < (-int(use_LE[other]), *other) for other in left)
    assert all(ids == sorted(ids) for ids in chosen)


def test_most_used_by_hand() -> None:
    """Five of two layers of four: three of the first, two of the second; of equal ones the first."""
    use_LE = torch.tensor([[1, 7, 7, 0], [2, 2, 2, 9]])
    kept = most_used(use_LE, 5)
    assert kept == [[0, 1, 2], [0, 3]]
    assert most_used_of(use_LE, kept, 1) == [[], [3]]
    assert most_used_of(use_LE, kept, 4) == [[1, 2], [0, 3]]


@pytest.mark.parametrize("dropped", ["reroute", "skip"])
def test_a_client_keeps_what_its_survey_found_and_trains_the_best_of_it(
    dropped: str, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Counted by hand on the model itself; the state, and what it told other clients, does not change that later."""
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "fmes", "profile_bits": None, "dropped": dropped},
        clients=one_tier(tuned_experts=3, held_experts=9),
        training={"max_steps": 1},
    )
    told = []
    for round in (1, 2):
        [upload] = world.play(round, "c0")
        told.append((world.download("c0", round).content.meta["kept"], upload.content.meta["exploited"]))
    use_LE = by_hand(world, "c0")
    assert torch.equal(world.state.tensors["client.c0.use"], use_LE)
    kept = most_used(use_LE, 9)
    assert [len(ids) for ids in kept] == [5, 4]
    assert told == [(kept, most_used_of(use_LE, kept, 3))] * 2
    assert world.memories["c0"].tensors == {}


def by_hand(world: CompactWorld, id_: str) -> torch.Tensor:
    """Counts of experts by a loop over the client's tokens, on what transformers' own routers say."""
    lm: Any = tiny_lm()
    batch: Any = world.shard(id_).collate(world.shard(id_).examples)
    with torch.no_grad():
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        scores = lm(**given, output_router_logits=True).router_logits
    counts = torch.zeros(2, 8, dtype=torch.int64)
    for row, layer in enumerate(scores):
        for token, real in zip(layer, batch.attention_mask.flatten().tolist(), strict=True):
            for expert in token.topk(2).indices.tolist() if real else ():
                counts[row, expert] += 1
    return counts


# ------------------------------------------------------------------------------------------ what a dropped expert means


class _Loop(torch.nn.Module):
    """A layer's experts written as a loop over tokens, some of them dropped."""

    def __init__(self, block: Any, kept: list[int], top_k: int, reroutes: bool, renormalises: bool) -> None:
        super().__init__()
        self.block, self.kept, self.top_k = block, kept, top_k
        self.reroutes, self.renormalises = reroutes, renormalises

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        hidden_TD = hidden_BSD.flatten(0, 1)
        return torch.stack([self.token(token_D) for token_D in hidden_TD]).view(hidden_BSD.shape)

    def token(self, token_D: torch.Tensor) -> torch.Tensor:
        experts: Any = self.block.experts
        among = self.kept if self.reroutes else list(range(experts.gate_up_proj.shape[0]))
        shares = torch.softmax((self.block.gate.weight @ token_D)[among], dim=0)
        best = shares.topk(self.top_k)
        weights = best.values / best.values.sum() if self.renormalises else best.values
        total = torch.zeros_like(token_D)
        for place, weight in zip(best.indices.tolist(), weights, strict=True):
            expert = among[place]
            if expert in self.kept:
                gate, up = (experts.gate_up_proj[expert] @ token_D).chunk(2)
                total = total + weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
        return total


@pytest.mark.parametrize("gate", ["native", "renormalised"])
@pytest.mark.parametrize("dropped", ["reroute", "skip"])
def test_a_clients_own_model_is_the_one_without_the_others(
    dropped: str, gate: str, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Against transformers' model with a loop over tokens in the place of its experts."""
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "fmes", "dropped": dropped, "gate": gate},
        clients=one_tier(tuned_experts=2, held_experts=9, top_k=3),
    )
    world.assign(1)
    kept = world.download("c0", 1).content.meta["kept"]
    lm: Any = tiny_lm()
    for layer, ids in zip(lm.model.layers, kept, strict=True):
        layer.mlp = _Loop(layer.mlp, ids, 3, dropped == "reroute", gate == "renormalised")
    before = model_bits(world.model)
    torch.testing.assert_close(world.personal("c0", 1), logits(lm), rtol=1e-4, atol=1e-4)
    assert model_bits(world.model) == before
    assert not torch.allclose(world.personal("c0", 1), world.deployed(), rtol=1e-2, atol=1e-2)


def test_the_survey_s_work_is_counted_in_the_first_round_alone(tiny_model_folder: Path, tiny_data: Path) -> None:
    training = {"max_steps": 1, "batch_size": 64, "learning_rate": 1e-30}
    world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "fmes"}, training=training)
    stats = [world.play(round, "c0")[0].content.meta["stats"] for round in (1, 2, 3)]
    assert stats[0]["flops"] > stats[1]["flops"] == stats[2]["flops"]
    assert stats[0]["memory_traffic_bytes"] > stats[1]["memory_traffic_bytes"]
    assert not any(key.startswith("idle") for one in stats for key in one)


def test_a_client_that_was_never_surveyed_keeps_the_first_experts(tiny_model_folder: Path, tiny_data: Path) -> None:
    """As for its own model, before its first round: nothing is known of what it uses."""
    world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "fmes"})
    late = Client("late", world.material.budgets[0], 4)
    meta = world.method.dispatch(world.state, late, 1).content.meta
    assert (meta["kept"], meta["exploited"]) == ([[0, 1, 2], [0, 1, 2]], [[0, 1], []])


# ------------------------------------------------------------------------------------------ FMD and FMQ


def adapter(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in bundle.tensors.items() if name.startswith("layers.")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_off_loaded_experts_give_the_bits_of_those_in_memory(tiny_model_folder: Path, tiny_data: Path) -> None:
    """FMD on disk is FedIT in memory: uploads, states and deployed models of two rounds; only FMD reads the disk."""
    fmd = CompactWorld(tiny_model_folder, tiny_data, method={"name": "fmd"})
    homo = CompactWorld(tiny_model_folder, tiny_data, method={"name": "homolora", "rank": "adapter"})
    assert any(isinstance(module, OffloadedWeight) for module in fmd.model.lm.modules())
    for round in (1, 2):
        for ours, theirs in zip(fmd.play(round), homo.play(round), strict=True):
            assert same(dict(ours.content.tensors), dict(theirs.content.tensors))
            assert ours.content.meta["stats"]["disk_bytes"] > 0
            assert theirs.content.meta["stats"]["disk_bytes"] == 0
        assert same(adapter(fmd.state), adapter(homo.state))
    assert torch.equal(fmd.deployed(), homo.deployed())
    assert torch.equal(fmd.personal("c0", 3), homo.personal("c0", 3))
    assert disk_bytes_read(homo.model.lm) == 0 < disk_bytes_read(fmd.model.lm)


@pytest.mark.parametrize("bits", [4, 8])
def test_clients_train_on_experts_in_few_bits_and_the_global_model_is_the_base(
    bits: Any, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """An upload has the bits of training on a copy made by hand; the base is as found, and what is evaluated."""
    world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "fmq", "bits": bits}, training={"max_steps": 2})
    whole = CompactWorld(
        tiny_model_folder, tiny_data, method={"name": "homolora", "rank": "adapter"}, training={"max_steps": 2}
    )
    before = model_bits(world.model)
    world.state = Bundle(loud(adapter(world.state), 0.02), world.state.meta)
    whole.state = Bundle(loud(adapter(whole.state), 0.02), whole.state.meta)
    assert torch.equal(world.deployed(), whole.deployed())
    copy, download = low_bit_copy(world.model, bits), world.download("c0", 1)
    by_hand = federated_lora.train(
        whole.method.trainer,
        copy,
        download.content.tensors,
        4.0,
        "native",
        "none",
        download,
        world.shard("c0"),
        Seeds(0).at(round=1, client="c0"),
    )
    ours, theirs = world.fit("c0", 1), whole.fit("c0", 1)
    assert same(dict(ours.content.tensors), dict(by_hand.tensors))
    assert not same(adapter(ours.content), adapter(theirs.content)), "few bits are not the base"
    assert model_bits(world.model) == before
    with copy.active_experts(world.clients["c0"].budget.top_k):
        ids = token_ids(2, 9)
        plain = copy.lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert not torch.equal(world.personal("c0", 2), plain), "its LoRA is on it"
    assert not torch.equal(world.personal("c0", 2), whole.personal("c0", 2))


def test_routers_need_k_experts_to_choose_from(tiny_model_folder: Path, tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds 2 experts, but routers .* need top_k 2 in each of 2 layers"):
        CompactWorld(
            tiny_model_folder,
            tiny_data,
            method={"name": "fmes"},
            clients=one_tier(tuned_experts=1, held_experts=2, top_k=2),
        )
