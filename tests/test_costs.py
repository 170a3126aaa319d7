"""Counted costs: against torch's FLOP counter where it can see, and against hand counts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import OlmoeConfig, OlmoeForCausalLM

from emberfed import costs
from emberfed.costs import Work
from emberfed.models import lora
from emberfed.models.sparse_model import SparseModel


@pytest.fixture(scope="module")
def model() -> SparseModel:
    """Eager attention: torch's counter does not see the fused one on CPUs."""
    config = OlmoeConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=4,
        vocab_size=64,
        pad_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    return SparseModel(OlmoeForCausalLM(config))


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize(
    "config",
    [
        lora.LoraConfig(rank=3),
        lora.LoraConfig(rank=3, attention=False),
        lora.LoraConfig(rank=2, experts=False),
        lora.LoraConfig(rank=2, router=True),
    ],
    ids=["all", "experts", "attention", "router"],
)
def test_flops_are_those_torch_counts(model: SparseModel, config: lora.LoraConfig, top_k: int) -> None:
    sequences, length, positions = 3, 10, torch.tensor([2, 5, 6])
    ids = torch.randint(2, 64, (sequences, length), generator=torch.Generator().manual_seed(0))
    tensors = lora.initial(model, config, torch.Generator().manual_seed(0))
    work = Work(sequences * length, sequences * length**2, top_k, sequences * len(positions))
    with model.active_experts(top_k), lora.attached(model, tensors, 16.0) as adapter:
        counter = FlopCounterMode(display=False)
        with counter:
            logits = model.lm(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=positions, use_cache=False
            ).logits
            forward = counter.get_total_flops()
            logits.sum().backward()
        assert costs.forward_flops(model.shape, work, adapter.parameters) == forward
        assert costs.training_flops(model.shape, work, adapter.parameters) == counter.get_total_flops()


def test_hand_count_of_one_token(model: SparseModel) -> None:
    """One token, K = 1, no adapter: per layer q 32x32, k and v 16x32, o 32x32, router 8x32, expert 3x32x16 weights.

    2 x (1024 + 512 + 512 + 1024 + 256 + 1536) = 9728 FLOPs, attention 4 x 1 pair x 32 = 128, so 2 x 9856 for both
    layers; the head 2 x 32 x 64 = 4096. In all 23808.
    """
    assert costs.forward_flops(model.shape, Work(1, 1, 1, 1), {}) == 23808


def test_work_adds_up() -> None:
    assert Work(1, 2, 4, 3) + Work(10, 20, 4, 30) == Work(11, 22, 4, 33)


def test_peak_memory_sees_what_was_used_inside_only() -> None:
    """In a process of its own: one that has freed memory before may hand it out again without growing."""
    code = """
import torch
from emberfed import costs
with costs.measuring(torch.device("cpu")) as before:
    pass
with costs.measuring(torch.device("cpu")) as inside:
    block = torch.ones(64 * 2**20 // 4)
    del block
with costs.measuring(torch.device("cpu")) as after:
    pass
print(before.bytes, inside.bytes, after.bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, inside, after = map(int, done.stdout.split())
    assert inside - before > 50 * 2**20
    assert inside - after > 50 * 2**20
