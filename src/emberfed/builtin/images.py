"""The built-in images: patterned figures of any place, size, turn and colours, in front of clutter.

A class is a figure with a pattern, so neither alone tells it. Ten classes are to be learnt by clients; others, of other
figures and other patterns, are what the built-in vision model saw before.

Shapes: N images, S pixels a side; G grids of points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from emberfed.seeds import Seeds

SIDE = 32
"""Pixels a side."""

_CHUNK = 500
"""Images drawn at once, which bounds memory."""

Grid = NDArray[np.floating[Any]]
"""(G, S, S), a number for each pixel of each image."""

Figure = Callable[[Grid, Grid], Grid]
"""From x and y to about the distance from a figure's edge, negative inside; figures reach about 1 from the middle."""

Pattern = Callable[[Grid, Grid, Grid], Grid]
"""From x, y and the distance from the edge to how much of the second colour a point has, 0 to 1."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Labelled images.

    Attributes:
        pixels: uint8 (N, S, S, 3), red, green and blue.
        labels: int64 (N,), index of the class.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def _bar(x: Grid, y: Grid, long: float, wide: float) -> Grid:
    distance: Grid = np.maximum(np.abs(x) - long, np.abs(y) - wide)
    return distance


def _polygon(x: Grid, y: Grid, corners: int, inner: float) -> Grid:
    """Return the distance from the straight sides of a regular polygon whose sides are `inner` from the middle."""
    sector = 2 * np.pi / corners
    angle = np.mod(np.arctan2(y, x) + sector / 2, sector) - sector / 2
    distance: Grid = np.hypot(x, y) * np.cos(angle) - np.float32(inner)
    return distance


def _lobes(x: Grid, y: Grid, number: int, depth: float) -> Grid:
    distance: Grid = np.hypot(x, y) - np.float32(1 - depth) - np.float32(depth) * np.cos(number * np.arctan2(y, x))
    return distance


_NEW_FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "arrow": lambda x, y: np.minimum(
            _bar(x + 0.4, y, 0.6, 0.22), np.maximum(np.abs(y) * 0.75 + x * 0.65 - 0.65, 0.05 - x)
        ),
        "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.5, y)),
        "cross": lambda x, y: np.minimum(_bar(x, y, 1, 0.32), _bar(y, x, 1, 0.32)),
        "star": lambda x, y: _lobes(x, y, 5, 0.32),
        "triangle": lambda x, y: _polygon(x, y, 3, 0.55),
    }
)
_NEW_PATTERNS: Mapping[str, Pattern] = MappingProxyType(
    {
        "dotted": lambda x, y, _: _soft(np.cos(9 * x) + np.cos(9 * y) - 0.6),
        "striped": lambda x, _y, _: _soft(2 * np.cos(9 * x)),
    }
)
_FORMER_FIGURES: Mapping[str, Figure] = MappingProxyType(
    {
        "bar": lambda x, y: _bar(x, y, 1, 0.4),
        "disc": lambda x, y: np.hypot(x, y) - 0.9,
        "ell": lambda x, y: np.minimum(_bar(x + 0.5, y, 0.32, 0.9), _bar(x, y - 0.6, 0.8, 0.32)),
        "frame": lambda x, y: np.abs(_bar(x, y, 0.65, 0.65)) - 0.22,
        "half disc": lambda x, y: np.maximum(np.hypot(x, y - 0.3) - 1, y - 0.3),
        "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.26,
        "square": lambda x, y: _bar(x, y, 0.78, 0.78),
        "trefoil": lambda x, y: _lobes(x, y, 3, 0.3),
    }
)
_FORMER_PATTERNS: Mapping[str, Pattern] = MappingProxyType(
    {
        "checked": lambda x, y, _: _soft(3 * np.cos(6 * x) * np.cos(6 * y)),
        "edged": lambda _x, _y, edge: _soft(8 * (edge + 0.2)),
        "plain": lambda x, _y, _: np.zeros_like(x),
    }
)


def _names(figures: Mapping[str, Figure], patterns: Mapping[str, Pattern]) -> tuple[str, ...]:
    return tuple(f"{pattern} {figure}" for pattern, figure in product(sorted(patterns), sorted(figures)))


CLASSES = _names(_NEW_FIGURES, _NEW_PATTERNS)
"""Names of the ten classes."""

FORMER_CLASSES = _names(_FORMER_FIGURES, _FORMER_PATTERNS)
"""Names of the classes of pretraining; no figure and no pattern of theirs is among those of `CLASSES`."""


def images(count: int, seeds: Seeds) -> Pictures:
    """Return images of `CLASSES`, as many of each as of any other (give or take one), shuffled."""
    return _pictures(count, _NEW_FIGURES, _NEW_PATTERNS, seeds.numpy("builtin images"))


def former_images(count: int, seeds: Seeds) -> Pictures:
    """Return images of `FORMER_CLASSES`, as many of each as of any other (give or take one), shuffled."""
    return _pictures(count, _FORMER_FIGURES, _FORMER_PATTERNS, seeds.numpy("builtin former images"))


def _pictures(
    count: int, figures: Mapping[str, Figure], patterns: Mapping[str, Pattern], rng: np.random.Generator
) -> Pictures:
    kinds = list(product(sorted(patterns), sorted(figures)))
    labels = rng.permutation(np.arange(count) % len(kinds))
    pixels = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    for label, (pattern, figure) in enumerate(kinds):
        places = np.flatnonzero(labels == label)
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK]
            pixels[chunk] = _drawn(len(chunk), figures[figure], patterns[pattern], rng)
    return Pictures(pixels, labels)


def _drawn(count: int, figure: Figure, pattern: Pattern, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return uint8 (count, S, S, 3): a background, a scrap on it, the figure in front, noise over all."""
    ground, first, second = _colours(count, rng)
    picture = ground[:, None, None, :] + _shading(count, rng)[..., None]
    picture = _with_scrap(picture, rng)
    x, y, size = _placed(count, rng, 10.5, 13.5, 2.5)
    edge = figure(x, y)
    share = pattern(x, y, edge)[..., None]
    colour = (1 - share) * first[:, None, None, :] + share * second[:, None, None, :]
    inside = np.clip(0.5 - edge * size, 0, 1)[..., None]
    picture = (1 - inside) * picture + inside * (colour + 0.5 * _shading(count, rng)[..., None])
    picture += 0.05 * rng.standard_normal(picture.shape, dtype=np.float32)
    pixels: NDArray[np.uint8] = np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)
    return pixels


def _soft(value: Grid) -> Grid:
    """Return 0 to 1 with a soft step at 0, so that patterns do not flicker with the pixels' places."""
    share: Grid = np.clip(0.5 + value, 0, 1)
    return share


def _placed(count: int, rng: np.random.Generator, least: float, most: float, stray: float) -> tuple[Grid, Grid, Grid]:
    """Return the pixels' x and y as a figure sees them that lies anywhere, turned anyhow, and its size in pixels."""
    size, turn = _drawn_between(count, rng, least, most), _drawn_between(count, rng, 0, 2 * np.pi)
    across, down = _drawn_between(count, rng, -stray, stray), _drawn_between(count, rng, -stray, stray)
    line = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
    right, low = line[None, None, :] - across, line[None, :, None] - down
    cos, sin = np.cos(turn), np.sin(turn)
    return (cos * right + sin * low) / size, (cos * low - sin * right) / size, size


def _drawn_between(count: int, rng: np.random.Generator, least: float, most: float) -> Grid:
    """Return (count, 1, 1)."""
    return rng.uniform(least, most, (count, 1, 1)).astype(np.float32)


def _colours(count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return (3, count, 3): a dark background, a bright first colour of the figure and a dark second one."""
    dark, bright, pattern = rng.random((3, count, 3), dtype=np.float32)
    return np.stack([0.45 * dark, 0.5 + 0.5 * bright, 0.5 * pattern])


def _shading(count: int, rng: np.random.Generator) -> Grid:
    """Return light that falls off slowly over the picture, -0.15 to 0.15 or so."""
    x, y, _ = _placed(count, rng, 14.0, 30.0, 10.0)
    return np.float32(0.15) * np.sin(2 * x) * np.cos(y)


def _with_scrap(picture: Grid, rng: np.random.Generator) -> Grid:
    """Put a small bar of any colour somewhere on each picture."""
    count = len(picture)
    x, y, size = _placed(count, rng, 2.0, 5.0, 16.0)
    inside = np.clip(0.5 - _bar(x, y, 1, 0.4) * size, 0, 1)[..., None]
    covered: Grid = (1 - inside) * picture + inside * rng.random((count, 1, 1, 3), dtype=np.float32)
    return covered
