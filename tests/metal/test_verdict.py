"""What ranks do with a step is one decision: also when one of them holds another gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cordee.checkpoint.pieces import weights_sha256
from cordee.config.load import load
from cordee.dist.process_group import RankProcess
from cordee.launcher.prepare import prepare_dataset, resolve_config
from cordee.launcher.run_ranks import launch
from cordee.planner.cluster import local_cluster
from cordee.planner.plan import make_plan
from cordee.report.reader import read_records
from cordee.training.fault_injection import FaultInjector
from cordee.training.run_logger import RunLogger
from cordee.training.step_guard import find_divergent_ranks
from cordee.training.trainer import Trainer
from cordee.training.user_parts import Parts
from tests.conftest import SMALL, TINY

NAN, INF = math.nan, math.inf
FAULT_STEP = 3

NORM_FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "twice as long": lambda norm: 2 * norm,
    "not a number": lambda norm: norm * NAN,
    "infinite": lambda norm: norm * INF,
    "one bit": lambda norm: torch.nextafter(norm, norm * 2),
}


@pytest.mark.parametrize(
    ("norms", "tolerance", "expected_ranks"),
    [
        ((1.0, 1.0, 1.0), 0.0, []),
        ((1.0, 1.0, 2.0), 0.0, [2]),
        ((3.0, 1.0, 1.0), 0.0, [0]),
        ((1.0, 2.0), 0.0, [0, 1]),
        ((1.0, NAN), 0.0, [1]),
        ((INF, 1.0), 0.0, [0]),
        ((NAN, 1.0, 1.0, INF), 0.0, [0, 3]),
        ((NAN, NAN, INF), 0.0, []),
        ((NAN,), 0.0, []),
        ((1.0, 2.0, 3.0), 0.0, [0, 1, 2]),
        ((1.0, 1.0 + 1e-6), 0.0, [0, 1]),
        ((1.0, 1.0 + 1e-6), 1e-3, []),
        ((0.0, 0.0), 0.0, []),
        ((1.0, 1.0, 1.5, 1.5), 1e-3, [0, 1, 2, 3]),
    ],
)
def test_who_differs(norms: tuple[float, ...], tolerance: float, expected_ranks: list[int]) -> None:
    assert find_divergent_ranks(norms, tolerance) == expected_ranks


def run_steps(
    process: RankProcess, folder: str, fault_name: str, fault_count: int, exact: bool
) -> dict[str, Any]:
    """Five steps, in which rank 1 takes the norm for something else `fault_count` times."""
    torch.set_num_threads(1)
    run_dir_override = f"run.dir={folder}/{process.rank}"
    overrides = (
        *SMALL,
        *TINY,
        run_dir_override,
        "run.steps=100",
        f"run.exact={str(exact).lower()}",
    )
    run = resolve_config(load(None, overrides).run)
    data = prepare_dataset(run)
    plan = make_plan(run, local_cluster(), data.vocabulary, process.size)
    trainer = Trainer(run, plan, process, data, Parts())
    trainer.logger = RunLogger(run, process)
    remaining_faults = [fault_count if process.rank == 1 else 0]
    original_norm, original_corrupt = Trainer.gradient_norm, FaultInjector.corrupt_gradient

    def faulty_corrupt(self: FaultInjector, gradients: Any, number: int) -> None:
        if fault_name == "its own sum" and number == FAULT_STEP and remaining_faults[0]:
            remaining_faults[0] -= 1
            gradients[0].view(-1)[0] = NAN

    def faulty_norm(self: Trainer, gradients: Any) -> Tensor:
        true_norm = original_norm(self, gradients)
        if (
            self.progress.step + 1 != FAULT_STEP
            or not remaining_faults[0]
            or fault_name not in NORM_FAULTS
        ):
            return true_norm
        remaining_faults[0] -= 1
        return NORM_FAULTS[fault_name](true_norm)

    Trainer.gradient_norm, FaultInjector.corrupt_gradient = faulty_norm, faulty_corrupt  # type: ignore[method-assign]
    try:
        verdicts = []
        for _ in range(5):
            verdicts.append(trainer.train_step().verdict)
    finally:
        Trainer.gradient_norm, FaultInjector.corrupt_gradient = original_norm, original_corrupt  # type: ignore[method-assign]
        trainer.logger.close()
    return {
        "said": [(verdict.decision, verdict.cause) for verdict in verdicts],
        "weights": weights_sha256(trainer.state.specs, trainer.state.full_tensor),
        "told": [e for e in read_records(Path(run.run.dir) / "events.jsonl")
                 if e["event"].startswith("step_")],
        "skipped": trainer.progress.skipped, "in a row": trainer.guard.consecutive_skips,
        "events": [e for e in read_records(Path(run.run.dir) / "events.jsonl")
                   if e["event"] == "ranks_differ"],
    }  # fmt: skip


def run_all_faults(process: RankProcess, folder: str, exact: bool) -> dict[str, Any]:
    """Every wrong norm once and for good, and none."""
    names = (*NORM_FAULTS, "its own sum")
    jobs = [("twice as long", 0), *((name, times) for name in names for times in (1, 2))]
    if not exact:
        jobs = [job for job in jobs if job[0] != "one bit"]
    return {f"{n} {t}": run_steps(process, f"{folder}/{n}-{t}", n, t, exact) for n, t in jobs}


def check_own(
    once_result: dict[str, Any], twice_result: dict[str, Any], clean_result: dict[str, Any]
) -> None:
    """What is not finite is computed again; when it is so again, the rank is named that has it."""
    assert once_result["weights"] == clean_result["weights"] and not once_result["skipped"]
    assert [e["event"] for e in once_result["told"]] == ["step_repeated"]
    assert twice_result["skipped"] == 1 and not twice_result["events"]
    assert [e["event"] for e in twice_result["told"]] == ["step_repeated", "step_skipped"]
    assert twice_result["told"][1]["rank"] == 1 and twice_result["told"][1]["sick"] == [{"rank": 1}]


@pytest.mark.parametrize("exact", [True, False])
def test_all_do_the_same_and_say_who_differs(exact: bool, tmp_path: Path) -> None:
    first_results, second_results = launch(run_all_faults, str(tmp_path), exact, ranks=2)
    clean_result = first_results.pop("twice as long 0")
    second_results.pop("twice as long 0")
    assert not clean_result["events"] and clean_result["skipped"] == 0
    check_own(first_results.pop("its own sum 1"), first_results.pop("its own sum 2"), clean_result)
    for job, result in first_results.items():
        second_result = second_results[job]
        for key in ("said", "weights", "skipped", "in a row"):
            assert result[key] == second_result[key], (job, key)
        if job.endswith("1"):  # a passing fault costs nothing
            assert result["weights"] == clean_result["weights"] and result["skipped"] == 0, job
            assert [e["done"] for e in result["events"]] == ["the step is computed again"]
        else:
            assert result["skipped"] == 1 and result["weights"] != clean_result["weights"], job
            assert "different gradients" in result["said"][FAULT_STEP - 1][1]
            assert len(result["events"]) == 2
        expected_ranks = [1] if job.startswith(("not", "inf")) else [0, 1]
        assert [
            rank_entry["rank"] for rank_entry in result["events"][0]["ranks"]
        ] == expected_ranks, job
