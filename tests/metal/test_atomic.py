"""A step that any of its collectives interrupts did not happen, and can simply be done again.

The fault comes where torch hands a collective to its backend (a dispatch mode sees every `c10d`
operation, whoever calls it), on all ranks at the same one. Not here: who notices, who joins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cordee.config.load import load
from cordee.data.loader import describe_samples
from cordee.dist.process_group import RankProcess
from cordee.launcher.prepare import prepare_dataset, resolve_config
from cordee.launcher.run_ranks import launch
from cordee.optim.optimizer import GROWTH_INTERVAL
from cordee.planner.cluster import local_cluster
from cordee.planner.plan import make_plan
from cordee.training.run_logger import RunLogger
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts
from tests.conftest import SMALL
from tests.metal import test_user_models as user_models

INTERRUPTED_STEP = 3
"""The step that is interrupted; two come before it and two after it."""

TINY = (
    "model.width=32", "data.tokens=20000", "data.sequence=16", "batch.microbatches=6",
    "run.steps=100", "run.precision=fp32",
)  # fmt: skip
MOE = (
    "model.moe.experts=4", "model.moe.active=2", "model.moe.width=16", "model.moe.balance=bias",
    "model.moe.balance_rate=0.01",
)  # fmt: skip
LIMITS = ("clip.matrices.norm=3", "clip.vectors.value=2", "clip.kind=agc")
FP16 = ("run.precision=fp16", "optim.name=adamw")

CASES: dict[str, tuple[tuple[str, ...], int]] = {
    # Name: words, and how many collectives a step has: one for losses, one (or two: there and back)
    # for the gradient, one for muon's matrices, one for the loads of experts. What is not finite
    # is computed twice before it is dropped; but for an overflow of fp16.
    "muon": ((), 3),
    "muon, exact": (("run.exact=true", "data.prefetch=1", *LIMITS), 4),
    "muon, exchange": (("sync.protocol=exchange", "sync.codec=bf16"), 4),
    "adamw": (("optim.name=adamw",), 2),
    "sgd": (("optim.name=sgd",), 2),
    "adafactor": (("optim.name=adafactor",), 2),
    "experts": (MOE, 4),
    "experts, adamw": ((*MOE, "optim.name=adamw", "run.exact=true"), 4),
    "fp16": (FP16, 2),
    "fp16, dropped": ((*FP16, f"fault.poison={INTERRUPTED_STEP}:0"), 2),
    "dropped": ((f"fault.poison={INTERRUPTED_STEP}:0",), 4),
    "a model with a norm": ((), 2),
    "a model with a norm, dropped": ((f"fault.poison={INTERRUPTED_STEP}:0",), 4),
}
FINAL_SCALES = {"fp16": (2.0**17, 2), "fp16, dropped": (2.0**15, 2)}
"""Loss scale and good steps at the end, where they move."""


class CollectiveError(Exception):
    """What a collective raises whose other end is gone."""


class InterruptingMode(TorchDispatchMode):
    """Lets a number of collectives pass, and raises at the one after them."""

    def __init__(self, allowed_count: int) -> None:
        super().__init__()
        self.op_count = 0
        self._allowed_count = allowed_count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation comes by."""
        if func.namespace == "c10d":
            if self.op_count == self._allowed_count:
                raise CollectiveError
            self.op_count += 1
        return func(*args, **(kwargs or {}))


def make_trainer(
    process: RankProcess, name: str, folder: Path, layout: tuple[str, ...] = ()
) -> Trainer:
    """A fresh run of a case; every rank has a folder of its own."""
    overrides = (*CASES[name][0], *layout, f"run.dir={folder}")
    user_parts = Parts()
    if name.startswith("a model with a norm"):
        user_parts = Parts(**user_models.make_parts("batch"))
        run = resolve_config(user_models.make_run(folder, "run.exact=false", *overrides))
        assert user_parts.data is not None
        data = describe_samples(user_parts.data, 0)
    else:
        run = resolve_config(load(None, (*SMALL, *TINY, *overrides)).run)
        data = prepare_dataset(run)
    plan = make_plan(run, local_cluster(), data.vocabulary, process.size)
    trainer = Trainer(run, plan, process, data, user_parts)
    trainer.logger = RunLogger(run, process)
    trainer.loss_scale.good_steps = (
        GROWTH_INTERVAL - INTERRUPTED_STEP
    )  # it would double with the interrupted step
    return trainer


def copy_state(trainer: Trainer) -> dict[str, Any]:
    """What survives, in copies."""
    tensors = {**trainer.state.model_tensors, **trainer.optimizer.state_tensors()}
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "scale": (trainer.loss_scale.value, trainer.loss_scale.good_steps),
        "in a row": trainer.guard.consecutive_skips,
        "step": (trainer.progress.step, trainer.progress.tokens, trainer.progress.skipped),
        "sync": trainer.sync.state(),
    }


def check_same(expected: dict[str, Any], actual: dict[str, Any]) -> None:
    """To the bit."""
    assert {**expected, "tensors": 0} == {**actual, "tensors": 0}
    for name, tensor in expected["tensors"].items():
        assert _byte_view(tensor).equal(_byte_view(actual["tensors"][name])), name


def _byte_view(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def count_collectives(trainer: Trainer) -> int:
    """Interrupts a step at each of its collectives until it passes; how many it has."""
    state_before = copy_state(trainer)
    for allowed_count in range(200):
        try:
            with InterruptingMode(allowed_count):
                trainer.train_step()
        except CollectiveError:
            check_same(state_before, copy_state(trainer))
        else:
            return allowed_count
    raise AssertionError("a step without an end")


def run_interrupted_cases(
    process: RankProcess,
    folder: str,
    names: list[str],
    layout: tuple[str, ...] = (),
    is_repeatable: bool = True,
) -> list[int]:
    """Each case undisturbed, and with one step interrupted: the same (unless the step cannot be
    done `is_repeatable` in place). How many collectives that step has."""
    torch.set_num_threads(1)
    counts: list[int] = []
    for index, name in enumerate(names):
        final_states = []
        for is_disturbed in (False, True):
            run_folder = Path(folder) / f"{index}-{is_disturbed}-{process.rank}"
            trainer = make_trainer(process, name, run_folder, layout)
            for _ in range(1, INTERRUPTED_STEP):
                trainer.train_step()
            tensors_before = copy_state(trainer)["tensors"]
            if is_disturbed:
                counts.append(count_collectives(trainer))
            else:
                trainer.train_step()
            if "dropped" in name:
                check_same({"tensors": tensors_before}, {"tensors": copy_state(trainer)["tensors"]})
            for _ in range(2):
                trainer.train_step()
            final_states.append(copy_state(trainer))
            trainer.logger.close()
        if is_repeatable:
            check_same(*final_states)
        assert final_states[0]["scale"] == FINAL_SCALES.get(
            name, (1.0, GROWTH_INTERVAL - INTERRUPTED_STEP)
        )
        assert final_states[0]["step"][2] == ("dropped" in name)
    return counts


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_that_is_interrupted_did_not_happen(ranks: int, tmp_path: Path) -> None:
    names = list(CASES)[:: ranks - 1]
    for counts in launch(run_interrupted_cases, str(tmp_path), names, ranks=ranks):
        assert dict(zip(names, counts, strict=True)) == {n: CASES[n][1] for n in names}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "shard"])
def test_an_interrupted_step_of_a_cut_island(axis: str, tmp_path: Path) -> None:
    """FSDP2 keeps what it was doing when it was interrupted: its modules are made anew for a second
    try, which is not here."""
    names, layout = ["muon", "adamw"], (f"layout.{axis}=2", "batch.microbatches=2")
    is_repeatable = axis == "tensor"
    muon, adamw = launch(
        run_interrupted_cases, str(tmp_path), names, layout, is_repeatable, ranks=2
    )[0]
    # Parts of matrices to who computes them, and back.
    assert muon == adamw + 2 if is_repeatable else muon > adamw > 0
