"""THE RUN, read top to bottom: distributed gradient descent, theta <- theta - eta * grad F(theta).

    initialise            config/  layout/  plan/  model/initial.py      `train`, `descend`
    distribute the data   data/order.py  data/loader.py                  `descend`, `build`
    distribute the model  parallel/apply.py                              `build`
    update                optim/                                         `step`
    communicate           dist/exchange.py  sync/                        `step`
    iterate               below                                          `walk`

One step is the same on one rank and on many, on the first day and after a restart; it did not
happen unless its last message came (`step`). Nothing is scheduled anywhere else: when to evaluate,
save, log and leave is decided in `walk`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cordee.balance import rebalance
from cordee.begin import (
    Brought,
    Ready,
    get_ready,
    launch_ranks,
    lay_out_data,
    locked,
    look,
    open_data,
    record,
)
from cordee.build import RunState, build
from cordee.checkpoint.fingerprint import weights_sha256
from cordee.checkpoint.state import describe, pieces
from cordee.config.load import flatten, override
from cordee.config.run import Run
from cordee.data.byte_table import table_bits_per_byte
from cordee.data.loader import held_out
from cordee.data.manifest import DatasetInfo, changed_sources
from cordee.data.samples import batches, describe_samples
from cordee.data.source import TokenSource, open_dataset
from cordee.desk import Desk, Outcome, scores
from cordee.dist.exchange import gather_bytes, gather_rows
from cordee.dist.line import open_line
from cordee.dist.mesh import WORKERS
from cordee.dist.start import Launched, broadcast_text, follow_parent, raise_limits, world
from cordee.dist.tally import Tally, gather_tally
from cordee.errors import CheckpointError, CordeeError, RunError
from cordee.evaluate import HeldOut, evaluate, total_of
from cordee.fault.guard import Say, name_culprits, odd_ranks
from cordee.fault.inject import make_drill
from cordee.fault.leave import Asked, leaving
from cordee.layout.axes import AXES, INSIDE
from cordee.metrics.sinks import last_event
from cordee.model.arithmetic import PORTABLE, portable_roots
from cordee.model.folder import cut
from cordee.optim.clip import clip_gradients, limit_parameters
from cordee.optim.schedule import factor
from cordee.parallel.apply import place_of
from cordee.parts import Parts
from cordee.plan.plan import Plan
from cordee.resume import Memory, Seat, check_arithmetic, copy_near, keep_safe, restore, seats
from cordee.sample import generate, to_text

SAMPLE_PROMPT = "def "
TABLE_BYTES = 4 << 20
"""Bytes that the counted table is made from at most: it takes half a second."""

NORM_TOLERANCE = 1e-3
"""How far apart ranks' norms of one gradient may lie, as a part of it, where bits are not promised:
other devices add in another order. What a flipped bit does to a norm is far more, or nothing."""


@dataclass(frozen=True)
class Report:
    """How a run ended. `exit_code` is 0 when it is finished, 128 + signal when it was asked to
    leave, 1 when it failed; `finished` is the last event of a finished run."""

    folder: str
    exit_code: int
    finished: Mapping[str, Any] | None = None


# ---- initialise ----------------------------------------------------------------------------------


def train(run: Run, parts: Parts | None = None, **brought: Any) -> Report:
    """Runs `run` to its end, or on from where it stands; the one way in, also for the CLI.

    `brought` are the fields of `Parts` by name: `train(run, model=module, loss=function,
    data=samples)`. Outside a launcher, the plan's ranks are started on this machine (not with
    parts, which cannot travel; under torchrun they are on every rank). Raises CordeeError with exit
    code 2 before anything is started or written when the command or its input is wrong.
    """
    given = replace(parts or Parts(), **brought)
    given.check(run)
    model = given.model
    count = 0 if model is None else sum(p.numel() for p in model.parameters())
    told = Brought(given.model_name, count, given.data is not None, given.any)
    ready = get_ready(run, told)
    if ready.standing.finished is not None:
        return Report(ready.run.run.dir, 0, ready.standing.finished)
    if ready.launches:
        code = launch_ranks(ready.run, ready.plan)
        last = last_event(Path(ready.run.run.dir))
        return Report(ready.run.run.dir, code, last if last.get("event") == "finished" else None)
    return descend(ready, given)


def descend(ready: Ready, parts: Parts) -> Report:
    """This process as one rank, in one generation after another: when the members change, it keeps
    what it holds and takes its next seat. Outside a supervisor there is one generation."""
    follow_parent()
    raise_limits()
    run, told = ready.run, ready.told
    line = open_line(told)
    lock = locked(run) if line is None and told.rank == 0 else nullcontext()
    memory = Memory()
    with lock, leaving(line) as asked:
        if line is None and told.rank == 0:  # another run may have begun here meanwhile
            look(run, parts.model_name)
        for seat in seats(ready, line):
            try:
                report = take_part(ready, parts, seat, memory, asked)
            except RuntimeError as error:
                if line is None or not line.interrupted(error, run.launch.timeout_s):
                    raise
            except CordeeError as error:
                if line is not None:
                    line.finish(error.exit_code, error.what)
                raise
            else:
                if report is None:
                    continue
                if line is not None:
                    line.finish(report.exit_code)
                return report
    return Report(run.run.dir, asked.exit_code)


def take_part(
    ready: Ready, parts: Parts, seat: Seat, memory: Memory, asked: Asked
) -> Report | None:
    """One generation: join, build, load, walk, finish; None after one that only saved."""
    run, plan, told = ready.run, seat.plan, seat.told
    # The seat's plan is the leader's, whose devices, and cores, may be others than this host's.
    device, threads = ready.plan.device, (ready.plan if plan.devices else plan).threads
    drill = make_drill(seat.drill, run.fault, told.rank, seat.mark)
    drill.point("group", max(memory.step, 0))
    with world(
        told, device, threads, run.launch.timeout_s,
        always=run.memory.offload != "none", store=seat.store, mixed=plan.mixed or seat.rescue,
    ) as here, portable_roots(run.run.arithmetic == PORTABLE):  # fmt: skip
        drill.point("build", max(memory.step, 0))
        if told.by_launcher and told.size > 1 and not told.supervised:
            run, plan = as_first_rank(run, plan)
        if seat.rescue:
            keep_safe(run, seat, memory, here)
            return None
        data = memory.data or distribute_data(run, parts, told)
        # Distribute the model: replicated over islands, sharded inside them; then the state, of
        # peers that hold it, else of the newest checkpoint, cut for this layout.
        state = build(run, plan, here, data, parts, memory.state, drill)
        state.arithmetic = check_arithmetic(state, told)
        trouble = ""
        if here.first:
            trouble = record(run, plan, memory.state is not None, state.arithmetic)
        desk = Desk(state, asked, memory.desk)
        try:
            desk.cannot_write(trouble)
            restore(state, desk, seat, memory)
            tell_devices(state, desk)
            walk(state, desk)
            return finish(state, desk)
        finally:
            desk.close()


def as_first_rank(run: Run, plan: Plan) -> tuple[Run, Plan]:
    """Rank 0's run and plan: under a launcher each rank has resolved its own, and profiles of
    hosts, or of one host at two times, differ."""
    settings, text = json.loads(broadcast_text(json.dumps([flatten(run), plan.to_json()])))
    return override(run, settings), Plan.from_json(text)


def tell_devices(state: RunState, desk: Desk) -> None:
    """Says, once, that islands are on devices of different kinds, and what that means."""
    if state.plan.mixed:
        kinds = ", ".join(sorted(set(state.plan.devices)))
        says = f"devices differ ({kinds}): the samples of each step are the same, " + (
            "the bits are not promised"
        )
        told = {"event": "devices_differ", "devices": list(state.plan.devices), "says": says}
        desk.tell_verdicts(state.progress.step, [told])


def distribute_data(run: Run, parts: Parts, told: Launched) -> DatasetInfo:
    """The dataset: one process writes the snapshot; then one of each host, should hosts share no
    disk; then the others read it. Which rows are whose follows from the order and the plan's
    splits alone. A supervisor has laid it out before its workers began."""
    mine = 0 if told.rank == 0 else 1 if told.local_rank == 0 else 2
    for turn in range(3):
        if turn == mine:
            brought = parts.data
            if brought is not None:
                data = describe_samples(brought, run.run.seed)
            elif told.rank == 0 and not told.supervised:
                data = lay_out_data(run)
            else:
                data = open_data(run, told.supervised)
        if told.size > 1 and not told.supervised:
            torch.distributed.barrier()
    return data


# ---- iterate -------------------------------------------------------------------------------------


def walk(state: RunState, desk: Desk) -> None:
    """Steps until a limit is reached or somebody asks to leave."""
    while True:
        while desk.owed:
            attend(state, desk, desk.owed[0])
        if desk.done(state) >= 1.0 or desk.leave:
            return
        outcome = step(state, desk)
        desk.record(state, outcome)
        if not math.isfinite(outcome.loss):
            check_finite(state, desk)
        desk.keeper.settle(outcome.tally.saving)
        if desk.done(state) < 1.0:
            rebalance(state, desk, outcome.tally)
        if state.neighbour is not None and state.neighbour.due(state.progress.step):
            copy_near(state)
        if outcome.verdict.say is Say.STOP:
            stop(state, desk, outcome)
        desk.note_due(state)


def attend(state: RunState, desk: Desk, owed: str) -> None:
    """What is due after a step; owed until it is done, also when a fault comes between."""
    if owed == "evaluation":
        desk.evaluated(state, measure(state))
    else:
        save(state, desk)
    desk.owed.remove(owed)


def step(state: RunState, desk: Desk) -> Outcome:
    """One optimiser step: microbatches -> backward -> agree -> clip -> judge -> commit or drop.

    Nothing that survives is changed before the last collective has succeeded: whatever a collective
    raises, the step can be done again, and what is left then is this rank's own work. But for one:
    an island that cuts tensors and limits their norms adds squares after the update.
    """
    number = state.progress.step + 1
    desk.meter.begin()
    state.drill.point("step.start", number)
    scale = factor(state.run.optim, desk.done(state), state.progress.step)
    state.optimizer.set_lr(scale)
    loss_scale = state.scale.value
    gradients, norm, tally, odd = compute(state, desk, number)
    # What went wrong may not do so again; an overflow of fp16 would, and its scale follows it.
    unsound = not math.isfinite(float(norm)) and not state.scale.dynamic
    if odd or unsound:
        desk.tell_again(number, tally.norms, odd)
        gradients, norm, tally, odd = compute(state, desk, number, look=True)

    # Update: theta <- theta - eta * grad F(theta), unless the guard drops the step.
    mean_losses = [loss / state.microbatch_tokens for loss in tally.losses]
    scaling, guard = copy.copy(state.scale), copy.copy(state.guard)
    overflow = "" if odd else scaling.follow(mean_losses, float(norm))
    verdict = guard.judge(mean_losses, float(norm), overflow, odd)
    if odd:
        desk.tell_odd(number, tally.norms, odd, "the step is dropped")
    layers = desk.layers(state, gradients, number)
    if verdict.say is Say.COMMIT:
        clip_gradients(state.named_gradients(gradients), state.run.clip, norm)
        updates, loads = state.optimizer.prepare(), state.engine.prepare()
        state.drill.point("step.update", number)
        state.optimizer.step(updates)
        state.engine.commit(loads)
        limit_parameters(state.groups, state.run.clip, state.totals)
    state.scale, state.guard = scaling, guard
    state.drill.point("step.commit", number)
    state.sync.settle(number)
    state.progress = desk.advance(state, tally, verdict)
    loss = total_of(mean_losses) / len(mean_losses)
    lr = scale * state.optimizer.peak_lr
    told = loss_scale if state.scale.dynamic else None
    return Outcome(loss, float(norm), lr, verdict, tally, layers, told)


def check_finite(state: RunState, desk: Desk) -> None:
    """RunError, on every rank, when a parameter or what the optimiser keeps of it is not finite on
    any rank: an update overflowed. Nothing of it is saved, so the newest checkpoint is a good one.
    """
    held = {**state.parameters, **state.optimizer.tensors()}
    mine = json.dumps(name_culprits(held.items())).encode()
    said = gather_bytes(mine, state.mesh.group(*AXES), state.world.size)
    names = list(dict.fromkeys(name for names in said for name in json.loads(names)))
    if not names:
        return
    number = state.progress.step
    desk.drain(state, lambda: None)
    values = {"step": number, "cause": "not finite after an update", "in": names[:3]}
    desk.event("stopped", number, values)
    raise RunError(
        "parameters, or the optimiser's state, are not finite; nothing of them was saved",
        values={**values, "last good checkpoint": desk.keeper.saved_step},
        fix="a lower optim.lr (cordee lr finds one), clip.kind=norm, a larger optim.eps",
    )


def compute(
    state: RunState, desk: Desk, number: int, look: bool = False
) -> tuple[list[Tensor], Tensor, Tally, list[int]]:
    """A step up to its verdict; nothing that survives is changed. This rank's part of the agreed
    gradient, its norm, what all ranks said, the ranks that hold another norm than the others.
    `look`: each rank says whether its own sums are finite, which takes a pass over them."""
    # Compute: losses of this rank's microbatches and their gradients, summed as far as it may.
    losses, partial = state.engine.forward_backward(
        number - 1, state.scale.value, lambda: state.drill.point("step.forward", number)
    )
    state.drill.spoil(partial[0][1], number)
    state.drill.point("step.backward", number)
    sums = (tensor for _, tensors in partial for tensor in tensors) if look else ()
    sick = not all(bool(torch.isfinite(tensor).all()) for tensor in sums)

    # Communicate: the gradient of the whole step, then what everybody lost, wants and holds.
    desk.meter.add("data", state.engine.data_s)
    with desk.meter.phase("comm"):
        compute_s = state.engine.compute_s  # until now: what follows waits for the slowest island
        agreed = state.sync.agree(partial, lambda: state.drill.point("step.reduce", number))
        gradients = state.engine.place(agreed)
        state.scale.unscale(gradients)
    del partial, agreed
    state.drill.point("step.agree", number)
    norm = state.norm(gradients)
    with desk.meter.phase("comm"):
        wishes = replace(desk.wishes(compute_s), norm=float(norm), sick=sick)
        group = state.mesh.group(*AXES)
        tally = gather_tally(state.speaks(losses), state.loaded(), wishes, state.spoken, group)
    odd = odd_ranks(tally.norms, 0.0 if state.run.run.exact else NORM_TOLERANCE)
    # One norm for all, whatever the last bits of other devices: clipping must not part replicas.
    first = next((rank for rank in range(len(tally.norms)) if rank not in odd), 0)
    return gradients, torch.full_like(norm, tally.norms[first]), tally, odd


def stop(state: RunState, desk: Desk, outcome: Outcome) -> None:
    """Too many dropped steps in a row: keep what is good and fail with the cause."""
    number = state.progress.step
    names = desk.culprits(state)
    values = {"steps in a row": state.guard.limit, "cause": outcome.verdict.cause, "in": names}
    save_last(state, desk)
    desk.event("stopped", number, values)
    raise RunError(
        f"{state.guard.limit} steps in a row were dropped; no parameter was touched by them",
        values=values,
        fix="a lower optim.lr (cordee lr finds one), clip.kind=norm, or look at the data there",
    )


# ---- what is due from time to time ---------------------------------------------------------------


def save(state: RunState, desk: Desk) -> None:
    """Begins a checkpoint of this moment in the background; RunError when it is not finite."""
    check_finite(state, desk)
    changed = changed_sources(state.data) if state.world.first else []
    desk.data_changed(state.progress.step, changed)
    state.progress = replace(state.progress, in_a_row=state.guard.in_a_row)
    meta = describe(
        state.progress, state.sync.state(), state.data.fingerprint, state.plan.layout.describe(),
        state.arithmetic,
    )  # fmt: skip
    mine = pieces(state.held())
    desk.keeper.begin(state.progress.step, state.progress.generation, mine, meta)


def save_last(state: RunState, desk: Desk) -> bool:
    """Ends the save in flight and saves this moment, unless it is saved; whether it succeeded."""
    saved = desk.drain(state, lambda: save(state, desk))
    if desk.keeper.saved_step != state.progress.step:
        save(state, desk)
        saved = desk.drain(state, lambda: save(state, desk))
    return saved


def measure(state: RunState) -> HeldOut | None:
    """Held-out loss of the parameters as they are; None when nothing is held out."""
    run = state.run
    if state.held_out is None or not run.evaluate.tokens:
        return None
    state.drill.point("evaluate", state.progress.step)
    workers = state.mesh.size(*WORKERS)
    return evaluate(
        state.engine,
        held_out_batches(state),
        (state.mesh.worker, workers),
        lambda sums: gather_rows(sums, state.mesh.group(*WORKERS), workers),
        state.bytes_per_token,
    )


def held_out_batches(state: RunState) -> list[Any]:
    """What an evaluation scores: the first rows of the held-out data, evaluate.tokens of them."""
    run, rows = state.run, state.run.batch.microbatch
    count = max(1, int(run.evaluate.tokens) * run.batch.microbatches // state.step_tokens)
    if isinstance(state.held_out, TokenSource):
        return list(held_out(state.held_out, run.data.sequence, rows, count))
    return list(batches(state.held_out, rows, count)) if state.held_out else []


def score_table(state: RunState) -> float | None:
    """Bits per byte of a counted table on what the evaluation scored, by rank 0: counts of as many
    bytes as the model was trained on. None where the data is not bytes."""
    sequence, source = state.run.data.sequence, state.held_out
    if not state.world.first or state.data.tokenizer != "bytes" or state.brought:
        return None
    if not isinstance(source, TokenSource) or not state.run.evaluate.tokens:
        return None
    rows = torch.cat(held_out_batches(state)).numpy().astype(np.uint8)
    trained = open_dataset(state.data.folder, "train", verify=False)
    number = min(trained.rows(sequence), TABLE_BYTES // sequence, state.progress.tokens // sequence)
    # Spread over the whole text, as training rows are.
    ids = np.linspace(0, trained.rows(sequence) - 1, max(1, number)).astype(np.int64)
    text = trained.gather(ids, sequence)[:, 1:].astype(np.uint8).reshape(-1)
    return table_bits_per_byte(text, rows)


def finish(state: RunState, desk: Desk) -> Report:
    """The last checkpoint, then (unless asked to leave) evaluation, sample, digest and report."""
    number = state.progress.step
    state.drill.point("finish", number)
    saved = save_last(state, desk)
    if desk.leave:
        desk.event("interrupted", number, {"signal": desk.asked.by, "saved": saved})
        desk.screen.say(f"left after step {number}; the same command goes on from there")
        return Report(state.run.run.dir, desk.asked.exit_code)
    scored = measure(state)
    table_bits = score_table(state)
    digest = weights_sha256(state.specs, lambda name: whole(state, name))
    text = sample(state)
    finished = {
        "weights_sha256": digest, **scores(scored), "table_bits_per_byte": table_bits,
        "steps": number, "tokens": state.progress.tokens,
        "elapsed_s": round(state.progress.elapsed_s, 3), "skipped": state.progress.skipped,
        "saved": saved, "sample": text,
    }  # fmt: skip
    event = desk.event("finished", number, finished)
    desk.tell_end(state, finished)
    if not saved:
        raise CheckpointError(
            "the run is finished but its last checkpoint could not be written",
            values={"run.dir": state.run.run.dir, "step": number},
            fix="make room or mend the disk, then give the same command again",
        )
    return Report(state.run.run.dir, 0, event)


def whole(state: RunState, name: str) -> Tensor:
    """A whole parameter (every rank of the island must ask): parts are added as bits into zeros, so
    that they arrive as they are."""
    spec, mine = state.specs[name], state.tensors.get(name)
    if mine is not None and tuple(mine.shape) == spec.shape and state.live.stages.ranks == 1:
        return mine
    place = place_of(spec, state.mesh)
    found = torch.zeros(spec.shape, dtype=torch.float32, device=state.world.device)
    if mine is not None and not any(state.mesh.at[axis] for axis in place.shared if axis in INSIDE):
        cut(found, place.box).copy_(mine)
    torch.distributed.all_reduce(found.view(torch.int32), group=state.mesh.group(*INSIDE))
    return found


def sample(state: RunState) -> str | None:
    """A text that the model writes; every rank of an island takes part."""
    run = state.run
    if not run.evaluate.sample or state.data.tokenizer != "bytes" or state.brought:
        return None
    if state.mesh.at["island"]:
        return None
    prompt = torch.tensor(list(SAMPLE_PROMPT.encode()))
    state.engine.modes(training=False)
    compiled = run.run.compile != "none"
    # Every length of the window would be compiled anew.
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        count, window = int(run.evaluate.sample), run.data.sequence
        made = generate(state.engine.logits, prompt, count, window, 0.8, run.run.seed)
    return to_text(made)
