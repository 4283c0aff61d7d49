"""What ranks agree on and how: protocol, bytes between islands, and the time of all messages.

W members agree on n elements of e bytes: the exchange sends (W-1)/W x n x e for each canonical
subtree of a rank's range and once more for the gather; the fused all-reduce 2 (W-1)/W x n x 4
(Thakur et al. 2005). Bytes of the axes inside an island are counted in `wires.py`. Latency and
bandwidth are two numbers per link (Hockney 1994); r ranks of a group on a host see r times one
rank's network. Not here: congestion, and overlap on CPU, where messages need the same cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.layout.axes import Layout
from cordee.layout.census import ORIGIN, Census, Specs, census
from cordee.layout.legal import canonical, worker_microbatches
from cordee.layout.split import canonical_subtrees, split_evenly
from cordee.layout.stages import Part
from cordee.plan.activations import FP32
from cordee.plan.cluster import Cluster
from cordee.plan.costs import block_counts, fresh_s, whole
from cordee.plan.dealing import Deal, deals
from cordee.plan.memory import TreeSums, Wire, summed_elements, tree_sums
from cordee.plan.wires import (
    rows_bytes,
    sequence_bytes,
    shard_bytes,
    stream_bytes,
    sum_bytes,
    tensor_bytes,
)

BF16 = 2
"""Bytes of an element of Muon's updates on the wire."""

SEAM_S = 1.2e-3
"""CPU: fixed time of a message between layers: copies, and the wait for ranks that are not in step
(tensor and context on two ranks of one thread, 1 M parameters)."""

GATHER_S = 1.9e-3
"""CPU: fixed time of gathering or reducing one unit with FSDP2 (hooks, copies in and out); with it,
two ranks and 0.2 to 7 M parameters were met within 15 %."""

MESSAGE_S = 20e-6
"""Each further message of a direct exchange: they are posted together and leave in turn."""

OVERLAP = 0.8
"""CUDA: part of messages that can hide behind computation: FSDP2's, a ring's and a pipeline's."""

COUNTED = "gradients"
"""The item that the run itself counts (metrics.jsonl, bytes_sent)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by item, and seconds that are not hidden."""

    sent_bytes: Mapping[str, int]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Load:
    """What a rank does in a step: the layers it holds, how it shards (zero), and the seconds that
    it computes, behind which messages can hide."""

    parts: Sequence[Part]
    zero: int = 1
    compute_s: float = 0.0


def choose_wire(run: Run, layout: Layout) -> Wire:
    """The protocol, codec and order of summation of this run on this layout.

    Given: as given (ConfigError when both cannot act). auto: exchange when exact or with a rounding
    codec, all-reduce between islands otherwise, none when there is one island. The exchange runs
    over all that compute microbatches, in canonical order, where islands and shards are the only
    axes; else islands exchange their sums.
    """
    wanted, codec = run.sync.protocol, run.sync.codec
    if wanted == "allreduce" and codec != "identity":
        raise ConfigError(
            "the fused all-reduce sends fp32 only",
            values={"sync.protocol": wanted, "sync.codec": codec},
            fix="sync.protocol=exchange, or sync.codec=identity",
        )
    if canonical(run, layout):
        return Wire("exchange", codec, True)
    if run.data.placement == "replicate" or layout.island == 1:
        return Wire("none", codec, False)
    by_exchange = wanted == "exchange" or codec != "identity"
    return Wire("exchange" if by_exchange else "allreduce", codec, False)


def traffic(
    run: Run,
    specs: Specs,
    layout: Layout,
    wire: Wire,
    cluster: Cluster,
    load: Load | None = None,
) -> Traffic:
    """What the busiest rank sends in a step, and the seconds that computation does not hide."""
    counted, load = census(specs), load or Load(parts=[whole(run)])
    sent: dict[str, int] = {}
    seconds: dict[str, float] = {}
    sums = tree_sums(run, layout) if wire.canonical else TreeSums(1, 1, layout.workers)
    sent[COUNTED] = gradient_bytes(counted, layout, wire, run, sums.ends, load.parts)
    mine = FP32 * _agreed(counted, layout, wire, load.parts)
    seconds["agree"] = _agree_s(run, layout, wire, cluster, mine, sent[COUNTED])
    if layout.shard > 1:
        gathered, reduced, units = shard_bytes(
            run, counted, layout, load.parts, load.zero, wire.canonical
        )
        sent["parameters gathered"], sent["gradients reduced"] = gathered, reduced
        seconds["shard"] = _shard_s(run, layout, cluster, gathered + reduced, units, load)
    for name, count, messages in _inside(run, counted, layout, load):
        sent[name] = count
        hides = name == "pipeline" or (name == "context" and run.layout.attention == "ring")
        hidden = OVERLAP if hides and cluster.device != "cpu" else 0.0
        seconds[name] = (1 - hidden) * _inside_s(layout, cluster, name, count, messages)
    if summed := sum_bytes(counted, layout, load.parts, ORIGIN):
        sent["gradients summed"] = summed
        seconds["gradients summed"] = _sum_s(counted, layout, cluster, load.parts)
    if shared := [deal for deal in deals(run, counted, layout, load.parts) if deal.ranks > 1]:
        sent["updates shared"] = sum(map(_shared_bytes, shared))
        seconds["updates shared"] = sum(_share_s(layout, cluster, deal) for deal in shared)
    return Traffic({k: v for k, v in sent.items() if v}, {k: v for k, v in seconds.items() if v})


def gradient_bytes(
    specs: Specs,
    layout: Layout,
    wire: Wire,
    run: Run,
    subtrees: int,
    parts: Sequence[Part] | None = None,
) -> int:
    """Bytes of gradients that a rank which holds `parts` and has so many canonical subtrees sends
    to other islands (canonical: to all workers), as it counts them."""
    if run.data.placement == "replicate":
        return 8 * (layout.island - 1)
    mine = _agreed(census(specs), layout, wire, parts)
    if wire.protocol == "exchange":
        members = layout.workers if wire.canonical else layout.island
        slice_bytes = -(-mine // members) * wire.element_bytes
        return (subtrees + 1) * (members - 1) * slice_bytes if members > 1 else 0
    if wire.protocol == "allreduce":
        return int(2 * (layout.island - 1) / layout.island * mine * FP32)
    return 0


def _agreed(counted: Census, layout: Layout, wire: Wire, parts: Sequence[Part] | None) -> int:
    """Elements of the gradient that a rank brings to the agreement."""
    return counted.elements(layout, ORIGIN, parts, "tensor" if wire.canonical else "shard")


def rank_subtrees(run: Run, layout: Layout, wire: Wire, worker: int) -> int:
    """Canonical subtrees that `worker` sends: 1 unless the order is canonical."""
    if not wire.canonical or run.data.placement == "replicate":
        return 1
    total = run.batch.microbatches
    first, last = total * worker // layout.workers, total * (worker + 1) // layout.workers
    return len(canonical_subtrees(range(first, last), total))


def splits(run: Run, layout: Layout) -> list[range]:
    """Microbatches of each worker; with replicated data every island has all of them."""
    total = run.batch.microbatches
    if run.data.placement == "replicate":
        return [range(total)] * layout.workers
    return split_evenly(total, layout.workers)


@dataclass(frozen=True)
class _Reach:
    """What one rank of a group sees: the slowest link and the share that crosses it."""

    latency_s: float
    ring_s: float
    ring_bytes_per_s: float
    direct_bytes_per_s: float


def _reach(cluster: Cluster, layout: Layout, axes: Sequence[str]) -> _Reach:
    """The group of ranks that differ in `axes` only, on the hosts that a full job needs."""
    per_host = max(1, cluster.slots // cluster.hosts)
    members = together = 1
    for axis in axes:
        degree = getattr(layout, axis)
        members *= degree
        together *= min(degree, max(1, per_host // layout.stride(axis)))
    hosts = -(-members // together)
    link = cluster.link_bytes_per_s
    # gloo waits at each of a ring's hops; NCCL's inside a host are a small part of one latency.
    hops = (members - 1) * cluster.link_s if cluster.device == "cpu" else cluster.link_s
    if hosts == 1:
        return _Reach(cluster.link_s, hops, link, link)
    hops += (hosts - 1) * cluster.network_s
    ring = min(link, together * cluster.network_bytes_per_s)
    # Direct messages: (hosts-1)/hosts of the bytes cross the rank's own network card.
    across = (hosts - 1) / hosts
    direct = 1 / (across / cluster.network_bytes_per_s + (1 - across) / link)
    return _Reach(max(cluster.link_s, cluster.network_s), hops, ring, direct)


def _agree_s(run: Run, layout: Layout, wire: Wire, cluster: Cluster, mine: int, sent: int) -> float:
    """Seconds until all ranks hold the sum of gradients of which each brings `mine` bytes."""
    if not sent:
        return 0.0
    if run.data.placement == "replicate":
        # Every island reads its gradient once to digest it.
        reach = _reach(cluster, layout, ("island",))
        return reach.latency_s + mine / cluster.memory_bytes_per_s
    if wire.protocol == "exchange":
        members = layout.workers if wire.canonical else layout.island
        axes = ("island", "shard") if wire.canonical else ("island",)
        reach = _reach(cluster, layout, axes)
        passes = 10 * mine / cluster.memory_bytes_per_s
        rounds = 2 * (reach.latency_s + (members - 2) * MESSAGE_S)
        encoded = mine * wire.element_bytes / FP32
        fresh = fresh_s(cluster, encoded, 3) + fresh_s(cluster, mine, 1)
        return rounds + sent / reach.direct_bytes_per_s + passes + fresh
    return _total_s(layout, cluster, ("island",), mine)


def _total_s(layout: Layout, cluster: Cluster, axes: Sequence[str], size: int) -> float:
    """Seconds of one all-reduce of `size` bytes."""
    reach = _reach(cluster, layout, axes)
    members: int = math.prod(getattr(layout, axis) for axis in axes)
    sent = 2 * (members - 1) / members * size
    passes = 2 * size / cluster.memory_bytes_per_s
    return 2 * reach.ring_s + sent / reach.ring_bytes_per_s + passes + fresh_s(cluster, size, 1)


def _sum_s(counted: Census, layout: Layout, cluster: Cluster, parts: Sequence[Part]) -> float:
    """Seconds of the sums inside an island."""
    sums = summed_elements(counted, layout, parts, ORIGIN)
    return math.fsum(_total_s(layout, cluster, axes, FP32 * size) for axes, size in sums.items())


def _shard_s(
    run: Run, layout: Layout, cluster: Cluster, sent: int, units: int, load: Load
) -> float:
    """Seconds of FSDP2's messages that computation does not hide."""
    reach = _reach(cluster, layout, ("shard",))
    fixed = GATHER_S if cluster.device == "cpu" else reach.ring_s
    messages = units * fixed + sent / reach.ring_bytes_per_s
    if cluster.device == "cpu":
        # Reductions and gathers copy in and out; gloo reduces at half of the link's rate.
        return messages + sent / reach.ring_bytes_per_s
    exposed = messages / max(1, units)
    # What is sent once a step hides behind its first forward and its last backward.
    behind = load.compute_s / (worker_microbatches(run, layout) if load.zero == 1 else 1)
    return exposed + max(0.0, messages - OVERLAP * behind)


def _inside(run: Run, counted: Census, layout: Layout, load: Load) -> list[tuple[str, int, int]]:
    """(axis, bytes, messages) of activations that a rank sends in a step."""
    each, parts = worker_microbatches(run, layout), load.parts
    blocks, again, experts = 0, 0, 0
    for moe, number, repeated in block_counts(run, parts):
        blocks, again = blocks + number, again + repeated
        experts += (4 * number + 2 * repeated) * moe
    found = []
    if layout.tensor > 1:
        sent = tensor_bytes(run, layout, parts, counted.vocabulary)
        found.append(("tensor", each * sent, each * (8 * blocks + 4 * again + 6)))
    if layout.context > 1:
        hops = 1 if run.layout.attention == "gather" else layout.context - 1
        sent = sequence_bytes(run, layout, parts)
        found.append(("context", each * sent, each * hops * (2 * blocks + again)))
    if layout.expert > 1:
        found.append(("expert", each * rows_bytes(run, layout, parts), each * experts))
    if layout.pipeline > 1:
        ways = sum((not part.embeds) + (not part.heads) for part in parts)
        found.append(("pipeline", each * ways * stream_bytes(run, layout), each * ways))
    return found


def _inside_s(layout: Layout, cluster: Cluster, axis: str, sent: int, messages: int) -> float:
    """Seconds of an axis's activations on their way."""
    reach = _reach(cluster, layout, (axis,))
    direct = axis in ("expert", "pipeline")
    fixed = reach.latency_s if direct else reach.ring_s
    if cluster.device == "cpu" and axis != "pipeline":
        fixed = max(fixed, SEAM_S)
    bandwidth = reach.direct_bytes_per_s if direct else reach.ring_bytes_per_s
    copies = sent / bandwidth if cluster.device == "cpu" else 0.0
    return messages * fixed + sent / bandwidth + copies


def _shared_bytes(deal: Deal) -> int:
    """Bytes of Muon's bf16 updates that the busiest rank sends (optim/muon.py).

    Whole copies: one gather, padded to the rank with most elements. Parts: they go to the matrix's
    owner and come back.
    """
    if not deal.cut:
        return deal.elements * BF16 * (deal.ranks - 1)
    rows, most = deal.all_elements // deal.ranks, deal.elements
    return (rows - most // deal.ranks + most - most // deal.ranks) * BF16


def _share_s(layout: Layout, cluster: Cluster, deal: Deal) -> float:
    reach = _reach(cluster, layout, deal.axes)
    rounds = 2 * reach.latency_s if deal.cut else reach.latency_s
    messages = (deal.ranks - 1) * MESSAGE_S
    return rounds + messages + _shared_bytes(deal) / reach.direct_bytes_per_s
