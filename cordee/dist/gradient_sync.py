"""How ranks agree on the gradient of a step: alone, by all-reduce, by the tree, or compared.

`reduce_gradients` takes this rank's partial sums and returns the whole gradient, flat tensors in
parameter order; `after_step` follows the commit. Nothing overlaps the backward: a CPU has no core
idle for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from cordee.dist.collectives import to_transport_device
from cordee.dist.tree_all_reduce import (
    Codec,
    PartialSums,
    TreeAllReduce,
    all_gather_rows,
    do_nothing,
)
from cordee.errors import RunError


class Sync(Protocol):
    """One protocol. `bytes_sent` grows over the run; the desk takes differences."""

    bytes_sent: int

    def reduce_gradients(
        self, partial_sums: PartialSums, on_local_sums: Callable[[], None] = do_nothing
    ) -> list[Tensor]:
        """The gradient of the step, summed over all microbatches of all members. `on_local_sums` is
        called with this rank's sums ready: between the rounds of messages where there are two."""
        ...

    def after_step(self, step: int) -> None:
        """Called after step `step` was committed."""
        ...

    def state(self) -> dict[str, Any]:
        """What must survive a restart (JSON)."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """The counterpart of `state`."""
        ...


class _StatelessSync:
    """Protocols that keep nothing from step to step."""

    def __init__(self) -> None:
        self.bytes_sent = 0

    def after_step(self, step: int) -> None:
        """Nothing to do after the commit."""

    def state(self) -> dict[str, Any]:
        """Nothing survives."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class NoSync(_StatelessSync):
    """One island: its own sum is the whole."""

    def reduce_gradients(
        self, partial_sums: PartialSums, on_local_sums: Callable[[], None] = do_nothing
    ) -> list[Tensor]:
        """The only partial sum."""
        on_local_sums()
        return partial_sums[0][1]


class AllReduceSync(_StatelessSync):
    """The library's fused all-reduce over one flat buffer."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        super().__init__()
        self.group = group
        self.size = size

    def reduce_gradients(
        self, partial_sums: PartialSums, on_local_sums: Callable[[], None] = do_nothing
    ) -> list[Tensor]:
        """Ring sum; its order, and so its last bits, depend on the number of members."""
        gradients = partial_sums[0][1]
        flat_gradient = flatten_tensors(gradients)
        on_local_sums()
        output = to_transport_device(flat_gradient, self.group)
        dist.all_reduce(output, group=self.group)
        traffic_factor = 2 * (self.size - 1) / self.size
        self.bytes_sent += int(
            traffic_factor * flat_gradient.numel() * flat_gradient.element_size()
        )
        return unflatten_tensors(output.to(flat_gradient.device), gradients)


class TreeSync(_StatelessSync):
    """The exchange in canonical order, with a codec on the wire."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranges: Sequence[range],
        codec: Codec,
        island_index: int | None = None,
    ) -> None:
        """`island_index`: this rank gives one sum, that of its island, and `ranges` count
        islands."""
        super().__init__()
        self.tree_all_reduce = TreeAllReduce(group, ranges, codec)
        self.island_index = island_index

    def set_ranges(self, ranges: Sequence[range]) -> None:
        """Workers compute these microbatches from now on; sums of islands do not care."""
        if self.island_index is None:
            self.tree_all_reduce.set_ranges(ranges)

    def reduce_gradients(
        self, partial_sums: PartialSums, on_local_sums: Callable[[], None] = do_nothing
    ) -> list[Tensor]:
        """The same bits for any number of members when the codec is the identity."""
        templates = partial_sums[0][1]
        if self.tree_all_reduce.size == 1:
            on_local_sums()
            return templates
        flat_sums = [(node, flatten_tensors(tensors)) for node, tensors in partial_sums]
        if self.island_index is not None:
            flat_sums = [((self.island_index, self.island_index + 1), flat_sums[0][1])]
        output = self.tree_all_reduce.all_reduce(flat_sums, on_local_sums)
        self.bytes_sent = self.tree_all_reduce.bytes_sent
        return unflatten_tensors(output, templates)


class ReplicaCheck(_StatelessSync):
    """Every island computed everything: compare digests instead of adding."""

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        super().__init__()
        self.group = group
        self.size = size

    def reduce_gradients(
        self, partial_sums: PartialSums, on_local_sums: Callable[[], None] = do_nothing
    ) -> list[Tensor]:
        """Our own gradient; RunError when an island computed another one."""
        gradients = partial_sums[0][1]
        on_local_sums()
        digest = xxhash.xxh3_64()
        for tensor in gradients:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        digest_row = torch.tensor([digest.intdigest() - (1 << 63)], dtype=torch.int64)
        digests = all_gather_rows(digest_row, self.group, self.size)[:, 0].tolist()
        self.bytes_sent += 8 * (self.size - 1)
        if len(set(digests)) > 1:
            majority_digest = max(set(digests), key=digests.count)
            odd_islands = [i for i, d in enumerate(digests) if d != majority_digest]
            raise RunError(
                "islands computed different gradients from the same samples",
                values={"islands that differ": odd_islands, "islands": self.size},
                fix="check that device's memory, or data.placement=partition",
            )
        return gradients


def flatten_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """One flat vector of all elements, in order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten_tensors(vector: Tensor, templates: Sequence[Tensor]) -> list[Tensor]:
    """Views of `vector` in the shapes of `templates`."""
    parts = torch.split(vector, [template.numel() for template in templates])
    return [part.view(template.shape) for part, template in zip(parts, templates, strict=True)]
