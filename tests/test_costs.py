"""Counted FLOPs: against torch's FLOP counter on every family, and against hand counts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import product

import pytest
import torch
from builders import DENSE_VARIANTS, SPARSE_VARIANTS, tiny_family_lm, token_ids, whole_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from emberfed import costs
from emberfed.costs import Work
from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel

SPARSE, DENSE = (
    [name for names in variants.values() for name in names] for variants in (SPARSE_VARIANTS, DENSE_VARIANTS)
)
SEQUENCES, LENGTH, POSITIONS = 3, 10, (2, 5, 6)


@cache
def tiny(name: str) -> FoundationModel:
    """Eager attention: torch's counter does not see the fused one on CPUs."""
    lm = tiny_family_lm(name, attn_implementation="eager")
    return FoundationModel(lm)


@cache
def everything(name: str) -> Mapping[str, torch.Tensor]:
    """LoRA on all that can have it, and trained routers, with ranks that tell the kinds apart."""
    model, generator = tiny(name), torch.Generator().manual_seed(0)
    high, low = (lora.initial(model, whole_adapter(model, rank), generator) for rank in (3, 2))
    return high | {key: tensor for key, tensor in low.items() if re.search(r"\.experts|\.mlp", key)}


def chosen(name: str, pattern: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in everything(name).items() if re.search(pattern, key)}


def addmm_flops(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: object) -> int:
    """The experts add products in place, which torch's counter does not know; it gives shapes."""
    return 2 * left[0] * left[1] * right[1]


def counted(
    model: FoundationModel, tensors: Mapping[str, torch.Tensor], top_k: int, checkpointing: bool = False
) -> tuple[int, int]:
    """What torch counts: forward, and backward."""
    ids = token_ids(SEQUENCES, LENGTH)
    again = model.gradient_checkpointing() if checkpointing else nullcontext()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with model.active_experts(top_k), lora.attached(model, tensors, 16.0), again, counter:
        logits = model.lm(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_to_keep=torch.tensor(POSITIONS),
            use_cache=False,
        ).logits
        forward = counter.get_total_flops()
        if logits.requires_grad:
            logits.sum().backward()
        return forward, counter.get_total_flops() - forward


def work(top_k: int) -> Work:
    return Work.of_batch(SEQUENCES, LENGTH, top_k, SEQUENCES * len(POSITIONS))


def check(name: str, tensors: Mapping[str, torch.Tensor], top_k: int, uncounted: int = 0) -> None:
    """Compare, where each direction has so many FLOPs beyond what the formulas count."""
    model = tiny(name)
    forward, backward = (flops - uncounted for flops in counted(model, tensors, top_k))
    assert costs.forward_flops(model.shape, work(top_k), tensors) == forward
    assert costs.backward_flops(model.shape, work(top_k), tensors) == backward
    assert costs.training_flops(model.shape, work(top_k), tensors) == forward + backward


def gates_on_shared_experts(name: str) -> int:
    """FLOPs of Qwen2-MoE's gates of one column, of which a `ModelShape` does not tell."""
    model = tiny(name)
    gated = [block for block in model.blocks if hasattr(block.module, "shared_expert_gate")]
    return len(gated) * 2 * work(1).tokens * model.shape.hidden


def two(name: str) -> int:
    """K = 2, or the one K there is."""
    return min(2, tiny(name).largest_top_k)


@pytest.mark.parametrize(("name", "top_k"), [*product(SPARSE, (1, 3)), *product(DENSE, (1,))])
def test_flops_of_every_family_are_those_torch_counts(name: str, top_k: int) -> None:
    check(name, chosen(name, r"self_attn|\.experts|\.mlp"), top_k, gates_on_shared_experts(name))


@pytest.mark.parametrize(
    "pattern",
    [
        "nothing",
        r"\.experts",
        "self_attn",
        "router",
        "shared",
        "q_proj|q_a_proj",
        "q_b_proj",
        "v_proj|kv_b_proj",
        "k_proj|kv_a_proj",
        "o_proj",
        r"\.experts.gate_proj",
        r"\.experts.down_proj",
        "shared_experts.up_proj",
        r"\.mlp",
        r"mlp.up_proj",
        r"mlp.down_proj",
        r"layers\.1",
        r"layers\.1\.experts",
        r"layers\.1\.router",
        "",
    ],
)
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "llama", "olmo2"])
def test_flops_of_any_part_are_those_torch_counts(name: str, pattern: str) -> None:
    check(name, chosen(name, pattern), two(name))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_flops_of_any_subset_are_those_torch_counts(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["deepseek_v3", "ernie4_5_moe", "olmoe", "qwen3"]))
    paths = sorted({key.removesuffix(".lora_A").removesuffix(".lora_B") for key in everything(name)})
    kept = tuple(data.draw(st.sets(st.sampled_from(paths))))
    part = {key: tensor for key, tensor in everything(name).items() if key.startswith(kept)} if kept else {}
    check(name, part, two(name))


def test_hand_count_of_one_token() -> None:
    """One token, K = 1, no adapter: per layer q 32x32, k and v 16x32, o 32x32, router 8x32, expert 3x32x16 weights.

    2 x (1024 + 512 + 512 + 1024 + 256 + 1536) = 9728 FLOPs, attention 4 x 1 pair x 32 = 128, so 2 x 9856 for both
    layers; the head 2 x 32 x 64 = 4096. In all 23808, and none backward.
    """
    one = Work.of_batch(1, 1, 1, 1)
    assert costs.forward_flops(tiny("olmoe").shape, one, {}) == 23808
    assert costs.backward_flops(tiny("olmoe").shape, one, {}) == 0


def test_hand_count_of_one_token_in_a_dense_model() -> None:
    """One token, LLaMA: per layer q 32x32, k and v 16x32, o 32x32, MLP 3x32x16 weights; attention as above.

    2 x (1024 + 512 + 512 + 1024 + 1536) = 9216 FLOPs and 128, so 2 x 9344 for both layers; the head 4096. In all 22784.
    """
    shape = tiny("llama").shape
    assert costs.forward_flops(shape, Work.of_batch(1, 1, 1, 1), {}) == 22784
    assert costs.upload_bytes(shape, everything("llama")) == costs.tensor_bytes(everything("llama"))


def test_padding_goes_to_no_expert() -> None:
    """Of 30 positions 12 are padding: at K = 2 that is 24 rows less for each of two layers' experts of 1536 weights."""
    shape, full = tiny("olmoe").shape, work(2)
    padded = Work(
        tokens=full.tokens,
        routed_tokens=full.tokens - 12,
        attended_pairs=full.attended_pairs,
        top_k=2,
        head_tokens=full.head_tokens,
    )
    assert costs.forward_flops(shape, full, {}) - costs.forward_flops(shape, padded, {}) == 2 * 24 * 2 * 1536


@pytest.mark.parametrize("pattern", [r"self_attn|\.experts", r"layers\.1\.experts", "nothing"])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"])
def test_flops_computed_again_under_gradient_checkpointing(name: str, pattern: str) -> None:
    model, tensors = tiny(name), chosen(name, pattern)
    again = counted(model, tensors, 2, checkpointing=True)[1] - counted(model, tensors, 2)[1]
    assert costs.recomputed_flops(model.shape, work(2), tensors) == again


@pytest.mark.parametrize(("name", "saved"), [("llama", 1), ("olmo2", 0)])
@pytest.mark.parametrize("pattern", ["self_attn", r"\.mlp"])
def test_flops_computed_again_in_a_dense_model(name: str, saved: int, pattern: str) -> None:
    """torch leaves out each layer's last product, unless a norm comes behind it: down_proj, or its B of rank 2."""
    model, tensors = tiny(name), chosen(name, pattern)
    again = counted(model, tensors, 1, checkpointing=True)[1] - counted(model, tensors, 1)[1]
    last = 2 * work(1).tokens * 32 * (2 if "mlp" in pattern else 16)
    assert costs.recomputed_flops(model.shape, work(1), tensors) == again + saved * 2 * last


def test_work_adds_up() -> None:
    one, ten = Work.of_batch(1, 2, 4, 1), Work.of_batch(10, 3, 4, 5)
    assert one + ten == Work(tokens=32, routed_tokens=32, attended_pairs=94, top_k=4, head_tokens=6)
    with pytest.raises(ValueError, match="cannot be added"):
        one + Work.of_batch(1, 2, 3, 1)


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
