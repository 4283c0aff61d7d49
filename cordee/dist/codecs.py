"""How gradients are encoded for a message: identity (fp32) and bf16.

bf16 keeps fp32's range, so sums cannot overflow; it rounds to 8 bits of mantissa once on the way
there and once on the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cordee.dist.tree_all_reduce import Codec


class IdentityCodec:
    """fp32 as it is."""

    dtype = torch.float32

    def encode(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def decode(self, payload: Tensor) -> Tensor:
        """The payload itself."""
        return payload


class BFloat16Codec:
    """fp32 rounded to bfloat16: half the bytes, relative error at most 2^-8 an element."""

    dtype = torch.bfloat16

    def encode(self, tensor: Tensor) -> Tensor:
        """Rounds to nearest even."""
        return tensor.to(torch.bfloat16)

    def decode(self, payload: Tensor) -> Tensor:
        """Widens back to fp32."""
        return payload.to(torch.float32)


def make_codec(name: str) -> Codec:
    """The codec called `name` (sync.codec)."""
    match name:
        case "identity":
            return IdentityCodec()
        case "bf16":
            return BFloat16Codec()
    raise KeyError(name)
