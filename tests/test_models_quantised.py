"""Expert weights in fewer bits: what they restore to, what they occupy, and training through them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import tiny_lm, tiny_model, token_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emberfed.errors import ModelError
from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora import LoraConfig
from emberfed.models.quantised import (
    Bits,
    QuantisedWeight,
    default_group_size,
    quantise_experts,
)
from emberfed.models.stacked import EXPERT_WEIGHTS

BITS: tuple[Bits, ...] = (4, 8)
both = pytest.mark.parametrize("bits", BITS)


def weights(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def slowly(weight: QuantisedWeight) -> torch.Tensor:
    """Every weight restored on its own, from what the class says of its layout."""
    restored = torch.empty(weight.shape)
    experts, rows, columns = weight.shape
    for expert in range(experts):
        for row in range(rows):
            for column in range(columns):
                if weight.bits == 8:
                    code = int(weight.codes[expert, row, column])
                else:
                    byte = int(weight.codes[expert, row, column % (columns // 2)])
                    code = byte % 16 if column < columns // 2 else byte // 16
                group = column // weight.group_size
                step, least = weight.scale[expert, row, group].float(), weight.minimum[expert, row, group].float()
                restored[expert, row, column] = code * step + least
    return restored


def per_weight(values: torch.Tensor, weight: QuantisedWeight) -> torch.Tensor:
    """Values of groups, (E, rows, G), repeated for each of their weights."""
    return values.float().repeat_interleave(weight.group_size, dim=-1)


def test_sixteen_values_have_a_code_each() -> None:
    tensor = torch.arange(16.0).view(1, 1, 16)
    weight = QuantisedWeight.quantise(tensor, 4)
    # The first eight in the low four bits, the other eight in the high ones.
    assert weight.codes.tolist() == [[[low + 16 * (low + 8) for low in range(8)]]]
    assert (weight.scale.item(), weight.minimum.item()) == (1, 0)
    assert torch.equal(weight.dequantised(torch.float32), tensor)


def test_integers_over_the_whole_range_are_exact_in_8_bits() -> None:
    tensor = torch.randint(-128, 128, (3, 5, 64), generator=torch.Generator().manual_seed(0)).float()
    tensor[..., 0], tensor[..., 63] = -128, 127
    assert torch.equal(QuantisedWeight.quantise(tensor, 8).dequantised(torch.float32), tensor)


@both
def test_restored_as_the_layout_says(bits: Bits) -> None:
    weight = QuantisedWeight.quantise(weights(2, 3, 48), bits, group_size=8)
    expected = slowly(weight)
    assert torch.equal(weight.dequantised(torch.float32), expected)
    for index in range(2):
        assert torch.equal(weight.expert(index, torch.float32), expected[index])
        assert torch.equal(weight.expert(index, torch.bfloat16), expected[index].bfloat16())


@given(
    bits=st.sampled_from(BITS),
    size=st.sampled_from([8, 16, 34]),
    magnitude=st.integers(-7, 4),
    offset=st.floats(-50, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_no_weight_is_off_by_more_than_half_a_step(
    bits: Bits, size: int, magnitude: int, offset: float, dtype: torch.dtype, seed: int
) -> None:
    """Also for groups far from zero, and for those whose scale is among float16's subnormals."""
    generator = torch.Generator().manual_seed(seed)
    tensor = ((torch.randn(2, 3, 2 * size, generator=generator) + offset) * 10.0**magnitude).clamp(-6e4, 6e4).to(dtype)
    weight = QuantisedWeight.quantise(tensor, bits, group_size=size)
    error = (weight.dequantised(torch.float32) - tensor.float()).abs()
    rounding = tensor.float().abs() * 2**-22
    assert (error <= per_weight(weight.scale, weight) * 0.5 * (1 + 1e-5) + rounding).all()


@both
def test_large_stacks_are_quantised_in_blocks_of_rows(bits: Bits) -> None:
    tensor = weights(2, 300, 512)
    whole = QuantisedWeight.quantise(tensor, bits).dequantised(torch.float32)
    for start in range(0, 300, 70):
        block = QuantisedWeight.quantise(tensor[:, start : start + 70], bits).dequantised(torch.float32)
        assert torch.equal(whole[:, start : start + 70], block)


@both
@given(value=st.floats(-65504, 65504, width=16))
def test_equal_values_are_exact(bits: Bits, value: float) -> None:
    tensor = torch.full((1, 2, 16), value)
    weight = QuantisedWeight.quantise(tensor, bits)
    assert torch.equal(weight.dequantised(torch.float32), tensor)


@both
def test_a_group_of_zeros_stays_zero_whatever_its_neighbours(bits: Bits) -> None:
    tensor = weights(1, 2, 64)
    tensor[..., 16:32] = 0
    restored = QuantisedWeight.quantise(tensor, bits, group_size=16).dequantised(torch.float32)
    assert (restored[..., 16:32] == 0).all()


@both
@given(seed=st.integers(0, 1000))
def test_quantising_again_changes_nothing(bits: Bits, seed: int) -> None:
    """For groups on both sides of zero, as weights are: their minimum and step are found again, to the bit."""
    once = QuantisedWeight.quantise(weights(2, 4, 64, seed=seed), bits, group_size=32)
    again = QuantisedWeight.quantise(once.dequantised(torch.float32), bits, group_size=32)
    for name, value in once.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    tensor = weights(2, 64, 256)

    def error(bits: Bits, group_size: int) -> float:
        restored = QuantisedWeight.quantise(tensor, bits, group_size).dequantised(torch.float32)
        return float((restored - tensor).norm() / tensor.norm())

    assert error(8, 64) < 0.006 < 0.07 < error(4, 32) < error(4, 64) < error(4, 128) < 0.11


@both
def test_bytes(bits: Bits) -> None:
    tensor = weights(3, 8, 128).bfloat16()
    weight = QuantisedWeight.quantise(tensor, bits)
    assert (weight.shape, weight.numel(), weight.group_size) == (tensor.shape, tensor.numel(), 64)
    assert weight.nbytes == tensor.numel() * (bits + 0.5) / 8
    assert weight.nbytes == sum(buffer.untyped_storage().nbytes() for buffer in weight.buffers())
    assert weight.nbytes / tensor.nbytes == {4: 0.28125, 8: 0.53125}[bits]


@both
def test_what_is_given_and_what_is_held_stay_as_they_are(bits: Bits) -> None:
    tensor = weights(2, 32, 16).transpose(1, 2)
    before = tensor.clone()
    weight = QuantisedWeight.quantise(tensor, bits)
    assert torch.equal(tensor, before)
    contiguous = QuantisedWeight.quantise(before.contiguous(), bits)
    assert torch.equal(weight.dequantised(torch.float32), contiguous.dequantised(torch.float32))
    weight.expert(0, torch.float32).zero_()
    assert torch.equal(weight.dequantised(torch.float32), contiguous.dequantised(torch.float32))


def test_it_is_saved_and_copied_but_not_trained() -> None:
    weight = QuantisedWeight.quantise(weights(2, 4, 16), 4)
    assert list(weight.parameters()) == []
    other = QuantisedWeight.quantise(weights(2, 4, 16, seed=1), 4)
    other.load_state_dict(weight.state_dict())
    for same in (other, copy.deepcopy(weight)):
        assert torch.equal(same.dequantised(torch.float32), weight.dequantised(torch.float32))
    assert not weight.expert(0, torch.float32).requires_grad
    assert str(weight) == "QuantisedWeight((2, 4, 16), bits=4, group_size=16)"


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e7, -7e4])
def test_values_that_have_no_code_are_refused(bits: Bits, value: float) -> None:
    tensor = weights(2, 4, 32)
    tensor[1, 2, 3] = value
    with pytest.raises(ModelError, match="^the weight holds values that are not finite, or too large for float16"):
        QuantisedWeight.quantise(tensor, bits, name="the weight")


@pytest.mark.parametrize(
    ("columns", "size"), [(2048, 64), (1408, 64), (2880, 64), (96, 48), (48, 48), (66, 33), (16, 16), (8, 8), (130, 26)]
)
def test_default_group_size(columns: int, size: int) -> None:
    assert default_group_size(columns) == size
    assert QuantisedWeight.quantise(weights(1, 2, columns), 4).group_size == size


@pytest.mark.parametrize("columns", [6, 45, 134])
def test_columns_that_cannot_be_grouped(columns: int) -> None:
    with pytest.raises(ModelError, match=f"^the weight has {columns} columns: .* it cannot be quantised"):
        QuantisedWeight.quantise(weights(1, 2, columns), 8, name="the weight")


@pytest.mark.parametrize("size", [0, -4, 5, 64])
def test_group_sizes_that_do_not_divide(size: int) -> None:
    with pytest.raises(ModelError, match=f"has 32 columns, which groups of {size} do not divide"):
        QuantisedWeight.quantise(weights(1, 2, 32), 4, group_size=size)


def restored_twin(seed: int, bits: Bits) -> tuple[FoundationModel, FoundationModel]:
    """A quantised model, and one that holds in float32 what the quantised weights stand for."""
    quantised, plain = tiny_lm(seed), tiny_lm(seed)
    quantise_experts(quantised, bits)
    for layer, twin in zip(quantised.model.layers, plain.model.layers, strict=True):
        for name in EXPERT_WEIGHTS:
            stack = getattr(layer.mlp.experts, name).dequantised(torch.float32)
            setattr(twin.mlp.experts, name, nn.Parameter(stack))
    return FoundationModel(quantised), FoundationModel(plain)


@both
def test_only_stacked_expert_weights_are_replaced(bits: Bits) -> None:
    lm, before = tiny_lm(), tiny_lm().state_dict()
    quantise_experts(lm, bits)
    kept = dict(lm.named_parameters())
    replaced = {f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in EXPERT_WEIGHTS}
    assert set(before) - set(kept) == replaced
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    for name in replaced:
        weight = lm.get_submodule(name)
        assert isinstance(weight, QuantisedWeight)
        expected = QuantisedWeight.quantise(before[name], bits)
        assert torch.equal(weight.dequantised(torch.float32), expected.dequantised(torch.float32))


def test_models_that_cannot_be_quantised() -> None:
    lm = tiny_lm()
    quantise_experts(lm, 8)
    first = r"weight 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"
    with pytest.raises(ModelError, match=f"{first} is kept as 8 bit already; load the model again"):
        quantise_experts(lm, 4)
    with pytest.raises(ModelError, match="no stacked expert weights"):
        quantise_experts(nn.Linear(8, 8), 4)
    broken = tiny_lm()
    with torch.no_grad():
        broken.model.layers[0].mlp.experts.gate_up_proj[3, 2, 1] = float("nan")
    with pytest.raises(ModelError, match=f"{first} holds values that are not finite"):
        quantise_experts(broken, 4)
    with pytest.raises(ModelError, match=r"experts\.down_proj' has 6 columns"):
        quantise_experts(tiny_lm(intermediate_size=6), 4)


def trained(model: FoundationModel) -> dict[str, torch.Tensor]:
    """Logits with a noisy adapter attached, and the gradient of each of its tensors."""
    generator = torch.Generator().manual_seed(5)
    values = lora.initial(model, LoraConfig(rank=3, router=True), generator)
    tensors = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in values.items()}
    ids = token_ids(3, 10)
    with lora.attached(model, tensors, alpha=6) as adapter:
        output = model.lm(input_ids=ids, labels=ids)
        output.loss.backward()
        results = {"logits": output.logits.detach()}
        for name, parameter in adapter.parameters.items():
            assert parameter.grad is not None, name
            results[name] = parameter.grad.to_dense()
    return results


@both
def test_logits_and_gradients_are_those_of_the_restored_weights(bits: Bits) -> None:
    quantised, restored = map(trained, restored_twin(0, bits))
    assert any(float(value.abs().max()) > 1e-3 for name, value in restored.items() if "experts.down_proj" in name)
    for name, expected in restored.items():
        torch.testing.assert_close(quantised[name], expected, rtol=1e-5, atol=1e-5)


def test_a_quantised_model_answers_as_the_restored_one() -> None:
    model, twin = restored_twin(1, 4)
    answers = [each.lm.generate(input_ids=token_ids(2, 5), max_new_tokens=8, do_sample=False) for each in (model, twin)]
    assert torch.equal(*answers)
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.006), (4, 0.1)])
def test_error_of_logits(bits: Bits, bound: float) -> None:
    """Every expert active, so that the error is that of the products and not of a token sent elsewhere."""
    ids = token_ids(4, 16)
    exact, quantised = tiny_model(num_experts_per_tok=8), tiny_lm(num_experts_per_tok=8)
    quantise_experts(quantised, bits)
    with torch.no_grad():
        expected = exact.lm(input_ids=ids).logits
        error = FoundationModel(quantised).lm(input_ids=ids).logits - expected
    assert 0 < error.norm() / expected.norm() < bound


_MEASURE = """
import gc, json, psutil, torch
from builders import tiny_lm
from emberfed.models.quantised import quantise_experts

def resident():
    gc.collect()
    return psutil.Process().memory_info().rss

sizes = dict(hidden_size=512, intermediate_size=512, num_experts=96, num_hidden_layers=4)
quantise_experts(tiny_lm(), 4)
with torch.device("meta"):
    lm = tiny_lm(**sizes)
before = resident()
lm = lm.to(torch.bfloat16).to_empty(device="cpu")
for parameter in lm.parameters():
    parameter.data.copy_(torch.linspace(-1, 1, parameter.shape[-1]).expand(parameter.shape))
full = resident()
experts = sum(parameter.nbytes for name, parameter in lm.named_parameters() if ".experts." in name)
quantise_experts(lm, 4)
print(json.dumps({"experts": experts, "full": full - before, "freed": full - resident()}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems return freed memory in their own time")
def test_resident_memory_of_experts_in_4_bits_is_at_most_0_3_of_16() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", _MEASURE], env=environment, capture_output=True, text=True, check=True
    )
    measured = json.loads(child.stdout)
    assert measured["experts"] > 600e6
    assert measured["full"] == pytest.approx(measured["experts"], rel=0.05)
    assert 1 - measured["freed"] / measured["experts"] <= 0.3
