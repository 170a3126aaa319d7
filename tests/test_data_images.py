"""Images with classes: sources, duplicates, the held-out split, fitting to a model, and a line for everything wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import CLIPImageProcessorPil, LlamaConfig, ViTConfig, ViTImageProcessorPil

from emberfed.data import loading
from emberfed.data.classes import in_natural_order
from emberfed.data.config import DataConfig, ImageDataConfig, LabelPartition, ShardsPartition
from emberfed.data.corpus import Corpus
from emberfed.data.image_sources import decoded
from emberfed.data.images import Preprocessing, encode_images, load_images, load_preprocessing
from emberfed.data.partition import partition
from emberfed.errors import DataError, ModelError
from emberfed.models.config import ModelConfig
from emberfed.seeds import Seeds


def noise(number: int, side: int = 8) -> NDArray[np.uint8]:
    """(side, side, 3)."""
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def picture(number: int, side: int = 8) -> PIL.Image.Image:
    return PIL.Image.fromarray(noise(number, side))


def folder_of(root: Path, counts: dict[str, int]) -> Path:
    """A sub-folder for each class, with that many different PNGs."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            picture(number).save(root / name / f"{number}.png")
            number += 1
    return root


def config(path: Path | str, **others: Any) -> ImageDataConfig:
    return ImageDataConfig(task="image_classification", path=str(path), **{"test_size": 2, **others})


def load(path: Path | str, **others: Any) -> Corpus:
    return load_images(config(path, **others), Seeds(0))


def vit(folder: Path, size: int = 8, **others: Any) -> ModelConfig:
    """A folder with a ViT's config alone, as `model.weights: random` takes."""
    ViTConfig(image_size=size, patch_size=4, **others).save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.fixture
def preprocessing(tmp_path: Path) -> Preprocessing:
    return load_preprocessing(vit(tmp_path / "vit"))


def pairs(corpus: Corpus) -> set[tuple[bytes, str]]:
    """Pixels and class of everything, from both sides."""
    return {
        (decoded(record["image"], "").tobytes(), record["category"])
        for side in (corpus.train, corpus.test)
        for record in side
    }


def table(names: Sequence[Any], feature: Any, image: str = "image", label: str = "label") -> datasets.Dataset:
    features = datasets.Features({image: datasets.Image(), label: feature, "writer": datasets.Value("string")})
    columns = {image: [picture(n) for n in range(len(names))], label: list(names), "writer": ["w"] * len(names)}
    return datasets.Dataset.from_dict(columns, features=features)


# sources


def test_the_built_in_images_load_offline_and_by_the_seed_alone() -> None:
    one = load_images(config("builtin", limit=60, test_size=10), Seeds(1))
    assert (len(one.train), len(one.test)) == (50, 10)
    assert one.classes == tuple(sorted(one.classes))
    assert len(one.classes) == 10
    assert pairs(one) == pairs(load_images(config("builtin", limit=60, test_size=10), Seeds(1)))
    assert pairs(one).isdisjoint(pairs(load_images(config("builtin", limit=60, test_size=10), Seeds(2))))


@pytest.mark.parametrize("split", ["", "train"])
def test_a_folder_of_classes(tmp_path: Path, split: str) -> None:
    root = folder_of(tmp_path / split, {"dog": 4, "cat": 5})
    (root / "cat" / ".DS_Store").write_text("of no interest")
    if split:
        folder_of(tmp_path / "test", {"dog": 3, "cat": 3})
    corpus = load(tmp_path)
    assert corpus.classes == ("cat", "dog")
    expected = {(noise(n).tobytes(), "dog" if n < 4 else "cat") for n in range(9)}
    assert pairs(corpus) == expected
    told = corpus.report.json()
    assert told == {
        "format": "images", "read": 9, "duplicates": 0, "empty": 0, "over_limit": 0, "train": 7, "test": 2,
    }  # fmt: skip


def test_another_split_of_a_folder(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", {"dog": 4, "cat": 5})
    folder_of(tmp_path / "test", {"dog": 3, "cat": 3})
    assert load(tmp_path, split="test").report.read == 6


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved", "saved with splits"])
def test_tables_of_images(tmp_path: Path, kind: str) -> None:
    made = table([0, 1, 0, 1, 1, 0], datasets.ClassLabel(names=["zebra", "ape"]), image="img", label="fine")
    if kind == "parquet":
        made.to_parquet(tmp_path / "x.parquet")
        path = tmp_path / "x.parquet"
    elif kind == "folder of parquet":
        made.to_parquet(tmp_path / "train-0.parquet")
        path = tmp_path
    else:
        saved = made if kind == "saved" else datasets.DatasetDict({"train": made})
        saved.save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved"
    corpus = load(path, image="img", label="fine")
    assert corpus.classes == ("ape", "zebra")
    names = ["zebra", "ape", "zebra", "ape", "ape", "zebra"]
    assert pairs(corpus) == {(noise(n).tobytes(), name) for n, name in enumerate(names)}
    assert set(corpus.train["writer"]) == {"w"}


@pytest.mark.parametrize(
    ("labels", "feature", "classes"),
    [
        ([10, 9, 10, 9, 10, 9], datasets.Value("int64"), ("9", "10")),
        (["b", "a", "b", "a", "b", "a"], datasets.Value("string"), ("a", "b")),
    ],
)
def test_classes_may_be_numbers_or_words(
    tmp_path: Path, labels: list[Any], feature: Any, classes: tuple[str, ...]
) -> None:
    table(labels, feature).to_parquet(tmp_path / "x.parquet")
    assert load(tmp_path / "x.parquet").classes == classes


@given(st.lists(st.one_of(st.integers(0, 200).map(str), st.text("abc", min_size=1))))
def test_natural_order_is_a_total_order_of_different_names(names: list[str]) -> None:
    made = in_natural_order(names)
    assert set(made) == set(names)
    assert len(made) == len(set(names))
    assert in_natural_order(made[::-1]) == made
    for one, other in pairwise(name for name in made if name.isdecimal()):
        assert int(one) <= int(other)


# duplicates, limit, held-out split


def test_the_same_pixels_are_kept_once_whatever_the_file_or_class(tmp_path: Path) -> None:
    """Images 0 and 1 come again: as another format without loss, and in another class. 6 read, 4 left, 2 held out."""
    folder_of(tmp_path, {"a": 2, "b": 2})
    picture(0).save(tmp_path / "a" / "z.bmp")
    picture(1).save(tmp_path / "b" / "z.png")
    corpus = load(tmp_path, test_size=1)
    assert (corpus.report.read, corpus.report.duplicates, corpus.report.train, corpus.report.test) == (6, 2, 3, 1)
    assert pairs(corpus) == {(noise(n).tobytes(), "a" if n < 2 else "b") for n in range(4)}


@settings(max_examples=20, deadline=None)
@given(st.integers(24, 40), st.integers(1, 6), st.integers(0, 9))
def test_the_limit_counts_held_out_images_and_nothing_is_on_both_sides(limit: int, held_out: int, seed: int) -> None:
    corpus = load_images(config("builtin", limit=limit + 20, test_size=held_out), Seeds(seed))
    told = corpus.report
    assert told.read == told.duplicates + told.empty + told.over_limit + told.train + told.test
    assert (told.train + told.test, told.test) == (limit + 20, held_out)
    assert len(pairs(corpus)) == limit + 20


@pytest.mark.parametrize(
    "how", [LabelPartition(kind="label", labels_per_client=2), ShardsPartition(kind="shards", shards_per_client=2)]
)
def test_twenty_clients_with_two_of_ten_classes(how: Any) -> None:
    corpus = load_images(config("builtin", limit=420, test_size=20), Seeds(0))
    made = partition(corpus.train, how, 20, Seeds(0))
    category = corpus.train["category"]
    held = [len({category[row] for row in rows}) for rows in made.rows.values()]
    assert sorted(row for rows in made.rows.values() for row in rows) == list(range(400))
    assert max(held) <= (2 if how.kind == "label" else 4)


# fitting to a model


def test_fitting_and_normalising_is_the_processor_s_own_bit_for_bit(tmp_path: Path) -> None:
    made = load_preprocessing(vit(tmp_path))
    other = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    for processor in (made.processor, other):
        own = Preprocessing(processor, made.values if processor is made.processor else _table_of(other))
        image = picture(3, 21).crop((0, 0, 21, 13))
        pixels = own.fitted(image)
        assert pixels.shape == (3, 8, 8)
        expected = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
        assert torch.equal(own.normalised(torch.from_numpy(pixels)[None])[0], expected)


def _table_of(processor: Any) -> torch.Tensor:
    """(3, 256), one byte at a time: the slow and obvious way."""
    columns = []
    for byte in range(256):
        flat = PIL.Image.new("RGB", (8, 8), (byte, byte, byte))
        columns.append(torch.from_numpy(np.asarray(processor(flat)["pixel_values"][0]))[:, 0, 0])
    return torch.stack(columns, dim=1)


def test_the_checkpoint_s_own_processing_is_used(tmp_path: Path) -> None:
    """Bytes 0, 255 become (0 - 0.25) / 0.5 = -0.5 and (1 - 0.25) / 0.5 = 1.5."""
    model = vit(tmp_path)
    quarter, half = [0.25] * 3, [0.5] * 3
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=quarter, image_std=half).save_pretrained(tmp_path)
    values = load_preprocessing(model).values
    torch.testing.assert_close(values[:, [0, 255]], torch.tensor([[-0.5, 1.5]] * 3))


def test_without_a_processing_the_model_s_size_and_the_usual_scale(tmp_path: Path) -> None:
    made = load_preprocessing(vit(tmp_path, size=12))
    assert made.fitted(picture(0, 5)).shape == (3, 12, 12)
    torch.testing.assert_close(made.values[0, [0, 255]], torch.tensor([-1.0, 1.0]))


def test_the_built_in_model_s_processing() -> None:
    made = load_preprocessing(ModelConfig())
    assert np.array_equal(made.fitted(picture(0, 32)).transpose(1, 2, 0), noise(0, 32))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_red_green_blue(tmp_path: Path, mode: str) -> None:
    image = picture(0).convert(mode)
    file = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image.save(file)
    found = decoded({"path": str(file), "bytes": None}, "")
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_what_is_transparent_becomes_white_whatever_colour_it_hides() -> None:
    """Half transparent black over white is (255 + 0) / 2, rounded: 127 or 128."""
    image = PIL.Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    made = decoded({"path": None, "bytes": _png(image)}, "")
    assert made.getpixel((0, 0)) == (255, 255, 255)
    assert made.getpixel((1, 0)) in ((127,) * 3, (128,) * 3)


def _png(image: PIL.Image.Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "png")
    return held.getvalue()


def test_shards_and_batches(tmp_path: Path, preprocessing: Preprocessing) -> None:
    corpus = load(folder_of(tmp_path / "data", {"dog": 4, "cat": 5}), test_size=1)
    shard = encode_images(corpus.train, preprocessing, corpus.classes, "client c1")
    assert shard.report.json() == {"examples": 8, "resized": 0}
    assert shard.report.classes == 2
    batch = shard.collate(shard.examples[:3])
    assert (batch.pixel_values.dtype, batch.pixel_values.shape) == (torch.float32, (3, 3, 8, 8))
    assert batch.labels.tolist() == [("cat", "dog").index(name) for name in corpus.train["category"][:3]]
    assert batch.targets == 3
    assert list(batch.inputs()) == ["pixel_values"]
    first = decoded(corpus.train[0]["image"], "")
    assert np.array_equal(shard.examples[0].pixels.transpose(1, 2, 0), np.asarray(first))
    orders = [list(shard.batches(3, torch.Generator().manual_seed(0))) for _ in range(2)]
    assert [len(part) for part in orders[0]] == [3, 3, 2]
    assert {id(example) for part in orders[0] for example in part} == {id(example) for example in shard.examples}


def test_the_digest_tells_pixels_classes_and_order(tmp_path: Path, preprocessing: Preprocessing) -> None:
    corpus = load(folder_of(tmp_path / "data", {"dog": 4, "cat": 5}), test_size=1)

    def digest(records: datasets.Dataset, classes: Sequence[str] = ("cat", "dog")) -> str:
        return encode_images(records, preprocessing, classes, "").digest()

    assert digest(corpus.train) == digest(corpus.train)
    different = [
        digest(corpus.train), digest(corpus.train, ("dog", "cat")), digest(corpus.train.select(range(7))),
        digest(corpus.train.select([1, 0, *range(2, 8)])),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_images_of_another_size_are_counted(tmp_path: Path, preprocessing: Preprocessing) -> None:
    root = folder_of(tmp_path / "data", {"dog": 3, "cat": 3})
    picture(99, 20).save(root / "dog" / "large.png")
    corpus = load(root, test_size=1)
    shards = [encode_images(side, preprocessing, corpus.classes, "") for side in (corpus.train, corpus.test)]
    assert sum(shard.report.resized for shard in shards) == 1
    assert {example.pixels.shape for shard in shards for example in shard.examples} == {(3, 8, 8)}


# what is wrong


def check_line(error: BaseException, words: Sequence[str]) -> None:
    text = str(error)
    assert [word for word in words if word not in text] == [], text
    assert "\n" not in text


def _loose(root: Path) -> Path:
    root.mkdir()
    picture(0).save(root / "x.png")
    return root


def _damaged(root: Path, damage: str) -> Path:
    folder_of(root, {"a": 3, "b": 3})
    file = root / "a" / "1.png"
    file.write_bytes(b"no image" if damage == "words" else file.read_bytes()[:90])
    return root


def _deep(root: Path) -> Path:
    folder_of(root, {"a": 3, "b": 3})
    PIL.Image.fromarray(np.full((8, 8), 60000, dtype=np.uint16)).save(root / "a" / "deep.png")
    return root


def _table(root: Path, labels: Sequence[Any], feature: Any) -> Path:
    root.mkdir()
    table(labels, feature).to_parquet(root / "x.parquet")
    return root / "x.parquet"


def _texts(root: Path) -> Path:
    root.mkdir()
    columns = {"image": ["x", "y"], "label": [0, 1]}
    datasets.Dataset.from_dict(columns).to_parquet(root / "x.parquet")
    return root / "x.parquet"


def _json(root: Path) -> Path:
    root.mkdir()
    (root / "x.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    return root / "x.jsonl"


NAMED = datasets.ClassLabel(names=["cat", "dog", "emu"])
WRONG: list[tuple[Any, dict[str, Any], list[str]]] = [
    (lambda root: root, {}, ["data", "there is no such file or folder"]),
    (_loose, {}, ["holds no sub-folders", "each class", "data.task: generation"]),
    (lambda root: _damaged(root, "words"), {}, ["a/1.png", "it is no image", "remove it"]),
    (lambda root: _damaged(root, "cut"), {}, ["a/1.png", "cannot be read", "truncated"]),
    (_deep, {}, ["deep.png", "more than 8 bits"]),
    (lambda root: folder_of(root, {"val/a": 3, "val/b": 3}), {}, ["val/a", "set data.split"]),
    (lambda root: folder_of(root, {"a": 3, "b": 3}), {"split": "test"}, ["no folder of the split 'test'"]),
    (lambda root: folder_of(root, {"a": 6}), {}, ["one class, 'a'", "at least two"]),
    (lambda root: folder_of(root, {"a": 6, "b": 0}), {}, ["class 'b' has no training example", "0 of its examples"]),
    (lambda root: folder_of(root, {"a": 1, "b": 1}), {}, ["2 usable images", "data.test_size 2", "lower it"]),
    (lambda root: _table(root, [0, 1] * 3, NAMED), {"image": "imag"}, ["no column 'imag'; did you mean 'image'?"]),
    (lambda root: _table(root, [0, 1] * 3, NAMED), {"label": "y"}, ["no column 'y'", "'writer'", "set data.label"]),
    (lambda root: _table(root, [0, 1] * 3, NAMED), {"image": "writer"}, ["'writer' holds string, not images"]),
    (lambda root: _table(root, [0, 1] * 3, NAMED), {}, ["class 'emu' has no training example on any client"]),
    (lambda root: _table(root, [0, -1] * 3, NAMED), {}, ["record 2", "label -1", "3 classes"]),
    (lambda root: _table(root, [0.5] * 6, datasets.Value("float32")), {}, ["record 1", "label 0.5", "data.label"]),
    (lambda root: _table(root, ["a", None] * 3, datasets.Value("string")), {}, ["record 2", "label None"]),
    (_texts, {}, ["'image' holds string, not images", "data.task: generation"]),
    (_json, {}, ["x.jsonl", "sub-folder for each class", "data.task: generation"]),
]


@pytest.mark.parametrize(("make", "others", "words"), WRONG)
def test_what_cannot_be_loaded_says_what_to_change(
    tmp_path: Path, make: Any, others: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        load(make(tmp_path / "data"), **others)
    check_line(caught.value, words)


def test_a_class_whose_examples_are_all_held_out_is_named(tmp_path: Path) -> None:
    """Of 30 images of a and 1 of b, 29 are held out: for most seeds b's is among them."""
    root = folder_of(tmp_path / "data", {"a": 30, "b": 1})
    lines = []
    for seed in range(4):
        try:
            load_images(config(root, test_size=29), Seeds(seed))
        except DataError as error:
            lines.append(error)
    assert lines
    check_line(lines[0], ["class 'b' has no training example", "1 of its examples are held out", "data.test_size"])


def test_images_given_for_text_are_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", {"a": 3, "b": 3})
    for path in (folder, _table(tmp_path / "table", [0, 1] * 3, NAMED)):
        with pytest.raises(DataError) as caught:
            loading.load(DataConfig(path=str(path), test_size=1), Seeds(0))
        check_line(caught.value, ["images", "set data.task: image_classification"])


def _no_model(folder: Path) -> None:
    folder.mkdir()


def _text_model(folder: Path) -> None:
    LlamaConfig().save_pretrained(folder)


def _grey_model(folder: Path) -> None:
    vit(folder, num_channels=1)


def _other_size(folder: Path) -> None:
    vit(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


def _bad_processing(folder: Path) -> None:
    vit(folder)
    (folder / "preprocessor_config.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, ["folder", "does not exist", "hub id"]),
        (_no_model, ["how it wants its images cannot be read"]),
        (_text_model, ["'llama'", "takes no images", "give a vision model"]),
        (_grey_model, ["images of 1 channels", "expected 3"]),
        (_other_size, ["images of 8 x 8 pixels", "makes them 16 x 16"]),
        (_bad_processing, ["how it wants its images cannot be read"]),
    ],
)
def test_models_that_do_not_take_these_images(tmp_path: Path, make: Any, words: list[str]) -> None:
    make(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        load_preprocessing(ModelConfig(path=str(tmp_path / "model")))
    check_line(caught.value, ["model", *words])


def test_a_file_taken_away_after_loading_is_named(tmp_path: Path, preprocessing: Preprocessing) -> None:
    corpus = load(folder_of(tmp_path / "data", {"a": 3, "b": 3}), test_size=1)
    file = Path(corpus.train[0]["image"]["path"])
    file.unlink()
    with pytest.raises(DataError) as caught:
        encode_images(corpus.train, preprocessing, corpus.classes, "client c1")
    check_line(caught.value, [file.name, "cannot be read"])


def test_configuration_goes_through_json() -> None:
    made = config("x", client_test_share=0.25)
    assert ImageDataConfig.model_validate(json.loads(made.model_dump_json())) == made
