"""A dense feed-forward network as experts: its neurons divided among them, or all of them copied into each.

A gated FFN is a sum over its neurons, down[:, f] * act(gate[f] · x) * (up[f] · x), so for any division of the neurons
the experts' outputs add up to the dense output. Dividing at random or by balanced k-means is LLaMA-MoE's (Zhu et al.
2024, https://arxiv.org/abs/2406.16554), copying is sparse upcycling (Komatsuzaki et al. 2023,
https://arxiv.org/abs/2212.05055).

Shapes: F neurons, D hidden, E experts, C = F / E neurons of an expert.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch.nn import functional

from emberfed.errors import ConfigError

MAX_ROUNDS = 100
"""Rounds of balanced k-means at most; 11008 normally distributed rows and 16 experts need about 15."""


def neurons_per_expert(neurons: int, num_experts: int) -> int:
    """Return C, the neurons of one of `num_experts` equal experts.

    Raises: ConfigError if there are fewer than two experts or `neurons` is not a multiple of their number.
    """
    if num_experts < 2 or neurons % num_experts:
        allowed = [number for number in range(2, neurons + 1) if neurons % number == 0]
        raise ConfigError(
            f"an FFN of {neurons} neurons cannot be divided into {num_experts} equal experts; "
            f"num_experts may be {', '.join(map(str, allowed))}"
        )
    return neurons // num_experts


def split_ffn(
    gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor, groups_EC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts that have the neurons of each group: gate_up (E, 2C, D), gate first, and down (E, D, C)."""
    gate_up_E2CD = torch.cat([gate_FD[groups_EC], up_FD[groups_EC]], dim=1)
    return gate_up_E2CD, down_DF[:, groups_EC].transpose(0, 1)


def copy_ffn(
    gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return experts that are each the whole FFN: gate_up (E, 2F, D) and down (E, D, F), as views of one copy."""
    return torch.cat([gate_FD, up_FD]).expand(num_experts, -1, -1), down_DF.expand(num_experts, -1, -1)


def random_groups(neurons: int, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random division of the neurons: their indices (E, C), ascending in each group.

    Raises: ConfigError as `neurons_per_expert`.
    """
    size = neurons_per_expert(neurons, num_experts)
    return torch.randperm(neurons, generator=generator).view(num_experts, size).sort(dim=1).values


def clustered_groups(rows_FD: torch.Tensor, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Return a division of the neurons by balanced k-means on their rows: indices (E, C), ascending in each group.

    Starts from k-means++ centroids and neurons placed by regret, then takes turns: centroids become the means of their
    groups; neurons are exchanged between every two groups, which leaves those two divided in the best way. Both lower
    the sum of squared distances to the centroids, so this ends: where no exchange helps, or after `MAX_ROUNDS` rounds.
    That the division of all is the best there is, is not guaranteed, as with any k-means.

    A round costs O(F E D) for distances and O(E F log F) for exchanges; memory beyond the rows in float32 is O(F E).

    Raises: ConfigError as `neurons_per_expert`.
    """
    rows_FD = rows_FD.float()
    size = neurons_per_expert(len(rows_FD), num_experts)
    groups_EC = _placed(_squared_distances(rows_FD, _spread(rows_FD, num_experts, generator)), size)
    for _ in range(MAX_ROUNDS):
        costs_FE = _squared_distances(rows_FD, group_means(rows_FD, groups_EC))
        better_EC = _exchanged(costs_FE, groups_EC)
        if torch.equal(better_EC, groups_EC):
            break
        groups_EC = better_EC
    return groups_EC


def group_means(rows_FD: torch.Tensor, groups_EC: torch.Tensor) -> torch.Tensor:
    """Return the mean row of each group, (E, D), float32."""
    return torch.stack([rows_FD[group].float().mean(dim=0) for group in groups_EC])


def random_router(num_experts: int, hidden: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """Return router rows (E, D) drawn from a normal distribution with mean 0."""
    return torch.randn(num_experts, hidden, generator=generator) * std


def centroid_router(centroids_ED: torch.Tensor, std: float) -> torch.Tensor:
    """Return router rows (E, D) in the directions of the centroids, as long as random rows of that `std` are.

    The router and the gate projection read the same input, so a token's logit for an expert is in proportion to the
    mean of what the expert's neurons get before their activation.
    """
    length: float = std * centroids_ED.shape[1] ** 0.5
    return functional.normalize(centroids_ED) * length


def _squared_distances(rows_FD: torch.Tensor, centroids_ED: torch.Tensor) -> torch.Tensor:
    """Return squared distances (F, E)."""
    norms_F1, norms_E = rows_FD.square().sum(dim=1, keepdim=True), centroids_ED.square().sum(dim=1)
    return (norms_F1 + norms_E - 2 * rows_FD @ centroids_ED.T).clamp_(min=0)


def _spread(rows_FD: torch.Tensor, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Return E of the rows far from each other, (E, D): greedy k-means++ (Arthur and Vassilvitskii 2007).

    Of a few candidates drawn with probability proportional to the squared distance to the nearest row taken so far, the
    one is taken that lowers the sum of these distances most.
    """
    candidates = 2 + num_experts.bit_length()
    taken = [int(torch.randint(len(rows_FD), (1,), generator=generator))]
    nearest_F = _squared_distances(rows_FD, rows_FD[taken])[:, 0]
    while len(taken) < num_experts:
        weights_F = nearest_F if nearest_F.sum() > 0 else torch.ones_like(nearest_F)
        drawn = torch.multinomial(weights_F, candidates, replacement=True, generator=generator)
        nearest_FN = torch.minimum(nearest_F[:, None], _squared_distances(rows_FD, rows_FD[drawn]))
        best = int(nearest_FN.sum(dim=0).argmin())
        taken.append(int(drawn[best]))
        nearest_F = nearest_FN[:, best]
    return rows_FD[taken]


def _placed(costs_FE: torch.Tensor, size: int) -> torch.Tensor:
    """Place each neuron with the cheapest expert that has room, those first who have most to lose: (E, C)."""
    ranked = costs_FE.sort(dim=1, stable=True)
    regret_F = ranked.values[:, 1] - ranked.values[:, 0]
    groups: list[list[int]] = [[] for _ in range(costs_FE.shape[1])]
    wishes = ranked.indices.tolist()
    for neuron in regret_F.argsort(descending=True, stable=True).tolist():
        next(groups[expert] for expert in wishes[neuron] if len(groups[expert]) < size).append(neuron)
    return torch.tensor(groups).sort(dim=1).values


def _exchanged(costs_FE: torch.Tensor, groups_EC: torch.Tensor) -> torch.Tensor:
    """Return the groups after every two of them, once, exchanged all neurons whose exchange lowers the sum of costs."""
    costs, groups = costs_FE.double().numpy(), groups_EC.numpy().copy()
    for one, other in combinations(range(len(groups)), 2):
        gain_F = costs[:, one] - costs[:, other]  # of moving from one to the other
        leaving = groups[one][np.argsort(-gain_F[groups[one]], kind="stable")]
        coming = groups[other][np.argsort(gain_F[groups[other]], kind="stable")]
        swap = gain_F[leaving] > gain_F[coming]
        groups[one] = np.where(swap, coming, leaving)
        groups[other] = np.where(swap, leaving, coming)
    return torch.from_numpy(groups).sort(dim=1).values
