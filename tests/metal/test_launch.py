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

from cordee.dist.process_group import WAIT_VARIABLES, LaunchInfo, join_process_group
from cordee.errors import ConfigError, RunError
from cordee.launcher import run_ranks
from cordee.launcher.run_ranks import RankProcess, launch
from tests.conftest import SMALL, clean_environment
from tests.drills.hosts import all_exit_within, is_process_alive

LATE_MODULES = (
    "torch._dynamo", "sympy", "torch.distributed.tensor", "torch.distributed.fsdp",
    "torch.distributed.pipelining",
)  # fmt: skip
"""What only shards, stages or compiled blocks need: 1.4 of a start's 3.3 s of processor time."""


def describe_rank(process: RankProcess, word: str) -> tuple[int, int, str]:
    """What a rank knows."""
    return process.rank, process.size, word


def fail_on_rank_one(process: RankProcess) -> None:
    """The second rank fails, the first waits for it."""
    if process.rank == 1:
        raise ValueError("the second rank fails")
    time.sleep(600)


def sleep_forever(process: RankProcess, folder: str) -> None:
    """Says its pid, and stays."""
    (Path(folder) / f"{process.rank}.pid").write_text(str(os.getpid()))
    time.sleep(600)


def test_every_rank_knows_its_place() -> None:
    for _ in range(2):
        assert launch(describe_rank, "here", ranks=3) == [(rank, 3, "here") for rank in range(3)]


def test_the_first_to_fail_ends_all_and_is_what_is_raised() -> None:
    with pytest.raises(RunError, match="the second rank fails"):
        launch(fail_on_rank_one, ranks=2)


def test_a_deadline_names_who_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="did not end before the deadline"):
        launch(sleep_forever, str(tmp_path), ranks=2, deadline_s=3)


def test_no_rank_outlives_who_launched_it(tmp_path: Path) -> None:
    code = (
        "import sys; from cordee.launcher.run_ranks import launch;"
        " from tests.metal.test_launch import sleep_forever; launch(sleep_forever,"
        " sys.argv[1], ranks=2)"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=clean_environment(), cwd=root
    )
    deadline = time.monotonic() + 120
    while len(files := [p for p in tmp_path.glob("*.pid") if p.stat().st_size]) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    rank_pids = [int(path.read_text()) for path in files]
    assert all(map(is_process_alive, rank_pids))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all_exit_within(rank_pids, 60), f"orphans among {rank_pids}"


def test_threads_of_the_command_sleep_while_they_wait() -> None:
    """OpenMP's own word, as it was when torch came in; the user's word stays."""
    code = (
        "import atexit; from cordee.cli.main import program;"
        " atexit.register(lambda: __import__('torch')); program()"
    )
    for variables, spin_count in (({}, "0"), ({"GOMP_SPINCOUNT": "77"}, "77")):
        environment = {k: v for k, v in clean_environment().items() if k not in WAIT_VARIABLES}
        result = subprocess.run(
            [sys.executable, "-c", code, "--version"], capture_output=True, text=True, timeout=120,
            env={**environment, **variables, "OMP_DISPLAY_ENV": "verbose"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        if "GOMP_SPINCOUNT" not in result.stderr:
            pytest.skip("this torch has another OpenMP than libgomp")
        assert f"GOMP_SPINCOUNT = '{spin_count}'" in result.stderr


def test_a_world_whose_ranks_do_not_meet_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been called by then; after the third time it is said."""
    real_world, failures_left = run_ranks._run_world, [2]

    def fail_at_first(*arguments: Any) -> list[Any]:
        if failures_left[0]:
            failures_left[0] -= 1
            raise run_ranks._ConnectError("rank 0 failed first: Gloo connectFullMesh failed")
        return real_world(*arguments)

    monkeypatch.setattr(run_ranks, "_run_world", fail_at_first)
    assert launch(get_rank, ranks=2) == [0, 1]
    failures_left[0] = 3
    with pytest.raises(RunError, match="connectFullMesh"):
        launch(get_rank, ranks=2)


def get_rank(process: RankProcess) -> int:
    return process.rank


@pytest.mark.parametrize(
    ("overrides", "needed_modules"),
    [
        ((), ()),
        (("optim.name=adamw", "run.exact=true"), ()),
        (("run.compile=blocks",), LATE_MODULES[:2]),
    ],
    ids=["muon", "exact", "compiled"],
)
def test_a_run_imports_what_its_plan_needs(
    overrides: tuple[str, ...], needed_modules: tuple[str, ...], run_dir: Path
) -> None:
    code = (
        "import sys, cordee; cordee.train(cordee.load(None, sys.argv[1:]).run);"
        f" print(*[name for name in {LATE_MODULES} if name in sys.modules])"
    )
    arguments = (*SMALL, *overrides, "run.steps=2", "launch.processes=1", f"run.dir={run_dir}")
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=clean_environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    loaded_modules = result.stdout.split()
    assert (
        loaded_modules == [] if not needed_modules else set(needed_modules) <= set(loaded_modules)
    )


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps"])
def test_a_device_that_torch_does_not_have_is_said_when_a_rank_starts(device: str) -> None:
    """The planner only knows what the kernel shows."""
    launch_info = LaunchInfo(local_rank=99)
    with (
        pytest.raises(ConfigError, match=f"no device {device}:99") as error_info,
        join_process_group(launch_info, device, threads=1, timeout_s=60),
    ):
        raise AssertionError("such a rank has begun")
    assert error_info.value.fix is not None and "launch.device=cpu" in error_info.value.fix
