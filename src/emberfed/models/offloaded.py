"""Frozen expert weights in files: a client holds of its experts only the one it is computing with.

Each stacked weight is one file of raw numbers, in the folder for temporary files (`TMPDIR` says which; it must be on a
disk, not in memory). The file has no name: it is gone when the weight is, or the process, however that ends. An
expert's numbers are read into fresh memory of their own each time they are needed, and never mapped: memory that a
mapping shows is the system's to count, and would hide what a client really needs. A client with room for some experts
can hold those (`OffloadedWeight.holding`), which are then read once.

The bits are those of the weight in memory, so everything computed is the same. Backward passes read again what forward
has read.

Shapes: E experts, each (rows, columns) as transformers stores them.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from typing import Any, final

import torch
from torch import nn

from emberfed.errors import ModelError, StorageError
from emberfed.models.stacked import StackedWeight, check_finite, replace, stacked_weights


@final
class OffloadedWeight(StackedWeight):
    """A stack of expert matrices in a file. Threads may read it at the same time.

    Attributes:
        name: What errors call it.
    """

    _held_NRC: torch.Tensor
    """Experts in memory. It moves with the model, which tells where experts are wanted."""

    def __init__(
        self, file: FileIO, shape: torch.Size, dtype: torch.dtype, device: torch.device, name: str = "an expert weight"
    ) -> None:
        """Take over a file that holds the numbers of all experts, one expert after the other."""
        super().__init__()
        self.name = name
        self._file = file
        self._shape = shape
        self._dtype = dtype
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._held: tuple[int, ...] = ()
        self.register_buffer("_held_NRC", torch.empty(0, *shape[1:], dtype=dtype, device=device), persistent=False)
        weakref.finalize(self, file.close)

    @staticmethod
    def write(tensor: torch.Tensor, name: str = "an expert weight") -> OffloadedWeight:
        """Write a stack to a new file, expert by expert.

        Args:
            tensor: (E, rows, columns), of any floating-point type; not changed.
            name: What errors call it.

        Raises: StorageError if the file cannot be written; ModelError if a value is not finite.
        """
        try:
            with ExitStack() as undo:
                # Closing the file deletes it, also when this process is killed.
                file = undo.enter_context(tempfile.TemporaryFile(prefix="emberfed-", buffering=0))
                for matrix in tensor.detach():
                    check_finite(name, matrix)
                    rest = _bytes_of(matrix.cpu().contiguous())
                    while rest:
                        rest = rest[file.write(rest) :]
                undo.pop_all()
        except OSError as error:
            raise StorageError(
                f"{name} of {tensor.nbytes} bytes cannot be written to a file in {tempfile.gettempdir()}: "
                f"{error.strerror or error}; make room there, or set TMPDIR to a folder on a larger disk"
            ) from error
        return OffloadedWeight(file, tensor.shape, tensor.dtype, tensor.device, name)

    @property
    def shape(self) -> torch.Size:
        """(E, rows, columns), as of the parameter it stands for."""
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers in the file."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where experts are handed out."""
        return self._held_NRC.device

    @property
    def nbytes(self) -> int:
        """Bytes it takes of the device's memory: those of experts that are held, otherwise none."""
        return self._held_NRC.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the file."""
        return self.numel() * self._dtype.itemsize

    @property
    def kept_as(self) -> str:
        """Its type, and that it is on disk."""
        return f"{str(self._dtype).removeprefix('torch.')} on disk"

    @property
    def bytes_read(self) -> int:
        """Bytes read so far; the system may have had them in its cache of files."""
        with self._lock:
            return self._bytes_read

    def expert(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Read one expert's matrix, (rows, columns): a fresh tensor. Raises: StorageError if that fails."""
        index = range(self._shape[0])[index]  # as a tensor: from the end if negative, or an IndexError
        if index in self._held:
            return self._held_NRC[self._held.index(index)].to(dtype, copy=True)
        matrix = torch.empty(self._shape[1:], dtype=self._dtype)
        offset = index * matrix.nbytes
        room = _bytes_of(matrix)
        try:
            while room:
                got = os.preadv(self._file.fileno(), [room], offset)
                if not got:
                    raise OSError("the file is shorter than it was written")
                room, offset = room[got:], offset + got
        except OSError as error:
            raise StorageError(
                f"expert {index} of {self.name} cannot be read back from its file: {error.strerror or error}; check "
                f"the disk, and load the model again"
            ) from error
        with self._lock:
            self._bytes_read += matrix.nbytes
        return matrix.to(self.device, dtype)

    @contextmanager
    def holding(self, experts: Sequence[int]) -> Iterator[None]:
        """Hold these experts in memory inside the context, and no others; each is read once, at its beginning.

        No other thread may read the weight while the context begins or ends.

        Raises: StorageError if that fails; IndexError if there is no such expert.
        """
        before = (self._held, self._held_NRC)
        held_NRC = torch.empty(len(experts), *self._shape[1:], dtype=self._dtype, device=self.device)
        for place, expert in enumerate(experts):
            held_NRC[place] = self.expert(expert, self._dtype)
        self._held, self._held_NRC = tuple(experts), held_NRC
        try:
            yield
        finally:
            self._held, self._held_NRC = before

    def extra_repr(self) -> str:
        """Say what is on disk, for `print(model)`."""
        return f"{tuple(self._shape)}, {self.kept_as}"


def offload_experts(lm: nn.Module) -> None:
    """Replace a loaded model's expert weights by files, in place, each old one freed before the next is written.

    Biases stay. `loading.load` with `expert_storage: disk` does the same while it reads, and never holds all of them.

    Raises: StorageError if a file cannot be written; ModelError naming a weight that is replaced already, or holds
        values that are not finite. Weights before it are in files by then.
    """
    for name, module, attribute in stacked_weights(lm):
        weight = getattr(module, attribute)
        if isinstance(weight, StackedWeight):
            raise ModelError(f"weight {name!r} is kept as {weight.kept_as} already; load the model again")
        replace(module, attribute, OffloadedWeight.write(weight, f"weight {name!r}"))


def is_offloaded(lm: nn.Module) -> bool:
    """Return whether a model's experts are on disk."""
    return any(isinstance(module, OffloadedWeight) for module in lm.modules())


def disk_bytes_read(lm: nn.Module) -> int:
    """Return the bytes of experts that a model has read from disk since it was loaded."""
    return sum(module.bytes_read for module in lm.modules() if isinstance(module, OffloadedWeight))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous CPU tensor's own bytes."""
    numbers: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)
