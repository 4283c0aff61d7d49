"""Bytes that tensor ranks send, counted on the wire and on paper."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from cordee.config.load import load
from cordee.config.run import MemorySettings, Run
from cordee.dist.start import World
from cordee.dist.wire import Wire
from cordee.layout.axes import Layout
from cordee.layout.tensors import tensors
from cordee.model.span import Span
from cordee.model.transformer import Transformer
from cordee.parallel.tensor import split_sequence
from cordee.plan.costs import whole
from cordee.plan.wires import tensor_bytes
from cordee.testing import launch

LEVERS = [
    MemorySettings(),
    MemorySettings(loss_chunk=7),
    MemorySettings(recompute="full"),
    MemorySettings(recompute="selective", recompute_every=2),
]


def count(world: World, ranks: int) -> None:
    torch.set_num_threads(1)
    for precision, dropout in (("fp32", 0.0), ("bf16", 0.1)):
        words = ("model.width=48", "model.heads=6", "model.kv_heads=3", "model.layers=3",
                 "batch.microbatch=3", "data.sequence=24", f"run.precision={precision}",
                 f"model.dropout={dropout}")  # fmt: skip
        for memory in LEVERS:
            hold(world, replace(load(None, words).run, memory=memory), ranks)


def hold(world: World, run: Run, ranks: int) -> None:
    """One microbatch on this rank's part of the model; what it sent is what paper says."""
    layout = Layout(tensor=ranks)
    model = Transformer(run.model, 60)
    model.memory = run.memory
    model.autocast = torch.bfloat16 if run.run.precision == "bf16" else None
    parameters = dict(model.named_parameters())
    for spec in tensors(run.model, 60):
        box = tuple(slice(*part) for part in spec.box(layout, layout.coordinates(world.rank)))
        parameters[spec.name].data = parameters[spec.name].data[box].clone()
    wire = Wire(dist.group.WORLD, ranks, world.rank)
    split_sequence(model, wire, Span(tensor=ranks, tensor_index=world.rank))
    tokens = torch.randint(0, 60, (3, 25), generator=torch.Generator().manual_seed(1))
    model.loss(tokens).backward()
    assert wire.bytes_sent == tensor_bytes(run, layout, [whole(run)], 60), run.memory


def test_counted_bytes_are_predicted_bytes() -> None:
    launch(count, 3, ranks=3)
