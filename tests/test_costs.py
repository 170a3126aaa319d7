"""Counted FLOPs: against torch's FLOP counter on every family, and against hand counts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from builders import CLASSIFIER_VARIANTS, DENSE_VARIANTS, SPARSE_VARIANTS, tiny_family_lm, token_ids, whole_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from emberfed import costs
from emberfed.costs import Work
from emberfed.models import lora, sparse_adapter
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.head import initial_head

SPARSE, DENSE = (
    [name for names in variants.values() for name in names] for variants in (SPARSE_VARIANTS, DENSE_VARIANTS)
)
CLASSIFIERS = [name for names in CLASSIFIER_VARIANTS.values() for name in names]
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


ROWS, TOKENS = 3, 8
"""Examples, and positions of texts, of which the last example has three that are padding."""


def classified(model: FoundationModel) -> tuple[dict[str, torch.Tensor], int]:
    """What a classifier is called with, and positions of one example."""
    image = model.shape.image
    if image is not None:
        return {"pixel_values": torch.ones(ROWS, image.channels, image.height, image.width)}, image.positions
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[-1, 5:] = 0
    return {"input_ids": token_ids(ROWS, TOKENS), "attention_mask": mask}, TOKENS


def counted_pass(model: FoundationModel, attached: AbstractContextManager[object]) -> tuple[int, int]:
    """What torch counts of a classifier: forward, and backward."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with attached, counter:
        logits = model.lm(**classified(model)[0]).logits
        forward = counter.get_total_flops()
        if logits.requires_grad:
            logits.sum().backward()
        return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize(
    "pattern",
    [
        "nothing",
        "",
        "head",
        r"layers",
        r"layers\.1",
        r"layers\.1\.mlp",
        r"mlp",
        r"query|q_proj",
        r"value|v_proj",
        r"dense|fc2",
    ],
)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_flops_of_classifiers_are_those_torch_counts(name: str, pattern: str) -> None:
    model = tiny(name)
    tensors = {key: value for key, value in everything(name).items() if re.search(pattern, key)}
    if any(key.startswith("head") for key in tensors):
        tensors |= initial_head(model)  # all of it, or nothing
    found = counted_pass(model, lora.attached(model, tensors, 16.0))
    one = Work.of_batch(ROWS, classified(model)[1], 1, ROWS)
    assert (costs.forward_flops(model.shape, one, tensors), costs.backward_flops(model.shape, one, tensors)) == found


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_flops_of_a_sparse_adapter_are_those_torch_counts(
    name: str, layers: tuple[int, ...] | None, experts: int, top_k: int
) -> None:
    """Padding goes to no expert, but the gate sees it."""
    model = tiny(name)
    config = sparse_adapter.SparseAdapterConfig(num_experts=experts, expert_size=5, layers=layers)
    tensors = sparse_adapter.initial(model, config, torch.Generator().manual_seed(0))
    found = counted_pass(model, sparse_adapter.attached(model, tensors, top_k))
    inputs, length = classified(model)
    real = int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else ROWS * length
    one = replace(Work.of_batch(ROWS, length, 1, ROWS), adapter_rows=real * top_k)
    assert (costs.forward_flops(model.shape, one, tensors), costs.backward_flops(model.shape, one, tensors)) == found


def test_hand_count_of_one_image() -> None:
    """ViT: 4 patches of 48 values to 32 channels, 5 positions through two layers, the head 32 x 5 once.

    Patches 2 x 4 x 48 x 32 = 12288. A layer: 4 x 32 x 32 and 2 x 32 x 48 weights, 2 x 5 x 7168 = 71680, and attention
    4 x 25 pairs x 32 = 3200; both layers 149760. The head 2 x 160 = 320. In all 162368. With the head trained, its
    weight's gradient is as much again as its product, and nothing else.
    """
    shape, one = tiny("vit").shape, Work.of_batch(1, 5, 1, 1)
    assert costs.forward_flops(shape, one, {}) == 162368
    assert costs.backward_flops(shape, one, {}) == 0
    head = {key: value for key, value in everything("vit").items() if key.startswith("head")}
    assert (costs.forward_flops(shape, one, head), costs.backward_flops(shape, one, head)) == (162368, 320)


def test_hand_count_of_one_token_of_a_sparse_adapter() -> None:
    """LLaMA, one token, 4 experts of 5 in layer 1, K = 2: gate 2 x 4 x 32, experts 2 x 2 rows x 2 matrices x 160."""
    model = tiny("llama")
    config = sparse_adapter.SparseAdapterConfig(num_experts=4, expert_size=5, layers=(1,))
    tensors = sparse_adapter.initial(model, config, torch.Generator().manual_seed(0))
    plain, more = Work.of_batch(1, 1, 1, 1), Work.of_batch(1, 1, 1, 1, adapter_top_k=2)
    assert costs.forward_flops(model.shape, more, tensors) - costs.forward_flops(model.shape, plain, {}) == 256 + 1280


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
    assert (Work.of_batch(1, 2, 4, 1, 3) + Work.of_batch(2, 5, 4, 1, 1)).adapter_rows == 2 * 3 + 10
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
