"""Dense models made sparse: identities with the dense model, and checkpoints that open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import VOCABULARY, token_ids
from commands import invoke
from denses import LLAMA3_ROPE, save_dense, save_llama, sizes, tensors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
)

from emberfed.errors import ConfigError
from emberfed.models import lora
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load
from emberfed.models.upcycle import UpcycleConfig, upcycle


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
