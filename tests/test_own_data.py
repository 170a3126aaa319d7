"""A client's own data: what was handed out reads back to the last bit, all of a folder counts, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
from builders import CLASSES, save_tiny_family
from federations import config, write_data
from hypothesis import given
from hypothesis import strategies as st

from emberfed import assembly
from emberfed.config import RunConfig, parse
from emberfed.data.config import CorpusConfig
from emberfed.data.formats import SCHEMA, normalise, recognise
from emberfed.data.own import source_columns
from emberfed.errors import DataError, StorageError
from emberfed.own_data import OwnData, hand_out, own_shards
from emberfed.sections import validate
from emberfed.seeds import Seeds
from emberfed.tasks import load_task

MODELS = {"generation": "olmoe", "text_classification": "bert", "image_classification": "vit"}
PARTITIONS: Mapping[str, dict[str, Any]] = {
    "iid": {"kind": "iid"},
    "dirichlet": {"kind": "dirichlet", "by": "category", "alpha": 0.5, "min_examples": 2},
    "label": {"kind": "label", "by": "category", "labels_per_client": 2},
    "shards": {"kind": "shards", "by": "category"},
    "size": {"kind": "size", "sizes": "linear"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for each task, in folders named by the task. Do not write to it."""
    root = tmp_path_factory.mktemp("models")
    for task, family in MODELS.items():
        save_tiny_family(family, root / task)
    return root


def checked(models: Path, task: str, data: Path, **section: Any) -> RunConfig:
    return parse(config(models / task, data, data={"task": task, **section}))


def expect_the_same(run: RunConfig, target: Path) -> None:
    """Hand out, read each folder as its client does, and compare with what a run on this machine gives the client."""
    divided = assembly.divide(run, Seeds(run.seed))
    hand_out(run.task, run.data, divided.corpus, divided.partition.rows, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(divided.shards)
    content = [name for name in divided.corpus.train.column_names if name in (*SCHEMA, "text")]
    classes = divided.corpus.classes
    for client, rows in divided.partition.rows.items():
        read = run.task.own_records(run.data, target / client, classes)
        whole = divided.corpus.train.select(rows)
        assert {name: list(read[name]) for name in content} == {name: list(whole[name]) for name in content}
        own = own_shards(run.task, run.data, target / client, divided.processor, classes, client, Seeds(run.seed))
        assert own.train.digest() == divided.shards[client].digest()
        assert own.train.report == divided.shards[client].report
        kept = divided.held_out.get(client)
        assert (None if own.held_out is None else own.held_out.digest()) == (None if kept is None else kept.digest())
        assert (kept is not None) == (run.data.client_test_share > 0)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("kind", PARTITIONS)
def test_what_was_handed_out_is_what_a_run_gives_each_client(
    models: Path, tmp_path: Path, task: str, kind: str, share: float
) -> None:
    data = write_data(task, tmp_path)
    run = checked(models, task, data, client_test_share=share, partition=PARTITIONS[kind], limit=44)
    expect_the_same(run, tmp_path / "parts")


@pytest.mark.parametrize("task", ["generation", "image_classification"])
def test_built_in_data_too(models: Path, tmp_path: Path, task: str) -> None:
    expect_the_same(
        checked(models, task, Path("builtin"), limit=200, test_size=20, client_test_share=0.2), tmp_path / "parts"
    )


ODD_WORDS = (
    "2024-01-01", "12:30:00", "2024-01-01T00:00:00Z", "007", "1e3", "null", "true", "NA", "3.0",
    "Straße\r\nİstanbul 東京 \U0001f600", "a\u2028b\u0085c\x00d", "e\u0301", '"quoted", \\n', "[{" * 120, "\ufeffx",
)  # fmt: skip
"""What JSON and CSV readers take for something else, or break at."""


def odd_turns(word: str, number: int) -> list[dict[str, str]]:
    earlier = [("system", word), ("user", f"before {word}"), ("assistant", "2020-02-02")] if number % 3 == 0 else []
    said = [*earlier, ("user", f"{word} {number}"), ("assistant", word)]
    return [{"role": role, "content": content} for role, content in said]


def odd_record(format: str, word: str, number: int) -> dict[str, Any]:
    turns, asked = odd_turns(word, number), f"{word} {number}"
    columns: dict[str, dict[str, Any]] = {
        "dolly": {"instruction": asked, "context": word, "response": word},
        "alpaca": {"instruction": asked, "input": word, "output": word},
        "question_answer": {"question": asked, "answer": word},
        "prompt_completion": {"prompt": turns[:-1], "completion": turns[-1:]},
        "messages": {"messages": turns},
        "sharegpt": {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in turns]},
    }
    return columns[format]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("format", ["dolly", "alpaca", "question_answer", "prompt_completion", "messages", "sharegpt"])
def test_odd_text_in_every_format(models: Path, tmp_path: Path, format: str, explicit: bool) -> None:
    """One client has all records whose words look like dates, so that its columns hold nothing else."""
    records = [
        {**odd_record(format, word, number), "category": word, "score": number / 7, "client": str(place)}
        for place, word in enumerate(ODD_WORDS)
        for number in range(3)
    ]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "odd.parquet")
    told: dict[str, Any] = {"format": format} if explicit else {}
    run = checked(
        models, "generation", tmp_path / "odd.parquet", partition={"kind": "label", "labels_per_client": 4}, **told
    )
    expect_the_same(run, tmp_path / "parts")


def test_odd_texts_and_classes(models: Path, tmp_path: Path) -> None:
    records = [
        {"sentence": f"{word} {number}", "kind": ["2024-01-01", "007", "true"][number % 3], "text": "not this"}
        for word in ODD_WORDS
        for number in range(4)
    ]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "odd.parquet")
    columns = {"text": "sentence", "label": "kind"}
    natural = {"kind": "label", "by": "kind", "labels_per_client": 1}
    run = checked(
        models, "text_classification", tmp_path / "odd.parquet", client_test_share=0.2, partition=natural, **columns
    )
    expect_the_same(run, tmp_path / "parts")


def test_the_column_of_texts_may_lend_its_usual_name_to_the_classes(models: Path, tmp_path: Path) -> None:
    """What is called `text` here are the classes: they must not take the place of the texts."""
    records = [{"sentence": f"w{10 + n} w{11 + n}", "text": CLASSES[n % 2]} for n in range(30)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "x.parquet")
    data = {"text": "sentence", "label": "text", "partition": {"kind": "iid"}}
    run = checked(models, "text_classification", tmp_path / "x.parquet", **data)
    expect_the_same(run, tmp_path / "parts")
    corpus = run.task.corpus(run.data, Seeds(0))
    assert set(corpus.train["text"]) | set(corpus.test["text"]) == {record["sentence"] for record in records}


def odd_images(folder: Path) -> Path:
    """Images of every mode a file may have, of several sizes, one turned by its camera's note; two classes."""
    draw = np.random.default_rng(4)
    for number in range(8):
        side = 6 + number
        colours = PIL.Image.fromarray(draw.integers(0, 256, (side, side + 1, 3), dtype=np.uint8))
        clear = colours.convert("RGBA")
        clear.putalpha(PIL.Image.fromarray(draw.integers(0, 256, (side, side + 1), dtype=np.uint8)))
        place = folder / CLASSES[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        for mode in ("L", "1", "P", "RGB"):
            colours.convert(mode).save(place / f"{mode}-{number}.png")
        clear.save(place / f"clear-{number}.webp", lossless=True)
        clear.convert("P").save(place / f"clear-{number}.gif", transparency=0)
        colours.convert("CMYK").save(place / f"print-{number}.jpg")
        turned = PIL.Image.Exif()
        turned[0x0112] = 6
        colours.save(place / f"turned-{number}.jpg", exif=turned)
    return folder


def test_images_of_every_mode_without_the_files_they_came_from(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other images lie under the same names where the client works: those must not be taken."""
    source = odd_images(tmp_path / "source")
    tier = {"kind": "shards", "by": "label"}
    run = checked(models, "image_classification", source, client_test_share=0.25, partition=tier)
    divided = assembly.divide(run, Seeds(run.seed))
    hand_out(run.task, run.data, divided.corpus, divided.partition.rows, tmp_path / "parts")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in source.rglob("*.*"):
        PIL.Image.new("RGB", (8, 8), "red").save(elsewhere / file.name)
    shutil.rmtree(source)
    monkeypatch.chdir(elsewhere)
    for client, shard in divided.shards.items():
        folder = tmp_path / "parts" / client
        own = own_shards(run.task, run.data, folder, divided.processor, divided.corpus.classes, client, Seeds(run.seed))
        assert own.train.digest() == shard.digest()
        assert own.held_out is not None
        assert own.held_out.digest() == divided.held_out[client].digest()


def test_images_of_a_table_under_other_names(models: Path, tmp_path: Path) -> None:
    """`image` is what the classes are called, and other columns go with the images."""
    draw = np.random.default_rng(1)
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "image": datasets.ClassLabel(names=["zebra", "ape", "nobody's"]),
            "writer": datasets.Value("string"),
        }
    )
    pictures = [PIL.Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(40)]
    columns = {"picture": pictures, "image": [n % 2 for n in range(40)], "writer": [str(n % 4) for n in range(40)]}
    data = datasets.Dataset.from_dict(columns, features=features).select(range(40))
    data.to_parquet(tmp_path / "x.parquet")
    section = {"image": "picture", "label": "image", "partition": {"kind": "natural", "by": "writer"}}
    with pytest.raises(DataError, match='class "nobody\'s" has no training example'):
        assembly.divide(checked(models, "image_classification", tmp_path / "x.parquet", **section), Seeds(0))
    data.cast_column("image", datasets.ClassLabel(names=["zebra", "ape"])).to_parquet(tmp_path / "x.parquet")
    run = checked(models, "image_classification", tmp_path / "x.parquet", **section)
    expect_the_same(run, tmp_path / "parts")
    read = run.task.own_records(run.data, tmp_path / "parts" / "c2", ("ape", "zebra"))
    assert set(read["writer"]) == {"2"}


def test_nothing_is_left_where_handing_out_fails(models: Path, tmp_path: Path) -> None:
    """The second client's rows are not there, so the folder must not appear with the first client's alone."""
    run = checked(models, "generation", write_data("generation", tmp_path))
    corpus = run.task.corpus(run.data, Seeds(0))
    with pytest.raises(IndexError):
        hand_out(run.task, run.data, corpus, {"a": (0, 1), "b": (10**6,)}, tmp_path / "parts")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not write"):
        hand_out(run.task, run.data, corpus, {"a": (0,)}, tmp_path / "file" / "parts")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "file"]


# Formats, and back.

words = st.text(st.characters(codec="utf-8"), max_size=12).map(str.strip)
answers = words.filter(bool)
spoken = st.builds(lambda role, content: {"role": role, "content": content},
                   st.sampled_from(["user", "assistant", "system"]), words)  # fmt: skip


@st.composite
def records(draw: st.DrawFn, format: str) -> dict[str, Any]:
    """A record of the schema as a file of the format may hold it."""
    in_turns = format in ("sharegpt", "messages", "prompt_completion")
    history = draw(st.lists(spoken, max_size=3)) if in_turns else []
    context = draw(words) if format in ("dolly", "alpaca", "question_answer") else ""
    instruction = draw(words if history or context else answers)
    response, category = draw(answers), draw(words)
    return {"instruction": instruction, "context": context, "response": response, "category": category,
            "history": history}  # fmt: skip


@pytest.mark.parametrize("format", ["dolly", "alpaca", "question_answer", "prompt_completion", "messages", "sharegpt"])
@given(data=st.data())
def test_records_of_every_format_come_back(format: str, data: st.DataObject) -> None:
    given_out = data.draw(st.lists(records(format), min_size=1, max_size=4))
    written = source_columns(format, given_out)
    for record, columns in zip(given_out, written, strict=True):
        whole = {**columns, "category": record["category"]}
        assert recognise(list(whole), "") == format
        assert normalise(format, whole, "") == record
    assert len({json.dumps({key: type(value).__name__ for key, value in row.items()}) for row in written}) == 1


# All of a client's folder, and what is refused.


def section(task: str, **options: Any) -> CorpusConfig:
    return validate(load_task(task).Config, {"task": task, **options}, "data")


def jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def own(task: str, folder: Path, classes: Sequence[str] | None = (), **options: Any) -> datasets.Dataset:
    return load_task(task).own_records(section(task, **options), folder, classes)


def refusal(task: str, folder: Path, classes: Sequence[str] = (), **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        own(task, folder, classes, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


def test_all_records_in_the_order_of_the_files(tmp_path: Path) -> None:
    """Neither limit nor held-out size of the server's data counts, nor its split; of two the first stays."""
    rows = [{"instruction": f"ask {n}", "response": f"reply {n}"} for n in range(6)]
    jsonl(tmp_path / "part-2.jsonl", [*rows[3:], {"instruction": "ASK  0", "response": "other"}])
    jsonl(tmp_path / "part-1.jsonl", [*rows[:3], {"instruction": "?", "response": " "}])
    read = own("generation", tmp_path, limit=2, test_size=500, split="test")
    assert list(read["response"]) == [f"reply {n}" for n in range(6)]
    assert list(own("generation", tmp_path / "part-2.jsonl")["response"])[-1] == "other", "a file will do"


def test_of_splits_the_training_one(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": "w3", "label": "a"}])
    jsonl(tmp_path / "test.jsonl", [{"text": "w4", "label": "a"}])
    assert list(own("text_classification", tmp_path, ("a", "b"), split="test")["text"]) == ["w3"]


def test_texts_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": text, "label": 3} for text in ("w9", "w5", " ", "W9 ", "w7")]
    read = own("text_classification", jsonl(tmp_path / "x.jsonl", rows), ("1", "2", "3"), test_size=500)
    assert list(read["text"]) == ["w9", "w5", "w7"]
    assert set(read["category"]) == {"3"}, "a client may have one class alone"


def test_images_in_their_order(models: Path, tmp_path: Path) -> None:
    """By class and name; the second of two with the same pixels is dropped; classes keep the server's numbers."""
    for name, colour in {"b/1": "red", "b/2": "blue", "d/1": "green", "d/2": "red"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    task, chosen = load_task("image_classification"), section("image_classification", test_size=500)
    processor = task.processor(checked(models, "image_classification", tmp_path).model)
    read = own_shards(task, chosen, tmp_path, processor, ("a", "b", "c", "d"), "me", Seeds(0))
    assert [example.label for example in read.train.examples] == [1, 1, 3]
    assert [tuple(example.pixels[:, 0, 0]) for example in read.train.examples] == [
        (255, 0, 0),
        (0, 0, 255),
        (0, 128, 0),
    ]


def test_a_relative_folder_named_as_the_built_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "builtin" / "x.jsonl", [{"instruction": "ask", "response": "mine"}])
    monkeypatch.chdir(tmp_path)
    assert list(own("generation", Path("builtin"))["response"]) == ["mine"]


@pytest.mark.parametrize("task", MODELS)
def test_missing_and_empty_folders(tmp_path: Path, task: str) -> None:
    assert "there is no such file or folder" in refusal(task, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("of no interest")
    assert "is empty; put the client's data there" in refusal(task, tmp_path / "empty")


def test_folders_that_hold_nothing_of_use(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("nothing")
    assert "holds no file of .csv, .json" in refusal("generation", tmp_path / "notes")
    assert "holds no file of .csv, .json" in refusal("text_classification", tmp_path / "notes")
    assert "holds no sub-folders" in refusal("image_classification", tmp_path / "notes")
    none = jsonl(tmp_path / "none" / "x.jsonl", [])
    assert "it is empty" in refusal("generation", none.parent)
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    assert "has no image" in refusal("image_classification", tmp_path / "classes", ("cat", "dog"))
    silent = jsonl(tmp_path / "silent" / "x.jsonl", [{"instruction": "ask", "response": ""}] * 2)
    assert "has no usable example (2 read, 2 without" in refusal("generation", silent.parent)
    blank = jsonl(tmp_path / "blank" / "x.jsonl", [{"text": " ", "label": "a"}])
    assert "has no usable text (1 read, all empty)" in refusal("text_classification", blank.parent, ("a",))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "x.parquet").write_bytes(b"PAR1 and no more")
    for task in MODELS:
        assert "cannot be read" in refusal(task, tmp_path / "torn", ("a",))
    (tmp_path / "damaged" / "cat").mkdir(parents=True)
    (tmp_path / "damaged" / "cat" / "1.png").write_bytes(b"not a picture")
    assert "it is no image" in refusal("image_classification", tmp_path / "damaged", ("cat", "dog"))


@pytest.mark.skipif(os.geteuid() == 0, reason="who may do everything is refused nothing")
@pytest.mark.parametrize("task", MODELS)
def test_folders_that_may_not_be_read(tmp_path: Path, task: str) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    try:
        assert "cannot be read" in refusal(task, closed)
    finally:
        closed.chmod(0o700)


def test_a_label_that_is_no_class(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", [{"text": "w3", "label": "cat"}, {"text": "w4", "label": "dgo"}])
    line = refusal("text_classification", file, ("cat", "dog", "emu"))
    assert "record 2: label 'dgo' is none of the server's 3 classes ('cat', 'dog', 'emu')" in line
    assert "did you mean 'dog'?" in line
    assert "mend the label, leave such records out" in line
    assert list(own("text_classification", file, None)["category"]) == ["cat", "dgo"], "none are known yet"
    many = [f"class {number}" for number in range(1000)]
    assert "'class 19' and 980 more)" in refusal("text_classification", file, many)
    (tmp_path / "images" / "yak").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "images" / "yak" / "1.png")
    assert "record 1: label 'yak' is none of the" in refusal("image_classification", tmp_path / "images", CLASSES)


def test_one_example_cannot_be_kept_apart(models: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", [{"instruction": "w3", "response": "w4"}])
    run = checked(models, "generation", file, client_test_share=0.5)
    processor = run.task.processor(run.model)
    with pytest.raises(DataError, match="client ann has 1 example; data.client_test_share 0.5 needs two"):
        own_shards(run.task, run.data, file, processor, (), "ann", Seeds(0))
    alone: OwnData = own_shards(
        run.task, run.data.model_copy(update={"client_test_share": 0.0}), file, processor, (), "ann", Seeds(0)
    )
    assert alone.held_out is None
    assert len(alone.train.examples) == 1
