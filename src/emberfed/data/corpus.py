"""Loaded data, whatever the task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, final

import datasets


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
    """Records with a held-out split; which columns they have depends on the task.

    Attributes:
        train: To be divided over clients.
        test: Held out, for the global model.
        report: What became of the records.
        classes: Names of the classes, in the order of their numbers; empty if the task has none.
    """

    train: datasets.Dataset
    test: datasets.Dataset
    report: LoadReport
    classes: tuple[str, ...] = ()
