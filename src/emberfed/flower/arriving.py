"""A reply on its way: Flower's objects become a message, the payload's pieces in a file until all of them are here."""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from flwr.app import Array, Message, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from emberfed import storage
from emberfed.errors import StorageError

LARGEST_BYTES = 4 * 2**30
# What is no piece of an array stays in memory: a message of ours has five such objects, of kilobytes.
_MOST_OBJECTS = 16
_MOST_OBJECTS_BYTES = 16 * 2**20


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
    once: a payload of n bytes takes n bytes. What objects a message has is its sender's word, and objects may name the
    same ones over and over; so their number and bytes are bounded as they come.

    Attributes:
        message: The object id of the message.
    """

    def __init__(
        self,
        message: str,
        fetch: Callable[[str], bytes | None],
        folder: Path,
        largest_bytes: int = LARGEST_BYTES,
    ) -> None:
        """Begin with nothing.

        Args:
            message: The object id of the message.
            fetch: Returns an object's content, or None if it is not uploaded yet.
            folder: Where the file is.
            largest_bytes: What its arrays may come to.
        """
        self.message = message
        self._fetch = fetch
        self._folder = folder
        self._wanted = deque([_Wanted(message)])
        self._contents: dict[str, bytes] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._largest_bytes = largest_bytes
        self._objects = 1
        self._objects_bytes = 0
        self._pieces = 0
        self._pieces_bytes = 0

    def content(self) -> RecordDict | None:
        """Fetch what is there; return the message's content once all of it is.

        Raises:
            ValueError: if it is not the message that Flower says it is, or too large.
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
        self._pieces_bytes += len(body)
        if self._pieces_bytes > self._largest_bytes:
            raise TooLarge(f"more than {self._largest_bytes} bytes")
        with storage.explained(self._folder):
            while body:  # a disk that is nearly full takes a part, and refuses the next
                body = body[wanted.pieces.write(body) :]

    def _take(self, object_id: str, content: bytes) -> None:
        """Keep an object, and want its children next."""
        if object_id in self._contents:
            raise ValueError(f"object {object_id} is in it twice")
        self._objects_bytes += len(content)
        if self._objects_bytes > _MOST_OBJECTS_BYTES:
            raise TooLarge(f"more than {_MOST_OBJECTS_BYTES} bytes beside its arrays")
        kind, children, _ = get_object_head_values_from_object_content(content)
        self._contents[object_id] = content
        if kind != Array.__qualname__:
            self._objects += len(children)
            if self._objects > _MOST_OBJECTS:
                raise TooLarge(f"more than {_MOST_OBJECTS} objects beside the pieces of its arrays")
            self._wanted.extendleft(_Wanted(child) for child in reversed(children))
            return
        order = self._order(content)
        with storage.explained(self._folder):
            pieces = self._files[object_id] = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        self._wanted.extendleft(_Wanted(children[index], pieces) for index in reversed(order))

    def _order(self, content: bytes) -> Sequence[int]:
        """Return which of its children an array's pieces are, one after the other."""
        order: Sequence[int] = json.loads(get_object_body(content, Array))["arraychunk_ids"]
        self._pieces += len(order)
        # Pieces without bytes would cost a call each, and count for nothing in bytes.
        most = _MOST_OBJECTS + self._largest_bytes // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
        if self._pieces > most:
            raise TooLarge(f"arrays of more than {most} pieces")
        return order

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


@final
class TooLarge(ValueError):
    """A message has more of something than it may; says what."""


@contextmanager
def _understood() -> Iterator[None]:
    """Make one error of what Flower and protobuf raise of bytes that are none of theirs. Raises: ValueError."""
    try:
        yield
    except (StorageError, TooLarge):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _head_bytes(content: bytes) -> int:
    """Return where an object's body begins."""
    _, _, body_bytes = get_object_head_values_from_object_content(content)
    return len(content) - body_bytes
