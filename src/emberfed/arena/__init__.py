"""The arena: a grid of runs that differ in named ways, run, resumed, and compared as the papers do."""

from emberfed.arena.running import compare

__all__ = ["compare"]
