"""All that happens before a rank exists: settle, check, look at the folder, lay out the data.

Paper but for numpy: the launching process needs no torch. Whatever is wrong with the command or its
input is found here, before anything is started or written. Not here: the run itself (`train.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from cordee.config.check import DEFAULT_MINUTES, check, check_threads
from cordee.config.hub import on_paper
from cordee.config.load import RUN_FILE, at_home, differences, dump, flatten, load, override
from cordee.config.model import USUAL_PRESET
from cordee.config.run import Run
from cordee.data.builtin import MARKOV, MARKOV_SYMBOLS
from cordee.data.manifest import DatasetInfo, is_dataset, read_info
from cordee.data.mixed import is_mixture, sources_of
from cordee.data.prepare import check_length, resolve
from cordee.data.records import check_images
from cordee.data.snapshot import is_of, make, remove, state_of
from cordee.dist.start import (
    PLAN_FILE,
    Launched,
    arithmetic_environment,
    chosen_variables,
    compiler,
    launched,
    may_take,
    raise_limits,
    take_arithmetic,
)
from cordee.dist.streams import say
from cordee.errors import ConfigError, DataError, RunError
from cordee.fault.course import Post
from cordee.fault.hold import Hold
from cordee.fault.supervise import supervise
from cordee.machine import measured_cluster
from cordee.metrics.lines import records
from cordee.metrics.sinks import write_whole
from cordee.plan.arithmetic import choose_arithmetic
from cordee.plan.cluster import local_cluster, processor_flags
from cordee.plan.devices import with_precision
from cordee.plan.plan import (
    Plan,
    devices_of,
    holds_plan,
    make_plan,
    on_devices,
    unpredicted,
    with_islands,
)
from cordee.plan.profile import cores
from cordee.plan.recipe import follows_clock, for_machine, recorded_recipe, with_evaluation
from cordee.rendezvous import check_addresses, check_meeting, end_of, interface, meet, several

RESOLVED = ("run.precision", "evaluate.tokens", "evaluate.sample")
"""Keys that are "auto" until a run begins."""
JOIN_WAIT_S = 30.0
"""How long a host that joins waits for run.toml, which the first rank of the run writes."""
DATA_FOLDER = "data"
LOCK_FILE = "lock"
RECORDS = ("events.jsonl", "metrics.jsonl", "layers.jsonl", "checkpoints")
"""What a run writes into its folder after run.toml."""


@dataclass(frozen=True)
class Standing:
    """What a run's folder says: `finished` is the last event of a run that is at its end."""

    finished: dict[str, Any] | None


def settle(run: Run) -> Run:
    """Fills what depends on other keys: name, folder and a limit; checks everything on paper."""
    run = at_home(run)
    name = run.run.name or run.model.name
    values: dict[str, Any] = {"run.name": name, "run.dir": run.run.dir or f"runs/{name}"}
    limits = run.run
    if not (limits.steps or limits.tokens or limits.epochs or limits.minutes):
        values["run.minutes"] = DEFAULT_MINUTES
    own = not (run.model.hub or follows_clock(override(run, values)))
    if run.model.preset == "auto" and own:
        values["model.preset"] = USUAL_PRESET
    settled = override(run, values)
    check(settled)
    check_addresses(settled)
    return settled


def as_recorded(run: Run) -> Run:
    """The run with what it resolved when it began, where its folder says so: it keeps its recipe,
    its precision and what it evaluates. A host that joins waits for the founder's file."""
    file = Path(run.run.dir) / RUN_FILE
    limit, lock = time.monotonic() + JOIN_WAIT_S, file.with_name(LOCK_FILE)
    before = flatten(run)
    opens = follows_clock(run) or any(before[key] == "auto" for key in RESOLVED)
    waits = opens and run.launch.join and os.path.isfile(lock)
    while waits and not os.path.isfile(file) and time.monotonic() < limit:
        time.sleep(0.1)
    if not os.path.isfile(file):
        return run
    recorded = load(str(file)).run
    if follows_clock(run):
        run = recorded_recipe(run, recorded)
    before, values = flatten(run), flatten(recorded)
    return override(run, {key: values[key] for key in RESOLVED if before[key] == "auto"})


def look(run: Run, brought: str = "") -> Standing:
    """Reads the run's folder; ConfigError when it belongs to another run or may not be resumed.
    `brought` names the model that the caller brings."""
    folder = Path(run.run.dir)
    kept = folder / RUN_FILE
    if not os.path.exists(kept):  # also where a path is too long to be one
        _refuse_foreign(folder)
        return Standing(None)
    other = load(str(kept)).run
    changed = differences(_with_arithmetic(other, run), run)
    if changed:
        shown = {key: f"{old!r} -> {new!r}" for key, (old, new) in changed.items()}
        raise ConfigError(
            f"the folder {folder} belongs to another run; these keys differ (there -> here)",
            values=shown,
            fix=f"run.dir={_free_name(folder)}, or the same keys again to go on with that run",
        )
    first = next(records(folder / "events.jsonl"), {})
    if brought != first.get("brought", brought):
        there, here = (name or "the house's own" for name in (first["brought"], brought))
        raise ConfigError(
            f"the folder {folder} belongs to a run of another model",
            values={"there": there, "here": here},
            fix=f"run.dir={_free_name(folder)}, or bring that model again to go on with that run",
        )
    if run.run.resume == "never":
        raise ConfigError(
            "the folder holds a run already and run.resume=never",
            values={"run.dir": str(folder)},
            fix=f"run.dir={_free_name(folder)}, or run.resume=auto",
        )
    return Standing(end_of(run))


def find_data(run: Run) -> Path | None:
    """Where the dataset of this start lies; None when a snapshot is to be made first.

    DataError when `data` in the run's folder is nothing that a run made there for what is asked:
    it is not used for something else, and not removed.
    """
    place, path = Path(run.run.dir) / DATA_FOLDER, Path(run.data.path)
    if is_dataset(place) and (_has_begun(Path(run.run.dir)) or run.launch.join):
        return place
    prepared = is_dataset(path)
    if prepared and is_dataset(place) and os.path.samefile(place, path):
        return path
    state = state_of(place, run)
    if state == "other" and (is_dataset(place) or not prepared):
        whose = "a dataset" if is_dataset(place) else "something"
        raise DataError(
            f"the run's folder has {whose} called {DATA_FOLDER} that was not made there for this"
            " run; it is not used, and nothing of it is touched",
            values={"there": str(place), "data.path": run.data.path},
            fix=f"run.dir={_free_name(place.parent)}"
            + (f", or data.path={place}" if is_dataset(place) else ""),
        )
    if prepared:
        # A snapshot of other data would be taken for the run's own at the next start.
        return None if state in ("same", "own") else path
    return place if state == "same" else None


def _with_arithmetic(recorded: Run, run: Run) -> Run:
    """A recorded run, with its arithmetic where `run` leaves it open. What was recorded before
    there was that setting was native."""
    there = "native" if recorded.run.arithmetic == "auto" else recorded.run.arithmetic
    free = run.run.arithmetic == "auto"
    return override(recorded, {"run.arithmetic": "auto" if free else there})


def settle_arithmetic(run: Run, device: str, here: bool) -> tuple[Run, str]:
    """The run with run.arithmetic resolved for its devices, and why in words: as its folder has it,
    else by this host's processor. `here`: this very process is to compute, which cannot choose any
    more once torch is imported. ConfigError: this host cannot."""
    kept = Path(run.run.dir) / RUN_FILE
    if run.run.arithmetic == "auto" and kept.exists():
        there = load(str(kept)).run.run.arithmetic
        run = override(run, {"run.arithmetic": "native" if there == "auto" else there})
        why = "as the run began"
    else:
        why = ""
    flags, variables = processor_flags(), chosen_variables()
    chosen, reason = choose_arithmetic(run.run, device, flags, variables)
    if run.run.arithmetic == "auto" and here and not may_take(chosen):
        chosen, reason = "native", "torch was imported before the run"
    return override(run, {"run.arithmetic": chosen}), why or reason


def lay_out_data(run: Run) -> DatasetInfo:
    """The run's dataset: a prepared folder as it is, anything else as a snapshot in the run.

    For the one process that holds the run's folder. A snapshot makes later changes of the source
    harmless. DataError when it is shorter than a sequence; then nothing stays behind.
    """
    place, path = Path(run.run.dir) / DATA_FOLDER, Path(run.data.path)
    there = find_data(run)
    if there is None and not is_dataset(path):
        return make(run, place)
    if there is None:
        remove(place)
    return _read_data(run, there or path)


def open_data(run: Run, supervised: bool) -> DatasetInfo:
    """The dataset that was laid out, for a rank that only reads it. Laid out here when there is
    none in sight (another host without a common disk), under the supervisor's lock or its own."""
    place = data_place(run, Path(run.run.dir))
    if is_dataset(place):
        return _read_data(run, place)
    with nullcontext() if supervised else locked(run):
        return lay_out_data(run)


def _read_data(run: Run, place: Path) -> DatasetInfo:
    info = read_info(place)
    check_images(info, run.model)
    check_length(info, run.data.sequence)
    return info


def data_place(run: Run, folder: Path) -> Path:
    """Where the dataset of the run in `folder` lies: the snapshot there, or a prepared folder."""
    place = folder / DATA_FOLDER
    is_own = is_dataset(place) and (_has_begun(folder) or run.launch.join or is_of(place, run))
    return place if is_own else Path(run.data.path)


def _has_begun(folder: Path) -> bool:
    """Whether a run has begun in `folder`: its data is then the run's, also of versions that wrote
    no marker. A run.toml alone may be a user's own file."""
    return (folder / RUN_FILE).exists() and any((folder / name).exists() for name in RECORDS)


def record(
    run: Run, plan: Plan, underway: bool = False, arithmetic: Mapping[str, str] | None = None
) -> str:
    """Writes run.toml (only once) and plan.json (of this start) into the run's folder; "", or what
    the disk refused. `arithmetic`: what computes, where bits are promised. RunError: run.toml is
    not there, without which nobody comes back to the run; never when it is `underway`: who holds
    the state goes on in memory."""
    folder = Path(run.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RUN_FILE).exists():
            write_whole(folder / RUN_FILE, dump(run, arithmetic).encode())
        write_whole(folder / PLAN_FILE, plan.to_json().encode() + b"\n")
    except OSError as error:
        there = (folder / RUN_FILE).is_file()
        cause = f"{PLAN_FILE if there else RUN_FILE}: {error.strerror or error}"
        if underway or there:
            return cause
        raise RunError(
            "the run's folder cannot be written",
            values={"run.dir": str(folder), "cause": cause},
            fix="make room, or run.dir=... on another disk",
        ) from error
    return ""


@contextmanager
def locked(run: Run) -> Iterator[Hold]:
    """Holds the run's folder; ConfigError when another process has it. Freed by any death. A host
    that joins only opens the lock: it shares the folder once it is let in."""
    folder, lock = Path(run.run.dir), Path(run.run.dir) / LOCK_FILE
    missing = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    fresh = not (run.launch.join or os.path.lexists(lock))
    try:
        with closing(_open_lock(folder)) as hold:
            if not run.launch.join and not hold.take():
                raise ConfigError(
                    "another process trains in this folder",
                    values={"run.dir": str(folder), "pid": hold.holder()},
                    fix=f"wait for it, or run.dir={_free_name(folder)}",
                )
            if run.launch.listen:
                hold.share(anew=True)
            try:
                yield hold
            except (ConfigError, DataError):
                if fresh and not (folder / RUN_FILE).exists():
                    lock.unlink(missing_ok=True)
                raise
    except (ConfigError, DataError):  # refused before it began: what it made goes, if it is empty
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def _open_lock(folder: Path) -> Hold:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hold = Hold(folder / LOCK_FILE)
    except OSError as error:
        raise ConfigError(
            f"the run's folder cannot be written: {error.strerror}",
            values={"run.dir": str(folder)},
            fix="run.dir=... in a place that you may write to, on a disk with room",
        ) from error
    if hold.is_lock():
        return hold
    hold.close()
    raise ConfigError(
        f"the folder has a file called {LOCK_FILE} that no run wrote; it is not touched",
        values={"run.dir": str(folder)},
        fix=f"run.dir={_free_name(folder)}",
    )


def launch_ranks(run: Run, plan: Plan) -> int:
    """Starts the plan's ranks of this very run on this machine and keeps them running, with those
    of other hosts if there are any; the run's exit code."""
    words = [f"{key}={value}" for key, value in _overrides(run).items()]
    cluster, planned = devices_of(run, local_cluster()), on_paper(run)
    symbols = vocabulary_of(run)

    @cache
    def made_for(islands: int, others: tuple[str, ...]) -> tuple[str, int]:
        made = with_islands(plan, planned, cluster, symbols, islands)
        made = on_devices(made, planned, others)
        return made.to_json(), made.layout.island

    def plan_for(islands: int, devices: Sequence[str] = ()) -> tuple[str, int]:
        return made_for(islands, () if set(devices) <= {plan.device} else tuple(devices))

    fault, layout = run.fault, plan.layout
    raise_limits()
    with locked(run) as hold, arithmetic_environment(run.run.arithmetic):
        post = Post(
            command=["train", *words],
            plan=plan.to_json(),
            plan_for=plan_for,
            inside=layout.size // layout.island,
            wants=plan.processes,
            spares=fault.spares if fault.recover else 0,
            threads=plan.threads,
            silence_s=fault.silence_s,
            start_s=run.launch.timeout_s,
            tries=fault.tries,
            recover=fault.recover,
            hold=hold,
            drills=fault.kills,
            interface=interface(run),
        )
        data = read_info(data_place(run, Path(run.run.dir))).fingerprint
        island = replace(layout, island=1).describe()
        return supervise(post, meet(run, data, island, plan.device))


def _overrides(run: Run) -> dict[str, str]:
    """The run as overrides on what its model implies: what the ranks' command line needs."""
    words = {
        key: str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in flatten(run).items()
    }
    model = [f"{key}={word}" for key, word in words.items() if key.startswith("model.")]
    before, now = flatten(load(None, model).run), flatten(run)
    return {k: w for k, w in words.items() if before[k] != now[k] or k.startswith("model.")}


def _refuse_foreign(folder: Path) -> None:
    """A folder with a run's records but no run.toml is damaged or not ours."""
    strays = [n for n in RECORDS if os.path.lexists(folder / n)]
    if strays:
        raise ConfigError(
            "the folder holds records of a run but no run.toml",
            values={"run.dir": str(folder), "found": strays},
            fix=f"run.dir={_free_name(folder)}",
        )
    if os.path.lexists(folder / PLAN_FILE) and not holds_plan(folder / PLAN_FILE):
        raise ConfigError(
            f"the folder has a file called {PLAN_FILE} that is no plan, and a run writes one",
            values={"run.dir": str(folder)},
            fix=f"run.dir={_free_name(folder)}",
        )


def _free_name(folder: Path) -> str:
    if folder.name in ("", ".."):  # . and the like
        folder = Path(os.path.realpath(folder))
    number = 2
    while os.path.lexists(free := folder.parent / f"{folder.name or 'run'}-{number}"):
        number += 1
    return str(free)


@dataclass(frozen=True)
class Brought:
    """What a caller brings, as far as paper must know it: the type's name and the parameters of a
    model ("" and 0: the house's), whether there are samples, whether there is anything at all."""

    model: str = ""
    parameters: int = 0
    data: bool = False
    any: bool = False


@dataclass(frozen=True)
class Ready:
    """A run that may begin: settled, checked, planned. `launches`: this process starts ranks."""

    run: Run
    plan: Plan
    told: Launched
    standing: Standing
    launches: bool
    arithmetic: str = ""
    """Which instructions compute, and why, in words; "" where bits are not promised."""


def get_ready(run: Run, brought: Brought = Brought()) -> Ready:
    """Everything that can be found wrong before anything is started or written.

    What is `brought` cannot travel to other processes: outside a launcher there is one. When ranks
    are to be launched, the data is laid out here, by the one process there is.
    """
    run = settle(run)
    told = launched()
    if not told.supervised:
        run = as_recorded(run)
    if several(run) and not told.supervised:  # one supervisor a host, whatever started it
        told = Launched()
    # A worker's supervisor has looked; by now the run itself may have written there.
    standing = Standing(None) if told.supervised else look(run, brought.model)
    wanted = None if told.supervised else _processes(run, told, 1 if brought.any else None)
    if made := told.read_plan():
        plan = Plan.from_json(made)
    else:
        # A launcher's other ranks take rank 0's plan: they need no profile of their own.
        probes = run.launch.probe and told.rank == 0 and standing.finished is None
        cluster, profile = measured_cluster(probes)
        cluster = replace(cluster, hosts=told.hosts)
        symbols = vocabulary_of(run)
        begins = not os.path.isfile(Path(run.run.dir) / RUN_FILE)
        if begins and not brought.any:
            run, text = for_machine(run, cluster, symbols, wanted)
            if text and told.rank == 0:
                say(f"recipe  {text}")
        run = with_precision(run, devices_of(run, cluster))
        planned = on_paper(run)
        if told.by_launcher or brought.any:  # nobody would come back to a copy
            planned = override(planned, {"fault.copy_every": 0})
        if not brought.model:
            _check_vocabulary(planned, symbols)
        plan = replace(make_plan(planned, cluster, symbols, wanted), profile=profile)
        if brought.model:
            plan = unpredicted(plan, brought.parameters)
        rate = plan.predicted.tokens_per_s
        run = with_evaluation(run, rate, rate / plan.processes)
    check_compiler(run, plan.device)
    if not told.supervised:
        check_threads(run, cores())
    reads = not (brought.data or told.supervised or standing.finished)
    if reads and find_data(run) in (None, Path(run.data.path)):
        resolve(run.data.path, run.model, run.data.weights)
    wanted_here = plan.processes > 1 or several(run)
    launches = wanted_here and not told.by_launcher and standing.finished is None
    run, why = settle_arithmetic(run, plan.device, not launches)
    if not launches and standing.finished is None:
        take_arithmetic(run.run.arithmetic)
    if launches and run.launch.join:
        _check_shared(run)
        check_meeting(run)
    elif launches:
        check_meeting(run)
        with locked(run):
            look(run, brought.model)  # again: another run may have begun before the lock was ours
            lay_out_data(run)
    says = f"{run.run.arithmetic} ({why})" if run.run.exact else ""
    return Ready(run, plan, told, standing, launches, says)


def _check_shared(run: Run) -> None:
    """ConfigError when this host does not see the folder of the run that it wants to join."""
    folder = Path(run.run.dir)
    if not (is_dataset(data_place(run, folder)) and (folder / LOCK_FILE).exists()):
        raise ConfigError(
            "there is no run in this folder yet; the hosts of a run share its folder",
            values={"run.dir": run.run.dir, "launch.join": run.launch.join},
            fix="run.dir=... as the first host sees it (start that one first)",
        )


def check_compiler(run: Run, device: str) -> None:
    """ConfigError when blocks are to be compiled and this host has nothing to compile with."""
    name, there = compiler(device)
    if run.run.compile == "blocks" and not there:
        raise ConfigError(
            "run.compile needs a compiler and Python's headers on every host",
            values={"run.compile": run.run.compile, "compiler": name},
            fix="run.compile=none, or install them (the environment variable CXX, on CUDA CC,"
            " names another compiler)",
        )


def _check_vocabulary(run: Run, symbols: int) -> None:
    if run.model.vocabulary and run.model.vocabulary < symbols:
        raise ConfigError(
            "the data has more symbols than the model's vocabulary",
            values={"model": run.model.name, "vocabulary": run.model.vocabulary, "data": symbols},
            fix="data of that vocabulary (cordee data prepare)" if run.model.hub
            else f"model.vocabulary={symbols}",
        )  # fmt: skip


def vocabulary_of(run: Run) -> int:
    """Size of the vocabulary before the data is read."""
    path = run.data.path
    for source in sources_of(path) if is_mixture(path) else [path]:
        if is_dataset(Path(source)):
            return read_info(Path(source)).vocabulary
    return MARKOV_SYMBOLS if run.data.path == MARKOV else 256


def _processes(run: Run, told: Launched, forced: int | None) -> int | None:
    if not told.by_launcher:
        return forced
    if run.launch.processes not in ("auto", told.size):
        raise ConfigError(
            "the launcher started another number of ranks than the run wants",
            values={"launch.processes": run.launch.processes, "ranks": told.size},
            fix="leave launch.processes out under a launcher",
        )
    return told.size
