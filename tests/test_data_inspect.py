"""The table of what each client holds, against counts by hand."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest
from builders import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from emberfed.data.config import DataConfig, DirichletPartition, PartitionConfig
from emberfed.data.corpus import Corpus, LoadReport
from emberfed.data.inspect import Inspection, inspect, total_variation
from emberfed.data.partition import Partition, partition
from emberfed.data.tokenise import tokenise
from emberfed.seeds import Seeds

REPORT = LoadReport("dolly", read=9, duplicates=1, empty=1, over_limit=0, train=6, test=1)
CONFIG = DataConfig(template="short", max_length=16)


def corpus() -> Corpus:
    """Six examples: categories a a a a b b, levels 1 1 2 2 2 2; the fourth has no target, the fifth a long one."""
    responses = ["w3", "w3 w4", "w3", " ", "w3 " * 40, "w3 w4 w5"]
    columns = {
        "instruction": [f"w{number + 3}" for number in range(6)],
        "context": [""] * 6,
        "response": responses,
        "category": list("aaaabb"),
        "history": [[] for _ in range(6)],
        "level": [1, 1, 2, 2, 2, 2],
    }
    data = datasets.Dataset.from_dict(columns)
    return Corpus(data, data.select([0]), REPORT)


def look(made: Partition) -> Inspection:
    data = corpus()
    shards = {
        client: tokenise(data.train.select(rows), tiny_tokenizer(), CONFIG, client)
        for client, rows in made.rows.items()
    }
    return inspect(data, made, shards, made.rows)


def by_hand(kind: str = "iid", **parameters: str) -> Inspection:
    return look(Partition(kind, parameters, {"c0": (0, 1, 2), "c1": (3, 4, 5)}))


def test_counts_labels_and_skew_by_hand() -> None:
    first, second = by_hand().clients
    assert (first.client, second.client) == ("c0", "c1")
    assert first.labels == {"a": 3}
    assert second.labels == {"a": 1, "b": 2}
    # Everybody: a 4/6, b 2/6. c0: |1 - 4/6| / 2 + |0 - 2/6| / 2; c1: |1/3 - 2/3| / 2 + |2/3 - 1/3| / 2.
    assert first.skew == pytest.approx(1 / 3)
    assert second.skew == pytest.approx(1 / 3)
    assert (first.report.examples, first.report.json()["target_tokens"]) == (3, 2 + 3 + 2)
    cut = second.report.json()
    assert (cut["examples"], cut["without_target"], cut["truncated_responses"]) == (2, 1, 1)


def test_json_holds_totals_and_clients() -> None:
    inspection = by_hand()
    document = json.loads(json.dumps(inspection.json()))
    assert document["totals"] == {
        **REPORT.json(),
        "target_tokens": sum(data.report.json()["target_tokens"] for data in inspection.clients),
        "truncated_prompts": sum(data.report.json()["truncated_prompts"] for data in inspection.clients),
        "truncated_responses": 1,
        "without_target": 1,
    }
    assert document["clients"]["c1"]["labels"] == {"a": 1, "b": 2}
    assert document["clients"]["c1"]["skew"] == pytest.approx(1 / 3)
    assert document["clients"]["c0"]["examples"] == 3


@pytest.mark.parametrize(
    ("kind", "by", "labels"),
    [
        ("dirichlet", "level", {"1": 2, "2": 1}),
        ("label", "level", {"1": 2, "2": 1}),
        ("dirichlet", "category", {"a": 3}),
        ("natural", "level", {"a": 3}),  # by its own column every natural client would be all skew
    ],
)
def test_labels_are_those_of_the_column_divided_by(kind: str, by: str, labels: dict[str, int]) -> None:
    assert by_hand(kind, by=by).clients[0].labels == labels


def test_a_made_partition_is_described_completely() -> None:
    config: PartitionConfig = DirichletPartition(kind="dirichlet", alpha=5.0, min_examples=1)
    inspection = look(partition(corpus().train, config, 2, Seeds(1)))
    total: Counter[str] = Counter()
    for data in inspection.clients:
        total.update(data.labels)
    assert total == {"a": 4, "b": 2}


histograms = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 30), min_size=1)


@given(histograms, histograms)
def test_total_variation_is_the_largest_difference_of_any_set_of_labels(
    one: dict[str, int], other: dict[str, int]
) -> None:
    keys = sorted({*one, *other})
    share = {key: one.get(key, 0) / sum(one.values()) - other.get(key, 0) / sum(other.values()) for key in keys}
    subsets = [[key for place, key in enumerate(keys) if mask >> place & 1] for mask in range(2 ** len(keys))]
    slow = max(sum(share[key] for key in subset) for subset in subsets)
    assert total_variation(one, other) == pytest.approx(slow, abs=1e-12)
    assert total_variation(one, other) == pytest.approx(total_variation(other, one))
    assert total_variation(one, {key: 3 * count for key, count in one.items()}) == pytest.approx(0, abs=1e-12)


def test_disjoint_histograms_are_at_distance_one() -> None:
    assert total_variation({"a": 3}, {"b": 1, "c": 1}) == 1
