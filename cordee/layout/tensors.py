"""The one table of parameters: pattern -> symbolic shape -> which axis cuts which dim.

The planner counts bytes from it, the runtime cuts by it, checkpoints are written by it, and tests
compare it with the model. Models from elsewhere bring rows of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from cordee.config.model import ModelSettings
from cordee.layout.axes import AXES, DATA_AXES, MODEL_AXES, SEQUENCE_AXES, STAGE_AXES, Layout
from cordee.layout.microbatches import shard_rows
from cordee.layout.slices import Box

CUT_AXES = ("expert", "tensor", "shard")
"""Axes that cut tensors, in this order: FSDP2 cuts what the others left."""


@dataclass(frozen=True)
class TensorRule:
    """One kind of parameter. `group` (matrices, embeddings, vectors) is how optimiser and limits
    treat it; `tensor`, `expert` and `shard` are the dims that those axes cut; `condition` names the
    choices with which it exists."""

    pattern: str
    shape: tuple[str, ...]
    group: str
    tensor: int | None = None
    expert: int | None = None
    shard: int = 0
    condition: str = ""


_BLOCK = "blocks.{layer}."
_matrix = partial(TensorRule, group="matrices")
_vector = partial(TensorRule, group="vectors")
_embedding = partial(TensorRule, group="embeddings")
_experts = partial(_matrix, expert=0, shard=1)

TENSOR_TABLE = (
    _embedding("embed.weight", ("vocabulary", "width"), tensor=0),
    _vector(_BLOCK + "attention_norm.weight", ("width",)),
    _matrix(_BLOCK + "attention.query.weight", ("queries", "width"), tensor=0),
    _matrix(_BLOCK + "attention.key.weight", ("kv", "width"), tensor=0),
    _matrix(_BLOCK + "attention.value.weight", ("kv", "width"), tensor=0),
    _matrix(_BLOCK + "attention.out.weight", ("width", "queries"), tensor=1),
    _vector(_BLOCK + "attention.query_gain.weight", ("head",), condition="qk_gain"),
    _vector(_BLOCK + "attention.key_gain.weight", ("head",), condition="qk_gain"),
    _vector(_BLOCK + "mlp_norm.weight", ("width",)),
    _matrix(_BLOCK + "mlp.up.weight", ("ffn", "width"), tensor=0, condition="dense"),
    _matrix(_BLOCK + "mlp.gate.weight", ("ffn", "width"), tensor=0, condition="dense gated"),
    _matrix(_BLOCK + "mlp.down.weight", ("width", "ffn"), tensor=1, condition="dense"),
    _experts(_BLOCK + "moe.up", ("experts", "expert", "width"), condition="moe"),
    _experts(_BLOCK + "moe.gate", ("experts", "expert", "width"), condition="moe gated"),
    _experts(_BLOCK + "moe.down", ("experts", "width", "expert"), condition="moe"),
    _embedding(_BLOCK + "moe.router.weight", ("experts", "width"), condition="moe"),
    _matrix(_BLOCK + "moe.shared.up.weight", ("shared", "width"), tensor=0, condition="moe shared"),
    _matrix(_BLOCK + "moe.shared.gate.weight", ("shared", "width"), tensor=0,
            condition="moe shared gated"),
    _matrix(_BLOCK + "moe.shared.down.weight", ("width", "shared"), tensor=1,
            condition="moe shared"),
    _vector("norm.weight", ("width",)),
    _embedding("head.weight", ("vocabulary", "width"), tensor=0, condition="untied"),
)  # fmt: skip


_GROUP_PATTERNS = [
    (re.compile(re.escape(row.pattern).replace(r"\{layer\}", r"\d+")), row.group)
    for row in TENSOR_TABLE
]
_EMBEDDING_PATTERN = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|lm_head|head)([._]|$)")


@dataclass(frozen=True)
class TensorSpec:
    """One parameter of one model: name, whole shape, group, the block it belongs to (-1 before the
    first, `layers` after the last), and which dim each axis cuts. Along axes in `full_grad_axes`
    every rank that holds it computes its whole gradient (transformers' models, whose stream is not
    split)."""

    name: str
    shape: tuple[int, ...]
    group: str
    layer: int = 0
    tensor: int | None = None
    expert: int | None = None
    shard: int | None = 0
    full_grad_axes: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_stacked(self) -> bool:
        """Whether dim 0 counts matrices of their own (experts)."""
        return self.expert is not None

    def cuts(self, layout: Layout) -> list[tuple[str, int]]:
        """(axis, dim) of the axes that cut this tensor, in their order."""
        pairs = [(axis, getattr(self, axis)) for axis in CUT_AXES if _degree(layout, axis) > 1]
        return [(axis, dim) for axis, dim in pairs if dim is not None]

    def box(self, layout: Layout, coords: Mapping[str, int], last_axis: str = "shard") -> Box:
        """What the rank at coordinates `coords` holds of it; `last_axis`: the last axis that
        cuts."""
        box = [(0, size) for size in self.shape]
        for axis, dim in self.cuts(layout):
            if CUT_AXES.index(axis) > CUT_AXES.index(last_axis):
                break
            start, stop = box[dim]
            rows = shard_rows(stop - start, _degree(layout, axis), coords[axis])
            box[dim] = (start + rows.start, start + rows.stop)
        return tuple(box)

    def replicated_axes(self, layout: Layout) -> tuple[str, ...]:
        """Axes (degree above 1) along which ranks hold the very same part; not the pipeline."""
        cut_axes = {axis for axis, _ in self.cuts(layout)}
        return tuple(
            axis for axis in STAGE_AXES if axis not in cut_axes and _degree(layout, axis) > 1
        )

    def grad_reduce_axes(self, layout: Layout) -> tuple[str, ...]:
        """Axes inside an island over which its gradient must still be summed after FSDP2 did.

        Ranks along them saw different samples or positions. Blocks work on split sequences under
        tensor parallelism, so what tensor ranks hold whole is summed over them as well.
        """
        excluded_axes = ("island", "shard", *self.full_grad_axes)
        return tuple(axis for axis in self.replicated_axes(layout) if axis not in excluded_axes)


def tensor_specs(model: ModelSettings, vocabulary: int) -> Iterator[TensorSpec]:
    """Every parameter of a built-in model, in the order of the model's own parameters."""
    sizes = {
        "vocabulary": model.vocabulary or vocabulary, "width": model.width, "kv": model.kv_width,
        "queries": model.query_width, "head": model.width_per_head, "ffn": model.hidden_width,
        "experts": model.moe.experts, "expert": model.expert_width,
        "shared": model.moe.shared * model.expert_width,
    }  # fmt: skip
    block_rules = [rule for rule in TENSOR_TABLE if "{layer}" in rule.pattern]
    for rule in TENSOR_TABLE[: TENSOR_TABLE.index(block_rules[0])]:
        yield _spec(rule, rule.pattern, sizes, -1)
    for layer in range(model.layers):
        conditions = _conditions(model, layer)
        for rule in block_rules:
            if conditions.issuperset(rule.condition.split()):
                yield _spec(rule, rule.pattern.format(layer=layer), sizes, layer)
    for rule in TENSOR_TABLE[TENSOR_TABLE.index(block_rules[-1]) + 1 :]:
        if _conditions(model, model.layers).issuperset(rule.condition.split()):
            yield _spec(rule, rule.pattern, sizes, model.layers)


def group_axes() -> list[tuple[str, ...]]:
    """Sets of axes whose ranks form a process group, each once, in an order that all ranks share.

    Axes of degree 1 drop out of a set, so the sets of a layout that has every axis serve all. Other
    people's models are cut by shard and tensor alone and need none beside these.
    """
    layout = Layout(**dict.fromkeys(AXES, 2))
    sets = [*((axis,) for axis in AXES), DATA_AXES, AXES, MODEL_AXES, STAGE_AXES, SEQUENCE_AXES]
    for rule in TENSOR_TABLE:
        spec = _spec(rule, rule.pattern, dict.fromkeys(rule.shape, 1), 0)
        sets.append(spec.grad_reduce_axes(layout))
        if rule.group == "matrices":
            # Muon shares its work among the ranks that cut a matrix, else among those that hold it.
            cut_axes = {axis for axis, _ in spec.cuts(layout)}
            sets.append(tuple(axis for axis in AXES if axis in cut_axes and axis != "expert"))
            sets.append(spec.replicated_axes(layout))
    return list(dict.fromkeys(sets))


def router_bias_specs(model: ModelSettings) -> Iterator[TensorSpec]:
    """Buffers that checkpoints hold, whole on every rank: biases of routers' choices."""
    if model.moe.balance == "bias":
        for layer in filter(model.is_moe, range(model.layers)):
            name, shape = f"blocks.{layer}.moe.bias", (model.moe.experts,)
            yield TensorSpec(name, shape, "buffers", layer, shard=None)


def parameter_group(name: str, ndim: int) -> str:
    """Group of a parameter: the table's for the house's own names; else vectors below 2 dims,
    embeddings by name (embed..., wte, wpe, head), and matrices."""
    for pattern, group in _GROUP_PATTERNS:
        if pattern.fullmatch(name):
            return group
    if ndim < 2:
        return "vectors"
    return "embeddings" if _EMBEDDING_PATTERN.search(name) else "matrices"


def count_parameters(model: ModelSettings, vocabulary: int) -> int:
    """Number of parameters of a built-in model."""
    return sum(spec.elements for spec in tensor_specs(model, vocabulary))


def _conditions(model: ModelSettings, layer: int) -> set[str]:
    """The words of a row's `condition` that hold for this model in `layer`."""
    moe = model.is_moe(layer)
    flags = {
        "moe": moe, "dense": not moe, "gated": model.mlp == "gated", "qk_gain": model.qk_gain,
        "shared": model.moe.shared > 0, "untied": not model.tied,
    }  # fmt: skip
    return {name for name, is_set in flags.items() if is_set}


def _degree(layout: Layout, axis: str) -> int:
    return int(getattr(layout, axis))


def _spec(rule: TensorRule, name: str, sizes: Mapping[str, int], layer: int) -> TensorSpec:
    shape = tuple(sizes[s] for s in rule.shape)
    return TensorSpec(name, shape, rule.group, layer, rule.tensor, rule.expert, rule.shard)
