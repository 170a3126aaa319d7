"""One copy of a model's frozen weights for all processes of a machine.

The first process writes its weights to a file, every process maps that file, and its own copies are freed. A mapping is
private: the system keeps one copy of each page for everybody, until a process writes to it (FLoRA merges into the
base), which gives that process a copy of that page alone.

The file is of one machine and one run: a length of 8 bytes, JSON that says where each weight is, the weights. Each
begins at a multiple of 64 bytes, as torch's own memory does, since libraries may add numbers in another order where it
does not, and results are to keep their bits. safetensors promises no such thing, and keeps no strides.

Weights of experts that are in files already (`offloaded`) are not memory, and stay each process's own.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from torch import nn

from emberfed.errors import ModelError, StorageError
from emberfed.models.freed_memory import return_freed_memory

_ALIGNMENT = 64
_LENGTH_BYTES = 8


@final
class _Place(NamedTuple):
    """Where a weight is, counted from the end of the header, and how it lies there."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def share_weights(lm: nn.Module, file: int) -> None:
    """Let a model's parameters and saved buffers lie in a file that other processes map, too.

    Their bits stay, and so do the parameters' objects. Weights that are not in main memory are left where they are: a
    process that computes on an accelerator needs its own.

    Args:
        lm: The model; in the second process and later the same one as in the first.
        file: Descriptor of a file open for reading and writing. If it is empty, this model's weights are written. It
            may be closed afterwards, and need have no name.

    Raises: StorageError if the file cannot be written or mapped; ModelError if it holds another model's weights.
    """
    own = _weights(lm)
    try:
        if os.fstat(file).st_size == 0:
            _write(own, file)
        begin, places = _read_header(file)
        if not own or not places:
            return
        _check_same(own, places)
        mapped = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise StorageError(
            f"the base model's weights of {sum(weight.nbytes for weight in own.values())} bytes cannot be shared by a "
            f"file ({error.strerror or error}); make room there, or set TMPDIR to a folder on a larger disk"
        ) from error
    for name, weight in own.items():
        place = places[name]
        # A storage for each, not views on one: whoever counts memory goes by storages.
        flat = torch.frombuffer(mapped, dtype=weight.dtype, count=weight.numel(), offset=begin + place.offset)
        weight.data = flat.as_strided(place.shape, place.stride)
    return_freed_memory()


def _weights(lm: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's parameters and saved buffers in main memory, tied ones once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, weight in sorted(lm.state_dict(keep_vars=True).items()):
        if weight.device.type == "cpu" and weight.numel():
            found.setdefault(id(weight), (name, weight))
    return dict(found.values())


def _write(weights: Mapping[str, torch.Tensor], file: int) -> None:
    places, end = {}, 0
    for name, weight in weights.items():
        stride = torch.empty_like(weight, device="meta").stride()  # that of a clone, whatever the weight is a view of
        places[name] = _Place(str(weight.dtype), tuple(weight.shape), stride, end)
        end = _aligned(end + weight.nbytes)
    header = json.dumps(places).encode()
    begin = _aligned(_LENGTH_BYTES + len(header))
    os.truncate(file, begin + end)
    _put(file, len(header).to_bytes(_LENGTH_BYTES, "little") + header, 0)
    for name, weight in weights.items():
        copy = weight.detach().clone()
        numbers: Any = torch.empty(0, dtype=torch.uint8).set_(copy.untyped_storage()).numpy()
        _put(file, memoryview(numbers), begin + places[name].offset)


def _put(file: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _read_header(file: int) -> tuple[int, dict[str, _Place]]:
    """Return where weights begin, and their places."""
    length = int.from_bytes(os.pread(file, _LENGTH_BYTES, 0), "little")
    given = json.loads(os.pread(file, length, _LENGTH_BYTES))
    places = {
        name: _Place(dtype, tuple(shape), tuple(stride), offset)
        for name, (dtype, shape, stride, offset) in given.items()
    }
    return _aligned(_LENGTH_BYTES + length), places


def _check_same(own: Mapping[str, torch.Tensor], places: Mapping[str, _Place]) -> None:
    """Check that weights are the file's by name, type and shape. Raises: ModelError naming one that is not."""
    here = {name: f"{weight.dtype} {tuple(weight.shape)}" for name, weight in own.items()}
    there = {name: f"{place.dtype} {place.shape}" for name, place in places.items()}
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise ModelError(
                f"weight {name!r} is {here.get(name, 'missing')} in this process, but {there.get(name, 'missing')} in "
                f"the one whose weights it is to share: the checkpoint was changed meanwhile; put it back, and resume"
            )


def _aligned(offset: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
