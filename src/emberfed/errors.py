"""Every error a user can meet. One readable line each: what happened, where, what was allowed, what to do.

The command line prints the line and exits with `exit_code`; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class EmberfedError(Exception):
    """Base of the errors below; `str(error)` is one line for the user."""

    exit_code: ClassVar[int] = 1


class ConfigError(EmberfedError):
    """A configuration that cannot be run: unknown key, wrong type, impossible budget."""

    exit_code = 2


class DataError(EmberfedError):
    """A data set or partition that cannot be trained on."""

    exit_code = 3


class ModelError(EmberfedError):
    """A model, tokenizer or adapter that does not fit."""

    exit_code = 4


class RunFolderError(EmberfedError):
    """A run folder that is missing, belongs to another run, or is damaged."""

    exit_code = 5


class RoundFailed(EmberfedError):
    """Too few clients gave a usable upload; the run stays resumable."""

    exit_code = 6


class StorageError(EmberfedError):
    """Writing failed: disk full, quota, permissions. Nothing finished is lost."""

    exit_code = 7


class ClientError(EmberfedError):
    """One client's local training failed (for example a non-finite loss). The round goes on without it."""

    exit_code = 8


class AggregationError(EmberfedError):
    """Updates that cannot be put together: other tensors, shapes or ranks than the method can mix."""

    exit_code = 9


class EngineError(EmberfedError):
    """What carries questions to clients cannot start, or is gone: processes, ports, connections, certificates.

    Nothing finished is lost; the run stays resumable.
    """

    exit_code = 10


class Interrupted(EmberfedError):
    """The user stopped the run; it is resumable."""

    exit_code = 130


def closest(name: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the allowed name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def one_of(names: Iterable[str]) -> str:
    """Return the names sorted and quoted, for `expected one of ...`."""
    return ", ".join(repr(name) for name in sorted(names))
