"""Finds what a word on the command line means: a run's folder or one of its checkpoints."""

from __future__ import annotations

import difflib
from pathlib import Path

from cordee.begin import RUN_FILE
from cordee.config.load import load
from cordee.config.run import Run
from cordee.errors import ConfigError


def run_folder(word: str) -> Path:
    """A run's folder: a path, or a name under runs/; ConfigError names the nearest run."""
    for folder in (Path(word), Path("runs") / word):
        if (folder / RUN_FILE).exists():
            return folder
    known = sorted(str(p.parent) for p in Path("runs").glob(f"*/{RUN_FILE}"))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.3) or known[:1]
    raise ConfigError(
        "there is no run in that folder",
        values={"run": word},
        fix=near[0] if near else "cordee train run.dir=" + word,
    )


def run_of(word: str) -> tuple[Path, Run]:
    """The folder and what was run there."""
    folder = run_folder(word)
    return folder, load(str(folder / RUN_FILE)).run


def checkpoint_folder(word: str) -> Path:
    """A checkpoint's own folder when `word` is one, else the run's `checkpoints`."""
    path = Path(word)
    if path.name.startswith("step-") and path.is_dir():
        return path
    return run_folder(word) / "checkpoints"
