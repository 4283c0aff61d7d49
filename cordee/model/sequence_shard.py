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

ActivationHook = Callable[[Tensor], Tensor]
"""A place where a layout may change an activation; alone it is `same`."""


def identity(x: Tensor) -> Tensor:
    """The activation itself."""
    return x


def full_sequence(length: int) -> Sequence[range]:
    """All positions, in order."""
    return (range(length),)


@dataclass(frozen=True)
class SequenceShard:
    """`tensor_size` ranks split what `context_size` ranks hold; `chunks(length)` are the positions
    of this context rank, as ranges, of a sequence of `full_length`."""

    context_size: int = 1
    tensor_size: int = 1
    tensor_index: int = 0
    chunks: Callable[[int], Sequence[range]] = full_sequence

    def full_length(self, local_length: int) -> int:
        """Positions of the whole sequence when the residual stream here has `local_length`."""
        return local_length * self.tensor_size * self.context_size

    def attention_positions(self, length: int) -> Tensor | None:
        """Positions [T] from which this rank attends; None when they are all, in order."""
        if self.context_size == 1:
            return None
        return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in self.chunks(length)])

    def stream_positions(self, length: int) -> Tensor | None:
        """Positions of the residual stream here; None when they are all, in order."""
        positions = self.attention_positions(length)
        if self.tensor_size == 1:
            return positions
        positions = torch.arange(length) if positions is None else positions
        return positions.view(self.tensor_size, -1)[self.tensor_index]


def dropout(x_BTD: Tensor, rate: float, seed: int, shard: SequenceShard) -> Tensor:
    """x with each element zero with probability `rate`, else divided by 1 - part.

    The mask is a function of (seed, position in the whole tensor): drawn whole, then cut.
    """
    batch, local_length, width = x_BTD.shape
    length = shard.full_length(local_length)
    generator = torch.Generator(x_BTD.device).manual_seed(seed)
    mask = torch.empty(batch, length, width, dtype=x_BTD.dtype, device=x_BTD.device)
    mask.bernoulli_(1.0 - rate, generator=generator).div_(1.0 - rate)
    positions = shard.stream_positions(length)
    return x_BTD * (mask if positions is None else mask[:, positions.to(mask.device)])
