"""The sparse adapter on real tiny models of every family: identity, values, counts, auxiliary loss, and bad input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from builders import CLASSIFIER_VARIANTS, FAMILY_VARIANTS, tiny_family_lm, token_ids
from torch import nn
from torch.nn import functional as F

from emberfed.errors import ConfigError, ModelError
from emberfed.models.balance import Regulariser, switch_loss, z_loss
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.groups import clip_gradients
from emberfed.models.sparse_adapter import (
    SparseAdapterConfig,
    attached,
    check,
    initial,
    is_expert,
    parameter_count,
)

VARIANTS = [name for names in (*FAMILY_VARIANTS.values(), *CLASSIFIER_VARIANTS.values()) for name in names]
FAMILIES = [*FAMILY_VARIANTS, *CLASSIFIER_VARIANTS]
SMALL = SparseAdapterConfig(num_experts=4, expert_size=3)
Tensors = dict[str, torch.Tensor]


def model_of(name: str = "llama") -> FoundationModel:
    return FoundationModel(tiny_family_lm(name))


def fresh(model: FoundationModel, config: SparseAdapterConfig = SMALL, seed: int = 0) -> Tensors:
    return initial(model, config, torch.Generator().manual_seed(seed))


def loud(model: FoundationModel, config: SparseAdapterConfig = SMALL) -> Tensors:
    """Every number random and large enough to be seen."""
    generator = torch.Generator().manual_seed(5)
    return {name: 0.5 * torch.randn(t.shape, generator=generator) for name, t in fresh(model, config).items()}


def inputs(model: FoundationModel, side: str | None = None) -> dict[str, torch.Tensor]:
    """Three examples; of texts two are padded on that side, to 9 positions."""
    if model.task == "image_classification":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    ids, mask = token_ids(3, 9), torch.ones(3, 9, dtype=torch.int64)
    for row, length in enumerate((9, 5, 2)):
        if side is not None:
            mask[row] = 0
            mask[row, slice(length) if side == "right" else slice(9 - length, None)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: FoundationModel, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    extra = {"use_cache": False} if model.task == "generation" else {}
    found: torch.Tensor = model.lm(**given, **extra).logits
    return found


def all_hooks(model: FoundationModel) -> list[int]:
    return [len(hooks) for m in model.lm.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_adapter_is_the_identity_bit_for_bit(name: str) -> None:
    model = model_of(name)
    given, before = inputs(model, "right"), all_hooks(model)
    slots = [id(parameter) for parameter in model.lm.parameters()]
    with torch.no_grad():
        base = logits(model, given)
        for top_k in (1, 4):
            with attached(model, fresh(model), top_k):
                assert torch.equal(logits(model, given), base)
        with attached(model, loud(model), 2):
            assert not torch.allclose(logits(model, given), base)
        assert torch.equal(logits(model, given), base)
    assert all_hooks(model) == before
    assert [id(parameter) for parameter in model.lm.parameters()] == slots


def dense_adapter(tensors: Tensors, layer: int, x: torch.Tensor, top_k: int) -> torch.Tensor:
    """All experts for all tokens, those not chosen weighted with zero."""
    start = f"layers.{layer}.adapter"
    down, up = tensors[f"{start}.experts.down_proj"], tensors[f"{start}.experts.up_proj"]
    scores = x @ tensors[f"{start}.router.weight"].T
    kept = scores >= scores.topk(top_k).values[..., -1:]
    gates = scores.masked_fill(~kept, -torch.inf).softmax(-1)
    every = torch.stack([F.gelu(x @ down[m].T) @ up[m].T for m in range(len(down))], dim=-1)
    return (every * gates.unsqueeze(-2)).sum(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_it_adds_is_the_definition_in_every_layer(name: str) -> None:
    """Seen by hooks behind ours: each host's output is the FFN's own plus the adapter of the FFN's input."""
    model, given = model_of(name), inputs(model_of(name))
    tensors = loud(model)
    seen: dict[int, list[Any]] = {layer: [] for layer in model.hosts()}
    handles: list[Any] = []
    with torch.no_grad(), attached(model, tensors, 2):
        for layer, host in model.hosts().items():
            note = seen[layer]
            handles += [
                host.source.register_forward_pre_hook(lambda _, args, note=note: note.append(args[0])),
                host.target.register_forward_hook(lambda m, args, out, note=note: note.extend((m.forward(*args), out))),
            ]
        logits(model, given)
        for handle in handles:
            handle.remove()
    assert sorted(seen) == list(range(len(model.layers)))
    for layer, (x, plain, found) in seen.items():
        plain, found = (out[0] if isinstance(out, tuple) else out for out in (plain, found))
        torch.testing.assert_close(found, plain + dense_adapter(tensors, layer, x, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_learns_and_the_base_does_not(name: str) -> None:
    model = model_of(name)
    with attached(model, loud(model), 4) as adapter:
        logits(model, inputs(model)).square().sum().backward()  # type: ignore[no-untyped-call]
        for key, parameter in adapter.parameters.items():
            assert parameter.grad is not None, key
            assert parameter.grad.to_dense().abs().sum() > 0, key
            assert parameter.grad.is_sparse == is_expert(key), key
        assert any(key.startswith("head.") for key in adapter.parameters) == (model.head is not None)
    assert all(parameter.grad is None for parameter in model.lm.parameters())


def test_it_is_taken_off_after_an_exception_too() -> None:
    model = model_of("vit")
    before = all_hooks(model)
    with pytest.raises(RuntimeError, match="stop"), attached(model, loud(model), 2):
        raise RuntimeError("stop")
    assert all_hooks(model) == before
    with attached(model, loud(model), 2):
        pass


def test_a_second_one_is_refused() -> None:
    model = model_of()
    with attached(model, loud(model), 2):
        base = logits(model, inputs(model))
        with pytest.raises(ModelError, match="already"), attached(model, fresh(model), 2):
            pass
        assert torch.equal(logits(model, inputs(model)), base)


@pytest.mark.parametrize("name", ["llama", "olmoe", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_only_real_tokens_are_counted_and_computed(name: str, side: str) -> None:
    """16 of 27 positions are real; K of each are counted, in each of two layers."""
    model = model_of(name)
    for padding, tokens in ((side, 16), (None, 27)):
        with attached(model, loud(model), 3) as adapter, adapter.counting() as counter:
            logits(model, inputs(model, padding)).sum().backward()  # type: ignore[no-untyped-call]
            assert counter.counts.sum(-1).tolist() == [3 * tokens] * 2
            for group in adapter.trainable_groups().experts:
                assert group.stacked.grad is not None
                used = group.stacked.grad._indices()[0].tolist()
                assert used == counter.counts[group.row].nonzero()[:, 0].tolist()


def test_padding_does_not_change_what_real_tokens_get() -> None:
    model = model_of()
    given = inputs(model, "right")
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad(), attached(model, loud(model), 2):
        together = logits(model, given)
        for row in range(3):
            alone = logits(model, {"input_ids": ids[row][mask[row] == 1][None]})[0]
            torch.testing.assert_close(together[row][mask[row] == 1], alone, rtol=1e-4, atol=1e-4)


def test_counts_are_taken_and_only_inside_the_context() -> None:
    model = model_of()
    with torch.no_grad(), attached(model, loud(model), 2) as adapter:
        with adapter.counting() as counter:
            logits(model, inputs(model))
            first = counter.take()
            logits(model, inputs(model, "left"))
            assert counter.take().sum().item() == 2 * 2 * 16
            assert counter.take().sum().item() == 0
        logits(model, inputs(model))
        assert counter.counts.sum().item() == first.sum().item() + 2 * 2 * 16


def test_a_mask_that_does_not_tell_padding_cannot_be_counted() -> None:
    model = model_of()
    given = {"input_ids": token_ids(2, 4), "attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}
    with attached(model, loud(model), 2) as adapter, adapter.counting(), pytest.raises(ModelError, match="2-D"):
        logits(model, given)


def test_generation_with_a_cache_and_left_padding_is_generation_without() -> None:
    model = model_of()
    given = inputs(model, "left")
    results, counts = [], []
    for use_cache in (True, False):
        with torch.inference_mode(), attached(model, loud(model), 2) as adapter, adapter.counting() as counter:
            options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "use_cache": use_cache}
            results.append(model.lm.generate(**given, **options))
            counts.append(int(counter.counts.sum()))
    assert torch.equal(*results)
    with_cache, without = 16 + 3 * 3, 16 + 19 + 22 + 25
    assert counts == [with_cache * 2 * 2, without * 2 * 2]


REGULARISER = Regulariser("heterogeneity", 0.7, torch.rand(2, 4, generator=torch.Generator().manual_seed(3)), 0.2)


def gradients_of(model: FoundationModel, checkpointing: bool, sides: tuple[str | None, ...]) -> tuple[Tensors, Any]:
    """Several forward passes, then one backward pass through all of them."""
    with attached(model, loud(model), 2, regulariser=REGULARISER) as adapter, adapter.counting() as counter:
        if checkpointing:
            with model.gradient_checkpointing():
                _backward(model, adapter, sides)
        else:
            _backward(model, adapter, sides)
        found = {}
        for name, parameter in adapter.parameters.items():
            assert parameter.grad is not None
            found[name] = parameter.grad.to_dense().clone()
        return found, counter.counts


def _backward(model: FoundationModel, adapter: Any, sides: tuple[str | None, ...]) -> None:
    losses = []
    for side in sides:
        losses.append(logits(model, inputs(model, side)).square().mean() + adapter.auxiliary_loss())
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["llama", "olmoe", "bert", "vit"])
@pytest.mark.parametrize("sides", [("left",), ("left", None, "right")])
def test_gradient_checkpointing_changes_no_gradient_and_counts_once(name: str, sides: tuple[str | None, ...]) -> None:
    """Also of passes that lie back, whose padding was another."""
    model = model_of(name)
    plain, counts = gradients_of(model, False, sides)
    again, counts_again = gradients_of(model, True, sides)
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, msg=key)
    assert torch.equal(counts, counts_again)


def test_the_auxiliary_loss_is_that_of_the_last_pass_over_real_tokens() -> None:
    model = model_of()
    tensors = loud(model)
    given = inputs(model, "right")
    seen: list[torch.Tensor] = []
    with attached(model, tensors, 2, regulariser=REGULARISER) as adapter:
        logits(model, inputs(model))
        hooks = [
            host.source.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for host in model.hosts().values()
        ]
        logits(model, given)
        found = adapter.auxiliary_loss()
    for hook in hooks:
        hook.remove()
    real = given["attention_mask"].reshape(-1) == 1
    expected = torch.zeros(())
    assert REGULARISER.omega_LM is not None
    for layer, x in enumerate(seen):
        scores = (x.reshape(-1, 32) @ tensors[f"layers.{layer}.adapter.router.weight"].T)[real]
        balance = switch_loss(scores, scores.topk(2).indices, None, REGULARISER.omega_LM[layer])
        expected = expected + (0.7 * balance + 0.2 * z_loss(scores)) / 2
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_auxiliary_loss_alone_trains_gates_and_nothing_else_of_the_last_layer() -> None:
    model = model_of()
    last = "layers.1.adapter"
    with attached(model, loud(model), 1, regulariser=Regulariser("switch", 1.0)) as adapter:
        logits(model, inputs(model))
        loss = adapter.auxiliary_loss()
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]
        assert adapter.parameters[f"{last}.router.weight"].grad is not None
        assert adapter.parameters[f"{last}.experts.up_proj"].grad is None
        assert adapter.parameters["layers.0.adapter.experts.up_proj"].grad is not None, "through the hidden states"


def test_without_a_regulariser_there_is_no_auxiliary_loss_and_without_a_pass_none_yet() -> None:
    model = model_of()
    with attached(model, loud(model), 2) as adapter:
        logits(model, inputs(model))
        assert adapter.auxiliary_loss() is None
    with attached(model, loud(model), 2, regulariser=REGULARISER) as adapter:
        with pytest.raises(ValueError, match="forward pass"):
            adapter.auxiliary_loss()
        with torch.no_grad():
            logits(model, inputs(model))
        with pytest.raises(ValueError, match="with gradients"):
            adapter.auxiliary_loss()


def test_autocast_and_a_bfloat16_base_keep_the_adapter_in_float32() -> None:
    model = FoundationModel(tiny_family_lm("llama").bfloat16())
    given = inputs(model)
    with attached(model, loud(model), 2) as adapter:
        assert logits(model, given).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            logits(model, given).float().sum().backward()  # type: ignore[no-untyped-call]
        assert {p.grad.dtype for p in adapter.parameters.values() if p.grad is not None} == {torch.float32}
    with torch.no_grad():
        base = logits(model, given)
        with attached(model, fresh(model), 2):
            assert torch.equal(logits(model, given), base)


def test_an_expert_without_tokens_keeps_its_bits_under_adamw() -> None:
    model = model_of()
    tensors = loud(model)
    for layer in range(2):
        # Equal logits everywhere: the two lowest experts get every token.
        tensors[f"layers.{layer}.adapter.router.weight"].zero_()
    with attached(model, tensors, 2) as adapter, adapter.counting() as counter:
        for layer in range(2):
            adapter.parameters[f"layers.{layer}.adapter.router.weight"].requires_grad_(False)
        groups = adapter.trainable_groups()
        optimizer = torch.optim.AdamW(groups.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(2):
            logits(model, inputs(model)).square().sum().backward()  # type: ignore[no-untyped-call]
            clip_gradients(groups.take_gradients(counter.take() > 0), 1.0)
            optimizer.step()
            groups.zero_grad()
        after = adapter.tensors()
    for name, tensor in after.items():
        moved = (tensor != tensors[name]).flatten(1).any(1).tolist()
        if is_expert(name):
            assert moved[2:] == [False, False], name
            assert all(moved[:2]), name


def test_one_expert_is_a_dense_adapter_without_gate() -> None:
    model = model_of()
    config = SparseAdapterConfig(num_experts=1, expert_size=12)
    assert not [name for name in fresh(model, config) if "router" in name]
    with attached(model, loud(model, config), 1) as adapter, adapter.counting() as counter:
        logits(model, inputs(model, "left"))
        assert counter.counts.tolist() == [[16], [16]]
    with (
        pytest.raises(ConfigError, match="no gate"),
        attached(model, loud(model, config), 1, regulariser=Regulariser("switch", 0.1)),
    ):
        pass


def test_a_head_alone_may_be_trained() -> None:
    """The linear probe."""
    model = model_of("vit")
    head = {name: tensor for name, tensor in loud(model).items() if name.startswith("head.")}
    given = inputs(model)
    with attached(model, head, 1) as adapter:
        found = logits(model, given)
        found.sum().backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in adapter.parameters.values())
        with adapter.counting() as counter:
            logits(model, given)
        assert counter.counts.shape == (0, 1)
    assert model.head is not None
    with torch.no_grad():
        inner = model.lm.vit(**given).last_hidden_state[:, 0]
        torch.testing.assert_close(found, F.linear(inner, head["head.weight"], head["head.bias"]))


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_fresh_adapter_is_the_same_for_the_same_seed(name: str) -> None:
    model = model_of(name)
    one, same, other = fresh(model, seed=1), fresh(model, seed=1), fresh(model, seed=2)
    assert list(one) == sorted(one)
    for key, tensor in one.items():
        assert torch.equal(tensor, same[key])
        assert tensor.dtype == torch.float32
        fixed = key.endswith("up_proj") or key.startswith("head.")
        assert torch.equal(tensor, other[key]) == fixed, key
        if key.endswith("up_proj"):
            assert not tensor.any()
        if key.endswith("down_proj"):
            assert tensor.abs().max() <= 32**-0.5
    assert parameter_count(SMALL, model) == sum(tensor.numel() for tensor in one.values())


def test_it_may_stand_in_some_layers_and_leave_the_head() -> None:
    model = model_of("vit")
    config = SparseAdapterConfig(num_experts=2, expert_size=3, layers=(1,), head=False)
    tensors = loud(model, config)
    assert {name.split(".adapter")[0] for name in tensors} == {"layers.1"}
    assert parameter_count(config, model) == 2 * (2 * 3 * 32 + 32)
    with attached(model, tensors, 1) as adapter, adapter.counting() as counter:
        logits(model, inputs(model))
        assert adapter.layers == (1,)
        assert counter.counts.sum().item() == 3 * 5
        assert {group.row for group in adapter.trainable_groups().experts} == {0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"layers": (1, 2, 7)}, r"names 2, 7, but this llama model has layers 0 to 1"),
        ("llama", {"head": True}, r"generates and has no head"),
        ("llama", {"num_experts": 4096, "expert_size": 65536}, r"GB of memory"),
    ],
)
def test_configs_that_do_not_fit_the_model_are_refused(name: str, options: Mapping[str, Any], message: str) -> None:
    model = FoundationModel(tiny_family_lm(name, hidden_size=64))
    with pytest.raises(ConfigError, match=message):
        fresh(model, SparseAdapterConfig(**options))


@pytest.mark.parametrize("layers", [(), (0, 0)])
def test_layers_are_named_once_and_there_is_one(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one layer, each once"):
        SparseAdapterConfig(layers=layers)


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_k_is_from_1_to_m(top_k: int) -> None:
    model = model_of()
    with (
        pytest.raises(ConfigError, match=rf"adapter_top_k {top_k} is impossible.*4 experts.*choose 1 to 4"),
        attached(model, fresh(model), top_k),
    ):
        pass


DOWN, UP, ROUTER = (f"layers.1.adapter.{part}" for part in ("experts.down_proj", "experts.up_proj", "router.weight"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.adapter.experts.up_prj": torch.zeros(1)}, r"up_prj' has no place.*did you mean"),
        ({"layers.9.adapter.router.weight": torch.zeros(4, 32)}, r"layers.9.* has no place.*0 to 1"),
        ({"head.wait": torch.zeros(5)}, r"head.wait' has no place"),
        ({DOWN: torch.zeros(4, 3, 31)}, r"shape \(4, 3, 31\); expected \(4, 3, 32\).*hidden size 32"),
        ({DOWN: torch.zeros(4, 2, 32)}, r"shape \(4, 2, 32\); expected \(4, 3, 32\)"),
        ({UP: torch.zeros(3, 32, 3)}, r"expected \(4, 32, 3\)"),
        ({ROUTER: torch.zeros(4, 32, dtype=torch.int64)}, r"router.weight' is torch.int64; expected one of"),
        ({ROUTER: None}, r"lacks 'layers.1.adapter.router.weight'"),
        ({UP: None}, r"lacks 'layers.1.adapter.experts.up_proj'"),
        ({DOWN: None}, r"lacks 'layers.1.adapter.experts.down_proj'"),
        ({"head.bias": None}, r"lacks 'head.bias'"),
        ({"head.weight": torch.zeros(4, 32)}, r"'head.weight' has shape \(4, 32\); expected \(5, 32\)"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(change: Mapping[str, torch.Tensor | None], message: str) -> None:
    model = model_of("vit")
    tensors: dict[str, torch.Tensor | None] = {**loud(model), **change}
    with pytest.raises(ModelError, match=message):
        check(model, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_weights_for_other_layers_or_experts_are_refused() -> None:
    model = model_of()
    wrong = Regulariser("heterogeneity", 0.1, torch.ones(3, 4))
    with (
        pytest.raises(ConfigError, match=r"\(3, 4\).*expected \(2, 4\)"),
        attached(model, fresh(model), 2, regulariser=wrong),
    ):
        pass


def test_tensors_are_copies_both_ways() -> None:
    model = model_of()
    tensors = loud(model)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with attached(model, tensors, 2) as adapter:
        taken = adapter.tensors()
        with torch.no_grad():
            for parameter in adapter.parameters.values():
                parameter.add_(1)
        assert isinstance(next(iter(adapter.parameters.values())), nn.Parameter)
    for name, tensor in before.items():
        assert torch.equal(tensors[name], tensor)
        assert torch.equal(taken[name], tensor)
