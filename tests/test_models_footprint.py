"""What a model's weights occupy, counted by hand and against the tensors themselves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from builders import FAMILY_VARIANTS, SPARSE_VARIANTS, tiny_family_lm, tiny_lm
from torch import nn

from emberfed.errors import ModelError
from emberfed.models.footprint import KINDS, ModuleMemory, memory_by_module, parameter_count, total
from emberfed.models.quantised import quantise_experts

VARIANTS = [name for names in FAMILY_VARIANTS.values() for name in names]


def by_kind(lm: nn.Module) -> dict[str, ModuleMemory]:
    return {row.module: row for row in memory_by_module(lm)}


def test_every_kind_by_hand() -> None:
    """2 layers, hidden 32, 8 experts of 16, 64 tokens; norms of layers, attention's queries and keys, and the last."""
    rows = by_kind(tiny_lm())
    expected = {
        "embedding": 64 * 32,
        "attention": 2 * 4 * 32 * 32,
        "routers": 2 * 8 * 32,
        "routed experts": 2 * 8 * 3 * 16 * 32,
        "norms": 2 * 4 * 32 + 32,
        "head": 64 * 32,
        "other": 8,  # the rotary embedding's frequencies, twice
    }
    assert {name: row.weights for name, row in rows.items()} == expected
    assert all(row.stored_bytes == 4 * row.weights for row in rows.values())
    assert all(row.formats == ("float32",) for row in rows.values())
    assert rows["head"] == ModuleMemory("head", 2048, 8192, ("float32",))
    assert rows["head"].sixteen_bit_bytes == 4096
    assert rows["head"].bits_per_weight == 32
    assert rows["head"].json() == {
        "module": "head",
        "weights": 2048,
        "stored_bytes": 8192,
        "formats": ("float32",),
        "sixteen_bit_bytes": 4096,
    }


def test_tied_weights_count_once() -> None:
    tied = by_kind(tiny_lm(tie_word_embeddings=True))
    assert "head" not in tied
    assert tied["embedding"].stored_bytes == 8192


@pytest.mark.parametrize(("bits", "bytes_per_group"), [(4, 2 * 2 + 8), (8, 2 * 2 + 16)])
def test_quantised_experts(bits: int, bytes_per_group: int) -> None:
    """Groups are as large as rows allow: 32 of gate and up, 16 of down."""
    lm = tiny_lm().bfloat16()
    before = by_kind(lm)
    quantise_experts(lm, 4 if bits == 4 else 8)
    after = by_kind(lm)
    experts = after.pop("routed experts")
    gate_up_groups, down_groups = 2 * 8 * 2 * 16, 2 * 8 * 32
    expected = gate_up_groups * (4 + 32 * bits // 8) + down_groups * bytes_per_group
    assert experts == ModuleMemory("routed experts", 24576, expected, (f"{bits} bit",))
    assert experts.sixteen_bit_bytes == before.pop("routed experts").stored_bytes
    assert after == before


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_add_up_in_every_family(name: str) -> None:
    lm = tiny_family_lm(name)
    rows = memory_by_module(lm)
    everything = {tensor.data_ptr(): tensor for tensor in (*lm.parameters(), *lm.buffers()) if tensor.numel()}.values()
    assert total(rows).stored_bytes == sum(tensor.nbytes for tensor in everything)
    assert total(rows).weights == sum(tensor.numel() for tensor in everything)
    assert [row.module for row in rows] == [kind for kind in KINDS if kind in {row.module for row in rows}]
    found = {row.module for row in rows}
    mlps = {"routers", "routed experts"} if name.partition("-")[0] in SPARSE_VARIANTS else {"dense MLPs"}
    # OLMo's norms have no weights.
    assert {"embedding", "attention", "norms"} - ({"norms"} if name == "olmo" else set()) | mlps <= found
    names = [key for key, _ in lm.named_parameters()]
    assert ("shared experts" in found) == any("shared_expert" in key for key in names)
    assert ("head" in found) == any(key.startswith("lm_head.") for key in names)
    routed = sum(value.numel() for key, value in lm.named_parameters() if ".experts." in key)
    assert ("routed experts" in found) == (routed > 0)
    assert not routed or by_kind(lm)["routed experts"].weights == routed


def test_dense_layers_are_told_apart() -> None:
    """The first of three layers is dense, 24 wide, with three matrices."""
    assert by_kind(tiny_family_lm("deepseek_v3"))["dense MLPs"].weights == 3 * 24 * 32


def test_a_dense_model_by_hand() -> None:
    """LLaMA with biases: 2 layers, hidden 32, 4 heads on 2 of 8, MLPs of 16; the head is the embedding."""
    expected = {
        "embedding": 64 * 32,
        "attention": 2 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 + 2 * 16),
        "dense MLPs": 2 * (3 * 32 * 16 + 2 * 16 + 32),
        "norms": 2 * 2 * 32 + 32,
        "other": 8,
    }
    assert {name: row.weights for name, row in by_kind(tiny_family_lm("llama-biased")).items()} == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_parameters_are_counted_whatever_bits_they_have(bits: int) -> None:
    lm = tiny_lm(tie_word_embeddings=True)
    number = parameter_count(lm)
    assert number == sum(parameter.numel() for parameter in lm.parameters())
    quantise_experts(lm, 4 if bits == 4 else 8)
    assert parameter_count(lm) == number


def test_total_of_nothing() -> None:
    nothing = total(())
    assert nothing == ModuleMemory("total", 0, 0, ())
    assert math.isnan(nothing.bits_per_weight)


def test_a_view_occupies_what_it_keeps_alive() -> None:
    lm = tiny_lm()
    lm.lm_head.weight = nn.Parameter(torch.zeros(128, 32)[:64])
    assert by_kind(lm)["head"].stored_bytes == 128 * 32 * 4


def test_a_model_of_no_known_family(tmp_path: Path) -> None:
    lm = tiny_lm()
    lm.config.model_type = "unheard_of"
    with pytest.raises(ModelError, match="unheard_of"):
        memory_by_module(lm)
