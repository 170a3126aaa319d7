"""Writes a finished file in one step."""

from __future__ import annotations

from pathlib import Path

from emberfed.errors import StorageError


def write_file(output: Path, content: bytes) -> None:
    """Write a file whole or not at all; folders on the way are made. Raises: StorageError."""
    unfinished = output.with_name(f"{output.name}.unfinished")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{output} cannot be written ({error.strerror}); free space or choose another file"
        ) from None
