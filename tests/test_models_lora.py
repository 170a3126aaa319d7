"""The adapter: initial values, attaching, training, and leaving no trace."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import DENSE_VARIANTS, FAMILY_VARIANTS, tiny_family_lm, tiny_model, token_ids, whole_adapter

from emberfed.errors import ConfigError, ModelError
from emberfed.models import lora, lora_layout, peft_layout
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora import Adapter, LoraConfig
from emberfed.sections import validate

ALPHA = 16.0
EVERYTHING = LoraConfig(rank=3, router=True)
Tensors = dict[str, torch.Tensor]


def initial(model: FoundationModel, config: LoraConfig = EVERYTHING, seed: int = 0) -> Tensors:
    return lora.initial(model, config, torch.Generator().manual_seed(seed))


def noisy(tensors: Tensors, seed: int = 1) -> Tensors:
    """The adapter with every value moved, so that lora_B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}


def logits(model: FoundationModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.lm(input_ids=token_ids(2, 10)).logits
    return result


def fingerprint(model: FoundationModel) -> tuple[Any, ...]:
    """Everything of the base: tensors bit by bit, which objects, gradients, modules, hooks, modes."""
    digest = hashlib.sha256()
    for _, tensor in sorted(model.lm.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    return (
        digest.hexdigest(),
        [(name, id(value), value.requires_grad, value.grad is None) for name, value in model.lm.named_parameters()],
        [
            (
                name,
                id(module),
                type(module),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                module.training,
            )
            for name, module in model.lm.named_modules()
        ],
    )


def train_step(
    model: FoundationModel, adapter: Adapter, optimizer: torch.optim.Optimizer, groups: Any, seed: int
) -> tuple[torch.Tensor, Tensors]:
    """One step on few tokens; returns who was touched and the gradients."""
    ids = token_ids(1, 3, seed)
    with model.count_activations() as counter:
        model.lm(input_ids=ids, labels=ids).loss.backward()
    gradients = {
        name: value.grad.to_dense().clone() for name, value in adapter.parameters.items() if value.grad is not None
    }
    touched = counter.take() > 0
    groups.take_gradients(touched)
    optimizer.step()
    groups.zero_grad()
    return touched, gradients


def test_initial_values() -> None:
    model = tiny_model()
    tensors = initial(model)
    assert list(tensors) == sorted(tensors)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert tensors["layers.1.self_attn.q_proj.lora_A"].shape == (3, 32)
    assert tensors["layers.1.self_attn.q_proj.lora_B"].shape == (32, 3)
    assert tensors["layers.0.experts.up_proj.lora_A"].shape == (8, 3, 32)
    assert tensors["layers.0.experts.up_proj.lora_B"].shape == (8, 16, 3)
    assert tensors["layers.0.experts.down_proj.lora_A"].shape == (8, 3, 16)
    assert tensors["layers.0.experts.down_proj.lora_B"].shape == (8, 32, 3)
    assert len(tensors) == 2 * (4 * 2 + 3 * 2 + 1)
    for name, value in tensors.items():
        if name.endswith("lora_B"):
            assert not value.any()
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(value.shape[-1])
            assert 0.8 * bound < value.abs().max() <= bound
    router = tensors["layers.0.router.weight"]
    assert torch.equal(router, model.blocks[0].router.get_parameter("weight"))
    assert router.data_ptr() != model.blocks[0].router.get_parameter("weight").data_ptr()


def test_initial_depends_on_the_generator_alone() -> None:
    model = tiny_model()
    first, again, other = initial(model), initial(model), initial(model, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.experts.up_proj.lora_A"], other["layers.0.experts.up_proj.lora_A"])


def test_config_covers_what_it_says() -> None:
    model = tiny_model()
    attention = initial(model, LoraConfig(experts=False))
    experts = initial(model, LoraConfig(attention=False))
    assert not any(lora.is_expert(name) for name in attention)
    assert all(lora.is_expert(name) for name in experts)
    assert len(attention) == 16
    assert len(experts) == 12
    nothing = {"attention": False, "experts": False}
    with pytest.raises(ConfigError, match="shared_experts and dense_mlp are all false, so there is nothing to adapt;"):
        validate(LoraConfig, nothing | {"dense_mlp": False}, "adapter")
    with pytest.raises(ConfigError, match="nothing to adapt in this olmoe model; set adapter.attention=true"):
        initial(model, validate(LoraConfig, nothing, "adapter"))
    with pytest.raises(ConfigError, match="rank must not be true"):
        validate(LoraConfig, {"rank": True, "experts": True}, "adapter")
    with pytest.raises(ConfigError, match=r"'adapter\.experts': input should be a valid boolean"):
        validate(LoraConfig, {"experts": 3}, "adapter")
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        validate(LoraConfig, {"rank": 0}, "adapter")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 65537}, "'adapter.rank': .* less than or equal to 65536"),
        ({"rank": 10**19}, "'adapter.rank': .* less than or equal to 65536"),
        ({"alpha": math.inf}, "'adapter.alpha': .* finite"),
        ({"alpha": math.nan}, "'adapter.alpha': .* finite"),
        ({"alpha": 1e300}, "'adapter.alpha': .* less than or equal to 1000000"),
        ({"alpha": 1e-300}, r"'adapter.alpha': .* greater than or equal to 0\.000001"),
    ],
)
def test_sizes_no_adapter_has(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(LoraConfig, values, "adapter")


def test_an_adapter_larger_than_the_memory() -> None:
    with torch.device("meta"):
        model = tiny_model(hidden_size=2**20, num_attention_heads=4, num_experts=4096)
    config = LoraConfig(rank=65536, attention=False)
    with pytest.raises(ConfigError, match=r"adapter\.rank 65536 makes an adapter of [\d,]+ GB, but this machine has"):
        initial(model, config)


def test_names() -> None:
    assert lora.layer_of("layers.12.experts.up_proj.lora_A") == 12
    assert lora.is_expert("layers.1.experts.up_proj.lora_A")
    assert not lora.is_expert("layers.1.self_attn.q_proj.lora_A")
    assert not lora.is_expert("layers.1.router.weight")
    with pytest.raises(ModelError, match="not the name of a layer's adapter tensor"):
        lora.layer_of("head.weight")


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_a_fresh_adapter_changes_no_bit(top_k: int) -> None:
    model = tiny_model()
    with model.active_experts(top_k):
        expected = logits(model)
        with lora.attached(model, initial(model), ALPHA):
            assert torch.equal(logits(model), expected)


def test_adapter_computes_the_merged_model() -> None:
    model, merged = tiny_model(), tiny_model()
    config = LoraConfig(rank=3, router=True)
    tensors = noisy(initial(model, config))
    scale = ALPHA / config.rank
    for layer, module in enumerate(merged.lm.model.layers):
        path = f"layers.{layer}"

        def delta(name: str, path: str = path) -> torch.Tensor:
            return scale * tensors[f"{path}.{name}.lora_B"] @ tensors[f"{path}.{name}.lora_A"]

        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(module.self_attn, name).weight.add_(delta(f"self_attn.{name}"))
        module.mlp.experts.gate_up_proj[:, :16].add_(delta("experts.gate_proj"))
        module.mlp.experts.gate_up_proj[:, 16:].add_(delta("experts.up_proj"))
        module.mlp.experts.down_proj.add_(delta("experts.down_proj"))
        module.mlp.gate.weight.copy_(tensors[f"{path}.router.weight"])
    with lora.attached(model, tensors, ALPHA):
        found = logits(model)
    torch.testing.assert_close(found, logits(merged), rtol=1e-5, atol=1e-5)
    assert (found - logits(model)).abs().max() > 0.1


def test_ranks_may_differ_between_tensors() -> None:
    model = tiny_model()
    tensors = initial(model)
    low = noisy(initial(model, LoraConfig(rank=2, router=True)))
    mixed = {name: low[name] if "layers.0" in name or "up_proj" in name else tensors[name] for name in tensors}
    with lora.attached(model, mixed, ALPHA) as adapter:
        assert {name: value.shape for name, value in adapter.tensors().items()} == {
            name: value.shape for name, value in mixed.items()
        }
        assert not torch.equal(logits(model), logits(tiny_model()))


PARTS: dict[str, Callable[[str], bool]] = {
    "down_proj": lambda name: "down_proj" in name,
    "gate_proj of one layer": lambda name: "1.experts.gate_proj" in name,
    "one layer": lambda name: "layers.0." in name,
    "one linear": lambda name: "layers.1.self_attn.v_proj" in name,
    "one router": lambda name: name == "layers.1.router.weight",
}


@pytest.mark.parametrize("belongs", PARTS.values(), ids=PARTS)
def test_a_part_of_an_adapter_is_one_whose_other_b_are_zero(belongs: Callable[[str], bool]) -> None:
    model = tiny_model()
    fresh = initial(model)
    part = {name: value for name, value in noisy(fresh).items() if belongs(name)}
    with lora.attached(model, part, ALPHA) as adapter:
        assert list(adapter.tensors()) == list(part)
        found = logits(model)
        groups = adapter.trainable_groups()
        assert {*groups.dense, *(group.name for group in groups.experts)} == set(part)
    with lora.attached(model, fresh | part, ALPHA):
        torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, logits(model))


def test_a_part_can_be_trained() -> None:
    model = tiny_model()
    before = fingerprint(model)
    part = {name: value for name, value in initial(model).items() if "up_proj" in name or "o_proj" in name}
    with lora.attached(model, part, ALPHA) as adapter:
        groups = adapter.trainable_groups()
        optimizer = torch.optim.SGD(groups.parameters(), lr=0.5)
        losses = []
        for _ in range(3):
            ids = token_ids(2, 8)
            with model.count_activations() as counter:
                loss = model.lm(input_ids=ids, labels=ids).loss
                loss.backward()
            losses.append(float(loss.detach()))
            groups.take_gradients(counter.take() > 0)
            optimizer.step()
            groups.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert fingerprint(model) == before


def test_shared_experts() -> None:
    model = FoundationModel(tiny_family_lm("deepseek_v3"))
    before = fingerprint(model)
    assert not [name for name in initial(model) if "shared_experts" in name]
    config = LoraConfig(rank=3, attention=False, experts=False, shared_experts=True)
    fresh = initial(model, config)
    layers = [block.layer for block in model.blocks]
    assert layers == list(range(1, layers[-1] + 1)), "its first layer is dense"
    assert sorted(fresh) == sorted(
        f"layers.{layer}.shared_experts.{matrix}_proj.lora_{factor}"
        for layer in layers
        for matrix in ("gate", "up", "down")
        for factor in "AB"
    )
    expected = logits(model)
    with lora.attached(model, fresh, ALPHA):
        assert torch.equal(logits(model), expected)
    with lora.attached(model, noisy(fresh), ALPHA) as adapter:
        ids = token_ids(2, 8)
        model.lm(input_ids=ids, labels=ids).loss.backward()
        assert all(value.grad is not None and value.grad.any() for value in adapter.parameters.values())
        assert not adapter.trainable_groups().experts
        assert (logits(model) - expected).abs().max() > 0.1
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", FAMILY_VARIANTS)
def test_every_family_takes_a_whole_adapter(name: str) -> None:
    model = FoundationModel(tiny_family_lm(name))
    before = fingerprint(model)
    tensors = initial(model, whole_adapter(model, 2))
    expected = logits(model)
    with lora.attached(model, tensors, ALPHA):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with lora.attached(model, noisy(tensors), ALPHA) as adapter:
        assert (logits(model) - expected).abs().max() > 0.1
        ids = token_ids(8, 16)
        model.lm(input_ids=ids, labels=ids).loss.backward()
        silent = [name for name, value in adapter.parameters.items() if value.grad is None]
    assert not silent
    assert fingerprint(model) == before


def test_null_is_every_part_a_model_has_instead_of_experts() -> None:
    dense, mixed = FoundationModel(tiny_family_lm("llama")), FoundationModel(tiny_family_lm("deepseek_v3"))
    kinds = {name.split(".")[2] for name in initial(dense, LoraConfig())}
    assert kinds == {"self_attn", "mlp"}
    assert {name.split(".")[2] for name in initial(mixed, LoraConfig())} == {"self_attn", "experts"}
    assert {name.split(".")[2] for name in initial(mixed, LoraConfig(dense_mlp=True))} == {
        "self_attn",
        "experts",
        "mlp",
    }
    only = initial(dense, LoraConfig(rank=3, attention=False, experts=False))
    assert {name: tuple(value.shape) for name, value in only.items() if name.startswith("layers.1.")} == {
        "layers.1.mlp.gate_proj.lora_A": (3, 32),
        "layers.1.mlp.gate_proj.lora_B": (16, 3),
        "layers.1.mlp.up_proj.lora_A": (3, 32),
        "layers.1.mlp.up_proj.lora_B": (16, 3),
        "layers.1.mlp.down_proj.lora_A": (3, 16),
        "layers.1.mlp.down_proj.lora_B": (32, 3),
    }
    assert len(only) == 2 * 6


LACKING: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": (
        "llama",
        {"experts": True},
        "experts is true, but this llama model has no routed experts; set .*=false",
    ),
    "routers": ("qwen3", {"router": True}, "router is true, but this qwen3 model has no routers; set adapter.router=f"),
    "shared": ("olmoe", {"shared_experts": True}, "shared_experts is true, but this olmoe model has no shared experts"),
    "dense": ("olmoe", {"dense_mlp": True}, "dense_mlp is true, but this olmoe model has no layers without experts"),
    "all": ("llama", {"attention": False, "dense_mlp": False}, "nothing to adapt in this llama model; set adapter.att"),
}


@pytest.mark.parametrize(("name", "values", "message"), LACKING.values(), ids=LACKING)
def test_what_a_model_lacks_cannot_be_adapted(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        initial(FoundationModel(tiny_family_lm(name)), LoraConfig(**values))


@pytest.mark.parametrize("name", [name for names in DENSE_VARIANTS.values() for name in names])
def test_a_dense_adapter_has_the_gradients_of_dense_adapted_weights(name: str) -> None:
    """With W' = W + s B A, the loss's gradient G at W' gives s B'G for A, and s G A' for B."""
    model = FoundationModel(tiny_family_lm(name))
    tensors = noisy(initial(model, LoraConfig(rank=3)))
    twin: Any = tiny_family_lm(name).requires_grad_(False)
    scale, ids = ALPHA / 3, token_ids(3, 10)
    names = {module: name for name, module in model.lm.named_modules()}
    weights: dict[str, torch.Tensor] = {}
    for path, (module, attribute) in lora_layout.linears(model).items():
        weight = twin.get_parameter(f"{names[module]}.{attribute}.weight")
        change = scale * tensors[f"{path}.lora_B"] @ tensors[f"{path}.lora_A"]
        weight.add_(change.T if name == "gpt2" else change)  # it stores (in, out)
        weights[path] = weight.requires_grad_()
    twin(input_ids=ids, labels=ids).loss.backward()
    with lora.attached(model, tensors, ALPHA) as adapter:
        model.lm(input_ids=ids, labels=ids).loss.backward()
    assert len(weights) == len(tensors) / 2 == 2 * (4 if name.startswith("gpt") else 7)
    for path, weight in weights.items():
        a, b = (adapter.parameters[f"{path}.lora_{factor}"] for factor in "AB")
        assert weight.grad is not None
        gradient = weight.grad.T if name == "gpt2" else weight.grad
        torch.testing.assert_close(a.grad, scale * b.detach().T @ gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad, scale * gradient @ a.detach().T, rtol=1e-4, atol=1e-5)


def test_a_dense_model_is_trained_without_experts() -> None:
    model = FoundationModel(tiny_family_lm("mistral"))
    before = fingerprint(model)
    with lora.attached(model, initial(model, LoraConfig(rank=2)), ALPHA) as adapter:
        groups = adapter.trainable_groups()
        assert list(groups.dense) == list(adapter.parameters)
        optimizer = torch.optim.SGD(groups.parameters(), lr=0.2)
        losses = []
        for _ in range(3):
            ids = token_ids(2, 8)
            with model.active_experts(1), model.count_activations() as counter:
                loss = model.lm(input_ids=ids, labels=ids).loss
                loss.backward()
            losses.append(float(loss.detach()))
            groups.take_gradients(counter.take() > 0)
            optimizer.step()
            groups.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert fingerprint(model) == before


def saved(model: FoundationModel, tensors: Tensors, folder: Path, alpha: float = ALPHA) -> str:
    for name, data in peft_layout.to_files(tensors, alpha, model).items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_start_from_an_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = noisy(initial(model))
    folder = saved(model, tensors, tmp_path)
    found = initial(model, EVERYTHING.model_copy(update={"start_from": folder}))
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_start_from_a_part(tmp_path: Path) -> None:
    model = tiny_model()
    part = {name: value for name, value in noisy(initial(model)).items() if "q_proj" in name or "1.experts" in name}
    found = initial(model, LoraConfig(rank=3, start_from=saved(model, part, tmp_path)))
    assert all(torch.equal(found[name], part[name]) for name in found)
    assert len(found) == len(part)


STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "another rank": ({"rank": 5}, r"has rank 3, but adapter\.rank is 5; make them agree"),
    "another alpha": ({"alpha": 8}, r"has alpha 16, but adapter\.alpha is 8; make them agree"),
    "experts unasked": (
        {"experts": False, "dense_mlp": True},
        r"adapts the experts, but adapter\.experts is false; set adapter\.experts=true",
    ),
    "dense MLPs missing": ({"dense_mlp": True}, r"adapts no dense_mlp, but adapter\.dense_mlp is true; set"),
    "attention missing": ({"attention": True}, r"adapts no attention, but adapter\.attention is true; set"),
    "router missing": ({"router": True}, r"adapts no router, but adapter\.router is true"),
}


@pytest.mark.parametrize(("changes", "message"), STARTS.values(), ids=STARTS)
def test_start_from_an_adapter_that_is_not_what_the_config_says(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = FoundationModel(tiny_family_lm("qwen2_moe-dense_layer"))
    config = LoraConfig(rank=3, attention=False)
    folder = saved(model, noisy(initial(model, config)), tmp_path)
    with pytest.raises(ConfigError, match=message) as raised:
        initial(model, config.model_copy(update=changes | {"start_from": folder}))
    assert folder in str(raised.value)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_start_from_an_adapter_with_dense_mlps(tmp_path: Path, name: str) -> None:
    model = FoundationModel(tiny_family_lm(name))
    tensors = noisy(initial(model, LoraConfig(rank=3, attention=False, dense_mlp=True)))
    config = LoraConfig(rank=3, attention=False, dense_mlp=True, start_from=saved(model, tensors, tmp_path))
    found = initial(model, config)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_start_from_an_adapter_without_what_null_means(tmp_path: Path) -> None:
    model = FoundationModel(tiny_family_lm("llama"))
    folder = saved(model, noisy(initial(model, LoraConfig(rank=3, dense_mlp=False))), tmp_path)
    why = "adapts no dense_mlp, but adapter.dense_mlp is null, which is true here; set adapter.dense_mlp=false"
    with pytest.raises(ConfigError, match=why):
        initial(model, LoraConfig(rank=3, start_from=folder))


def test_start_from_an_adapter_of_another_model(tmp_path: Path) -> None:
    wider = tiny_model(hidden_size=64)
    folder = saved(wider, noisy(initial(wider, LoraConfig(rank=3))), tmp_path)
    with pytest.raises(ModelError, match=r"shape \(8, 3, 64\); expected \(8, 3, 32\)"):
        initial(tiny_model(), EVERYTHING.model_copy(update={"start_from": folder}))
    with pytest.raises(ModelError, match="not a readable PEFT adapter"):
        initial(tiny_model(), LoraConfig(start_from=str(tmp_path / "nothing")))


def test_the_empty_adapter_is_the_base() -> None:
    model = tiny_model()
    with lora.attached(model, {}, ALPHA) as adapter:
        assert adapter.tensors() == {}
        assert torch.equal(logits(model), logits(tiny_model()))


def test_attaching_draws_nothing_from_the_global_stream_and_copies() -> None:
    model = tiny_model()
    tensors = initial(model)
    before = torch.get_rng_state()
    with lora.attached(model, tensors, ALPHA) as adapter:
        assert torch.equal(torch.get_rng_state(), before)
        out = adapter.tensors()
        for name, parameter in adapter.parameters.items():
            assert torch.equal(parameter, tensors[name])
            assert parameter.data_ptr() not in (tensors[name].data_ptr(), out[name].data_ptr())
            assert parameter.requires_grad
            assert not out[name].requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_left_exactly_as_found(fails: bool) -> None:
    model = tiny_model()
    tensors = noisy(initial(model))
    before, kept = fingerprint(model), {name: value.clone() for name, value in tensors.items()}
    try:
        with lora.attached(model, tensors, ALPHA) as adapter, model.active_experts(3, "renormalised"):
            groups = adapter.trainable_groups()
            optimizer = torch.optim.AdamW(groups.parameters(), lr=0.1)
            for seed in range(3):
                train_step(model, adapter, optimizer, groups, seed)
            if fails:
                raise RuntimeError("in training")
    except RuntimeError:
        assert fails
    assert fingerprint(model) == before
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)
    assert not all(torch.equal(adapter.tensors()[name], kept[name]) for name in kept)


def test_gradients_reach_every_kind_of_parameter() -> None:
    model = tiny_model()
    with lora.attached(model, noisy(initial(model)), ALPHA) as adapter:
        ids = token_ids(4, 16)
        model.lm(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in adapter.parameters.items():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_untouched_experts_keep_their_bits_and_touched_ones_move_as_alone(make: Callable[..., Any]) -> None:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    if make is torch.optim.SGD:
        options["momentum"] = 0.9
    model = tiny_model()
    start = noisy(initial(model))
    with lora.attached(model, start, ALPHA) as adapter:
        groups = adapter.trainable_groups()
        optimizer = make(groups.parameters(), **options)
        alone = {
            (name, expert): torch.nn.Parameter(start[name][expert].clone())
            for name in start
            if lora.is_expert(name)
            for expert in range(8)
        }
        twins = {key: make([parameter], **options) for key, parameter in alone.items()}
        ever = torch.zeros(2, 8, dtype=torch.bool)
        skipped = 0
        for seed in range(4):
            touched, gradients = train_step(model, adapter, optimizer, groups, seed)
            skipped += int((ever & ~touched).sum())  # here momentum would move it
            ever |= touched
            for (name, expert), parameter in alone.items():
                if touched[lora.layer_of(name), expert]:
                    parameter.grad = gradients[name][expert]
                    twins[name, expert].step()
        final = adapter.tensors()
    assert skipped > 0
    assert not ever.all(), "some expert was to stay untouched"
    for (name, expert), parameter in alone.items():
        assert torch.equal(final[name][expert], parameter), (name, expert)
        if not ever[lora.layer_of(name), expert]:
            assert torch.equal(final[name][expert], start[name][expert])
        else:
            assert not torch.equal(final[name][expert], start[name][expert])


def test_fused_optimiser_agrees() -> None:
    model = tiny_model()
    start = noisy(initial(model))
    finals = []
    for fused in (False, True):
        with lora.attached(model, start, ALPHA) as adapter:
            groups = adapter.trainable_groups()
            optimizer = torch.optim.AdamW(groups.parameters(), lr=0.05, fused=fused)
            touched = [train_step(model, adapter, optimizer, groups, seed)[0] for seed in range(3)]
            finals.append(adapter.tensors())
    for name in start:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=1e-4, atol=1e-4)
    ever = torch.stack(touched).any(0)
    for name in filter(lora.is_expert, start):
        for expert in (~ever[lora.layer_of(name)]).nonzero().flatten().tolist():
            assert torch.equal(finals[1][name][expert], start[name][expert])


def test_views_share_the_stacked_storage_and_forget_gradients() -> None:
    model = tiny_model()
    with lora.attached(model, initial(model), ALPHA) as adapter:
        groups = adapter.trainable_groups()
        assert len(groups.parameters()) == 16 + 2 + 2 * 6 * 8
        with torch.no_grad():
            groups.experts[0].views[5].fill_(7.0)
        stacked = adapter.parameters[groups.experts[0].name]
        assert (stacked[5] == 7).all()
        assert not (stacked[4] == 7).any()
        ids = token_ids(1, 4)
        model.lm(input_ids=ids, labels=ids).loss.backward()
        groups.take_gradients(torch.ones(2, 8, dtype=torch.bool))
        assert all(parameter.grad is not None for parameter in groups.dense.values())
        for group in groups.experts:
            used = {expert for expert, view in enumerate(group.views) if view.grad is not None}
            assert 0 < len(used) < 8, "few tokens reach some experts, not all"
        groups.zero_grad()
        assert all(parameter.grad is None for parameter in [*groups.parameters(), *adapter.parameters.values()])
        for wrong in (torch.ones(2, 8), torch.ones(2, 7, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)):
            with pytest.raises(ValueError, match="touched must be bool"):
                groups.take_gradients(wrong)


def test_bfloat16_base_has_a_float32_adapter() -> None:
    model = tiny_model()
    tensors = noisy(initial(model))
    with lora.attached(model, tensors, ALPHA):
        expected = logits(model)
    model.lm.to(torch.bfloat16)
    before = fingerprint_dtypes(model)
    with lora.attached(model, tensors, ALPHA) as adapter:
        found = logits(model)
        ids = token_ids(4, 16)
        model.lm(input_ids=ids, labels=ids).loss.backward()
        assert {parameter.dtype for parameter in adapter.parameters.values()} == {torch.float32}
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters.values())
    assert found.dtype == torch.bfloat16
    assert fingerprint_dtypes(model) == before
    similarity = torch.nn.functional.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0)
    assert similarity > 0.98


def fingerprint_dtypes(model: FoundationModel) -> list[tuple[str, int, torch.dtype, bool]]:
    return [(name, id(value), value.dtype, value.requires_grad) for name, value in model.lm.named_parameters()]


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name not in names}


BROKEN: list[tuple[str, Callable[[Tensors], Tensors], str]] = [
    (
        "foreign",
        lambda t: t | {"layers.0.experts.gate_proj.lora_C": torch.zeros(1)},
        r"'layers\.0\.experts\.gate_proj\.lora_C' has no place in this model; did you mean",
    ),
    (
        "layer",
        lambda t: t | {"layers.9.router.weight": torch.zeros(8, 32)},
        r"'layers\.9\.router\.weight' has no place",
    ),
    (
        "missing",
        lambda t: without(t, "layers.1.self_attn.k_proj.lora_B"),
        r"has 'layers\.1\.self_attn\.k_proj\.lora_A' but lacks 'layers\.1\.self_attn\.k_proj\.lora_B'",
    ),
    (
        "shape",
        lambda t: t | {"layers.1.experts.up_proj.lora_A": torch.zeros(8, 3, 31)},
        r"'layers\.1\.experts\.up_proj\.lora_A' has shape \(8, 3, 31\); expected \(8, 3, 32\)",
    ),
    (
        "experts",
        lambda t: t | {"layers.1.experts.up_proj.lora_B": torch.zeros(7, 16, 3)},
        r"'layers\.1\.experts\.up_proj\.lora_B' has shape \(7, 16, 3\); expected \(8, 16, 3\)",
    ),
    (
        "rank",
        lambda t: t | {"layers.0.self_attn.q_proj.lora_B": torch.zeros(32, 4)},
        r"'layers\.0\.self_attn\.q_proj\.lora_B' has shape \(32, 4\); expected \(32, 3\)",
    ),
    (
        "rank 0",
        lambda t: (
            t
            | {
                "layers.0.self_attn.q_proj.lora_A": torch.zeros(0, 32),
                "layers.0.self_attn.q_proj.lora_B": torch.zeros(32, 0),
            }
        ),
        r"'layers\.0\.self_attn\.q_proj\.lora_A' has shape \(0, 32\)",
    ),
    (
        "integer",
        lambda t: t | {"layers.0.router.weight": torch.zeros(8, 32, dtype=torch.int64)},
        r"'layers\.0\.router\.weight' is torch\.int64",
    ),
    (
        "scalar",
        lambda t: t | {"layers.0.self_attn.q_proj.lora_A": torch.tensor(1.0)},
        r"'layers\.0\.self_attn\.q_proj\.lora_A' has shape \(\)",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_adapters_that_do_not_fit_are_refused_by_name(change: Callable[[Tensors], Tensors], message: str) -> None:
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(ModelError, match=message), lora.attached(model, change(initial(model)), ALPHA):
        pass
    assert fingerprint(model) == before
