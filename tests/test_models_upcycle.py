"""Dense models made sparse: identities with the dense model, checkpoints that open, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import VOCABULARY, save_tiny_model, tiny_tokenizer, token_ids
from commands import invoke
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
)

from emberfed.errors import ConfigError, ModelError
from emberfed.models import lora
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load
from emberfed.models.upcycle import UpcycleConfig, sparse_config, upcycle

NEURONS, HIDDEN = 64, 32
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def sizes(**overrides: Any) -> dict[str, Any]:
    """Settings of a tiny dense model: 2 layers, hidden 32, FFN of 64 neurons, 4 heads on 2 key-value heads."""
    plain = {
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
    }
    return plain | overrides


def save_dense(folder: Path, lm: Any) -> Path:
    """Write a dense model with loud random weights and a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(lm.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a tiny LLaMA."""
    with torch.random.fork_rng(devices=[]):
        return save_dense(folder, LlamaForCausalLM(LlamaConfig(**sizes(**overrides))).to(dtype))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA. Do not write to it."""
    return save_llama(tmp_path_factory.mktemp("dense"))


def logits(folder: Path) -> torch.Tensor:
    """What transformers computes from a folder in float32, (2, 9, vocabulary)."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        result: torch.Tensor = lm(input_ids=token_ids(2, 9)).logits
    return result


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by the name they have on disk."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in safetensors.torch.load_file(file).items()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- identities with the dense model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "clustered"])
def test_all_experts_behind_a_zero_router_are_the_dense_model(dense: Path, tmp_path: Path, method: str) -> None:
    options = {"method": method, "num_experts": 4, "top_k": 4, "router_std": 0, "output_scale": 4}
    upcycle(dense, tmp_path / "sparse", UpcycleConfig.model_validate(options))
    torch.testing.assert_close(logits(tmp_path / "sparse"), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("router_std", [0.0, 5.0])
def test_copies_are_the_dense_model_whatever_the_router(
    dense: Path, tmp_path: Path, top_k: int, router_std: float
) -> None:
    options = UpcycleConfig(method="copy", num_experts=4, top_k=top_k, router_std=router_std)
    upcycle(dense, tmp_path / "sparse", options)
    torch.testing.assert_close(logits(tmp_path / "sparse"), logits(dense), rtol=1e-5, atol=2e-5)


def test_the_scale_is_in_the_down_projections_only(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "plain", UpcycleConfig(num_experts=4, top_k=2, output_scale=1))
    upcycle(dense, tmp_path / "default", UpcycleConfig(num_experts=4, top_k=2))
    plain, default = tensors(tmp_path / "plain"), tensors(tmp_path / "default")
    for name, tensor in plain.items():
        assert torch.equal(default[name], tensor * 2 if name.endswith(".w2.weight") else tensor), name


def test_everything_outside_the_ffns_is_carried_over(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "sparse", UpcycleConfig(num_experts=4))
    before, after = tensors(dense), tensors(tmp_path / "sparse")
    outside = {name for name in before if ".mlp." not in name}
    assert outside == {name for name in after if "block_sparse_moe" not in name}
    assert all(torch.equal(before[name], after[name]) for name in outside)


def test_layers_differ_and_the_seed_decides(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        upcycle(dense, tmp_path / name, UpcycleConfig(method="clustered", num_experts=4, seed=seed))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    upcycle(dense, tmp_path / "random", UpcycleConfig(num_experts=4, seed=3))
    upcycle(dense, tmp_path / "random-other", UpcycleConfig(num_experts=4, seed=4))
    one, other = tensors(tmp_path / "random"), tensors(tmp_path / "random-other")
    router = "model.layers.{}.block_sparse_moe.gate.weight"
    assert not torch.equal(one[router.format(0)], one[router.format(1)])
    assert not torch.equal(one[router.format(0)], other[router.format(0)])


def test_the_global_random_stream_is_left_alone(dense: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    upcycle(dense, tmp_path / "sparse", UpcycleConfig(method="clustered", num_experts=4))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "clustered", "copy"])
def test_the_checkpoint_opens(dense: Path, tmp_path: Path, method: str) -> None:
    heard: list[tuple[int, int]] = []
    options = UpcycleConfig.model_validate({"method": method, "num_experts": 4, "top_k": 2})
    written = upcycle(dense, tmp_path / "deep" / "sparse", options, lambda done, of: heard.append((done, of)))
    assert heard == [(0, 2), (1, 2), (2, 2)]
    assert [path.name for path in written.path.parent.iterdir()] == ["sparse"]  # nothing temporary stays
    lm, info = AutoModelForCausalLM.from_pretrained(written.path, output_loading_info=True)
    assert isinstance(lm, MixtralForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert written.parameters == sum(parameter.numel() for parameter in lm.parameters())
    experts = lm.model.layers[0].mlp.experts
    assert written.expert_intermediate == experts.down_proj.shape[2]
    idle = 2 * 2 * (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel())  # 2 layers, 2 of 4 experts
    assert written.active_parameters == written.parameters - idle
    assert AutoTokenizer.from_pretrained(written.path).convert_tokens_to_ids("w5") == 5
    assert json.loads((written.path / "upcycle.json").read_text())["method"] == method


def test_it_opens_and_trains_here(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "sparse", UpcycleConfig(num_experts=4, top_k=2, router_std=1))
    model, tokenizer = load(ModelConfig(path=str(tmp_path / "sparse"), device="cpu"))
    assert len(tokenizer) == VOCABULARY
    assert (model.num_experts, model.native_top_k) == (4, 2)
    ids = token_ids(2, 9)
    with torch.no_grad(), model.active_experts(2):
        torch.testing.assert_close(model.lm(input_ids=ids).logits, logits(tmp_path / "sparse"), rtol=1e-5, atol=2e-5)
    start = lora.initial(model, lora.LoraConfig(rank=2, alpha=4), generator(0))
    with model.active_experts(1), lora.attached(model, start, 4.0) as adapter:
        optimizer = torch.optim.SGD(list(adapter.parameters.values()), lr=0.05)
        losses = []
        for _ in range(2):
            loss = model.lm(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_number_formats_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = save_llama(tmp_path / "dense", dtype=dtype)
    upcycle(dense, tmp_path / "sparse", UpcycleConfig(num_experts=4))
    assert {tensor.dtype for tensor in tensors(tmp_path / "sparse").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").dtype == dtype


def test_settings_survive(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "rope_parameters": LLAMA3_ROPE,
        "rms_norm_eps": 3e-4,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        "initializer_range": 0.01,
        "attention_dropout": 0.1,
    }
    dense = save_llama(tmp_path / "dense", **settings)
    upcycle(dense, tmp_path / "sparse", UpcycleConfig(method="copy", num_experts=2, top_k=1))
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, value in sizes(**settings).items():
        assert getattr(lm.config, name) == value, name
    torch.testing.assert_close(logits(tmp_path / "sparse"), logits(dense), rtol=1e-5, atol=2e-5)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_a_mistral_with_a_sliding_window(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        lm = MistralForCausalLM(MistralConfig(**sizes(sliding_window=4)))
    dense = save_dense(tmp_path / "dense", lm)
    upcycle(dense, tmp_path / "sparse", UpcycleConfig(method="copy", num_experts=2, top_k=2))
    torch.testing.assert_close(logits(tmp_path / "sparse"), logits(dense), rtol=1e-5, atol=2e-5)
    whole = json.loads((tmp_path / "sparse/config.json").read_text())
    assert whole["sliding_window"] == 4
    (tmp_path / "sparse/config.json").write_text(json.dumps(whole | {"sliding_window": None}))
    assert not torch.allclose(logits(tmp_path / "sparse"), logits(dense), atol=1e-3)  # the window does matter here


def test_a_checkpoint_in_several_files_with_old_buffers(dense: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(dense).save_pretrained(sharded, max_shard_size="20KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    safetensors.torch.save_file({old: torch.ones(4)}, sharded / "old.safetensors")
    index["weight_map"][old] = "old.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(list(sharded.glob("*.safetensors"))) > 3
    upcycle(dense, tmp_path / "one", UpcycleConfig(num_experts=4))
    upcycle(sharded, tmp_path / "two", UpcycleConfig(num_experts=4))
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- what is refused --------------------------------------------------------------------------------------------------


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
    assert (tmp_path / "folder/file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert upcycle(dense, tmp_path / "empty", UpcycleConfig(num_experts=4)).path == tmp_path / "empty"


def test_more_experts_per_token_than_experts() -> None:
    with pytest.raises(ValidationError, match="top_k 5 is more than num_experts 4"):
        UpcycleConfig(num_experts=4, top_k=5)


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(dense: Path, tmp_path: Path) -> None:
    said = invoke("upcycle", dense, tmp_path / "a", "--experts", "4", "--method", "clustered", "--seed", "5")
    assert said.exit_code == 0
    assert f"{tmp_path / 'a'} written: 2 layers, 4 experts of 16 neurons in each, 2 active per token." in said.stdout
    result = invoke(
        "upcycle", dense, tmp_path / "b", "--experts", "4", "--method", "clustered", "--seed", "5", "--json"
    )
    document = json.loads(result.stdout)
    assert document.items() >= {"method": "clustered", "num_experts": 4, "output_scale": 2.0, "seed": 5}.items()
    files = [path.name for path in (tmp_path / "a").iterdir()]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_command_errors(dense: Path, tmp_path: Path) -> None:
    result = invoke("upcycle", dense, tmp_path / "a", "--experts", "7")
    assert result.exit_code == ConfigError.exit_code
    assert "cannot be divided into 7 equal experts; num_experts may be 2, 4, 8, 16, 32, 64" in result.stderr
    assert "'upcycle.method'" in invoke("upcycle", dense, tmp_path / "a", "--method", "best").stderr
    assert "Example: emberfed upcycle" in invoke("upcycle", "--help").stdout
