"""Attention that tells what each position receives: against eager attention, in loops, and in small pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from builders import SPARSE_VARIANTS, tiny_family_lm, tiny_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import nn

from emberfed.errors import ModelError
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.received_attention import attend, receiving

VARIANTS = [name for names in SPARSE_VARIANTS.values() for name in names]
every_variant = pytest.mark.parametrize("name", VARIANTS)
ELSEWHERE = torch.finfo(torch.float32).min


def slowly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    sinks: list[float] | None,
    real: list[list[bool]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over the keys that are real, number by number, and what each position receives."""
    batch, heads, length, _ = query.shape
    per_group = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, value.shape[3])
    received = torch.zeros(batch, length)
    for b in range(batch):
        for h in range(heads):
            for q in (q for q in range(length) if real[b][q]):
                seen = [t for t in range(q + 1) if real[b][t]]
                scores = [math.exp(float(query[b, h, q] @ key[b, h // per_group, t]) * scaling) for t in seen]
                total = sum(scores) + (0 if sinks is None else math.exp(sinks[h]))
                for t, score in zip(seen, scores, strict=True):
                    out[b, q, h] += score / total * value[b, h // per_group, t]
                    received[b, t] += score / total / heads / sum(real[b])
    return out, received


def causal(real: torch.Tensor) -> torch.Tensor:
    """What is added to scores so that queries see real keys up to themselves, (B, 1, S, S)."""
    length = real.shape[1]
    seen = torch.ones(length, length).tril().bool() & real[:, None, None, :]
    return torch.zeros(seen.shape).masked_fill(~seen, ELSEWHERE)


def padded(length: int = 12) -> torch.Tensor:
    """A sequence without padding, one padded left, and one padded right: (3, S)."""
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, 9:] = 0
    return mask


def test_uniform_attention_by_hand() -> None:
    """Queries of zero attend evenly to what is before them: rows 1 / .5 .5 / .33 .33 .33 of three tokens.

    The first receives (1 + 1/2 + 1/3) / 3 = 11/18, the second (1/2 + 1/3) / 3 = 5/18, the third 1/9.
    """
    zeros, real = torch.zeros(1, 2, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    _, received = attend(zeros, zeros, zeros, causal(real), 1.0, None, real, 100)
    torch.testing.assert_close(received, torch.tensor([[11 / 18, 5 / 18, 1 / 9]]))


@settings(deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    per_group=st.sampled_from([1, 2]),
    length=st.integers(1, 7),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    has_sinks=st.booleans(),
    chunk_elements=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_attend_is_the_sum_in_loops(
    groups: int, per_group: int, length: int, left: int, right: int, has_sinks: bool, chunk_elements: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = left + length + right
    query = torch.randn(2, groups * per_group, positions, 4, generator=generator)
    key = torch.randn(2, groups, positions, 4, generator=generator)
    value = torch.randn(2, groups, positions, 3, generator=generator)
    sinks = torch.randn(groups * per_group, generator=generator) if has_sinks else None
    real = torch.zeros(2, positions, dtype=torch.bool)
    real[0, left : left + length] = True
    real[1, right:] = True
    out, received = attend(query, key, value, causal(real), 0.7, sinks, real, chunk_elements)
    expected_out, expected = slowly(query, key, value, 0.7, None if sinks is None else sinks.tolist(), real.tolist())
    torch.testing.assert_close(received[real], expected[real], atol=1e-6, rtol=1e-5)
    assert torch.equal(received[~real], torch.zeros(int((~real).sum())))
    torch.testing.assert_close(out[real], expected_out[real], atol=1e-6, rtol=1e-5)
    if sinks is None:
        torch.testing.assert_close(received.sum(dim=1), torch.ones(2))
    else:
        assert (received.sum(dim=1) < 1).all()


def test_a_sequence_of_padding_alone_receives_nothing() -> None:
    states, real = torch.ones(2, 1, 3, 4), torch.tensor([[False] * 3, [True] * 3])
    _, received = attend(states, states, states, causal(real), 1.0, None, real, 100)
    assert received[0].tolist() == [0, 0, 0]
    assert float(received[1].sum()) == pytest.approx(1)


def test_no_tensor_is_larger_than_a_chunk() -> None:
    batch, heads, length, queries = 2, 4, 64, 5
    states = torch.randn(batch, heads, length, 2, generator=torch.Generator().manual_seed(0))
    real = torch.ones(batch, length, dtype=torch.bool)
    mask = causal(real)
    chunk = batch * heads * queries * length
    with LargestTensor() as largest:
        attend(states, states, states, mask, 1.0, torch.zeros(heads), real, chunk)
    assert largest.elements == chunk
    assert chunk < batch * heads * length * length


def test_a_model_never_holds_all_weights_of_a_layer() -> None:
    model, ids = tiny_model(max_position_embeddings=600), token_ids(2, 600)
    with torch.no_grad(), receiving(model), LargestTensor() as largest:
        model.lm.base_model(input_ids=ids, use_cache=False)
    whole = 2 * 4 * 600 * 600
    assert largest.elements <= 2**20 < whole


@every_variant
def test_every_family_computes_and_receives_as_with_eager_attention(name: str) -> None:
    """Grouped keys, latent heads, sliding windows, sinks, scalings: whatever the family's attention has."""
    lm, mask, ids = tiny_family_lm(name), padded(), token_ids(3, 12)
    model = FoundationModel(lm)
    with torch.no_grad(), receiving(model) as received:
        ours = lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        found = [received.of(layer) for layer in range(len(model.layers))]
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        eager = lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True)
    real = mask.bool()
    torch.testing.assert_close(ours[real], eager.last_hidden_state[real], atol=2e-5, rtol=1e-5)
    for received_BS, weights_BHSS in zip(found, eager.attentions, strict=True):
        expected = torch.zeros(received_BS.shape)
        for b in range(len(real)):
            for q in range(real.shape[1]):
                if real[b, q]:
                    expected[b] += weights_BHSS[b, :, q].mean(dim=0) / real[b].sum()
        torch.testing.assert_close(received_BS[real], expected[real], atol=1e-5, rtol=1e-4)
        assert not received_BS[~real].any()


@every_variant
def test_one_layer_of_attention_is_eager_s_within_a_millionth(name: str) -> None:
    lm, ids, mask = tiny_family_lm(name), token_ids(3, 12), padded()
    model, kept = FoundationModel(lm), []
    first = getattr(model.layers[0], model.family.attention)
    hook = first.register_forward_hook(lambda _, __, output: kept.append(output[0]))
    with torch.no_grad():
        with receiving(model):
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        lm.set_attn_implementation("eager")
        lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    hook.remove()
    ours, eager = kept
    torch.testing.assert_close(ours[mask.bool()], eager[mask.bool()], atol=1e-6, rtol=0)


def test_in_16_bits_it_is_near_eager_attention() -> None:
    model, ids = FoundationModel(tiny_family_lm("qwen3_moe").to(torch.bfloat16)), token_ids(2, 12)
    with torch.no_grad():
        with receiving(model) as received:
            ours = model.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
            assert received.of(0).dtype == torch.float32
        model.lm.set_attn_implementation("eager")
        eager = model.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert ours.dtype == torch.bfloat16
    assert float((ours - eager).abs().mean()) < 0.02 * float(eager.abs().mean())


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_the_model_is_as_found_afterwards(before: str) -> None:
    model, ids = tiny_model(), token_ids(2, 8)
    model.lm.set_attn_implementation(before)
    modules = {path: dict(vars(module)) for path, module in model.lm.named_modules()}
    hooks = len(model.lm.base_model._forward_pre_hooks)
    with torch.no_grad():
        logits = model.lm(ids).logits
        with pytest.raises(RuntimeError, match="stop"), receiving(model):
            raise RuntimeError("stop")
        with receiving(model):
            model.lm.base_model(input_ids=ids, use_cache=False)
        assert torch.equal(model.lm(ids).logits, logits)
    assert model.lm.config._attn_implementation == before
    assert len(model.lm.base_model._forward_pre_hooks) == hooks
    assert {path: vars(module).keys() for path, module in model.lm.named_modules()} == {
        path: held.keys() for path, held in modules.items()
    }


class Averaging(nn.Module):
    """An attention of its own kind, which asks no registry and has no weights to show."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.mean(dim=1, keepdim=True).expand_as(hidden_states), None


@contextmanager
def one_layer_of_its_own_kind() -> Iterator[FoundationModel]:
    model = tiny_model()
    model.layers[1].self_attn = Averaging()
    yield model


def test_an_attention_outside_the_registry_is_refused_in_one_line() -> None:
    with one_layer_of_its_own_kind() as model, torch.no_grad(), receiving(model) as received:
        model.lm.base_model(input_ids=token_ids(1, 4), use_cache=False)
        assert received.of(0).shape == (1, 4)
        with pytest.raises(ModelError, match=r"no attention weights.*olmoe.*layer 1.*merge_weights=frequency") as told:
            received.of(1)
    assert "\n" not in str(told.value)


def test_keys_of_an_earlier_pass_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad(), receiving(model):
        cache = model.lm.base_model(input_ids=token_ids(1, 4), use_cache=True).past_key_values
        with pytest.raises(ModelError, match="1 positions with 5 keys; call the model with use_cache=False"):
            model.lm.base_model(input_ids=token_ids(1, 1), past_key_values=cache)


def test_a_mask_that_does_not_tell_padding_is_refused() -> None:
    with torch.no_grad(), receiving(model := tiny_model()), pytest.raises(ModelError, match="2-D attention mask"):
        model.lm.base_model(input_ids=token_ids(1, 4), attention_mask=torch.zeros(1, 1, 4, 4), use_cache=False)
