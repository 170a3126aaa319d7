"""The values that travel between hops, all frozen: bundles of named tensors, payloads, jobs and replies.

Only `Payload` bytes cross between server and client. They are safetensors with JSON in the header; never pickle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from emberfed.errors import RunFolderError

Json = Any
"""A value JSON can hold: None, bool, int, float, str, list, dict with str keys."""

ACTIVATION_COUNTS = "activation_counts"
"""Key of an upload's counts: int64 (layers, experts), (token, slot) assignments without padding."""

SCORES = "scores"
"""Key, in the meta of the answer to an `Assessment`, of the scores."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """Named tensors with JSON beside them: the server's state, a client's memory, the content of a payload.

    `tensors` may be lazy (`Bundle.open`): a tensor is then read from disk each time it is asked for.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))
    meta: Mapping[str, Json] = field(default_factory=lambda: MappingProxyType({}))

    def to_bytes(self) -> bytes:
        """Serialise to safetensors; the same content always gives the same bytes."""
        tensors = {name: self.tensors[name].detach().cpu().contiguous() for name in sorted(self.tensors)}
        meta = json.dumps(dict(self.meta), sort_keys=True, allow_nan=False)
        data: bytes = safetensors.torch.save(tensors, {"meta": meta})
        return data

    @staticmethod
    def from_bytes(data: bytes) -> Bundle:
        """Inverse of `to_bytes`. Raises: RunFolderError if the bytes are not a bundle."""
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            return Bundle(safetensors.torch.load(data), _strict(header["__metadata__"]["meta"]))
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunFolderError(f"these {len(data)} bytes are not a bundle of tensors ({error})") from None

    @staticmethod
    def open(path: Path) -> Bundle:
        """Open a file written from `to_bytes`; tensors are read when asked for. Raises: RunFolderError."""
        try:
            with safe_open(path, framework="pt") as file:
                return Bundle(_LazyTensors(path, tuple(file.keys())), _strict(file.metadata()["meta"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunFolderError(f"{path} is not a readable bundle of tensors ({error})") from None


def _strict(text: str) -> dict[str, Json]:
    """Parse a JSON object without NaN or infinity, which JSON does not have and our tables cannot hold."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        value = float(number)
        if math.isinf(value):
            raise ValueError(f"{number[:20]} is too large a number")
        return value

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


@final
class _LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors of one safetensors file, read one by one so that many clients' uploads never sit in memory together."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path = path
        self._names = frozenset(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            # A copy: the mapped file must not stay resident, nor be shared with whoever asked.
            tensor: torch.Tensor = file.get_tensor(name).clone()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """What crosses between server and client, in either direction.

    Attributes:
        round: The round it belongs to, from 1.
        client: Id of the client it goes to or comes from.
        content: Tensors, and meta such as `top_k` (download) or `examples`, `stats` (upload).
    """

    round: int
    client: str
    content: Bundle

    def to_bytes(self) -> bytes:
        """Serialise; the only bytes that cross between server and client."""
        header = {"round": self.round, "client": self.client, "meta": dict(self.content.meta)}
        return Bundle(self.content.tensors, header).to_bytes()

    @staticmethod
    def from_bytes(data: bytes) -> Payload:
        """Inverse of `to_bytes`. Raises: RunFolderError if the bytes are not a payload."""
        return Payload._unwrap(Bundle.from_bytes(data), f"these {len(data)} bytes are")

    @staticmethod
    def open(path: Path) -> Payload:
        """Open a payload's file lazily. Raises: RunFolderError."""
        return Payload._unwrap(Bundle.open(path), f"{path} is")

    @staticmethod
    def _unwrap(bundle: Bundle, what: str) -> Payload:
        round_, client, meta = (bundle.meta.get(key) for key in ("round", "client", "meta"))
        if not (type(round_) is int and isinstance(client, str) and isinstance(meta, dict)):
            raise RunFolderError(f"{what} not a payload: round, client or meta is missing")
        return Payload(round_, client, Bundle(bundle.tensors, meta))


@final
@dataclass(frozen=True, slots=True, eq=False)
class FitResult:
    """What local training gives: the upload's content, and the client's memory, which stays with the client."""

    upload: Bundle
    memory: Bundle


@final
@dataclass(frozen=True, slots=True)
class Job:
    """One client's training for one round, as handed to an engine."""

    round: int
    client: str
    download: bytes


@final
@dataclass(frozen=True, slots=True)
class Assessment:
    """The other thing a client can be asked: how good its own model is, on data of its own.

    `round` is the one in which it would be sent this download to train; its memory is that of earlier ones.
    """

    round: int
    client: str
    download: bytes


@final
@dataclass(frozen=True, slots=True)
class Survey:
    """The question before a client's first training, of methods that ask it: how does its data use the model's experts?

    `round` is the one in which it is to train for the first time.
    """

    round: int
    client: str
    download: bytes


Question = Job | Assessment | Survey
"""What a client can be asked."""


@final
@dataclass(frozen=True, slots=True)
class Reply:
    """What an engine brings back for a job that ended well.

    Attributes:
        upload: Bytes of the upload's `Payload`.
        measured: What the clock and the operating system said (`seconds`, `peak_memory_bytes`); kept apart from the
            payload so that payloads are the same bits on every run.
    """

    round: int
    client: str
    upload: bytes
    measured: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class ClientFailed:
    """What an engine brings back for a job that did not: the failure is a value, with one line that says why."""

    round: int
    client: str
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Rank:
    """A dimension that the sender chooses within bounds, both inclusive, and the same in all of an upload's tensors."""

    low: int
    high: int


@final
@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What an upload's tensor must look like."""

    shape: tuple[int | Rank, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        """Return the spec that only tensors of this shape and dtype meet."""
        return TensorSpec(tuple(tensor.shape), tensor.dtype)

    def problem(self, tensor: torch.Tensor) -> str | None:
        """Return what is wrong with `tensor`, or None."""
        if tensor.dtype != self.dtype:
            return f"dtype {tensor.dtype}, expected {self.dtype}"
        ranges = [size if isinstance(size, Rank) else Rank(size, size) for size in self.shape]
        if len(ranges) == tensor.dim() and all(
            allowed.low <= size <= allowed.high for size, allowed in zip(tensor.shape, ranges, strict=True)
        ):
            return None
        expected = ", ".join(
            str(rank.low) if rank.low == rank.high else f"{rank.low} to {rank.high}" for rank in ranges
        )
        return f"shape {tuple(tensor.shape)}, expected ({expected})"

    def ranks(self, tensor: torch.Tensor) -> set[int]:
        """Return the sizes of those of the tensor's dimensions that its sender chose."""
        return {size for size, wanted in zip(tensor.shape, self.shape, strict=True) if isinstance(wanted, Rank)}
