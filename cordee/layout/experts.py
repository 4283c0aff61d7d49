"""Why a layout cannot hold a mixture of experts, with the nearest that can.

Not here: what is wrong with a mixture on one process already (`config/check.py`).
"""

from __future__ import annotations

import math

from cordee.config.model import ModelSettings
from cordee.layout.axes import Layout


def moe_problems(model: ModelSettings, layout: Layout) -> list[tuple[str, str]]:
    """(reason, nearest fix) pairs; empty when the layout can hold the model's experts."""
    moe = model.moe
    if not moe.experts:
        why = f"layout.expert={layout.expert}: the model has no experts to deal"
        return [(why, "layout.expert=1")] if layout.expert > 1 else []
    found = []
    if moe.experts % layout.expert:
        found.append((
            f"{moe.experts} experts (model.moe.experts) cannot be dealt evenly over"
            f" layout.expert={layout.expert} ranks",
            f"layout.expert={nearest_divisor(moe.experts, layout.expert)}",
        ))  # fmt: skip
    inner = math.gcd(model.expert_width, model.width)
    if inner % layout.shard:
        found.append((
            f"layout.shard={layout.shard} must divide an expert's hidden width"
            f" {model.expert_width} and the width {model.width}: shards cut them evenly",
            f"layout.shard={nearest_divisor(inner, layout.shard)}",
        ))  # fmt: skip
    shared = moe.shared * model.expert_width
    if shared % layout.tensor:
        found.append((
            f"layout.tensor={layout.tensor} must divide the shared experts' hidden width {shared}",
            f"layout.tensor={nearest_divisor(shared, layout.tensor)}",
        ))  # fmt: skip
    if moe.capacity and layout.tensor * layout.context > 1:
        found.append((
            f"model.moe.capacity={moe.capacity:g} with layout.context={layout.context} and"
            f" layout.tensor={layout.tensor}: the layout would decide which tokens are dropped",
            "model.moe.capacity=0",
        ))  # fmt: skip
    return found


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`; of two the smaller."""
    divisors = (d for d in range(1, min(number, 2 * wanted) + 1) if number % d == 0)
    return min(divisors, key=lambda d: (abs(d - wanted), d))
