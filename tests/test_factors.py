"""Factors of different ranks against the products they stand for, formed in float64, and the methods' identities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emberfed import factors
from emberfed.factors import Pair

ALPHA = 16.0


def dense(pair: Pair) -> Tensor:
    """1 / R * B A in float64: what a pair adds to a weight, but for alpha."""
    return pair.b.double() @ pair.a.double() / pair.rank


def dense_mean(pairs: Sequence[Pair], weights: Tensor) -> Tensor:
    """Sum_c w_c / r_c * B_c A_c in float64, one client at a time."""
    total = torch.zeros_like(dense(pairs[0]))
    for pair, shares in zip(pairs, weights, strict=True):
        total += shares.double()[..., None, None] * dense(pair)
    return total


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tell 0.0 from -0.0."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


class World:
    """Pairs of some clients, their weights, and what they were before.

    Attributes:
        unused: Experts whose weights are all 0, bool (E,); a single False where there are no experts.
    """

    def __init__(
        self, ranks: Sequence[int], rank: int, size: tuple[int, int], experts: int | None, per_expert: bool, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        stack = () if experts is None else (experts,)
        inputs, outputs = size

        def pair(rank: int) -> Pair:
            a = torch.randn(*stack, rank, inputs, generator=generator)
            return Pair(a, torch.randn(*stack, outputs, rank, generator=generator))

        self.pairs = [pair(rank) for rank in ranks]
        self.previous = pair(rank)
        weighed = stack if per_expert else ()
        raw = torch.rand(len(ranks), *weighed, generator=generator, dtype=torch.float64) + 0.1
        self.unused = torch.rand(weighed, generator=generator) < (0.3 if per_expert else 0)
        self.weights = raw / raw.sum(dim=0) * ~self.unused

    @property
    def total_rank(self) -> int:
        return sum(pair.rank for pair in self.pairs)

    def copies(self) -> list[Tensor]:
        return [tensor.clone() for pair in (*self.pairs, self.previous) for tensor in pair] + [self.weights.clone()]


@st.composite
def worlds(draw: st.DrawFn, largest: int = 6) -> World:
    """One to five clients with and without experts; sizes around the ranks, so that some of them are equal."""
    ranks = draw(st.lists(st.integers(1, largest), min_size=1, max_size=5))
    rank = draw(st.integers(max(ranks), largest + 2))
    sizes = st.sampled_from([1, 2, max(ranks), rank, 9, 30])
    experts = draw(st.sampled_from([None, 1, 3]))
    per_expert = experts is not None and draw(st.booleans())
    return World(ranks, rank, (draw(sizes), draw(sizes)), experts, per_expert, draw(st.integers(0, 2**30)))


def close(found: Tensor, expected: Tensor) -> None:
    """Compare to what float32 can hold of numbers of this size."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


# Products ----------------------------------------------------------------------------------------------------------


@given(worlds(), st.integers(1, 6))
def test_a_cut_is_the_first_components_at_their_old_share(world: World, wanted: int) -> None:
    pair = world.previous
    rank = min(wanted, pair.rank)
    components = [pair.b[..., :, i : i + 1].double() @ pair.a[..., i : i + 1, :].double() for i in range(rank)]
    expected = torch.stack(components).sum(dim=0) / pair.rank
    found = factors.cut(pair, rank)
    assert found.rank == rank == found.b.shape[-1]
    close(dense(found), expected)


@given(worlds())
def test_norms_are_those_of_the_products(world: World) -> None:
    for pair in world.pairs:
        found = factors.update_norm(pair)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, dense(pair).flatten(-2).norm(dim=-1), rtol=1e-4, atol=1e-5)


@given(worlds())
def test_a_padded_mean_is_a_slow_loop(world: World) -> None:
    found = factors.padded_mean(iter(world.pairs), world.weights, world.previous)
    rank, shape = world.previous.rank, world.previous.a.shape[:-2]
    weights = world.weights if world.weights.dim() > 1 else world.weights[:, None].expand(-1, *shape[:1] or (1,))
    a, b = (tensor.double().clone().reshape(-1, *tensor.shape[-2:]) for tensor in world.previous)
    for expert in range(a.shape[0]):
        for component in range(rank):
            if not any(w[expert] > 0 and pair.rank > component for w, pair in zip(weights, world.pairs, strict=True)):
                continue
            a[expert, component] = 0
            b[expert, :, component] = 0
            for w, pair in zip(weights, world.pairs, strict=True):
                if pair.rank > component:
                    row = pair.a.reshape(-1, *pair.a.shape[-2:])[expert, component].double()
                    column = pair.b.reshape(-1, *pair.b.shape[-2:])[expert, :, component].double()
                    a[expert, component] += w[expert] * row
                    b[expert, :, component] += w[expert] * column * rank / pair.rank
    close(found.a, a.reshape(found.a.shape))
    close(found.b, b.reshape(found.b.shape))


@given(worlds())
def test_a_stack_is_the_mean_of_the_products(world: World) -> None:
    """Whatever the sizes: a hidden size that equals a rank changes nothing."""
    found = factors.stacked(world.pairs, world.weights)
    assert found.rank == world.total_rank == found.b.shape[-1]
    close(found.b.double() @ found.a.double(), dense_mean(world.pairs, world.weights))


@given(worlds())
def test_principal_components_of_all_ranks_are_the_mean_of_the_products(world: World) -> None:
    shape_a, shape_b = list(world.previous.a.shape), list(world.previous.b.shape)
    shape_a[-2] = shape_b[-1] = world.total_rank
    found = factors.principal(world.pairs, world.weights, Pair(torch.zeros(shape_a), torch.zeros(shape_b)))
    assert found.rank == world.total_rank == found.b.shape[-1]
    close(dense(found), dense_mean(world.pairs, world.weights))


@given(worlds())
def test_the_error_of_fewer_principal_components_is_eckart_youngs(world: World) -> None:
    """The squared error is the sum of the squared singular values that are left out: no pair of that rank is better."""
    expected = dense_mean(world.pairs, world.weights)
    dropped = torch.linalg.svdvals(expected)[..., world.previous.rank :].square().sum(dim=-1)
    found = factors.principal(world.pairs, world.weights, world.previous)
    errors = (dense(found) - expected).square().sum(dim=(-2, -1))
    size = expected.square().sum(dim=(-2, -1)).max()
    used = ~world.unused
    torch.testing.assert_close(
        errors.expand(used.shape)[used] if used.dim() else errors,
        dropped.expand(used.shape)[used] if used.dim() else dropped,
        rtol=1e-4,
        atol=1e-6 * max(1.0, float(size)),
    )


@given(worlds(), st.integers(1, 6))
def test_cuts_of_principal_components_are_the_best_of_their_rank(world: World, wanted: int) -> None:
    """So one SVD serves clients of every rank."""
    found = factors.principal(world.pairs, torch.where(world.weights > 0, world.weights, 1.0), world.previous)
    rank = min(wanted, found.rank)
    u, s, vh = torch.linalg.svd(dense(found), full_matrices=False)
    best = (u * s[..., None, :])[..., :rank] @ vh[..., :rank, :]
    gap = s[..., rank - 1 : rank + 1].diff(dim=-1).abs().min() if s.shape[-1] > rank else torch.tensor(1.0)
    if gap > 1e-2:  # equal singular values have no best components
        torch.testing.assert_close(dense(factors.cut(found, rank)), best, rtol=1e-3, atol=1e-3)


# Identities --------------------------------------------------------------------------------------------------------


def test_ranks_4_8_and_16_with_alpha_16_have_scales_4_2_and_1() -> None:
    """Every client's product has a single 1, so with shares 1/2, 1/4, 1/4 it is 4/2 + 2/4 + 1/4 = 2.75 there.

    A is the same everywhere, so that the mean of the factors (HetLoRA) is the mean of the products too.
    """
    pairs = []
    for rank in (4, 8, 16):
        a, b = torch.zeros(rank, 5), torch.zeros(3, rank)
        a[0, 0] = b[0, 0] = 1
        pairs.append(Pair(a, b))
    assert [float(ALPHA * dense(pair)[0, 0]) for pair in pairs] == [4, 2, 1]
    weights = torch.tensor([0.5, 0.25, 0.25])
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[0, 0] = 2.75
    previous = Pair(torch.zeros(16, 5), torch.zeros(3, 16))
    stack = factors.stacked(pairs, weights)
    assert torch.equal(ALPHA * stack.b.double() @ stack.a.double(), expected)
    assert torch.equal(ALPHA * dense(factors.padded_mean(pairs, weights, previous)), expected)
    close(ALPHA * dense(factors.principal(pairs, weights, previous)), expected)


@given(worlds())
def test_one_client_alone_gets_its_own_update(world: World) -> None:
    """Up to the product, and for the padded mean of its own rank bit by bit."""
    pair, one = world.pairs[0], torch.ones(1)
    expected = dense(pair)
    stack = factors.stacked([pair], one)
    close(stack.b.double() @ stack.a.double(), expected)
    zeros = Pair(torch.zeros_like(world.previous.a), torch.zeros_like(world.previous.b))
    close(dense(factors.padded_mean([pair], one, zeros)), expected)
    close(dense(factors.principal([pair], one, world.previous)), expected)
    same = factors.padded_mean([pair], one, Pair(torch.zeros_like(pair.a), torch.zeros_like(pair.b)))
    assert torch.equal(same.a, pair.a)
    assert torch.equal(same.b, pair.b)


@given(worlds())
def test_what_nobody_trained_keeps_its_bits(world: World) -> None:
    """Experts without a weight, and components above the ranks of all who have one."""
    before = Pair(torch.where(world.previous.a > 1, -0.0, world.previous.a), world.previous.b)
    mean = factors.padded_mean(world.pairs, world.weights, before)
    best = factors.principal(world.pairs, world.weights, before)
    if world.unused.dim():
        for found in (mean, best):
            assert same_bits(found.a[world.unused], before.a[world.unused])
            assert same_bits(found.b[world.unused], before.b[world.unused])
        empty = factors.stacked(world.pairs, world.weights)
        assert not bool((empty.b @ empty.a)[world.unused].any())
    reached = max(pair.rank for pair in world.pairs)
    assert same_bits(mean.a[..., reached:, :], before.a[..., reached:, :])
    assert same_bits(mean.b[..., reached:], before.b[..., reached:])


def test_a_component_of_a_client_without_weight_counts_as_untrained() -> None:
    """Client 2 has rank 3 and weight 0: components 2 and 3 are as before, component 1 is client 1's (B times 3 / 1)."""
    one = Pair(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]))
    other = Pair(torch.full((3, 2), 9.0), torch.full((2, 3), 9.0))
    before = Pair(torch.full((3, 2), 5.0), torch.full((2, 3), 6.0))
    found = factors.padded_mean([one, other], torch.tensor([1.0, 0.0]), before)
    assert found.a.tolist() == [[1, 2], [5, 5], [5, 5]]
    assert found.b.tolist() == [[9, 6, 6], [12, 6, 6]]


@given(worlds())
def test_components_that_the_mean_does_not_have_begin_anew(world: World) -> None:
    """A from before, B zero, so that they change nothing and can be trained."""
    found = factors.principal(world.pairs, torch.where(world.weights > 0, world.weights, 1.0), world.previous)
    outputs, inputs = dense(found).shape[-2:]
    known = min(world.total_rank, inputs, outputs, found.rank)
    assert torch.equal(found.a[..., known:, :], world.previous.a[..., known:, :])
    assert not bool(found.b[..., known:].any())
    gram = found.a[..., :known, :].double() @ found.a[..., :known, :].double().mT
    close(gram, torch.eye(known, dtype=torch.float64).expand(gram.shape))


RULES: dict[str, Callable[[World], object]] = {
    "cut": lambda world: factors.cut(world.previous, 1),
    "update_norm": lambda world: factors.update_norm(world.previous),
    "padded_mean": lambda world: factors.padded_mean(world.pairs, world.weights, world.previous),
    "principal": lambda world: factors.principal(world.pairs, world.weights, world.previous),
    "stacked": lambda world: factors.stacked(world.pairs, world.weights),
}


@pytest.mark.parametrize("rule", RULES)
def test_inputs_stay_as_they_were_and_results_are_their_own(rule: str) -> None:
    world = World([2, 4, 3], 4, (6, 5), 3, True, 1)
    before = world.copies()
    result = RULES[rule](world)
    if isinstance(result, Pair):
        for tensor in result:
            tensor.fill_(7.0)
    assert all(torch.equal(one, other) for one, other in zip(before, world.copies(), strict=True))


MEANS = pytest.mark.parametrize("rule", [factors.padded_mean, factors.principal])


@MEANS
def test_half_precision_is_kept_and_summed_in_single(rule: Callable[[list[Pair], Tensor, Pair], Pair]) -> None:
    """1/2 * 2 + 1/4 * 2^-6 + 1/4 * 2^-6 = 1 + 2^-7; in bfloat16 each addition of 2^-8 to 1 would be rounded away."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    pairs = [Pair(one, value * one) for value in (2, 2**-6, 2**-6)]
    found = rule(pairs, torch.tensor([0.5, 0.25, 0.25]), Pair(one, one))
    assert found.a.dtype == found.b.dtype == torch.bfloat16
    assert float(dense(found)) == 1 + 2**-7


@MEANS
def test_shares_are_not_rounded_to_half_precision(rule: Callable[[list[Pair], Tensor, Pair], Pair]) -> None:
    """Three thirds are 1; in bfloat16 a third is 0.333984375, three of them 1.00195."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    single = torch.ones(1, 1)
    found = rule([Pair(one, one)] * 3, torch.full((3,), 1 / 3), Pair(single, single))
    torch.testing.assert_close(dense(found), torch.ones(1, 1, dtype=torch.float64), rtol=1e-6, atol=0)
