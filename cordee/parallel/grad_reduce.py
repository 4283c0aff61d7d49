"""Sums inside an island: gradients of tensors that several ranks hold, and squared norms.

Where several ranks hold the same part, each counts its share, so every tensor counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.mesh import Mesh
from cordee.dist.tree_all_reduce import all_gather_rows
from cordee.layout.axes import MODEL_AXES
from cordee.layout.tensors import TensorSpec


class GradientReducer:
    """Adds this rank's gradients to those of the ranks that saw other samples or positions."""

    def __init__(self, mesh: Mesh, specs: Sequence[TensorSpec]) -> None:
        """`specs` in the order of the gradients."""
        self.mesh = mesh
        self.bytes_sent = 0
        self._indices_by_axes: dict[tuple[str, ...], list[int]] = {}
        for index, spec in enumerate(specs):
            axes = spec.grad_reduce_axes(mesh.layout)
            if axes:
                self._indices_by_axes.setdefault(axes, []).append(index)

    def reduce(self, gradients: list[Tensor]) -> None:
        """Replaces `gradients` by their sums; one flat all-reduce for each set of axes."""
        for axes, indices in self._indices_by_axes.items():
            axis_gradients = [gradients[index] for index in indices]
            flat = torch.cat([tensor.reshape(-1) for tensor in axis_gradients])
            dist.all_reduce(flat, group=self.mesh.group(*axes))
            size = self.mesh.size(*axes)  # a ring all-reduce sends 2 (size - 1) / size of it
            self.bytes_sent += 2 * (size - 1) * flat.nbytes // size
            parts = torch.split(flat, [t.numel() for t in axis_gradients])
            for index, total in zip(indices, parts, strict=True):
                gradients[index] = total.view(gradients[index].shape)


class NormReducer:
    """Sums of numbers per tensor over the ranks of an island, each tensor counted once."""

    def __init__(
        self, mesh: Mesh, specs: Mapping[str, TensorSpec], all_specs: Mapping[str, TensorSpec]
    ) -> None:
        """`specs` are this rank's tensors, `all_specs` those of the whole model."""
        self.group = mesh.group(*MODEL_AXES)
        self.size = mesh.size(*MODEL_AXES)
        self._index_by_name = {name: index for index, name in enumerate(all_specs)}
        self._share_by_name = {
            name: 1.0
            / mesh.size(*(axis for axis in spec.replicated_axes(mesh.layout) if axis != "island"))
            for name, spec in specs.items()
        }
        self._cache: dict[tuple[tuple[str, ...], torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """All tensors of the model, in the order of `sum_all`."""
        return list(self._index_by_name)

    def sum_all(self, names: Sequence[str], numbers: Tensor) -> Tensor:
        """fp64 totals of all tensors of the model, given this rank's own `names` and numbers."""
        indices, shares = self._indices_and_shares(tuple(names), numbers.device)
        row = torch.zeros(len(self._index_by_name), dtype=torch.float64, device=numbers.device)
        row[indices] = numbers.double() * shares
        return all_gather_rows(row, self.group, self.size).sum(0)

    def sum_local(self, names: Sequence[str], numbers: Tensor) -> Tensor:
        """fp64 totals of `names` alone, in their order; collective over the island."""
        indices, _ = self._indices_and_shares(tuple(names), numbers.device)
        return self.sum_all(names, numbers)[indices]

    def _indices_and_shares(
        self, names: tuple[str, ...], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cached, since the same few sets of names come in every step."""
        if (names, device) not in self._cache:
            indices = torch.tensor([self._index_by_name[name] for name in names], dtype=torch.int64)
            shares = torch.tensor(
                [self._share_by_name[name] for name in names], dtype=torch.float64
            )
            self._cache[names, device] = indices.to(device), shares.to(device)
        return self._cache[names, device]
