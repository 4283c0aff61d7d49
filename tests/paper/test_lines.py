"""A run's JSON files after anything: what cannot be read is passed over, and nothing waits."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cordee.metrics import sinks
from cordee.metrics.lines import DIGITS, LINE_BYTES, document, records, step_of
from cordee.metrics.page import page
from cordee.metrics.records import read_run
from cordee.metrics.report import summarise
from cordee.metrics.sinks import JsonLines, cut_after, last_event, last_step, read_lines

BAD = (
    b'{"step": 1e999}', b'{"step": NaN, "event": "evaluated", "held_out_loss": Infinity}',
    b'{"step": -4}', b'{"step": "7"}', b'{"step": true}', b'{"loss": 1.0}', b"[" * 100_000,
    b'{"step": ' + b"9" * 6000 + b"}", b'{"step": ' + b"9" * (DIGITS + 1) + b"}",
    b'{"step": 99999999999999999999}', b"\xff\xfe\x00{", b'{"st', b"[1, 2]", b"null", b"",
    b'{"event": "quorum", "members": [3, {}], "time": "2020-01-01T00:00:00", "seconds": 1e999}',
    b'{"event": "resumed", "step": [], "members": 4, "time": 5, "entropy_bits": "x"}',
)  # fmt: skip
"""Lines that no writer of ours makes, or only half of."""


def row(step: int) -> bytes:
    return json.dumps({"step": step, "loss": 1.0, "event": "x"}).encode()


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_line_that_is_no_record_is_passed_over(bad: bytes, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "layers.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join([row(1), bad, row(2), row(3), bad]) + b"\n")
    (tmp_path / "plan.json").write_bytes(bad)
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 3
    assert [r["step"] for r in read_lines(path) if r.get("event") == "x"] == [1, 2, 3]
    found = read_run(tmp_path)
    assert found.steps == [1, 2, 3]
    assert "</html>" in page(found, summarise(found))
    sink = JsonLines(path)
    sink.cut(2)
    sink.write({"step": 3})
    assert [step for r in read_lines(path) if (step := step_of(r))] == [1, 2, 3]


def test_steps_that_go_back_and_forth_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(row(n) + b"\n" for n in (1, 5, 2, 3, 6, 4)))
    cut_after(path, 3)
    assert [r["step"] for r in read_lines(path)] == [1, 2, 3]


def test_a_line_without_end_is_no_record_and_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(row(1) + b"\n" + b"x" * (LINE_BYTES + 7) + b"\n" + row(2) + b"\n")
    assert [r["step"] for r in records(path)] == [1, 2]


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo, "folder": os.mkdir, "endless": lambda p: p.symlink_to("/dev/zero"),
    "dangling": lambda p: p.symlink_to(p.with_name("nothing")),
    "loop": lambda p: p.symlink_to(p),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_read_as_nothing_and_set_aside(kind: str, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "layers.jsonl", "events.jsonl", "plan.json", "run.toml"):
        NO_FILES[kind](tmp_path / name)
    found = read_run(tmp_path)
    assert not found.steps and not found.events and document(tmp_path / "plan.json") == {}
    assert last_event(tmp_path) == {} and last_step(tmp_path / "metrics.jsonl") == 0
    sink = JsonLines(tmp_path / "metrics.jsonl")
    aside = sink.set_aside()
    assert aside == ("" if kind == "dangling" else "metrics.jsonl.aside-1")
    sink.take_over()
    sink.write({"step": 1})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}], sink.failure
    assert not aside or os.path.lexists(tmp_path / aside)


def test_a_cut_needs_no_room_and_is_owed_while_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(row(n) + b"\n" for n in (1, 5, 2, 3, 6)))
    sink = JsonLines(path)
    monkeypatch.setattr(sinks, "write_whole", no_room)
    sink.cut(3)
    sink.write({"step": 4})
    assert sink.failure and [r["step"] for r in read_lines(path)] == [1, 5, 2, 3, 6]
    monkeypatch.undo()
    sink.write({"step": 5})
    assert not sink.failure and [r["step"] for r in read_lines(path)] == [1, 2, 3, 4, 5]
