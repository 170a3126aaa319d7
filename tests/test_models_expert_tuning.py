"""Tuned experts of a model, whole or compact: against dense models under autograd, and what stays as it was."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from builders import SPARSE_VARIANTS, tiny_family_lm, tiny_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from emberfed.data.tokenise import Example, ResponseShard, ShardReport
from emberfed.errors import ConfigError, ModelError
from emberfed.models import expert_tuning, lora
from emberfed.models.compact import Cluster, CompactPlan, LayerPlan, compacted
from emberfed.models.expert_values import ExpertValues
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.groups import clip_gradients
from emberfed.models.offloaded import offload_experts
from emberfed.models.quantised import quantise_experts
from emberfed.models.tuning_layout import Rows, Tune, all_rows, take_rows
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig

VARIANTS = [variant for variants in SPARSE_VARIANTS.values() for variant in variants]
RANK, ALPHA = 3, 5.0
MATRICES = ("gate_proj", "up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


def loud(tensors: Mapping[str, torch.Tensor], seed: int = 2) -> Tensors:
    """The tensors with noise that matters on top."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}


def stacks_for(model: FoundationModel, rows: Rows, tune: Tune) -> Tensors:
    return loud(expert_tuning.initial(model, rows, tune, RANK, torch.Generator().manual_seed(3)))


def loss(lm: Any) -> torch.Tensor:
    ids = token_ids(2, 9)
    answer: torch.Tensor = lm(input_ids=ids, labels=ids, use_cache=False).loss
    return answer


def singly(model: FoundationModel, rows: Rows) -> CompactPlan:
    """A plan that holds every expert as it is: some to be tuned, the others each in a cluster of its own."""
    plan = []
    for block in model.blocks:
        tuned = rows.get(block.layer, ())
        others = [expert for expert in range(block.num_experts) if expert not in tuned]
        plan.append(LayerPlan(tuned, tuple(Cluster((expert,), (1.0,)) for expert in others)))
    return tuple(plan)


def dense_experts(model: FoundationModel, lm: Any, trained: Mapping[str, torch.Tensor]) -> Tensors:
    """Parameters (by name) of all experts in the family's layout, with `.weight` stacks of all experts written in."""
    paths = {id(module): path for path, module in model.lm.named_modules()}
    result: Tensors = {}
    for block in model.blocks:
        gate, up, down = (trained[f"layers.{block.layer}.experts.{matrix}.weight"] for matrix in MATRICES)
        if model.family.model_type == "gpt_oss":
            both, down = torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2), down.transpose(1, 2)
        else:
            both = torch.cat([gate, up], dim=1)
        path = paths[id(block.experts)]
        result |= {f"{path}.gate_up_proj": both, f"{path}.down_proj": down}
    assert set(result) <= dict(lm.named_parameters()).keys()
    return result


def some_rows(model: FoundationModel) -> dict[int, tuple[int, ...]]:
    """Half of the experts, the odd ones, which are not the first."""
    return {block.layer: tuple(range(1, block.num_experts, 2)) for block in model.blocks}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_whole_weights_are_those_of_a_dense_model(variant: str) -> None:
    """In every family: of all experts on the whole model, and of some in a compact one.

    The oracle is transformers' own model with eager experts; autograd goes through all of their weights.
    """
    model = FoundationModel(tiny_family_lm(variant))
    every = all_rows(model)
    start = stacks_for(model, every, "full")

    dense: Any = tiny_family_lm(variant).eval().requires_grad_(False)
    dense.set_experts_implementation("eager")
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    ids = token_ids(2, 9)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    theirs = functional_call(dense, dense_experts(model, dense, leaves), kwargs=inputs).loss
    theirs.backward()
    wanted = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(wanted) == len(leaves)

    with expert_tuning.attached(model, start, every, ALPHA) as tuned:
        ours = loss(model.lm)
        ours.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        for name, parameter in tuned.parameters.items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.to_dense(), wanted[name], rtol=1e-4, atol=1e-5)

    rows = some_rows(model)
    values = ExpertValues(model, start, every, ALPHA)
    mine = take_rows(start, every, rows)
    with (
        compacted(model, singly(model, rows), values),
        expert_tuning.attached(model, mine, rows, ALPHA) as tuned,
    ):
        ours = loss(model.lm)
        ours.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        of_mine = take_rows(wanted, every, rows)
        for name, parameter in tuned.parameters.items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.to_dense(), of_mine[name], rtol=1e-4, atol=1e-5)
    assert any(bool(gradient.any()) for gradient in of_mine.values())


@pytest.mark.parametrize("variant", ["olmoe", "gpt_oss", "deepseek_v3", "ernie4_5_moe-unshared"])
def test_lora_on_all_experts_is_that_of_a_whole_adapter(variant: str) -> None:
    """Bit for bit, since the names and stacks are the same."""
    model = FoundationModel(tiny_family_lm(variant))
    start = stacks_for(model, all_rows(model), "lora")
    found = []
    for context in (
        lora.attached(model, start, ALPHA),
        expert_tuning.attached(model, start, all_rows(model), ALPHA),
    ):
        with context as trained:
            ours = loss(model.lm)
            ours.backward()  # type: ignore[no-untyped-call]
            found.append([ours, *(parameter.grad for parameter in trained.parameters.values())])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("tune", ["lora", "full"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_gradients_in_a_compact_model_are_rows_of_those_in_the_whole_one(tune: Tune, data: st.DataObject) -> None:
    """For any choice of tuned experts, in some layers maybe none."""
    model = tiny_model()
    experts = st.lists(st.integers(0, 7), unique=True, max_size=8).map(lambda ids: tuple(sorted(ids)))
    rows = {0: data.draw(experts), 1: data.draw(experts)}
    every = all_rows(model)
    start = stacks_for(model, every, tune)
    with expert_tuning.attached(model, start, every, ALPHA) as whole:
        expected = loss(model.lm)
        expected.backward()  # type: ignore[no-untyped-call]
    wanted = {name: p.grad.to_dense() for name, p in whole.parameters.items() if p.grad is not None}
    mine = take_rows(start, every, rows)
    values = ExpertValues(model, start, every, ALPHA)
    with (
        compacted(model, singly(model, rows), values),
        expert_tuning.attached(model, mine, rows, ALPHA) as tuned,
    ):
        found = loss(model.lm)
        if mine:
            found.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert set(tuned.parameters) == set(mine)
    for name, gradient in take_rows(wanted, every, rows).items():
        parameter = tuned.parameters[name]
        found_gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_experts_without_tokens_keep_their_bits_and_are_found_by_their_ids(tune: Tune) -> None:
    """AdamW with weight decay, three steps: an expert moves exactly if its router sent it a token."""
    model = tiny_model()
    rows = {0: (1, 2, 5), 1: (0, 3, 4, 6, 7)}
    start = stacks_for(model, rows, tune)
    values = ExpertValues(model, start, rows, ALPHA)
    ids = token_ids(1, 2)
    with (
        compacted(model, singly(model, rows), values),
        expert_tuning.attached(model, start, rows, ALPHA) as tuned,
        tuned.counting() as counter,
    ):
        groups = tuned.trainable_groups()
        assert {views.name: views.experts for views in groups.experts} == {
            name: rows[int(name.split(".")[1])] for name in start
        }
        optimizer = torch.optim.AdamW(groups.parameters(), lr=0.01, weight_decay=0.5)
        for _ in range(3):
            model.lm(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            gradients = groups.take_gradients(counter.take() > 0)
            clip_gradients(gradients, 1.0)
            optimizer.step()
            groups.zero_grad()
        counts_LE = counter.counts
        after = tuned.tensors()
    assert counts_LE.shape == (2, 8)
    moved = 0
    for name, before in start.items():
        layer = int(name.split(".")[1])
        for place, expert in enumerate(rows[layer]):
            same = torch.equal(after[name][place], before[place])
            assert same == (counts_LE[layer, expert] == 0), (name, expert)
            moved += not same
    assert 0 < moved < sum(map(len, start.values()))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_model_is_as_found_also_after_an_exception(tune: Tune) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.lm.state_dict().items()}
    modules = [name for name, _ in model.lm.named_modules()]
    start = stacks_for(model, all_rows(model), tune)
    copies = {name: value.clone() for name, value in start.items()}

    def change_and_fail() -> None:
        with expert_tuning.attached(model, start, all_rows(model), 1.0) as tuned:
            for parameter in tuned.parameters.values():
                parameter.data += 1
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        change_and_fail()
    after = model.lm.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in model.lm.named_modules()] == modules
    assert all(torch.equal(start[name], copies[name]) for name in start)


@pytest.mark.parametrize("variant", ["olmoe", "gpt_oss"])
def test_initial_stacks_change_nothing(variant: str) -> None:
    model = FoundationModel(tiny_family_lm(variant))
    ids = token_ids(2, 9)
    with torch.no_grad():
        plain = model.lm(input_ids=ids).logits
        for tune in ("lora", "full"):
            start = expert_tuning.initial(model, all_rows(model), tune, RANK, torch.Generator().manual_seed(3))
            with expert_tuning.attached(model, start, all_rows(model), ALPHA):
                torch.testing.assert_close(model.lm(input_ids=ids).logits, plain, rtol=1e-6, atol=1e-6)


def test_initial_lora_is_uniform_and_the_same_for_the_same_generator() -> None:
    """Of hidden size 32 and expert size 16: A in ±1/sqrt(32), of down_proj in ±1/sqrt(16); B is zero."""
    model, rows = tiny_model(), {0: (2, 4, 7), 1: ()}
    first, again = (expert_tuning.initial(model, rows, "lora", 4, torch.Generator().manual_seed(8)) for _ in range(2))
    assert list(first) == sorted(f"layers.0.experts.{matrix}.lora_{side}" for matrix in MATRICES for side in "AB")
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, value in first.items():
        if name.endswith("lora_B"):
            assert not value.any()
        else:
            bound = 16**-0.5 if "down_proj" in name else 32**-0.5
            assert 0.9 * bound < value.abs().max() <= bound
            assert len(value) == 3


def test_initial_whole_weights_are_the_base_s_also_where_it_is_quantised() -> None:
    """OLMoE holds gate above up: rows 0 to 15 and 16 to 31 of `gate_up_proj`."""
    model = tiny_model()
    rows = {1: (0, 6)}
    plain = expert_tuning.initial(model, rows, "full", 1, torch.Generator())
    experts: Any = model.blocks[1].experts
    assert torch.equal(plain["layers.1.experts.gate_proj.weight"], experts.gate_up_proj[[0, 6], :16])
    assert torch.equal(plain["layers.1.experts.up_proj.weight"], experts.gate_up_proj[[0, 6], 16:])
    assert torch.equal(plain["layers.1.experts.down_proj.weight"], experts.down_proj[[0, 6]])
    plain["layers.1.experts.down_proj.weight"].zero_()
    assert experts.down_proj[0].any(), "a copy"
    quantise_experts(model.lm, 8)
    packed = expert_tuning.initial(model, rows, "full", 1, torch.Generator())
    assert torch.equal(packed["layers.1.experts.up_proj.weight"][1], experts.gate_up_proj.expert(6, torch.float32)[16:])


def test_what_takes_more_than_the_machine_s_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"training these experts \(lora\) takes tensors of .* lower adapter.rank"):
        expert_tuning.initial(tiny_model(), {0: (1,)}, "lora", 2**40, torch.Generator())


@pytest.mark.parametrize("variant", VARIANTS)
def test_replaced_experts_are_those_of_a_dense_model(variant: str) -> None:
    model = FoundationModel(tiny_family_lm(variant))
    rows, every = some_rows(model), all_rows(model)
    own = expert_tuning.initial(model, every, "full", 1, torch.Generator())
    stacks = stacks_for(model, rows, "full")
    written = {name: value.clone() for name, value in own.items()}
    for name, value in written.items():
        value[list(rows[int(name.split(".")[1])])] = stacks[name]

    dense: Any = tiny_family_lm(variant).eval().requires_grad_(False)
    dense.set_experts_implementation("eager")
    before = {name: value.clone() for name, value in model.lm.state_dict().items()}
    ids = token_ids(2, 9)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    with torch.no_grad():
        expected = functional_call(dense, dense_experts(model, dense, written), kwargs=inputs).logits
        with expert_tuning.replaced(model, stacks, rows):
            found = model.lm(**inputs).logits
            now = expert_tuning.initial(model, every, "full", 1, torch.Generator())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(now[name], written[name]) for name in written)
    after = model.lm.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_replacing_rounds_once_to_the_base_s_type_and_gives_its_bits_back() -> None:
    model = FoundationModel(tiny_family_lm("gpt_oss").bfloat16())
    stacks = stacks_for(model, {0: (5,)}, "full")
    experts: Any = model.blocks[0].experts
    before = experts.gate_up_proj.clone()

    def look_and_fail() -> None:
        with expert_tuning.replaced(model, stacks, {0: (5,)}):
            rounded = stacks["layers.0.experts.up_proj.weight"][0].bfloat16().T
            assert torch.equal(experts.gate_up_proj[5, :, 1::2], rounded)
            assert torch.equal(experts.gate_up_proj[4], before[4])
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        look_and_fail()
    assert torch.equal(experts.gate_up_proj, before)


@pytest.mark.parametrize("kept", ["quantised", "offloaded"])
def test_experts_of_a_base_that_cannot_be_written_are_replaced_beside_it(kept: str) -> None:
    """The oracle is attaching whole stacks of all experts, which does not read the base at all."""
    model, rows = tiny_model(), {0: (1, 6), 1: (3,)}
    if kept == "quantised":
        quantise_experts(model.lm, 4)
    else:
        offload_experts(model.lm)
    every = all_rows(model)
    stacks = stacks_for(model, rows, "full")
    written = expert_tuning.initial(model, every, "full", 1, torch.Generator())
    for name, value in written.items():
        value[list(rows[int(name.split(".")[1])])] = stacks[name]
    ids = token_ids(2, 9)
    with torch.no_grad():
        plain = model.lm(input_ids=ids).logits
        with expert_tuning.attached(model, written, every, 1.0):
            expected = model.lm(input_ids=ids).logits
        with expert_tuning.replaced(model, stacks, rows):
            found = model.lm(input_ids=ids).logits
        assert torch.equal(model.lm(input_ids=ids).logits, plain)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - plain).abs().max() > 0.01


def test_what_cannot_be_tuned_is_refused_in_one_line() -> None:
    model = tiny_model()
    stacks = stacks_for(model, {1: (2, 5)}, "full")
    values = ExpertValues(model, {}, {}, 1.0)
    with (
        pytest.raises(
            ModelError, match=r"experts \(2, 5\) of layer 1 cannot be tuned: the layer is whole, and its fir"
        ),
        expert_tuning.attached(model, stacks, {1: (2, 5)}, 1.0),
    ):
        pass
    with compacted(model, singly(model, {1: (2, 4)}), values):
        with (
            pytest.raises(ModelError, match=r"the layer is compact, and its first slots hold \(2, 4\)"),
            expert_tuning.attached(model, stacks, {1: (2, 5)}, 1.0),
        ):
            pass
        with (
            pytest.raises(ModelError, match="layer 0 is compact, so its experts cannot be replaced"),
            expert_tuning.replaced(model, stacks, {1: (2, 5)}),
        ):
            pass
    with (
        pytest.raises(ModelError, match="is LoRA, which replaces no weights"),
        expert_tuning.replaced(model, stacks_for(model, {1: (2,)}, "lora"), {1: (2,)}),
    ):
        pass


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_training_loop_trains_them_with_the_same_bits_every_time(tune: Tune) -> None:
    """Also with gradient checkpointing, and while another model runs in another thread."""
    rows: Rows = {0: (1, 5), 1: (3,)}
    plan = (
        LayerPlan((1, 5), (Cluster((0, 2, 3), (0.2, 0.3, 0.5)), Cluster((4, 6, 7), (0.5, 0.25, 0.25)))),
        LayerPlan((3,), (Cluster((0, 1, 2, 4, 5, 6, 7), (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4)),)),
    )
    examples = tuple(Example(token_ids(1, 12, seed)[0].numpy().astype(np.int32), 4, "w3", "") for seed in range(6))
    shard = ResponseShard(examples, ShardReport(6, 48, 0, 0, 0), pad_token_id=0)

    def trained(checkpointing: bool) -> tuple[tuple[float, ...], Tensors]:
        model = tiny_model()
        start = expert_tuning.initial(model, rows, tune, RANK, torch.Generator().manual_seed(3))
        config = TrainingConfig(
            optimizer="adamw",
            weight_decay=0.1,
            learning_rate=0.01,
            local_epochs=4,
            gradient_checkpointing=checkpointing,
        )
        with (
            compacted(model, plan, ExpertValues(model, start, rows, ALPHA)),
            expert_tuning.attached(model, start, rows, ALPHA) as tuned,
        ):
            stats = Trainer(config).train(model, tuned, shard, "c", 1, Seeds(5))
        return stats.losses, tuned.tensors()

    losses, first = trained(checkpointing=False)
    assert losses[-1] < losses[0]
    other, stop = tiny_model(seed=1), threading.Event()

    def beside() -> None:
        with torch.no_grad():
            while not stop.is_set():
                other.lm(input_ids=token_ids(2, 16))

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        again = [trained(checkpointing) for checkpointing in (False, True)]
    finally:
        stop.set()
        thread.join()
    for found_losses, found in again:
        assert found_losses == losses
        assert all(torch.equal(found[name], first[name]) for name in first)
