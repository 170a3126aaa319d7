"""From `data` in the configuration to a `Corpus`: records of one schema, de-duplicated, with a held-out split."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import datasets

from emberfed.builtin import corpus
from emberfed.data.config import DataConfig
from emberfed.data.formats import SCHEMA, check_columns, normalise
from emberfed.errors import DataError
from emberfed.seeds import Seeds

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_BUILTIN_TRAINING_EXAMPLES = 480
_SHEPHERD = re.compile(r"local_training_(\d+)")


@final
@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of the records: `read` = `duplicates` + `empty` + `over_limit` + `train` + `test`."""

    format: str
    read: int
    duplicates: int
    empty: int
    over_limit: int
    train: int
    test: int

    def json(self) -> dict[str, Any]:
        """Return the counts."""
        return asdict(self)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Records with the columns of `formats.SCHEMA` and the scalar columns they came with."""

    train: datasets.Dataset
    test: datasets.Dataset
    report: LoadReport


def load(config: DataConfig, seeds: Seeds) -> Corpus:
    """Load, map to one schema, drop duplicates and empty responses, shuffle, limit, and hold out the test split.

    No (instruction, context, history) is on both sides of the split. The shuffle is drawn from `seeds`.

    Raises:
        DataError: if the data cannot be found or read, is of no known format, or is too little.
    """
    raw = _read(config, seeds)
    format = check_columns(config.format, raw.column_names)
    kept: dict[str, dict[str, Any]] = {}
    empty = 0
    for number, record in enumerate(raw):
        mapped = normalise(format, record, f"data {config.path}, record {number + 1}")
        if not mapped["response"]:
            empty += 1
            continue
        kept.setdefault(_key(mapped), {**_scalars(record), **mapped})
    records = list(kept.values())
    order = seeds.numpy("data order").permutation(len(records))[: config.limit]
    if len(order) <= config.test_size:
        raise DataError(
            f"data {config.path} has {len(order)} usable examples ({raw.num_rows} read, {empty} without response); "
            f"data.test_size {config.test_size} leaves none to train on; lower it or give more data"
        )
    chosen = datasets.Dataset.from_list([records[index] for index in order])
    report = LoadReport(
        format=format,
        read=raw.num_rows,
        duplicates=raw.num_rows - empty - len(records),
        empty=empty,
        over_limit=len(records) - len(order),
        train=len(order) - config.test_size,
        test=config.test_size,
    )
    held_out = range(config.test_size)
    return Corpus(chosen.select(range(config.test_size, len(order))), chosen.select(held_out), report)


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
    path = Path(config.path).expanduser()
    if path.is_file():
        return _read_files([path])
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in _BUILDERS or config.path.startswith((".", "/", "~")):
        raise DataError(f"data.path {config.path}: there is no such file or folder")
    return _read_hub(config)


def _read_folder(folder: Path) -> datasets.Dataset:
    if (folder / "dataset_info.json").is_file():
        with _explained(str(folder)):
            loaded = datasets.load_from_disk(str(folder), keep_in_memory=True)
        if isinstance(loaded, datasets.DatasetDict):
            raise DataError(f"data.path {folder} holds several splits {sorted(loaded)}; give the folder of one of them")
        return loaded
    files = sorted((path for path in folder.iterdir() if path.suffix in _BUILDERS), key=_by_number)
    if not files:
        raise DataError(f"data.path {folder} holds no file of {', '.join(sorted(_BUILDERS))}")
    parts = []
    for file in files:
        part = _read_files([file])
        shepherd = _SHEPHERD.fullmatch(file.stem)
        client = shepherd[1] if shepherd else file.stem
        parts.append(part if "client" in part.column_names else part.add_column("client", [client] * part.num_rows))
    with _explained(str(folder)):
        return datasets.concatenate_datasets(parts)


def _by_number(path: Path) -> tuple[str, int, str]:
    number = re.search(r"(\d+)$", path.stem)
    return (path.stem[: number.start()], int(number[0]), "") if number else (path.stem, 0, path.suffix)


def _read_files(files: Sequence[Path]) -> datasets.Dataset:
    file = files[0]
    if file.suffix not in _BUILDERS:
        raise DataError(f"data.path {file}: files must end in one of {', '.join(sorted(_BUILDERS))}")
    if file.stat().st_size == 0:
        raise DataError(f"data.path {file} is empty")
    # The cache is ours and goes away: an edited file must be read again, and a read-only home must not matter.
    with tempfile.TemporaryDirectory() as cache, _explained(str(file)), _quietly():
        loaded = datasets.load_dataset(
            _BUILDERS[file.suffix],
            data_files=[str(path) for path in files],
            split="train",
            cache_dir=cache,
            keep_in_memory=True,
        )
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _read_hub(config: DataConfig) -> datasets.Dataset:
    with _quietly():
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
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise DataError(f"data.path {where} cannot be read ({type(cause).__name__}: {reason})") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's progress bars and log lines; our own progress is shown instead."""
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
