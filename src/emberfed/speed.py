"""How fast this machine is, as a `Device`: measured as training uses it. Takes some seconds.

The fastest of several repeats counts: whatever else a machine does can only slow it down.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
import torch
from torch import Tensor

from emberfed import storage
from emberfed.devices import Device
from emberfed.models.matmul import times

_REPEATS: Final = 30
_SIZE: Final = 1024
"""Rows and columns of the products: large enough to be limited by arithmetic."""
_COPIED_BYTES: Final = 2**27
"""More than caches hold."""
_FILE_BYTES: Final = 2**28
_READ_BYTES: Final = 2**22
_ASSUMED_DOWN: Final = 25e6
_ASSUMED_UP: Final = 6.25e6


def measured(name: str, folder: Path) -> Device:
    """Measure this machine: products in float32 (bfloat16 on CUDA), copies in memory, reads of a file in `folder`.

    Rates of the network cannot be measured without a server, and are assumed as for a connection at home.

    Raises: StorageError if the file cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Device(
        name=name,
        flops_per_second=_rounded(flops_per_second(device)),
        memory_bytes_per_second=_rounded(memory_bytes_per_second(device)),
        memory_bytes=_memory_bytes(device),
        disk_bytes_per_second=_rounded(disk_bytes_per_second(folder)),
        download_bytes_per_second=_ASSUMED_DOWN,
        upload_bytes_per_second=_ASSUMED_UP,
        source=f"measured with {threads}; network assumed",
    )


def flops_per_second(device: torch.device) -> float:
    """Return the rate of large matrix products, computed as experts are."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, weight = (torch.ones(_SIZE, _SIZE, dtype=dtype, device=device) for _ in range(2))
    return 2 * _SIZE**3 / _seconds(lambda: times(x, weight), device)


def memory_bytes_per_second(device: torch.device) -> float:
    """Return the rate of a copy; what is read and what is written both count."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _seconds(lambda: target.copy_(source), device)


def disk_bytes_per_second(folder: Path) -> float:
    """Return the rate at which a new file is read from its beginning to its end, past the system's cache if it can be.

    Raises: StorageError if it cannot be written.
    """
    with _file(folder) as path, path.open("rb", buffering=0) as file:
        seconds = []
        for _ in range(3):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            for start in range(0, _FILE_BYTES, _READ_BYTES):
                os.pread(file.fileno(), _READ_BYTES, start)
            seconds.append(time.perf_counter() - started)
    return _FILE_BYTES / min(seconds)


@contextmanager
def _file(folder: Path) -> Iterator[Path]:
    """Write a file of noise, which no file system makes smaller, and remove it."""
    with storage.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".speed-") as file:
            for _ in range(_FILE_BYTES // _READ_BYTES):
                file.write(os.urandom(_READ_BYTES))
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Return the least time of a call."""
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _rounded(rate: float) -> float:
    """Return three digits: more would say what a measurement does not know."""
    return float(f"{rate:.3g}")
