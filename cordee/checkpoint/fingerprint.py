"""One digest of all weights: the same for every layout that holds the same bits.

SHA-256 over, for each parameter in name order: its name, dtype, whole shape, and bytes in C order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def weights_sha256(names: Iterable[str], read_tensor: Callable[[str], Tensor]) -> str:
    """`read(name)` gives a whole parameter; it is called once for each name, in sorted order."""
    hasher = hashlib.sha256()
    for name in sorted(names):
        tensor = read_tensor(name).detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
