"""One digest of all weights: the same for every layout that holds the same bits.

SHA-256 over, for each parameter in name order: its name, dtype, whole shape, and bytes in C order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def weights_sha256(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """`read(name)` gives a whole parameter; it is called once for each name, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = read(name).detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
