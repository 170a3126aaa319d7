"""Checkpoints that are not what they should be: one line each; and the one quantised format that is understood."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import save_tiny_family, tiny_family_lm, tiny_tokenizer, token_ids
from transformers import AutoModelForCausalLM

from emberfed.errors import ModelError
from emberfed.models import merging
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load

Tensors = dict[str, torch.Tensor]


def change_config(folder: Path, values: Mapping[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, {"format": "pt"})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(ModelConfig(path=str(folder), **options))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_change(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


EXPERT = "model.layers.0.mlp.experts.0.down_proj.weight"


@pytest.mark.parametrize("options", [{}, {"expert_bits": 4}, {"expert_storage": "disk"}])
def test_an_experts_weight_that_is_missing_or_misshapen(options: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_family("olmoe", tmp_path / "model")
    original = (folder / "model.safetensors").read_bytes()
    change_tensors(folder, without(EXPERT))
    assert "model.layers.0.mlp.experts.down_proj" in refusal(folder, **options)
    (folder / "model.safetensors").write_bytes(original)
    change_tensors(folder, with_change(EXPERT, lambda weight: weight[:, :-1]))
    assert "experts do not go together" in refusal(folder, **options)


def test_tensors_that_have_no_place(tmp_path: Path) -> None:
    folder = save_tiny_family("mixtral", tmp_path / "model")
    change_tensors(folder, lambda tensors: {**tensors, "model.layers.7.extra": torch.ones(2)})
    assert "1 tensors of the checkpoint have no place" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_without_a_word_of_quantisation(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny_family("olmoe", tmp_path / "model")
    change_tensors(folder, with_change(EXPERT, lambda weight: weight.to(dtype)))
    assert f"{EXPERT!r} is stored as " in refusal(folder)


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "wibble"])
def test_quantised_checkpoints_of_other_formats(method: str, tmp_path: Path) -> None:
    folder = save_tiny_family("qwen3_moe", tmp_path / "model")
    change_config(folder, {"quantization_config": {"quant_method": method, "bits": 4}})
    assert f"quantised ({method})" in refusal(folder)


def test_buffers_are_checked_too(tmp_path: Path) -> None:
    folder = save_tiny_family("deepseek_v3", tmp_path / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    change_tensors(folder, with_change(name, lambda bias: torch.full_like(bias, torch.nan)))
    assert f"{name!r} holds values that are not finite" in refusal(folder)


def test_numbers_too_large_for_the_type_asked_for(tmp_path: Path) -> None:
    folder = save_tiny_family("olmoe", tmp_path / "model")
    change_tensors(folder, with_change("lm_head.weight", lambda weight: weight + 1e6))
    assert "not finite in float16" in refusal(folder, dtype="float16")
    load(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    "values", [{"n_group": 0}, {"n_group": 3}, {"n_group": None}, {"topk_group": 9}, {"topk_group": None}]
)
def test_groups_of_experts_that_do_not_work_out(values: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_family("deepseek_v3", tmp_path / "model")
    change_config(folder, values)
    assert "expected n_group to divide n_routed_experts, and topk_group from 1 to n_group" in refusal(folder)


@pytest.mark.parametrize("values", [{"hidden_act": "wibble"}, {"vocab_size": 0}, {"num_local_experts": None}])
def test_values_transformers_chokes_on(values: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_family("mixtral", tmp_path / "model")
    change_config(folder, values)
    assert refusal(folder).startswith(f"model {folder}")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["null", "[]", "{", '"text"'])
def test_files_of_another_content(file: str, text: str, tmp_path: Path) -> None:
    folder = save_tiny_family("olmoe", tmp_path / "model")
    (folder / file).write_text(text)
    assert str(folder) in refusal(folder)


def test_a_revision_of_a_folder(tmp_path: Path) -> None:
    assert "model.revision 'main' is of hub ids only" in refusal(
        save_tiny_family("olmoe", tmp_path / "m"), revision="main"
    )


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(weight_EIO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks, scales and restored values of a stack: 32 inputs share a power of two, each is one of 16 numbers."""
    experts, inputs, outputs = weight_EIO.shape
    groups = weight_EIO.transpose(1, 2).reshape(experts, outputs, inputs // 32, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True) / 6 + 1e-9)) + 1
    codes = (groups / 2**exponent).unsqueeze(-1).sub(FP4).abs().argmin(-1).to(torch.uint8)
    restored = (FP4[codes.long()] * 2**exponent).flatten(2).transpose(1, 2).contiguous()
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent.squeeze(-1) + 127).to(torch.uint8), restored


def test_gpt_oss_in_its_published_format_loads_exactly_and_merges(tmp_path: Path) -> None:
    lm = tiny_family_lm("gpt_oss", hidden_size=64, intermediate_size=64)
    folder = tmp_path / "model"
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales, restored = mxfp4(tensors.pop(name))
        tensors |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
        lm.get_parameter(name).data = restored
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, {"quantization_config": {"quant_method": "mxfp4"}})

    model, tokenizer = load(ModelConfig(path=str(folder)))
    ids = token_ids(2, 9)
    with torch.no_grad():
        wanted = lm.eval()(input_ids=ids).logits
        torch.testing.assert_close(model.lm(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
        merging.write_checkpoint(model, tokenizer, tmp_path / "merged")
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
