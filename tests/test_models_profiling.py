"""Profiles of experts: against loops over single examples and tokens, whatever the padding, the family and K."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SPARSE_VARIANTS, tiny_family_lm, tiny_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emberfed.costs import Work, forward_flops
from emberfed.errors import DataError, ModelError
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.profiling import Profile, error, profile

VARIANTS = [name for names in SPARSE_VARIANTS.values() for name in names]
every_variant = pytest.mark.parametrize("name", VARIANTS)
LENGTHS = (7, 12, 1, 9, 12)


def examples(lengths: Sequence[int] = LENGTHS) -> list[torch.Tensor]:
    return [token_ids(1, length, seed=number)[0] for number, length in enumerate(lengths)]


def batches(
    texts: Sequence[torch.Tensor], size: int, side: str = "right", more: int = 0
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Some texts at a time, padded to the longest of them and `more`."""
    for start in range(0, len(texts), size):
        together = texts[start : start + size]
        length = max(map(len, together)) + more
        ids = torch.zeros(len(together), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(together):
            place = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
            ids[row, place], mask[row, place] = text, 1
        yield ids, mask


def slowly(model: FoundationModel, texts: Sequence[torch.Tensor]) -> Profile:
    """Each text alone, without padding, with eager attention's own weights; all sums by token and slot."""
    layers, experts = model.num_layers, model.num_experts
    counts = torch.zeros(layers, experts, dtype=torch.int64)
    attention = torch.zeros(layers, experts, dtype=torch.float64)
    reached = torch.zeros(len(texts), layers, experts, dtype=torch.bool)
    before = model.lm.config._attn_implementation
    model.lm.set_attn_implementation("eager")
    for number, text in enumerate(texts):
        chosen: dict[int, torch.Tensor] = {}

        def keep(row: int, _: Any, __: Any, output: Any, chosen: dict[int, torch.Tensor] = chosen) -> None:
            chosen[row] = output[2]

        hooks = [block.router.register_forward_hook(partial(keep, row)) for row, block in enumerate(model.blocks)]
        with torch.no_grad():
            weights = model.lm(text[None], output_attentions=True, use_cache=False).attentions
        for hook in hooks:
            hook.remove()
        for row, block in enumerate(model.blocks):
            for token in range(len(text)):
                received = sum(float(weights[block.layer][0, :, q, token].mean()) for q in range(len(text))) / len(text)
                for expert in chosen[row][token].tolist():
                    counts[row, expert] += 1
                    attention[row, expert] += received
                    reached[number, row, expert] = True
    model.lm.set_attn_implementation(before)
    return Profile(
        tokens=sum(map(len, texts)),
        examples=len(texts),
        top_k=model.top_k,
        positions=sum(map(len, texts)),
        attended_pairs=sum(len(text) ** 2 for text in texts),
        counts_LE=counts,
        attention_LE=(attention / counts.clamp(min=1)).float(),
        reached_NLE=reached,
    )


def attention_of(found: Profile) -> torch.Tensor:
    assert found.attention_LE is not None
    return found.attention_LE


def assert_same(found: Profile, expected: Profile) -> None:
    assert (found.tokens, found.examples, found.top_k) == (expected.tokens, expected.examples, expected.top_k)
    assert torch.equal(found.counts_LE, expected.counts_LE)
    assert torch.equal(found.reached_NLE, expected.reached_NLE)
    torch.testing.assert_close(attention_of(found), attention_of(expected), atol=1e-5, rtol=1e-4)


@every_variant
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_family_is_profiled_as_in_loops(name: str, side: str) -> None:
    model = FoundationModel(tiny_family_lm(name))
    assert_same(profile(model, batches(examples(), 3, side)), slowly(model, examples()))


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "phimoe", "granitemoe"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_at_another_k(name: str, top_k: int) -> None:
    model = FoundationModel(tiny_family_lm(name))
    with model.active_experts(top_k):
        found = profile(model, batches(examples(), 2))
        assert_same(found, slowly(model, examples()))
    assert found.counts_LE.sum(dim=1).tolist() == [top_k * sum(LENGTHS)] * model.num_layers


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    size=st.integers(1, 5),
    side=st.sampled_from(["left", "right"]),
    more=st.integers(0, 3),
)
def test_how_examples_are_put_together_does_not_matter(lengths: list[int], size: int, side: str, more: int) -> None:
    model, texts = tiny_model(), examples(lengths)
    assert_same(profile(model, batches(texts, size, side, more)), profile(model, batches(texts, 1)))


def test_what_a_profile_says_goes_together() -> None:
    model = tiny_model()
    found = profile(model, batches(examples(), 2))
    torch.testing.assert_close(found.frequency_LE.sum(dim=1), torch.full((2,), 2.0, dtype=torch.float64))
    assert torch.equal(found.examples_LE > 0, found.counts_LE > 0)
    assert (found.examples_LE <= found.counts_LE).all()
    assert torch.equal(attention_of(found) > 0, found.counts_LE > 0)
    # Each sequence receives 1 in all, and each token does so in K slots.
    total = (attention_of(found) * found.counts_LE).sum(dim=1)
    torch.testing.assert_close(total, torch.full((2,), 2.0 * len(LENGTHS)))


def test_the_same_input_gives_the_same_bits() -> None:
    model = tiny_model()
    first, second = (profile(model, batches(examples(), 2)).to_tensors() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_attention_the_rest_is_the_same() -> None:
    model = tiny_model()
    found = profile(model, batches(examples(), 2), attention=False)
    assert found.attention_LE is None
    whole = profile(model, batches(examples(), 2))
    assert torch.equal(found.counts_LE, whole.counts_LE)
    assert torch.equal(found.reached_NLE, whole.reached_NLE)


def test_padding_is_paid_for_but_not_profiled() -> None:
    """Batches of 2, 2 and 1 texts, of 12, 9 and 12 positions: 24 + 18 + 12 positions, 288 + 162 + 144 pairs."""
    model = tiny_model()
    found = profile(model, batches(examples(), 2))
    assert (found.tokens, found.positions, found.attended_pairs) == (41, 54, 594)
    work = Work(
        tokens=found.positions,
        routed_tokens=found.tokens,
        attended_pairs=found.attended_pairs,
        top_k=found.top_k,
        head_tokens=0,
    )
    in_full = Work.of_batch(2, 12, 2, 0) + Work.of_batch(2, 9, 2, 0) + Work.of_batch(1, 12, 2, 0)
    per_row = 2 * 3 * 32 * 16  # three matrices of hidden 32 and 16, a multiply-add counts 2
    difference = forward_flops(model.shape, in_full, {}) - forward_flops(model.shape, work, {})
    assert difference == (54 - 41) * 2 * per_row * model.num_layers


def test_the_model_is_as_found_afterwards() -> None:
    model, ids = tiny_model(), token_ids(2, 8)
    with torch.no_grad():
        logits = model.lm(ids).logits
        profile(model, batches(examples(), 2))
        assert torch.equal(model.lm(ids).logits, logits)
    assert [len(block.router._forward_hooks) for block in model.blocks] == [0, 0]


@pytest.mark.parametrize("attention", [True, False])
def test_a_profile_goes_through_tensors(attention: bool, tmp_path: Path) -> None:
    found = profile(tiny_model(), batches(examples(), 2), attention)
    save_file(found.to_tensors(), tmp_path / "profile.safetensors")
    again = Profile.from_tensors(load_file(tmp_path / "profile.safetensors"))
    for name in ("tokens", "examples", "top_k", "positions", "attended_pairs"):
        assert getattr(again, name) == getattr(found, name)
    assert torch.equal(again.counts_LE, found.counts_LE)
    assert torch.equal(again.reached_NLE, found.reached_NLE)
    assert (again.attention_LE is None) == (found.attention_LE is None)
    if attention:
        assert torch.equal(attention_of(again), attention_of(found))


def test_tensors_of_something_else_are_refused() -> None:
    with pytest.raises(ModelError, match=r"lacks \['tokens'.*'reached'\]"):
        Profile.from_tensors({"counts": torch.zeros(1, 2)})


def test_dense_models_and_no_data_are_refused() -> None:
    with pytest.raises(ModelError, match="llama models are dense"):
        profile(FoundationModel(tiny_family_lm("llama")), batches(examples(), 2))
    with pytest.raises(DataError, match="no token"):
        profile(tiny_model(), [])


def made(counts: list[list[int]], attention: list[list[float]] | None, tokens: int) -> Profile:
    """A profile of one example with these sums."""
    counts_LE = torch.tensor(counts)
    return Profile(
        tokens=tokens,
        examples=1,
        top_k=1,
        positions=tokens,
        attended_pairs=tokens**2,
        counts_LE=counts_LE,
        attention_LE=None if attention is None else torch.tensor(attention),
        reached_NLE=counts_LE[None] > 0,
    )


def test_errors_by_hand() -> None:
    """10 tokens, one layer: frequencies .5 .3 .2 against .4 .2 .4 differ by .1, .1 and .2.

    Their mean is 4/30, their sum over 1 is .4, total variation half of it. The two most used are 0, 1 against 0, 2.
    Attention .1 .2 .3 against .1 .1 .3 differs by .1 in all, over .5.
    """
    found = made([[5, 3, 2]], [[0.1, 0.2, 0.3]], tokens=10)
    reference = made([[4, 2, 4]], [[0.1, 0.1, 0.3]], tokens=10)
    told = error(found, reference, top=2)
    assert told.frequency_absolute == pytest.approx(4 / 30)
    assert told.frequency_relative == pytest.approx(0.4)
    assert told.attention_absolute == pytest.approx(0.1 / 3)
    assert told.attention_relative == pytest.approx(0.2)
    assert told.overlap == 0.5
    torch.testing.assert_close(told.variation_L, torch.tensor([0.2], dtype=torch.float64))


def test_a_profile_is_no_error_from_itself() -> None:
    found = profile(tiny_model(), batches(examples(), 2))
    told = error(found, found, top=3)
    assert (told.frequency_relative, told.attention_relative, told.overlap) == (0, 0, 1)
    assert told.variation_L.tolist() == [0, 0]


def test_errors_without_attention_say_nothing_of_it() -> None:
    told = error(made([[1, 1]], None, 2), made([[2, 0]], [[0.1, 0.0]], 2), top=1)
    assert (told.attention_absolute, told.attention_relative) == (None, None)
    assert told.frequency_relative == 1


@pytest.mark.parametrize("top", [0, 4])
def test_profiles_that_cannot_be_compared_are_refused(top: int) -> None:
    one = made([[5, 3, 2]], None, tokens=10)
    with pytest.raises(ModelError, match=rf"over {top} experts.*1 to 3"):
        error(one, one, top)
    with pytest.raises(ModelError, match=r"\(1, 2\) and \(1, 3\)"):
        error(made([[5, 5]], None, tokens=10), one, 1)
