"""Addressed randomness: every draw comes from a generator named by (seed, round, client, purpose).

No generator is shared, so the order in which clients run, the engine, or a resume cannot change a draw.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import final

import numpy as np
import torch


@final
@dataclass(frozen=True, slots=True)
class Seeds:
    """A place in the tree of random streams.

    `Seeds(7).at(round=2, client="c03").torch("order")` always gives the same stream.
    """

    seed: int
    address: tuple[tuple[str, int | str], ...] = ()

    def at(self, **address: int | str) -> Seeds:
        """Return the place reached by adding named coordinates (their order does not matter)."""
        return Seeds(self.seed, tuple(sorted({**dict(self.address), **address}.items())))

    def integer(self, purpose: str) -> int:
        """Return a 63-bit integer for `purpose` at this address, for libraries that take a seed."""
        text = json.dumps([self.seed, self.address, purpose], separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def torch(self, purpose: str) -> torch.Generator:
        """Return a fresh CPU `torch.Generator` for `purpose`."""
        return torch.Generator().manual_seed(self.integer(purpose))

    def numpy(self, purpose: str) -> np.random.Generator:
        """Return a fresh NumPy generator for `purpose`."""
        return np.random.default_rng(self.integer(purpose))
