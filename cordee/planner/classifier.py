"""What a classifier of images costs: operations, element passes, and what its backward keeps.

Counts of the modules in model/classifier.py, for `costs.microbatch_cost` and `memory`, which know
time and the rest of memory. Traded away: convolutions by shape; they are taken to be as fast as
products. Forward and backward of 22 models (conv 16 to 128 wide on 16 and 32 pixels, mlp 256 to
2048, fp32 and bf16, one thread of a Zen 4 core, torch 2.13) gave the constants below; they took
0.7 to 1.3 of what follows from them, but for a bf16 mlp of 25 M weights (2.0).
"""

from __future__ import annotations

from typing import Any

from cordee.config.run import Run

FP32 = 4

PASSES = {"conv": 12, "mlp": 6}
"""Passes over a block's stream, forward and backward."""

DISPATCH = {"conv": 0.3, "mlp": 0.05}
"""Fixed time of a block, as a part of a transformer's."""


def microbatch_counts(run: Run) -> dict[str, Any]:
    """The fields of `costs.Work` for one microbatch, forward and backward.

    3 times the forward's operations, but 2 for the first layer, as pixels need no gradient.
    """
    model, image, images = run.model, run.model.image, run.batch.microbatch
    width, head = model.width, model.width * image.classes
    if model.kind == "conv":
        areas = [side * side for side in model.block_sides]
        first = 9 * image.channels * width * areas[0]
        inner = 18 * width * width * sum(areas[1:])
        weights = 9 * width * (image.channels + 2 * width * model.layers) + head
        positions = sum(areas[:-1])
    else:
        first, inner = image.pixel_bytes * width, (model.layers - 1) * width * width
        weights = first + inner + head
        positions = model.layers
    flops = 2.0 * images * (2 * first + 3 * (inner + head))
    return {
        "tokens": images * run.data.sequence,
        "layers": DISPATCH[model.kind] * model.layers,
        "routers": 0.0,
        "experts": 0.0,
        "matrix_flops": flops,
        "attention_flops": 0.0,
        "block_elements": float(PASSES[model.kind] * images * width * positions),
        "logits": images * image.classes,
        "weights": weights,
        "probabilities": 0.0,
        "flops": flops,
    }


def activation_bytes(run: Run, device: str) -> int:
    """Bytes autograd holds of one microbatch at the loss.

    Norms keep their input, the ReLU after them what it gives, and products their input: the same
    tensor, but on CUDA under autocast, where norms are computed in fp32 and products in bf16.
    """
    model, image, bf16 = run.model, run.model.image, run.run.precision == "bf16"
    product = 2 if bf16 else FP32
    cast = 2 if bf16 and device != "cpu" else 0
    normed = 2 * (FP32 if cast else product) * model.width
    if model.kind == "conv":
        areas = [side * side for side in model.block_sides]
        kept = sum((normed + cast * model.width) * area for area in areas[:-1])
        kept += sum(product * model.width * area for area in areas[1:])
        kept += normed * areas[-1]
    else:
        kept = model.layers * normed + cast * model.width * model.layers
    return int(run.batch.microbatch * (kept + product * image.pixel_bytes))


def temporary_bytes(run: Run) -> int:
    """What the widest block's backward works with: gradients of its stream and of what it made."""
    model = run.model
    positions = model.image.side**2 if model.kind == "conv" else 1
    return 3 * FP32 * run.batch.microbatch * positions * model.width
