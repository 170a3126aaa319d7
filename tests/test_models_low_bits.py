"""A second model in fewer bits: what it shares, what it computes, and that both can run at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import SPARSE_VARIANTS, tiny_family_lm, tiny_model, token_ids
from largest_tensor import LargestTensor

from emberfed.errors import ModelError
from emberfed.models import lora
from emberfed.models.expert_values import ExpertMatrices
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.footprint import parameter_count
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora import LoraConfig
from emberfed.models.low_bits import HeldWeight, holding, low_bit_copy
from emberfed.models.offloaded import offload_experts
from emberfed.models.profiling import profile
from emberfed.models.quantised import Bits, QuantisedWeight, quantise_experts
from emberfed.models.stacked import EXPERT_WEIGHTS

VARIANTS = [name for names in SPARSE_VARIANTS.values() for name in names]
both = pytest.mark.parametrize("bits", [4, 8])
IDS = token_ids(2, 12)


def logits(model: FoundationModel) -> torch.Tensor:
    with torch.no_grad():
        given: torch.Tensor = model.lm(IDS, use_cache=False).logits
    return given


def storages(model: FoundationModel) -> dict[int, int]:
    """Bytes of everything the model holds, by where it is."""
    tensors = (*model.lm.parameters(), *model.lm.buffers())
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def weight_of(model: FoundationModel, row: int, name: str) -> QuantisedWeight:
    weight = getattr(model.blocks[row].experts, name)
    assert isinstance(weight, QuantisedWeight)
    return weight


def loud_adapter(model: FoundationModel) -> dict[str, torch.Tensor]:
    tensors = lora.initial(model, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    return {name: tensor + 0.1 for name, tensor in tensors.items()}


def values_of(model: FoundationModel, row: int, expert: int) -> ExpertMatrices:
    experts: Any = model.blocks[row].experts
    weights = ExpertWeights(experts, torch.float32)
    return ExpertMatrices(weights.gate_up(expert), weights.down(expert), None, None)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_s_copy_computes_what_a_quantised_model_does(name: str) -> None:
    model, state = FoundationModel(tiny_family_lm(name)), torch.random.get_rng_state()
    before = logits(model)
    twin = low_bit_copy(model, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    quantised = tiny_family_lm(name)
    quantise_experts(quantised, 4)
    assert torch.equal(logits(twin), logits(FoundationModel(quantised)))
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


@both
def test_all_but_the_experts_is_shared(bits: Bits) -> None:
    """With groups of 64 a weight takes `bits` and 32 / 64 more: 4.5 or 8.5. No module is in both models."""
    model = tiny_model(hidden_size=64, intermediate_size=64)
    twin = low_bit_copy(model, bits)
    mine, theirs = storages(model), storages(twin)
    fresh = {place: size for place, size in theirs.items() if place not in mine}
    weights = model.num_layers * model.num_experts * 3 * 64 * 64
    buffers = sum(buffer.nbytes for buffer in model.lm.buffers())
    assert sum(fresh.values()) == weights * (bits + 0.5) / 8 + buffers
    assert not set(model.lm.modules()) & set(twin.lm.modules())
    assert twin.lm.config is not model.lm.config
    shared = {name: parameter for name, parameter in model.lm.named_parameters() if "experts." not in name}
    assert dict(twin.lm.named_parameters()).keys() == shared.keys()
    assert all(parameter is shared[name] for name, parameter in twin.lm.named_parameters())


def test_tied_weights_stay_tied() -> None:
    twin = low_bit_copy(FoundationModel(tiny_family_lm("olmoe-renormalised")), 4)
    assert twin.lm.lm_head.weight is twin.lm.model.embed_tokens.weight


def test_experts_on_disk_are_read_one_at_a_time() -> None:
    """And give the codes that experts in memory give."""
    model, offloaded = tiny_model(), tiny_model()
    offload_experts(offloaded.lm)
    with LargestTensor() as largest:
        twin = low_bit_copy(offloaded, 4)
    assert largest.elements == 2 * 16 * 32  # gate and up of one expert
    assert torch.equal(logits(twin), logits(low_bit_copy(model, 4)))


@both
def test_experts_in_memory_are_quantised_one_at_a_time(bits: Bits) -> None:
    model = tiny_model()
    with LargestTensor() as largest:
        low_bit_copy(model, bits)
    assert largest.elements == 2 * 16 * 32  # gate and up of one expert


@pytest.mark.parametrize("held", [4, 8])
def test_experts_that_are_quantised_already_are_shared(held: Bits) -> None:
    lm = tiny_family_lm("olmoe")
    quantise_experts(lm, held)
    model = FoundationModel(lm)
    twin = low_bit_copy(model, 4)
    for row in range(model.num_layers):
        for name in EXPERT_WEIGHTS:
            mine, theirs = weight_of(model, row, name), weight_of(twin, row, name)
            assert mine is not theirs
            assert theirs.codes.data_ptr() == mine.codes.data_ptr()
            assert theirs.bits == held
    assert torch.equal(logits(twin), logits(model))


def test_a_copy_begins_at_the_native_k() -> None:
    model = tiny_model()
    expected = logits(low_bit_copy(model, 4))
    with model.active_experts(1):
        twin = low_bit_copy(model, 4)
        assert (twin.top_k, twin.native_top_k, model.top_k) == (2, 2, 1)
        assert torch.equal(logits(twin), expected)
        with twin.active_experts(3):
            assert model.blocks[0].router.top_k == model.lm.config.num_experts_per_tok == 1


def test_an_adapter_on_the_copy_is_not_on_the_model() -> None:
    model = tiny_model()
    twin, tensors = low_bit_copy(model, 4), loud_adapter(model)
    before, plain = logits(model), logits(twin)
    quantised = tiny_model()
    quantise_experts(quantised.lm, 4)
    with lora.attached(quantised, tensors, 4.0):
        expected = logits(quantised)
    with lora.attached(twin, tensors, 4.0):
        assert torch.equal(logits(model), before)
        assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(twin), plain)


@pytest.mark.parametrize("config", [LoraConfig(rank=2, attention=False), LoraConfig(rank=2, experts=False)])
def test_a_model_with_something_attached_is_refused(config: LoraConfig) -> None:
    model = tiny_model()
    tensors = lora.initial(model, config, torch.Generator().manual_seed(0))
    with lora.attached(model, tensors, 4.0), pytest.raises(ModelError, match=r"attached to model\.layers\.0.*take it"):
        low_bit_copy(model, 4)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ModelError, match="llama models are dense"):
        low_bit_copy(FoundationModel(tiny_family_lm("llama")), 4)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "ernie4_5_moe"])
@both
def test_held_values_are_those_of_a_model_that_has_them(name: str, bits: Bits) -> None:
    """Experts 1 and 4 of the last layer come from another model; afterwards every bit is as before."""
    model, other = FoundationModel(tiny_family_lm(name)), FoundationModel(tiny_family_lm(name, seed=5))
    twin = low_bit_copy(model, bits)
    row, experts = model.num_layers - 1, (1, 4)
    before, weights = logits(twin), [weight_of(twin, row, attribute) for attribute in EXPERT_WEIGHTS]
    with holding(twin, row, {expert: values_of(other, row, expert) for expert in experts}):
        found = logits(twin)
        assert [kept.kept_as for kept in twin.blocks[row].experts.children() if isinstance(kept, HeldWeight)] == [
            f"{bits} bit"
        ] * 2
    assert [getattr(twin.blocks[row].experts, attribute) for attribute in EXPERT_WEIGHTS] == weights
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        for attribute in EXPERT_WEIGHTS:
            for expert in experts:
                mine, theirs = (getattr(which.blocks[row].experts, attribute) for which in (model, other))
                mine[expert] = theirs[expert]
    expected = logits(low_bit_copy(model, bits))
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_holding_ends_with_an_exception_and_costs_its_experts_only() -> None:
    lm = tiny_family_lm("olmoe")
    quantise_experts(lm, 4)
    model = FoundationModel(lm)
    twin, other = low_bit_copy(model, 4), tiny_model(seed=5)
    shared = weight_of(model, 0, "down_proj")
    codes, before = shared.codes.clone(), logits(twin)
    with holding(twin, 0, {3: values_of(other, 0, 3)}):
        held: Any = twin.blocks[0].experts.down_proj
        assert isinstance(held, HeldWeight)
        assert held.nbytes == shared.nbytes + shared.nbytes // 8
        assert parameter_count(twin.lm) == parameter_count(model.lm)
        assert torch.equal(held.dequantised(torch.float32)[2], shared.expert(2, torch.float32))
        assert not torch.equal(held.dequantised(torch.float32)[3], shared.expert(3, torch.float32))
    with pytest.raises(RuntimeError, match="stop"), holding(twin, 0, {3: values_of(other, 0, 3)}):
        raise RuntimeError("stop")
    assert torch.equal(shared.codes, codes)
    assert torch.equal(logits(twin), before)


def test_values_that_cannot_be_held_are_refused() -> None:
    model, other = tiny_model(), tiny_model(seed=5)
    twin, values = low_bit_copy(model, 4), values_of(other, 0, 3)
    with (
        pytest.raises(ModelError, match=r"layer 0 has experts 0 to 7, but values for \[8\]"),
        holding(twin, 0, {8: values}),
    ):
        pass
    with pytest.raises(ModelError, match="is not quantised.*low_bit_copy"), holding(model, 0, {3: values}):
        pass
    with holding(twin, 0, {3: values}):
        with pytest.raises(ModelError, match="holds other values already"), holding(twin, 0, {4: values}):
            pass
        assert isinstance(twin.blocks[0].experts.down_proj, HeldWeight)
    with (
        pytest.raises(ModelError, match=r"'gate_up_proj' of layer 0 is of experts \(32, 32\)") as told,
        holding(twin, 0, {3: replace(values, gate_up_D2F=values.gate_up_D2F[:, :8])}),
    ):
        pass
    assert "\n" not in str(told.value)


def trained(model: FoundationModel, steps: int) -> dict[str, torch.Tensor]:
    """An adapter after some steps of plain gradient descent."""
    with lora.attached(model, loud_adapter(model), 4.0) as adapter:
        for step in range(steps):
            ids = token_ids(4, 16, seed=step)
            loss = model.lm(ids, labels=ids, use_cache=False).loss
            gradients = torch.autograd.grad(loss, list(adapter.parameters.values()), allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(adapter.parameters.values(), gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(0.1 * (gradient.to_dense() if gradient.is_sparse else gradient))
        return {name: parameter.detach().clone() for name, parameter in adapter.parameters.items()}


def profiled(model: FoundationModel, times: int) -> list[dict[str, torch.Tensor]]:
    batches = [(token_ids(4, 16, seed=seed), torch.ones(4, 16, dtype=torch.int64)) for seed in range(3)]
    return [profile(model, batches).to_tensors() for _ in range(times)]


def test_the_copy_is_profiled_while_the_model_trains() -> None:
    """Bit for bit as if each ran alone; both begin together, and run for about as long."""
    model = tiny_model()
    twin = low_bit_copy(model, 4)
    alone, expected = profiled(twin, 1)[0], trained(model, 8)
    found: dict[str, Any] = {}
    begin = threading.Barrier(2)

    def run(name: str, work: Callable[[], Any]) -> None:
        begin.wait()
        found[name] = work()

    threads = [
        threading.Thread(target=run, args=("profiles", lambda: profiled(twin, 8))),
        threading.Thread(target=run, args=("adapter", lambda: trained(model, 8))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for again in found["profiles"]:
        assert all(torch.equal(again[name], tensor) for name, tensor in alone.items())
    assert all(torch.equal(found["adapter"][name], tensor) for name, tensor in expected.items())
