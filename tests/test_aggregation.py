"""Aggregation against slow loops, identities, and examples worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emberfed import aggregation
from emberfed.aggregation import FREQUENCIES, Frequency, Update, Weights, lora_factor
from emberfed.errors import AggregationError


def slow_weights(
    examples: list[int], counts: Tensor, tokens: list[int], top_k: list[int], rule: str, temperature: float
) -> list[list[list[float]]]:
    """The printed formula, one number at a time: weights[c][l][e]."""
    clients, layers, experts = counts.shape
    weights = [[[0.0] * experts for _ in range(layers)] for _ in range(clients)]
    for layer in range(layers):
        for expert in range(experts):
            raw = []
            for c in range(clients):
                a = float(counts[c, layer, expert])
                everything = float(counts[c, layer].sum())
                if rule == "per_token":
                    f = a / tokens[c]
                elif everything == 0:
                    f = 0.0
                else:
                    f = a / everything / (top_k[c] if rule == "per_activation_over_k" else 1)
                raw.append(examples[c] / sum(examples) * f**temperature)
            if float(counts[:, layer, expert].sum()) > 0:
                for c in range(clients):
                    weights[c][layer][expert] = raw[c] / sum(raw)
    return weights


@st.composite
def federations(draw: st.DrawFn) -> tuple[list[int], Tensor, list[int], list[int]]:
    clients, layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    counts = draw(
        st.lists(st.integers(0, 50), min_size=clients * layers * experts, max_size=clients * layers * experts)
    )
    numbers = st.lists(st.integers(1, 300), min_size=clients, max_size=clients)
    top_k = draw(st.lists(st.integers(1, 8), min_size=clients, max_size=clients))
    return draw(numbers), torch.tensor(counts).view(clients, layers, experts), draw(numbers), top_k


@given(federations(), st.sampled_from(FREQUENCIES), st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0, 8.0]))
def test_weights_are_the_printed_formula(
    federation: tuple[list[int], Tensor, list[int], list[int]], rule: Frequency, temperature: float
) -> None:
    examples, counts, tokens, top_k = federation
    shares = aggregation.data_weights(torch.tensor(examples))
    frequency = aggregation.activation_frequency(counts, torch.tensor(tokens), torch.tensor(top_k), rule)
    weights = aggregation.expert_weights(shares, frequency, temperature)
    expected = torch.tensor(slow_weights(examples, counts, tokens, top_k, rule, temperature), dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@given(federations(), st.sampled_from(FREQUENCIES), st.floats(0, 50))
def test_weights_of_a_used_expert_sum_to_one_and_of_an_unused_one_to_zero(
    federation: tuple[list[int], Tensor, list[int], list[int]], rule: Frequency, temperature: float
) -> None:
    examples, counts, tokens, top_k = federation
    shares = aggregation.data_weights(torch.tensor(examples))
    frequency = aggregation.activation_frequency(counts, torch.tensor(tokens), torch.tensor(top_k), rule)
    total = aggregation.expert_weights(shares, frequency, temperature).sum(dim=0)
    used = counts.sum(dim=0) > 0
    torch.testing.assert_close(total[used], torch.ones_like(total[used]), rtol=1e-12, atol=0)
    assert bool((total[~used] == 0).all())


@given(federations(), st.sampled_from(FREQUENCIES))
def test_temperature_zero_is_data_size_averaging(
    federation: tuple[list[int], Tensor, list[int], list[int]], rule: Frequency
) -> None:
    examples, counts, tokens, top_k = federation
    shares = aggregation.data_weights(torch.tensor(examples))
    frequency = aggregation.activation_frequency(counts, torch.tensor(tokens), torch.tensor(top_k), rule)
    weights = aggregation.expert_weights(shares, frequency, 0.0)
    used = counts.sum(dim=0) > 0
    torch.testing.assert_close(weights[:, used], shares[:, None].expand(-1, int(used.sum())))


def test_hand_computed_example() -> None:
    """Two clients, 30 and 10 examples, K = 1 and 2; expert 0 used 6 of 8 times and 4 of 16 times.

    per_activation: f = 0.75, 0.25; gamma 2: 0.75 * 0.5625 = 0.421875 and 0.25 * 0.0625 = 0.015625, so 27/28 and 1/28.
    per_activation_over_k halves the second f: 0.421875 and 0.00390625, so 108/109 and 1/109.
    per_token with n = 8, 8: f = 0.75, 0.5: 0.421875 and 0.0625, so 27/31 and 4/31.
    """
    counts = torch.tensor([[[6, 2]], [[4, 12]]])
    shares = aggregation.data_weights(torch.tensor([30, 10]))
    assert shares.tolist() == [0.75, 0.25]
    expected: dict[Frequency, list[float]] = {
        "per_activation": [27 / 28, 1 / 28],
        "per_activation_over_k": [108 / 109, 1 / 109],
        "per_token": [27 / 31, 4 / 31],
    }
    for rule, weights in expected.items():
        frequency = aggregation.activation_frequency(counts, torch.tensor([8, 8]), torch.tensor([1, 2]), rule)
        found = aggregation.expert_weights(shares, frequency, 2.0)[:, 0, 0]
        torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64))


def test_small_frequencies_to_a_high_power_do_not_vanish() -> None:
    frequency = torch.tensor([1e-30, 2e-30], dtype=torch.float64).view(2, 1, 1)
    weights = aggregation.expert_weights(torch.tensor([0.5, 0.5]), frequency, 16.0)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert weights[1, 0, 0] > 0.99998


def test_data_weights_refuse_empty_clients() -> None:
    with pytest.raises(ValueError, match="positive"):
        aggregation.data_weights(torch.tensor([3, 0]))


@given(st.integers(1, 5), st.integers(0, 2**30))
def test_means_are_slow_loops(clients: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(clients, 3, 2, 4, generator=generator)
    weights_CE = torch.rand(clients, 3, generator=generator, dtype=torch.float64)
    previous = torch.randn(3, 2, 4, generator=generator)
    found = aggregation.mean_per_expert(previous, iter(tensors), weights_CE)
    dense = aggregation.mean(iter(tensors), weights_CE[:, 0])
    for expert in range(3):
        slow = sum(tensors[c, expert].double() * weights_CE[c, expert] for c in range(clients))
        assert isinstance(slow, Tensor)
        torch.testing.assert_close(found[expert].double(), slow, rtol=1e-5, atol=1e-5)
    slow = sum(tensors[c].double() * weights_CE[c, 0] for c in range(clients))
    assert isinstance(slow, Tensor)
    torch.testing.assert_close(dense.double(), slow, rtol=1e-5, atol=1e-5)


def test_an_unused_expert_keeps_its_bits_and_one_client_gives_its_own() -> None:
    previous = torch.tensor([[0.1, -0.0], [1e-45, 0.3]])
    update = torch.tensor([[0.7, 0.2], [0.5, 0.6]])
    found = aggregation.mean_per_expert(previous, [update], torch.tensor([[1.0, 0.0]]))
    assert found.view(torch.int32).tolist() == torch.stack([update[0], previous[1]]).view(torch.int32).tolist()
    assert torch.equal(aggregation.mean([update], torch.tensor([1.0])), update)


def test_inputs_stay_as_they_were_and_half_precision_is_summed_in_fp32() -> None:
    tensors = [torch.full((1, 2), value, dtype=torch.bfloat16) for value in (1.0, 2**-8, 2**-8)]
    copies = [tensor.clone() for tensor in tensors]
    previous = torch.zeros(1, 2, dtype=torch.bfloat16)
    result = aggregation.mean(tensors, torch.ones(3))
    stacked = aggregation.mean_per_expert(previous, tensors, torch.ones(3, 1))
    # 1 + 2^-8 + 2^-8 = 1 + 2^-7 in fp32; in bf16 each addition of 2^-8 to 1 would be rounded away.
    assert result.dtype == torch.bfloat16
    assert set(result.float().flatten().tolist()) == set(stacked.float().flatten().tolist()) == {1 + 2**-7}
    assert all(torch.equal(one, other) for one, other in zip(tensors, copies, strict=True))
    assert not bool(previous.any())


def test_means_refuse_nothing_and_uneven_input() -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        aggregation.mean([], torch.tensor([]))
    with pytest.raises(ValueError, match="zip"):
        aggregation.mean([torch.ones(2)], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("name", "partner"),
    [
        ("layers.0.q.lora_A", "layers.0.q.lora_B"),
        ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
        ("q.lora_A.default.weight", "q.lora_B.default.weight"),
        ("q.lora_A.my-adapter.weight", "q.lora_B.my-adapter.weight"),
        ("q.lora_A.v1.2.weight", "q.lora_B.v1.2.weight"),
        ("embed.lora_embedding_A", "embed.lora_embedding_B"),
        ("embed.lora_embedding_A.default", "embed.lora_embedding_B.default"),
        ("lora_A", "lora_B"),
        ("outer.lora_A.inner.lora_B.x.lora_A", "outer.lora_A.inner.lora_B.x.lora_B"),
    ],
)
def test_factors_are_told_by_name_and_have_one_partner(name: str, partner: str) -> None:
    assert lora_factor(name) == ("A", partner)
    assert lora_factor(partner) == ("B", name)


@pytest.mark.parametrize(
    "name",
    [
        "q.lora_B.bias",
        "q.lora_B.default.bias",
        "q.lora_magnitude_vector",
        "q.weight",
        "q.lora_AB",
        "xlora_A",
        "lora",
        "",
    ],
)
def test_other_tensors_are_no_factors(name: str) -> None:
    assert lora_factor(name) is None


def test_an_expert_nobody_used_is_kept_or_averaged() -> None:
    """Two clients of equal size; expert 0 is used by both, expert 1 by nobody."""
    updates = [Update(client, {}, 5, activations={"layers.0": torch.tensor([3, 0])}) for client in ("a", "b")]
    kept, averaged = Weights(updates), Weights(updates, unused="average")
    assert kept.of("layers.0.up").tolist() == [[0.5, 0.0], [0.5, 0.0]]
    assert averaged.of("layers.0.up").tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert kept.of("layers.00.up").tolist() == kept.of("elsewhere").tolist() == [0.5, 0.5]
    used = kept.used("layers.0.up")
    assert used is not None
    assert used.tolist() == [True, False]
    assert kept.used("elsewhere") is None


# ------------------------------------------------------------------------------------------------ partial stacks


@st.composite
def partial_stacks(draw: st.DrawFn) -> tuple[Tensor, list[tuple[int, ...]], list[int], list[Tensor]]:
    """Previous experts (E, 2, 3), and of each client: which experts it has, its examples, their tensors."""
    experts = draw(st.integers(1, 5))
    held = draw(st.lists(st.sets(st.integers(0, experts - 1)).map(lambda ids: tuple(sorted(ids))), max_size=4))
    weights = draw(st.lists(st.integers(1, 300), min_size=len(held), max_size=len(held)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = [torch.randn(len(ids), 2, 3, generator=generator) for ids in held]
    return torch.randn(experts, 2, 3, generator=generator), held, weights, tensors


@given(partial_stacks())
def test_an_expert_is_the_mean_of_those_who_hold_it(
    stacks: tuple[Tensor, list[tuple[int, ...]], list[int], list[Tensor]],
) -> None:
    """One expert at a time, in float64; one that nobody holds keeps its bits, one of one client is that client's."""
    previous, held, weights, tensors = stacks
    before = [previous.clone(), *(tensor.clone() for tensor in tensors)]
    result = aggregation.mean_of_holders(previous, held, torch.tensor(weights), iter(tensors))
    for expert in range(len(previous)):
        holders = [
            (weight, tensor[ids.index(expert)])
            for ids, weight, tensor in zip(held, weights, tensors, strict=True)
            if expert in ids
        ]
        if len(holders) < 2:
            assert torch.equal(result[expert], holders[0][1] if holders else previous[expert])
            continue
        total = sum(weight for weight, _ in holders)
        slow = torch.stack([weight * tensor.double() for weight, tensor in holders]).sum(dim=0) / total
        torch.testing.assert_close(result[expert].double(), slow, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(before, [previous, *tensors], strict=True)), "inputs are left as found"


@given(partial_stacks())
def test_whole_stacks_are_averaged_as_whole_stacks_are(
    stacks: tuple[Tensor, list[tuple[int, ...]], list[int], list[Tensor]],
) -> None:
    previous, held, weights, _ = stacks
    everybody = [tuple(range(len(previous)))] * len(held)
    tensors = [previous * (index + 1) for index in range(len(held))]
    result = aggregation.mean_of_holders(previous, everybody, torch.tensor(weights), tensors)
    if held:
        shares_CE = aggregation.data_weights(torch.tensor(weights))[:, None].expand(-1, len(previous))
        assert torch.equal(result, aggregation.mean_per_expert(previous, tensors, shares_CE))
    else:
        assert torch.equal(result, previous)


def test_holders_in_bfloat16_are_summed_in_float32() -> None:
    """256 + 1 is 256 in bfloat16, so a sum in it would lose each 1; in float32 the mean of 256, 1 and 1 is 86."""
    tensors = [torch.tensor([[value]], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    previous = torch.zeros(2, 1, dtype=torch.bfloat16)
    result = aggregation.mean_of_holders(previous, [(1,)] * 3, torch.ones(3), tensors)
    assert result.dtype == torch.bfloat16
    assert result.tolist() == [[0.0], [86.0]]


@pytest.mark.parametrize(
    ("held", "weight", "shape", "message"),
    [
        ((1, 0), 1.0, (2, 3), r"update 0 is of experts \[1, 0\]; ids must ascend within 0..3"),
        ((1, 1), 1.0, (2, 3), r"experts \[1, 1\]"),
        ((2, 4), 1.0, (2, 3), r"experts \[2, 4\]"),
        ((-1, 2), 1.0, (2, 3), r"experts \[-1, 2\]"),
        ((1, 2), 0.0, (2, 3), r"update 0 has weight 0"),
        ((1, 2), float("nan"), (2, 3), r"update 0 has weight nan"),
        ((1, 2), 1.0, (3, 3), r"update 0 has shape \(3, 3\); expected \(2, 3\)"),
        ((1, 2), 1.0, (2, 2), r"update 0 has shape \(2, 2\); expected \(2, 3\)"),
    ],
)
def test_partial_stacks_that_do_not_fit_are_refused(
    held: tuple[int, ...], weight: float, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(AggregationError, match=message):
        aggregation.mean_of_holders(torch.zeros(4, 3), [held], torch.tensor([weight]), [torch.zeros(shape)])
