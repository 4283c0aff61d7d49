"""`cordee lr`: a learning rate by experiment on this run's own data and model, as a band.

Not here: the experiment (`optim/search.py`) and training (`trial.losses_at`). It sets nothing: it
prints a table and the command that uses the rate, and it ends with 1 when the experiment cannot
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

from cordee.cli.arguments import Words, check_flags, parser, read, say
from cordee.cli.places import refuse_other
from cordee.config.presets import DEFAULT_LR
from cordee.config.ranges import MANY, Range
from cordee.config.run import Run
from cordee.metrics.png import BLUE, ORANGE, RED, Plot, Series, draw
from cordee.metrics.report import amount, seconds
from cordee.metrics.sinks import write_whole
from cordee.optim.search import Finding, SearchSettings, Sweep, find_lr
from cordee.plan.recipe import for_machine

EVERY_S = 10.0
"""Seconds between lines that say how far the search is."""


def run(argv: Sequence[str]) -> int:
    """Searches, prints and writes lr.json and lr.png; 1 when nothing can be said."""
    default = SearchSettings(centre=1.0)
    made = parser(
        "lr",
        "Finds a learning rate by short experiments: a range test, then ever longer runs of ever\n"
        "fewer rates. A minute and a half for the default model on 2 cores. Sets nothing.",
        "cordee lr model.preset=small --steps 1500",
        "[CONFIG.toml] [key=value ...] [--steps N] [--seeds N] [--json]",
    )
    made.add_argument(
        "--steps", type=int, default=default.steps, metavar="N",
        help=f"optimiser steps of all experiments together (default {default.steps})",
    )  # fmt: skip
    made.add_argument(
        "--seeds", type=int, default=default.seeds, metavar="N",
        help=f"runs of each rate (default {default.seeds})",
    )  # fmt: skip
    made.add_argument("--json", action="store_true", help="print the finding as one JSON object")
    words = read(made, argv)
    check_flags(made, words.flags, {"steps": Range(1, MANY), "seeds": Range(1, 1000)})
    from cordee.begin import settle, vocabulary_of
    from cordee.machine import measured_cluster

    wanted = settle(words.load().run)
    cluster, _ = measured_cluster(wanted.launch.probe)
    wanted, _ = for_machine(wanted, cluster, vocabulary_of(wanted))
    settings = SearchSettings(
        centre=peak(wanted),
        steps=words.flags.steps,
        seeds=words.flags.seeds,
        first_seed=wanted.run.seed,
    )
    settings.check()
    _check_places(Path(wanted.run.dir))
    tell = _clocked(say)
    found = find_lr(_sweep(wanted, settings.steps, tell), settings, tell)
    folder = Path(wanted.run.dir)
    tokens = wanted.batch.microbatch * wanted.batch.microbatches * wanted.data.sequence
    write(found, folder, tokens)
    command = use(found, wanted, words)
    if words.flags.json:
        print(json.dumps(plain(found, tokens) | {"command": command}, allow_nan=False))
    else:
        print(table(found, tokens))
        print(conclusion(found, command))
    say(f"wrote {folder / 'lr.json'} and {folder / 'lr.png'}")
    return 0 if found.conclusive else 1


def _check_places(folder: Path) -> None:
    """ConfigError when lr.json or lr.png in the folder is somebody's own."""
    findings, fix = folder / "lr.json", "run.dir=... another folder"
    refuse_other(findings, "file", _holds_finding, fix)
    refuse_other(folder / "lr.png", "file", lambda _: findings.is_file(), fix)


def _holds_finding(path: Path) -> bool:
    try:
        plain = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(plain, dict) and {"range_test", "conclusive"} <= plain.keys()


def peak(run: Run) -> float:
    """The rate that the run would use: its own, or the rule's default."""
    return DEFAULT_LR[run.optim.name] if run.optim.lr == "auto" else float(run.optim.lr)


def use(found: Finding, run: Run, words: Words) -> str | None:
    """The command that trains with the suggestion; None when there is none."""
    if found.suggestion is None:
        return None
    own = [w for w in words.overrides if w.partition("=")[0] not in ("optim.lr", "optim.adam_lr")]
    rates = [f"optim.lr={found.suggestion:.3g}"]
    if run.optim.name == "muon":
        rates.append(f"optim.adam_lr={run.optim.adam_lr * found.suggestion / peak(run):.3g}")
    return " ".join(["cordee train", *([words.file] if words.file else []), *own, *rates])


def table(found: Finding, step_tokens: int) -> str:
    """A row for each rate: its loss after each length of run, and whether it is in the band."""
    lengths = sorted({steps for row in found.rows for steps in row.steps})
    heads = [f"{amount(steps * step_tokens)} tokens" for steps in lengths]
    wide = max([12, *map(len, heads)])
    out = []
    if found.rows:
        out.append("learning rate  " + "  ".join(f"{head:>{wide}}" for head in heads))
    for row in found.rows:
        by_steps = dict(zip(row.steps, row.losses, strict=True))
        cells = []
        for steps in lengths:
            loss = by_steps.get(steps)
            shown = "" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            cells.append(f"{shown:>{wide}}")
        inside = found.band is not None and found.band[0] <= row.lr <= found.band[1]
        word = "best" if row.lr == found.best else "in the band" if inside else ""
        word = "diverged" if row.diverged and "diverged" not in cells[-1] else word
        out.append(f"{row.lr:>13.3g}  {'  '.join(cells)}  {word}".rstrip())
    return "\n".join(out)


def conclusion(found: Finding, command: str | None) -> str:
    """The band, the suggestion and the command; or the reason why there is none."""
    spent = f"({found.steps_used} steps, noise of one loss {found.noise:.2g})"
    if not found.conclusive or found.band is None:
        return f"inconclusive: {found.reason} {spent}"
    longest = max(row.steps[-1] for row in found.rows)
    return "\n".join(
        [
            f"band        {found.band[0]:.3g} to {found.band[1]:.3g}  {spent}",
            f"suggestion  {found.suggestion:.3g}  (seen over {longest} steps; a much longer run"
            " rather wants the lower end)",
            f"use it      {command}",
        ]
    )


def plain(found: Finding, step_tokens: int) -> dict[str, Any]:
    """The finding as JSON can hold it: what is not finite is null."""
    return {**_finite(asdict(found)), "step_tokens": step_tokens}


def write(found: Finding, folder: Path, step_tokens: int) -> None:
    """Writes lr.json and lr.png into the folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(found, step_tokens), indent=1, allow_nan=False) + "\n"
    for name, data in (("lr.json", text.encode()), ("lr.png", draw(plot(found)))):
        write_whole(folder / name, data)


def plot(found: Finding) -> Plot:
    """The range test as a curve, the candidates as dots at their longest runs, and the band."""
    test, ceiling = found.range_test, 1.3 * found.start
    # What explodes leaves the picture at its top instead of flattening everything else.
    xs = [p.lr for p in test]
    rows = [row for row in found.rows if not row.diverged]
    out = [row.lr for row in found.rows if row.diverged]
    title = "learning rate: no conclusion"
    if found.suggestion is not None:
        title = f"learning rate: {found.suggestion:.3g}"
    held = [min(p.loss, ceiling) for p in test]
    dots = [Series(label="candidates", x=[r.lr for r in rows], y=[r.losses[-1] for r in rows],
                   colour=ORANGE, kind="dots")]  # fmt: skip
    if out:
        dots.append(Series(label="diverged", x=out, y=[found.start] * len(out), colour=RED,
                           kind="dots"))  # fmt: skip
    return Plot(
        title=title,
        x_label="learning rate",
        y_label="loss",
        series=[
            Series(label="range test", x=xs, y=held, kind="faint", colour=BLUE),
            Series(label="smoothed", x=xs, y=[min(p.smoothed, ceiling) for p in test]),
            *dots,
        ],
        band=found.band,
        mark=None if found.suggestion is None else ("suggestion", found.suggestion),
    )


def _sweep(run: Run, budget: int, tell: Callable[[str], None]) -> Sweep:
    """Training runs of this run's model and data; tells every so often how many steps are done."""
    from cordee.trial import losses_at

    done, told_at = 0, time.monotonic()

    def sweep(rates: Sequence[float], seed: int) -> list[float]:
        nonlocal done, told_at
        losses: list[float] = losses_at(run, rates, seed)
        done += len(losses)
        if time.monotonic() - told_at > EVERY_S:
            told_at = time.monotonic()
            tell(f"{done} of about {budget} steps done")
        return losses

    return sweep


def _clocked(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Lines with the time since the start before them."""
    began = time.monotonic()
    return lambda text: tell(f"{seconds(round(time.monotonic() - began)):>12}  {text}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
