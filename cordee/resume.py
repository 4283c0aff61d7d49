"""How a run goes on: from what live ranks hold, else from the newest checkpoint that verifies.

Start, resume, shrink, grow and repair are this one path: take a seat, build, restore. What survives
is listed in `checkpoint/state.py`; this file puts it back. Not here: who has a seat
(`fault/supervise.py`), and whether the folder may be gone on with (`begin.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cordee.begin import Ready
from cordee.build import RunState
from cordee.checkpoint.folders import folder_name
from cordee.checkpoint.load import Checkpoint, newest, open_checkpoint
from cordee.checkpoint.neighbour import Neighbour
from cordee.checkpoint.peer import Filled, Kept, fill, no_drill
from cordee.checkpoint.rescue import Rescued, rescue, told_of
from cordee.checkpoint.save import Saver
from cordee.checkpoint.state import Progress, describe, progress_of, reader
from cordee.config.load import RUN_FILE, recorded
from cordee.config.run import Run
from cordee.data.manifest import DatasetInfo
from cordee.desk import Desk
from cordee.dist.exchange import gather_bytes, gather_rows
from cordee.dist.line import Line
from cordee.dist.start import Launched, World
from cordee.errors import CheckpointError, ConfigError, DataError
from cordee.layout.axes import AXES, INSIDE
from cordee.metrics.screen import Screen
from cordee.metrics.sinks import JsonLines, now
from cordee.model.arithmetic import fingerprint, libraries
from cordee.plan.plan import Plan
from cordee.rendezvous import last_generation, remedy


@dataclass(frozen=True)
class Seat:
    """This process's place in a generation: the plan, its rank, the rendezvous `store` (None: what
    the launcher told), and of a supervised one its number (0: of no supervisor), the verdicts that
    led to it, all its processes, and when the one before ended (this host's monotonic clock);
    `rescue`: not to train, but to save what is left."""

    plan: Plan
    told: Launched
    drill: str
    store: Any = None
    mark: Any = None
    generation: int = 0
    why: tuple[Mapping[str, Any], ...] = ()
    members: tuple[Mapping[str, Any], ...] = ()
    ended_s: float = 0.0
    rescue: bool = False


def seats(ready: Ready, line: Line | None) -> Iterator[Seat]:
    """The seats of this process, one after another; without a supervisor it has one."""
    if line is None:
        yield Seat(ready.plan, ready.told, ready.run.fault.kills[0])
        return
    line.ready()
    while (given := line.take()) is not None:
        told = replace(ready.told, rank=given.rank, size=given.size, local_rank=given.local_rank)
        yield Seat(
            Plan.from_json(given.plan), told, given.drill, line.store(given), line.mark,
            given.generation, tuple(given.why), tuple(given.members), given.ended_s, given.rescue,
        )  # fmt: skip


@dataclass
class Memory:
    """What this process holds from one generation to the next; nothing at first."""

    state: RunState | None = None
    desk: Desk | None = None
    neighbour: Neighbour | None = None

    @property
    def data(self) -> DatasetInfo | None:
        """The dataset, if it has been laid out."""
        return None if self.state is None else self.state.data

    @property
    def step(self) -> int:
        """The last step that was committed here; -1 when nothing is held."""
        return -1 if self.state is None else self.state.progress.step

    def kept(self) -> list[Kept]:
        """The moments that this process can give to others."""
        if self.state is None or self.desk is None:
            return []
        meta = {**meta_of(self.state), "owed": self.desk.owes()}
        near = self.neighbour.kept() if self.neighbour else []
        return [Kept(self.step, meta, self.state.held(everything=True)), *near]

    def keep_near(self, state: RunState, seat: Seat) -> None:
        """From now on, and at once, a neighbour keeps what only this rank holds."""
        run, size = state.run, state.world.size
        if not seat.generation or state.mesh.size(*INSIDE) == 1 or not run.fault.copy_every:
            self.neighbour = None
            return
        group, hosts = state.mesh.group(*AXES), [str(m["host"]) for m in seat.members]
        if self.neighbour is None:
            self.neighbour = Neighbour(
                run.fault.copy_every, group, state.world.rank, size, hosts, state.drill.point
            )
        else:
            self.neighbour.back_to(state.progress.step)
            self.neighbour.rebind(group, state.world.rank, size, hosts)
        state.neighbour = self.neighbour
        copy_near(state)


def meta_of(state: RunState) -> dict[str, Any]:
    """What goes with the tensors of this moment."""
    at = replace(state.progress, in_a_row=state.guard.in_a_row)
    layout = state.plan.layout.describe()
    return describe(at, state.sync.state(), state.data.fingerprint, layout, state.arithmetic)


def copy_near(state: RunState) -> None:
    """Gives a neighbour a copy of this moment (checkpoint/neighbour.py)."""
    if state.neighbour is not None:
        held = state.held(everything=True)
        state.neighbour.copy(state.progress.step, {**meta_of(state), "owed": []}, held)


def restore(state: RunState, desk: Desk, seat: Seat, memory: Memory) -> None:
    """Puts back what live ranks hold, else the newest complete checkpoint, and says how the run
    begins or goes on."""
    group, size = state.mesh.group(*AXES), state.world.size
    desk.members = seat.members
    state.drill.point("fill", max(memory.step, 0))
    filled = None
    if seat.generation:
        wanted = state.held(everything=True)
        filled = fill(wanted, memory.kept(), group, state.world.rank, size, state.drill.point)
    if filled is not None:
        _take_on(state, filled.meta, seat.generation)
        desk.owed = list(filled.meta["owed"])
        memory.state, memory.desk = state, desk
        desk.cut(state)
        memory.keep_near(state, seat)
        _tell_change(state, desk, seat, filled)
        return
    found, generation = choose_checkpoint(state, desk, seat)
    if found is None:
        state.progress = Progress(generation=generation, loss_scale=state.scale.value)
    else:
        _load(state, found, generation)
    memory.state, memory.desk = state, desk
    desk.cut(state)
    began = {
        "layout": state.plan.layout.describe(), "ranks": size, "why": state.plan.why,
        "generation": generation, "entropy_bits": state.data.entropy_bits,
        "brought": state.brought, "members": list(seat.members),
        "pid": state.world.pid, "rank": state.world.rank, "host": state.world.host,
    }  # fmt: skip
    desk.tell_verdicts(state.progress.step, seat.why)
    if found is None:
        desk.event("started", 0, began)
    else:
        desk.event("resumed", state.progress.step, {**began, "checkpoint": found.path.name})
    memory.keep_near(state, seat)
    desk.tell_start(state, None if found is None else found.path.name)


def check_arithmetic(state: RunState, launched: Launched) -> dict[str, str]:
    """What computes here, by name, where bits are promised: the fingerprint of the arithmetic, the
    versions of the libraries that the model is made of. ConfigError: the run began with another, or
    the ranks of a launcher differ (hosts of our own compare theirs when they meet)."""
    run, here = state.run, state.world
    if not run.promises_bits:
        return {}
    bits = fingerprint(here.device, run.run.precision, run.run.arithmetic)
    found = {"arithmetic": bits}
    for chunk in state.live.chunks:
        found |= libraries(chunk)
    said = [found]
    if here.size > 1 and not launched.supervised:
        words = gather_bytes(json.dumps(found).encode(), state.mesh.group(*AXES), here.size)
        said = [json.loads(of_rank) for of_rank in words]
    there = recorded(state.folder / RUN_FILE)
    for rank, of_rank in enumerate(said):  # on every rank, so that all of them end alike
        _compare(there, of_rank, state)
        _compare(of_rank, said[0], state, f"on rank {rank}", "on rank 0")
    return found


def _compare(
    there: Mapping[str, str], here: Mapping[str, str], state: RunState,
    those: str = "when it began", these: str = "here",
) -> None:  # fmt: skip
    """ConfigError when two of what `check_arithmetic` returns differ; nothing is known of runs that
    were begun before it was recorded."""
    names = [n for n in sorted({*there, *here}) if there and there.get(n) != here.get(n)]
    if not names:
        return
    device = state.world.device.partition(":")[0]
    fix = remedy(state.run, device) if "arithmetic" in names else "the same versions everywhere"
    raise ConfigError(
        "the bits of this run are promised, and other code would compute them",
        values={f"{n} {w}": d.get(n) for n in names for w, d in ((those, there), (these, here))}
        | {"run.arithmetic": state.run.run.arithmetic},
        fix=f"{fix}; this one goes on only where the same is computed",
    )


def keep_safe(run: Run, seat: Seat, memory: Memory, here: World) -> None:
    """Ranks that are no island save what they hold together, and keep it while they wait."""
    seat.mark("rescue", max(memory.step, 0))
    folder, group = Path(run.run.dir), dist.group.WORLD if here.size > 1 else None
    saver = Saver(folder / "checkpoints", here.rank, here.size, run.checkpoint.keep, no_drill)
    events, screen = JsonLines(folder / "events.jsonl"), Screen(silent=not here.first)
    found = None
    if here.first:
        with suppress(CheckpointError):  # the folder cannot be listed: what is held may be all
            found = newest(folder / "checkpoints", lambda *_: None)
    saved_step = found.step if found else -1
    required = [f"model/{name}" for name in memory.state.specs] if memory.state else []
    try:
        saved = rescue(
            memory.kept(), required, saver, seat.generation, saved_step, group, here.rank, here.size
        )
    except CheckpointError as error:
        saved = Rescued(None, None, error.what)
    if here.first:
        events.take_over()
        known = {"generation": seat.generation, "members": list(seat.members), **told_of(saved)}
        events.write({"time": now(), "event": "rescued", **known, "step": max(memory.step, 0)})
        path = saved.report.path.name if saved.report else ""
        done = f"what is left is saved: {path}" if path else f"nothing is saved: {saved.why}"
        screen.say(f"step {memory.step:>5}  {done}; the ranks that are left wait for others")


def _load(state: RunState, found: Checkpoint, generation: int) -> None:
    """The tensors and the progress of a checkpoint. DataError: it was made with other data;
    ConfigError: by other code, where bits are promised."""
    if found.meta.get("data") != state.data.fingerprint:
        raise DataError(
            "the checkpoint was made with other data",
            values={"there": found.meta.get("data"), "here": state.data.fingerprint},
            fix="give the data back its old content, or train in another run.dir",
        )
    _compare(found.meta.get("arithmetic", {}), state.arithmetic, state)
    mine = reader(found, state.places)
    with torch.no_grad():
        for name, tensor in state.tensors.items():
            tensor.copy_(mine(f"model/{name}"))
    known = set(found.names())
    state.optimizer.load(lambda k: mine(f"optim/{k}") if f"optim/{k}" in known else None)
    _take_on(state, found.meta, generation)


def _take_on(state: RunState, meta: Mapping[str, Any], generation: int) -> None:
    """Everything that survives and is no tensor."""
    state.sync.restore(meta.get("sync") or {})
    state.progress = replace(progress_of(meta), generation=generation)
    state.guard.in_a_row = state.progress.in_a_row
    state.scale.value = state.progress.loss_scale
    state.scale.good_steps = state.progress.scale_steps


def _tell_change(state: RunState, desk: Desk, seat: Seat, filled: Filled) -> None:
    """The events of a generation that goes on from live ranks."""
    step = state.progress.step
    desk.tell_verdicts(step, seat.why)
    known = {
        "generation": seat.generation, "islands": state.plan.layout.island,
        "ranks": state.world.size, "layout": state.plan.layout.describe(),
        "members": list(seat.members), "donors": filled.donors, "receivers": filled.receivers,
        "bytes": filled.bytes, "seconds": round(time.monotonic() - seat.ended_s, 4),
        "pid": state.world.pid, "rank": state.world.rank, "host": state.world.host,
    }  # fmt: skip
    desk.event("quorum", step, known)
    verb = "go" if state.plan.layout.island > 1 else "goes"
    filled_by = f", {filled.receivers} filled by {filled.donors}" if filled.receivers else ""
    desk.screen.say(
        f"step {step:>5}  {state.plan.layout.describe()} {verb} on in generation {seat.generation}"
        f"{filled_by}; {known['seconds']:.2f} s"
    )


def choose_checkpoint(state: RunState, desk: Desk, seat: Seat) -> tuple[Checkpoint | None, int]:
    """Rank 0 looks for the newest checkpoint that verifies, all open that one: (it, generation).

    One rank has checked every byte: the others check the manifest and read what is theirs.
    """
    folder = state.folder / "checkpoints"
    found: Checkpoint | None = None
    generation = seat.generation or 1
    if state.world.first:
        found = newest(folder, desk.rejected, desk.passed_over)
        generation = seat.generation or last_generation(state.folder) + 1
    row = torch.tensor(
        [generation, found.step if found else -1, found.generation if found else -1],
        dtype=torch.int64,
    )
    generation, step, old = gather_rows(row, state.mesh.group(*AXES), state.world.size)[0].tolist()
    if step < 0 or state.world.first:
        return found, generation
    return open_checkpoint(folder / folder_name(step, old), verify=False), generation
