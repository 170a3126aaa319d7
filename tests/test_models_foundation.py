"""`FoundationModel`: how many experts are active, and counting what they get."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import tiny_lm, tiny_model, token_ids
from torch import nn

from emberfed.errors import ConfigError, ModelError
from emberfed.models.config import ModelConfig
from emberfed.models.families import families, family_of, load_family
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.gating import Rescale
from emberfed.models.loading import load


def logits(model: FoundationModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.lm(input_ids=ids, **inputs).logits
    return result


def routing(model: FoundationModel, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """(logits, weights, index) of each layer, as the experts get them."""
    seen: list[tuple[torch.Tensor, ...]] = []
    hooks = [
        block.router.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in model.blocks
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


def traces(model: FoundationModel) -> tuple[Any, ...]:
    """Everything `active_experts` may touch."""
    routers = [block.router for block in model.blocks]
    return (
        [router.top_k for router in routers],
        [len(router._forward_hooks) for router in routers],
        model.lm.num_experts_per_tok,
        model.lm.config.num_experts_per_tok,
        model.top_k,
    )


def test_facts_of_the_model() -> None:
    model = tiny_model()
    assert (model.num_layers, model.num_experts, model.native_top_k, model.top_k) == (2, 8, 2, 2)
    assert [block.layer for block in model.blocks] == [0, 1]
    assert {block.native_gate for block in model.blocks} == {"plain"}
    shape = model.shape
    assert (shape.hidden, shape.expert_intermediate, shape.heads, shape.head_dim, shape.vocabulary) == (
        32,
        16,
        4,
        8,
        64,
    )
    assert shape.attention["k_proj"] == (32, 32)
    assert shape.parameters == sum(parameter.numel() for parameter in model.lm.parameters())
    assert not model.lm.training
    assert not any(parameter.requires_grad for parameter in model.lm.parameters())


@pytest.mark.parametrize("normalised", [False, True])
def test_native_top_k_keeps_every_bit(normalised: bool) -> None:
    model = tiny_model(norm_topk_prob=normalised)
    ids = token_ids(3, 12)
    expected = logits(model, ids)
    with model.active_experts(2):
        assert torch.equal(logits(model, ids), expected)
    if normalised:  # the checkpoint renormalises already
        with model.active_experts(2, "renormalised"):
            assert torch.equal(logits(model, ids), expected)
    else:
        rescales: tuple[Rescale, ...] = ("static", "mass")
        for rescale in rescales:
            with model.active_experts(2, rescale=rescale):
                assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_renormalised_mass_is_one_at_every_k(top_k: int) -> None:
    model = tiny_model()
    with model.active_experts(top_k, "renormalised"):
        for _, weights, index in routing(model, token_ids(2, 6)):
            assert index.shape == (12, top_k)
            torch.testing.assert_close(weights.sum(-1), torch.ones(12))


@pytest.mark.parametrize("rescale", ["none", "static", "mass"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_experts_get_the_probabilities_times_the_rescaling(top_k: int, rescale: Rescale) -> None:
    model = tiny_model()
    with model.active_experts(top_k, rescale=rescale):
        for router_logits, weights, index in routing(model, token_ids(2, 6)):
            probabilities = torch.softmax(router_logits, dim=-1)
            kept, experts = probabilities.topk(top_k)
            native = probabilities.topk(2).values.sum(-1, keepdim=True)
            mass = native / kept.sum(-1, keepdim=True)
            factor = {"none": torch.tensor(1.0), "static": torch.tensor(2 / top_k), "mass": mass}[rescale]
            torch.testing.assert_close(weights, kept * factor)
            assert torch.equal(index, experts)


def test_smaller_k_is_what_a_checkpoint_of_that_k_computes() -> None:
    model, small = tiny_model(), tiny_model(num_experts_per_tok=1)
    ids = token_ids(2, 10)
    with model.active_experts(1):
        assert torch.equal(logits(model, ids), logits(small, ids))
    normalised = tiny_model(num_experts_per_tok=4, norm_topk_prob=True)
    with model.active_experts(4, "renormalised"):
        torch.testing.assert_close(logits(model, ids), logits(normalised, ids))


def test_the_auxiliary_loss_uses_the_active_k() -> None:
    model, small = tiny_model(), tiny_model(num_experts_per_tok=1)
    ids = token_ids(2, 10)
    with torch.no_grad(), model.active_experts(1):
        found = model.lm(input_ids=ids, output_router_logits=True).aux_loss
    with torch.no_grad():
        expected = small.lm(input_ids=ids, output_router_logits=True).aux_loss
    assert torch.equal(found, expected)


def test_contexts_nest_and_restore_also_after_exceptions() -> None:
    model = tiny_model()
    ids = token_ids(1, 8)
    outside = traces(model)
    with model.active_experts(4, "renormalised"):
        outer, expected = traces(model), logits(model, ids)
        with model.active_experts(1):
            assert model.top_k == 1
            assert traces(model)[1] == [0, 0]  # a native gate inside a renormalised one is native
        assert traces(model) == outer
        with pytest.raises(RuntimeError, match="inside"), model.active_experts(3, rescale="mass"):
            raise RuntimeError("inside")
        assert traces(model) == outer
        assert torch.equal(logits(model, ids), expected)
    assert traces(model) == outside


@pytest.mark.parametrize("top_k", [0, -1, 9])
def test_impossible_top_k(top_k: int) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=f"top_k {top_k} .* 8 experts .* 1 to 8"), model.active_experts(top_k):
        pass


def test_rescaling_does_not_go_with_renormalising() -> None:
    with pytest.raises(ConfigError, match="rescale 'mass'"), tiny_model().active_experts(1, "renormalised", "mass"):
        pass
    normalised = tiny_model(norm_topk_prob=True)
    with pytest.raises(ConfigError, match="rescale 'static'"), normalised.active_experts(1, rescale="static"):
        pass


def counted(model: FoundationModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The slow count: one (token, slot) after the other."""
    counts = torch.zeros(model.num_layers, model.num_experts, dtype=torch.int64)
    seen: list[tuple[torch.Tensor, ...]] = []
    hooks = [
        block.router.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in model.blocks
    ]
    logits(model, ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    for layer, (_, _, index) in enumerate(seen):
        for token, real in enumerate(mask.flatten().tolist()):
            for expert in index[token].tolist():
                counts[layer, expert] += real
    return counts


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_counts_sum_to_tokens_times_k(top_k: int) -> None:
    model = tiny_model()
    with model.active_experts(top_k), model.count_activations() as counter:
        logits(model, token_ids(3, 7))
    assert counter.counts.dtype == torch.int64
    assert counter.counts.sum(1).tolist() == [21 * top_k] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side: str) -> None:
    model = tiny_model()
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8])
    mask = mask.flip(1) if side == "left" else mask
    ids = token_ids(3, 9) * mask
    with model.count_activations() as counter:
        logits(model, ids, attention_mask=mask)
    assert torch.equal(counter.counts, counted(model, ids, mask))
    assert counter.counts.sum(1).tolist() == [30, 30]


def test_padding_is_not_counted_during_generation_with_a_cache() -> None:
    model = tiny_model()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with model.count_activations() as counter:
        output = model.lm.generate(
            input_ids=token_ids(2, 4) * mask,
            attention_mask=mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            use_cache=True,
        )
    assert output.shape == (2, 9)
    # The prompt's 6 real tokens, then 4 steps of 2; the last token generated is not fed back.
    assert counter.counts.sum(1).tolist() == [(6 + 8) * 2] * 2


def test_gradient_checkpointing_counts_once_and_changes_no_gradient() -> None:
    model = tiny_model()
    ids = token_ids(2, 6)
    weight = model.blocks[0].router.get_parameter("weight").requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        with model.count_activations() as counter:
            loss = model.lm(input_ids=ids, labels=ids, use_cache=False).loss
            (gradient,) = torch.autograd.grad(loss, weight)
        return counter.counts, gradient

    plain_counts, plain_gradient = step()
    passes = []
    hook = model.blocks[0].router.register_forward_hook(lambda module, inputs, output: passes.append(1))
    with model.gradient_checkpointing():
        counts, gradient = step()
    assert len(passes) == 2, "the layer was to run again in backward"
    assert torch.equal(counts, plain_counts)
    assert torch.equal(gradient, plain_gradient)
    passes.clear()
    step()
    assert len(passes) == 1, "checkpointing was to end with its context"
    hook.remove()


def test_take_gives_what_is_new_and_keeps_the_total() -> None:
    model = tiny_model()
    with model.count_activations() as counter:
        logits(model, token_ids(1, 5, seed=1))
        first = counter.take()
        assert not counter.take().any()
        logits(model, token_ids(1, 5, seed=2))
        logits(model, token_ids(1, 5, seed=3))
        second = counter.take()
    assert first.sum(1).tolist() == [10, 10]
    assert second.sum(1).tolist() == [20, 20]
    assert torch.equal(counter.counts, first + second)
    assert all(not block.router._forward_hooks for block in model.blocks)


def test_counters_are_independent_and_stop_with_their_context() -> None:
    model = tiny_model()
    with model.count_activations() as outer:
        with model.count_activations() as inner:
            logits(model, token_ids(1, 4))
        logits(model, token_ids(1, 4))
    logits(model, token_ids(1, 4))
    assert inner.counts.sum().item() == 4 * 2 * 2
    assert outer.counts.sum().item() == 2 * 4 * 2 * 2


def test_a_mask_with_four_dimensions_cannot_be_counted() -> None:
    model = tiny_model()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with model.count_activations(), pytest.raises(ModelError, match="2-D attention mask"):
        logits(model, token_ids(1, 4), attention_mask=mask)


@pytest.mark.parametrize("name", families())
def test_every_family_record_is_complete(name: str) -> None:
    family = load_family(name)
    assert family.model_type == name
    assert family.attention_linears


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'newmoe' has no record.*\(num_experts=8\).*olmoe.*families/newmoe\.py"):
        family_of(SimpleNamespace(model_type="newmoe", num_experts=8))
    with pytest.raises(ModelError, match="did you mean 'olmoe'"):
        load_family("olmo_e")


def test_a_model_without_any_block_is_refused() -> None:
    lm = tiny_lm()
    for layer in lm.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ModelError, match="no layer"):
        FoundationModel(lm)


def test_real_model_loses_quality_as_k_falls(shared: Path) -> None:
    model, tokenizer = load(ModelConfig(path=str(shared / "models" / "olmoe-en-16m")))
    text = "The sun rises in the east and sets in the west. Water boils when it is heated."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    losses = []
    for top_k in (8, 2, 1):
        with torch.no_grad(), model.active_experts(top_k), model.count_activations() as counter:
            losses.append(model.lm(input_ids=ids, labels=ids).loss.item())
        assert counter.counts.sum(1).tolist() == [ids.numel() * top_k] * 4
    assert losses == sorted(losses)
    assert losses[2] > losses[0] + 0.2


def test_rescaling_by_mass_leaves_the_router_at_the_active_k() -> None:
    """It asks the router for its native K in between; the next pass must not notice."""
    model = tiny_model()
    router = model.blocks[0].router
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), model.active_experts(1, rescale="mass"):
        first, second = router(hidden), router(hidden)
    assert second[2].shape == (9, 1)
    assert torch.equal(first[1], second[1])
