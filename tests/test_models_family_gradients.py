"""For every sparse family: gradients of routed LoRA are those of a dense model whose experts are W + alpha / R B A.

The oracle is transformers' own model with its own eager experts, called with adapted weights in the family's layout,
so that autograd goes through the whole dense matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from builders import SPARSE_VARIANTS, tiny_family_lm, token_ids
from torch.func import functional_call

from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel

VARIANTS = [variant for variants in SPARSE_VARIANTS.values() for variant in variants]
RANK, ALPHA = 3, 5.0
CONFIG = lora.LoraConfig(rank=RANK, alpha=ALPHA, attention=False)
Tensors = dict[str, torch.Tensor]


def adapter(model: FoundationModel) -> Tensors:
    """Random LoRA on all experts, loud enough to matter."""
    generator = torch.Generator().manual_seed(2)
    fresh = lora.initial(model, CONFIG, generator)
    return {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}


def loss(lm: Any) -> torch.Tensor:
    ids = token_ids(2, 9)
    answer: torch.Tensor = lm(input_ids=ids, labels=ids, use_cache=False).loss
    return answer


def adapted_weights(lm: Any, model: FoundationModel, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Dense adapted weights by parameter name: (E, out, in), or (E, in, out) and gate and up alternating in GPT-OSS."""
    paths = {id(module): path for path, module in model.lm.named_modules()}
    own = dict(lm.named_parameters())
    result: Tensors = {}
    for block in model.blocks:
        path = paths[id(block.experts)]

        def change(matrix: str, layer: int = block.layer) -> torch.Tensor:
            stem = f"layers.{layer}.experts.{matrix}"
            return ALPHA / RANK * tensors[f"{stem}.lora_B"] @ tensors[f"{stem}.lora_A"]

        gate, up, down = change("gate_proj"), change("up_proj"), change("down_proj")
        if model.family.model_type == "gpt_oss":
            both = torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2)
            down = down.transpose(1, 2)
        else:
            both = torch.cat([gate, up], dim=1)
        result[f"{path}.gate_up_proj"] = own[f"{path}.gate_up_proj"].detach() + both
        result[f"{path}.down_proj"] = own[f"{path}.down_proj"].detach() + down
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_dense_adapted_experts(variant: str) -> None:
    model = FoundationModel(tiny_family_lm(variant))
    start = adapter(model)
    with lora.attached(model, start, ALPHA) as attached:
        ours = loss(model.lm)
        ours.backward()  # type: ignore[no-untyped-call]
        found = {name: value.grad for name, value in attached.parameters.items()}

    dense: Any = tiny_family_lm(variant).eval().requires_grad_(False)
    dense.set_experts_implementation("eager")
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    ids = token_ids(2, 9)
    weights = adapted_weights(dense, model, leaves)
    theirs = functional_call(dense, weights, kwargs={"input_ids": ids, "labels": ids, "use_cache": False}).loss
    theirs.backward()

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, leaf in leaves.items():
        gradient = found[name]
        assert gradient is not None, name
        assert leaf.grad is not None, name
        torch.testing.assert_close(gradient.to_dense(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert any(bool(leaf.grad.any()) for leaf in leaves.values() if leaf.grad is not None)
