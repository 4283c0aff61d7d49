"""`builtin:shapes`: drawn images that every machine has, for classifiers to learn from.

Ten shapes at random places, sizes, angles and colours, with noise. The same on every machine: raw
Philox words are the only randomness and all arithmetic is of whole numbers. Not here: files of
images (`records`). Traded away: beauty; a pixel is the mean of four points, and that is all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cordee.config.model import ImageSettings
from cordee.data.corpora import SHAPES, philox_words
from cordee.errors import DataError

SHAPES_IMAGES = 20_000
"""Images of the train split when data.tokens does not say otherwise."""

LEAST_SIDE = 8
"""Below, a cross and a disc are the same few pixels."""

_I64 = NDArray[np.int64]
_Mask = NDArray[np.bool_]
_Inside = Callable[[_I64, _I64], _Mask]


def _largest(u: _I64, v: _I64) -> _I64:
    return np.maximum(np.abs(u), np.abs(v))


def _between(value: _I64, low: int, high: int) -> _Mask:
    return (value >= low) & (value <= high)


def _tee(u: _I64, v: _I64) -> _Mask:
    beam = _between(v, 350, 900) & (np.abs(u) <= 900)
    return beam | ((np.abs(u) <= 270) & _between(v, -1000, 900))


FIGURES: tuple[tuple[str, _Inside], ...] = (
    ("disc", lambda u, v: u * u + v * v <= 1000**2),
    ("ring", lambda u, v: _between(u * u + v * v, 550**2, 1000**2)),
    ("square", lambda u, v: _largest(u, v) <= 800),
    ("frame", lambda u, v: _between(_largest(u, v), 450, 850)),
    ("cross", lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 260) & (_largest(u, v) <= 1000)),
    ("bar", lambda u, v: (np.abs(v) <= 280) & (np.abs(u) <= 1000)),
    ("two bars", lambda u, v: _between(np.abs(v), 300, 750) & (np.abs(u) <= 900)),
    ("triangle", lambda u, v: (v >= -500) & (1000 * np.abs(u) <= 577 * (1000 - v))),
    ("corner", lambda u, v: (_largest(u, v) <= 850) & (np.minimum(u, v) <= -350)),
    ("tee", _tee),
)
"""Name of each class and what is inside it, in thousandths of the shape's half-size."""

_POINT = 64  # units in which places are counted, to a pixel
_TURNS = 64  # angles to a full turn
_COSINES = np.rint(1024 * np.cos(2 * np.pi * np.arange(_TURNS) / _TURNS)).astype(np.int64)
_SINES = np.roll(_COSINES, _TURNS // 4)
_PIECE = 512  # images drawn at once: their work fits into the second-level cache


def shape_records(seed: int, count: int, image: ImageSettings) -> NDArray[np.uint8]:
    """`count` images of `image.make_side` and `image.channels`, uint8 (count, image.record): the
    label first. DataError for more classes than there are shapes, or too few pixels to draw
    them."""
    if image.classes > len(FIGURES) or image.side < LEAST_SIDE:
        raise DataError(
            f"{SHAPES} draws {len(FIGURES)} shapes on {LEAST_SIDE} x {LEAST_SIDE} pixels or more",
            values={"model.image.classes": image.classes, "model.image.side": image.side},
            fix=f"model.image.classes={min(image.classes, len(FIGURES))}"
            f" model.image.side={max(image.side, LEAST_SIDE)}",
        )
    # Three counters far apart: what is drawn, in which colours, and the noise over it.
    drawn = philox_words(seed, 0, 5 * count).reshape(5, count)
    colours = philox_words(seed, 1, 2 * count * image.channels).reshape(2, count, image.channels)
    noise = philox_words(seed, 2, -(-count * image.pixel_bytes // 8)).view(np.uint8)
    out = np.empty((count, image.record_bytes), dtype=np.uint8)
    out[:, 0] = _below(drawn[0], image.classes)
    area = image.side**2
    for start in range(0, count, _PIECE):
        part = slice(start, min(start + _PIECE, count))
        covered = _coverage(out[part, 0], drawn[1:, part], image.side)[:, None, :]
        ground = 30 + _below(colours[0, part], 196)[:, :, None]
        contrast = 70 + _below(colours[1, part], 58)[:, :, None]
        pixels = ground + np.where(ground < 128, contrast, -contrast) * covered // 4
        grain = noise[part.start * image.pixel_bytes : part.stop * image.pixel_bytes] >> 3
        pixels += grain.reshape(-1, image.channels, area).astype(np.int64) - 16
        out[part, 1:] = pixels.clip(0, 255).reshape(-1, image.pixel_bytes)
    return out


def _below(words: NDArray[np.uint64], limit: int) -> _I64:
    return (words % np.uint64(limit)).astype(np.int64)


def _coverage(labels: NDArray[np.uint8], words: NDArray[np.uint64], side: int) -> _I64:
    """How many of each pixel's four points (0..4) lie inside: int64 (images, side x side)."""
    half = side * _POINT // 2
    radius = side * _POINT * (27 + _below(words[0], 16)) // 100
    room = half - radius
    places = [half - room + _below(w, 1 << 20) * (2 * room + 1) // (1 << 20) for w in words[1:3]]
    angle = _below(words[3], _TURNS)
    # Two points a pixel and side, a quarter of a pixel from its edges.
    points = np.arange(2 * side, dtype=np.int64) * (_POINT // 2) + _POINT // 4
    inside = np.empty((len(labels), 2 * side, 2 * side), dtype=np.int64)
    for label, (_, is_inside) in enumerate(FIGURES):
        rows = np.flatnonzero(labels == label)
        x = (points[None, :] - places[0][rows, None])[:, None, :]
        y = (points[None, :] - places[1][rows, None])[:, :, None]
        c, s, r = (a[rows, None, None] for a in (_COSINES[angle], _SINES[angle], radius))
        u = (x * c + y * s) * 1000 // (1024 * r)
        v = (y * c - x * s) * 1000 // (1024 * r)
        inside[rows] = is_inside(u, v)
    covered: _I64 = inside.reshape(-1, side, 2, side, 2).sum((2, 4))
    return covered.reshape(-1, side * side)
