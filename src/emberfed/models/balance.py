"""Losses that keep a gate from sending everything to few experts, and what is said of an adapter's load.

The Switch loss (https://arxiv.org/abs/2101.03961, eq. 4 to 6, here for any K) and the router z-loss
(https://arxiv.org/abs/2202.08906, eq. 5) are as published. FFT-MoE's heterogeneity-aware auxiliary loss is not: its
formula is not public, only that it takes the federation's load into account. What is here, `omega` and
`client_coefficient`, is a stand-in in the spirit of FFT-MoE.

Shapes: T tokens, K active experts, M experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch

from emberfed.errors import ConfigError

Kind = Literal["none", "switch", "heterogeneity"]

FLOOR = 1e-3
"""Added to every expert's share before shares are compared, so that an expert without load gives a finite number."""


def load_shares(index_TK: torch.Tensor, num_experts: int, real_T: torch.Tensor | None = None) -> torch.Tensor:
    """Return F, the share of the tokens' K choices that each expert got: float32 (M,), sum 1; zeros without tokens.

    Args:
        index_TK: The experts of each token.
        num_experts: M.
        real_T: True where a token counts; None: all do.
    """
    kept_NK = index_TK if real_T is None else index_TK[real_T]
    counts_M = torch.bincount(kept_NK.reshape(-1), minlength=num_experts).float()
    return counts_M / max(1, kept_NK.numel())


def switch_loss(
    logits_TM: torch.Tensor,
    index_TK: torch.Tensor,
    real_T: torch.Tensor | None = None,
    omega_M: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return M * sum over m of F_m P_m omega_m of one layer, a scalar.

    F_m is the share of the choices that went to expert m and has no gradient; P_m is the mean over tokens of the
    softmax over *all* logits, through which the gradient flows. Without omega this is Switch's loss: exactly 1 at
    uniform load for every K, whatever P is, and at least 1 wherever experts with more load have more probability. (It
    can be below 1 where they have less, which a gate that is unsure of its choices may bring about.)

    Args:
        logits_TM: The gate's logits.
        index_TK: The experts of each token.
        real_T: True where a token counts; None: all do. Without any the loss is 0.
        omega_M: Weights of mean 1; None: all ones.
    """
    kept_NM = logits_TM if real_T is None else logits_TM[real_T]
    probability_M = kept_NM.softmax(-1).sum(0) / max(1, len(kept_NM))
    shares_M = load_shares(index_TK, logits_TM.shape[1], real_T).to(probability_M)
    weights_M = shares_M if omega_M is None else shares_M * omega_M.to(shares_M)
    return logits_TM.shape[1] * (weights_M * probability_M).sum()


def z_loss(logits_TM: torch.Tensor, real_T: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean over tokens of logsumexp(logits)^2 of one layer, a scalar; 0 without tokens."""
    kept_NM = logits_TM if real_T is None else logits_TM[real_T]
    return kept_NM.logsumexp(-1).square().sum() / max(1, len(kept_NM))


def omega(global_load_M: torch.Tensor) -> torch.Tensor:
    """Return weights proportional to the federation's load, of mean 1 in the last dimension: float32 (..., M).

    Experts that all clients together used much weigh more, which pushes a client to those that were used little.
    Without any load, as before the first round, all weights are 1. A stand-in in the spirit of FFT-MoE, whose formula
    is not public.
    """
    load_M = global_load_M.double()
    mean_1 = load_M.mean(-1, keepdim=True)
    return torch.where(mean_1 > 0, load_M / mean_1.where(mean_1 > 0, 1), 1).float()


def divergence(client_load_M: torch.Tensor, global_load_M: torch.Tensor) -> float:
    """Return KL(client || global) of two loads in nats, the mean over layers; 0 for equal shares.

    `FLOOR` is added to every share of both, so the result is at most ln(1 + 1 / FLOOR). A layer in which either has no
    load says nothing, and counts as 0.

    Args:
        client_load_M: (M,) or (L, M), not negative: experts' loads, or counts of labels.
        global_load_M: The same of all clients.

    Raises: ValueError if the shapes differ.
    """
    if client_load_M.shape != global_load_M.shape:
        raise ValueError(f"loads must be of one shape, found {client_load_M.shape} and {global_load_M.shape}")
    client, whole = (load.double().reshape(-1, load.shape[-1]) for load in (client_load_M, global_load_M))
    known_L = (client.sum(-1) > 0) & (whole.sum(-1) > 0)
    p_LM, q_LM = (_floored_shares(load[known_L]) for load in (client, whole))
    return float((p_LM * (p_LM / q_LM).log()).sum()) / max(1, len(client))


def _floored_shares(load_LM: torch.Tensor) -> torch.Tensor:
    shares_LM = load_LM / load_LM.sum(-1, keepdim=True) + FLOOR
    return shares_LM / shares_LM.sum(-1, keepdim=True)


def client_coefficient(base: float, client_load_M: torch.Tensor, global_load_M: torch.Tensor) -> float:
    """Return base * (1 + KL(client || global)): clients unlike the others are regularised more.

    Arguments and errors as `divergence`. A stand-in in the spirit of FFT-MoE, whose formula is not public.
    """
    return base * (1 + divergence(client_load_M, global_load_M))


@final
@dataclass(frozen=True, slots=True)
class LoadStatistics:
    """How even a load is.

    Attributes:
        coefficient_of_variation: Standard deviation of the experts' loads over their mean, the mean over layers; 0 is
            even, sqrt(M - 1) is one expert with everything.
        dead_experts: Experts without any load, of all layers.
    """

    coefficient_of_variation: float
    dead_experts: int

    @staticmethod
    def of(load_LM: torch.Tensor) -> LoadStatistics:
        """Return the statistics of loads (L, M). Raises: ValueError if a layer has no load at all."""
        load_LM = load_LM.double()
        mean_L = load_LM.mean(-1)
        if not len(load_LM) or not bool((mean_L > 0).all()):
            raise ValueError(f"every layer needs some load, found {load_LM.sum(-1).tolist()}")
        variation_L = load_LM.std(-1, correction=0) / mean_L
        return LoadStatistics(float(variation_L.mean()), int((load_LM == 0).sum()))


class GateRecord(NamedTuple):
    """What a layer's gate did in a forward pass.

    Attributes:
        logits_TM: Its logits, with gradient.
        index_TK: The experts of each token.
        real_T: True where a token is not padding; None if all are.
    """

    logits_TM: torch.Tensor
    index_TK: torch.Tensor
    real_T: torch.Tensor | None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Regulariser:
    """What is added to the loss for the gates' sake.

    Attributes:
        kind: `switch` is the Switch loss; `heterogeneity` weighs its terms with `omega_LM`, a stand-in in the spirit of
            FFT-MoE; `none` is neither.
        coefficient: Of that loss, not negative; 0 if there is none.
        omega_LM: Weights by layer of the adapter and expert, (L, M), for `heterogeneity` alone.
        z_coefficient: Of the router z-loss, not negative.
    """

    kind: Kind = "none"
    coefficient: float = 0.0
    omega_LM: torch.Tensor | None = None
    z_coefficient: float = 0.0

    def __post_init__(self) -> None:
        """Raises: ConfigError if the parts do not go together."""
        if self.coefficient < 0 or self.z_coefficient < 0:
            raise ConfigError(
                f"coefficients of auxiliary losses are {self.coefficient} and {self.z_coefficient}; they must not be "
                f"negative"
            )
        if self.kind == "none" and self.coefficient:
            raise ConfigError(f"the auxiliary loss is none, but its coefficient is {self.coefficient}; make it 0")
        if (self.omega_LM is not None) != (self.kind == "heterogeneity"):
            raise ConfigError("weights of experts go with the auxiliary loss 'heterogeneity', and with no other")

    @property
    def is_active(self) -> bool:
        """Whether it adds anything."""
        return self.coefficient > 0 or self.z_coefficient > 0

    def loss(self, records: Sequence[GateRecord]) -> torch.Tensor:
        """Return the mean over layers of the weighted losses, a scalar with gradient.

        Args:
            records: One for each layer with a gate, in the order of `omega_LM`'s rows; at least one.
        """
        terms = []
        for row, (logits_TM, index_TK, real_T) in enumerate(records):
            omega_M = None if self.omega_LM is None else self.omega_LM[row]
            term = torch.zeros((), dtype=logits_TM.dtype, device=logits_TM.device)
            if self.coefficient > 0:
                term = term + self.coefficient * switch_loss(logits_TM, index_TK, real_T, omega_M)
            if self.z_coefficient > 0:
                term = term + self.z_coefficient * z_loss(logits_TM, real_T)
            terms.append(term)
        return torch.stack(terms).mean()


NO_REGULARISER = Regulariser()
