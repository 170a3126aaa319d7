"""What the server does with the clients' mean: take it, or take it as a gradient (Reddi et al. 2021, "Adaptive
Federated Optimization", algorithm 2; Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification", FedAvgM).

With x the server's tensors, d = mean - x the pseudo-gradient, eta the learning rate, and b1, b2 the decays:

    average    x + eta d
    fedavgm    m <- b1 m + d;            x + eta m
    fedadam    m <- b1 m + (1 - b1) d;   v <- b2 v + (1 - b2) d^2;                  x + eta m / (sqrt(v) + tau)
    fedyogi    m as fedadam;             v <- v - (1 - b2) d^2 sign(v - d^2);       x + eta m / (sqrt(v) + tau)

All in float32. m begins at 0 and v at tau^2, the least the paper allows. As in the paper, and unlike Adam, no bias is
corrected. Where we deviate: an expert that nobody trained in a round keeps its bits and its moments, where the paper
would have momentum move it.

Shape suffixes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from emberfed.errors import AggregationError
from emberfed.sections import Section

FIRST, SECOND = "optimizer.first.", "optimizer.second."
"""What the names of moments m and v begin with; the name of their tensor follows."""

Name = Literal["average", "fedavgm", "fedadam", "fedyogi"]
_MOMENTS: Mapping[Name, tuple[str, ...]] = {
    "average": (),
    "fedavgm": (FIRST,),
    "fedadam": (FIRST, SECOND),
    "fedyogi": (FIRST, SECOND),
}
_MOMENT_OF = {"momentum": FIRST, "beta_2": SECOND, "tau": SECOND}
"""The moment that a key of the configuration is about."""


class ServerOptimizerConfig(Section):
    """How the server goes from its adapter to the next one, given the clients' mean.

    Attributes:
        name: `average` takes the mean; `fedavgm` adds momentum; `fedadam` and `fedyogi` scale each number's step by
            its past ones too.
        learning_rate: eta of the server; null: 1 for `average` and `fedavgm` (the mean itself, without momentum), 0.01
            for `fedadam` and `fedyogi` (each number then moves by up to about that much).
        momentum: b1, decay of the mean of steps; not for `average`.
        beta_2: b2, decay of the mean of squares; for `fedadam` and `fedyogi`.
        tau: Smallest scale of a step that counts as large, added to the root of the squares; for `fedadam` and
            `fedyogi`.
    """

    name: Name = "average"
    learning_rate: float | None = Field(None, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    beta_2: float = Field(0.99, ge=0, lt=1)
    tau: float = Field(1e-3, ge=1e-10, le=1e6)

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> ServerOptimizerConfig:
        for key, moment in _MOMENT_OF.items():
            if moment not in _MOMENTS[self.name] and getattr(self, key) != type(self).model_fields[key].default:
                users = " or ".join(name for name, moments in _MOMENTS.items() if moment in moments)
                raise ValueError(f"{key} has no effect with name: {self.name}; leave it out, or set name: {users}")
        return self

    @property
    def rate(self) -> float:
        """The learning rate, that of the name where none is given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.name in ("average", "fedavgm") else 0.01


def step(
    config: ServerOptimizerConfig,
    previous: Mapping[str, Tensor],
    averaged: Mapping[str, Tensor],
    memory: Mapping[str, Tensor],
    untouched: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the next tensors, in the dtypes of `previous`, and the next memory, in float32, both by sorted name.

    Args:
        config: Which optimiser. `average` at rate 1 returns the bits of `averaged` (experts nobody trained apart).
        previous: What the clients began with.
        averaged: Their mean: the same names and shapes.
        memory: What the last step returned; empty before the first. Its names begin with `optimizer.`.
        untouched: By name of a stacked tensor, bool (E,): experts that nobody trained. They and their moments keep
            their bits.

    Raises: AggregationError if names or shapes do not match.
    """
    prefixes = _MOMENTS[config.name]
    _check_names("the mean", averaged, set(previous))
    _check_names("the mask of untouched experts", untouched, set(previous) & set(untouched))
    if memory:
        _check_names("the memory", memory, {prefix + name for prefix in prefixes for name in previous})
    tensors: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, before in sorted(previous.items()):
        mean = averaged[name]
        _check_shape("the mean of", name, mean, before.shape)
        old = [memory[prefix + name] if memory else _initial(prefix, config, before) for prefix in prefixes]
        for prefix, moment in zip(prefixes, old, strict=True):
            _check_shape("the memory of", prefix + name, moment, before.shape)
        delta = mean.to(torch.float32) - before.to(torch.float32)
        new = _next_moments(config, old, delta)
        if config.name == "average" and config.rate == 1:
            after = mean.to(before.dtype)  # x + (mean - x) differs from it in the last bits
        else:
            after = (before.to(torch.float32) + config.rate * _direction(config, delta, new)).to(before.dtype)
        if name in untouched:
            _check_shape("the mask of untouched experts of", name, untouched[name], before.shape[:1])
            frozen = untouched[name].view(-1, *[1] * (before.dim() - 1))
            after = torch.where(frozen, before, after)
            new = [torch.where(frozen, kept, moved) for kept, moved in zip(old, new, strict=True)]
        tensors[name] = after
        moments |= {prefix + name: moment for prefix, moment in zip(prefixes, new, strict=True)}
    return tensors, dict(sorted(moments.items()))


def _initial(prefix: str, config: ServerOptimizerConfig, like: Tensor) -> Tensor:
    return torch.full_like(like, 0.0 if prefix == FIRST else config.tau**2, dtype=torch.float32)


def _next_moments(config: ServerOptimizerConfig, old: Sequence[Tensor], delta: Tensor) -> list[Tensor]:
    """Return the moments after a pseudo-gradient, as many as there were."""
    if config.name == "average":
        return []
    if config.name == "fedavgm":
        return [config.momentum * old[0] + delta]
    first = config.momentum * old[0] + (1 - config.momentum) * delta
    square = delta.square()
    if config.name == "fedadam":
        return [first, config.beta_2 * old[1] + (1 - config.beta_2) * square]
    return [first, old[1] - (1 - config.beta_2) * square * (old[1] - square).sign()]


def _direction(config: ServerOptimizerConfig, delta: Tensor, moments: Sequence[Tensor]) -> Tensor:
    if config.name == "average":
        return delta
    if config.name == "fedavgm":
        return moments[0]
    return moments[0] / (moments[1].sqrt() + config.tau)


def _check_names(what: str, found: Mapping[str, Tensor], expected: set[str]) -> None:
    odd = sorted(set(found) ^ expected)
    if odd:
        how = "holds" if odd[0] in found else "lacks"
        raise AggregationError(
            f"server optimiser: {what} {how} {odd[0]!r}; its tensors must be those of the server's adapter"
        )


def _check_shape(what: str, name: str, found: Tensor, expected: Sequence[int]) -> None:
    if tuple(found.shape) != tuple(expected):
        raise AggregationError(
            f"server optimiser: {what} {name!r} has shape {tuple(found.shape)}, but {tuple(expected)} was expected; "
            f"an adapter must keep the ranks and experts it has"
        )
