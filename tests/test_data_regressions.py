"""Mistakes once made in loading, dividing and tokenising; each test failed before its repair."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from builders import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from emberfed.data.config import DataConfig, LabelPartition, NaturalPartition, SizePartition
from emberfed.data.corpus import Corpus
from emberfed.data.loading import load
from emberfed.data.partition import partition
from emberfed.data.tokenise import tokenise
from emberfed.errors import DataError
from emberfed.seeds import Seeds

SEEDS = Seeds(3)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def dolly(name: str, count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"{name} {number}", "response": f"answer {number}"} for number in range(count)]


def read(path: Path, **options: Any) -> Corpus:
    return load(DataConfig(path=str(path), test_size=1, **options), SEEDS)


def instructions(corpus: Corpus) -> list[str]:
    return sorted([*corpus.train["instruction"], *corpus.test["instruction"]])


def labelled(counts: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"category": [f"k{k}" for k, count in enumerate(counts) for _ in range(count)]})


@given(st.integers(2, 9), st.integers(1, 4), st.integers(1, 8), st.integers(0, 5))
def test_label_partition_covers_every_row_with_at_most_the_labels_asked_for(
    clients: int, per_client: int, labels: int, seed: int
) -> None:
    labels = max(2, per_client, min(labels, clients * per_client))
    if labels > clients * per_client:
        return
    records = labelled([12 * (number + 1) for number in range(labels)])
    config = LabelPartition(kind="label", labels_per_client=per_client)
    rows = partition(records, config, clients, Seeds(seed)).rows
    assert Counter(row for held in rows.values() for row in held) == Counter(range(len(records)))
    categories = records["category"]
    assert all(len({categories[row] for row in held}) == per_client for held in rows.values())


def test_a_label_too_rare_for_its_holders_is_named() -> None:
    with pytest.raises(DataError, match="'k1', which has 1 examples; lower labels_per_client"):
        partition(labelled([20, 1]), LabelPartition(kind="label", labels_per_client=2), 4, SEEDS)


def test_sizes_that_leave_a_client_empty_are_one_line() -> None:
    with pytest.raises(DataError, match="exponential sizes leave some of 20 clients"):
        partition(labelled([40, 40]), SizePartition(kind="size", sizes="exponential"), 20, SEEDS)


def test_natural_partition_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    records = datasets.Dataset.from_dict({"client": ["a", "b"] * 4})
    partition(records, NaturalPartition(kind="natural"), 2, SEEDS)
    assert capsys.readouterr().err == ""


def test_examples_without_the_column_are_not_a_client() -> None:
    records = datasets.Dataset.from_dict({"client": ["a", "b", None] * 4})
    with pytest.raises(DataError, match="4 of 12 examples have no 'client'"):
        partition(records, NaturalPartition(kind="natural"), 3, SEEDS)


def test_a_folders_test_file_stays_out_of_training(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", dolly("train", 4))
    write(tmp_path / "test-00000-of-00001.jsonl", dolly("test", 4))
    assert instructions(read(tmp_path)) == [f"train {number}" for number in range(4)]
    assert instructions(read(tmp_path, split="test")) == [f"test {number}" for number in range(4)]
    with pytest.raises(DataError, match="no file of the split 'validation'"):
        read(tmp_path, split="validation")


def test_a_file_has_no_other_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no splits"):
        read(write(tmp_path / "data.jsonl", dolly("a", 4)), split="test")


def test_only_shepherds_client_files_are_clients(tmp_path: Path) -> None:
    for client in (0, 1):
        write(tmp_path / f"local_training_{client}.json", dolly(f"client{client}", 3))
    write(tmp_path / "global_training.json", dolly("client0", 3))
    corpus = read(tmp_path)
    assert {*corpus.train["client"], *corpus.test["client"]} == {"0", "1"}


def test_file_names_are_no_patterns(tmp_path: Path) -> None:
    assert read(write(tmp_path / "we[1]rd *.jsonl", dolly("a", 4))).report.read == 4


def test_csv_answers_stay_the_text_they_are(tmp_path: Path) -> None:
    answers = ["None", "NA", "null", "007", "7"]
    lines = ["instruction,context,response", *(f"q{number},,{answer}" for number, answer in enumerate(answers))]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    corpus = read(tmp_path / "data.csv")
    assert sorted([*corpus.train["response"], *corpus.test["response"]]) == sorted(answers)


def test_text_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"instruction": "é", "response": "ü"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="cannot be read .*utf-8"):
        read(tmp_path / "latin.jsonl")


def test_a_record_without_prompt_is_counted_as_empty(tmp_path: Path) -> None:
    records = [{"instruction": "", "response": "answer"}, *dolly("a", 3)]
    assert read(write(tmp_path / "data.jsonl", records)).report.empty == 1


def test_conversations_column_may_use_role_and_content(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}] for n in range(3)]
    corpus = read(write(tmp_path / "data.jsonl", [{"conversations": turn} for turn in turns]))
    assert instructions(corpus) == ["q0", "q1", "q2"]


def test_prompt_as_messages_with_a_plain_completion(tmp_path: Path) -> None:
    records = [{"prompt": [{"role": "user", "content": f"q{n}"}], "completion": "a"} for n in range(3)]
    assert instructions(read(write(tmp_path / "data.jsonl", records))) == ["q0", "q1", "q2"]


def record(instruction: str, response: str) -> datasets.Dataset:
    row = {"instruction": instruction, "context": "", "response": response, "category": "", "history": []}
    return datasets.Dataset.from_list([row])


def test_end_of_text_written_in_the_data_is_not_an_end() -> None:
    shard = tokenise(record("w9 <eos> w8", "w3 <eos> w4"), tiny_tokenizer(), DataConfig(template="short"), "test")
    assert shard.examples[0].input_ids.tolist().count(1) == 1
    assert shard.examples[0].input_ids[-1] == 1


def test_a_cut_prompt_keeps_its_beginning_of_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w63 $A", special_tokens=[("w63", 63)])
    tokenizer.bos_token = "w63"
    config = DataConfig(max_length=16, template="short")
    example = tokenise(record(" ".join(["w9"] * 80), "w3 w4"), tokenizer, config, "test").examples[0]
    assert len(example.input_ids) == 16
    assert example.input_ids[0] == 63
    assert example.input_ids[1] != 63


def test_a_chat_template_that_refuses_is_one_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        tokenise(record("w9", "w3"), tokenizer, DataConfig(template="chat"), "test")
