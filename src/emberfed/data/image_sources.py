"""Images with classes as `datasets` reads them: folders of files, Parquet, saved data sets, the hub, the built-in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import datasets
import PIL.Image

from emberfed.builtin.images import CLASSES, images
from emberfed.data.classes import check_columns, class_names, declared, in_natural_order
from emberfed.data.config import ImageDataConfig
from emberfed.data.loading import SAVED, read_table
from emberfed.errors import DataError
from emberfed.seeds import Seeds

_BUILTIN_TRAINING_IMAGES = 2000
_DEEP_MODES = ("I", "F")
"""Pillow's names of more than 8 bits per channel begin so; it would cut their values off without a word."""
_IMAGE = datasets.Image()
_ENCODED = datasets.Image(decode=False)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Images as they were found.

    Attributes:
        records: Columns `image` (encoded, not read yet), `category` (the class's name), and the scalar ones there were.
        classes: Names of all classes the source speaks of, in natural order; some may have no image.
    """

    records: datasets.Dataset
    classes: tuple[str, ...]


def read_source(config: ImageDataConfig, seeds: Seeds) -> Source:
    """Find images and the names of their classes. Raises: DataError if there are none, or no classes."""
    return _builtin(config, seeds) if config.path == "builtin" else read_found(config)


def read_found(config: ImageDataConfig) -> Source:
    """Find images in a file, a folder or on the hub. Raises: DataError if there are none, or no classes."""
    path = Path(config.path).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in SAVED) and not any(path.glob("*.parquet")):
        return _read_classes_folder(path, config.split)
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise DataError(
            f"data {path}: images come as a folder with a sub-folder for each class, as .parquet, or from the "
            f"hub; for data of text set data.task: generation"
        )
    return _from_columns(read_table(config), config)


def decoded(value: Mapping[str, Any] | None, where: str) -> PIL.Image.Image:
    """Return an image in RGB, turned as its camera says; what is transparent becomes white.

    Raises: DataError naming the file, or else `where`, if there is none, it cannot be read, or it is more than one.
    """
    if value is None:
        raise DataError(f"{where} has no image; give it one, or leave the record out")
    named = f"image {value['path']}" if value["path"] else where
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's words on odd metadata
            image: PIL.Image.Image = _IMAGE.decode_example({"path": value["path"], "bytes": _bytes(value)})
    except Exception as error:  # Pillow's readers raise many kinds over damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        reason = "it is no image" if isinstance(error, PIL.UnidentifiedImageError) else reason
        raise DataError(f"{named} cannot be read ({reason}); mend or remove it") from None
    if image.mode.startswith(_DEEP_MODES):
        raise DataError(f"{named} has more than 8 bits per channel (mode {image.mode}); convert it to 8")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph, with a second view or a preview beside it
        raise DataError(f"{named} holds {frames} pictures, of which one would be used; keep the one that is meant")
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")


def _bytes(value: Mapping[str, Any]) -> bytes | None:
    """Read a local file whole; the library would leave a damaged one open. None: let it find what the path means."""
    if value["bytes"] is None and value["path"] and Path(value["path"]).is_file():
        return Path(value["path"]).read_bytes()
    held: bytes | None = value["bytes"]
    return held


def _builtin(config: ImageDataConfig, seeds: Seeds) -> Source:
    size = config.limit or _BUILTIN_TRAINING_IMAGES + config.test_size
    pictures = images(size, seeds.at(part="images"))
    features = datasets.Features({"image": _IMAGE, "category": datasets.Value("string")})
    columns = {
        "image": [PIL.Image.fromarray(pixels) for pixels in pictures.pixels],
        "category": [CLASSES[label] for label in pictures.labels],
    }
    records = datasets.Dataset.from_dict(columns, features=features)
    return Source(records.cast_column("image", _ENCODED), in_natural_order(CLASSES))


def _read_classes_folder(folder: Path, split: str) -> Source:
    """Read the folder of `split`, or the folder itself: a sub-folder for each class, holding images alone."""
    try:
        root = folder / split if (folder / split).is_dir() else folder
        if root == folder and split != "train":
            raise DataError(f"data {folder} holds no folder of the split {split!r}; set data.split or path")
        names = sorted(entry.name for entry in _visible(root) if entry.is_dir())
        if not names:
            raise DataError(
                f"data {root} holds no sub-folders; put each class's images in a sub-folder with its name, or for "
                f"data of text set data.task: generation"
            )
        files = [(file, name) for name in names for file in _visible(root / name)]
        deeper = next((file for file, _ in files if file.is_dir()), None)
        special = next((file for file, _ in files if file.exists() and not (file.is_file() or file.is_dir())), None)
        loose = next((entry for entry in _visible(root) if entry.suffix.lower() in _endings()), None)
        for name in names:
            name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"data {folder} has a class whose folder's name {error.object!r} is not UTF-8; rename it"
        ) from None
    except OSError as error:
        raise DataError(f"data {folder} cannot be read ({error.strerror})") from None
    if deeper is not None:
        raise DataError(
            f"data {root}: {deeper.relative_to(root)} is a folder in a class's folder, which may hold images "
            f"alone; set data.split or path to the folder right above the classes"
        )
    if special is not None:
        raise DataError(f"data {root}: {special.relative_to(root)} is no file (a pipe or a device); remove it")
    if loose is not None:
        raise DataError(
            f"data {root}: image {loose.name} lies beside the classes' folders, so it has no class; move it into "
            f"one of them, or away"
        )
    columns = {
        "image": [{"path": str(file), "bytes": None} for file, _ in files],
        "category": [name for _, name in files],
    }
    features = datasets.Features({"image": _ENCODED, "category": datasets.Value("string")})
    return Source(datasets.Dataset.from_dict(columns, features=features), in_natural_order(names))


def _endings() -> frozenset[str]:
    """Return how names of image files end, in lower case."""
    return frozenset(PIL.Image.registered_extensions())


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _from_columns(raw: datasets.Dataset, config: ImageDataConfig) -> Source:
    where = f"data {config.path}"
    check_columns(raw, {"image": config.image, "label": config.label}, where)
    pictured = raw.features[config.image]
    if not _holds_images(pictured):
        raise DataError(
            f"{where}: column {config.image!r} holds {_kind(pictured)}, not images; set data.image, or for data of "
            f"text data.task: generation"
        )
    names = class_names(raw, config.label, where)
    scalars = [
        name
        for name, feature in raw.features.items()
        if isinstance(feature, datasets.Value) and name not in (config.image, config.label, "image", "category")
    ]
    records = raw.select_columns([config.image, *scalars])
    if config.image != "image":
        records = records.rename_column(config.image, "image")
    records = records.cast_column("image", _ENCODED).add_column("category", names)
    return Source(records, declared(raw, config.label, names))


def _holds_images(feature: Any) -> bool:
    """Whether a column is of images, or of what they are stored as where the file does not say so."""
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _kind(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__
