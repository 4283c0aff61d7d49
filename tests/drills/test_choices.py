"""Each choice of a run acts: codecs, placement, limits, rules, what ends it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import SMALL, read_events, read_rows, run_cordee, train_small, weights_digest

EXACT_OVERRIDES = ("run.exact=true", "run.steps=24", "evaluate.sample=0", "evaluate.tokens=0")


def read_losses(folder: Path) -> list[float]:
    """The curve."""
    return [float(str(row["loss"])) for row in read_rows(folder)]


def export_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Whole parameters of a finished run."""
    assert run_cordee("export", str(folder)).returncode == 0
    return load_file(folder / "model.safetensors")


def test_bf16_on_the_wire_halves_the_bytes_and_keeps_the_curve(tmp_path: Path) -> None:
    sent_bytes, curves = {}, {}
    for codec in ("identity", "bf16"):
        folder = tmp_path / codec
        train_small(
            folder, "run.steps=40", "launch.processes=2", "sync.protocol=exchange",
            f"sync.codec={codec}", "run.precision=fp32", "layout.balance=false",
        )  # fmt: skip
        sent_bytes[codec] = {row["bytes_sent"] for row in read_rows(folder)}
        curves[codec] = read_losses(folder)
    (fp32_bytes,), (bf16_bytes,) = sent_bytes["identity"], sent_bytes["bf16"]
    assert fp32_bytes == 2 * int(str(bf16_bytes))
    max_error = max(abs(a / b - 1) for a, b in zip(*curves.values(), strict=True))
    assert 0 < max_error < 2e-2


def test_replicated_work_is_compared_and_gives_the_same_bits(tmp_path: Path) -> None:
    train_small(tmp_path / "one", *EXACT_OVERRIDES, "launch.processes=1")
    train_small(
        tmp_path / "two", *EXACT_OVERRIDES, "launch.processes=2", "data.placement=replicate"
    )
    assert weights_digest(tmp_path / "one") == weights_digest(tmp_path / "two")


def test_replicated_work_that_differs_is_found(run_dir: Path) -> None:
    result = run_cordee(
        "train", *SMALL, *EXACT_OVERRIDES, f"run.dir={run_dir}", "launch.processes=3",
        "data.placement=replicate", "fault.poison=9:1",
    )  # fmt: skip
    assert result.returncode == 1
    assert "islands computed different gradients" in result.stderr
    assert "[1]" in result.stderr
    assert len(read_rows(run_dir)) == 8


@pytest.mark.parametrize("layout", ["layout.shard=1", "layout.shard=2"])
def test_parameter_limits_hold_for_their_group_alone(layout: str, run_dir: Path) -> None:
    train_small(
        run_dir, *EXACT_OVERRIDES, "launch.processes=2", layout, "clip.matrices.value=0.02",
        "clip.embeddings.norm=1.5",
    )  # fmt: skip
    for name, tensor in export_weights(run_dir).items():
        if "embed" in name or "head" in name:
            assert float(tensor.norm()) <= 1.5 * (1 + 1e-5), name
        elif tensor.dim() == 2:
            assert float(tensor.abs().max()) <= 0.02, name
        else:
            assert float(tensor.abs().max()) > 0.02, name


@pytest.mark.parametrize(
    ("rule", "clip"),
    [
        ("adamw", "agc"), ("muon", "norm"),
        pytest.param("adafactor", "norm", marks=pytest.mark.slow),
        *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in (
            ("sgd", "none"), ("momentum", "value"), ("adam", "normalise"),
        )),
    ],
)  # fmt: skip
def test_every_rule_goes_on_in_the_same_bits(rule: str, clip: str, tmp_path: Path) -> None:
    limit = "0.05" if clip in ("value", "agc") else "1"
    overrides = (
        *EXACT_OVERRIDES, f"optim.name={rule}", f"clip.kind={clip}", f"clip.limit={limit}",
        "checkpoint.every=8", "optim.weight_decay=0.01",
    )  # fmt: skip
    train_small(tmp_path / "clean", *overrides, "launch.processes=1")
    kill_folder = tmp_path / "broken"
    kill_result = run_cordee(
        "train", *SMALL, *overrides, f"run.dir={kill_folder}", "launch.processes=2",
        "fault.kill=step.agree:19:1", "fault.recover=false",
    )  # fmt: skip
    assert kill_result.returncode == 1
    train_small(kill_folder, *overrides, "launch.processes=3")
    assert weights_digest(kill_folder) == weights_digest(tmp_path / "clean")
    assert any(event["event"] == "resumed" for event in read_events(kill_folder))
    assert read_losses(kill_folder)[-1] < read_losses(kill_folder)[0]


def test_a_run_ends_by_tokens(run_dir: Path) -> None:
    step_tokens = 12 * 2 * 32
    train_small(run_dir, f"run.tokens={10 * step_tokens - 1}")
    assert len(read_rows(run_dir)) == 10


def test_a_run_ends_by_minutes_on_all_ranks_alike(run_dir: Path) -> None:
    train_small(run_dir, "run.minutes=0.05", "launch.processes=2", "optim.schedule=linear")
    step_rows = read_rows(run_dir)
    assert 3.0 <= float(str(step_rows[-1]["elapsed_s"])) < 6.0
    assert float(str(step_rows[-1]["lr"])) < 0.2 * max(float(str(row["lr"])) for row in step_rows)


def test_a_bigger_step_than_the_data_has_starts_a_new_epoch(run_dir: Path) -> None:
    train_small(run_dir, "data.tokens=2000", "run.steps=12", "launch.processes=2")
    assert len(read_rows(run_dir)) == 12
