"""Texts with a class: labels however they are written, duplicates, cutting, batches, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from builders import tiny_tokenizer

from emberfed.data.classes import class_names, declared, in_natural_order
from emberfed.data.config import TextClassDataConfig
from emberfed.data.corpus import Corpus
from emberfed.data.text_classes import load_texts, tokenise_texts
from emberfed.errors import ConfigError, DataError
from emberfed.sections import validate
from emberfed.seeds import Seeds


def section(path: Path, **options: Any) -> TextClassDataConfig:
    values = {"task": "text_classification", "path": str(path), "test_size": 2, **options}
    return validate(TextClassDataConfig, values, "data")


def written(folder: Path, records: list[dict[str, Any]]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"text": f"w{number} w{number + 1}", "label": ["b", "a", "c"][number % 3]} for number in range(count)]


def rows(corpus: Corpus) -> set[tuple[str, str]]:
    return {(row["text"], row["category"]) for part in (corpus.train, corpus.test) for row in part}


def test_every_text_is_on_one_side_with_its_class(tmp_path: Path) -> None:
    corpus = load_texts(section(written(tmp_path, numbered(12))), Seeds(0))
    assert corpus.classes == ("a", "b", "c")
    assert (len(corpus.train), len(corpus.test)) == (10, 2)
    assert rows(corpus) == {(record["text"], record["label"]) for record in numbered(12)}


def test_repeated_and_empty_texts_count_once_and_not_at_all(tmp_path: Path) -> None:
    records = [*numbered(9), {"text": " W1  w2", "label": "c"}, {"text": "  ", "label": "a"}]
    corpus = load_texts(section(written(tmp_path, records)), Seeds(0))
    assert (corpus.report.read, corpus.report.duplicates, corpus.report.empty) == (11, 1, 1)
    assert ("w1 w2", "a") in rows(corpus), "of two the first stays"


def test_limit_and_seed(tmp_path: Path) -> None:
    file = written(tmp_path, numbered(30))
    one = load_texts(section(file, limit=20), Seeds(0))
    assert (one.report.over_limit, one.report.train, one.report.test) == (10, 18, 2)
    assert rows(one) == rows(load_texts(section(file, limit=20), Seeds(0)))
    assert rows(one) != rows(load_texts(section(file, limit=20), Seeds(1)))


@pytest.mark.parametrize("name", ["text", "label"])
def test_columns_may_have_other_names(tmp_path: Path, name: str) -> None:
    records = [{("other" if key == name else key): value for key, value in record.items()} for record in numbered(9)]
    assert len(load_texts(section(written(tmp_path, records), **{name: "other"}), Seeds(0)).classes) == 3
    with pytest.raises(DataError, match=rf"no column '{name}'.*set data\.{name}"):
        load_texts(section(written(tmp_path, records)), Seeds(0))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": f"w{number}", "label": 0.5} for number in range(9)], r"record 1: label 0\.5 is neither"),
        (
            [{"text": f"w{number}", "label": None if number == 4 else "a"} for number in range(9)],
            "record 5: label None",
        ),
        ([{"text": f"w{number}", "label": "a"} for number in range(9)], "has one class, 'a'"),
        ([{"text": number, "label": "ab"[number % 2]} for number in range(9)], "record 1: 0 is no text"),
        (numbered(2), "2 usable texts .*leaves none to train on"),
    ],
)
def test_what_is_refused(tmp_path: Path, records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        load_texts(section(written(tmp_path, records)), Seeds(0))
    assert "\n" not in str(raised.value)


def test_a_class_that_nobody_could_learn(tmp_path: Path) -> None:
    """With 8 of 9 texts held out, some class has none left."""
    with pytest.raises(DataError, match=r"class '\w' has no training example on any client \(3 of its examples are"):
        load_texts(section(written(tmp_path, numbered(9)), test_size=8), Seeds(0))


def test_there_is_no_builtin_data() -> None:
    with pytest.raises(DataError, match="no built-in data for task text_classification"):
        load_texts(validate(TextClassDataConfig, {"task": "text_classification"}, "data"), Seeds(0))
    with pytest.raises(ConfigError, match="'data.max_length'"):
        validate(TextClassDataConfig, {"task": "text_classification", "max_length": 1}, "data")


def test_numbers_and_declared_classes_by_their_names() -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["zebra", "ant", "nobody"])})
    table = datasets.Dataset.from_dict({"label": [1, 0, 1]}, features=features)
    names = class_names(table, "label", "data")
    assert names == ["ant", "zebra", "ant"]
    assert declared(table, "label", names) == ("ant", "nobody", "zebra")
    assert in_natural_order(["10", "9", "b", "a", "9"]) == ("9", "10", "a", "b")
    unknown = datasets.Dataset.from_dict({"label": [1, -1]}, features=features)
    with pytest.raises(DataError, match="record 2: label -1 is none of the 3 classes"):
        class_names(unknown, "label", "data")


def test_texts_are_cut_at_their_end_and_padded_on_the_right() -> None:
    records = datasets.Dataset.from_list(
        [{"text": "w10 w11 w12 w13 w14 w15", "category": "b"}, {"text": "w10 w11", "category": "a"}]
    )
    tokenizer = tiny_tokenizer()
    config = section(Path("x"), max_length=4)
    shard = tokenise_texts(records, tokenizer, config, ("a", "b"), "c0")
    whole = tokenizer("w10 w11 w12 w13 w14 w15")["input_ids"]
    assert shard.report.json() == {"examples": 2, "tokens": 4 + 2, "truncated": 1}
    batch = shard.collate(shard.examples)
    assert batch.input_ids[0].tolist() == whole[:4]
    assert batch.input_ids[1].tolist() == [*whole[:2], shard.pad_token_id, shard.pad_token_id]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert torch.equal(batch.labels, torch.tensor([1, 0]))
    assert batch.targets == 2
    assert set(batch.inputs()) == {"input_ids", "attention_mask"}
    other = tokenise_texts(records, tokenizer, config, ("b", "a"), "c0")
    assert other.digest() != shard.digest(), "classes are part of what a shard holds"
    with pytest.raises(DataError, match="c0 has no examples"):
        tokenise_texts(records.select([]), tokenizer, config, ("a", "b"), "c0")
