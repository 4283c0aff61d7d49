"""The one table of parameters: pattern -> symbolic shape -> which axis cuts which dim.

The planner counts bytes from it, the runtime cuts by it, checkpoints are written by it, and a test
holds it equal to the model that is built, so none of them can drift. Cuts follow one another:
expert, then tensor, then shard (FSDP2 cuts what the others left). Not here: image classifiers'
shapes (`classifier.py`) and foreign models, which bring rows of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cordee.config.model import ModelSettings
from cordee.layout.axes import Layout
from cordee.layout.boxes import Box
from cordee.layout.classifier import classifier_tensors
from cordee.layout.split import shard_rows

CUTS = ("expert", "tensor", "shard")
"""Axes that cut tensors, in the order in which they do."""


@dataclass(frozen=True)
class Row:
    """One kind of parameter. `group` is how optimiser and limits treat it; `tensor`, `expert` and
    `shard` are the dims that those axes cut; `when` is the choice that makes it exist."""

    pattern: str
    shape: tuple[str, ...]
    group: str  # "matrices" | "embeddings" | "vectors"
    tensor: int | None = None
    expert: int | None = None
    shard: int = 0
    when: str = ""


TABLE = (
    Row("embed.weight", ("vocabulary", "width"), "embeddings", tensor=0),
    Row("blocks.{layer}.attention_norm.weight", ("width",), "vectors"),
    Row("blocks.{layer}.attention.query.weight", ("queries", "width"), "matrices", tensor=0),
    Row("blocks.{layer}.attention.key.weight", ("kv", "width"), "matrices", tensor=0),
    Row("blocks.{layer}.attention.value.weight", ("kv", "width"), "matrices", tensor=0),
    Row("blocks.{layer}.attention.out.weight", ("width", "queries"), "matrices", tensor=1),
    Row("blocks.{layer}.attention.query_gain.weight", ("head",), "vectors", when="qk_gain"),
    Row("blocks.{layer}.attention.key_gain.weight", ("head",), "vectors", when="qk_gain"),
    Row("blocks.{layer}.mlp_norm.weight", ("width",), "vectors"),
    Row("blocks.{layer}.mlp.up.weight", ("ffn", "width"), "matrices", tensor=0, when="dense"),
    Row("blocks.{layer}.mlp.gate.weight", ("ffn", "width"), "matrices", tensor=0,
        when="dense gated"),
    Row("blocks.{layer}.mlp.down.weight", ("width", "ffn"), "matrices", tensor=1, when="dense"),
    Row("blocks.{layer}.moe.up", ("experts", "expert", "width"), "matrices",
        expert=0, shard=1, when="moe"),
    Row("blocks.{layer}.moe.gate", ("experts", "expert", "width"), "matrices",
        expert=0, shard=1, when="moe gated"),
    Row("blocks.{layer}.moe.down", ("experts", "width", "expert"), "matrices",
        expert=0, shard=1, when="moe"),
    Row("blocks.{layer}.moe.router.weight", ("experts", "width"), "embeddings", when="moe"),
    Row("blocks.{layer}.moe.shared.up.weight", ("shared", "width"), "matrices", tensor=0,
        when="moe shared"),
    Row("blocks.{layer}.moe.shared.gate.weight", ("shared", "width"), "matrices", tensor=0,
        when="moe shared gated"),
    Row("blocks.{layer}.moe.shared.down.weight", ("width", "shared"), "matrices", tensor=1,
        when="moe shared"),
    Row("norm.weight", ("width",), "vectors"),
    Row("head.weight", ("vocabulary", "width"), "embeddings", tensor=0, when="untied"),
)  # fmt: skip


_PATTERNS = [
    (re.compile(re.escape(row.pattern).replace(r"\{layer\}", r"\d+")), row.group) for row in TABLE
]
_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|lm_head|head)([._]|$)")


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of one model: name, whole shape, group, the block it belongs to (-1 before the
    first, `layers` after the last), and which dim each axis cuts. Along axes in `complete` every
    rank that holds it computes its whole gradient (foreign models, whose stream is not split)."""

    name: str
    shape: tuple[int, ...]
    group: str
    layer: int = 0
    tensor: int | None = None
    expert: int | None = None
    shard: int | None = 0
    complete: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether dim 0 counts matrices of their own (experts)."""
        return self.expert is not None

    def cuts(self, layout: Layout) -> list[tuple[str, int]]:
        """(axis, dim) of the axes that cut this tensor, in their order."""
        dims = {axis: getattr(self, axis) for axis in CUTS}
        return [
            (axis, d) for axis, d in dims.items() if d is not None and _degree(layout, axis) > 1
        ]

    def box(self, layout: Layout, at: Mapping[str, int], upto: str = "shard") -> Box:
        """What the rank at coordinates `at` holds of it; `upto`: the last axis that cuts."""
        box = [(0, size) for size in self.shape]
        for axis, dim in self.cuts(layout):
            if CUTS.index(axis) > CUTS.index(upto):
                break
            start, stop = box[dim]
            part = shard_rows(stop - start, _degree(layout, axis), at[axis])
            box[dim] = (start + part.start, start + part.stop)
        return tuple(box)

    def shared(self, layout: Layout) -> tuple[str, ...]:
        """Axes (degree above 1) along which ranks hold the very same part; not the pipeline."""
        cutting = {axis for axis, _ in self.cuts(layout)}
        axes = ("island", "context", "expert", "shard", "tensor")
        return tuple(a for a in axes if a not in cutting and _degree(layout, a) > 1)

    def summed(self, layout: Layout) -> tuple[str, ...]:
        """Axes inside an island over which its gradient must still be summed after FSDP2 did.

        Ranks along them saw different samples or positions. Blocks work on split sequences under
        tensor parallelism, so what tensor ranks hold whole is summed over them as well.
        """
        whole = ("island", "shard", *self.complete)
        return tuple(a for a in self.shared(layout) if a not in whole)


def tensors(model: ModelSettings, vocabulary: int) -> Iterator[TensorSpec]:
    """Every parameter of a built-in model, in the order of the model's own parameters."""
    if model.classifies:
        yield from (TensorSpec(*named) for named in classifier_tensors(model))
        return
    sizes = {
        "vocabulary": model.vocabulary or vocabulary, "width": model.width, "kv": model.kv_width,
        "queries": model.query_width, "head": model.per_head, "ffn": model.hidden_width,
        "experts": model.moe.experts, "expert": model.expert_width,
        "shared": model.moe.shared * model.expert_width,
    }  # fmt: skip
    block = [row for row in TABLE if "{layer}" in row.pattern]
    for row in TABLE[: TABLE.index(block[0])]:
        yield _spec(row, row.pattern, sizes, -1)
    for layer in range(model.layers):
        there = _choices(model, layer)
        for row in block:
            if there.issuperset(row.when.split()):
                yield _spec(row, row.pattern.format(layer=layer), sizes, layer)
    for row in TABLE[TABLE.index(block[-1]) + 1 :]:
        if _choices(model, model.layers).issuperset(row.when.split()):
            yield _spec(row, row.pattern, sizes, model.layers)


def buffers(model: ModelSettings) -> Iterator[TensorSpec]:
    """What is no parameter and yet survives, whole on every rank: biases of routers' choices."""
    if model.moe.balance == "bias":
        for layer in filter(model.is_moe, range(model.layers)):
            name, shape = f"blocks.{layer}.moe.bias", (model.moe.experts,)
            yield TensorSpec(name, shape, "buffers", layer, shard=None)


def group_of(name: str, ndim: int) -> str:
    """Group of a parameter: the table's for the house's own names; else vectors below 2 dims,
    embeddings by name (embed..., wte, wpe, head), and matrices."""
    for pattern, group in _PATTERNS:
        if pattern.fullmatch(name):
            return group
    if ndim < 2:
        return "vectors"
    return "embeddings" if _EMBEDDING.search(name) else "matrices"


def parameters(model: ModelSettings, vocabulary: int) -> int:
    """Number of parameters of a built-in model."""
    return sum(spec.elements for spec in tensors(model, vocabulary))


def _choices(model: ModelSettings, layer: int) -> set[str]:
    """What a row's `when` may ask for that this model has in `layer`."""
    moe = model.is_moe(layer)
    found = {
        "moe": moe, "dense": not moe, "gated": model.mlp == "gated", "qk_gain": model.qk_gain,
        "shared": model.moe.shared > 0, "untied": not model.tied,
    }  # fmt: skip
    return {name for name, there in found.items() if there}


def _degree(layout: Layout, axis: str) -> int:
    return int(getattr(layout, axis))


def _spec(row: Row, name: str, sizes: Mapping[str, int], layer: int) -> TensorSpec:
    shape = tuple(sizes[s] for s in row.shape)
    return TensorSpec(name, shape, row.group, layer, row.tensor, row.expert, row.shard)
