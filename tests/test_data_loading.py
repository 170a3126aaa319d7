"""From files, folders and the built-in corpus to a de-duplicated corpus with a held-out split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emberfed.data.config import DataConfig, DirichletPartition
from emberfed.data.corpus import Corpus
from emberfed.data.loading import load
from emberfed.data.partition import partition
from emberfed.errors import ConfigError, DataError
from emberfed.sections import validate
from emberfed.seeds import Seeds

Rows = list[dict[str, Any]]


def questions(count: int, prefix: str = "ask") -> Rows:
    return [
        {"instruction": f"{prefix} {n}", "context": "", "response": f"reply {n}", "category": "ab"[n % 2]}
        for n in range(count)
    ]


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def json_array(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def csv_file(path: Path, rows: Rows) -> Path:
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in cells))
    return path


def parquet(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def saved(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def read(path: Path | str, seed: int = 0, **options: Any) -> Corpus:
    return load(DataConfig(path=str(path), **({"test_size": 2} | options)), Seeds(seed))


def everything(corpus: Corpus, column: str = "instruction") -> list[Any]:
    return [*corpus.test[column], *corpus.train[column]]


def message(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("data.jsonl", jsonl),
        ("data.json", json_array),
        ("data.json", jsonl),
        ("DATA.JSONL", jsonl),
        ("data.csv", csv_file),
        ("data.parquet", parquet),
        ("disk", saved),
    ],
)
def test_every_kind_of_file_gives_the_same_corpus(
    name: str, write: Callable[[Path, Rows], Path], tmp_path: Path
) -> None:
    rows = questions(12)
    reference = read(jsonl(tmp_path / "reference.jsonl", rows))
    corpus = read(write(tmp_path / name, rows))
    assert corpus.train.to_list() == reference.train.to_list()
    assert corpus.test.to_list() == reference.test.to_list()
    by_instruction = {row["instruction"]: row for row in [*corpus.train, *corpus.test]}
    assert by_instruction == {row["instruction"]: {**row, "history": []} for row in rows}


@pytest.mark.parametrize(
    "rows",
    [
        [{"instruction": f"q{n}", "input": "", "output": "a"} for n in range(4)],
        [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(4)],
        [{"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]} for n in range(4)],
        [{"prompt": f"q{n}", "completion": "a"} for n in range(4)],
        [
            {
                "prompt": [{"role": "user", "content": f"q{n}"}],
                "completion": [{"role": "assistant", "content": "a"}],
            }
            for n in range(4)
        ],
        [{"question": f"q{n}", "answer": "a"} for n in range(4)],
    ],
)
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_every_format_survives_the_way_through_a_file(
    rows: Rows, write: Callable[[Path, Rows], Path], tmp_path: Path
) -> None:
    path = write(tmp_path / f"data.{write.__name__}", rows)
    corpus = read(path)
    assert sorted(everything(corpus)) == ["q0", "q1", "q2", "q3"]
    assert set(everything(corpus, "response")) == {"a"}


def test_history_of_different_lengths_loads(tmp_path: Path) -> None:
    def talk(length: int) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": f"{length} {n}"} for n in range(length)]

    corpus = read(jsonl(tmp_path / "talk.jsonl", [{"messages": talk(length)} for length in (2, 6, 4, 8)]))
    histories = {row["instruction"]: row["history"] for row in [*corpus.train, *corpus.test]}
    assert histories == {f"{length} {length - 2}": talk(length)[:-2] for length in (2, 4, 6, 8)}


def test_report_adds_up_and_says_what_was_dropped(tmp_path: Path) -> None:
    rows = [
        *questions(8),
        {**questions(1)[0], "instruction": "  ASK\n0 ", "response": "a duplicate by case and blanks"},
        {**questions(2)[1], "context": "not a duplicate: another context"},
        {**questions(3)[2], "response": "   "},
        {**questions(4)[3], "response": None},
    ]
    report = read(jsonl(tmp_path / "data.jsonl", rows), limit=7).report
    assert report.json() == {
        "format": "dolly",
        "read": 12,
        "duplicates": 1,
        "empty": 2,
        "over_limit": 2,
        "train": 5,
        "test": 2,
    }


def test_the_first_of_duplicates_stays(tmp_path: Path) -> None:
    rows = [*questions(3), {**questions(1)[0], "response": "later"}]
    corpus = read(jsonl(tmp_path / "data.jsonl", rows), test_size=1)
    assert sorted(everything(corpus, "response")) == ["reply 0", "reply 1", "reply 2"]


def test_other_columns_stay_for_partitioning(tmp_path: Path) -> None:
    rows = [{**row, "level": n, "tags": ["x"], "hard": n > 2} for n, row in enumerate(questions(5))]
    corpus = read(jsonl(tmp_path / "data.jsonl", rows))
    assert sorted(everything(corpus, "level")) == [0, 1, 2, 3, 4]
    assert "tags" not in corpus.train.column_names


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcAB "), st.sampled_from("xyX"), st.sampled_from(["", "r", "s"])), max_size=40
    ),
    st.integers(1, 3),
    st.integers(2, 12),
    st.integers(0, 3),
)
def test_no_key_is_on_both_sides_and_every_record_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str, str]], test_size: int, limit: int, seed: int
) -> None:
    rows = [{"instruction": a, "context": b, "response": c} for a, b, c in cells]
    keys = {(a.strip().lower(), b.lower()) for a, b, c in cells if c}
    path = jsonl(tmp_path_factory.mktemp("property") / "data.jsonl", [*rows, {**questions(1)[0]}])
    usable = min(limit, len(keys) + 1)
    if usable <= test_size:
        assert "leaves none to train on" in message(path, seed=seed, test_size=test_size, limit=limit)
        return
    corpus = read(path, seed, test_size=test_size, limit=limit)
    sides = [
        {(row["instruction"].lower(), row["context"].lower()) for row in side} for side in (corpus.train, corpus.test)
    ]
    assert not sides[0] & sides[1]
    assert (len(sides[0]), len(sides[1])) == (len(corpus.train), len(corpus.test)) == (usable - test_size, test_size)
    report = corpus.report
    dropped = report.duplicates + report.empty + report.over_limit
    assert report.read == len(rows) + 1 == dropped + report.train + report.test


def test_the_split_is_drawn_by_the_seed_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", questions(30))
    first, again, other = read(path, 0), read(path, 0), read(path, 1)
    assert first.train.to_list() == again.train.to_list()
    assert first.test.to_list() == again.test.to_list()
    assert everything(first) != everything(other)
    assert sorted(everything(first)) == sorted(everything(other))
    assert everything(first) != [row["instruction"] for row in questions(30)]


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", questions(4))
    read(path)
    stamp = path.stat()
    jsonl(path, questions(4, "say"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same length, same time: only the content differs
    assert sorted(everything(read(path))) == [f"say {n}" for n in range(4)]


def test_a_home_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", questions(4))
    blocked = tmp_path / "file"
    blocked.write_text("a folder cannot be made below a file")
    code = (
        "import sys; from emberfed.data.loading import load; from emberfed.data.config import DataConfig; "
        "from emberfed.seeds import Seeds; "
        "print(load(DataConfig(path=sys.argv[1], test_size=2), Seeds(0)).report.read)"
    )
    environment = {**os.environ, "HOME": str(blocked), "HF_HOME": str(blocked / "hf"), "XDG_CACHE_HOME": str(blocked)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("4\n", 0), done.stderr
    assert done.stderr == ""


def test_loading_is_quiet_and_leaves_the_librarys_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity())
    good = [write(tmp_path / f"{write.__name__}.{write.__name__}", questions(4)) for write in (jsonl, parquet, saved)]
    (tmp_path / "cut.jsonl").write_text('{"a": ')
    capfd.readouterr()
    for path in good:
        read(path)
    message(tmp_path / "cut.jsonl")
    assert capfd.readouterr() == ("", "")
    assert (datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()) == before


def test_shepherds_folder_gives_one_client_per_file_by_number(tmp_path: Path) -> None:
    for client in (0, 2, 10):
        json_array(tmp_path / f"local_training_{client}.json", questions(4, f"client {client} asks"))
    json_array(tmp_path / "global_training.json", questions(4, "client 0 asks"))
    json_array(tmp_path / "global_test.json", questions(4, "test asks"))
    corpus = read(tmp_path)
    assert corpus.report.read == 12
    for row in [*corpus.train, *corpus.test]:
        assert row["instruction"].startswith(f"client {row['client']} asks")
    assert sorted(set(everything(corpus, "client"))) == ["0", "10", "2"]


def test_a_folder_of_files_names_clients_after_them_unless_the_records_do(tmp_path: Path) -> None:
    jsonl(tmp_path / "berlin.jsonl", questions(3, "b"))
    csv_file(tmp_path / "paris.csv", questions(3, "p"))
    jsonl(tmp_path / "named.jsonl", [{**row, "client": "rome"} for row in questions(3, "r")])
    (tmp_path / "README.md").write_text("not data")
    corpus = read(tmp_path)
    clients = {row["instruction"][0]: row["client"] for row in [*corpus.train, *corpus.test]}
    assert clients == {"b": "berlin", "p": "paris", "r": "rome"}


def test_a_saved_folder_of_several_splits_gives_the_one_asked_for(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list(questions(4, name)) for name in ("train", "extra")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "disk"))
    assert sorted(everything(read(tmp_path / "disk", split="extra"))) == [f"extra {n}" for n in range(4)]
    assert "has the splits 'extra', 'train', not 'exra'" in message(tmp_path / "disk", split="exra")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "it is empty"),
        ("blank.jsonl", b"\n  \n", "it is empty"),
        ("none.json", b"[]", "it holds no records"),
        ("null.json", b"null", "it begins with 'n'"),
        ("numbers.jsonl", b"1\n2\n", "one JSON object per line"),
        ("cut.jsonl", b'{"instruction": "a", "response": "b"}\n{"instr', "cannot be read"),
        ("latin.jsonl", '{"instruction": "é", "response": "b"}'.encode("latin-1"), "cannot be read"),
        ("text.parquet", b"text", "cannot be read"),
        ("header.csv", b"instruction,response\n", "it holds no records"),
        ("empty.csv", b"", "it holds no records"),
        ("commas.csv", b"instruction,response\na,b\nc,d,e\n", "line 3: 3 cells under 2 column names"),
        ("short.csv", b"instruction,context,response\na,b\n", "line 2: 2 cells under 3 column names"),
        ("twice.csv", b"instruction,response,response\na,b,c\n", "not all different"),
        ("quote.csv", b'instruction,response\n"a,b\n', "cannot be read"),
        ("latin.csv", "instruction,response\né,b\n".encode("latin-1"), "cannot be read"),
        ("columns.jsonl", b'{"text": "a"}\n', "the columns ['text'] are of no known format"),
        ("data.txt", b"a", "files must end in one of .csv, .json, .jsonl, .parquet"),
        ("few.jsonl", b'{"instruction": "a", "response": "b"}\n', "1 usable examples (1 read, 0 without"),
    ],
)
def test_unreadable_files_are_one_line_with_the_path(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    text = message(tmp_path / name)
    assert words in text
    assert name in text


def test_csv_may_come_from_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    path.write_bytes('\ufeff,instruction,response\r\n0,"a, b\nc",d\r\n\r\n1,"say ""x""",e\r\n2,f,g\r\n'.encode())
    assert sorted(everything(read(path))) == ["a, b\nc", "f", 'say "x"']


@pytest.mark.parametrize("path", ["absent.jsonl", "./absent", "~/absent/absent", "a/b/c", "a name", "x" * 5000])
def test_paths_that_are_not_there_fail_at_once(path: str) -> None:
    text = message(path)
    assert path[:50] in text
    assert len(text) < 600


def test_a_folder_without_data_says_what_it_looked_for(tmp_path: Path) -> None:
    assert "holds no file of .csv, .json, .jsonl, .parquet" in message(tmp_path)


def test_folders_whose_files_disagree_are_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{**row, "level": 1} for row in questions(3)])
    jsonl(tmp_path / "b.jsonl", [{**row, "level": {"x": 1}} for row in questions(3, "b")])
    assert str(tmp_path) in message(tmp_path)


def test_the_test_split_must_leave_something(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", questions(4))
    assert len(read(path, test_size=3).train) == 1
    assert "data.test_size 4 leaves none to train on" in message(path, test_size=4)


def test_builtin_corpus_has_the_size_asked_for() -> None:
    corpus = read("builtin", limit=100, test_size=20)
    assert (len(corpus.train), len(corpus.test)) == (80, 20)
    assert len(set(corpus.train["category"])) == 8
    assert everything(corpus) == everything(read("builtin", limit=100, test_size=20))
    assert everything(corpus) != everything(read("builtin", 1, limit=100, test_size=20))


def test_builtin_corpus_has_a_default_size() -> None:
    assert len(read("builtin", test_size=96).train) == 480


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pth": "x"}, "did you mean 'path'?"),
        ({"path": ""}, "data.path"),
        ({"limit": 1}, "data.limit"),
        ({"test_size": 0}, "data.test_size"),
        ({"template": "llama"}, "data.template"),
        ({"max_length": "long"}, "data.max_length"),
        ({"partition": {"kind": "dirichlet"}}, "alpha"),
        ({"partition": {"kind": "dirichlet", "alpha": 0}}, "alpha"),
        ({"partition": {"kind": "dirichlet", "alpha": 0.5, "min_exmples": 3}}, "did you mean 'min_examples'?"),
        ({"partition": {"kind": "dirichlett", "alpha": 1}}, "'dirichlet'"),
    ],
)
def test_misspelt_data_sections_name_the_key(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(DataConfig, values, "data")
    assert words in str(caught.value)


def test_real_dolly(shared: Path) -> None:
    corpus = load(DataConfig(path=str(shared / "dolly" / "dolly.jsonl")), Seeds(0))
    assert corpus.report.format == "dolly"
    assert corpus.report.read == 13507
    assert corpus.report.test == 96
    assert 0 < corpus.report.duplicates < 300
    assert len(set(corpus.train["category"])) == 8
    config = DirichletPartition(kind="dirichlet", alpha=0.5)
    rows = partition(corpus.train, config, 8, Seeds(0)).rows
    assert sorted(row for held in rows.values() for row in held) == list(range(len(corpus.train)))
    assert len(rows) == 8


def test_real_gsm8k(shared: Path) -> None:
    corpus = load(DataConfig(path=str(shared / "gsm8k" / "train.jsonl"), limit=500), Seeds(0))
    assert (corpus.report.format, corpus.report.read) == ("question_answer", 7473)
    assert (corpus.report.train, corpus.report.test) == (404, 96)
    assert all("####" in response for response in corpus.train["response"])
