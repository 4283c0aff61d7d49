"""Every layout is the same descent: each axis alone, every pair, triples, against one process."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import pytest
import torch

from cordee.launcher.run_ranks import launch
from tests.metal.layouts import DENSE, Curve, resume_pairs, train_curves

STEPS = 20
"""Of the golden curve."""
FEW_STEPS = 8
"""Where the jobs are many."""
AXES = ("islands", "shard", "tensor", "pipeline", "context")
GOLDEN = Path(__file__).parent.parent / "golden"


def layout_overrides(**degrees: int | str) -> tuple[str, ...]:
    return tuple(f"layout.{axis}={degree}" for axis, degree in degrees.items())


LAYOUTS_OF_TWO = [
    *(layout_overrides(**{axis: 2}) for axis in AXES),
    layout_overrides(shard=2, zero=2),
    layout_overrides(shard=2, zero=3),
    layout_overrides(context=2, attention="ring"),
    layout_overrides(pipeline=2, schedule="gpipe"),
    layout_overrides(pipeline=2, schedule="interleaved"),
    layout_overrides(pipeline=2, schedule="zero_bubble"),
]
LAYOUTS_OF_FOUR = [
    *(layout_overrides(**{axis: 4}) for axis in AXES if axis != "tensor"),
    layout_overrides(context=4, attention="ring"),
    *(layout_overrides(**{a: 2, b: 2}) for a, b in itertools.combinations(AXES, 2)),
    layout_overrides(shard=2, tensor=2, zero=3),
    layout_overrides(tensor=2, context=2, attention="ring"),
    layout_overrides(pipeline=2, shard=2, schedule="interleaved"),
    layout_overrides(pipeline=2, tensor=2, schedule="zero_bubble"),
]
LAYOUTS_OF_EIGHT = [
    layout_overrides(shard=2, tensor=2, pipeline=2),
    layout_overrides(islands=2, tensor=2, context=2),
    layout_overrides(islands=2, shard=2, pipeline=2),
]
LEVERS = [
    ("model.dropout=0.2",), ("memory.recompute=full", "model.dropout=0.2"),
    ("memory.loss_chunk=8", "model.mlp=gated"),
]  # fmt: skip
LEVER_LAYOUTS = [
    layout_overrides(tensor=2),
    layout_overrides(pipeline=2),
    layout_overrides(context=2),
    layout_overrides(shard=2),
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The one process."""
    return launch(train_curves, str(tmp_path_factory.mktemp("one")), [DENSE], STEPS, ranks=1)[0][0]


def check_close(
    result_curve: Curve, oracle: Curve, curve_rtol: float, parameter_rtol: float
) -> None:
    """Losses and norms to `curve_rtol`, relative; parameters to `parameter_rtol` of their
    largest."""
    assert result_curve.losses == pytest.approx(oracle.losses, rel=curve_rtol)
    assert result_curve.norms == pytest.approx(oracle.norms, rel=curve_rtol)
    assert list(result_curve.parameters) == list(oracle.parameters)
    for name, tensor in oracle.parameters.items():
        max_error = (result_curve.parameters[name] - tensor).abs().max()
        assert max_error <= parameter_rtol * tensor.abs().max(), name


@pytest.fixture(scope="module")
def short_oracle(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The one process, a few steps."""
    return launch(train_curves, str(tmp_path_factory.mktemp("few")), [DENSE], FEW_STEPS, ranks=1)[
        0
    ][0]


def check_layouts(
    ranks: int, jobs: list[tuple[str, ...]], oracle: Curve, folder: Path, steps: int = FEW_STEPS
) -> None:
    full_jobs = [(*DENSE, *job) for job in jobs]
    all_curves = launch(train_curves, str(folder), full_jobs, steps, ranks=ranks)[0]
    assert oracle.losses[-1] < oracle.losses[0] - 0.5, "the oracle learns"
    for job, result_curve in zip(jobs, all_curves, strict=True):
        print(job)
        check_close(result_curve, oracle, 1e-5, 1e-4)


def test_each_axis_at_two(short_oracle: Curve, tmp_path: Path) -> None:
    check_layouts(2, LAYOUTS_OF_TWO, short_oracle, tmp_path)


@pytest.mark.nightly
def test_each_axis_at_two_for_longer(oracle: Curve, tmp_path: Path) -> None:
    check_layouts(2, LAYOUTS_OF_TWO, oracle, tmp_path, STEPS)


@pytest.mark.slow
def test_each_axis_at_four_and_every_pair(short_oracle: Curve, tmp_path: Path) -> None:
    check_layouts(4, LAYOUTS_OF_FOUR, short_oracle, tmp_path)


@pytest.mark.nightly
def test_three_axes(short_oracle: Curve, tmp_path: Path) -> None:
    check_layouts(8, LAYOUTS_OF_EIGHT, short_oracle, tmp_path)


@pytest.mark.slow
def test_dropout_and_levers_are_the_same_under_every_axis(tmp_path: Path) -> None:
    bare_jobs = [(*DENSE, *lever) for lever in LEVERS]
    oracles = launch(train_curves, str(tmp_path), bare_jobs, 5, ranks=1)[0]
    jobs = [(*DENSE, *lever, *axis) for lever in LEVERS for axis in LEVER_LAYOUTS]
    all_curves = launch(train_curves, str(tmp_path), jobs, 5, ranks=2)[0]
    assert oracles[0].losses != pytest.approx(oracles[2].losses, rel=1e-3)
    for index, result_curve in enumerate(all_curves):
        print(jobs[index][len(DENSE) :])
        check_close(result_curve, oracles[index // len(LEVER_LAYOUTS)], 1e-5, 1e-4)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(FEW_STEPS, marks=pytest.mark.slow),
        pytest.param(STEPS, marks=pytest.mark.nightly),
    ],
)
def test_bf16_stays_near(steps: int, tmp_path: Path) -> None:
    job = [*DENSE, "run.precision=bf16"]
    reference = launch(train_curves, str(tmp_path), [tuple(job)], steps, ranks=1)[0][0]
    axes = [layout_overrides(**{axis: 2}) for axis in AXES]
    jobs = [(*job, *axis) for axis in axes]
    for axis, result_curve in zip(
        axes, launch(train_curves, str(tmp_path), jobs, steps, ranks=2)[0], strict=True
    ):
        print(axis)
        assert result_curve.losses == pytest.approx(reference.losses, rel=2e-2)
        assert result_curve.norms == pytest.approx(reference.norms, rel=0.1)


def test_the_curve_is_the_frozen_one(oracle: Curve) -> None:
    golden = json.loads((GOLDEN / "curve_dense.json").read_text())
    assert oracle.losses == pytest.approx(golden["losses"], rel=1e-4)
    assert oracle.norms == pytest.approx(golden["norms"], rel=1e-3)


MOE_OVERRIDES = (
    *DENSE, "model.moe.experts=4", "model.moe.active=2", "model.moe.dense_layers=1",
    "model.moe.width=32", "model.moe.shared=1", "model.moe.router=sigmoid",
)  # fmt: skip
"""Experts in all blocks but the first, dropless. Which experts a token gets is a matter of yes and
no, so a rule that magnifies last bits (muon, adam) can flip one: momentum, muon for a few steps."""
MOMENTUM_OVERRIDES = ("optim.name=momentum", "optim.lr=0.05")
BIAS_OVERRIDES = ("model.moe.balance=bias", "model.moe.balance_rate=0.01")
EXPERT_LAYOUTS = [
    layout_overrides(expert=4), *(layout_overrides(**{"expert": 2, axis: 2}) for axis in AXES),
    layout_overrides(shard=2, tensor=2), layout_overrides(shard=2, context=2),
]  # fmt: skip


def check_experts(
    ranks: int,
    job: tuple[str, ...],
    jobs: list[tuple[str, ...]],
    folder: Path,
    steps: int = FEW_STEPS,
) -> None:
    parameter_rtol = 1e-4 if set(MOMENTUM_OVERRIDES) <= set(job) else 1e-3
    reference = launch(train_curves, str(folder), [job], steps, ranks=1)[0][0]
    assert reference.losses[-1] < reference.losses[0] - 0.3
    full_jobs = [(*job, *axes) for axes in jobs]
    all_curves = launch(train_curves, str(folder), full_jobs, steps, ranks=ranks)[0]
    for axes, result_curve in zip(jobs, all_curves, strict=True):
        print(axes)
        check_close(result_curve, reference, 1e-5, parameter_rtol)


@pytest.mark.parametrize("steps", [FEW_STEPS, pytest.param(STEPS, marks=pytest.mark.nightly)])
def test_experts_at_two(steps: int, tmp_path: Path) -> None:
    jobs = [layout_overrides(**{axis: 2}) for axis in (*AXES, "expert")]
    check_experts(2, (*MOE_OVERRIDES, *MOMENTUM_OVERRIDES), jobs, tmp_path, steps)


@pytest.mark.slow
@pytest.mark.parametrize("balance", [(), BIAS_OVERRIDES], ids=["loss", "bias"])
def test_experts_beside_every_axis(balance: tuple[str, ...], tmp_path: Path) -> None:
    check_experts(4, (*MOE_OVERRIDES, *MOMENTUM_OVERRIDES, *balance), EXPERT_LAYOUTS, tmp_path)
    if balance:  # once with muon, for which the balance makes no difference
        check_experts(4, (*MOE_OVERRIDES, *balance), EXPERT_LAYOUTS, tmp_path, 5)


MOVE_LAYOUTS = [
    layout_overrides(islands=4),
    layout_overrides(shard=4),
    layout_overrides(tensor=2, islands=2),
    layout_overrides(pipeline=2, shard=2),
    layout_overrides(context=2, tensor=2),
    layout_overrides(pipeline=2, tensor=2, schedule="zero_bubble"),
    layout_overrides(shard=2, context=2),
    layout_overrides(islands=2, pipeline=2),
]


@pytest.mark.slow
def test_experts_move_between_layouts(tmp_path: Path) -> None:
    layouts = [
        layout_overrides(expert=4),
        layout_overrides(expert=2, shard=2),
        layout_overrides(tensor=2, pipeline=2),
    ]
    job = (*MOE_OVERRIDES, *BIAS_OVERRIDES)
    pairs = [((*job, *a), (*job, *b)) for a, b in itertools.permutations(layouts, 2)]
    for reference_losses, resumed_losses in launch(resume_pairs, str(tmp_path), pairs, ranks=4)[0]:
        assert resumed_losses == pytest.approx(reference_losses, rel=1e-6)


@pytest.mark.slow
def test_checkpoints_move_between_layouts(tmp_path: Path) -> None:
    ring_pairs = [*zip(MOVE_LAYOUTS, MOVE_LAYOUTS[1:] + MOVE_LAYOUTS[:1], strict=True)]
    across_pairs = [(MOVE_LAYOUTS[i], MOVE_LAYOUTS[i - 3]) for i in range(0, len(MOVE_LAYOUTS), 2)]
    pairs = [((*DENSE, *a), (*DENSE, *b)) for a, b in ring_pairs + across_pairs]
    results = launch(resume_pairs, str(tmp_path), pairs, ranks=4)[0]
    assert len(results) >= 12
    for (a, b), (reference_losses, resumed_losses) in zip(
        ring_pairs + across_pairs, results, strict=True
    ):
        print(a, b)
        assert resumed_losses == pytest.approx(reference_losses, rel=1e-6)


def write_golden_curve() -> None:
    """Writes the golden curve anew: `python -m tests.metal.test_layouts`."""
    result_curve = launch(train_curves, tempfile.mkdtemp(), [DENSE], STEPS, ranks=1)[0][0]
    text = json.dumps({"losses": result_curve.losses, "norms": result_curve.norms}, indent=1)
    (GOLDEN / "curve_dense.json").write_text(text + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_golden_curve()
