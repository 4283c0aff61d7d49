"""Which positions of a sequence a rank holds, and dropout that does not depend on it.

Under context parallelism a rank attends from some chunks of the sequence, and under tensor
parallelism the residual stream holds an even part of those. Masks are drawn for the whole sequence
from (key, layer, place) and cut to what is held, so every layout drops the same elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Seam = Callable[[Tensor], Tensor]
"""A place where a layout may change an activation; alone it is `same`."""


def same(x: Tensor) -> Tensor:
    """The activation itself."""
    return x


def whole_sequence(length: int) -> Sequence[range]:
    """All positions, in order."""
    return (range(length),)


@dataclass(frozen=True)
class Span:
    """`tensor` ranks split what `context` ranks hold; `chunks(length)` are the positions of this
    context rank, as ranges, of a sequence of `length`."""

    context: int = 1
    tensor: int = 1
    tensor_index: int = 0
    chunks: Callable[[int], Sequence[range]] = whole_sequence

    def length(self, held: int) -> int:
        """Positions of the whole sequence when the residual stream here has `held`."""
        return held * self.tensor * self.context

    def attended(self, length: int) -> Tensor | None:
        """Positions [T] from which this rank attends; None when they are all, in order."""
        if self.context == 1:
            return None
        return torch.cat([torch.arange(part.start, part.stop) for part in self.chunks(length)])

    def held(self, length: int) -> Tensor | None:
        """Positions of the residual stream here; None when they are all, in order."""
        attended = self.attended(length)
        if self.tensor == 1:
            return attended
        attended = torch.arange(length) if attended is None else attended
        return attended.view(self.tensor, -1)[self.tensor_index]


def dropout(x_BTD: Tensor, part: float, seed: int, span: Span) -> Tensor:
    """x with each element zero with probability `part`, else divided by 1 - part.

    The mask is a function of (seed, position in the whole tensor): drawn whole, then cut.
    """
    batch, held, width = x_BTD.shape
    length = span.length(held)
    generator = torch.Generator(x_BTD.device).manual_seed(seed)
    mask = torch.empty(batch, length, width, dtype=x_BTD.dtype, device=x_BTD.device)
    mask.bernoulli_(1.0 - part, generator=generator).div_(1.0 - part)
    positions = span.held(length)
    return x_BTD * (mask if positions is None else mask[:, positions.to(mask.device)])
