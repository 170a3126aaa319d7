"""Loading from folders, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from builders import SPARSE_VARIANTS, save_tiny_family, save_tiny_model, tiny_lm, tiny_tokenizer, token_ids
from transformers import BloomConfig, BloomForCausalLM

from emberfed import config as configuration
from emberfed.errors import ConfigError, ModelError
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load, load_tokenizer
from emberfed.models.quantised import Bits, QuantisedWeight, quantise_experts
from emberfed.provenance import fixed_settings


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that may be broken."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def test_round_trip_through_a_folder(tiny_model_folder: Path) -> None:
    model, tokenizer = load(ModelConfig(path=str(tiny_model_folder), device="cpu"))
    ids = token_ids(2, 8)
    reference = tiny_lm()
    with torch.no_grad():
        torch.testing.assert_close(model.lm(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert tokenizer.convert_tokens_to_ids("w5") == 5
    assert not any(parameter.requires_grad for parameter in model.lm.parameters())
    assert not model.lm.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny_model_folder: Path, dtype: str) -> None:
    config = ModelConfig.model_validate({"path": str(tiny_model_folder), "dtype": dtype, "device": "cpu"})
    assert {str(parameter.dtype) for parameter in load(config)[0].lm.parameters()} == {f"torch.{dtype}"}


def test_dtype_auto_is_the_checkpoints(folder: Path) -> None:
    tiny_lm().to(torch.bfloat16).save_pretrained(folder)
    model, _ = load(ModelConfig(path=str(folder), dtype="auto", device="cpu"))
    assert {parameter.dtype for parameter in model.lm.parameters()} == {torch.bfloat16}


def test_tokenizer_of_another_folder(tiny_model_folder: Path, folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer .* has no tokens; .* set model\.tokenizer"):
        load_tokenizer(ModelConfig(path=str(folder)))
    config = ModelConfig(path=str(folder), tokenizer=str(tiny_model_folder), device="cpu")
    assert load(config)[1].convert_tokens_to_ids("w5") == 5


def test_loading_is_silent_and_restores_the_libraries_settings(
    tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = transformers.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    load(ModelConfig(path=str(tiny_model_folder), device="cpu"))
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_folder(path: str) -> None:
    with pytest.raises(ModelError, match=f"model folder {path} does not exist"):
        load(ModelConfig(path=path))


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_dense_model_of_no_known_family(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'bloom' has no record \(its config says nothing of experts\); known: bert"):
        load(ModelConfig(path=str(tmp_path)))


def test_missing_weights_are_not_invented(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    gone = "model.layers.1.mlp.gate.weight"
    safetensors.torch.save_file(
        {name: value for name, value in tensors.items() if name != gone}, file, {"format": "pt"}
    )
    with pytest.raises(ModelError, match=f"1 weights are not in the checkpoint, the first is '{gone}'"):
        load(ModelConfig(path=str(folder)))


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))
    with pytest.raises(ModelError, match="2 weights have another shape .* first is .lm_head.weight") as caught:
        load(ModelConfig(path=str(folder)))
    assert "\n" not in str(caught.value)


def test_damaged_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(ModelConfig(path=str(folder)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(tiny_model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no CUDA device here; set model\.device=cpu"):
        load(ModelConfig(path=str(tiny_model_folder), device="cuda"))


def test_real_model(shared: Path) -> None:
    model, tokenizer = load(ModelConfig(path=str(shared / "models" / "olmoe-en-16m"), device="cpu"))
    assert (model.num_layers, model.num_experts, model.native_top_k) == (4, 64, 8)
    assert model.shape.parameters == 15_584_448
    assert len(tokenizer) <= model.shape.vocabulary == 4096


def test_a_tokenizer_whose_class_is_unknown_is_read_from_its_file(tmp_path: Path) -> None:
    """As OLMo's: its configuration names a class, and code, that transformers does not have."""
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "UnheardOfTokenizer"
    settings["auto_map"] = {"AutoTokenizer": ["unheard_of.UnheardOfTokenizer", None]}
    file.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert tokenizer("w5 w3")["input_ids"] == [5, 3]
    assert tokenizer.eos_token_id == 1


def test_olmos_tokenizer_gives_the_published_ids(shared: Path) -> None:
    cases = json.loads((shared / "testvectors" / "testvectors.json").read_text())["olmoe_tokenizer"]
    tokenizer = load_tokenizer(ModelConfig(path=str(shared / "tokenizers" / "olmo")))
    for text, ids in cases["cases"]:
        assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.eos_token_id == cases["eos_id"]


def change_weight(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Rewrite one tensor of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors | {name: change(tensors[name])}, file, {"format": "pt"})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(-1, torch.tensor([3]), float("nan"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", SPARSE_VARIANTS)
def test_quantised_while_loading_is_quantised_after_it(family: str, bits: Bits, tmp_path: Path) -> None:
    path = str(save_tiny_family(family, tmp_path))
    expected, _ = load(ModelConfig(path=path, device="cpu"))
    quantise_experts(expected.lm, bits)
    random_state = torch.random.get_rng_state()
    model, _ = load(ModelConfig(path=path, device="cpu", expert_bits=bits))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    found, wanted = model.lm.state_dict(), expected.lm.state_dict()
    assert set(found) == set(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert all(isinstance(block.experts.down_proj, QuantisedWeight) for block in model.blocks)
    ids = token_ids(2, 6)
    with torch.no_grad():
        assert torch.equal(model.lm(input_ids=ids).logits, expected.lm(input_ids=ids).logits)


def test_transformers_does_not_take_the_model_for_one_of_its_quantised_ones(tiny_model_folder: Path) -> None:
    model, _ = load(ModelConfig(path=str(tiny_model_folder), device="cpu", expert_bits=4))
    assert "quantization_config" not in model.lm.config.to_dict()
    assert not getattr(model.lm, "is_quantized", False)
    assert getattr(model.lm, "hf_quantizer", None) is None


@pytest.mark.parametrize("options", [{}, {"expert_bits": 4}, {"expert_storage": "disk"}])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.5.up_proj.weight", "model.layers.0.mlp.gate.weight"])
def test_values_that_are_not_finite(folder: Path, name: str, options: dict[str, Any]) -> None:
    change_weight(folder, name, with_nan)
    where = r"layers\.1\.mlp\.experts\.gate_up_proj" if "experts" in name else r"layers\.0\.mlp\.gate\.weight"
    with pytest.raises(ModelError, match=rf"model .*: weight 'model\.{where}' holds values that are not finite"):
        load(ModelConfig(path=str(folder), **options))


@pytest.mark.parametrize("options", [{"expert_bits": 8}, {"expert_storage": "disk"}])
def test_experts_of_another_shape(folder: Path, options: dict[str, Any]) -> None:
    for expert in range(8):
        change_weight(
            folder, f"model.layers.1.mlp.experts.{expert}.down_proj.weight", lambda weight: weight[:, :8].clone()
        )
    expected = r"'model\.layers\.1\.mlp\.experts\.down_proj' has shape \(8, 32, 8\); expected \(8, 32, 16\)"
    with pytest.raises(ModelError, match=expected):
        load(ModelConfig(path=str(folder), **options))


def test_experts_that_cannot_be_grouped(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, intermediate_size=6)
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.experts\.down_proj' has 6 columns: .* leave model.expert_bits out"
    ):
        load(ModelConfig(path=str(path), expert_bits=4))
    load(ModelConfig(path=str(path), device="cpu"))


def test_a_checkpoint_that_is_quantised_already(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="its checkpoint is quantised already, .*; set model.expert_bits=null"):
        load(ModelConfig(path=str(folder), expert_bits=4))


def test_bits_there_are_none_of() -> None:
    with pytest.raises(ConfigError, match=r"'model\.expert_bits': input should be 4 or 8, found 5"):
        configuration.load(None, ["model.expert_bits=5"])


def test_a_run_cannot_go_on_with_a_base_in_other_bits() -> None:
    """What must stay the same for the whole of a run includes the bits."""
    settings = [fixed_settings(configuration.load(None, [f"model.expert_bits={bits}"])) for bits in ("null", "4", "8")]
    assert [values["model.expert_bits"] for values in settings] == [None, 4, 8]


_MEASURE = r"""
import json, re, sys
from pathlib import Path
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load

def status(key):
    return int(re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

path, tiny, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
load(ModelConfig(path=tiny, device="cpu", expert_bits=4))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load(ModelConfig(path=path, dtype="bfloat16", device="cpu", **options))
print(json.dumps({"peak": status("VmHWM") - before, "left": status("VmRSS") - before}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.3 GB in bfloat16, most of it experts."""
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        lm = tiny_lm(hidden_size=512, intermediate_size=512, num_experts=24, num_hidden_layers=8)
    lm = lm.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in lm.parameters():
        parameter.data.copy_(torch.linspace(-1, 1, parameter.shape[-1]).expand(parameter.shape))
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def measured(large: Path, tiny: Path, **options: Any) -> dict[str, float]:
    """Resident memory while and after loading, in a process of its own, as shares of the checkpoint's bytes."""
    command = [sys.executable, "-c", _MEASURE, str(large), str(tiny), json.dumps(options)]
    child = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    checkpoint = (large / "model.safetensors").stat().st_size
    return {name: value / checkpoint for name, value in json.loads(child.stdout).items()}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_in_4_bits_or_onto_disk_never_needs_the_memory_of_16(large: Path, tiny_model_folder: Path) -> None:
    """All experts in 16 bit are never there at once. The checkpoint's pages count too: they are mapped.

    The larger stacks are 0.08 of the checkpoint: four times that, and what is no expert, is what disk needs at most.
    """
    in_16, in_4, on_disk = (
        measured(large, tiny_model_folder, **options)
        for options in ({}, {"expert_bits": 4}, {"expert_storage": "disk"})
    )
    mapped, experts = 1.0, 0.94
    assert in_16["peak"] - mapped > experts > 0.85 > in_4["peak"] - mapped
    assert in_4["left"] < 0.4 < 0.9 < in_16["left"] < 1.1
    assert on_disk["peak"] - mapped < 0.4
    assert on_disk["left"] < 0.15
