"""Router weights at another K, as pure functions of the weights a router gave to the experts it kept.

They hold for every way of scoring experts: softmax, sigmoid, SparseMixer.

Shapes: T tokens, K active experts per token.
"""

from __future__ import annotations

from typing import Literal

import torch

Gate = Literal["plain", "renormalised"]
"""`plain`: the kept experts have the weights they would have at any K. `renormalised`: a token's sum to a constant."""

Rescale = Literal["none", "static", "mass"]
"""Repair of the mass a `plain` gate loses below the native K: by native K / K, or to the mass of the native K best."""

_SMALLEST = torch.finfo(torch.float32).tiny


def with_mass(weights_TK: torch.Tensor, mass: float | torch.Tensor) -> torch.Tensor:
    """Return the weights times one factor per token, so that each token's sum to `mass`.

    For a softmax router and mass 1 that is the softmax over the kept logits.

    Args:
        weights_TK: (T, K), none negative.
        mass: A number for all tokens, or (T, 1).

    Returns:
        (T, K), float32. Weights that are all zero stay zero.
    """
    weights_TK = weights_TK.float()
    return weights_TK / mass_of(weights_TK).clamp(min=_SMALLEST) * mass


def mass_of(weights_TK: torch.Tensor) -> torch.Tensor:
    """Return the sum of each token's weights, (T, 1), float32."""
    return weights_TK.float().sum(dim=-1, keepdim=True)
