"""PEFT folders that cannot be read: one line each, whatever is wrong with the configuration or the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from emberfed.errors import ModelError
from emberfed.models import lora, peft_layout
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import load
from emberfed.models.lora import LoraConfig

ALPHA = 7.0
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> FoundationModel:
    return load(ModelConfig(path=str(tiny_model_folder), device="cpu"))[0]


def written(model: FoundationModel, folder: Path) -> Path:
    """Write an adapter of everything, with no value zero."""
    generator = torch.Generator().manual_seed(0)
    fresh = lora.initial(model, LoraConfig(rank=3, router=True), generator)
    tensors = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}
    for name, data in peft_layout.to_files(tensors, ALPHA, model).items():
        (folder / name).write_bytes(data)
    return folder


def edited(
    folder: Path, config: dict[str, Any] | None = None, tensors: Callable[[Tensors], Tensors] | None = None
) -> Path:
    """Change a written adapter."""
    path = folder / peft_layout.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if tensors:
        file = folder / peft_layout.TENSORS_FILE
        safetensors.torch.save_file(tensors(safetensors.torch.load_file(file)), file)
    return folder


LAYER = "base_model.model.model.layers.0"
INNER = f"{LAYER}.mlp.experts.base_layer.lora"
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors] | None, str]] = {
    "other method": ({"peft_type": "IA3"}, None, "not the configuration of a LoRA"),
    "dora": ({"use_dora": True}, None, "use_dora is not supported; only plain and rank-stabilised LoRA are"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, None, "'pissa_niter_4' changes the base model"),
    "rank": ({"r": 7}, None, r"layers\.0\.experts\.gate_up_proj: lora_A .* are not of rank 7 for 8 experts"),
    "attention's rank": ({"rank_pattern": {"q_proj": 5, "down_proj": 3}}, None, r"are not of rank"),
    "targets": ({"target_parameters": ["mlp.experts.down_proj"]}, None, "do not go with target_parameters"),
    "no targets": ({"target_parameters": None}, None, "do not go with target_parameters None"),
    "head": (
        {},
        lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(1)},
        "lm_head.* has no place in this olmoe",
    ),
    "norm": (
        {},
        lambda t: t | {f"{LAYER}.norm.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"},
        r"layers\.0\.norm.* has no place in this olmoe model; adapters are LoRA on attention",
    ),
    "bigger model": (
        {},
        lambda t: t | {f"{LAYER[:-1]}9.self_attn.q_proj.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"},
        r"layers\.9\.self_attn.* has no place in this olmoe model.*did you mean",
    ),
    "wider model": (
        {},
        lambda t: t | {f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.zeros(3, 31)},
        r"'layers\.0\.self_attn\.q_proj\.lora_A' has shape \(3, 31\); expected \(3, 32\)",
    ),
    "older transformers": (
        {},
        lambda t: t | {f"{LAYER}.mlp.experts.3.up_proj.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"},
        "LoRA on a single expert's module, as in older transformers; open the adapter with PeftModel",
    ),
    "a bias of the router": (
        {},
        lambda t: t | {f"{LAYER}.mlp.gate.bias": torch.zeros(8)},
        "of routers only the weight can be trained",
    ),
    "no lora_B": ({}, lambda t: {k: v for k, v in t.items() if k != f"{INNER}_B.weight"}, "no lora_B beside it"),
    "no lora_A": ({}, lambda t: {k: v for k, v in t.items() if k != f"{INNER}_A.weight"}, "no lora_A beside it"),
    "not finite": (
        {},
        lambda t: t | {f"{INNER}_B.weight": t[f"{INNER}_B.weight"] / 0},
        r"base_layer\.lora_B\.weight' holds values that are not finite",
    ),
    "empty": ({}, lambda t: {}, "no LoRA in it"),
    "old PEFT": ({"peft_version": "0.17.1"}, None, r"was written by PEFT 0\.17\.1, but only .* PEFT 0\.21 is tested"),
    "new PEFT": ({"peft_version": "0.22.0.dev0"}, None, r"was written by PEFT 0\.22\.0\.dev0, but only"),
    "a number as version": ({"peft_version": 21}, None, "'peft_version': input should be a valid string, found 21"),
    "no rank": ({"r": None}, None, "'r': input should be a valid integer, found None"),
    "ranks": ({"r": [4]}, None, r"'r': input should be a valid integer, found \[4\]"),
    "rank in words": ({"r": "four"}, None, "'r': input should be a valid integer, found 'four'"),
    "rank and truth": ({"r": True}, None, r"json: r must not be true"),
    "negative rank": ({"r": -2}, None, "'r': input should be greater than or equal to 1, found -2"),
    "no alpha": ({"lora_alpha": None}, None, "'lora_alpha': input should be a valid number"),
    "alpha in words": ({"lora_alpha": "x"}, None, "'lora_alpha': input should be a valid number, found 'x'"),
    "alpha of nothing": ({"lora_alpha": 0}, None, "'lora_alpha': input should be greater than 0"),
    "alpha not a number": ({"lora_alpha": float("nan")}, None, "'lora_alpha': input should be a finite number"),
    "endless alpha": ({"lora_alpha": float("inf")}, None, "'lora_alpha': input should be a finite number"),
    "huge alpha": ({"lora_alpha": 1e300}, None, "'lora_alpha': input should be less than or equal to 1000000000000"),
    "a list of patterns": ({"rank_pattern": ["q_proj"]}, None, "'rank_pattern': input should be a valid dictionary"),
    "a broken pattern": ({"rank_pattern": {"(": 4}}, None, r"'rank_pattern': '\(' is not a regular expression"),
    "a pattern of words": ({"rank_pattern": {"q_proj": "x"}}, None, r"'rank_pattern\.q_proj': .*, found 'x'"),
    "alphas in words": ({"alpha_pattern": "x"}, None, "'alpha_pattern': input should be a valid dictionary, found 'x'"),
    "a number as targets": ({"target_parameters": 5}, None, "'target_parameters': input should be a valid list"),
    "a number as target": ({"target_parameters": [5]}, None, r"'target_parameters\.0': input should be a valid string"),
    "very old PEFT": ({"peft_version": None}, None, "was written by PEFT of an unknown version, but only"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read(
    model: FoundationModel,
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Callable[[Tensors], Tensors] | None,
    message: str,
) -> None:
    folder = written(model, tmp_path)
    with pytest.raises(ModelError, match=message) as raised:
        peft_layout.from_peft(edited(folder, config, tensors), model)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unreadable_folders(model: FoundationModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a readable PEFT adapter"):
        peft_layout.from_peft(tmp_path, model)
    (tmp_path / peft_layout.CONFIG_FILE).write_text("{}")
    (tmp_path / peft_layout.TENSORS_FILE).write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not a readable PEFT adapter"):
        peft_layout.from_peft(tmp_path, model)


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


FOREIGN_FORMATS = [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64"), (torch.float8_e4m3fn, "F8_E4M3")]


@pytest.mark.parametrize(("dtype", "name"), FOREIGN_FORMATS)
@pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning")
def test_number_formats_that_are_no_weights(
    model: FoundationModel, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    folder = edited(written(model, tmp_path), tensors=cast(dtype))
    with pytest.raises(ModelError, match=rf"is stored as {name}; expected one of F64, F32, F16, BF16"):
        peft_layout.from_peft(folder, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats_that_are(model: FoundationModel, tmp_path: Path, dtype: torch.dtype) -> None:
    whole, _ = peft_layout.from_peft(written(model, tmp_path), model)
    found, alpha = peft_layout.from_peft(edited(tmp_path, tensors=cast(dtype)), model)
    assert alpha == ALPHA
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, whole[name].to(dtype).float(), rtol=0, atol=0)


def test_numbers_that_float32_cannot_hold(model: FoundationModel, tmp_path: Path) -> None:
    folder = edited(written(model, tmp_path), tensors=lambda t: {name: x.double() * 1e300 for name, x in t.items()})
    with pytest.raises(ModelError, match=r"'layers\.0\..*' holds values that are not finite in float32"):
        peft_layout.from_peft(folder, model)


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "NaN", "", "{", "[" * 100_000, "\0"], ids=lambda text: text[:4])
def test_configurations_that_are_none(model: FoundationModel, tmp_path: Path, text: str) -> None:
    (written(model, tmp_path) / peft_layout.CONFIG_FILE).write_text(text)
    with pytest.raises(ModelError, match="not the configuration of a LoRA|is not a readable PEFT adapter") as raised:
        peft_layout.from_peft(tmp_path, model)
    assert "\n" not in str(raised.value)
