"""The one table of parameters: pattern -> symbolic shape -> which axis may cut which dim.

The planner counts bytes from it and a test holds it equal to the model that is built, so neither
can drift. Not here: foreign models (they bring a plan of their own). FSDP2 cuts dim 0 of every
tensor over `shard`; the `tensor` column is what tensor parallelism will cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from cordee.config.model import ModelSettings
from cordee.layout.classifier import classifier_tensors
from cordee.layout.split import shard_rows


@dataclass(frozen=True)
class Row:
    """One kind of parameter. `group` is how optimiser and limits treat it."""

    pattern: str
    shape: tuple[str, ...]
    group: str  # "matrices" | "embeddings" | "vectors"
    tensor: int | None = None


TABLE = (
    Row("embed.weight", ("vocabulary", "width"), "embeddings", tensor=0),
    Row("blocks.{layer}.attention_norm.weight", ("width",), "vectors"),
    Row("blocks.{layer}.attention.query.weight", ("width", "width"), "matrices", tensor=0),
    Row("blocks.{layer}.attention.key.weight", ("kv", "width"), "matrices", tensor=0),
    Row("blocks.{layer}.attention.value.weight", ("kv", "width"), "matrices", tensor=0),
    Row("blocks.{layer}.attention.out.weight", ("width", "width"), "matrices", tensor=1),
    Row("blocks.{layer}.mlp_norm.weight", ("width",), "vectors"),
    Row("blocks.{layer}.mlp.up.weight", ("ffn", "width"), "matrices", tensor=0),
    Row("blocks.{layer}.mlp.gate.weight", ("ffn", "width"), "matrices", tensor=0),
    Row("blocks.{layer}.mlp.down.weight", ("width", "ffn"), "matrices", tensor=1),
    Row("norm.weight", ("width",), "vectors"),
    Row("head.weight", ("vocabulary", "width"), "embeddings", tensor=0),
)


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of one model: name, whole shape, group."""

    name: str
    shape: tuple[int, ...]
    group: str

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    def shard_rows(self, shard: int, index: int) -> range:
        """Rows of dim 0 that shard `index` of `shard` holds (see split.shard_rows)."""
        return shard_rows(self.shape[0], shard, index)


def tensors(model: ModelSettings, vocabulary: int) -> Iterator[TensorSpec]:
    """Every parameter of a built-in model, in the order of the model's own parameters."""
    if model.classifies:
        yield from (TensorSpec(*named) for named in classifier_tensors(model))
        return
    sizes = {
        "vocabulary": vocabulary, "width": model.width, "kv": model.kv_width,
        "ffn": model.hidden_width,
    }  # fmt: skip
    rows = [row for row in TABLE if _exists(row, model)]
    before = [r for r in rows if "{layer}" not in r.pattern and r.pattern.startswith("embed")]
    block = [r for r in rows if "{layer}" in r.pattern]
    after = [r for r in rows if "{layer}" not in r.pattern and r not in before]
    for row in before:
        yield _spec(row, row.pattern, sizes)
    for layer in range(model.layers):
        for row in block:
            yield _spec(row, row.pattern.format(layer=layer), sizes)
    for row in after:
        yield _spec(row, row.pattern, sizes)


def parameters(model: ModelSettings, vocabulary: int) -> int:
    """Number of parameters of a built-in model."""
    return sum(spec.elements for spec in tensors(model, vocabulary))


def _exists(row: Row, model: ModelSettings) -> bool:
    if row.pattern == "head.weight":
        return not model.tied
    return model.mlp == "gated" or ".gate." not in row.pattern


def _spec(row: Row, name: str, sizes: dict[str, int]) -> TensorSpec:
    return TensorSpec(name, tuple(sizes[s] for s in row.shape), row.group)
