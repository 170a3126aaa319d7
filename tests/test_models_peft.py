"""PEFT's file format: plain PEFT opens what we write and computes the same; we read what it writes, and our own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from builders import FAMILY_VARIANTS, save_tiny_family, token_ids, whole_adapter
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from emberfed.errors import ModelError
from emberfed.models import lora, peft_layout
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import load
from emberfed.models.lora import LoraConfig

ALPHA = 7.0
Tensors = dict[str, torch.Tensor]
pytestmark = [
    # PEFT 0.21 asks transformers 5.23 a question that transformers deprecates; it is not ours to answer.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # It looks for a pattern's matches among modules only; `test_without_attention...` looks at this warning.
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning"),
]

CONFIGS = {
    "all": LoraConfig(rank=3),
    "with routers": LoraConfig(rank=3, router=True),
    "attention": LoraConfig(rank=3, experts=False),
    "experts": LoraConfig(rank=2, attention=False),
    "rank 1": LoraConfig(rank=1),
}
MATRICES = ("gate_proj", "up_proj", "down_proj")


def loaded(folder: Path) -> FoundationModel:
    return load(ModelConfig(path=str(folder), device="cpu"))[0]


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> FoundationModel:
    return loaded(tiny_model_folder)


@pytest.fixture(scope="module", params=[name for names in FAMILY_VARIANTS.values() for name in names])
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of each family, and of its variants."""
    return save_tiny_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def family_model(family_folder: Path) -> FoundationModel:
    return loaded(family_folder)


def moved(tensors: Tensors, seed: int = 0) -> Tensors:
    """The adapter with every value moved, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}


def adapter(model: FoundationModel, config: LoraConfig, seed: int = 0) -> Tensors:
    return moved(lora.initial(model, config, torch.Generator().manual_seed(seed)), seed)


def only(tensors: Tensors, *parts: str) -> Tensors:
    return {name: value for name, value in tensors.items() if any(part in name for part in parts)}


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = lm(input_ids=token_ids(2, 10)).logits
    return result


def by_peft(base: Path, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def by_us(model: FoundationModel, tensors: Tensors, alpha: float = ALPHA) -> torch.Tensor:
    with lora.attached(model, tensors, alpha):
        return logits(model.lm)


def assert_same(read: tuple[Tensors, float], tensors: Tensors) -> None:
    found, alpha = read
    assert alpha == ALPHA
    assert list(found) == sorted(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def made_by_peft(base: Path, folder: Path, seed: int = 0, **options: Any) -> torch.Tensor:
    """Write an adapter as a user of PEFT makes it, with random factors, and return what PEFT computes with it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global stream
        options = {"r": 3, "lora_alpha": 5, "target_modules": []} | options
        theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftLoraConfig(**options))
    with torch.no_grad():
        for name, parameter in sorted(theirs.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder)
    return logits(theirs.eval())


# Every family.


def test_plain_peft_computes_the_same_and_what_it_saves_reads_back(
    family_model: FoundationModel, family_folder: Path, tmp_path: Path
) -> None:
    tensors = adapter(family_model, whole_adapter(family_model))
    folder = write(peft_layout.to_files(tensors, ALPHA, family_model), tmp_path / "ours")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family_folder), folder)
    expected = by_us(family_model, tensors)
    assert_close(logits(theirs), expected)
    assert (expected - logits(family_model.lm)).abs().max() > 0.01
    assert_same(peft_layout.from_peft(folder, family_model), tensors)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(peft_layout.from_peft(tmp_path / "theirs", family_model), tensors)


def test_plain_peft_computes_the_same_without_attention(
    family_model: FoundationModel, family_folder: Path, tmp_path: Path
) -> None:
    tensors = adapter(family_model, LoraConfig(rank=2, attention=False), seed=1)
    folder = write(peft_layout.to_files(tensors, ALPHA, family_model), tmp_path)
    assert_close(by_peft(family_folder, folder), by_us(family_model, tensors))


KINDS: dict[str, tuple[bool, list[str]]] = {
    "attention": (True, []),
    "gate_up": (False, ["experts.gate_up_proj"]),
    "down": (False, ["experts.down_proj"]),
    "both": (False, ["experts.gate_up_proj", "experts.down_proj"]),
    "both and attention": (True, ["experts.down_proj", "experts.gate_up_proj"]),
}


def modules_instead(model: FoundationModel, parameter: str) -> list[str]:
    """Modules that a dense model has instead of experts' parameters."""
    *inner, outer = model.shape.mlp
    return [f"mlp.{name}" for name in (inner if parameter == "experts.gate_up_proj" else [outer])]


@pytest.mark.parametrize(("attention", "parameters"), KINDS.values(), ids=KINDS)
def test_adapters_of_pefts_own_making(
    family_model: FoundationModel, family_folder: Path, tmp_path: Path, attention: bool, parameters: list[str]
) -> None:
    where = family_model.family.attention
    modules = sorted({f"{where}.{name}" for _, name in family_model.attention_linears()}) if attention else []
    if family_model.is_dense:
        modules += [module for parameter in parameters for module in modules_instead(family_model, parameter)]
        parameters = []
    expected = made_by_peft(
        family_folder,
        tmp_path,
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=family_model.family.model_type == "gpt2",
    )
    tensors, alpha = peft_layout.from_peft(tmp_path, family_model)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    found = by_us(family_model, tensors, alpha)
    assert_close(found, expected)
    assert (found - logits(family_model.lm)).abs().max() > 0.01
    again = write(peft_layout.to_files(tensors, alpha, family_model), tmp_path / "again")
    assert_close(by_peft(family_folder, again), expected)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_family("llama", tmp_path_factory.mktemp("dense"))


def test_an_adapter_of_a_dense_model_is_ordinary_lora_on_modules(dense_folder: Path) -> None:
    model = loaded(dense_folder)
    tensors = adapter(model, LoraConfig(rank=3))
    config, converted = peft_layout.to_peft(tensors, ALPHA, model, "base")
    attention = [f"self_attn.{name}_proj" for name in "koqv"]
    assert config["target_modules"] == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *attention]
    assert config["target_parameters"] is None
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, ALPHA, {}, {})
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    assert torch.equal(converted[key], tensors["layers.1.mlp.up_proj.lora_A"])
    part = only(tensors, "1.mlp.down_proj")
    assert peft_layout.to_peft(part, ALPHA, model, "base")[0]["target_modules"] == ["layers.1.mlp.down_proj"]


DENSE_OPTIONS: dict[str, dict[str, Any]] = {
    "all linears": {"target_modules": "all-linear"},
    "weights as parameters": {"target_parameters": ["mlp.down_proj.weight", "mlp.gate_proj.weight"]},
    "ranks and a stable scale": {
        "target_modules": ["up_proj", "q_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 5},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("options", DENSE_OPTIONS.values(), ids=DENSE_OPTIONS)
def test_adapters_of_a_dense_model_that_users_of_peft_make(
    dense_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = loaded(dense_folder)
    expected = made_by_peft(dense_folder, tmp_path, **options)
    tensors, alpha = peft_layout.from_peft(tmp_path, model)
    assert_close(by_us(model, tensors, alpha), expected)
    assert (expected - logits(model.lm)).abs().max() > 0.01


def test_mlps_beside_experts_are_told_of_by_their_weights(tmp_path: Path) -> None:
    folder = save_tiny_family("deepseek_v3", tmp_path / "base")
    model = loaded(folder)
    tensors = only(adapter(model, LoraConfig(rank=3, dense_mlp=True)), ".mlp.", "q_a_proj")
    config, converted = peft_layout.to_peft(tensors, ALPHA, model, "base")
    assert config["target_parameters"] == [f"mlp.{matrix}.weight" for matrix in sorted(MATRICES)]
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in converted
    written = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path / "adapter")
    assert_close(by_peft(folder, written), by_us(model, tensors))
    assert_same(peft_layout.from_peft(written, model), tensors)


# One family is enough for what follows.


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_keeps_every_bit(model: FoundationModel, config: LoraConfig, tmp_path: Path) -> None:
    tensors = adapter(model, config)
    kept = {name: value.clone() for name, value in tensors.items()}
    files = peft_layout.to_files(tensors, ALPHA, model)
    assert files == peft_layout.to_files(tensors, ALPHA, model)
    assert_same(peft_layout.from_peft(write(files, tmp_path), model), kept)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_a_fresh_adapter_survives(model: FoundationModel, tmp_path: Path) -> None:
    tensors = lora.initial(model, LoraConfig(rank=3, router=True), torch.Generator().manual_seed(0))
    assert_same(peft_layout.from_peft(write(peft_layout.to_files(tensors, ALPHA, model), tmp_path), model), tensors)


PARTS = {
    "down_proj": ("down_proj",),
    "gate_proj": ("gate_proj",),
    "up_proj and q_proj": ("up_proj", "q_proj"),
    "one layer": ("layers.1.",),
    "v_proj of one layer": ("layers.0.self_attn.v_proj",),
    "gate_up of one layer, down of the other": ("0.experts.gate", "0.experts.up", "1.experts.down"),
    "one router": ("self_attn", "layers.0.router"),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_any_part_of_an_adapter(
    model: FoundationModel, tiny_model_folder: Path, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    tensors = only(adapter(model, LoraConfig(rank=3, router=True)), *parts)
    folder = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)
    assert_close(by_peft(tiny_model_folder, folder), by_us(model, tensors))
    assert_same(peft_layout.from_peft(folder, model), tensors)


def test_without_attention_peft_warns_wrongly_and_computes_the_same(
    model: FoundationModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    tensors = adapter(model, LoraConfig(rank=3, attention=False))
    folder = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = by_peft(tiny_model_folder, folder)
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    assert [message.split()[2] for message in messages] == ["rank_pattern", "alpha_pattern"]
    assert_close(found, by_us(model, tensors))


def test_ranks_that_differ_by_layer_and_matrix(model: FoundationModel, tiny_model_folder: Path, tmp_path: Path) -> None:
    low, high = adapter(model, LoraConfig(rank=2)), adapter(model, LoraConfig(rank=5))
    tensors = {name: high[name] if "layers.1" in name or "down_proj" in name else low[name] for name in low}
    folder = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)
    assert_close(by_peft(tiny_model_folder, folder), by_us(model, tensors))
    assert_same(peft_layout.from_peft(folder, model), tensors)


def test_gate_and_up_of_different_rank(model: FoundationModel, tiny_model_folder: Path, tmp_path: Path) -> None:
    low, high = adapter(model, LoraConfig(rank=2)), adapter(model, LoraConfig(rank=5))
    tensors = {name: high[name] if "up_proj" in name else low[name] for name in low}
    folder = write(peft_layout.to_files(tensors, ALPHA, model), tmp_path)
    assert_close(by_peft(tiny_model_folder, folder), by_us(model, tensors))
    found, alpha = peft_layout.from_peft(folder, model)
    assert alpha == ALPHA
    for name, value in tensors.items():
        if "up_proj.lora_B" in name:  # its scale took a detour
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found[name], value)


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 4, "experts.down_proj": 1}},
    "alpha pattern": {"alpha_pattern": {"k_proj": 2, "layers.0.mlp.experts.gate_up_proj": 9}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"v_proj": 1}},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer of experts": {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
    "another in each layer": {
        "target_parameters": ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    },
    "experts by their old names": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "target_parameters": None},
    "regular expression": {"target_modules": r".*layers\.0\.self_attn\.(q|o)_proj"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_peft(
    model: FoundationModel, tiny_model_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    usual = {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
    }
    expected = made_by_peft(tiny_model_folder, tmp_path, **(usual | options))
    tensors, alpha = peft_layout.from_peft(tmp_path, model)
    assert_close(by_us(model, tensors, alpha), expected)


def test_a_lora_that_mixes_gate_and_up_is_both_of_the_whole_rank(
    model: FoundationModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    made_by_peft(tiny_model_folder, tmp_path, target_parameters=["experts.gate_up_proj"])
    tensors, alpha = peft_layout.from_peft(tmp_path, model)
    assert alpha == 5
    assert torch.equal(tensors["layers.0.experts.gate_proj.lora_A"], tensors["layers.0.experts.up_proj.lora_A"])
    assert tensors["layers.0.experts.up_proj.lora_B"].shape == (8, 16, 3)


def test_layout_by_hand(model: FoundationModel) -> None:
    tensors = adapter(model, LoraConfig(rank=3))
    config, converted = peft_layout.to_peft(tensors, ALPHA, model, "some/base")
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"]) == (6, 14.0)
    assert config["target_modules"] == [f"self_attn.{name}_proj" for name in "koqv"]
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
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


def test_targets_name_layers_only_where_some_are_left_out(model: FoundationModel) -> None:
    tensors = only(adapter(model, LoraConfig(rank=3)), "q_proj", "0.self_attn.v_proj", "1.experts.down_proj")
    config, converted = peft_layout.to_peft(tensors, ALPHA, model, "some/base")
    assert config["target_modules"] == ["layers.0.self_attn.v_proj", "self_attn.q_proj"]
    assert config["target_parameters"] == ["layers.1.mlp.experts.down_proj"]
    assert "base_model.model.model.layers.1.mlp.experts.lora_A.weight" in converted


def test_what_cannot_be_written(model: FoundationModel) -> None:
    with pytest.raises(ModelError, match="without LoRA"):
        peft_layout.to_files({}, ALPHA, model)
    with pytest.raises(ModelError, match="without LoRA"):
        peft_layout.to_files(only(adapter(model, LoraConfig(router=True)), "router"), ALPHA, model)
    with pytest.raises(ModelError, match="has no place"):
        peft_layout.to_files({"layers.7.router.weight": torch.zeros(8, 32)}, ALPHA, model)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.3.dev0", "0.21"])
def test_tested_versions(version: str) -> None:
    peft_layout.check_version(version, "it is")


@pytest.mark.parametrize("version", ["0.20.9", "0.22.0", "1.21.0", "0.2", "0.210.0", None])
def test_other_versions_are_refused_naming_both(version: str | None) -> None:
    with pytest.raises(ModelError, match=rf"installed is PEFT {version or 'of an unknown version'}, .* PEFT 0\.21 is"):
        peft_layout.check_version(version, "installed is")


def test_the_installed_version_is_a_tested_one() -> None:
    peft_layout.check_version(peft.__version__, "installed is")


def test_real_model(shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / "olmoe-en-16m"
    real = loaded(path)
    generator = torch.Generator().manual_seed(2)
    fresh = lora.initial(real, LoraConfig(rank=4), generator)
    tensors = {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}
    folder = write(peft_layout.to_files(tensors, ALPHA, real), tmp_path)
    torch.testing.assert_close(by_peft(path, folder), by_us(real, tensors), rtol=1e-4, atol=5e-5)
    assert_same(peft_layout.from_peft(folder, real), tensors)
