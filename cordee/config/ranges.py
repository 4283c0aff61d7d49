"""Ranges of a run's numbers, as types that stand beside the fields of `run.py` and `model.py`.

A value out of its range makes a run worthless or impossible on any machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

Auto = int | Literal["auto"]
AutoFloat = float | Literal["auto"]

SMALLEST_NORMAL = 2.0**-126
"""The smallest normal number of fp32, in which a run computes: a smaller one would act like 0."""

MAX_COUNT = 10**12
"""Most steps, tokens or bytes that are counted; sums and products with them fit 64 bits."""

MAX_DIM = 2**24
"""Largest dim of a matrix; that of the whole matrix is for the plan to judge."""

MAX_RANKS = 2**17
"""Most processes, and most parts that anything is cut into."""

MAX_LAYERS = 10_000
"""Most layers."""


@dataclass(frozen=True)
class Range:
    """From `minimum` to `maximum`, both included unless excluded, in numbers that fp32 can hold."""

    minimum: float
    maximum: float
    excludes_minimum: bool = False
    excludes_maximum: bool = False

    def __contains__(self, value: float) -> bool:
        is_large_enough = value > self.minimum if self.excludes_minimum else value >= self.minimum
        is_small_enough = value < self.maximum if self.excludes_maximum else value <= self.maximum
        return is_large_enough and is_small_enough and (value == 0 or abs(value) >= SMALLEST_NORMAL)

    def __str__(self) -> str:
        low = f"{'above' if self.excludes_minimum else 'at least'} {_bound_text(self.minimum)}"
        high = f"{'below' if self.excludes_maximum else 'at most'} {_bound_text(self.maximum)}"
        return f"{low} and {high}"

    def nearest(self, value: float, default: float) -> float:
        """The nearer end of the range, or `default` where that end is excluded."""
        if isinstance(value, float) and not math.isfinite(value):  # an int may exceed floats
            return default
        end = self.minimum if value <= self.minimum else self.maximum
        nearest: Any = int(end) if isinstance(default, int) else end
        return nearest if nearest in self else default


def _bound_text(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


DEGREE = Range(1, MAX_RANKS)
Degree = Annotated[Auto, DEGREE]
Count = Annotated[int, Range(0, MAX_COUNT)]
Size = Annotated[int, Range(0, MAX_DIM)]
Part = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, 1, excludes_maximum=True)]
Limit = Annotated[float, Range(0, 1e9)]
