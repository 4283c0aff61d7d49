"""Bytes that one rank sends in a step on each axis, as dist/wire.py counts them.

A ring of n sends n - 1 own parts to gather or to scatter sums, and 2 (n - 1)/n of a total. Exact
for tensor, context, pipeline and the sums inside an island; a test holds what a run counts to it.
What FSDP2 sends is as it pads; experts' rows are taken as balanced. Not here: what islands send
each other, and time (`network.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cordee.config.run import Run
from cordee.layout.axes import Layout
from cordee.layout.census import Specs, census
from cordee.layout.legal import canonical, gathers_cast, worker_microbatches
from cordee.layout.stages import Part, Stages
from cordee.layout.traffic import context_bytes, expert_bytes
from cordee.plan.activations import FP32, attended_tokens, element_bytes
from cordee.plan.costs import block_counts
from cordee.plan.memory import summed_elements, unit_bytes

SUMS = "sums"
"""What `axis_bytes` calls gradients summed inside an island, over several axes at once."""

COUNT_BYTES = 8
"""What says how many rows an expert gets."""


def axis_bytes(
    run: Run,
    specs: Specs,
    layout: Layout,
    stages: Stages,
    at: Mapping[str, int],
    zero: int = 1,
) -> dict[str, int]:
    """Bytes that the rank at coordinates `at` sends in a step, forward and backward, on every axis
    inside an island whose degree is above 1, and for `SUMS`."""
    parts, each = stages.held(at["pipeline"]), worker_microbatches(run, layout)
    counted = census(specs)
    found = {
        "pipeline": each * pipeline_bytes(run, layout, stages, at["pipeline"]),
        "context": each * sequence_bytes(run, layout, parts),
        "expert": each * rows_bytes(run, layout, parts),
        "shard": sum(shard_bytes(run, specs, layout, parts, zero, canonical(run, layout))[:2]),
        "sequence": each * balance_bytes(run, layout, parts),
        "tensor": each * tensor_bytes(run, layout, parts, counted.vocabulary),
        SUMS: sum_bytes(specs, layout, parts, at),
    }
    return {axis: sent for axis, sent in found.items() if sent}


def tensor_bytes(run: Run, layout: Layout, parts: Sequence[Part], vocabulary: int) -> int:
    """Of one microbatch: each block gathers its split stream before attention and before the MLP
    and scatters sums after both, and mirrors that in the backward; the embedding scatters (fp32),
    the head gathers, and its loss needs three numbers for every position."""
    ranks = layout.tensor
    if ranks == 1:
        return 0
    tokens, element = attended_tokens(run, layout), element_bytes(run)
    part = (ranks - 1) * tokens // ranks * run.model.width
    sent = 0
    for moe, blocks, again in block_counts(run, parts):
        # Experts work on split tokens; those that every token uses are cut as an MLP is.
        seams = 2 if moe and not run.model.moe.shared else 4
        # Computed again: all but the last scatter, unless what comes after it is needed (dropout).
        repeated = seams if moe or run.model.dropout else seams - 1
        sent += (2 * seams * blocks + repeated * again) * part * element
    for stage in parts:
        sent += 2 * part * FP32 * stage.embeds
        if stage.heads:
            sent += 2 * part * element + _loss_bytes(run, ranks, tokens)
    return sent


def _loss_bytes(run: Run, ranks: int, tokens: int) -> int:
    """The largest logit, then the sum and the target's logit, of each position; by chunks."""
    chunk = min(tokens, run.memory.loss_chunk or tokens)
    whole, left = divmod(tokens, chunk)
    return whole * _totals(ranks, chunk) + _totals(ranks, left)


def _totals(ranks: int, positions: int) -> int:
    each = 2 * (ranks - 1) * FP32 * positions
    return each // ranks + 2 * each // ranks


def sequence_bytes(run: Run, layout: Layout, parts: Sequence[Part]) -> int:
    """Of one microbatch on the axis context: keys and values of every block."""
    if layout.context == 1:
        return 0
    tokens = run.batch.microbatch * run.data.sequence
    width, element = run.model.kv_width // layout.tensor, element_bytes(run)
    method, ranks = run.layout.attention, layout.context
    once = context_bytes(method, tokens, width, element, ranks)
    twice = context_bytes(method, tokens, width, element, ranks, forwards=2)
    counts = block_counts(run, parts)
    return sum((blocks - again) * once + again * twice for _, blocks, again in counts)


def rows_bytes(run: Run, layout: Layout, parts: Sequence[Part]) -> int:
    """Of one microbatch on the axis expert: the counts of every forward, and each token's row to
    its experts and back, which balanced routing spreads evenly."""
    ranks, moe = layout.expert, run.model.moe
    if ranks == 1:
        return 0
    tokens = attended_tokens(run, layout) // layout.tensor
    counts = (ranks - 1) * moe.experts // ranks * COUNT_BYTES
    sent = 0.0
    for mixed, blocks, again in block_counts(run, parts):
        for forwards, number in ((1, blocks - again), (2, again)):
            rows = expert_bytes(
                tokens, moe.active, run.model.width, ranks, element_bytes(run), forwards
            )
            sent += mixed * number * (rows + forwards * counts)
    return int(sent)


def balance_bytes(run: Run, layout: Layout, parts: Sequence[Part]) -> int:
    """Of one microbatch on the axes that split a sequence: the assignments of every expert, which
    the balance loss of a mixture adds up in each forward."""
    ranks, moe = layout.context * layout.tensor, run.model.moe
    if ranks == 1 or moe.balance != "loss":
        return 0
    once = 2 * (ranks - 1) * COUNT_BYTES * moe.experts // ranks
    counts = block_counts(run, parts)
    return once * sum(blocks + again for mixed, blocks, again in counts if mixed)


def pipeline_bytes(run: Run, layout: Layout, stages: Stages, rank: int) -> int:
    """Of one microbatch on the axis pipeline: the fp32 stream to the next stage and its gradient to
    the one before, unless that is on the same rank (the turn of a V)."""
    stream, sent = stream_bytes(run, layout), 0
    for stage in stages.of_rank(rank):
        for other in (stage - 1, stage + 1):
            if 0 <= other <= stages.last and stages.rank_of(other) != rank:
                sent += stream
    return sent


def stream_bytes(run: Run, layout: Layout) -> int:
    """What one stage hands to the next of one microbatch."""
    return FP32 * run.model.width * attended_tokens(run, layout) // layout.tensor


def shard_bytes(
    run: Run, specs: Specs, layout: Layout, parts: Sequence[Part], zero: int, whole: bool = False
) -> tuple[int, int, int]:
    """FSDP2 in one step: (bytes gathered, bytes reduced, collectives) of one rank.

    zero 1 gathers and reduces once; 2 reduces every microbatch; 3 also gathers every microbatch,
    blocks twice. 2 and 3 gather in the type of products. `whole`: gradients stay whole and are left
    to the exchange.
    """
    if layout.shard == 1:
        return 0, 0, 0
    rest, blocks, number = unit_bytes(specs, layout, parts)
    each = worker_microbatches(run, layout)
    reduces = 0 if whole else 1 if zero == 1 else each
    block_gathers, rest_gathers = (2 * each, each) if zero == 3 else (1, 1)
    units = block_gathers * number + reduces * number
    if rest:
        units += rest_gathers + reduces
    gathered = (block_gathers * blocks + rest_gathers * rest) // layout.shard
    reduced = reduces * (blocks + rest) // layout.shard
    if gathers_cast(run, zero):
        gathered = gathered * element_bytes(run) // FP32
    return (layout.shard - 1) * gathered, (layout.shard - 1) * reduced, units


def sum_bytes(specs: Specs, layout: Layout, parts: Sequence[Part], at: Mapping[str, int]) -> int:
    """Gradients that an island sums after FSDP2: one flat fp32 total for each set of axes."""
    sent = 0
    for axes, elements in summed_elements(specs, layout, parts, at).items():
        ranks = 1
        for axis in axes:
            ranks *= getattr(layout, axis)
        sent += 2 * (ranks - 1) * FP32 * elements // ranks
    return sent
