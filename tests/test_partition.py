"""Dividing examples over clients: every row with exactly one client, by the seed alone, or a line that says why not."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from emberfed.clients import client_ids
from emberfed.data.config import (
    DirichletPartition,
    IidPartition,
    LabelPartition,
    NaturalPartition,
    PartitionConfig,
    ShardsPartition,
    SizePartition,
)
from emberfed.data.inspect import total_variation
from emberfed.data.partition import Partition, partition, split_client
from emberfed.errors import DataError
from emberfed.seeds import Seeds

SIZES: dict[str, Callable[[int], float]] = {"linear": float, "square": lambda n: float(n**2), "exponential": math.exp}


def records(count: int, labels: int = 4, **columns: list[Any]) -> datasets.Dataset:
    """Rows in order of their label."""
    category = [f"k{number * labels // count}" for number in range(count)]
    text = [f"t{number}" for number in range(count)]
    return datasets.Dataset.from_dict({"instruction": text, "response": text, "category": category, **columns})


def divide(data: datasets.Dataset, config: PartitionConfig, clients: int, seed: int = 0) -> Partition:
    return partition(data, config, clients, Seeds(seed))


def check(data: datasets.Dataset, config: PartitionConfig, clients: int, seed: int) -> Partition:
    """What holds for every kind."""
    made = divide(data, config, clients, seed)
    assert list(made.rows) == client_ids(clients)
    assert all(made.rows.values())
    assert Counter(row for rows in made.rows.values() for row in rows) == Counter(range(len(data)))
    assert all(list(rows) == sorted(rows) for rows in made.rows.values())
    assert divide(data, config, clients, seed).rows == made.rows
    assert made.kind == config.kind
    assert Partition.from_json(json.loads(json.dumps(made.json()))).json() == made.json()
    return made


seeds = st.integers(0, 50)


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(0, 60), seeds)
def test_iid_is_even(clients: int, extra: int, seed: int) -> None:
    made = check(records(clients + extra), IidPartition(), clients, seed)
    sizes = [len(rows) for rows in made.rows.values()]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40)
@given(st.integers(2, 8), st.floats(0.3, 50), st.integers(1, 3), seeds)
def test_dirichlet_gives_everybody_the_minimum(clients: int, alpha: float, least: int, seed: int) -> None:
    config = DirichletPartition(kind="dirichlet", alpha=alpha, min_examples=least)
    made = check(records(160, labels=8), config, clients, seed)
    assert min(len(rows) for rows in made.rows.values()) >= least


@settings(max_examples=40)
@given(st.integers(2, 10), st.integers(1, 4), st.integers(2, 10), seeds)
def test_label_gives_exactly_so_many_labels(clients: int, per_client: int, labels: int, seed: int) -> None:
    assume(per_client <= labels <= clients * per_client)
    data = records(labels * 40, labels)
    made = check(data, LabelPartition(kind="label", labels_per_client=per_client), clients, seed)
    category = data["category"]
    held = [{category[row] for row in rows} for rows in made.rows.values()]
    assert {len(labels_held) for labels_held in held} == {per_client}
    holders = Counter(label for labels_held in held for label in labels_held)
    assert max(holders.values()) - min(holders.values()) <= 1


@settings(max_examples=40)
@given(st.integers(1, 10), st.integers(1, 4), st.integers(2, 10), seeds)
def test_shards_are_even_pieces_of_the_sorted_rows(clients: int, pieces: int, labels: int, seed: int) -> None:
    """A piece of s rows, sorted by label, holds at most 1 + ceil((s - 1) / 20) labels when each label has 20 rows."""
    data = records(labels * 20, labels)
    made = check(data, ShardsPartition(kind="shards", shards_per_client=pieces), clients, seed)
    category = data["category"]
    largest = math.ceil(len(data) / (clients * pieces))
    for rows in made.rows.values():
        assert abs(len(rows) - len(data) / clients) <= pieces
        assert len({category[row] for row in rows}) <= pieces * (1 + math.ceil((largest - 1) / 20))


def test_shards_by_hand() -> None:
    """Two clients, two pieces each, of 8 rows aabbccdd: a piece is one label, so each client has two labels whole."""
    data = records(8, 4)
    rows = divide(data, ShardsPartition(kind="shards", shards_per_client=2), 2).rows
    category = data["category"]
    held = [Counter(category[row] for row in own) for own in rows.values()]
    assert [set(counts.values()) for counts in held] == [{2}, {2}]
    assert held[0].keys().isdisjoint(held[1])


@settings(max_examples=60)
@given(st.sets(st.integers(0, 999), min_size=2, max_size=60), st.floats(0.01, 0.5), seeds)
def test_a_client_s_own_rows_are_divided_once_and_for_all(rows: set[int], share: float, seed: int) -> None:
    own = sorted(rows)
    trained, kept = split_client("c1", own, share, Seeds(seed))
    assert sorted([*trained, *kept]) == own
    assert trained
    assert len(kept) == max(1, round(share * len(own)))
    assert (list(trained), list(kept)) == (sorted(trained), sorted(kept))
    assert split_client("c1", own, share, Seeds(seed)) == (trained, kept)


def test_each_client_draws_its_own_test_rows() -> None:
    drawn = {split_client(client, range(40), 0.5, Seeds(0)) for client in client_ids(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize("rows", [[], [3]])
def test_a_client_with_too_few_rows_to_divide_is_named(rows: list[int]) -> None:
    with pytest.raises(DataError, match=r"client c07 has .* example.*client_test_share 0\.2"):
        split_client("c07", rows, 0.2, Seeds(0))


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["anna", "bo", "7", "10", "07", "x y"]), min_size=1, max_size=40), seeds)
def test_natural_is_a_client_per_name(names: list[str], seed: int) -> None:
    clients = len(set(names))
    made = check(records(len(names), 1, client=names), NaturalPartition(kind="natural"), clients, seed)
    owners = [{names[row] for row in rows} for rows in made.rows.values()]
    assert sorted(owner for (owner,) in owners) == sorted(set(names))


@settings(max_examples=40)
@given(st.sampled_from(["linear", "square", "exponential"]), st.integers(1, 4), st.integers(100, 300), seeds)
def test_sizes_follow_their_formula(sizes: Any, clients: int, count: int, seed: int) -> None:
    made = check(records(count), SizePartition(kind="size", sizes=sizes), clients, seed)
    units = [SIZES[sizes](number) for number in range(1, clients + 1)]
    lengths = [len(rows) for rows in made.rows.values()]
    for length, unit in zip(lengths[:-1], units, strict=False):
        assert abs(length - count * unit / sum(units)) <= 1
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    "config",
    [
        IidPartition(),
        DirichletPartition(kind="dirichlet", alpha=0.5),
        LabelPartition(kind="label", labels_per_client=2),
        ShardsPartition(kind="shards"),
        SizePartition(kind="size"),
    ],
)
def test_the_seed_changes_the_partition(config: PartitionConfig) -> None:
    data = records(120, 8)
    assert divide(data, config, 4, 1).rows != divide(data, config, 4, 2).rows


def test_the_seed_draws_the_dirichlet_shares_too() -> None:
    config = DirichletPartition(kind="dirichlet", alpha=0.5)
    sizes = {tuple(map(len, divide(records(120, 8), config, 4, seed).rows.values())) for seed in range(5)}
    assert len(sizes) == 5


def test_iid_is_shuffled_although_the_data_is_sorted() -> None:
    data = records(800, 8)
    category = data["category"]
    for rows in divide(data, IidPartition(), 4).rows.values():
        assert total_variation(Counter(category[row] for row in rows), Counter(category)) < 0.15
        assert set(np.diff(rows)) != {1}


def test_small_alpha_is_skewed_and_large_alpha_even() -> None:
    data = records(1600, 8)
    category = data["category"]

    def skew(alpha: float) -> float:
        rows = divide(data, DirichletPartition(kind="dirichlet", alpha=alpha), 8).rows.values()
        return float(
            np.mean([total_variation(Counter(category[row] for row in held), Counter(category)) for held in rows])
        )

    assert skew(0.1) > 0.5 > skew(1.0) > 0.15 > skew(1000.0)


def test_dirichlet_takes_any_column_also_numbers() -> None:
    data = records(60, 2, level=[number % 3 for number in range(60)])
    made = check(data, DirichletPartition(kind="dirichlet", by="level", alpha=0.3), 3, 0)
    assert made.json()["parameters"] == {"by": "level", "alpha": 0.3, "min_examples": 2}


def test_natural_clients_are_in_order_of_their_names_numbers_by_value() -> None:
    names = ["10", "2", "b", "a"]
    made = divide(records(4, 1, client=names), NaturalPartition(kind="natural"), 4)
    assert [names[rows[0]] for rows in made.rows.values()] == ["2", "10", "a", "b"]


def test_more_clients_than_can_be_written_with_one_digit_sort_by_number() -> None:
    assert list(divide(records(12), IidPartition(), 12).rows)[:3] == ["c00", "c01", "c02"]


def test_the_data_is_not_changed() -> None:
    data = records(20)
    before = data.to_list()
    divide(data, DirichletPartition(kind="dirichlet", alpha=5.0), 2)
    assert data.to_list() == before


NAMES = ["a", "b", "a", "b", None, "a", "b", "a"]


@pytest.mark.parametrize(
    ("data", "config", "clients", "words"),
    [
        (records(3), {"kind": "iid"}, 4, ["3 training examples", "4 clients", "use fewer clients"]),
        (records(8), {"kind": "dirichlet", "alpha": 1, "by": "categry"}, 2, ["'categry'", "did you mean 'category'?"]),
        (records(8), {"kind": "natural"}, 2, ["no column 'client'", "there are ['category']"]),
        (records(8), {"kind": "label", "labels_per_client": 1, "by": "response"}, 2, ["no column 'response'"]),
        (records(8, 1), {"kind": "dirichlet", "alpha": 1}, 2, ["'category' has one value", "another column"]),
        (records(8, 1), {"kind": "label", "labels_per_client": 1}, 2, ["has one value"]),
        (records(8), {"kind": "label", "labels_per_client": 5}, 2, ["labels_per_client 5", "4 values"]),
        (records(8), {"kind": "label", "labels_per_client": 1}, 3, ["cannot hold the 4 values", "raise"]),
        (records(8), {"kind": "label", "labels_per_client": 4}, 3, ["3 clients", "which has 2 examples", "fewer"]),
        (
            records(8),
            {"kind": "shards", "shards_per_client": 3},
            3,
            ["8 examples", "3 clients x 3 = 9 pieces", "lower"],
        ),
        (records(8, 1), {"kind": "shards"}, 2, ["'category' has one value"]),
        (records(8), {"kind": "dirichlet", "alpha": 1, "min_examples": 5}, 2, ["alpha 1", "at least 5", "of 8"]),
        (records(40), {"kind": "dirichlet", "alpha": 1e-5}, 8, ["raise alpha", "lower min_examples", "fewer clients"]),
        (records(9), {"kind": "size", "sizes": "exponential"}, 6, ["exponential sizes", "6 clients", "fewer clients"]),
        (records(9), {"kind": "size", "sizes": "square"}, 6, ["square sizes", "without any of 9"]),
        (records(8, 1, client=["a", "b"] * 4), {"kind": "natural"}, 3, ["2 different", "set clients.count to 2"]),
        (records(8, 1, client=NAMES), {"kind": "natural"}, 3, ["1 of 8 examples have no 'client'"]),
    ],
)
def test_what_cannot_be_divided_says_what_to_change(
    data: datasets.Dataset, config: dict[str, Any], clients: int, words: list[str]
) -> None:
    checked: PartitionConfig = TypeAdapter(PartitionConfig).validate_python(config)
    with pytest.raises(DataError) as caught:
        divide(data, checked, clients)
    text = str(caught.value)
    assert [word for word in words if word not in text] == [], text
    assert "\n" not in text


@pytest.mark.parametrize("kind", ["dirichlet", "natural", "size"])
def test_dividing_prints_nothing(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    configs: dict[str, PartitionConfig] = {
        "dirichlet": DirichletPartition(kind="dirichlet", alpha=0.2, min_examples=4),  # needs several draws
        "natural": NaturalPartition(kind="natural"),
        "size": SizePartition(kind="size"),
    }
    divide(records(80, client=["a", "b", "c", "d"] * 20), configs[kind], 4)
    assert capfd.readouterr() == ("", "")
