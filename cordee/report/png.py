"""A small plot as PNG: lines, dots, a shaded band, axes with ticks, text in a 5x7 bitmap font.

numpy and zlib only. Not here: charts of the report, which are SVG (`charts.py`; its ticks and
labels are used here as well). Traded away: everything that a plotting library has and that a
terminal's user who wants one picture does not need. Lines are anti-aliased by the distance of a
pixel's centre from the line.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cordee.report.charts import format_number, log_ticks, tick_labels, ticks

Colour = tuple[int, int, int]
INK, SOFT, RULE, PAPER = (31, 36, 40), (106, 114, 123), (228, 228, 223), (255, 255, 255)
BLUE, ORANGE, GREEN, RED = (42, 102, 176), (200, 96, 42), (46, 125, 84), (181, 57, 47)

WIDE, HIGH, ZOOM = 5, 7, 2
"""Columns and rows of a glyph, and pixels of the picture to one of the font."""
BELOW = frozenset("gjpqy,;")
"""Glyphs that stand two rows lower."""


FONT = """
0 0e11111111110e 1 040c040404040e 2 0e11010204081f 3 1f02040201110e 4 02060a121f0202
5 1f101e0101110e 6 0608101e11110e 7 1f010204080808 8 0e11110e11110e 9 0e11110f01020c
A 0e11111f111111 B 1e11111e11111e C 0e11101010110e D 1e11111111111e E 1f10101e10101f
F 1f10101e101010 G 0e11101711110e H 1111111f111111 I 0e04040404040e J 0702020202120c
K 11121418141211 L 1010101010101f M 111b1515111111 N 11191513111111 O 0e11111111110e
P 1e11111e101010 Q 0e11111115120d R 1e11111e141211 S 0f10100e01011e T 1f040404040404
U 1111111111110e V 11111111110a04 W 11111115151b11 X 11110a040a1111 Y 11110a04040404
Z 1f01020408101f a 00000e010f110f b 10101e1111111e c 00000e1110110e d 01010f1111110f
e 00000e111f100e f 0609081c080808 g 0f1111110f010e h 10101e11111111 i 04000c0404040e
j 0206020202120c k 10101214181412 l 0c04040404040e m 00001a15151515 n 00001e11111111
o 00000e1111110e p 1e1111111e1010 q 0f1111110f0101 r 00001619101010 s 00000f100e011e
t 08081c08080906 u 0000111111110f v 00001111110a04 w 0000111115150a x 0000110a040a11
y 111111110f010e z 00001f0204081f . 00000000000c0c , 0000000c0c0408 : 000c0c000c0c00
; 000c0c000c0408 - 0000000e000000 + 0004041f040400 = 00001f001f0000 / 01010204081010
( 02040808080402 ) 08040202020408 % 18190204081303 < 02040810080402 > 08040201020408
_ 0000000000001f
"""
"""A character, then its seven rows of five pixels as two hexadecimal digits each."""

GLYPHS: Mapping[str, str] = dict(zip(FONT.split()[::2], FONT.split()[1::2], strict=True))


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one colour, joined or as dots; a y that is not finite leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Colour = BLUE
    kind: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture with a logarithmic x axis; `band` is shaded and `mark` is a vertical line."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    band: tuple[float, float] | None = None
    mark: tuple[str, float] | None = None
    width: int = 1200
    height: int = 680


def draw(plot: Plot) -> bytes:
    """The plot as the bytes of a PNG file."""
    canvas = Canvas(plot.width, plot.height)
    left, right, top, bottom = 110, plot.width - 36, 104, plot.height - 84
    canvas.text(36, 26, plot.title, INK, zoom=3)
    points = [
        (x, y)
        for s in plot.series
        for x, y in zip(s.x, s.y, strict=True)
        if x > 0 and math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        canvas.text(left, (top + bottom) / 2, "nothing was measured", SOFT)
        return canvas.png()
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    high_x = max(high_x, low_x * 1.01)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    margin = 0.06 * ((high_y - low_y) or abs(high_y) or 1.0)
    low_y, high_y = low_y - margin, high_y + margin

    def across(x: float) -> float:
        part = math.log(x / low_x) / math.log(high_x / low_x)
        return left + (right - left) * min(1.0, max(0.0, part))

    def down(y: float) -> float:
        return bottom - (bottom - top) * (y - low_y) / (high_y - low_y)

    if plot.band is not None:
        canvas.box(across(plot.band[0]), top, across(plot.band[1]), bottom, GREEN, 0.16)
    y_at = ticks(low_y, high_y, 6)
    for y, label in zip(y_at, tick_labels(y_at), strict=True):
        canvas.box(left, round(down(y)), right, round(down(y)) + 1, RULE)
        canvas.text(left - 14, down(y) - HIGH, label, SOFT, align=1.0)
    for x in log_ticks(low_x, high_x, 8):
        canvas.box(round(across(x)), bottom, round(across(x)) + 1, bottom + 8, SOFT)
        canvas.text(across(x), bottom + 16, format_number(x), SOFT, align=0.5)
    canvas.box(left, bottom, right, bottom + 1, SOFT)
    canvas.text((left + right) / 2, plot.height - 32, plot.x_label, SOFT, align=0.5)
    canvas.text(36, top - 30, plot.y_label, SOFT)
    if plot.mark is not None:
        canvas.line([(across(plot.mark[1]), top), (across(plot.mark[1]), bottom)], GREEN, 2.0)
    _series(canvas, plot, across, down)
    return canvas.png()


def _series(
    canvas: Canvas, plot: Plot, across: Callable[[float], float], down: Callable[[float], float]
) -> None:
    """The lines, the faint ones first, and a legend from the right end of its row leftwards."""
    keys: list[tuple[str, Colour, str]] = [(s.label, s.colour, s.kind) for s in plot.series]
    if plot.mark is not None:
        keys.append((plot.mark[0], GREEN, "line"))
    for s in sorted(plot.series, key=lambda s: s.kind != "faint"):
        spots = [
            (across(x), down(y)) if math.isfinite(y) and x > 0 else None
            for x, y in zip(s.x, s.y, strict=True)
        ]
        if s.kind == "dots":
            for spot in filter(None, spots):
                canvas.line([spot, spot], PAPER, 15.0)
                canvas.line([spot, spot], s.colour, 11.0)
            continue
        for piece in _pieces(spots):
            canvas.line(piece, s.colour, 1.2 if s.kind == "faint" else 2.6, s.kind == "faint")
    x = float(plot.width - 36)
    for label, colour, kind in reversed(keys):
        x -= canvas.text(x, 74, label, SOFT, align=1.0) + 12
        ends = [(x - 18, 81.0), (x, 81.0)] if kind != "dots" else [(x - 6, 81.0), (x - 6, 81.0)]
        canvas.line(ends, colour, 11.0 if kind == "dots" else 3.0, kind == "faint")
        x -= 46


def _pieces(spots: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Runs of points without a gap."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for spot in spots:
        if spot is None:
            pieces.append([])
        else:
            pieces[-1].append(spot)
    return [piece for piece in pieces if len(piece) > 1]


class Canvas:
    """An RGB picture that is drawn on, from the top left, in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels: NDArray[np.float32] = np.empty((height, width, 3), np.float32)
        self.pixels[:] = PAPER

    def box(
        self, x0: float, y0: float, x1: float, y1: float, colour: Colour, opacity: float = 1.0
    ) -> None:
        """A filled rectangle."""
        part = self.pixels[round(y0) : round(y1), round(x0) : round(x1)]
        part += opacity * (np.array(colour, np.float32) - part)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        colour: Colour,
        thick: float,
        faint: bool = False,
    ) -> None:
        """A polyline with round ends; equal points are a disc. Covers no pixel twice."""
        height, width = self.pixels.shape[:2]
        cover = np.zeros((height, width), np.float32)
        reach = thick / 2 + 1
        for (ax, ay), (bx, by) in pairwise(points):
            x0, x1 = max(0, int(min(ax, bx) - reach)), min(width, int(max(ax, bx) + reach) + 2)
            y0, y1 = max(0, int(min(ay, by) - reach)), min(height, int(max(ay, by) + reach) + 2)
            if x0 >= x1 or y0 >= y1:
                continue
            y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32) + np.float32(0.5)
            dx, dy = bx - ax, by - ay
            along = ((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-9)
            along = np.clip(along, 0, 1)
            away = np.hypot(x - ax - along * dx, y - ay - along * dy)
            inside = np.clip(thick / 2 + 0.5 - away, 0, 1)
            np.maximum(cover[y0:y1, x0:x1], inside, out=cover[y0:y1, x0:x1])
        opacity = (0.4 if faint else 1.0) * cover[:, :, None]
        self.pixels += opacity * (np.array(colour, np.float32) - self.pixels)

    def text(
        self, x: float, y: float, text: str, colour: Colour, align: float = 0.0, zoom: int = ZOOM
    ) -> int:
        """Text with its top at `y`; `align` 0 starts, 0.5 centres and 1 ends it at `x`. Returns its
        width in pixels. A character without a glyph is a space."""
        step = (WIDE + 1) * zoom
        left = round(x - align * step * len(text))
        for i, letter in enumerate(text):
            rows = GLYPHS.get(letter, "")
            for row in range(len(rows) // 2):
                bits = int(rows[2 * row : 2 * row + 2], 16)
                for column in range(WIDE):
                    if bits >> (WIDE - 1 - column) & 1:
                        at_x = left + i * step + column * zoom
                        at_y = round(y) + (row + 2 * (letter in BELOW)) * zoom
                        self.box(at_x, at_y, at_x + zoom, at_y + zoom, colour)
        return step * len(text)

    def png(self) -> bytes:
        """The picture as a PNG file: one IDAT chunk, each row filtered by the row above it."""
        pixels = np.clip(np.rint(self.pixels), 0, 255).astype(np.uint8)
        height, width = pixels.shape[:2]
        rows = pixels.reshape(height, width * 3)
        above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
        filtered = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
