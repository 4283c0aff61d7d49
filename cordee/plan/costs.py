"""Arithmetic of a step and the time it takes: closed formulas and a few constants per kind.

Not here: messages (`network.py`) and bytes held (`memory.py`). Traded away: efficiency by exact
shape, which needs a measured profile. A kind (device, precision) has a dozen constants; time is
the sum of four streams (matrix products, attention, element passes, fixed cost of a layer).

How the CPU's constants were obtained: a script timed forward + backward of the built-in model with
2-8 blocks (width 64-768, sequence 64-1024, microbatch 1-16, vocabulary 256 and 8192, 1 and 2
threads, fp32 and bf16 autocast: 168 rows, each the minimum of 4-60 calls on idle cores) on two
Zen 4 cores with torch 2.13; non-negative least squares on relative errors gave the columns of
`KINDS`. Mean error of that fit: fp32 3.5 % (1 thread) and 8 % (2 threads), bf16 4.5 % and 6 %;
eight rows in ten lie between 0.94 and 1.23 of the prediction. CUDA's: A100 and H100 rows with FSDP
and no recomputation of a published table (72 rows, 125 M - 13 B parameters, 8-512 devices) are met
with 6 % mean error, 0.93 to 1.35; other software moves them more. `low` and `high` are wider than
both, for other machines: a kind is not a measured device. Whole steps of 13 short runs on the
first machine (1-2 ranks, all protocols, shards, 0.1-11 M parameters) took 0.88 to 1.10 of the plan.
A mixture's fixed time is from 28 such rows with 4 to 32 experts.

Of a measured CPU (`MEASURED`, `MUON`) the same fit was made against its profile's rates: 36 rows of
one thread (2-6 blocks, width 64-384, sequence 64-512, microbatch 2-16) on a machine with AMX, in
fp32 as it is and held to AVX2 (rates 188 and 109 GFLOP/s, met with 4.7 %, 0.86 to 1.16) and in bf16
(5.2 %, 0.89 to 1.12); updates within 0.77 to 1.16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cordee.config.model import ModelSettings
from cordee.config.run import Run
from cordee.devices import DEVICES
from cordee.layout.axes import Layout
from cordee.layout.census import ORIGIN, Specs, census
from cordee.layout.stages import Part
from cordee.plan.classifier import microbatch_counts
from cordee.plan.cluster import Cluster
from cordee.plan.dealing import Deal, deals
from cordee.plan.profile import NOISY

MUON_SHARE = 0.88
"""Share of the bf16 peak that they reach on a CPU (192 to 768 wide: 0.76 to 0.98)."""

CONTENTION = 0.03
"""All cores of a host busy with ranks: each is this much slower (measured: -5 to 3 %)."""
OVERSUBSCRIBED = 1.2
"""More threads than cores lose this much beside the time they share (2 cores, 3 and 4 ranks)."""

CHUNK = 128
CHUNKED_UP_TO = 1024
"""CPU attention keeps its probabilities up to this length, by chunks of queries (attention.py)."""

FRESH_BYTES = 32 << 20
FRESH_S_PER_BYTE = 0.5e-9
"""CPU buffers above glibc's largest mmap threshold are mapped anew each time: page faults."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Constants of one (device, precision). Shares are of the cluster's nominal figures."""

    matrix: float
    """Share of peak that large matrix products reach."""
    rows: float = 0.0
    """Rows of a microbatch at which a product reaches half of that."""
    attention: float
    """Speed of causal attention, forward and backward, as a share of the products'."""
    bandwidth: float
    """Share of the bandwidth that element passes reach: of the memory's, or of that of the measured
    pass (`Cluster.pass_bytes_per_s`)."""
    per_logit: float
    per_weight: float
    per_probability: float = 0.0
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
    low: float
    high: float
    """The step takes between low x and high x what is predicted."""


SELECTIVE_LAYERS = 2.2
"""CPU: selective recomputation asks a Python rule at every operation of a block, which costs as
much as the fixed time of so many blocks (bf16; measured, 5.2 ms a block and microbatch)."""

USUAL_OPERATOR_S = 5.7e-6
"""Small operator, forward and backward, of the machine on which fixed times were measured."""

LAYER_REGIONS, MATRIX_REGIONS = 115.0, 20.0
"""Operators for which threads are woken: of a layer and microbatch, forward and backward, and of a
matrix that Muon orthogonalises (fitted on runs of 1 and 2 threads, 0.1 to 11 M parameters)."""

STEP_S = 2e-3
"""Fixed time of a step: data, tally, records."""

KINDS: Mapping[tuple[str, str], Kind] = {
    ("cpu", "fp32"): Kind(
        matrix=0.99, attention=0.74, bandwidth=0.193, per_logit=11, per_weight=2.0,
        per_probability=3.0, layer_s=1.0e-3, router_s=2.2e-3, expert_s=0.28e-3,
        serial_matrix=0.075, serial_passes=0.2, low=0.85, high=1.35,
    ),
    ("cpu", "bf16"): Kind(
        matrix=0.92, attention=0.71, bandwidth=0.54, per_logit=23, per_weight=2.0,
        per_probability=5.7, layer_s=2.4e-3, router_s=2.8e-3, expert_s=0.46e-3,
        serial_matrix=0.075, serial_passes=0.2, low=0.85, high=1.45,
    ),
    ("cuda", "fp32"): Kind(
        matrix=0.75, rows=250, attention=0.38, bandwidth=0.7, per_logit=12, per_weight=3,
        layer_s=1.5e-3, low=0.65, high=1.7,
    ),
    ("cuda", "bf16"): Kind(
        matrix=0.57, rows=690, attention=0.38, bandwidth=0.7, per_logit=12, per_weight=3,
        layer_s=2.1e-3, low=0.7, high=1.6,
    ),
}  # fmt: skip
"""See the file's header; cuda fp32 is a guess between the two."""

MEASURED: Mapping[str, Kind] = {
    "fp32": Kind(
        matrix=0.95, attention=0.37, bandwidth=0.08, per_logit=6.4, per_weight=0.94,
        per_probability=1.5, layer_s=0.79e-3, router_s=2.2e-3, expert_s=0.28e-3,
        serial_matrix=0.075, serial_passes=0.2, low=0.8, high=1.35,
    ),
    "bf16": Kind(
        matrix=0.83, attention=0.2, bandwidth=0.074, per_logit=6.0, per_weight=2.15,
        per_probability=0.65, layer_s=2.4e-3, router_s=2.8e-3, expert_s=0.46e-3,
        serial_matrix=0.075, serial_passes=0.2, low=0.75, high=1.45,
    ),
    "emulated": Kind(
        matrix=1.15, attention=1.7, bandwidth=0.074, per_logit=6.0, per_weight=2.15,
        per_probability=0.65, layer_s=2.4e-3, router_s=2.8e-3, expert_s=0.46e-3,
        serial_matrix=0.075, serial_passes=0.2, low=0.6, high=1.8,
    ),
}  # fmt: skip
"""Of a CPU whose rates were measured, as shares of them: the header says how they were obtained.
Emulated: a precision without instructions, whose products are slower than fp32's."""


@dataclass(frozen=True)
class MuonCost:
    """Muon's orthogonalisation on a measured CPU: share of the products' rate, element passes, and
    small operators of a matrix."""

    share: float
    passes: float
    operators: float


MUON: Mapping[str, MuonCost] = {
    "fp32": MuonCost(1.17, 43, 20),  # fewer products than are counted (optim/muon.py, by Gram)
    "bf16": MuonCost(3.3, 120, 62),  # casts and small matrices count, hardly the products
}

UPDATE_BYTES: Mapping[str, int] = {
    "sgd": 6, "momentum": 15, "adam": 14, "adamw": 14, "muon": 30, "adafactor": 80,
}  # fmt: skip
"""Traffic of an update per parameter, in bytes at nominal CPU bandwidth, fused kernels."""
UNFUSED_BYTES: Mapping[str, int] = {**UPDATE_BYTES, "adam": 76, "adamw": 76}
"""The same without fused kernels, as run.exact needs it."""
CLIP_BYTES = 12
"""Norm and scaling of a gradient, per parameter."""


@dataclass(frozen=True)
class Work:
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


ALONE = Layout()
"""One rank: nothing is cut."""


def microbatch_work(
    run: Run,
    vocabulary: int,
    device: str,
    layout: Layout = ALONE,
    parts: Sequence[Part] | None = None,
) -> Work:
    """Counts one microbatch of `run` on a rank that holds `parts` (None: every layer).

    6 operations per weight and token (forward 2, backward 4), and 12 x keys x width per token and
    layer for attention, where a causal query needs half of the sequence as keys (Chowdhery et al.
    2022, appendix B, count all of it); a CPU multiplies a little more (`keys_per_query`). The
    embedding's look-up is free; a tied head is not. Routing is taken as balanced.
    """
    model, held = run.model, parts or [whole(run)]
    if model.classifies:
        return Work(**microbatch_counts(run))
    tokens = run.batch.microbatch * run.data.sequence // layout.context
    rows, layers, again = tokens / layout.tensor, 0, 0
    met = met_again = elements = 0
    routers = 0.0
    # Over the stream and the hidden layer, forward and backward; their sum is fitted.
    stream, hidden = 36 if model.dropout else 24, 7 if model.mlp == "gated" else 4
    for moe, number, repeated in block_counts(run, held):
        layers, again = layers + number, again + repeated
        routers += (number + repeated / 3) * moe
        met += number * block_weights(model, moe)
        met_again += repeated * block_weights(model, moe)
        elements += number * (stream * model.width + hidden * hidden_width(model, moe))
    head = vocabulary * model.width if held[-1].heads else 0
    seen = keys_per_query(run.data.sequence, device)
    keys = min(seen, model.window) if model.window else seen
    per_key = 12.0 * rows * layers * model.query_width
    matrix_flops = 6.0 * rows * (met + head)
    # A second forward of some blocks: a third of forward and backward, products only when full.
    twice = 1.0 + again / layers / 3
    selects = again if run.memory.recompute == "selective" and device == "cpu" else 0
    products = 2.0 * rows * met_again if run.memory.recompute == "full" else 0.0
    half = run.data.sequence / 2
    return Work(
        tokens=tokens,
        layers=layers * twice + selects * SELECTIVE_LAYERS,
        routers=routers,
        experts=routers * model.moe.experts / layout.expert,
        matrix_flops=matrix_flops + products,
        attention_flops=per_key * keys * twice,
        block_elements=rows * elements * twice,
        logits=rows * vocabulary if head else 0.0,
        weights=(met + head) / layout.tensor + _spare_weights(run, held, layout),
        probabilities=rows * layers * model.heads * keys,
        flops=matrix_flops + per_key * (min(half, model.window) if model.window else half),
    )


def whole(run: Run) -> Part:
    """All layers as one part."""
    return Part(0, run.model.layers, True, True)


def block_counts(run: Run, parts: Sequence[Part]) -> list[tuple[bool, int, int]]:
    """(whether they have experts, blocks, blocks computed again) in `parts`, both kinds."""
    dense = run.model.moe.dense_layers if run.model.moe.experts else run.model.layers
    every = run.memory.recompute_every
    found = []
    for moe in (False, True):
        number = again = 0
        for part in parts:
            start = max(part.start, dense) if moe else part.start
            stop = max(start, part.stop if moe else min(part.stop, dense))
            number += stop - start
            again += -(-stop // every) - -(-start // every)
        found.append((moe, number, again if run.memory.recompute != "none" else 0))
    return [(moe, number, again) for moe, number, again in found if number]


def hidden_width(model: ModelSettings, moe: bool) -> int:
    """Hidden features that a token goes through in a block."""
    if not moe:
        return model.hidden_width
    return (model.moe.active + model.moe.shared) * model.expert_width


def block_weights(model: ModelSettings, moe: bool) -> int:
    """Weights of a block that a token meets."""
    attention = 2 * model.width * (model.query_width + model.kv_width)
    router = model.moe.experts * model.width if moe else 0
    sides = 3 if model.mlp == "gated" else 2
    return attention + router + sides * model.width * hidden_width(model, moe)


def _spare_weights(run: Run, parts: Sequence[Part], layout: Layout) -> float:
    """Weights of experts on one rank beyond those that a token meets."""
    model, blocks = run.model, dict((moe, n) for moe, n, _ in block_counts(run, parts))
    sides = (3 if model.mlp == "gated" else 2) * model.width * model.expert_width
    held = model.moe.experts / layout.expert - model.moe.active / layout.tensor
    return blocks.get(True, 0) * sides * held


def keys_per_query(length: int, device: str) -> float:
    """Keys that a causal query meets on average: half, and half a chunk where chunks are whole.

    Up to CHUNKED_UP_TO positions, CPU attention takes chunks of queries against the keys up to the
    chunk's end and keeps the probabilities (model/attention.py).
    """
    if device != "cpu" or length > CHUNKED_UP_TO:
        return length / 2
    starts = range(0, length, CHUNK)
    met = sum(min(length, s + CHUNK) * (min(length, s + CHUNK) - s) for s in starts)
    return met / length


def kind_of(cluster: Cluster, precision: str) -> Kind:
    """The constants of these devices; fp16 and fp8 have bf16's, whose elements they share."""
    if cluster.measured and cluster.device == "cpu":
        emulated = cluster.flops(precision) < cluster.flops_fp32
        return MEASURED["fp32" if precision == "fp32" else "emulated" if emulated else "bf16"]
    return KINDS[DEVICES[cluster.device].figures, "fp32" if precision == "fp32" else "bf16"]


def microbatch_s(work: Work, cluster: Cluster, precision: str, threads: int) -> dict[str, float]:
    """Seconds of one microbatch on one rank with the machine to itself, by stream."""
    kind = kind_of(cluster, precision)
    element_bytes = 4 if precision == "fp32" or cluster.device == "cpu" else 2
    speed = matrix_share(cluster, precision) * cluster.flops(precision)
    speed *= work.tokens / (work.tokens + kind.rows)
    speed /= _product_slowdown(kind, threads, cluster)
    passes = (
        work.block_elements
        + kind.per_logit * work.logits
        + kind.per_weight * work.weights
        + kind.per_probability * work.probabilities
    )
    bandwidth = kind.bandwidth * (cluster.pass_bytes_per_s or cluster.memory_bytes_per_s)
    bandwidth /= _pass_slowdown(kind, threads, cluster)
    dispatch = cluster.operator_s / USUAL_OPERATOR_S if cluster.operator_s else 1.0
    # Not measured: as far from fp8's peak as from bf16's, the head's product too.
    gain = cluster.flops_fp8 / cluster.flops_bf16 if precision == "fp8" else 1.0
    return {
        "matrices": work.matrix_flops / (speed * gain),
        "attention": work.attention_flops / (kind.attention * speed),
        "elementwise": passes * element_bytes / bandwidth,
        "dispatch": dispatch
        * (kind.layer_s * work.layers + kind.router_s * work.routers + kind.expert_s * work.experts)
        + _wakes_s(LAYER_REGIONS * work.layers, threads, cluster),
    }


def matrix_share(cluster: Cluster, precision: str) -> float:
    """Share of peak that large matrix products reach on these devices."""
    told = cluster.bf16_share if precision != "fp32" else 0.0
    return told or kind_of(cluster, precision).matrix


def update_s(
    run: Run,
    specs: Specs,
    cluster: Cluster,
    threads: int,
    layout: Layout,
    parts: Sequence[Part] | None = None,
) -> float:
    """Seconds of clip and update on the rank with most work of those that hold `parts`."""
    kind = kind_of(cluster, run.run.precision)
    bytes_of = UNFUSED_BYTES if run.run.exact else UPDATE_BYTES
    name, traffic = run.optim.name, 0.0
    for held in census(specs).held(layout, ORIGIN, parts):
        rule = "adamw" if name == "muon" and held.spec.group != "matrices" else name
        traffic += held.elements * (bytes_of[rule] + CLIP_BYTES)
    slow = _pass_slowdown(kind, threads, cluster)
    seconds = traffic / cluster.memory_bytes_per_s * slow
    return seconds + sum(
        _muon_s(run, cluster, threads, deal) for deal in deals(run, specs, layout, parts)
    )


def _muon_s(run: Run, cluster: Cluster, threads: int, deal: Deal) -> float:
    """Seconds of the orthogonalisations that fall to one rank."""
    kind, products = kind_of(cluster, run.run.precision), muon_precision(run.run.precision, cluster)
    share = MUON_SHARE if cluster.device == "cpu" else matrix_share(cluster, products)
    seconds = 0.0
    if cluster.measured:
        cost = MUON[products]
        share = cost.share
        passes = 4 * cost.passes * deal.elements / cluster.pass_bytes_per_s
        seconds = passes * _pass_slowdown(kind, threads, cluster)
        seconds += cost.operators * cluster.operator_s * deal.matrices
        seconds += _wakes_s(MATRIX_REGIONS * deal.matrices, threads, cluster)
    rate = share * cluster.flops(products)
    return seconds + deal.flops / rate * _product_slowdown(kind, threads, cluster)


def muon_precision(precision: str, cluster: Cluster) -> str:
    """What Muon's products are computed in (`optim/muon.product_dtype`): bf16 where the device has
    it and the run is not fp32."""
    native = cluster.device != "cpu" or cluster.flops_bf16 > cluster.flops_fp32
    return "bf16" if native and precision != "fp32" else "fp32"


def contention(cluster: Cluster, processes_per_host: int, threads: int) -> float:
    """How much slower each rank of a CPU host is beside its neighbours; 1 for accelerators."""
    if cluster.device != "cpu":
        return 1.0
    busy = processes_per_host * threads
    shared = CONTENTION * min(1.0, (processes_per_host - 1) / max(1, cluster.cores - 1))
    crowded = OVERSUBSCRIBED * busy / cluster.cores if busy > cluster.cores else 1.0
    return (1 + shared) * crowded


def interval(
    cluster: Cluster, precision: str, processes_per_host: int, threads: int
) -> tuple[float, float]:
    """(low, high) factors of a predicted step; CPU ranks with several threads suffer most from
    other programs, and ranks that share cores from each other."""
    kind = kind_of(cluster, precision)
    wider = 1.0 + min(1.0, cluster.spread) if cluster.spread > NOISY else 1.0
    if cluster.device != "cpu":
        return kind.low, kind.high
    crowded = processes_per_host * threads > cluster.cores
    high = kind.high * (1.15 if threads > 1 else 1.0) * (1.3 if crowded else 1.0)
    return kind.low / wider, high * wider


def fresh_s(cluster: Cluster, buffer_bytes: float, buffers: int) -> float:
    """Time to map `buffers` new CPU buffers of `buffer_bytes` each."""
    if cluster.device != "cpu" or buffer_bytes < FRESH_BYTES:
        return 0.0
    return buffers * buffer_bytes * FRESH_S_PER_BYTE


def _wakes_s(regions: float, threads: int, cluster: Cluster) -> float:
    """Time to wake a rank's threads for so many operators."""
    return regions * cluster.region_s if threads > 1 else 0.0


def _product_slowdown(kind: Kind, threads: int, cluster: Cluster) -> float:
    return _slowdown(kind.serial_matrix, cluster.thread_products, threads, cluster)


def _pass_slowdown(kind: Kind, threads: int, cluster: Cluster) -> float:
    return _slowdown(kind.serial_passes, cluster.thread_passes, threads, cluster)


def _slowdown(serial: float, gain: float, threads: int, cluster: Cluster) -> float:
    """Time with `threads` over time with one. `gain`: how many times as fast all cores together
    are, where it was measured; it says what is serial."""
    if gain and cluster.cores > 1:
        serial = max(0.0, (cluster.cores / gain - 1) / (cluster.cores - 1))
    if cluster.device != "cpu":
        return 1.0
    return (1 + serial * (threads - 1)) / threads
