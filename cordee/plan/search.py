"""All layouts of the given devices: enumerate, drop with a reason, predict, rank.

Not here: what is done with the winner (`plan.py`). Exhaustive: with the axes that run (islands and
shard) there are few hundred layouts even for 100,000 ranks, so nothing is approximated by a
heuristic. Traded away: microbatch size and M are the user's; they change the descent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cordee.config.run import LayoutSettings, Run
from cordee.layout.axes import BUILT, INSIDE, Layout, problems
from cordee.layout.tensors import TensorSpec, tensors
from cordee.plan import classifier
from cordee.plan.cluster import Cluster
from cordee.plan.costs import (
    STEP_S,
    contention,
    interval,
    microbatch_s,
    microbatch_work,
    update_s,
)
from cordee.plan.memory import (
    FITS,
    OVERHEAD_BYTES,
    Wire,
    rank_memory,
)
from cordee.plan.network import choose_wire, gradient_bytes, rank_subtrees, traffic

ON_PAPER = 8
"""Numbers of processes up to this are in the table also where there are fewer cores."""

MIB = 1 << 20


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
class Candidate:
    """A legal layout that fits, with its prediction."""

    layout: Layout
    threads: int
    wire: Wire
    predicted: Prediction


@dataclass(frozen=True)
class Rejected:
    """A layout, or some that differ in one degree, and why they are out."""

    layout: str
    reason: str


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first, and what was dropped."""

    ranked: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]


def search(
    run: Run, cluster: Cluster, vocabulary: int = 256, processes: int | None = None
) -> Ranking:
    """Every layout of `processes` ranks (or of 1 to all devices), ranked by time, then memory.

    Axes that the run gives are kept. Pure, a millisecond per layout.
    """
    specs = tuple(tensors(run.model, vocabulary))
    ranked: list[Candidate] = []
    rejected: list[Rejected] = []
    idle: list[int] = []
    uneven: list[int] = []
    barred = shards_barred(run)
    if barred is not None:
        rejected.append(Rejected("shard", barred[0]))
    for layout in candidates(run.layout, cluster, processes):
        if barred is not None and layout.shard > 1:
            continue
        crowd = _crowd(run, layout, idle, uneven)
        if crowd is not None:
            crowd.append(layout.size)
            continue
        reason = illegal(run, layout, cluster)
        if reason is None:
            made = predict(run, cluster, layout, specs)
            reason = too_big(made, cluster)
            if reason is None:
                ranked.append(made)
                continue
        rejected.append(Rejected(layout.describe(), reason))
    rejected += _crowds(run.batch.microbatches, idle, uneven)
    ranked.sort(key=lambda c: (c.predicted.step_s, c.predicted.memory_bytes, c.layout.size))
    return Ranking(tuple(ranked), (*rejected, *_not_built(cluster, processes)))


def candidates(
    wanted: LayoutSettings, cluster: Cluster, processes: int | None = None
) -> Iterator[Layout]:
    """Layouts of the axes that run, fewest ranks first, consistent with the degrees given."""
    given = {axis: getattr(wanted, axis) for axis in INSIDE if getattr(wanted, axis) != "auto"}
    any_given = bool(given) or wanted.islands != "auto"
    counts = [processes] if processes is not None else _counts(cluster)
    for count in counts:
        shards = [int(given.get("shard", 1))] if any_given else _divisors(count)
        for shard in shards:
            islands, left = divmod(count, shard)
            if left or wanted.islands not in ("auto", islands):
                continue
            if any(int(given.get(axis, 1)) > 1 for axis in INSIDE if axis != "shard"):
                continue
            yield Layout(island=islands, shard=shard)


def illegal(run: Run, layout: Layout, cluster: Cluster) -> str | None:
    """Why `layout` cannot run, whatever it costs; None when it can."""
    found = layout_problems(run, layout)
    if found:
        return found[0][0]
    if cluster.device == "cuda" and layout.size > cluster.slots:
        return f"{layout.size} processes but {cluster.slots} devices"
    return None


def layout_problems(run: Run, layout: Layout) -> list[tuple[str, str]]:
    """(reason, nearest fix) pairs: axes, microbatches, rules that shards break, useless shards."""
    replicated = run.data.placement == "replicate"
    # Replicated islands each compute every microbatch, so only one island's share must divide.
    found = problems(replace(layout, island=1) if replicated else layout, run.batch.microbatches)
    found += classifier.barred(run, layout)
    if layout.shard > 1:
        barred = shards_barred(run)
        found += [barred] if barred is not None else []
        if layout.shard > run.model.width:
            reason = f"shard {layout.shard} exceeds model.width={run.model.width}: some ranks would"
            found.append((f"{reason} hold no row", f"layout.shard={run.model.width}"))
    return found


def shards_barred(run: Run) -> tuple[str, str] | None:
    """(reason, nearest fix) when this run cannot shard at all."""
    if run.data.placement == "replicate":
        return "replicated work is compared between whole islands of one rank", "layout.shard=1"
    if run.optim.name == "adafactor":
        return "adafactor keeps statistics of whole rows and columns", "optim.name=adamw"
    return None


def too_big(made: Candidate, cluster: Cluster) -> str | None:
    """Why a candidate does not fit into its device (or host, on CPU); None when it does."""
    ranks = ranks_per_host(made.layout, cluster) if cluster.device == "cpu" else 1
    needed = (made.predicted.memory_bytes + made.predicted.overhead_bytes) * ranks
    if needed <= FITS * cluster.memory_bytes:
        return None
    item = max(made.predicted.memory_items, key=lambda k: made.predicted.memory_items[k])
    size = made.predicted.memory_items[item]
    return (
        f"needs {needed / MIB:,.0f} MiB of {FITS * cluster.memory_bytes / MIB:,.0f} MiB"
        f" ({item} {size / MIB:,.0f} MiB a rank)"
    )


def choose_threads(run: Run, layout: Layout, cluster: Cluster) -> int:
    """Threads of a rank: as given, one when exact, else an equal share of the host's cores."""
    if run.launch.threads != "auto":
        return int(run.launch.threads)
    if run.run.exact:
        return 1
    return max(1, cluster.cores // ranks_per_host(layout, cluster))


def ranks_per_host(layout: Layout, cluster: Cluster) -> int:
    """Ranks of the fullest host."""
    return -(-layout.size // cluster.hosts)


def predict(run: Run, cluster: Cluster, layout: Layout, specs: Sequence[TensorSpec]) -> Candidate:
    """Time, bytes and memory of one step of `run` on `layout`."""
    wire = choose_wire(run, layout)
    threads = choose_threads(run, layout, cluster)
    precision = run.run.precision
    work = microbatch_work(run, specs[0].shape[0], cluster.device)
    slow = contention(cluster, ranks_per_host(layout, cluster), threads)
    rounds = _rounds(run, layout, slow)
    streams = microbatch_s(work, cluster, precision, threads)
    times = {name: rounds * seconds for name, seconds in streams.items()}
    sent = traffic(run, specs, layout, wire, cluster, sum(times.values()))
    times["update"] = slow * update_s(run, specs, cluster, threads, layout)
    times.update({name: slow * seconds for name, seconds in sent.seconds.items()})
    times["step"] = STEP_S
    step_s = sum(times.values())
    low, high = interval(cluster, precision, ranks_per_host(layout, cluster), threads)
    memory = rank_memory(run, specs, layout, wire, cluster.device)
    tokens = run.batch.microbatches * work.tokens
    predicted = Prediction(
        step_s=step_s,
        low_s=low * step_s,
        high_s=high * step_s,
        tokens_per_s=tokens / step_s,
        bytes_sent=gradient_bytes(
            specs, layout, wire, run, rank_subtrees(run, layout, wire, worker=0)
        ),
        bytes_items=sent.sent_bytes,
        memory_bytes=memory.total_bytes,
        overhead_bytes=OVERHEAD_BYTES[cluster.device],
        memory_items=memory.items,
        time_items=times,
        flops=run.batch.microbatches * work.flops,
        peak_flops=cluster.flops(precision)
        * min(layout.size * (threads if cluster.device == "cpu" else 1), cluster.slots),
        parameters=sum(spec.elements for spec in specs),
    )
    return Candidate(layout, threads, wire, predicted)


def _rounds(run: Run, layout: Layout, slow: float) -> float:
    """Microbatches of the slowest worker, in units of one that has a core to itself.

    Where ranks share cores, those with less work leave them to the others: the mean counts.
    """
    total = run.batch.microbatches
    if run.data.placement == "replicate":
        return total * slow
    return max(-(-total // layout.workers), total / layout.workers * slow)


def _counts(cluster: Cluster) -> list[int]:
    """Numbers of ranks to consider: all small ones, powers of two, divisors of all devices."""
    slots = cluster.slots
    most = max(slots, ON_PAPER) if cluster.device == "cpu" else slots
    powers = {1 << k for k in range(most.bit_length())}
    found = set(range(1, min(most, ON_PAPER) + 1)) | powers | set(_divisors(slots))
    return sorted(count for count in found if count <= most)


def _divisors(count: int) -> list[int]:
    small = [d for d in range(1, int(count**0.5) + 1) if count % d == 0]
    return sorted({*small, *(count // d for d in small)})


def _crowd(run: Run, layout: Layout, idle: list[int], uneven: list[int]) -> list[int] | None:
    """The list that a layout belongs to when M microbatches do not do for its ranks."""
    if run.data.placement == "replicate":
        return None
    if layout.workers > run.batch.microbatches:
        return idle
    return uneven if layout.shard > 1 and run.batch.microbatches % layout.workers else None


def _crowds(microbatches: int, idle: list[int], uneven: list[int]) -> Iterator[Rejected]:
    """One line for all numbers of ranks that exceed M, one for those that do not divide it."""
    if uneven:
        yield Rejected(
            f"shards on {_numbers(uneven)} ranks",
            f"{microbatches} microbatches do not divide over them, as shards need",
        )
    if idle:
        yield Rejected(
            f"{_numbers(idle)} ranks",
            f"{microbatches} microbatches give work to at most {microbatches} ranks"
            f" (batch.microbatches={max(idle)})",
        )


def _numbers(counts: Sequence[int]) -> str:
    """Different numbers as text: all when they are few, else the first and last."""
    found = sorted(set(counts))
    if len(found) > 6:
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def _not_built(cluster: Cluster, processes: int | None) -> Iterator[Rejected]:
    """Axes that the tables know and this version does not run, grouped."""
    most = processes or max(cluster.slots, ON_PAPER if cluster.device == "cpu" else 1)
    degrees = ", ".join(str(1 << k) for k in range(1, min(most, ON_PAPER).bit_length()))
    if degrees:
        built = " and ".join(f"{axis}s" if axis == "island" else axis for axis in BUILT)
        others = [axis for axis in INSIDE if axis not in (*BUILT, "expert")]
        told = f"this version runs the axes {built}"
        yield Rejected(f"{', '.join(others)} of {degrees}", told)
        yield Rejected(f"expert of {degrees}", f"the model has no experts; {told}")
