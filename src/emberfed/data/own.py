"""A client's own data in a deployment: where it lies, and the columns it is handed out with.

Nothing of it is held out for the server and nothing is divided: all of it is the client's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets

from emberfed.data.config import CorpusConfig
from emberfed.data.loading import explained, quietly
from emberfed.errors import DataError, closest

_MOST_CLASSES_TOLD = 20
_CorpusConfig = TypeVar("_CorpusConfig", bound=CorpusConfig)


def own_section(config: _CorpusConfig, folder: Path) -> _CorpusConfig:
    """Return the `data` section that reads a client's folder (or file): all of it, and of splits `train`.

    Raises: DataError naming the folder if it is not there, is empty, or may not be looked into.
    """
    path = folder.expanduser().absolute()
    with explained(str(path)):
        there = path.exists()
        empty = path.is_dir() and all(entry.name.startswith(".") for entry in path.iterdir())
    if not there:
        raise DataError(f"the client's data {path}: there is no such file or folder; give the one that holds its data")
    if empty:
        raise DataError(f"the client's data folder {path} is empty; put the client's data there, or give another one")
    return config.model_copy(update={"path": str(path), "split": "train"})


def check_known(names: Sequence[str], classes: Sequence[str] | None, where: str) -> None:
    """Check that a client's labels are classes of the federation; it need not have some of each.

    Args:
        names: Each record's class.
        classes: Names of all classes, which the server sets; None: it has not told them yet.
        where: Whose records they are.

    Raises: DataError naming the first label that is none of the classes, and these.
    """
    if classes is None:
        return
    known = set(classes)
    for row, name in enumerate(names):
        if name not in known:
            listed = ", ".join(repr(known_name) for known_name in classes[:_MOST_CLASSES_TOLD])
            more = f" and {len(classes) - _MOST_CLASSES_TOLD} more" if len(classes) > _MOST_CLASSES_TOLD else ""
            raise DataError(
                f"{where}, record {row + 1}: label {name!r} is none of the server's {len(classes)} classes ({listed}"
                f"{more}){closest(name, classes)}; mend the label, leave such records out, or give the server's own "
                f"data that class"
            )


def source_columns(format: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return instruction records with the columns of a format: inverse of `formats.normalise`, category aside.

    Args:
        format: The format they are to be read as.
        records: Of the schema of `formats`, all that lie in one file: a column is either text or lists.
    """
    in_turns = format == "prompt_completion" and any(record["history"] for record in records)
    written = _prompt_and_completion_in_turns if in_turns else _WRITERS[format]
    return [written(record) for record in records]


def named_columns(records: datasets.Dataset, content: str, content_as: str, label_as: str) -> datasets.Dataset:
    """Return records with a class each under the names a configuration gives their columns, scalars beside them.

    Args:
        records: Columns `content` and `category`, that of the label, and scalar ones.
        content: Which column holds the images or texts.
        content_as: What it is to be called.
        label_as: What the column of the classes' names is to be called.
    """
    scalars = [name for name in records.column_names if name not in (content, "category", content_as, label_as)]
    chosen = records.select_columns([content, *scalars])
    named = chosen if content == content_as else chosen.rename_column(content, content_as)
    with quietly():
        return named.add_column(label_as, list(records["category"]))


def _texts(instruction: str, context: str | None, response: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def write(record: Mapping[str, Any]) -> dict[str, Any]:
        beside = {} if context is None else {context: record["context"]}
        return {instruction: record["instruction"], **beside, response: record["response"]}

    return write


def _sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in _conversation(record)]}


def _messages(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": _conversation(record)}


def _prompt_and_completion_in_turns(record: Mapping[str, Any]) -> dict[str, Any]:
    *prompt, answer = _conversation(record)
    return {"prompt": prompt, "completion": [answer]}


def _conversation(record: Mapping[str, Any]) -> list[dict[str, str]]:
    question = {"role": "user", "content": record["instruction"]}
    return [*record["history"], question, {"role": "assistant", "content": record["response"]}]


_WRITERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "dolly": _texts("instruction", "context", "response"),
    "alpaca": _texts("instruction", "input", "output"),
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_completion": _texts("prompt", None, "completion"),
    "question_answer": _texts("question", "context", "answer"),
}
