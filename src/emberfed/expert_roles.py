"""Who tunes which experts: utilities, the share of slots they decide, and the assignment (FLUX).

A client has a budget of experts it can tune. Most of its slots *exploit*: they go to the experts that are of most use
to it, which it trains. The others *explore*: experts drawn at random, of which it only estimates the gradient, so that
their utility is known when roles are given next. What of FLUX's assignment is not public is decided here and said so.

Shape suffixes: L layers with experts, E experts, C clients, N = L * E experts of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import scipy.optimize
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from emberfed.errors import ConfigError

Experts = tuple[tuple[int, ...], ...]
"""Ids of experts, ascending, for each layer with experts."""

_Floats = NDArray[np.float64]
_Bools = NDArray[np.bool_]


@final
@dataclass(frozen=True, slots=True)
class Roles:
    """What one client does with the experts it tunes.

    Attributes:
        exploited: Those it trains.
        explored: Those whose gradient it estimates, none of them exploited.
    """

    exploited: Experts
    explored: Experts

    @property
    def tuned(self) -> Experts:
        """Those of either role."""
        pairs = zip(self.exploited, self.explored, strict=True)
        return tuple(tuple(sorted(exploited + explored)) for exploited, explored in pairs)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Everybody's roles.

    Attributes:
        roles: By client, in the order of their names.
        shortfall_LE: How many clients each expert lacks of those that should train it, int64.
    """

    roles: Mapping[str, Roles]
    shortfall_LE: Tensor


def utility(examples_LE: Tensor, gradient_rms_LE: Tensor, known_LE: Tensor) -> Tensor:
    """Return u_e = |D^e| sqrt(mean over D^e of ||g||^2), float64 (L, E): how much a client's data would move experts.

    FLUX's statistical utility. Where no gradient is known yet, the mean of the client's known ones stands for it, or 1
    where none is: then only the number of examples decides.

    Args:
        examples_LE: |D^e|, how many of the client's examples have a token routed to the expert.
        gradient_rms_LE: The root mean square of its examples' gradient norms; read where `known_LE`.
        known_LE: Where the client has trained or explored the expert.

    Raises: ValueError if a known gradient is negative or not finite.
    """
    rms_LE = gradient_rms_LE.to(torch.float64)
    known = rms_LE[known_LE]
    if not bool((torch.isfinite(known) & (known >= 0)).all()):
        raise ValueError(f"gradients' root mean squares must be finite and not negative, found {known.tolist()}")
    typical = known.mean() if len(known) else torch.ones((), dtype=torch.float64)
    return examples_LE.to(torch.float64) * torch.where(known_LE, rms_LE, typical)


def exploitation_share(round: int, first: float, last: float, rounds: int) -> float:
    """Return the share of a client's slots that go by utility in a round, counted from 1.

    FLUX's epsilon grows: `first` in round 1, `last` in round `rounds`, linear between and constant from there on. It
    does not depend on how many rounds are planned, so that a run that is extended is one that was planned long.

    Raises: ValueError if `round` or `rounds` is below 1.
    """
    if min(round, rounds) < 1:
        raise ValueError(f"rounds are counted from 1, found round {round} of {rounds}")
    if round >= rounds:
        return last
    return first + (last - first) * (round - 1) / (rounds - 1)


def exploited_slots(budget: int, share: float) -> int:
    """Return how many of `budget` slots exploit: `share` of them, halves rounded up, at least one.

    One at least, because a client that only explores would train nothing.

    Raises: ConfigError if the share is not above 0 and at most 1, or the budget is below 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"the share of tuned experts that go by utility is {share:g}; choose above 0, at most 1")
    if budget < 1:
        raise ConfigError(f"a budget of {budget} tuned experts cannot be filled; choose at least 1")
    return max(1, math.floor(share * budget + 0.5))


def assign(
    utilities: Mapping[str, Tensor],
    budgets: Mapping[str, int],
    share: float,
    coverage: int,
    generators: Mapping[str, np.random.Generator],
    tunable: Mapping[str, Tensor] | None = None,
) -> Assignment:
    """Give every client its experts: by utility, and for coverage, and the rest at random.

    A client exploits `exploited_slots` of its budget. Without coverage those are its own highest utilities; with it, of
    all ways to have each expert exploited by `coverage` clients, one of the greatest sum of utilities (`covered`), each
    client's relative to its own greatest.
    The rest of the budget is drawn at random among its other experts, without replacement. All budgets are filled,
    unless a client has fewer experts that it can tune: then it exploits and explores those it has.

    Args:
        utilities: Of each client, (L, E), finite and not negative.
        budgets: How many experts each client can tune, over all layers.
        share: Of a budget that goes by utility, above 0.
        coverage: How many clients should exploit each expert that any can tune; 0: no matter.
        generators: Of each client's draw.
        tunable: Which experts a client can tune, bool (L, E): those that its data reach; None: all.

    Raises: ConfigError if a budget is below 1 or above all experts there are, or the share or coverage is impossible;
        ValueError if utilities differ in shape, or are negative or not finite.
    """
    if coverage < 0:
        raise ConfigError(f"coverage {coverage} is no number of clients; choose at least 0")
    clients = sorted(utilities)
    shape = _common_shape(utilities)
    utilities_CN = np.stack([utilities[client].to(torch.float64).numpy().ravel() for client in clients])
    tunable_CN = np.ones(utilities_CN.shape, dtype=np.bool_)
    if tunable is not None:
        tunable_CN = np.stack([tunable[client].numpy().ravel() for client in clients])
    slots_C = []
    for client, tunable_N in zip(clients, tunable_CN, strict=True):
        if budgets[client] > tunable_N.size:
            raise ConfigError(
                f"{client}: a budget of {budgets[client]} tuned experts is more than the model's {tunable_N.size}; "
                f"choose at most that"
            )
        slots_C.append(min(exploited_slots(budgets[client], share), int(tunable_N.sum())))
    if coverage:
        # Relative to the client's own greatest: nobody's scale, honest or not, may make the others' differences vanish.
        relative_CN = utilities_CN / np.where(utilities_CN.max(1) > 0, utilities_CN.max(1), 1)[:, None]
        exploited_CN = covered(relative_CN, tunable_CN, np.array(slots_C), coverage)
    else:
        exploited_CN = np.stack([_best(*row) for row in zip(utilities_CN, tunable_CN, slots_C, strict=True)])
    roles = {}
    for client, exploited_N, tunable_N in zip(clients, exploited_CN, tunable_CN, strict=True):
        others = np.flatnonzero(tunable_N & ~exploited_N)
        size = min(budgets[client] - int(exploited_N.sum()), len(others))
        explored_N = np.zeros_like(exploited_N)
        explored_N[generators[client].choice(others, size, replace=False)] = True
        roles[client] = Roles(_by_layer(exploited_N, shape), _by_layer(explored_N, shape))
    lacking_N = np.maximum(coverage * tunable_CN.any(0) - exploited_CN.sum(0), 0)
    return Assignment(roles, torch.from_numpy(lacking_N.astype(np.int64)).view(shape))


def covered(utilities_CN: _Floats, tunable_CN: _Bools, slots_C: NDArray[np.int64], coverage: int) -> _Bools:
    """Return who exploits what, bool (C, N): all slots filled, experts covered, and then the greatest sum of utilities.

    Coverage comes first: as few (expert, client) places as possible are missing of `coverage` clients for each expert
    that any can tune. Of all such assignments this is one of the greatest sum of utilities.

    It is the linear programme: maximise sum u x - P sum s over 0 <= x <= 1 and s >= 0, where x sums over experts to a
    client's slots, and over clients, with s, to at least `coverage`. Its matrix is the incidence matrix of a bipartite
    graph (clients, experts) beside an identity, hence totally unimodular: with whole right-hand sides every vertex is
    whole, and the simplex method ends at a vertex. One missing place is mended by a path of exchanges that visits each
    client at most once and loses at most the greatest utility there, so with utilities scaled to at most 1, P = C + 1
    puts coverage before any utility.

    Utilities closer than the solver's tolerance (1e-7 of the greatest) are ties; those are broken by the solver, which
    is deterministic.

    Args:
        utilities_CN: Finite and not negative.
        tunable_CN: Which experts a client can tune.
        slots_C: How many it exploits, at most as many as it can tune.
        coverage: How many clients each expert should have.

    Raises: ValueError if a client has more slots than experts it can tune.
    """
    if bool((slots_C > tunable_CN.sum(1)).any()):
        raise ValueError(f"{slots_C.tolist()} slots are more than the {tunable_CN.sum(1).tolist()} tunable experts")
    if not slots_C.any():
        return np.zeros_like(tunable_CN)
    client_X, expert_X = np.nonzero(tunable_CN)
    (wanted_W,) = np.nonzero(tunable_CN.any(0))
    chosen, missing = len(client_X), len(wanted_W)
    row_N = np.full(tunable_CN.shape[1], -1)
    row_N[wanted_W] = np.arange(missing)
    greatest = utilities_CN.max(initial=0) or 1.0
    cost = np.concatenate([-utilities_CN[client_X, expert_X] / greatest, np.full(missing, len(slots_C) + 1.0)])
    ones = np.ones(chosen)
    of_clients = scipy.sparse.csr_array((ones, (client_X, np.arange(chosen))), shape=(len(slots_C), chosen + missing))
    of_experts = scipy.sparse.hstack(
        [
            scipy.sparse.csr_array((ones, (row_N[expert_X], np.arange(chosen))), shape=(missing, chosen)),
            scipy.sparse.eye_array(missing),
        ],
        format="csr",
    )
    solution: Any = scipy.optimize.linprog(
        cost,
        A_ub=-of_experts,
        b_ub=np.full(missing, -coverage),
        A_eq=of_clients,
        b_eq=slots_C,
        bounds=np.column_stack([np.zeros(chosen + missing), np.concatenate([ones, np.full(missing, np.inf)])]),
        method="highs-ds",
    )
    assert solution.success, f"the programme always has a solution: {solution.message}"
    x_X = solution.x[:chosen]
    assert np.abs(x_X - np.round(x_X)).max(initial=0) < 1e-6, "a vertex of a totally unimodular programme is whole"
    result_CN = np.zeros_like(tunable_CN)
    result_CN[client_X, expert_X] = x_X > 0.5
    return result_CN


def _best(utilities_N: _Floats, tunable_N: _Bools, slots: int) -> _Bools:
    """Return the experts of the highest utilities, bool (N,); of equal ones the first."""
    ranked = np.argsort(np.where(tunable_N, -utilities_N, np.inf), kind="stable")
    best_N = np.zeros_like(tunable_N)
    best_N[ranked[:slots]] = True
    return best_N


def _by_layer(chosen_N: _Bools, shape: tuple[int, int]) -> Experts:
    return tuple(tuple(np.flatnonzero(chosen_E).tolist()) for chosen_E in chosen_N.reshape(shape))


def _common_shape(utilities: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (L, E), the same for all clients. Raises: ValueError."""
    shapes = {tuple(utility_LE.shape) for utility_LE in utilities.values()}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 2:
        raise ValueError(f"utilities must be of one shape (layers, experts), found {sorted(shapes)}")
    for client, utility_LE in utilities.items():
        if not bool((torch.isfinite(utility_LE) & (utility_LE >= 0)).all()):
            raise ValueError(f"{client}: utilities must be finite and not negative")
    layers, experts = shape
    return layers, experts
