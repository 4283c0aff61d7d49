"""Finds what a word on the command line means: a run's folder or one of its checkpoints; and where
a verb may write: a place that is free, or holds what this verb wrote before.

Not here: what is in them. A run is found while it lives, when it ended and after it was killed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cordee.config.load import RUN_FILE, load
from cordee.config.paths import free_name
from cordee.config.run import Run
from cordee.errors import ConfigError
from cordee.metrics.sinks import read_lines

RECORDS = (RUN_FILE, "metrics.jsonl", "events.jsonl")
"""A folder that holds one of these is a run's."""


def find_run(verb: str, word: str | None) -> Path:
    """A run's folder: a path, or a name under runs/; ConfigError names the nearest that exists."""
    for folder in (Path(word), Path("runs") / word) if word else ():
        if is_run(folder):
            return folder
    near = nearest_run(word)
    if word is None:
        what, values = "which run?", {}
    elif Path(word).is_dir():
        what, values = "that folder holds no run", {"RUN": word, "looked for": " ".join(RECORDS)}
    else:
        what, values = "there is no such run", {"RUN": word}
    fix = f"cordee {verb} {near}" if near else "cordee train, which writes runs/tiny"
    raise ConfigError(what, values=values, fix=fix)


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run's records."""
    return any((folder / name).is_file() for name in RECORDS)


def nearest_run(word: str | None) -> Path | None:
    """The run whose name is most like it, among its neighbours and in runs/; else the newest."""
    wanted = Path(word or "runs")
    places = [wanted.parent, Path("runs"), wanted]
    found = [f for p in places if p.is_dir() for f in sorted(p.iterdir()) if is_run(f)]
    if not found:
        return None
    if word is not None:
        by_name = {folder.name: folder for folder in reversed(found)}
        close = difflib.get_close_matches(wanted.name, list(by_name), n=1, cutoff=0.4)
        if close:
            return by_name[close[0]]
    return max(found, key=lambda folder: folder.stat().st_mtime)


def run_of(verb: str, word: str | None) -> tuple[Path, Run]:
    """The folder and what was run there; ConfigError when its settings are gone."""
    folder = find_run(verb, word)
    if not (folder / RUN_FILE).is_file():
        raise ConfigError(
            f"the run's {RUN_FILE} is gone",
            values={"RUN": str(folder)},
            fix=f"put {RUN_FILE} back, or cordee report {folder}, which needs the records only",
        )
    return folder, load(str(folder / RUN_FILE)).run


def refuse_brought(verb: str, folder: Path) -> None:
    """ConfigError when the run's model came from a caller: its code is not in the folder."""
    events = read_lines(folder / "events.jsonl")
    brought = next((e["brought"] for e in events if e.get("brought")), "")
    if brought:
        raise ConfigError(
            f"cordee {verb} cannot build a model that a program brought",
            values={"RUN": str(folder), "model": brought},
            fix=f"cordee export {folder}, which writes its weights by the module's own names",
        )


def checkpoint_folder(verb: str, word: str | None) -> Path:
    """A checkpoint's own folder when `word` is one, else the run's `checkpoints`."""
    if word and Path(word).name.startswith("step-") and Path(word).is_dir():
        return Path(word)
    return find_run(verb, word) / "checkpoints"


def refuse_other(target: Path, flag: str, is_own: Callable[[Path], bool], fix: str = "") -> None:
    """ConfigError when `target` is there and is not, as `is_own` says, what the verb writes."""
    with suppress(OSError):
        if not os.path.lexists(target) or (target.is_file() and is_own(target)):
            return
    number = 2
    while os.path.lexists(free := target.parent / f"{target.stem}-{number}{target.suffix}"):
        number += 1
    raise ConfigError(
        "there is something else at the place of the output, and it is not replaced",
        values={flag: str(target), "there": "a folder" if target.is_dir() else "another file"},
        fix=fix or f"{flag} {free}, or move it away",
    )


@contextmanager
def replacing(target: Path, flag: str) -> Iterator[Path]:
    """A free name beside `target` to write to, which then becomes `target` (of a link, the file
    that it names); removed when that fails. ConfigError: it cannot be written there."""
    target = Path(os.path.realpath(target))
    beside = free_name(target)
    try:
        yield beside
        os.replace(beside, target)
    except OSError as error:
        raise ConfigError(
            f"the output cannot be written: {error.strerror or error}",
            values={flag: str(target)},
            fix=f"{flag} PATH, in a folder that you may write to, on a disk with room",
        ) from error
    finally:
        beside.unlink(missing_ok=True)
