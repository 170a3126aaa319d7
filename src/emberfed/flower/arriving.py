"""A reply on its way: Flower's objects become a message, the payload's pieces in a file until all of them are here."""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from flwr.app import Array, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from emberfed import storage
from emberfed.errors import StorageError


@final
@dataclass(frozen=True, slots=True)
class _Wanted:
    """An object to fetch.

    Attributes:
        object: Its id.
        pieces: The file that its body goes to, if it is a piece of an array.
    """

    object: str
    pieces: IO[bytes] | None = None


@final
class Arriving:
    """A reply whose message is known and whose objects may still be uploaded by its node.

    Its array is collected in a file without a name, so that of all replies on their way none is in memory, and read
    once: a payload of n bytes takes n bytes.

    Attributes:
        message: The object id of the message.
    """

    def __init__(self, message: str, fetch: Callable[[str], bytes | None], folder: Path) -> None:
        """Begin with nothing.

        Args:
            message: The object id of the message.
            fetch: Returns an object's content, or None if it is not uploaded yet.
            folder: Where the file is.
        """
        self.message = message
        self._fetch = fetch
        self._folder = folder
        self._wanted = deque([_Wanted(message)])
        self._contents: dict[str, bytes] = {}
        self._files: dict[str, IO[bytes]] = {}

    def content(self) -> RecordDict | None:
        """Fetch what is there; return the message's content once all of it is.

        Raises:
            ValueError: if it is not the message that Flower says it is.
            StorageError: if it cannot be kept.
        """
        while self._wanted:
            wanted = self._wanted[0]
            content = self._fetch(wanted.object)
            if content is None:
                return None
            self._wanted.popleft()
            with _understood():
                self._keep(wanted, content)
        with _understood():
            message = self._made(self.message)
            if not isinstance(message, Message):
                raise TypeError("not a message")
            return message.content

    def drop(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    def _keep(self, wanted: _Wanted, content: bytes) -> None:
        if wanted.pieces is None:
            self._take(wanted.object, content)
            return
        body = memoryview(content)[_head_bytes(content) :]
        with storage.explained(self._folder):
            while body:  # a disk that is nearly full takes a part, and refuses the next
                body = body[wanted.pieces.write(body) :]

    def _take(self, object_id: str, content: bytes) -> None:
        """Keep an object, and want its children next."""
        kind, children, _ = get_object_head_values_from_object_content(content)
        self._contents[object_id] = content
        if kind != Array.__qualname__:
            self._wanted.extendleft(_Wanted(child) for child in reversed(children))
            return
        with storage.explained(self._folder):
            pieces = self._files[object_id] = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        order = json.loads(get_object_body(content, Array))["arraychunk_ids"]
        self._wanted.extendleft(_Wanted(children[index], pieces) for index in reversed(order))

    def _made(self, object_id: str) -> InflatableObject:
        content = self._contents[object_id]
        if object_id in self._files:
            return self._array(content, self._files[object_id])
        kind, children, _ = get_object_head_values_from_object_content(content)
        return inflatable_class_registry[kind].inflate(content, {child: self._made(child) for child in children})

    def _array(self, content: bytes, pieces: IO[bytes]) -> Array:
        told = json.loads(get_object_body(content, Array))
        pieces.seek(0, os.SEEK_SET)
        data = pieces.read()
        pieces.close()
        return Array(dtype=told["dtype"], shape=tuple(told["shape"]), stype=told["stype"], data=data)


@contextmanager
def _understood() -> Iterator[None]:
    """Make one error of what Flower and protobuf raise of bytes that are none of theirs. Raises: ValueError."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _head_bytes(content: bytes) -> int:
    """Return where an object's body begins."""
    _, _, body_bytes = get_object_head_values_from_object_content(content)
    return len(content) - body_bytes
