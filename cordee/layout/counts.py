"""Parameters that look alike, counted together: a model has a dozen kinds of tensors and hundreds
of each, so that 405 B on 16,384 ranks are planned as quickly as a small model."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cordee.config.model import ModelSettings
from cordee.layout.axes import AXES, Layout
from cordee.layout.stages import LayerRange
from cordee.layout.tensors import TensorSpec, tensor_specs

ORIGIN: Mapping[str, int] = dict.fromkeys(AXES, 0)
"""Coordinates of the rank that holds most along every axis that cuts tensors."""


@dataclass(frozen=True)
class RepeatedTensor:
    """Tensors that differ in name and layer only: one of them, and the layers of all, sorted."""

    spec: TensorSpec
    layers: tuple[int, ...]

    def count_in(self, layer_ranges: Sequence[LayerRange] | None) -> int:
        """How many of them lie in `layer_ranges`; None: in the whole model."""
        if layer_ranges is None:
            return len(self.layers)
        layers = self.layers
        return sum(
            bisect_right(layers, r.last_layer) - bisect_left(layers, r.first_layer)
            for r in layer_ranges
        )


@dataclass(frozen=True)
class RankTensors:
    """`count` tensors of one kind, of each of which a rank holds `shape`."""

    spec: TensorSpec
    shape: tuple[int, ...]
    count: int

    @property
    def elements(self) -> int:
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class TensorCounts:
    """All parameters of a model by kind. `vocabulary` are the rows of its first tensor, which in a
    transformer is the embedding."""

    tensors: tuple[RepeatedTensor, ...]
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(tensor.spec.elements * len(tensor.layers) for tensor in self.tensors)

    def rank_tensors(
        self,
        layout: Layout,
        coords: Mapping[str, int] = ORIGIN,
        layer_ranges: Sequence[LayerRange] | None = None,
        last_axis: str = "shard",
    ) -> Iterator[RankTensors]:
        """What the rank at coordinates `coords` holds of the layers in `layer_ranges` (None: of
        all)."""
        for tensor in self.tensors:
            if count := tensor.count_in(layer_ranges):
                box = tensor.spec.box(layout, coords, last_axis)
                yield RankTensors(tensor.spec, tuple(stop - start for start, stop in box), count)

    def rank_elements(
        self,
        layout: Layout,
        coords: Mapping[str, int] = ORIGIN,
        layer_ranges: Sequence[LayerRange] | None = None,
        last_axis: str = "shard",
    ) -> int:
        """Elements of all that `rank_tensors` yields."""
        local_tensors = self.rank_tensors(layout, coords, layer_ranges, last_axis)
        return sum(tensors.elements for tensors in local_tensors)


TensorSpecs = TensorCounts | Sequence[TensorSpec]
"""Parameters, counted already or one by one."""


def count_tensors(specs: TensorSpecs) -> TensorCounts:
    """Counts `specs`, unless they are counted already."""
    if isinstance(specs, TensorCounts):
        return specs
    groups: dict[tuple[object, ...], tuple[TensorSpec, list[int]]] = {}
    for spec in specs:
        signature = (spec.shape, spec.group, spec.tensor, spec.expert, spec.shard, in_block(spec))
        groups.setdefault(signature, (spec, []))[1].append(spec.layer)
    tensors = (RepeatedTensor(spec, tuple(sorted(layers))) for spec, layers in groups.values())
    return TensorCounts(tuple(tensors), vocabulary=specs[0].shape[0])


def count_model_tensors(model: ModelSettings, vocabulary: int) -> TensorCounts:
    return count_tensors(tuple(tensor_specs(model, vocabulary)))


def in_block(spec: TensorSpec) -> bool:
    """Whether a tensor belongs to a block (which FSDP2 gathers as one unit)."""
    return spec.name.startswith("blocks.")
