"""Memory that is free, but that the C library keeps for later."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def return_freed_memory() -> None:
    """Give the system back what was freed; elsewhere than with glibc it goes back by itself, or not at all.

    Large tensors that come and go leave holes between small ones that stay, and glibc keeps the holes: after loading
    half as much again as a model needs, and while loading up to all that went through.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)
