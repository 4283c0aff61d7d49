"""`cordee lr`: a learning rate by experiment on this run's own data and model, as a band.

It sets nothing: it prints a table and the command that uses the rate, and ends with 1 when the
experiment cannot tell. All parts of the update rule are scaled together, so muon's command names
both its rates.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cordee.cli.arguments import ParsedArguments, check_flags, make_parser, parse_arguments
from cordee.config.paths import expand_home
from cordee.config.ranges import MAX_COUNT, Range
from cordee.config.run import Run
from cordee.dist.streams import print_to_stderr
from cordee.errors import ConfigError
from cordee.launcher.run_paths import refuse_overwrite
from cordee.optim.lr_search import LRSearchResult, LRSearchSettings, TrainFn, find_lr
from cordee.planner.recipe import resolve_for_machine
from cordee.report.charts import ChartSeries
from cordee.report.metrics_writer import without_non_finite, write_atomically
from cordee.report.summary import format_amount, format_seconds
from cordee.report.svg import Figure, svg_text

REPORT_EVERY_S = 10.0
"""Seconds between lines that say how far the search is."""
TITLE = "cordee lr"
"""How the title of every picture begins, by which a picture is known."""
BLUE, ORANGE, RED = "#2a66b0", "#c8602a", "#b5392f"


def run(argv: Sequence[str]) -> int:
    """Searches, prints and writes lr.json and lr.svg; 1 when nothing can be said."""
    defaults = LRSearchSettings(centre=1.0)
    arg_parser = make_parser(
        "lr",
        "Finds a learning rate by short experiments: a range test, then ever longer runs of ever\n"
        "fewer rates. A minute and a half for the default model on 2 cores. Sets nothing.",
        "cordee lr model.preset=small --steps 1500",
        "[CONFIG.toml] [key=value ...] [--steps N] [--seeds N] [--output FILE] [--json]",
    )
    arg_parser.add_argument(
        "--steps", type=int, default=defaults.steps, metavar="N",
        help=f"optimiser steps of all experiments together (default {defaults.steps})",
    )  # fmt: skip
    arg_parser.add_argument(
        "--seeds", type=int, default=defaults.seeds, metavar="N",
        help=f"runs of each rate (default {defaults.seeds})",
    )  # fmt: skip
    arg_parser.add_argument(
        "--output", metavar="FILE.svg", help="where to draw the picture (default lr.svg in run.dir)"
    )
    arg_parser.add_argument(
        "--json", action="store_true", help="print the finding as one JSON object"
    )
    args = parse_arguments(arg_parser, argv)
    check_flags(arg_parser, args.flags, {"steps": Range(1, MAX_COUNT), "seeds": Range(1, 1000)})
    picture = _picture_path(args.flags.output)
    from cordee.launcher.local_cluster import measure_cluster
    from cordee.launcher.prepare import read_vocabulary_size, resolve_config

    run_config = resolve_config(args.load().run)
    cluster, _ = measure_cluster(run_config.launch.probe)
    run_config, _ = resolve_for_machine(run_config, cluster, read_vocabulary_size(run_config))
    settings = LRSearchSettings(
        centre=run_config.optim.peak_lr,
        steps=args.flags.steps,
        seeds=args.flags.seeds,
        first_seed=run_config.run.seed,
    )
    settings.check()
    folder = Path(run_config.run.dir)
    picture = picture or folder / "lr.svg"
    _check_output_paths(folder / "lr.json", picture)
    print_line = _with_elapsed_time(print_to_stderr)
    result = find_lr(_make_sweep(run_config, settings.steps, print_line), settings, print_line)
    tokens = run_config.batch.microbatch * run_config.batch.microbatches * run_config.data.sequence
    write_result(result, folder, tokens, picture)
    command = train_command(result, run_config, args)
    if args.flags.json:
        print(json.dumps(to_json_dict(result, tokens) | {"command": command}, allow_nan=False))
    else:
        print(result_table(result, tokens))
        print(conclusion(result, command))
    print_to_stderr(f"wrote {folder / 'lr.json'} and {picture}")
    return 0 if result.conclusive else 1


def _picture_path(flag: str | None) -> Path | None:
    """What --output names; ConfigError, before anything is measured, when that is no SVG in a
    folder that exists."""
    if flag is None:
        return None
    path = Path(expand_home(flag))
    folder = path.parent if path.parent.is_dir() else Path()
    if path.suffix != ".svg" or path.parent != folder:
        raise ConfigError(
            "the picture is an SVG, in a folder that exists",
            values={"--output": flag},
            fix=f"--output {folder / (path.stem or 'lr')}.svg",
        )
    return path


def _check_output_paths(result_file: Path, picture: Path) -> None:
    """ConfigError when one of them is there and somebody's own."""
    refuse_overwrite(result_file, "file", _is_search_result, "run.dir=... another folder")
    refuse_overwrite(picture, "--output", lambda path: TITLE.encode() in path.read_bytes())


def _is_search_result(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"range_test", "conclusive"} <= document.keys()


def train_command(result: LRSearchResult, run: Run, args: ParsedArguments) -> str | None:
    """The command that trains with the suggestion; None when there is none."""
    if result.suggestion is None:
        return None
    other_overrides = [
        w for w in args.overrides if w.partition("=")[0] not in ("optim.lr", "optim.adam_lr")
    ]
    rates = [f"optim.lr={result.suggestion:.3g}"]
    if run.optim.rule.rule_of_others:
        adam_lr = run.optim.adam_lr * result.suggestion / run.optim.peak_lr
        rates.append(f"optim.adam_lr={adam_lr:.3g}")
    return " ".join(["cordee train", *([args.file] if args.file else []), *other_overrides, *rates])


def result_table(result: LRSearchResult, step_tokens: int) -> str:
    """A row for each rate: its loss after each length of run, and whether it is in the band."""
    lengths = sorted({steps for row in result.rows for steps in row.steps})
    headings = [f"{format_amount(steps * step_tokens)} tokens" for steps in lengths]
    cell_width = max([12, *map(len, headings)])
    lines = []
    if result.rows:
        lines.append(
            "learning rate  " + "  ".join(f"{heading:>{cell_width}}" for heading in headings)
        )
    for row in result.rows:
        by_steps = dict(zip(row.steps, row.losses, strict=True))
        cells = []
        for steps in lengths:
            loss = by_steps.get(steps)
            cell = "" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            cells.append(f"{cell:>{cell_width}}")
        is_in_band = result.band is not None and result.band[0] <= row.lr <= result.band[1]
        remark = "best" if row.lr == result.best else "in the band" if is_in_band else ""
        remark = "diverged" if row.diverged and "diverged" not in cells[-1] else remark
        lines.append(f"{row.lr:>13.3g}  {'  '.join(cells)}  {remark}".rstrip())
    return "\n".join(lines)


def conclusion(result: LRSearchResult, command: str | None) -> str:
    """The band, the suggestion and the command; or the reason why there is none."""
    cost_text = f"({result.steps_used} steps, noise of one loss {result.noise:.2g})"
    if not result.conclusive or result.band is None:
        return f"inconclusive: {result.reason} {cost_text}"
    max_steps = max(row.steps[-1] for row in result.rows)
    return "\n".join(
        [
            f"band        {result.band[0]:.3g} to {result.band[1]:.3g}  {cost_text}",
            f"suggestion  {result.suggestion:.3g}  (seen over {max_steps} steps; a much longer run"
            " rather wants the lower end)",
            f"use it      {command}",
        ]
    )


def to_json_dict(result: LRSearchResult, step_tokens: int) -> dict[str, Any]:
    """The finding as JSON can hold it: what is not finite is null."""
    return {**without_non_finite(asdict(result)), "step_tokens": step_tokens}


def write_result(
    result: LRSearchResult, folder: Path, step_tokens: int, picture: Path | None = None
) -> None:
    """Writes lr.json and the picture (lr.svg) into the folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json_dict(result, step_tokens), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "lr.json", text.encode())
    write_atomically(picture or folder / "lr.svg", svg_text(make_figure(result)).encode())


def make_figure(result: LRSearchResult) -> Figure:
    """The range test as a curve, the candidates as dots at their longest runs, and the band."""
    range_test, ceiling = result.range_test, 1.3 * result.start
    # What explodes leaves the picture at its top instead of flattening everything else.
    test_rates = [p.lr for p in range_test]
    rows = [row for row in result.rows if not row.diverged]
    bad_lrs = [row.lr for row in result.rows if row.diverged]
    losses, smoothed = (
        [min(getattr(p, n), ceiling) for p in range_test] for n in ("loss", "smoothed")
    )
    series = [
        ChartSeries(label="range test", x=test_rates, y=losses, kind="faint", colour=BLUE),
        ChartSeries(label="smoothed", x=test_rates, y=smoothed, colour=BLUE),
        ChartSeries(label="candidates", x=[r.lr for r in rows], y=[r.losses[-1] for r in rows],
                    colour=ORANGE, kind="dots"),
        ChartSeries(label="diverged", x=bad_lrs, y=[result.start] * len(bad_lrs), colour=RED,
                    kind="dots"),
    ]  # fmt: skip
    suggestion = result.suggestion
    return Figure(
        title=f"{TITLE}: " + ("no conclusion" if suggestion is None else f"{suggestion:.3g}"),
        x_label="learning rate",
        y_label="loss",
        series=series if bad_lrs else series[:-1],
        band=result.band,
        mark=None if suggestion is None else ("suggestion", suggestion),
    )


def _make_sweep(run: Run, budget: int, print_line: Callable[[str], None]) -> TrainFn:
    """Training runs of this run's model and data; tells every so often how many steps are done."""
    from cordee.training.lr_trial import measure_losses

    steps_done, last_report_s = 0, time.monotonic()

    def sweep(rates: Sequence[float], seed: int) -> list[float]:
        nonlocal steps_done, last_report_s
        losses: list[float] = measure_losses(run, rates, seed)
        steps_done += len(losses)
        if time.monotonic() - last_report_s > REPORT_EVERY_S:
            last_report_s = time.monotonic()
            print_line(f"{steps_done} of about {budget} steps done")
        return losses

    return sweep


def _with_elapsed_time(print_line: Callable[[str], None]) -> Callable[[str], None]:
    """Lines with the time since the start before them."""
    start_s = time.monotonic()
    return lambda text: print_line(
        f"{format_seconds(round(time.monotonic() - start_s)):>12}  {text}"
    )
