"""How ranks agree on the gradient of a step: alone, by fused all-reduce, by exchange, or compared.

`agree` takes this rank's partial sums and returns the whole gradient, flat lists in parameter
order; `settle` comes after the commit. Not here: local steps and quorums that change (later
issues); the interface has their places. Traded away: overlap with backward, which a CPU has no idle
core for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from cordee.dist.exchange import Codec, Exchange, Partial, gather_rows, nothing
from cordee.dist.flat import outward
from cordee.errors import RunError


class Sync(Protocol):
    """One protocol. `bytes_sent` grows over the run; the desk takes differences."""

    bytes_sent: int

    def agree(self, partial: Partial, reached: Callable[[], None] = nothing) -> list[Tensor]:
        """The gradient of the step, summed over all microbatches of all members. `reached` is
        called with this rank's sums ready: between the rounds of messages where there are two."""
        ...

    def settle(self, step: int) -> None:
        """Called after step `step` was committed."""
        ...

    def state(self) -> dict[str, Any]:
        """What must survive a restart (JSON)."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """The counterpart of `state`."""
        ...


class _Stateless:
    """Protocols that keep nothing from step to step."""

    def __init__(self) -> None:
        self.bytes_sent = 0

    def settle(self, step: int) -> None:
        """Nothing to do after the commit."""

    def state(self) -> dict[str, Any]:
        """Nothing survives."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Alone(_Stateless):
    """One island: its own sum is the whole."""

    def agree(self, partial: Partial, reached: Callable[[], None] = nothing) -> list[Tensor]:
        """The only partial sum."""
        reached()
        return partial[0][1]


class AllReduce(_Stateless):
    """The library's fused all-reduce over one flat buffer."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        super().__init__()
        self.group = group
        self.size = size

    def agree(self, partial: Partial, reached: Callable[[], None] = nothing) -> list[Tensor]:
        """Ring sum; its order, and so its last bits, depend on the number of members."""
        gradients = partial[0][1]
        flat = flatten(gradients)
        reached()
        whole = outward(flat, self.group)
        dist.all_reduce(whole, group=self.group)
        share = 2 * (self.size - 1) / self.size
        self.bytes_sent += int(share * flat.numel() * flat.element_size())
        return unflatten(whole.to(flat.device), gradients)


class ByExchange(_Stateless):
    """The exchange in canonical order, with a codec on the wire."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranges: Sequence[range],
        codec: Codec,
        island: int | None = None,
    ) -> None:
        """`island`: this rank gives one sum, that of its island, and `ranges` count islands."""
        super().__init__()
        self.exchange = Exchange(group, ranges, codec)
        self.island = island

    def deal(self, ranges: Sequence[range]) -> None:
        """Workers compute these microbatches from now on; sums of islands do not care."""
        if self.island is None:
            self.exchange.deal(ranges)

    def agree(self, partial: Partial, reached: Callable[[], None] = nothing) -> list[Tensor]:
        """The same bits for any number of members when the codec is the identity."""
        like = partial[0][1]
        if self.exchange.size == 1:
            reached()
            return like
        flat = [(node, flatten(tensors)) for node, tensors in partial]
        if self.island is not None:
            flat = [((self.island, self.island + 1), flat[0][1])]
        whole = self.exchange.add(flat, reached)
        self.bytes_sent = self.exchange.bytes_sent
        return unflatten(whole, like)


class Compared(_Stateless):
    """Every island computed everything: compare digests instead of adding."""

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        super().__init__()
        self.group = group
        self.size = size

    def agree(self, partial: Partial, reached: Callable[[], None] = nothing) -> list[Tensor]:
        """Our own gradient; RunError when an island computed another one."""
        gradients = partial[0][1]
        reached()
        digest = xxhash.xxh3_64()
        for tensor in gradients:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        ours = torch.tensor([digest.intdigest() - (1 << 63)], dtype=torch.int64)
        digests = gather_rows(ours, self.group, self.size)[:, 0].tolist()
        self.bytes_sent += 8 * (self.size - 1)
        if len(set(digests)) > 1:
            common = max(set(digests), key=digests.count)
            odd = [i for i, d in enumerate(digests) if d != common]
            raise RunError(
                "islands computed different gradients from the same samples",
                values={"islands that differ": odd, "islands": self.size},
                fix="check that device's memory, or data.placement=partition",
            )
        return gradients


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One flat vector of all elements, in order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `flat` in the shapes of `like`."""
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
