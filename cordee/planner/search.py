"""All layouts of the given devices: enumerate, drop with a reason, predict, rank.

Degrees of each axis are tried alone first, so that what no combination repairs is dropped once and
named once. Microbatch size and M, which change the descent, stay as the user has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cordee.config.run import LayoutSettings, Run
from cordee.layout.axes import MODEL_AXES, Layout
from cordee.layout.counts import TensorCounts, TensorSpecs, count_model_tensors, count_tensors
from cordee.layout.stages import Stages, make_stages
from cordee.layout.validate import Violation, degree_violations, rank_microbatches, violations
from cordee.planner.activations import bubble_ratio
from cordee.planner.cluster import Cluster, single_device_reason, with_precision
from cordee.planner.compute_cost import (
    STEP_OVERHEAD_S,
    contention,
    interval_factors,
    microbatch_cost,
    microbatch_s,
    update_s,
)
from cordee.planner.memory import (
    OVERHEAD_BYTES,
    USABLE_MEMORY_SHARE,
    RankMemory,
    SyncChoice,
    distinct_stages,
    rank_memory,
)
from cordee.planner.network import (
    RankLoad,
    choose_sync,
    gradient_bytes,
    step_traffic,
    subtree_count,
)

FULL_SEARCH_SIZE = 8
"""Numbers of processes up to this are in the table also where there are fewer cores."""

MIN_CONTEXT_CHUNK = 128
"""Positions that a chunk of a sequence should have at least: attention's own chunks."""

MIB = 1 << 20
BYTE_VOCABULARY = 256
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
class FitResult:
    """How a layout is cut into stages and sharded, the memory of its fullest rank, and why that
    does not fit into its device (or host, on CPU); empty when it does."""

    stages: Stages
    sync: SyncChoice
    zero: int
    memory: RankMemory
    reason: str


@dataclass(frozen=True)
class CandidateLayout:
    """A legal layout with its prediction."""

    layout: Layout
    threads: int
    fit_result: FitResult
    prediction: Prediction


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first, and what was dropped."""

    candidates: tuple[CandidateLayout, ...]
    rejections: tuple[Rejection, ...]
    nearest_fit: tuple[Layout, FitResult] | None
    """Of those that do not fit, the one that needs least."""


def search(
    run: Run, cluster: Cluster, vocabulary: int = 256, processes: int | None = None
) -> Ranking:
    """Every layout of `processes` ranks (or of 1 to all devices), ranked by time, then memory.

    Axes that the run gives are kept. Smaller numbers of ranks than there are devices are cut by
    shards only, unless no layout of all devices is legal. Pure, a millisecond per layout.
    """
    run = with_precision(run, cluster)
    tensor_counts = count_model_tensors(run.model, vocabulary)
    sizes = [processes] if processes is not None else world_sizes(cluster)
    rejections, state = Rejections(), _SearchState()
    for is_second_pass in (False, True):
        domains = axis_domains(run, cluster, tensor_counts, sizes, rejections)
        for layout in candidate_layouts(run.layout, domains, sizes, is_second_pass):
            state.visit(run, cluster, tensor_counts, layout, rejections)
        if sizes[-1] in state.legal_sizes:
            break
    state.candidates.sort(
        key=lambda c: (c.prediction.step_s, c.prediction.memory_bytes, c.layout.size)
    )
    return Ranking(tuple(state.candidates), tuple(rejections.summarize()), state.nearest_fit)


@dataclass
class _SearchState:
    """The layouts visited so far; `legal_sizes` are the numbers of ranks of legal ones."""

    candidates: list[CandidateLayout] = field(default_factory=list)
    legal_sizes: set[int] = field(default_factory=set)
    nearest_fit: tuple[Layout, FitResult] | None = None
    stages_by_degree: dict[int, Stages] = field(default_factory=dict)

    def visit(
        self,
        run: Run,
        cluster: Cluster,
        tensor_counts: TensorCounts,
        layout: Layout,
        rejections: Rejections,
    ) -> None:
        if rules := violations(run, layout, tensor_counts):
            rejections.add_violation(rules[0], layout)
            return
        self.legal_sizes.add(layout.size)
        if layout.pipeline not in self.stages_by_degree:
            self.stages_by_degree[layout.pipeline] = _stages_of(run, tensor_counts, layout)
        fit_result = fit_layout(
            run, cluster, layout, tensor_counts, self.stages_by_degree[layout.pipeline]
        )
        if not fit_result.reason:
            self.candidates.append(predict(run, cluster, layout, tensor_counts, fit_result))
            return
        needed_bytes = fit_result.memory.total_bytes
        rejections.add_misfit(layout, fit_result.reason, needed_bytes)
        if self.nearest_fit is None or needed_bytes < self.nearest_fit[1].memory.total_bytes:
            self.nearest_fit = layout, fit_result


def fit_layout(
    run: Run, cluster: Cluster, layout: Layout, specs: TensorSpecs, stages: Stages | None = None
) -> FitResult:
    """What shards keep whole: as given, else the first of 1, 2, 3 that fits (the last if none)."""
    tensor_counts, sync = count_tensors(specs), choose_sync(run, layout)
    stages = stages or _stages_of(run, tensor_counts, layout)
    is_unsharded = layout.shard == 1 and run.memory.offload == "none"
    choices = (1, 2, 3) if run.layout.zero == "auto" else (int(run.layout.zero),)
    if is_unsharded or layout.pipeline > 1 or sync.is_canonical:
        choices = (1,)  # gradients stay whole
    for zero in choices:
        memory = rank_memory(run, tensor_counts, layout, sync, cluster.device, zero, stages)
        reason = _misfit_reason(memory, layout, cluster)
        if not reason:
            break
    return FitResult(stages, sync, zero, memory, reason)


def _misfit_reason(memory: RankMemory, layout: Layout, cluster: Cluster) -> str:
    ranks = ranks_per_host(layout, cluster) if cluster.device == "cpu" else 1
    needed_bytes = (memory.total_bytes + OVERHEAD_BYTES[cluster.device]) * ranks
    usable_bytes = USABLE_MEMORY_SHARE * cluster.memory_bytes
    if needed_bytes <= usable_bytes:
        return ""
    item, item_bytes = max(memory.peak_items.items(), key=lambda pair: pair[1])
    return (
        f"needs {needed_bytes / MIB:,.0f} MiB of {usable_bytes / MIB:,.0f} MiB"
        f" ({item} {item_bytes / MIB:,.0f} MiB a rank)"
    )


def choose_threads(run: Run, layout: Layout, cluster: Cluster) -> int:
    """Threads of a rank: as given, one when exact, else an equal share of the host's cores, or one
    where a CPU was measured and waking others for each operator costs more than they bring."""
    if run.launch.threads != "auto":
        return int(run.launch.threads)
    share = max(1, cluster.cores // ranks_per_host(layout, cluster))
    if run.run.exact or share == 1 or not cluster.measured:
        return 1 if run.run.exact else share
    cost = microbatch_cost(run, BYTE_VOCABULARY, cluster.device, layout)
    precision = run.run.precision
    return min((share, 1), key=lambda n: sum(microbatch_s(cost, cluster, precision, n).values()))


def ranks_per_host(layout: Layout, cluster: Cluster) -> int:
    return -(-layout.size // cluster.hosts)


def predict(
    run: Run,
    cluster: Cluster,
    layout: Layout,
    specs: TensorSpecs,
    fit_result: FitResult | None = None,
) -> CandidateLayout:
    """Time, bytes and memory of one step of `run` on `layout`, which must be legal."""
    tensor_counts = count_tensors(specs)
    fit_result = fit_result or fit_layout(run, cluster, layout, tensor_counts)
    sync, memory = fit_result.sync, fit_result.memory
    threads, host_ranks = choose_threads(run, layout, cluster), ranks_per_host(layout, cluster)
    slowdown = contention(cluster, host_ranks, threads)
    load, times = _slowest_rank(run, cluster, layout, tensor_counts, fit_result)
    comm = step_traffic(run, tensor_counts, layout, sync, cluster, load)
    update_seconds = update_s(run, tensor_counts, cluster, threads, layout, load.layer_ranges)
    times["update"] = slowdown * update_seconds
    times.update({name: slowdown * seconds for name, seconds in comm.seconds.items()})
    times["step"] = STEP_OVERHEAD_S
    step_s = sum(times.values())
    precision = run.run.precision
    low_factor, high_factor = interval_factors(cluster, precision, host_ranks, threads)
    tokens = run.batch.microbatches * run.batch.microbatch * run.data.sequence
    cost = microbatch_cost(run, tensor_counts.vocabulary, cluster.device)
    subtrees = subtree_count(run, layout, sync, dp_rank=0)
    first_ranges = fit_result.stages.layer_ranges(0)
    busy_devices = layout.size * (threads if cluster.device == "cpu" else 1)
    prediction = Prediction(
        step_s=step_s,
        low_s=low_factor * step_s,
        high_s=high_factor * step_s,
        tokens_per_s=tokens / step_s,
        bytes_sent=gradient_bytes(tensor_counts, layout, sync, run, subtrees, first_ranges),
        bytes_items=comm.sent_bytes,
        memory_bytes=memory.total_bytes,
        overhead_bytes=OVERHEAD_BYTES[cluster.device],
        memory_items=memory.peak_items,
        time_items=times,
        flops=run.batch.microbatches * cost.flops,
        peak_flops=cluster.flops(precision) * min(busy_devices, cluster.slots),
        parameters=tensor_counts.parameters,
    )
    return CandidateLayout(layout, threads, fit_result, prediction)


def _stages_of(run: Run, tensor_counts: TensorCounts, layout: Layout) -> Stages:
    return make_stages(run.model, tensor_counts.vocabulary, run.layout, layout.pipeline)


def _slowest_rank(
    run: Run, cluster: Cluster, layout: Layout, tensor_counts: TensorCounts, fit_result: FitResult
) -> tuple[RankLoad, dict[str, float]]:
    """The pipeline rank that computes longest, and its seconds of a step by stream."""
    threads = choose_threads(run, layout, cluster)
    slowdown = contention(cluster, ranks_per_host(layout, cluster), threads)
    microbatches = _effective_microbatches(run, layout, slowdown)
    slowest_streams: dict[str, float] = {}
    for _, layer_ranges in distinct_stages(run, fit_result.stages):
        cost = microbatch_cost(run, tensor_counts.vocabulary, cluster.device, layout, layer_ranges)
        streams = microbatch_s(cost, cluster, run.run.precision, threads)
        if sum(streams.values()) > sum(slowest_streams.values()):
            slowest_streams, slowest_ranges = streams, layer_ranges
    times = {name: microbatches * seconds for name, seconds in slowest_streams.items()}
    load = RankLoad(slowest_ranges, fit_result.zero, sum(times.values()))
    if layout.pipeline > 1:
        rank_share = rank_microbatches(run, layout)
        times["bubble"] = load.compute_s * bubble_ratio(run.layout, layout.pipeline, rank_share)
    return load, times


def _effective_microbatches(run: Run, layout: Layout, slowdown: float) -> float:
    """Microbatches of the slowest worker, in units of one that has a core to itself.

    Where ranks share cores, those with less work leave them to the others: the mean counts.
    """
    total = run.batch.microbatches
    if run.data.placement == "replicate":
        return total * slowdown
    return max(-(-total // layout.dp_size), total / layout.dp_size * slowdown)


@dataclass(frozen=True)
class Rejection:
    """Layouts that are out for one reason, and that reason."""

    layout: str
    reason: str


@dataclass
class Rejections:
    """Why layouts are out: by rule and degree, or by the memory that they need."""

    degrees_by_rule: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    misfits_by_size: dict[int, list[tuple[int, str, str]]] = field(default_factory=dict)

    def add_violation(self, violation: Violation, layout: Layout) -> None:
        degree = layout.dp_size if violation.axis == "workers" else getattr(layout, violation.axis)
        self.add_degree(violation.axis, violation.clause, degree)

    def add_degree(self, axis: str, clause: str, degree: int) -> None:
        self.degrees_by_rule.setdefault((axis, clause), set()).add(degree)

    def add_misfit(self, layout: Layout, reason: str, needed_bytes: int) -> None:
        misfits = self.misfits_by_size.setdefault(layout.size, [])
        misfits.append((needed_bytes, layout.describe(), reason))

    def summarize(self) -> Iterator[Rejection]:
        """One line for each rule, and for what does not fit one for each number of ranks."""
        for (axis, clause), degrees in self.degrees_by_rule.items():
            text = numbers_text(degrees)
            yield Rejection(f"{text} workers" if axis == "workers" else f"{axis} {text}", clause)
        for size, misfits in sorted(self.misfits_by_size.items()):
            _, smallest, reason = min(misfits)
            if len(misfits) == 1:
                yield Rejection(smallest, reason)
            else:
                text = f"{len(misfits)} layouts of {size} rank{'s' if size > 1 else ''}"
                yield Rejection(text, f"the smallest, {smallest}, {reason}")


def candidate_layouts(
    settings: LayoutSettings,
    domains: Mapping[str, Sequence[int]],
    sizes: Sequence[int],
    is_second_pass: bool,
) -> Iterator[Layout]:
    """Layouts, fewest ranks first, with the degrees that the run gives.

    Where it gives none, all axes are combined on up to FULL_SEARCH_SIZE ranks and on the largest
    number, islands and shards on the others; `is_second_pass`: what that leaves out.
    """
    degrees = {
        axis: getattr(settings, axis) for axis in MODEL_AXES if getattr(settings, axis) != "auto"
    }
    if degrees or settings.islands != "auto":
        for size in sizes if not is_second_pass else ():
            yield from _requested_layout(settings.islands, degrees, size)
        return
    shard_domains = {**dict.fromkeys(MODEL_AXES, (1,)), "shard": domains["shard"]}
    for size in sizes:
        is_full_search = size <= FULL_SEARCH_SIZE or size == sizes[-1]
        if not is_second_pass:
            yield from _degree_products(domains if is_full_search else shard_domains, size)
        elif not is_full_search:
            layouts = _degree_products(domains, size)
            yield from (layout for layout in layouts if layout.island * layout.shard < layout.size)


def axis_domains(
    run: Run,
    cluster: Cluster,
    tensor_counts: TensorCounts,
    sizes: Sequence[int],
    rejections: Rejections,
) -> dict[str, list[int]]:
    """Degrees of every axis inside an island that divide one of `sizes`, are legal alone and worth
    a try."""
    degrees = sorted({d for size in sizes for d in divisors(size)} - {1})
    domains: dict[str, list[int]] = {}
    for axis in MODEL_AXES:
        domains[axis] = [1]
        for degree in degrees:
            layout = Layout(**{axis: degree})
            rules = [
                rule for rule in degree_violations(run, layout, tensor_counts) if rule.axis == axis
            ]
            if clause := rules[0].clause if rules else _slow_reason(run, cluster, axis, degree):
                rejections.add_degree(axis, clause, degree)
            else:
                domains[axis].append(degree)
    return domains


def world_sizes(cluster: Cluster) -> list[int]:
    """Numbers of ranks to consider: all small ones, powers of two, divisors of all devices."""
    slots = cluster.slots
    max_size = max(slots, FULL_SEARCH_SIZE) if cluster.device == "cpu" else slots
    powers = {1 << k for k in range(max_size.bit_length())}
    sizes = set(range(1, min(max_size, FULL_SEARCH_SIZE) + 1)) | powers | set(divisors(slots))
    return sorted(size for size in sizes if size <= max_size)


def divisors(count: int) -> list[int]:
    small_divisors = [d for d in range(1, int(count**0.5) + 1) if count % d == 0]
    return sorted({*small_divisors, *(count // d for d in small_divisors)})


def numbers_text(values: set[int]) -> str:
    """Different numbers as text: all when they are few, else the first and last."""
    numbers = sorted(values)
    if len(numbers) > 6:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _requested_layout(
    islands: int | str, degrees: Mapping[str, int], size: int
) -> Iterator[Layout]:
    """The one layout of `size` ranks with these degrees, if there is one; others are 1."""
    island_layout = Layout(**degrees)
    island_count, remainder = divmod(size, island_layout.size)
    if remainder == 0 and island_count and islands in ("auto", island_count):
        yield Layout(**{**degrees, "island": island_count})


def _slow_reason(run: Run, cluster: Cluster, axis: str, degree: int) -> str:
    """Why a legal degree is not tried; a layout that the user gives is planned all the same."""
    if reason := single_device_reason(cluster):
        return reason
    if axis == "tensor" and cluster.device != "cpu" and degree > cluster.devices:
        return f"is never quick beyond the {cluster.devices} devices of a host: not tried"
    if axis == "context" and run.data.sequence < 2 * degree * MIN_CONTEXT_CHUNK:
        return f"is never quick in chunks below {MIN_CONTEXT_CHUNK} positions: not tried"
    return ""


def _degree_products(domains: Mapping[str, Sequence[int]], size: int) -> Iterator[Layout]:
    """Every product of degrees that divides `size`; islands are the rest."""
    choices: list[dict[str, int]] = [{}]
    quotients = [size]
    for axis in reversed(MODEL_AXES):
        next_choices: list[dict[str, int]] = []
        next_quotients: list[int] = []
        for index, degrees in enumerate(choices):
            for degree in domains[axis]:
                if quotients[index] % degree == 0:
                    next_quotients.append(quotients[index] // degree)
                    next_choices.append({**degrees, axis: degree})
        choices, quotients = next_choices, next_quotients
    for index, degrees in enumerate(choices):
        yield Layout(**{**degrees, "island": quotients[index]})
