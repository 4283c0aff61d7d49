"""The library: configurations, a Trainer in one process, plans and trained models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cordee
from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.training.trainer import Trainer
from tests.conftest import (
    SMALL,
    TINY,
    clean_environment,
    read_events,
    read_rows,
    train_small,
    weights_digest,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "notebook.py"
STEPS = 6
OVERRIDES = (*SMALL, *TINY, f"run.steps={STEPS}", "evaluate.tokens=256", "launch.processes=1")


def tiny_config(folder: Path, *words: str) -> cordee.Config:
    return cordee.Config.load(*OVERRIDES, f"run.dir={folder}", *words)


# ---- Config --------------------------------------------------------------------------------------


def test_words_tables_and_a_file_are_one_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[run]\nsteps = 5\nseed = 1\n[optim]\nname = "sgd"\n')
    config = cordee.Config.load(
        file, "run.seed=3", run={"steps": 7, "seed": 2}, model={"moe": {"experts": 4}}
    )
    assert (config.run.steps, config.run.seed, config.optim.name) == (7, 3, "sgd")
    assert config.model.moe.experts == 4 and config.run.dir == "runs/tiny"
    assert isinstance(config, Run)
    assert cordee.Config.load(str(file)).run.seed == 1


@pytest.mark.parametrize(
    ("words", "sections", "message"),
    [
        (("optim.lrr=1",), {}, "there is no such key"),
        ((), {"optim": {"lrr": 1}}, "there is no such key"),
        ((), {"run": {"steps": "many"}}, "wrong type"),
        (("a.toml", "b.toml"), {}, "one file"),
        (("missing.toml",), {}, "cannot be read"),
        ((), {"batch": {"microbatches": 0}}, "batch.microbatches"),
    ],
)
def test_a_wrong_configuration_is_refused_when_it_is_loaded(
    words: tuple[str, ...], sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cordee.Config.load(*words, **sections)


def test_a_plan_is_made_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, cordee; config = cordee.Config.load('model.preset=micro', 'run.steps=3');"
        " plan = cordee.plan(config); assert plan.why and plan.predicted.step_s > 0;"
        " assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), cwd=tmp_path, check=True, timeout=120
    )


# ---- Trainer -------------------------------------------------------------------------------------


def test_a_loop_of_steps_is_the_run_that_train_makes(tmp_path: Path) -> None:
    """The same bits, rows and events, also when it is closed and opened again between two steps."""
    cordee.train(tiny_config(tmp_path / "whole"))
    config, results = tiny_config(tmp_path / "steps"), []
    with cordee.Trainer(config) as trainer:
        assert isinstance(trainer, Trainer) and not trainer.done
        results += [trainer.train_step() for _ in range(3)]
        assert trainer.save_checkpoint()
        results.append(trainer.train_step())  # of which no checkpoint knows
    with cordee.Trainer(config) as trainer:
        assert trainer.progress.step == 3
        while not trainer.done:
            results.append(trainer.train_step())
        evaluation = trainer.evaluate()
        assert evaluation is not None and evaluation.bits_per_byte
        assert trainer.finish().exit_code == 0
    assert weights_digest(tmp_path / "steps") == weights_digest(tmp_path / "whole")
    assert [r.step for r in results] == [1, 2, 3, 4, 4, 5, 6]
    assert results[3].loss == results[4].loss
    rows, expected_rows = read_rows(tmp_path / "steps"), read_rows(tmp_path / "whole")
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert list(row) == list(expected_row)
        for key in ("step", "loss", "grad_norm", "lr", "tokens", "samples", "skipped"):
            assert row[key] == expected_row[key], key
    names = [event["event"] for event in read_events(tmp_path / "steps")]
    assert names == ["started", "checkpoint", "resumed", "checkpoint", "finished"]
    assert read_events(tmp_path / "steps")[-1]["held_out_loss"] == evaluation.loss


def test_fit_does_what_is_due_between_steps(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "evaluate.every=2", "checkpoint.every=4")
    with cordee.Trainer(config) as trainer:
        trainer.fit()
        assert trainer.done and trainer.progress.step == STEPS
    events = [(e["event"], e["step"]) for e in read_events(tmp_path / "run")]
    assert [e for e in events if e[0] == "evaluated"] == [("evaluated", 2), ("evaluated", 4)]
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_what_a_trainer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one process"):
        cordee.Trainer(tiny_config(tmp_path / "two", "launch.processes=2"))
    assert not (tmp_path / "two").exists()
    config = tiny_config(tmp_path / "run")
    with (
        cordee.Trainer(config),
        pytest.raises(ConfigError, match="another process trains in this folder"),
    ):
        cordee.Trainer(config)
    cordee.train(config)
    with pytest.raises(ConfigError, match="is finished"):
        cordee.Trainer(config)


# ---- a module of your own ------------------------------------------------------------------------


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def cross_entropy_sum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def test_a_module_of_your_own_is_trained_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    samples = TensorDataset(x, (x[:, 0] > 0).long())
    words = (f"run.dir={tmp_path / 'run'}", "run.steps=30", "optim.name=adamw", "optim.lr=0.01")
    config = cordee.Config.load(*words, "batch.microbatch=8", "batch.microbatches=2")
    net = make_net()
    parts = {"loss": cross_entropy_sum, "data": samples, "held_out": samples}
    with cordee.Trainer(config, model=net, **parts) as trainer:  # type: ignore[arg-type]
        losses = [trainer.train_step().loss for _ in range(30)]
        evaluation = trainer.evaluate()
        trainer.finish()
    assert losses[-1] < 0.7 * losses[0]
    assert evaluation is not None and evaluation.loss < 0.7 * losses[0]
    loaded_model = cordee.load_model(tmp_path / "run", model=make_net())
    for name, tensor in net.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(tensor, loaded_model.state_dict()[name]), name
    assert not loaded_model.training
    with pytest.raises(ConfigError, match="that a program brought"):
        cordee.load_model(tmp_path / "run")
    with pytest.raises(ConfigError, match="not those of the model"):
        cordee.load_model(tmp_path / "run", model=nn.Linear(8, 2))


LOOP = """
import sys, torch, cordee
from tests.metal.test_api import cross_entropy_sum
from torch.utils.data import TensorDataset
x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
data = TensorDataset(x, (x[:, 0] > 0).long())
words = ("run.steps=4", "run.precision=fp32", "batch.microbatches=4", "launch.probe=false")
config = cordee.Config.load(*words, *sys.argv[1:])
net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
for tensor in net.parameters():
    torch.nn.init.constant_(tensor, 0.1)
with cordee.Trainer(config, model=net, loss=cross_entropy_sum, data=data) as trainer:
    while not trainer.done:
        result = trainer.train_step()
    trainer.finish()
print(result.loss)
"""


@pytest.mark.slow
def test_a_loop_of_several_ranks(tmp_path: Path) -> None:
    """Every rank of torchrun runs the same loop; sharded, it is the descent of one process."""
    losses = []
    for ranks in (1, 2):
        (tmp_path / "loop.py").write_text(LOOP)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        words = [f"run.dir={tmp_path / str(ranks)}", f"layout.shard={ranks}"]
        result = subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "loop.py"), *words],
            env=clean_environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        losses += [float(line) for line in result.stdout.split()]
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, rel=1e-5)


# ---- trained models ------------------------------------------------------------------------------


def test_a_run_of_several_ranks_is_loaded_as_one_module(tmp_path: Path) -> None:
    """Its loss on the held-out rows is the one that the run wrote."""
    train_small(
        tmp_path / "run", *TINY, "run.steps=4", "layout.shard=2", "launch.processes=2",
        "evaluate.tokens=2048", "checkpoint.every=2",
    )  # fmt: skip
    model = cordee.load_model(tmp_path / "run")
    from cordee.data.dataset import open_dataset
    from cordee.data.loader import held_out_token_batches

    dataset = open_dataset(tmp_path / "run" / "data", "held_out")
    batches = list(held_out_token_batches(dataset, 16, 2, 2048 // 32))
    with torch.no_grad():
        loss = sum(float(model(batch[:, :-1], batch[:, 1:])) for batch in batches)
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    assert loss / tokens == pytest.approx(
        read_events(tmp_path / "run")[-1]["held_out_loss"], rel=1e-5
    )
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-00000002*"))
    early_model = cordee.load_model(checkpoints[0])
    assert not torch.equal(next(early_model.parameters()), next(model.parameters()))


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run"):
        cordee.load_model(tmp_path / "nothing")


def test_the_notebook_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "run.steps=20", "run.dir=run", "run.precision=fp32"]
    result = subprocess.run(
        command, env=clean_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "step 20: loss" in result.stdout and "logits [1, 6, 256]" in result.stdout
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["processes"] == 1
    assert read_events(tmp_path / "run")[-1]["event"] == "finished"
