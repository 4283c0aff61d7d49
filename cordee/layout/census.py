"""Parameters that look alike, counted: what makes 405 B on 16,384 ranks as quick as a small model.

A model has a dozen kinds of tensors and hundreds of each. Not here: names and slices
(`tensors.py`), which the runtime uses one by one; a test holds both to the same sums.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cordee.config.model import ModelSettings
from cordee.layout.axes import AXES, Layout
from cordee.layout.stages import Part
from cordee.layout.tensors import TensorSpec, tensors

ORIGIN: Mapping[str, int] = dict.fromkeys(AXES, 0)
"""Coordinates of the rank that holds most along every axis that cuts tensors."""


@dataclass(frozen=True)
class Kind:
    """Tensors that differ in name and layer only: one of them, and the layers of all, sorted."""

    spec: TensorSpec
    layers: tuple[int, ...]

    def count(self, parts: Sequence[Part] | None) -> int:
        """How many of them lie in `parts`; None: in the whole model."""
        if parts is None:
            return len(self.layers)
        layers = self.layers
        return sum(bisect_right(layers, p.last) - bisect_left(layers, p.first) for p in parts)


@dataclass(frozen=True)
class Held:
    """`count` tensors of one kind, of each of which a rank holds `shape`."""

    spec: TensorSpec
    shape: tuple[int, ...]
    count: int

    @property
    def elements(self) -> int:
        """Elements of all of them that the rank holds."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class Census:
    """All parameters of a model by kind. `vocabulary` are the rows of its first tensor, which in a
    transformer is the embedding."""

    kinds: tuple[Kind, ...]
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(kind.spec.elements * len(kind.layers) for kind in self.kinds)

    def held(
        self,
        layout: Layout,
        at: Mapping[str, int] = ORIGIN,
        parts: Sequence[Part] | None = None,
        upto: str = "shard",
    ) -> Iterator[Held]:
        """What the rank at coordinates `at` holds of the layers in `parts` (None: of all)."""
        for kind in self.kinds:
            if count := kind.count(parts):
                box = kind.spec.box(layout, at, upto)
                yield Held(kind.spec, tuple(stop - start for start, stop in box), count)

    def elements(
        self,
        layout: Layout,
        at: Mapping[str, int] = ORIGIN,
        parts: Sequence[Part] | None = None,
        upto: str = "shard",
    ) -> int:
        """Number of elements that `held` yields."""
        return sum(held.elements for held in self.held(layout, at, parts, upto))


Specs = Census | Sequence[TensorSpec]
"""Parameters, counted already or one by one."""


def census(specs: Specs) -> Census:
    """Counts `specs`; a census stays as it is."""
    if isinstance(specs, Census):
        return specs
    return _counted(specs, specs[0].shape[0])


def model_census(model: ModelSettings, vocabulary: int) -> Census:
    """The census of a built-in model."""
    return census(tuple(tensors(model, vocabulary)))


def _counted(specs: Iterable[TensorSpec], vocabulary: int) -> Census:
    found: dict[tuple[object, ...], tuple[TensorSpec, list[int]]] = {}
    for spec in specs:
        looks = (spec.shape, spec.group, spec.tensor, spec.expert, spec.shard, in_block(spec))
        found.setdefault(looks, (spec, []))[1].append(spec.layer)
    return Census(
        tuple(Kind(spec, tuple(sorted(layers))) for spec, layers in found.values()), vocabulary
    )


def in_block(spec: TensorSpec) -> bool:
    """Whether a tensor belongs to a block (which FSDP2 gathers as one unit)."""
    return spec.name.startswith("blocks.")
