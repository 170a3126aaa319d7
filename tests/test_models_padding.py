"""Padded positions go to no expert, and nobody can tell from the rest."""

from __future__ import annotations

import torch
from builders import tiny_model, token_ids

from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences of 9, 5 and 2 real tokens, padded to 9."""
    ids, mask = token_ids(3, 9), torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate((9, 5, 2)):
        mask[row, slice(length) if side == "right" else slice(9 - length, None)] = 1
    return ids * mask, mask


def routed_rows(model: FoundationModel, ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    """(token, slot) pairs that really go to an expert, layer by layer."""
    rows: list[int] = []
    hooks = [
        block.experts.register_forward_hook(lambda _, args, __: rows.append(int((args[1] < 8).sum())))
        for block in model.blocks
    ]
    with torch.no_grad():
        model.lm(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return rows


def test_only_real_tokens_reach_experts() -> None:
    model = tiny_model()
    for side in ("left", "right"):
        ids, mask = padded(side)
        with model.active_experts(3):
            assert routed_rows(model, ids, mask) == [16 * 3, 16 * 3]
    assert routed_rows(model, ids, None) == [27 * 2, 27 * 2]
    assert routed_rows(model, ids, torch.ones_like(ids)) == [27 * 2, 27 * 2]


def test_real_positions_are_computed_as_without_padding() -> None:
    model = tiny_model()
    for side in ("left", "right"):
        ids, mask = padded(side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            together = model.lm(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            for row in range(3):
                alone = model.lm(input_ids=ids[row][mask[row] == 1][None]).logits[0]
                torch.testing.assert_close(together[row][mask[row] == 1], alone, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_filters_the_prompt_only() -> None:
    model = tiny_model()
    ids, mask = padded("left")
    rows: list[int] = []
    hook = model.blocks[0].experts.register_forward_hook(lambda _, args, __: rows.append(int((args[1] < 8).sum())))
    model.lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    hook.remove()
    assert rows == [16 * 2, 3 * 2, 3 * 2]


def test_layers_run_again_for_checkpointing_see_the_padding_of_their_own_pass() -> None:
    """Two passes with different padding, then both backward: the second's padding must not be used for the first."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    start = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in lora.initial(model, lora.LoraConfig(rank=2), generator).items()
    }

    def gradients() -> dict[str, torch.Tensor]:
        with lora.attached(model, start, 4.0) as adapter:
            losses = []
            for side in ("left", "right"):
                ids, mask = padded(side)
                logits = model.lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
                losses.append(logits[mask == 1].square().mean())
            for loss in losses:
                loss.backward()
            return {name: value.grad.to_dense() for name, value in adapter.parameters.items() if value.grad is not None}

    plain = gradients()
    with model.gradient_checkpointing():
        again = gradients()
    assert set(again) == set(start)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_embeddings_in_place_of_ids_with_a_cache() -> None:
    model = tiny_model()
    ids, mask = token_ids(2, 6), torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    rows: list[int] = []
    hook = model.blocks[0].experts.register_forward_hook(lambda _, args, __: rows.append(int((args[1] < 8).sum())))
    embedded = model.lm.get_input_embeddings()(ids)
    with torch.no_grad():
        first = model.lm(inputs_embeds=embedded[:, :4], attention_mask=mask[:, :4], use_cache=True)
        model.lm(inputs_embeds=embedded[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    hook.remove()
    assert rows == [5 * 2, 4 * 2]
