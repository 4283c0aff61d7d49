"""Bytes that tensor ranks send, counted on the wire and on paper."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from cordee.config.load import load
from cordee.config.run import MemorySettings, Run
from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.process_group import RankProcess
from cordee.launcher.run_ranks import launch
from cordee.layout.axes import Layout
from cordee.layout.tensors import tensor_specs
from cordee.model.layers import SequenceShard
from cordee.model.transformer import Transformer
from cordee.parallel.tensor import set_sequence_parallel
from cordee.planner.compute_cost import all_layers
from cordee.planner.traffic import tensor_axis_bytes

LEVERS = [
    MemorySettings(),
    MemorySettings(loss_chunk=7),
    MemorySettings(recompute="full"),
    MemorySettings(recompute="selective", recompute_every=2),
]


def check_bytes(process: RankProcess, ranks: int) -> None:
    torch.set_num_threads(1)
    for precision, dropout in (("fp32", 0.0), ("bf16", 0.1)):
        overrides = ("model.width=48", "model.heads=6", "model.kv_heads=3", "model.layers=3",
                 "batch.microbatch=3", "data.sequence=24", f"run.precision={precision}",
                 f"model.dropout={dropout}")  # fmt: skip
        for memory in LEVERS:
            check_microbatch(process, replace(load(None, overrides).run, memory=memory), ranks)


def check_microbatch(process: RankProcess, run: Run, ranks: int) -> None:
    """One microbatch on this rank's part of the model; what it sent is what paper says."""
    layout = Layout(tensor=ranks)
    model = Transformer(run.model, 60)
    model.memory = run.memory
    model.autocast = torch.bfloat16 if run.run.precision == "bf16" else None
    parameters = dict(model.named_parameters())
    for spec in tensor_specs(run.model, 60):
        box = tuple(slice(*bounds) for bounds in spec.box(layout, layout.coordinates(process.rank)))
        parameters[spec.name].data = parameters[spec.name].data[box].clone()
    comm = AxisComm(dist.group.WORLD, ranks, process.rank)
    set_sequence_parallel(model, comm, SequenceShard(tensor_size=ranks, tensor_index=process.rank))
    tokens = torch.randint(0, 60, (3, 25), generator=torch.Generator().manual_seed(1))
    model.loss(tokens).backward()
    assert comm.bytes_sent == tensor_axis_bytes(run, layout, [all_layers(run)], 60), run.memory


def test_counted_bytes_are_predicted_bytes() -> None:
    launch(check_bytes, 3, ranks=3)
