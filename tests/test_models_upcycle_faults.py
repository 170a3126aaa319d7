"""Dense models that cannot be made sparse, outputs that are taken, and stopping: one line, and nothing is left."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import save_tiny_family, save_tiny_model
from commands import invoke, start
from denses import LLAMA3_ROPE, save_llama, sizes, tensors
from pydantic import ValidationError
from transformers import LlamaConfig, MistralConfig

from emberfed.errors import ConfigError, Interrupted, ModelError
from emberfed.models.upcycle import UpcycleConfig, sparse_config, upcycle


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA. Do not write to it."""
    return save_llama(tmp_path_factory.mktemp("dense"))


def refused(dense: Path, output: Path, match: str, **options: Any) -> None:
    """Check that upcycling ends with one line, and leaves nothing."""
    before = sorted(output.parent.iterdir())
    with pytest.raises((ModelError, ConfigError), match=match) as caught:
        upcycle(dense, output, UpcycleConfig.model_validate({"num_experts": 4, **options}))
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.iterdir()) == before


def test_settings_mixtral_does_not_have(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"attention_bias": True, "mlp_bias": True, "pretraining_tp": 2}
    for name, value in settings.items():
        dense = save_llama(tmp_path / name, **{name: value})
        refused(dense, tmp_path / "sparse", rf"{name} = {value} of this llama model cannot be expressed")


def test_the_dense_config_is_not_shared() -> None:
    dense = LlamaConfig(**sizes(rope_parameters=LLAMA3_ROPE))
    before = dense.to_dict()
    sparse_config(dense, UpcycleConfig()).rope_parameters["factor"] = 2.0
    assert dense.to_dict() == before


def test_settings_per_layer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="layer_types of this mistral model cannot be expressed"):
        sparse_config(MistralConfig(layer_types=["full_attention"] * 2, **sizes()), UpcycleConfig())


def test_models_of_another_kind(dense: Path, tmp_path: Path) -> None:
    olmoe = save_tiny_model(tmp_path / "olmoe")
    refused(olmoe, tmp_path / "sparse", "model type 'olmoe' has experts already; give one of type llama or mistral")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text('{"model_type": "gpt2"}')
    refused(tmp_path / "gpt", tmp_path / "sparse", "model type 'gpt2' is not supported; give one of type llama")
    olmo2 = save_tiny_family("olmo2", tmp_path / "olmo2")
    refused(olmo2, tmp_path / "sparse", "model type 'olmo2' is not supported; give one of type llama or mistral")


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "sparse", "nowhere does not exist")
    dense = save_llama(tmp_path / "dense")
    weights = dense / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(dense, tmp_path / "sparse", "cannot be read")
    weights.unlink()
    refused(dense, tmp_path / "sparse", r"has no model\.safetensors; open it once with transformers")
    (dense / "config.json").write_text("{")
    refused(dense, tmp_path / "sparse", "cannot be read")


@pytest.mark.parametrize("text", ["[]", "null", "5", '{"weight_map": 5}', '{"a": 5}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    dense = save_llama(tmp_path / "dense")
    (dense / "model.safetensors.index.json").write_text(text)
    refused(dense, tmp_path / "sparse", r"model\.safetensors\.index\.json has no weight_map")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read: RecursionError|cannot be read: maximum recursion depth"),
        ('{"weight_map": {"a": "none.safetensors"}}', "cannot be read: .*none"),
        ('{"weight_map": {"a": "\\u0000"}}', "cannot be read"),
        ('{"weight_map": {}}', "weights are not in the checkpoint"),
    ],
    ids=["cut off", "deep", "file gone", "NUL", "empty"],
)
def test_an_index_that_leads_nowhere(tmp_path: Path, text: str, message: str) -> None:
    dense = save_llama(tmp_path / "dense")
    (dense / "model.safetensors.index.json").write_text(text)
    refused(dense, tmp_path / "sparse", message)


@pytest.mark.parametrize(
    "text", ["null", "[]", "5", '"x"', '{"model_type": 5}', '{"model_type": ["llama"]}', "[" * 100_000]
)
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    dense = save_llama(tmp_path / "dense")
    (dense / "config.json").write_text(text)
    refused(dense, tmp_path / "sparse", "cannot be read")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "wibble"}, "hidden_act 'wibble' is no activation of transformers"),
        ({"hidden_act": "sillu"}, "hidden_act 'sillu' is no activation of transformers; did you mean 'silu'"),
        ({"hidden_act": None}, "hidden_act"),
        ({"num_attention_heads": 0}, "cannot be read"),
        ({"hidden_size": "wide"}, "cannot be read: .*hidden_size"),
        ({"intermediate_size": -64}, "cannot be read"),
        ({"intermediate_size": 0}, "has shape .*, its config says"),
        ({"rope_parameters": {"rope_type": "wibble"}}, "cannot be read: .*wibble"),
        ({"dtype": "wibble"}, "cannot be read: .*wibble"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_settings_no_model_has(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    dense = save_llama(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | values))
    refused(dense, tmp_path / "sparse", message)


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("model.norm.weight", None, r"1 weights are not in the checkpoint, the first is 'model\.norm\.weight'"),
        ("model.norm.weight", torch.ones(3), r"'model\.norm\.weight' has shape \(3,\), its config says \(32,\)"),
        ("model.norm.weight", torch.full((32,), torch.nan), r"'model\.norm\.weight' .* not finite"),
        ("model.layers.1.mlp.up_proj.weight", torch.full((64, 32), torch.inf), r"'.*1\.mlp\.up_proj.*' .* not finite"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int8), r"stored as I8; give .* float32, bfloat16, float16"),
        ("score.weight", torch.ones(2, 32), r"'score\.weight' has no place in the Mixtral architecture"),
    ],
)
def test_damaged_weights(tmp_path: Path, name: str, replacement: torch.Tensor | None, message: str) -> None:
    dense = save_llama(tmp_path / "dense")
    changed = tensors(dense)
    changed.pop(name, None)
    if replacement is not None:
        changed[name] = replacement
    safetensors.torch.save_file(changed, dense / "model.safetensors", metadata={"format": "pt"})
    refused(dense, tmp_path / "sparse", message)


def test_quantised_models(tmp_path: Path) -> None:
    dense = save_llama(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refused(dense, tmp_path / "sparse", "is quantised; give the checkpoint it was made from")


def test_a_scale_the_number_format_cannot_hold(tmp_path: Path) -> None:
    dense = save_llama(tmp_path / "dense", dtype=torch.float16)
    refused(dense, tmp_path / "sparse", "does not fit into float16 times output_scale 1e[+]06", output_scale=1e6)


def test_outputs_that_are_taken(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("mine")
    refused(dense, tmp_path / "file", "exists and is not an empty folder")
    refused(dense, tmp_path / "folder", "exists and is not an empty folder")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    refused(dense, tmp_path / "link", "exists and is not an empty folder")
    refused(dense, tmp_path / ("x" * 300), "cannot be a folder: File name too long")
    refused(dense, tmp_path / "nul\0", "cannot be a folder: it has a NUL in it")
    refused(tmp_path / ("x" * 300), tmp_path / "new", "cannot be read: .*File name too long")
    assert (tmp_path / "folder/file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert upcycle(dense, tmp_path / "empty", UpcycleConfig(num_experts=4)).path == tmp_path / "empty"


def test_more_experts_per_token_than_experts() -> None:
    with pytest.raises(ValidationError, match="top_k 5 is more than num_experts 4"):
        UpcycleConfig(num_experts=4, top_k=5)


@pytest.mark.parametrize("std", ["1e300", "inf", "nan", "-1", "1001"])
def test_router_weights_no_format_holds(dense: Path, tmp_path: Path, std: str) -> None:
    result = invoke("upcycle", dense, tmp_path / "a", "--router-std", std)
    assert result.exit_code == ConfigError.exit_code
    assert "'upcycle.router_std'" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped(tmp_path: Path, number: signal.Signals) -> None:
    dense = save_llama(tmp_path / "dense", num_hidden_layers=60)
    process = start("upcycle", dense, tmp_path / "out" / "sparse", "--experts", "32", "--method", "clustered")
    while not list(tmp_path.glob("out/.sparse.*.tmp/*.safetensors")):
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == Interrupted.exit_code
    assert (out, err) == ("", "emberfed: stopped\n")
    assert not list((tmp_path / "out").iterdir())
