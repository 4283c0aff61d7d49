"""`cordee data ledger RUN`: which samples a step used, which steps used a sample, and the proof."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cordee.begin import data_place
from cordee.cli.places import find_run
from cordee.config.load import RUN_FILE, load
from cordee.config.run import Run
from cordee.data.ledger import prove, uses_of
from cordee.data.manifest import DatasetInfo, is_dataset, read_info
from cordee.data.order import Order
from cordee.data.source import open_dataset
from cordee.errors import ConfigError
from cordee.metrics.lines import step_of
from cordee.metrics.sinks import read_lines


def tell(word: str, flags: Namespace) -> int:
    """Prints what is asked of the run `word`; 1 when its records do not prove exactly-once."""
    folder = find_run("data ledger", word)
    run = load(str(folder / RUN_FILE)).run
    info = dataset_of(run, folder)
    order, found = order_of(run, info), read_lines(folder / "metrics.jsonl")
    rows = [row for row in found if step_of(row)]
    steps = max((row["step"] for row in rows), default=0)
    if flags.step is not None and flags.sample is not None:
        raise ConfigError(
            "a step or a sample, not both",
            values={"--step": flags.step, "--sample": flags.sample},
            fix=f"--step {flags.step}",
        )
    if flags.step is not None:
        return _print(_of_step(order, steps, flags.step, rows), flags.json)
    if flags.sample is not None:
        uses = [asdict(use) for use in uses_of(order, flags.sample, steps)]
        source = _source_of(order, info, flags.sample)
        return _print({"sample": flags.sample, **source, "steps": steps, "uses": uses}, flags.json)
    proof = prove(order, rows)
    known = {"holds": proof.holds, "samples": order.rows, **asdict(proof)}
    known |= {"epochs": round(proof.epochs, 4), **_drawn(order, info, proof.steps)}
    _print(known, flags.json)
    return 0 if proof.holds else 1


def _source_of(order: Order, info: DatasetInfo, sample: int) -> dict[str, Any]:
    """Which source of a mixture a sample is of, and its number there."""
    if order.mixture is None:
        return {}
    number = order.mixture.source_of(sample)
    return {"source": info.parts[number].name, "row": sample - order.mixture.starts[number]}


def _drawn(order: Order, info: DatasetInfo, steps: int) -> dict[str, Any]:
    """How often each source of a mixture was drawn: samples, and epochs of its own rows."""
    if order.mixture is None:
        return {}
    drawn = order.mixture.drawn(steps * order.step_rows)
    each = zip(info.parts, order.mixture.rows, drawn, strict=True)
    return {
        "sources": [
            {"name": part.name, "weight": part.weight, "drawn": n, "epochs": round(n / rows, 4)}
            for part, rows, n in each
        ]
    }


def dataset_of(run: Run, folder: Path) -> DatasetInfo:
    """The dataset of the run in `folder`; ConfigError when its samples are not there."""
    place = data_place(run, folder)
    if not is_dataset(place):
        raise ConfigError(
            "the run's samples were brought by a program: their number is not in its folder",
            values={"RUN": str(folder), "data.path": run.data.path},
            fix="cordee.data.ledger.prove with their Order",
        )
    return read_info(place)


def order_of(run: Run, info: DatasetInfo) -> Order:
    """The order of a run's samples."""
    source, batch = open_dataset(info.folder, "train", verify=False), run.batch
    return source.order(run.run.seed, run.data.sequence, batch.microbatch, batch.microbatches)


def _of_step(order: Order, steps: int, step: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not 1 <= step <= steps:
        raise ConfigError(
            "the run has no such step",
            values={"--step": step, "steps": steps},
            fix=f"--step {min(max(1, step), steps)}" if steps else "a run with a step",
        )
    taken = [order.rows_of(step - 1, m).tolist() for m in range(order.microbatches)]
    skipped = any(row["step"] == step and row.get("skipped") for row in rows)
    return {"step": step, "skipped": skipped, "samples": taken}


def _print(known: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(known))
        return 0
    width = max(map(len, known))
    for key, value in known.items():
        lines = value if isinstance(value, list) and value else [value]
        for number, line in enumerate(lines):
            shown = "none" if line == [] else line
            if isinstance(shown, dict):
                shown = ", ".join(f"{name} {part}" for name, part in shown.items())
            elif isinstance(shown, list):
                shown = f"microbatch {number}: " + " ".join(map(str, shown))
            print(f"{key if number == 0 else '':<{width}}  {shown}")
    return 0
