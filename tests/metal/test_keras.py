"""Keras 3 models on torch: the adapter trains, alone and sharded; the guard refuses a raw model."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from cordee.dist.autograd_collectives import AxisComm
from cordee.dist.mesh import make_mesh
from cordee.errors import ConfigError, LayoutError, RunError
from cordee.hf.keras import KerasModel
from cordee.launcher.run_ranks import RankProcess, launch
from cordee.layout.axes import Layout
from cordee.parallel.external import ModelProbe, compare_probes, sgd_step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("keras") is None, reason='needs pip install "cordee[keras]"'
)


def build_keras_model() -> Any:
    """A classifier with a BatchNorm; the same numbers each time."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((8,)), keras.layers.Dense(16, activation="relu"),
        keras.layers.BatchNormalization(), keras.layers.Dense(4),
    ])  # fmt: skip


def make_batch(rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    return x[rows], x[rows, :4].argmax(-1)


def summed_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = F.cross_entropy(model(x), y, reduction="sum")
    return loss


def train_steps(model: nn.Module, rows: slice, steps: int = 30) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    losses = []
    for _ in range(steps):
        loss = summed_loss(model, *make_batch(rows))
        (loss / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_it_trains_and_its_states_move() -> None:
    raw_model = build_keras_model()
    model = KerasModel(raw_model).train()
    x, y = make_batch()
    torch.testing.assert_close(model.eval()(x), raw_model(x, training=False))
    buffers_before = {name: b.clone() for name, b in model.named_buffers()}
    losses = train_steps(model.train(), slice(None))
    assert losses[-1] < 0.5 * losses[0]
    assert all(
        not torch.equal(buffers_before[n], b) for n, b in model.named_buffers() if "moving" in n
    )
    assert sum("moving" in n for n in buffers_before) == 2
    assert torch.equal(model.to_keras()(x, training=False), model.eval()(x))
    assert summed_loss(model, x, y) < losses[0]


def train_sharded(process: RankProcess) -> tuple[float, float, bool, str]:
    """First and last loss of the sharded adapter, whether states moved, and what the guard says
    of the raw Keras model."""
    torch.set_num_threads(1)
    mesh = make_mesh(Layout(shard=2), process.rank, process.device)
    assert mesh.shard_mesh is not None
    rows = slice(16 * process.rank, 16 * process.rank + 16)
    comm = AxisComm(mesh.group("shard"), 2, process.rank)

    def wrap_model(model: nn.Module) -> nn.Module:
        fully_shard(model, mesh=mesh.shard_mesh)
        model.set_force_sum_reduction_for_comms(True)
        model.set_gradient_divide_factor(1.0)
        return model

    def check_model(model: nn.Module) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        local_parameters = [p.detach().to_local() for p in parameters]

        def step() -> None:
            (summed_loss(model, *make_batch(rows)) / 32).backward()
            grads = [None if p.grad is None else p.grad.to_local() for p in parameters]
            sgd_step(local_parameters, grads, 0.2)

        def probe_loss() -> Tensor:
            local_loss = summed_loss(model, *make_batch(rows)).detach()
            model.reshard()
            return comm.all_reduce_no_grad(local_loss)

        compare_probes(ModelProbe(probe_loss, step), local_parameters, comm)

    model = wrap_model(KerasModel(build_keras_model()).train())
    check_model(model)
    model.zero_grad()
    buffers_before = {name: b.clone() for name, b in model.named_buffers() if "moving" in name}
    losses = train_steps(model, rows)
    states_moved = all(
        not torch.equal(buffers_before[n], dict(model.named_buffers())[n]) for n in buffers_before
    )
    try:
        check_model(wrap_model(build_keras_model().train()))
    except RunError as error:
        return losses[0], losses[-1], states_moved, error.message
    return losses[0], losses[-1], states_moved, ""


def test_sharded_it_trains_and_a_raw_keras_model_is_refused() -> None:
    for first_loss, last_loss, states_moved, message in launch(train_sharded, ranks=2):
        assert last_loss < 0.5 * first_loss
        assert states_moved
        assert "stale tensors" in message or "changes no parameter" in message


def test_what_cannot_be_is_refused() -> None:
    model = KerasModel(build_keras_model())
    model.check_layout(Layout(shard=2), exact=False)
    for layout, exact in ((Layout(tensor=2), False), (Layout(shard=2), True)):
        with pytest.raises(LayoutError):
            model.check_layout(layout, exact)
    with pytest.raises(ConfigError, match="no built Keras model"):
        KerasModel(nn.Linear(2, 2))
