"""Server optimisers against scalars worked out number by number, and the identities between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from emberfed.errors import AggregationError
from emberfed.server_optimizer import ServerOptimizerConfig, step

NAMES = ("average", "fedavgm", "fedadam", "fedyogi")
STACKED, DENSE = "layers.0.experts.up_proj.lora_A", "layers.0.self_attn.q_proj.lora_B"


def config(name: str, **options: Any) -> ServerOptimizerConfig:
    return ServerOptimizerConfig.model_validate({"name": name, **options})


def adapter(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {STACKED: torch.randn(4, 2, 3, generator=draw), DENSE: torch.randn(3, 2, generator=draw)}


def scalars(how: ServerOptimizerConfig, means: list[float], start: float = 0.0) -> list[float]:
    """The server's value after each round, for one number."""
    x = {"layers.0.w": torch.tensor([start])}
    memory: dict[str, Tensor] = {}
    found = []
    for mean in means:
        x, memory = step(how, x, {"layers.0.w": torch.tensor([mean])}, memory, {})
        found.append(float(x["layers.0.w"]))
    return found


def test_average_by_hand() -> None:
    """Half way to each mean: 0 -> 1 (of 2), 1 -> 2 (of 3), 2 -> 0 (of -2)."""
    assert scalars(config("average", learning_rate=0.5), [2.0, 3.0, -2.0]) == [1.0, 2.0, 0.0]


def test_fedavgm_by_hand() -> None:
    """Momentum 0.5, rate 1. d = 1 - 0 = 1: m = 1, x = 1. d = 3 - 1 = 2: m = 0.5 + 2 = 2.5, x = 3.5.

    d = 3 - 3.5 = -0.5: m = 1.25 - 0.5 = 0.75, x = 4.25.
    """
    assert scalars(config("fedavgm", momentum=0.5), [1.0, 3.0, 3.0]) == [1.0, 3.5, 4.25]


def test_fedadam_by_hand() -> None:
    """b1 = b2 = 0.5, tau = 1, rate 2; m begins at 0, v at 1.

    1. d = 2: m = 1, v = 0.5 + 2 = 2.5, x = 2 x 1 / (sqrt 2.5 + 1).
    2. d = 2 again (the mean is x + 2): m = 0.5 + 1 = 1.5, v = 1.25 + 2 = 3.25, x grows by 2 x 1.5 / (sqrt 3.25 + 1).
    3. d = -1: m = 0.75 - 0.5 = 0.25, v = 1.625 + 0.5 = 2.125, x grows by 2 x 0.25 / (sqrt 2.125 + 1).
    """
    first = 2 / (math.sqrt(2.5) + 1)
    second = first + 3 / (math.sqrt(3.25) + 1)
    third = second + 0.5 / (math.sqrt(2.125) + 1)
    how = config("fedadam", momentum=0.5, beta_2=0.5, tau=1.0, learning_rate=2.0)
    assert scalars(how, [2.0, first + 2, second - 1]) == pytest.approx([first, second, third], rel=1e-6)


def test_fedyogi_by_hand() -> None:
    """b1 = b2 = 0.5, tau = 1, rate 2; m begins at 0, v at 1.

    1. d = 2, d^2 = 4 > v: m = 1, v = 1 + 0.5 x 4 = 3, x = 2 x 1 / (sqrt 3 + 1).
    2. d = 1, d^2 = 1 < v: m = 0.5 + 0.5 = 1, v = 3 - 0.5 = 2.5, x grows by 2 x 1 / (sqrt 2.5 + 1).
    3. d = -2, d^2 = 4 > v: m = 0.5 - 1 = -0.5, v = 2.5 + 2 = 4.5, x falls by 2 x 0.5 / (sqrt 4.5 + 1).
    """
    first = 2 / (math.sqrt(3) + 1)
    second = first + 2 / (math.sqrt(2.5) + 1)
    third = second - 1 / (math.sqrt(4.5) + 1)
    how = config("fedyogi", momentum=0.5, beta_2=0.5, tau=1.0, learning_rate=2.0)
    assert scalars(how, [2.0, first + 1, second - 2]) == pytest.approx([first, second, third], rel=1e-6)


def test_default_rates() -> None:
    assert [config(name).rate for name in NAMES] == [1.0, 1.0, 0.01, 0.01]
    assert [config(name, learning_rate=0.3).rate for name in NAMES] == [0.3] * 4


def test_the_memory_s_names_and_dtypes() -> None:
    before = {name: tensor.to(torch.bfloat16) for name, tensor in adapter(1).items()}
    mean = {name: tensor.to(torch.bfloat16) for name, tensor in adapter(2).items()}
    moments = {
        "average": [],
        "fedavgm": ["optimizer.first."],
        "fedadam": ["optimizer.first.", "optimizer.second."],
        "fedyogi": ["optimizer.first.", "optimizer.second."],
    }
    for name in NAMES:
        tensors, memory = step(config(name), before, mean, {}, {})
        assert list(tensors) == [STACKED, DENSE]
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert list(memory) == [prefix + tensor for prefix in moments[name] for tensor in (STACKED, DENSE)]
        assert all(tensor.dtype == torch.float32 for tensor in memory.values())


def test_plain_averaging_gives_the_mean_s_bits() -> None:
    before, mean = adapter(1), adapter(2)
    tensors, memory = step(ServerOptimizerConfig(), before, mean, {}, {})
    assert not memory
    for name, tensor in tensors.items():
        assert torch.equal(tensor, mean[name])
        arithmetic = before[name] + (mean[name] - before[name])
        assert not torch.equal(arithmetic, mean[name]), "an example where it matters"


@pytest.mark.parametrize("name", NAMES)
def test_untouched_experts_keep_their_bits_and_moments_and_others_do_not_notice(name: str) -> None:
    how = config(name)
    x, memory = step(how, adapter(1), adapter(2), {}, {})
    mean = adapter(3)
    untouched = torch.tensor([False, True, False, True])
    free, free_memory = step(how, x, mean, memory, {})
    held, held_memory = step(how, x, mean, memory, {STACKED: untouched})
    assert torch.equal(held[STACKED][untouched], x[STACKED][untouched])
    assert torch.equal(held[STACKED][~untouched], free[STACKED][~untouched])
    assert torch.equal(held[DENSE], free[DENSE])
    assert not torch.equal(free[STACKED][untouched], x[STACKED][untouched])
    for moment, tensor in held_memory.items():
        if moment.endswith(STACKED):
            assert torch.equal(tensor[untouched], memory[moment][untouched])
            assert torch.equal(tensor[~untouched], free_memory[moment][~untouched])
        else:
            assert torch.equal(tensor, free_memory[moment])


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_changed(name: str) -> None:
    how, before, mean = config(name), adapter(1), adapter(2)
    _, memory = step(how, before, mean, {}, {})
    inputs: list[Mapping[str, Tensor]] = [before, mean, memory, {STACKED: torch.tensor([True, False, False, True])}]
    copies = [{key: tensor.clone() for key, tensor in mapping.items()} for mapping in inputs]
    step(how, *inputs)
    for mapping, copy in zip(inputs, copies, strict=True):
        assert list(mapping) == list(copy)
        assert all(torch.equal(mapping[key], copy[key]) for key in copy)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_momentum_of_nothing_is_averaging(seed: int, other: int) -> None:
    before, mean = adapter(seed), adapter(other)
    tensors, _ = step(config("fedavgm", momentum=0.0), before, mean, {}, {})
    for name in mean:
        torch.testing.assert_close(tensors[name], mean[name], rtol=1e-6, atol=1e-6)


@given(st.integers(0, 1000), st.sampled_from(NAMES))
def test_the_order_of_names_does_not_matter(seed: int, name: str) -> None:
    def backwards(mapping: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(reversed(list(mapping.items())))

    how = config(name)
    x, memory = step(how, adapter(seed), adapter(seed + 1), {}, {})
    one = step(how, x, adapter(seed + 2), memory, {})
    other = step(how, backwards(x), backwards(adapter(seed + 2)), backwards(memory), {})
    for found, expected in zip(one, other, strict=True):
        assert list(found) == list(expected) == sorted(found)
        assert all(torch.equal(found[key], expected[key]) for key in found)


@given(st.integers(0, 1000), st.sampled_from(["fedadam", "fedyogi"]), st.floats(0.01, 100.0))
def test_adaptive_steps_do_not_depend_on_the_scale_of_updates(seed: int, name: str, scale: float) -> None:
    """x = 0 and all means, and tau, times s: moments scale with s and s^2, so the step stays the same."""
    zero = {key: torch.zeros_like(tensor) for key, tensor in adapter(seed).items()}
    mean = adapter(seed)
    plain, _ = step(config(name, tau=0.1), zero, mean, {}, {})
    times = {key: tensor * scale for key, tensor in mean.items()}
    scaled, _ = step(config(name, tau=0.1 * scale), zero, times, {}, {})
    for key in mean:
        torch.testing.assert_close(scaled[key], plain[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_no_update_is_no_step(name: str) -> None:
    before = adapter(1)
    tensors, _ = step(config(name), before, before, {}, {})
    assert all(torch.equal(tensors[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 0.5}, "momentum has no effect with name: average; .* set name: fedavgm or fedadam or fedyogi"),
        ({"name": "fedavgm", "tau": 0.1}, "tau has no effect with name: fedavgm"),
        ({"name": "fedavgm", "beta_2": 0.5}, "beta_2 has no effect .* set name: fedadam or fedyogi"),
        ({"name": "fedadam", "beta_2": 1.0}, "less than 1"),
        ({"learning_rate": 0.0}, "greater than 0"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServerOptimizerConfig.model_validate(options)


def test_tensors_that_do_not_match_are_refused() -> None:
    how, before, mean = config("fedavgm"), adapter(1), adapter(2)
    _, memory = step(how, before, mean, {}, {})
    with pytest.raises(AggregationError, match=f"the mean lacks '{DENSE}'"):
        step(how, before, {STACKED: mean[STACKED]}, {}, {})
    with pytest.raises(AggregationError, match=r"the memory holds 'optimizer.first.*adapter"):
        step(config("average"), before, mean, memory, {})
    with pytest.raises(AggregationError, match=r"the mean of '.*lora_B' has shape \(6,\), but \(3, 2\) was expected"):
        step(how, before, {**mean, DENSE: mean[DENSE].flatten()}, {}, {})
    with pytest.raises(AggregationError, match=r"mask of untouched experts of '.*lora_A' has shape \(3,\), but \(4,\)"):
        step(how, before, mean, {}, {STACKED: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(AggregationError, match="mask of untouched experts holds 'layers.9'"):
        step(how, before, mean, {}, {"layers.9": torch.ones(4, dtype=torch.bool)})
    stale = {**memory, f"optimizer.first.{DENSE}": torch.zeros(6)}
    with pytest.raises(AggregationError, match=r"the memory of 'optimizer.first.*lora_B' has shape \(6,\)"):
        step(how, before, mean, stale, {})


@pytest.mark.parametrize("tau", [1e-50, 1e20])
def test_a_tau_whose_square_float32_cannot_hold_is_refused(tau: float) -> None:
    with pytest.raises(ValidationError, match="tau"):
        ServerOptimizerConfig(name="fedadam", tau=tau)
