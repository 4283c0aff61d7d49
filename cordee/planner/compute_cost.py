"""Operations of a step and the seconds they take: closed formulas, a dozen constants per device and
precision. A time is the sum of four streams: products, attention, element passes, dispatch.

The CPU's constants: forward + backward of the built-in model with 2-8 blocks (width 64-768,
sequence 64-1024, microbatch 1-16, vocabulary 256 and 8192, 1 and 2 threads, fp32 and bf16: 168
rows, each the minimum of 4-60 calls) on two idle Zen 4 cores with torch 2.13; non-negative least
squares on relative errors. Mean error: fp32 3.5 % (1 thread) and 8 % (2), bf16 4.5 % and 6 %; eight
rows in ten lie between 0.94 and 1.23 of the prediction. CUDA's meet the A100 and H100 rows of a
published table (72 rows, FSDP, 125 M - 13 B parameters, 8-512 devices) with 6 % mean error, 0.93 to
1.35; cuda fp32 is a guess between the two. `low_factor` and `high_factor` are wider, for other
machines. Whole steps of 13 short runs on the first machine (1-2 ranks, all protocols, 0.1-11 M
parameters) took 0.88 to 1.10 of the plan. A mixture's fixed time: 28 such rows, 4 to 32 experts.

`MEASURED_CONSTANTS` and `MUON_COSTS` are shares of a CPU's measured rates, by the same fit: 36 rows
of one thread (2-6 blocks, width 64-384, sequence 64-512, microbatch 2-16) on a machine with AMX, in
fp32 as it is and held to AVX2 (188 and 109 GFLOP/s, met with 4.7 %, 0.86 to 1.16) and in bf16 (5.2
%, 0.89 to 1.12); updates within 0.77 to 1.16.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cordee.config.model import ModelSettings
from cordee.config.run import Run
from cordee.hardware.devices import DEVICES
from cordee.layout.axes import Layout
from cordee.layout.counts import ORIGIN, TensorSpecs, count_tensors
from cordee.layout.stages import LayerRange
from cordee.planner.cluster import Cluster
from cordee.planner.profile import NOISY_SPREAD

MUON_ITERATIONS = 5
"""Newton-Schulz iterations of an orthogonalisation (Jordan 2024)."""

MUON_PEAK_SHARE = 0.88
"""Share of the bf16 peak that its products reach on a CPU (192 to 768 wide: 0.76 to 0.98)."""

CONTENTION = 0.03
"""All cores of a host busy with ranks: each is this much slower (measured: -5 to 3 %)."""
OVERSUBSCRIPTION = 1.2
"""More threads than cores lose this much beside the time they share (2 cores, 3 and 4 ranks)."""

ATTENTION_CHUNK = 128
CHUNKED_MAX_LENGTH = 1024
"""CPU attention keeps its probabilities up to this length, by chunks of queries (attention.py)."""

MMAP_THRESHOLD_BYTES = 32 << 20
PAGE_FAULT_S_PER_BYTE = 0.5e-9
"""CPU buffers above glibc's largest mmap threshold are mapped anew each time: page faults."""


@dataclass(frozen=True, kw_only=True)
class DeviceConstants:
    """Constants of one (device, precision). Shares are of the cluster's nominal figures."""

    matrix_share: float  # of peak, that large matrix products reach
    half_speed_rows: float = 0.0  # rows of a microbatch at which a product reaches half of that
    attention_share: float  # speed of causal attention, as a share of the products'
    bandwidth_share: float
    """Of element passes: of the memory's bandwidth, or of `Cluster.pass_bytes_per_s`."""
    passes_per_logit: float
    passes_per_weight: float
    passes_per_probability: float = 0.0
    """Element passes of a microbatch, forward and backward: over logits (cap, softmax, loss), over
    weights (casts, adding up gradients), over attention's probabilities where they are kept."""
    layer_s: float
    """Fixed time of a layer and microbatch, forward and backward (dispatch of its operations)."""
    router_s: float = 0.0
    expert_s: float = 0.0
    """What a mixture adds to it, and each of its experts on the rank (a CPU runs one by one)."""
    serial_matrix: float = 0.0
    serial_passes: float = 0.0
    """t threads are t / (1 + serial x (t - 1)) as fast as one, where that was not measured."""
    low_factor: float
    high_factor: float
    """The interval of a prediction."""


SELECTIVE_LAYERS = 2.2
"""CPU: selective recomputation asks a Python rule at every operation of a block, which costs as
much as the fixed time of so many blocks (bf16; measured, 5.2 ms a block and microbatch)."""

REFERENCE_OPERATOR_S = 5.7e-6
"""Small operator, forward and backward, of the machine on which fixed times were measured."""

LAYER_REGIONS, MATRIX_REGIONS = 115.0, 20.0
"""Operators for which threads are woken: of a layer and microbatch, forward and backward, and of a
matrix that Muon orthogonalises (fitted on runs of 1 and 2 threads, 0.1 to 11 M parameters)."""

STEP_OVERHEAD_S = 2e-3
"""Fixed time of a step: data, tally, records."""

_CPU = partial(DeviceConstants, serial_matrix=0.075, serial_passes=0.2)
_CPU_FP32 = partial(_CPU, router_s=2.2e-3, expert_s=0.28e-3)
_CPU_BF16 = partial(_CPU, layer_s=2.4e-3, router_s=2.8e-3, expert_s=0.46e-3)
_CUDA = partial(
    DeviceConstants, attention_share=0.38, bandwidth_share=0.7, passes_per_logit=12,
    passes_per_weight=3,
)  # fmt: skip

DEVICE_CONSTANTS: Mapping[tuple[str, str], DeviceConstants] = {
    ("cpu", "fp32"): _CPU_FP32(
        matrix_share=0.99, attention_share=0.74, bandwidth_share=0.193, passes_per_logit=11,
        passes_per_weight=2.0, passes_per_probability=3.0, layer_s=1.0e-3, low_factor=0.85,
        high_factor=1.35,
    ),
    ("cpu", "bf16"): _CPU_BF16(
        matrix_share=0.92, attention_share=0.71, bandwidth_share=0.54, passes_per_logit=23,
        passes_per_weight=2.0, passes_per_probability=5.7, low_factor=0.85, high_factor=1.45,
    ),
    ("cuda", "fp32"): _CUDA(
        matrix_share=0.75, half_speed_rows=250, layer_s=1.5e-3, low_factor=0.65, high_factor=1.7
    ),
    ("cuda", "bf16"): _CUDA(
        matrix_share=0.57, half_speed_rows=690, layer_s=2.1e-3, low_factor=0.7, high_factor=1.6
    ),
}  # fmt: skip

MEASURED_CONSTANTS: Mapping[str, DeviceConstants] = {
    "fp32": _CPU_FP32(
        matrix_share=0.95, attention_share=0.37, bandwidth_share=0.08, passes_per_logit=6.4,
        passes_per_weight=0.94, passes_per_probability=1.5, layer_s=0.79e-3, low_factor=0.8,
        high_factor=1.35,
    ),
    "bf16": _CPU_BF16(
        matrix_share=0.83, attention_share=0.2, bandwidth_share=0.074, passes_per_logit=6.0,
        passes_per_weight=2.15, passes_per_probability=0.65, low_factor=0.75, high_factor=1.45,
    ),
    "emulated": _CPU_BF16(
        matrix_share=1.15, attention_share=1.7, bandwidth_share=0.074, passes_per_logit=6.0,
        passes_per_weight=2.15, passes_per_probability=0.65, low_factor=0.6, high_factor=1.8,
    ),
}  # fmt: skip
"""Emulated: a precision without instructions, whose products are slower than fp32's."""


@dataclass(frozen=True)
class MuonCost:
    """Muon's orthogonalisation on a measured CPU: share of the products' rate, element passes, and
    small operators of a matrix."""

    share: float
    passes: float
    operators: float


MUON_COSTS: Mapping[str, MuonCost] = {
    "fp32": MuonCost(1.17, 43, 20),  # fewer products than are counted (optim/muon.py, by Gram)
    "bf16": MuonCost(3.3, 120, 62),  # casts and small matrices count, hardly the products
}

CLIP_BYTES = 12
"""Norm and scaling of a gradient, per parameter."""


@dataclass(frozen=True)
class MicrobatchCost:
    """One microbatch on one rank, forward and backward: operations, and elements that passes go
    over. `tokens` are those that its attention sees."""

    tokens: int
    layers: float
    """Blocks by their fixed cost: a third more for each that is computed again."""
    routers: float
    experts: float
    """Mixtures, and experts on this rank in all of them, counted likewise."""
    matrix_flops: float
    attention_flops: float
    block_elements: float
    logits: float
    weights: float
    probabilities: float
    flops: float
    """Operations of the model as MFU counts them: only what the result needs."""


SINGLE_RANK = Layout()
"""One rank: nothing is cut."""


def microbatch_cost(
    run: Run,
    vocabulary: int,
    device: str,
    layout: Layout = SINGLE_RANK,
    layer_ranges: Sequence[LayerRange] | None = None,
) -> MicrobatchCost:
    """Counts one microbatch of `run` on a rank that holds `layer_ranges` (None: every
    layer).

    6 operations per weight and token (forward 2, backward 4), and 12 x keys x width per token and
    layer for attention, where a causal query needs half of the sequence as keys (Chowdhery et al.
    2022, appendix B, count all of it); a CPU multiplies a little more (`keys_per_query`). The
    embedding's look-up is free; a tied head is not. Routing is taken as balanced.
    """
    model, ranges = run.model, layer_ranges or [all_layers(run)]
    tokens = run.batch.microbatch * run.data.sequence // layout.context
    split_tokens, layers, recomputed_layers = tokens / layout.tensor, 0, 0
    active_weights = recomputed_weights = elements = 0
    routers = 0.0
    # Over the stream and the hidden layer, forward and backward; their sum is fitted.
    stream_passes, hidden_passes = 36 if model.dropout else 24, 7 if model.mlp == "gated" else 4
    for is_moe, blocks, recomputed_blocks in block_counts(run, ranges):
        layers, recomputed_layers = layers + blocks, recomputed_layers + recomputed_blocks
        routers += (blocks + recomputed_blocks / 3) * is_moe
        active_weights += blocks * block_weights(model, is_moe)
        recomputed_weights += recomputed_blocks * block_weights(model, is_moe)
        hidden_elements = hidden_passes * hidden_width(model, is_moe)
        elements += blocks * (stream_passes * model.width + hidden_elements)
    head_weights = vocabulary * model.width if ranges[-1].has_head else 0
    window, half_sequence = model.window or math.inf, run.data.sequence / 2
    keys = min(keys_per_query(run.data.sequence, device), window)
    flops_per_key = 12.0 * split_tokens * layers * model.query_width
    matrix_flops = 6.0 * split_tokens * (active_weights + head_weights)
    # A second forward of some blocks: a third of forward and backward, products only when full.
    recompute, recompute_factor = run.memory.recompute, 1.0 + recomputed_layers / layers / 3
    selective_layers = recomputed_layers * (recompute == "selective" and device == "cpu")
    recompute_flops = 2.0 * split_tokens * recomputed_weights * (recompute == "full")
    return MicrobatchCost(
        tokens=tokens,
        layers=layers * recompute_factor + selective_layers * SELECTIVE_LAYERS,
        routers=routers,
        experts=routers * model.moe.experts / layout.expert,
        matrix_flops=matrix_flops + recompute_flops,
        attention_flops=flops_per_key * keys * recompute_factor,
        block_elements=split_tokens * elements * recompute_factor,
        logits=split_tokens * vocabulary if head_weights else 0.0,
        weights=(active_weights + head_weights) / layout.tensor
        + _inactive_weights(run, ranges, layout),
        probabilities=split_tokens * layers * model.heads * keys,
        flops=matrix_flops + flops_per_key * min(half_sequence, window),
    )


def all_layers(run: Run) -> LayerRange:
    return LayerRange(0, run.model.layers, True, True)


def block_counts(run: Run, layer_ranges: Sequence[LayerRange]) -> list[tuple[bool, int, int]]:
    """(whether they have experts, blocks, blocks computed again) in `layer_ranges`, both kinds."""
    dense_layers = run.model.moe.dense_layers if run.model.moe.experts else run.model.layers
    recompute_every = run.memory.recompute_every
    counts = []
    for is_moe in (False, True):
        blocks = recomputed_blocks = 0
        for layer_range in layer_ranges:
            start = max(layer_range.start, dense_layers) if is_moe else layer_range.start
            stop = max(start, layer_range.stop if is_moe else min(layer_range.stop, dense_layers))
            blocks += stop - start
            recomputed_blocks += -(-stop // recompute_every) - -(-start // recompute_every)
        if blocks:
            is_recomputed = run.memory.recompute != "none"
            counts.append((is_moe, blocks, recomputed_blocks * is_recomputed))
    return counts


def hidden_width(model: ModelSettings, is_moe: bool) -> int:
    """Hidden features that a token goes through in a block."""
    if not is_moe:
        return model.hidden_width
    return (model.moe.active + model.moe.shared) * model.expert_width


def block_weights(model: ModelSettings, is_moe: bool) -> int:
    """Weights of a block that a token is multiplied with."""
    attention = 2 * model.width * (model.query_width + model.kv_width)
    router = model.moe.experts * model.width if is_moe else 0
    mlp_matrices = 3 if model.mlp == "gated" else 2
    return attention + router + mlp_matrices * model.width * hidden_width(model, is_moe)


def _inactive_weights(run: Run, layer_ranges: Sequence[LayerRange], layout: Layout) -> float:
    """Weights of experts on one rank beyond those that a token is multiplied with."""
    model = run.model
    moe_blocks = sum(is_moe * blocks for is_moe, blocks, _ in block_counts(run, layer_ranges))
    expert_weights = (3 if model.mlp == "gated" else 2) * model.width * model.expert_width
    inactive_experts = model.moe.experts / layout.expert - model.moe.active / layout.tensor
    return moe_blocks * expert_weights * inactive_experts


def keys_per_query(length: int, device: str) -> float:
    """Keys that a causal query is multiplied with on average: half of the sequence; on a CPU, up to
    CHUNKED_MAX_LENGTH positions, those up to the end of the query's chunk (model/attention.py)."""
    if device != "cpu" or length > CHUNKED_MAX_LENGTH:
        return length / 2
    chunks = [
        (start, min(length, start + ATTENTION_CHUNK)) for start in range(0, length, ATTENTION_CHUNK)
    ]
    return sum(stop * (stop - start) for start, stop in chunks) / length


def device_constants(cluster: Cluster, precision: str) -> DeviceConstants:
    """The constants of these devices; fp16 and fp8 have bf16's, whose elements they share."""
    element = "fp32" if precision == "fp32" else "bf16"
    if cluster.measured and cluster.device == "cpu":
        is_emulated = cluster.flops(precision) < cluster.flops_fp32
        return MEASURED_CONSTANTS["emulated" if element == "bf16" and is_emulated else element]
    return DEVICE_CONSTANTS[DEVICES[cluster.device].cost_model, element]


def microbatch_s(
    cost: MicrobatchCost, cluster: Cluster, precision: str, threads: int
) -> dict[str, float]:
    """Seconds of one microbatch on one rank with the machine to itself, by stream."""
    constants = device_constants(cluster, precision)
    element_bytes = 4 if precision == "fp32" or cluster.device == "cpu" else 2
    speed = matrix_share(cluster, precision) * cluster.flops(precision)
    speed *= cost.tokens / (cost.tokens + constants.half_speed_rows)
    speed /= _product_slowdown(constants, threads, cluster)
    passes = (
        cost.block_elements
        + constants.passes_per_logit * cost.logits
        + constants.passes_per_weight * cost.weights
        + constants.passes_per_probability * cost.probabilities
    )
    bandwidth = constants.bandwidth_share * (cluster.pass_bytes_per_s or cluster.memory_bytes_per_s)
    bandwidth /= _pass_slowdown(constants, threads, cluster)
    dispatch = cluster.operator_s / REFERENCE_OPERATOR_S if cluster.operator_s else 1.0
    # Not measured: as far from fp8's peak as from bf16's, the head's product too.
    fp8_gain = cluster.flops_fp8 / cluster.flops_bf16 if precision == "fp8" else 1.0
    dispatch *= (
        constants.layer_s * cost.layers
        + constants.router_s * cost.routers
        + constants.expert_s * cost.experts
    )
    return {
        "matrices": cost.matrix_flops / (speed * fp8_gain),
        "attention": cost.attention_flops / (constants.attention_share * speed),
        "elementwise": passes * element_bytes / bandwidth,
        "dispatch": dispatch + _thread_wake_s(LAYER_REGIONS * cost.layers, threads, cluster),
    }


def matrix_share(cluster: Cluster, precision: str) -> float:
    """Share of peak that large matrix products reach on these devices."""
    share = cluster.bf16_share if precision != "fp32" else 0.0
    return share or device_constants(cluster, precision).matrix_share


def update_s(
    run: Run,
    specs: TensorSpecs,
    cluster: Cluster,
    threads: int,
    layout: Layout,
    layer_ranges: Sequence[LayerRange] | None = None,
) -> float:
    """Seconds of clip and update on the rank with most work of those that hold `layer_ranges`."""
    constants = device_constants(cluster, run.run.precision)
    traffic = 0.0
    for tensors in count_tensors(specs).rank_tensors(layout, ORIGIN, layer_ranges):
        rule = run.optim.rule.for_group(tensors.spec.group)
        traffic += tensors.elements * (rule.traffic_bytes(not run.run.exact) + CLIP_BYTES)
    slowdown = _pass_slowdown(constants, threads, cluster)
    seconds = traffic / cluster.memory_bytes_per_s * slowdown
    return seconds + sum(
        _muon_s(run, cluster, threads, group)
        for group in muon_groups(run, specs, layout, layer_ranges)
    )


def _muon_s(run: Run, cluster: Cluster, threads: int, group: MuonGroup) -> float:
    """Seconds of the orthogonalisations that fall to one rank."""
    constants = device_constants(cluster, run.run.precision)
    product_precision = muon_precision(run.run.precision, cluster)
    share = MUON_PEAK_SHARE if cluster.device == "cpu" else matrix_share(cluster, product_precision)
    seconds = 0.0
    if cluster.measured:
        cost = MUON_COSTS[product_precision]
        share = cost.share
        passes = 4 * cost.passes * group.elements / cluster.pass_bytes_per_s
        seconds = passes * _pass_slowdown(constants, threads, cluster)
        seconds += cost.operators * cluster.operator_s * group.matrices
        seconds += _thread_wake_s(MATRIX_REGIONS * group.matrices, threads, cluster)
    rate = share * cluster.flops(product_precision)
    return seconds + group.flops / rate * _product_slowdown(constants, threads, cluster)


def muon_precision(precision: str, cluster: Cluster) -> str:
    """What Muon's products are computed in (`optim/muon.product_dtype`): bf16 where the device has
    it and the run is not fp32."""
    is_native = cluster.device != "cpu" or cluster.flops_bf16 > cluster.flops_fp32
    return "bf16" if is_native and precision != "fp32" else "fp32"


def contention(cluster: Cluster, processes_per_host: int, threads: int) -> float:
    """How much slower each rank of a CPU host is beside its neighbours; 1 for accelerators."""
    if cluster.device != "cpu":
        return 1.0
    busy_threads = processes_per_host * threads
    sharing_cost = CONTENTION * min(1.0, (processes_per_host - 1) / max(1, cluster.cores - 1))
    is_crowded = busy_threads > cluster.cores
    crowding_factor = OVERSUBSCRIPTION * busy_threads / cluster.cores if is_crowded else 1.0
    return (1 + sharing_cost) * crowding_factor


def interval_factors(
    cluster: Cluster, precision: str, processes_per_host: int, threads: int
) -> tuple[float, float]:
    """(low, high) factors of a predicted step; CPU ranks with several threads suffer most from
    other programs, and ranks that share cores from each other."""
    constants = device_constants(cluster, precision)
    widening = 1.0 + min(1.0, cluster.spread) if cluster.spread > NOISY_SPREAD else 1.0
    if cluster.device != "cpu":
        return constants.low_factor, constants.high_factor
    is_crowded = processes_per_host * threads > cluster.cores
    high = constants.high_factor * (1.15 if threads > 1 else 1.0) * (1.3 if is_crowded else 1.0)
    return constants.low_factor / widening, high * widening


def page_fault_s(cluster: Cluster, buffer_bytes: float, buffers: int) -> float:
    """Time to map `buffers` new CPU buffers of `buffer_bytes` each."""
    if cluster.device != "cpu" or buffer_bytes < MMAP_THRESHOLD_BYTES:
        return 0.0
    return buffers * buffer_bytes * PAGE_FAULT_S_PER_BYTE


def _thread_wake_s(regions: float, threads: int, cluster: Cluster) -> float:
    return regions * cluster.region_s if threads > 1 else 0.0


def _product_slowdown(constants: DeviceConstants, threads: int, cluster: Cluster) -> float:
    return _slowdown(constants.serial_matrix, cluster.thread_products, threads, cluster)


def _pass_slowdown(constants: DeviceConstants, threads: int, cluster: Cluster) -> float:
    return _slowdown(constants.serial_passes, cluster.thread_passes, threads, cluster)


def _slowdown(serial_share: float, gain: float, threads: int, cluster: Cluster) -> float:
    """Time with `threads` over time with one. `gain`: how many times as fast all cores together
    are, where it was measured; it says what is serial."""
    if gain and cluster.cores > 1:
        serial_share = max(0.0, (cluster.cores / gain - 1) / (cluster.cores - 1))
    if cluster.device != "cpu":
        return 1.0
    return (1 + serial_share * (threads - 1)) / threads


@dataclass(frozen=True)
class MuonGroup:
    """Muon's matrices that one group of ranks shares."""

    axes: tuple[str, ...]
    ranks: int
    is_sharded: bool  # whether ranks hold parts of each matrix, or the same matrices
    flops: float  # of the rank with most
    elements: int  # of the rank with most
    all_elements: int
    matrices: int  # of one rank


def muon_groups(
    run: Run, specs: TensorSpecs, layout: Layout, layer_ranges: Sequence[LayerRange] | None = None
) -> list[MuonGroup]:
    """How Muon's work is shared: matrices cut by tensor or shard among the ranks that hold their
    parts, others among all that hold the same (nobody where replicated work is compared)."""
    if run.optim.name != "muon":
        return []
    is_replicated = run.data.placement == "replicate"
    shapes_by_group: dict[tuple[bool, tuple[str, ...]], list[tuple[int, ...]]] = {}
    for tensors in count_tensors(specs).rank_tensors(layout, ORIGIN, layer_ranges, "expert"):
        if tensors.spec.group != "matrices":
            continue
        axes = tuple(axis for axis, _ in tensors.spec.cuts(layout) if axis != "expert")
        is_sharded = bool(axes)
        axes = axes or (() if is_replicated else tensors.spec.replicated_axes(layout))
        shape = tensors.shape if tensors.spec.is_stacked else (1, *tensors.shape)
        shapes_by_group.setdefault((is_sharded, axes), []).extend([shape] * tensors.count)
    groups = []
    for (is_sharded, axes), shapes in shapes_by_group.items():
        ranks = math.prod(getattr(layout, axis) for axis in axes)
        flops, elements = max_rank_load(shapes, ranks)
        rank_matrices = -(-sum(shape[0] for shape in shapes) // ranks)
        total = sum(map(math.prod, shapes))
        groups.append(MuonGroup(axes, ranks, is_sharded, flops, elements, total, rank_matrices))
    return groups


def max_rank_load(shapes: Sequence[tuple[int, ...]], ranks: int) -> tuple[float, int]:
    """The most (operations, elements) that one rank gets of stacks of matrices, if the largest
    goes first to the rank with least (optim/muon.py, `assign_owners`)."""
    heap = [(0.0, rank, 0) for rank in range(min(ranks, len(shapes)))]
    for shape in sorted(shapes, key=newton_schulz_flops, reverse=True):
        flops, rank, elements = heap[0]
        new_load = (flops + newton_schulz_flops(shape), rank, elements + math.prod(shape))
        heapq.heapreplace(heap, new_load)
    return max(load[0] for load in heap), max(load[2] for load in heap)


def newton_schulz_flops(shape: tuple[int, ...]) -> float:
    """Operations of Muon's orthogonalisation of a stack [matrices, rows, columns ...]: 5 times
    X Xt, its square and a product with X."""
    matrices, *sides = shape[0], shape[1], math.prod(shape[2:])
    short_side, long_side = min(sides), max(sides)
    products = 4.0 * short_side * short_side * long_side + 2.0 * short_side**3
    return matrices * MUON_ITERATIONS * products
