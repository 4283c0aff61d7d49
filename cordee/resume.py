"""How a run goes on: the newest checkpoint that verifies becomes the state of every rank.

What survives is listed in `checkpoint/state.py`; this file puts it back. Not here: whether the
folder may be gone on with (`begin.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from cordee.build import RunState
from cordee.checkpoint.format import folder_name
from cordee.checkpoint.load import Checkpoint, newest, open_checkpoint
from cordee.checkpoint.state import Progress, progress_of, reader
from cordee.desk import Desk
from cordee.dist.exchange import gather_rows
from cordee.errors import DataError
from cordee.layout.axes import AXES
from cordee.metrics.sinks import read_lines


def restore(state: RunState, desk: Desk) -> None:
    """Loads the newest complete checkpoint, if there is one, and says how the run begins."""
    found, generation = choose_checkpoint(state, desk)
    began = {
        "layout": state.plan.layout.describe(), "ranks": state.world.size, "why": state.plan.why,
        "generation": generation, "entropy_bits": state.data.entropy_bits,
        "brought": state.brought,
        "pid": state.world.pid, "rank": state.world.rank, "host": state.world.host,
    }  # fmt: skip
    if found is None:
        state.progress = Progress(generation=generation, loss_scale=state.scale.value)
        desk.cut(state)
        desk.event("started", 0, began)
        desk.tell_start(state, None)
        return
    if found.meta.get("data") != state.data.fingerprint:
        raise DataError(
            "the checkpoint was made with other data",
            values={"there": found.meta.get("data"), "here": state.data.fingerprint},
            fix="give the data back its old content, or train in another run.dir",
        )
    mine = reader(found, state.places)
    with torch.no_grad():
        for name, tensor in state.tensors.items():
            tensor.copy_(mine(f"model/{name}"))
    known = set(found.names())
    state.optimizer.load(lambda k: mine(f"optim/{k}") if f"optim/{k}" in known else None)
    state.sync.restore(found.meta["sync"])
    state.progress = replace(progress_of(found.meta), generation=generation)
    state.guard.in_a_row = state.progress.in_a_row
    state.scale.value = state.progress.loss_scale
    state.scale.good_steps = state.progress.scale_steps
    desk.cut(state)
    desk.event("resumed", state.progress.step, {**began, "checkpoint": found.path.name})
    desk.tell_start(state, found.path.name)


def choose_checkpoint(state: RunState, desk: Desk) -> tuple[Checkpoint | None, int]:
    """Rank 0 looks for the newest checkpoint that verifies, all open that one: (it, generation).

    One rank has checked every byte: the others check the manifest and read what is theirs.
    """
    folder = state.folder / "checkpoints"
    found: Checkpoint | None = None
    generation = 1
    if state.world.first:
        found = newest(folder, desk.rejected)
        numbers = [int(p.name.rpartition(".g")[2]) for p in folder.glob("step-*.g*")]
        starts = [e.get("generation", 0) for e in read_lines(state.folder / "events.jsonl")]
        generation = max([0, *numbers, *starts]) + 1
    row = torch.tensor(
        [generation, found.step if found else -1, found.generation if found else -1],
        dtype=torch.int64,
    )
    generation, step, old = gather_rows(row, state.mesh.group(*AXES), state.world.size)[0].tolist()
    if step < 0 or state.world.first:
        return found, generation
    return open_checkpoint(folder / folder_name(step, old), verify=False), generation
