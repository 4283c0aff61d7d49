"""Shares that move in a live run: whoever computes a microbatch, the step is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cordee.balance import share_out
from cordee.dist.start import World
from cordee.layout.shares import deal
from cordee.testing import launch
from cordee.trial import step
from tests.metal.layouts import DENSE, Curve, live, parameters

EXACT = (*DENSE, "run.exact=true", "model.dropout=0.1", "data.prefetch=1")
STEPS = 6

Job = tuple[tuple[str, ...], list[list[int]]]
"""Words, and the islands' shares of each step, in turn (none: as they are)."""


def moving(world: World, folder: str, jobs: list[Job]) -> list[Curve]:
    """A curve for each job."""
    found = []
    for words, given in jobs:
        state = live(world, folder, words)
        walked = []
        for number in range(STEPS):
            if given:
                workers = state.plan.layout.workers // state.plan.layout.island
                share_out(state, deal(given[number % len(given)], workers))
                assert state.plan.shares == given[number % len(given)]
            walked.append(step(state, number))
        losses, norms = ([pair[i] for pair in walked] for i in range(2))
        found.append(Curve(losses, norms, parameters(state)))
    return found if world.first else []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Curve]:
    """What one process does, exact and not."""
    folder = str(tmp_path_factory.mktemp("alone"))
    found: list[Curve] = launch(moving, folder, [(EXACT, []), (DENSE, [])], ranks=1)[0]
    return found


def same_bits(one: Curve, other: Curve) -> bool:
    pairs = ((one.parameters[name], other.parameters[name]) for name in one.parameters)
    return one.losses == other.losses and all(torch.equal(a, b) for a, b in pairs)


TWO = [[4, 4], [6, 2], [8, 0], [1, 7], [0, 8], [3, 5]]
THREE = [[8, 0, 0], [0, 8, 0], [3, 0, 5], [1, 6, 1], [0, 1, 7], [2, 3, 3]]


@pytest.mark.parametrize("ranks,given", [(2, TWO), (3, THREE)])
def test_exact_bits_whoever_computes(
    ranks: int, given: list[list[int]], alone: list[Curve], tmp_path: Path
) -> None:
    (found,) = launch(moving, str(tmp_path), [(EXACT, given)], ranks=ranks)[0]
    assert same_bits(found, alone[0])


@pytest.mark.slow
def test_exact_bits_with_shards_inside(alone: list[Curve], tmp_path: Path) -> None:
    jobs = [((*EXACT, "layout.shard=2"), [[6, 2], [2, 6]])]
    (found,) = launch(moving, str(tmp_path), jobs, ranks=4)[0]
    assert same_bits(found, alone[0])


@pytest.mark.slow
def test_the_curve_of_other_sums(alone: list[Curve], tmp_path: Path) -> None:
    two: list[Job] = [
        ((*DENSE, "sync.protocol=allreduce"), TWO), ((*DENSE, "sync.protocol=exchange"), TWO),
    ]  # fmt: skip
    cut = (*DENSE, "layout.islands=2")
    four: list[Job] = [
        ((*cut, "layout.tensor=2", "sync.protocol=exchange"), [[7, 1], [2, 6]]),
        ((*cut, "layout.shard=2", "layout.zero=3", "sync.protocol=allreduce"), [[6, 2], [2, 6]]),
    ]
    for jobs, ranks in ((two, 2), (four, 4)):
        for found in launch(moving, str(tmp_path / str(ranks)), jobs, ranks=ranks)[0]:
            for mine, theirs in zip(found.losses, alone[1].losses, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5)
