"""What ranks of an island add up: gradients that several hold parts of, and squared norms.

Tensors are counted once: where several ranks hold the very same part, each counts its share. Not
here: sums over shards (FSDP2) and between islands (`sync/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cordee.dist.exchange import gather_rows
from cordee.dist.mesh import Mesh
from cordee.layout.axes import INSIDE
from cordee.layout.tensors import TensorSpec


class GradientSums:
    """Adds this rank's gradients to those of the ranks that saw other samples or positions."""

    def __init__(self, mesh: Mesh, specs: Sequence[TensorSpec]) -> None:
        """`specs` in the order of the gradients."""
        self.mesh = mesh
        self.bytes_sent = 0
        self._classes: dict[tuple[str, ...], list[int]] = {}
        for place, spec in enumerate(specs):
            axes = spec.summed(mesh.layout)
            if axes:
                self._classes.setdefault(axes, []).append(place)

    def add(self, gradients: list[Tensor]) -> None:
        """Puts the sums in place of `gradients`; one flat all-reduce for each set of axes."""
        for axes, places in self._classes.items():
            some = [gradients[place] for place in places]
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            dist.all_reduce(flat, group=self.mesh.group(*axes))
            size = self.mesh.size(*axes)
            self.bytes_sent += 2 * (size - 1) * flat.nbytes // size
            parts = torch.split(flat, [t.numel() for t in some])
            for place, part in zip(places, parts, strict=True):
                gradients[place] = part.view(gradients[place].shape)


class IslandTotals:
    """Sums of numbers per tensor over the ranks of an island, each tensor counted once."""

    def __init__(
        self, mesh: Mesh, specs: Mapping[str, TensorSpec], every: Mapping[str, TensorSpec]
    ) -> None:
        """`specs` are this rank's tensors, `every` those of the whole model."""
        self.group = mesh.group(*INSIDE)
        self.size = mesh.size(*INSIDE)
        self._place = {name: place for place, name in enumerate(every)}
        self._share = {
            name: 1.0 / mesh.size(*(a for a in spec.shared(mesh.layout) if a != "island"))
            for name, spec in specs.items()
        }
        self._found: dict[tuple[tuple[str, ...], torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        """All tensors of the model, in the order of `every`."""
        return list(self._place)

    def every(self, names: Sequence[str], numbers: Tensor) -> Tensor:
        """fp64 totals of all tensors of the model, given this rank's own `names` and numbers."""
        places, shares = self._known(tuple(names), numbers.device)
        row = torch.zeros(len(self._place), dtype=torch.float64, device=numbers.device)
        row[places] = numbers.double() * shares
        return gather_rows(row, self.group, self.size).sum(0)

    def own(self, names: Sequence[str], numbers: Tensor) -> Tensor:
        """fp64 totals of `names` alone, in their order (every rank of the island must ask)."""
        places, _ = self._known(tuple(names), numbers.device)
        return self.every(names, numbers)[places]

    def _known(self, names: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Places and shares of `names`; the same few sets of names come in every step."""
        if (names, device) not in self._found:
            places = torch.tensor([self._place[name] for name in names], dtype=torch.int64)
            shares = torch.tensor([self._share[name] for name in names], dtype=torch.float64)
            self._found[names, device] = places.to(device), shares.to(device)
        return self._found[names, device]
