"""The shapes instruction data comes in, recognised by their columns and mapped to one schema.

The schema: `instruction`, `context`, `response`, `category` (strings, empty where there is none) and `history`, the
earlier turns of a conversation as a list of {role, content}. The last assistant turn is the response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emberfed.data.config import Format
from emberfed.errors import DataError

Record = Mapping[str, Any]
SCHEMA = ("instruction", "context", "response", "category", "history")

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}

_COLUMNS: dict[str, tuple[str, ...]] = {
    "dolly": ("instruction", "context", "response"),
    "alpaca": ("instruction", "input", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "context", "answer"),
}
"""Columns a record of each format has; the first format that fits is the one."""

_OPTIONAL = {"dolly": "context", "alpaca": "input", "question_answer": "context"}


def recognise(columns: Sequence[str], where: str) -> str:
    """Return the format of records with these columns. Raises: DataError listing what was found and what is known."""
    for name in _COLUMNS:
        if not _missing(name, columns) and not _stray(name, columns):
            return name
    known = "; ".join(f"{name}: {', '.join(wanted)}" for name, wanted in _COLUMNS.items())
    raise DataError(
        f"{where}: the columns {sorted(columns)} are of no known format ({known}); rename them or convert the file"
    )


def _missing(format: str, columns: Sequence[str]) -> list[str]:
    return sorted(set(_COLUMNS[format]) - {_OPTIONAL.get(format)} - set(columns))


def _stray(format: str, columns: Sequence[str]) -> bool:
    """Whether the context is under another format's name: read as this format it would be lost without a word."""
    own = _OPTIONAL.get(format)
    return own is not None and own not in columns and bool(set(_OPTIONAL.values()) & set(columns))


def check_columns(format: Format, columns: Sequence[str], where: str) -> str:
    """Return the format to use. Raises: DataError if the records lack a column of the format asked for."""
    if format == "auto":
        return recognise(columns, where)
    missing = _missing(format, columns)
    if missing:
        raise DataError(
            f"{where}: data.format {format!r} needs the column {missing[0]!r}; the data has {sorted(columns)}"
        )
    return format


def normalise(format: str, record: Record, where: str) -> dict[str, Any]:
    """Map one record to the schema. Raises: DataError naming `where` if it is malformed."""
    mapped = _READERS[format](record, where)
    category = record.get("category")
    return {**mapped, "category": "" if category is None else str(category)}


def _text(record: Record, key: str, where: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise DataError(f"{where}: {key!r} must be text, found {type(value).__name__}")
    return str(value).strip()


def _instruction(instruction: str, context: str | None, response: str) -> Callable[[Record, str], dict[str, Any]]:
    def read(record: Record, where: str) -> dict[str, Any]:
        return {
            "instruction": _text(record, instruction, where),
            "context": "" if context is None else _text(record, context, where),
            "response": _text(record, response, where),
            "history": [],
        }

    return read


def _conversation(column: str, role: str, content: str) -> Callable[[Record, str], dict[str, Any]]:
    def read(record: Record, where: str) -> dict[str, Any]:
        value = record.get(column)
        openai = isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]
        names = ("role", "content") if openai else (role, content)
        return conversation(_turns(value, *names, f"{where}, {column!r}"))

    return read


def _prompt_completion(record: Record, where: str) -> dict[str, Any]:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list):
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        turns = [_turns(value, "role", "content", where) for value in (prompt, answer)]
        return conversation([*turns[0], *turns[1]])
    return _instruction("prompt", None, "completion")(record, where)


def conversation(turns: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Map a conversation: its last assistant turn is the response, the user turn before it the instruction.

    What comes before is history. A conversation without such a pair has an empty response (it is dropped and counted).
    """
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0 or turns[last - 1]["role"] != "user":
        return {"instruction": "", "context": "", "response": "", "history": []}
    return {
        "instruction": turns[last - 1]["content"],
        "context": "",
        "response": turns[last]["content"],
        "history": [dict(turn) for turn in turns[: last - 1]],
    }


def _turns(value: Any, role: str, content: str, where: str) -> list[dict[str, str]]:
    if value is None:  # as any other record without a response: dropped and counted
        return []
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list of turns, found {type(value).__name__}")
    turns = []
    for number, turn in enumerate(value):
        # A turn that only calls a tool has null content.
        if not isinstance(turn, Mapping) or content not in turn or not isinstance(turn[content], str | None):
            raise DataError(f"{where}: turn {number} must have {role!r} and {content!r}, found {turn!r:.80}")
        name = _ROLES.get(str(turn.get(role)))
        if name is None:
            raise DataError(f"{where}: turn {number} has the unknown role {turn.get(role)!r}; known: {sorted(_ROLES)}")
        turns.append({"role": name, "content": (turn[content] or "").strip()})
    return turns


_READERS: dict[str, Callable[[Record, str], dict[str, Any]]] = {
    "dolly": _instruction("instruction", "context", "response"),
    "alpaca": _instruction("instruction", "input", "output"),
    "sharegpt": _conversation("conversations", "from", "value"),
    "messages": _conversation("messages", "role", "content"),
    "prompt_completion": _prompt_completion,
    "question_answer": _instruction("question", "context", "answer"),
}
