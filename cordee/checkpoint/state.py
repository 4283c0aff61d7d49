"""The complete list of what survives: nothing else carries a run from one process to the next.

parameters, buffers · optimiser state · `Progress` (below: step, tokens, clock, skips, loss scale) ·
the sync protocol's state · digests of data and configuration. Order of samples and dropout need no
state: both are functions of (seed, step, microbatch). Each rank stores the boxes that it holds, so
that any layout may load them. Ranks that hold the same box share the writing: one of them writes
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from cordee.checkpoint.format import Piece
from cordee.checkpoint.load import Checkpoint
from cordee.errors import CheckpointError
from cordee.layout.boxes import Place, shape_of, volume, whole


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
    """One tensor of this rank: `part` is the box `place.box` of the whole tensor."""

    name: str
    part: Tensor
    place: Place


def holdings(
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    places: Mapping[str, Place],
    everything: bool = False,
) -> list[Holding]:
    """What this rank answers for: `model/<name>` and `optim/<group>/<name>/<what>`.

    `places` says where the rank's part of every parameter lies. Optimiser tensors shaped like that
    part are cut like it. Others (steps, factored statistics) are the same wherever the parameter
    is, and whoever has its first element answers for them; `everything`: they are listed wherever
    they are, as what a rank needs and can give (`peer.fill`). CheckpointError: a part has not the
    shape of its box.
    """
    found = []
    for name, parameter in parameters.items():
        part, place = parameter.detach(), places[name]
        if tuple(part.shape) != shape_of(place.box):
            raise CheckpointError(
                "a parameter is not the box that the layout says",
                values={"name": name, "shape": tuple(part.shape), "box": place.box},
            )
        found.append(Holding(f"model/{name}", part, place))
    for key, tensor in optimizer.items():
        place, shape = places[_parameter(f"optim/{key}")], tuple(tensor.shape)
        if shape == shape_of(place.box):
            found.append(Holding(f"optim/{key}", tensor, place))
        elif everything or (volume(place.box) and not any(start for start, _ in place.box)):
            uncut = replace(place, box=whole(shape), shape=shape)
            found.append(Holding(f"optim/{key}", tensor, uncut))
    return found


def pieces(held: Sequence[Holding]) -> list[Piece]:
    """What this rank writes of it: one copy of each tensor is dealt a rank, the largest first.

    The ranks that share tensors along the same axes deal these alike, each to who has the fewest
    bytes so far, and so need not talk.
    """
    loads: dict[tuple[str, ...], list[int]] = {}
    mine = []
    for item in sorted(held, key=lambda h: (-h.part.nbytes, h.name)):
        place = item.place
        load = loads.setdefault(place.shared, [0] * place.copies)
        copy = load.index(min(load))
        load[copy] += item.part.nbytes
        if copy == place.copy:
            start = tuple(start for start, _ in place.box)
            mine.append(Piece(item.name, item.part, place.shape, start))
    return mine


def reader(checkpoint: Checkpoint, places: Mapping[str, Place]) -> Callable[[str], Tensor]:
    """A function from a full name to this rank's part of the tensor (see `holdings`).

    It raises CheckpointError for a parameter that the checkpoint has in another shape, or not.
    """

    def mine(name: str) -> Tensor:
        place, shape = places[_parameter(name)], checkpoint.shape(name)
        if shape == place.shape:
            return checkpoint.read(name, place.box)
        if name.startswith("model/"):
            raise CheckpointError(
                "a parameter of another shape",
                values={"tensor": name, "stored": shape, "wanted": place.shape},
                fix="load a checkpoint of the same model",
            )
        return checkpoint.read(name)

    return mine


def _parameter(name: str) -> str:
    """The parameter that a stored tensor belongs to."""
    return name.split("/")[2 if name.startswith("optim/") else 1]


def describe(
    progress: Progress, sync: Mapping[str, Any], data: str, run: str, arithmetic: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON that goes with the tensors: progress, sync state, data and run digests, and what
    computed them (empty where bits are not promised)."""
    known = {"progress": asdict(progress), "sync": dict(sync), "data": data, "run": run}
    return {**known, "arithmetic": dict(arithmetic)}


def progress_of(meta: Mapping[str, Any]) -> Progress:
    """The counterpart of `describe`; CheckpointError when fields are missing or unknown."""
    progress = meta.get("progress")
    try:
        found = Progress(**progress)  # type: ignore[arg-type]
        for known in fields(Progress):
            value, wanted = getattr(found, known.name), type(known.default)
            if type(value) not in (wanted, int) or not 0 <= value < 1 << 62:
                raise TypeError(f"{known.name} is {str(value)[:40]}")
        return found
    except TypeError as error:
        raise CheckpointError(
            "the checkpoint was written by another version",
            values={"fields": sorted(progress) if isinstance(progress, dict) else "none"},
            fix="use the version that wrote it, or another run.dir",
        ) from error
