"""Bytes that autograd keeps of a microbatch, counted block by block for the built-in model.

Per token and block: both norms keep a unit vector (fp32), their outputs are kept as inputs of the
matrices; queries and keys a unit vector each (fp32); queries, keys, values and the output
projection's input one each; the MLP two hidden vectors, four when gated; dropout its masks. Tensor
ranks hold their heads and hidden features of all positions and their positions of the stream.
Met within 1 % of what torch saves, uncut. Not here: state and buffers (`memory.py`). Traded away:
unequal routing; experts are taken as equally busy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cordee.config.run import Run
from cordee.layout.axes import Layout
from cordee.layout.stages import LayerRange
from cordee.planner.compute_cost import CHUNKED_MAX_LENGTH, SINGLE_RANK, all_layers, keys_per_query

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
    sizes = {
        is_moe: _block_activation_bytes(run, device, layout, is_moe) for is_moe in (False, True)
    }
    moe_flags = [run.model.is_moe(layer) for layer in range(layer_range.start, layer_range.stop)]
    recompute_flags = [
        run.memory.recomputes(layer) for layer in range(layer_range.start, layer_range.stop)
    ]
    block_sizes = (
        sizes[is_moe][is_recomputed]
        for is_moe, is_recomputed in zip(moe_flags, recompute_flags, strict=True)
    )
    # A schedule keeps what a stage was given and what it gave until its backward.
    boundary_bytes = stream_bytes * ((not layer_range.has_embedding) + (not layer_range.has_head))
    cumulative_bytes = list(itertools.accumulate(block_sizes, initial=boundary_bytes))
    points = [BackwardPoint(int(cumulative_bytes[-1] + head_bytes), 0.0, layer_range.has_head)]
    recomputed_indices = [
        index for index, is_recomputed in enumerate(recompute_flags) if is_recomputed
    ]
    for is_moe in (False, True):
        # Memory is linear in the place of equal blocks: the first or the last of them is worst.
        indices = [index for index in recomputed_indices if moe_flags[index] == is_moe]
        for index in {*indices[:1], *indices[-1:]}:
            # Its turn: it holds all that it computes again; what came after it is gone.
            fraction_done = (len(moe_flags) - index) / (len(moe_flags) + 1)
            points.append(
                BackwardPoint(
                    int(cumulative_bytes[index] + stream_bytes + sizes[is_moe][False]),
                    fraction_done,
                    False,
                )
            )
    return points


def rank_backward_points(
    run: Run,
    device: str,
    layout: Layout,
    layer_ranges: Sequence[LayerRange],
    in_flight: Sequence[int],
) -> list[tuple[BackwardPoint, LayerRange]]:
    """Moments of a rank that holds `flights[i]` microbatches of its stage `parts[i]`: the others
    wait, whole, while one is at its moment."""
    points_by_range = [
        backward_points(run, device, layout, layer_range) for layer_range in layer_ranges
    ]
    waiting_bytes = sum(
        count * points[0].live_bytes
        for count, points in zip(in_flight, points_by_range, strict=True)
    )
    return [
        (
            BackwardPoint(
                waiting_bytes - points[0].live_bytes + point.live_bytes,
                point.fraction_done,
                point.is_loss,
            ),
            layer_range,
        )
        for points, layer_range in zip(points_by_range, layer_ranges, strict=True)
        for point in points
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
    mask_bytes = (
        2 * model.width * (dtype_bytes if device == "cpu" else 1) * split_tokens
        if model.dropout
        else 0
    )
    mlp_bytes, product_bytes = (
        _expert_bytes(run, device, layout)
        if is_moe
        else _mlp_bytes(run, layout, model.hidden_width)
    )
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
    saved_bytes = FP32 * unit_width * tokens + 2 * dtype_bytes * (
        model.query_width * tokens + key_width * key_tokens
    )
    if is_ring or device != "cpu" or run.data.sequence > CHUNKED_MAX_LENGTH:
        bytes_per_head: float = FP32
    else:
        bytes_per_head = dtype_bytes * keys_per_query(run.data.sequence, device)
    return (saved_bytes + model.heads * bytes_per_head * tokens) / layout.tensor


def _mlp_bytes(run: Run, layout: Layout, width: int) -> tuple[float, float]:
    """Bytes of an MLP with `width` hidden features: (all that is kept, results of products)."""
    model, dtype_bytes = run.model, element_bytes(run)
    tokens = tokens_per_rank(run, layout)
    is_gated = model.mlp == "gated"
    hidden_elements = width * tokens / layout.tensor
    saved_bytes = dtype_bytes * ((4 if is_gated else 2) * hidden_elements + model.width * tokens)
    return saved_bytes, dtype_bytes * (
        (2 if is_gated else 1) * hidden_elements + model.width * tokens
    )


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
        saved_bytes += (
            dtype_bytes * (model.width + hidden_width) * PADDING_ROWS * moe.experts / layout.expert
        )
    saved_bytes += (
        ROUTING_ROW_BYTES * rows + FP32 * (moe.experts + (moe.router == "sigmoid")) * split_tokens
    )
    product_bytes = dtype_bytes * (model.width + (2 if is_gated else 1) * model.expert_width) * rows
    product_bytes += FP32 * moe.experts * split_tokens
    if not moe.shared:
        return saved_bytes + FP32 * model.width * split_tokens, product_bytes
    shared_mlp = _mlp_bytes(run, layout, moe.shared * model.expert_width)
    # What shared experts read is the router's input, unless that was cast, or gathered for them.
    router_input_bytes = (
        0.0 if dtype_bytes == FP32 and layout.tensor == 1 else FP32 * model.width * split_tokens
    )
    return saved_bytes + router_input_bytes + shared_mlp[0], product_bytes + shared_mlp[1]
