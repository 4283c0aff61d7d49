"""The run on CUDA, when there is a device: its curve is the CPU's, and it repeats its bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, cordee, digest, rows, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0
CUDA = ("launch.device=cuda", "launch.processes=1", "run.steps=20", "evaluate.sample=0")
FP32 = "run.precision=fp32"
MOE = ("model.moe.experts=4", "model.moe.active=2", "model.moe.width=64")


def losses(folder: Path, *words: str) -> list[float]:
    """The losses of 20 steps of the small run."""
    train(folder, "run.steps=20", "evaluate.sample=0", "model.layers=2", *words)
    return [float(str(row["loss"])) for row in rows(folder)]


def near(found: list[float], wanted: list[float], rel: float) -> None:
    assert found == pytest.approx(wanted, rel=rel)


def has_fp8() -> bool:
    return DEVICES > 0 and torch.cuda.get_device_capability() >= (8, 9)


def test_trains_and_repeats_its_bits_on_cuda(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        train(tmp_path / name, *CUDA, FP32, "run.exact=true")
        digests.add(digest(tmp_path / name))
    assert len(digests) == 1


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    words = (*CUDA, "run.exact=true", "checkpoint.every=5")
    train(tmp_path / "clean", *words)
    again = ("train", *SMALL, *words, f"run.dir={tmp_path / 'again'}")
    assert cordee(*again, "fault.kill=step.commit:12:0", "fault.recover=false").returncode != 0
    assert cordee(*again).returncode == 0
    assert digest(tmp_path / "again") == digest(tmp_path / "clean")


@pytest.mark.parametrize("model", [(), MOE, ("model.mlp=gated", "model.kv_heads=2")])
def test_the_curve_is_the_cpus(model: tuple[str, ...], tmp_path: Path) -> None:
    cpu = losses(tmp_path / "cpu", "launch.device=cpu", "launch.processes=1", FP32, *model)
    near(losses(tmp_path / "cuda", *CUDA, FP32, *model), cpu, 1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_lower_precisions_stay_near(precision: str, tmp_path: Path) -> None:
    if precision == "fp8" and not has_fp8():
        pytest.skip("this device does not multiply in fp8")
    one = losses(tmp_path / "fp32", *CUDA, FP32)
    near(losses(tmp_path / precision, *CUDA, f"run.precision={precision}"), one, 4e-2)


@pytest.mark.parametrize(
    "lever",
    [
        "memory.recompute=full", "memory.recompute=selective", "memory.loss_chunk=24",
        "memory.offload=parameters", "run.compile=blocks", "data.prefetch=1",
    ],
)  # fmt: skip
def test_levers_leave_the_curve(lever: str, tmp_path: Path) -> None:
    one = losses(tmp_path / "one", *CUDA, FP32)
    near(losses(tmp_path / "lever", *CUDA, FP32, lever), one, 1e-4)


@pytest.mark.skipif(DEVICES < 2, reason=f"needs 2 CUDA devices, there are {DEVICES}")
@pytest.mark.parametrize(
    "axis",
    [
        "layout.islands=2", "layout.shard=2", "layout.tensor=2", "layout.pipeline=2",
        "layout.context=2", "layout.expert=2",
    ],
)  # fmt: skip
def test_each_axis_on_two_devices(axis: str, tmp_path: Path) -> None:
    model = MOE if "expert" in axis else ()
    one = losses(tmp_path / "one", *CUDA, FP32, *model)
    words = ("launch.device=cuda", "launch.processes=2", axis, FP32, *model)
    near(losses(tmp_path / "two", *words), one, 1e-4)


def test_memory_of_a_rank_is_counted_on_the_device(tmp_path: Path) -> None:
    train(tmp_path, *CUDA)
    assert all(0 < int(str(row["memory_bytes"])) < 1 << 30 for row in rows(tmp_path))
