"""Phi-3.5-MoE (https://arxiv.org/abs/2404.14219): 16 experts, SparseMixer routing (https://arxiv.org/abs/2409.12136).

transformers' router always picks two experts. `sparsemixer` is its rule outside training for any number.
"""

from typing import Any

import torch

from emberfed.models.families import Family, FixedRouting, Mixture


def sparsemixer(logits_TE: torch.Tensor, top_k: int, router: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick `top_k` experts one after the other, each the best of those left.

    The weight of a pick is its probability among the experts left whose logits z are near its own logit b: those with
    (b - z) / max(|z|, b) up to twice `router.router_jitter_noise`. The weights of several picks may sum to more than 1.

    Returns:
        Weights (T, K), in the type of the logits, and expert indices (T, K), int64, in the order of the picks.
    """
    left_TE = logits_TE
    weights, index = [], []
    for _ in range(top_k):
        with torch.no_grad():
            best_T1, pick_T1 = left_TE.max(dim=-1, keepdim=True)
            distance_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1)
        near_TE = left_TE.masked_fill(distance_TE > 2 * router.router_jitter_noise, float("-inf"))
        weights.append(torch.softmax(near_TE, dim=-1).gather(-1, pick_T1))
        index.append(pick_T1)
        left_TE = left_TE.scatter(-1, pick_T1, float("-inf"))
    return torch.cat(weights, dim=-1), torch.cat(index, dim=-1)


FAMILY = Family(
    model_type="phimoe",
    mixture=Mixture(
        router="router",
        num_experts="num_local_experts",
        renormalises=False,
        fixed=FixedRouting(top_k=2, route=sparsemixer),
    ),
)
