"""All layouts of the given devices: enumerate, drop with a reason, predict, rank.

Not here: what is done with the winner (`plan.py`), why a layout is illegal (`layout/legal.py`).
Exhaustive over the degrees that `candidates.py` gives, so nothing is approximated by a heuristic.
Traded away: microbatch size and M are the user's, they change the descent; so are schedule and
kind of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cordee.config.run import Run
from cordee.layout.axes import Layout
from cordee.layout.census import Census, Specs, census, model_census
from cordee.layout.legal import broken, worker_microbatches
from cordee.layout.stages import Stages, make_stages
from cordee.plan.candidates import Reasons, Rejected, all_domains, candidates, rank_counts
from cordee.plan.cluster import Cluster
from cordee.plan.costs import (
    STEP_S,
    contention,
    interval,
    microbatch_s,
    microbatch_work,
    update_s,
)
from cordee.plan.devices import with_precision
from cordee.plan.memory import FITS, OVERHEAD_BYTES, Memory, Wire, rank_memory, unlike
from cordee.plan.network import Load, choose_wire, gradient_bytes, rank_subtrees, traffic
from cordee.plan.pipeline import bubble

MIB = 1 << 20
BYTES = 256
"""Vocabulary by which threads are chosen; another one would hardly change which is faster."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step should cost. Times are of the slowest rank, memory of the fullest."""

    step_s: float
    low_s: float
    high_s: float
    tokens_per_s: float
    bytes_sent: int
    """Gradient bytes that rank 0 sends in a step, as the run counts them in metrics.jsonl."""
    bytes_items: Mapping[str, int]
    """All bytes that the busiest rank sends in a step: gradients, gathers, shared updates."""
    memory_bytes: int
    """Peak of the fullest rank without the process itself."""
    overhead_bytes: int
    memory_items: Mapping[str, int]
    time_items: Mapping[str, float]
    flops: float
    """Operations of the model in a step, over all ranks (what MFU counts)."""
    peak_flops: float
    """Peak of all devices together, operations per second (what MFU divides by)."""
    parameters: int

    @property
    def all_bytes_sent(self) -> int:
        """Sum of `bytes_items`."""
        return sum(self.bytes_items.values())


@dataclass(frozen=True)
class Fitting:
    """How a layout is cut into stages and sharded, the memory of its fullest rank, and why that
    does not fit into its device (or host, on CPU); empty when it does."""

    stages: Stages
    wire: Wire
    zero: int
    memory: Memory
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A legal layout with its prediction."""

    layout: Layout
    threads: int
    fitting: Fitting
    predicted: Prediction


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first, and what was dropped."""

    ranked: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    tightest: tuple[Layout, Fitting] | None
    """Of those that do not fit, the one that needs least."""


def search(
    run: Run, cluster: Cluster, vocabulary: int = 256, processes: int | None = None
) -> Ranking:
    """Every layout of `processes` ranks (or of 1 to all devices), ranked by time, then memory.

    Axes that the run gives are kept. Smaller numbers of ranks than there are devices are cut by
    shards only, unless no layout of all devices is legal. Pure, a millisecond per layout.
    """
    run = with_precision(run, cluster)
    counted = model_census(run.model, vocabulary)
    counts = [processes] if processes is not None else rank_counts(cluster)
    reasons, looked = Reasons(), _Looked()
    for everything in (False, True):
        domains = all_domains(run, cluster, counted, counts, reasons)
        for layout in candidates(run.layout, domains, counts, everything):
            looked.at(run, cluster, counted, layout, reasons)
        if counts[-1] in looked.legal:
            break
    ranked = sorted(
        looked.ranked,
        key=lambda c: (c.predicted.step_s, c.predicted.memory_bytes, c.layout.size),
    )
    return Ranking(tuple(ranked), tuple(reasons.lines()), looked.tightest)


@dataclass
class _Looked:
    """What a search has found so far; `legal` are the numbers of ranks of legal layouts."""

    ranked: list[Candidate] = field(default_factory=list)
    legal: set[int] = field(default_factory=set)
    tightest: tuple[Layout, Fitting] | None = None
    stages: dict[int, Stages] = field(default_factory=dict)

    def at(
        self, run: Run, cluster: Cluster, counted: Census, layout: Layout, reasons: Reasons
    ) -> None:
        """Predicts `layout`, or notes why it is out."""
        if rules := broken(run, layout, counted):
            reasons.note(rules[0], layout)
            return
        self.legal.add(layout.size)
        if layout.pipeline not in self.stages:
            self.stages[layout.pipeline] = _stages(run, counted, layout)
        fitting = fit(run, cluster, layout, counted, self.stages[layout.pipeline])
        if not fitting.reason:
            self.ranked.append(predict(run, cluster, layout, counted, fitting))
            return
        needed = fitting.memory.total_bytes
        reasons.too_big(layout, fitting.reason, needed)
        if self.tightest is None or needed < self.tightest[1].memory.total_bytes:
            self.tightest = layout, fitting


def fit(
    run: Run, cluster: Cluster, layout: Layout, specs: Specs, stages: Stages | None = None
) -> Fitting:
    """What shards keep whole: as given, else the first of 1, 2, 3 that fits (the last if none)."""
    counted, wire = census(specs), choose_wire(run, layout)
    stages = stages or _stages(run, counted, layout)
    given = run.layout.zero
    alone = layout.shard == 1 and run.memory.offload == "none"
    whole = alone or layout.pipeline > 1 or wire.canonical
    for zero in (1,) if whole else (1, 2, 3) if given == "auto" else (int(given),):
        memory = rank_memory(run, counted, layout, wire, cluster.device, zero, stages)
        reason = _too_big(memory, layout, cluster)
        if not reason:
            break
    return Fitting(stages, wire, zero, memory, reason)


def _too_big(memory: Memory, layout: Layout, cluster: Cluster) -> str:
    ranks = ranks_per_host(layout, cluster) if cluster.device == "cpu" else 1
    needed = (memory.total_bytes + OVERHEAD_BYTES[cluster.device]) * ranks
    if needed <= FITS * cluster.memory_bytes:
        return ""
    item = max(memory.items, key=lambda name: memory.items[name])
    return (
        f"needs {needed / MIB:,.0f} MiB of {FITS * cluster.memory_bytes / MIB:,.0f} MiB"
        f" ({item} {memory.items[item] / MIB:,.0f} MiB a rank)"
    )


def choose_threads(run: Run, layout: Layout, cluster: Cluster) -> int:
    """Threads of a rank: as given, one when exact, else an equal share of the host's cores, or one
    where a CPU was measured and waking others for each operator costs more than they bring."""
    if run.launch.threads != "auto":
        return int(run.launch.threads)
    share = max(1, cluster.cores // ranks_per_host(layout, cluster))
    if run.run.exact or share == 1 or not cluster.measured:
        return 1 if run.run.exact else share
    work = microbatch_work(run, BYTES, cluster.device, layout)
    precision = run.run.precision
    return min((share, 1), key=lambda n: sum(microbatch_s(work, cluster, precision, n).values()))


def ranks_per_host(layout: Layout, cluster: Cluster) -> int:
    """Ranks of the fullest host."""
    return -(-layout.size // cluster.hosts)


def predict(
    run: Run, cluster: Cluster, layout: Layout, specs: Specs, fitting: Fitting | None = None
) -> Candidate:
    """Time, bytes and memory of one step of `run` on `layout`, which must be legal."""
    counted = census(specs)
    fitting = fitting or fit(run, cluster, layout, counted)
    wire, memory = fitting.wire, fitting.memory
    threads = choose_threads(run, layout, cluster)
    slow = contention(cluster, ranks_per_host(layout, cluster), threads)
    load, times = _slowest(run, cluster, layout, counted, fitting)
    sent = traffic(run, counted, layout, wire, cluster, load)
    update = update_s(run, counted, cluster, threads, layout, load.parts)
    times["update"] = slow * update
    times.update({name: slow * seconds for name, seconds in sent.seconds.items()})
    times["step"] = STEP_S
    step_s = sum(times.values())
    precision = run.run.precision
    low, high = interval(cluster, precision, ranks_per_host(layout, cluster), threads)
    tokens = run.batch.microbatches * run.batch.microbatch * run.data.sequence
    work = microbatch_work(run, counted.vocabulary, cluster.device)
    subtrees = rank_subtrees(run, layout, wire, worker=0)
    predicted = Prediction(
        step_s=step_s,
        low_s=low * step_s,
        high_s=high * step_s,
        tokens_per_s=tokens / step_s,
        bytes_sent=gradient_bytes(counted, layout, wire, run, subtrees, fitting.stages.held(0)),
        bytes_items=sent.sent_bytes,
        memory_bytes=memory.total_bytes,
        overhead_bytes=OVERHEAD_BYTES[cluster.device],
        memory_items=memory.items,
        time_items=times,
        flops=run.batch.microbatches * work.flops,
        peak_flops=cluster.flops(precision)
        * min(layout.size * (threads if cluster.device == "cpu" else 1), cluster.slots),
        parameters=counted.parameters,
    )
    return Candidate(layout, threads, fitting, predicted)


def _stages(run: Run, counted: Census, layout: Layout) -> Stages:
    return make_stages(run.model, counted.vocabulary, run.layout, layout.pipeline)


def _slowest(
    run: Run, cluster: Cluster, layout: Layout, counted: Census, fitting: Fitting
) -> tuple[Load, dict[str, float]]:
    """The pipeline rank that computes longest, and its seconds of a step by stream."""
    threads = choose_threads(run, layout, cluster)
    slow = contention(cluster, ranks_per_host(layout, cluster), threads)
    rounds = _rounds(run, layout, slow)
    slowest: dict[str, float] = {}
    for _, parts in unlike(run, fitting.stages):
        work = microbatch_work(run, counted.vocabulary, cluster.device, layout, parts)
        streams = microbatch_s(work, cluster, run.run.precision, threads)
        if sum(streams.values()) > sum(slowest.values()):
            slowest, held = streams, parts
    times = {name: rounds * seconds for name, seconds in slowest.items()}
    load = Load(held, fitting.zero, sum(times.values()))
    if layout.pipeline > 1:
        each = worker_microbatches(run, layout)
        times["bubble"] = load.compute_s * bubble(run.layout, layout.pipeline, each)
    return load, times


def _rounds(run: Run, layout: Layout, slow: float) -> float:
    """Microbatches of the slowest worker, in units of one that has a core to itself.

    Where ranks share cores, those with less work leave them to the others: the mean counts.
    """
    total = run.batch.microbatches
    if run.data.placement == "replicate":
        return total * slow
    return max(-(-total // layout.workers), total / layout.workers * slow)
