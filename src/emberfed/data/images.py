"""Images with a class each: loading, fitting to a model, shards and batches.

Shapes: B images, H x W pixels as the model wants them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import datasets
import numpy as np
import PIL.Image
import torch
from datasets.table import embed_table_storage
from numpy.typing import NDArray
from transformers import AutoConfig, AutoImageProcessor, ViTImageProcessorPil

from emberfed.data.classes import check_learnable
from emberfed.data.config import ImageDataConfig
from emberfed.data.corpus import Corpus, LoadReport
from emberfed.data.image_sources import Source, decoded, read_found, read_source
from emberfed.data.loading import explained, quietly
from emberfed.data.own import check_known
from emberfed.data.shard import ClassBatch, Shard
from emberfed.errors import DataError, ModelError
from emberfed.models.config import ModelConfig
from emberfed.models.loading import model_path
from emberfed.seeds import Seeds

_IMAGES_AT_ONCE = 100
"""Bytes of that many images are put into one array, which may hold 2 GiB."""
_PROCESSINGS = ("preprocessor_config.json", "processor_config.json")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Preprocessing:
    """How a model wants its images.

    Attributes:
        processor: transformers' own, on Pillow; it resizes and crops.
        values: float32 (3, 256), what the processor makes of each byte of each channel.
    """

    processor: Any
    values: torch.Tensor

    def fitted(self, image: PIL.Image.Image) -> NDArray[np.uint8]:
        """Return an RGB image's pixels in the model's size, uint8 (3, H, W)."""
        made = self.processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        return np.asarray(made, dtype=np.uint8)

    def save_pretrained(self, folder: str) -> None:
        """Write the processor's settings as transformers reads them."""
        self.processor.save_pretrained(folder)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return fitted pixels, uint8 (B, 3, H, W), as the model's input, float32 of the same shape."""
        return self.values[torch.arange(3)[:, None, None], pixels.long()]


@final
@dataclass(frozen=True, slots=True, eq=False)
class ImageExample:
    """One image.

    Attributes:
        pixels: uint8 (3, H, W), in the model's size.
        label: Number of its class.
    """

    pixels: NDArray[np.uint8]
    label: int


@final
@dataclass(frozen=True, slots=True)
class ImageShardReport:
    """What fitting did: images kept, how many had another size than the model's, and of how many classes they are."""

    examples: int
    resized: int
    classes: int

    def json(self) -> dict[str, int]:
        """Return the counts that can be added up over clients."""
        return {"examples": self.examples, "resized": self.resized}


@final
@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch(ClassBatch):
    """Images as the model takes them: `pixel_values` float32 (B, 3, H, W), `labels` int64 (B,)."""

    pixel_values: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> ImageBatch:
        """Return the batch on a device."""
        return ImageBatch(self.pixel_values.to(device), self.labels.to(device))

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the images."""
        return {"pixel_values": self.pixel_values}


@final
@dataclass(frozen=True, slots=True, eq=False)
class ImageShard(Shard):
    """Images, kept as bytes; a batch is normalised when it is made."""

    examples: tuple[ImageExample, ...]
    report: ImageShardReport
    preprocessing: Preprocessing

    def collate(self, examples: Sequence[ImageExample]) -> ImageBatch:
        """Return some of the examples as one batch."""
        pixels = torch.from_numpy(np.stack([example.pixels for example in examples]))
        labels = torch.tensor([example.label for example in examples])
        return ImageBatch(self.preprocessing.normalised(pixels), labels)

    def digest(self) -> str:
        """Return a SHA-256 of the fitted pixels and the classes' numbers."""
        told = hashlib.sha256()
        for example in self.examples:
            told.update(repr((example.pixels.shape, example.label)).encode())
            told.update(example.pixels.tobytes())
        return told.hexdigest()


def load_images(config: ImageDataConfig, seeds: Seeds) -> Corpus:
    """Load images, drop those whose pixels came before, shuffle, limit, hold out.

    No image is on both sides of the split; of two with the same pixels the first stays, whatever their classes. The
    shuffle is drawn from `seeds`.

    Returns:
        Records with columns `image` (encoded), `category` (the class's name), and the source's scalar ones.

    Raises:
        DataError: if the images cannot be found or read, have no classes or one, if there are too few, or if none of
            some class is left to train on.
    """
    source = read_source(config, seeds)
    rows = _usable(source, config)
    order = seeds.numpy("data order").permutation(len(rows))[: config.limit]
    if len(order) <= config.test_size:
        raise DataError(
            f"data {config.path} has {len(order)} usable images ({source.records.num_rows} read); data.test_size "
            f"{config.test_size} leaves none to train on; lower it or give more data"
        )
    chosen = _records(source, rows[order], config)
    train, test = chosen.select(range(config.test_size, len(order))), chosen.select(range(config.test_size))
    check_learnable(source.classes, train["category"], test["category"], f"data {config.path}")
    report = LoadReport(
        format="images",
        read=source.records.num_rows,
        duplicates=source.records.num_rows - len(rows),
        empty=0,
        over_limit=len(rows) - len(order),
        train=len(train),
        test=len(test),
    )
    return Corpus(train, test, report, source.classes)


def load_own_images(config: ImageDataConfig, classes: Sequence[str] | None) -> datasets.Dataset:
    """Load what is all a client's: as `load_images` does, in the order of the files, nothing held out or left out.

    Raises: DataError if the images cannot be found or read, one has a label that is none of the classes, or there are
        none.
    """
    source = read_found(config)
    if not len(source.records):
        raise DataError(f"data {config.path} has no image; put each class's images in the sub-folder with its name")
    check_known(source.records["category"], classes, f"data {config.path}")
    return _records(source, _usable(source, config), config)


def _usable(source: Source, config: ImageDataConfig) -> NDArray[np.int64]:
    """Read all images and return the rows of those whose pixels did not come before."""
    kept: dict[bytes, int] = {}
    for row, value in enumerate(source.records["image"]):
        kept.setdefault(_key(decoded(value, f"data {config.path}, record {row + 1}")), row)
    return np.asarray(list(kept.values()), dtype=np.int64)


def _records(source: Source, rows: NDArray[np.int64], config: ImageDataConfig) -> datasets.Dataset:
    chosen = source.records.select(rows)
    if config.label in chosen.column_names:
        return chosen
    with quietly():
        return chosen.add_column(config.label, chosen["category"])  # by which a partition may ask for the classes


def with_their_files(records: datasets.Dataset, where: str) -> datasets.Dataset:
    """Return images as the bytes of their files, where they were paths. Raises: DataError if a file is gone."""
    with explained(where), quietly():
        tables = records.with_format("arrow")
        held = tables.map(embed_table_storage, batched=True, batch_size=_IMAGES_AT_ONCE, keep_in_memory=True)
        return held.with_format(None)


def _key(image: PIL.Image.Image) -> bytes:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


def encode_images(
    records: datasets.Dataset, preprocessing: Preprocessing, classes: Sequence[str], where: str
) -> ImageShard:
    """Fit images to a model.

    Args:
        records: Columns `image` (encoded) and `category`, as `load_images` gives them.
        preprocessing: How the model wants them.
        classes: Names of the classes, in the order of their numbers.
        where: Whose they are, for errors.

    Raises:
        DataError: if a file was damaged or taken away since it was loaded.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    examples, resized = [], 0
    for row, record in enumerate(records.select_columns(["image", "category"])):
        image = decoded(record["image"], f"{where}, record {row + 1}")
        pixels = preprocessing.fitted(image)
        resized += pixels.shape != (3, image.height, image.width)
        examples.append(ImageExample(pixels, numbers[record["category"]]))
    report = ImageShardReport(len(examples), resized, len({example.label for example in examples}))
    return ImageShard(tuple(examples), report, preprocessing)


def load_preprocessing(config: ModelConfig) -> Preprocessing:
    """Load how a model wants its images: what its checkpoint says, else its size and ViT's usual scale, -1 to 1.

    Raises:
        ModelError: if the model cannot be found or read, takes no images of three channels, or its checkpoint's
            processing makes images of another size than its own.
    """
    path = model_path(config, "image_classification")
    if config.tokenizer is not None:
        raise ModelError(f"model.tokenizer is {config.tokenizer!r}, but a model of images has none; leave it out")
    folder = Path(path)
    if not folder.is_dir() and path.startswith((".", "/", "~")):
        raise ModelError(f"model folder {path} does not exist; give a local folder, a hub id or 'builtin'")
    where: dict[str, Any] = {
        "local_files_only": folder.is_dir(),
        "revision": None if folder.is_dir() else config.revision,
        "trust_remote_code": False,
    }
    try:
        model = AutoConfig.from_pretrained(path, **where)
        size = _image_size(model, path)
        silent = folder.is_dir() and not any((folder / name).is_file() for name in _PROCESSINGS)
        processor = _usual(size) if silent else AutoImageProcessor.from_pretrained(path, backend="pil", **where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's words on values that are not finite, told below
            made = Preprocessing(processor, _values(processor))
        found = made.fitted(PIL.Image.new("RGB", (size[1] + 7, size[0] + 3))).shape[1:]
    except ModelError:
        raise
    except Exception as error:  # whatever libraries raise over files that are not what they should be
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {path}: how it wants its images cannot be read ({type(error).__name__}: {reason})"
        ) from None
    lowest, highest = made.values.min(dim=1).values, made.values.max(dim=1).values
    if not bool((torch.isfinite(made.values).all(dim=1) & (lowest < highest)).all()):
        raise ModelError(
            f"model {path}: its {_PROCESSINGS[0]} makes every image the same, or not finite; mend its rescale_factor, "
            f"image_mean and image_std"
        )
    if found != size:
        raise ModelError(
            f"model {path} takes images of {size[0]} x {size[1]} pixels, but its {_PROCESSINGS[0]} makes them "
            f"{found[0]} x {found[1]}; mend that file"
        )
    return made


def _image_size(model: Any, path: str) -> tuple[int, int]:
    """Return the height and width a model takes, in pixels."""
    vision = getattr(model, "vision_config", model)
    size = getattr(vision, "image_size", None)
    if size is None:
        raise ModelError(
            f"model {path} is of type {model.model_type!r} and takes no images, and data.task is "
            f"'image_classification'; give a vision model such as a ViT, or data of text"
        )
    channels = getattr(vision, "num_channels", 3)
    if channels != 3:
        raise ModelError(f"model {path} takes images of {channels} channels; expected 3 (red, green, blue)")
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _usual(size: tuple[int, int]) -> Any:
    half = [0.5, 0.5, 0.5]
    return ViTImageProcessorPil(size={"height": size[0], "width": size[1]}, image_mean=half, image_std=half)


def _values(processor: Any) -> torch.Tensor:
    """Return float32 (3, 256): an image that holds every byte in every channel, scaled but not resized."""
    every = PIL.Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    made = processor(every, do_resize=False, do_center_crop=False)["pixel_values"][0]
    return torch.from_numpy(np.asarray(made, dtype=np.float32).reshape(3, 256))
