"""Shares that move in a live run: whoever computes a microbatch, the step is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cordee.dist.process_group import RankProcess
from cordee.launcher.run_ranks import launch
from cordee.layout.load_balance import microbatch_ranges
from tests.metal.layouts import DENSE, Curve, gather_parameters, make_trainer

EXACT_OVERRIDES = (*DENSE, "run.exact=true", "model.dropout=0.1", "data.prefetch=1")
STEPS = 6

Job = tuple[tuple[str, ...], list[list[int]]]
"""Words, and the islands' shares of each step, in turn (none: as they are)."""


def train_with_shares(process: RankProcess, folder: str, jobs: list[Job]) -> list[Curve]:
    """A curve for each job."""
    curves = []
    for overrides, shares_by_step in jobs:
        trainer = make_trainer(process, folder, overrides)
        step_results = []
        for step_number in range(STEPS):
            if shares_by_step:
                workers = trainer.plan.layout.dp_size // trainer.plan.layout.island
                trainer.set_worker_ranges(
                    microbatch_ranges(shares_by_step[step_number % len(shares_by_step)], workers)
                )
                assert (
                    trainer.plan.island_microbatches
                    == shares_by_step[step_number % len(shares_by_step)]
                )
            step_results.append(trainer.train_step())
        losses, norms = [r.loss for r in step_results], [r.grad_norm for r in step_results]
        curves.append(Curve(losses, norms, gather_parameters(trainer)))
    return curves if process.is_first else []


@pytest.fixture(scope="module")
def reference_curves(tmp_path_factory: pytest.TempPathFactory) -> list[Curve]:
    """What one process does, exact and not."""
    folder = str(tmp_path_factory.mktemp("alone"))
    curves: list[Curve] = launch(
        train_with_shares, folder, [(EXACT_OVERRIDES, []), (DENSE, [])], ranks=1
    )[0]
    return curves


def has_same_bits(curve: Curve, reference: Curve) -> bool:
    pairs = ((curve.parameters[name], reference.parameters[name]) for name in curve.parameters)
    return curve.losses == reference.losses and all(torch.equal(a, b) for a, b in pairs)


SHARES_OF_TWO = [[4, 4], [6, 2], [8, 0], [1, 7], [0, 8], [3, 5]]
SHARES_OF_THREE = [[8, 0, 0], [0, 8, 0], [3, 0, 5], [1, 6, 1], [0, 1, 7], [2, 3, 3]]


@pytest.mark.parametrize("ranks,shares_by_step", [(2, SHARES_OF_TWO), (3, SHARES_OF_THREE)])
def test_exact_bits_whoever_computes(
    ranks: int, shares_by_step: list[list[int]], reference_curves: list[Curve], tmp_path: Path
) -> None:
    (curve,) = launch(
        train_with_shares, str(tmp_path), [(EXACT_OVERRIDES, shares_by_step)], ranks=ranks
    )[0]
    assert has_same_bits(curve, reference_curves[0])


@pytest.mark.slow
def test_exact_bits_with_shards_inside(reference_curves: list[Curve], tmp_path: Path) -> None:
    jobs = [((*EXACT_OVERRIDES, "layout.shard=2"), [[6, 2], [2, 6]])]
    (curve,) = launch(train_with_shares, str(tmp_path), jobs, ranks=4)[0]
    assert has_same_bits(curve, reference_curves[0])


@pytest.mark.slow
def test_the_curve_of_other_sums(reference_curves: list[Curve], tmp_path: Path) -> None:
    jobs_of_two: list[Job] = [
        ((*DENSE, "sync.protocol=allreduce"), SHARES_OF_TWO),
        ((*DENSE, "sync.protocol=exchange"), SHARES_OF_TWO),
    ]
    island_overrides = (*DENSE, "layout.islands=2")
    jobs_of_four: list[Job] = [
        ((*island_overrides, "layout.tensor=2", "sync.protocol=exchange"), [[7, 1], [2, 6]]),
        (
            (*island_overrides, "layout.shard=2", "layout.zero=3", "sync.protocol=allreduce"),
            [[6, 2], [2, 6]],
        ),
    ]
    for jobs, ranks in ((jobs_of_two, 2), (jobs_of_four, 4)):
        for curve in launch(train_with_shares, str(tmp_path / str(ranks)), jobs, ranks=ranks)[0]:
            for loss, reference_loss in zip(curve.losses, reference_curves[1].losses, strict=True):
                assert loss == pytest.approx(reference_loss, rel=1e-5)
