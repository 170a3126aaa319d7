"""The report: one self-contained HTML page made from run folders alone.

Nothing is fetched and nothing is run; the same run folders always give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emberfed import storage
from emberfed.errors import RunFolderError
from emberfed.report.page import page
from emberfed.report.reading import read_run

__all__ = ["write_report"]


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write the report of one or several run folders to the file `output`, and return `output`.

    Raises:
        RunFolderError: No run was given, or a path is not a run folder. Missing or damaged files in one are no error:
            the page names them.
        StorageError: The page cannot be written.
    """
    if not runs:
        raise RunFolderError("no run folder was given; name at least one, for example runs/quickstart")
    storage.write(output, page([read_run(path) for path in runs]).encode())
    return output
