"""The plan: layout, split of the batch, protocol and what a step should cost; `make_plan`.

A plan is a file: printed by `cordee plan`, written as plan.json by `cordee train`, obeyed by it and
held against reality at its end. Not here: measuring, or changing what the user wrote; what cannot
be obeyed is refused with the nearest layout that can.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from cordee.config.check import check_processes
from cordee.config.run import Run
from cordee.devices import DEVICES, Kind
from cordee.errors import ConfigError, LayoutError
from cordee.layout.axes import AXES, INSIDE, Layout, settle
from cordee.layout.census import Census, model_census
from cordee.layout.legal import broken
from cordee.layout.shares import deal, shares
from cordee.plan.cluster import Cluster, cpu_only
from cordee.plan.devices import check_devices, check_inside, precision_text, with_precision
from cordee.plan.network import splits
from cordee.plan.search import (
    Candidate,
    Prediction,
    Ranking,
    choose_threads,
    predict,
    ranks_per_host,
    search,
)

RANGES = ("splits", "stages")
"""Fields of a plan that are [start, stop) pairs."""

UNMEASURED = 1e6
"""How much slower than an accelerator a CPU is taken to be until it was measured."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the runtime needs to know before it starts. `splits` are [start, stop) of each
    worker's microbatches, in the order of `Layout.worker`; `stages` are [start, stop) of each
    stage's layers; `zero` is what shards keep whole between uses (layout.zero, settled);
    `devices` are the islands' kinds of device, where not all are `device`."""

    layout: Layout
    processes: int
    threads: int
    device: Kind
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
    def mixed(self) -> bool:
        """Whether islands compute on devices of different kinds."""
        return len(set(self.devices)) > 1

    @property
    def shares(self) -> list[int]:
        """Microbatches of each island."""
        lengths = [stop - start for start, stop in self.splits]
        each = self.layout.workers // self.layout.island
        return [sum(lengths[i : i + each]) for i in range(0, len(lengths), each)]

    def to_json(self) -> str:
        """The plan as one JSON object; `from_json` gives an equal plan back."""
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        layout = {axis: getattr(self.layout, axis) for axis in AXES}
        ranges = {name: [list(part) for part in getattr(self, name)] for name in RANGES}
        return {**asdict(self), "layout": layout, **ranges, "devices": list(self.devices)}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what `to_json` wrote; ConfigError for anything else."""
        try:
            told = json.loads(text)
        except json.JSONDecodeError as error:
            raise _bad_plan("it is not JSON", str(error)) from error
        values = _exactly(told, cls, "plan")
        values["layout"] = Layout(**_exactly(values["layout"], Layout, "layout"))
        values["predicted"] = Prediction(**_exactly(values["predicted"], Prediction, "predicted"))
        for name in RANGES:
            pairs = values[name]
            if not all(isinstance(p, list) and [type(i) for i in p] == [int, int] for p in pairs):
                raise _bad_plan(f"{name} are pairs of whole numbers", str(pairs)[:80])
            values[name] = tuple((start, stop) for start, stop in pairs)
        values["devices"] = tuple(values["devices"])
        return cls(**values)


def holds_plan(path: Path) -> bool:
    """Whether a file holds a plan, of this version or another."""
    try:
        plain = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(plain, dict) and {"layout", "predicted", "why"} <= plain.keys()


def make_plan(
    run: Run, cluster: Cluster, vocabulary: int = 256, processes: int | None = None
) -> Plan:
    """The plan of `run` on `cluster`: the user's layout if there is one, else the best.

    `processes` is what a launcher has started; else launch.processes; else the search chooses.
    Raises LayoutError when what is asked for is illegal or does not fit, with the nearest fix.
    """
    _check_vocabulary(run, vocabulary)
    cluster = devices_of(run, cluster)
    run = with_precision(run, cluster)
    asked = processes
    if asked is None and run.launch.processes != "auto":
        asked = int(run.launch.processes)
    # Ranks without axes are islands, unless shards are asked for by what they keep.
    islands = asked is not None and run.layout.zero in ("auto", 1)
    if islands or axes_given(run):
        counted = model_census(run.model, vocabulary)
        layout = settle(run.layout, asked if asked is not None else "auto")
        _refuse(run, layout, cluster, counted)
        candidate = predict(run, cluster, layout, counted)
        reason = candidate.fitting.reason
        if reason and not axes_given(run):
            candidate, reason = _sharded(run, cluster, vocabulary, layout), ""
        if reason:
            raise _does_not_fit(run, cluster, vocabulary, layout, reason)
        why = _why_asked(run, processes, layout, candidate)
    else:
        ranking = search(run, cluster, vocabulary, asked)
        usable = [c for c in ranking.ranked if c.layout.size in (asked, *range(cluster.slots + 1))]
        if not usable:
            raise _nothing_fits(run, cluster, ranking)
        candidate = usable[0]
        why = why_first(usable)
    return finished(run, cluster, candidate, why)


def finished(run: Run, cluster: Cluster, candidate: Candidate, why: str) -> Plan:
    """A candidate as the plan that the runtime obeys."""
    return Plan(
        layout=candidate.layout,
        processes=candidate.layout.size,
        threads=candidate.threads,
        device=cluster.device,
        protocol=typing.cast(Any, candidate.fitting.wire.protocol),
        codec=candidate.fitting.wire.codec,
        zero=candidate.fitting.zero,
        splits=tuple((part.start, part.stop) for part in splits(run, candidate.layout)),
        stages=candidate.fitting.stages.parts,
        predicted=candidate.predicted,
        why=why,
        note=_note(run, cluster, candidate),
        precision=precision_text(run.run.precision, cluster),
    )


def with_islands(plan: Plan, run: Run, cluster: Cluster, vocabulary: int, islands: int) -> Plan:
    """The plan on another number of islands that are cut as these: as many of `islands` as the
    batch has work for. `run` is on paper (config/hub.py)."""
    counted = model_census(run.model, vocabulary)
    why = f"as the plan of {plan.layout.describe()}"
    for count in range(islands, 0, -1):
        layout = replace(plan.layout, island=count)
        if layout == plan.layout:
            return plan
        if not broken(run, layout, counted):
            made = finished(run, cluster, predict(run, cluster, layout, counted), why)
            return replace(made, threads=plan.threads)
    return plan


def on_devices(plan: Plan, run: Run, devices: Sequence[str]) -> Plan:
    """The plan where island i computes on a device of kind `devices[i]`, of which this host may
    have none: nothing is foretold then. A CPU beside accelerators starts with the least share, as
    else all would wait for it until speeds are measured."""
    kinds = tuple(devices[: plan.layout.island])
    if set(kinds) <= {plan.device}:
        return plan
    made, each = unpredicted(plan, plan.predicted.parameters), plan.layout.workers // len(kinds)
    if len(set(kinds)) > 1 and run.layout.balance and plan.layout.pipeline == 1:
        seconds = [UNMEASURED if kind == "cpu" else 1.0 for kind in kinds]
        counts = shares(seconds, run.batch.microbatches, each, least=each)
        made = replace(made, splits=deal(counts, each))
    words = " and ".join(sorted(set(kinds)))
    return replace(made, devices=kinds, note=f"islands are on {words}: nothing is foretold")


def unpredicted(plan: Plan, parameters: int) -> Plan:
    """The plan of a model that paper does not know: where it runs, and no figures but its size."""
    kinds = {f.name: str(f.type) for f in fields(Prediction)}
    nothing: dict[str, Any] = {n: {} if "Mapping" in kind else 0 for n, kind in kinds.items()}
    predicted = Prediction(**{**nothing, "parameters": parameters})
    return replace(plan, predicted=predicted, note="the model is the caller's: nothing is foretold")


def devices_of(run: Run, cluster: Cluster) -> Cluster:
    """The cluster as the run wants it (launch.device); ConfigError when there is no such device, or
    it cannot do what the run asks."""
    wanted = run.launch.device
    if wanted not in ("auto", "cpu", cluster.device):
        raise LayoutError(
            f"there is no {wanted} device",
            values={"launch.device": wanted, "devices": cluster.name},
            fix="launch.device=cpu",
        )
    found = cpu_only(cluster) if wanted == "cpu" else cluster
    check_devices(run, found)
    return found


def _check_vocabulary(run: Run, vocabulary: int) -> None:
    """ConfigError when the data has tokens that the model has no row for."""
    if 0 < run.model.vocabulary < vocabulary and not run.model.classifies:
        raise ConfigError(
            "the data has more tokens than the model's vocabulary",
            values={"model.vocabulary": run.model.vocabulary, "data": vocabulary},
            fix=f"model.vocabulary={vocabulary}, or 0: as many as the data has",
        )


def axes_given(run: Run) -> bool:
    """Whether the user wrote any degree."""
    return any(getattr(run.layout, axis) != "auto" for axis in (*INSIDE, "islands"))


def why_first(ranked: list[Candidate]) -> str:
    """One sentence: why the first of the ranked is the pick."""
    first = ranked[0]
    if len(ranked) == 1:
        return f"{first.layout.describe()}: the only layout that is legal and fits"
    second = ranked[1]
    gain = second.predicted.step_s / first.predicted.step_s - 1
    return (
        f"{_with_threads(first)} is predicted fastest of {len(ranked)} that are legal and fit;"
        f" {_with_threads(second)} would take {gain:.0%} longer"
    )


def _with_threads(made: Candidate) -> str:
    return f"{made.layout.describe()} x {made.threads} thread{'s' if made.threads > 1 else ''}"


def _refuse(run: Run, layout: Layout, cluster: Cluster, counted: Census) -> None:
    """Raises for a layout that cannot run here, whatever it costs."""
    if rules := broken(run, layout, counted):
        values = {"layout": layout.describe(), "batch.microbatches": run.batch.microbatches}
        raise LayoutError(rules[0].reason, values=values, fix=rules[0].fix)
    check_inside(layout, cluster)
    if cluster.device == "cpu":
        check_processes(layout.size, cluster.slots)
    elif layout.size > cluster.slots:
        raise LayoutError(
            "there are more processes than devices",
            values={"processes": layout.size, "devices": cluster.slots},
            fix=f"launch.processes={cluster.slots}",
        )


def _sharded(run: Run, cluster: Cluster, vocabulary: int, islands: Layout) -> Candidate:
    """With the number of ranks given and whole copies too large: the best layout that shards."""
    ranking = search(run, cluster, vocabulary, islands.size)
    if not ranking.ranked:
        raise _nothing_fits(run, cluster, ranking)
    return ranking.ranked[0]


def _does_not_fit(
    run: Run, cluster: Cluster, vocabulary: int, layout: Layout, reason: str
) -> LayoutError:
    ranking = search(without_axes(run), cluster, vocabulary)
    others = [c for c in ranking.ranked if c.layout.size <= cluster.slots]
    if not others:
        return _nothing_fits(run, cluster, ranking)
    near = min(others, key=lambda c: (abs(c.layout.size - layout.size), c.predicted.step_s)).layout
    words = " ".join(f"layout.{axis}={degree}" for axis, degree in _degrees(near))
    return LayoutError(
        f"{layout.describe()} does not fit: it {reason}",
        values={"layout": layout.describe(), "devices": _devices(cluster)},
        fix=f"layout.islands={near.island} {words} (launch.processes={near.size})",
    )


def _degrees(layout: Layout) -> list[tuple[str, int]]:
    """Axes inside an island that cut something; shard 1 where none does."""
    found = [(axis, getattr(layout, axis)) for axis in INSIDE if getattr(layout, axis) > 1]
    return found or [("shard", 1)]


def _nothing_fits(run: Run, cluster: Cluster, ranking: Ranking) -> LayoutError:
    """No layout of these devices works: name the tightest one and what would help most."""
    values: dict[str, object] = {"devices": _devices(cluster)}
    largest, idle = "", 1
    if ranking.tightest is not None:
        layout, fitting = ranking.tightest
        if layout.workers == run.batch.microbatches:  # no shard more without work for it
            idle = cluster.slots // layout.size
        values[layout.describe()] = fitting.reason
        largest = max(fitting.memory.items, key=lambda name: fitting.memory.items[name])
    elif ranking.rejected:
        values[ranking.rejected[0].layout] = ranking.rejected[0].reason
    if largest.startswith("copies"):
        fix = (
            "fault.copy_every=0, and a rank that dies sends its island back to the last checkpoint"
        )
    elif largest in ("activations", "bf16 weights") and run.memory.recompute == "none":
        fix = "memory.recompute=full"
    elif largest in ("activations", "logits") and run.batch.microbatch > 1:
        fix = "batch.microbatch=1, with batch.microbatches so many times more"
    elif cluster.device != "cpu" and idle > 1:
        fix = f"batch.microbatches={idle * run.batch.microbatches}, to cut the model over more"
    elif cluster.device != "cpu":
        fix = f"more devices to cut the model over (hosts = {2 * cluster.hosts} in --cluster FILE)"
    else:
        fix = "a smaller model.preset, or a machine with more memory"
    return LayoutError("no layout of these devices is legal and fits", values=values, fix=fix)


def _devices(cluster: Cluster) -> str:
    return f"{cluster.hosts} hosts of {cluster.name}" if cluster.hosts > 1 else cluster.name


def without_axes(run: Run) -> Run:
    """The run without degrees and ranks of its own: all layouts are its neighbours."""
    axes = dict.fromkeys(("islands", *INSIDE), "auto")
    layout = replace(run.layout, **axes)  # type: ignore[arg-type]
    return replace(run, layout=layout, launch=replace(run.launch, processes="auto"))


def _why_asked(run: Run, processes: int | None, layout: Layout, made: Candidate) -> str:
    if made.layout != layout:
        return f"{layout.describe()} does not fit; {made.layout.describe()} is the best that does"
    if processes is not None:
        return f"{made.layout.describe()}: {processes} processes were started by the caller"
    if axes_given(run):
        return f"{made.layout.describe()}, as the run gives it"
    return f"{made.layout.describe()}, because launch.processes={run.launch.processes}"


def _note(run: Run, cluster: Cluster, made: Candidate) -> str:
    """What a person should know beside the figures; empty when nothing."""
    found = []
    busy = ranks_per_host(made.layout, cluster) * choose_threads(run, made.layout, cluster)
    if cluster.device == "cpu" and busy > cluster.cores:
        found.append(f"{busy} threads share {cluster.cores} cores: for tests, not for speed")
    parts = {len(part) for part in splits(run, made.layout)}
    if len(parts) > 1:
        found.append(f"ranks compute {min(parts)} or {max(parts)} microbatches; some wait")
    if "(as " in cluster.name:
        found.append("the accelerator is not in the table: give --cluster FILE for its figures")
    return "; ".join(found)


def _exactly(told: object, cls: type, what: str) -> dict[str, Any]:
    """`told` as the fields of `cls`, no more, no fewer, each of the plain type it should have."""
    names = {f.name: str(f.type) for f in fields(cls)}
    if not isinstance(told, dict):
        raise _bad_plan(f"{what} is a table", str(told)[:80])
    for name in [*(n for n in told if n not in names), *(n for n in names if n not in told)]:
        known = "unknown" if name in told else "missing"
        raise _bad_plan(f"{what} has a key that is {known}", name)
    for name, value in told.items():
        if not _is_kind(value, names[name]):
            raise _bad_plan(f"{what}.{name} has the wrong type: it is {names[name]}", repr(value))
    return dict(told)


def _is_kind(value: object, kind: str) -> bool:
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind == "Kind":
        return value in DEVICES
    if kind.startswith("Literal"):
        return isinstance(value, str) and repr(value) in kind
    if kind.startswith("Mapping"):
        return isinstance(value, Mapping)
    return isinstance(value, list) if kind.startswith("tuple") else True


def _bad_plan(what: str, told: str) -> ConfigError:
    return ConfigError(
        f"this is not a plan of this version: {what}",
        values={"found": told},
        fix="cordee plan ... --save FILE writes one",
    )
