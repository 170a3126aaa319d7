"""Router weights, as pure functions of the router's logits.

Shapes: T tokens, E experts, K active experts per token.
"""

from __future__ import annotations

from typing import Literal

import torch

Gate = Literal["plain", "renormalised"]
"""`plain`: softmax over all experts, the K largest kept as they are. `renormalised`: softmax over the K kept logits."""

Rescale = Literal["none", "static", "mass"]
"""Repair of the probability mass a `plain` gate loses below the native K; see `gate_weights`."""


def gate_weights(
    logits_TE: torch.Tensor, top_k: int, gate: Gate, rescale: Rescale = "none", native_top_k: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of the `top_k` experts of each token, and which experts they are.

    Args:
        logits_TE: The router's logits, (T, E).
        top_k: K, at most E.
        gate: `renormalised` weights sum to 1 for every K; `plain` ones lose mass as K falls.
        rescale: Factor on a plain gate: `static` is native_top_k / K, `mass` is, per token, the probability of the
            native_top_k best experts over that of the K best.
        native_top_k: The checkpoint's own K; needed by a `rescale` other than `none`.

    Returns:
        Weights (T, K), float32, largest first, and expert indices (T, K), int64.
    """
    probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights_TK, index_TK = torch.topk(probabilities_TE, top_k, dim=-1)
    if gate == "renormalised":
        return torch.softmax(logits_TE.float().gather(-1, index_TK), dim=-1), index_TK
    if rescale == "none":
        return weights_TK, index_TK
    if native_top_k is None:
        raise ValueError(f"rescale {rescale!r} needs native_top_k")
    if rescale == "static":
        return weights_TK * (native_top_k / top_k), index_TK
    native_mass_T1 = torch.topk(probabilities_TE, native_top_k, dim=-1).values.sum(-1, keepdim=True)
    return weights_TK * (native_mass_T1 / weights_TK.sum(-1, keepdim=True)), index_TK
