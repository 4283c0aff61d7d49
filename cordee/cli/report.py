"""`cordee report RUN`: a run's folder as one page that can be mailed, and as one JSON object.

Not here: what the page says (`metrics/report.py`) and how it looks (`metrics/page.py`). It reads
files only, so that it works on a run that lives, ended or was killed, and on a login node.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cordee.cli.arguments import parser, read, say
from cordee.errors import ConfigError
from cordee.metrics.page import page
from cordee.metrics.report import read_run, summarise

RECORDS = ("metrics.jsonl", "events.jsonl", "run.toml")
"""A folder that holds one of these is a run's."""


def run(argv: Sequence[str]) -> int:
    """Writes the page; returns the exit code. ConfigError when there is no such run."""
    made = parser(
        "report",
        "Writes what a run's folder says as one HTML file that needs nothing else.",
        "cordee report runs/tiny --output report.html",
        "RUN [--output FILE] [--json]",
    )
    made.add_argument(
        "--output", metavar="FILE", help="where to write it (default RUN/report.html)"
    )
    made.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    words = read(made, argv, rest=1)
    if words.overrides or words.file:
        raise ConfigError(
            "a report has no settings",
            values={"word": words.file or words.overrides[0]},
            fix="cordee report RUN [--output FILE] [--json]",
        )
    folder = find_run(words.rest[0] if words.rest else None)
    target = Path(words.flags.output) if words.flags.output else folder / "report.html"
    if not target.parent.is_dir() or target.is_dir():
        raise ConfigError(
            "the page cannot be written there",
            values={"--output": str(target)},
            fix=f"--output {folder / 'report.html'}",
        )
    records = read_run(folder)
    summary = summarise(records)
    try:
        write_whole(target, page(records, summary).encode())
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written: {error.strerror}",
            values={"--output": str(target)},
            fix="--output FILE in a folder that you may write to",
        ) from error
    say(f"{summary.verdict}\nwrote {target}")
    if words.flags.json:
        print(json.dumps(asdict(summary) | {"report": str(target)}))
    return 0


def find_run(name: str | None) -> Path:
    """The run's folder; ConfigError names the nearest run that exists."""
    for folder in (Path(name), Path("runs") / name) if name else ():
        if is_run(folder):
            return folder
    near = nearest_run(name)
    if name is None:
        what, values = "which run?", {}
    elif Path(name).is_dir():
        what, values = "that folder holds no run", {"RUN": name, "looked for": " ".join(RECORDS)}
    else:
        what, values = "there is no such run", {"RUN": name}
    fix = f"cordee report {near}" if near else "cordee train, which writes runs/tiny"
    raise ConfigError(what, values=values, fix=fix)


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run's records."""
    return any((folder / name).is_file() for name in RECORDS)


def nearest_run(name: str | None) -> Path | None:
    """The run whose name is most like it, among its neighbours and in runs/; else the newest."""
    wanted = Path(name or "runs")
    places = [wanted.parent, Path("runs"), wanted]
    found = [f for p in places if p.is_dir() for f in sorted(p.iterdir()) if is_run(f)]
    if not found:
        return None
    if name is not None:
        by_name = {folder.name: folder for folder in reversed(found)}
        close = difflib.get_close_matches(wanted.name, list(by_name), n=1, cutoff=0.4)
        if close:
            return by_name[close[0]]
    return max(found, key=lambda folder: folder.stat().st_mtime)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is seen whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
