"""The protocol between islands, the bytes that it sends, and the time of all messages.

W members that sum n elements of e bytes: the exchange sends (W-1)/W x n x e for each canonical
subtree of a rank's range and once more for the gather; the fused all-reduce 2 (W-1)/W x n x 4
(Thakur et al. 2005). Latency and bandwidth are two numbers per link (Hockney 1994); r ranks of a
group on a host see r times one rank's network. Congestion is left out, and overlap on a CPU, where
messages need the same cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.layout.axes import Layout
from cordee.layout.counts import ORIGIN, TensorCounts, TensorSpecs, count_tensors
from cordee.layout.microbatches import canonical_subtrees, split_evenly
from cordee.layout.stages import LayerRange
from cordee.layout.validate import rank_microbatches, uses_canonical_order
from cordee.planner.activations import FP32
from cordee.planner.cluster import Cluster
from cordee.planner.compute_cost import (
    MuonGroup,
    all_layers,
    block_counts,
    muon_groups,
    page_fault_s,
)
from cordee.planner.memory import SyncChoice, grad_reduce_elements, partial_sum_counts
from cordee.planner.traffic import (
    context_axis_bytes,
    expert_axis_bytes,
    fsdp_bytes,
    grad_reduce_bytes,
    stage_boundary_bytes,
    tensor_axis_bytes,
)

BF16_BYTES = 2
"""Bytes of an element of Muon's updates on the wire."""

LAYER_MESSAGE_S = 1.2e-3
"""CPU: fixed time of a message between layers: copies, and the wait for ranks that are not in step
(tensor and context on two ranks of one thread, 1 M parameters)."""

FSDP_UNIT_S = 1.9e-3
"""CPU: fixed time of gathering or reducing one unit with FSDP2 (hooks, copies in and out); with it,
two ranks and 0.2 to 7 M parameters were met within 15 %."""

EXTRA_MESSAGE_S = 20e-6
"""Each further message of a direct exchange: they are posted together and leave in turn."""

OVERLAP_SHARE = 0.8
"""CUDA: part of messages that can hide behind computation: FSDP2's, a ring's and a pipeline's."""

GRADIENTS_ITEM = "gradients"
"""The item that the run itself counts (metrics.jsonl, bytes_sent)."""


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one rank sends in a step, and seconds that computation does not hide, by item."""

    sent_bytes: Mapping[str, int]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class RankLoad:
    """The layers that a rank holds, how it shards (zero), and the seconds that it computes in a
    step, behind which messages can hide."""

    layer_ranges: Sequence[LayerRange]
    zero: int = 1
    compute_s: float = 0.0


def choose_sync(run: Run, layout: Layout) -> SyncChoice:
    """The protocol, codec and order of summation of this run on this layout.

    Given: as given (ConfigError when both cannot act). auto: exchange when exact or with a rounding
    codec, all-reduce between islands otherwise, none when there is one island. The exchange runs
    over all that compute microbatches, in canonical order, where islands and shards are the only
    axes; else islands exchange their sums.
    """
    protocol, codec = run.sync.protocol, run.sync.codec
    if protocol == "allreduce" and codec != "identity":
        raise ConfigError(
            "the fused all-reduce sends fp32 only",
            values={"sync.protocol": protocol, "sync.codec": codec},
            fix="sync.protocol=exchange, or sync.codec=identity",
        )
    if uses_canonical_order(run, layout):
        return SyncChoice("exchange", codec, True)
    if run.data.placement == "replicate" or layout.island == 1:
        return SyncChoice("none", codec, False)
    uses_exchange = protocol == "exchange" or codec != "identity"
    return SyncChoice("exchange" if uses_exchange else "allreduce", codec, False)


def step_traffic(
    run: Run,
    specs: TensorSpecs,
    layout: Layout,
    sync: SyncChoice,
    cluster: Cluster,
    load: RankLoad | None = None,
) -> StepTraffic:
    """What the busiest rank sends in a step, and the seconds that computation does not hide."""
    tensor_counts, load = count_tensors(specs), load or RankLoad(layer_ranges=[all_layers(run)])
    ranges = load.layer_ranges
    sums = partial_sum_counts(run, layout).final if sync.is_canonical else 1
    size = gradient_bytes(tensor_counts, layout, sync, run, sums, ranges)
    grad_bytes = FP32 * _sync_elements(tensor_counts, layout, sync, ranges)
    sent_bytes = {GRADIENTS_ITEM: size}
    seconds = {"agree": _sync_s(run, layout, sync, cluster, grad_bytes, size)}
    if layout.shard > 1:
        gathered_bytes, reduced_bytes, collectives = fsdp_bytes(
            run, tensor_counts, layout, ranges, load.zero, sync.is_canonical
        )
        size = gathered_bytes + reduced_bytes
        sent_bytes |= {"parameters gathered": gathered_bytes, "gradients reduced": reduced_bytes}
        seconds["shard"] = _fsdp_s(run, layout, cluster, size, collectives, load)
    for name, size, messages in _activation_messages(run, tensor_counts, layout, load):
        sent_bytes[name] = size
        overlaps = name == "pipeline" or (name == "context" and run.layout.attention == "ring")
        hidden_share = OVERLAP_SHARE if overlaps and cluster.device != "cpu" else 0.0
        seconds[name] = (1 - hidden_share) * _activation_s(layout, cluster, name, size, messages)
    sums_by_axes = grad_reduce_elements(tensor_counts, layout, ranges, ORIGIN)
    sent_bytes["gradients summed"] = grad_reduce_bytes(tensor_counts, layout, ranges, ORIGIN)
    seconds["gradients summed"] = math.fsum(
        _all_reduce_s(layout, cluster, axes, FP32 * n) for axes, n in sums_by_axes.items()
    )
    groups = [g for g in muon_groups(run, tensor_counts, layout, ranges) if g.ranks > 1]
    sent_bytes["updates shared"] = sum(map(_muon_bytes, groups))
    seconds["updates shared"] = sum(_muon_message_s(layout, cluster, group) for group in groups)
    return StepTraffic(
        {k: v for k, v in sent_bytes.items() if v}, {k: v for k, v in seconds.items() if v}
    )


def gradient_bytes(
    specs: TensorSpecs,
    layout: Layout,
    sync: SyncChoice,
    run: Run,
    subtrees: int,
    layer_ranges: Sequence[LayerRange] | None = None,
) -> int:
    """Bytes of gradients that a rank which holds `layer_ranges` and has so many canonical subtrees
    sends to other islands (canonical: to all workers), as the run counts them."""
    if run.data.placement == "replicate":
        return 8 * (layout.island - 1)
    elements = _sync_elements(count_tensors(specs), layout, sync, layer_ranges)
    if sync.protocol == "exchange":
        members = layout.dp_size if sync.is_canonical else layout.island
        slice_bytes = -(-elements // members) * sync.element_bytes
        return (subtrees + 1) * (members - 1) * slice_bytes if members > 1 else 0
    if sync.protocol == "allreduce":
        return int(2 * (layout.island - 1) / layout.island * elements * FP32)
    return 0


def _sync_elements(
    tensor_counts: TensorCounts,
    layout: Layout,
    sync: SyncChoice,
    layer_ranges: Sequence[LayerRange] | None,
) -> int:
    """Elements of the gradient that a rank sums with other islands."""
    last_axis = "tensor" if sync.is_canonical else "shard"
    return tensor_counts.rank_elements(layout, ORIGIN, layer_ranges, last_axis)


def subtree_count(run: Run, layout: Layout, sync: SyncChoice, dp_rank: int) -> int:
    """Canonical subtrees that `dp_rank` sends: 1 unless the order is canonical."""
    if not sync.is_canonical or run.data.placement == "replicate":
        return 1
    total = run.batch.microbatches
    start, stop = total * dp_rank // layout.dp_size, total * (dp_rank + 1) // layout.dp_size
    return len(canonical_subtrees(range(start, stop), total))


def split_microbatches(run: Run, layout: Layout) -> list[range]:
    """Microbatches of each worker; with replicated data every island has all of them."""
    total = run.batch.microbatches
    if run.data.placement == "replicate":
        return [range(total)] * layout.dp_size
    return split_evenly(total, layout.dp_size)


@dataclass(frozen=True)
class _GroupLink:
    """Latency and bandwidth as one rank of a group sees them, on the group's slowest link."""

    latency_s: float
    ring_s: float
    ring_bytes_per_s: float
    direct_bytes_per_s: float


def _group_link(cluster: Cluster, layout: Layout, axes: Sequence[str]) -> _GroupLink:
    """The group of ranks that differ in `axes` only, on the hosts that a full job needs."""
    per_host = max(1, cluster.slots // cluster.hosts)
    members = local_members = 1
    for axis in axes:
        degree = getattr(layout, axis)
        members *= degree
        local_members *= min(degree, max(1, per_host // layout.stride(axis)))
    hosts = -(-members // local_members)
    link = cluster.link_bytes_per_s
    # gloo waits at each of a ring's hops; NCCL's inside a host are a small part of one latency.
    hop_s = (members - 1) * cluster.link_s if cluster.device == "cpu" else cluster.link_s
    if hosts == 1:
        return _GroupLink(cluster.link_s, hop_s, link, link)
    hop_s += (hosts - 1) * cluster.network_s
    ring_bytes_per_s = min(link, local_members * cluster.network_bytes_per_s)
    # Direct messages: (hosts-1)/hosts of the bytes cross the rank's own network card.
    remote_share = (hosts - 1) / hosts
    direct_s_per_byte = remote_share / cluster.network_bytes_per_s + (1 - remote_share) / link
    latency_s = max(cluster.link_s, cluster.network_s)
    return _GroupLink(latency_s, hop_s, ring_bytes_per_s, 1 / direct_s_per_byte)


def _sync_s(
    run: Run, layout: Layout, sync: SyncChoice, cluster: Cluster, grad_bytes: int, sent_bytes: int
) -> float:
    """Seconds until all ranks hold the sum of gradients of `grad_bytes` each."""
    if not sent_bytes:
        return 0.0
    if run.data.placement == "replicate":
        # Every island reads its gradient once to digest it.
        link = _group_link(cluster, layout, ("island",))
        return link.latency_s + grad_bytes / cluster.memory_bytes_per_s
    if sync.protocol == "exchange":
        members = layout.dp_size if sync.is_canonical else layout.island
        axes = ("island", "shard") if sync.is_canonical else ("island",)
        link = _group_link(cluster, layout, axes)
        pass_s = 10 * grad_bytes / cluster.memory_bytes_per_s
        round_trip_s = 2 * (link.latency_s + (members - 2) * EXTRA_MESSAGE_S)
        encoded_bytes = grad_bytes * sync.element_bytes / FP32
        fault_s = page_fault_s(cluster, encoded_bytes, 3) + page_fault_s(cluster, grad_bytes, 1)
        return round_trip_s + sent_bytes / link.direct_bytes_per_s + pass_s + fault_s
    return _all_reduce_s(layout, cluster, ("island",), grad_bytes)


def _all_reduce_s(layout: Layout, cluster: Cluster, axes: Sequence[str], size: int) -> float:
    """Seconds of one all-reduce of `size` bytes."""
    link = _group_link(cluster, layout, axes)
    members: int = math.prod(getattr(layout, axis) for axis in axes)
    sent_bytes = 2 * (members - 1) / members * size
    pass_s, fault_s = 2 * size / cluster.memory_bytes_per_s, page_fault_s(cluster, size, 1)
    return 2 * link.ring_s + sent_bytes / link.ring_bytes_per_s + pass_s + fault_s


def _fsdp_s(
    run: Run, layout: Layout, cluster: Cluster, sent_bytes: int, collectives: int, load: RankLoad
) -> float:
    """Seconds of FSDP2's messages that computation does not hide."""
    link = _group_link(cluster, layout, ("shard",))
    latency_s = FSDP_UNIT_S if cluster.device == "cpu" else link.ring_s
    message_s = collectives * latency_s + sent_bytes / link.ring_bytes_per_s
    if cluster.device == "cpu":
        # Reductions and gathers copy in and out; gloo reduces at half of the link's rate.
        return message_s + sent_bytes / link.ring_bytes_per_s
    exposed_s = message_s / max(1, collectives)
    # What is sent once a step hides behind its first forward and its last backward.
    compute_s = load.compute_s / (rank_microbatches(run, layout) if load.zero == 1 else 1)
    return exposed_s + max(0.0, message_s - OVERLAP_SHARE * compute_s)


def _activation_messages(
    run: Run, tensor_counts: TensorCounts, layout: Layout, load: RankLoad
) -> list[tuple[str, int, int]]:
    """(axis, bytes, messages) of activations that a rank sends in a step."""
    microbatches, layer_ranges = rank_microbatches(run, layout), load.layer_ranges
    blocks, recomputed_blocks, expert_messages = 0, 0, 0
    for is_moe, count, recomputed in block_counts(run, layer_ranges):
        blocks, recomputed_blocks = blocks + count, recomputed_blocks + recomputed
        expert_messages += (4 * count + 2 * recomputed) * is_moe
    messages = []  # of one microbatch
    if layout.tensor > 1:
        size = tensor_axis_bytes(run, layout, layer_ranges, tensor_counts.vocabulary)
        messages.append(("tensor", size, 8 * blocks + 4 * recomputed_blocks + 6))
    if layout.context > 1:
        hops = 1 if run.layout.attention == "gather" else layout.context - 1
        size = context_axis_bytes(run, layout, layer_ranges)
        messages.append(("context", size, hops * (2 * blocks + recomputed_blocks)))
    if layout.expert > 1:
        messages.append(("expert", expert_axis_bytes(run, layout, layer_ranges), expert_messages))
    if layout.pipeline > 1:
        directions = sum((not r.has_embedding) + (not r.has_head) for r in layer_ranges)
        size = directions * stage_boundary_bytes(run, layout)
        messages.append(("pipeline", size, directions))
    return [(axis, microbatches * size, microbatches * count) for axis, size, count in messages]


def _activation_s(
    layout: Layout, cluster: Cluster, axis: str, sent_bytes: int, messages: int
) -> float:
    """Seconds of an axis's activations on their way."""
    link = _group_link(cluster, layout, (axis,))
    is_direct = axis in ("expert", "pipeline")
    latency_s = link.latency_s if is_direct else link.ring_s
    if cluster.device == "cpu" and axis != "pipeline":
        latency_s = max(latency_s, LAYER_MESSAGE_S)
    bandwidth = link.direct_bytes_per_s if is_direct else link.ring_bytes_per_s
    copy_s = sent_bytes / bandwidth if cluster.device == "cpu" else 0.0
    return messages * latency_s + sent_bytes / bandwidth + copy_s


def _muon_bytes(group: MuonGroup) -> int:
    """Bytes of Muon's bf16 updates that the busiest rank sends (optim/muon.py).

    Whole copies: one gather, padded to the rank with most elements. Parts: they go to the matrix's
    owner and come back.
    """
    if not group.is_sharded:
        return group.elements * BF16_BYTES * (group.ranks - 1)
    rank_elements, max_elements = group.all_elements // group.ranks, group.elements
    return BF16_BYTES * (rank_elements + max_elements - 2 * (max_elements // group.ranks))


def _muon_message_s(layout: Layout, cluster: Cluster, group: MuonGroup) -> float:
    link = _group_link(cluster, layout, group.axes)
    latency_s = 2 * link.latency_s if group.is_sharded else link.latency_s
    message_s = (group.ranks - 1) * EXTRA_MESSAGE_S
    return latency_s + message_s + _muon_bytes(group) / link.direct_bytes_per_s
