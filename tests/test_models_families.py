"""Every family on disk, as transformers builds and saves it: routing at any K, counts, sizes, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from builders import (
    CLASSIFIER_VARIANTS,
    DENSE_VARIANTS,
    FAMILY_VARIANTS,
    SPARSE_VARIANTS,
    save_tiny_family,
    tiny_family_lm,
    token_ids,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from emberfed.errors import ConfigError, ModelError
from emberfed.models.config import ModelConfig
from emberfed.models.families import Mixture, families, family_of, load_family
from emberfed.models.foundation_model import FoundationModel, ModelShape, SparseBlock
from emberfed.models.gating import Rescale
from emberfed.models.loading import load
from emberfed.models.quantised import quantise_experts

SPARSE = [variant for variants in SPARSE_VARIANTS.values() for variant in variants]
DENSE = [variant for variants in DENSE_VARIANTS.values() for variant in variants]
DENSE_LAYERS = {
    "qwen2_moe-dense_layer": (1,),
    "qwen3_moe-every_second": (0,),
    "deepseek_v2-grouped": (0,),
    "deepseek_v3": (0,),
    "deepseek_v3-plain": (0,),
    "ernie4_5_moe": (0,),
    "ernie4_5_moe-unshared": (0,),
    "glm4_moe": (0,),
    "glm4_moe-plain": (0,),
}
SHARED_INTERMEDIATE = {
    "qwen2_moe": 20,
    "qwen2_moe-dense_layer": 20,
    "deepseek_v2": 32,
    "deepseek_v2-grouped": 32,
    "deepseek_v3": 16,
    "deepseek_v3-plain": 16,
    "ernie4_5_moe": 32,
    "glm4_moe": 16,
    "glm4_moe-plain": 16,
}
PLAIN = [
    "olmoe",
    "flex_olmo",
    "flex_olmo-three",
    "qwen2_moe",
    "qwen3_moe-every_second",
    "deepseek_v2",
    "deepseek_v2-grouped",
    "deepseek_v3-plain",
    "phimoe",
    "glm4_moe-plain",
]
SCALE = {"deepseek_v2-grouped": 1.5, "deepseek_v3": 2.5, "deepseek_v3-plain": 2.5, "glm4_moe-plain": 2.0}
LARGEST = {"flex_olmo-three": 6, "deepseek_v2-grouped": 4, "deepseek_v3": 4, "deepseek_v3-plain": 4}
"""Facts of sparse variants in builders.py; elsewhere no layer is dense, nothing shared, the scale 1, K at most 8."""


@pytest.fixture(scope="module", params=SPARSE)
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(variant: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_family(variant, tmp_path_factory.mktemp(variant))


@pytest.fixture(scope="module")
def model(folder: Path) -> FoundationModel:
    return load(ModelConfig(path=str(folder)))[0]


@pytest.fixture(scope="module", params=DENSE)
def dense_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dense(dense_folder: Path) -> FoundationModel:
    return load(ModelConfig(path=str(dense_folder)))[0]


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(20, 32, generator=torch.Generator().manual_seed(3))


def theirs(folder: Path, top_k: int) -> Any:
    """The checkpoint as plain transformers loads it, with its own eager experts, its config saying `top_k`."""
    config = AutoConfig.from_pretrained(folder)
    config.num_experts_per_tok = top_k
    return AutoModelForCausalLM.from_pretrained(folder, config=config, experts_implementation="eager").eval()


def facts(model: FoundationModel) -> Mixture:
    """What the family's record says of its experts."""
    assert model.family.mixture is not None
    return model.family.mixture


def logits(lm: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = lm(input_ids=ids, **inputs).logits
    return answer


def routed(block: SparseBlock, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts the block's experts would get."""
    with torch.no_grad():
        _, weights, index = block.router(hidden)
    return weights, index


def traces(model: FoundationModel) -> tuple[Any, ...]:
    """Every place that holds K, and the hooks."""
    return (
        [block.router.top_k for block in model.blocks],
        [getattr(block.module, "top_k", None) for block in model.blocks],
        [len(block.router._forward_hooks) for block in model.blocks],
        getattr(model.lm, "num_experts_per_tok", None),
        model.lm.config.num_experts_per_tok,
        model.lm.config.to_dict(),
        model.top_k,
    )


def some_top_ks(model: FoundationModel) -> list[int]:
    return sorted({1, model.native_top_k, model.largest_top_k})


def test_every_family_has_a_tiny_model() -> None:
    assert sorted([*FAMILY_VARIANTS, *CLASSIFIER_VARIANTS]) == list(families())


def test_logits_are_transformers_own(folder: Path, model: FoundationModel) -> None:
    ids = token_ids(2, 16)
    expected = logits(theirs(folder, model.native_top_k), ids)
    torch.testing.assert_close(logits(model.lm, ids), expected, rtol=1e-5, atol=1e-5)


def test_another_k_is_a_checkpoint_of_that_k(folder: Path, model: FoundationModel) -> None:
    ids = token_ids(2, 16)
    # A router that ignores its K has no such checkpoints; what it computes at another K is tested below.
    for top_k in some_top_ks(model) if facts(model).fixed is None else [model.native_top_k]:
        expected = logits(theirs(folder, top_k), ids)
        with model.active_experts(top_k):
            torch.testing.assert_close(logits(model.lm, ids), expected, rtol=1e-5, atol=1e-5)


def test_native_k_keeps_every_bit(variant: str, model: FoundationModel) -> None:
    ids = token_ids(2, 16)
    expected = logits(model.lm, ids)
    rescales: tuple[Rescale, ...] = ("none", "static", "mass") if variant in PLAIN else ("none",)
    for rescale in rescales:
        with model.active_experts(model.native_top_k, rescale=rescale):
            assert torch.equal(logits(model.lm, ids), expected)


@pytest.mark.parametrize("counted_first", [True, False])
def test_counts_sum_to_real_tokens_times_k(model: FoundationModel, counted_first: bool) -> None:
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    ids = token_ids(2, 12) * mask
    for top_k in some_top_ks(model):
        outer, inner = model.count_activations(), model.active_experts(top_k)
        if counted_first:
            with outer as counter, inner:
                logits(model.lm, ids, attention_mask=mask)
        else:
            with inner, outer as counter:
                logits(model.lm, ids, attention_mask=mask)
        assert counter.counts.sum(1).tolist() == [19 * top_k] * model.num_layers
        assert counter.counts.max() <= 19, "an expert was picked twice for a token"


def test_one_setter_changes_k_everywhere_and_back(model: FoundationModel) -> None:
    ids = token_ids(1, 8)
    outside, expected = traces(model), logits(model.lm, ids)
    with model.active_experts(1, "renormalised"):
        inside = traces(model)
        routers, modules, _, lm, config, everything, now = inside
        assert {*routers, *modules, lm, config, now} <= {1, None}
        changed = {key for key, value in everything.items() if value != outside[5][key]}
        assert changed <= {"num_experts_per_tok", "moe_k"}
        assert len(changed) == 1
        with pytest.raises(RuntimeError, match="inside"), model.active_experts(model.largest_top_k):
            raise RuntimeError("inside")
        assert traces(model) == inside
    assert traces(model) == outside
    assert torch.equal(logits(model.lm, ids), expected)


def balance(all_logits: tuple[torch.Tensor, ...], top_k: int, mask: list[int]) -> float:
    """Switch Transformer's load balance over all layers and real tokens, one token after the other."""
    experts, tokens = all_logits[0].shape[1], sum(mask) * len(all_logits)
    picks, probability = [0.0] * experts, [0.0] * experts
    for layer in all_logits:
        for row, real in zip(layer.tolist(), mask, strict=True):
            odds = [math.exp(value - max(row)) for value in row]
            for expert in sorted(range(experts), key=row.__getitem__)[-top_k:]:
                picks[expert] += real / tokens
            for expert in range(experts):
                probability[expert] += real * odds[expert] / sum(odds) / tokens
    return experts * sum(pick * share for pick, share in zip(picks, probability, strict=True))


def test_the_auxiliary_loss_uses_the_active_k(model: FoundationModel) -> None:
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    ids = token_ids(2, 9) * mask
    for top_k in some_top_ks(model):
        with torch.no_grad(), model.active_experts(top_k):
            output = model.lm(input_ids=ids, attention_mask=mask, output_router_logits=True)
        if not model.has_auxiliary_loss:
            assert output.get("aux_loss") is None
            continue
        expected = balance(output.router_logits, top_k, mask.flatten().tolist())
        assert output.aux_loss.item() == pytest.approx(expected, rel=1e-4)


def test_renormalised_weights_sum_to_the_familys_scale(
    variant: str, model: FoundationModel, hidden: torch.Tensor
) -> None:
    for top_k in range(1, model.largest_top_k + 1):
        with model.active_experts(top_k):
            native, native_index = routed(model.blocks[0], hidden)
        with model.active_experts(top_k, "renormalised"):
            weights, index = routed(model.blocks[0], hidden)
        assert index.shape == (20, top_k)
        assert torch.equal(index, native_index)
        torch.testing.assert_close(weights.sum(-1), torch.full((20,), SCALE.get(variant, 1.0)))
        torch.testing.assert_close(weights * native.sum(-1, keepdim=True), native * SCALE.get(variant, 1.0))


def test_the_native_gate_is_what_the_family_says(variant: str, model: FoundationModel, hidden: torch.Tensor) -> None:
    assert model.native_gate == model.blocks[0].native_gate == ("plain" if variant in PLAIN else "renormalised")
    with model.active_experts(1):
        alone, _ = routed(model.blocks[0], hidden)
    same = torch.allclose(alone, torch.full((20, 1), SCALE.get(variant, 1.0)))
    assert same == (variant not in PLAIN)


def test_rescaling(variant: str, model: FoundationModel, hidden: torch.Tensor) -> None:
    if variant not in PLAIN:
        with pytest.raises(ConfigError, match="rescale 'mass'"), model.active_experts(1, rescale="mass"):
            pass
        return
    block = model.blocks[0]
    native, _ = routed(block, hidden)
    for top_k in some_top_ks(model):
        with model.active_experts(top_k):
            plain, experts = routed(block, hidden)
        with model.active_experts(top_k, rescale="static"):
            static, same = routed(block, hidden)
        assert torch.equal(same, experts)
        torch.testing.assert_close(static, plain * (model.native_top_k / top_k))
        with model.active_experts(top_k, rescale="mass"):
            mass, same = routed(block, hidden)
        assert torch.equal(same, experts)
        torch.testing.assert_close(mass.sum(-1), native.sum(-1))
        torch.testing.assert_close(mass * plain.sum(-1, keepdim=True), plain * native.sum(-1, keepdim=True))
        assert block.router.top_k == model.native_top_k


def test_impossible_top_k(variant: str, model: FoundationModel) -> None:
    largest = LARGEST.get(variant, 8)
    assert model.largest_top_k == largest
    for top_k in (0, model.num_experts + 1):
        why = (
            rf"top_k {top_k} is impossible: the model has {model.num_experts} experts per layer; choose 1 to {largest}$"
        )
        with pytest.raises(ConfigError, match=why), model.active_experts(top_k):
            pass
    if largest < model.num_experts:
        why = rf"top_k {largest + 1} is impossible: the router keeps 2 of 4 groups of 2 experts.*choose 1 to {largest}$"
        with pytest.raises(ConfigError, match=why), model.active_experts(largest + 1):
            pass


@pytest.mark.parametrize("name", [name for name in LARGEST if LARGEST[name] == 4])
def test_all_experts_of_the_chosen_groups_can_be_active(name: str, hidden: torch.Tensor) -> None:
    model = FoundationModel(tiny_family_lm(name))
    with model.active_experts(4):
        weights, index = routed(model.blocks[0], hidden)
    assert (weights > 0).all()
    for experts in index.tolist():
        assert len(set(experts)) == 4
        assert len({expert // 2 for expert in experts}) == 2


def test_greedy_generation_with_a_cache_at_k_1(model: FoundationModel) -> None:
    ids = token_ids(2, 5)
    with model.active_experts(1), model.count_activations() as counter:
        found = model.lm.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=True
        )
    assert counter.counts.sum(1).tolist() == [2 * (5 + 3)] * model.num_layers
    with model.active_experts(1):
        for _ in range(4):
            step = logits(model.lm, ids, use_cache=False)[:, -1:]
            ids = torch.cat([ids, step.argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_sizes(variant: str, model: FoundationModel) -> None:
    shape = model.shape
    layers = shape.num_layers
    dense = DENSE_LAYERS.get(variant, ())
    assert (shape.dense_layers, shape.sparse_layers) == (dense, tuple(sorted({*range(layers)} - {*dense})))
    assert [block.layer for block in model.blocks] == list(shape.sparse_layers)
    assert (shape.hidden, shape.expert_intermediate, shape.vocabulary, shape.heads) == (32, 16, 64, 4)
    assert shape.shared_intermediate == SHARED_INTERMEDIATE.get(variant, 0)
    assert (shape.dense_intermediate > 0) == bool(dense)
    assert counted_parameters(shape, model) == shape.parameters


def counted_parameters(shape: ModelShape, model: FoundationModel) -> int:
    """All parameters, from the sizes; what sizes leave out (norms, biases, sinks, extra gates) by their names."""
    attention = sum(rows * columns for rows, columns in shape.attention.values())
    expert = 3 * shape.hidden * shape.expert_intermediate
    mixture = shape.num_experts * (expert + shape.hidden) + 3 * shape.hidden * shape.shared_intermediate
    matrices = (
        shape.num_layers * attention
        + len(shape.sparse_layers) * mixture
        + len(shape.dense_layers) * len(shape.mlp) * shape.hidden * shape.dense_intermediate
        + shape.hidden * shape.vocabulary * (1 if model.lm.config.tie_word_embeddings else 2)
    )
    others = ("bias", "sinks", "shared_expert_gate.weight", "wpe.weight")
    parameters: list[tuple[str, nn.Parameter]] = list(model.lm.named_parameters())
    return matrices + sum(
        value.numel() for name, value in parameters if name.endswith(others) or (value.dim() == 1 and "weight" in name)
    )


def test_weights_in_fewer_bits_count_as_parameters() -> None:
    lm = tiny_family_lm("gpt_oss")
    expected = FoundationModel(lm).shape.parameters
    quantise_experts(lm, 8)
    assert sum(parameter.numel() for parameter in lm.parameters()) < expected
    assert FoundationModel(lm).shape.parameters == expected


def test_attention_linears_are_all_linears_of_the_attention(model: FoundationModel) -> None:
    listed = {id(getattr(module, name)) for module, name in model.attention_linears().values()}
    there = {
        id(module)
        for layer in model.lm.model.layers
        for module in layer.self_attn.modules()
        if isinstance(module, nn.Linear)
    }
    assert listed == there
    assert {layer for layer, _ in model.attention_linears()} == {*range(model.shape.num_layers)}
    sizes = {name: tuple(getattr(*place).weight.shape) for (_, name), place in model.attention_linears().items()}
    assert sizes == model.shape.attention
    assert sizes["o_proj"] == (32, 4 * model.shape.v_head_dim)


def test_shared_linears_are_what_every_token_goes_through(variant: str, model: FoundationModel) -> None:
    linears = model.shared_linears()
    size = SHARED_INTERMEDIATE.get(variant, 0)
    assert {layer for layer, _ in linears} == (set(model.shape.sparse_layers) if size else set())
    assert len(linears) == (3 * model.num_layers if size else 0)
    for (layer, name), place in linears.items():
        linear = getattr(*place)
        assert isinstance(linear, nn.Linear)
        assert linear.weight.shape == ((32, size) if name == "down_proj" else (size, 32))
        assert linear in list(model.lm.model.layers[layer].mlp.modules())


def test_mlp_linears_are_those_of_layers_without_experts(variant: str, model: FoundationModel) -> None:
    linears, size = model.mlp_linears(), model.shape.dense_intermediate
    assert {layer for layer, _ in linears} == set(DENSE_LAYERS.get(variant, ()))
    for (layer, name), place in linears.items():
        assert getattr(*place) is getattr(model.lm.model.layers[layer].mlp, name)
        assert getattr(*place).weight.shape == ((32, size) if name == "down_proj" else (size, 32))


def test_a_router_that_cannot_do_what_the_config_says_is_refused() -> None:
    with pytest.raises(ModelError, match="num_experts_per_tok is 1 .* phimoe .* pick 2 experts.*set it to 2"):
        FoundationModel(tiny_family_lm("phimoe", num_experts_per_tok=1))
    with pytest.raises(ModelError, match="num_experts_per_tok is 6 .* deepseek_v3 .* can pick 1 to 4"):
        FoundationModel(tiny_family_lm("deepseek_v3", num_experts_per_tok=6))


def test_a_model_that_is_not_what_the_record_says_is_refused_by_path(variant: str) -> None:
    family = load_family(variant.partition("-")[0])
    assert family.mixture is not None
    block, router = family.block, family.mixture.router
    last = tiny_family_lm(variant).config.num_hidden_layers - 1
    where = rf"model\.layers\.{last}\.{block}"

    def broken(change: Any) -> FoundationModel:
        lm: Any = tiny_family_lm(variant)
        change(lm.model.layers[last])
        return FoundationModel(lm)

    with pytest.raises(ModelError, match=rf"{where} has experts, but no router .* at {where}\.{router}"):
        broken(lambda layer: delattr(getattr(layer, block), router))
    with pytest.raises(ModelError, match=rf"{where} has a router, but no experts at {where}\.experts"):
        broken(lambda layer: delattr(getattr(layer, block), "experts"))
    with pytest.raises(ModelError, match=rf"{where}\.experts is a Identity"):
        broken(lambda layer: setattr(getattr(layer, block), "experts", nn.Identity()))
    with pytest.raises(ModelError, match=rf"no {where}: .*families/.*\.py"):
        broken(lambda layer: delattr(layer, block))
    with pytest.raises(ModelError, match=rf"layers\.{last}\.self_attn has none of the linear layers .*o_proj"):
        broken(lambda layer: setattr(layer, "self_attn", nn.Identity())).attention_linears()


def test_a_causal_model_of_other_parts_is_refused() -> None:
    lm: Any = tiny_family_lm("mixtral")
    lm.model.blocks = lm.model.layers
    del lm.model.layers
    with pytest.raises(ModelError, match=r"no model\.layers: not a mixtral model"):
        FoundationModel(lm)


@pytest.mark.parametrize(
    ("model_type", "fact"),
    [
        ("jamba", "num_experts=16"),
        ("llama4", "text_config.num_local_experts=16"),
        ("dbrx", "ffn_config.moe_num_experts=4"),
    ],
)
def test_an_unknown_sparse_model_is_told_what_was_found_and_how_to_add_it(model_type: str, fact: str) -> None:
    with pytest.raises(ModelError, match=f"'{model_type}'") as caught:
        family_of(AutoConfig.for_model(model_type))
    line = str(caught.value)
    assert fact in line
    assert f"emberfed/models/families/{model_type}.py with FAMILY = Family(model_type='{model_type}'" in line
    assert "\n" not in line


def test_an_unknown_dense_model_is_told_how_to_add_it() -> None:
    config = SimpleNamespace(model_type="bloom", num_experts=0, num_hidden_layers=4)
    known = r"'bloom' has no record \(its config says nothing of experts\); known: .*llama.*olmoe.*families/bloom\.py"
    with pytest.raises(ModelError, match=known):
        family_of(config)


def test_a_dense_model_computes_what_transformers_does(dense_folder: Path, dense: FoundationModel) -> None:
    ids, mask = token_ids(2, 16), torch.tensor([[0] * 5 + [1] * 11, [1] * 16])
    plain = AutoModelForCausalLM.from_pretrained(dense_folder).eval()
    for inputs in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(logits(dense.lm, ids, **inputs), logits(plain, ids, **inputs), rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in dense.lm.parameters())


def test_a_dense_model_is_one_expert_that_is_always_active(dense: FoundationModel) -> None:
    assert dense.is_dense
    assert (dense.blocks, dense.num_layers, dense.has_auxiliary_loss) == ((), 0, False)
    assert (dense.num_experts, dense.native_top_k, dense.largest_top_k, dense.top_k) == (1, 1, 1, 1)
    ids, config = token_ids(2, 16), dense.lm.config.to_dict()
    expected = logits(dense.lm, ids)
    gates: tuple[Literal["native", "renormalised"], ...] = ("native", "renormalised")
    for gate in gates:
        with dense.active_experts(1, gate), dense.count_activations() as counter:
            assert torch.equal(logits(dense.lm, ids), expected)
            assert dense.lm.config.to_dict() == config
        assert (tuple(counter.counts.shape), tuple(counter.take().shape)) == ((0, 1), (0, 1))
    for top_k in (0, 2):
        why = rf"top_k {top_k} is impossible: {dense.family.model_type} models are dense, .*; choose 1$"
        with pytest.raises(ConfigError, match=why), dense.active_experts(top_k):
            pass
    with pytest.raises(ConfigError, match="rescale 'static' is impossible: .* dense .* use rescale 'none'"):
        dense.active_experts(1, rescale="static").__enter__()


def test_sizes_of_a_dense_model(dense: FoundationModel) -> None:
    shape = dense.shape
    assert (shape.dense_layers, shape.sparse_layers) == ((0, 1), ())
    assert (shape.num_experts, shape.native_top_k, shape.expert_intermediate, shape.shared_intermediate) == (1, 1, 0, 0)
    fused = FUSED.get(dense.family.model_type)
    inner = 16 if fused is None else 48
    assert (shape.hidden, shape.dense_intermediate, shape.vocabulary, shape.heads) == (32, inner, 64, 4)
    assert (shape.head, shape.pooler, shape.image, dense.num_classes, dense.head) == ({}, None, None, 0, None)
    assert counted_parameters(shape, dense) == shape.parameters
    assert not dense.shared_linears()
    *before, last = ("gate_proj", "up_proj", "down_proj") if fused is None else fused[1]
    sizes = {key: stored(place) for key, place in dense.mlp_linears().items()}
    expected = {**dict.fromkeys(before, (inner, 32)), last: (32, inner)}
    assert sizes == {(layer, name): size for layer in (0, 1) for name, size in expected.items()}
    attention = {name: stored(place) for (_, name), place in dense.attention_linears().items()}
    assert attention == shape.attention
    assert tuple(attention) == (("q_proj", "k_proj", "v_proj", "o_proj") if fused is None else fused[0])


FUSED = {
    "gpt2": (("c_attn", "c_proj"), ("c_fc", "c_proj")),
    "gpt_neox": (("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h")),
}
"""Linears of attention and MLP where one layer makes queries, keys and values."""


def stored(place: tuple[nn.Module, str]) -> tuple[int, ...]:
    """(out, in) of a linear layer."""
    shape = tuple(getattr(*place).weight.shape)
    return shape[::-1] if isinstance(getattr(*place), Conv1D) else shape


def test_a_dense_model_with_a_cache_and_with_checkpointing(dense: FoundationModel) -> None:
    ids = token_ids(2, 5)
    found = dense.lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    for _ in range(found.shape[1] - 5):
        step = logits(dense.lm, ids, use_cache=False)[:, -1:]
        ids = torch.cat([ids, step.argmax(-1)], dim=1)
    assert torch.equal(found, ids)
    weight = dense.lm.get_input_embeddings().weight.requires_grad_()

    def gradient() -> torch.Tensor:
        loss = dense.lm(input_ids=ids, labels=ids, use_cache=False).loss
        found: torch.Tensor = torch.autograd.grad(loss, weight)[0]
        return found

    plain = gradient()
    with dense.gradient_checkpointing():
        assert torch.equal(gradient(), plain)
    weight.requires_grad_(False)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dense_model_has_no_experts_to_quantise(dense_folder: Path, bits: Literal[4, 8]) -> None:
    why = rf"model\.expert_bits is {bits}, but .* models are dense and have no experts; set model\.expert_bits=null$"
    with pytest.raises(ModelError, match=why):
        load(ModelConfig(path=str(dense_folder), expert_bits=bits))


def test_a_dense_model_of_other_parts_is_refused_by_path() -> None:
    def broken(change: Any) -> FoundationModel:
        lm: Any = tiny_family_lm("llama")
        change(lm.model.layers[1])
        return FoundationModel(lm)

    with pytest.raises(ModelError, match=r"no model\.layers\.1\.mlp: not a llama model as .*families/llama\.py"):
        broken(lambda layer: delattr(layer, "mlp"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp has no linear layer up_proj: not a llama model"):
        broken(lambda layer: delattr(layer.mlp, "up_proj")).mlp_linears()
