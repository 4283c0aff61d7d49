"""Every layout is the same descent: each axis alone, every pair, triples, against one process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from cordee.testing import launch
from tests.metal.layouts import DENSE, Curve, curves, moved

STEPS = 20
"""Of the golden curve."""
FEW = 8
"""Where the jobs are many."""
AXES = ("islands", "shard", "tensor", "pipeline", "context")
GOLDEN = Path(__file__).parent.parent / "golden"


def words(**degrees: int | str) -> tuple[str, ...]:
    return tuple(f"layout.{axis}={degree}" for axis, degree in degrees.items())


TWO = [
    *(words(**{axis: 2}) for axis in AXES),
    words(shard=2, zero=2), words(shard=2, zero=3), words(context=2, attention="ring"),
    words(pipeline=2, schedule="gpipe"), words(pipeline=2, schedule="interleaved"),
    words(pipeline=2, schedule="zero_bubble"),
]  # fmt: skip
FOUR = [
    *(words(**{axis: 4}) for axis in AXES if axis != "tensor"),
    words(context=4, attention="ring"),
    *(words(**{a: 2, b: 2}) for a, b in itertools.combinations(AXES, 2)),
    words(shard=2, tensor=2, zero=3), words(tensor=2, context=2, attention="ring"),
    words(pipeline=2, shard=2, schedule="interleaved"),
    words(pipeline=2, tensor=2, schedule="zero_bubble"),
]  # fmt: skip
EIGHT = [
    words(shard=2, tensor=2, pipeline=2),
    words(islands=2, tensor=2, context=2),
    words(islands=2, shard=2, pipeline=2),
]
LEVERS = [
    ("model.dropout=0.2",), ("memory.recompute=full", "model.dropout=0.2"),
    ("memory.loss_chunk=8", "model.mlp=gated"),
]  # fmt: skip
LEVERED = [words(tensor=2), words(pipeline=2), words(context=2), words(shard=2)]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The one process."""
    return launch(curves, str(tmp_path_factory.mktemp("one")), [DENSE], STEPS, ranks=1)[0][0]


def close(found: Curve, oracle: Curve, curve: float, parameter: float) -> None:
    """Losses and norms to `curve`, relative; parameters to `parameter` of their largest."""
    assert found.losses == pytest.approx(oracle.losses, rel=curve)
    assert found.norms == pytest.approx(oracle.norms, rel=curve)
    assert list(found.parameters) == list(oracle.parameters)
    for name, tensor in oracle.parameters.items():
        off = (found.parameters[name] - tensor).abs().max()
        assert off <= parameter * tensor.abs().max(), name


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The one process, a few steps."""
    return launch(curves, str(tmp_path_factory.mktemp("few")), [DENSE], FEW, ranks=1)[0][0]


def check(
    ranks: int, jobs: list[tuple[str, ...]], oracle: Curve, folder: Path, steps: int = FEW
) -> None:
    whole = [(*DENSE, *job) for job in jobs]
    found = launch(curves, str(folder), whole, steps, ranks=ranks)[0]
    assert oracle.losses[-1] < oracle.losses[0] - 0.5, "the oracle learns"
    for job, made in zip(jobs, found, strict=True):
        print(job)
        close(made, oracle, 1e-5, 1e-4)


def test_each_axis_at_two(short: Curve, tmp_path: Path) -> None:
    check(2, TWO, short, tmp_path)


@pytest.mark.nightly
def test_each_axis_at_two_for_longer(oracle: Curve, tmp_path: Path) -> None:
    check(2, TWO, oracle, tmp_path, STEPS)


@pytest.mark.slow
def test_each_axis_at_four_and_every_pair(short: Curve, tmp_path: Path) -> None:
    check(4, FOUR, short, tmp_path)


@pytest.mark.nightly
def test_three_axes(short: Curve, tmp_path: Path) -> None:
    check(8, EIGHT, short, tmp_path)


@pytest.mark.slow
def test_dropout_and_levers_are_the_same_under_every_axis(tmp_path: Path) -> None:
    bare = [(*DENSE, *lever) for lever in LEVERS]
    oracles = launch(curves, str(tmp_path), bare, 5, ranks=1)[0]
    jobs = [(*DENSE, *lever, *axis) for lever in LEVERS for axis in LEVERED]
    found = launch(curves, str(tmp_path), jobs, 5, ranks=2)[0]
    assert oracles[0].losses != pytest.approx(oracles[2].losses, rel=1e-3)
    for place, made in enumerate(found):
        print(jobs[place][len(DENSE) :])
        close(made, oracles[place // len(LEVERED)], 1e-5, 1e-4)


@pytest.mark.parametrize(
    "steps",
    [pytest.param(FEW, marks=pytest.mark.slow), pytest.param(STEPS, marks=pytest.mark.nightly)],
)
def test_bf16_stays_near(steps: int, tmp_path: Path) -> None:
    job = [*DENSE, "run.precision=bf16"]
    one = launch(curves, str(tmp_path), [tuple(job)], steps, ranks=1)[0][0]
    axes = [words(**{axis: 2}) for axis in AXES]
    jobs = [(*job, *axis) for axis in axes]
    for axis, made in zip(
        axes, launch(curves, str(tmp_path), jobs, steps, ranks=2)[0], strict=True
    ):
        print(axis)
        assert made.losses == pytest.approx(one.losses, rel=2e-2)
        assert made.norms == pytest.approx(one.norms, rel=0.1)


def test_the_curve_is_the_frozen_one(oracle: Curve) -> None:
    frozen = json.loads((GOLDEN / "curve_dense.json").read_text())
    assert oracle.losses == pytest.approx(frozen["losses"], rel=1e-4)
    assert oracle.norms == pytest.approx(frozen["norms"], rel=1e-3)


MIXED = (
    *DENSE, "model.moe.experts=4", "model.moe.active=2", "model.moe.dense_layers=1",
    "model.moe.width=32", "model.moe.shared=1", "model.moe.router=sigmoid",
)  # fmt: skip
"""Experts in all blocks but the first, dropless. Which experts a token gets is a matter of yes and
no, so a rule that magnifies last bits (muon, adam) can flip one: momentum, muon for a few steps."""
GENTLE = ("optim.name=momentum", "optim.lr=0.05")
BIASED = ("model.moe.balance=bias", "model.moe.balance_rate=0.01")
EXPERTS = [
    words(expert=4), *(words(**{"expert": 2, axis: 2}) for axis in AXES),
    words(shard=2, tensor=2), words(shard=2, context=2),
]  # fmt: skip


def check_experts(
    ranks: int, job: tuple[str, ...], jobs: list[tuple[str, ...]], at: Path, steps: int = FEW
) -> None:
    parameter = 1e-4 if set(GENTLE) <= set(job) else 1e-3
    one = launch(curves, str(at), [job], steps, ranks=1)[0][0]
    assert one.losses[-1] < one.losses[0] - 0.3
    whole = [(*job, *axes) for axes in jobs]
    found = launch(curves, str(at), whole, steps, ranks=ranks)[0]
    for axes, made in zip(jobs, found, strict=True):
        print(axes)
        close(made, one, 1e-5, parameter)


@pytest.mark.parametrize("steps", [FEW, pytest.param(STEPS, marks=pytest.mark.nightly)])
def test_experts_at_two(steps: int, tmp_path: Path) -> None:
    jobs = [words(**{axis: 2}) for axis in (*AXES, "expert")]
    check_experts(2, (*MIXED, *GENTLE), jobs, tmp_path, steps)


@pytest.mark.slow
@pytest.mark.parametrize("balance", [(), BIASED], ids=["loss", "bias"])
def test_experts_beside_every_axis(balance: tuple[str, ...], tmp_path: Path) -> None:
    check_experts(4, (*MIXED, *GENTLE, *balance), EXPERTS, tmp_path)
    if balance:  # once with muon, for which the balance makes no difference
        check_experts(4, (*MIXED, *balance), EXPERTS, tmp_path, 5)


MOVES = [
    words(islands=4), words(shard=4), words(tensor=2, islands=2), words(pipeline=2, shard=2),
    words(context=2, tensor=2), words(pipeline=2, tensor=2, schedule="zero_bubble"),
    words(shard=2, context=2), words(islands=2, pipeline=2),
]  # fmt: skip


@pytest.mark.slow
def test_experts_move_between_layouts(tmp_path: Path) -> None:
    places = [words(expert=4), words(expert=2, shard=2), words(tensor=2, pipeline=2)]
    job = (*MIXED, *BIASED)
    pairs = [((*job, *a), (*job, *b)) for a, b in itertools.permutations(places, 2)]
    for undisturbed, resumed in launch(moved, str(tmp_path), pairs, ranks=4)[0]:
        assert resumed == pytest.approx(undisturbed, rel=1e-6)


@pytest.mark.slow
def test_checkpoints_move_between_layouts(tmp_path: Path) -> None:
    ring = [*zip(MOVES, MOVES[1:] + MOVES[:1], strict=True)]
    across = [(MOVES[i], MOVES[i - 3]) for i in range(0, len(MOVES), 2)]
    pairs = [((*DENSE, *a), (*DENSE, *b)) for a, b in ring + across]
    found = launch(moved, str(tmp_path), pairs, ranks=4)[0]
    assert len(found) >= 12
    for (a, b), (undisturbed, resumed) in zip(ring + across, found, strict=True):
        print(a, b)
        assert resumed == pytest.approx(undisturbed, rel=1e-6)


def freeze() -> None:
    """Writes the golden curve anew: `python -m tests.metal.test_layouts`."""
    made = launch(curves, "/tmp/cordee-golden", [DENSE], STEPS, ranks=1)[0][0]
    text = json.dumps({"losses": made.losses, "norms": made.norms}, indent=1)
    (GOLDEN / "curve_dense.json").write_text(text + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    freeze()
