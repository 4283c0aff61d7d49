"""THE RUN, read top to bottom: distributed gradient descent, theta <- theta - eta * grad F(theta).

    initialise            config/  layout/  plan/  model/initial.py      `train`, `descend`
    distribute the data   data/order.py  data/loader.py                  `build.build`
    distribute the model  parallel/apply.py                              `build.build`
    update                optim/                                         `step`
    communicate           dist/exchange.py  sync/                        `step`
    iterate               below                                          `walk`

One step is the same on one rank and on many, on the first day and after a restart. Nothing is
scheduled anywhere else: when to evaluate, save, log and leave is decided in `walk`.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from cordee.begin import Ready, get_ready, launch_ranks, lay_out_data, locked, record, settle
from cordee.build import Parts, RunState, build
from cordee.checkpoint.fingerprint import weights_sha256
from cordee.checkpoint.load import Checkpoint, newest, open_checkpoint
from cordee.checkpoint.state import Progress, describe, pieces, progress_of, reader
from cordee.config.load import override
from cordee.config.run import Run
from cordee.data.loader import held_out
from cordee.data.source import changed_sources
from cordee.desk import Desk, Outcome
from cordee.dist.exchange import gather_rows
from cordee.dist.start import Launched, follow_parent, world
from cordee.dist.tally import gather_tally
from cordee.errors import CheckpointError, DataError, RunError
from cordee.evaluate import HeldOut, evaluate
from cordee.fault.guard import Say
from cordee.metrics.sinks import last_event, read_lines
from cordee.optim.clip import clip_gradients, global_norm, limit_parameters
from cordee.optim.schedule import factor
from cordee.parallel.shard import local
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan
from cordee.sample import generate, to_text

SAMPLE_PROMPT = "def "


@dataclass(frozen=True)
class Report:
    """How a run ended. `exit_code` is 0 when it is finished, 128 + signal when it was asked to
    leave, 1 when it failed; `finished` is the last event of a finished run."""

    folder: str
    exit_code: int
    finished: Mapping[str, Any] | None = None


# ---- initialise ----------------------------------------------------------------------------------


def train(run: Run, parts: Parts | None = None) -> Report:
    """Runs `run` to its end, or on from where it stands; the one way in, also for the CLI.

    Outside a launcher, the plan's ranks are started on this machine (not with `parts`, which
    cannot travel). Raises CordeeError with exit code 2 before anything is started or written when
    the command or its input is wrong.
    """
    ready = get_ready(run, processes=1 if parts is not None else None)
    if ready.standing.finished is not None:
        return Report(ready.run.run.dir, 0, ready.standing.finished)
    if ready.launches:
        code = launch_ranks(ready.run, ready.plan)
        last = last_event(Path(ready.run.run.dir))
        return Report(ready.run.run.dir, code, last if last.get("event") == "finished" else None)
    return descend(ready, parts or Parts())


def descend(ready: Ready, parts: Parts) -> Report:
    """This process as one rank: join, build, load, walk, finish."""
    follow_parent()
    run, plan, told = ready.run, ready.plan, ready.told
    lock = locked(run) if told.rank == 0 else nullcontext()
    with (
        lock,
        leaving() as asked,
        world(told, plan.device, plan.threads, run.launch.timeout_s) as here,
    ):
        if told.local_rank == 0:
            lay_out_data(run)
        if told.size > 1:
            torch.distributed.barrier()
        state = build(run, plan, here, lay_out_data(run), parts)
        if here.first:
            record(run, plan)
        desk = Desk(state, asked)
        try:
            restore(state, desk)
            walk(state, desk)
            return finish(state, desk)
        finally:
            desk.close()


def restore(state: RunState, desk: Desk) -> None:
    """Loads the newest complete checkpoint, if there is one, and says how the run begins."""
    found, generation = choose_checkpoint(state, desk)
    began = {
        "layout": state.plan.layout.describe(), "ranks": state.world.size, "why": state.plan.why,
        "generation": generation, "entropy_bits": state.data.entropy_bits,
        "pid": state.world.pid, "rank": state.world.rank, "host": state.world.host,
    }  # fmt: skip
    if found is None:
        state.progress = Progress(generation=generation)
        desk.cut(state)
        desk.event("started", 0, began)
        return
    if found.meta.get("data") != state.data.fingerprint:
        raise DataError(
            "the checkpoint was made with other data",
            values={"there": found.meta.get("data"), "here": state.data.fingerprint},
            fix="give the data back its old content, or train in another run.dir",
        )
    shapes = {name: tuple(p.shape) for name, p in state.parameters.items()}
    mine = reader(found.read, found.shape, shapes, state.plan.layout, state.world.rank)
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            local(parameter).copy_(mine(f"model/{name}"))
    known = set(found.names())
    state.optimizer.load(lambda k: mine(f"optim/{k}") if f"optim/{k}" in known else None)
    state.sync.restore(found.meta["sync"])
    state.progress = replace(progress_of(found.meta), generation=generation)
    state.guard.in_a_row = state.progress.in_a_row
    desk.cut(state)
    desk.event("resumed", state.progress.step, {**began, "checkpoint": found.path.name})


def choose_checkpoint(state: RunState, desk: Desk) -> tuple[Checkpoint | None, int]:
    """Rank 0 looks for the newest checkpoint that verifies, all open that one: (it, generation)."""
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
    generation, step, old = gather_rows(row, state.mesh.workers, state.world.size)[0].tolist()
    if step < 0 or state.world.first:
        return found, generation
    return open_checkpoint(folder / f"step-{step:08d}.g{old}"), generation


# ---- iterate -------------------------------------------------------------------------------------


def walk(state: RunState, desk: Desk) -> None:
    """Steps until a limit is reached or somebody asks to leave."""
    run = state.run
    while desk.done(state) < 1.0 and not desk.leave:
        outcome = step(state, desk)
        number = state.progress.step
        desk.record(state, outcome)
        desk.keeper.settle(outcome.tally.saving)
        if outcome.verdict.say is Say.STOP:
            stop(state, desk, outcome)
        last = desk.done(state) >= 1.0
        if run.evaluate.every and number % run.evaluate.every == 0 and not last:
            desk.evaluated(state, measure(state))
        if desk.keeper.due(number) and not last:
            save(state, desk)


def step(state: RunState, desk: Desk) -> Outcome:
    """One optimiser step: microbatches -> backward -> agree -> clip -> judge -> commit or drop."""
    number = state.progress.step + 1
    desk.meter.begin()
    state.drill.point("step.start", number)
    scale = factor(state.run.optim, desk.done(state), state.progress.step)
    state.optimizer.set_lr(scale)

    losses, partial = state.engine.forward_backward(number - 1)
    state.drill.spoil(partial[0][1], number)
    state.drill.point("step.backward", number)

    with desk.meter.phase("comm"):
        tally = gather_tally(
            [float(loss) for loss in losses], desk.wishes(), state.ranges, state.mesh.workers
        )
        gradients = state.engine.place(state.sync.agree(partial))
    del partial
    state.drill.point("step.agree", number)

    norm = global_norm(gradients, state.by_rows, state.whole_rows)
    mean_losses = [loss / state.microbatch_tokens for loss in tally.losses]
    verdict = state.guard.judge(mean_losses, float(norm))
    layers = desk.layers(state, gradients, number)
    if verdict.say is Say.COMMIT:
        clip_gradients(state.named_gradients(gradients), state.run.clip, norm)
        state.optimizer.step()
        limit_parameters(state.groups, state.run.clip, state.total_squares)
    state.drill.point("step.commit", number)
    state.sync.settle(number)
    state.progress = desk.advance(state, tally, verdict)
    loss = math.fsum(mean_losses) / len(mean_losses)
    return Outcome(loss, float(norm), scale * state.optimizer.peak_lr, verdict, tally, layers)


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
    """Begins a checkpoint of this moment in the background."""
    changed = changed_sources(state.data) if state.world.first else []
    desk.data_changed(state.progress.step, changed)
    state.progress = replace(state.progress, in_a_row=state.guard.in_a_row)
    meta = describe(
        state.progress, state.sync.state(), state.data.fingerprint, state.plan.layout.describe()
    )
    mine = pieces(state.held(), state.plan.layout, state.world.rank)
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
    rows = max(1, run.batch.microbatch)
    count = max(1, run.evaluate.tokens // (rows * run.data.sequence))
    batches = list(held_out(state.held_out, run.data.sequence, rows, count))
    return evaluate(
        state.model,
        batches,
        (state.mesh.worker, state.world.size),
        lambda sums: gather_rows(sums, state.mesh.workers, state.world.size),
        state.data.bytes_per_token,
        run.run.precision == "bf16",
    )


def finish(state: RunState, desk: Desk) -> Report:
    """The last checkpoint, then (unless asked to leave) evaluation, sample, digest and report."""
    number = state.progress.step
    saved = save_last(state, desk)
    if desk.leave:
        desk.event("interrupted", number, {"signal": asked_by(desk), "saved": saved})
        desk.screen.say(f"left after step {number}; the same command goes on from there")
        return Report(state.run.run.dir, 128 + (desk.asked.number or signal.SIGINT))
    scored = measure(state)
    digest = weights_sha256(state.parameters, lambda name: whole(state.parameters[name]))
    text = sample(state)
    finished = {
        "weights_sha256": digest, "held_out_bits_per_byte": scored and scored.bits_per_byte,
        "held_out_loss": scored and scored.loss, "steps": number, "tokens": state.progress.tokens,
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


def whole(parameter: Tensor) -> Tensor:
    """A whole parameter from its shards (every rank of the island must ask)."""
    full = getattr(parameter, "full_tensor", None)
    return full() if full is not None else parameter


def sample(state: RunState) -> str | None:
    """A text that the model writes; every rank of a sharded island takes part."""
    run = state.run
    if not run.evaluate.sample or state.data.tokenizer != "bytes":
        return None
    if state.mesh.shards is None and not state.world.first:
        return None
    prompt = torch.tensor(list(SAMPLE_PROMPT.encode()), device=state.world.device)
    made = generate(state.model, prompt, run.evaluate.sample, run.data.sequence, 0.8, run.run.seed)
    return to_text(made)


# ---- leaving -------------------------------------------------------------------------------------


@dataclass
class Asked:
    """Whether a signal asked us to leave, and which."""

    number: int | None = None


def asked_by(desk: Desk) -> str:
    """The signal's name, or "another rank"."""
    number = desk.asked.number
    return signal.Signals(number).name if number else "another rank"


@contextmanager
def leaving() -> Iterator[Asked]:
    """Turns the first SIGINT or SIGTERM into a wish; the second one ends the process at once."""
    asked = Asked()

    def on_signal(number: int, _: FrameType | None) -> None:
        asked.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    try:
        before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's business
        before = {}
    try:
        yield asked
    finally:
        for number, action in before.items():
            signal.signal(number, action)


# ---- for the search of a learning rate -----------------------------------------------------------


def losses_at(run: Run, lr_of_step: Sequence[float], seed: int) -> list[float]:
    """Training loss before each update, in this process, with the learning rate of each step.

    Parameters, order of samples and dropout follow `seed`. Ends early after a loss or gradient that
    is not finite (the last value then is infinity). Writes nothing but the run's data.
    """
    values = {
        "run.seed": seed, "layout.islands": "auto", "layout.shard": "auto",
        "run.steps": max(1, len(lr_of_step)), "run.minutes": 0.0, "run.tokens": 0,
    }  # fmt: skip
    run = settle(override(run, values))
    data = lay_out_data(run)
    plan = make_plan(run, local_cluster(), data.vocabulary, 1)
    losses: list[float] = []
    with world(Launched(), plan.device, plan.threads, run.launch.timeout_s) as here:
        state = build(run, plan, here, data, Parts())
        for number, rate in enumerate(lr_of_step):
            state.optimizer.set_lr(rate / state.optimizer.peak_lr)
            sums, partial = state.engine.forward_backward(number)
            loss = math.fsum(map(float, sums)) / state.step_tokens
            gradients = state.engine.place(state.sync.agree(partial))
            norm = global_norm(gradients, state.by_rows)
            if not (math.isfinite(loss) and math.isfinite(float(norm))):
                losses.append(math.inf)
                break
            losses.append(loss)
            clip_gradients(state.named_gradients(gradients), run.clip, norm)
            state.optimizer.step()
    return losses
