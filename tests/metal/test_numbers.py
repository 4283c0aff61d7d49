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
from cordee.checkpoint.checkpointer import Checkpointer
from cordee.checkpoint.pieces import Piece
from cordee.cli.main import main
from cordee.config.run import Run
from cordee.data.loader import SampleLoader, describe_samples
from cordee.data.order import SampleOrder
from cordee.errors import ConfigError, CordeeError, DataError, RunError
from cordee.launcher.run_ranks import RankProcess, launch
from cordee.planner.cluster import local_cluster
from cordee.planner.plan import make_plan
from cordee.report.metrics_writer import JsonLinesWriter
from cordee.report.reader import last_step, read_records
from cordee.training.evaluate import evaluate
from cordee.training.run_logger import RunLogger
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts
from cordee.training.weights import open_weights
from tests.conftest import read_rows
from tests.metal import test_user_models as user_models

FEATURES = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
SAMPLES = TensorDataset(FEATURES, FEATURES[:, :4].argmax(1))
OVERRIDES = (
    "run.steps=6", "optim.name=adamw", "optim.lr=0.01", "run.precision=fp32", "batch.microbatch=4",
    "batch.microbatches=4", "launch.threads=1",
)  # fmt: skip


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def cross_entropy_sum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def make_run(folder: Path, *overrides: str) -> Run:
    return cordee.load(None, [*OVERRIDES, f"run.dir={folder}", *overrides]).run


def read_strict_json(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file, as a reader takes them that knows JSON alone."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}")

    for line in path.read_text().splitlines():
        yield json.loads(line, parse_constant=refuse)


# ---- what a caller brings ----

BAD_LOSSES: dict[str, Callable[..., Any]] = {
    "tuple": lambda m, x, y: (cross_entropy_sum(m, x, y), m(x)),
    "float": lambda m, x, y: cross_entropy_sum(m, x, y).item(),
    "of shape [4]": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"),
    "of shape [1]": lambda m, x, y: cross_entropy_sum(m, x, y)[None],
    "NoneType": lambda m, x, y: None,
    "ndarray": lambda m, x, y: cross_entropy_sum(m, x, y).detach().numpy(),
    "without a gradient": lambda m, x, y: cross_entropy_sum(m, x, y).detach(),
    "torch.int64": lambda m, x, y: (m(x).argmax(1) == y).sum(),
    "torch.complex64": lambda m, x, y: cross_entropy_sum(m, x, y).to(torch.complex64),
    "device meta": lambda m, x, y: cross_entropy_sum(m, x, y).to("meta"),
}


@pytest.mark.parametrize("case_name", BAD_LOSSES)
def test_losses_that_are_no_loss(case_name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"(?s)the loss .* no summed loss.*{_escape_pattern(case_name)}"
    ):
        cordee.train(
            make_run(tmp_path / "run"), model=make_model(), loss=BAD_LOSSES[case_name], data=SAMPLES
        )
    assert not (tmp_path / "run" / "run.toml").exists()


def test_model_of_tokens_that_gives_no_loss(tmp_path: Path) -> None:
    class Logits(user_models.ByteModel):
        def forward(self, tokens: Tensor, targets: Tensor) -> Any:
            return super().forward(tokens, targets), None

    overrides = ("data.path=builtin:markov", "data.tokens=9000", "data.sequence=32")
    with pytest.raises(ConfigError, match=r"(?s)the model .* no summed loss.*tuple"):
        cordee.train(make_run(tmp_path / "run", *overrides), model=Logits())


def test_loss_that_goes_wrong_later(tmp_path: Path) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        loss_sum = cross_entropy_sum(model, x, y)
        return (
            loss_sum
            if loss_sum > 4 * 1.2 or not torch.is_grad_enabled()
            else float(loss_sum.detach())
        )

    with pytest.raises(ConfigError, match="no summed loss"):
        overrides = ("run.steps=200", "optim.lr=0.1")
        cordee.train(
            make_run(tmp_path / "run", *overrides), model=make_model(), loss=loss, data=SAMPLES
        )


BAD_PARTS: dict[str, dict[str, Any]] = {
    "model": {"model": nn.Linear},
    "model is not a module": {"model": lambda x: x},
    "loss": {"loss": 3},
    "data": {"data": iter([1, 2])},
    "data is not samples": {"data": 5},
    "data that was brought has no samples": {"data": TensorDataset(FEATURES[:0], FEATURES[:0])},
    "held_out that was brought has no samples": {
        "held_out": TensorDataset(FEATURES[:0], FEATURES[:0])
    },
    "held_out": {"held_out": TensorDataset},
    "held-out": {"loss": None, "data": None, "held_out": SAMPLES},
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_of_another_kind(name: str, tmp_path: Path) -> None:
    user_parts = {"model": make_model(), "loss": cross_entropy_sum, "data": SAMPLES} | BAD_PARTS[
        name
    ]
    with pytest.raises(ConfigError) as error_info:
        cordee.train(make_run(tmp_path / "run"), **user_parts)
    assert name.split()[0] in str(error_info.value)
    assert not (tmp_path / "run").exists()


# ---- samples that draw ----


class NoisyDataset(Dataset[Any]):
    """Samples with noise from each of the generators that augmentation uses."""

    def __len__(self) -> int:
        return len(FEATURES)

    def __getitem__(self, index: int) -> Any:
        scale = random.random() + float(np.random.rand())
        return FEATURES[index] + 0.3 * scale * torch.randn(8), SAMPLES.tensors[1][index]


class StatefulNoise(NoisyDataset):
    """Noise from a generator that goes its own way."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        return FEATURES[index] + float(self.generator.random()), SAMPLES.tensors[1][index]


def test_draws_follow_from_the_microbatch_alone() -> None:
    loader = SampleLoader(NoisyDataset(), SampleOrder(5, len(FEATURES), 4, 4))
    (first_batch, _), (other_batch, _) = loader.microbatch(2, 1), loader.microbatch(2, 2)
    outside_draws = torch.rand(()), random.random(), np.random.rand()
    assert torch.equal(loader.microbatch(2, 1)[0], first_batch) and not torch.equal(
        other_batch, first_batch
    )
    assert not torch.equal(
        SampleLoader(NoisyDataset(), SampleOrder(6, 200, 4, 4)).microbatch(2, 1)[0], first_batch
    )
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    loader.microbatch(0, 0)
    later_draws = torch.rand(()), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    assert later_draws == (torch.rand(()), random.random(), np.random.rand()) != outside_draws


def test_run_on_augmented_samples_goes_on_as_if_nothing_had_stopped_it(tmp_path: Path) -> None:
    user_parts: dict[str, Any] = {
        "loss": cross_entropy_sum,
        "data": NoisyDataset(),
        "held_out": NoisyDataset(),
    }
    clean_folder, resumed_folder = tmp_path / "clean", tmp_path / "cut"
    overrides = ("checkpoint.every=2",)
    clean_result = cordee.train(
        make_run(clean_folder, *overrides), model=make_model(), **user_parts
    ).finished
    with pytest.raises(RuntimeError):
        crash_override = "fault.crash=step.start:5:0"
        cordee.train(
            make_run(resumed_folder, *overrides, crash_override), model=make_model(), **user_parts
        )
    resumed_result = cordee.train(
        make_run(resumed_folder, *overrides), model=make_model(), **user_parts
    ).finished
    assert (
        clean_result
        and resumed_result
        and resumed_result["weights_sha256"] == clean_result["weights_sha256"]
    )
    assert resumed_result["held_out_loss"] == clean_result["held_out_loss"]
    assert [r["loss"] for r in read_rows(resumed_folder)] == [
        r["loss"] for r in read_rows(clean_folder)
    ]


def test_samples_that_are_others_when_read_again(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another one when it is read again"):
        cordee.train(
            make_run(tmp_path / "run"),
            model=make_model(),
            loss=cross_entropy_sum,
            data=StatefulNoise(),
        )


def test_samples_that_carry_gradients() -> None:
    data = TensorDataset(FEATURES.clone().requires_grad_(), SAMPLES.tensors[1])
    assert describe_samples(data, 0).fingerprint == describe_samples(SAMPLES, 0).fingerprint


# ---- numbers that are not finite ----


@pytest.mark.parametrize("bad_value", [math.nan, math.inf, -math.inf])
def test_held_out_samples_that_are_not_finite(
    bad_value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out_inputs, folder = FEATURES[:20].clone(), tmp_path / "run"
    held_out_inputs[3, 2] = bad_value
    run = make_run(folder, "evaluate.every=2")
    data = TensorDataset(held_out_inputs, SAMPLES.tensors[1][:20])
    report = cordee.train(
        run, model=make_model(), loss=cross_entropy_sum, data=SAMPLES, held_out=data
    )
    assert report.exit_code == 0 and "NO FINITE LOSS in 1 of" in capsys.readouterr().err
    evaluations = [
        e
        for e in read_strict_json(folder / "events.jsonl")
        if e["event"] in ("evaluated", "finished")
    ]
    assert len(evaluations) == 3
    for event in evaluations:
        assert event["held_out_loss"] is None and event["held_out_not_finite"] == 1
    assert main(["report", str(folder)]) == 0


def test_infinite_losses_of_both_signs() -> None:
    class Scorer:
        def loss(self, batch: Any) -> Tensor:
            total: Tensor = batch[0].sum()
            return total

        def set_training(self, training: bool) -> None:
            pass

    batches = [(torch.tensor([value]),) for value in (1.0, math.inf, -math.inf, 2.0)]
    evaluation = evaluate(Scorer(), batches, (0, 1), lambda sums: sums[None], None)
    assert math.isnan(evaluation.loss) and evaluation.nonfinite_batches == 2


@pytest.mark.parametrize("saves_every_step", [True, False])
def test_parameters_that_are_not_finite_are_not_saved(
    saves_every_step: bool, tmp_path: Path
) -> None:
    """Spoilt while step 5 goes on, where the guard does not look; the newest checkpoint stays the
    last good one, whether the next save or (none is due) the next loss tells of it."""
    folder = tmp_path / "run"
    calls: list[int] = []

    def loss(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
        loss_sum = cross_entropy_sum(model, x, y)
        if (folder / "metrics.jsonl").exists() and len(read_rows(folder)) == 4:
            calls.append(1)
            if len(calls) == 4:  # the last microbatch: no later loss of this step is of it
                with torch.no_grad():
                    model[2].bias[0] = math.inf
        return loss_sum

    overrides = (f"checkpoint.every={1 if saves_every_step else 4}", "checkpoint.keep=1")
    with pytest.raises(RunError, match="not finite; nothing of them was saved"):
        cordee.train(make_run(folder, *overrides), model=make_model(), loss=loss, data=SAMPLES)
    event_records = list(read_strict_json(folder / "events.jsonl"))
    assert event_records[-1]["event"] == "stopped" and event_records[-1]["in"] == ["2.bias"]
    (newest_folder,) = (folder / "checkpoints").glob("step-*")
    # While one save is in flight no other begins.
    assert newest_folder.name[:13] in (
        [f"step-0000000{n}" for n in (1, 2, 3, 4)] if saves_every_step else ["step-00000004"]
    )
    assert len(read_rows(folder)) in (5, 6)
    assert main(["export", str(folder)]) == 0
    assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())
    list(read_strict_json(folder / "metrics.jsonl"))


def corrupt_and_check(process: RankProcess, folder: str, layout: str) -> list[str]:
    """What each rank says when one rank's part of a parameter is not finite."""
    user_parts = Parts(model=make_model(), loss=cross_entropy_sum, data=SAMPLES)
    run = cordee.load(None, [*OVERRIDES, f"run.dir={folder}/{process.rank}", *layout.split()]).run
    plan = make_plan(run, local_cluster(), 2, process.size)
    trainer = Trainer(run, plan, process, describe_samples(SAMPLES, 0), user_parts)
    trainer.logger = RunLogger(run, process)
    trainer.check_finite()  # says nothing: all is well
    messages = []
    for tensors in (trainer.parameters, trainer.optimizer.state_tensors()):
        name, tensor = next((n, t) for n, t in tensors.items() if t.ndim)
        tensor_copy = tensor.detach().clone()
        if process.rank == process.size - 1:
            with torch.no_grad():
                tensor.view(-1)[0] = math.nan
        try:
            trainer.check_finite()
        except RunError as error:
            messages.append(str(error) if name in str(error) else "another name")
        with torch.no_grad():
            tensor.copy_(tensor_copy)
    return messages


@pytest.mark.parametrize("layout", ["layout.islands=2", "layout.shard=2"])
def test_every_rank_says_what_is_not_finite_on_one(layout: str, tmp_path: Path) -> None:
    for messages in launch(corrupt_and_check, str(tmp_path), layout, ranks=2):
        assert len(messages) == 2 and all("not finite" in message for message in messages), messages


@pytest.mark.parametrize("verb", ["export", "sample"])
def test_checkpoint_that_is_not_finite_is_not_handed_on(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that an earlier version saved."""
    folder = tmp_path / "run"
    (tmp_path / "a.txt").write_text("what a line of text this is\n" * 300)
    overrides = (
        "model.layers=1",
        "model.width=32",
        "model.heads=2",
        "data.sequence=16",
        "run.steps=1",
        "evaluate.sample=0",
        "evaluate.tokens=64",
        "run.precision=fp32",
        "launch.processes=1",
        f"data.path={tmp_path / 'a.txt'}",
    )
    assert main(["train", *overrides, f"run.dir={folder}"]) == 0
    checkpoint = open_weights(verb, str(folder))
    saver = Checkpointer(folder / "checkpoints", 0, 1, 1, lambda point, step: None)
    pieces = []
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        if name == "model/embed.weight":
            tensor[0, 0] = math.nan
        pieces.append(Piece(name, tensor, tuple(tensor.shape), (0,) * tensor.ndim))
    meta = {**checkpoint.meta, "progress": {**checkpoint.meta["progress"], "step": 2}}
    saver.begin(2, checkpoint.generation + 1, pieces, meta)
    saver.join()
    assert saver.commit() is not None
    assert main([verb, str(folder)]) == 1
    assert "embed.weight" in capsys.readouterr().err
    assert not list(folder.glob("*.safetensors*"))


def test_records_are_json_whatever_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write({"step": 1, "loss": math.nan, "inner": [math.inf, {"a": np.float64("-inf")}]})
    assert list(read_strict_json(path)) == [{"step": 1, "loss": None, "inner": [None, {"a": None}]}]
    junk_lines = (
        "[" * 100_000,
        "1" * 6000,
        '{"step": NaN}',
        '{"step": 1e400}',
        "\udcff",
        "null",
        "[]",
    )
    with open(path, "a", errors="surrogateescape") as stream:
        stream.writelines(f"{line}\n" for line in junk_lines)
    assert read_records(path)[0]["step"] == 1
    assert last_step(path) == 1
    writer.write({"step": 2})
    writer.truncate_after(1)
    assert last_step(path) == 1


def _escape_pattern(text: str) -> str:
    return text.replace("[", r"\[").replace("]", r"\]").replace(".", r"\.")


def test_errors_have_no_traceback_where_the_first_loss_is_not_finite(tmp_path: Path) -> None:
    bad_samples = TensorDataset(FEATURES * math.nan, SAMPLES.tensors[1])
    with pytest.raises(CordeeError, match="first microbatch is not finite"):
        cordee.train(
            make_run(tmp_path / "run"), model=make_model(), loss=cross_entropy_sum, data=bad_samples
        )
