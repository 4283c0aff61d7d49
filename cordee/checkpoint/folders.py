"""Which checkpoints a run's folder holds, by name alone.

PAPER: no torch; the process that launches ranks asks too. Not here: what is in them (`format.py`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
MAX_GENERATION = 10**15
"""No run was started so often: a larger number in a name is not counted on from."""
_FOLDER_NAME = re.compile(r"step-([0-9]{8,18})\.g([0-9]{1,18})")


@dataclass(frozen=True, kw_only=True)
class StepFolder:
    """A checkpoint folder as found; complete when it has a manifest, verified or not."""

    step: int
    generation: int
    path: Path
    is_complete: bool


def folder_name(step: int, generation: int) -> str:
    """`step-00000020.g3`; a generation never writes where another one wrote."""
    return f"step-{step:08d}.g{generation}"


def scan_step_folders(folder: Path) -> list[StepFolder]:
    """Checkpoint folders, newest (step, generation) first; links are not followed. OSError."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _FOLDER_NAME.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                path = folder / entry.name
                is_complete = os.path.lexists(path / MANIFEST)
                step, generation = int(match[1]), int(match[2])
                folders.append(
                    StepFolder(step=step, generation=generation, path=path, is_complete=is_complete)
                )
    return sorted(folders, key=lambda f: (f.step, f.generation), reverse=True)


def list_invalid_folders(folder: Path) -> list[tuple[int, int, Path, str]]:
    """(step, generation, path, reason) of what has a checkpoint's name and is none, newest first.
    OSError."""
    invalid_folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            match, path = _FOLDER_NAME.fullmatch(entry.name), folder / entry.name
            if not match:
                continue
            if entry.is_symlink():
                reason = "is a link, and links are not followed"
            elif not entry.is_dir(follow_symlinks=False):
                reason = "is not a folder"
            elif not os.path.lexists(path / MANIFEST):
                reason = f"has no {MANIFEST}: its save did not end, or the file is gone"
            else:
                continue
            invalid_folders.append((int(match[1]), int(match[2]), path, reason))
    return sorted(invalid_folders, reverse=True)


def list_generations(folder: Path) -> list[int]:
    """Generations that the names in a folder tell of, those of half a checkpoint too; none where
    there is no folder to list."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    numbers = [int(match[2]) for match in map(_FOLDER_NAME.fullmatch, names) if match]
    return [number for number in numbers if number <= MAX_GENERATION]
