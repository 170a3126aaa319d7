"""Whole files or none: everything is written under a temporary name, synced, and renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from emberfed.errors import StorageError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too big",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an operating system error while writing `path` into one line. Raises: StorageError."""
    try:
        yield
    except OSError as error:
        reason = _FULL.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(
            f"could not write {path}: {reason}; nothing finished is lost. Make room or allow writing, then repeat or "
            f"resume"
        ) from error


def write(path: Path, data: bytes) -> None:
    """Write a file atomically and durably, with its folders. Raises: StorageError."""
    _put(path, data, lambda file: os.fsync(file.fileno()))
    with explained(path):
        sync_folder(path.parent)


def put(path: Path, data: bytes) -> None:
    """Write a file atomically, but leave it to the system when it reaches the disk. Raises: StorageError.

    For what can be made again and is checked before use: it survives a kill, not always a power cut.
    """
    _put(path, data, lambda file: None)  # noqa: ARG005


def _put(path: Path, data: bytes, settle: Callable[[BinaryIO], None]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                settle(file)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys sorted. Raises: StorageError."""
    write(path, encoded(value))


def encoded(value: Any) -> bytes:
    """Return a JSON document with sorted keys."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line. Raises: StorageError."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(lines([row]))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename durably. Raises: StorageError."""
    with explained(target):
        source.rename(target)
        sync_folder(target.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which appears as `target` when the block ends well and is gone when it does not.

    What killed attempts at the same target left beside it is removed first; attempts still at work are left alone.

    Args:
        target: The folder, absent or empty, in one that may be absent.

    Raises: StorageError.
    """
    target = target.absolute()
    filled = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with explained(target):
            _remove_left_overs(target)
            filled.mkdir(parents=True)
            held = os.open(filled, os.O_RDONLY)
        try:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            yield filled
            rename(filled, target)
        finally:
            os.close(held)
    finally:
        shutil.rmtree(filled, ignore_errors=True)


def _remove_left_overs(target: Path) -> None:
    """Remove the unfinished folders of `target` that no process holds: the system lets go of a killed one's."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    found = target.parent.iterdir() if target.parent.is_dir() else ()
    for folder in [path for path in found if ours.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]:
        with suppress(OSError):
            held = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, atomically. Raises: StorageError."""
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explained(link):
        temporary.symlink_to(target)
        temporary.replace(link)
        sync_folder(link.parent)
