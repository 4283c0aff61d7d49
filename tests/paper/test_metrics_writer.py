"""Records that survive a disk that refuses and a writer that is killed."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cordee.report.metrics_writer import JsonLinesWriter, truncate_after_step
from cordee.report.reader import last_event, read_records
from cordee.report.screen import format_row, format_short_row


@contextmanager
def files_no_longer_than(size_bytes: int) -> Iterator[None]:
    """The kernel refuses writes beyond it."""
    previous_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, previous_limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous_limit)
        signal.signal(signal.SIGXFSZ, previous_handler)


def test_no_record_is_lost_or_halved_while_the_disk_refuses(tmp_path: Path) -> None:
    writer = JsonLinesWriter(tmp_path / "rows.jsonl")
    for step in range(200):
        if step == 50:
            with files_no_longer_than(1000):
                for inner_step in range(50, 150):
                    writer.write({"step": inner_step, "text": "x" * 30})
                assert writer.failure.startswith("rows.jsonl")
                # What stands in the file is whole, to the byte.
                lines = (tmp_path / "rows.jsonl").read_text().splitlines()
                assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
                writer.sync()
        if not 50 <= step < 150:
            writer.write({"step": step, "text": "x" * 30})
    assert writer.failure == ""
    assert [row["step"] for row in read_records(tmp_path / "rows.jsonl")] == list(range(200))


def test_a_line_that_was_cut_by_a_kill_goes_before_the_next_is_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for partial_line in ('{"event": "half', '{"event": "' + "long" * 5000):
        path.write_text('{"event": "one"}\n' + partial_line)
        JsonLinesWriter(path).write({"event": "two"})
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == [
            "one", "two",
        ]  # fmt: skip
    path.write_text('{"event"')
    JsonLinesWriter(path).write({"event": "three"})
    assert last_event(tmp_path) == {"event": "three"}
    assert len(path.read_text().splitlines()) == 1


def test_what_is_kept_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(9)) + '{"st')
    truncate_after_step(path, 3)
    assert [row["step"] for row in read_records(path)] == [0, 1, 2, 3]
    assert path.read_text().count("\n") == 4


def test_a_line_has_room_beside_a_bar_of_8_in_80_columns() -> None:
    row = {
        "step": 12345, "loss": 2.2346, "bits_per_byte": 3.2239, "grad_norm": None, "lr": 4.2e-4,
        "tokens_per_s": 47_900.0, "skipped": False,
    }  # fmt: skip
    assert format_short_row(row, 3605.4) == (
        "12345 loss 2.235 bpb 3.224 gnorm   nan lr 4.2e-04 47.9k/s 60:05"
    )
    assert 8 + len(" 100% ") + len(format_short_row(row, 3605.4)) <= 80
    assert format_row({**row, "skipped": True}, 0.0).endswith("0:00 left  SKIPPED")


def test_a_frozen_writer_wakes_up_and_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    writer_1 = JsonLinesWriter(path)
    writer_1.claim_file()
    for step in (1, 2, 3):
        writer_1.write({"step": step})
    with open(path, "ab", buffering=0) as stream:  # frozen between opening and writing
        writer_2 = JsonLinesWriter(path)
        writer_2.claim_file()
        writer_2.truncate_after(2)
        stream.write(b'{"step": 3, "by": "zombie"}\n')
    writer_1.write({"step": 4, "by": "zombie"})
    assert "another host" in writer_1.failure
    writer_2.write({"step": 3})
    assert read_records(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    writer_1.claim_file()  # it is let in again and has the first rank
    writer_1.write({"step": 4})
    assert [row["step"] for row in read_records(path)] == [1, 2, 3, 4]
