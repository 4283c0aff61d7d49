"""Tensor parallelism of foreign models: hooks on their Linears, as the model's own plan says.

The model's code stays as it is. A Linear that is cut by outputs takes its input from all ranks
alike and hands its part on; one that is cut by inputs adds the ranks' products. The stream between
them is whole on every rank, so norms compute complete gradients (`TensorSpec.complete`). Traded
away: the split sequence of `tensor.py` (less memory), which needs to know what stands between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.dist.wire import Wire
from cordee.errors import LayoutError
from cordee.layout.axes import Layout
from cordee.layout.tensors import TensorSpec
from cordee.model.hub import WEIGHT_DIMS, Hub, HubModel, pattern_of
from cordee.parallel.tensor import Vocabulary


def check_hub_layout(hub: Hub, specs: Mapping[str, TensorSpec], layout: Layout) -> None:
    """LayoutError for degrees that the model's own plan does not allow, naming the nearest."""
    for axis in ("pipeline", "context", "expert"):
        if getattr(layout, axis) > 1:
            raise LayoutError(
                f"a model of transformers is not cut by {axis}",
                values={f"layout.{axis}": getattr(layout, axis)},
                fix=f"layout.{axis}=1; layout.shard and layout.tensor cut it",
            )
    if layout.tensor == 1:
        return
    _check_plan(hub, layout.tensor)
    settings = hub.settings
    sizes = {f"{s.name} dim {s.tensor}": s.shape[s.tensor] for s in specs.values()
             if s.tensor is not None}  # fmt: skip
    for key in ("num_attention_heads", "num_key_value_heads"):
        if getattr(settings, key, None):
            sizes[key] = int(getattr(settings, key))
    odd = [name for name, size in sizes.items() if size % layout.tensor]
    if odd:
        common = math.gcd(*sizes.values())
        near = max(d for d in range(1, layout.tensor + 1) if common % d == 0)
        raise LayoutError(
            "layout.tensor does not divide what it cuts",
            values={"layout.tensor": layout.tensor, **{n: sizes[n] for n in odd[:3]}},
            fix=f"layout.tensor={near}",
        )
    if hub.dropout:
        raise LayoutError(
            "dropout inside a cut layer would depend on the layout",
            values={"layout.tensor": layout.tensor, "model.hub": str(hub.folder.path)},
            fix="dropout of 0 in its config.json, or layout.tensor=1",
        )


def set_seams(model: HubModel, wire: Wire) -> None:
    """Sets hooks on a model whose parameters are narrowed to this rank's part."""
    for name, module in list(model.named_modules()):
        entry = model.source.entry(name)
        if entry is not None and wire.size > 1:
            SEAMS[entry](module, wire)
    head = model.source.plain.get_output_embeddings()
    names = [n for n, m in model.source.plain.named_modules() if m is head]
    if wire.size > 1 and names and str(model.source.entry(names[0])).startswith("colwise"):
        model.enter = wire.spread
        model.cross_entropy = Vocabulary(wire).cross_entropy


def _check_plan(hub: Hub, tensor: int) -> None:
    values: dict[str, object] = {
        "layout.tensor": tensor, "model.hub": str(hub.folder.path)
    }  # fmt: skip
    if not hub.plan:
        raise LayoutError(
            "the model brings no tensor-parallel plan", values=values, fix="layout.tensor=1"
        )
    for name, module in hub.plain.named_modules():
        entry = hub.entry(name)
        if entry is None:
            continue
        if entry not in SEAMS or not _takes(entry, module):
            raise LayoutError(
                "the model's tensor-parallel plan asks for what this version does not do",
                values={**values, "module": name, "entry": entry, "type": type(module).__name__},
                fix="layout.tensor=1",
            )
    # Packed experts and the like: rows of the plan that cut a parameter, not a module.
    bare = [n for n, _ in hub.plain.named_parameters() if pattern_of(n) in hub.plan]
    if bare:
        raise LayoutError(
            "the model's tensor-parallel plan cuts what is no module",
            values={**values, "parameter": bare[0], "entry": hub.plan[pattern_of(bare[0])]},
            fix="layout.tensor=1",
        )
    for name, first in hub.ties.items():
        dims = {WEIGHT_DIMS.get(str(hub.entry(n.rpartition(".")[0]))) for n in (name, first)}
        if len(dims) > 1:
            raise LayoutError(
                "the plan cuts a tied parameter in two ways",
                values={**values, "tensors": (first, name)},
                fix="layout.tensor=1",
            )


def _takes(entry: str, module: nn.Module) -> bool:
    """Whether the seam of `entry` fits the module: plain products where it replaces them."""
    if entry.startswith("embedding"):
        return isinstance(module, nn.Embedding)
    if entry.startswith("rowwise"):
        return type(module) is nn.Linear
    return isinstance(module, nn.Linear) or WEIGHT_DIMS[entry] is None


def _by_outputs(module: nn.Module, wire: Wire) -> None:
    module.register_forward_pre_hook(lambda _, args: (wire.spread(args[0]), *args[1:]))


def _by_outputs_united(module: nn.Module, wire: Wire) -> None:
    _by_outputs(module, wire)
    module.register_forward_hook(lambda _, args, y: wire.unite(y, y.ndim - 1))


def _by_inputs(module: nn.Module, wire: Wire, split: bool = False) -> None:
    assert isinstance(module, nn.Linear)

    def forward(x: Tensor) -> Tensor:
        x = wire.part(x, x.ndim - 1) if split else x
        y = wire.total(F.linear(x, module.weight))
        return y if module.bias is None else y + module.bias  # added once, not by every rank

    module.forward = forward  # type: ignore[method-assign, assignment]


class _Rows:
    """An embedding of which this rank holds some rows: others' tokens look up zeros."""

    def __init__(self, module: nn.Module, wire: Wire) -> None:
        assert isinstance(module, nn.Embedding)
        self.wire = wire
        self.rows = len(module.weight)
        self.outside = torch.empty(0)
        padding = module.padding_idx
        if padding is not None:
            here = padding // self.rows == wire.index
            module.padding_idx = padding % self.rows if here else None
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        local = args[0] - self.wire.index * self.rows
        self.outside = (local < 0) | (local >= self.rows)
        return (local.masked_fill(self.outside, 0), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return self.wire.total(y.masked_fill(self.outside.unsqueeze(-1), 0.0))


def _columns(module: nn.Module, wire: Wire) -> None:
    module.register_forward_hook(lambda _, args, y: wire.unite(y, y.ndim - 1))


def _nothing(module: nn.Module, wire: Wire) -> None:
    """What ranks hold whole; `TensorSpec.complete` says whether its gradients are summed."""


SEAMS: Mapping[str, Callable[[nn.Module, Wire], object]] = {
    "colwise": _by_outputs,
    "colwise_gather_output": _by_outputs_united,
    "colwise_rep": _by_outputs_united,
    "rowwise": _by_inputs,
    "rowwise_split_input": partial(_by_inputs, split=True),
    "rowwise_rep": partial(_by_inputs, split=True),
    "embedding_rowwise": _Rows,
    "embedding_colwise": _columns,
    "replicate": _nothing,
    "replicated_with_grad_allreduce": _nothing,
}
"""Entry of a plan -> what sets its hooks."""
