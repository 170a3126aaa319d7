"""Small models of other sparse families: a LLaMA divided into experts, and a DeepSeek with shared ones."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from emberfed.builtin.pretrain import (
    DeepseekRecipe,
    DenseRecipe,
    LlamaMoeRecipe,
    Recipe,
    batches,
    new_model,
    pretrain,
    save,
)
from emberfed.errors import ConfigError
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load

DENSE = DenseRecipe(
    vocab_size=400, tokenizer_documents=200, hidden_size=16, mlp_size=24, layers=2, heads=2,
    sequence_tokens=32, batch_size=2, steps=40, warmup_steps=2,
)  # fmt: skip
DEEPSEEK = DeepseekRecipe(
    vocab_size=400, tokenizer_documents=200, hidden_size=16, mlp_size=24, layers=2, heads=2, expert_size=4, experts=6,
    shared_experts=2, top_k=2, latent_size=8, head_size=8, rotary_size=4,
    sequence_tokens=32, batch_size=2, steps=6, warmup_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny dense LLaMA, trained a little."""
    tokenizer = DENSE.tokenizer()
    model = new_model(DENSE, tokenizer)
    pretrain(DENSE, model, tokenizer)
    folder = tmp_path_factory.mktemp("dense")
    save(model, tokenizer, folder)
    return folder


def llama_moe(dense: Path, **options: Any) -> LlamaMoeRecipe:
    small = {"experts": 6, "top_k": 2, "sequence_tokens": 32, "batch_size": 2, "steps": 6, "warmup_steps": 2}
    return LlamaMoeRecipe(dense=str(dense), **(small | options))


def written(family: str, recipe: Any, folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """What the command writes: its record, and the model and tokenizer as they load."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(recipe).items()]
    command = [sys.executable, "-m", "emberfed.builtin.pretrain", f"--family={family}", f"--output={folder}", *given]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((folder / "recipe.json").read_text()), *load(ModelConfig(path=str(folder), device="cpu"))


def test_a_llama_with_all_its_experts_is_the_dense_one_before_training(dense: Path) -> None:
    """With K = E every neuron of the FFN takes part, and a router without preference weighs all experts the same."""
    recipe = llama_moe(dense, top_k=6)
    tokenizer = recipe.tokenizer()
    sparse = new_model(recipe, tokenizer)
    for layer in sparse.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    input_ids = next(batches(recipe, tokenizer))
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(input_ids=input_ids)
        torch.testing.assert_close(sparse(input_ids=input_ids).logits, original.logits, rtol=0.02, atol=0.02)
    assert sparse.dtype == torch.float32


def test_a_llama_goes_on_from_the_dense_one_with_other_text(dense: Path) -> None:
    recipe = llama_moe(dense)
    tokenizer = recipe.tokenizer()
    assert tokenizer.get_vocab() == DENSE.tokenizer().get_vocab()
    first, second = new_model(recipe, tokenizer), new_model(recipe, tokenizer)
    assert pretrain(recipe, first, tokenizer) == pretrain(recipe, second, tokenizer)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    fresh = float(torch.tensor(float(len(tokenizer))).log())
    own, earlier = next(batches(recipe, tokenizer)), next(batches(DENSE, tokenizer))
    with torch.no_grad():
        loss = float(first(input_ids=own, labels=own).loss)
    assert loss < fresh - 0.1, "what the dense model learned is still there"
    assert not torch.equal(own, earlier)


def test_the_routers_loss_is_in_what_is_minimised_at_its_weight(dense: Path) -> None:
    for recipe, without in (
        (llama_moe(dense, router_aux_loss_coef=0.5), llama_moe(dense, router_aux_loss_coef=0.0)),
        (
            dataclasses.replace(DEEPSEEK, router_aux_loss_coef=0.5),
            dataclasses.replace(DEEPSEEK, router_aux_loss_coef=0.0),
        ),
    ):
        tokenizer = recipe.tokenizer()
        input_ids = next(batches(recipe, tokenizer))
        loss, entropy = recipe.losses(new_model(recipe, tokenizer), input_ids)
        bare, same = without.losses(new_model(without, tokenizer), input_ids)
        assert float(bare.detach()) == pytest.approx(same, abs=1e-5)
        assert entropy == pytest.approx(same, abs=1e-5)
        assert float(loss.detach()) > entropy + 0.4, "half of a loss that is about 1 for each layer, or more"


def test_a_deepseek_s_cross_entropy_is_transformers_own() -> None:
    tokenizer = DEEPSEEK.tokenizer()
    model = new_model(DEEPSEEK, tokenizer)
    input_ids = next(batches(DEEPSEEK, tokenizer))
    _, entropy = DEEPSEEK.losses(model, input_ids)
    with torch.no_grad():
        output = model(input_ids=input_ids, labels=input_ids)
    assert entropy == pytest.approx(float(output.loss), rel=1e-6)
    slow = cross_entropy(output.logits[:, :-1].reshape(-1, output.logits.shape[-1]), input_ids[:, 1:].reshape(-1))
    assert entropy == pytest.approx(float(slow), rel=1e-6)


def test_a_deepseek_s_pretraining_is_reproducible_and_trains_its_routers() -> None:
    tokenizer = DEEPSEEK.tokenizer()
    first, second = new_model(DEEPSEEK, tokenizer), new_model(DEEPSEEK, tokenizer)
    before = first.model.layers[1].mlp.gate.weight.detach().clone()
    assert pretrain(DEEPSEEK, first, tokenizer) == pretrain(DEEPSEEK, second, tokenizer)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(before, first.model.layers[1].mlp.gate.weight)


def test_the_command_writes_a_llama_with_experts_that_loads(dense: Path, tmp_path: Path) -> None:
    recipe = llama_moe(dense)
    record, model, tokenizer = written("llama-moe", recipe, tmp_path)
    assert LlamaMoeRecipe(**record["arguments"]) == recipe
    assert record["parameters"] == model.shape.parameters
    assert (model.family.model_type, model.shape.num_experts, model.shape.native_top_k) == ("mixtral", 6, 2)
    assert model.shape.expert_intermediate * model.shape.num_experts == DENSE.mlp_size
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["router_aux_loss_coef"] == recipe.router_aux_loss_coef
    assert model.shape.vocabulary == len(tokenizer)


def test_the_command_writes_a_deepseek_that_loads(tmp_path: Path) -> None:
    record, model, tokenizer = written("deepseek", DEEPSEEK, tmp_path)
    assert DeepseekRecipe(**record["arguments"]) == DEEPSEEK
    assert record["parameters"] == model.shape.parameters
    assert (model.family.model_type, model.shape.num_experts, model.shape.native_top_k) == ("deepseek_v2", 6, 2)
    assert [block.layer for block in model.blocks] == [1], "the first layer has no experts"
    assert model.shape.vocabulary == len(tokenizer)


def test_text_and_tokenizer_are_the_built_in_model_s() -> None:
    fields = ("seed", "vocab_size", "tokenizer_documents", "max_positions", "sequence_tokens", "batch_size")
    assert [getattr(DeepseekRecipe(), name) for name in fields] == [getattr(Recipe(), name) for name in fields]
    assert LlamaMoeRecipe().seed != DenseRecipe().seed


def test_experts_that_do_not_divide_the_ffn_are_refused(dense: Path) -> None:
    recipe = llama_moe(dense, experts=7)
    with pytest.raises(ConfigError, match="7"):
        new_model(recipe, recipe.tokenizer())
