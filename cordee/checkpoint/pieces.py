"""Tensors as checkpoints hold them: their dtypes by code, pieces, and a digest of all weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from cordee.checkpoint.format import PieceEntry

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
     "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64,
     "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
     "F64": torch.float64}
)  # fmt: skip
DTYPE_CODES: Mapping[torch.dtype, str] = MappingProxyType({d: c for c, d in DTYPES.items()})


@dataclass(frozen=True)
class Piece:
    """The box of the tensor `name` that begins at `start` and has the shape of `tensor`.

    `start` has an entry for every dim of `global_shape`, so () for a scalar. Each element of a
    tensor belongs to one piece of one rank; one that is missing or in two makes the commit fail.
    """

    name: str
    tensor: Tensor
    global_shape: tuple[int, ...]
    start: tuple[int, ...]


def make_entry(piece: Piece) -> PieceEntry:
    """The manifest's view of a piece. ValueError if it cannot be stored."""
    tensor = piece.tensor
    if tensor.dtype not in DTYPE_CODES or tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(f"{piece.name}: {tensor.dtype}, {tensor.layout} on {tensor.device}")
    return PieceEntry(
        name=piece.name,
        dtype=DTYPE_CODES[tensor.dtype],
        shape=tuple(int(dim) for dim in piece.global_shape),
        start=tuple(int(index) for index in piece.start),
        size=tuple(tensor.shape),
    )


def weights_sha256(names: Iterable[str], read_tensor: Callable[[str], Tensor]) -> str:
    """One digest of all weights, the same for every layout that holds the same bits: SHA-256 over
    name, dtype, whole shape and bytes (C order) of each parameter, in name order.

    `read_tensor` gives a whole parameter; every rank of an island calls it in the same order.
    """
    hasher = hashlib.sha256()
    for name in sorted(names):
        tensor = read_tensor(name).detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
