"""The run on CUDA, when there is a device: its curve is the CPU's, and it repeats its bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, read_rows, run_cordee, train_small, weights_digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICE_COUNT = torch.cuda.device_count() if torch.cuda.is_available() else 0
CUDA_RUN = ("launch.device=cuda", "launch.processes=1", "run.steps=20", "evaluate.sample=0")
FP32 = "run.precision=fp32"
MOE = ("model.moe.experts=4", "model.moe.active=2", "model.moe.width=64")


def losses(folder: Path, *overrides: str) -> list[float]:
    """The losses of 20 steps of the small run."""
    train_small(folder, "run.steps=20", "evaluate.sample=0", "model.layers=2", *overrides)
    return [float(str(row["loss"])) for row in read_rows(folder)]


def assert_close(values: list[float], expected: list[float], rel: float) -> None:
    assert values == pytest.approx(expected, rel=rel)


def has_fp8() -> bool:
    return DEVICE_COUNT > 0 and torch.cuda.get_device_capability() >= (8, 9)


def test_trains_and_repeats_its_bits_on_cuda(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        train_small(tmp_path / name, *CUDA_RUN, FP32, "run.exact=true")
        digests.add(weights_digest(tmp_path / name))
    assert len(digests) == 1


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    overrides = (*CUDA_RUN, "run.exact=true", "checkpoint.every=5")
    train_small(tmp_path / "clean", *overrides)
    command = ("train", *SMALL, *overrides, f"run.dir={tmp_path / 'again'}")
    assert (
        run_cordee(*command, "fault.kill=step.commit:12:0", "fault.recover=false").returncode != 0
    )
    assert run_cordee(*command).returncode == 0
    assert weights_digest(tmp_path / "again") == weights_digest(tmp_path / "clean")


@pytest.mark.parametrize("model", [(), MOE, ("model.mlp=gated", "model.kv_heads=2")])
def test_the_curve_is_the_cpus(model: tuple[str, ...], tmp_path: Path) -> None:
    cpu_losses = losses(tmp_path / "cpu", "launch.device=cpu", "launch.processes=1", FP32, *model)
    assert_close(losses(tmp_path / "cuda", *CUDA_RUN, FP32, *model), cpu_losses, 1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_lower_precisions_stay_near(precision: str, tmp_path: Path) -> None:
    if precision == "fp8" and not has_fp8():
        pytest.skip("this device does not multiply in fp8")
    fp32_losses = losses(tmp_path / "fp32", *CUDA_RUN, FP32)
    assert_close(
        losses(tmp_path / precision, *CUDA_RUN, f"run.precision={precision}"), fp32_losses, 4e-2
    )


@pytest.mark.parametrize(
    "lever",
    [
        "memory.recompute=full", "memory.recompute=selective", "memory.loss_chunk=24",
        "memory.offload=parameters", "run.compile=blocks", "data.prefetch=1",
    ],
)  # fmt: skip
def test_memory_options_keep_the_losses(lever: str, tmp_path: Path) -> None:
    base_losses = losses(tmp_path / "one", *CUDA_RUN, FP32)
    assert_close(losses(tmp_path / "lever", *CUDA_RUN, FP32, lever), base_losses, 1e-4)


@pytest.mark.skipif(DEVICE_COUNT < 2, reason=f"needs 2 CUDA devices, there are {DEVICE_COUNT}")
@pytest.mark.parametrize(
    "axis",
    [
        "layout.islands=2", "layout.shard=2", "layout.tensor=2", "layout.pipeline=2",
        "layout.context=2", "layout.expert=2",
    ],
)  # fmt: skip
def test_each_axis_on_two_devices(axis: str, tmp_path: Path) -> None:
    model = MOE if "expert" in axis else ()
    base_losses = losses(tmp_path / "one", *CUDA_RUN, FP32, *model)
    overrides = ("launch.device=cuda", "launch.processes=2", axis, FP32, *model)
    assert_close(losses(tmp_path / "two", *overrides), base_losses, 1e-4)


def test_memory_of_a_rank_is_counted_on_the_device(tmp_path: Path) -> None:
    train_small(tmp_path, *CUDA_RUN)
    assert all(0 < int(str(row["memory_bytes"])) < 1 << 30 for row in read_rows(tmp_path))
