"""From `data` in the configuration to a `Corpus`: records of one schema, de-duplicated, with a held-out split."""

from __future__ import annotations

import csv
import glob
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, final

import datasets
import huggingface_hub

from emberfed.builtin import corpus
from emberfed.data.config import CorpusConfig, DataConfig
from emberfed.data.corpus import Corpus, LoadReport
from emberfed.data.formats import SCHEMA, check_columns, normalise
from emberfed.errors import DataError, one_of
from emberfed.seeds import Seeds

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_BUILTIN_TRAINING_EXAMPLES = 480
_DEEPEST = 100
"""Levels of JSON; the library's parser crashes the process on endless nesting."""
SAVED = ("dataset_info.json", "dataset_dict.json")
"""What `save_to_disk` leaves in the folder of a data set, and of one with several splits."""
_SHEPHERD = re.compile(r"local_training_(\d+)")
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-zA-Z])")


def load(config: DataConfig, seeds: Seeds) -> Corpus:
    """Load, map to one schema, drop duplicates and records without prompt or response, shuffle, limit, hold out.

    No (instruction, context, history) is on both sides of the split. The shuffle is drawn from `seeds`.

    Raises:
        DataError: if the data cannot be found or read, is of no known format, or is too little.
    """
    usable = _usable(_read(config, seeds), config)
    order = seeds.numpy("data order").permutation(len(usable.records))[: config.limit]
    if len(order) <= config.test_size:
        raise DataError(
            f"data {config.path} has {len(order)} usable examples ({usable.read} read, {usable.empty} without prompt "
            f"or response); "
            f"data.test_size {config.test_size} leaves none to train on; lower it or give more data"
        )
    chosen = datasets.Dataset.from_list([usable.records[index] for index in order])
    report = LoadReport(
        format=usable.format,
        read=usable.read,
        duplicates=usable.read - usable.empty - len(usable.records),
        empty=usable.empty,
        over_limit=len(usable.records) - len(order),
        train=len(order) - config.test_size,
        test=config.test_size,
    )
    held_out = range(config.test_size)
    return Corpus(chosen.select(range(config.test_size, len(order))), chosen.select(held_out), report)


def load_own(config: DataConfig) -> datasets.Dataset:
    """Load what is all a client's: as `load` does, in the order of the files, with nothing held out or left out.

    Raises: DataError if the data cannot be found or read, is of no known format, or has no usable record.
    """
    usable = _usable(read_table(config), config)
    if not usable.records:
        raise DataError(
            f"data {config.path} has no usable example ({usable.read} read, {usable.empty} without prompt or "
            f"response); give each a prompt and a response"
        )
    return datasets.Dataset.from_list(list(usable.records))


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Usable:
    """Records of the schema of `formats` with their scalars, in the order they were read, and what was left out."""

    records: Sequence[dict[str, Any]]
    format: str
    read: int
    empty: int


def _usable(raw: datasets.Dataset, config: DataConfig) -> _Usable:
    """Map records to the schema; drop those without prompt or response, and those that came before."""
    _check_text(raw, config.path)
    format = check_columns(config.format, raw.column_names, f"data {config.path}")
    kept: dict[str, dict[str, Any]] = {}
    empty = 0
    with explained(config.path):  # text that is not UTF-8 shows only now
        rows = raw.to_list()
    for number, record in enumerate(rows):
        mapped = normalise(format, record, f"data {config.path}, record {number + 1}")
        if not mapped["response"] or not (mapped["instruction"] or mapped["context"] or mapped["history"]):
            empty += 1
            continue
        kept.setdefault(_key(mapped), {**_scalars(record), **mapped})
    return _Usable(list(kept.values()), format, raw.num_rows, empty)


def _check_text(raw: datasets.Dataset, path: str) -> None:
    """Refuse images here, where a list of missing text columns would not say what is wrong."""
    for column, feature in raw.features.items():
        if isinstance(feature, datasets.Image):
            raise DataError(
                f"data {path} holds images (column {column!r}), and data.task is 'generation'; give data of text, or "
                f"set data.task: image_classification"
            )


def _key(record: dict[str, Any]) -> str:
    parts = [record["instruction"], record["context"], *(turn["content"] for turn in record["history"])]
    return json.dumps([" ".join(part.casefold().split()) for part in parts])


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.items()
        if name not in SCHEMA and (value is None or isinstance(value, str | int | float))
    }


def _read(config: DataConfig, seeds: Seeds) -> datasets.Dataset:
    if config.path == "builtin":
        size = config.limit or _BUILTIN_TRAINING_EXAMPLES + config.test_size
        return datasets.Dataset.from_list(corpus(size, seeds.at(part="corpus")))
    return read_table(config)


def read_table(config: CorpusConfig) -> datasets.Dataset:
    """Read a split of a file, a folder of files or a data set of the hub, as it is. Raises: DataError."""
    path = Path(config.path).expanduser()
    with explained(config.path):
        is_file, is_folder = path.is_file(), path.is_dir()
    if is_file:
        if config.split != "train":
            raise DataError(f"data.split {config.split!r}: the file {path} has no splits; leave data.split out")
        return _read_file(path)
    if is_folder:
        return _read_folder(path, config.split)
    if _builder(path) or not _HUB_ID.fullmatch(config.path):
        raise DataError(f"data.path {config.path}: there is no such file or folder")
    return _read_hub(config)


def _read_folder(folder: Path, split: str) -> datasets.Dataset:
    if any((folder / name).is_file() for name in SAVED):
        return _read_saved(folder, split)
    parts = []
    for file in _files_of(folder, split):
        part = _read_file(file)
        shepherd = _SHEPHERD.fullmatch(file.stem)
        client = shepherd[1] if shepherd else file.stem
        parts.append(part if "client" in part.column_names else part.add_column("client", [client] * part.num_rows))
    with explained(str(folder)):
        return datasets.concatenate_datasets(parts)


def _read_saved(folder: Path, split: str) -> datasets.Dataset:
    with explained(str(folder)), quietly():
        loaded = datasets.load_from_disk(str(folder), keep_in_memory=True)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise DataError(f"data {folder} has the splits {one_of(loaded)}, not {split!r}; set data.split")
    return loaded[split]


def _files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split: Shepherd's clients, else those named after it, else all if none names a split."""
    with explained(str(folder)):
        files = sorted((path for path in folder.iterdir() if _builder(path)), key=_by_number)
    if not files:
        raise DataError(
            f"data {folder} holds no file of {', '.join(sorted(_BUILDERS))}; for a folder of images set "
            f"data.task: image_classification"
        )
    clients = [file for file in files if _SHEPHERD.fullmatch(file.stem)]
    if clients and split == "train":
        return clients  # beside them lie files with the same records again
    named = {file: _SPLIT.match(file.stem) for file in files}
    chosen = [file for file, match in named.items() if match and match[1] == split]
    if chosen:
        return chosen
    if split == "train" and not any(named.values()):
        return files
    found = ", ".join(file.name for file in files[:8])
    raise DataError(
        f"data {folder} holds no file of the split {split!r} (found: {found}); rename its files, or set data.split or "
        f"path"
    )


def _by_number(path: Path) -> tuple[str, int, str]:
    number = re.search(r"(\d+)$", path.stem)
    return (path.stem[: number.start()], int(number[0]), path.name) if number else (path.stem, -1, path.name)


def _builder(path: Path) -> str | None:
    return _BUILDERS.get(path.suffix.lower())


def _read_file(file: Path) -> datasets.Dataset:
    builder = _builder(file)
    if builder is None:
        raise DataError(f"data {file}: files must end in one of {', '.join(sorted(_BUILDERS))}")
    if builder == "csv":
        return _read_csv(file)
    if builder == "json":
        _check_json(file)
    # The cache is ours and goes away: an edited file must be read again, and a read-only home must not matter.
    with tempfile.TemporaryDirectory() as cache, explained(str(file)), quietly():
        loaded = datasets.load_dataset(
            builder,
            data_files=[glob.escape(str(file))],
            split="train",
            cache_dir=cache,
            keep_in_memory=True,
        )
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _depth(text: str) -> int:
    """Return how deep brackets nest at most; those inside strings count too, which errs on the safe side."""
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _check_json(file: Path) -> None:
    """Refuse what cannot be records; the library's parser crashes the process on some of it (a lone `null`)."""
    with explained(str(file)), file.open(encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        start = first.lstrip()[:1]
        for number, line in enumerate(chain([first], lines)):
            if line.count("{") + line.count("[") > _DEEPEST and _depth(line) > _DEEPEST:
                raise DataError(f"data {file}: record {number + 1} is nested deeper than {_DEEPEST} levels")
    if start not in ("{", "["):
        found = f"it begins with {start!r}" if start else "it is empty"
        raise DataError(f"data {file} must hold one JSON object per line, or a list of objects; {found}")


def _read_csv(file: Path) -> datasets.Dataset:
    """Read every column as text: answers such as `None`, `NA` or `007` must stay what they are.

    The library's own reader guesses types, and shifts the columns of rows with a comma too many.
    """
    with explained(str(file)), file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header = next(reader, [])
        rows = [(reader.line_num, row) for row in reader if row]
    if len(set(header)) < len(header):
        raise DataError(f"data {file}: the column names {header} are not all different; rename them")
    for line, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"data {file}, line {line}: {len(row)} cells under {len(header)} column names; "
                f"put text with commas in quotes"
            )
    if not rows:
        raise DataError(f"data {file} cannot be read (it holds no records)")
    return datasets.Dataset.from_dict({name: [row[place] for _, row in rows] for place, name in enumerate(header)})


def _read_hub(config: CorpusConfig) -> datasets.Dataset:
    with quietly():
        try:
            loaded = datasets.load_dataset(config.path, split=config.split)
        except Exception as error:  # the hub's client raises many kinds, some of other libraries
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"data.path {config.path!r} is no local file or folder, and the hub gave nothing for split "
                f"{config.split!r} ({type(error).__name__}: {reason})"
            ) from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what the library and the system raise over data they cannot read into one line that says where."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, csv.Error, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        if "corresponds to no data" in reason:  # the library's words for it
            reason = "it holds no records"
        raise DataError(f"data {where[:200]} cannot be read ({reason[:200]})") from None


@contextmanager
def quietly() -> Iterator[None]:
    """Work without the library's progress bars and log lines; our own progress is shown instead."""
    hub_log: Any = huggingface_hub.utils.logging
    shown, level, hub_level = (
        datasets.is_progress_bar_enabled(),
        datasets.logging.get_verbosity(),
        hub_log.get_verbosity(),
    )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_log.set_verbosity(hub_log.CRITICAL)
    try:
        yield
    finally:
        hub_log.set_verbosity(hub_level)
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
