"""The dense relative of the built-in model: how it is made, of the same text and with the same tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from emberfed.builtin import model_path
from emberfed.builtin.pretrain import DenseRecipe, Recipe, batches, new_model, pretrain, train_tokenizer
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import load

TINY = DenseRecipe(
    vocab_size=400, tokenizer_documents=200, hidden_size=16, mlp_size=24, layers=1, heads=2,
    sequence_tokens=32, batch_size=2, steps=6, warmup_steps=2,
)  # fmt: skip


def test_pretraining_is_reproducible_and_lowers_the_loss() -> None:
    tokenizer = train_tokenizer(TINY)
    state = torch.get_rng_state()
    first, second = new_model(TINY, tokenizer), new_model(TINY, tokenizer)
    assert torch.equal(state, torch.get_rng_state()), "the global random state was left as found"
    batch = next(batches(TINY, tokenizer))
    before = float(first(input_ids=batch, labels=batch).loss.detach())
    assert pretrain(TINY, first, tokenizer) == pretrain(TINY, second, tokenizer)
    assert float(first(input_ids=batch, labels=batch).loss.detach()) < before
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))


def test_text_and_tokenizer_are_the_built_in_model_s() -> None:
    fields = ("seed", "vocab_size", "tokenizer_documents", "max_positions", "sequence_tokens", "batch_size")
    assert [getattr(DenseRecipe(), name) for name in fields] == [getattr(Recipe(), name) for name in fields]


def test_it_is_of_the_size_of_the_active_part_of_the_built_in_model() -> None:
    """Built in, 8 of 32 experts are active: all parameters without 24 of 32 experts in each of 4 layers."""
    model, tokenizer = load(ModelConfig(path="builtin", device="cpu"))
    sparse = model.shape
    expert = 3 * sparse.hidden * sparse.expert_intermediate
    active = sparse.parameters - sparse.num_layers * (sparse.num_experts - sparse.native_top_k) * expert
    with torch.device("meta"):
        dense = FoundationModel(new_model(DenseRecipe(), tokenizer)).shape
    assert active < dense.parameters < 2 * active


def test_the_command_writes_a_model_that_loads(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        name.replace("_", "-"): getattr(TINY, name)
        for name in (
            "vocab_size", "tokenizer_documents", "hidden_size", "mlp_size", "layers", "heads", "sequence_tokens",
            "batch_size", "steps", "warmup_steps",
        )
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "emberfed.builtin.pretrain", "--family=llama", f"--output={tmp_path}", *given]
    subprocess.run(command, check=True, capture_output=True)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert DenseRecipe(**recipe["arguments"]) == TINY
    assert recipe["parameters"] == AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    model, tokenizer = load(ModelConfig(path=str(tmp_path), device="cpu"))
    assert model.is_dense
    assert model.shape.vocabulary == len(tokenizer)


def test_the_command_needs_to_be_told_where() -> None:
    command = [sys.executable, "-m", "emberfed.builtin.pretrain", "--family=llama"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--output" in done.stderr
    assert (model_path() / "recipe.json").is_file()
