"""Each choice of a run acts: codecs, placement, limits, rules, what ends it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import SMALL, cordee, digest, events, rows, train

EXACT = ("run.exact=true", "run.steps=24", "evaluate.sample=0", "evaluate.tokens=0")


def losses(folder: Path) -> list[float]:
    """The curve."""
    return [float(str(row["loss"])) for row in rows(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Whole parameters of a finished run."""
    assert cordee("export", str(folder)).returncode == 0
    return load_file(folder / "model.safetensors")


def test_bf16_on_the_wire_halves_the_bytes_and_keeps_the_curve(tmp_path: Path) -> None:
    sent, curves = {}, {}
    for codec in ("identity", "bf16"):
        folder = tmp_path / codec
        train(
            folder, "run.steps=40", "launch.processes=2", "sync.protocol=exchange",
            f"sync.codec={codec}", "run.precision=fp32", "layout.balance=false",
        )  # fmt: skip
        sent[codec] = {row["bytes_sent"] for row in rows(folder)}
        curves[codec] = losses(folder)
    (whole,), (half,) = sent["identity"], sent["bf16"]
    assert whole == 2 * int(str(half))
    worst = max(abs(a / b - 1) for a, b in zip(*curves.values(), strict=True))
    assert 0 < worst < 2e-2


def test_replicated_work_is_compared_and_gives_the_same_bits(tmp_path: Path) -> None:
    train(tmp_path / "one", *EXACT, "launch.processes=1")
    train(tmp_path / "two", *EXACT, "launch.processes=2", "data.placement=replicate")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_replicated_work_that_differs_is_found(run_dir: Path) -> None:
    done = cordee(
        "train", *SMALL, *EXACT, f"run.dir={run_dir}", "launch.processes=3",
        "data.placement=replicate", "fault.poison=9:1",
    )  # fmt: skip
    assert done.returncode == 1
    assert "islands computed different gradients" in done.stderr
    assert "[1]" in done.stderr
    assert len(rows(run_dir)) == 8


@pytest.mark.parametrize("layout", ["layout.shard=1", "layout.shard=2"])
def test_parameter_limits_hold_for_their_group_alone(layout: str, run_dir: Path) -> None:
    train(
        run_dir, *EXACT, "launch.processes=2", layout, "clip.matrices.value=0.02",
        "clip.embeddings.norm=1.5",
    )  # fmt: skip
    for name, tensor in weights(run_dir).items():
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
    words = (
        *EXACT, f"optim.name={rule}", f"clip.kind={clip}", f"clip.limit={limit}",
        "checkpoint.every=8", "optim.weight_decay=0.01",
    )  # fmt: skip
    train(tmp_path / "clean", *words, "launch.processes=1")
    broken = tmp_path / "broken"
    killed = cordee(
        "train", *SMALL, *words, f"run.dir={broken}", "launch.processes=2",
        "fault.kill=step.agree:19:1", "fault.recover=false",
    )  # fmt: skip
    assert killed.returncode == 1
    train(broken, *words, "launch.processes=3")
    assert digest(broken) == digest(tmp_path / "clean")
    assert any(event["event"] == "resumed" for event in events(broken))
    assert losses(broken)[-1] < losses(broken)[0]


def test_a_run_ends_by_tokens(run_dir: Path) -> None:
    step_tokens = 12 * 2 * 32
    train(run_dir, f"run.tokens={10 * step_tokens - 1}")
    assert len(rows(run_dir)) == 10


def test_a_run_ends_by_minutes_on_all_ranks_alike(run_dir: Path) -> None:
    train(run_dir, "run.minutes=0.05", "launch.processes=2", "optim.schedule=linear")
    told = rows(run_dir)
    assert 3.0 <= float(str(told[-1]["elapsed_s"])) < 6.0
    assert float(str(told[-1]["lr"])) < 0.2 * max(float(str(row["lr"])) for row in told)


def test_a_bigger_step_than_the_data_has_starts_a_new_epoch(run_dir: Path) -> None:
    train(run_dir, "data.tokens=2000", "run.steps=12", "launch.processes=2")
    assert len(rows(run_dir)) == 12
