"""THE recipe: how a plain model becomes this rank's part of it.

Order: build -> initialise -> fp8 -> recompute -> compile -> place -> shard. Every parameter's
numbers depend on (seed, name) alone, so they are the same whatever comes after. Tensor, expert,
context and pipeline cuts will stand before fp8; their layouts are refused on paper until then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from cordee.config.run import MemorySettings, Run
from cordee.dist.mesh import Mesh
from cordee.errors import ConfigError
from cordee.model.fp8 import use_fp8
from cordee.model.recompute import recomputed
from cordee.parallel.shard import shard


def apply(model: nn.Module, mesh: Mesh, device: str, canonical: bool, run: Run) -> nn.Module:
    """Moves `model` (initialised, whole, on CPU) to `device` and cuts it for this rank.

    Under memory.offload, FSDP2 moves it unit by unit, and `mesh` has a shard mesh whatever its
    size. ConfigError when the run wants something of blocks and the model has none.
    """
    offload = run.memory.offload == "parameters"
    if run.run.precision == "fp8":
        for block in _wanted_blocks(model, "run.precision"):
            use_fp8(block)
    if run.run.compile == "blocks":
        compile_blocks(model)
    if not offload:
        model.to(device)
    if mesh.shard_mesh is not None:
        shard(model, mesh.shard_mesh, blocks_of(model), canonical, offload)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, in order; empty when it has none."""
    return list(getattr(model, "blocks", ()))


def compile_blocks(model: nn.Module) -> None:
    """torch.compile of every block's forward, in place: one code for all blocks alike.

    What is recomputed moves inside, where the compiler can tell what to keep (around compiled code,
    selective would keep no more than full). FSDP2's hooks stay outside.
    """
    blocks = _wanted_blocks(model, "run.compile")
    memory = cast(MemorySettings, model.memory)
    for index, block in enumerate(blocks):
        inner = block.forward
        forward = recomputed(memory.recompute, inner) if memory.recomputes(index) else inner
        block.forward = torch.compile(forward)
    cast(Any, model).memory = replace(memory, recompute="none")


def _wanted_blocks(model: nn.Module, key: str) -> list[nn.Module]:
    found = blocks_of(model)
    if not found:
        raise ConfigError(
            f"{key} is for models with blocks",
            values={"model": type(model).__name__},
            fix="run.compile=none run.precision=bf16",
        )
    return found
