"""Loading from folders, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from builders import tiny_lm, tiny_tokenizer, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

from emberfed.errors import ModelError
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load, load_tokenizer


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


def test_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'llama' is not a sparse mixture-of-experts model"):
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
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
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
