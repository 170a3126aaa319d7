"""Stacks of some experts: names, shapes and errors, and that taking rows and putting them back undo each other."""

from __future__ import annotations

import pytest
import torch
from builders import tiny_family_lm, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from emberfed.errors import ModelError
from emberfed.models import lora_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.tuning_layout import all_rows, check, is_full, put_rows, sizes, take_rows

Rows = dict[int, tuple[int, ...]]
EXPERTS = 6
LAYERS = (1, 4)
NAMES = ("experts.up_proj.lora_A", "experts.up_proj.lora_B", "experts.down_proj.weight")


def stacks(rows: Rows, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of three names in each layer with rows."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"layers.{layer}.{name}": torch.randn(len(experts), 2, 3, generator=draw)
        for layer, experts in rows.items()
        if experts
        for name in NAMES
    }


@st.composite
def nested_rows(draw: st.DrawFn) -> tuple[Rows, Rows]:
    """Rows of two layers, and a choice of those."""
    held: Rows = {}
    wanted: Rows = {}
    for layer in LAYERS:
        held[layer] = tuple(sorted(draw(st.sets(st.integers(0, EXPERTS - 1)))))
        wanted[layer] = tuple(expert for expert in held[layer] if draw(st.booleans()))
    return held, wanted


@given(both=nested_rows())
def test_taken_rows_are_those_of_the_experts_wanted(both: tuple[Rows, Rows]) -> None:
    held, wanted = both
    tensors = stacks(held)
    taken = take_rows(tensors, held, wanted)
    assert set(taken) == {name for name in tensors if wanted[int(name.split(".")[1])]}
    for name, rows in taken.items():
        layer = int(name.split(".")[1])
        assert len(rows) == len(wanted[layer])
        for place, expert in enumerate(wanted[layer]):
            assert torch.equal(rows[place], tensors[name][held[layer].index(expert)])


@given(both=nested_rows())
def test_put_rows_replaces_those_experts_and_no_others(both: tuple[Rows, Rows]) -> None:
    held, given_rows = both
    tensors, values = stacks(held), stacks(given_rows, seed=1)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    result = put_rows(tensors, held, values, given_rows)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors), "inputs are not changed"
    assert list(result) == list(tensors)
    for name, tensor in result.items():
        layer = int(name.split(".")[1])
        for place, expert in enumerate(held[layer]):
            new = expert in given_rows[layer]
            expected = values[name][given_rows[layer].index(expert)] if new else before[name][place]
            assert torch.equal(tensor[place], expected)
    back = take_rows(result, held, given_rows)
    assert all(torch.equal(back[name], values[name]) for name in values)
    undone = put_rows(result, held, take_rows(tensors, held, given_rows), given_rows)
    assert all(torch.equal(undone[name], before[name]) for name in tensors)


def test_experts_and_names_that_are_not_held_are_refused() -> None:
    held: Rows = {1: (0, 2), 4: ()}
    tensors = stacks(held)
    with pytest.raises(ModelError, match=r"expert 3 of layer 1 is not in the stacks, which hold 0, 2"):
        take_rows(tensors, held, {1: (0, 3)})
    with pytest.raises(ModelError, match=r"expert 0 of layer 4 is not in the stacks, which hold none"):
        put_rows(tensors, held, stacks({4: (0,)}), {4: (0,)})
    with pytest.raises(ModelError, match=r"'layers.1.experts.gate_proj.weight' is not among the stacks"):
        put_rows(tensors, held, {"layers.1.experts.gate_proj.weight": torch.zeros(1, 2, 3)}, {1: (0,)})


def test_shapes_are_out_in_whatever_the_family_stores() -> None:
    """Hidden 32, experts of 16; GPT-OSS holds them transposed."""
    model = FoundationModel(tiny_family_lm("gpt_oss"))
    assert sizes(model, {0: (3, 5), 1: ()}) == {
        "layers.0.experts.gate_proj": (2, 16, 32),
        "layers.0.experts.up_proj": (2, 16, 32),
        "layers.0.experts.down_proj": (2, 32, 16),
    }
    assert sizes(model, all_rows(model)) == lora_layout.expert_sizes(model)


def test_which_names_are_of_whole_weights() -> None:
    assert is_full("layers.0.experts.up_proj.weight")
    assert not is_full("layers.0.experts.up_proj.lora_A")
    assert not is_full("layers.0.router.weight")


A, B = torch.zeros(2, 3, 32), torch.zeros(2, 16, 3)
UP = "layers.0.experts.up_proj"


@pytest.mark.parametrize(
    ("tensors", "rows", "message"),
    [
        (
            {f"{UP}.lora_A": A, f"{UP}.lora_B": B},
            {0: (5, 2)},
            r"experts 5, 2 of layer 0 cannot be tuned; name each onc",
        ),
        ({f"{UP}.lora_A": A, f"{UP}.lora_B": B}, {0: (2, 2)}, r"in ascending order, from 0 to 7"),
        ({f"{UP}.lora_A": A, f"{UP}.lora_B": B}, {0: (2, 8)}, r"experts 2, 8 of layer 0 cannot be tuned"),
        ({}, {7: (1,)}, r"layer 7 has no experts to tune; layers with experts: 0, 1"),
        ({f"{UP}.lora_A": A}, {0: (2, 5)}, r"has 'layers.0.experts.up_proj.lora_A' but lacks"),
        ({f"{UP}.weight": torch.zeros(1, 16, 32)}, {0: (2, 5)}, r"shape \(1, 16, 32\); expected \(2, 16, 32\)"),
        ({f"{UP}.lora_A": A, f"{UP}.lora_B": B[:1]}, {0: (2, 5)}, r"shape \(1, 16, 3\); expected \(2, 16, 3\)"),
        ({f"{UP}.weight": torch.zeros(2, 16, 32).int()}, {0: (2, 5)}, r"is torch.int32; expected one of float64"),
        ({f"{UP}.weight": torch.zeros(2, 16, 32)}, {}, r"but no expert of layer 0 is said to be tuned"),
        ({f"{UP}.weight": torch.zeros(2, 16, 32)}, {0: ()}, r"but no expert of layer 0 is said to be tuned"),
        (
            {"layers.0.router.weight": torch.zeros(8, 32)},
            {0: (1,)},
            r"'layers.0.router.weight' is not a tensor of rout",
        ),
        ({f"{UP}.bias": torch.zeros(2, 16)}, {0: (2, 5)}, r"'layers.0.experts.up_proj.bias' has no place in this mode"),
        ({f"{UP}.weight": torch.zeros(2, 16, 32)}, {0: (2, 5), 1: (0,)}, r"experts 0 of layer 1 are to be tuned, but"),
        (
            {f"{UP}.lora_A": A, f"{UP}.lora_B": B, "layers.0.experts.gate_proj.weight": torch.zeros(2, 16, 32)},
            {0: (2, 5)},
            r"layer 0 has LoRA and whole weights of its experts, among them 'layers.0.experts.gate_proj.weight'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tensors: dict[str, torch.Tensor], rows: Rows, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check(tiny_model(), tensors, rows)


def test_stacks_of_some_matrices_and_of_one_kind_for_each_layer_fit() -> None:
    check(
        tiny_model(),
        {f"{UP}.lora_A": A, f"{UP}.lora_B": B, "layers.1.experts.down_proj.weight": torch.zeros(1, 32, 16)},
        {0: (2, 5), 1: (7,)},
    )
    check(tiny_model(), {}, {0: ()})
