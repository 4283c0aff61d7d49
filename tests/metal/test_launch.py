"""Ranks of `launch`: what they see, whose they are; and what a run imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cordee import testing
from cordee.dist.start import WAITING, Launched, world
from cordee.errors import ConfigError, RunError
from cordee.testing import World, launch
from tests.conftest import SMALL, clean_environment
from tests.drills.hosts import alive, gone_within

LATE = (
    "torch._dynamo", "sympy", "torch.distributed.tensor", "torch.distributed.fsdp",
    "torch.distributed.pipelining",
)  # fmt: skip
"""What only shards, stages or compiled blocks need: 1.4 of a start's 3.3 s of processor time."""


def seen(world: World, word: str) -> tuple[int, int, str]:
    """What a rank knows."""
    return world.rank, world.size, word


def failing(world: World) -> None:
    """The second rank fails, the first waits for it."""
    if world.rank == 1:
        raise ValueError("the second rank fails")
    time.sleep(600)


def sleeping(world: World, folder: str) -> None:
    """Says its pid, and stays."""
    (Path(folder) / f"{world.rank}.pid").write_text(str(os.getpid()))
    time.sleep(600)


def test_every_rank_knows_its_place() -> None:
    for _ in range(2):
        assert launch(seen, "here", ranks=3) == [(rank, 3, "here") for rank in range(3)]


def test_the_first_to_fail_ends_all_and_is_what_is_raised() -> None:
    with pytest.raises(RunError, match="the second rank fails"):
        launch(failing, ranks=2)


def test_a_deadline_names_who_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did not end before the deadline"):
        launch(sleeping, str(tmp_path), ranks=2, deadline_s=3)


def test_no_rank_outlives_who_launched_it(tmp_path: Path) -> None:
    code = (
        "import sys; from cordee.testing import launch;"
        " from tests.metal.test_launch import sleeping; launch(sleeping, sys.argv[1], ranks=2)"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=clean_environment(), cwd=root
    )
    end = time.monotonic() + 120
    while len(files := [p for p in tmp_path.glob("*.pid") if p.stat().st_size]) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    ranks = [int(path.read_text()) for path in files]
    assert all(map(alive, ranks))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone_within(ranks, 60), f"orphans among {ranks}"


def test_threads_of_the_command_sleep_while_they_wait() -> None:
    """OpenMP's own word, as it was when torch came in; the user's word stays."""
    code = (
        "import atexit; from cordee.cli.main import program;"
        " atexit.register(lambda: __import__('torch')); program()"
    )
    for given, spins in (({}, "0"), ({"GOMP_SPINCOUNT": "77"}, "77")):
        plain = {k: v for k, v in clean_environment().items() if k not in WAITING}
        done = subprocess.run(
            [sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=120,
            env={**plain, **given, "OMP_DISPLAY_ENV": "verbose"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        if "GOMP_SPINCOUNT" not in done.stderr:
            pytest.skip("this torch has another OpenMP than libgomp")
        assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_a_world_whose_ranks_do_not_meet_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been called by then; after the third time it is said."""
    meets, failures = testing._world, [2]

    def fails_at_first(*arguments: Any) -> list[Any]:
        if failures[0]:
            failures[0] -= 1
            raise testing._NotMet("rank 0 failed first: Gloo connectFullMesh failed")
        return meets(*arguments)

    monkeypatch.setattr(testing, "_world", fails_at_first)
    assert launch(rank_of, ranks=2) == [0, 1]
    failures[0] = 3
    with pytest.raises(RunError, match="connectFullMesh"):
        launch(rank_of, ranks=2)


def rank_of(world: World) -> int:
    return world.rank


@pytest.mark.parametrize(
    ("words", "needed"),
    [((), ()), (("optim.name=adamw", "run.exact=true"), ()), (("run.compile=blocks",), LATE[:2])],
    ids=["muon", "exact", "compiled"],
)
def test_a_run_imports_what_its_plan_needs(
    words: tuple[str, ...], needed: tuple[str, ...], run_dir: Path
) -> None:
    code = (
        "import sys, cordee; cordee.train(cordee.load(None, sys.argv[1:]).run);"
        f" print(*[name for name in {LATE} if name in sys.modules])"
    )
    given = (*SMALL, *words, "run.steps=2", "launch.processes=1", f"run.dir={run_dir}")
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        env=clean_environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = done.stdout.split()
    assert loaded == [] if not needed else set(needed) <= set(loaded)


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_a_device_that_torch_does_not_have_is_said_when_a_rank_starts(device: str) -> None:
    """The planner only knows what the kernel shows."""
    absent = Launched(local_rank=99)
    with (
        pytest.raises(ConfigError, match=f"no device {device}:99") as told,
        world(absent, device, threads=1, timeout_s=60),
    ):
        raise AssertionError("such a rank has begun")
    assert told.value.fix is not None and "launch.device=cpu" in told.value.fix
