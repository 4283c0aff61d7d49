"""What tests share: a small run that trains in a second, and the command line as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from cordee.launcher.run_ranks import PRELOAD_MODULES
from cordee.layout.slices import Box, full_box

PRELOAD_MODULES += [
    "torch.distributed.fsdp", "torch.distributed.pipelining", "hypothesis", "pytest",
    "tests.metal.layouts",
]  # fmt: skip
# Worlds of `launch` are forks of one process that has all this: imported once, not in each rank.

os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / f"cordee-tests-{os.getuid()}")
# The machine profile of tests is not the user's: a probe beside other tests is a poor one.

settings.register_profile("house", deadline=None)
settings.load_profile("house")
# A busy machine is no fault of what is tested.

SMALL = (
    "model.layers=1",
    "model.width=64",
    "model.heads=4",
    "data.path=builtin:markov",
    "data.tokens=60000",
    "data.sequence=32",
    "batch.microbatch=2",
    "batch.microbatches=12",
    "evaluate.tokens=2048",
    "launch.threads=1",
    "run.precision=fp32",
    "fault.spares=0",
    "launch.probe=false",
    "run.arithmetic=native",
)
"""A model and a source small enough to train 60 steps in about a second. fp32: every processor has
it, and bf16 without instructions for it is thirty times as slow. Native arithmetic: a test may
compare a run of its own process, which has imported torch, with one of another. No spare: each is
an import of torch; runs that are disturbed (`drills/live.py`) have one."""


TINY = ("model.layers=1", "model.width=32", "data.sequence=16", "batch.microbatches=4")
"""Smaller still: for what is emulated (bf16, fp16), and for runs of very many steps."""


def run_cordee(
    *words: str, folder: Path | None = None, deadline_s: float = 400.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, as a user's shell would start it."""
    return subprocess.run(
        [sys.executable, "-m", "cordee", *words],
        cwd=folder,
        env={**clean_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=deadline_s,
    )


def clean_environment() -> dict[str, str]:
    """The environment without a launcher's variables, with the package importable anywhere."""
    root = str(Path(__file__).resolve().parent.parent)
    variables = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return {**variables, "PYTHONPATH": root}


def train_small(
    directory: Path, *words: str, deadline_s: float = 400.0
) -> subprocess.CompletedProcess[str]:
    """`cordee train` of the small run in `directory`; must succeed."""
    result = run_cordee("train", *SMALL, f"run.dir={directory}", *words, deadline_s=deadline_s)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def wait_for_step(folder: Path, step: int, deadline_s: float = 120.0) -> int:
    """Until the run has made that step; returns the step it has made."""
    end_s, path = time.monotonic() + deadline_s, folder / "metrics.jsonl"
    while time.monotonic() < end_s:
        count = path.read_bytes().count(b"\n") if path.exists() else 0
        if count >= step:
            return count
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not made")


def read_rows(directory: Path) -> list[dict[str, object]]:
    """The run's metrics rows."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_events(directory: Path) -> list[dict[str, object]]:
    """The run's events."""
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def weights_digest(directory: Path) -> str:
    """weights_sha256 of a finished run."""
    last_event = read_events(directory)[-1]
    assert last_event["event"] == "finished", last_event
    return str(last_event["weights_sha256"])


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """Any box of a tensor, empty ones too."""
    pairs = [sorted(draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
    return tuple((start, stop) for start, stop in pairs)


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that tile a tensor, cut one by one in any place; some may be empty or come twice."""
    tiles = [full_box(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = tiles.pop(draw(st.integers(0, len(tiles) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        start, stop = box[dim]
        cut_index = draw(st.integers(start, stop))
        tiles += [
            (*box[:dim], part, *box[dim + 1 :]) for part in ((start, cut_index), (cut_index, stop))
        ]
    return tiles


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder for one run."""
    return tmp_path / "run"


FOLDER_ORDER = ("paper", "test_house_rules.py", "metal", "gpu", "drills")
"""Fast tests first: what fails in a second should not wait for what takes minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by room; the order inside a room stays."""
    tests_dir = Path(__file__).parent
    items.sort(key=lambda item: FOLDER_ORDER.index(item.path.relative_to(tests_dir).parts[0]))
