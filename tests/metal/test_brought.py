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
from cordee.begin import settle
from cordee.build import build
from cordee.cli.main import main
from cordee.config.run import Run
from cordee.data.samples import describe_samples
from cordee.errors import ConfigError, CordeeError
from cordee.parts import Parts
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan
from cordee.testing import World, launch
from cordee.train import whole
from cordee.trial import step
from tests.conftest import clean_environment, digest, events, rows

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "any_module.py"
KERAS = importlib.util.find_spec("keras") is not None
WORDS = (
    "run.steps=12", "optim.name=adamw", "optim.lr=0.01", "run.precision=fp32",
    "batch.microbatch=4", "batch.microbatches=4", "launch.threads=1", "checkpoint.every=5",
    "evaluate.tokens=100", "evaluate.every=6",
)  # fmt: skip


class Net(nn.Module):
    """A residual net of `blocks` with a dropout or a norm of any kind."""

    def __init__(self, extra: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 16)
        # No bias: before a BatchNorm its gradient is zero but for rounding, which adamw magnifies.
        blocks = (nn.Sequential(nn.Linear(16, 16, bias=False), extra()) for _ in range(2))
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


class Captured(nn.Module):
    """Reads the parameter that it was made with, whatever becomes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
        weight = self.weight
        self.made = lambda x: x @ weight.T

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.made(x)
        return logits


class Bytes(nn.Module):
    """A model of tokens that gives its own loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed loss."""
        logits = self.head(self.embed(tokens)).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")


def keras_model() -> Any:
    """A built Keras model; the same numbers each time."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((8,)), dense(16, activation="relu"), dense(4)])


def make(kind: str) -> nn.Module:
    """A fresh model."""
    if kind == "keras":
        from cordee.model.keras import KerasModel

        return KerasModel(keras_model())
    makers: dict[str, Callable[[], Any]] = {
        "net": lambda: Net(lambda: nn.LayerNorm(16)),
        "drops": lambda: Net(lambda: nn.Dropout(0.3)),
        "batch": lambda: Net(lambda: nn.BatchNorm1d(16)),
        "captured": Captured,
        "branches": Branches,
        "raw keras": keras_model,
    }
    made: nn.Module = makers[kind]()
    return made


def samples(count: int, seed: int) -> TensorDataset:
    """Eight features; the label is the largest of the first four."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :4].argmax(1))


def summed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss that is brought."""
    return F.cross_entropy(model(x), y, reduction="sum")


def run_of(folder: Path, *words: str) -> Run:
    return cordee.load(None, [*WORDS, f"run.dir={folder}", *words]).run


def parts(kind: str = "net") -> dict[str, Any]:
    return {"model": make(kind), "loss": summed, "data": samples(400, 1),
            "held_out": samples(90, 2)}  # fmt: skip


Job = tuple[str, str]
"""A kind of model, and words."""


def curves(world: World, folder: str, jobs: list[Job], steps: int) -> list[Any]:
    """Losses and whole parameters of each job, or what was refused."""
    torch.set_num_threads(1)
    found: list[Any] = []
    for kind, words in jobs:
        run = settle(run_of(Path(folder), *words.split()))
        given = Parts(**parts(kind))
        plan = make_plan(run, local_cluster(), 2, world.size)
        assert given.data is not None
        try:
            state = build(run, plan, world, describe_samples(given.data, 0), given)
            losses = [step(state, number)[0] for number in range(steps)]
        except CordeeError as error:
            found.append(error.what)
            continue
        with torch.no_grad():
            found.append((losses, {n: whole(state, n).clone() for n in state.live.every}))
    return found


JOBS = [
    ("net", "layout.islands=2"), ("net", "layout.shard=2"), ("net", "layout.shard=2 layout.zero=3"),
    ("net", "layout.shard=2 run.exact=true"), ("drops", "layout.islands=2"),
    ("drops", "layout.shard=2"), ("batch", "layout.shard=2"),
    ("net", "layout.shard=2 layout.zero=2"), ("branches", "layout.shard=2"),
    ("branches", "layout.shard=2 layout.zero=2"),
    ("branches", "layout.shard=2 run.exact=true"), ("branches", "layout.islands=2"),
    *([("keras", "layout.islands=2"), ("keras", "layout.shard=2")] if KERAS else []),
]  # fmt: skip
REFUSED = [
    ("captured", "layout.shard=2", "changes no parameter"),
    ("batch", "layout.islands=2 run.exact=true", "that a forward moves"),
    ("branches", "layout.shard=2 layout.zero=3", "use different parts of the model"),
    *([("raw keras", "layout.shard=2", "does not move the cut model")] if KERAS else []),
]


def test_two_ranks_descend_as_one(tmp_path: Path) -> None:
    """Modules with blocks of their own, dropout, BatchNorm, and Keras'; and what the guard says of
    modules that read stale tensors."""
    steps = 8
    kinds = sorted({kind for kind, _ in JOBS})
    alone = launch(curves, str(tmp_path), [(k, "") for k in kinds], steps, ranks=1)[0]
    oracle = dict(zip(kinds, alone, strict=True))
    both = [*JOBS, *((kind, words) for kind, words, _ in REFUSED)]
    found = launch(curves, str(tmp_path), both, steps, ranks=2)[0]
    for (kind, words), made in zip(JOBS, found, strict=False):
        assert not isinstance(made, str), (kind, words, made)
        losses, parameters = oracle[kind]
        assert losses[-1] < losses[0]
        assert made[0] == pytest.approx(losses, rel=1e-5), (kind, words)
        for name, tensor in parameters.items():
            off = (made[1][name] - tensor).abs().max()
            assert off <= 1e-4 * tensor.abs().max(), (kind, words, name)
    for (kind, words, why), said in zip(REFUSED, found[len(JOBS) :], strict=True):
        assert isinstance(said, str) and why in said, (kind, words, said)


def test_a_run_has_records_and_goes_on(tmp_path: Path) -> None:
    """Rows, held-out losses, buffers; killed and gone on with; finished; not by another model."""
    clean, cut = tmp_path / "clean", tmp_path / "cut"
    report = cordee.train(run_of(clean), **parts("batch"))
    assert report.exit_code == 0 and report.finished is not None
    assert len(rows(clean)) == 12 and all(r["bits_per_byte"] is None for r in rows(clean))
    told = [e for e in events(clean) if e["event"] == "evaluated"]
    assert told[0]["held_out_loss"] > report.finished["held_out_loss"] > 0
    assert told[0]["tokens"] == 90 and report.finished["held_out_accuracy"] is None
    assert report.finished["steps"] == 12 and report.finished["tokens"] == 12 * 16

    class Leaves(TensorDataset):
        """Asks the run to leave while it reads its thirtieth microbatch."""

        reads = 0

        def __getitem__(self, index: Any) -> Any:
            type(self).reads += 1
            if type(self).reads == 120:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    brought = parts("batch")
    brought["data"] = Leaves(*brought["data"].tensors)
    assert cordee.train(run_of(cut), **brought).exit_code == 128 + signal.SIGTERM
    with pytest.raises(ConfigError, match="another model"):
        cordee.train(run_of(cut))
    assert cordee.train(run_of(cut), **parts("batch")).exit_code == 0
    assert digest(cut) == digest(clean)
    assert [r["loss"] for r in rows(cut)] == [r["loss"] for r in rows(clean)]
    again = cordee.train(run_of(cut), **parts("batch"))
    assert again.finished == report.finished or again.finished == events(cut)[-1]


def test_verbs_on_such_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    cordee.train(run_of(folder, "data.path=builtin:markov", "data.tokens=9000"), model=Bytes())
    assert events(folder)[-1]["held_out_bits_per_byte"] > 0
    assert events(folder)[-1]["sample"] is None
    for verb in (["report"], ["fingerprint"], ["export"]):
        assert main([*verb, str(folder)]) == 0
    assert digest(folder) in capsys.readouterr().out
    for words in (["sample", str(folder)], ["export", str(folder), "--to", "hf"]):
        assert main(words) == 2
        assert "cannot build a model that a program brought" in capsys.readouterr().err


def example(folder: Path, ranks: int, *words: str) -> int:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(start if ranks > 1 else []), str(EXAMPLE), f"run.dir={folder}"]
    given = ["run.steps=20", "run.exact=true", "checkpoint.every=1", "run.precision=fp32"]
    done = subprocess.run(
        [*command, *given, *words], env=clean_environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    print(done.stderr[-2000:])
    return done.returncode


def test_exact_digest_under_a_launcher_and_after_a_kill(tmp_path: Path) -> None:
    """Two islands are killed; one process goes on: the bits of one undisturbed process."""
    assert example(tmp_path / "one", 1) == 0
    assert example(tmp_path / "cut", 2, "fault.kill=step.agree:19:1") != 0
    assert example(tmp_path / "cut", 1) == 0
    names = [json.dumps(e["event"]) for e in events(tmp_path / "cut")]
    assert '"resumed"' in names
    assert digest(tmp_path / "cut") == digest(tmp_path / "one")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    given = parts()
    for words, missing in (
        (("layout.tensor=2",), ()), (("memory.recompute=full",), ()), (("run.compile=blocks",), ()),
        ((), ("data",)), ((), ("loss",)),
    ):  # fmt: skip
        brought = {n: part for n, part in given.items() if n not in missing}
        with pytest.raises(ConfigError):
            cordee.train(run_of(tmp_path / "no", *words), **brought)
    assert not (tmp_path / "no").exists()
