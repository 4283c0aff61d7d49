"""Bytes that one rank sends in a step on each axis inside an island.

A ring of n sends n - 1 own parts to gather or to scatter sums, and 2 (n - 1)/n of a total. Exact
for tensor, context, pipeline and the sums inside an island: tests compare with the bytes that
`dist/autograd_collectives.py` counts. Experts' rows are taken as balanced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from cordee.config.run import Run
from cordee.layout.axes import Layout
from cordee.layout.counts import TensorSpecs, count_tensors
from cordee.layout.stages import LayerRange, Stages
from cordee.layout.validate import gathers_param_dtype, rank_microbatches, uses_canonical_order
from cordee.planner.activations import FP32, element_bytes, tokens_per_rank
from cordee.planner.compute_cost import block_counts
from cordee.planner.memory import fsdp_unit_bytes, grad_reduce_elements

ContextMethod = Literal["gather", "ring"]
"""How ranks of a context group get each other's keys and values (parallel/context.py)."""

ACCUMULATOR_BYTES = 4
"""Gradients of keys and values travel round the ring in fp32: every stop adds to them."""

GRAD_REDUCE_ITEM = "sums"
"""What `axis_bytes` calls gradients summed inside an island, over several axes at once."""

ROUTING_COUNT_BYTES = 8
"""What says how many rows an expert gets."""


def axis_bytes(
    run: Run,
    specs: TensorSpecs,
    layout: Layout,
    stages: Stages,
    coords: Mapping[str, int],
    zero: int = 1,
) -> dict[str, int]:
    """Bytes that the rank at coordinates `coords` sends in a step, forward and backward, on every
    axis inside an island whose degree is above 1, and for `GRAD_REDUCE_ITEM`."""
    stage_rank, microbatches = coords["pipeline"], rank_microbatches(run, layout)
    layer_ranges, vocabulary = stages.layer_ranges(stage_rank), count_tensors(specs).vocabulary
    is_canonical = uses_canonical_order(run, layout)
    sizes = {
        "pipeline": microbatches * pipeline_axis_bytes(run, layout, stages, stage_rank),
        "context": microbatches * context_axis_bytes(run, layout, layer_ranges),
        "expert": microbatches * expert_axis_bytes(run, layout, layer_ranges),
        "shard": sum(fsdp_bytes(run, specs, layout, layer_ranges, zero, is_canonical)[:2]),
        "sequence": microbatches * balance_loss_bytes(run, layout, layer_ranges),
        "tensor": microbatches * tensor_axis_bytes(run, layout, layer_ranges, vocabulary),
        GRAD_REDUCE_ITEM: grad_reduce_bytes(specs, layout, layer_ranges, coords),
    }
    return {axis: size for axis, size in sizes.items() if size}


def tensor_axis_bytes(
    run: Run, layout: Layout, layer_ranges: Sequence[LayerRange], vocabulary: int
) -> int:
    """Bytes of one microbatch: each block gathers its split stream before attention and before the
    MLP and scatters sums after both, and mirrors that in the backward; the embedding scatters
    (fp32), the head gathers, and its loss needs three numbers for every position."""
    ranks = layout.tensor
    if ranks == 1:
        return 0
    tokens, dtype_bytes = tokens_per_rank(run, layout), element_bytes(run)
    elements = (ranks - 1) * tokens // ranks * run.model.width
    sent_bytes = 0
    for is_moe, blocks, recomputed_blocks in block_counts(run, layer_ranges):
        # Experts work on split tokens; those that every token uses are cut as an MLP is.
        collectives = 2 if is_moe and not run.model.moe.shared else 4
        # Computed again: all but the last scatter, unless what comes after it is needed (dropout).
        recomputed_collectives = collectives if is_moe or run.model.dropout else collectives - 1
        count = 2 * collectives * blocks + recomputed_collectives * recomputed_blocks
        sent_bytes += count * elements * dtype_bytes
    for layer_range in layer_ranges:
        sent_bytes += 2 * elements * FP32 * layer_range.has_embedding
        if layer_range.has_head:
            sent_bytes += 2 * elements * dtype_bytes + _loss_bytes(run, ranks, tokens)
    return sent_bytes


def _loss_bytes(run: Run, ranks: int, tokens: int) -> int:
    """The largest logit, then the sum and the target's logit, of each position; by chunks."""
    chunk = min(tokens, run.memory.loss_chunk or tokens)
    full_chunks, remainder = divmod(tokens, chunk)
    return full_chunks * _all_reduce_bytes(ranks, chunk) + _all_reduce_bytes(ranks, remainder)


def _all_reduce_bytes(ranks: int, positions: int) -> int:
    sent_bytes = 2 * (ranks - 1) * FP32 * positions
    return sent_bytes // ranks + 2 * sent_bytes // ranks


def context_axis_bytes(run: Run, layout: Layout, layer_ranges: Sequence[LayerRange]) -> int:
    """Bytes of one microbatch: keys and values of every block."""
    if layout.context == 1:
        return 0
    tokens = run.batch.microbatch * run.data.sequence
    width, dtype_bytes = run.model.kv_width // layout.tensor, element_bytes(run)
    single_bytes, recompute_bytes = (
        context_layer_bytes(run.layout.attention, tokens, width, dtype_bytes, layout.context, n)
        for n in (1, 2)
    )
    return sum(
        (blocks - recomputed_blocks) * single_bytes + recomputed_blocks * recompute_bytes
        for _, blocks, recomputed_blocks in block_counts(run, layer_ranges)
    )


def expert_axis_bytes(run: Run, layout: Layout, layer_ranges: Sequence[LayerRange]) -> int:
    """Bytes of one microbatch: the counts of every forward, and each token's row to its experts and
    back, which balanced routing spreads evenly."""
    ranks, moe = layout.expert, run.model.moe
    if ranks == 1:
        return 0
    tokens = tokens_per_rank(run, layout) // layout.tensor
    count_bytes = (ranks - 1) * moe.experts // ranks * ROUTING_COUNT_BYTES
    sent_bytes = 0.0
    for is_moe, blocks, recomputed_blocks in block_counts(run, layer_ranges):
        for forwards, block_count in ((1, blocks - recomputed_blocks), (2, recomputed_blocks)):
            row_bytes = expert_layer_bytes(
                tokens, moe.active, run.model.width, ranks, element_bytes(run), forwards
            )
            sent_bytes += is_moe * block_count * (row_bytes + forwards * count_bytes)
    return int(sent_bytes)


def balance_loss_bytes(run: Run, layout: Layout, layer_ranges: Sequence[LayerRange]) -> int:
    """Bytes of one microbatch on the axes that split a sequence: the assignments of every expert,
    which the balance loss of a mixture adds up in each forward."""
    ranks, moe = layout.context * layout.tensor, run.model.moe
    if ranks == 1 or moe.balance != "loss":
        return 0
    forward_bytes = 2 * (ranks - 1) * ROUTING_COUNT_BYTES * moe.experts // ranks
    counts = block_counts(run, layer_ranges)
    return forward_bytes * sum(
        blocks + recomputed_blocks for is_moe, blocks, recomputed_blocks in counts if is_moe
    )


def pipeline_axis_bytes(run: Run, layout: Layout, stages: Stages, rank: int) -> int:
    """Bytes of one microbatch: the fp32 stream to the next stage and its gradient to the one
    before, unless that is on the same rank (the turn of a V)."""
    boundary_bytes, sent_bytes = stage_boundary_bytes(run, layout), 0
    for stage in stages.rank_stages(rank):
        for neighbour in (stage - 1, stage + 1):
            if 0 <= neighbour <= stages.last_stage and stages.rank_of(neighbour) != rank:
                sent_bytes += boundary_bytes
    return sent_bytes


def stage_boundary_bytes(run: Run, layout: Layout) -> int:
    """What one stage sends to the next of one microbatch."""
    return FP32 * run.model.width * tokens_per_rank(run, layout) // layout.tensor


def fsdp_bytes(
    run: Run,
    specs: TensorSpecs,
    layout: Layout,
    layer_ranges: Sequence[LayerRange],
    zero: int,
    keeps_full_gradients: bool = False,
) -> tuple[int, int, int]:
    """FSDP2 in one step, as it pads: (bytes gathered, bytes reduced, collectives) of one rank.

    zero 1 gathers and reduces once; 2 reduces every microbatch; 3 also gathers every microbatch,
    blocks twice. 2 and 3 gather in the type of products. `keeps_full_gradients`: the exchange sums
    whole gradients, and FSDP2 reduces none.
    """
    if layout.shard == 1:
        return 0, 0, 0
    rest_bytes, block_bytes, block_count = fsdp_unit_bytes(specs, layout, layer_ranges)
    microbatches = rank_microbatches(run, layout)
    reductions = 0 if keeps_full_gradients else 1 if zero == 1 else microbatches
    block_gathers, rest_gathers = (2 * microbatches, microbatches) if zero == 3 else (1, 1)
    collectives = block_gathers * block_count + reductions * block_count
    if rest_bytes:
        collectives += rest_gathers + reductions
    gathered_bytes = (block_gathers * block_bytes + rest_gathers * rest_bytes) // layout.shard
    reduced_bytes = reductions * (block_bytes + rest_bytes) // layout.shard
    if gathers_param_dtype(run, zero):
        gathered_bytes = gathered_bytes * element_bytes(run) // FP32
    return (layout.shard - 1) * gathered_bytes, (layout.shard - 1) * reduced_bytes, collectives


def grad_reduce_bytes(
    specs: TensorSpecs,
    layout: Layout,
    layer_ranges: Sequence[LayerRange],
    coords: Mapping[str, int],
) -> int:
    """Gradients that an island sums after FSDP2: one flat fp32 total for each set of axes."""
    sent_bytes = 0
    for axes, elements in grad_reduce_elements(specs, layout, layer_ranges, coords).items():
        ranks = math.prod(getattr(layout, axis) for axis in axes)
        sent_bytes += 2 * (ranks - 1) * FP32 * elements // ranks
    return sent_bytes


def context_layer_bytes(
    method: ContextMethod,
    tokens: int,
    kv_width: int,
    element_bytes: int,
    ranks: int,
    forwards: int = 1,
) -> int:
    """Bytes that each of `ranks` ranks sends for one attention layer and one microbatch.

    `tokens` are those of the whole microbatch (rows x sequence), `kv_width` the width of keys that
    this rank computes (its heads), `forwards` 2 where the backward computes the block again. Keys
    and values go to every rank once a forward. Their gradients come back: summed at once, as wide
    as themselves (gather), or from stop to stop together with them, in fp32 (ring).
    """
    elements = 2 * tokens // ranks * kv_width
    gradient_bytes = element_bytes if method == "gather" else element_bytes + ACCUMULATOR_BYTES
    return (ranks - 1) * elements * (forwards * element_bytes + gradient_bytes)


def expert_layer_bytes(
    tokens: int,
    experts_per_token: int,
    width: int,
    ranks: int,
    element_bytes: int,
    forwards: int = 1,
) -> float:
    """Bytes that each of `ranks` sends for one mixture of experts and one microbatch, when all
    experts are equally busy.

    `tokens` are those that this rank holds; `experts_per_token` rows of each go to their experts
    and back, in every forward and as gradients; (ranks - 1) / ranks of them leave the rank. Left
    out: the counts, 8 bytes an expert and forward.
    """
    rows = tokens * experts_per_token * (ranks - 1) / ranks
    return (2 * forwards + 2) * rows * width * element_bytes
