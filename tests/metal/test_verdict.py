"""What ranks do with a step is one decision: also when one of them holds another gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cordee.begin import lay_out_data, settle
from cordee.build import RunState, build
from cordee.checkpoint.fingerprint import weights_sha256
from cordee.config.load import load
from cordee.desk import Desk
from cordee.dist.start import World
from cordee.fault.guard import odd_ranks
from cordee.fault.inject import Drill
from cordee.fault.leave import Asked
from cordee.metrics.sinks import read_lines
from cordee.parts import Parts
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan
from cordee.testing import launch
from cordee.train import step, whole
from tests.conftest import SMALL, TINY

NAN, INF = math.nan, math.inf
SICK_STEP = 3

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "twice as long": lambda norm: 2 * norm,
    "not a number": lambda norm: norm * NAN,
    "infinite": lambda norm: norm * INF,
    "one bit": lambda norm: torch.nextafter(norm, norm * 2),
}


@pytest.mark.parametrize(
    ("norms", "tolerance", "odd"),
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
def test_who_differs(norms: tuple[float, ...], tolerance: float, odd: list[int]) -> None:
    assert odd_ranks(norms, tolerance) == odd


def steps(world: World, folder: str, wrong: str, times: int, exact: bool) -> dict[str, Any]:
    """Five steps, in which rank 1 takes the norm for something else `times` times."""
    torch.set_num_threads(1)
    home = f"run.dir={folder}/{world.rank}"
    words = (*SMALL, *TINY, home, "run.steps=100", f"run.exact={str(exact).lower()}")
    run = settle(load(None, words).run)
    data = lay_out_data(run)
    plan = make_plan(run, local_cluster(), data.vocabulary, world.size)
    state = build(run, plan, world, data, Parts())
    desk, left = Desk(state, Asked()), [times if world.rank == 1 else 0]
    honest, spoil = RunState.norm, Drill.spoil

    def spoiled(self: Drill, gradients: Any, number: int) -> None:
        if wrong == "its own sum" and number == SICK_STEP and left[0]:
            left[0] -= 1
            gradients[0].view(-1)[0] = NAN

    def norm(self: RunState, gradients: Any) -> Tensor:
        right = honest(self, gradients)
        if self.progress.step + 1 != SICK_STEP or not left[0] or wrong not in WRONG:
            return right
        left[0] -= 1
        return WRONG[wrong](right)

    RunState.norm, Drill.spoil = norm, spoiled  # type: ignore[method-assign]
    try:
        said = []
        for _ in range(5):
            outcome = step(state, desk)
            desk.record(state, outcome)
            said.append(outcome.verdict)
    finally:
        RunState.norm, Drill.spoil = honest, spoil  # type: ignore[method-assign]
        desk.close()
    return {
        "said": [(verdict.say, verdict.cause) for verdict in said],
        "weights": weights_sha256(state.specs, lambda name: whole(state, name)),
        "told": [e for e in read_lines(Path(run.run.dir) / "events.jsonl")
                 if e["event"].startswith("step_")],
        "skipped": state.progress.skipped, "in a row": state.guard.in_a_row,
        "events": [e for e in read_lines(Path(run.run.dir) / "events.jsonl")
                   if e["event"] == "ranks_differ"],
    }  # fmt: skip


def both(world: World, folder: str, exact: bool) -> dict[str, Any]:
    """Every wrong norm once and for good, and none."""
    names = (*WRONG, "its own sum")
    jobs = [("twice as long", 0), *((name, times) for name in names for times in (1, 2))]
    if not exact:
        jobs = [job for job in jobs if job[0] != "one bit"]
    return {f"{n} {t}": steps(world, f"{folder}/{n}-{t}", n, t, exact) for n, t in jobs}


def check_own(once: dict[str, Any], twice: dict[str, Any], clean: dict[str, Any]) -> None:
    """What is not finite is computed again; when it is so again, the rank is named that has it."""
    assert once["weights"] == clean["weights"] and not once["skipped"]
    assert [e["event"] for e in once["told"]] == ["step_repeated"]
    assert twice["skipped"] == 1 and not twice["events"]
    assert [e["event"] for e in twice["told"]] == ["step_repeated", "step_skipped"]
    assert twice["told"][1]["rank"] == 1 and twice["told"][1]["sick"] == [{"rank": 1}]


@pytest.mark.parametrize("exact", [True, False])
def test_all_do_the_same_and_say_who_differs(exact: bool, tmp_path: Path) -> None:
    one, other = launch(both, str(tmp_path), exact, ranks=2)
    clean = one.pop("twice as long 0")
    other.pop("twice as long 0")
    assert not clean["events"] and clean["skipped"] == 0
    check_own(one.pop("its own sum 1"), one.pop("its own sum 2"), clean)
    for job, found in one.items():
        twin = other[job]
        for key in ("said", "weights", "skipped", "in a row"):
            assert found[key] == twin[key], (job, key)
        if job.endswith("1"):  # a passing fault costs nothing
            assert found["weights"] == clean["weights"] and found["skipped"] == 0, job
            assert [e["done"] for e in found["events"]] == ["the step is computed again"]
        else:
            assert found["skipped"] == 1 and found["weights"] != clean["weights"], job
            assert "different gradients" in found["said"][SICK_STEP - 1][1]
            assert len(found["events"]) == 2
        sick = [1] if job.startswith(("not", "inf")) else [0, 1]
        assert [who["rank"] for who in found["events"][0]["ranks"]] == sick, job
