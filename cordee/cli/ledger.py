"""`cordee data ledger RUN`: which samples a step used, which steps used a sample, and the proof."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cordee.config.load import RUN_FILE, load
from cordee.config.run import Run
from cordee.data.dataset import open_dataset
from cordee.data.ledger import check_ledger, find_uses
from cordee.data.manifest import DatasetInfo, is_dataset, read_info
from cordee.data.order import SampleOrder
from cordee.errors import ConfigError
from cordee.launcher.prepare import dataset_dir_of
from cordee.launcher.run_paths import find_run
from cordee.report.reader import read_records, record_step


def print_ledger(run_word: str, flags: Namespace) -> int:
    """Prints what is asked of the run `run_word`; 1 when its records do not prove exactly-once."""
    folder = find_run("data ledger", run_word)
    run = load(str(folder / RUN_FILE)).run
    info = read_run_dataset(run, folder)
    order, records = make_order(run, info), read_records(folder / "metrics.jsonl")
    rows = [row for row in records if record_step(row)]
    steps = max((row["step"] for row in rows), default=0)
    if flags.step is not None and flags.sample is not None:
        raise ConfigError(
            "a step or a sample, not both",
            values={"--step": flags.step, "--sample": flags.sample},
            fix=f"--step {flags.step}",
        )
    if flags.step is not None:
        return _print_fields(_step_samples(order, steps, flags.step, rows), flags.json)
    if flags.sample is not None:
        uses = [asdict(use) for use in find_uses(order, flags.sample, steps)]
        source = _source_of(order, info, flags.sample)
        return _print_fields(
            {"sample": flags.sample, **source, "steps": steps, "uses": uses}, flags.json
        )
    proof = check_ledger(order, rows)
    fields = {"holds": proof.is_exactly_once, "samples": order.rows, **asdict(proof)}
    fields |= {"epochs": round(proof.epochs, 4), **_source_counts(order, info, proof.steps)}
    _print_fields(fields, flags.json)
    return 0 if proof.is_exactly_once else 1


def _source_of(order: SampleOrder, info: DatasetInfo, sample: int) -> dict[str, Any]:
    """Which source of a mixture a sample is of, and its number there."""
    if order.mixture is None:
        return {}
    number = order.mixture.source_index(sample)
    return {"source": info.parts[number].name, "row": sample - order.mixture.starts[number]}


def _source_counts(order: SampleOrder, info: DatasetInfo, steps: int) -> dict[str, Any]:
    """How often each source of a mixture was drawn: samples, and epochs of its own rows."""
    if order.mixture is None:
        return {}
    draw_counts = order.mixture.counts_below(steps * order.step_rows)
    part_counts = zip(info.parts, order.mixture.rows, draw_counts, strict=True)
    return {
        "sources": [
            {"name": part.name, "weight": part.weight, "drawn": n, "epochs": round(n / rows, 4)}
            for part, rows, n in part_counts
        ]
    }


def read_run_dataset(run: Run, folder: Path) -> DatasetInfo:
    """The dataset of the run in `folder`; ConfigError when its samples are not there."""
    dataset_dir = dataset_dir_of(run, folder)
    if not is_dataset(dataset_dir):
        raise ConfigError(
            "the run's samples were brought by a program: their number is not in its folder",
            values={"RUN": str(folder), "data.path": run.data.path},
            fix="cordee.data.ledger.check_ledger with their SampleOrder",
        )
    return read_info(dataset_dir)


def make_order(run: Run, info: DatasetInfo) -> SampleOrder:
    """The order of a run's samples."""
    source, batch = open_dataset(info.folder, "train", verify=False), run.batch
    return source.sample_order(
        run.run.seed, run.data.sequence, batch.microbatch, batch.microbatches
    )


def _step_samples(
    order: SampleOrder, steps: int, step: int, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    if not 1 <= step <= steps:
        raise ConfigError(
            "the run has no such step",
            values={"--step": step, "steps": steps},
            fix=f"--step {min(max(1, step), steps)}" if steps else "a run with a step",
        )
    samples = [order.microbatch_row_ids(step - 1, m).tolist() for m in range(order.microbatches)]
    is_skipped = any(row["step"] == step and row.get("skipped") for row in rows)
    return {"step": step, "skipped": is_skipped, "samples": samples}


def _print_fields(fields: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print(json.dumps(fields))
        return 0
    width = max(map(len, fields))
    for key, value in fields.items():
        lines = value if isinstance(value, list) and value else [value]
        for number, line in enumerate(lines):
            text = "none" if line == [] else line
            if isinstance(text, dict):
                text = ", ".join(f"{name} {part}" for name, part in text.items())
            elif isinstance(text, list):
                text = f"microbatch {number}: " + " ".join(map(str, text))
            print(f"{key if number == 0 else '':<{width}}  {text}")
    return 0
