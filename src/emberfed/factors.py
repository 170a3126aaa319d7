"""LoRA factors of different ranks, put together and divided again, without ever forming their products.

A pair adapts a weight by alpha / R * B A, with one alpha for everybody and R read from the shapes. So a client of rank
r contributes 1 / r * B A (times alpha, which cancels): that scale goes into the factors before they are mixed, and out
of them after.

Shapes: A (..., R, in), B (..., out, R); the dots are the experts of a stacked pair, (E,), or nothing. Everything is
batched over experts. C clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """The factors of one LoRA: A (..., R, in), B (..., out, R)."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """R, from A's rows: which factor is which is told by name, never by shape."""
        return self.a.shape[-2]


def cut(pair: Pair, rank: int) -> Pair:
    """Return the pair's first `rank` components, with the share they had in the adapted weight (HetLoRA, FlexLoRA)."""
    return Pair(pair.a[..., :rank, :].clone(), pair.b[..., :rank] * (rank / pair.rank))


def update_norm(pair: Pair) -> Tensor:
    """Return the Frobenius norm of 1 / R * B A, float64 (...), from two R x R products: tr(AᵀBᵀBA) = <BᵀB, AAᵀ>."""
    gram_a = (pair.a @ pair.a.mT).to(torch.float64)
    gram_b = (pair.b.mT @ pair.b).to(torch.float64)
    return (gram_a * gram_b).sum(dim=(-2, -1)).clamp(min=0).sqrt() / pair.rank


def padded_mean(pairs: Iterable[Pair], weights: Tensor, previous: Pair) -> Pair:
    """Return sum_c w_c of the pairs, filled up with zeros to the rank of `previous`; A and B apart (HetLoRA).

    What nobody trained keeps the bits of `previous`: a component beyond the rank of every client with a weight, and so
    an expert whose weights are all 0. A component of zeros in A and B would never have a gradient again.

    Args:
        pairs: Of any ranks up to that of `previous`; one is held at a time.
        weights: (C,), or (C, E).
        previous: What the clients' pairs were cut from.
    """
    a = torch.zeros_like(previous.a, dtype=torch.float32)
    b = torch.zeros_like(previous.b, dtype=torch.float32)
    reached = torch.zeros(weights.shape[1:], dtype=torch.int64)
    for pair, shares in zip(pairs, weights.to(torch.float32).unbind(), strict=True):
        wide = shares[..., None, None]
        a[..., : pair.rank, :].addcmul_(pair.a.to(torch.float32), wide)
        b[..., : pair.rank].addcmul_(pair.b.to(torch.float32), wide * (previous.rank / pair.rank))
        reached = reached.maximum((shares > 0) * pair.rank)
    a, b = a.to(previous.a.dtype), b.to(previous.b.dtype)
    untrained = (torch.arange(previous.rank) >= reached[..., None]).expand(a.shape[:-1])
    a[untrained] = previous.a[untrained]
    b.mT[untrained] = previous.b.mT[untrained]
    return Pair(a, b)


def principal(pairs: Sequence[Pair], weights: Tensor, previous: Pair) -> Pair:
    """Return the best pair for the mean update sum_c w_c / r_c * B_c A_c, of the rank of `previous` (FlexLoRA).

    With the stacked factors' QR, B = Q_B R_B and Aᵀ = Q_A R_A, the SVD of the small core R_B R_Aᵀ = U S Vᵀ gives that
    of their product. A holds right singular vectors, B left ones times singular values times the rank.

    An expert whose weights are all 0 keeps the bits of `previous`. Where the pairs have fewer components than the
    result, the others begin anew: their rows of A from `previous`, B zero.

    Args:
        pairs: Of any ranks.
        weights: (C,), or (C, E).
        previous: What the clients' pairs were cut from.
    """
    stack = stacked([Pair(pair.a.to(torch.float32), pair.b.to(torch.float32)) for pair in pairs], weights)
    left, right = _Qr.of(stack.b), _Qr.of(stack.a.mT)
    u, s, vh = torch.linalg.svd(left.r @ right.r.mT, full_matrices=False)
    kept = min(previous.rank, s.shape[-1])
    a, b = previous.a.to(torch.float32, copy=True), torch.zeros_like(previous.b, dtype=torch.float32)
    a[..., :kept, :] = right.q_times(vh[..., :kept, :].mT).mT
    b[..., :kept] = left.q_times(u[..., :kept] * s[..., None, :kept]) * previous.rank
    used = (weights > 0).any(dim=0)[..., None, None]
    return Pair(
        torch.where(used, a.to(previous.a.dtype), previous.a), torch.where(used, b.to(previous.b.dtype), previous.b)
    )


class _Qr(NamedTuple):
    """A QR decomposition whose Q (m, k) stays reflectors: to multiply a few columns is cheaper than to form it."""

    reflectors: Tensor
    tau: Tensor

    @staticmethod
    def of(matrix: Tensor) -> _Qr:
        """Decompose (..., m, n); k = min(m, n)."""
        return _Qr(*torch.geqrf(matrix))

    @property
    def r(self) -> Tensor:
        """R (..., k, n)."""
        return self.reflectors[..., : self.tau.shape[-1], :].triu()

    def q_times(self, right: Tensor) -> Tensor:
        """Return Q times a matrix (..., k, columns)."""
        rows, k = self.reflectors.shape[-2], self.tau.shape[-1]
        below = (0, 0, 0, rows - k)
        return torch.ormqr(self.reflectors[..., :k], self.tau, torch.nn.functional.pad(right, below))


def stacked(pairs: Sequence[Pair], weights: Tensor) -> Pair:
    """Return one pair whose product B A is sum_c w_c / r_c * B_c A_c exactly (FLoRA's stacking); its rank is sum_c r_c.

    The product carries no scale of its own: it is to be attached with alpha times its rank.
    """
    ranks = [pair.rank for pair in pairs]
    *stack, _, inputs = pairs[0].a.shape
    a = pairs[0].a.new_empty(*stack, sum(ranks), inputs)
    parts = a.split_with_sizes(ranks, dim=-2)
    for part, pair, shares in zip(parts, pairs, weights.to(torch.float32).unbind(), strict=True):
        part.copy_(pair.a).mul_(shares[..., None, None] / pair.rank)
    return Pair(a, torch.cat([pair.b for pair in pairs], dim=-1))
