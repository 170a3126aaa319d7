"""Stacks of some experts: aggregation by hand, weights in full, figures of gradients, and budgets that are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from builders import save_tiny_family, tiny_lm
from compact_worlds import MATRICES, CompactWorld, bundle_bits, logits, loud, one_tier, places
from federations import config
from torch import Tensor
from torch.func import functional_call

import emberfed
from emberfed import federated_experts
from emberfed.aggregation import Update
from emberfed.config import parse
from emberfed.errors import AggregationError, ConfigError, ModelError
from emberfed.models import expert_tuning
from emberfed.models.tuning_layout import all_rows
from emberfed.records import Bundle, Payload
from emberfed.tasks import load_task

# ------------------------------------------------------------------------------------------ aggregation, by hand

EXAMPLES = {"a": 1, "b": 3, "c": 4}
NAME = "layers.3.experts.up_proj"


def upload(client: str, exploited: list[int], values: list[float], ending: str) -> Payload:
    tensors = {f"{NAME}.{ending}": torch.tensor(values).view(-1, 1, 1)} if values else {}
    meta = {"exploited": [exploited], "examples": EXAMPLES[client], "tokens": 9, "top_k": 2}
    return Payload(1, client, Bundle(tensors, meta))


def combined(state: Bundle, uploads: list[Payload]) -> dict[str, Tensor]:
    return federated_experts.combine(*federated_experts.updates_of(state, uploads))


def test_each_expert_is_the_mean_of_the_clients_that_tuned_it() -> None:
    """Three clients with 1, 3 and 4 examples; of five experts in full, 1 and 2 were tuned before, as 10 and 20.

    a tunes 0 and 1 (as 8 and 16), b tunes 1 and 4 (as 24 and 7), c tunes 1 (as 32):
    expert 0 is a's, 8; expert 1 is (1 * 16 + 3 * 24 + 4 * 32) / 8 = 27; expert 2 stays 20; expert 4 is b's, 7.
    Expert 3 was never tuned, so that the state holds nothing of it.
    """
    meta = {"tune": "full", "sparse_layers": [3], "num_experts": 5, "matrices": {"up_proj": [1, 1]}}
    state = Bundle({f"{NAME}.weight": torch.tensor([10.0, 20.0]).view(2, 1, 1)}, {**meta, "trained": [[1, 2]]})
    uploads = [
        upload("a", [0, 1], [8, 16], "weight"),
        upload("b", [1, 4], [24, 7], "weight"),
        upload("c", [1], [32], "weight"),
    ]
    found = combined(state, uploads)
    assert {name: tensor.flatten().tolist() for name, tensor in found.items()} == {f"{NAME}.weight": [8, 27, 20, 7]}
    assert federated_experts.trained(state.meta, uploads) == {"trained": [[0, 1, 2, 4]]}


def test_with_lora_all_experts_have_a_place_from_the_start() -> None:
    """As above, on the stack of all: expert 3 keeps its 3, and a client that tunes nothing here has no say."""
    meta = {"tune": "lora", "sparse_layers": [3], "num_experts": 5, "trained": []}
    state = Bundle({f"{NAME}.lora_A": torch.tensor([0.0, 10, 20, 3, 4]).view(5, 1, 1)}, meta)
    uploads = [
        upload("a", [0, 1], [8, 16], "lora_A"),
        upload("b", [1, 4], [24, 7], "lora_A"),
        upload("c", [], [], "lora_A"),
    ]
    found = combined(state, uploads)[f"{NAME}.lora_A"]
    assert found.flatten().tolist() == [8, (16 + 3 * 24) / 4, 20, 3, 7]


def whole_stacks(**more: Any) -> list[Update]:
    """The clients of the first example, as users of other frameworks hand them over, with a norm that all train."""
    stacks = {"a": [8.0, 16.0, 0, 0, 0], "b": [0, 24.0, 0, 0, 7], "c": [0, 32.0, 0, 0, 0]}
    return [
        Update(
            client,
            {"moe.w": torch.tensor(values).view(5, 1, 1), "norm": torch.tensor([values[1]]), **more},
            EXAMPLES[client],
            activations={"moe": torch.tensor(values) > 0},
        )
        for client, values in stacks.items()
    ]


@pytest.mark.parametrize("method", ["flux", "fmes"])
def test_the_public_rule_on_whole_stacks(method: str) -> None:
    """The same numbers; of the norm no expert is counted, so it is the mean of all. Expert 3 keeps its bits.

    Without `previous` an expert nobody tuned is averaged: here all hold 0 of it.
    """
    previous = {"moe.w": torch.tensor([1.0, 10, 20, 3.3, 4]).view(5, 1, 1), "norm": torch.zeros(1)}
    found = emberfed.aggregate(whole_stacks(), method=method, previous=previous)
    assert found["moe.w"].flatten().tolist() == [8, 27, 20, previous["moe.w"][3].item(), 7]
    assert found["norm"].tolist() == [27]
    unknown = emberfed.aggregate(whole_stacks(), method=method)
    assert unknown["moe.w"].flatten().tolist() == [8, 27, 0, 0, 7]


def test_updates_that_do_not_go_together_are_refused_by_name() -> None:
    previous = {"moe.w": torch.zeros(5, 1, 1), "norm": torch.zeros(1)}
    with pytest.raises(AggregationError, match=r"previous lacks 'norm'"):
        emberfed.aggregate(whole_stacks(), method="flux", previous={"moe.w": previous["moe.w"]})
    with pytest.raises(AggregationError, match=r"a: 'moe.w' has shape \(5, 1, 1\), but \(6, 1, 1\) in previous"):
        emberfed.aggregate(whole_stacks(), method="flux", previous={**previous, "moe.w": torch.zeros(6, 1, 1)})
    wide = {"moe.w": torch.ones(5, 2, 1), "norm": torch.ones(1)}
    odd = [*whole_stacks()[:2], Update("c", wide, 4, activations={"moe": torch.ones(5)})]
    with pytest.raises(AggregationError, match=r"c: 'moe.w' has shape \(5, 2, 1\), a sent \(5, 1, 1\)"):
        emberfed.aggregate(odd, method="flux", previous=previous)


# ------------------------------------------------------------------------------------------ experts tuned in full


@pytest.fixture(scope="module")
def full(tiny_model_folder: Path, tiny_data: Path) -> CompactWorld:
    """Two rounds of FLUX on the weights themselves."""
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "flux", "epsilon_first": 0.5},
        adapter={"tune": "full", "rank": 8, "alpha": 16.0},
        training={"max_steps": 1},
    )
    world.play(1, "c0", "c1")
    world.play(2, "c2", "c3")
    return world


def replaced_by_hand(state: Bundle) -> Any:
    """Transformers' own model, with the state's numbers written over its experts'."""
    lm = tiny_lm()
    for row, layer in enumerate(state.meta["sparse_layers"]):
        experts: Any = lm.model.layers[layer].mlp.experts
        inner = experts.gate_up_proj.shape[1] // 2
        for place, expert in enumerate(state.meta["trained"][row]):
            gate, up, down = (state.tensors[f"layers.{layer}.experts.{matrix}.weight"][place] for matrix in MATRICES)
            with torch.no_grad():
                experts.gate_up_proj[expert, :inner], experts.gate_up_proj[expert, inner:] = gate, up
                experts.down_proj[expert] = down
    return lm


def test_the_deployed_model_is_the_base_with_weights_replaced(full: CompactWorld) -> None:
    budget = full.material.budgets[1]
    assert budget.top_k == full.model.native_top_k
    with full.method.deploy(full.state, full.model, budget):
        ours = logits(full.model.lm)
    theirs, base = logits(replaced_by_hand(full.state)), logits(tiny_lm())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, theirs, rtol=1e-3, atol=1e-3)


def test_in_full_the_state_holds_what_was_tuned_and_grows_by_that_alone(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    """The weights of one round's experts are in it, and in what every client is sent; no other's are."""
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "flux"},
        adapter={"tune": "full", "rank": 8, "alpha": 16.0},
        training={"max_steps": 1},
    )
    assert federated_experts.stacks_of(world.state) == {}
    held: set[tuple[int, int]] = set()
    for round, ids in enumerate([("c0",), ("c1", "c2"), ("c3",)], start=1):
        for one in world.play(round, *ids):
            held |= places(one.content.meta["exploited"])
        assert places(world.state.meta["trained"]) == held
        stacks = federated_experts.stacks_of(world.state)
        assert sum(len(stack) for stack in stacks.values()) == 3 * len(held)
        download = world.download("c0", round + 1)
        assert bundle_bits(Bundle(federated_experts.stacks_of(download.content))) == bundle_bits(Bundle(stacks))
    assert len(held) < 16


def test_in_full_an_expert_that_no_step_moved_has_the_bases_bits(full: CompactWorld) -> None:
    """Of an upload; and the deployed model has the base's bits in all that nobody tuned."""
    trained = places(full.state.meta["trained"])
    before = [experts_of(full, row) for row in range(2)]
    with full.method.deploy(full.state, full.model, full.material.budgets[0]):
        for row, layer in enumerate(before):
            now = experts_of(full, row)
            for expert in range(8):
                same = all(torch.equal(one[expert], other[expert]) for one, other in zip(layer, now, strict=True))
                assert same == ((row, expert) not in trained), (row, expert)
    after = [experts_of(full, row) for row in range(2)]
    assert all(torch.equal(before[row][part], after[row][part]) for row in range(2) for part in range(2))


def experts_of(world: CompactWorld, row: int) -> list[Tensor]:
    experts: Any = world.model.blocks[row].experts
    return [experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()]


def test_the_exported_weights_are_the_states(full: CompactWorld) -> None:
    [(name, data)] = full.method.export(full.state, full.model).items()
    assert name == "experts.safetensors"
    stacks = federated_experts.stacks_of(full.state)
    opened = safetensors.torch.load(data)
    assert opened.keys() == stacks.keys()
    assert all(torch.equal(opened[key], stacks[key]) for key in stacks)
    told = {int(layer): tuple(ids) for layer, ids in Bundle.from_bytes(data).meta["experts"].items()}
    assert told == federated_experts.held_rows(full.state.meta)
    assert all(len(opened[key]) == len(told[int(key.split(".")[1])]) for key in opened)


# ------------------------------------------------------------------------------------------ figures of gradients


def everything_held(model: Path, data: Path, tune: str, **method: Any) -> CompactWorld:
    """FLUX with room for all experts, so that the compact model computes what the whole one does; one step of all."""
    options = {"profile": "fresh", "profile_bits": None, "epsilon_first": 0.5, **method}
    adapter = {"tune": "full", "rank": 8, "alpha": 16.0} if tune == "full" else {"tune": "lora", "rank": 2, "alpha": 4}
    world = CompactWorld(
        model,
        data,
        method={"name": "flux", **options},
        adapter=adapter,
        clients=one_tier(tuned_experts=6, held_experts=16),
        training={"batch_size": 64, "max_steps": 1},
    )
    if tune == "lora":
        world.state = Bundle(loud(world.state.tensors), world.state.meta)
    world.assign(1)
    return world


def dense_gradients(world: CompactWorld, id_: str, rows: list[int] | None = None) -> Tensor:
    """Norms of dense gradients over each expert's parameters, (L, E): transformers' own model under autograd.

    The loss is the mean over the targets of the client's examples, or of some, as one batch, with torch's own
    cross-entropy.
    """
    lm = tiny_lm()
    shard = world.shard(id_) if rows is None else world.shard(id_).only(rows)
    batch: Any = shard.collate(shard.examples)
    stacks = federated_experts.stacks_of(world.state)
    is_lora = bool(stacks)
    leaves: dict[tuple[int, str], list[Tensor]] = {}
    replaced = {}
    for layer in world.state.meta["sparse_layers"]:
        experts: Any = lm.model.layers[layer].mlp.experts
        matrices = dict(zip(MATRICES, [*experts.gate_up_proj.chunk(2, dim=1), experts.down_proj], strict=True))
        values = {}
        for matrix, base in matrices.items():
            if is_lora:
                path = f"layers.{layer}.experts.{matrix}"
                a, b = (stacks[f"{path}.lora_{side}"].clone().requires_grad_() for side in "AB")
                leaves[layer, matrix] = [a, b]
                values[matrix] = base.detach() + 4 / 2 * (b @ a)
            else:
                leaf = base.detach().clone().requires_grad_()
                leaves[layer, matrix] = [leaf]
                values[matrix] = leaf
        path = f"model.layers.{layer}.mlp.experts"
        replaced[f"{path}.gate_up_proj"] = torch.cat([values["gate_proj"], values["up_proj"]], dim=1)
        replaced[f"{path}.down_proj"] = values["down_proj"]
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    found = functional_call(lm, replaced, kwargs=given).logits
    F.cross_entropy(found[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    squares_LE = torch.zeros(2, 8)
    for (layer, _), tensors in leaves.items():
        for leaf in tensors:
            assert leaf.grad is not None
            squares_LE[layer] += leaf.grad.flatten(1).square().sum(1)
    return squares_LE.sqrt()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_figures_of_gradients_are_those_of_dense_autograd(tune: str, tiny_model_folder: Path, tiny_data: Path) -> None:
    """Of exploited experts, to rounding: the norm of the one step's gradient.

    Of explored ones it is that of the same batch of all examples, within the noise of the estimate: the mean of 100
    squares of normal numbers has a relative standard deviation of sqrt(2 / 100) = 0.14, its root of 0.07; 4 of those
    are 0.28.
    """
    world = everything_held(tiny_model_folder, tiny_data, tune, exploration_draws=100, exploration_step=1e-3)
    meta = world.download("c0", 1).content.meta
    upload = world.fit("c0", 1)
    assert upload.content.meta["examples"] == len(world.shard("c0").examples), "every example reaches some expert"
    found_LE, truth_LE = upload.content.tensors["gradient_rms"], dense_gradients(world, "c0")
    exploited, explored = places(meta["exploited"]), places(meta["explored"])
    assert (len(exploited), len(explored)) == (3, 3)
    for place in exploited:
        assert float(found_LE[place]) == pytest.approx(float(truth_LE[place]), rel=1e-3)
        assert float(truth_LE[place]) > 1e-4
    for place in explored:
        assert float(found_LE[place]) == pytest.approx(float(truth_LE[place]), rel=0.28)
    others = {(row, expert) for row in range(2) for expert in range(8)} - exploited - explored
    assert all(float(found_LE[place]) == -1 for place in others)


def test_over_several_steps_the_figure_is_the_root_mean_square(tiny_model_folder: Path, tiny_data: Path) -> None:
    """Without learning (a rate of 1e-30) the batches of one example each have the gradients of the formula: of D^e."""
    world = everything_held(tiny_model_folder, tiny_data, "full")
    small = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "flux", "profile": "fresh", "profile_bits": None, "epsilon_first": 1.0},
        adapter={"tune": "full", "rank": 8, "alpha": 16.0},
        clients=one_tier(tuned_experts=1, held_experts=16),
        training={"batch_size": 1, "learning_rate": 1e-30, "max_grad_norm": None},
    )
    small.assign(1)
    [place] = places(small.download("c0", 1).content.meta["exploited"])
    upload = small.fit("c0", 1)
    reach = int(upload.content.tensors["reach"][place])
    assert upload.content.meta["examples"] == upload.content.meta["stats"]["steps"] == reach
    rows = range(len(world.shard("c0").examples))
    squares = [float(dense_gradients(world, "c0", [row])[place]) ** 2 for row in rows]
    assert sum(square > 0 for square in squares) == reach
    assert float(upload.content.tensors["gradient_rms"][place]) == pytest.approx(
        math.sqrt(sum(squares) / reach), rel=1e-3
    )


def test_an_example_outside_of_an_experts_share_gives_it_no_gradient_at_all(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Every example by itself: an expert has a row in the stacks' sparse gradients if and only if it is in D^e."""
    world = everything_held(tiny_model_folder, tiny_data, "full")
    model, shard, top_k = world.model, world.shard("c0"), world.clients["c0"].budget.top_k
    profile = federated_experts.profiled(model, Bundle(), 4.0, top_k, "native", shard, 4, attention=False)
    assert not profile.reached_NLE.all(), "or there is nothing to see here"
    every = all_rows(model)
    start = expert_tuning.initial(model, every, "full", 1, torch.Generator())
    for number in range(len(shard.examples)):
        with model.active_experts(top_k), expert_tuning.attached(model, start, every, 1.0) as tuned:
            batch = shard.collate([shard.examples[number]])
            load_task(model.task).forward(model, batch).loss.backward()  # type: ignore[no-untyped-call]
            for row, block in enumerate(model.blocks):
                for matrix in MATRICES:
                    gradient: Any = tuned.parameters[f"layers.{block.layer}.experts.{matrix}.weight"].grad
                    rows = gradient._indices()[0].tolist()
                    assert rows == profile.reached_NLE[number, row].nonzero()[:, 0].tolist()


# ------------------------------------------------------------------------------------------ bad input

ROOM = {"tuned_experts": 2, "held_experts": 6}


def begin(model: Path, data: Path, /, **sections: Any) -> CompactWorld:
    return CompactWorld(model, data, **sections)


@pytest.mark.parametrize(
    ("method", "room", "words"),
    [
        ("flux", {}, r"tier 'all' has no tuned_experts and held_experts, which FLUX needs for every tier; add it"),
        ("flux", {"held_experts": 6}, r"tier 'all' has no tuned_experts, which FLUX needs"),
        ("fmes", {"tuned_experts": 6}, r"tier 'all' has no held_experts, which FMES needs"),
        ("flux", {"tuned_experts": 2, "held_experts": 3}, r"room for 3 experts, too few .* it must hold 4, 2 that are"),
        ("flux", {"tuned_experts": 15, "held_experts": 15}, r"room for 15 experts, too few .* it must hold 16, 15 tha"),
        (
            "fmes",
            {"tuned_experts": 1, "held_experts": 1},
            r"too few for a model of 2 layers with experts: .* hold 2, on",
        ),
        ("flux", {"tuned_experts": 2, "held_experts": 17}, r"holds 17 experts, .* 2 layers of 8; .* can be 16 at most"),
        ("flux", {"tuned_experts": 7, "held_experts": 6}, r"tunes 7 experts and holds 6"),
        ("fmes", {"tuned_experts": 2, "held_experts": 3}, r"need top_k 2 in each of 2 layers; hold 4, lower top_k, or"),
    ],
)
def test_budgets_that_cannot_be_are_refused_in_one_line(
    method: str, room: Mapping[str, int], words: str, tiny_model_folder: Path, tiny_data: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        begin(tiny_model_folder, tiny_data, method={"name": method}, clients=one_tier(**{"top_k": 2, **room}))
    assert "\n" not in str(caught.value)


def test_the_smallest_budgets_that_can_be_train(tiny_model_folder: Path, tiny_data: Path) -> None:
    """One expert tuned and one merged in each layer, or all but one tuned."""
    for tuned, held in ((1, 3), (15, 16), (16, 16)):
        clients = one_tier(tuned_experts=tuned, held_experts=held)
        method = {"name": "flux", "epsilon_first": 1.0}
        world = CompactWorld(tiny_model_folder, tiny_data, method=method, clients=clients, training={"max_steps": 1})
        [upload] = world.play(1, "c0")
        possible = int((world.memories["c0"].tensors["reached"].any(dim=0)).sum())
        assert 1 <= len(places(upload.content.meta["exploited"])) <= min(tuned, possible + 1)


@pytest.mark.parametrize("method", ["flux", "fmes", "fmd", "fmq"])
def test_dense_models_are_refused(method: str, tiny_data: Path, tmp_path: Path) -> None:
    llama = save_tiny_family("llama", tmp_path / "llama")
    tiers = [{"name": "all", "share": 1.0, "top_k": 1, **ROOM}]
    with pytest.raises((ConfigError, ModelError), match="llama models are dense") as caught:
        begin(llama, tiny_data, method={"name": method}, clients={"tiers": tiers})
    assert "\n" not in str(caught.value)


def test_a_model_whose_experts_are_in_memory_is_none_for_fmd(tiny_model_folder: Path, tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"this model's are in memory; set model.expert_storage=disk"):
        begin(tiny_model_folder, tiny_data, method={"name": "fmd"}, model={"expert_storage": "memory"})


def test_a_profile_of_the_model_itself_cannot_be_made_while_it_is_in_use(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    method = {"name": "flux", "profile_bits": None}
    with pytest.raises(ConfigError, match=r"profile_bits null profiles with the model itself.* set profile: fresh"):
        parse(config(tiny_model_folder, tiny_data, method=method))
    parse(config(tiny_model_folder, tiny_data, method={**method, "profile": "fresh"}))


def test_a_rank_without_effect_is_refused(tiny_model_folder: Path, tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank has no effect with tune 'full'"):
        parse(config(tiny_model_folder, tiny_data, method={"name": "flux"}, adapter={"tune": "full", "rank": 3}))
