"""Merging experts: budgets per layer, features, clusters, weights, plans."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from builders import tiny_model, token_ids
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from emberfed.errors import ConfigError
from emberfed.models.compact import compacted
from emberfed.models.expert_merging import (
    BudgetRule,
    WeightRule,
    cluster,
    clusters_of,
    gram,
    join,
    layer_budgets,
    least_error_plan,
    merge_weights,
    output_error,
    plan,
    principal_features,
)
from emberfed.models.expert_values import ExpertMatrices, ExpertValues


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- budgets ---


def frequencies(*deviations: float) -> torch.Tensor:
    """Two experts per layer with frequencies 0.5 - d and 0.5 + d: variance d squared."""
    return torch.tensor([[0.5 - d, 0.5 + d] for d in deviations], dtype=torch.float64)


def test_adaptive_budgets_by_hand() -> None:
    """L = 3, d = 0.1, 0.2, 0.1, so v = 0.01, 0.04, 0.01 and b = 3 / 0.01, 2 / 0.04, 1 / 0.01 = 300, 50, 100.

    Of 18: 12, 2, 4. Of 20: 13.33, 2.22, 4.44, rounded down 13, 2, 4; the one left goes to the largest remainder, 0.44.
    """
    frequency = frequencies(0.1, 0.2, 0.1)
    assert layer_budgets(18, frequency, [64] * 3) == (12, 2, 4)
    assert layer_budgets(20, frequency, [64] * 3) == (13, 2, 5)


def test_what_a_full_layer_cannot_take_goes_to_the_others_in_proportion() -> None:
    """b = 300, 50, 100 again; of 18 with at most 6 in the first layer, 12 are left for b = 50, 100: 4 and 8."""
    assert layer_budgets(18, frequencies(0.1, 0.2, 0.1), [6, 64, 64]) == (6, 4, 8)


def test_each_layer_gets_one_even_where_its_share_is_less() -> None:
    """b = 3, 2, 1 / 100 of that: of 5 the last layer's share is far below 1, and 4 are left for 3 : 2: 2.4, 1.6."""
    frequency = frequencies(0.05, 0.05, 0.5)
    assert layer_budgets(5, frequency, [64] * 3) == (2, 2, 1)


def test_variances_are_floored_where_experts_are_used_evenly() -> None:
    """Exactly even layers differ by depth alone: b in the proportion 2 : 1. So do those less uneven than the floor."""
    assert layer_budgets(12, frequencies(0.0, 0.0), [64] * 2) == (8, 4)
    assert layer_budgets(12, frequencies(0.0, 0.049), [64] * 2) == (8, 4)
    assert layer_budgets(12, frequencies(0.0, 0.1), [64] * 2) == (11, 1)  # b = 2 / 0.0025 and 1 / 0.01: 8 : 1


def test_other_rules() -> None:
    frequency = frequencies(0.1, 0.2, 0.1)
    assert layer_budgets(11, frequency, [64] * 3, "uniform") == (4, 4, 3)
    assert layer_budgets(11, frequency, [2, 64, 0], "uniform") == (2, 9, 0)
    assert layer_budgets(11, frequency, [64, 64, 0], "one") == (1, 1, 0)
    assert layer_budgets(0, frequency, [0, 0, 0]) == (0, 0, 0)


@st.composite
def budget_questions(draw: st.DrawFn) -> tuple[int, torch.Tensor, list[int]]:
    layers, experts = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    limits = draw(st.lists(st.integers(0, experts), min_size=layers, max_size=layers))
    counts = draw(
        st.lists(
            st.lists(st.integers(0, 1000), min_size=experts, max_size=experts).filter(any),
            min_size=layers,
            max_size=layers,
        )
    )
    total = draw(st.integers(sum(limit > 0 for limit in limits), sum(limits)))
    return total, torch.tensor(counts) / 1000, limits


@given(budget_questions(), st.sampled_from(["adaptive", "uniform"]))
def test_budgets_sum_to_the_total_and_keep_their_bounds(
    question: tuple[int, torch.Tensor, list[int]], rule: BudgetRule
) -> None:
    total, frequency, limits = question
    budgets = layer_budgets(total, frequency, limits, rule)
    assert sum(budgets) == total
    assert all(min(1, limit) <= budget <= limit for budget, limit in zip(budgets, limits, strict=True))


@given(budget_questions())
def test_budgets_are_within_one_of_the_exact_shares(question: tuple[int, torch.Tensor, list[int]]) -> None:
    """The oracle finds by bisection the scale s at which min(limit, max(1, s b)) sum to the total."""
    total, frequency, limits = question
    layers = len(limits)
    ratios = []
    for number, row in enumerate(frequency.double()):
        mean = float(row.mean())
        variance = sum((float(value) - mean) ** 2 for value in row) / len(row)
        ratios.append((layers - number) / max(variance, (0.1 * mean) ** 2))

    def shares(scale: float) -> list[float]:
        return [min(limit, max(1, scale * ratio)) if limit else 0 for ratio, limit in zip(ratios, limits, strict=True)]

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < total else (low, middle)
    budgets = layer_budgets(total, frequency, limits)
    assert all(abs(budget - share) < 1 + 1e-6 for budget, share in zip(budgets, shares(high), strict=True))


def test_impossible_budgets_are_refused() -> None:
    frequency = frequencies(0.1, 0.2)
    with pytest.raises(ConfigError, match="1 merged experts are too few: 2 layers"):
        layer_budgets(1, frequency, [4, 4])
    with pytest.raises(ConfigError, match="9 merged experts are too many: only 8"):
        layer_budgets(9, frequency, [4, 4])
    with pytest.raises(ConfigError, match="no tokens"):
        layer_budgets(4, torch.zeros(2, 4), [4, 4])
    with pytest.raises(ConfigError, match="not negative"):
        layer_budgets(4, torch.tensor([[0.5, float("nan")]]), [4])


# --- weights ---


def test_merge_weights() -> None:
    frequency, attention = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.2, 0.8]])
    assert merge_weights(frequency, attention)[0].tolist() == pytest.approx([0.1, 0.2])
    assert merge_weights(frequency, None, "frequency").tolist() == [[0.5, 0.25]]
    assert merge_weights(frequency, None, "uniform").tolist() == [[1.0, 1.0]]
    with pytest.raises(ConfigError, match="use frequency"):
        merge_weights(frequency, None)
    with pytest.raises(ConfigError, match="attention of experts must be finite"):
        merge_weights(frequency, -attention)


def test_an_unused_expert_is_a_member_that_weighs_nothing() -> None:
    """Experts 0, 2, 4 in one cluster with weights 3, 1, 0; experts 1 and 5 in another with none; 3 is in none."""
    found = clusters_of(torch.tensor([7, 2, 7, -1, 7, 2]), torch.tensor([3.0, 0.0, 1.0, 9.0, 0.0, 0.0]))
    assert [member.members for member in found] == [(0, 2, 4), (1, 5)]
    assert [member.weights for member in found] == [(0.75, 0.25, 0.0), (0.5, 0.5)]


# --- features ---


def matrices(experts: int, seed: int = 0) -> list[ExpertMatrices]:
    gate_up, down = drawn(experts, 5, 6, seed=seed).float(), drawn(experts, 3, 5, seed=seed + 1).float()
    return [ExpertMatrices(gate_up[e], down[e].clone(), None, None) for e in range(experts)]


def flat(experts: list[ExpertMatrices]) -> torch.Tensor:
    return torch.stack([torch.cat([e.gate_up_D2F.flatten(), e.down_FD.flatten()]) for e in experts]).double()


@pytest.mark.parametrize("held", [7, 20, 6, 4, 3, 2])
def test_inner_products_in_blocks(held: int) -> None:
    experts = matrices(7)
    rows = flat(experts)
    assert torch.allclose(gram(experts.__getitem__, 7, held), rows @ rows.T, rtol=1e-5, atol=1e-5)


def test_inner_products_over_several_chunks() -> None:
    """Longer than one chunk, and not a multiple of it; ones, so that every product is the number of parameters."""
    experts = [ExpertMatrices(torch.ones(300, 200), torch.ones(100, 70), None, None)] * 2
    assert gram(experts.__getitem__, 2, 2).tolist() == [[67_000.0] * 2] * 2


def test_inner_products_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="only 1 may be"):
        gram(matrices(3).__getitem__, 3, 1)
    broken = ExpertMatrices(torch.full((2, 4), torch.inf), torch.ones(2, 2), None, None)
    with pytest.raises(ConfigError, match="not finite"):
        gram(lambda _: broken, 2, 2)


def test_features_are_those_of_scikit_learn() -> None:
    rows = flat(matrices(9))
    found = principal_features(rows @ rows.T, 5)
    expected = torch.from_numpy(PCA(5, svd_solver="full").fit_transform(rows.numpy()))
    assert torch.allclose(found.abs(), expected.abs(), atol=1e-9)
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


@given(st.integers(1, 7), st.integers(0, 3))
def test_all_features_keep_all_distances_and_no_common_offset(experts: int, seed: int) -> None:
    rows = drawn(experts, 11, seed=seed) + 5
    found = principal_features(rows @ rows.T, 10)
    assert found.shape == (experts, 10)
    assert torch.allclose(torch.cdist(found, found), torch.cdist(rows, rows), atol=1e-4)
    assert (found[:, max(0, experts - 1) :] == 0).all()


def test_equal_experts_have_no_features() -> None:
    assert (principal_features(torch.full((4, 4), 1e3), 3) == 0).all()


# --- k-means ---


def cosine_error(features: torch.Tensor, labels: torch.Tensor) -> float:
    """The sum of 1 - cosine to the mean direction of one's cluster."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    total = 0.0
    for label in set(labels.tolist()) - {-1}:
        own = unit[labels == label]
        centre = own.sum(0) / own.sum(0).norm()
        total += float((1 - own @ centre).sum())
    return total


def test_clusters_are_as_good_as_scikit_learn_s_of_each_layer() -> None:
    """On features without any clusters, which is hardest: not worse than its ten starts over all, by 5 % in any layer.

    Scikit-learn's k-means is Euclidean; on directions of length 1 its aim is nearly the same.
    """
    features, clusters = drawn(6, 40, 8), (5, 8, 20, 12, 3, 30)
    found = cluster(features, torch.ones(6, 40, dtype=torch.bool), clusters, generator())
    ratios = []
    for row, number in enumerate(clusters):
        unit = torch.nn.functional.normalize(features[row], dim=1)
        theirs = torch.from_numpy(KMeans(number, n_init=10, random_state=0).fit(unit.numpy()).labels_)
        ratios.append(cosine_error(features[row], found[row]) / cosine_error(features[row], theirs))
    assert max(ratios) <= 1.05
    assert sum(ratios) / len(ratios) <= 1.0


def test_clusters_of_few_experts_are_the_best_there_are() -> None:
    """All ways to divide 7 experts into 3 clusters are tried."""
    features = drawn(3, 7, 4)
    found = cluster(features, torch.ones(3, 7, dtype=torch.bool), [3] * 3, generator(), restarts=32)
    for row in range(3):
        best = min(
            cosine_error(features[row], torch.tensor(labels))
            for labels in itertools.product(range(3), repeat=7)
            if len(set(labels)) == 3
        )
        assert cosine_error(features[row], found[row]) == pytest.approx(best)


@given(st.data())
def test_every_layer_has_its_number_of_clusters(data: st.DataObject) -> None:
    """Also of experts that are all equal, opposite, or have no direction at all."""
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    flags = st.lists(st.booleans(), min_size=experts, max_size=experts)
    merged = torch.tensor(data.draw(st.lists(flags, min_size=layers, max_size=layers)))
    clusters = [data.draw(st.integers(min(1, n), n)) for n in merged.sum(1).tolist()]
    few = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=2, max_size=2)
    features = torch.tensor(
        data.draw(st.lists(st.lists(few, min_size=experts, max_size=experts), min_size=layers, max_size=layers))
    )
    found = cluster(features, merged, clusters, generator())
    assert torch.equal(found == -1, ~merged)
    assert [len(set(row.tolist()) - {-1}) for row in found] == clusters


def test_layers_and_lengths_do_not_mix() -> None:
    """Layers that repeat one another get the same clusters as far as one can tell by their error; scaling is nothing.

    Directions of two tight bundles per layer, of very different lengths, are told apart.
    """
    bundles = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    lengths = torch.tensor([1.0, 100.0, 0.01, 5.0, 0.1, 30.0])[:, None]
    features = torch.stack([bundles * lengths, bundles.flip(0) * lengths])
    found = cluster(features, torch.ones(2, 6, dtype=torch.bool), [2, 2], generator())
    for row in found:
        assert len(set(row[:3].tolist())) == len(set(row[3:].tolist())) == 1
        assert row[0] != row[3]


def test_the_same_generator_gives_the_same_clusters() -> None:
    features, merged = drawn(3, 20, 5), torch.ones(3, 20, dtype=torch.bool)
    one, other = (cluster(features, merged, [6, 7, 8], generator(4)) for _ in range(2))
    assert torch.equal(one, other)


def test_impossible_clusters_are_refused() -> None:
    merged = torch.tensor([[True, True, False], [False, False, False]])
    with pytest.raises(ConfigError, match="2 experts of sparse layer 0 cannot be merged into 3; choose 1 to 2"):
        cluster(drawn(2, 3, 2), merged, [3, 0], generator())
    with pytest.raises(ConfigError, match="into 0; choose 1 to 2"):
        cluster(drawn(2, 3, 2), merged, [0, 0], generator())
    with pytest.raises(ConfigError, match="0 experts of sparse layer 1 cannot be merged into 1; choose 0"):
        cluster(drawn(2, 3, 2), merged, [1, 1], generator())
    with pytest.raises(ConfigError, match="not finite"):
        cluster(torch.full((2, 3, 2), torch.nan), merged, [1, 0], generator())


# --- joining by error ---


def parameter_error(rows: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor) -> float:
    """The weighted squared error of a layer's clusters over the weighted squares of all its experts."""
    total = 0.0
    for label in set(labels.tolist()) - {-1}:
        own, alpha = rows[labels == label], weights[labels == label][:, None]
        mean = (alpha * own).sum(0) / alpha.sum() if alpha.sum() > 0 else own.mean(0)
        total += float((alpha * (own - mean) ** 2).sum())
    return total / float((weights[:, None] * rows**2).sum())


@given(st.integers(0, 20), st.integers(2, 9), st.booleans())
def test_joining_takes_the_cheapest_pair_at_each_step(seed: int, total: int, unused: bool) -> None:
    """The oracle forms every union of two clusters of a layer, and their error from the parameters themselves."""
    rows, weights = drawn(2, 5, 4, seed=seed), drawn(2, 5, seed=seed + 99).abs()
    merged = torch.ones(2, 5, dtype=torch.bool)
    merged[1, 3] = False
    if unused:
        weights[0, :2] = 0
    labels = torch.where(merged, torch.arange(5), -1)
    while sum(len(set(row.tolist()) - {-1}) for row in labels) > total:
        options = []
        for layer in range(2):
            for one, other in itertools.combinations(sorted(set(labels[layer].tolist()) - {-1}), 2):
                joined = labels.clone()
                joined[layer, joined[layer] == other] = one
                before = parameter_error(rows[layer], weights[layer], labels[layer])
                options.append((parameter_error(rows[layer], weights[layer], joined[layer]) - before, joined))
        labels = min(options, key=lambda option: round(option[0], 12))[1]
    assert torch.equal(join(rows @ rows.mT, weights, merged, total), labels)


def test_joining_decides_how_many_each_layer_keeps() -> None:
    """Layer 0 has three pairs of equal experts, layer 1 six that all differ: of 9 left, 3 and 6."""
    rows = torch.stack([torch.eye(6, dtype=torch.float64)[[0, 0, 1, 1, 2, 2]], torch.eye(6, dtype=torch.float64)])
    products = rows @ rows.mT
    found = join(products, torch.ones(2, 6).double(), torch.ones(2, 6, dtype=torch.bool), 9)
    assert found.tolist() == [[0, 0, 2, 2, 4, 4], [0, 1, 2, 3, 4, 5]]


def test_joining_changes_nothing_it_was_given() -> None:
    products, weights = drawn(2, 4, 4), torch.ones(2, 4).double()
    before = products.clone(), weights.clone()
    join(products, weights, torch.ones(2, 4, dtype=torch.bool), 3)
    assert torch.equal(products, before[0])
    assert torch.equal(weights, before[1])


# --- plans ---


def profile_of(layers: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(layers, experts, seed=5).abs(), drawn(layers, experts, seed=6).abs()


@given(st.data())
def test_plans_put_every_expert_in_one_place(data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    ids = st.lists(st.integers(0, experts - 1), unique=True, max_size=experts)
    kept = [data.draw(ids) for _ in range(layers)]
    cuts = [data.draw(st.integers(0, len(row))) for row in kept]
    tuned = [row[:cut] for row, cut in zip(kept, cuts, strict=True)]
    singles = [row[cut:] for row, cut in zip(kept, cuts, strict=True)]
    limits = [experts - len(row) for row in kept]
    merged = data.draw(st.integers(sum(limit > 0 for limit in limits), sum(limits)))
    frequency, attention = profile_of(layers, experts)
    rows = drawn(layers, experts, 9)
    plans = (
        plan(tuned, singles, merged, frequency, attention, rows, generator()),
        least_error_plan(tuned, singles, merged, frequency, attention, rows @ rows.mT),
    )
    for found in plans:
        assert sum(layer.slots for layer in found) == merged + sum(map(len, kept))
        for layer, layer_tuned, layer_singles in zip(found, tuned, singles, strict=True):
            assert layer.tuned == tuple(sorted(layer_tuned))
            alone = {cluster.members[0] for cluster in layer.clusters if len(cluster.members) == 1}
            assert alone >= set(layer_singles)
            assert layer.num_experts == experts  # a LayerPlan is a partition of as many as it names


def test_weights_within_a_plan_follow_the_rule() -> None:
    """One layer, experts 1 and 2 merged with f = 0.2, 0.6 and a = 0.3, 0.3: 1 : 3. With a = 0.9, 0.1: 3 : 1."""
    frequency, features = torch.tensor([[0.9, 0.2, 0.6]]), drawn(1, 3, 2)
    rules: tuple[tuple[WeightRule, list[float], tuple[float, ...]], ...] = (
        ("attention_frequency", [0.1, 0.3, 0.3], (0.25, 0.75)),
        ("attention_frequency", [0.1, 0.9, 0.1], (0.75, 0.25)),
        ("frequency", [0.1, 0.9, 0.1], (0.25, 0.75)),
        ("uniform", [0.1, 0.9, 0.1], (0.5, 0.5)),
    )
    for rule, attention, expected in rules:
        given_attention = torch.tensor([attention], dtype=torch.float64)
        found = plan([[0]], [[]], 1, frequency, given_attention, features, generator(), weight_rule=rule)
        assert found[0].clusters[0].members == (1, 2)
        assert found[0].clusters[0].weights == pytest.approx(expected)


@pytest.mark.parametrize(("tuned", "singles"), [([[0, 0]], [[]]), ([[1]], [[1]]), ([[3]], [[]]), ([[]], [[-1]])])
def test_experts_named_twice_or_unknown_are_refused(tuned: list[list[int]], singles: list[list[int]]) -> None:
    frequency, attention = profile_of(1, 3)
    with pytest.raises(ConfigError, match="ids are 0 to 2"):
        plan(tuned, singles, 1, frequency, attention, drawn(1, 3, 2), generator())
    with pytest.raises(ConfigError, match="ids are 0 to 2"):
        least_error_plan(tuned, singles, 1, frequency, attention, torch.eye(3)[None])


@torch.no_grad()
def test_a_model_under_a_plan_is_nearer_to_itself_the_more_it_holds() -> None:
    """With as many merged experts as there are experts it is the model itself, bit for bit."""
    model = tiny_model()
    values = ExpertValues(model, {}, {}, 1.0)
    products = torch.stack([gram(partial(values.matrices, row), 8, 4) for row in range(2)])
    features = torch.stack([principal_features(found) for found in products])
    ids = token_ids(4, 12)
    with model.count_activations() as counter:
        whole = model.lm(input_ids=ids).logits
    frequency = counter.counts / ids.numel()
    errors = []
    for merged in (2, 8, 12, 16):
        found = plan([[]] * 2, [[]] * 2, merged, frequency, None, features, generator(), weight_rule="frequency")
        with compacted(model, found, values):
            errors.append(output_error(model.lm(input_ids=ids).logits, whole))
    assert errors[-1] == 0
    assert errors[0] > errors[2] > 0
    assert errors[1] > errors[2]
    ours = least_error_plan([[]] * 2, [[]] * 2, 16, frequency, None, products, "frequency")
    with compacted(model, ours, values):
        assert torch.equal(model.lm(input_ids=ids).logits, whole)


def test_output_error_by_hand() -> None:
    """The difference is (3, 4), of norm 5; the whole has norm 10."""
    assert output_error(torch.tensor([[9.0, 4.0]]), torch.tensor([[6.0, 8.0]])) == pytest.approx(0.5)
    assert np.isclose(output_error(torch.zeros(1, 2), torch.tensor([[6.0, 8.0]])), 1)
