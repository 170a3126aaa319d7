"""Counted FLOPs of training some experts of a compact model: against torch's FLOP counter, and by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import tiny_family_lm, token_ids
from test_costs import addmm_flops
from torch.utils.flop_counter import FlopCounterMode

from emberfed import costs
from emberfed.costs import Work
from emberfed.models import expert_tuning
from emberfed.models.compact import Cluster, ExpertWork, LayerPlan, compacted
from emberfed.models.expert_values import ExpertValues
from emberfed.models.foundation_model import FoundationModel

SEQUENCES, LENGTH, PADDING = 3, 10, 4
TUNED = (1, 4)
PLAN = LayerPlan(TUNED, (Cluster((0, 2, 3), (0.5, 0.25, 0.25)), Cluster((5,), (1.0,))), (6, 7))


def tiny(name: str) -> FoundationModel:
    """Eager attention: torch's counter does not see the fused one on CPUs."""
    return FoundationModel(tiny_family_lm(name, attn_implementation="eager"))


def work(top_k: int) -> Work:
    whole = Work.of_batch(SEQUENCES, LENGTH, top_k, SEQUENCES * LENGTH)
    return replace(whole, routed_tokens=SEQUENCES * LENGTH - PADDING)


def check(name: str, top_k: int, tensors: Mapping[str, torch.Tensor], rows: Any, reroute: bool) -> None:
    model = tiny(name)
    ids = token_ids(SEQUENCES, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, -PADDING:] = 0
    plan = (PLAN,) * model.num_layers
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    fewer = compacted(model, plan, ExpertValues(model, {}, {}, 1.0), reroute)
    with model.active_experts(top_k), fewer as compact, expert_tuning.attached(model, tensors, rows, 16.0), counter:
        logits = model.lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        forward = counter.get_total_flops()
        if logits.requires_grad:
            logits.sum().backward()
        backward = counter.get_total_flops() - forward
    done = replace(work(top_k), expert_work=compact.take())
    assert done.expert_work is not None
    assert all(layer.rows < done.routed_tokens * top_k for layer in done.expert_work) or reroute
    assert costs.forward_flops(model.shape, done, tensors) == forward
    assert costs.backward_flops(model.shape, done, tensors) == backward


@pytest.mark.parametrize("pattern", ["", r"layers\.1", "down_proj", "gate_proj|up_proj", "up_proj", "nothing"])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "mixtral"])
def test_flops_of_tuned_experts_are_those_torch_counts(name: str, tune: Any, pattern: str) -> None:
    model = tiny(name)
    every = {block.layer: TUNED for block in model.blocks}
    start = expert_tuning.initial(model, every, tune, 3, torch.Generator().manual_seed(0))
    tensors = {key: tensor for key, tensor in start.items() if re.search(pattern, key)}
    rows = {layer: TUNED for layer in every if any(key.startswith(f"layers.{layer}.") for key in tensors)}
    for top_k in (1, 3):
        check(name, top_k, tensors, rows, False)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v2", "glm4_moe", "phimoe"])
def test_flops_of_routers_that_choose_among_fewer(name: str) -> None:
    model = tiny(name)
    rows = {block.layer: TUNED for block in model.blocks}
    tensors = expert_tuning.initial(model, rows, "lora", 3, torch.Generator().manual_seed(0))
    check(name, 2, tensors, rows, True)


def test_hand_count_of_one_layer() -> None:
    """OLMoE, one token; layer 0 computes 3 rows of which 2 are tuned in full, layer 1 none.

    Forward, against no experts: 3 rows x 3 matrices x 2 x 512. Backward of layer 0, the lowest that is trained: 3 rows
    of down's input 2 x 512 each, nothing of the input of gate and up, and 2 rows x 3 weights; layer 1 has none.
    """
    shape = tiny("olmoe").shape
    one = Work.of_batch(1, 1, 3, 0)
    idle, busy = ExpertWork(0, 0, 8), ExpertWork(3, 2, 8)
    tensors = {f"layers.0.experts.{matrix}_proj.weight": torch.empty(2, 1) for matrix in ("gate", "up", "down")}
    without, done = replace(one, expert_work=(idle, idle)), replace(one, expert_work=(busy, idle))
    forward, backward = (
        flops(shape, done, tensors) - flops(shape, without, tensors)
        for flops in (costs.forward_flops, costs.backward_flops)
    )
    assert forward == 3 * 3 * 2 * 512
    assert backward == 3 * 2 * 512 + 2 * 3 * 2 * 512


def test_counted_work_adds_up() -> None:
    one = Work.of_batch(1, 2, 4, 1)
    first, second = replace(one, expert_work=(ExpertWork(3, 1, 8),)), replace(one, expert_work=(ExpertWork(4, 4, 8),))
    assert (first + second).expert_work == (ExpertWork(7, 5, 8),)
    with pytest.raises(ValueError, match="counted experts and of others"):
        one + first
