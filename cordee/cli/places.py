"""Finds what a word on the command line means: a run's folder or one of its checkpoints.

Not here: what is in them. A run is found while it lives, when it ended and after it was killed.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from cordee.config.load import RUN_FILE, load
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
