"""The classes of examples: their names, whatever way a data set writes them, and whether all can be learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets

from emberfed.errors import DataError, closest, one_of


def in_natural_order(names: Sequence[str]) -> tuple[str, ...]:
    """Return different names sorted, numbers by value and before words."""
    return tuple(sorted(set(names), key=lambda name: (False, int(name), "") if name.isdecimal() else (True, 0, name)))


def check_columns(table: datasets.Dataset, columns: dict[str, str], where: str) -> None:
    """Check that a table has the columns that keys of the configuration name. Raises: DataError."""
    for key, column in columns.items():
        if column not in table.column_names:
            raise DataError(
                f"{where} has no column {column!r}{closest(column, table.column_names)} (there are "
                f"{one_of(table.column_names)}); set data.{key}, or for other data data.task"
            )


def class_names(table: datasets.Dataset, column: str, where: str) -> list[str]:
    """Return each example's class by name: whole numbers and words as they are, numbers of a ClassLabel by its names.

    Raises: DataError naming the first record whose label is none of these.
    """
    feature = table.features[column]
    return [
        _name(label, feature, column, f"{where}, record {number + 1}") for number, label in enumerate(table[column])
    ]


def _name(label: Any, feature: Any, column: str, where: str) -> str:
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DataError(
            f"{where}: label {label!r} is neither a whole number nor a word; mend column {column!r} or set data.label"
        )
    if isinstance(label, str) and not label.strip():
        raise DataError(f"{where}: label {label!r} is blank; give the record a class, or leave it out")
    if not isinstance(feature, datasets.ClassLabel):
        return str(label)
    if not 0 <= int(label) < feature.num_classes:
        raise DataError(
            f"{where}: label {label} is none of the {feature.num_classes} classes; give the record a class, or use a "
            f"split whose labels are known"
        )
    return str(feature.int2str(label))


def declared(table: datasets.Dataset, column: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return all classes a column speaks of, in natural order; a ClassLabel's may have no example."""
    feature = table.features[column]
    return in_natural_order(feature.names if isinstance(feature, datasets.ClassLabel) else names)


def check_learnable(classes: Sequence[str], train: Sequence[str], test: Sequence[str], where: str) -> None:
    """Check that there is something to tell apart, and something to learn each class from. Raises: DataError."""
    if len(classes) < 2:
        found = ", ".join(repr(name) for name in classes)
        raise DataError(f"{where} has one class, {found}; there must be at least two to tell apart")
    trained, held_out = Counter(train), Counter(test)
    for name in classes:
        if not trained[name]:
            raise DataError(
                f"{where}: class {name!r} has no training example on any client ({held_out[name]} of its examples are "
                f"held out); give it more, raise data.limit, lower data.test_size, or leave the class out"
            )
