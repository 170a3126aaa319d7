"""Tiers, budgets, enrolment and cohorts, checked against hand-computed values and exact fractions."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberfed.clients import (
    Budget,
    Client,
    ClientsConfig,
    Tier,
    client_ids,
    cohort,
    enrol,
    largest_remainder,
    resolve,
)
from emberfed.errors import ConfigError
from emberfed.sections import validate
from emberfed.seeds import Seeds

PAPER = [("1/8", 1), ("1/4", 2), ("1/2", 4), ("1", 8)]


def tiers(*shares: float) -> list[dict[str, Any]]:
    return [{"name": f"t{number}", "share": share, "top_k": number + 1} for number, share in enumerate(shares)]


def config(count: int, *shares: float, **options: Any) -> ClientsConfig:
    return validate(ClientsConfig, {"count": count, "tiers": tiers(*(shares or (1.0,))), **options}, "clients")


def enrolled(count: int, *shares: float, seed: int = 0) -> tuple[Client, ...]:
    examples = {id_: 10 + number for number, id_ in enumerate(client_ids(count))}
    return enrol(examples, config(count, *shares), 8, 64, Seeds(seed))


@pytest.mark.parametrize(("beta", "top_k"), PAPER)
def test_beta_is_the_papers_budget(beta: str, top_k: int) -> None:
    tier = Tier(name="t", share=1.0, beta=float(Fraction(beta)))
    assert resolve([tier], 8, 64) == [Budget("t", top_k)]


@given(st.integers(1, 64), st.integers(1, 200), st.integers(1, 200))
def test_beta_rule_is_an_exact_floor_of_at_least_one(native: int, numerator: int, denominator: int) -> None:
    beta = Fraction(min(numerator, denominator), denominator)
    (budget,) = resolve([Tier(name="t", share=1.0, beta=float(beta))], native, 64)
    assert budget.top_k == max(1, math.floor(native * beta))
    assert 1 <= budget.top_k <= native


def test_resolve_keeps_order_rank_and_every_k_up_to_the_experts() -> None:
    listed = [Tier(name="b", share=0.5, top_k=64, rank=12), Tier(name="a", share=0.5, top_k=1)]
    assert resolve(listed, 8, 64) == [Budget("b", 64, 12), Budget("a", 1, None)]


@pytest.mark.parametrize(
    ("keys", "top_k"),
    [({"adapter_top_k": 3}, 8), ({"adapter_top_k": 3, "top_k": 2}, 2), ({"adapter_top_k": 3, "beta": 0.5}, 4)],
)
def test_a_tier_with_an_adapters_k_may_leave_the_models_own_to_the_checkpoint(keys: dict[str, Any], top_k: int) -> None:
    assert resolve([Tier(name="t", share=1.0, **keys)], 8, 64) == [Budget("t", top_k, None, 3)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"adapter_top_k": 0}, "adapter_top_k"),
        ({"adapter_top_k": 1.5}, "adapter_top_k"),
        ({"adapter_top_k": 2, "top_k": 1, "beta": 0.5}, "exactly one of top_k and beta"),
        ({"rank": 2}, "exactly one of top_k and beta"),
    ],
)
def test_impossible_tiers_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Tier, {"name": "t", "share": 1.0, **keys}, "tier")
    assert words in str(caught.value)


def test_more_active_experts_than_there_are_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"tier 'big' has top_k 65, the model can send a token to 64 experts at most; choose 1 to 64"
    ):
        resolve([Tier(name="big", share=1.0, top_k=65)], 8, 64)


@pytest.mark.parametrize(
    ("shares", "total", "expected"),
    [
        ([0.25, 0.25, 0.25, 0.25], 8, [2, 2, 2, 2]),
        ([0.5, 0.3, 0.2], 8, [4, 2, 2]),  # 4, 2.4, 1.6: the .6 gets the one left
        ([1 / 3, 1 / 3, 1 / 3], 4, [2, 1, 1]),  # equal remainders: the earlier
        ([0.1] * 10, 10, [1] * 10),
        ([0.7, 0.2, 0.1], 10, [7, 2, 1]),  # 0.7 * 10 is 7 exactly, whatever floats say
        ([1.0], 3, [3]),
        ([1 / 9, 1 / 9, 7 / 9], 165, [19, 18, 128]),  # 18 1/3, 18 1/3, 128 1/3: equal, although floats differ
        ([0.9, 0.1], 1, [1, 0]),
    ],
)
def test_largest_remainder_by_hand(shares: list[float], total: int, expected: list[int]) -> None:
    assert largest_remainder(shares, total) == expected


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 300))
def test_largest_remainder_against_exact_fractions(weights: list[int], total: int) -> None:
    exact = [Fraction(weight, sum(weights)) * total for weight in weights]
    counts = largest_remainder([weight / sum(weights) for weight in weights], total)
    assert sum(counts) == total
    assert all(math.floor(share) <= count <= math.ceil(share) for share, count in zip(exact, counts, strict=True))
    remainders = [share - math.floor(share) for share in exact]
    raised = {index for index, share in enumerate(exact) if counts[index] > math.floor(share)}
    slow = sorted(range(len(exact)), key=lambda index: (-remainders[index], index))[
        : total - sum(map(math.floor, exact))
    ]
    assert raised == set(slow)


def test_enrolment_gives_tiers_their_counts_and_clients_their_examples() -> None:
    clients = enrolled(10, 0.5, 0.3, 0.2)
    assert Counter(client.budget.tier for client in clients) == {"t0": 5, "t1": 3, "t2": 2}
    assert [client.id for client in clients] == client_ids(10)
    assert [client.examples for client in clients] == list(range(10, 20))
    assert all(client.budget.top_k == int(client.budget.tier[1:]) + 1 for client in clients)


def test_who_gets_which_tier_is_drawn_by_the_seed() -> None:
    assert enrolled(20, 0.5, 0.5) == enrolled(20, 0.5, 0.5)
    assert enrolled(20, 0.5, 0.5) != enrolled(20, 0.5, 0.5, seed=1)
    tier_of_first = Counter(enrolled(4, 0.25, 0.75, seed=seed)[0].budget.tier for seed in range(400))
    assert 60 <= tier_of_first["t0"] <= 140  # a quarter of 400, within 4.6 standard deviations


def test_order_of_the_examples_does_not_matter() -> None:
    examples = {"c1": 5, "c0": 4, "c2": 6}
    assert enrol(examples, config(3), 8, 64, Seeds(0)) == enrol(
        dict(sorted(examples.items())), config(3), 8, 64, Seeds(0)
    )


def test_a_tier_without_client_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tier 't1' with share 0.1 gets none of the 3 clients; raise its share"):
        enrolled(3, 0.9, 0.1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tiers": tiers(0.5, 0.4)}, "must sum to 1, they sum to 0.9"),
        ({"tiers": tiers(0.5, 0.6)}, "they sum to 1.1"),
        ({"tiers": tiers(0.5, 0.500002)}, "they sum to 1.000002"),
        ({"tiers": []}, "tiers"),
        ({"tiers": [{"name": "t", "share": 1}]}, "tier 't' needs exactly one of top_k and beta"),
        ({"tiers": [{"name": "t", "share": 1, "top_k": 1, "beta": 0.5}]}, "exactly one of top_k and beta"),
        ({"tiers": [{"name": "t", "share": 0.5, "top_k": 1}] * 2}, "tier names must differ"),
        ({"tiers": [{"name": "a/b", "share": 1, "top_k": 1}]}, "name"),
        ({"tiers": [{"name": "t", "share": 1, "topk": 1}]}, "did you mean 'top_k'?"),
        ({"tiers": [{"name": "t", "share": 1, "top_k": 0}]}, "top_k"),
        ({"tiers": [{"name": "t", "share": 1, "beta": 1.5}]}, "beta"),
        ({"tiers": [{"name": "t", "share": 1, "top_k": 1, "rank": 0}]}, "rank"),
        ({"count": 0}, "clients.count"),
        ({"per_round": 5}, "per_round 5 is more than the 4 clients there are"),
        ({"per_round": 2, "fraction": 0.5}, "give fraction or per_round, not both"),
        ({"fraction": 0.5, "min_replies": 3}, "min_replies 3 is more than the 2 clients asked"),
        ({"fraction": 0}, "fraction"),
        ({"fraction": 1.1}, "fraction"),
    ],
)
def test_impossible_clients_are_refused_in_words(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(ClientsConfig, {"count": 4, "tiers": tiers(1.0), **values}, "clients")
    assert words in str(caught.value)


def test_shares_may_miss_one_by_rounding() -> None:
    third = 0.3333333
    assert len(enrolled(3, third, third, third)) == 3


@pytest.mark.parametrize(
    ("count", "options", "asked"),
    [
        (8, {}, 8),
        (8, {"fraction": 0.5}, 4),
        (10, {"fraction": 0.25}, 3),
        (10, {"fraction": 0.3}, 3),
        (10, {"fraction": 0.7}, 7),
        (100, {"fraction": 0.07}, 7),
        (8, {"fraction": 0.01}, 1),
        (8, {"per_round": 3}, 3),
    ],
)
def test_clients_asked_in_a_round(count: int, options: dict[str, Any], asked: int) -> None:
    settings = config(count, **options)
    assert settings.asked == asked
    assert len(cohort(enrolled(count), settings, 1, Seeds(0))) == asked


def test_everybody_is_asked_in_order_of_ids() -> None:
    clients = enrolled(12)
    assert cohort(tuple(reversed(clients)), config(12), 1, Seeds(0)) == clients


def test_cohorts_are_samples_that_change_with_round_and_seed() -> None:
    clients, settings = enrolled(12), config(12, per_round=5)
    rounds = [cohort(clients, settings, round, Seeds(0)) for round in range(1, 9)]
    assert rounds == [cohort(clients, settings, round, Seeds(0)) for round in range(1, 9)]
    assert len({tuple(client.id for client in asked) for asked in rounds}) == 8
    assert rounds != [cohort(clients, settings, round, Seeds(1)) for round in range(1, 9)]
    for asked in rounds:
        assert len({client.id for client in asked}) == 5
        assert [client.id for client in asked] == sorted(client.id for client in asked)
        assert set(asked) <= set(clients)


def test_every_client_is_asked_about_as_often() -> None:
    clients, settings = enrolled(10), config(10, per_round=3)
    asked = Counter(client.id for round in range(1, 1001) for client in cohort(clients, settings, round, Seeds(0)))
    # 300 expected each; one standard deviation of a hypergeometric count is sqrt(1000 * 0.3 * 0.7) = 14.5.
    assert set(asked) == set(client_ids(10))
    assert all(abs(count - 300) < 65 for count in asked.values())


@given(st.integers(1, 2000))
def test_ids_sort_as_numbers(count: int) -> None:
    ids = client_ids(count)
    assert ids == sorted(ids)
    assert [int(id_[1:]) for id_ in ids] == list(range(count))
