"""PEFT's file format: plain PEFT opens what we write and computes the same; we read it back bit by bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import token_ids
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from emberfed.errors import ModelError
from emberfed.models import lora, peft_layout
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load
from emberfed.models.lora import LoraConfig
from emberfed.models.sparse_model import SparseModel

ALPHA = 7.0
Tensors = dict[str, torch.Tensor]
# PEFT 0.21 asks transformers 5.23 a question that transformers deprecates; it is not ours to answer.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIGS = {
    "all": LoraConfig(rank=3),
    "with routers": LoraConfig(rank=3, router=True),
    "attention": LoraConfig(rank=3, experts=False),
    "rank 1": LoraConfig(rank=1),
}


@pytest.fixture
def model(tiny_model_folder: Path) -> SparseModel:
    return load(ModelConfig(path=str(tiny_model_folder), device="cpu"))[0]


def adapter(model: SparseModel, config: LoraConfig, seed: int = 0) -> Tensors:
    """A random adapter, none of its values zero."""
    generator = torch.Generator().manual_seed(seed)
    fresh = lora.initial(model, config, generator)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}


def write(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = lm(input_ids=token_ids(2, 10)).logits
    return result


def by_peft(base: Path, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def by_us(model: SparseModel, tensors: Tensors) -> torch.Tensor:
    with lora.attached(model, tensors, ALPHA):
        return logits(model.lm)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_plain_peft_computes_the_same(
    model: SparseModel, config: LoraConfig, tiny_model_folder: Path, tmp_path: Path
) -> None:
    tensors = adapter(model, config)
    folder = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)
    found = by_peft(tiny_model_folder, folder)
    torch.testing.assert_close(found, by_us(model, tensors), rtol=1e-5, atol=1e-5)
    assert (found - logits(model.lm)).abs().max() > 0.01


def test_without_attention_peft_warns_wrongly_and_computes_the_same(
    model: SparseModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    tensors = adapter(model, LoraConfig(rank=3, attention=False))
    folder = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = by_peft(tiny_model_folder, folder)
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    assert [message.split()[2] for message in messages] == ["rank_pattern", "alpha_pattern"]
    torch.testing.assert_close(found, by_us(model, tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning")
def test_ranks_that_differ_by_layer_and_matrix(model: SparseModel, tiny_model_folder: Path, tmp_path: Path) -> None:
    low, high = adapter(model, LoraConfig(rank=2)), adapter(model, LoraConfig(rank=5))
    tensors = {name: high[name] if "layers.1" in name or "down_proj" in name else low[name] for name in low}
    folder = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)
    torch.testing.assert_close(by_peft(tiny_model_folder, folder), by_us(model, tensors), rtol=1e-5, atol=1e-5)
    assert_same(peft_layout.from_peft(folder), tensors)


def assert_same(read: tuple[Tensors, float], tensors: Tensors) -> None:
    found, alpha = read
    assert alpha == ALPHA
    assert list(found) == sorted(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("config", [*CONFIGS.values(), LoraConfig(rank=2, attention=False)], ids=[*CONFIGS, "experts"])
def test_round_trip_keeps_every_bit(model: SparseModel, config: LoraConfig, tmp_path: Path) -> None:
    tensors = adapter(model, config)
    kept = {name: value.clone() for name, value in tensors.items()}
    files = peft_layout.to_files(tensors, ALPHA, model)
    assert files == peft_layout.to_files(tensors, ALPHA, model)
    assert_same(peft_layout.from_peft(write(files, tmp_path)), kept)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_a_fresh_adapter_survives(model: SparseModel, tmp_path: Path) -> None:
    tensors = lora.initial(model, LoraConfig(rank=3, router=True), torch.Generator().manual_seed(0))
    assert_same(peft_layout.from_peft(write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)), tensors)


def test_reads_what_peft_saves(model: SparseModel, tiny_model_folder: Path, tmp_path: Path) -> None:
    tensors = adapter(model, LoraConfig(rank=3, router=True))
    folder = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    PeftModel.from_pretrained(base, folder).save_pretrained(tmp_path / "again")
    assert_same(peft_layout.from_peft(tmp_path / "again"), tensors)


def test_layout_by_hand(model: SparseModel) -> None:
    tensors = adapter(model, LoraConfig(rank=3))
    config, converted = peft_layout.to_peft(tensors, ALPHA, model, "some/base")
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"]) == (6, 14.0)
    prefix = "base_model.model.model.layers.1.mlp.experts"
    a, b = converted[f"{prefix}.base_layer.lora_A.weight"], converted[f"{prefix}.base_layer.lora_B.weight"]
    assert a.shape == (8 * 6, 32)
    assert b.shape == (32, 6 * 8)
    expert, rank = 5, 2
    path = "layers.1.experts"
    assert torch.equal(a[expert * 6 + rank], tensors[f"{path}.gate_proj.lora_A"][expert, rank])
    assert torch.equal(a[expert * 6 + 3 + rank], tensors[f"{path}.up_proj.lora_A"][expert, rank])
    assert torch.equal(b[:16, rank * 8 + expert], tensors[f"{path}.gate_proj.lora_B"][expert, :, rank])
    assert not b[16:, rank * 8 + expert].any()
    assert torch.equal(b[16:, (3 + rank) * 8 + expert], tensors[f"{path}.up_proj.lora_B"][expert, :, rank])
    assert not b[:16, (3 + rank) * 8 + expert].any()
    down = converted[f"{prefix}.lora_B.weight"]
    assert torch.equal(down[:, rank * 8 + expert], tensors[f"{path}.down_proj.lora_B"][expert, :, rank])


def test_what_cannot_be_written(model: SparseModel) -> None:
    low, high = adapter(model, LoraConfig(rank=2)), adapter(model, LoraConfig(rank=3))
    mixed = {name: high[name] if "up_proj" in name else low[name] for name in low}
    with pytest.raises(ModelError, match=r"layers\.0\.experts: gate_proj has rank 2 and up_proj 3"):
        peft_layout.to_files(mixed, ALPHA, model)
    with pytest.raises(ModelError, match="without tensors"):
        peft_layout.to_files({}, ALPHA, model)
    with pytest.raises(ModelError, match="has no place"):
        peft_layout.to_files({"layers.7.router.weight": torch.zeros(8, 32)}, ALPHA, model)


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


INNER = "base_model.model.model.layers.0.mlp.experts.base_layer.lora"
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors] | None, str]] = {
    "other method": ({"peft_type": "IA3"}, None, "not the configuration of a LoRA"),
    "rslora": ({"use_rslora": True}, None, "use_rslora is not supported"),
    "rank": ({"r": 7}, None, r"not of rank 7"),
    "targets": ({"target_parameters": ["mlp.experts.down_proj"]}, None, "target_parameters must be"),
    "alpha": ({"lora_alpha": 3.0}, None, "our adapters have one alpha"),
    "head": ({}, lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(1)}, "not of a decoder layer"),
    "norm": (
        {},
        lambda t: t | {f"base_model.model.model.layers.0.norm.lora_{x}.weight": torch.zeros(3, 3) for x in "AB"},
        "LoRA on 'norm'",
    ),
    "no lora_B": ({}, lambda t: {k: v for k, v in t.items() if k != f"{INNER}_B.weight"}, "no lora_B beside it"),
    "mixed": ({}, lambda t: t | {f"{INNER}_B.weight": torch.ones_like(t[f"{INNER}_B.weight"])}, "mixes gate_proj and"),
    "empty": ({}, lambda t: {}, "no LoRA in it"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read(
    model: SparseModel,
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Callable[[Tensors], Tensors] | None,
    message: str,
) -> None:
    folder = write(peft_layout.to_files(adapter(model, LoraConfig(rank=3)), ALPHA, model), tmp_path)
    with pytest.raises(ModelError, match=message):
        peft_layout.from_peft(edited(folder, config, tensors))


def test_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a readable PEFT adapter"):
        peft_layout.from_peft(tmp_path)
    write({peft_layout.CONFIG_FILE: b"{}", peft_layout.TENSORS_FILE: b"nonsense"}, tmp_path)
    with pytest.raises(ModelError, match="not a readable PEFT adapter"):
        peft_layout.from_peft(tmp_path)


def test_an_adapter_of_pefts_own_making(tiny_model_folder: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        config = PeftLoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), config)
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    tensors, alpha = peft_layout.from_peft(tmp_path)
    ours, _ = load(ModelConfig(path=str(tiny_model_folder), device="cpu"))
    with lora.attached(ours, tensors, alpha):
        torch.testing.assert_close(logits(ours.lm), logits(theirs.eval()), rtol=1e-5, atol=1e-5)


def test_real_model(shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / "olmoe-en-16m"
    real, _ = load(ModelConfig(path=str(path), device="cpu"))
    generator = torch.Generator().manual_seed(2)
    fresh = lora.initial(real, LoraConfig(rank=4), generator)
    tensors = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}
    folder = write(peft_layout.to_files(tensors, ALPHA, real), tmp_path)
    torch.testing.assert_close(by_peft(path, folder), by_us(real, tensors), rtol=1e-4, atol=5e-5)
    assert_same(peft_layout.from_peft(folder), tensors)
