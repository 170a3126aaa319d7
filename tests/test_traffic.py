"""Bytes that training moves: against a slow count of what each pass reads, and by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from builders import tiny_family_lm, tiny_model, token_ids
from torch import Tensor, nn

from emberfed import traffic
from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel
from emberfed.seeds import Seeds


def read_slowly(model: FoundationModel, ids: Tensor, mask: Tensor | None) -> tuple[int, list[int]]:
    """Bytes beside the experts, and by layer those of experts that real tokens went to, by the router's own choice."""
    experts_bytes = []
    hooks = []

    def look(block: Any, _: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
        index_TK = output[2]
        real = index_TK if mask is None else index_TK[mask.reshape(-1).bool()]
        one = sum(tensor[0].nbytes for tensor in block.experts.parameters(recurse=False))
        experts_bytes.append(one * len(set(real.flatten().tolist())))

    for block in model.blocks:
        hooks.append(block.router.register_forward_hook(lambda m, a, o, block=block: look(block, m, a, o)))
    with torch.no_grad():
        model.lm(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    beside = 0
    for layer in model.layers:
        beside += sum(p.nbytes for name, p in layer.named_parameters() if "experts" not in name)
    return beside, experts_bytes


def head_bytes(model: FoundationModel) -> int:
    return sum(parameter.nbytes for parameter in model.lm.get_output_embeddings().parameters())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_pass_reads_what_its_tokens_need(top_k: int, padded: bool) -> None:
    """Two texts of 3: so few tokens leave experts out. Trained in layer 0: all is read twice, or three times."""
    model, ids = tiny_model(), token_ids(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]) if padded else None
    trained = {"layers.0.self_attn.q_proj.lora_A": torch.zeros(1)}
    with model.active_experts(top_k):
        beside, experts = read_slowly(model, ids, mask)
        with traffic.counting_reads(model) as reads, torch.no_grad():
            model.lm(ids, attention_mask=mask)
    whole = sum(tensor.nbytes for block in model.blocks for tensor in block.experts.parameters())
    assert sum(experts) < whole
    assert reads.frozen_bytes(trained, recomputed=False) == 2 * (beside + sum(experts)) + 2 * head_bytes(model)
    assert reads.frozen_bytes(trained, recomputed=True) == 3 * (beside + sum(experts)) + 2 * head_bytes(model)


def test_layers_below_the_lowest_trained_one_are_read_once() -> None:
    model, ids = tiny_model(), token_ids(2, 3)
    _, experts = read_slowly(model, ids, None)
    with traffic.counting_reads(model) as reads, torch.no_grad():
        model.lm(ids)
    layers = [sum(p.nbytes for name, p in layer.named_parameters() if "experts" not in name) for layer in model.layers]
    found = reads.frozen_bytes({"layers.1.experts.up_proj.lora_A": torch.zeros(1)}, recomputed=True)
    assert found == layers[0] + experts[0] + 3 * (layers[1] + experts[1]) + 2 * head_bytes(model)
    only_head = reads.frozen_bytes({"head.weight": torch.zeros(1)}, recomputed=False)
    assert only_head == sum(layers) + sum(experts) + 2 * head_bytes(model)


def test_passes_add_up_and_the_adapter_is_not_frozen() -> None:
    model, ids = tiny_model(), token_ids(2, 5)
    tensors = lora.initial(model, lora.LoraConfig(rank=2, alpha=4), Seeds(0).torch("adapter"))
    counts: list[int] = []
    for passes in (1, 2):
        with lora.attached(model, tensors, 4.0) as adapter, traffic.counting_reads(model) as reads:
            for _ in range(passes):
                model.lm(ids)
            counts.append(reads.frozen_bytes(adapter.parameters, recomputed=False))
    with traffic.counting_reads(model) as reads, torch.no_grad():
        model.lm(ids)
    assert counts == [reads.frozen_bytes(tensors, recomputed=False) * passes for passes in (1, 2)]


def test_checkpointing_does_not_count_a_pass_twice() -> None:
    model, ids = tiny_model(), token_ids(2, 3)
    tensors = lora.initial(model, lora.LoraConfig(rank=2, alpha=4), Seeds(0).torch("adapter"))
    found = []
    for checkpointing in (False, True):
        with lora.attached(model, tensors, 4.0) as adapter, traffic.counting_reads(model) as reads:
            if checkpointing:
                with model.gradient_checkpointing():
                    model.lm(ids, use_cache=False).logits.sum().backward()
            else:
                model.lm(ids, use_cache=False).logits.sum().backward()
            found.append(reads.frozen_bytes(adapter.parameters, recomputed=False))
    assert found[0] == found[1]


def test_quantised_experts_count_their_codes(tmp_path: Any) -> None:
    """A weight of 4 bits in groups of 16 takes 0.5 bytes and a 16th of 4 bytes: 0.75 bytes, against 4 in float32."""
    from emberfed.models.quantised import QuantisedWeight

    plain, quantised, ids = tiny_model(), tiny_model(), token_ids(2, 3)
    for block in quantised.blocks:
        for name in ("gate_up_proj", "down_proj"):
            weight: nn.Parameter = getattr(block.experts, name)
            delattr(block.experts, name)
            setattr(block.experts, name, QuantisedWeight.quantise(weight, 4, 16))
    trained: Mapping[str, Tensor] = {"layers.0.self_attn.q_proj.lora_A": torch.zeros(1)}
    with traffic.counting_reads(quantised) as reads, torch.no_grad():
        quantised.lm(ids)
    moved = reads.frozen_bytes(trained, recomputed=False)
    beside = 2 * sum(
        p.nbytes for layer in plain.layers for name, p in layer.named_parameters() if "experts" not in name
    ) + 2 * head_bytes(plain)
    slots = sum(reads._read_L.tolist())
    weights_each = 32 * 32 + 16 * 32  # gate and up of 16 each, and down, at a hidden size of 32
    assert moved == beside + 2 * slots * int(weights_each * 0.75)


def test_a_dense_classifier_reads_all_of_its_layers() -> None:
    model = FoundationModel(tiny_family_lm("vit"))
    image = model.shape.image
    assert image is not None
    with traffic.counting_reads(model) as reads, torch.no_grad():
        model.lm(pixel_values=torch.zeros(2, image.channels, image.height, image.width))
    layers = sum(p.nbytes for layer in model.layers for p in layer.parameters())
    assert model.head is not None
    head = sum(p.nbytes for p in model.head.parameters())
    assert reads.frozen_bytes({"head.weight": torch.zeros(1)}, recomputed=False) == layers + 2 * head


def test_trained_weights_by_hand() -> None:
    """100 elements, two passes: read forward and backward 2 x 2; a gradient 2; Adam 3 read, 3 written: 12 x 4."""
    assert traffic.trained_bytes(100, 2) == 100 * 4 * 12
