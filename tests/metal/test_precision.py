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

import cordee
from cordee.checkpoint.pieces import weights_sha256
from cordee.config.load import load, override
from cordee.config.run import MemorySettings, Run
from cordee.dist.mesh import make_mesh
from cordee.errors import ConfigError
from cordee.launcher.prepare import prepare_dataset, resolve_config
from cordee.launcher.run_ranks import RankProcess, launch
from cordee.layout.axes import Layout
from cordee.model.fp8 import E4M3, E5M2, fp8_product, quantise, scaled_product, use_fp8
from cordee.model.layers import autocast_to
from cordee.optim.optimizer import GROWTH_INTERVAL, INITIAL_SCALE, MAX_SCALE, MIN_SCALE, LossScaler
from cordee.parallel.engine import Engine, StepSpec
from cordee.parallel.fsdp import Sharding
from cordee.planner.cluster import local_cluster
from cordee.planner.plan import make_plan
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts
from tests.conftest import (
    SMALL,
    TINY,
    read_events,
    read_rows,
    run_cordee,
    train_small,
    weights_digest,
)
from tests.metal.layouts import build_full_model, build_local_model

FP16_OVERRIDES = (
    *TINY,
    "run.precision=fp16",
    "run.exact=true",
    "run.steps=16",
    "evaluate.tokens=0",
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def read_losses(folder: Path) -> list[float]:
    """The curve."""
    return [float(str(row["loss"])) for row in read_rows(folder)]


def max_relative_error(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(x / y - 1) for x, y in zip(a, b, strict=True))


# ---- fp16 ----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([1.0, math.inf, math.nan]), max_size=60), st.integers(0, 24))
def test_a_scale_is_a_power_of_two_between_its_limits(norms: list[float], power: int) -> None:
    scale = LossScaler(is_dynamic=True)
    scale.value = 2.0**power
    for norm in norms:
        value_before = scale.value
        cause = scale.update([1.0], norm)
        assert bool(cause) == (not math.isfinite(norm) and value_before > MIN_SCALE)
        assert scale.value == (value_before / 2 if cause else value_before)
        assert math.frexp(scale.value)[0] == 0.5 and MIN_SCALE <= scale.value <= MAX_SCALE
    gradient = torch.tensor([1e-20, 3.0, -7e20])
    scaled_gradients = [gradient * scale.value]
    scale.unscale(scaled_gradients)
    assert torch.equal(scaled_gradients[0], gradient)


def test_a_scale_doubles_after_good_steps_and_leaves_bad_losses_alone() -> None:
    scale = LossScaler(is_dynamic=True)
    for _ in range(GROWTH_INTERVAL - 1):
        assert not scale.update([1.0], 1.0)
    assert not scale.update([1.0, math.nan], math.nan)
    assert scale.value == INITIAL_SCALE
    scale.update([1.0], 1.0)
    assert (scale.value, scale.good_steps) == (2 * INITIAL_SCALE, 0)
    for _ in range(20 * GROWTH_INTERVAL):
        scale.update([1.0], 1.0)
    assert scale.value == MAX_SCALE
    fixed_scale = LossScaler(is_dynamic=False)
    assert not fixed_scale.update([1.0], math.inf) and fixed_scale.value == 1.0


def test_fp16_is_near_fp32(tmp_path: Path) -> None:
    curves = []
    for precision in ("fp32", "fp16"):
        train_small(tmp_path / precision, *TINY, "run.steps=20", f"run.precision={precision}")
        curves.append(read_losses(tmp_path / precision))
    assert 0 < max_relative_error(*curves) < 2e-2
    assert {row["loss_scale"] for row in read_rows(tmp_path / "fp16")} == {INITIAL_SCALE}
    assert not any("loss_scale" in row for row in read_rows(tmp_path / "fp32"))


def test_a_fixed_scale_stays_and_is_exact(tmp_path: Path) -> None:
    for name, scale in (("found", ()), ("fixed", (f"run.loss_scale={int(INITIAL_SCALE)}",))):
        train_small(tmp_path / name, *FP16_OVERRIDES, *scale)
    assert weights_digest(tmp_path / "found") == weights_digest(tmp_path / "fixed")
    assert not any("loss_scale" in row for row in read_rows(tmp_path / "fixed"))


@pytest.mark.slow
def test_an_overflow_gives_the_same_bits_anywhere_and_survives_a_kill(tmp_path: Path) -> None:
    poison_overrides = (*FP16_OVERRIDES, "fault.poison=5:0", "guard.in_a_row=1")
    layouts = {"one": ("launch.processes=1",), "two": ("launch.processes=2",),
               "cut": ("launch.processes=2", "layout.shard=2")}  # fmt: skip
    for name, layout in layouts.items():
        train_small(tmp_path / name, *poison_overrides, *layout)
    arguments = (
        "train",
        *SMALL,
        *poison_overrides,
        f"run.dir={tmp_path / 'again'}",
        "checkpoint.every=8",
    )
    kill_overrides = ("launch.processes=2", "fault.kill=step.start:12:1", "fault.recover=false")
    result = run_cordee(*arguments, *kill_overrides)
    assert result.returncode == 1
    assert run_cordee(*arguments, "launch.processes=1").returncode == 0
    assert len({weights_digest(tmp_path / name) for name in (*layouts, "again")}) == 1
    for name in ("one", "again"):
        scales = [row["loss_scale"] for row in read_rows(tmp_path / name)]
        assert scales == [INITIAL_SCALE] * 5 + [INITIAL_SCALE / 2] * 11
    (skip_event,) = (
        event for event in read_events(tmp_path / "one") if event["event"] == "step_skipped"
    )
    assert skip_event["cause"] == "fp16 overflow; loss scale 65536 -> 32768"
    assert (skip_event["step"], skip_event["in_a_row"]) == (5, 0)


def test_what_no_scale_helps_against_stops_the_run(run_dir: Path) -> None:
    overrides = (*SMALL, *FP16_OVERRIDES, "run.steps=40", "fault.poison=3-40:0", "guard.in_a_row=3")
    result = run_cordee("train", *overrides, f"run.dir={run_dir}", "launch.processes=1")
    assert result.returncode == 1
    last_event = read_events(run_dir)[-1]
    halvings = int(math.log2(INITIAL_SCALE))
    assert (last_event["event"], last_event["step"]) == ("stopped", 2 + halvings + 3)
    assert last_event["cause"] == "the gradient is not finite"


def run_overflowing(process: RankProcess, folder: str) -> tuple[str, list[float], int]:
    """Six steps from a scale that is too large: (digest of the weights, scales, skipped steps)."""
    run = resolve_config(
        load(None, (*SMALL, *FP16_OVERRIDES, f"run.dir={folder}/{process.rank}")).run
    )
    data = prepare_dataset(run)
    plan = make_plan(run, local_cluster(), data.vocabulary, process.size)
    trainer = Trainer(run, plan, process, data, Parts())
    trainer.loss_scale.value = MAX_SCALE
    scales = []
    for _ in range(6):
        scales.append(trainer.loss_scale.value)
        trainer.train_step()
    assert trainer.guard.consecutive_skips == 0
    final_digest = weights_sha256(trainer.parameters, lambda name: trainer.parameters[name])
    return final_digest, scales, trainer.progress.skipped


def test_a_real_overflow_is_found_alike_by_any_number_of_ranks(tmp_path: Path) -> None:
    results = [launch(run_overflowing, str(tmp_path / str(n)), ranks=n) for n in (1, 2)]
    (outcome,) = {(a, tuple(b), c) for ranks in results for a, b, c in ranks}
    _, scales, skipped = outcome
    assert 0 < skipped < 6
    assert scales[-1] < MAX_SCALE


# ---- fp8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [(E4M3, 2.0**-4), (E5M2, 2.0**-3)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_quantising_uses_the_whole_range(dtype: torch.dtype, error: float, size: float) -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * size
    x8, scale = quantise(x, dtype)
    largest = torch.finfo(dtype).max
    assert float(x8.float().abs().max()) == largest
    is_large = x.abs() > x.abs().max() / 1000
    restored_x = x8.float() * scale
    assert float((restored_x / x - 1)[is_large].abs().max()) <= error * (1 + 1e-5)


def test_quantising_zeros_and_what_is_not_finite() -> None:
    zeros, scale = quantise(torch.zeros(16, 16), E4M3)
    assert float(zeros.float().abs().max()) == 0 and math.isfinite(float(scale))
    for bad_value in (math.inf, -math.inf, math.nan):
        x = torch.ones(16, 16)
        x[3, 4] = bad_value
        x8, scale = quantise(x, E5M2)
        product = scaled_product(x8, x8.to(E4M3), scale, scale, torch.float32)
        assert not bool(torch.isfinite(product).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_products_are_those_of_quantised_numbers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(64, 32, generator=generator).requires_grad_()
    grad = torch.randn(48, 64, generator=generator).to(dtype)

    def quantise_round_trip(tensor: Tensor, kind: torch.dtype) -> Tensor:
        values, scale = quantise(tensor.detach(), kind)
        return values.double() * scale.double()

    with autocast_to("cpu", torch.bfloat16):  # as in a run; it must not round what is inside
        y = fp8_product(x, weight, dtype)
    x_grad, weight_grad = torch.autograd.grad(y, (x, weight), grad)
    assert (y.dtype, x_grad.dtype, weight_grad.dtype) == (dtype, dtype, torch.float32)
    x8, w8, g8 = (
        quantise_round_trip(x, E4M3),
        quantise_round_trip(weight, E4M3),
        quantise_round_trip(grad, E5M2),
    )
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2.0**-8, "atol": 1e-4}
    torch.testing.assert_close(y.double(), x8 @ w8.T, **tolerance)
    torch.testing.assert_close(x_grad.double(), g8 @ w8, **tolerance)
    torch.testing.assert_close(weight_grad.double(), g8.T @ x8, rtol=1e-5, atol=1e-4)


def make_fp8_run(**memory: str) -> Run:
    memory_overrides = {f"memory.{key}": value for key, value in memory.items()}
    base_overrides = {
        "model.layers": 2,
        "model.width": 32,
        "model.heads": 2,
        "initial.residual": "same",
        "run.precision": "bf16",
    }
    return override(Run(), {**base_overrides, **memory_overrides})


def train_sgd(run: Run, fp8: bool, steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses of plain SGD on one batch, and the last gradients."""
    model = build_full_model(run)
    names = [name for name, _ in model.named_parameters()]
    if fp8:
        for block in model.parts():
            use_fp8(block)
    assert [name for name, _ in model.named_parameters()] == names
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(2))
    curve, gradients = [], []
    for _ in range(steps):
        with autocast_to("cpu", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
        gradients = list(torch.autograd.grad(loss, list(model.parameters())))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        curve.append(loss.item())
    return curve, gradients


def test_blocks_in_fp8_descend_as_in_bf16() -> None:
    bf16_losses, _ = train_sgd(make_fp8_run(), False, 30)
    fp8_losses, _ = train_sgd(make_fp8_run(), True, 30)
    assert 0 < max_relative_error(bf16_losses, fp8_losses) < 5e-2
    assert fp8_losses[-1] < 0.8 * fp8_losses[0]


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_fp8_computed_again_gives_the_same_bits(kind: str) -> None:
    curve, gradients = train_sgd(make_fp8_run(), True, 3)
    second_curve, second_gradients = train_sgd(make_fp8_run(recompute=kind), True, 3)
    assert curve == second_curve
    assert all(torch.equal(a, b) for a, b in zip(gradients, second_gradients, strict=True))


def test_levers_of_blocks_are_refused_without_blocks(run_dir: Path) -> None:
    run = override(Run(), {"run.dir": str(run_dir), "run.steps": 2, "run.compile": "blocks"})
    with pytest.raises(ConfigError, match="blocks of the built-in model"):
        cordee.train(run, Parts(model=torch.nn.Linear(2, 2)))
    assert not run_dir.exists()


# ---- compile -------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize(
    "overrides",
    [("launch.processes=1",), ("launch.processes=2", "layout.shard=2", "memory.recompute=full")],
    ids=["alone", "sharded"],
)
def test_compiled_blocks_make_the_same_steps(overrides: tuple[str, ...], tmp_path: Path) -> None:
    train_overrides = ("run.steps=5", "run.precision=fp32", "evaluate.sample=20", *overrides)
    for kind in ("none", "blocks"):
        train_small(tmp_path / kind, *train_overrides, f"run.compile={kind}", deadline_s=600.0)
    assert (
        max_relative_error(read_losses(tmp_path / "none"), read_losses(tmp_path / "blocks")) < 1e-5
    )
    assert weights_digest(tmp_path / "none") != weights_digest(tmp_path / "blocks")


@pytest.mark.slow
def test_compiled_selective_keeps_products_and_no_more() -> None:
    run = override(make_fp8_run(), {"run.compile": "blocks", "memory.recompute": "selective"})
    bytes_by_kind = {}
    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(2))
    for kind in ("none", "selective", "full"):
        kind_run = override(run, {"memory.recompute": kind})
        model = build_local_model(
            kind_run, make_mesh(Layout(), 0, "cpu"), Sharding()
        ).stage_modules[0]
        assert model.memory == MemorySettings()
        saved_bytes: dict[int, int] = {}

        def record_saved(x: Tensor, saved_bytes: dict[int, int] = saved_bytes) -> Tensor:
            saved_bytes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(record_saved, lambda x: x):
            model(tokens[:, :-1], tokens[:, 1:])
        bytes_by_kind[kind] = sum(saved_bytes.values())
    assert bytes_by_kind["full"] < bytes_by_kind["selective"] < bytes_by_kind["none"]


# ---- offload -------------------------------------------------------------------------------------


class FakeLoader:
    """Microbatches that depend on their index alone."""

    def begin(self, step: int, indices: range) -> None:
        """Nothing to announce."""

    def microbatch(self, step: int, index: int) -> Tensor:
        """int64 [2, 17]."""
        return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(index))

    def ids(self, step: int, index: int) -> NDArray[np.int64]:
        """The index stands for its rows."""
        return np.array([index, index])


def compute_gradients(process: RankProcess, offload: str, canonical: bool) -> list[Tensor]:
    """Gradients of three microbatches, as they lie on the parameters."""
    run = make_fp8_run(offload=offload)
    mesh = make_mesh(Layout(), 0, process.device, offload != "none")
    sharding = Sharding(canonical=canonical, offload=offload != "none")
    step_spec = StepSpec(
        microbatches=range(3),
        total_microbatches=3,
        step_tokens=96,
        seed=0,
        takes_dropout_key=False,
        autocast=None,
        sharding=sharding,
        device=process.device,
    )
    engine = Engine(build_local_model(run, mesh, sharding), FakeLoader(), mesh, step_spec)
    assert engine.is_sharded == (offload != "none")
    gradients = []
    for number in range(2):
        _, partial = engine.forward_backward(number)
        gradients = engine.set_gradients(partial[0][1])
        parameters = engine.parameters.values()
        assert all(p.grad is not None and p.grad.device == p.device for p in parameters)
    return [gradient.clone() for gradient in gradients]


@pytest.mark.parametrize("canonical", [True, False])
def test_offloaded_shards_of_one_give_the_same_gradients(canonical: bool) -> None:
    """On a CPU, where nothing moves: the path of FSDP2 with its policy and a mesh of one rank."""
    (plain_gradients,) = launch(compute_gradients, "none", canonical, ranks=1)
    (offload_gradients,) = launch(compute_gradients, "parameters", canonical, ranks=1)
    assert all(torch.equal(a, b) for a, b in zip(plain_gradients, offload_gradients, strict=True))
