"""What crosses the wire: questions and replies as Flower's records, and back.

A message's content has one `ConfigRecord`, whose values are scalars, and one array, which holds a payload's bytes as
they are: safetensors, so that every dtype survives, in the 5 MB pieces that Flower cuts arrays into.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from emberfed.errors import RunFolderError
from emberfed.records import Assessment, ClientFailed, Job, Json, Question, Reply, Survey

_RECORD = "emberfed"
_PAYLOAD = "payload"
_STORED_AS = "emberfed.safetensors"
_LONGEST_LINE = 1000
_LARGEST_MEASUREMENT = 1e30  # sums of them are written down, and must be finite
_QUESTIONS: Mapping[str, type[Job | Assessment | Survey]] = {"job": Job, "assessment": Assessment, "survey": Survey}


@final
@dataclass(frozen=True, slots=True)
class Hello:
    """What a server says of itself: alone, a request that the client describes itself; and with every question.

    Attributes:
        run: The run's identity; a client's memory belongs to one run.
        expected: What the server has (versions, model, settings), for the client to compare with and to work with.
    """

    run: str
    expected: Mapping[str, Json]


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """A question on its way to a client.

    Attributes:
        hello: Who asks; a client that was started anew needs it as much as one that is asked for the first time.
        tier: The name of the tier that the client is on.
        question: The question.
    """

    hello: Hello
    tier: str
    question: Question


@final
@dataclass(frozen=True, slots=True)
class Description:
    """A client's answer to `Hello`: what it has, for the server to compare and to count with."""

    told: Mapping[str, Json]


def asked(message: Hello | Asked) -> RecordDict:
    """Return what is sent to a client."""
    if isinstance(message, Hello):
        return _content({"kind": "hello", **_introduction(message)})
    question = message.question
    kind = next(name for name, of in _QUESTIONS.items() if isinstance(question, of))
    head = {"tier": message.tier, "round": question.round, "client": question.client}
    return _content({"kind": kind, **_introduction(message.hello), **head}, question.download)


def read_asked(content: RecordDict) -> Hello | Asked:
    """Inverse of `asked`. Raises: RunFolderError if the content is nothing that a server sends."""
    head = _head(content)
    kind = head.get("kind")
    hello = Hello(_text(head, "run"), _object(head))
    if kind == "hello":
        return hello
    if not isinstance(kind, str) or kind not in _QUESTIONS:
        raise RunFolderError(f"a server asked for {kind!r}, which this version of emberfed does not know")
    question = _QUESTIONS[kind](_number(head, "round"), _text(head, "client"), _payload(content))
    return Asked(hello, _text(head, "tier"), question)


def answered(message: Description | Reply | ClientFailed) -> RecordDict:
    """Return what is sent to the server."""
    if isinstance(message, Description):
        return _content({"kind": "description", "body": json.dumps(dict(message.told))})
    head = {"round": message.round, "client": message.client}
    if isinstance(message, ClientFailed):
        return _content({"kind": "failed", **head, "reason": message.reason})
    return _content({"kind": "reply", **head, "body": json.dumps(dict(message.measured))}, message.upload)


def read_answered(content: RecordDict) -> Description | Reply | ClientFailed:
    """Inverse of `answered`. Raises: RunFolderError if the content is nothing that a client sends."""
    head = _head(content)
    kind = head.get("kind")
    if kind == "description":
        return Description(_object(head))
    if kind == "failed":
        return ClientFailed(_number(head, "round"), _text(head, "client"), as_line(_text(head, "reason")))
    if kind != "reply":
        raise RunFolderError(f"a client answered with {kind!r}, which this version of emberfed does not know")
    measured = _object(head)
    if not all(type(value) in (int, float) and 0 <= value < _LARGEST_MEASUREMENT for value in measured.values()):
        raise RunFolderError(f"a client's measurements are not numbers from 0 below {_LARGEST_MEASUREMENT:g}")
    return Reply(_number(head, "round"), _text(head, "client"), _payload(content), measured)


def as_line(told: str) -> str:
    """Return what another machine said as one line that can be printed, and not pages of it."""
    shown = "".join(letter if letter.isprintable() else " " for letter in told[: 2 * _LONGEST_LINE])
    line = " ".join(shown.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."


def _introduction(hello: Hello) -> dict[str, str]:
    return {"run": hello.run, "body": json.dumps(dict(hello.expected))}


def _content(head: Mapping[str, Any], payload: bytes | None = None) -> RecordDict:
    content = RecordDict({_RECORD: ConfigRecord(dict(head))})
    if payload is not None:
        array = Array(dtype="uint8", shape=(len(payload),), stype=_STORED_AS, data=payload)
        content[_PAYLOAD] = ArrayRecord({_PAYLOAD: array})
    return content


def _head(content: RecordDict) -> Mapping[str, Any]:
    head = content.config_records.get(_RECORD)
    if head is None:
        raise RunFolderError("a message without emberfed's record: whoever sent it does not run emberfed")
    return head


def _payload(content: RecordDict) -> bytes:
    arrays = content.array_records.get(_PAYLOAD)
    array = None if arrays is None else arrays.get(_PAYLOAD)
    if array is None or array.stype != _STORED_AS:
        raise RunFolderError("a message without a payload")
    return array.data


def _text(head: Mapping[str, Any], key: str) -> str:
    value = head.get(key)
    if not isinstance(value, str):
        raise RunFolderError(f"a message whose {key!r} is not text")
    return value


def _number(head: Mapping[str, Any], key: str) -> int:
    value = head.get(key)
    if type(value) is not int:
        raise RunFolderError(f"a message whose {key!r} is not a whole number")
    return value


def _object(head: Mapping[str, Any]) -> dict[str, Json]:
    try:
        value = json.loads(_text(head, "body"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RunFolderError("a message whose 'body' is not a JSON object")
    return value
