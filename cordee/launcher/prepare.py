"""All that happens before a rank exists: settle, check, look at the folder, lay out the data.

The launching process needs no torch. Whatever is wrong with the command or its input is found here,
before anything is started or written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from cordee.config.from_hf import with_hub_shape
from cordee.config.load import RUN_FILE, differences, dump, expand_paths, flatten, load, override
from cordee.config.model import DEFAULT_PRESET
from cordee.config.run import Run
from cordee.config.validate import DEFAULT_MINUTES, check_threads, validate_run
from cordee.data.corpora import MARKOV, MARKOV_SYMBOLS
from cordee.data.manifest import DatasetInfo, is_dataset, read_info
from cordee.data.prepare import check_sources, check_split_lengths
from cordee.data.snapshot import classify_snapshot, make_snapshot, matches_request, remove_snapshot
from cordee.data.writer import split_sources
from cordee.dist.process_group import (
    PLAN_FILE,
    LaunchInfo,
    arithmetic_environment,
    can_set_arithmetic,
    find_compiler,
    present_cpu_variables,
    raise_file_limit,
    read_launch_info,
    set_arithmetic,
)
from cordee.dist.streams import print_to_stderr
from cordee.elastic.run_lock import RunLock
from cordee.elastic.run_progress import SupervisorConfig
from cordee.elastic.supervisor import Supervisor
from cordee.errors import ConfigError, DataError, RunError
from cordee.launcher.local_cluster import measure_cluster
from cordee.launcher.rendezvous import (
    check_addresses,
    check_rendezvous,
    is_multi_host,
    make_rendezvous_config,
    network_interface,
    read_end_event,
)
from cordee.planner.cluster import choose_arithmetic, local_cluster, processor_flags, with_precision
from cordee.planner.plan import (
    Plan,
    is_plan_file,
    make_plan,
    select_cluster,
    with_devices,
    with_islands,
    without_prediction,
)
from cordee.planner.profile import usable_cores
from cordee.planner.recipe import (
    follows_clock,
    resolve_for_machine,
    restore_recipe,
    with_evaluation,
)
from cordee.report.metrics_writer import write_atomically
from cordee.report.reader import iter_records

AUTO_KEYS = ("run.precision", "evaluate.tokens", "evaluate.sample")
"""Keys that are "auto" until a run begins."""
JOIN_WAIT_S = 30.0
"""How long a host that joins waits for run.toml, which the first rank of the run writes."""
DATA_FOLDER = "data"
LOCK_FILE = "lock"
WORKER_MODULES = ("cordee.cli.main", "cordee.cli.train", "cordee.training.worker", "numpy.random")
"""What every worker imports before its first step."""
AXIS_MODULES = {"shard": "torch.distributed.fsdp", "pipeline": "torch.distributed.pipelining"}
"""What it needs besides where an axis is cut."""
RUN_OUTPUTS = ("events.jsonl", "metrics.jsonl", "layers.jsonl", "checkpoints")
"""What a run writes into its folder after run.toml."""


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder says: `end_event` is the last event of a run that is at its end."""

    end_event: dict[str, Any] | None


def resolve_config(run: Run) -> Run:
    """Fills what depends on other keys: name, folder and a limit; checks everything on paper."""
    run = expand_paths(run)
    name = run.run.name or run.model.name
    values: dict[str, Any] = {"run.name": name, "run.dir": run.run.dir or f"runs/{name}"}
    limits = run.run
    if not (limits.steps or limits.tokens or limits.epochs or limits.minutes):
        values["run.minutes"] = DEFAULT_MINUTES
    needs_preset = not (run.model.hub or follows_clock(override(run, values)))
    if run.model.preset == "auto" and needs_preset:
        values["model.preset"] = DEFAULT_PRESET
    resolved_run = override(run, values)
    validate_run(resolved_run)
    check_addresses(resolved_run)
    return resolved_run


def apply_recorded_settings(run: Run) -> Run:
    """The run with what it resolved when it began, where its folder says so: it keeps its recipe,
    its precision and what it evaluates. A host that joins waits for the founder's file."""
    run_file = Path(run.run.dir) / RUN_FILE
    deadline_s, lock = time.monotonic() + JOIN_WAIT_S, run_file.with_name(LOCK_FILE)
    settings = flatten(run)
    has_open_keys = follows_clock(run) or any(settings[key] == "auto" for key in AUTO_KEYS)
    must_wait = has_open_keys and run.launch.join and os.path.isfile(lock)
    while must_wait and not os.path.isfile(run_file) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    if not os.path.isfile(run_file):
        return run
    recorded_run = load(str(run_file)).run
    if follows_clock(run):
        run = restore_recipe(run, recorded_run)
    settings, recorded_settings = flatten(run), flatten(recorded_run)
    return override(
        run, {key: recorded_settings[key] for key in AUTO_KEYS if settings[key] == "auto"}
    )


def inspect_run_dir(run: Run, model_name: str = "") -> RunStatus:
    """Reads the run's folder; ConfigError when it belongs to another run or may not be resumed.
    `model_name` names the model that the caller brings."""
    folder = Path(run.run.dir)
    run_file = folder / RUN_FILE
    if not os.path.exists(run_file):  # also where a path is too long to be one
        _reject_foreign_files(folder)
        return RunStatus(None)
    recorded_run = load(str(run_file)).run
    changes = differences(_with_arithmetic(recorded_run, run), run)
    if changes:
        change_texts = {
            key: f"{old_value!r} -> {new_value!r}"
            for key, (old_value, new_value) in changes.items()
        }
        raise ConfigError(
            f"the folder {folder} belongs to another run; these keys differ (there -> here)",
            values=change_texts,
            fix=f"run.dir={_unused_dir(folder)}, or the same keys again to go on with that run",
        )
    first_event = next(iter_records(folder / "events.jsonl"), {})
    if model_name != first_event.get("brought", model_name):
        recorded_model, caller_model = (
            name or "the house's own" for name in (first_event["brought"], model_name)
        )
        raise ConfigError(
            f"the folder {folder} belongs to a run of another model",
            values={"there": recorded_model, "here": caller_model},
            fix=f"run.dir={_unused_dir(folder)}, or bring that model again to go on with that run",
        )
    if run.run.resume == "never":
        raise ConfigError(
            "the folder holds a run already and run.resume=never",
            values={"run.dir": str(folder)},
            fix=f"run.dir={_unused_dir(folder)}, or run.resume=auto",
        )
    return RunStatus(read_end_event(run))


def find_dataset_dir(run: Run) -> Path | None:
    """Where the dataset of this start lies; None when a snapshot is to be made first.

    DataError when `data` in the run's folder is nothing that a run made there for what is asked:
    it is not used for something else, and not removed.
    """
    snapshot_dir, source_path = Path(run.run.dir) / DATA_FOLDER, Path(run.data.path)
    if is_dataset(snapshot_dir) and (_has_run(Path(run.run.dir)) or run.launch.join):
        return snapshot_dir
    is_prepared = is_dataset(source_path)
    if is_prepared and is_dataset(snapshot_dir) and os.path.samefile(snapshot_dir, source_path):
        return source_path
    snapshot_state = classify_snapshot(snapshot_dir, run)
    if snapshot_state == "other" and (is_dataset(snapshot_dir) or not is_prepared):
        content = "a dataset" if is_dataset(snapshot_dir) else "something"
        raise DataError(
            f"the run's folder has {content} called {DATA_FOLDER} that was not made there for this"
            " run; it is not used, and nothing of it is touched",
            values={"there": str(snapshot_dir), "data.path": run.data.path},
            fix=f"run.dir={_unused_dir(snapshot_dir.parent)}"
            + (f", or data.path={snapshot_dir}" if is_dataset(snapshot_dir) else ""),
        )
    if is_prepared:
        # A snapshot of other data would be taken for the run's own at the next start.
        return None if snapshot_state in ("same", "own") else source_path
    return snapshot_dir if snapshot_state == "same" else None


def _with_arithmetic(recorded_run: Run, run: Run) -> Run:
    """A recorded run, with its arithmetic where `run` leaves it open. What was recorded
    before there was that setting was native."""
    recorded_mode = (
        "native" if recorded_run.run.arithmetic == "auto" else recorded_run.run.arithmetic
    )
    is_auto = run.run.arithmetic == "auto"
    return override(recorded_run, {"run.arithmetic": "auto" if is_auto else recorded_mode})


def resolve_arithmetic(run: Run, device: str, in_process: bool) -> tuple[Run, str]:
    """The run with run.arithmetic resolved for its devices, and why in words: as its folder has it,
    else by this host's processor. `in_process`: this very process is to compute, which cannot
    choose any more once torch is imported. ConfigError: this host cannot."""
    run_file = Path(run.run.dir) / RUN_FILE
    if run.run.arithmetic == "auto" and run_file.exists():
        recorded_mode = load(str(run_file)).run.run.arithmetic
        run = override(
            run, {"run.arithmetic": "native" if recorded_mode == "auto" else recorded_mode}
        )
        recorded_reason = "as the run began"
    else:
        recorded_reason = ""
    flags, variables = processor_flags(), present_cpu_variables()
    mode, reason = choose_arithmetic(run.run, device, flags, variables)
    if run.run.arithmetic == "auto" and in_process and not can_set_arithmetic(mode):
        mode, reason = "native", "torch was imported before the run"
    return override(run, {"run.arithmetic": mode}), recorded_reason or reason


def prepare_dataset(run: Run) -> DatasetInfo:
    """The run's dataset: a prepared folder as it is, anything else as a snapshot in the run.

    For the one process that holds the run's folder. A snapshot makes later changes of the source
    harmless. DataError when it is shorter than a sequence; then nothing stays behind.
    """
    snapshot_dir, source_path = Path(run.run.dir) / DATA_FOLDER, Path(run.data.path)
    dataset_dir = find_dataset_dir(run)
    if dataset_dir is None and not is_dataset(source_path):
        return make_snapshot(run, snapshot_dir)
    if dataset_dir is None:
        remove_snapshot(snapshot_dir)
    return _read_dataset_info(run, dataset_dir or source_path)


def read_or_prepare_dataset(run: Run, is_supervised: bool) -> DatasetInfo:
    """The dataset that was laid out, for a rank that only reads it. Laid out here when there is
    none in sight (another host without a common disk), under the supervisor's lock or its own."""
    dataset_dir = dataset_dir_of(run, Path(run.run.dir))
    if is_dataset(dataset_dir):
        return _read_dataset_info(run, dataset_dir)
    with nullcontext() if is_supervised else acquire_run_lock(run):
        return prepare_dataset(run)


def _read_dataset_info(run: Run, dataset_dir: Path) -> DatasetInfo:
    info = read_info(dataset_dir)
    check_split_lengths(info, run.data.sequence)
    return info


def dataset_dir_of(run: Run, folder: Path) -> Path:
    """Where the dataset of the run in `folder` lies: the snapshot there, or a prepared folder."""
    snapshot_dir = folder / DATA_FOLDER
    is_own = is_dataset(snapshot_dir) and (
        _has_run(folder) or run.launch.join or matches_request(snapshot_dir, run)
    )
    return snapshot_dir if is_own else Path(run.data.path)


def _has_run(folder: Path) -> bool:
    """Whether a run has begun in `folder`: its data is then the run's, also of versions that wrote
    no marker. A run.toml alone may be a user's own file."""
    return (folder / RUN_FILE).exists() and any((folder / name).exists() for name in RUN_OUTPUTS)


def write_run_files(
    run: Run, plan: Plan, has_state: bool = False, arithmetic: Mapping[str, str] | None = None
) -> str:
    """Writes run.toml (only once) and plan.json (of this start) into the run's folder; "", or what
    the disk refused. `arithmetic`: what computes, where bits are promised. RunError: run.toml is
    not there, without which nobody comes back to the run; never when it is `has_state`: who holds
    the state goes on in memory."""
    folder = Path(run.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RUN_FILE).exists():
            write_atomically(folder / RUN_FILE, dump(run, arithmetic).encode())
        write_atomically(folder / PLAN_FILE, plan.to_json().encode() + b"\n")
    except OSError as error:
        run_file_exists = (folder / RUN_FILE).is_file()
        cause = f"{PLAN_FILE if run_file_exists else RUN_FILE}: {error.strerror or error}"
        if has_state or run_file_exists:
            return cause
        raise RunError(
            "the run's folder cannot be written",
            values={"run.dir": str(folder), "cause": cause},
            fix="make room, or run.dir=... on another disk",
        ) from error
    return ""


@contextmanager
def acquire_run_lock(run: Run) -> Iterator[RunLock]:
    """Holds the run's folder; ConfigError when another process has it. Freed by any death. A host
    that joins only opens the lock: it shares the folder once it is let in."""
    folder, lock_file = Path(run.run.dir), Path(run.run.dir) / LOCK_FILE
    missing_dirs = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    is_new_lock = not (run.launch.join or os.path.lexists(lock_file))
    try:
        with closing(_open_run_lock(folder)) as run_lock:
            if not run.launch.join and not run_lock.acquire_exclusive():
                raise ConfigError(
                    "another process trains in this folder",
                    values={"run.dir": str(folder), "pid": run_lock.holder()},
                    fix=f"wait for it, or run.dir={_unused_dir(folder)}",
                )
            if run.launch.listen:
                run_lock.acquire_shared(from_exclusive=True)
            try:
                yield run_lock
            except (ConfigError, DataError):
                if is_new_lock and not (folder / RUN_FILE).exists():
                    lock_file.unlink(missing_ok=True)
                raise
    except (ConfigError, DataError):  # refused before it began: what it made goes, if it is empty
        with suppress(OSError):
            for parent in missing_dirs:
                parent.rmdir()
        raise


def _open_run_lock(folder: Path) -> RunLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run_lock = RunLock(folder / LOCK_FILE)
    except OSError as error:
        raise ConfigError(
            f"the run's folder cannot be written: {error.strerror}",
            values={"run.dir": str(folder)},
            fix="run.dir=... in a place that you may write to, on a disk with room",
        ) from error
    if run_lock.is_lock_file():
        return run_lock
    run_lock.close()
    raise ConfigError(
        f"the folder has a file called {LOCK_FILE} that no run wrote; it is not touched",
        values={"run.dir": str(folder)},
        fix=f"run.dir={_unused_dir(folder)}",
    )


def launch_local_ranks(run: Run, plan: Plan) -> int:
    """Starts the plan's ranks of this very run on this machine and keeps them running, with those
    of other hosts if there are any; the run's exit code."""
    cluster, planner_run = select_cluster(run, local_cluster()), with_hub_shape(run)
    vocabulary = read_vocabulary_size(run)

    @cache
    def make_island_plan(islands: int, device_kinds: tuple[str, ...]) -> tuple[str, int]:
        island_plan = with_islands(plan, planner_run, cluster, vocabulary, islands)
        island_plan = with_devices(island_plan, planner_run, device_kinds)
        return island_plan.to_json(), island_plan.layout.island

    def plan_for(islands: int, devices: Sequence[str] = ()) -> tuple[str, int]:
        return make_island_plan(islands, () if set(devices) <= {plan.device} else tuple(devices))

    fault, layout = run.fault, plan.layout
    raise_file_limit()
    with acquire_run_lock(run) as run_lock, arithmetic_environment(run.run.arithmetic):
        supervisor_config = SupervisorConfig(
            worker_config=dump_run_and_plan(run, plan),
            replan=plan_for,
            island_size=layout.size // layout.island,
            num_ranks=plan.processes,
            spares=fault.spares if fault.recover else 0,
            threads=plan.threads,
            heartbeat_timeout_s=fault.silence_s,
            startup_timeout_s=run.launch.timeout_s,
            max_failures=fault.tries,
            recover=fault.recover,
            run_lock=run_lock,
            drills=fault.kill_specs,
            interface=network_interface(run),
            preload=(
                *WORKER_MODULES,
                *(name for axis, name in AXIS_MODULES.items() if getattr(layout, axis) > 1),
            ),
            no_fork_cause=no_fork_cause(run, plan.device),
        )
        fingerprint = read_info(dataset_dir_of(run, Path(run.run.dir))).fingerprint
        island_layout = replace(layout, island=1).describe()
        rendezvous = make_rendezvous_config(run, fingerprint, island_layout, plan.device)
        return Supervisor(supervisor_config, rendezvous).run()


def no_fork_cause(run: Run, device: str) -> str:
    """Why workers of a run on this kind of device cannot be forks; "" when they can."""
    if not run.launch.fork_server:
        return "launch.fork_server=false"
    return "" if device == "cpu" else f"a fork cannot use {device} safely"


def dump_run_and_plan(run: Run, plan: Plan) -> str:
    """A resolved run and a plan as JSON, for other processes of the same run."""
    return json.dumps({"run": flatten(run), "plan": plan.to_json()})


def load_run_and_plan(text: str) -> tuple[Run, Plan]:
    """What `dump_run_and_plan` was given."""
    values = json.loads(text)
    return override(Run(), values["run"]), Plan.from_json(values["plan"])


def prepared_worker_run(launch_info: LaunchInfo) -> PreparedRun:
    """The run of a worker: its supervisor has resolved, checked and planned it."""
    run, plan = load_run_and_plan(launch_info.read_config())
    return PreparedRun(run, plan, launch_info, RunStatus(None), is_launcher=False)


def _reject_foreign_files(folder: Path) -> None:
    """A folder with a run's records but no run.toml is damaged or not ours."""
    stray_names = [n for n in RUN_OUTPUTS if os.path.lexists(folder / n)]
    if stray_names:
        raise ConfigError(
            "the folder holds records of a run but no run.toml",
            values={"run.dir": str(folder), "found": stray_names},
            fix=f"run.dir={_unused_dir(folder)}",
        )
    if os.path.lexists(folder / PLAN_FILE) and not is_plan_file(folder / PLAN_FILE):
        raise ConfigError(
            f"the folder has a file called {PLAN_FILE} that is no plan, and a run writes one",
            values={"run.dir": str(folder)},
            fix=f"run.dir={_unused_dir(folder)}",
        )


def _unused_dir(folder: Path) -> str:
    if folder.name in ("", ".."):  # . and the like
        folder = Path(os.path.realpath(folder))
    number = 2
    while os.path.lexists(candidate := folder.parent / f"{folder.name or 'run'}-{number}"):
        number += 1
    return str(candidate)


@dataclass(frozen=True)
class PartsInfo:
    """What a caller brings, as far as paper must know it: the type's name and the parameters of a
    model ("" and 0: the house's), whether there are samples, whether there is anything at all."""

    model_name: str = ""
    parameter_count: int = 0
    has_data: bool = False
    has_any: bool = False


@dataclass(frozen=True)
class PreparedRun:
    """A run that may begin: settled, checked, planned. `is_launcher`: this process starts ranks."""

    run: Run
    plan: Plan
    launch_info: LaunchInfo
    status: RunStatus
    is_launcher: bool
    arithmetic_note: str = ""
    """Which instructions compute, and why, in words; "" where bits are not promised."""


@dataclass(frozen=True)
class Report:
    """How a run ended. `exit_code` is 0 when it is finished, 128 + signal when it was asked to
    leave, 1 when it failed; `finished` is the last event of a finished run."""

    folder: str
    exit_code: int
    finished: Mapping[str, Any] | None = None


def prepare_run(run: Run, parts: PartsInfo = PartsInfo()) -> PreparedRun:
    """Everything that can be found wrong before anything is started or written.

    What is `parts` cannot travel to other processes: outside a launcher there is one. When ranks
    are to be launched, the data is laid out here, by the one process there is.
    """
    run, launch_info = apply_recorded_settings(resolve_config(run)), read_launch_info()
    if is_multi_host(run):  # one supervisor a host, whatever started it
        launch_info = LaunchInfo()
    status = inspect_run_dir(run, parts.model_name)
    run, plan = _resolve_plan(run, parts, launch_info, status)
    check_compiler(run, plan.device)
    check_threads(run, usable_cores())
    reads_source = not (parts.has_data or status.end_event)
    if reads_source and find_dataset_dir(run) in (None, Path(run.data.path)):
        check_sources(run.data.path, run.data.weights)
    needs_ranks = plan.processes > 1 or is_multi_host(run)
    is_launcher = needs_ranks and not launch_info.has_launcher and status.end_event is None
    run, reason = resolve_arithmetic(run, plan.device, not is_launcher)
    if not is_launcher and status.end_event is None:
        set_arithmetic(run.run.arithmetic)
    if is_launcher and run.launch.join:
        _check_shared_run_dir(run)
        check_rendezvous(run)
    elif is_launcher:
        check_rendezvous(run)
        with acquire_run_lock(run):
            inspect_run_dir(
                run, parts.model_name
            )  # again: another run may have begun before the lock was ours
            prepare_dataset(run)
    arithmetic_note = f"{run.run.arithmetic} ({reason})" if run.run.exact else ""
    return PreparedRun(run, plan, launch_info, status, is_launcher, arithmetic_note)


def _resolve_plan(
    run: Run, parts: PartsInfo, launch_info: LaunchInfo, status: RunStatus
) -> tuple[Run, Plan]:
    """The plan of a run, and the run with what follows from this machine and from the plan."""
    processes = _process_count(run, launch_info, 1 if parts.has_any else None)
    # A launcher's other ranks take rank 0's plan: they need no profile of their own.
    may_probe = run.launch.probe and launch_info.rank == 0 and status.end_event is None
    cluster, profile = measure_cluster(may_probe)
    cluster = replace(cluster, hosts=launch_info.host_count)
    vocabulary = read_vocabulary_size(run)
    is_new_run = not os.path.isfile(Path(run.run.dir) / RUN_FILE)
    if is_new_run and not parts.has_any:
        run, recipe_text = resolve_for_machine(run, cluster, vocabulary, processes)
        if recipe_text and launch_info.rank == 0:
            print_to_stderr(f"recipe  {recipe_text}")
    run = with_precision(run, select_cluster(run, cluster))
    planner_run = with_hub_shape(run)
    if launch_info.has_launcher or parts.has_any:  # nobody would come back to a copy
        planner_run = override(planner_run, {"fault.copy_every": 0})
    if not parts.model_name:
        _check_vocabulary(planner_run, vocabulary)
    plan = replace(make_plan(planner_run, cluster, vocabulary, processes), profile=profile)
    if parts.model_name:
        plan = without_prediction(plan, parts.parameter_count)
    rate = plan.predicted.tokens_per_s
    return with_evaluation(run, rate, rate / plan.processes), plan


def _check_shared_run_dir(run: Run) -> None:
    """ConfigError when this host does not see the folder of the run that it wants to join."""
    folder = Path(run.run.dir)
    if not (is_dataset(dataset_dir_of(run, folder)) and (folder / LOCK_FILE).exists()):
        raise ConfigError(
            "there is no run in this folder yet; the hosts of a run share its folder",
            values={"run.dir": run.run.dir, "launch.join": run.launch.join},
            fix="run.dir=... as the first host sees it (start that one first)",
        )


def check_compiler(run: Run, device: str) -> None:
    """ConfigError when blocks are to be compiled and this host has nothing to compile with."""
    compiler_name, is_available = find_compiler(device)
    if run.run.compile == "blocks" and not is_available:
        raise ConfigError(
            "run.compile needs a compiler and Python's headers on every host",
            values={"run.compile": run.run.compile, "compiler": compiler_name},
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


def read_vocabulary_size(run: Run) -> int:
    """Size of the vocabulary before the data is read."""
    for source in split_sources(run.data.path):
        if is_dataset(Path(source)):
            return read_info(Path(source)).vocabulary
    return MARKOV_SYMBOLS if run.data.path == MARKOV else 256


def _process_count(run: Run, launch_info: LaunchInfo, required_count: int | None) -> int | None:
    if not launch_info.has_launcher:
        return required_count
    if run.launch.processes not in ("auto", launch_info.size):
        raise ConfigError(
            "the launcher started another number of ranks than the run wants",
            values={"launch.processes": run.launch.processes, "ranks": launch_info.size},
            fix="leave launch.processes out under a launcher",
        )
    return launch_info.size
