"""What benchmarks measure of a call: CPU seconds, and by how much memory rose."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[], None]


def cpu_seconds(run: Run) -> float:
    """Return the processor's seconds of all threads."""
    started = time.process_time()
    run()
    return time.process_time() - started


def extra_peak_bytes(run: Run) -> float:
    """Return by how much resident memory rose at most; in a process whose allocator returns what is freed."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
