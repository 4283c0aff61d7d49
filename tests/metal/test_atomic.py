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

from cordee.begin import lay_out_data, settle
from cordee.build import RunState, build
from cordee.config.load import load
from cordee.data.samples import describe_samples
from cordee.desk import Desk
from cordee.dist.start import World
from cordee.fault.leave import Asked
from cordee.optim.scale import GOOD_STEPS
from cordee.parts import Parts
from cordee.plan.cluster import local_cluster
from cordee.plan.plan import make_plan
from cordee.testing import launch
from cordee.train import step
from tests.conftest import SMALL
from tests.metal import test_brought as brought

CUT = 3
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
    "fp16, dropped": ((*FP16, f"fault.poison={CUT}:0"), 2),
    "dropped": ((f"fault.poison={CUT}:0",), 4),
    "a model with a norm": ((), 2),
    "a model with a norm, dropped": ((f"fault.poison={CUT}:0",), 4),
}
ENDS = {"fp16": (2.0**17, 2), "fp16, dropped": (2.0**15, 2)}
"""Loss scale and good steps at the end, where they move."""


class Cut(Exception):
    """What a collective raises whose other end is gone."""


class Cutting(TorchDispatchMode):
    """Lets a number of collectives pass, and raises at the one after them."""

    def __init__(self, passing: int) -> None:
        super().__init__()
        self.seen = 0
        self._passing = passing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation comes by."""
        if func.namespace == "c10d":
            if self.seen == self._passing:
                raise Cut
            self.seen += 1
        return func(*args, **(kwargs or {}))


def live(world: World, name: str, folder: Path, layout: tuple[str, ...] = ()) -> RunState:
    """A fresh run of a case; every rank has a folder of its own."""
    words = (*CASES[name][0], *layout, f"run.dir={folder}")
    given = Parts()
    if name.startswith("a model with a norm"):
        given = Parts(**brought.parts("batch"))
        run = settle(brought.run_of(folder, "run.exact=false", *words))
        assert given.data is not None
        data = describe_samples(given.data, 0)
    else:
        run = settle(load(None, (*SMALL, *TINY, *words)).run)
        data = lay_out_data(run)
    plan = make_plan(run, local_cluster(), data.vocabulary, world.size)
    state = build(run, plan, world, data, given)
    state.scale.good_steps = GOOD_STEPS - CUT  # it would double with the interrupted step
    return state


def told(state: RunState) -> dict[str, Any]:
    """What survives, in copies."""
    tensors = {**state.tensors, **state.optimizer.tensors()}
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "scale": (state.scale.value, state.scale.good_steps),
        "in a row": state.guard.in_a_row,
        "step": (state.progress.step, state.progress.tokens, state.progress.skipped),
        "sync": state.sync.state(),
    }


def check_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the bit."""
    assert {**one, "tensors": 0} == {**other, "tensors": 0}
    for name, tensor in one["tensors"].items():
        assert _bits(tensor).equal(_bits(other["tensors"][name])), name


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def interrupt(state: RunState, desk: Desk) -> int:
    """Interrupts a step at each of its collectives until it passes; how many it has."""
    before = told(state)
    for passing in range(200):
        try:
            with Cutting(passing):
                step(state, desk)
        except Cut:
            check_same(before, told(state))
        else:
            return passing
    raise AssertionError("a step without an end")


def interrupted(
    world: World, folder: str, names: list[str], layout: tuple[str, ...] = (), again: bool = True
) -> list[int]:
    """Each case undisturbed, and with one step interrupted: the same (unless the step cannot be
    done `again` in place). How many collectives that step has."""
    torch.set_num_threads(1)
    counts: list[int] = []
    for place, name in enumerate(names):
        found = []
        for disturbed in (False, True):
            home = Path(folder) / f"{place}-{disturbed}-{world.rank}"
            state = live(world, name, home, layout)
            desk = Desk(state, Asked())
            for _ in range(1, CUT):
                step(state, desk)
            before = told(state)["tensors"]
            if disturbed:
                counts.append(interrupt(state, desk))
            else:
                step(state, desk)
            if "dropped" in name:
                check_same({"tensors": before}, {"tensors": told(state)["tensors"]})
            for _ in range(2):
                step(state, desk)
            found.append(told(state))
            desk.close()
        if again:
            check_same(*found)
        assert found[0]["scale"] == ENDS.get(name, (1.0, GOOD_STEPS - CUT))
        assert found[0]["step"][2] == ("dropped" in name)
    return counts


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_that_is_interrupted_did_not_happen(ranks: int, tmp_path: Path) -> None:
    names = list(CASES)[:: ranks - 1]
    for counts in launch(interrupted, str(tmp_path), names, ranks=ranks):
        assert dict(zip(names, counts, strict=True)) == {n: CASES[n][1] for n in names}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "shard"])
def test_nor_where_an_island_is_cut(axis: str, tmp_path: Path) -> None:
    """FSDP2 keeps what it was doing when it was interrupted: its modules are made anew for a second
    try, which is not here."""
    names, layout = ["muon", "adamw"], (f"layout.{axis}=2", "batch.microbatches=2")
    again = axis == "tensor"
    muon, adamw = launch(interrupted, str(tmp_path), names, layout, again, ranks=2)[0]
    # Parts of matrices to who computes them, and back.
    assert muon == adamw + 2 if again else muon > adamw > 0
