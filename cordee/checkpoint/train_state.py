"""The complete list of what survives a process: all of a run's state, as tensors and metadata.

Tensors: parameters, buffers, optimiser state. Metadata: `Progress`, the sync protocol's state,
digests of data, layout and arithmetic. The order of samples and dropout need no state: both are
functions of (seed, step, microbatch). Each rank stores the boxes that it holds, so that any layout
can load them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from cordee.checkpoint.load import Checkpoint
from cordee.checkpoint.pieces import Piece
from cordee.errors import CheckpointError
from cordee.layout.slices import LocalSlice, box_shape, full_box, volume


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `skipped` counts dropped steps, `in_a_row` those just before this one,
    `generation` how often the run was started, `scale_steps` the good steps since the loss scale
    changed."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    generation: int = 0
    loss_scale: float = 1.0
    scale_steps: int = 0


@dataclass(frozen=True)
class LocalTensor:
    """One tensor of this rank: `tensor` is the box `local_slice.box` of the whole tensor."""

    name: str
    tensor: Tensor
    local_slice: LocalSlice


def collect_local_tensors(
    parameters: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    local_slices: Mapping[str, LocalSlice],
    include_replicas: bool = False,
) -> list[LocalTensor]:
    """This rank's tensors: `model/<name>` and `optim/<group>/<name>/<what>`.

    `local_slices` says where the rank's part of every parameter lies. Optimiser tensors shaped like
    that part are cut like it. Others (steps, factored statistics) are equal on all ranks that hold
    a part of the parameter: the rank with its first element lists them, or every rank with
    `include_replicas`, which is what it needs and can offer to its peers. CheckpointError: a part
    has not the shape of its box.
    """
    local_tensors = []
    for name, parameter in parameters.items():
        part, local_slice = parameter.detach(), local_slices[name]
        if tuple(part.shape) != box_shape(local_slice.box):
            raise CheckpointError(
                "a parameter is not the box that the layout says",
                values={"name": name, "shape": tuple(part.shape), "box": local_slice.box},
            )
        local_tensors.append(LocalTensor(f"model/{name}", part, local_slice))
    for key, tensor in optimizer.items():
        local_slice, shape = local_slices[_parameter_name(f"optim/{key}")], tuple(tensor.shape)
        if shape == box_shape(local_slice.box):
            local_tensors.append(LocalTensor(f"optim/{key}", tensor, local_slice))
        elif include_replicas or (
            volume(local_slice.box) and not any(start for start, _ in local_slice.box)
        ):
            full_slice = replace(local_slice, box=full_box(shape), shape=shape)
            local_tensors.append(LocalTensor(f"optim/{key}", tensor, full_slice))
    return local_tensors


def select_pieces(local_tensors: Sequence[LocalTensor]) -> list[Piece]:
    """The tensors of which this rank writes the one copy.

    Ranks that hold the same tensors share them out, the largest first, each to the rank with the
    fewest bytes so far. All compute the same, so no message is needed.
    """
    loads: dict[tuple[str, ...], list[int]] = {}
    own_pieces = []
    for item in sorted(local_tensors, key=lambda h: (-h.tensor.nbytes, h.name)):
        local_slice = item.local_slice
        # One list of loads per set of axes: the ranks that hold the same tensors see the same list.
        load = loads.setdefault(local_slice.replicated_axes, [0] * local_slice.replica_count)
        replica_index = load.index(min(load))
        load[replica_index] += item.tensor.nbytes
        if replica_index == local_slice.replica_index:
            start = tuple(start for start, _ in local_slice.box)
            own_pieces.append(Piece(item.name, item.tensor, local_slice.shape, start))
    return own_pieces


def make_reader(
    checkpoint: Checkpoint, local_slices: Mapping[str, LocalSlice]
) -> Callable[[str], Tensor]:
    """A function from a full name to this rank's part of the tensor (see `collect_local_tensors`).

    It raises CheckpointError for a parameter that the checkpoint lacks or has in another shape.
    """

    def read_local(name: str) -> Tensor:
        local_slice, shape = local_slices[_parameter_name(name)], checkpoint.shape(name)
        if shape == local_slice.shape:
            return checkpoint.read(name, local_slice.box)
        if name.startswith("model/"):
            raise CheckpointError(
                "a parameter of another shape",
                values={"tensor": name, "stored": shape, "wanted": local_slice.shape},
                fix="load a checkpoint of the same model",
            )
        return checkpoint.read(name)

    return read_local


def _parameter_name(name: str) -> str:
    """The parameter that a stored tensor belongs to."""
    return name.split("/")[2 if name.startswith("optim/") else 1]


def make_metadata(
    progress: Progress,
    sync_state: Mapping[str, Any],
    data_fingerprint: str,
    layout_text: str,
    arithmetic: Mapping[str, str],
) -> dict[str, Any]:
    """The JSON that goes with the tensors. `arithmetic` is empty where bits are not promised."""
    return {
        "progress": asdict(progress),
        "sync": dict(sync_state),
        "data": data_fingerprint,
        "run": layout_text,
        "arithmetic": dict(arithmetic),
    }


def parse_progress(meta: Mapping[str, Any]) -> Progress:
    """The progress in `make_metadata`'s result; CheckpointError when its fields are others."""
    progress = meta.get("progress")
    try:
        result = Progress(**progress)  # type: ignore[arg-type]
        for field in fields(Progress):
            value, field_type = getattr(result, field.name), type(field.default)
            if type(value) not in (field_type, int) or not 0 <= value < 1 << 62:
                raise TypeError(f"{field.name} is {str(value)[:40]}")
        return result
    except TypeError as error:
        raise CheckpointError(
            "the checkpoint was written by another version",
            values={"fields": sorted(progress) if isinstance(progress, dict) else "none"},
            fix="use the version that wrote it, or another run.dir",
        ) from error
