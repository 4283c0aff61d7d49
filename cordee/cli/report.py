"""`cordee report RUN`: a run's folder as one page that can be mailed, and as one JSON object.

Not here: what the page says (`metrics/report.py`) and how it looks (`metrics/page.py`). It reads
files only, so that it works on a run that lives, ended or was killed, and on a login node.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cordee.cli.arguments import parser, read, say
from cordee.cli.places import find_run, refuse_other, replacing
from cordee.config.paths import home
from cordee.errors import ConfigError
from cordee.metrics.page import TITLE_END, page
from cordee.metrics.records import read_run
from cordee.metrics.report import summarise


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
    words = read(made, argv, rest=1, settings=())
    folder = find_run("report", words.run)
    target = Path(home(words.flags.output)) if words.flags.output else folder / "report.html"
    if not target.parent.is_dir() or target.is_dir():
        raise ConfigError(
            "the page cannot be written there",
            values={"--output": str(target)},
            fix=f"--output {folder / 'report.html'}",
        )
    refuse_other(target, "--output", _is_report)
    records = read_run(folder)
    summary = summarise(records)
    with replacing(target, "--output") as beside:
        # A file's name may hold bytes that are no text.
        beside.write_bytes(page(records, summary).encode(errors="backslashreplace"))
    say(f"{summary.verdict}\nwrote {target}")
    if words.flags.json:
        print(json.dumps(asdict(summary) | {"report": str(target)}))
    return 0


def _is_report(target: Path) -> bool:
    """Whether a file is one of these pages, by its head."""
    with open(target, "rb") as stream:
        return TITLE_END.encode() in stream.read(4096)
