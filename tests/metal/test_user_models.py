"""Models, losses and samples that a caller brings: any layout against one process, and refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cordee
from cordee.cli.main import main
from cordee.config.run import Run
from cordee.data.loader import describe_samples
from cordee.errors import ConfigError, CordeeError
from cordee.launcher.prepare import resolve_config
from cordee.launcher.run_ranks import RankProcess, launch
from cordee.planner.cluster import local_cluster
from cordee.planner.plan import make_plan
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts
from tests.conftest import clean_environment, read_events, read_rows, weights_digest
from tests.metal.layouts import with_constant_lr

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "any_module.py"
HAS_KERAS = importlib.util.find_spec("keras") is not None
OVERRIDES = (
    "run.steps=12", "optim.name=adamw", "optim.lr=0.01", "run.precision=fp32",
    "batch.microbatch=4", "batch.microbatches=4", "launch.threads=1", "checkpoint.every=5",
    "evaluate.tokens=100", "evaluate.every=6",
)  # fmt: skip


class Net(nn.Module):
    """A residual net of `blocks` with a dropout or a norm of any kind."""

    def __init__(self, make_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 16)
        # No bias: before a BatchNorm its gradient is zero but for rounding, which adamw magnifies.
        blocks = (nn.Sequential(nn.Linear(16, 16, bias=False), make_layer()) for _ in range(2))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + block(x).relu()
        logits: Tensor = self.head(x)
        return logits


class Branches(nn.Module):
    """Each microbatch goes through one of two blocks alike, as its first sample says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.blocks[int(x[0, 0] > 0)](x).relu())
        return logits


class CapturedWeightModel(nn.Module):
    """Reads the parameter that it was made with, whatever becomes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
        weight = self.weight
        self.compute_logits = lambda x: x @ weight.T

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.compute_logits(x)
        return logits


class ByteModel(nn.Module):
    """A model of tokens that gives its own loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed loss."""
        logits = self.head(self.embed(tokens)).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")


def build_keras_model() -> Any:
    """A built Keras model; the same numbers each time."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((8,)), dense(16, activation="relu"), dense(4)])


def make_model(kind: str) -> nn.Module:
    """A fresh model."""
    if kind == "keras":
        from cordee.hf.keras import KerasModel

        return KerasModel(build_keras_model())
    makers: dict[str, Callable[[], Any]] = {
        "net": lambda: Net(lambda: nn.LayerNorm(16)),
        "drops": lambda: Net(lambda: nn.Dropout(0.3)),
        "batch": lambda: Net(lambda: nn.BatchNorm1d(16)),
        "captured": CapturedWeightModel,
        "branches": Branches,
        "raw keras": build_keras_model,
    }
    model: nn.Module = makers[kind]()
    return model


def make_samples(count: int, seed: int) -> TensorDataset:
    """Eight features; the label is the largest of the first four."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :4].argmax(1))


def cross_entropy_sum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss that is brought."""
    return F.cross_entropy(model(x), y, reduction="sum")


def make_run(folder: Path, *overrides: str) -> Run:
    return cordee.load(None, [*OVERRIDES, f"run.dir={folder}", *overrides]).run


def make_parts(kind: str = "net") -> dict[str, Any]:
    return {"model": make_model(kind), "loss": cross_entropy_sum, "data": make_samples(400, 1),
            "held_out": make_samples(90, 2)}  # fmt: skip


Job = tuple[str, str]
"""A kind of model, and words."""


def train_jobs(process: RankProcess, folder: str, jobs: list[Job], steps: int) -> list[Any]:
    """Losses and whole parameters of each job, or what was refused."""
    torch.set_num_threads(1)
    results: list[Any] = []
    for kind, overrides in jobs:
        run = resolve_config(make_run(Path(folder), *overrides.split()))
        user_parts = Parts(**make_parts(kind))
        plan = make_plan(run, local_cluster(), 2, process.size)
        assert user_parts.data is not None
        try:
            data = describe_samples(user_parts.data, 0)
            trainer = with_constant_lr(Trainer(run, plan, process, data, user_parts))
            losses = [trainer.train_step().loss for _ in range(steps)]
        except CordeeError as error:
            results.append(error.message)
            continue
        with torch.no_grad():
            names = trainer.model.all_specs
            results.append((losses, {n: trainer.state.full_tensor(n).clone() for n in names}))
    return results


JOBS = [
    ("net", "layout.islands=2"), ("net", "layout.shard=2"), ("net", "layout.shard=2 layout.zero=3"),
    ("net", "layout.shard=2 run.exact=true"), ("drops", "layout.islands=2"),
    ("drops", "layout.shard=2"), ("batch", "layout.shard=2"),
    ("net", "layout.shard=2 layout.zero=2"), ("branches", "layout.shard=2"),
    ("branches", "layout.shard=2 layout.zero=2"),
    ("branches", "layout.shard=2 run.exact=true"), ("branches", "layout.islands=2"),
    *([("keras", "layout.islands=2"), ("keras", "layout.shard=2")] if HAS_KERAS else []),
]  # fmt: skip
REFUSED_JOBS = [
    ("captured", "layout.shard=2", "changes no parameter"),
    ("batch", "layout.islands=2 run.exact=true", "that a forward moves"),
    ("branches", "layout.shard=2 layout.zero=3", "use different parts of the model"),
    *([("raw keras", "layout.shard=2", "does not move the cut model")] if HAS_KERAS else []),
]


def test_two_ranks_descend_as_one(tmp_path: Path) -> None:
    """Modules with blocks of their own, dropout, BatchNorm, and Keras'; and what the guard says of
    modules that read stale tensors."""
    steps = 8
    kinds = sorted({kind for kind, _ in JOBS})
    reference_results = launch(train_jobs, str(tmp_path), [(k, "") for k in kinds], steps, ranks=1)[
        0
    ]
    oracle = dict(zip(kinds, reference_results, strict=True))
    all_jobs = [*JOBS, *((kind, overrides) for kind, overrides, _ in REFUSED_JOBS)]
    results = launch(train_jobs, str(tmp_path), all_jobs, steps, ranks=2)[0]
    for (kind, overrides), result in zip(JOBS, results, strict=False):
        assert not isinstance(result, str), (kind, overrides, result)
        losses, parameters = oracle[kind]
        assert losses[-1] < losses[0]
        assert result[0] == pytest.approx(losses, rel=1e-5), (kind, overrides)
        for name, tensor in parameters.items():
            max_error = (result[1][name] - tensor).abs().max()
            assert max_error <= 1e-4 * tensor.abs().max(), (kind, overrides, name)
    for (kind, overrides, reason), message in zip(REFUSED_JOBS, results[len(JOBS) :], strict=True):
        assert isinstance(message, str) and reason in message, (kind, overrides, message)


def test_a_run_has_records_and_goes_on(tmp_path: Path) -> None:
    """Rows, held-out losses, buffers; killed and gone on with; finished; not by another model."""
    clean_folder, resumed_folder = tmp_path / "clean", tmp_path / "cut"
    report = cordee.train(make_run(clean_folder), **make_parts("batch"))
    assert report.exit_code == 0 and report.finished is not None
    assert len(read_rows(clean_folder)) == 12 and all(
        r["bits_per_byte"] is None for r in read_rows(clean_folder)
    )
    evaluations = [e for e in read_events(clean_folder) if e["event"] == "evaluated"]
    assert evaluations[0]["held_out_loss"] > report.finished["held_out_loss"] > 0
    assert evaluations[0]["tokens"] == 90
    assert report.finished["steps"] == 12 and report.finished["tokens"] == 12 * 16

    class StoppingDataset(TensorDataset):
        """Asks the run to leave while it reads its thirtieth microbatch."""

        read_count = 0

        def __getitem__(self, index: Any) -> Any:
            type(self).read_count += 1
            if type(self).read_count == 120:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    user_parts = make_parts("batch")
    user_parts["data"] = StoppingDataset(*user_parts["data"].tensors)
    assert cordee.train(make_run(resumed_folder), **user_parts).exit_code == 128 + signal.SIGTERM
    with pytest.raises(ConfigError, match="another model"):
        cordee.train(make_run(resumed_folder))
    assert cordee.train(make_run(resumed_folder), **make_parts("batch")).exit_code == 0
    assert weights_digest(resumed_folder) == weights_digest(clean_folder)
    assert [r["loss"] for r in read_rows(resumed_folder)] == [
        r["loss"] for r in read_rows(clean_folder)
    ]
    second_report = cordee.train(make_run(resumed_folder), **make_parts("batch"))
    assert (
        second_report.finished == report.finished
        or second_report.finished == read_events(resumed_folder)[-1]
    )


def test_verbs_on_such_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    cordee.train(
        make_run(folder, "data.path=builtin:markov", "data.tokens=9000"), model=ByteModel()
    )
    assert read_events(folder)[-1]["held_out_bits_per_byte"] > 0
    assert read_events(folder)[-1]["sample"] is None
    for verb in (["report"], ["fingerprint"], ["export"]):
        assert main([*verb, str(folder)]) == 0
    assert weights_digest(folder) in capsys.readouterr().out
    for arguments in (["sample", str(folder)], ["export", str(folder), "--to", "hf"]):
        assert main(arguments) == 2
        assert "cannot build a model that a program brought" in capsys.readouterr().err


def run_example(folder: Path, ranks: int, *overrides: str) -> int:
    launcher_args = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        sys.executable,
        *(launcher_args if ranks > 1 else []),
        str(EXAMPLE),
        f"run.dir={folder}",
    ]
    base_overrides = ["run.steps=20", "run.exact=true", "checkpoint.every=1", "run.precision=fp32"]
    result = subprocess.run(
        [*command, *base_overrides, *overrides],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(result.stderr[-2000:])
    return result.returncode


def test_exact_digest_under_a_launcher_and_after_a_kill(tmp_path: Path) -> None:
    """Two islands are killed; one process goes on: the bits of one undisturbed process."""
    assert run_example(tmp_path / "one", 1) == 0
    assert run_example(tmp_path / "cut", 2, "fault.kill=step.agree:19:1") != 0
    assert run_example(tmp_path / "cut", 1) == 0
    names = [json.dumps(e["event"]) for e in read_events(tmp_path / "cut")]
    assert '"resumed"' in names
    assert weights_digest(tmp_path / "cut") == weights_digest(tmp_path / "one")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    all_parts = make_parts()
    for overrides, missing_names in (
        (("layout.tensor=2",), ()), (("memory.recompute=full",), ()), (("run.compile=blocks",), ()),
        ((), ("data",)), ((), ("loss",)),
    ):  # fmt: skip
        user_parts = {n: part for n, part in all_parts.items() if n not in missing_names}
        with pytest.raises(ConfigError):
            cordee.train(make_run(tmp_path / "no", *overrides), **user_parts)
    assert not (tmp_path / "no").exists()
