"""`cordee lr`: a learning rate by experiment on this run's own data and model, as a band.

Not here: the experiment (`optim/lr_search.py`) and training (`trial.losses_at`). It sets nothing:
it prints a table and the command that uses the rate, and it ends with 1 when the experiment cannot
tell. All parts of the update rule are scaled together, so muon's command names both its rates.
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
from cordee.config.presets import DEFAULT_LR
from cordee.config.ranges import MAX_COUNT, Range
from cordee.config.run import Run
from cordee.dist.streams import print_to_stderr
from cordee.launcher.run_paths import refuse_overwrite
from cordee.optim.lr_search import LRSearchResult, LRSearchSettings, TrainFn, find_lr
from cordee.planner.recipe import resolve_for_machine
from cordee.report.metrics_writer import write_atomically
from cordee.report.png import BLUE, ORANGE, RED, Plot, Series, draw
from cordee.report.summary import format_amount, format_seconds

REPORT_EVERY_S = 10.0
"""Seconds between lines that say how far the search is."""


def run(argv: Sequence[str]) -> int:
    """Searches, prints and writes lr.json and lr.png; 1 when nothing can be said."""
    defaults = LRSearchSettings(centre=1.0)
    arg_parser = make_parser(
        "lr",
        "Finds a learning rate by short experiments: a range test, then ever longer runs of ever\n"
        "fewer rates. A minute and a half for the default model on 2 cores. Sets nothing.",
        "cordee lr model.preset=small --steps 1500",
        "[CONFIG.toml] [key=value ...] [--steps N] [--seeds N] [--json]",
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
        "--json", action="store_true", help="print the finding as one JSON object"
    )
    args = parse_arguments(arg_parser, argv)
    check_flags(arg_parser, args.flags, {"steps": Range(1, MAX_COUNT), "seeds": Range(1, 1000)})
    from cordee.launcher.local_cluster import measure_cluster
    from cordee.launcher.prepare import read_vocabulary_size, resolve_config

    run_config = resolve_config(args.load().run)
    cluster, _ = measure_cluster(run_config.launch.probe)
    run_config, _ = resolve_for_machine(run_config, cluster, read_vocabulary_size(run_config))
    settings = LRSearchSettings(
        centre=peak_lr(run_config),
        steps=args.flags.steps,
        seeds=args.flags.seeds,
        first_seed=run_config.run.seed,
    )
    settings.check()
    _check_output_paths(Path(run_config.run.dir))
    print_line = _with_elapsed_time(print_to_stderr)
    result = find_lr(_make_sweep(run_config, settings.steps, print_line), settings, print_line)
    folder = Path(run_config.run.dir)
    tokens = run_config.batch.microbatch * run_config.batch.microbatches * run_config.data.sequence
    write_result(result, folder, tokens)
    command = train_command(result, run_config, args)
    if args.flags.json:
        print(json.dumps(to_json_dict(result, tokens) | {"command": command}, allow_nan=False))
    else:
        print(result_table(result, tokens))
        print(conclusion(result, command))
    print_to_stderr(f"wrote {folder / 'lr.json'} and {folder / 'lr.png'}")
    return 0 if result.conclusive else 1


def _check_output_paths(folder: Path) -> None:
    """ConfigError when lr.json or lr.png in the folder is somebody's own."""
    result_file, fix = folder / "lr.json", "run.dir=... another folder"
    refuse_overwrite(result_file, "file", _is_search_result, fix)
    refuse_overwrite(folder / "lr.png", "file", lambda _: result_file.is_file(), fix)


def _is_search_result(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"range_test", "conclusive"} <= document.keys()


def peak_lr(run: Run) -> float:
    """The rate that the run would use: its own, or the rule's default."""
    return DEFAULT_LR[run.optim.name] if run.optim.lr == "auto" else float(run.optim.lr)


def train_command(result: LRSearchResult, run: Run, args: ParsedArguments) -> str | None:
    """The command that trains with the suggestion; None when there is none."""
    if result.suggestion is None:
        return None
    other_overrides = [
        w for w in args.overrides if w.partition("=")[0] not in ("optim.lr", "optim.adam_lr")
    ]
    rates = [f"optim.lr={result.suggestion:.3g}"]
    if run.optim.name == "muon":
        rates.append(f"optim.adam_lr={run.optim.adam_lr * result.suggestion / peak_lr(run):.3g}")
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
    return {**_finite_or_none(asdict(result)), "step_tokens": step_tokens}


def write_result(result: LRSearchResult, folder: Path, step_tokens: int) -> None:
    """Writes lr.json and lr.png into the folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json_dict(result, step_tokens), indent=1, allow_nan=False) + "\n"
    for name, data in (("lr.json", text.encode()), ("lr.png", draw(make_plot(result)))):
        write_atomically(folder / name, data)


def make_plot(result: LRSearchResult) -> Plot:
    """The range test as a curve, the candidates as dots at their longest runs, and the band."""
    range_test, ceiling = result.range_test, 1.3 * result.start
    # What explodes leaves the picture at its top instead of flattening everything else.
    test_rates = [p.lr for p in range_test]
    rows = [row for row in result.rows if not row.diverged]
    bad_lrs = [row.lr for row in result.rows if row.diverged]
    title = "learning rate: no conclusion"
    if result.suggestion is not None:
        title = f"learning rate: {result.suggestion:.3g}"
    clipped_losses = [min(p.loss, ceiling) for p in range_test]
    dots = [Series(label="candidates", x=[r.lr for r in rows], y=[r.losses[-1] for r in rows],
                   colour=ORANGE, kind="dots")]  # fmt: skip
    if bad_lrs:
        dots.append(Series(label="diverged", x=bad_lrs, y=[result.start] * len(bad_lrs), colour=RED,
                           kind="dots"))  # fmt: skip
    return Plot(
        title=title,
        x_label="learning rate",
        y_label="loss",
        series=[
            Series(label="range test", x=test_rates, y=clipped_losses, kind="faint", colour=BLUE),
            Series(
                label="smoothed", x=test_rates, y=[min(p.smoothed, ceiling) for p in range_test]
            ),
            *dots,
        ],
        band=result.band,
        mark=None if result.suggestion is None else ("suggestion", result.suggestion),
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


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite_or_none(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
