"""From run.precision to the type that products are computed in.

Parameters, gradients and sums stay fp32 whatever it is. Not here: the scale of the loss
(`optim/scale.py`), products in fp8 (`fp8.py`). Traded away: types layer by layer; autocast's own
lists say what stays fp32.
"""

from __future__ import annotations

import torch


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The autocast type of run.precision, resolved; None where nothing is cast. What fp8 leaves is
    bf16."""
    match precision:
        case "fp32":
            return None
        case "fp16":
            return torch.float16
        case "bf16" | "fp8":
            return torch.bfloat16
    raise ValueError(f"run.precision={precision} is not resolved (plan/devices.py)")


def casting(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on a kind of device ("cpu", "cuda"); does nothing when it is None."""
    return torch.autocast(device, dtype, enabled=dtype is not None)
