"""A run's JSON files after anything: what cannot be read is passed over, and nothing waits."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cordee.report import metrics_writer
from cordee.report.html import report_page
from cordee.report.metrics_writer import JsonLinesWriter, truncate_after_step
from cordee.report.reader import (
    MAX_DIGITS,
    MAX_LINE_BYTES,
    iter_records,
    last_event,
    last_step,
    read_json_object,
    read_records,
    read_run,
    record_step,
)
from cordee.report.summary import summarise

BAD_LINES = (
    b'{"step": 1e999}', b'{"step": NaN, "event": "evaluated", "held_out_loss": Infinity}',
    b'{"step": -4}', b'{"step": "7"}', b'{"step": true}', b'{"loss": 1.0}', b"[" * 100_000,
    b'{"step": ' + b"9" * 6000 + b"}", b'{"step": ' + b"9" * (MAX_DIGITS + 1) + b"}",
    b'{"step": 99999999999999999999}', b"\xff\xfe\x00{", b'{"st', b"[1, 2]", b"null", b"",
    b'{"event": "quorum", "members": [3, {}], "time": "2020-01-01T00:00:00", "seconds": 1e999}',
    b'{"event": "resumed", "step": [], "members": 4, "time": 5, "entropy_bits": "x"}',
)  # fmt: skip
"""Lines that no writer of ours makes, or only half of."""


def row_bytes(step: int) -> bytes:
    return json.dumps({"step": step, "loss": 1.0, "event": "x"}).encode()


@pytest.mark.parametrize("bad_line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_is_no_record_is_passed_over(bad_line: bytes, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "layers.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes(
            b"\n".join([row_bytes(1), bad_line, row_bytes(2), row_bytes(3), bad_line]) + b"\n"
        )
    (tmp_path / "plan.json").write_bytes(bad_line)
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 3
    assert [r["step"] for r in read_records(path) if r.get("event") == "x"] == [1, 2, 3]
    run_records = read_run(tmp_path)
    assert run_records.steps == [1, 2, 3]
    assert "</html>" in report_page(run_records, summarise(run_records))
    writer = JsonLinesWriter(path)
    writer.truncate_after(2)
    writer.write({"step": 3})
    assert [step for r in read_records(path) if (step := record_step(r))] == [1, 2, 3]


def test_steps_that_go_back_and_forth_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(row_bytes(n) + b"\n" for n in (1, 5, 2, 3, 6, 4)))
    truncate_after_step(path, 3)
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]


def test_a_line_without_end_is_no_record_and_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(
        row_bytes(1) + b"\n" + b"x" * (MAX_LINE_BYTES + 7) + b"\n" + row_bytes(2) + b"\n"
    )
    assert [r["step"] for r in iter_records(path)] == [1, 2]


NON_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo, "folder": os.mkdir, "endless": lambda p: p.symlink_to("/dev/zero"),
    "dangling": lambda p: p.symlink_to(p.with_name("nothing")),
    "loop": lambda p: p.symlink_to(p),
}  # fmt: skip


@pytest.mark.parametrize("kind", NON_FILES)
def test_what_is_no_file_is_read_as_nothing_and_set_aside(kind: str, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "layers.jsonl", "events.jsonl", "plan.json", "run.toml"):
        NON_FILES[kind](tmp_path / name)
    run_records = read_run(tmp_path)
    assert (
        not run_records.steps
        and not run_records.events
        and read_json_object(tmp_path / "plan.json") == {}
    )
    assert last_event(tmp_path) == {} and last_step(tmp_path / "metrics.jsonl") == 0
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    aside_name = writer.move_obstacle()
    assert aside_name == ("" if kind == "dangling" else "metrics.jsonl.aside-1")
    writer.claim_file()
    writer.write({"step": 1})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1}], writer.failure
    assert not aside_name or os.path.lexists(tmp_path / aside_name)


def test_a_cut_needs_no_room_and_is_owed_while_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_no_space(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(row_bytes(n) + b"\n" for n in (1, 5, 2, 3, 6)))
    writer = JsonLinesWriter(path)
    monkeypatch.setattr(metrics_writer, "write_atomically", raise_no_space)
    writer.truncate_after(3)
    writer.write({"step": 4})
    assert writer.failure and [r["step"] for r in read_records(path)] == [1, 5, 2, 3, 6]
    monkeypatch.undo()
    writer.write({"step": 5})
    assert not writer.failure and [r["step"] for r in read_records(path)] == [1, 2, 3, 4, 5]
