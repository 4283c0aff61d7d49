"""`cordee data ledger RUN`: which samples a step used, which steps used a sample, and the proof."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cordee.begin import DATA_FOLDER
from cordee.cli.places import find_run
from cordee.config.load import RUN_FILE, load
from cordee.data.ledger import prove, uses_of
from cordee.data.order import Order
from cordee.data.source import is_dataset, open_dataset
from cordee.errors import ConfigError
from cordee.metrics.sinks import read_lines


def tell(word: str, flags: Namespace) -> int:
    """Prints what is asked of the run `word`; 1 when its records do not prove exactly-once."""
    folder = find_run("data ledger", word)
    order, rows = order_of(folder), read_lines(folder / "metrics.jsonl")
    steps = max((int(row["step"]) for row in rows), default=0)
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
        return _print({"sample": flags.sample, "steps": steps, "uses": uses}, flags.json)
    proof = prove(order, rows)
    known = {"holds": proof.holds, "samples": order.rows, **asdict(proof)}
    _print({**known, "epochs": round(proof.epochs, 4)}, flags.json)
    return 0 if proof.holds else 1


def order_of(folder: Path) -> Order:
    """The order of a run's samples, from its folder; ConfigError when its samples are not there."""
    run = load(str(folder / RUN_FILE)).run
    place = next(
        (p for p in (folder / DATA_FOLDER, Path(run.data.path)) if is_dataset(p)), None
    )  # fmt: skip
    if place is None:
        raise ConfigError(
            "the run's samples were brought by a program: their number is not in its folder",
            values={"RUN": str(folder), "data.path": run.data.path},
            fix="cordee.data.ledger.prove with their Order",
        )
    source = open_dataset(place, "train", verify=False)
    batch = run.batch
    count = source.rows(run.data.sequence)
    return Order(run.run.seed, count, batch.microbatch, batch.microbatches)


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
