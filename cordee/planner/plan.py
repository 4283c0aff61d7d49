"""The plan of a run: layout, split of the batch, protocol, and what a step should cost.

`cordee plan` prints it, `cordee train` writes it to plan.json, executes it and compares its
figures with the run's at the end.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from cordee.config.run import Run
from cordee.config.validate import check_processes
from cordee.errors import ConfigError, LayoutError
from cordee.hardware.devices import DEVICES, DeviceKind
from cordee.layout.axes import AXES, MODEL_AXES, Layout, resolve_degrees
from cordee.layout.counts import TensorCounts, count_model_tensors
from cordee.layout.load_balance import balance_microbatches, microbatch_ranges
from cordee.layout.validate import violations
from cordee.planner.cluster import (
    Cluster,
    check_devices,
    check_island_devices,
    precision_text,
    with_precision,
    without_accelerators,
)
from cordee.planner.network import split_microbatches
from cordee.planner.search import (
    CandidateLayout,
    Prediction,
    Ranking,
    choose_threads,
    predict,
    ranks_per_host,
    search,
)

RANGE_FIELDS = ("splits", "stages")
"""Fields of a plan that are [start, stop) pairs."""

CPU_SLOWDOWN = 1e6
"""How much slower than an accelerator a CPU is taken to be until it was measured."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the runtime needs to know before it starts. `splits` are [start, stop) of each
    worker's microbatches, in the order of `Layout.dp_rank`; `stages` are [start, stop) of each
    stage's layers; `zero` is layout.zero with "auto" resolved; `devices` are the islands' kinds of
    device, where not all are `device`."""

    layout: Layout
    processes: int
    threads: int
    device: DeviceKind
    protocol: Literal["exchange", "allreduce", "none"]
    codec: str
    zero: int
    splits: tuple[tuple[int, int], ...]
    stages: tuple[tuple[int, int], ...]
    predicted: Prediction
    why: str
    note: str = ""
    precision: str = ""
    """Why the run's precision is fast or slow on these devices."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """The machine profile that the figures rest on; empty: nominal figures."""
    devices: tuple[str, ...] = ()

    @property
    def has_mixed_devices(self) -> bool:
        """Whether islands compute on devices of different kinds."""
        return len(set(self.devices)) > 1

    @property
    def island_microbatches(self) -> list[int]:
        """Microbatches of each island."""
        lengths = [stop - start for start, stop in self.splits]
        workers = self.layout.dp_size // self.layout.island
        return [sum(lengths[i : i + workers]) for i in range(0, len(lengths), workers)]

    def to_json(self) -> str:
        """The plan as one JSON object; `from_json` gives an equal plan back."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        layout = {axis: getattr(self.layout, axis) for axis in AXES}
        ranges = {name: [list(pair) for pair in getattr(self, name)] for name in RANGE_FIELDS}
        return {**asdict(self), "layout": layout, **ranges, "devices": list(self.devices)}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what `to_json` wrote; ConfigError for anything else."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise _plan_error("it is not JSON", str(error)) from error
        values = _check_fields(document, cls, "plan")
        for name, field_class in (("layout", Layout), ("predicted", Prediction)):
            values[name] = field_class(**_check_fields(values[name], field_class, name))
        for name in RANGE_FIELDS:
            pairs = values[name]
            if not all(isinstance(p, list) and [type(i) for i in p] == [int, int] for p in pairs):
                raise _plan_error(f"{name} are pairs of whole numbers", str(pairs)[:80])
            values[name] = tuple((start, stop) for start, stop in pairs)
        values["devices"] = tuple(values["devices"])
        return cls(**values)


def is_plan_file(path: Path) -> bool:
    """Whether a file holds a plan, of this version or another."""
    try:
        document = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"layout", "predicted", "why"} <= document.keys()


def make_plan(
    run: Run, cluster: Cluster, vocabulary: int = 256, processes: int | None = None
) -> Plan:
    """The plan of `run` on `cluster`: the user's layout if there is one, else the best.

    `processes` is what a launcher has started; without it launch.processes counts, then the search.
    LayoutError when the layout that is asked for is illegal or does not fit, with the nearest fix.
    """
    _check_vocabulary(run, vocabulary)
    cluster = select_cluster(run, cluster)
    run = with_precision(run, cluster)
    process_count = processes
    if process_count is None and run.launch.processes != "auto":
        process_count = int(run.launch.processes)
    # A number of ranks without axes means islands, unless layout.zero=2 or 3 asks for shards.
    is_islands_only = process_count is not None and run.layout.zero in ("auto", 1)
    if is_islands_only or has_explicit_axes(run):
        tensor_counts = count_model_tensors(run.model, vocabulary)
        layout = resolve_degrees(run.layout, process_count if process_count is not None else "auto")
        _check_layout(run, layout, cluster, tensor_counts)
        candidate = predict(run, cluster, layout, tensor_counts)
        reason = candidate.fit_result.reason
        if reason and not has_explicit_axes(run):
            candidate, reason = _best_sharded(run, cluster, vocabulary, layout), ""
        if reason:
            raise _misfit_error(run, cluster, vocabulary, layout, reason)
        why = _request_reason(run, processes, layout, candidate)
    else:
        ranking = search(run, cluster, vocabulary, process_count)
        sizes = (process_count, *range(cluster.slots + 1))
        candidates = [c for c in ranking.candidates if c.layout.size in sizes]
        if not candidates:
            raise _no_fit_error(run, cluster, ranking)
        candidate = candidates[0]
        why = choice_reason(candidates)
    return plan_of_candidate(run, cluster, candidate, why)


def plan_of_candidate(run: Run, cluster: Cluster, candidate: CandidateLayout, why: str) -> Plan:
    """The plan of a candidate; `why` says in words why it is the pick."""
    return Plan(
        layout=candidate.layout,
        processes=candidate.layout.size,
        threads=candidate.threads,
        device=cluster.device,
        protocol=typing.cast(Any, candidate.fit_result.sync.protocol),
        codec=candidate.fit_result.sync.codec,
        zero=candidate.fit_result.zero,
        splits=tuple((r.start, r.stop) for r in split_microbatches(run, candidate.layout)),
        stages=candidate.fit_result.stages.block_ranges,
        predicted=candidate.prediction,
        why=why,
        note=_note(run, cluster, candidate),
        precision=precision_text(run.run.precision, cluster),
    )


def with_islands(plan: Plan, run: Run, cluster: Cluster, vocabulary: int, islands: int) -> Plan:
    """The plan on at most `islands` islands of the same cut: as many as the batch has work for.
    `run` has the shape of a model.hub filled in (config/from_hf.py)."""
    tensor_counts = count_model_tensors(run.model, vocabulary)
    why = f"as the plan of {plan.layout.describe()}"
    for count in range(islands, 0, -1):
        layout = replace(plan.layout, island=count)
        if layout == plan.layout:
            return plan
        if not violations(run, layout, tensor_counts):
            candidate = predict(run, cluster, layout, tensor_counts)
            new_plan = plan_of_candidate(run, cluster, candidate, why)
            return replace(new_plan, threads=plan.threads)
    return plan


def with_devices(plan: Plan, run: Run, devices: Sequence[str]) -> Plan:
    """The plan where island i computes on a device of kind `devices[i]`, without a prediction where
    kinds differ. A CPU beside accelerators starts with the smallest share, so that they do not wait
    for it until speeds are measured."""
    kinds = tuple(devices[: plan.layout.island])
    if set(kinds) <= {plan.device}:
        return plan
    new_plan = without_prediction(plan, plan.predicted.parameters)
    ranks_per_island = plan.layout.dp_size // len(kinds)
    if len(set(kinds)) > 1 and run.layout.balance and plan.layout.pipeline == 1:
        seconds = [CPU_SLOWDOWN if kind == "cpu" else 1.0 for kind in kinds]
        counts = balance_microbatches(
            seconds, run.batch.microbatches, ranks_per_island, min_share=ranks_per_island
        )
        new_plan = replace(new_plan, splits=microbatch_ranges(counts, ranks_per_island))
    words = " and ".join(sorted(set(kinds)))
    return replace(new_plan, devices=kinds, note=f"islands are on {words}: nothing is foretold")


def without_prediction(plan: Plan, parameters: int) -> Plan:
    """The plan of a model that the planner does not know: no figures but its size."""
    zeros: dict[str, Any] = {
        f.name: {} if "Mapping" in str(f.type) else 0 for f in fields(Prediction)
    }
    prediction = Prediction(**{**zeros, "parameters": parameters})
    note = "the model is the caller's: nothing is foretold"
    return replace(plan, predicted=prediction, note=note)


def select_cluster(run: Run, cluster: Cluster) -> Cluster:
    """The cluster as launch.device asks; ConfigError when there is no such device, or it cannot do
    what the run asks."""
    device = run.launch.device
    if device not in ("auto", "cpu", cluster.device):
        raise LayoutError(
            f"there is no {device} device",
            values={"launch.device": device, "devices": cluster.name},
            fix="launch.device=cpu",
        )
    selection = without_accelerators(cluster) if device == "cpu" else cluster
    check_devices(run, selection)
    return selection


def _check_vocabulary(run: Run, vocabulary: int) -> None:
    """ConfigError when the data has tokens that the model has no row for."""
    if 0 < run.model.vocabulary < vocabulary:
        raise ConfigError(
            "the data has more tokens than the model's vocabulary",
            values={"model.vocabulary": run.model.vocabulary, "data": vocabulary},
            fix=f"model.vocabulary={vocabulary}, or 0: as many as the data has",
        )


def has_explicit_axes(run: Run) -> bool:
    return any(getattr(run.layout, axis) != "auto" for axis in (*MODEL_AXES, "islands"))


def choice_reason(candidates: list[CandidateLayout]) -> str:
    """Why the first candidate is the pick, in one sentence."""
    best = candidates[0]
    if len(candidates) == 1:
        return f"{best.layout.describe()}: the only layout that is legal and fits"
    runner_up = candidates[1]
    gain = runner_up.prediction.step_s / best.prediction.step_s - 1
    return (
        f"{_candidate_text(best)} is predicted fastest of {len(candidates)} that are legal and fit;"
        f" {_candidate_text(runner_up)} would take {gain:.0%} longer"
    )


def _candidate_text(candidate: CandidateLayout) -> str:
    plural = "s" if candidate.threads > 1 else ""
    return f"{candidate.layout.describe()} x {candidate.threads} thread{plural}"


def _check_layout(run: Run, layout: Layout, cluster: Cluster, tensor_counts: TensorCounts) -> None:
    """Raises for a layout that cannot run on these devices."""
    if rules := violations(run, layout, tensor_counts):
        values = {"layout": layout.describe(), "batch.microbatches": run.batch.microbatches}
        raise LayoutError(rules[0].reason, values=values, fix=rules[0].fix)
    check_island_devices(layout, cluster)
    if cluster.device == "cpu":
        check_processes(layout.size, cluster.slots)
    elif layout.size > cluster.slots:
        raise LayoutError(
            "there are more processes than devices",
            values={"processes": layout.size, "devices": cluster.slots},
            fix=f"launch.processes={cluster.slots}",
        )


def _best_sharded(run: Run, cluster: Cluster, vocabulary: int, islands: Layout) -> CandidateLayout:
    """The best layout of as many ranks, where whole copies of the model do not fit."""
    ranking = search(run, cluster, vocabulary, islands.size)
    if not ranking.candidates:
        raise _no_fit_error(run, cluster, ranking)
    return ranking.candidates[0]


def _misfit_error(
    run: Run, cluster: Cluster, vocabulary: int, layout: Layout, reason: str
) -> LayoutError:
    ranking = search(without_axes(run), cluster, vocabulary)
    candidates = [c for c in ranking.candidates if c.layout.size <= cluster.slots]
    if not candidates:
        return _no_fit_error(run, cluster, ranking)
    nearest = min(
        candidates, key=lambda c: (abs(c.layout.size - layout.size), c.prediction.step_s)
    ).layout
    words = " ".join(f"layout.{axis}={degree}" for axis, degree in _degrees(nearest))
    return LayoutError(
        f"{layout.describe()} does not fit: it {reason}",
        values={"layout": layout.describe(), "devices": _devices_text(cluster)},
        fix=f"layout.islands={nearest.island} {words} (launch.processes={nearest.size})",
    )


def _degrees(layout: Layout) -> list[tuple[str, int]]:
    """Axes inside an island that cut something; shard 1 where none does."""
    degrees = [(axis, getattr(layout, axis)) for axis in MODEL_AXES if getattr(layout, axis) > 1]
    return degrees or [("shard", 1)]


def _no_fit_error(run: Run, cluster: Cluster, ranking: Ranking) -> LayoutError:
    """No layout of these devices works: names the one that needs least and what would help most."""
    values: dict[str, object] = {"devices": _devices_text(cluster)}
    largest_item, idle_factor = "", 1
    if ranking.nearest_fit is not None:
        layout, fit_result = ranking.nearest_fit
        if layout.dp_size == run.batch.microbatches:  # no shard more without work for it
            idle_factor = cluster.slots // layout.size
        values[layout.describe()] = fit_result.reason
        peak_items = fit_result.memory.peak_items
        largest_item = max(peak_items, key=lambda name: peak_items[name])
    elif ranking.rejections:
        values[ranking.rejections[0].layout] = ranking.rejections[0].reason
    if largest_item.startswith("copies"):
        fix = (
            "fault.copy_every=0, and a rank that dies sends its island back to the last checkpoint"
        )
    elif largest_item in ("activations", "bf16 weights") and run.memory.recompute == "none":
        fix = "memory.recompute=full"
    elif largest_item in ("activations", "logits") and run.batch.microbatch > 1:
        fix = "batch.microbatch=1, with batch.microbatches so many times more"
    elif cluster.device != "cpu" and idle_factor > 1:
        count = idle_factor * run.batch.microbatches
        fix = f"batch.microbatches={count}, to cut the model over more"
    elif cluster.device != "cpu":
        fix = f"more devices to cut the model over (hosts = {2 * cluster.hosts} in --cluster FILE)"
    else:
        fix = "a smaller model.preset, or a machine with more memory"
    return LayoutError("no layout of these devices is legal and fits", values=values, fix=fix)


def _devices_text(cluster: Cluster) -> str:
    return f"{cluster.hosts} hosts of {cluster.name}" if cluster.hosts > 1 else cluster.name


def without_axes(run: Run) -> Run:
    """The run with every degree and the number of ranks left to the search."""
    axes = dict.fromkeys(("islands", *MODEL_AXES), "auto")
    layout = replace(run.layout, **axes)  # type: ignore[arg-type]
    return replace(run, layout=layout, launch=replace(run.launch, processes="auto"))


def _request_reason(
    run: Run, processes: int | None, layout: Layout, candidate: CandidateLayout
) -> str:
    text = candidate.layout.describe()
    if candidate.layout != layout:
        return f"{layout.describe()} does not fit; {text} is the best that does"
    if processes is not None:
        return f"{text}: {processes} processes were started by the caller"
    if has_explicit_axes(run):
        return f"{text}, as the run gives it"
    return f"{text}, because launch.processes={run.launch.processes}"


def _note(run: Run, cluster: Cluster, candidate: CandidateLayout) -> str:
    """What a person should know beside the figures; empty when nothing."""
    notes, layout = [], candidate.layout
    threads = ranks_per_host(layout, cluster) * choose_threads(run, layout, cluster)
    if cluster.device == "cpu" and threads > cluster.cores:
        notes.append(f"{threads} threads share {cluster.cores} cores: for tests, not for speed")
    lengths = {len(microbatches) for microbatches in split_microbatches(run, layout)}
    if len(lengths) > 1:
        notes.append(f"ranks compute {min(lengths)} or {max(lengths)} microbatches; some wait")
    if "(as " in cluster.name:
        notes.append("the accelerator is not in the table: give --cluster FILE for its figures")
    return "; ".join(notes)


def _check_fields(table: object, cls: type, label: str) -> dict[str, Any]:
    """`table` as the fields of `cls`, no more, no fewer, each of the plain type it should have."""
    field_types = {f.name: str(f.type) for f in fields(cls)}
    if not isinstance(table, dict):
        raise _plan_error(f"{label} is a table", str(table)[:80])
    for name in table:
        if name not in field_types:
            raise _plan_error(f"{label} has a key that is unknown", name)
    for name, type_text in field_types.items():
        if name not in table:
            raise _plan_error(f"{label} has a key that is missing", name)
        if not _has_type(table[name], type_text):
            problem = f"{label}.{name} has the wrong type: it is {type_text}"
            raise _plan_error(problem, repr(table[name]))
    return dict(table)


def _has_type(value: object, type_name: str) -> bool:
    """Whether a JSON value fits a field's annotation, which is text in this package."""
    if type_name == "DeviceKind":
        return value in DEVICES
    if type_name.startswith("Literal"):
        return isinstance(value, str) and repr(value) in type_name
    json_types: dict[str, Any] = {
        "int": int, "float": int | float, "str": str, "Mapping": Mapping, "tuple": list,
    }  # fmt: skip
    json_type = json_types.get(type_name.partition("[")[0], object)
    return isinstance(value, json_type) and (json_type is object or not isinstance(value, bool))


def _plan_error(problem: str, excerpt: str) -> ConfigError:
    return ConfigError(
        f"this is not a plan of this version: {problem}",
        values={"found": excerpt},
        fix="cordee plan ... --save FILE writes one",
    )
