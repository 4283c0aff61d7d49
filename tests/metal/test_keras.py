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

from cordee.dist.mesh import make_mesh
from cordee.dist.wire import Wire
from cordee.errors import ConfigError, LayoutError, RunError
from cordee.layout.axes import Layout
from cordee.model.keras import KerasModel
from cordee.parallel.probe import Tried, descend, probe
from cordee.testing import World, launch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("keras") is None, reason='needs pip install "cordee[keras]"'
)


def keras_model() -> Any:
    """A classifier with a BatchNorm; the same numbers each time."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((8,)), keras.layers.Dense(16, activation="relu"),
        keras.layers.BatchNormalization(), keras.layers.Dense(4),
    ])  # fmt: skip


def batch(rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    return x[rows], x[rows, :4].argmax(-1)


def summed_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = F.cross_entropy(model(x), y, reduction="sum")
    return loss


def train(model: nn.Module, rows: slice, steps: int = 30) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    losses = []
    for _ in range(steps):
        loss = summed_loss(model, *batch(rows))
        (loss / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_it_trains_and_its_states_move() -> None:
    theirs = keras_model()
    model = KerasModel(theirs).train()
    x, y = batch()
    torch.testing.assert_close(model.eval()(x), theirs(x, training=False))
    held = {name: b.clone() for name, b in model.named_buffers()}
    losses = train(model.train(), slice(None))
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(held[n], b) for n, b in model.named_buffers() if "moving" in n)
    assert sum("moving" in n for n in held) == 2
    assert torch.equal(model.give_back()(x, training=False), model.eval()(x))
    assert summed_loss(model, x, y) < losses[0]


def sharded(world: World) -> tuple[float, float, bool, str]:
    """First and last loss of the sharded adapter, whether states moved, and what the guard says
    of the raw Keras model."""
    torch.set_num_threads(1)
    mesh = make_mesh(Layout(shard=2), world.rank, world.device)
    assert mesh.shard_mesh is not None
    rows = slice(16 * world.rank, 16 * world.rank + 16)
    wire = Wire(mesh.group("shard"), 2, world.rank)

    def wrapped(model: nn.Module) -> nn.Module:
        fully_shard(model, mesh=mesh.shard_mesh)
        model.set_force_sum_reduction_for_comms(True)
        model.set_gradient_divide_factor(1.0)
        return model

    def guarded(model: nn.Module) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        parts = [p.detach().to_local() for p in trained]

        def step() -> None:
            (summed_loss(model, *batch(rows)) / 32).backward()
            grads = [None if p.grad is None else p.grad.to_local() for p in trained]
            descend(parts, grads, 0.2)

        def loss() -> Tensor:
            found = summed_loss(model, *batch(rows)).detach()
            model.reshard()
            return wire.total_now(found)

        probe(Tried(loss, step), parts, wire)

    model = wrapped(KerasModel(keras_model()).train())
    guarded(model)
    model.zero_grad()
    held = {name: b.clone() for name, b in model.named_buffers() if "moving" in name}
    losses = train(model, rows)
    moved = all(not torch.equal(held[n], dict(model.named_buffers())[n]) for n in held)
    try:
        guarded(wrapped(keras_model().train()))
    except RunError as error:
        return losses[0], losses[-1], moved, error.what
    return losses[0], losses[-1], moved, ""


def test_sharded_it_trains_and_a_raw_keras_model_is_refused() -> None:
    for first, last, moved, said in launch(sharded, ranks=2):
        assert last < 0.5 * first
        assert moved
        assert "stale tensors" in said or "changes no parameter" in said


def test_what_cannot_be_is_refused() -> None:
    model = KerasModel(keras_model())
    model.check(Layout(shard=2), exact=False)
    for layout, exact in ((Layout(tensor=2), False), (Layout(shard=2), True)):
        with pytest.raises(LayoutError):
            model.check(layout, exact)
    with pytest.raises(ConfigError, match="no built Keras model"):
        KerasModel(nn.Linear(2, 2))
