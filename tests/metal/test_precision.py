"""Precision and compile levers: fp16's scale, fp8's products, compiled blocks, offloaded shards."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cordee.begin import lay_out_data, settle
from cordee.build import build
from cordee.checkpoint.fingerprint import weights_sha256
from cordee.config.load import load, override
from cordee.config.run import MemorySettings, Run
from cordee.desk import Desk
from cordee.dist.mesh import make_mesh
from cordee.errors import ConfigError
from cordee.fault.leave import Asked
from cordee.layout.axes import Layout
from cordee.model.fp8 import E4M3, E5M2, fp8_product, quantise, scaled_product, use_fp8
from cordee.model.precision import casting
from cordee.optim.scale import FIRST, GOOD_STEPS, LEAST, MOST, LossScale
from cordee.parallel.engine import Engine, Work
from cordee.parallel.shard import Sharding
from cordee.parts import Parts
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan
from cordee.testing import World, launch
from cordee.train import step
from cordee.train import train as cordee_train
from tests.conftest import SMALL, TINY, cordee, digest, events, rows, train
from tests.metal.layouts import live_model, plain_model

FP16 = (*TINY, "run.precision=fp16", "run.exact=true", "run.steps=16", "evaluate.tokens=0")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def losses(folder: Path) -> list[float]:
    """The curve."""
    return [float(str(row["loss"])) for row in rows(folder)]


def far(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


# ---- fp16 ----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([1.0, math.inf, math.nan]), max_size=60), st.integers(0, 24))
def test_a_scale_is_a_power_of_two_between_its_limits(norms: list[float], power: int) -> None:
    scale = LossScale(dynamic=True)
    scale.value = 2.0**power
    for norm in norms:
        before = scale.value
        cause = scale.follow([1.0], norm)
        assert bool(cause) == (not math.isfinite(norm) and before > LEAST)
        assert scale.value == (before / 2 if cause else before)
        assert math.frexp(scale.value)[0] == 0.5 and LEAST <= scale.value <= MOST
    gradient = torch.tensor([1e-20, 3.0, -7e20])
    scaled = [gradient * scale.value]
    scale.unscale(scaled)
    assert torch.equal(scaled[0], gradient)


def test_a_scale_doubles_after_good_steps_and_leaves_bad_losses_alone() -> None:
    scale = LossScale(dynamic=True)
    for _ in range(GOOD_STEPS - 1):
        assert not scale.follow([1.0], 1.0)
    assert not scale.follow([1.0, math.nan], math.nan)
    assert scale.value == FIRST
    scale.follow([1.0], 1.0)
    assert (scale.value, scale.good_steps) == (2 * FIRST, 0)
    for _ in range(20 * GOOD_STEPS):
        scale.follow([1.0], 1.0)
    assert scale.value == MOST
    fixed = LossScale(dynamic=False)
    assert not fixed.follow([1.0], math.inf) and fixed.value == 1.0


def test_fp16_is_near_fp32(tmp_path: Path) -> None:
    curves = []
    for precision in ("fp32", "fp16"):
        train(tmp_path / precision, *TINY, "run.steps=20", f"run.precision={precision}")
        curves.append(losses(tmp_path / precision))
    assert 0 < far(*curves) < 2e-2
    assert {row["loss_scale"] for row in rows(tmp_path / "fp16")} == {FIRST}
    assert not any("loss_scale" in row for row in rows(tmp_path / "fp32"))


def test_a_fixed_scale_stays_and_is_exact(tmp_path: Path) -> None:
    for name, scale in (("found", ()), ("fixed", (f"run.loss_scale={int(FIRST)}",))):
        train(tmp_path / name, *FP16, *scale)
    assert digest(tmp_path / "found") == digest(tmp_path / "fixed")
    assert not any("loss_scale" in row for row in rows(tmp_path / "fixed"))


@pytest.mark.slow
def test_an_overflow_gives_the_same_bits_anywhere_and_survives_a_kill(tmp_path: Path) -> None:
    spoilt = (*FP16, "fault.poison=5:0", "guard.in_a_row=1")
    layouts = {"one": ("launch.processes=1",), "two": ("launch.processes=2",),
               "cut": ("launch.processes=2", "layout.shard=2")}  # fmt: skip
    for name, layout in layouts.items():
        train(tmp_path / name, *spoilt, *layout)
    words = ("train", *SMALL, *spoilt, f"run.dir={tmp_path / 'again'}", "checkpoint.every=8")
    broken = ("launch.processes=2", "fault.kill=step.start:12:1", "fault.recover=false")
    killed = cordee(*words, *broken)
    assert killed.returncode == 1
    assert cordee(*words, "launch.processes=1").returncode == 0
    assert len({digest(tmp_path / name) for name in (*layouts, "again")}) == 1
    for name in ("one", "again"):
        scales = [row["loss_scale"] for row in rows(tmp_path / name)]
        assert scales == [FIRST] * 5 + [FIRST / 2] * 11
    (told,) = (event for event in events(tmp_path / "one") if event["event"] == "step_skipped")
    assert told["cause"] == "fp16 overflow; loss scale 65536 -> 32768"
    assert (told["step"], told["in_a_row"]) == (5, 0)


def test_what_no_scale_helps_against_stops_the_run(run_dir: Path) -> None:
    words = (*SMALL, *FP16, "run.steps=40", "fault.poison=3-40:0", "guard.in_a_row=3")
    done = cordee("train", *words, f"run.dir={run_dir}", "launch.processes=1")
    assert done.returncode == 1
    last = events(run_dir)[-1]
    halvings = int(math.log2(FIRST))
    assert (last["event"], last["step"]) == ("stopped", 2 + halvings + 3)
    assert last["cause"] == "the gradient is not finite"


def overflowing(world: World, folder: str) -> tuple[str, list[float], int]:
    """Six steps from a scale that is too large: (digest of the weights, scales, skipped steps)."""
    run = settle(load(None, (*SMALL, *FP16, f"run.dir={folder}/{world.rank}")).run)
    data = lay_out_data(run)
    plan = make_plan(run, local_cluster(), data.vocabulary, world.size)
    state = build(run, plan, world, data, Parts())
    state.scale.value = MOST
    desk = Desk(state, Asked())
    scales = []
    for _ in range(6):
        scales.append(state.scale.value)
        step(state, desk)
    assert state.guard.in_a_row == 0
    whole = weights_sha256(state.parameters, lambda name: state.parameters[name])
    return whole, scales, state.progress.skipped


def test_a_real_overflow_is_found_alike_by_any_number_of_ranks(tmp_path: Path) -> None:
    found = [launch(overflowing, str(tmp_path / str(n)), ranks=n) for n in (1, 2)]
    (told,) = {(a, tuple(b), c) for ranks in found for a, b, c in ranks}
    _, scales, skipped = told
    assert 0 < skipped < 6
    assert scales[-1] < MOST


# ---- fp8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [(E4M3, 2.0**-4), (E5M2, 2.0**-3)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_quantising_uses_the_whole_range(dtype: torch.dtype, error: float, size: float) -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * size
    x8, scale = quantise(x, dtype)
    largest = torch.finfo(dtype).max
    assert float(x8.float().abs().max()) == largest
    big = x.abs() > x.abs().max() / 1000
    back = x8.float() * scale
    assert float((back / x - 1)[big].abs().max()) <= error * (1 + 1e-5)


def test_quantising_zeros_and_what_is_not_finite() -> None:
    zeros, scale = quantise(torch.zeros(16, 16), E4M3)
    assert float(zeros.float().abs().max()) == 0 and math.isfinite(float(scale))
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.ones(16, 16)
        x[3, 4] = bad
        x8, scale = quantise(x, E5M2)
        product = scaled_product(x8, x8.to(E4M3), scale, scale, torch.float32)
        assert not bool(torch.isfinite(product).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_products_are_those_of_quantised_numbers(dtype: torch.dtype) -> None:
    made_by = torch.Generator().manual_seed(1)
    x = torch.randn(48, 32, generator=made_by).to(dtype).requires_grad_()
    weight = torch.randn(64, 32, generator=made_by).requires_grad_()
    grad = torch.randn(48, 64, generator=made_by).to(dtype)

    def rounded(tensor: Tensor, kind: torch.dtype) -> Tensor:
        values, scale = quantise(tensor.detach(), kind)
        return values.double() * scale.double()

    with casting("cpu", torch.bfloat16):  # as in a run; it must not round what is inside
        y = fp8_product(x, weight, dtype)
    x_grad, weight_grad = torch.autograd.grad(y, (x, weight), grad)
    assert (y.dtype, x_grad.dtype, weight_grad.dtype) == (dtype, dtype, torch.float32)
    x8, w8, g8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(grad, E5M2)
    near = {"rtol": 1e-5 if dtype == torch.float32 else 2.0**-8, "atol": 1e-4}
    torch.testing.assert_close(y.double(), x8 @ w8.T, **near)
    torch.testing.assert_close(x_grad.double(), g8 @ w8, **near)
    torch.testing.assert_close(weight_grad.double(), g8.T @ x8, rtol=1e-5, atol=1e-4)


def fp8_run(**memory: str) -> Run:
    keys = {f"memory.{key}": value for key, value in memory.items()}
    shape = {"model.layers": 2, "model.width": 32, "model.heads": 2, "initial.residual": "same",
             "run.precision": "bf16"}  # fmt: skip
    return override(Run(), {**shape, **keys})


def trained(run: Run, fp8: bool, steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses of plain SGD on one batch, and the last gradients."""
    model = plain_model(run)
    names = [name for name, _ in model.named_parameters()]
    if fp8:
        for block in model.parts():
            use_fp8(block)
    assert [name for name, _ in model.named_parameters()] == names
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(2))
    curve, gradients = [], []
    for _ in range(steps):
        with casting("cpu", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
        gradients = list(torch.autograd.grad(loss, list(model.parameters())))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        curve.append(loss.item())
    return curve, gradients


def test_blocks_in_fp8_descend_as_in_bf16() -> None:
    wide, _ = trained(fp8_run(), False, 30)
    narrow, _ = trained(fp8_run(), True, 30)
    assert 0 < far(wide, narrow) < 5e-2
    assert narrow[-1] < 0.8 * narrow[0]


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_fp8_computed_again_gives_the_same_bits(kind: str) -> None:
    curve, gradients = trained(fp8_run(), True, 3)
    again, gradients_again = trained(fp8_run(recompute=kind), True, 3)
    assert curve == again
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


def test_levers_of_blocks_are_refused_without_blocks(run_dir: Path) -> None:
    run = override(Run(), {"run.dir": str(run_dir), "run.steps": 2, "run.compile": "blocks"})
    with pytest.raises(ConfigError, match="blocks of the built-in model"):
        cordee_train(run, Parts(model=torch.nn.Linear(2, 2)))
    assert not run_dir.exists()


# ---- compile -------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize(
    "words",
    [("launch.processes=1",), ("launch.processes=2", "layout.shard=2", "memory.recompute=full")],
    ids=["alone", "sharded"],
)
def test_compiled_blocks_make_the_same_steps(words: tuple[str, ...], tmp_path: Path) -> None:
    fp32 = ("run.steps=5", "run.precision=fp32", "evaluate.sample=20", *words)
    for kind in ("none", "blocks"):
        train(tmp_path / kind, *fp32, f"run.compile={kind}", deadline_s=600.0)
    assert far(losses(tmp_path / "none"), losses(tmp_path / "blocks")) < 1e-5
    assert digest(tmp_path / "none") != digest(tmp_path / "blocks")


@pytest.mark.slow
def test_compiled_selective_keeps_products_and_no_more() -> None:
    run = override(fp8_run(), {"run.compile": "blocks", "memory.recompute": "selective"})
    kept = {}
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(2))
    for kind in ("none", "selective", "full"):
        wanted = override(run, {"memory.recompute": kind})
        model = live_model(wanted, make_mesh(Layout(), 0, "cpu"), Sharding()).chunks[0]
        assert model.memory == MemorySettings()
        held: dict[int, int] = {}

        def keep(x: Tensor, held: dict[int, int] = held) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(tokens[:, :-1], tokens[:, 1:])
        kept[kind] = sum(held.values())
    assert kept["full"] < kept["selective"] < kept["none"]


# ---- offload -------------------------------------------------------------------------------------


class Rows:
    """Microbatches that depend on their index alone."""

    def begin(self, step: int, indices: range) -> None:
        """Nothing to announce."""

    def microbatch(self, step: int, index: int) -> Tensor:
        """int64 [2, 17]."""
        return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(index))

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """The index stands for its rows."""
        return np.array([index, index])


def gradients_of(world: World, offload: str, canonical: bool) -> list[Tensor]:
    """Gradients of three microbatches, as they lie on the parameters."""
    run = fp8_run(offload=offload)
    mesh = make_mesh(Layout(), 0, world.device, offload != "none")
    sharding = Sharding(canonical=canonical, offload=offload != "none")
    work = Work(
        part=range(3), total=3, tokens=96, seed=0, keyed=False, autocast=None,
        sharding=sharding, device=world.device,
    )  # fmt: skip
    engine = Engine(live_model(run, mesh, sharding), Rows(), mesh, work)
    assert engine.sharded == (offload != "none")
    found = []
    for number in range(2):
        _, partial = engine.forward_backward(number)
        found = engine.place(partial[0][1])
        parts = engine.parameters.values()
        assert all(p.grad is not None and p.grad.device == p.device for p in parts)
    return [gradient.clone() for gradient in found]


@pytest.mark.parametrize("canonical", [True, False])
def test_offloaded_shards_of_one_give_the_same_gradients(canonical: bool) -> None:
    """On a CPU, where nothing moves: the path of FSDP2 with its policy and a mesh of one rank."""
    (plain,) = launch(gradients_of, "none", canonical, ranks=1)
    (moved,) = launch(gradients_of, "parameters", canonical, ranks=1)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))
