"""What a word means as a run: a run's folder or one of its checkpoints; and where an output may be
written: a place that is free, or holds what the same verb wrote before.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cordee.config.load import RUN_FILE, load
from cordee.config.paths import make_temporary_path
from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.report.reader import read_records

RECORD_FILES = (RUN_FILE, "metrics.jsonl", "events.jsonl")
"""A folder that holds one of these is a run's."""


def find_run(verb: str, word: str | None) -> Path:
    """A run's folder: a path, or a name under runs/; ConfigError names the nearest that exists."""
    for folder in (Path(word), Path("runs") / word) if word else ():
        if is_run(folder):
            return folder
    nearest = nearest_run(word)
    if word is None:
        message, values = "which run?", {}
    elif Path(word).is_dir():
        message, values = (
            "that folder holds no run",
            {"RUN": word, "looked for": " ".join(RECORD_FILES)},
        )
    else:
        message, values = "there is no such run", {"RUN": word}
    fix = f"cordee {verb} {nearest}" if nearest else "cordee train, which writes runs/tiny"
    raise ConfigError(message, values=values, fix=fix)


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run's records."""
    return any((folder / name).is_file() for name in RECORD_FILES)


def nearest_run(word: str | None) -> Path | None:
    """The run whose name is most like it, among its neighbours and in runs/; else the newest."""
    target = Path(word or "runs")
    folders = [target.parent, Path("runs"), target]
    run_dirs = [f for p in folders if p.is_dir() for f in sorted(p.iterdir()) if is_run(f)]
    if not run_dirs:
        return None
    if word is not None:
        by_name = {folder.name: folder for folder in reversed(run_dirs)}
        close_matches = difflib.get_close_matches(target.name, list(by_name), n=1, cutoff=0.4)
        if close_matches:
            return by_name[close_matches[0]]
    return max(run_dirs, key=lambda folder: folder.stat().st_mtime)


def load_run(verb: str, word: str | None) -> tuple[Path, Run]:
    """The folder and what was run there; ConfigError when its settings are gone."""
    folder = find_run(verb, word)
    if not (folder / RUN_FILE).is_file():
        raise ConfigError(
            f"the run's {RUN_FILE} is gone",
            values={"RUN": str(folder)},
            fix=f"put {RUN_FILE} back, or cordee report {folder}, which needs the records only",
        )
    return folder, load(str(folder / RUN_FILE)).run


def refuse_user_model(verb: str, folder: Path) -> None:
    """ConfigError when the run's model came from a caller: its code is not in the folder."""
    events = read_records(folder / "events.jsonl")
    model_name = next((e["brought"] for e in events if e.get("brought")), "")
    if model_name:
        raise ConfigError(
            f"cordee {verb} cannot build a model that a program brought",
            values={"RUN": str(folder), "model": model_name},
            fix=f"cordee export {folder}, which writes its weights by the module's own names",
        )


def checkpoint_folder(verb: str, word: str | None) -> Path:
    """A checkpoint's own folder when `word` is one, else the run's `checkpoints`."""
    if word and Path(word).name.startswith("step-") and Path(word).is_dir():
        return Path(word)
    return find_run(verb, word) / "checkpoints"


def refuse_overwrite(
    target: Path, flag: str, is_own: Callable[[Path], bool], fix: str = ""
) -> None:
    """ConfigError when `target` is there and is not, as `is_own` says, what the verb writes."""
    with suppress(OSError):
        if not os.path.lexists(target) or (target.is_file() and is_own(target)):
            return
    number = 2
    while os.path.lexists(free_path := target.parent / f"{target.stem}-{number}{target.suffix}"):
        number += 1
    raise ConfigError(
        "there is something else at the place of the output, and it is not replaced",
        values={flag: str(target), "there": "a folder" if target.is_dir() else "another file"},
        fix=fix or f"{flag} {free_path}, or move it away",
    )


@contextmanager
def atomic_write(target: Path, flag: str) -> Iterator[Path]:
    """A free name beside `target` to write to, which then becomes `target` (of a link, the file
    that it names); removed when that fails. ConfigError: it cannot be written there."""
    target = Path(os.path.realpath(target))
    temporary_path = make_temporary_path(target)
    try:
        yield temporary_path
        os.replace(temporary_path, target)
    except OSError as error:
        raise ConfigError(
            f"the output cannot be written: {error.strerror or error}",
            values={flag: str(target)},
            fix=f"{flag} PATH, in a folder that you may write to, on a disk with room",
        ) from error
    finally:
        temporary_path.unlink(missing_ok=True)
