"""Numbers that are not finite, and losses and samples of a caller that cannot work."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import cordee
from cordee.build import build
from cordee.checkpoint.format import Piece
from cordee.checkpoint.save import Saver
from cordee.cli.main import main
from cordee.cli.weights import open_weights
from cordee.config.run import Run
from cordee.data.order import Order
from cordee.data.samples import SampleLoader, describe_samples
from cordee.desk import Desk
from cordee.errors import ConfigError, CordeeError, DataError, RunError
from cordee.evaluate import evaluate
from cordee.fault.leave import Asked
from cordee.metrics.sinks import JsonLines, last_step, read_lines
from cordee.parts import Parts
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan
from cordee.testing import World, launch
from cordee.train import check_finite
from tests.conftest import rows
from tests.metal import test_brought as brought

X = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X[:, :4].argmax(1))
WORDS = (
    "run.steps=6", "optim.name=adamw", "optim.lr=0.01", "run.precision=fp32", "batch.microbatch=4",
    "batch.microbatches=4", "launch.threads=1",
)  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def summed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def run_of(folder: Path, *words: str) -> Run:
    return cordee.load(None, [*WORDS, f"run.dir={folder}", *words]).run


def strict(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file, as a reader takes them that knows JSON alone."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}")

    for line in path.read_text().splitlines():
        yield json.loads(line, parse_constant=refuse)


# ---- what a caller brings ----

LOSSES: dict[str, Callable[..., Any]] = {
    "tuple": lambda m, x, y: (summed(m, x, y), m(x)),
    "float": lambda m, x, y: summed(m, x, y).item(),
    "of shape [4]": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"),
    "of shape [1]": lambda m, x, y: summed(m, x, y)[None],
    "NoneType": lambda m, x, y: None,
    "ndarray": lambda m, x, y: summed(m, x, y).detach().numpy(),
    "without a gradient": lambda m, x, y: summed(m, x, y).detach(),
    "torch.int64": lambda m, x, y: (m(x).argmax(1) == y).sum(),
    "torch.complex64": lambda m, x, y: summed(m, x, y).to(torch.complex64),
    "device meta": lambda m, x, y: summed(m, x, y).to("meta"),
}


@pytest.mark.parametrize("says", LOSSES)
def test_losses_that_are_no_loss(says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"(?s)the loss .* no summed loss.*{_plain(says)}"):
        cordee.train(run_of(tmp_path / "run"), model=net(), loss=LOSSES[says], data=DATA)
    assert not (tmp_path / "run" / "run.toml").exists()


def test_model_of_tokens_that_gives_no_loss(tmp_path: Path) -> None:
    class Logits(brought.Bytes):
        def forward(self, tokens: Tensor, targets: Tensor) -> Any:
            return super().forward(tokens, targets), None

    words = ("data.path=builtin:markov", "data.tokens=9000", "data.sequence=32")
    with pytest.raises(ConfigError, match=r"(?s)the model .* no summed loss.*tuple"):
        cordee.train(run_of(tmp_path / "run", *words), model=Logits())


def test_loss_that_goes_wrong_later(tmp_path: Path) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        found = summed(model, x, y)
        return found if found > 4 * 1.2 or not torch.is_grad_enabled() else float(found.detach())

    with pytest.raises(ConfigError, match="no summed loss"):
        words = ("run.steps=200", "optim.lr=0.1")
        cordee.train(run_of(tmp_path / "run", *words), model=net(), loss=loss, data=DATA)


BROUGHT: dict[str, dict[str, Any]] = {
    "model": {"model": nn.Linear}, "model is not a module": {"model": lambda x: x},
    "loss": {"loss": 3}, "data": {"data": iter([1, 2])}, "data is not samples": {"data": 5},
    "data that was brought has no samples": {"data": TensorDataset(X[:0], X[:0])},
    "held_out that was brought has no samples": {"held_out": TensorDataset(X[:0], X[:0])},
    "held_out": {"held_out": TensorDataset}, "held-out": {"loss": None, "data": None,
                                                          "held_out": DATA},
}  # fmt: skip


@pytest.mark.parametrize("name", BROUGHT)
def test_parts_of_another_kind(name: str, tmp_path: Path) -> None:
    given = {"model": net(), "loss": summed, "data": DATA} | BROUGHT[name]
    with pytest.raises(ConfigError) as caught:
        cordee.train(run_of(tmp_path / "run"), **given)
    assert name.split()[0] in str(caught.value)
    assert not (tmp_path / "run").exists()


# ---- samples that draw ----


class Noisy(Dataset[Any]):
    """Samples with noise from each of the generators that augmentation uses."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        scale = random.random() + float(np.random.rand())
        return X[index] + 0.3 * scale * torch.randn(8), DATA.tensors[1][index]


class Own(Noisy):
    """Noise from a generator that goes its own way."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        return X[index] + float(self.generator.random()), DATA.tensors[1][index]


def test_draws_follow_from_the_microbatch_alone() -> None:
    loader = SampleLoader(Noisy(), Order(5, len(X), 4, 4))
    (first, _), (other, _) = loader.microbatch(2, 1), loader.microbatch(2, 2)
    outside = torch.rand(()), random.random(), np.random.rand()
    assert torch.equal(loader.microbatch(2, 1)[0], first) and not torch.equal(other, first)
    assert not torch.equal(SampleLoader(Noisy(), Order(6, 200, 4, 4)).microbatch(2, 1)[0], first)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    loader.microbatch(0, 0)
    after = torch.rand(()), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    assert after == (torch.rand(()), random.random(), np.random.rand()) != outside


def test_run_on_augmented_samples_goes_on_as_if_nothing_had_stopped_it(tmp_path: Path) -> None:
    given: dict[str, Any] = {"loss": summed, "data": Noisy(), "held_out": Noisy()}
    clean, cut = tmp_path / "clean", tmp_path / "cut"
    words = ("checkpoint.every=2",)
    one = cordee.train(run_of(clean, *words), model=net(), **given).finished
    with pytest.raises(RuntimeError):
        crash = "fault.crash=step.start:5:0"
        cordee.train(run_of(cut, *words, crash), model=net(), **given)
    two = cordee.train(run_of(cut, *words), model=net(), **given).finished
    assert one and two and two["weights_sha256"] == one["weights_sha256"]
    assert two["held_out_loss"] == one["held_out_loss"]
    assert [r["loss"] for r in rows(cut)] == [r["loss"] for r in rows(clean)]


def test_samples_that_are_others_when_read_again(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another one when it is read again"):
        cordee.train(run_of(tmp_path / "run"), model=net(), loss=summed, data=Own())


def test_samples_that_carry_gradients() -> None:
    data = TensorDataset(X.clone().requires_grad_(), DATA.tensors[1])
    assert describe_samples(data, 0).fingerprint == describe_samples(DATA, 0).fingerprint


# ---- numbers that are not finite ----


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_held_out_samples_that_are_not_finite(
    odd: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held, folder = X[:20].clone(), tmp_path / "run"
    held[3, 2] = odd
    run = run_of(folder, "evaluate.every=2")
    data = TensorDataset(held, DATA.tensors[1][:20])
    report = cordee.train(run, model=net(), loss=summed, data=DATA, held_out=data)
    assert report.exit_code == 0 and "NO FINITE LOSS in 1 of" in capsys.readouterr().err
    told = [e for e in strict(folder / "events.jsonl") if e["event"] in ("evaluated", "finished")]
    assert len(told) == 3
    for event in told:
        assert event["held_out_loss"] is None and event["held_out_not_finite"] == 1
    assert main(["report", str(folder)]) == 0


def test_infinite_losses_of_both_signs() -> None:
    class Scorer:
        device = torch.device("cpu")

        def loss(self, given: Any) -> Tensor:
            found: Tensor = given[0].sum()
            return found

        def infer(self, inputs: Tensor, targets: Tensor | None) -> Tensor:
            return inputs

        def modes(self, training: bool) -> None:
            pass

    given = [(torch.tensor([value]),) for value in (1.0, math.inf, -math.inf, 2.0)]
    found = evaluate(Scorer(), given, (0, 1), lambda sums: sums[None], None)
    assert math.isnan(found.loss) and found.not_finite == 2


@pytest.mark.parametrize("saves", [True, False])
def test_parameters_that_are_not_finite_are_not_saved(saves: bool, tmp_path: Path) -> None:
    """Spoilt while step 5 goes on, where the guard does not look; the newest checkpoint stays the
    last good one, whether the next save or (none is due) the next loss tells of it."""
    folder = tmp_path / "run"
    calls: list[int] = []

    def loss(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
        found = summed(model, x, y)
        if (folder / "metrics.jsonl").exists() and len(rows(folder)) == 4:
            calls.append(1)
            if len(calls) == 4:  # the last microbatch: no later loss of this step is of it
                with torch.no_grad():
                    model[2].bias[0] = math.inf
        return found

    words = (f"checkpoint.every={1 if saves else 4}", "checkpoint.keep=1")
    with pytest.raises(RunError, match="not finite; nothing of them was saved"):
        cordee.train(run_of(folder, *words), model=net(), loss=loss, data=DATA)
    told = list(strict(folder / "events.jsonl"))
    assert told[-1]["event"] == "stopped" and told[-1]["in"] == ["2.bias"]
    (newest,) = (folder / "checkpoints").glob("step-*")
    # While one save is in flight no other begins.
    assert newest.name[:13] in (
        [f"step-0000000{n}" for n in (1, 2, 3, 4)] if saves else ["step-00000004"]
    )
    assert len(rows(folder)) in (5, 6)
    assert main(["export", str(folder)]) == 0
    assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())
    list(strict(folder / "metrics.jsonl"))


def spoil(world: World, folder: str, layout: str) -> list[str]:
    """What each rank says when one rank's part of a parameter is not finite."""
    given = Parts(model=net(), loss=summed, data=DATA)
    run = cordee.load(None, [*WORDS, f"run.dir={folder}/{world.rank}", *layout.split()]).run
    plan = make_plan(run, local_cluster(), 2, world.size)
    state = build(run, plan, world, describe_samples(DATA, 0), given)
    desk = Desk(state, Asked())
    check_finite(state, desk)  # says nothing: all is well
    said = []
    for tensors in (state.parameters, state.optimizer.tensors()):
        name, tensor = next((n, t) for n, t in tensors.items() if t.ndim)
        held = tensor.detach().clone()
        if world.rank == world.size - 1:
            with torch.no_grad():
                tensor.view(-1)[0] = math.nan
        try:
            check_finite(state, desk)
        except RunError as error:
            said.append(str(error) if name in str(error) else "another name")
        with torch.no_grad():
            tensor.copy_(held)
    return said


@pytest.mark.parametrize("layout", ["layout.islands=2", "layout.shard=2"])
def test_every_rank_says_what_is_not_finite_on_one(layout: str, tmp_path: Path) -> None:
    for said in launch(spoil, str(tmp_path), layout, ranks=2):
        assert len(said) == 2 and all("not finite" in sentence for sentence in said), said


@pytest.mark.parametrize("verb", ["export", "sample"])
def test_checkpoint_that_is_not_finite_is_not_handed_on(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that an earlier version saved."""
    folder = tmp_path / "run"
    (tmp_path / "a.txt").write_text("what a line of text this is\n" * 300)
    words = ("model.layers=1", "model.width=32", "model.heads=2", "data.sequence=16", "run.steps=1",
             "evaluate.sample=0", "evaluate.tokens=64", "run.precision=fp32", "launch.processes=1",
             f"data.path={tmp_path / 'a.txt'}")  # fmt: skip
    assert main(["train", *words, f"run.dir={folder}"]) == 0
    good = open_weights(verb, str(folder))
    saver = Saver(folder / "checkpoints", 0, 1, 1, lambda point, step: None)
    pieces = []
    for name in good.names():
        tensor = good.read(name)
        if name == "model/embed.weight":
            tensor[0, 0] = math.nan
        pieces.append(Piece(name, tensor, tuple(tensor.shape), (0,) * tensor.ndim))
    meta = {**good.meta, "progress": {**good.meta["progress"], "step": 2}}
    saver.begin(2, good.generation + 1, pieces, meta)
    saver.join()
    assert saver.commit() is not None
    assert main([verb, str(folder)]) == 1
    assert "embed.weight" in capsys.readouterr().err
    assert not list(folder.glob("*.safetensors*"))


def test_records_are_json_whatever_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write({"step": 1, "loss": math.nan, "inner": [math.inf, {"a": np.float64("-inf")}]})
    assert list(strict(path)) == [{"step": 1, "loss": None, "inner": [None, {"a": None}]}]
    junk = ("[" * 100_000, "1" * 6000, '{"step": NaN}', '{"step": 1e400}', "\udcff", "null", "[]")
    with open(path, "a", errors="surrogateescape") as stream:
        stream.writelines(f"{line}\n" for line in junk)
    assert read_lines(path)[0]["step"] == 1
    assert last_step(path) == 1
    sink.write({"step": 2})
    sink.cut(1)
    assert last_step(path) == 1


def _plain(text: str) -> str:
    return text.replace("[", r"\[").replace("]", r"\]").replace(".", r"\.")


def test_errors_have_no_traceback_where_the_first_loss_is_not_finite(tmp_path: Path) -> None:
    bad = TensorDataset(X * math.nan, DATA.tensors[1])
    with pytest.raises(CordeeError, match="first microbatch is not finite"):
        cordee.train(run_of(tmp_path / "run"), model=net(), loss=summed, data=bad)
