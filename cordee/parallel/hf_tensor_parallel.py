"""Tensor parallelism of Hugging Face models: hooks on their Linears, as the model's own plan says.

The model's code stays as it is. Activations between cut layers are whole on every rank, so norms
compute complete gradients; splitting the sequence there, as `tensor.py` does, would need to know
the model's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.dist.autograd_collectives import AxisComm
from cordee.errors import LayoutError
from cordee.hf.model import WEIGHT_DIMS, HubModel, HubSource, pattern_of
from cordee.layout.axes import Layout
from cordee.layout.tensors import TensorSpec
from cordee.parallel.tensor import VocabParallel


def check_hf_layout(hub: HubSource, specs: Mapping[str, TensorSpec], layout: Layout) -> None:
    """LayoutError for degrees that the model's own plan does not allow, with the nearest one."""
    for axis in ("pipeline", "context", "expert"):
        if getattr(layout, axis) > 1:
            raise LayoutError(
                f"a model of transformers is not cut by {axis}",
                values={f"layout.{axis}": getattr(layout, axis)},
                fix=f"layout.{axis}=1; layout.shard and layout.tensor cut it",
            )
    if layout.tensor == 1:
        return
    _check_tp_plan(hub, layout.tensor)
    settings = hub.settings
    sizes = {f"{spec.name} dim {spec.tensor}": spec.shape[spec.tensor] for spec in specs.values()
             if spec.tensor is not None}  # fmt: skip
    for key in ("num_attention_heads", "num_key_value_heads"):
        if getattr(settings, key, None):
            sizes[key] = int(getattr(settings, key))
    uneven_names = [name for name, size in sizes.items() if size % layout.tensor]
    if uneven_names:
        common_divisor = math.gcd(*sizes.values())
        nearest_degree = max(
            degree for degree in range(1, layout.tensor + 1) if common_divisor % degree == 0
        )
        raise LayoutError(
            "layout.tensor does not divide what it cuts",
            values={"layout.tensor": layout.tensor, **{n: sizes[n] for n in uneven_names[:3]}},
            fix=f"layout.tensor={nearest_degree}",
        )
    if hub.has_dropout:
        raise LayoutError(
            "dropout inside a cut layer would depend on the layout",
            values={"layout.tensor": layout.tensor, "model.hub": str(hub.folder.path)},
            fix="dropout of 0 in its config.json, or layout.tensor=1",
        )


def set_tensor_parallel(model: HubModel, comm: AxisComm) -> None:
    """Sets hooks on a model whose parameters have this rank's shapes."""
    for name, module in list(model.named_modules()):
        plan_entry = model.source.tp_entry(name)
        if plan_entry is not None and comm.size > 1:
            PLAN_HOOKS[plan_entry](module, comm)
    head = model.source.meta_model.get_output_embeddings()
    head_names = [n for n, m in model.source.meta_model.named_modules() if m is head]
    head_entry = str(model.source.tp_entry(head_names[0])) if head_names else ""
    if comm.size > 1 and head_entry.startswith("colwise"):
        model.head_input_hook = comm.all_reduce_backward
        model.cross_entropy = VocabParallel(comm).cross_entropy


def _check_tp_plan(hub: HubSource, tensor_degree: int) -> None:
    """LayoutError for plan entries that have no hook here."""

    def error(message: str, **values: object) -> LayoutError:
        context = {"layout.tensor": tensor_degree, "model.hub": str(hub.folder.path)}
        return LayoutError(message, values={**context, **values}, fix="layout.tensor=1")

    if not hub.tp_plan:
        raise error("the model brings no tensor-parallel plan")
    for name, module in hub.meta_model.named_modules():
        entry = hub.tp_entry(name)
        if entry is not None and (entry not in PLAN_HOOKS or not _fits_module(entry, module)):
            message = "the model's tensor-parallel plan asks for what this version does not do"
            raise error(message, module=name, entry=entry, type=type(module).__name__)
    # Packed experts and the like: plan entries for a parameter instead of a module.
    for name, _ in hub.meta_model.named_parameters():
        if pattern_of(name) in hub.tp_plan:
            message = "the model's tensor-parallel plan cuts what is no module"
            raise error(message, parameter=name, entry=hub.tp_plan[pattern_of(name)])
    for name, tied_name in hub.tied_parameters.items():
        dims = {WEIGHT_DIMS.get(str(hub.tp_entry(n.rpartition(".")[0]))) for n in (name, tied_name)}
        if len(dims) > 1:
            message = "the plan cuts a tied parameter in two ways"
            raise error(message, tensors=(tied_name, name))


def _fits_module(plan_entry: str, module: nn.Module) -> bool:
    """Whether the hook of `plan_entry` fits: row parallelism replaces the forward of a plain Linear
    and must not replace another's."""
    if plan_entry.startswith("embedding"):
        return isinstance(module, nn.Embedding)
    if plan_entry.startswith("rowwise"):
        return type(module) is nn.Linear
    return isinstance(module, nn.Linear) or WEIGHT_DIMS[plan_entry] is None


def _column_parallel(module: nn.Module, comm: AxisComm) -> None:
    module.register_forward_pre_hook(lambda _, args: (comm.all_reduce_backward(args[0]), *args[1:]))


def _column_parallel_gather(module: nn.Module, comm: AxisComm) -> None:
    _column_parallel(module, comm)
    module.register_forward_hook(lambda _, args, y: comm.all_gather_split_backward(y, y.ndim - 1))


def _row_parallel(module: nn.Module, comm: AxisComm, split: bool = False) -> None:
    assert isinstance(module, nn.Linear)

    def forward(x: Tensor) -> Tensor:
        x = comm.split_all_gather_backward(x, x.ndim - 1) if split else x
        y = comm.all_reduce_forward(F.linear(x, module.weight))
        return y if module.bias is None else y + module.bias  # added once, not by every rank

    module.forward = forward  # type: ignore[method-assign, assignment]


class _RowParallelEmbedding:
    """An embedding of which this rank holds some rows; tokens of other ranks' rows give zeros."""

    def __init__(self, module: nn.Module, comm: AxisComm) -> None:
        assert isinstance(module, nn.Embedding)
        self.comm = comm
        self.row_count = len(module.weight)
        self.outside_mask = torch.empty(0)
        padding_index = module.padding_idx
        if padding_index is not None:
            owns_padding = padding_index // self.row_count == comm.index
            module.padding_idx = padding_index % self.row_count if owns_padding else None
        module.register_forward_pre_hook(self.mask_tokens)
        module.register_forward_hook(self.sum_rows)

    def mask_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        local_tokens = args[0] - self.comm.index * self.row_count
        self.outside_mask = (local_tokens < 0) | (local_tokens >= self.row_count)
        return (local_tokens.masked_fill(self.outside_mask, 0), *args[1:])

    def sum_rows(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return self.comm.all_reduce_forward(y.masked_fill(self.outside_mask.unsqueeze(-1), 0.0))


def _column_embedding(module: nn.Module, comm: AxisComm) -> None:
    module.register_forward_hook(lambda _, args, y: comm.all_gather_split_backward(y, y.ndim - 1))


def _replicate(module: nn.Module, comm: AxisComm) -> None:
    """Whole on every rank; `TensorSpec.full_grad_axes` says whether gradients are summed."""


PLAN_HOOKS: Mapping[str, Callable[[nn.Module, AxisComm], object]] = {
    "colwise": _column_parallel,
    "colwise_gather_output": _column_parallel_gather,
    "colwise_rep": _column_parallel_gather,
    "rowwise": _row_parallel,
    "rowwise_split_input": partial(_row_parallel, split=True),
    "rowwise_rep": partial(_row_parallel, split=True),
    "embedding_rowwise": _RowParallelEmbedding,
    "embedding_colwise": _column_embedding,
    "replicate": _replicate,
    "replicated_with_grad_allreduce": _replicate,
}
"""Entry of a plan -> what sets its hooks."""
