"""Which experts a client merges into which, as FLUX does it: budgets per layer, features, clusters, weights.

Pure functions; nothing here touches a model. A *merged* expert stands for several that the client neither tunes nor
holds as they are. How many of them a layer gets follows from how evenly its experts are used (`layer_budgets`); which
experts share one, from PCA of their parameters (`principal_features`) and k-means with cosine distance (`cluster`); how
much each weighs in it, from how often tokens use it and how much attention those receive (`merge_weights`). `plan` puts
it together. `least_error_plan` is ours: it decides budgets and clusters at once, by the error of the merged parameters.

FLUX's own text was not at hand; formulas follow second-hand notes and what is marked "ours" is our decision.

Shapes: L layers with experts, E experts per layer, P parameters of one expert, D principal components, K clusters of
the layer with the most, N fits at a time (layers times restarts), C candidates for a starting centre, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from emberfed.errors import ConfigError
from emberfed.models.compact import Cluster, CompactPlan, LayerPlan
from emberfed.models.expert_values import ExpertMatrices

BudgetRule = Literal["adaptive", "uniform", "one"]
"""How merged experts are shared out over layers: FLUX's rule, equally, or one for each layer whatever there are."""

WeightRule = Literal["attention_frequency", "frequency", "uniform"]
"""What an expert weighs in the one it is merged into."""

DIMENSIONS: Final = 8
"""Principal components kept (ours)."""

EVENNESS: Final = 0.1
"""Layers whose experts' frequencies vary by less than this part of their mean count as equally even (ours)."""

RESTARTS: Final = 16
ITERATIONS: Final = 100

_CHUNK: Final = 2**15
"""Parameters of which inner products are taken in float32; sums over chunks are in float64."""

_CANDIDATES: Final = 4
"""Experts drawn for each starting centre, of which the best is taken."""

_ROUNDING: Final = 1e-9
"""A share this close to a whole number is that number."""


def layer_budgets(
    total: int, frequency_LE: torch.Tensor, limits_L: Sequence[int], rule: BudgetRule = "adaptive"
) -> tuple[int, ...]:
    """Return how many merged experts each layer gets.

    `adaptive` (FLUX): in proportion to b_l = (L - l + 1) / v_l, with l from 1 and v_l the variance of the activation
    frequencies in the layer, so that early layers and evenly used ones keep more. `uniform`: in equal parts. Both keep
    to 1 and the limit of each layer (ours): the shares are min(limit, max(1, s b_l)) with the one s that makes them sum
    to `total`, which is FLUX's B b_l / sum b where no bound is met. They are rounded down, and what is left goes to the
    largest remainders, the earlier layer first. `one`: 1 for each layer, whatever `total` is.

    Args:
        total: B, merged experts over all layers; except under `one` the result sums to it.
        frequency_LE: Tokens routed to each expert / tokens. Only `adaptive` looks at it.
        limits_L: Experts of each layer that are to be merged; a layer without any gets 0.
        rule: How to share.

    Raises: ConfigError if `total` is below one for each layer with experts to merge, or above all limits together, or
        if `adaptive` is asked without tokens.
    """
    _check_total(total, limits_L)
    open_rows = [row for row, limit in enumerate(limits_L) if limit > 0]
    budgets = [0] * len(limits_L)
    if not open_rows:
        return tuple(budgets)
    weights_L = _adaptive_weights(frequency_LE) if rule == "adaptive" else torch.ones(len(limits_L)).double()
    limits = np.array([limits_L[row] for row in open_rows])
    shares = np.ones(len(open_rows)) if rule == "one" else _shares(total, weights_L[open_rows].numpy(), limits)
    found = np.floor(shares + _ROUNDING).astype(np.int64)
    left = 0 if rule == "one" else total - int(found.sum())
    found[np.argsort(found - shares, kind="stable")[:left]] += 1
    for row, budget in zip(open_rows, found.tolist(), strict=True):
        budgets[row] = budget
    return tuple(budgets)


def merge_weights(
    frequency_LE: torch.Tensor, attention_LE: torch.Tensor | None, rule: WeightRule = "attention_frequency"
) -> torch.Tensor:
    """Return alpha, what each expert weighs before a cluster's weights are made to sum to 1: float64 (L, E).

    Args:
        frequency_LE: f, tokens routed to each expert / tokens.
        attention_LE: a, mean attention received by its tokens; None where the model gives none.
        rule: `attention_frequency` is f a (FLUX); `frequency` is f; `uniform` is 1.

    Raises: ConfigError if the rule needs attention and there is none, or if a number is negative or not finite.
    """
    frequency_LE = _checked(frequency_LE, "frequencies")
    if rule == "uniform":
        return torch.ones_like(frequency_LE)
    if rule == "frequency":
        return frequency_LE
    if attention_LE is None:
        raise ConfigError(
            "merge weights attention_frequency need the attention that tokens receive, and the profile has none; use "
            "frequency"
        )
    return frequency_LE * _checked(attention_LE, "attention")


def gram(read: Callable[[int], ExpertMatrices], num_experts: int, held: int) -> torch.Tensor:
    """Return inner products of experts' parameters, float64 (E, E), holding few of them at a time in float32.

    With `held` >= E each is read once; otherwise in blocks of held / 2, so about E / held times.

    Args:
        read: Gives the matrices of an expert; biases do not count.
        num_experts: E.
        held: Experts that may be in memory, beside the one just read.

    Raises: ConfigError if `held` is below 2 and there are more experts; or if parameters are not finite.
    """
    if held < min(2, num_experts):
        raise ConfigError(f"inner products of experts need two of them in memory, but only {held} may be; allow 2")
    size = num_experts if held >= num_experts else held // 2
    blocks = [range(start, min(start + size, num_experts)) for start in range(0, num_experts, size)]
    products_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for number, rows in enumerate(blocks):
        left = _stacked(read, rows)
        _put(products_EE, rows, rows, _products(left, left))
        for columns in blocks[number + 1 :]:
            _put(products_EE, rows, columns, _products(left, _stacked(read, columns)))
    if not products_EE.isfinite().all():
        raise ConfigError("experts hold parameters that are not finite, so they cannot be merged")
    return products_EE


def principal_features(products_EE: torch.Tensor, dimensions: int = DIMENSIONS) -> torch.Tensor:
    """Return the experts' scores on the first principal components of their parameters, float64 (E, D).

    PCA by the E x E inner products, never by a covariance of P x P: with the layer's mean taken off, these are U S U',
    and the scores U sqrt(S). A component's sign is such that its largest score is positive. Components that experts do
    not vary in (always those from the E-th on) are zero.

    Args:
        products_EE: Inner products of the parameters, as `gram` gives them.
        dimensions: D.
    """
    centred_EE = products_EE - products_EE.mean(0, keepdim=True)
    centred_EE = centred_EE - centred_EE.mean(1, keepdim=True)
    variance_E, vectors_EE = torch.linalg.eigh((centred_EE + centred_EE.t()) / 2)
    variance_E, vectors_EE = variance_E.flip(0), vectors_EE.flip(1)
    noise = len(variance_E) * torch.finfo(torch.float32).eps * products_EE.diagonal().max()
    scores_EE = vectors_EE * torch.where(variance_E > noise, variance_E, 0).sqrt()
    largest_E = scores_EE.gather(0, scores_EE.abs().argmax(0, keepdim=True))
    scores_EE = scores_EE * torch.where(largest_E < 0, -1.0, 1.0)
    return F.pad(scores_EE, (0, max(0, dimensions - len(scores_EE))))[:, :dimensions].contiguous()


def cluster(
    features_LED: torch.Tensor,
    merged_LE: torch.Tensor,
    clusters_L: Sequence[int],
    generator: torch.Generator,
    restarts: int = RESTARTS,
) -> torch.Tensor:
    """Return which cluster of its layer each expert is in: int64 (L, E), -1 for those not to be merged.

    k-means with cosine distance (Dhillon & Modha 2001): a centre is the mean direction of its members, and the sum of
    1 - cosine falls. All layers and restarts are fitted at once, and no pair of different layers is ever formed, which
    is what FLUX's mask over pairs of experts comes to. It starts from k-means++, keeps the best of the restarts for
    each layer, and gives a cluster that loses all members the expert that is farthest from its own centre. So each
    layer has exactly its number of clusters, none of them empty. O(restarts L E K D) per iteration.

    Args:
        features_LED: What experts are compared by; lengths do not matter. One without direction is as far from all.
        merged_LE: bool, which experts are to be merged.
        clusters_L: Clusters of each layer; 0 where there is nothing to merge.
        generator: Source of the starting centres.
        restarts: Fits of each layer.

    Raises: ConfigError if a layer has fewer experts to merge than clusters, or some but no cluster; or if features are
        not finite.
    """
    for row, (number, wanted) in enumerate(zip(merged_LE.sum(1).tolist(), clusters_L, strict=True)):
        if not min(1, number) <= wanted <= number:
            raise ConfigError(
                f"{number} experts of sparse layer {row} cannot be merged into {wanted}; choose "
                f"{f'1 to {number}' if number else '0'}"
            )
    if not features_LED.isfinite().all():
        raise ConfigError("features of experts are not finite, so experts cannot be clustered")
    layers = len(clusters_L)
    fit = _Fit(
        F.normalize(features_LED.double(), dim=-1).repeat(restarts, 1, 1),
        merged_LE.repeat(restarts, 1),
        torch.tensor(clusters_L).repeat(restarts),
    )
    assigned_NE = fit.nearest(fit.starts(generator))
    for _ in range(ITERATIONS):
        fresh_NE = fit.nearest(fit.centres(assigned_NE))
        if torch.equal(fresh_NE, assigned_NE):
            break
        assigned_NE = fresh_NE
    best_L = fit.objective(assigned_NE).view(restarts, layers).argmin(0)
    return assigned_NE.view(restarts, layers, -1)[best_L, torch.arange(layers)]


def clusters_of(assigned_E: torch.Tensor, weights_E: torch.Tensor) -> tuple[Cluster, ...]:
    """Return one layer's clusters, in the order of their first members, each with weights that sum to 1.

    An expert of weight 0 stays a member: its tokens go to the merged expert, which owes it nothing. Where all members
    have weight 0, so none was ever used, they weigh the same.

    Args:
        assigned_E: Cluster of each expert; -1 for none.
        weights_E: Their weights, none negative.
    """
    labels = [label for label in assigned_E.tolist() if label >= 0]
    found = []
    for label in dict.fromkeys(labels):
        members = (assigned_E == label).nonzero().squeeze(1)
        weights = weights_E[members].double()
        shares = weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / len(members))
        found.append(Cluster(tuple(members.tolist()), tuple(shares.tolist())))
    return tuple(found)


def plan(
    tuned: Sequence[Sequence[int]],
    singles: Sequence[Sequence[int]],
    merged: int,
    frequency_LE: torch.Tensor,
    attention_LE: torch.Tensor | None,
    features_LED: torch.Tensor,
    generator: torch.Generator,
    budget_rule: BudgetRule = "adaptive",
    weight_rule: WeightRule = "attention_frequency",
) -> CompactPlan:
    """Return who is tuned, held as it is, or merged into what, for each layer with experts; as FLUX does it.

    Args:
        tuned: Experts to tune, for each layer.
        singles: Experts held as they are without being tuned; each a cluster of its own.
        merged: Merged experts that all others may become, over all layers.
        frequency_LE: Tokens routed to each expert / tokens.
        attention_LE: Mean attention received by its tokens; None where the model gives none.
        features_LED: What experts are compared by, see `principal_features`.
        generator: Source of the clusters' starting centres.
        budget_rule: How merged experts are shared out over layers.
        weight_rule: What an expert weighs in a merged one.

    Raises: ConfigError as `layer_budgets`, `merge_weights` and `cluster`; or if an expert is named twice, or unknown.
    """
    merged_LE = _left_over(tuned, singles, frequency_LE)
    budgets = layer_budgets(merged, frequency_LE, merged_LE.sum(1).tolist(), budget_rule)
    weights_LE = merge_weights(frequency_LE, attention_LE, weight_rule)
    assigned_LE = cluster(features_LED, merged_LE, budgets, generator)
    return _planned(tuned, singles, assigned_LE, weights_LE)


def least_error_plan(
    tuned: Sequence[Sequence[int]],
    singles: Sequence[Sequence[int]],
    merged: int,
    frequency_LE: torch.Tensor,
    attention_LE: torch.Tensor | None,
    products_LEE: torch.Tensor,
    weight_rule: WeightRule = "attention_frequency",
) -> CompactPlan:
    """Return a plan as `plan` does, whose budgets and clusters both follow from `join` (ours).

    Args:
        tuned: Experts to tune, for each layer.
        singles: Experts held as they are without being tuned.
        merged: Merged experts that all others may become, over all layers.
        frequency_LE: Tokens routed to each expert / tokens.
        attention_LE: Mean attention received by its tokens; None where the model gives none.
        products_LEE: Inner products of experts' parameters, see `gram`.
        weight_rule: What an expert weighs in a merged one.

    Raises: ConfigError as `join` and `merge_weights`; or if an expert is named twice, or unknown.
    """
    merged_LE = _left_over(tuned, singles, frequency_LE)
    weights_LE = merge_weights(frequency_LE, attention_LE, weight_rule)
    return _planned(tuned, singles, join(products_LEE, weights_LE, merged_LE, merged), weights_LE)


def join(products_LEE: torch.Tensor, weights_LE: torch.Tensor, merged_LE: torch.Tensor, total: int) -> torch.Tensor:
    """Return which cluster of its layer each expert is in: int64 (L, E), -1 for those not to be merged. Ours.

    A cluster's weighted mean has the weighted squared error sum_e alpha_e ||W_e - mean||^2, the least of any one expert
    in its place. Beginning with every expert by itself, the two clusters of one layer whose union adds the least to the
    sum of all layers' errors are joined, until `total` are left: Ward's method (1963) with weights, over all layers at
    once, so budgets come out of it. A layer's error is relative to sum_e alpha_e ||W_e||^2 over all its experts. What
    is used much stays alone, since joining it costs much. Nothing is drawn. O(L^2 E^3).

    Args:
        products_LEE: Inner products of experts' parameters.
        weights_LE: alpha, none negative.
        merged_LE: bool, which experts are to be merged.
        total: Clusters over all layers.

    Raises: ConfigError if `total` is below one for each layer with experts to merge, or above their number.
    """
    _check_total(total, merged_LE.sum(1).tolist())
    products, weights, alive = (tensor.numpy().copy() for tensor in (products_LEE.double(), weights_LE, merged_LE))
    size_L = np.einsum("le,lee->l", weights, products)
    scale_L = np.divide(1, size_L, out=np.zeros_like(size_L), where=size_L > 0)
    labels = np.where(alive, np.arange(alive.shape[1]), -1)
    costs = np.full(products.shape, np.inf)

    def price(row: int, one: int) -> None:
        """Write what it adds to the error to join one cluster with each other of its layer."""
        own, others, inner = weights[row, one], weights[row], products[row]
        distances = np.maximum(inner[one, one] + inner.diagonal() - 2 * inner[one], 0)
        both = own + others
        harmonic = np.divide(own * others, both, out=np.zeros_like(both), where=both > 0)
        added = np.where(alive[row], scale_L[row] * harmonic * distances, np.inf)
        added[one] = np.inf
        costs[row, one] = costs[row, :, one] = added

    for row, expert in np.argwhere(alive).tolist():
        price(row, expert)
    for _ in range(int(alive.sum()) - total):
        row, one, other = map(int, np.unravel_index(costs.argmin(), costs.shape))
        both = weights[row, one] + weights[row, other]
        share = weights[row, one] / both if both > 0 else 0.5
        products[row, one] = share * products[row, one] + (1 - share) * products[row, other]
        products[row, :, one] = share * products[row, :, one] + (1 - share) * products[row, :, other]
        weights[row, one] = both
        alive[row, other] = False
        labels[row, labels[row] == other] = one
        costs[row, other] = costs[row, :, other] = np.inf
        price(row, one)
    return torch.from_numpy(labels)


def output_error(merged_TD: torch.Tensor, whole_TD: torch.Tensor) -> float:
    """Return how far merged experts' output is from that of all experts: ||merged - whole|| / ||whole||."""
    whole_TD = whole_TD.double()
    return float((merged_TD.double() - whole_TD).norm() / whole_TD.norm())


def _check_total(total: int, limits_L: Sequence[int]) -> None:
    needed = sum(limit > 0 for limit in limits_L)
    if total < needed:
        raise ConfigError(
            f"{total} merged experts are too few: {needed} layers have experts to merge and each needs one; "
            f"hold at least {needed} experts more than are tuned, or tune all experts of a layer"
        )
    if total > sum(limits_L):
        raise ConfigError(
            f"{total} merged experts are too many: only {sum(limits_L)} experts are neither tuned nor held as they "
            f"are; choose at most as many"
        )


def _left_over(
    tuned: Sequence[Sequence[int]], singles: Sequence[Sequence[int]], frequency_LE: torch.Tensor
) -> torch.Tensor:
    """Return which experts are neither tuned nor held as they are, bool (L, E)."""
    merged_LE = torch.ones_like(frequency_LE, dtype=torch.bool)
    experts = merged_LE.shape[1]
    for row, kept in enumerate(zip(tuned, singles, strict=True)):
        ids = [*kept[0], *kept[1]]
        if len(set(ids)) < len(ids) or not all(0 <= expert < experts for expert in ids):
            raise ConfigError(
                f"experts {sorted(ids)} of sparse layer {row} are to be tuned or held: each may be named once, and "
                f"ids are 0 to {experts - 1}"
            )
        merged_LE[row, ids] = False
    return merged_LE


def _planned(
    tuned: Sequence[Sequence[int]],
    singles: Sequence[Sequence[int]],
    assigned_LE: torch.Tensor,
    weights_LE: torch.Tensor,
) -> CompactPlan:
    layers = []
    for row, (assigned_E, weights_E) in enumerate(zip(assigned_LE, weights_LE, strict=True)):
        alone = [Cluster((expert,), (1.0,)) for expert in singles[row]]
        clusters = sorted([*alone, *clusters_of(assigned_E, weights_E)], key=lambda found: found.members)
        layers.append(LayerPlan(tuple(sorted(tuned[row])), tuple(clusters)))
    return tuple(layers)


def _adaptive_weights(frequency_LE: torch.Tensor) -> torch.Tensor:
    """Return b_l = (L - l + 1) / v_l, with v_l no less than (EVENNESS times the layer's mean frequency) squared."""
    frequency_LE = _checked(frequency_LE, "frequencies")
    mean_L = frequency_LE.mean(1)
    if not (mean_L > 0).all():
        raise ConfigError("adaptive budgets need how often experts are used, and the profile has no tokens")
    variance_L = torch.maximum(frequency_LE.var(1, correction=0), (EVENNESS * mean_L).square())
    depth_L = torch.arange(len(mean_L), 0, -1, dtype=torch.float64)
    return depth_L / variance_L


def _shares(
    total: int,
    weights: npt.NDArray[np.float64],
    limits: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Return min(limit, max(1, s weight)) with the s that makes them sum to `total`.

    Their sum is linear in s between the points where a share leaves 1 or meets its limit, so s is interpolated.
    """
    bends = np.unique(np.concatenate([1 / weights, limits / weights]))
    sums = np.clip(bends[:, None] * weights, 1, limits).sum(1)
    shares: npt.NDArray[np.float64] = np.clip(np.interp(total, sums, bends) * weights, 1, limits)
    return shares


def _checked(numbers_LE: torch.Tensor, what: str) -> torch.Tensor:
    numbers_LE = numbers_LE.double()
    if not numbers_LE.isfinite().all() or (numbers_LE < 0).any():
        raise ConfigError(f"{what} of experts must be finite and not negative; the profile is damaged, make it again")
    return numbers_LE


def _stacked(read: Callable[[int], ExpertMatrices], experts: Sequence[int]) -> torch.Tensor:
    """Return the experts' parameters, float32 (experts, P), reading one expert at a time."""
    rows = torch.empty(0, 0)
    for number, expert in enumerate(experts):
        found = read(expert)
        gate_up = found.gate_up_D2F.numel()
        if number == 0:
            rows = torch.empty(len(experts), gate_up + found.down_FD.numel())
        rows[number, :gate_up].view(found.gate_up_D2F.shape).copy_(found.gate_up_D2F)
        rows[number, gate_up:].view(found.down_FD.shape).copy_(found.down_FD)
    return rows


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(len(left), len(right), dtype=torch.float64)
    for start in range(0, left.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        found += left[:, chunk] @ right[:, chunk].t()
    return found


def _put(products_EE: torch.Tensor, rows: range, columns: range, found: torch.Tensor) -> None:
    products_EE[rows.start : rows.stop, columns.start : columns.stop] = found
    products_EE[columns.start : columns.stop, rows.start : rows.stop] = found.t()


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """N fits of k-means at once.

    Attributes:
        points_NED: float64, directions of length 1 or 0.
        merged_NE: bool, which of them take part.
        clusters_N: Clusters of each fit.
    """

    points_NED: torch.Tensor
    merged_NE: torch.Tensor
    clusters_N: torch.Tensor

    @property
    def open_NK(self) -> torch.Tensor:  # noqa: N802 - the suffix says the shape
        """Which clusters there are: bool, with K the most of any fit, and at least 1."""
        return torch.arange(max(1, int(self.clusters_N.max()))) < self.clusters_N[:, None]

    def starts(self, generator: torch.Generator) -> torch.Tensor:
        """Return starting centres, (N, K, D): experts, drawn by their distance from those drawn before.

        Greedy k-means++ (Arthur & Vassilvitskii 2007): of several draws the one that leaves least distance is taken.
        """
        open_NK = self.open_NK
        fits_N1 = torch.arange(len(open_NK)).unsqueeze(1)
        free_NE = self.merged_NE.double()
        distance_NE = 2 * free_NE
        centres_NKD = torch.zeros(*open_NK.shape, self.points_NED.shape[2], dtype=torch.float64)
        for number in range(open_NK.shape[1]):
            # Once all that differ are drawn, the others differ by nothing: any of them will do.
            chance_NE = free_NE * distance_NE.clamp(min=_ROUNDING)
            chance_NE[chance_NE.sum(1) == 0] = 1.0
            drawn_NC = torch.multinomial(chance_NE, _CANDIDATES, replacement=True, generator=generator)
            cosine_NCE = self.points_NED[fits_N1, drawn_NC] @ self.points_NED.mT
            left_NCE = torch.minimum(distance_NE.unsqueeze(1), (1 - cosine_NCE) * self.merged_NE.unsqueeze(1))
            best_N1 = left_NCE.sum(2).argmin(1, keepdim=True)
            drawn_N1 = drawn_NC.gather(1, best_N1)
            centres_NKD[:, number] = self.points_NED[fits_N1, drawn_N1].squeeze(1)
            distance_NE = left_NCE[fits_N1, best_N1].squeeze(1)
            free_NE[fits_N1, drawn_N1] = 0.0
        return centres_NKD

    def nearest(self, centres_NKD: torch.Tensor) -> torch.Tensor:
        """Return the cluster of each expert, int64 (N, E), every cluster with at least one."""
        open_NK = self.open_NK
        cosine_NEK = self.points_NED @ centres_NKD.mT
        assigned_NE = cosine_NEK.masked_fill(~open_NK[:, None], -torch.inf).argmax(2)
        own_NE = cosine_NEK.gather(2, assigned_NE.unsqueeze(2)).squeeze(2)
        assigned_NE = assigned_NE.masked_fill(~self.merged_NE, -1)
        while (empty_NK := open_NK & ((sizes_NK := self.sizes(assigned_NE)) == 0)).any():
            lacking_N = empty_NK.any(1).nonzero().squeeze(1)
            spare_NE = self.merged_NE & (sizes_NK.gather(1, assigned_NE.clamp(min=0)) > 1)
            farthest_N = own_NE.masked_fill(~spare_NE, torch.inf).argmin(1)
            assigned_NE[lacking_N, farthest_N[lacking_N]] = empty_NK.int().argmax(1)[lacking_N]
        return assigned_NE

    def sizes(self, assigned_NE: torch.Tensor) -> torch.Tensor:
        """Return the members of each cluster, int64 (N, K)."""
        fits, clusters = self.open_NK.shape
        counts = torch.zeros(fits, clusters + 1, dtype=torch.int64)
        return counts.scatter_add_(1, assigned_NE + 1, torch.ones_like(assigned_NE))[:, 1:]

    def centres(self, assigned_NE: torch.Tensor) -> torch.Tensor:
        """Return the mean direction of each cluster, (N, K, D)."""
        fits, clusters = self.open_NK.shape
        sums = torch.zeros(fits, clusters + 1, self.points_NED.shape[2], dtype=torch.float64)
        sums.scatter_add_(1, (assigned_NE + 1).unsqueeze(2).expand_as(self.points_NED), self.points_NED)
        return F.normalize(sums[:, 1:], dim=-1)

    def objective(self, assigned_NE: torch.Tensor) -> torch.Tensor:
        """Return the sum of 1 - cosine to the own centre, (N,)."""
        cosine_NEK = self.points_NED @ self.centres(assigned_NE).mT
        own_NE = cosine_NEK.gather(2, assigned_NE.clamp(min=0).unsqueeze(2)).squeeze(2)
        return ((1 - own_NE) * self.merged_NE).sum(1)
