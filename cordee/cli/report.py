"""`cordee report RUN`: a run's folder as one page that can be mailed, and as one JSON object.

It reads files only, so that it works on a run that lives, ended or was killed, and on a login node.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cordee.cli.arguments import make_parser, parse_arguments
from cordee.config.paths import expand_home
from cordee.dist.streams import print_to_stderr
from cordee.errors import ConfigError
from cordee.launcher.run_paths import atomic_write, find_run, refuse_overwrite
from cordee.report.html import TITLE_SUFFIX, report_page
from cordee.report.reader import read_run
from cordee.report.summary import summarise


def run(argv: Sequence[str]) -> int:
    """Writes the page; returns the exit code. ConfigError when there is no such run."""
    arg_parser = make_parser(
        "report",
        "Writes what a run's folder says as one HTML file that needs nothing else.",
        "cordee report runs/tiny --output report.html",
        "RUN [--output FILE] [--json]",
    )
    arg_parser.add_argument(
        "--output", metavar="FILE", help="where to write it (default RUN/report.html)"
    )
    arg_parser.add_argument(
        "--json", action="store_true", help="print the summary as one JSON object"
    )
    args = parse_arguments(arg_parser, argv, max_positionals=1, sections=())
    folder = find_run("report", args.run_word)
    target = Path(expand_home(args.flags.output)) if args.flags.output else folder / "report.html"
    if not target.parent.is_dir() or target.is_dir():
        raise ConfigError(
            "the page cannot be written there",
            values={"--output": str(target)},
            fix=f"--output {folder / 'report.html'}",
        )
    refuse_overwrite(target, "--output", _is_report)
    records = read_run(folder)
    summary = summarise(records)
    with atomic_write(target, "--output") as temporary_path:
        # A file's name may hold bytes that are no text.
        temporary_path.write_bytes(report_page(records, summary).encode(errors="backslashreplace"))
    print_to_stderr(f"{summary.verdict}\nwrote {target}")
    if args.flags.json:
        print(json.dumps(asdict(summary) | {"report": str(target)}))
    return 0


def _is_report(target: Path) -> bool:
    """Whether a file is one of these pages, by its head."""
    with open(target, "rb") as stream:
        return TITLE_SUFFIX.encode() in stream.read(4096)
