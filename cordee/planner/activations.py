"""Bytes that autograd keeps of a microbatch, counted block by block for the built-in model.

Per token and block: both norms keep a unit vector (fp32), their outputs are kept as inputs of the
matrices; queries and keys a unit vector each (fp32); queries, keys, values and the output
projection's input one each; the MLP two hidden vectors, four when gated; dropout its masks. Tensor
ranks hold their heads and hidden features of all positions and their positions of the stream.
Within 1 % of what torch saves, uncut; experts are taken as equally busy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cordee.config.run import LayoutSettings, Run
from cordee.layout.axes import Layout
from cordee.layout.stages import LayerRange
from cordee.planner.compute_cost import CHUNKED_MAX_LENGTH, SINGLE_RANK, all_layers, keys_per_query

ZERO_BUBBLE_RATIO = 1 / 3
"""Bubble of ZBV over that of 1F1B: weights' gradients fill it (Qi et al. 2023, half or less)."""

FP32 = 4

ROUTING_ROW_BYTES = 36
"""Of each row of a token for an expert: places before and after sorting, and its weight."""

PADDING_ROWS = 16
"""Rows of zeros of an expert on a CPU in bf16, on average: half of what moe.py fills up to."""


def element_bytes(run: Run) -> int:
    """Bytes of what matrix products read: fp16 and fp8 are planned as bf16."""
    return FP32 if run.run.precision == "fp32" else 2


@dataclass(frozen=True)
class BackwardPoint:
    """`live_bytes` of activations when part `fraction_done` of a stage's backward is over;
    `is_loss`: the stage's loss is being computed."""

    live_bytes: int
    fraction_done: float
    is_loss: bool


def tokens_per_rank(run: Run, layout: Layout) -> int:
    """Tokens of a microbatch that a rank's attention and matrices see."""
    return run.batch.microbatch * run.data.sequence // layout.context


def activation_bytes(run: Run, device: str) -> int:
    """The most activations held at once by a run that is not cut (see `backward_points`)."""
    return max(
        point.live_bytes for point in backward_points(run, device, SINGLE_RANK, all_layers(run))
    )


def backward_points(
    run: Run, device: str, layout: Layout, layer_range: LayerRange
) -> list[BackwardPoint]:
    """What one microbatch holds of one stage: before its backward, and at each block that is
    computed again. Without recomputation activations shrink faster than gradients grow, so the
    first moment is the worst."""
    split_tokens = tokens_per_rank(run, layout) / layout.tensor
    stream_bytes = FP32 * run.model.width * split_tokens
    head_bytes = _head_input_bytes(run, layout) if layer_range.has_head else 0.0
    sizes = [_block_activation_bytes(run, device, layout, is_moe) for is_moe in (False, True)]
    layers = range(layer_range.start, layer_range.stop)
    flags = [(run.model.is_moe(layer), run.memory.recomputes(layer)) for layer in layers]
    block_sizes = (sizes[is_moe][is_recomputed] for is_moe, is_recomputed in flags)
    # A schedule keeps a stage's input and output until its backward.
    boundary_bytes = stream_bytes * ((not layer_range.has_embedding) + (not layer_range.has_head))
    cumulative_bytes = list(itertools.accumulate(block_sizes, initial=boundary_bytes))
    points = [BackwardPoint(int(cumulative_bytes[-1] + head_bytes), 0.0, layer_range.has_head)]
    for is_moe in (False, True):
        # Memory is linear in the place of equal blocks: the first or the last of them is worst.
        indices = [i for i in range(len(flags)) if flags[i] == (is_moe, True)]
        for index in {*indices[:1], *indices[-1:]}:
            # Its turn: it holds all that it computes again, and later blocks hold nothing.
            live_bytes = cumulative_bytes[index] + stream_bytes + sizes[is_moe][False]
            fraction_done = (len(flags) - index) / (len(flags) + 1)
            points.append(BackwardPoint(int(live_bytes), fraction_done, False))
    return points


def rank_backward_points(
    run: Run,
    device: str,
    layout: Layout,
    layer_ranges: Sequence[LayerRange],
    in_flight: Sequence[int],
) -> list[tuple[BackwardPoint, LayerRange]]:
    """Points of a rank that holds `in_flight[i]` microbatches of its stage `layer_ranges[i]`: while
    one is in its backward, the others wait with all their activations."""
    points_by_range = [backward_points(run, device, layout, r) for r in layer_ranges]
    waiting_bytes = sum(
        count * points[0].live_bytes
        for count, points in zip(in_flight, points_by_range, strict=True)
    )
    return [
        (replace(p, live_bytes=waiting_bytes - points[0].live_bytes + p.live_bytes), layer_range)
        for points, layer_range in zip(points_by_range, layer_ranges, strict=True)
        for p in points
    ]


def _head_input_bytes(run: Run, layout: Layout) -> float:
    """What the last norm keeps: its unit vector (split) and the head's input (gathered)."""
    tokens = tokens_per_rank(run, layout)
    return (FP32 / layout.tensor + element_bytes(run)) * run.model.width * tokens


def _block_activation_bytes(
    run: Run, device: str, layout: Layout, is_moe: bool
) -> tuple[float, float]:
    """Bytes that a block keeps of a microbatch: (without, with being computed again)."""
    model, dtype_bytes = run.model, element_bytes(run)
    tokens = tokens_per_rank(run, layout)
    split_tokens = tokens / layout.tensor
    norm_bytes = 2 * FP32 * (model.width + 1) * split_tokens + dtype_bytes * model.width * tokens
    mask_element_bytes = (dtype_bytes if device == "cpu" else 1) if model.dropout else 0
    mask_bytes = 2 * model.width * mask_element_bytes * split_tokens
    if is_moe:
        mlp_bytes, product_bytes = _expert_bytes(run, device, layout)
    else:
        mlp_bytes, product_bytes = _mlp_bytes(run, layout, model.hidden_width)
    total_bytes = norm_bytes + _attention_bytes(run, device, layout) + mlp_bytes + mask_bytes
    saved_bytes = FP32 * model.width * split_tokens
    if run.memory.recompute == "selective":
        # Queries, keys, values, what attention gives, its projection, and the MLP's products.
        qkv_width = (2 * model.query_width + 2 * model.kv_width) / layout.tensor
        saved_bytes += dtype_bytes * (qkv_width + model.width) * tokens + product_bytes
    return total_bytes, saved_bytes


def _attention_bytes(run: Run, device: str, layout: Layout) -> float:
    """Queries, keys, values, probabilities where they are kept, and the projection's input."""
    model, dtype_bytes = run.model, element_bytes(run)
    tokens, kv_heads = tokens_per_rank(run, layout), model.kv_heads or model.heads
    is_ring = layout.context > 1 and run.layout.attention == "ring"
    unit_width = model.query_width + model.kv_width + model.heads + kv_heads if model.qk_norm else 0
    # A CPU repeats keys and values for each query head; gathered ones are those of all ranks.
    key_width = model.query_width if device == "cpu" and not is_ring else model.kv_width
    key_tokens = tokens if is_ring else tokens * layout.context
    saved_bytes = FP32 * unit_width * tokens
    saved_bytes += 2 * dtype_bytes * (model.query_width * tokens + key_width * key_tokens)
    if is_ring or device != "cpu" or run.data.sequence > CHUNKED_MAX_LENGTH:
        bytes_per_head: float = FP32
    else:
        bytes_per_head = dtype_bytes * keys_per_query(run.data.sequence, device)
    return (saved_bytes + model.heads * bytes_per_head * tokens) / layout.tensor


def _mlp_bytes(run: Run, layout: Layout, width: int) -> tuple[float, float]:
    """Bytes of an MLP with `width` hidden features: (all that is kept, results of products)."""
    tokens, products = tokens_per_rank(run, layout), 2 if run.model.mlp == "gated" else 1
    hidden_elements, stream_elements = width * tokens / layout.tensor, run.model.width * tokens
    saved_bytes, product_bytes = (
        element_bytes(run) * (copies * products * hidden_elements + stream_elements)
        for copies in (2, 1)
    )
    return saved_bytes, product_bytes


def _expert_bytes(run: Run, device: str, layout: Layout) -> tuple[float, float]:
    """The same of experts, which work on split tokens: the router's fp32 input and scores, each
    chosen row on its way in and out, hidden vectors, places of rows (integers) and weights; shared
    experts as an MLP."""
    model, dtype_bytes = run.model, element_bytes(run)
    moe, is_gated = model.moe, model.mlp == "gated"
    split_tokens = tokens_per_rank(run, layout) / layout.tensor
    rows = split_tokens * moe.active
    hidden_width = (4 if is_gated else 2) * model.expert_width
    saved_bytes = dtype_bytes * (2 * model.width + hidden_width) * rows
    if device == "cpu" and run.run.precision == "bf16":
        padding_rows = PADDING_ROWS * moe.experts / layout.expert
        saved_bytes += dtype_bytes * (model.width + hidden_width) * padding_rows
    saved_bytes += ROUTING_ROW_BYTES * rows
    saved_bytes += FP32 * (moe.experts + (moe.router == "sigmoid")) * split_tokens
    product_bytes = dtype_bytes * (model.width + (2 if is_gated else 1) * model.expert_width) * rows
    product_bytes += FP32 * moe.experts * split_tokens
    if not moe.shared:
        return saved_bytes + FP32 * model.width * split_tokens, product_bytes
    shared_mlp = _mlp_bytes(run, layout, moe.shared * model.expert_width)
    # Shared experts read the router's input, unless that was cast, or gathered for them.
    if dtype_bytes != FP32 or layout.tensor > 1:
        saved_bytes += FP32 * model.width * split_tokens
    return saved_bytes + shared_mlp[0], product_bytes + shared_mlp[1]


def in_flight_microbatches(
    settings: LayoutSettings, ranks: int, rank: int, microbatches: int
) -> list[int]:
    """For each stage of pipeline rank `rank`, the microbatches whose activations it holds at most:
    closed forms of torch.distributed.pipelining's schedules.

    GPipe holds all; 1F1B as many as stages follow; interleaved those of its warm-up and one more;
    ZBV, whose first and last stage are on one rank, as many as there are stages in all.
    """
    m = microbatches
    if ranks == 1:
        return [1]
    match settings.schedule:
        case "gpipe":
            return [m]
        case "1f1b":
            return [min(m, ranks - rank)]
        case "interleaved":
            return _interleaved_in_flight(settings.chunks, ranks, rank, m)
    return [min(m, 2 * ranks - rank - 1), min(m, rank + 1)]


def bubble_ratio(settings: LayoutSettings, ranks: int, microbatches: int) -> float:
    """Idle time of a step over the time that a rank computes (Narayanan et al. 2021, section 2)."""
    ratio = (ranks - 1) / microbatches
    match settings.schedule:
        case "interleaved":
            return ratio / settings.chunks
        case "zero_bubble":
            return ratio * ZERO_BUBBLE_RATIO
    return ratio


def _interleaved_in_flight(chunks: int, ranks: int, rank: int, microbatches: int) -> list[int]:
    """Forwards before the first backward, dealt to the chunks in rounds."""
    round_size = microbatches // max(1, microbatches // ranks)
    warm_up = (chunks - 1) * round_size + 2 * (ranks - 1 - rank)
    forwards = min(warm_up + 1, microbatches * chunks)
    cycles, remainder = divmod(forwards, round_size * chunks)
    partial_rounds = (max(0, remainder - round_size * chunk) for chunk in range(chunks))
    counts = (cycles * round_size + min(round_size, forwards) for forwards in partial_rounds)
    return [min(microbatches, count) for count in counts]
