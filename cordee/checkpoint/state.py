"""The complete list of what survives: nothing else carries a run from one process to the next.

parameters · optimiser state · `Progress` (below: step, tokens, clock, skips, loss scale) · the sync
protocol's state · digests of the data and of the configuration. Order of samples and dropout need
no state: both are functions of (seed, step, microbatch). Sharded tensors are stored by rows, so any
number of ranks may load them. Replicas share the writing: each tensor is dealt to one island.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from cordee.checkpoint.format import Piece
from cordee.errors import CheckpointError
from cordee.layout.axes import Layout
from cordee.layout.split import shard_rows


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `generation` counts how often it was started, `scale_steps` the good
    steps since the loss scale changed (optim/scale.py)."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    generation: int = 0
    loss_scale: float = 1.0
    scale_steps: int = 0


@dataclass(frozen=True)
class Holding:
    """One tensor of this rank: `part` is its local rows, `shape` the whole's, `sharded` if cut."""

    name: str
    part: Tensor
    shape: tuple[int, ...]
    sharded: bool


def holdings(
    parameters: Mapping[str, nn.Parameter],
    optimizer: Mapping[str, Tensor],
    local: Callable[[Tensor], Tensor],
    shards: int,
) -> list[Holding]:
    """Everything this rank holds: `model/<name>` and `optim/<group>/<name>/<what>`."""
    found = []
    for name, parameter in parameters.items():
        part, shape = local(parameter.detach()), tuple(parameter.shape)
        found.append(Holding(f"model/{name}", part, shape, shards > 1))
    for key, tensor in optimizer.items():
        owner = parameters.get(key.split("/")[1])
        like = owner is not None and tuple(tensor.shape) == tuple(local(owner.detach()).shape)
        cut = like and shards > 1
        shape = tuple(owner.shape) if owner is not None and cut else tuple(tensor.shape)
        found.append(Holding(f"optim/{key}", tensor, shape, cut))
    return found


def pieces(held: Sequence[Holding], layout: Layout, rank: int) -> list[Piece]:
    """What `rank` writes of it: tensors dealt to islands by bytes, the largest first."""
    at = layout.coordinates(rank)
    load = [0] * layout.island
    mine = []
    order = sorted(held, key=lambda h: (-math.prod(h.shape), h.name))
    for item in order:
        island = load.index(min(load))
        load[island] += max(1, math.prod(item.shape))
        if island != at["island"] or (at["shard"] and not item.sharded):
            continue
        start = shard_rows(item.shape[0], layout.shard, at["shard"]).start if item.sharded else 0
        if item.part.numel():
            mine.append(Piece(item.name, item.part, item.shape, start))
    return mine


def reader(
    read: Callable[[str, int, int | None], Tensor],
    shape: Callable[[str], tuple[int, ...]],
    held: Mapping[str, tuple[int, ...]],
    layout: Layout,
    rank: int,
) -> Callable[[str], Tensor]:
    """A function from a full name to this rank's rows of it.

    `read(name, start, stop)` and `shape(name)` are the checkpoint's; `held` maps parameter names to
    whole shapes. Optimiser tensors shaped like their parameter are cut like it.
    """
    index = layout.coordinates(rank)["shard"]

    def mine(name: str) -> Tensor:
        whole = shape(name)
        parameter = name.split("/")[2 if name.startswith("optim/") else 1]
        if layout.shard > 1 and held.get(parameter) == whole and whole:
            part = shard_rows(whole[0], layout.shard, index)
            return read(name, part.start, part.stop)
        return read(name, 0, None)

    return mine


def describe(progress: Progress, sync: Mapping[str, Any], data: str, run: str) -> dict[str, Any]:
    """The JSON that goes with the tensors: progress, sync state, data and run digests."""
    return {"progress": asdict(progress), "sync": dict(sync), "data": data, "run": run}


def progress_of(meta: Mapping[str, Any]) -> Progress:
    """The counterpart of `describe`; CheckpointError when fields are missing or unknown."""
    try:
        return Progress(**meta["progress"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            "the checkpoint was written by another version",
            values={"fields": sorted(meta.get("progress", {}))},
            fix="use the version that wrote it, or another run.dir",
        ) from error
