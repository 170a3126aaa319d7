"""Who tunes which experts: utilities by hand, assignments against every possible one, and what always holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from emberfed.errors import ConfigError
from emberfed.expert_roles import (
    Assignment,
    Experts,
    Roles,
    assign,
    covered,
    exploitation_share,
    exploited_slots,
    utility,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def generators(clients: object, seed: int = 0) -> dict[str, np.random.Generator]:
    assert isinstance(clients, dict)
    return {client: np.random.default_rng([seed, index]) for index, client in enumerate(sorted(clients))}


def size(experts: Experts) -> int:
    return sum(map(len, experts))


def mask(experts: Experts, shape: tuple[int, int]) -> Tensor:
    mask_LE = torch.zeros(shape, dtype=torch.bool)
    for row, ids in enumerate(experts):
        mask_LE[row, list(ids)] = True
    return mask_LE


# ------------------------------------------------------------------------------------------------ utilities


def test_utility_by_hand() -> None:
    """|D| = 4, 9, 5, 0 and rms 0.5, 2 known of the first two: 4 * 0.5 = 2, 9 * 2 = 18; the mean known rms is 1.25, so
    the third has 5 * 1.25 = 6.25, whatever stands there, and the fourth has no example."""
    found = utility(
        torch.tensor([[4, 9], [5, 0]]),
        torch.tensor([[0.5, 2.0], [torch.nan, 7.0]]),
        torch.tensor([[True, True], [False, False]]),
    )
    assert found.tolist() == [[2.0, 18.0], [6.25, 0.0]]
    assert found.dtype == torch.float64


def test_without_any_known_gradient_the_number_of_examples_is_the_utility() -> None:
    examples = torch.tensor([[3, 0, 7]])
    assert utility(examples, torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[3.0, 0.0, 7.0]]


@given(st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=1, max_size=6))
def test_utility_is_the_printed_formula_of_per_example_gradients(gradients: list[list[float]]) -> None:
    """|D| sqrt(1 / |D| sum ||g_k||^2) from the gradients themselves."""
    squares = [x * x + y * y for x, y in gradients]
    printed = len(squares) * (sum(squares) / len(squares)) ** 0.5
    rms = torch.tensor([[(sum(squares) / len(squares)) ** 0.5]], dtype=torch.float64)
    found = utility(torch.tensor([[len(squares)]]), rms, torch.ones(1, 1, dtype=torch.bool))
    assert found.item() == pytest.approx(printed)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_a_known_gradient_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        utility(torch.tensor([[1]]), torch.tensor([[value]]), torch.tensor([[True]]))


# ------------------------------------------------------------------------------------------------ the schedule


def test_the_share_grows_from_first_to_last_and_stays() -> None:
    """Four steps of 0.15 from 0.3 to 0.9."""
    shares = [exploitation_share(round, 0.3, 0.9, 5) for round in range(1, 9)]
    assert shares == pytest.approx([0.3, 0.45, 0.6, 0.75, 0.9, 0.9, 0.9, 0.9])
    assert exploitation_share(1, 0.3, 0.9, 1) == 0.9
    assert exploitation_share(1, 0.3, 0.9, 2) == 0.3


@pytest.mark.parametrize(("round", "rounds"), [(0, 5), (1, 0)])
def test_rounds_are_counted_from_one(round: int, rounds: int) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        exploitation_share(round, 0.3, 0.9, rounds)


def test_halves_are_rounded_up_and_one_slot_always_exploits() -> None:
    assert [exploited_slots(budget, 0.5) for budget in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert [exploited_slots(budget, 0.3) for budget in (1, 2, 10, 12)] == [1, 1, 3, 4]
    assert [exploited_slots(budget, 1.0) for budget in (1, 7)] == [1, 7]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share of tuned experts"):
        exploited_slots(4, share)


# ------------------------------------------------------------------------------------------------ assignments


@st.composite
def federations(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor], float, int]:
    """Utilities, budgets, tunable experts, share, coverage; few distinct utilities, so that ties are common."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    count = layers * experts
    utilities, budgets, tunable = {}, {}, {}
    for client in draw(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=5, unique=True)):
        numbers = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
        can = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        utilities[client] = torch.tensor(numbers, dtype=torch.float64).view(layers, experts)
        tunable[client] = torch.tensor(can).view(layers, experts)
        budgets[client] = draw(st.integers(1, count))
    return utilities, budgets, tunable, draw(st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0])), draw(st.integers(0, 3))


def given_out(
    federation: tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor], float, int], seed: int = 0
) -> Assignment:
    utilities, budgets, tunable, share, coverage = federation
    return assign(utilities, budgets, share, coverage, generators(utilities, seed), tunable)


@given(federations())
def test_budgets_are_filled_with_experts_the_client_can_tune_each_in_one_role(
    federation: tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor], float, int],
) -> None:
    utilities, budgets, tunable, share, coverage = federation
    assignment = given_out(federation)
    assert list(assignment.roles) == sorted(utilities)
    exploiting_LE = torch.zeros_like(assignment.shortfall_LE)
    for client, roles in assignment.roles.items():
        possible = int(tunable[client].sum())
        assert size(roles.exploited) == min(exploited_slots(budgets[client], share), possible)
        assert size(roles.tuned) == min(budgets[client], possible)
        shape = (tunable[client].shape[0], tunable[client].shape[1])
        exploited, explored, tuned = (mask(part, shape) for part in (roles.exploited, roles.explored, roles.tuned))
        assert not (exploited & explored).any()
        assert torch.equal(exploited | explored, tuned)
        assert not (tuned & ~tunable[client]).any()
        assert all(list(ids) == sorted(set(ids)) for ids in (*roles.exploited, *roles.explored, *roles.tuned))
        exploiting_LE += exploited
    wanted = coverage * torch.stack(list(tunable.values())).any(0)
    assert torch.equal(assignment.shortfall_LE, (wanted - exploiting_LE).clamp(min=0))


@given(federations())
def test_same_input_same_roles_in_any_order_of_clients_and_other_draws_explore_others_only(
    federation: tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor], float, int],
) -> None:
    utilities, budgets, tunable, share, coverage = federation
    first = given_out(federation)
    again = given_out((dict(reversed(utilities.items())), budgets, tunable, share, coverage))
    assert first.roles == again.roles
    other = given_out(federation, seed=1)
    assert {client: roles.exploited for client, roles in first.roles.items()} == {
        client: roles.exploited for client, roles in other.roles.items()
    }


@given(federations())
def test_without_coverage_everybody_exploits_its_highest_utilities(
    federation: tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor], float, int],
) -> None:
    utilities, budgets, tunable, share, _ = federation
    assignment = given_out((utilities, budgets, tunable, share, 0))
    for client, roles in assignment.roles.items():
        places = [
            (-float(utilities[client][row, expert]), row, expert)
            for row, expert in itertools.product(*map(range, utilities[client].shape))
            if tunable[client][row, expert]
        ]
        best = {(row, expert) for _, row, expert in sorted(places)[: exploited_slots(budgets[client], share)]}
        assert {(row, expert) for row, ids in enumerate(roles.exploited) for expert in ids} == best
    assert not assignment.shortfall_LE.any()


def everything(tunable_CN: Bools, slots_C: list[int]) -> Iterator[Bools]:
    """All assignments there are."""
    rows = [
        [np.isin(np.arange(len(tunable_N)), chosen) for chosen in itertools.combinations(np.flatnonzero(tunable_N), n)]
        for tunable_N, n in zip(tunable_CN, slots_C, strict=True)
    ]
    for chosen in itertools.product(*rows):
        yield np.stack(chosen)


def missing(exploited_CN: Bools, tunable_CN: Bools, coverage: int) -> int:
    return int(np.maximum(coverage * tunable_CN.any(0) - exploited_CN.sum(0), 0).sum())


@st.composite
def tiny_programmes(draw: st.DrawFn) -> tuple[Floats, Bools, list[int], int]:
    clients, experts = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    numbers = draw(st.lists(st.integers(0, 9), min_size=clients * experts, max_size=clients * experts))
    can = draw(st.lists(st.booleans(), min_size=clients * experts, max_size=clients * experts))
    tunable_CN = np.array(can).reshape(clients, experts)
    slots = [draw(st.integers(0, int(tunable_N.sum()))) for tunable_N in tunable_CN]
    return np.array(numbers, dtype=np.float64).reshape(clients, experts), tunable_CN, slots, draw(st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(tiny_programmes())
def test_coverage_first_then_utility_against_every_assignment(programme: tuple[Floats, Bools, list[int], int]) -> None:
    utilities_CN, tunable_CN, slots_C, coverage = programme
    found_CN = covered(utilities_CN, tunable_CN, np.array(slots_C), coverage)
    assert found_CN.sum(1).tolist() == slots_C
    assert not (found_CN & ~tunable_CN).any()
    best = min(
        (missing(chosen_CN, tunable_CN, coverage), -float(utilities_CN[chosen_CN].sum()))
        for chosen_CN in everything(tunable_CN, slots_C)
    )
    value = (missing(found_CN, tunable_CN, coverage), -float(utilities_CN[found_CN].sum()))
    assert value[0] == best[0]
    assert value[1] == pytest.approx(best[1])


def test_coverage_comes_before_any_utility() -> None:
    """Client i of 0..5 values expert i at 1 and expert i + 1 at 0, and can tune no other; client 6 can only tune
    expert 0. Expert 6 is missing unless all six move up by one, which costs all their utility for one place: a penalty
    below 6 would not pay."""
    utilities_CN = np.eye(7)
    tunable_CN = (np.eye(7) + np.eye(7, k=1)).astype(np.bool_)
    tunable_CN[6] = np.arange(7) == 0
    found_CN = covered(utilities_CN, tunable_CN, np.ones(7, dtype=np.int64), 1)
    assert found_CN.argmax(1).tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert found_CN.sum(1).tolist() == [1] * 7


def test_covering_by_hand() -> None:
    """Two clients with one slot each, both of whom want expert 0: somebody must take expert 1, and client b loses less
    by it (5 - 4 against 9 - 3). Expert 2 stays without: two slots cannot cover three."""
    utilities = {"a": torch.tensor([[9.0, 3.0, 0.0]]), "b": torch.tensor([[5.0, 4.0, 0.0]])}
    assignment = assign(utilities, {"a": 1, "b": 1}, 1.0, 1, generators(utilities))
    assert assignment.roles == {"a": Roles(((0,),), ((),)), "b": Roles(((1,),), ((),))}
    assert assignment.shortfall_LE.tolist() == [[0, 0, 1]]
    alone = assign(utilities, {"a": 1, "b": 1}, 1.0, 0, generators(utilities))
    assert alone.roles["b"].exploited == ((0,),)


def test_a_federation_of_real_size_covers_everything_it_has_room_for() -> None:
    """30 clients x 28 layers x 64 experts: 90 % of 150 slots is 135 each, 4050 in all, two for each of 1792 experts."""
    rng = np.random.default_rng(0)
    utilities = {f"c{index:02}": torch.from_numpy(rng.integers(0, 20, (28, 64))).double() for index in range(30)}
    assignment = assign(utilities, dict.fromkeys(utilities, 150), 0.9, 2, generators(utilities))
    assert not assignment.shortfall_LE.any()
    assert {size(roles.exploited) for roles in assignment.roles.values()} == {135}
    assert {size(roles.explored) for roles in assignment.roles.values()} == {15}


def test_exploration_reaches_every_expert_that_is_not_exploited() -> None:
    """One slot of two explores: in 200 draws each of the 7 others comes up (the chance that one does not is 3e-13)."""
    utilities = {"a": torch.tensor([[8.0, 1, 1, 1], [1, 1, 1, 1]])}
    seen = {assign(utilities, {"a": 2}, 0.5, 0, generators(utilities, seed)).roles["a"].explored for seed in range(200)}
    single = [((expert,), ()) for expert in (1, 2, 3)] + [((), (expert,)) for expert in range(4)]
    assert seen == set(single)


# ------------------------------------------------------------------------------------------------ bad input


def test_budgets_that_cannot_be_filled_are_refused_by_name() -> None:
    utilities = {"a": torch.ones(2, 3)}
    with pytest.raises(ConfigError, match=r"a: a budget of 7 tuned experts is more than the model's 6"):
        assign(utilities, {"a": 7}, 0.5, 0, generators(utilities))
    with pytest.raises(ConfigError, match=r"a budget of 0 tuned experts"):
        assign(utilities, {"a": 0}, 0.5, 0, generators(utilities))
    with pytest.raises(ConfigError, match=r"coverage -1"):
        assign(utilities, {"a": 1}, 0.5, -1, generators(utilities))


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_utilities_that_are_none_are_refused_by_name(value: float) -> None:
    utilities = {"a": torch.ones(1, 2), "b": torch.tensor([[1.0, value]])}
    with pytest.raises(ValueError, match="b: utilities must be finite"):
        assign(utilities, {"a": 1, "b": 1}, 0.5, 0, generators(utilities))


def test_utilities_of_other_shapes_are_refused() -> None:
    utilities = {"a": torch.ones(1, 2), "b": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="one shape"):
        assign(utilities, {"a": 1, "b": 1}, 0.5, 0, generators(utilities))


def test_more_slots_than_tunable_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        covered(np.ones((1, 2)), np.array([[True, False]]), np.array([2]), 1)
